"""The two attentions of Perceiver: latents read a long input, and latents read each other."""

import weakref

import torch
from torch import nn

from .. import ops
from ..ops._shared.arguments import autocast_dtype, check_key_mask, check_number
from ..ops.latent import api, decode, plan
from .backend import Linear, WithBackend, eager_attention, split_heads


class LatentCrossAttention(WithBackend):
    """Queries attend to another array: Attn(LN(z), LN(x)) with projections. Few latents to a long input (Perceiver, Jaegle et
    al. 2021, section 3.1), or one or many output queries to the latents (Perceiver IO, Jaegle et al. 2022, section 3.2).

        Q = LN_q(z) Wq + bq    K = LN_x([x ; position]) Wk + bk    V = LN_x([x ; position]) Wv + bv
        out = concat_h(softmax(Q_h K_h^T / sqrt(d)) V_h) Wo + bo

    Residual and MLP are the caller's. Which projections are made and which are absorbed by the other side is chosen by counts
    of operations (`ops/latent/plan.py`): `ops.latent_attention` does everything between Q and Wo, or `ops.latent_decode`
    everything but K and V, from the weights of the sub-modules, which are therefore not called themselves: shard (FSDP) or
    hook the attention as a whole.

    In evaluation and without gradients, queries that are the same tensor at every call (a parameter, a view of it) are
    normalised, projected and absorbed once. What they become is kept until they or a weight change, as far as torch's version
    counters tell; `train()` forgets it, for the sake of changes through `.data`, which they do not count.

    Args:
        query_channels: Dq.
        input_channels: C, content and position together.
        num_heads: H; head h owns the contiguous channels h d to (h+1) d - 1.
        qk_channels: channels of Q and K in all heads together; default by `shape_for_attention`.
        v_channels: channels of V in all heads together; default `qk_channels`.
        output_channels: default Dq.
        shape_for_attention: "kv" takes `input_channels` for `qk_channels`, "q" takes `query_channels`.
        eps: of both layer norms.
        dropout: probability of dropping an attention weight while training.
        backend: a backend of `ops.latent_attention`, or "eager": plain PyTorch with SDPA.

    Raises ValueError for sizes that are not positive, heads that do not divide the channels, unknown names.
    """

    _kept = None  # the owners of what was absorbed, their state, and what became of them

    def __init__(
        self,
        query_channels,
        input_channels,
        *,
        num_heads=1,
        qk_channels=None,
        v_channels=None,
        output_channels=None,
        shape_for_attention="kv",
        eps=1e-5,
        dropout=0.0,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__(backend)
        if shape_for_attention not in ("kv", "q"):
            raise ValueError(f"shape_for_attention is {shape_for_attention!r}; allowed are 'kv' and 'q'")
        if qk_channels is None:
            qk_channels = input_channels if shape_for_attention == "kv" else query_channels
        v_channels = qk_channels if v_channels is None else v_channels
        output_channels = query_channels if output_channels is None else output_channels
        _check_sizes(
            num_heads,
            eps,
            dropout,
            query_channels=query_channels,
            input_channels=input_channels,
            output_channels=output_channels,
            qk_channels=qk_channels,
            v_channels=v_channels,
        )
        self.num_heads, self.dropout = num_heads, dropout
        factory = {"device": device, "dtype": dtype}
        self.query_norm = nn.LayerNorm(query_channels, eps=eps, **factory)
        self.input_norm = nn.LayerNorm(input_channels, eps=eps, **factory)
        self.query = Linear(query_channels, qk_channels, backend=backend, **factory)
        self.key = Linear(input_channels, qk_channels, backend=backend, **factory)
        self.value = Linear(input_channels, v_channels, backend=backend, **factory)
        self.output = Linear(v_channels, output_channels, backend=backend, **factory)

    def forward(self, queries, inputs, *, position=None, key_mask=None, query_position=None, query_mask=None, group=None):
        """Reads `inputs` into the queries: an encoder's latents, or a decoder's outputs, which read the latents.

        Args:
            queries: (B, N, Cq), or (1, N, Cq) shared by the batch.
            inputs: (B, M, Cx).
            position: (M, Cp) with Cx + Cp = C, shared by the batch and never copied per example.
            key_mask: bool (B, M), True where an input may be attended. An example without any yields the bias of `output`.
            query_position: (N, Dp) with Cq + Dp = Dq, the last channels of the queries, shared by the batch.
            query_mask: bool (B, N), True for queries that count. Others yield the bias of `output`, as in DeepMind's code.
            group: a torch.distributed group whose ranks hold `inputs`, `position` and `key_mask` in parts, M of each rank its
                own: `ops.latent_attention_sharded`, which says what gradients are. Queries and weights are the same on all.

        Returns:
            (B, N, output_channels).
        """
        self._check(queries, inputs, position, query_position, query_mask)
        if group is not None:
            return self._finish(self._sharded(queries, inputs, position, key_mask, query_position, group), query_mask)
        dropout = self._dropout()
        if self.backend != "eager" and dropout == 0.0 and self._decodes(queries, inputs):
            return self._decode(queries, inputs, position, key_mask, query_position, query_mask)
        out = self._from_kept(queries, inputs, position, key_mask, query_position)
        if out is None:
            q = self._project_queries(queries, query_position)
            if self.backend == "eager":
                out = self._eager(q, inputs, position, key_mask)
            else:
                sides = {"position": position, "key_mask": key_mask, "dropout_p": dropout}
                out = ops.latent_attention(q, inputs, self.key.weight, self.value.weight, **sides, **self._options())
        return self._finish(out, query_mask)

    def _sharded(self, queries, inputs, position, key_mask, query_position, group):
        if self.backend == "eager":
            raise ValueError("backend is 'eager'; with a group it must be one of ops.latent_attention, such as 'auto'")
        return ops.latent_attention_sharded(
            self._project_queries(queries, query_position),
            inputs,
            self.key.weight,
            self.value.weight,
            position=position,
            key_mask=key_mask,
            dropout_p=self._dropout(),
            group=group,
            **self._options(),
        )

    def stream(self, queries, chunks, *, parameters=(), query_position=None, query_mask=None):
        """`forward` for inputs that are read in chunks and never are in memory as a whole: `ops.latent_attention_stream`.

        Args:
            queries, query_position, query_mask: as in `forward`.
            chunks: what can be iterated twice, or a function that returns an iterator; each element is inputs (B, m, Cx), or
                (inputs, position), or (inputs, position, key_mask). With gradients the backward pass reads them again.
            parameters: what the chunks are computed from and wants gradients, as `preprocessor.parameters()`.

        Returns:
            (B, N, output_channels).
        """
        if self.backend == "eager":
            raise ValueError("backend is 'eager'; a stream needs one of ops.latent_attention, such as 'auto' or 'reference'")
        self._check_queries(queries, query_position)
        out = ops.latent_attention_stream(
            self._project_queries(queries, query_position),
            chunks,
            self.key.weight,
            self.value.weight,
            dropout_p=self._dropout(),
            parameters=parameters,
            **self._options(),
        )
        if query_mask is not None:
            check_key_mask(query_mask, out.shape[0], queries.shape[1], queries.device, "query_mask")
        return self._finish(out, query_mask)

    def _dropout(self):
        return self.dropout if self.training else 0.0

    def _options(self):
        return {
            "num_heads": self.num_heads,
            "norm_weight": self.input_norm.weight,
            "norm_bias": self.input_norm.bias,
            "eps": self.input_norm.eps,
            "b_k": self.key.bias,
            "b_v": self.value.bias,
            "backend": self.backend,
        }

    def _project_queries(self, queries, query_position):
        return self.query(self.query_norm(_joined(queries, query_position)))

    def _finish(self, out, query_mask):
        return self.output(out if query_mask is None else torch.where(query_mask[..., None], out, 0.0))

    def _check_queries(self, queries, query_position):
        self._check_side("queries", queries, "N", self.query, ("query_position", query_position, "Dp"))

    def _decodes(self, queries, inputs):
        """Is folding the query's and the output's projections into keys and values the cheapest form?"""
        qk_channels, query_channels = self.query.weight.shape
        output_channels, v_channels = self.output.weight.shape
        channels = (query_channels, self.key.in_features, qk_channels, v_channels, output_channels)
        cheaper = plan.decoding_is_cheaper(queries.shape[1], inputs.shape[1], *channels, self.num_heads)
        return cheaper and decode.has_kernels(queries, self.backend)

    def _decode(self, queries, inputs, position, key_mask, query_position, query_mask):
        if key_mask is not None:
            check_key_mask(key_mask, inputs.shape[0], inputs.shape[1], inputs.device)
            inputs = torch.where(key_mask[..., None], inputs, 0.0)  # NaN behind the mask must not reach a weight's gradient
        inputs = self.input_norm(_joined(inputs, position))
        return ops.latent_decode(
            queries,
            self.key(inputs),
            self.value(inputs),
            self.query.weight,
            self.output.weight,
            num_heads=self.num_heads,
            norm_weight=self.query_norm.weight,
            norm_bias=self.query_norm.bias,
            eps=self.query_norm.eps,
            b_q=self.query.bias,
            b_o=self.output.bias,
            position=query_position,
            query_mask=query_mask,
            key_mask=key_mask,
            backend=self.backend,
        )

    def _from_kept(self, queries, inputs, position, key_mask, query_position):
        """The attention of queries absorbed at an earlier call, or at this one; None where nothing may be kept."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training or queries.shape[0] != 1:
            return None
        if self.backend == "eager" or autocast_dtype(inputs.device) is not None:
            return None
        query_norm, query, norm, key = self.query_norm, self.query, self.input_norm, self.key
        made_of = [queries, query_norm.weight, query_norm.bias, query.weight, query.bias, key.weight, norm.weight]
        if query_position is not None:
            made_of.append(query_position)
        if any([type(t) not in (torch.Tensor, nn.Parameter) or t.is_inference() for t in made_of]):
            return None
        try:
            inputs.data_ptr()
            state = [(t.data_ptr(), t._version, t.shape, t.stride(), t.dtype) for t in made_of]
        except RuntimeError:  # tensors inside a function transform have no address
            return None
        if queries.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # a graph would go on reading what is forgotten here
        value = self.value.weight
        backend = api.absorbing_backend(queries, inputs, key.weight, value, self.num_heads, position, self.backend)
        if backend is None:
            return None
        if key_mask is not None:
            check_key_mask(key_mask, inputs.shape[0], inputs.shape[1], inputs.device)
        # Memory may come again with the same address and version: the tensor itself, or what it is a view of, must be alive.
        owners = [t if t._base is None else t._base for t in made_of]
        kept = self._kept
        if kept is None or kept[1] != state or any([ref() is not t for ref, t in zip(kept[0], owners, strict=True)]):
            q = self._project_queries(queries, query_position)
            absorbed = api.absorb_queries(q, key.weight, self.num_heads, norm.weight)
            self._kept = kept = ([weakref.ref(t) for t in owners], state, absorbed)
        affine, scale = (norm.weight, norm.bias, norm.eps, self.value.bias), (query.out_features // self.num_heads) ** -0.5
        return api.attention_of_absorbed(backend, kept[2], inputs, value, self.num_heads, *affine, position, key_mask, scale)

    def train(self, mode=True):
        self._kept = None
        return super().train(mode)

    def _apply(self, *arguments, **options):  # to another dtype and back the memory may be the same again
        self._kept = None
        return super()._apply(*arguments, **options)

    def __getstate__(self):
        return {**self.__dict__, "_kept": None}

    def _check(self, queries, inputs, position, query_position, query_mask):
        self._check_queries(queries, query_position)
        self._check_side("inputs", inputs, "M", self.key, ("position", position, "Cp"))
        if queries.shape[0] != 1 and queries.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"queries has shape {tuple(queries.shape)}; its batch must be 1 or that of inputs, {inputs.shape[0]}"
            )
        if query_mask is not None:
            check_key_mask(query_mask, inputs.shape[0], queries.shape[1], inputs.device, "query_mask")

    @staticmethod
    def _check_side(name, tokens, rows, linear, table):
        channels = linear.in_features
        what, position, width = table
        if position is not None:
            if not isinstance(position, torch.Tensor) or position.dim() != 2:
                was = f"has shape {tuple(position.shape)}" if isinstance(position, torch.Tensor) else f"is {position!r}"
                raise ValueError(f"{what} {was}; it must be a tensor ({rows}, {width}) or None")
            channels -= position.shape[1]
        _check_tokens(name, tokens, rows, channels, linear.weight)
        if position is not None and position.shape[0] != tokens.shape[1]:
            raise ValueError(
                f"{what} has shape {tuple(position.shape)}; with {name} {tuple(tokens.shape)} it must have {rows} rows"
            )

    def _eager(self, q, inputs, position, key_mask):
        inputs = self.input_norm(_joined(inputs, position))
        q, k, v = q.expand(inputs.shape[0], -1, -1), self.key(inputs), self.value(inputs)
        return eager_attention(q, k, v, self.num_heads, key_mask, self._dropout())

    def extra_repr(self):
        return f"num_heads={self.num_heads}, dropout={self.dropout}, backend={self.backend!r}"


class LatentSelfAttention(WithBackend):
    """Self-attention of the latents with one shared layer norm: Attn(LN(z), LN(z)), projections included.

    Args:
        channels: D.
        num_heads: H; head h owns the contiguous channels h d to (h+1) d - 1.
        qk_channels: channels of Q and K in all heads together; default D.
        v_channels: channels of V in all heads together; default `qk_channels`.
        output_channels: default `v_channels`.
        eps: of the layer norm.
        dropout: probability of dropping an attention weight while training.
        backend: a backend of `ops.attention`, or "eager": plain PyTorch with SDPA.

    Raises ValueError for sizes that are not positive, heads that do not divide the channels, unknown names.
    """

    def __init__(
        self,
        channels,
        *,
        num_heads=8,
        qk_channels=None,
        v_channels=None,
        output_channels=None,
        eps=1e-5,
        dropout=0.0,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__(backend)
        qk_channels = channels if qk_channels is None else qk_channels
        v_channels = qk_channels if v_channels is None else v_channels
        output_channels = v_channels if output_channels is None else output_channels
        _check_sizes(
            num_heads,
            eps,
            dropout,
            channels=channels,
            output_channels=output_channels,
            qk_channels=qk_channels,
            v_channels=v_channels,
        )
        self.num_heads, self.dropout = num_heads, dropout
        factory = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(channels, eps=eps, **factory)
        self.query = Linear(channels, qk_channels, backend=backend, **factory)
        self.key = Linear(channels, qk_channels, backend=backend, **factory)
        self.value = Linear(channels, v_channels, backend=backend, **factory)
        self.output = Linear(v_channels, output_channels, backend=backend, **factory)

    def forward(self, latents, *, key_mask=None):
        """(B, N, D) -> (B, N, output_channels); `key_mask` bool (B, N), True where a latent may be attended."""
        _check_tokens("latents", latents, "N", self.query.in_features, self.query.weight)
        normalised = self.norm(latents)
        q, k, v = self.query(normalised), self.key(normalised), self.value(normalised)
        dropout = self.dropout if self.training else 0.0
        if self.backend == "eager":
            return self.output(eager_attention(q, k, v, self.num_heads, key_mask, dropout))
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        out = ops.attention(q, k, v, key_mask=key_mask, dropout_p=dropout, backend=self.backend)
        return self.output(out.transpose(1, 2).flatten(2))

    def extra_repr(self):
        return f"num_heads={self.num_heads}, dropout={self.dropout}, backend={self.backend!r}"


def _joined(tokens, position):
    """[tokens ; position], (B, N, *) and (N, *) shared by the batch, or no position."""
    if position is None:
        return tokens
    return torch.cat([tokens, position.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], -1)


def _check_tokens(name, tensor, length, channels, weight):
    """Raises unless `tensor` is (B, `length`, `channels`), where and of the dtype that the module's `weight` is."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.dim() != 3 or tensor.shape[2] != channels:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be (B, {length}, {channels})")
    if tensor.device != weight.device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on the module's device, {weight.device}")
    if tensor.dtype != weight.dtype and autocast_dtype(tensor.device) is None:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be the module's, {weight.dtype}")


def _check_sizes(num_heads, eps, dropout, **sizes):
    for name, value in {"num_heads": num_heads, **sizes}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive integer")
    check_number("eps", eps, "a positive number", lambda eps: eps > 0.0)
    check_number("dropout", dropout, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
    for name in ("qk_channels", "v_channels"):
        if sizes[name] % num_heads:
            raise ValueError(f"{name} is {sizes[name]}; it must be a multiple of num_heads, {num_heads}")

"""Perceiver resamplers: a few learned latents read a context of any length (Flamingo, Alayrac et al. 2022, section 3.1).

Flamingo's, Idefics2's and IP-Adapter's differ in norms, MLP, heads of keys, projections and names; one module is all of them.
"""

import functools
import re
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..ops._shared.arguments import autocast_dtype, check_integer, check_key_mask, check_number
from ..ops.latent import api, plan
from .backend import Linear, WithBackend, gelu, linear, own_backend, split_heads

ACTIVATIONS = {
    "relu": lambda x, backend: F.relu(x),
    "gelu": lambda x, backend: gelu(x, "none", backend),
    "gelu_tanh": lambda x, backend: gelu(x, "tanh", backend),
    "silu": lambda x, backend: F.silu(x),
}
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}

# --- Names of others --------------------------------------------------------------------------------------------------------
# Theirs -> ours, of a layer and of the whole; "key+value" is one matrix that makes both.

IDEFICS2 = {
    "input_context_norm": "context_norm",
    "input_latents_norm": "latent_norm",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "output",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "norm": "norm",
}
FLAMINGO = {
    "0.norm_media": "context_norm",
    "0.norm_latents": "latent_norm",
    "0.to_q": "query",
    "0.to_kv": "key+value",
    "0.to_out": "output",
    "1.0": "mlp_norm",
    "1.1": "up",
    "1.3": "down",
    "norm": "norm",
    "frame_embs": "frames",
    "media_time_embs": "media",
    "media_pos_emb": "media",
}
IP_ADAPTER = FLAMINGO | {
    "0.norm1": "context_norm",
    "0.norm2": "latent_norm",
    "proj_in": "input",
    "proj_out": "output",
    "norm_out": "norm",
    "pos_emb": "positions",
    # as diffusers has it
    "ln0": "context_norm",
    "ln1": "latent_norm",
    "attn.to_q": "query",
    "attn.to_k": "key",
    "attn.to_v": "value",
    "attn.to_out.0": "output",
    "ff.0": "mlp_norm",
    "ff.1.net.0.proj": "up",
    "ff.1.net.2": "down",
}
_HIDDEN_ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def renamed(state_dict, names, prefix) -> dict:
    """Tensors of a resampler by the names of ours: those behind `prefix`, which ends the first part of a name at most."""
    start = re.compile(rf"(?:.*\.)?{prefix}\.")
    if any(start.match(name) for name in state_dict):
        state_dict = {start.sub("", name): tensor for name, tensor in state_dict.items() if start.match(name)}
    tensors, unknown = {}, []
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"state_dict has {name!r}: a {type(tensor).__name__}; it must map names to tensors")
        layer, own, kind = re.fullmatch(r"(layers\.\d+\.)?(.*?)(?:\.(weight|bias))?", name).groups("")
        ours = "latents" if own == "latents" else names.get(own)
        if ours is None:
            unknown.append(name)
        elif ours == "key+value":
            tensors |= zip((f"{layer}key.{kind}", f"{layer}value.{kind}"), tensor.chunk(2), strict=True)
        elif ours in ("latents", "positions", "frames", "media"):
            tensors[ours] = tensor.reshape(-1, tensor.shape[-1])
        else:
            tensors[f"{layer}{ours}.{kind}"] = tensor
    if unknown or "latents" not in tensors:
        what = f"has {', '.join(sorted(unknown)[:4])}, which the module has not" if unknown else "has no latents"
        raise ValueError(f"state_dict {what}; it must be that of such a resampler")
    return tensors


# Theirs that are of no layer, though a layer has one of the same name with us.
_WHOLE = ("norm", "norm_out", "proj_in", "proj_out")


def _theirs(name, names) -> str:
    """The others' name, or names, of ours: of "layers.0.key.weight" 'layers.0.0.to_kv.weight' with Flamingo's `names`."""
    layer, own, end = re.fullmatch(r"(layers\.\d+\.)?(\w+)(.*)", name).groups("")
    both = (own, "key+value") if own in ("key", "value") else (own,)
    found = [n for n, ours in names.items() if ours in both and (not layer or n not in _WHOLE)]
    if not layer and end:
        found = [n for n in found if n in _WHOLE]
    return " or ".join(repr(f"{layer}{n}{end}") for n in found) or repr(name)


def _check_dict(name, value, allowed="a state dict"):
    if not isinstance(value, dict):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be {allowed}")


# --- The layers -------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """The modules of a layer, ours or another library's. The context's norm is not called: its weight and bias are read."""

    context_norm: nn.Module
    latent_norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    mlp_norm: nn.Module
    up: nn.Module
    down: nn.Module
    gate: nn.Module | None = None


class ResamplerLayer(nn.Module):
    """The weights of a layer; what they compute is the resampler's."""

    def __init__(self, channels, num_heads, kv_heads, head_dim, mlp_channels, gated, norm, bias, eps, **factory):
        super().__init__()
        norm = functools.partial(NORMS[norm], channels, eps=eps, **factory)
        layer = functools.partial(nn.Linear, bias=bias, **factory)
        self.context_norm, self.latent_norm = norm(), norm()
        self.query = layer(channels, num_heads * head_dim)
        self.key = layer(channels, kv_heads * head_dim)
        self.value = layer(channels, kv_heads * head_dim)
        self.output = layer(num_heads * head_dim, channels)
        self.mlp_norm = norm()
        if gated:
            self.gate = layer(channels, mlp_channels)
        self.up, self.down = layer(channels, mlp_channels), layer(mlp_channels, channels)

    def parts(self) -> Layer:
        return Layer(*(getattr(self, name, None) for name in Layer._fields))


class Options(NamedTuple):
    """What the layers of a resampler share."""

    num_heads: int
    kv_heads: int
    norm: str
    eps: float
    activation: object  # a function
    dropout: float  # of attention weights, 0 unless in training
    backend: str


def resample(latents, context, key_mask, layers, options):
    """Latents (N, C) after all `layers` have read the context (B, M, C), (B, N, C); key_mask bool (B, M) or None.

    In every layer, with x the context and z the latents: z <- z + Attention(z, [x ; z]), z <- z + MLP(z). The norm of x is
    the same in all layers up to gain and shift. It is computed once, and these go where they cost less: into a layer's
    weights, so that no layer makes, or keeps for its backward, a normalised context of its own, or into a context of few rows.
    RMSNorm's own factor, one of each row, goes into keys and values, which are narrower than the context. Very few latents
    make neither, but absorb the projections of both (`ops/latent`), and plain matrix products are what is left.
    """
    eager = options.backend == "eager"
    x, factor = (context, None) if eager else _normalised(context, options)
    z = latents[None]  # the first layer's queries, and the keys of the latents, are the same in all examples
    for layer in layers:
        own = layer.latent_norm(z)
        q = _apply(layer.query, own, options)
        if eager:
            out = _eager(layer, q, x, own, key_mask, options)
        elif _absorbs(layer, q, x, options):
            out = _absorbed(layer, q, _scaled(layer, x, factor), own, key_mask, options)
        else:
            out = _projected(layer, q, x, factor, own, key_mask, options)
        z = z + _apply(layer.output, out, options)
        own = layer.mlp_norm(z)
        hidden = _apply(layer.up, own, options)
        if layer.gate is None:
            hidden = options.activation(hidden)
        else:
            hidden = options.activation(_apply(layer.gate, own, options)) * hidden
        z = z + _apply(layer.down, hidden, options)
    return z


# What the latents of a layer read, (B, N, H D): q (B or 1, N, H D) are their queries, `own` (B or 1, N, C) they, normalised.


def _eager(layer, q, x, own, key_mask, options):
    keys = torch.cat([layer.context_norm(x), own.expand(x.shape[0], -1, -1)], 1)
    q = split_heads(q, options.num_heads).expand(x.shape[0], -1, -1, -1)
    k, v = (split_heads(part(keys), options.kv_heads) for part in (layer.key, layer.value))
    mask = None if key_mask is None else _with_latents(key_mask, own)[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=options.dropout, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def _projected(layer, q, x, factor, own, key_mask, options):
    pairs = []
    for of_context, part in zip(_read(layer, x, factor, options), (layer.key, layer.value), strict=True):
        of_latents = split_heads(_apply(part, own, options), options.kv_heads).expand(x.shape[0], -1, -1, -1)
        pairs.append((split_heads(of_context, options.kv_heads), of_latents))
    q = split_heads(q, options.num_heads).expand(x.shape[0], -1, -1, -1)
    masks = None if key_mask is None else (key_mask, None)
    out = ops.attention(q, *pairs, key_mask=masks, dropout_p=options.dropout, backend=options.backend)
    return out.transpose(1, 2).flatten(2)


def _absorbs(layer, q, x, options):
    """Does absorbing take less than half of the operations? With less to gain the passes over the scores eat it up.

    In 16 bits the scores, which attention keeps in float32, would be rounded.
    """
    plain = all(type(part) in (nn.Linear, Linear) for part in (layer.key, layer.value))
    exact = x.dtype in (torch.float32, torch.float64) and autocast_dtype(x.device) is None
    if not (plain and exact) or options.backend != "auto" or options.dropout > 0.0 or options.kv_heads != options.num_heads:
        return False
    channels, width = layer.key.in_features, layer.key.out_features
    sizes = (q.shape[1], x.shape[1] + q.shape[1], 0, channels, width, width, 0, options.num_heads)
    return plan.absorbing_share(*sizes) < 0.5


def _absorbed(layer, q, x, own, key_mask, options):
    """Keys and values are [x ; own] themselves, the same for all heads; a bias of the keys moves all scores of a row alike."""
    if key_mask is not None:
        x = torch.where(key_mask[..., None], x, 0.0)  # NaN behind the mask must not reach a sum
    keys = torch.cat([x, own.expand(x.shape[0], -1, -1)], 1)
    del x  # in inference it is not needed any more
    scale = (layer.key.out_features // options.num_heads) ** -0.5
    scores = api.absorb_queries(q * scale, layer.key.weight, options.num_heads, None) @ keys.mT  # (B, H N, M + N)
    if key_mask is not None:
        scores = scores.masked_fill(~_with_latents(key_mask, own)[:, None], float("-inf"))
    out = scores.softmax(-1) @ keys
    out = api.project_values(out, layer.value.weight, options.num_heads, None, None, layer.value.bias)
    return out if layer.key.bias is None else out + layer.key.bias.sum() * 0.0  # a gradient of zero instead of none


def _with_latents(key_mask, own):
    """(B, M) -> (B, M + N): latents are always read."""
    return F.pad(key_mask, (0, own.shape[1]), value=True)


def _apply(module, x, options):
    """A linear layer by the faster product; what a library put in its place (LoRA, quantised) is called."""
    if options.backend != "eager" and type(module) in (nn.Linear, Linear):
        return linear(x, module.weight, module.bias, options.backend)
    return module(x)


def _normalised(x, options):
    """The norm of the context without gain and shift: (rows, None), or (the context, a factor of each row)."""
    if options.norm == "layer":
        return ops.film_layer_norm(x, None, None, eps=options.eps, backend=own_backend(options.backend)), None
    if (autocast_dtype(x.device) or x.dtype) == torch.float16:  # products of rows as they are may be too large for it
        return F.rms_norm(x, x.shape[-1:], None, options.eps), None
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x, torch.rsqrt(length.square() / x.shape[-1] + options.eps)


def _read(layer, x, factor, options):
    """Keys and values (B, M, G D) of a context from `_normalised`."""
    gain, shift = layer.context_norm.weight, getattr(layer.context_norm, "bias", None)
    parts = (layer.key, layer.value)
    if all(type(part) in (nn.Linear, Linear) and x.shape[0] * x.shape[1] > part.out_features for part in parts):
        for part in parts:
            weight, bias = part.weight * gain, part.bias
            if factor is not None:
                rows = linear(x, weight, None, options.backend)
                rows = (rows * factor).to(rows.dtype)
                yield rows if bias is None else rows + bias.to(rows.dtype)
                continue
            if shift is not None:  # under autocast it comes in 16 bits
                bias = F.linear(shift[None], part.weight, bias)[0].to(part.weight.dtype)
            yield linear(x, weight, bias, options.backend)
    else:
        x = _scaled(layer, x, factor)
        for part in parts:
            yield _apply(part, x, options)


def _scaled(layer, x, factor):
    """The layer's normalised context (B, M, C), of one from `_normalised`."""
    gain, shift = layer.context_norm.weight, getattr(layer.context_norm, "bias", None)
    x = x if factor is None else (x * factor).to(x.dtype)
    return x * gain if shift is None else torch.addcmul(shift, x, gain)


# --- The module -------------------------------------------------------------------------------------------------------------


class PerceiverResampler(WithBackend):
    """Learned latents that attend to a context and to themselves: N tokens of any number of them.

        z <- z + Wo Attention(q = Wq LN_z(z), k = Wk [LN_x(x) ; LN_z(z)], v = Wv [LN_x(x) ; LN_z(z)])      in every layer
        z <- z + W2 act(W1 LN(z)),     or gated z <- z + W2 (act(Wg LN(z)) * W1 LN(z))
        out = LN(Wout z)

    The keys of context and latents are two segments of one attention and never joined. `from_idefics2`, `from_ip_adapter` and
    `from_flamingo` begin with weights of others.

    Args:
        channels: C, of the latents and of the context that the layers read.
        num_latents: N.
        depth: number of layers.
        num_heads: H; head h owns the contiguous channels h D to (h+1) D - 1.
        head_dim: D.
        kv_heads: G, heads of keys and values, of which H is a multiple (grouped-query attention); default H.
        mlp_channels: default 4 C.
        activation: of the MLP: "relu", "gelu", "gelu_tanh" (its tanh form) or "silu".
        gated: whether the MLP is a gated one.
        norm: "layer" or "rms", of all norms.
        bias: whether the linear layers of attention and MLP have biases.
        input_channels: C0 of the context, where a linear layer (with a bias) takes it to C first; default None, there is none.
        output_channels: likewise after the last layer; the last norm has as many channels.
        max_length, max_frames, max_media: where given, learned embeddings of places in the context, of frames, of media, are
            added to the context, before `input_channels`' layer.
        eps: of the norms.
        dropout: of the attention weights in training.
        backend: a backend of `ops.attention`, or "eager": plain PyTorch with SDPA on joined keys.

    Raises ValueError for sizes that are not positive, heads that are no multiple, unknown names, TypeError for what is no
    number or bool.
    """

    def __init__(
        self,
        channels,
        *,
        num_latents=64,
        depth=6,
        num_heads=8,
        head_dim=64,
        kv_heads=None,
        mlp_channels=None,
        activation="gelu",
        gated=False,
        norm="layer",
        bias=False,
        input_channels=None,
        output_channels=None,
        max_length=None,
        max_frames=None,
        max_media=None,
        eps=1e-5,
        dropout=0.0,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__(backend)
        kv_heads = num_heads if kv_heads is None else kv_heads
        sizes = dict(channels=channels, num_latents=num_latents, depth=depth, num_heads=num_heads, head_dim=head_dim)
        optional = dict(mlp_channels=mlp_channels, input_channels=input_channels, output_channels=output_channels)
        tables = dict(positions=max_length, frames=max_frames, media=max_media)
        optional |= dict(max_length=max_length, max_frames=max_frames, max_media=max_media)
        for name, value in (sizes | dict(kv_heads=kv_heads) | {n: v for n, v in optional.items() if v is not None}).items():
            check_integer(name, value)
        if num_heads % kv_heads:
            raise ValueError(f"num_heads is {num_heads}; it must be a multiple of kv_heads, {kv_heads}")
        for name, value, allowed in (("activation", activation, ACTIVATIONS), ("norm", norm, NORMS)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")
        for name, value in (("gated", gated), ("bias", bias)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be True or False")
        check_number("eps", eps, "a positive number", lambda eps: eps > 0.0)
        self.dropout = check_number("dropout", dropout, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
        self.num_heads, self.kv_heads, self.activation, self.norm_kind, self.eps = num_heads, kv_heads, activation, norm, eps
        factory = {"device": device, "dtype": dtype}
        width = channels if input_channels is None else input_channels
        self.latents = nn.Parameter(torch.empty(num_latents, channels, **factory))
        for name, rows in tables.items():
            self.register_parameter(name, None if rows is None else nn.Parameter(torch.empty(rows, width, **factory)))
        self.input = None if input_channels is None else nn.Linear(input_channels, channels, **factory)
        mlp_channels = 4 * channels if mlp_channels is None else mlp_channels
        shape = (channels, num_heads, kv_heads, head_dim, mlp_channels, gated, norm, bias, eps)
        self.layers = nn.ModuleList(ResamplerLayer(*shape, **factory) for _ in range(depth))
        self.output = None if output_channels is None else nn.Linear(channels, output_channels, **factory)
        self.norm = NORMS[norm](channels if output_channels is None else output_channels, eps=eps, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draws latents and embeddings anew, with a variance of 1 / C."""
        for table in (self.latents, self.positions, self.frames, self.media):
            if table is not None:
                nn.init.normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, context, *, key_mask=None):
        """Resamples each medium by itself.

        Args:
            context: (B, M, C0), or (B, T, M, C0) of T media, or (B, T, F, M, C0) of F frames each, whose rows are read
                together; C0 is C where there is no `input_channels`.
            key_mask: bool, context's shape without channels, True where a row counts. Latents are always read, so a context
                without any row leaves these alone.

        Returns:
            (B, N, C), or (B, T, N, C); `output_channels` where given.
        """
        self._check(context, key_mask)
        if key_mask is not None:  # NaN behind the mask must reach no sum, not those of the gradients either
            context = torch.where(key_mask[..., None], context, 0.0)
        media, context = context.shape[:-2][:2], self._placed(context)
        context = context.flatten(0, len(media) - 1).flatten(1, -2)
        if key_mask is not None:
            key_mask = key_mask.flatten(0, len(media) - 1).flatten(1)
        options = Options(
            self.num_heads,
            self.kv_heads,
            self.norm_kind,
            self.eps,
            functools.partial(ACTIVATIONS[self.activation], backend=self.backend),
            self.dropout if self.training else 0.0,
            self.backend,
        )
        if self.input is not None:
            context = _apply(self.input, context, options)
        out = resample(self.latents, context, key_mask, [layer.parts() for layer in self.layers], options)
        if self.output is not None:
            out = _apply(self.output, out, options)
        return self.norm(out).unflatten(0, media)

    def _placed(self, context):
        """The context with its embeddings."""
        total, rows = None, context.shape[1:-1]  # (M), (T, M) or (T, F, M)
        for table, size, trailing in (
            (self.positions, rows[-1], 0),
            (self.frames, rows[1] if len(rows) == 3 else 1, 1),
            (self.media, rows[0] if len(rows) > 1 else 1, len(rows) - 1),
        ):
            if table is not None:
                own = table[:size].reshape(size, *(1,) * trailing, -1)
                total = own if total is None else total + own
        return context if total is None else context + total.to(context.dtype)

    def _check(self, context, key_mask):
        if not isinstance(context, torch.Tensor):
            raise TypeError(f"context is a {type(context).__name__}; it must be a tensor")
        first = self.layers[0].query
        channels = first.in_features if self.input is None else self.input.in_features
        if not 3 <= context.dim() <= 5 or context.shape[-1] != channels:
            allowed = ", ".join(f"({rows}, {channels})" for rows in ("B, M", "B, T, M", "B, T, F, M"))
            raise ValueError(f"context has shape {tuple(context.shape)}; it must be one of {allowed}")
        if context.device != first.weight.device:
            raise ValueError(f"context is on {context.device}; it must be on the module's device, {first.weight.device}")
        if context.dtype != first.weight.dtype and autocast_dtype(context.device) is None:
            raise TypeError(f"context has dtype {context.dtype}; it must be the module's, {first.weight.dtype}")
        rows = context.shape[1:-1]
        for name, table, size in (
            ("max_length", self.positions, rows[-1]),
            ("max_frames", self.frames, rows[1] if len(rows) == 3 else 1),
            ("max_media", self.media, rows[0] if len(rows) > 1 else 1),
        ):
            if table is not None and size > table.shape[0]:
                raise ValueError(
                    f"context has shape {tuple(context.shape)}; with {name} {table.shape[0]} it has {size} of them"
                )
        if key_mask is not None:
            if not isinstance(key_mask, torch.Tensor) or key_mask.shape != context.shape[:-1]:
                was = f"has shape {tuple(key_mask.shape)}" if isinstance(key_mask, torch.Tensor) else f"is {key_mask!r}"
                raise ValueError(f"key_mask {was}; it must be a bool tensor {tuple(context.shape[:-1])}")
            flat = key_mask.flatten(1)
            check_key_mask(flat, flat.shape[0], flat.shape[1], context.device)

    @classmethod
    def from_idefics2(cls, source, config=None, **options):
        """Begins with a resampler of Idefics2: `Idefics2PerceiverResampler` of transformers.

        Args:
            source: that module, or its state dict, or that of a whole model with one.
            config: the model's perceiver_config, an object or a dict; default the module's own.
            options: `backend`, `device`, `dtype`, `dropout`; default the source's device, dtype and `attention_dropout`.

        Raises ValueError for a state dict of something else, of a part, or without a config, TypeError for other types.
        """
        if isinstance(source, nn.Module):
            config, source = getattr(source, "config", None) if config is None else config, source.state_dict()
        _check_dict("source", source, "a module or a state dict")
        if config is None:
            raise ValueError("config is None; with a state dict it must be the perceiver_config")
        if not isinstance(config, dict) and not hasattr(config, "__dict__"):
            raise TypeError(f"config is a {type(config).__name__}; it must be the perceiver_config, an object or a dict")
        values = config if isinstance(config, dict) else vars(config)
        hidden_act = values.get("hidden_act", "silu")
        if hidden_act not in _HIDDEN_ACTS:
            raise ValueError(f"hidden_act is {hidden_act!r}; allowed are {', '.join(map(repr, _HIDDEN_ACTS))}")
        tensors = renamed(source, IDEFICS2, "perceiver_resampler")
        options = dict(dropout=values.get("attention_dropout", 0.0)) | options
        shape = dict(head_dim=values.get("resampler_head_dim", 96), eps=values.get("rms_norm_eps", 1e-6))
        return cls._from_tensors(tensors, IDEFICS2, activation=_HIDDEN_ACTS[hidden_act], **shape, **options)

    @classmethod
    def from_ip_adapter(cls, state_dict, *, head_dim=64, **options):
        """Begins with the image projection of an IP-Adapter "plus", by its own names or those of diffusers.

        Args:
            state_dict: of the projection, or of the whole adapter, with "image_proj" in it or before its names.
            head_dim: D, which weights do not show; 64 in everything released.
            options: `backend`, `device`, `dtype`, `eps`, `dropout`; default the tensors' device and dtype.

        Raises ValueError for a state dict of something else, such as one with latents of the mean of a context, or of a part,
        TypeError for what is none.
        """
        _check_dict("state_dict", state_dict)
        if isinstance(state_dict.get("image_proj"), dict):
            state_dict = state_dict["image_proj"]
        return cls._from_tensors(renamed(state_dict, IP_ADAPTER, "image_proj"), IP_ADAPTER, head_dim=head_dim, **options)

    @classmethod
    def from_flamingo(cls, state_dict, *, head_dim=64, **options):
        """Begins with the resampler of OpenFlamingo or flamingo-pytorch, embeddings of frames and media included.

        Args:
            state_dict: of the resampler, or of a whole model that has it as `perceiver`.
            head_dim, options: as for `from_ip_adapter`.

        Raises ValueError for a state dict of something else or of a part, TypeError for what is none.
        """
        _check_dict("state_dict", state_dict)
        return cls._from_tensors(renamed(state_dict, FLAMINGO, "perceiver"), FLAMINGO, head_dim=head_dim, **options)

    @classmethod
    def _from_tensors(cls, tensors, names, *, head_dim, device=None, dtype=None, **options):
        """A module of the sizes that its tensors have, with copies of them; `names` are those of `renamed`, for errors."""
        check_integer("head_dim", head_dim)
        latents = tensors["latents"]

        def rows(name):
            return tensors[name].shape[0] if name in tensors else None

        # What says the sizes; of a layer with a bias that is its weight.
        biases = [name for name in tensors if name.endswith(".bias")]
        for name in ("layers.0.query.weight", "layers.0.key.weight", *(f"{n.removesuffix('bias')}weight" for n in biases)):
            if name not in tensors:
                raise ValueError(f"state_dict has no {_theirs(name, names)}")
        wide = {"num_heads": rows("layers.0.query.weight"), "kv_heads": rows("layers.0.key.weight")}
        for name, width in wide.items():
            if width % head_dim:
                raise ValueError(f"head_dim is {head_dim}; {name} times that must be {width}, the rows of the state dict's")
        model = cls(
            latents.shape[1],
            num_latents=latents.shape[0],
            depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers.")),
            head_dim=head_dim,
            mlp_channels=rows("layers.0.up.weight"),
            gated="gate" in names.values(),
            norm="layer" if any(name.endswith("norm.bias") for name in biases) else "rms",
            bias="layers.0.query.bias" in tensors,
            input_channels=tensors["input.weight"].shape[-1] if "input.weight" in tensors else None,
            output_channels=rows("output.weight"),
            max_length=rows("positions"),
            max_frames=rows("frames"),
            max_media=rows("media"),
            device="meta",
            **{name: width // head_dim for name, width in wide.items()},
            **options,
        )
        own = model.state_dict()
        for name in own | tensors:
            theirs = _theirs(name, names)
            if name not in tensors:
                raise ValueError(f"state_dict has no {theirs}")
            if name not in own:
                raise ValueError(f"state_dict has {theirs}, which does not go with its other tensors")
            if tensors[name].shape != own[name].shape:
                shapes = tuple(tensors[name].shape), tuple(own[name].shape)
                raise ValueError(
                    f"state_dict has {theirs} of shape {shapes[0]}; with its other tensors it must be {shapes[1]}"
                )
        target = dict(device=latents.device if device is None else device, dtype=latents.dtype if dtype is None else dtype)
        copies = {name: tensor.detach().to(**target, copy=True) for name, tensor in tensors.items()}
        model.load_state_dict(copies, assign=True)
        return model

    def extra_repr(self):
        return (
            f"num_heads={self.num_heads}, kv_heads={self.kv_heads}, activation={self.activation!r}, backend={self.backend!r}"
        )

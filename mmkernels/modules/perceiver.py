"""The blocks of Perceiver and Perceiver IO, and what they are stacked to: an encoder and a decoder."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from ..ops._shared.arguments import check_integer, check_number
from .backend import Gelu, Linear
from .latent import LatentCrossAttention, LatentSelfAttention
from .positions import reset_linear_, reset_table_

# The released code has GELU in its tanh form; Hugging Face's checkpoints of it are run in the exact one; it has others too.
ACTIVATIONS = {
    "gelu_tanh": functools.partial(Gelu, "tanh"),
    "gelu": functools.partial(Gelu, "none"),
    "relu": lambda backend: nn.ReLU(),
    "silu": lambda backend: nn.SiLU(),
}
SHARING = ("after_first", "all", "none")


class Mlp(nn.Sequential):
    """Linear, activation, Linear; the hidden layer is `widening` times as wide."""

    def __init__(self, channels, widening=1, activation="gelu_tanh", *, backend="auto", **factory):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}")
        check_integer("widening", widening)
        super().__init__(
            Linear(channels, widening * channels, backend=backend, **factory),
            ACTIVATIONS[activation](backend=backend),
            Linear(widening * channels, channels, backend=backend, **factory),
        )


class CrossBlock(nn.Module):
    """y = q + CrossAttention(q, x);  y + Mlp(LN(y)).

    Args:
        channels: of the queries and of the result.
        input_channels: of what they read, positions included.
        num_heads, qk_channels, v_channels, shape_for_attention, eps, backend: see `LatentCrossAttention`.
        widening: of the MLP.
        residual: whether the query is added to what it reads; without it y = CrossAttention(q, x).
        activation: "gelu_tanh", "gelu", "relu" or "silu".
        dropout: of the attention's and the MLP's result.
        attention_dropout: of the attention's weights.
    """

    def __init__(
        self,
        channels,
        input_channels,
        *,
        num_heads=1,
        qk_channels=None,
        v_channels=None,
        shape_for_attention="kv",
        widening=1,
        residual=True,
        activation="gelu_tanh",
        dropout=0.0,
        attention_dropout=0.0,
        eps=1e-5,
        backend="auto",
        **factory,
    ):
        super().__init__()
        _check_dropout(dropout)
        self.attention = LatentCrossAttention(
            channels,
            input_channels,
            num_heads=num_heads,
            qk_channels=qk_channels,
            v_channels=v_channels,
            shape_for_attention=shape_for_attention,
            dropout=attention_dropout,
            eps=eps,
            backend=backend,
            **factory,
        )
        self.norm = nn.LayerNorm(channels, eps=eps, **factory)
        self.mlp = Mlp(channels, widening, activation, backend=backend, **factory)
        self.residual, self.dropout = residual, dropout

    def forward(self, queries, inputs, *, position=None, key_mask=None, query_position=None, query_mask=None, group=None):
        """As `LatentCrossAttention.forward`; returns (B, N, channels)."""
        y = self.attention(
            queries,
            inputs,
            position=position,
            key_mask=key_mask,
            query_position=query_position,
            query_mask=query_mask,
            group=group,
        )
        if query_position is not None and self.residual:
            queries = torch.cat([queries, query_position.to(queries.dtype).expand(queries.shape[0], -1, -1)], -1)
        return self._after(queries, y)

    def stream(self, queries, chunks, *, parameters=()):
        """`forward` for inputs that are read in chunks: `LatentCrossAttention.stream`."""
        return self._after(queries, self.attention.stream(queries, chunks, parameters=parameters))

    def _after(self, queries, y):
        y = F.dropout(y, self.dropout, self.training)
        y = queries + y if self.residual else y
        return y + F.dropout(self.mlp(self.norm(y)), self.dropout, self.training)


class SelfBlock(nn.Module):
    """y = z + SelfAttention(z);  y + Mlp(LN(y)). The arguments are those of `CrossBlock`."""

    def __init__(
        self,
        channels,
        *,
        num_heads=8,
        qk_channels=None,
        v_channels=None,
        widening=1,
        activation="gelu_tanh",
        dropout=0.0,
        attention_dropout=0.0,
        eps=1e-5,
        backend="auto",
        **factory,
    ):
        super().__init__()
        _check_dropout(dropout)
        self.attention = LatentSelfAttention(
            channels,
            num_heads=num_heads,
            qk_channels=qk_channels,
            v_channels=v_channels,
            output_channels=channels,
            dropout=attention_dropout,
            eps=eps,
            backend=backend,
            **factory,
        )
        self.norm = nn.LayerNorm(channels, eps=eps, **factory)
        self.mlp = Mlp(channels, widening, activation, backend=backend, **factory)
        self.dropout = dropout

    def forward(self, latents):
        """(B, N, D) -> (B, N, D)."""
        latents = latents + F.dropout(self.attention(latents), self.dropout, self.training)
        return latents + F.dropout(self.mlp(self.norm(latents)), self.dropout, self.training)


class PerceiverEncoder(nn.Module):
    """Latents that read an input, and then each other, once or again and again (Jaegle et al. 2021, section 3; 2022, 3.1).

        z <- latents
        for every block b:  z <- Cross(z, x) in front of the blocks that have one;  z <- Self_1 .. Self_L (z)

    Perceiver IO has one cross-attend. Parameters: `latents` (N, D), `cross.<i>`, `blocks.<b>.<l>`.

    Args:
        input_channels: C, content and positions together.
        num_latents, latent_channels: N, D.
        num_cross_attends: how often the input is read, evenly over the blocks.
        num_blocks: of `layers_per_block` self-attentions each.
        share_cross: "after_first" (the second and all later cross-attends are one), "all" or "none".
        share_blocks: whether all blocks are one.
        residual: of the latents in the cross-attention.
        cross_..., self_...: heads, channels (None: the defaults of the attention modules) and widening of the MLP.
        shape_for_attention, activation, dropout, attention_dropout, eps, backend: see `CrossBlock`.

    Raises ValueError for sizes that are not positive or do not divide each other.
    """

    def __init__(
        self,
        input_channels,
        *,
        num_latents=512,
        latent_channels=1024,
        num_cross_attends=1,
        num_blocks=8,
        layers_per_block=6,
        share_cross="after_first",
        share_blocks=True,
        residual=True,
        cross_heads=1,
        self_heads=8,
        cross_qk_channels=None,
        cross_v_channels=None,
        self_qk_channels=None,
        self_v_channels=None,
        cross_widening=1,
        self_widening=1,
        shape_for_attention="kv",
        activation="gelu_tanh",
        dropout=0.0,
        attention_dropout=0.0,
        eps=1e-5,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value, least in (
            ("num_latents", num_latents, 1),
            ("latent_channels", latent_channels, 1),
            ("num_cross_attends", num_cross_attends, 1),
            ("num_blocks", num_blocks, 1),
            ("layers_per_block", layers_per_block, 0),
        ):
            check_integer(name, value, least)
        if num_blocks % num_cross_attends:
            raise ValueError(f"num_blocks is {num_blocks}; it must be a multiple of num_cross_attends, {num_cross_attends}")
        if share_cross not in SHARING:
            raise ValueError(f"share_cross is {share_cross!r}; allowed are 'after_first', 'all' and 'none'")
        self.num_blocks, self.every = num_blocks, num_blocks // num_cross_attends
        distinct_cross = {"all": 1, "after_first": min(2, num_cross_attends), "none": num_cross_attends}[share_cross]
        options = {"activation": activation, "dropout": dropout, "attention_dropout": attention_dropout}
        options |= {"eps": eps, "backend": backend, "device": device, "dtype": dtype}
        self.latents = nn.Parameter(torch.empty(num_latents, latent_channels, device=device, dtype=dtype))
        self.cross = nn.ModuleList(
            CrossBlock(
                latent_channels,
                input_channels,
                num_heads=cross_heads,
                qk_channels=cross_qk_channels,
                v_channels=cross_v_channels,
                shape_for_attention=shape_for_attention,
                widening=cross_widening,
                residual=residual,
                **options,
            )
            for _ in range(distinct_cross)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                SelfBlock(
                    latent_channels,
                    num_heads=self_heads,
                    qk_channels=self_qk_channels,
                    v_channels=self_v_channels,
                    widening=self_widening,
                    **options,
                )
                for _ in range(layers_per_block)
            )
            for _ in range(1 if share_blocks else num_blocks)
        )
        if type(self) is PerceiverEncoder:  # what inherits from it does so when it is whole
            self.reset_parameters()

    def reset_parameters(self):
        """Weights truncated normal of variance 1 / fan_in, latents of deviation 0.02, biases zero, norms one."""
        reset_table_(self.latents)
        _reset_layers(self)

    def forward(self, inputs, *, position=None, key_mask=None, group=None):
        """Latents (B, N, D) of an input.

        Args:
            inputs: (B, M, Cx), the content.
            position: (M, Cp) with Cx + Cp = C, shared by the batch and never copied per example.
            key_mask: bool (B, M), True for elements that count.
            group: a torch.distributed group whose ranks hold the M elements in parts, see `LatentCrossAttention.forward`. All
                have the same latents then; with dropout their generators must be in the same state.
        """
        return self._run(lambda cross, z: cross(z, inputs, position=position, key_mask=key_mask, group=group))

    def stream(self, chunks, *, parameters=()):
        """`forward` for an input that is longer than memory: (B, N, D).

        Args:
            chunks: what can be iterated again for every cross-attend, and for each once more in the backward pass, or a
                function that returns an iterator; each element is inputs (B, m, Cx), (inputs, position) or (inputs, position,
                key_mask), as `ops.latent_attention_stream` reads them.
            parameters: what the chunks are computed from and wants gradients, as `preprocessor.parameters()`.
        """
        parameters = tuple(parameters)
        return self._run(lambda cross, z: cross.stream(z, chunks, parameters=parameters))

    def _run(self, read):
        """`read(cross, z)` is a cross-attend of the input."""
        z = self.latents[None]  # the first queries are the same for every example
        for b in range(self.num_blocks):
            if b % self.every == 0:
                z = read(self.cross[min(b // self.every, len(self.cross) - 1)], z)
            for layer in self.blocks[b % len(self.blocks)]:
                z = layer(z)
        return z


class PerceiverDecoder(nn.Module):
    """Queries, one for every output, that read the latents (Perceiver IO, Jaegle et al. 2022, section 3.2).

        y <- Cross(q, z);   out = Linear(y), or y where there is no `output_channels`

    Args:
        query_channels: E.
        latent_channels: D.
        output_channels: F, or None.
        num_heads, qk_channels, v_channels, widening, residual, activation, attention_dropout, eps, backend: see `CrossBlock`.
    """

    def __init__(
        self,
        query_channels,
        latent_channels,
        *,
        output_channels=None,
        num_heads=1,
        qk_channels=None,
        v_channels=None,
        widening=1,
        residual=False,
        activation="gelu_tanh",
        attention_dropout=0.0,
        eps=1e-5,
        backend="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.cross = CrossBlock(
            query_channels,
            latent_channels,
            num_heads=num_heads,
            qk_channels=qk_channels,
            v_channels=v_channels,
            widening=widening,
            residual=residual,
            activation=activation,
            attention_dropout=attention_dropout,
            eps=eps,
            backend=backend,
            **factory,
        )
        if output_channels is not None:
            check_integer("output_channels", output_channels)
            self.output = Linear(query_channels, output_channels, backend=backend, **factory)
        else:
            self.output = None
        self.reset_parameters()

    def reset_parameters(self):
        """Weights truncated normal of variance 1 / fan_in, biases zero, norms one."""
        _reset_layers(self)

    def forward(self, latents, queries, *, query_position=None, query_mask=None):
        """Outputs of queries.

        Args:
            latents: (B, N, D).
            queries: (B, O, Eq), or (1, O, Eq) shared by the batch.
            query_position: (O, Ep) with Eq + Ep = E, the last channels of the queries, shared by the batch.
            query_mask: bool (B, O), True for queries that count. Others read nothing.

        Returns:
            (B, O, F), or (B, O, E) without an output layer.
        """
        y = self.cross(queries, latents, query_position=query_position, query_mask=query_mask)
        return y if self.output is None else self.output(y)


def _reset_layers(module):
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            reset_linear_(layer.weight, layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()


def _check_dropout(dropout):
    check_number("dropout", dropout, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)

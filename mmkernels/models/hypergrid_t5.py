"""HyperGrid Transformers (Tay et al., ICLR 2021): a T5 whose feed-forward layers every example gates for itself.

    x <- x + Drop(SelfAttention(RMSNorm(x)))
    x <- x + Drop(CrossAttention(RMSNorm(x), memory))                     in the decoder
    x <- x + Drop(Drop(ReLU(n W_i)) (rho + S) o W_o),   n = RMSNorm(x),   S = sigmoid(r cᵀ) from the example's n[0]
    logits = RMSNorm(x) Eᵀ, times d_model ** -0.5 in T5 1.0

Without a grid it is T5 1.0 or 1.1 (gated GELU, a head of its own). Parameters have the names of Hugging Face's
T5ForConditionalGeneration, and beside every `wo.weight` stand `wo.hypergrid.L_r`, `L_c`, `G_r`, `G_c`.

Left open by the paper and settled here: the local state is the first token of the sub-layer's normalised input, in the
decoder as in the encoder. Later tokens never change the decoder's, so that an example's gates are made once to decode it.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..modules import HyperGridLinear
from ..modules.backend import Linear, WithBackend, gelu, linear, split_heads
from ..modules.hypergrid import VARIANTS, check_grid
from ..ops._shared.arguments import check_integer, check_number
from . import official
from .registry import load_weights, save_pretrained

IGNORED = -100  # labels that the loss leaves out
FEED_FORWARDS = ("relu", "gated-gelu")


@dataclasses.dataclass(frozen=True)
class HyperGridT5Config:
    """Sizes of a T5, under Hugging Face's names, and of its grids."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None  # as many as the encoder has
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"  # or "gated-gelu", in T5 1.1
    tie_word_embeddings: bool = True  # whether the head is the embedding; not in T5 1.1
    scale_decoder_outputs: bool | None = None  # by d_model ** -0.5 before the head; where it is tied
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int | None = None  # the padding
    grid: tuple | None = None  # (R, C): blocks over d_ff and over d_model; None is a plain T5
    variant: str = "L2"  # of the grids; see `HyperGridLinear`
    residual: bool = True  # scales by 1 + S
    backend: str = "auto"  # of every layer; "eager" is plain PyTorch

    def __post_init__(self):
        defaults = {
            "num_decoder_layers": self.num_layers,
            "scale_decoder_outputs": self.tie_word_embeddings,
            "decoder_start_token_id": self.pad_token_id,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"):
            check_integer(name, getattr(self, name))
        check_integer("relative_attention_num_buckets", self.relative_attention_num_buckets, 4)
        check_integer("relative_attention_max_distance", self.relative_attention_max_distance)
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance is {self.relative_attention_max_distance}; it must be above half of "
                f"relative_attention_num_buckets, {self.relative_attention_num_buckets}"
            )
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            check_integer(name, getattr(self, name), 0)
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be below vocab_size, {self.vocab_size}")
        check_number("dropout_rate", self.dropout_rate, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
        check_number("layer_norm_epsilon", self.layer_norm_epsilon, "a number above 0", lambda eps: eps > 0.0)
        for name, allowed in (("feed_forward_proj", FEED_FORWARDS), ("variant", tuple(VARIANTS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(map(repr, allowed))}")
        if self.grid is not None:
            object.__setattr__(self, "grid", check_grid(self.grid, self.variant))  # JSON has lists only


def _sizes(prefix, sizes, **common):
    names = ("d_model", "d_ff", "num_layers", "num_heads")
    return {
        f"{prefix}-{size}": HyperGridT5Config(**dict(zip(names, numbers, strict=True)), **common, **own)
        for size, (numbers, own) in sizes.items()
    }


# The released sizes of T5, with the grids of the paper's range; `load(name, grid=None)` is a plain T5.
CONFIGS = {
    **_sizes(
        "hypergrid-t5",
        {
            "small": ((512, 2048, 6, 8), {}),
            "base": ((768, 3072, 12, 12), {}),
            "large": ((1024, 4096, 24, 16), {}),
            "3b": ((1024, 16384, 24, 32), {"d_kv": 128}),
            "11b": ((1024, 65536, 24, 128), {"d_kv": 128}),
        },
        grid=(32, 32),
    ),
    **_sizes(
        "hypergrid-t5-v1.1",
        {
            "small": ((512, 1024, 8, 6), {}),
            "base": ((768, 2048, 12, 12), {}),
            "large": ((1024, 2816, 24, 16), {}),
            "xl": ((2048, 5120, 24, 32), {}),
            "xxl": ((4096, 10240, 24, 64), {}),
        },
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        grid=(32, 32),
    ),
    "hypergrid-t5-tiny": HyperGridT5Config(
        vocab_size=1024, d_model=128, d_kv=32, d_ff=512, num_layers=2, num_heads=4, grid=(8, 8)
    ),
}


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: torch.Tensor  # (B, T, vocab_size)
    loss: torch.Tensor | None  # the mean over labels that count; None without labels


class RMSNorm(nn.Module):
    """x / sqrt(mean x² + eps) times `weight`, with no mean taken off; 16-bit rows are summed in float32."""

    def __init__(self, channels, eps, **factory):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, **factory))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Cache:
    """What a layer of the decoder keeps while K beams of each of B examples are decoded.

    The memory's keys and values and the gate are an example's, whatever its beams.
    """

    def __init__(self, max_length: int):
        self.max_length, self.length = max_length, 0
        self.keys = self.values = self.memory = self.gate = None

    def append(self, keys, values):
        """Takes (B K, H, 1, D) of the newest token; returns those of all tokens so far."""
        if self.keys is None:
            self.keys, self.values = (t.new_empty(t.shape[0], t.shape[1], self.max_length, t.shape[3]) for t in (keys, values))
        for stored, new in ((self.keys, keys), (self.values, values)):
            stored[:, :, self.length : self.length + 1] = new
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reorder(self, rows):
        """Beam i goes on from what was beam rows[i], numbered over the batch."""
        for stored in (self.keys, self.values):
            stored[:, :, : self.length] = stored[rows, :, : self.length]


class Attention(WithBackend):
    """T5's: no biases, scores that are not scaled, and a bias by relative position that a stack's first layer has for all."""

    def __init__(self, config, *, relative_bias=False, causal=False, **factory):
        super().__init__(config.backend)
        self.num_heads, self.dropout, self.causal = config.num_heads, config.dropout_rate, causal
        inner = config.num_heads * config.d_kv
        options = {"bias": False, "backend": config.backend, **factory}
        self.q, self.k, self.v = (Linear(config.d_model, inner, **options) for _ in range(3))
        self.o = Linear(inner, config.d_model, **options)
        if relative_bias:
            self.max_distance = config.relative_attention_max_distance
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, config.num_heads, **factory)

    def forward(self, x, memory=None, *, bias=None, key_mask=None, cache=None):
        """(B, N, C) -> (B, N, C), attending to itself or to `memory` (B, M, C), where `key_mask` (B, M) is True.

        With a cache x is the newest token of N beams, which attend each to its own past.
        """
        shape = x.shape
        if cache is None:
            keys_values = self._keys_values(x if memory is None else memory)
        elif memory is None:
            x = x.flatten(0, 1)[:, None]
            keys_values = cache.append(*self._keys_values(x))
        else:
            if cache.memory is None:
                cache.memory = self._keys_values(memory)
            keys_values = cache.memory
        attended = self._attend(split_heads(self.q(x), self.num_heads), *keys_values, bias, key_mask)
        return self.o(attended.transpose(1, 2).flatten(2)).view(shape)

    def relative_bias(self, queries, keys, first=0):
        """(1, H, queries, keys), where the queries' positions start at `first`; -inf for what is not yet known."""
        table = self.relative_attention_bias
        positions = torch.arange(max(first + queries, keys), device=table.weight.device)
        distance = positions[:keys] - positions[first : first + queries, None]
        buckets = bucket(distance, table.num_embeddings, self.max_distance, bidirectional=not self.causal)
        bias = table(buckets).permute(2, 0, 1)[None]
        return bias.masked_fill(distance > 0, float("-inf")) if self.causal else bias

    def _keys_values(self, x):
        return split_heads(self.k(x), self.num_heads), split_heads(self.v(x), self.num_heads)

    def _attend(self, q, k, v, bias, key_mask):
        dropout = self.dropout if self.training else 0.0
        if self.backend != "eager":
            options = {"key_mask": key_mask, "bias": bias, "scale": 1.0, "dropout_p": dropout}
            return ops.attention(q, k, v, **options, backend=self.backend)
        mask = bias if bias is None else bias.to(q.dtype)
        if key_mask is not None:
            key_mask = key_mask[:, None, None, :]
            mask = key_mask if mask is None else mask.masked_fill(~key_mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0)


def bucket(distance, num_buckets, max_distance, *, bidirectional):
    """The number of the bias of keys that are `distance` after the query, before it where negative (int64, any shape).

    Half of the buckets are exact distances, half grow in powers up to `max_distance`; the last one has all above. With
    `bidirectional` one half of everything is for keys after the query and one for those before, else only these are known.
    """
    if bidirectional:
        num_buckets //= 2
        first, distance = (distance > 0) * num_buckets, distance.abs()
    else:
        first, distance = 0, (-distance).clamp(min=0)
    exact = num_buckets // 2
    # In float32 and in this order, as checkpoints were trained: another rounding moves distances at a bucket's edge.
    power = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + power.clamp(min=0).to(torch.int64)).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class FeedForward(WithBackend):
    """act(x W_i) W_o, or act(x W_0) * (x W_1) W_o; W_o gated where the config has a grid."""

    def __init__(self, config, **factory):
        super().__init__(config.backend)
        self.dropout, self.gated = config.dropout_rate, config.feed_forward_proj == "gated-gelu"
        options = {"bias": False, "backend": config.backend, **factory}
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, Linear(config.d_model, config.d_ff, **options))
        self.wo = Linear(config.d_ff, config.d_model, **options)
        if config.grid is not None:
            self.add_grid(config)

    def add_grid(self, config):
        """The output layer takes a grid and keeps its weight."""
        self.wo = HyperGridLinear.from_linear(
            self.wo,
            config.grid,
            state_features=config.d_model,
            variant=config.variant,
            residual=config.residual,
            activation=None if self.gated else "relu",
            dropout=config.dropout_rate,
            backend=self.backend,
        )

    def forward(self, x, *, state=None, first=None, cache=None):
        """(B, T, C) -> (B, T, C). `state` (B, C) is what the gates are made of: default token number `first` (B,), or 0."""
        if self.gated:
            hidden = gelu(self.wi_0(x), "tanh", self.backend) * self.wi_1(x)
        else:
            hidden = self.wi(x)
        if isinstance(self.wo, HyperGridLinear):
            return self.wo(hidden, gate=self._gate(x, state, first, cache))
        hidden = hidden if self.gated else F.relu(hidden)
        return self.wo(F.dropout(hidden, self.dropout, self.training))

    def _gate(self, x, state, first, cache):
        if cache is not None and cache.gate is not None:
            return cache.gate
        if state is None and self.wo.hypergrid.is_local:
            state = x[:, 0] if first is None else x[torch.arange(x.shape[0], device=x.device), first]
        gate = self.wo.gate(state)
        if cache is not None:
            cache.gate = gate
        return gate


class SubLayer(nn.Module):
    """x + Drop(f(RMSNorm(x))); f is a sub-module under the name that Hugging Face has for it."""

    def __init__(self, config, name, inner, **factory):
        super().__init__()
        self.name, self.dropout = name, config.dropout_rate
        self.add_module(name, inner)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, **factory)

    @property
    def inner(self):
        return getattr(self, self.name)

    def forward(self, x, *args, **options):
        x = x + F.dropout(self.inner(self.layer_norm(x), *args, **options), self.dropout, self.training)
        # The activations of T5 leave the range of float16; so does Hugging Face.
        return x.clamp(-64504.0, 64504.0) if x.dtype == torch.float16 else x


class Block(nn.Module):
    """A layer of the encoder or the decoder: `layer` has its two or three sub-layers."""

    def __init__(self, config, *, decoder, first, **factory):
        super().__init__()
        layers = {"SelfAttention": Attention(config, relative_bias=first, causal=decoder, **factory)}
        if decoder:
            layers["EncDecAttention"] = Attention(config, **factory)
        layers["DenseReluDense"] = FeedForward(config, **factory)
        self.layer = nn.ModuleList(SubLayer(config, name, inner, **factory) for name, inner in layers.items())

    def forward(self, x, *, bias, key_mask, memory, memory_mask, state, first, cache):
        attention, *cross, feed_forward = self.layer
        x = attention(x, bias=bias, key_mask=key_mask, cache=cache)
        for layer in cross:
            x = layer(x, memory, key_mask=memory_mask, cache=cache)
        return feed_forward(x, state=state, first=first, cache=cache)


class Stack(nn.Module):
    """The encoder, or the decoder."""

    def __init__(self, config, *, decoder, **factory):
        super().__init__()
        self.dropout = config.dropout_rate
        layers = config.num_decoder_layers if decoder else config.num_layers
        self.block = nn.ModuleList(Block(config, decoder=decoder, first=i == 0, **factory) for i in range(layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, **factory)

    def forward(self, x, *, key_mask=None, memory=None, memory_mask=None, state=None, caches=None):
        """Embeddings (B, T, C) -> (B, T, C); with caches the newest token of T beams."""
        attention = self.block[0].layer[0].inner
        if caches is None:
            bias = attention.relative_bias(x.shape[1], x.shape[1])
            caches = [None] * len(self.block)
        else:
            past = caches[0].length
            bias = attention.relative_bias(1, past + 1, past)
        first = None if key_mask is None else key_mask.int().argmax(1)
        shared = {"bias": bias, "key_mask": key_mask, "memory": memory, "memory_mask": memory_mask}
        x = F.dropout(x, self.dropout, self.training)
        for block, cache in zip(self.block, caches, strict=True):
            x = block(x, **shared, state=state, first=first, cache=cache)
        return F.dropout(self.final_layer_norm(x), self.dropout, self.training)


class HyperGridT5(WithBackend):
    """T5 with or without grids (the arguments are in the config).

    Parameters: `shared.weight`, `encoder.*`, `decoder.*`, and `lm_head.weight` unless the head is tied.
    """

    def __init__(self, config: HyperGridT5Config, *, device=None, dtype=None):
        super().__init__(config.backend)
        self.config = config
        factory = {"device": device, "dtype": dtype}
        self.shared = nn.Embedding(config.vocab_size, config.d_model, **factory)
        self.encoder = Stack(config, decoder=False, **factory)
        self.decoder = Stack(config, decoder=True, **factory)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.d_model, config.vocab_size, bias=False, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Normal, as T5 is: embedding and head of deviation 1, matrices of fan_in ** -0.5, queries of d_kv ** -0.5 more."""
        config = self.config
        for module in self.modules():
            if isinstance(module, (nn.Linear, HyperGridLinear)):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if isinstance(module, HyperGridLinear):
                module.hypergrid.reset_parameters()
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=1.0 if module is self.shared else config.d_model**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=1.0)

    def forward(
        self,
        input_ids,
        *,
        attention_mask=None,
        labels=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        local_state=None,
    ):
        """Logits of targets, each from the input and the targets before it, and their loss.

        Args:
            input_ids: (B, S), int64 or int32.
            attention_mask: (B, S), bool or integers 0 and 1, which of them count; padding may be on either side, and the
                local state is then the first that counts. Without one all do, padding included.
            labels: (B, T), int64; -100 is left out of the loss. The decoder reads them shifted, after the start token.
            decoder_input_ids: (B, T), in place of labels, or beside them.
            decoder_attention_mask: (B, T). Targets padded on the right need none: nothing before the padding sees it.
            local_state: (B, d_model), what all gates are made of, in place of the first tokens.

        Returns:
            `Output`: logits (B, T, vocab_size), and the loss, float32: the mean over labels that count, 0 where none does.

        Raises ValueError or TypeError for ids, labels, masks and states of wrong shapes, dtypes and values.
        """
        memory, mask = self._encode(input_ids, attention_mask, local_state)
        batch = input_ids.shape[0]
        if labels is not None:
            self._check_ids("labels", labels, batch, IGNORED)
            if decoder_input_ids is None:
                decoder_input_ids = self.shift_right(labels)
        if decoder_input_ids is None:
            raise ValueError("labels and decoder_input_ids are None; one of them must be given")
        self._check_ids("decoder_input_ids", decoder_input_ids, batch)
        if labels is not None and labels.shape != decoder_input_ids.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; it must be that of decoder_input_ids, "
                f"{tuple(decoder_input_ids.shape)}"
            )
        x = self.decoder(
            self.shared(decoder_input_ids),
            key_mask=_mask("decoder_attention_mask", decoder_attention_mask, decoder_input_ids),
            memory=memory,
            memory_mask=mask,
            state=local_state,
        )
        logits = self._logits(x)
        if labels is None:
            return Output(logits, None)
        wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide, labels.flatten().long(), ignore_index=IGNORED, reduction="sum")
        return Output(logits, total / (labels != IGNORED).sum().clamp(min=1))

    def shift_right(self, labels):
        """(B, T): the start token and the labels but the last, padding where they are -100."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == IGNORED, self.config.pad_token_id)

    def encode(self, input_ids, *, attention_mask=None, local_state=None):
        """(B, S, d_model): what the decoder attends to; zeros where the mask is False. See `forward` for the arguments."""
        return self._encode(input_ids, attention_mask, local_state)[0]

    def _encode(self, input_ids, attention_mask, local_state):
        self._check_ids("input_ids", input_ids)
        mask = _mask("attention_mask", attention_mask, input_ids)
        if local_state is not None:
            shape, width = (input_ids.shape[0], self.config.d_model), getattr(local_state, "shape", None)
            if width is None or tuple(width) != shape:
                what = f"a {type(local_state).__name__}" if width is None else f"of shape {tuple(width)}"
                raise ValueError(f"local_state is {what}; it must be a tensor {shape}")
        memory = self.encoder(self.shared(input_ids), key_mask=mask, state=local_state)
        return memory if mask is None else memory.masked_fill(~mask[..., None], 0.0), mask

    def _logits(self, x):
        if self.config.scale_decoder_outputs:
            x = x * self.config.d_model**-0.5
        head = self.shared if self.lm_head is None else self.lm_head
        return linear(x, head.weight, None, self.backend)

    def _check_ids(self, name, ids, batch=None, ignored=None):
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
            kind = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise TypeError(f"{name} is a {kind}; it must be a tensor of int64 or int32")
        if ids.dim() != 2 or ids.shape[1] == 0 or (batch is not None and ids.shape[0] != batch):
            wanted = "(B, T)" if batch is None else f"({batch}, T)"
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; it must be {wanted} with T of 1 or more")
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            counted = ids if ignored is None else ids.masked_fill(ids == ignored, 0)
            low, high = (int(i) for i in torch.aminmax(counted))
            if low < 0 or high >= self.config.vocab_size:
                also = "" if ignored is None else f", or {ignored}"
                raise ValueError(f"{name} has {low if low < 0 else high}; ids are 0 to {self.config.vocab_size - 1}{also}")

    @torch.no_grad()
    def generate(
        self,
        input_ids,
        *,
        attention_mask=None,
        local_state=None,
        max_new_tokens=64,
        num_beams=1,
        length_penalty=1.0,
        early_stopping=False,
    ):
        """The likeliest targets: greedy, or by beam search as Hugging Face's `generate` has it.

        Keys and values are kept, and the gates and the memory's keys are made once per example, whatever its beams. Put the
        model in `eval()` first.

        Args:
            input_ids, attention_mask, local_state: as in `forward`.
            max_new_tokens: the most that are made, the end token included.
            num_beams: 1 is greedy.
            length_penalty: finished beams have the score log p / length ** length_penalty.
            early_stopping: an example is done as soon as `num_beams` of its beams are finished (True), no running beam could
                be better at its present length (False), or at any length ("never").

        Returns (B, 1 + n) ids, n up to max_new_tokens: the start token, the target with its end token, padding.

        Raises ValueError or TypeError for arguments out of range, and as `forward` does.
        """
        check_integer("max_new_tokens", max_new_tokens)
        check_integer("num_beams", num_beams)
        if 2 * num_beams > self.config.vocab_size:
            raise ValueError(f"num_beams is {num_beams}; it must be at most half of vocab_size, {self.config.vocab_size}")
        check_number("length_penalty", length_penalty)
        if not isinstance(early_stopping, bool) and early_stopping != "never":
            raise ValueError(f"early_stopping is {early_stopping!r}; allowed are True, False, 'never'")
        memory, mask = self._encode(input_ids, attention_mask, local_state)
        caches = [Cache(max_new_tokens) for _ in self.decoder.block]

        def step(tokens):
            """Logits (B, K, vocab_size) of what follows the newest tokens (B, K) of K beams."""
            x = self.shared(tokens)
            x = self.decoder(x, memory=memory, memory_mask=mask, state=local_state, caches=caches)
            return self._logits(x).float()

        tokens = input_ids.new_full((input_ids.shape[0], num_beams, 1 + max_new_tokens), self.config.pad_token_id)
        tokens[:, :, 0] = self.config.decoder_start_token_id
        if tokens.shape[0] == 0:
            return tokens[:, 0, :1]
        if num_beams == 1:
            return greedy(step, tokens[:, 0], self.config.eos_token_id)

        def reorder(rows):
            for cache in caches:
                cache.reorder(rows)

        return beam_search(step, reorder, tokens, self.config.eos_token_id, float(length_penalty), early_stopping)

    def save_pretrained(self, path):
        """Writes config.json and model.safetensors into the folder `path`; `mmkernels.models.load(path)` reads them."""
        save_pretrained(self, path)


CONFIG, MODEL = HyperGridT5Config, HyperGridT5


def _mask(name, mask, ids):
    """A bool mask of the shape of `ids`, from one of bools or integers."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.is_floating_point():
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"{name} is a {kind}; it must be a tensor of bools, or of integers 0 and 1")
    if mask.shape != ids.shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; it must be that of the ids, {tuple(ids.shape)}")
    return mask.bool()


# --- Decoding ----------------------------------------------------------------------------------------------------------------

NEVER = -1e9  # a score that loses against every other


def greedy(step, tokens, end):
    """Fills `tokens` (B, 1 + L), padding behind the start token, with the likeliest next ones."""
    padding = tokens[:, 1].clone()
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for length in range(1, tokens.shape[1]):
        following = step(tokens[:, length - 1 : length])[:, 0].argmax(-1)
        tokens[:, length] = torch.where(done, padding, following)
        done |= following == end
        if done.all():
            break
    return tokens[:, : length + 1]


def beam_search(step, reorder, running, end, length_penalty, early_stopping):
    """The best of K beams for each example, from `running` (B, K, 1 + L), padding behind the start token.

    Of the 2 K likeliest continuations of an example's K beams, those of the first K that end are candidates for the K best
    targets; the likeliest K that do not end run on. (Each beam has one continuation that ends, so there are K of these.)
    """
    batch, beams, size = running.shape
    scores = torch.full((batch, beams), NEVER, device=running.device)
    scores[:, 0] = 0.0  # all beams start alike: go on from one
    best, best_scores = running.clone(), torch.full_like(scores, NEVER)
    finished = torch.zeros_like(scores, dtype=torch.bool)
    lengths = torch.zeros_like(scores, dtype=torch.int64)
    improving = torch.ones(batch, 1, dtype=torch.bool, device=running.device)
    first_row = torch.arange(batch, device=running.device)[:, None] * beams
    leading = torch.arange(2 * beams, device=running.device) < beams
    for length in range(1, size):
        logits = step(running[:, :, length - 1])
        likely, index = (logits.log_softmax(-1) + scores[..., None]).flatten(1).topk(2 * beams)
        parent, token = index // logits.shape[-1], index % logits.shape[-1]
        continued = _gather(running, parent)
        continued[:, :, length] = token
        ends = (token == end) | (length == size - 1)

        scores, going_on = likely.masked_fill(ends, NEVER).topk(beams)
        running = _gather(continued, going_on)

        accepted = ends & leading & improving
        if early_stopping is True:
            accepted &= ~finished.all(1, keepdim=True)
        new_scores = (likely / length**length_penalty).masked_fill(~accepted, NEVER)
        best_scores, kept = torch.cat([best_scores, new_scores], 1).topk(beams)
        best = _gather(torch.cat([best, continued], 1), kept)
        finished = _gather(torch.cat([finished, accepted], 1), kept)
        lengths = _gather(torch.cat([lengths, torch.full_like(token, length)], 1), kept)

        longest = size - 1 if early_stopping == "never" and length_penalty > 0.0 else length
        reachable = scores[:, :1] / longest**length_penalty
        worst = best_scores.amin(1, keepdim=True).masked_fill(~finished.all(1, keepdim=True), NEVER)
        improving = improving & (reachable > worst)
        if not improving.any() or (early_stopping is True and finished.all()):
            break
        reorder((parent.gather(1, going_on) + first_row).flatten())
    return best[:, 0, : 1 + int(lengths[:, 0].max())]


def _gather(tensor, numbers):
    """Those of the second dimension that have the `numbers` (B, n)."""
    return tensor.take_along_dim(numbers.view(*numbers.shape, *[1] * (tensor.dim() - 2)), 1)


# --- Checkpoints of Hugging Face ---------------------------------------------------------------------------------------------

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The first checkpoints have it; cross-attention has no positions.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def from_official(config: dict, state_dict: dict, *, grid=None, variant="L2", residual=True, backend="auto") -> HyperGridT5:
    """A T5 with the parameters of Hugging Face's T5ForConditionalGeneration, in the dtype of `state_dict`.

    With a `grid` its feed-forward layers are gated; grids that `state_dict` has not start fresh, as `HyperGridLinear` does.

    Args:
        config: the fields of config.json; those of no effect on the network are not read.
        state_dict: its parameters. `official.read_huggingface(folder)` reads both.
        grid, variant, residual, backend: see `HyperGridT5Config`.

    Raises ValueError for another architecture, for missing, unknown or misshapen entries.
    """
    official.check_mappings(config, state_dict)
    if config.get("model_type", "t5") not in ("t5", "mt5"):
        raise ValueError(f"config has model_type {config['model_type']!r}; allowed are 't5' and 'mt5'")
    state = dict(state_dict)
    state.pop(UNUSED, None)
    for name in COPIES:
        copy = state.pop(name, None)
        if copy is not None and not torch.equal(copy, state.setdefault("shared.weight", copy)):
            raise ValueError(f"state_dict has {name!r}, which is not 'shared.weight'; T5 has one embedding")
    head, shared = state.get("lm_head.weight"), state.get("shared.weight")
    tied = head is None or (config.get("tie_word_embeddings", True) and shared is not None and torch.equal(head, shared))
    if tied:
        state.pop("lm_head.weight", None)
    known = {field.name for field in dataclasses.fields(HyperGridT5Config)}
    sizes = {"scale_decoder_outputs": config.get("tie_word_embeddings", True)}
    sizes |= {name: value for name, value in config.items() if name in known}
    sizes |= {"tie_word_embeddings": tied, "grid": grid, "variant": variant, "residual": residual, "backend": backend}
    model = HyperGridT5(HyperGridT5Config(**sizes), device="meta", dtype=official.common_dtype(state))
    model.to_empty(device=next(iter(state.values())).device)
    for module in model.modules():
        if isinstance(module, HyperGridLinear):
            module.hypergrid.reset_parameters()
    fresh = {name: tensor for name, tensor in model.state_dict().items() if ".hypergrid." in name}
    load_weights(model, {**fresh, **state}, "state_dict")
    return model


def add_grids(model: HyperGridT5, grid, *, variant="L2", residual=True) -> HyperGridT5:
    """Gates the feed-forward layers of a plain T5, in place and with its weights; returns `model`.

    Raises ValueError for a model that has grids, and for grids that do not fit.
    """
    if model.config.grid is not None:
        raise ValueError(f"model has grids of {model.config.grid}; it must be a T5 without")
    config = dataclasses.replace(model.config, grid=grid, variant=variant, residual=residual)
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.add_grid(config)
    model.config = config
    return model

"""Problems of several modalities: bottleneck attention, the fusion layer around it, and a training step of the whole MBT.

The shapes are those of MBT-B (Nagrani et al. 2021): tokens of video and of sound, a CLS token in front of each, and bottleneck
tokens that every modality reads beside its own. A layer and a model are functions of their inputs and of every weight, so that
they are verified and timed like an op.
"""

import functools
from typing import NamedTuple

import torch
from torch.func import functional_call

import mmkernels
from mmkernels import testing
from mmkernels.models import mbt
from mmkernels.modules import BottleneckFusionLayer

from .problem import problem_dtype, problem_id

NAMES = ("rgb", "spectrogram", "flow", "depth", "infrared", "text", "touch", "pose")  # of modalities
WEIGHTS = "weights."  # tensors whose names begin so are a network's own


class Fusion(NamedTuple):
    """`op`: "bottleneck_attention", or "fusion_layer" or "mbt", which are networks around it."""

    op: str
    name: str
    batch: int
    tokens: tuple  # rows of each modality, without the bottleneck's
    bottlenecks: int
    heads: int
    head_dim: int
    query_rows: str = "all"  # "cls": the first row of each modality alone, as the last layer of a classifier computes it
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def network(self) -> bool:
        return self.op != "bottleneck_attention"

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(batch=1, tokens=tuple(2 for _ in self.tokens), head_dim=8)

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        b, h, d = self.batch, self.heads, self.head_dim
        cls = self.query_rows == "cls"
        if not self.network:
            tensors = {}
            for i, length in enumerate(self.tokens):
                tensors[f"tokens{i}"] = normal(b, length, 3, h, d)
                tensors[f"bottleneck{i}"] = normal(b, self.bottlenecks, 3, h, d)
            rows = [n for length in self.tokens for n in ((1, 0) if cls else (length, self.bottlenecks))]
            return tensors, {"query_rows": self.query_rows}, [(b, n, h * d) for n in rows]
        network = _network(self, "eager")
        weights = {WEIGHTS + name: _weight(name, p, normal) for name, p in network.named_parameters()}
        if self.op == "fusion_layer":
            tensors = {name: normal(b, n, h * d) for name, n in zip(NAMES, self.tokens, strict=False)}
            tensors["bottleneck"] = normal(b, self.bottlenecks, h * d)
            return tensors | weights, {}, [t.shape for t in tensors.values()]
        tensors = {m.name: normal(b, *m.shape, m.channels) for m in network.config.modalities}
        return tensors | weights, {}, [(b, network.config.num_classes)] * len(self.tokens)

    def wanted(self, pass_: str) -> tuple:
        if pass_ == "forward":
            return ()
        if not self.network:
            return tuple(f"{name}{i}" for i in range(len(self.tokens)) for name in ("tokens", "bottleneck"))
        weights = tuple(WEIGHTS + n for n, _ in _network(self, "eager").named_parameters())
        return weights if self.op == "mbt" else (*NAMES[: len(self.tokens)], "bottleneck", *weights)

    def exact(self, inputs, names: tuple) -> testing.Run:
        """Outputs and gradients in float64: by the op's reference, one example at a time; of a network by its plain twin."""
        wide = {n: t.double() for n, t in inputs.tensors.items()}
        if self.network:
            run = network_function(self, "eager")
            cotangent = [c.double() for c in inputs.cotangent]
            with torch.set_grad_enabled(bool(names)):
                return testing.run(run, wide, names, cotangent)
        examples = []
        for i in range(self.batch):
            one = {n: t[i : i + 1] for n, t in wide.items()}
            cotangent = [c[i : i + 1].double() for c in inputs.cotangent]
            with torch.set_grad_enabled(bool(names)):
                examples.append(testing.run(op_function("reference"), one, names, cotangent, **inputs.options))
        output = [torch.cat(parts) for parts in zip(*(e.output for e in examples), strict=True)]
        return testing.Run(output, {n: torch.cat([e.gradients[n] for e in examples]) for n in names})

    def attended(self) -> list:
        """(queries, keys) of each modality."""
        keys = [n + self.bottlenecks for n in self.tokens]
        return [(1, n) if self.query_rows == "cls" else (n, n) for n in keys]

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes): of the op its products and tensors; of a network its layers' products, and all weights."""
        b, c, item = self.batch, self.channels, self.torch_dtype.itemsize
        if not self.network:
            scores, queries = sum(n * m for n, m in self.attended()), sum(n for n, _ in self.attended())
            forward, backward = 4 * b * scores * c, 10 * b * scores * c
            inputs, output = 3 * b * sum(m for _, m in self.attended()) * c, b * queries * c
        else:
            network, fusing, alone = _network(self, "eager"), 1, 0
            if self.op == "mbt":
                fusing = len(network.encoder.layers) - network.config.fusion_layer
                alone = network.config.fusion_layer
            forward = backward = 0
            for layers, extra in ((fusing, self.bottlenecks), (alone, 0)):
                lengths = [n + extra for n in self.tokens]
                linears = 24 * b * sum(lengths) * c**2  # queries, keys, values, result, and an MLP four times as wide
                scores = b * sum(n * n for n in lengths) * c
                forward += layers * (linears + 4 * scores)
                backward += layers * (2 * linears + 10 * scores)
            inputs = sum(p.numel() for p in network.parameters()) + b * sum(self.tokens) * c
            output = b * sum(self.tokens) * c
        if pass_ == "forward":
            return forward, item * (inputs + output)
        backward_bytes = 2 * item * (inputs + output)
        if pass_ == "backward":
            return backward, backward_bytes
        return forward + backward, item * (inputs + output) + backward_bytes


def _fusion(name, tokens, **options):
    return Fusion("bottleneck_attention", name, 2, tokens, 5, 12, 64, **options)


FRAMES_32 = _fusion("mbt-32-frames", (3137, 401))
FRAMES_8 = _fusion("mbt-8-frames", (1569, 401))
SECONDS_4 = _fusion("mbt-4-seconds", (785, 201))
CLS = SECONDS_4._replace(name="mbt-4-seconds-cls", query_rows="cls")
LAYER, LAYER_8, LAYER_32 = (p._replace(op="fusion_layer") for p in (SECONDS_4, FRAMES_8, FRAMES_32))
MODEL = SECONDS_4._replace(op="mbt", batch=1)


# --- Inputs -----------------------------------------------------------------------------------------------------------------


def _weight(name, parameter, normal):
    """Such that every layer's output has the size of its input, and every weight a gradient (a new model's head is zero)."""
    if parameter.dim() == 1:
        return normal(*parameter.shape, scale=0.1, shift=1.0 if name.endswith("weight") else 0.0)
    tables = parameter.dim() == 3 and parameter.shape[0] == 1  # positions, CLS tokens, bottleneck
    return normal(*parameter.shape, scale=0.5 if tables else parameter[0].numel() ** -0.5)


# --- What is compared -------------------------------------------------------------------------------------------------------


def pairs(tensors) -> tuple:
    """tokens_qkv and bottleneck_qkv as lists."""
    return [[t for n, t in tensors.items() if n.startswith(kind)] for kind in ("tokens", "bottleneck")]


def interleave(tokens, bottleneck) -> list:
    return [t for pair in zip(tokens, bottleneck, strict=True) for t in pair]


@functools.cache
def op_function(backend):
    """`ops.bottleneck_attention` as a function of named tensors, which returns a list."""

    def run(query_rows="all", **tensors):
        return interleave(*mmkernels.ops.bottleneck_attention(*pairs(tensors), query_rows=query_rows, backend=backend))

    return run


def one_by_one(attention):
    """One modality after the other: join its rows, `attention` (B, H, N, D), take the result apart."""

    def run(query_rows="all", **tensors):
        outputs = []
        for tokens, bottleneck in zip(*pairs(tensors), strict=True):
            length, rows = (1, 1) if query_rows == "cls" else (tokens.shape[1], None)
            q, k, v = torch.cat([tokens, bottleneck], 1).permute(2, 0, 3, 1, 4)
            out = attention(q[:, :, :rows], k, v).transpose(1, 2).flatten(2)
            outputs += [out[:, :length], out[:, length:]]
        return outputs

    return run


def all_at_once(attention):
    """All rows of all modalities in one sequence; `attention(q, k, v, lengths)` keeps its parts from each other."""

    def run(**tensors):
        rows = interleave(*pairs(tensors))
        sizes = [t.shape[1] for t in rows]
        lengths = tuple(a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True))
        q, k, v = torch.cat(rows, 1).permute(2, 0, 3, 1, 4)
        return list(attention(q, k, v, lengths).transpose(1, 2).flatten(2).split(sizes, 1))

    return run


@functools.lru_cache(maxsize=8)
def _network(problem: Fusion, backend: str, prune: bool = True):
    """The layer or model of a problem, without memory: its weights are given with every call."""
    factory = {"device": "meta", "dtype": problem.torch_dtype}
    if problem.op == "fusion_layer":
        names = NAMES[: len(problem.tokens)]
        return BottleneckFusionLayer(names, problem.channels, num_heads=problem.heads, backend=backend, **factory)
    # Tokens are patches of 16 by 16: of frames of 14 by 14 patches, of a spectrogram of 8 mel patches; and one is CLS.
    frames, steps = (max(1, (n - 1) // per) for n, per in zip(problem.tokens, (196, 8), strict=True))
    network = mbt.MBT(
        mbt.MBTConfig(
            modalities=(
                mbt.ModalityConfig("rgb", (2 * frames, 224, 224), (2, 16, 16), "3d_conv"),
                mbt.ModalityConfig("spectrogram", (16 * steps, 128), (16, 16), "2d_conv"),
            ),
            channels=problem.channels,
            num_heads=problem.heads,
            mlp_channels=4 * problem.channels,
            num_bottlenecks=problem.bottlenecks,
            backend=backend,
        ),
        **factory,
    )
    if not prune:
        encode = network.encoder.forward
        network.encoder.forward = lambda tokens, key_masks, rows: encode(tokens, key_masks=key_masks, rows="all")
    return network


def network_function(problem: Fusion, backend: str, *, prune=True, compiler=lambda function: function):
    """The network as a function of its inputs and weights, which returns a list: of a model the logits of each modality, as
    in training (it drops nothing).

    `prune`: False computes all rows of the model's last layer, of which the classifier then reads one.
    """
    network = _network(problem, backend, prune)

    def call(weights, given):
        if problem.op == "fusion_layer":
            tokens = {n: t for n, t in given.items() if n != "bottleneck"}
            tokens, bottleneck = functional_call(network, weights, (tokens, given["bottleneck"]))
            return [*tokens.values(), bottleneck]
        return list(functional_call(network, weights, (given,)).values())

    call = compiler(call)

    def run(**tensors):
        weights = {n.removeprefix(WEIGHTS): t for n, t in tensors.items() if n.startswith(WEIGHTS)}
        return call(weights, {n: t for n, t in tensors.items() if not n.startswith(WEIGHTS)})

    return run


# --- Counting ---------------------------------------------------------------------------------------------------------------

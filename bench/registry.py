"""What is measured: attention problems at the shapes of the papers, and the passes timed for each.

Sizes are those of `Problem`: B batch, N queries, M keys, C channels of the input, H heads, D and E head dims of keys and
values. Counts of operations and bytes live in `roofline.py`, the functions that are compared in `baselines.py`.
"""

import difflib
import fnmatch
import math
from typing import NamedTuple

import torch

from . import adapted, adapters, conditional, decoding, fusion, perceiver, products, resampler, rows, text
from .problem import problem_dtype, problem_id

PASSES = ("forward", "backward", "step", "backward-dx", "step-dx")


class Problem(NamedTuple):
    """One attention problem. `channels`, `position` and `shared_queries` belong to latent_attention only."""

    op: str
    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    value_dim: int
    channels: int = 0  # of content and position together
    position: int = 0  # how many of them are the same for every example
    shared_queries: bool = False  # one array of queries for the whole batch: the latents of the first layer
    masked: bool = False  # a key mask that hides up to half of each example's keys
    bias: bool = False  # a bias (1, H, N, M) that wants a gradient
    dtype: str = "float32"
    chunk: int = 0  # latent_attention_stream reads the input in pieces of so many rows; 0: it is no candidate

    id = problem_id
    torch_dtype = problem_dtype

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(batch=1, queries=2, keys=3)


OtherProblem = (
    adapted.Adapted
    | adapters.Adapters
    | adapters.Fused
    | conditional.Conditional
    | decoding.Decoding
    | fusion.Fusion
    | perceiver.PerceiverIO
    | products.Product
    | resampler.Resampled
    | rows.Rows
    | text.Text
)


class Case(NamedTuple):
    problem: Problem | OtherProblem
    pass_: str  # forward: without gradients. backward: alone. step: both. -dx: the input wants a gradient too

    @property
    def id(self) -> str:
        return f"{self.problem.id}/{self.pass_}"


def _latent(name, n, m, channels, qk=None, v=None, heads=1, batch=1, **options):
    qk, v = qk or channels, v or channels
    return Problem("latent_attention", name, batch, n, m, heads, qk // heads, v // heads, channels, **options)


def _attention(name, n, m, d, e=None, heads=1, batch=1, **options):
    return Problem("attention", name, batch, n, m, heads, d, e or d, **options)


# Perceiver (Jaegle et al. 2021) and Perceiver IO (2022); MBT (Nagrani et al. 2021) for bottleneck tokens.
IMAGENET = _latent("imagenet-fourier", 512, 50176, 261, shared_queries=True)
IMAGENET_SPLIT = _latent("imagenet-fourier-split", 512, 50176, 261, position=258, shared_queries=True)
LEARNED = _latent("imagenet-learned", 512, 50176, 512, shared_queries=True)
CONV = _latent("imagenet-conv", 512, 3136, 322, shared_queries=True)
MODELNET = _latent("modelnet", 512, 2048, 387, shared_queries=True)
AUDIOSET = _latent("audioset", 512, 13024, 487, shared_queries=True)
KINETICS = _latent("kinetics", 784, 52097, 704, shared_queries=True)
FLOW = _latent("flow", 2048, 182528, 322, shared_queries=True)
BYTES = _latent("language-bytes", 256, 2048, 768, 256, 1280, heads=8, shared_queries=True, masked=True)
STARCRAFT = _latent("starcraft", 32, 512, 128, batch=32, masked=True)
CLASSIFY = _latent("class-decoder", 1, 512, 1024, batch=16, shared_queries=True)
STREAM, LONG_STREAM = (_latent(f"stream-{m}", 64, m, 64, shared_queries=True, chunk=4096) for m in (100_000, 1_000_000))
LATENT_TINY = _latent("tiny", 8, 32, 16)

SELF_IMAGENET = _attention("self-imagenet", 512, 512, 128, heads=8)
SELF_LANGUAGE = _attention("self-language", 256, 256, 32, 160, heads=8)
SELF_FLOW = _attention("self-flow", 2048, 2048, 32, heads=16)
CROSS_IMAGENET = _attention("cross-imagenet", 512, 50176, 261)
CROSS_BYTES = _attention("cross-language-bytes", 256, 2048, 32, 160, heads=8, masked=True)
MLM = _attention("mlm-decoder", 2048, 256, 32, 96, heads=8)
FLOW_DECODER = _attention("flow-decoder", 182528, 2048, 512)
TOKENS = _attention("tokens", 1568, 1568, 64, heads=12, batch=2)
FEW_QUERIES = _attention("bottleneck-reads-tokens", 4, 1568, 64, heads=12, batch=2)
FEW_KEYS = _attention("tokens-read-bottleneck", 1568, 4, 64, heads=12, batch=2)
# Of 4 s: 784 patches and a CLS token of the video, 200 and one of the sound.
FEW = [
    p._replace(name=f"{p.name}-{tokens}", **{side: tokens})
    for p, side in ((FEW_QUERIES, "keys"), (FEW_KEYS, "queries"))
    for tokens in (785, 201)
]
ONE_QUERY, TWO_QUERIES = (FEW_QUERIES._replace(name=f"queries-{n}", queries=n) for n in (1, 2))
BIASED = _attention("biased", 512, 512, 64, heads=8, bias=True)
ATTENTION_TINY = _attention("tiny", 8, 32, 16)


def _cases(passes, *problems, **changes):
    return [Case(p._replace(**changes), pass_) for p in problems for pass_ in passes]


def _on_gpu(problem, batch):
    return problem._replace(dtype="bfloat16", batch=batch * (problem.batch if problem.batch > 2 else 1))


_PRODUCTS = (products.FLOOR, products.GRID_16, products.GRID_32, products.SHORT_FLOOR, products.SHORT)
_DECODE = (products.DECODE, products.DECODE_LARGE)
_CONDITIONAL = (conditional.BASE, conditional.LARGE, conditional.BASE_256)
_MODALITIES = (fusion.FRAMES_32, fusion.FRAMES_8, fusion.SECONDS_4)


def _gpu_cases():
    """Ordered by value: a visit that is cut short has the first ones."""
    three, five = ("forward", "step", "backward"), ("forward", "step", "backward", "step-dx", "backward-dx")
    first = [_on_gpu(p, 8) for p in (IMAGENET, LEARNED, KINETICS)] + [_on_gpu(p, 1) for p in (IMAGENET, LEARNED, KINETICS)]
    cases = _cases(("forward",), *first) + _cases(five[1:], *first)
    cases += _cases(three, *(_on_gpu(p, 8) for p in (SELF_IMAGENET, CROSS_IMAGENET, TOKENS, FEW_QUERIES, FEW_KEYS)))
    cases += _cases(three, *(_on_gpu(p, 8) for p in (*_MODALITIES, fusion.CLS)))
    cases += _cases(
        ("forward", "step"), *(_on_gpu(p, 8) for p in (fusion.LAYER_32, fusion.LAYER_8, fusion.LAYER, fusion.MODEL))
    )
    cases += _cases(three, *(_on_gpu(p, 8) for p in (rows.NORM, rows.GELU)))
    for p in (*_CONDITIONAL, rows.TASKS, rows.TASKS_LARGE):
        cases += _cases(three, p._replace(dtype="bfloat16"))
    cases += _cases(("forward", "step"), conditional.LAYER._replace(dtype="bfloat16"))
    cases += _cases(three, *(p._replace(dtype="bfloat16", batch=8) for p in resampler.ATTENTIONS))
    cases += _cases(("forward", "step"), *(p._replace(dtype="bfloat16", batch=8) for p in resampler.MODULES))
    cases += _cases(three, *(p._replace(dtype="bfloat16", batch=128) for p in (*_PRODUCTS, products.LARGE)))
    cases += _cases(("forward",), *(p._replace(dtype="bfloat16", batch=128) for p in _DECODE))
    cases += _cases(three, products.GATE._replace(dtype="bfloat16"))
    cases += _cases(
        three, *(p._replace(dtype="bfloat16") for p in (*adapters.GPU, *adapters.MIXED, adapters.LARGE, *adapters.FUSED))
    )
    layers = (*adapted.ONE[3:], *adapted.SPLIT, adapted.SPLIT_64, *adapted.FUSE, adapted.LORA_8)
    cases += _cases(("forward", "step"), *(p._replace(dtype="bfloat16") for p in layers))
    cases += _cases(("forward", "step"), *(p._replace(dtype="bfloat16", batch=8 * p.batch) for p in perceiver.MODELS))
    cases += _cases(("step",), *(p._replace(dtype="bfloat16", batch=32) for p in (text.BASE, text.BASE_PLAIN)))
    cases += _cases(("forward",), *(p._replace(dtype="bfloat16", batch=32) for p in text.GENERATE_BASE))
    cases += _cases(three, *(p._replace(dtype="bfloat16") for p in (decoding.FLOW, decoding.KINETICS)))
    cases += _cases(three, decoding.MLM._replace(dtype="bfloat16", batch=8))
    cases += _cases(("forward",), LATENT_TINY, ATTENTION_TINY, dtype="bfloat16")
    cases += _cases(five, *(_on_gpu(p, 8) for p in (IMAGENET_SPLIT, AUDIOSET, CONV)))
    cases += _cases(three, *(_on_gpu(p, 8) for p in (BYTES, CROSS_BYTES, BIASED, MLM, SELF_FLOW, SELF_LANGUAGE)))
    cases += _cases(three, *(_on_gpu(p, 1) for p in (FLOW, FLOW_DECODER)))
    cases += _cases(three, *(_on_gpu(p, 8) for p in (MODELNET, STARCRAFT, CLASSIFY)))
    return cases + _cases(("forward", "step"), IMAGENET, SELF_IMAGENET)  # float32


PRESETS = {
    "quick": _cases(("forward",), LATENT_TINY, ATTENTION_TINY)
    + _cases(("forward", "step"), CONV, FEW_QUERIES, FEW_KEYS)
    + _cases(("forward",), BYTES, SELF_LANGUAGE, decoding.MLM)
    + _cases(("forward", "step"), fusion.SECONDS_4._replace(batch=1), rows.NORM, rows.GELU)
    + _cases(("forward",), products.SHORT_FLOOR._replace(batch=2), products.SHORT._replace(batch=2), products.GATE)
    + _cases(("forward", "step"), adapters.PFEIFFER[1], adapters.MIXED[0], adapters.FUSED[0]),
    "paper": _cases(("forward", "step", "step-dx", "backward", "backward-dx"), IMAGENET)
    + _cases(("forward", "step"), IMAGENET, dtype="bfloat16")
    + _cases(("forward",), LATENT_TINY, ATTENTION_TINY)
    + _cases(("step",), FEW_QUERIES, FEW_KEYS)
    + _cases(("forward", "step"), IMAGENET_SPLIT, AUDIOSET, CONV, BYTES, STARCRAFT, CLASSIFY)
    + _cases(("forward", "step"), SELF_IMAGENET, SELF_LANGUAGE, CROSS_BYTES, MLM, TOKENS, BIASED)
    + _cases(("forward", "step"), CROSS_IMAGENET, LEARNED, MODELNET)
    + _cases(("forward",), KINETICS)
    + _cases(("forward", "step"), decoding.FLOW_SLICE, decoding.MLM)
    + _cases(("forward",), decoding.KINETICS_SLICE)
    + _cases(("forward", "backward"), FEW_QUERIES, FEW_KEYS, *FEW, ONE_QUERY, TWO_QUERIES)
    + _cases(("forward", "step", "backward"), fusion.SECONDS_4, fusion.FRAMES_8, fusion.CLS)
    + _cases(("forward", "step"), fusion.FRAMES_32, fusion.LAYER, fusion.LAYER_8, fusion.MODEL)
    + _cases(("forward", "step", "backward"), rows.NORM, rows.GELU)
    + _cases(("forward", "step", "backward"), *_CONDITIONAL, rows.TASKS, rows.TASKS_LARGE)
    + _cases(("forward", "step"), conditional.LAYER)
    + _cases(("forward", "step", "backward"), *resampler.ATTENTIONS)
    + _cases(("forward", "step"), *resampler.MODULES)
    + _cases(("forward", "step", "backward"), products.MBT, *_PRODUCTS, products.GATE)
    + _cases(("forward",), *(p._replace(batch=b) for p in _DECODE for b in (1, 16, 64)))
    + _cases(("forward", "step", "backward"), *adapters.ALONE, *adapters.PFEIFFER, *adapters.HOULSBY, *adapters.PARALLEL)
    + _cases(("forward", "step", "backward"), *adapters.MIXED, adapters.LARGE, *adapters.FUSED[:2])
    + _cases(
        ("forward", "step"),
        *adapted.ONE,
        adapted.GELU_NEW,
        *adapted.OTHER,
        *adapted.SPLIT,
        adapted.SPLIT_64,
        *adapted.FUSE,
        adapted.LORA,
        adapted.LORA_8,
    )
    + _cases(("forward", "step"), *perceiver.MODELS)
    + _cases(("step",), text.SMALL, text.SMALL_PLAIN)
    + _cases(("forward",), *text.GENERATE)
    # Time and memory against M.
    + _cases(("forward",), *(IMAGENET._replace(name=f"keys-{m}", keys=m) for m in (1024, 4096, 16384, 65536)))
    + _cases(("forward", "step"), STREAM, LONG_STREAM),
    "gpu": _gpu_cases(),
}


def select(preset: str, op: str | None = None, patterns: list | None = None) -> list:
    """The cases of a preset, narrowed to an op and to ids that match one of some patterns (`*imagenet*/forward`).

    Raises ValueError when nothing is left, or for an unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; allowed are {', '.join(map(repr, PRESETS))}")
    cases = [c for c in PRESETS[preset] if op is None or c.problem.op == op]
    if not cases:
        ops = sorted({c.problem.op for c in PRESETS[preset]})
        raise ValueError(f"op is {op!r}; preset {preset!r} has cases of {', '.join(map(repr, ops))}")
    if not patterns:
        return cases
    chosen = {}
    for pattern in patterns:
        matching = [c for c in cases if fnmatch.fnmatch(c.id, pattern) or fnmatch.fnmatch(c.problem.id, pattern)]
        if not matching:
            near = difflib.get_close_matches(pattern, [c.id for c in cases], 8, 0.0)
            raise ValueError(f"case is {pattern!r}; it matches none of {len(cases)}, such as: " + ", ".join(near))
        chosen |= dict.fromkeys(matching)
    return [c for c in cases if c in chosen]


class Inputs(NamedTuple):
    tensors: dict  # arguments of the op by name
    options: dict  # arguments that are no tensors
    cotangent: torch.Tensor | list  # of the output, or of each of several

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


def make_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs of a problem: scores have unit variance, so softmax is neither uniform nor one-hot."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = problem.torch_dtype

    def normal(*shape, scale=1.0, shift=0.0):
        values = torch.randn(shape, generator=generator, device=device)
        return (values * scale + shift).to(dtype)

    if not isinstance(problem, Problem):
        tensors, options, shapes = problem.make_tensors(normal)
        return Inputs(tensors, options, [normal(*shape) for shape in shapes])
    b, n, m, h, d, e = problem[2:8]
    options, tensors = {}, {}
    if problem.op == "attention":
        tensors["q"], tensors["k"], tensors["v"] = normal(b, h, n, d), normal(b, h, m, d), normal(b, h, m, e)
        if problem.bias:
            tensors["bias"] = normal(1, h, n, m)
        output = (b, h, n, e)
    else:
        c, p = problem.channels, problem.position
        tensors["q"] = normal(1 if problem.shared_queries else b, n, h * d)
        tensors["x"] = normal(b, m, c - p, shift=0.3)
        if p:
            tensors["position"] = normal(m, p)
        tensors["w_k"], tensors["w_v"] = (normal(h * size, c, scale=1 / math.sqrt(c)) for size in (d, e))
        tensors["norm_weight"] = normal(c, scale=0.1, shift=1.0)
        tensors["norm_bias"], tensors["b_v"] = normal(c, scale=0.1), normal(h * e, scale=0.1)
        options["num_heads"] = h
        output = (b, n, h * e)
    if problem.masked:
        lengths = torch.randint(m // 2, m + 1, (b, 1), generator=generator, device=device)
        tensors["key_mask"] = torch.arange(m, device=device) < lengths
    return Inputs(tensors, options, normal(*output))


def wanted(problem: Problem, pass_: str) -> tuple:
    """The arguments whose gradients a pass computes."""
    if not isinstance(problem, Problem):
        return problem.wanted(pass_)
    if pass_ == "forward":
        return ()
    if problem.op == "attention":
        return ("q", "k", "v", "bias") if problem.bias else ("q", "k", "v")
    names = ("q", "w_k", "w_v", "norm_weight", "norm_bias", "b_v")
    return (*names, "x") if pass_.endswith("-dx") else names

"""Problems of perceiver resamplers: the attention of latents to context and latents, whose keys are two segments, and a whole
resampler of one layer, at the sizes of Idefics2 (heads that share keys) and of IP-Adapter "plus".

A resampler is a function of its context and of every weight, so that it is verified and timed like an op.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import mmkernels
from mmkernels import testing
from mmkernels.modules import PerceiverResampler

from .fusion import WEIGHTS
from .problem import lacking, problem_dtype, problem_id


class Resampled(NamedTuple):
    """`op`: "resampler_attention", or "resampler" with its layer and projections. `like`: "idefics2" or "ip_adapter"."""

    op: str
    name: str
    batch: int
    queries: int
    keys: int  # of the context
    channels: int
    heads: int
    kv_heads: int
    head_dim: int
    like: str
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    @property
    def missing(self) -> str:
        """What is not installed that the peer is of; empty when nothing is."""
        return lacking("transformers" if self.like == "idefics2" else "diffusers")

    def small(self):
        """A tiny one with the same candidates."""
        groups = self.heads // self.kv_heads
        return self._replace(batch=2, queries=3, keys=20, channels=16, heads=2 * groups, kv_heads=2, head_dim=8)

    @property
    def shape(self) -> dict:
        """Arguments of the module."""
        sizes = dict(num_latents=self.queries, depth=1, num_heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        if self.like == "idefics2":
            return sizes | dict(activation="silu", gated=True, norm="rms", eps=1e-6)
        return sizes | dict(input_channels=self.channels, output_channels=self.channels)

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        b, n, m, d = self.batch, self.queries, self.keys, self.head_dim
        if self.op == "resampler":
            weights = {WEIGHTS + name: _weight(name, p, normal) for name, p in _module(self, "eager").named_parameters()}
            return {"x": normal(b, m, self.channels)} | weights, {}, [(b, n, self.channels)]
        tensors = {"q": normal(b, self.heads, n, d)}
        tensors |= {name: normal(b, self.kv_heads, rows, d) for name, rows in (("k", m), ("v", m), ("own_k", n), ("own_v", n))}
        return tensors, {}, [(b, self.heads, n, d)]

    def wanted(self, pass_: str) -> tuple:
        if pass_ == "forward":
            return ()
        if self.op == "resampler":
            return ("x", *(WEIGHTS + name for name, _ in _module(self, "eager").named_parameters()))
        return ("q", "k", "v", "own_k", "own_v")

    def exact(self, inputs, names: tuple) -> testing.Run:
        """Output and gradients in float64: by the op's reference; of a resampler by its plain twin."""
        wide = {n: t.double() for n, t in inputs.tensors.items()}
        plain = function(self._replace(dtype="float64"), "eager" if self.op == "resampler" else "reference")
        with torch.set_grad_enabled(bool(names)):
            return testing.run(plain, wide, names, [c.double() for c in inputs.cotangent])

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes): of all products; of tensors and weights once, twice in the backward."""
        b, n, rows = self.batch, self.queries, self.keys + self.queries
        forward, backward = (factor * b * self.heads * n * rows * self.head_dim for factor in (4, 10))
        elements = 2 * b * self.head_dim * (self.heads * n + self.kv_heads * rows)
        if self.op == "resampler":
            products = 0
            for name, p in _module(self, "eager").named_parameters():
                if p.dim() == 2 and name != "latents":
                    of_context = "key" in name or "value" in name, name.startswith("input")
                    products += 2 * p.numel() * b * (rows if of_context[0] else self.keys if of_context[1] else n)
            forward, backward = forward + products, backward + 2 * products
            elements = b * rows * self.channels + sum(p.numel() for p in _module(self, "eager").parameters())
        moved = self.torch_dtype.itemsize * elements
        if pass_ == "forward":
            return forward, moved
        return (backward, 2 * moved) if pass_ == "backward" else (forward + backward, 3 * moved)


# Idefics2-8b reads 4900 patches of an image of 980 x 980, or 980 of a smaller one; IP-Adapter plus 257 tokens of a ViT-H, with
# the widths of SDXL and of SD 1.5.
LARGE = Resampled("resampler_attention", "idefics2-4900", 1, 64, 4900, 4096, 16, 4, 96, "idefics2")
MEDIUM = LARGE._replace(name="idefics2-980", batch=2, keys=980)
XL = Resampled("resampler_attention", "ip-adapter-xl", 2, 16, 257, 1280, 20, 20, 64, "ip_adapter")
SD = XL._replace(name="ip-adapter-sd15", channels=768, heads=12, kv_heads=12)
ATTENTIONS = (LARGE, MEDIUM, XL, SD)
MODULES = tuple(p._replace(op="resampler") for p in ATTENTIONS)


def _weight(name, parameter, normal):
    """Such that what a layer adds has the size of what it is added to."""
    if parameter.dim() == 1:
        return normal(*parameter.shape, scale=0.1, shift=1.0 if name.endswith("weight") else 0.0)
    return normal(*parameter.shape, scale=1.0 if name == "latents" else parameter.shape[1] ** -0.5)


# --- What is compared -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _module(problem: Resampled, backend: str) -> nn.Module:
    """The resampler of a problem, without memory: its weights are given with every call."""
    return PerceiverResampler(
        problem.channels, **problem.shape, backend=backend, device="meta", dtype=problem.torch_dtype
    ).eval()


def network_function(network, rename, compiler=lambda function: function, **options):
    """A module without memory as a function of its context and of weights by the names of ours; `rename`: ours -> its own."""

    def call(weights, x):
        return functional_call(network, weights, (x,), options)

    call = compiler(call)
    return lambda x, **weights: [call(rename({n.removeprefix(WEIGHTS): t for n, t in weights.items()}), x)]


def function(problem: Resampled, backend: str, *, compiler=lambda function: function):
    """The problem as a function of named tensors that returns a list."""
    if problem.op == "resampler":
        return network_function(_module(problem, backend), lambda weights: weights, compiler)
    if backend == "eager":
        call = _repeated
    elif backend == "sdpa":
        call = _sdpa
    else:

        def call(q, k, v, own_k, own_v):
            return mmkernels.ops.attention(q, (k, own_k), (v, own_v), backend=backend)

    call = compiler(call)
    return lambda **tensors: [call(**tensors)]


def _repeated(q, k, v, own_k, own_v):
    """Keys of context and latents joined, and repeated for every head."""
    return testing.eager_attention(q, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2))


def _sdpa(q, k, v, own_k, own_v):
    return F.scaled_dot_product_attention(q, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2), enable_gqa=True)

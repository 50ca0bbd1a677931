"""Problems of adapters: one after a sub-layer, as AdapterHub's methods place it, and batches whose examples have several.

The shapes are those of BERT-base and BERT-large. Floors: the two matrix products alone, and, of a mixed batch, all examples
with one adapter.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import mmkernels
from mmkernels import testing

from .problem import problem_dtype, problem_id


class Adapters(NamedTuple):
    """`place`: "alone" (x + up), "pfeiffer", "houlsby", "parallel" (of what the sub-layer was given), or "products".

    `adapters`: of a bank, in turn over the examples; 0: one adapter. `first`: all examples have the bank's first one.
    """

    op: str
    name: str
    batch: int
    length: int
    channels: int
    bottleneck: int
    place: str
    adapters: int = 0
    first: bool = False
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(batch=3, length=2, channels=8, bottleneck=4)

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        rows, c, r = (self.batch, self.length, self.channels), self.channels, self.bottleneck
        bank = (self.adapters,) if self.adapters else ()
        tensors = {"x": normal(*rows), "w_down": normal(*bank, r, c, scale=c**-0.5), "b_down": normal(*bank, r, scale=0.1)}
        tensors |= {"w_up": normal(*bank, c, r, scale=r**-0.5), "b_up": normal(*bank, c, scale=0.1)}
        if self.place != "alone":
            tensors["stream"] = normal(*rows)
            tensors |= {"norm_weight": normal(c, scale=0.1, shift=1.0), "norm_bias": normal(c, scale=0.1)}
        if self.adapters:
            tensors["index"] = torch.arange(self.batch, device=tensors["x"].device) % self.adapters
        return tensors, {}, [rows]

    def wanted(self, pass_: str) -> tuple:
        """The pre-trained norm is frozen."""
        if pass_ == "forward":
            return ()
        return ("x", "w_down", "b_down", "w_up", "b_up", *(("stream",) if self.place != "alone" else ()))

    def exact(self, inputs, names: tuple) -> testing.Run:
        with torch.set_grad_enabled(bool(names)):
            wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
            cotangent = [c.double() for c in inputs.cotangent]
            return testing.run(function(self, "reference"), wide, names, cotangent)

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes): of the products, the backward with its bottleneck made again; every array once."""
        rows = self.batch * self.length
        product, weights = 2 * rows * self.channels * self.bottleneck, 2 * self.channels * self.bottleneck
        weights *= max(self.adapters, 1)
        arrays = 1 if self.place == "alone" else 2  # of rows, that are read
        item = self.torch_dtype.itemsize
        forward = 2 * product, item * ((arrays + 1) * rows * self.channels + weights)
        backward = 5 * product, item * ((2 * arrays + 1) * rows * self.channels + 2 * weights)
        if pass_ == "step":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if pass_ == "forward" else backward


class Fused(NamedTuple):
    """AdapterFusion of `adapters` outputs; op is "adapter_fusion"."""

    op: str
    name: str
    batch: int
    length: int
    channels: int
    adapters: int
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(batch=2, length=3, channels=8, adapters=3)

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); scores have unit variance."""
        rows, c = (self.batch, self.length), self.channels
        tensors = {"query": normal(*rows, c), "outputs": normal(*rows, self.adapters, c)}
        tensors |= {"w_q": normal(c, c, scale=c**-0.5), "b_q": normal(c, scale=0.1), "w_k": normal(c, c, scale=1 / c)}
        return tensors | {"b_k": normal(c, scale=0.1), "w_v": normal(c, c, scale=c**-0.5)}, {}, [(*rows, c)]

    def wanted(self, pass_: str) -> tuple:
        """Not b_k, whose gradient is zero."""
        return () if pass_ == "forward" else ("query", "outputs", "w_q", "b_q", "w_k", "w_v")

    def exact(self, inputs, names: tuple) -> testing.Run:
        with torch.set_grad_enabled(bool(names)):
            wide = {n: t.double() for n, t in inputs.tensors.items()}
            cotangent = [c.double() for c in inputs.cotangent]
            return testing.run(mmkernels.ops.adapter_fusion, wide, names, cotangent, backend="reference")

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes): of three products a token with absorbed projections; every array once."""
        rows, c = self.batch * self.length, self.channels
        operations = 6 * rows * c * c + 4 * rows * self.adapters * c
        arrays, item = rows * c * (self.adapters + 2) + 3 * c * c, self.torch_dtype.itemsize
        forward, backward = (operations, item * arrays), (2 * operations, 2 * item * arrays)
        if pass_ == "step":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if pass_ == "forward" else backward

    def parts(self, pass_: str) -> tuple:
        """(operations of the library's products, bytes of the kernel between them, launches), forward or backward."""
        rows, c, item = self.batch * self.length, self.channels, self.torch_dtype.itemsize
        arrays = self.adapters + 2 if pass_ == "forward" else 2 * self.adapters + 3  # of rows
        moved = item * rows * c * arrays + 4 * rows * self.adapters
        return (6 * rows * c * c, moved, 4) if pass_ == "forward" else (12 * rows * c * c, moved, 8)


def _problem(name, batch, length, bottleneck, place, channels=768, **options):
    return Adapters("adapter", name, batch, length, channels, bottleneck, place, **options)


# One example, where calls dominate; 1024 and 4096 tokens.
ALONE = [_problem(f"alone-{n}x128-r{r}", n, 128, r, "alone") for n in (1, 8, 32) for r in (48, 64)]
PFEIFFER = [_problem(f"pfeiffer-{n}x128", n, 128, 48, "pfeiffer") for n in (1, 8, 32)]
HOULSBY = [_problem(f"houlsby-{n}x128", n, 128, 48, "houlsby") for n in (1, 8, 32)]
PARALLEL = [_problem(f"parallel-{n}x128", n, 128, 384, "parallel") for n in (8, 32)]
MIXED = [
    _problem("mixed-8x128", 8, 128, 48, "alone", adapters=8),
    _problem("mixed-32x128", 32, 128, 48, "pfeiffer", adapters=8),
    _problem("mixed-64x64", 64, 64, 48, "pfeiffer", adapters=8),
]
LARGE = _problem("large-mixed-32x128", 32, 128, 64, "pfeiffer", 1024, adapters=8)
FUSED = [Fused("adapter_fusion", f"{n}x128-{a}", n, 128, 768, a) for n, a in ((8, 3), (8, 8), (8, 16), (32, 8))]
GPU = [
    *(_problem(f"{place}-16x512", 16, 512, r, place) for place, r in (("pfeiffer", 48), ("houlsby", 48), ("parallel", 384))),
    *(_problem(f"pfeiffer-16x512-r{r}", 16, 512, r, "pfeiffer") for r in (12, 384)),
    _problem("mixed-64x128", 64, 128, 48, "pfeiffer", adapters=16),
    _problem("mixed-16x512", 16, 512, 48, "pfeiffer", adapters=4),
]


# --- What is compared -------------------------------------------------------------------------------------------------------


def function(problem: Adapters, backend: str):
    """The op as placed, or its plain twin for "eager", as a function of named tensors."""
    if problem.place == "products":
        return products

    def placed(x, w_down, b_down, w_up, b_up, stream=None, norm_weight=None, norm_bias=None, index=None):
        norm = {"out_norm_weight": norm_weight, "out_norm_bias": norm_bias}
        if problem.place == "alone":
            options = {"residual": x}
        elif problem.place == "pfeiffer":
            before = {"input_residual": stream, "norm_weight": norm_weight, "norm_bias": norm_bias}
            options = norm | before | {"residual": (x, stream)}
        elif problem.place == "houlsby":
            options = norm | {"residual": (x, stream)}
        else:
            x, options = stream, norm | {"residual": (x, stream)}
        weights = (w_down, b_down, w_up, b_up)
        if problem.first:
            weights = (t[0] for t in weights)
        elif index is not None:
            options |= {"index": index}
        if backend == "eager":
            return testing.eager_adapter(x, *weights, **options)
        return mmkernels.ops.adapter(x, *weights, **options, backend=backend)

    return placed


def products(x, w_down, b_down, w_up, b_up):
    """The matrix products of an adapter alone; of a bank, of the first one for all rows."""
    if w_down.dim() == 3:
        w_down, b_down, w_up, b_up = w_down[0], b_down[0], w_up[0], b_up[0]
    return F.linear(F.linear(x, w_down, b_down), w_up, b_up)


def explain(problem: Adapters, tensors: dict):
    """Which backend would run it."""
    weights = [tensors[n] for n in ("w_down", "b_down", "w_up", "b_up")]
    return mmkernels.explain(problem.op, tensors["x"], *weights, index=tensors.get("index"))

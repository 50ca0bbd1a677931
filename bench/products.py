"""Problems of matrix products: a linear layer, the same one gated block by block by HyperGrid, and the gate's own making.

The shapes are those of the second feed-forward matrix of T5-base, which HyperGrid gates. The `linear` problems of the same
sizes are the floor of the gated ones.
"""

import functools
from typing import NamedTuple

import torch

import mmkernels
from mmkernels import testing

from .problem import problem_dtype, problem_id


class Product(NamedTuple):
    """`op`: "linear", "hypergrid_linear" or "hypergrid_gate"; `grid`: (R, C), of the last two."""

    op: str
    name: str
    batch: int
    length: int
    channels: int
    outputs: int
    grid: tuple = ()
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(batch=2, length=3, channels=16, outputs=32, grid=self.grid and (2, 4))

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        b, k, n = self.batch, self.channels, self.outputs
        if self.op == "hypergrid_gate":
            return {"row": normal(b, self.grid[0]), "column": normal(b, self.grid[1])}, {}, [(b, *self.grid)]
        tensors = {"x": normal(b, self.length, k), "weight": normal(n, k, scale=k**-0.5)}
        tensors |= {"gate": normal(b, *self.grid).sigmoid()} if self.grid else {"bias": normal(n)}
        return tensors, {}, [(b, self.length, n)]

    def wanted(self, pass_: str) -> tuple:
        if pass_ == "forward":
            return ()
        names = {"linear": ("x", "weight", "bias"), "hypergrid_linear": ("x", "weight", "gate")}
        return names.get(self.op, ("row", "column"))

    def exact(self, inputs, names: tuple) -> testing.Run:
        with torch.set_grad_enabled(bool(names)):
            wide = {n: t.double() for n, t in inputs.tensors.items()}
            return testing.run(function(self.op, "reference"), wide, names, [c.double() for c in inputs.cotangent])

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes): of the ungated product, and of every tensor once; of a gate some ten operations an entry."""
        rows, gates = self.batch * self.length, self.batch * (self.grid[0] * self.grid[1] if self.grid else 0)
        if self.op == "hypergrid_gate":
            operations, inputs, output = 10 * gates, self.batch * sum(self.grid), gates
        else:
            operations = 2 * rows * self.channels * self.outputs
            inputs, output = rows * self.channels + self.channels * self.outputs + gates, rows * self.outputs
        item = self.torch_dtype.itemsize
        forward, backward = (operations, item * (inputs + output)), (2 * operations, item * (2 * inputs + output))
        if pass_ == "step":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if pass_ == "forward" else backward


def _gated(name, batch, length, grid):
    return Product("hypergrid_linear", name, batch, length, 3072, 768, grid)


GRID_16, GRID_32 = _gated("t5-base-16x16", 4, 512, (16, 16)), _gated("t5-base-32x32", 4, 512, (32, 32))
SHORT = _gated("t5-base-short-32x32", 16, 128, (32, 32))
LARGE = GRID_32._replace(name="t5-large-32x32", channels=4096, outputs=1024)
# A step of decoding: every row has a gate of its own.
DECODE, DECODE_LARGE = (p._replace(name=f"{p.name}-decode", batch=1, length=1) for p in (GRID_32, LARGE))
FLOOR, SHORT_FLOOR = (p._replace(op="linear", name=n, grid=()) for p, n in ((GRID_16, "t5-base"), (SHORT, "t5-base-short")))
MBT = Product("linear", "mbt-4-seconds", 2, 790, 768, 3072)
GATE = Product("hypergrid_gate", "t5-base-32x32", 128, 1, 3072, 768, (32, 32))


# --- What is compared -------------------------------------------------------------------------------------------------------


def by_blocks(x, weight, gate):
    """The gate inside one einsum over the blocks."""
    rows, columns = gate.shape[1:]
    blocks = torch.unflatten(torch.unflatten(weight, 1, (rows, -1)), 0, (columns, -1))
    return torch.einsum("btrk,cnrk,brc->btcn", torch.unflatten(x, 2, (rows, -1)), blocks, gate).flatten(2)


def ungated(x, weight):
    """The floor of a gated product: the same without the gate. (torch's own has no argument names.)"""
    return torch.nn.functional.linear(x, weight)


PLAIN = {
    "linear": torch.nn.functional.linear,
    "hypergrid_linear": testing.eager_hypergrid_linear,
    "hypergrid_gate": testing.eager_hypergrid_gate,
}


def function(op: str, backend: str):
    """The op, or its plain twin for "eager", as a function of named tensors."""
    return PLAIN[op] if backend == "eager" else functools.partial(getattr(mmkernels.ops, op), backend=backend)

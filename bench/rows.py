"""Problems of the ops that go over rows once: LayerNorm with its residual addition, and GELU with its bias.

The shapes are those of a transformer layer of 768 channels over the rows of MBT's clips of 4 s, and of CA-MTL's layers, whose
norms have a gain for each task.
"""

from typing import NamedTuple

import torch

import mmkernels
from mmkernels import testing

from .problem import problem_dtype, problem_id


class Rows(NamedTuple):
    """`op`: "film_layer_norm", with a residual, its bias, a gain and a bias; or "bias_gelu", with a bias."""

    op: str
    name: str
    batch: int
    length: int
    channels: int
    tasks: int = 0  # that have gains of their own; 0: one gain for all
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(batch=1, length=2, channels=8, tasks=min(self.tasks, 2))

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        shape, channels = (self.batch, self.length, self.channels), self.channels
        if self.op == "bias_gelu":
            return {"x": normal(*shape), "bias": normal(channels, scale=0.1)}, {}, [shape]
        tensors = {"x": normal(*shape), "residual": normal(*shape), "residual_bias": normal(channels, scale=0.1)}
        tensors |= {"gain": normal(channels, scale=0.1, shift=1.0), "bias": normal(channels, scale=0.1)}
        if self.tasks:
            tensors["gain"] = normal(self.tasks, channels, scale=0.1, shift=1.0)
            tensors["index"] = torch.arange(self.batch, device=tensors["x"].device) % self.tasks
        return tensors, {}, [shape, shape]

    def wanted(self, pass_: str) -> tuple:
        if pass_ == "forward":
            return ()
        return ("x", "bias") if self.op == "bias_gelu" else ("x", "residual", "residual_bias", "gain", "bias")

    def exact(self, inputs, names: tuple) -> testing.Run:
        with torch.set_grad_enabled(bool(names)):
            wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
            return testing.run(function(self.op, "reference"), wide, names, [c.double() for c in inputs.cotangent])

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes): some ten operations an element, which no device waits for."""
        elements = self.batch * self.length * self.channels
        arrays = 2 if self.op == "bias_gelu" else 4  # read and written once; the backward reads s and two gradients
        forward, backward = arrays * elements, (arrays + (1 if self.op == "bias_gelu" else 0)) * elements
        moved = {"forward": forward, "backward": backward}.get(pass_, forward + backward)
        return 10 * elements * (2 if pass_ == "step" else 1), self.torch_dtype.itemsize * moved


NORM = Rows("film_layer_norm", "mbt-4-seconds", 2, 790, 768)
TASKS = Rows("film_layer_norm", "ca-mtl-base", 32, 128, 768, 8)
TASKS_LARGE = Rows("film_layer_norm", "ca-mtl-large", 32, 128, 1024, 8)
GELU = Rows("bias_gelu", "mbt-4-seconds", 2, 790, 3072)


def function(op: str, backend: str):
    """The op, or its plain twin for "eager", as a function of named tensors that returns a list."""
    if backend == "eager":
        plain = {"film_layer_norm": testing.eager_film_layer_norm, "bias_gelu": testing.eager_bias_gelu}[op]
    else:
        plain = getattr(mmkernels.ops, op)

    def run(**tensors):
        out = plain(**tensors) if backend == "eager" else plain(**tensors, backend=backend)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    return run

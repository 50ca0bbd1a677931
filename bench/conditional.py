"""Problems of CA-MTL (Pilault et al. 2021): attention with a bias of diagonal blocks, and a layer around it.

The shapes are those of its base and large models, with 8 tasks in a batch of 32 and texts of half to all of the length. A
layer is a function of its inputs and of every weight, so that it is verified and timed like an op.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import mmkernels
from mmkernels import testing
from mmkernels.models import ca_mtl

from .fusion import WEIGHTS
from .problem import problem_dtype, problem_id


class Conditional(NamedTuple):
    """`op`: "conditional_attention", or "ca_mtl_layer", a layer of the model's upper half with its FiLMs."""

    op: str
    name: str
    batch: int
    length: int
    heads: int
    head_dim: int
    block: int
    tasks: int
    dtype: str = "float32"

    id = problem_id
    torch_dtype = problem_dtype

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    def small(self):
        """A tiny one with the same candidates."""
        return self._replace(batch=2, length=16, heads=2, head_dim=16, block=8, tasks=2)

    def make_tensors(self, normal) -> tuple:
        """(tensors by name, options, shapes of the outputs); `normal(*shape)` makes random numbers."""
        b, n, h, d, c = self.batch, self.length, self.heads, self.head_dim, self.block
        if self.op == "ca_mtl_layer":
            weights = {WEIGHTS + name: _weight(p, normal) for name, p in _layer(self, "eager").named_parameters()}
            tensors = {"x": normal(b, n, h * d), "tasks": normal(self.tasks, h * d)} | weights
            shapes = [(b, n, h * d)]
        else:
            tensors = {name: normal(b, h, n, d) for name in "qkv"}
            tensors["matrix"] = normal(n, c, scale=0.5)
            tensors |= {name: normal(self.tasks, c, scale=0.5) for name in ("gain", "shift")}
            shapes = [(b, h, n, d)]
        first = next(iter(tensors.values()))
        tensors["index"] = torch.arange(b, device=first.device) % self.tasks
        lengths = n // 2 + torch.arange(b, device=first.device) * (n - n // 2) // max(b - 1, 1)
        tensors["key_mask"] = torch.arange(n, device=first.device) < lengths[:, None]
        return tensors, {}, shapes

    def wanted(self, pass_: str) -> tuple:
        if pass_ == "forward":
            return ()
        if self.op == "ca_mtl_layer":
            return ("x", "tasks", *(WEIGHTS + name for name, _ in _layer(self, "eager").named_parameters()))
        return ("q", "k", "v", "matrix", "gain", "shift")

    def exact(self, inputs, names: tuple) -> testing.Run:
        """Outputs and gradients in float64: by the op's reference; of a layer by its plain twin."""
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.tensors.items()}
        plain = function(self, "eager" if self.op == "ca_mtl_layer" else "reference")
        with torch.set_grad_enabled(bool(names)):
            return testing.run(plain, wide, names, [c.double() for c in inputs.cotangent])

    def counts(self, pass_: str) -> tuple:
        """(operations, bytes): of all products; of tensors and weights once, twice in the backward."""
        rows, c = self.batch * self.length, self.channels
        forward, backward = 4 * rows * self.length * c, 10 * rows * self.length * c
        elements = 4 * rows * c
        if self.op == "ca_mtl_layer":
            products = 24 * rows * c**2
            forward, backward = forward + products, backward + 2 * products
            elements = 2 * rows * c + sum(p.numel() for p in _layer(self, "eager").parameters())
        moved = self.torch_dtype.itemsize * elements
        if pass_ == "forward":
            return forward, moved
        return (backward, 2 * moved) if pass_ == "backward" else (forward + backward, 3 * moved)


BASE = Conditional("conditional_attention", "base-128", 32, 128, 12, 64, 22, 8)
LARGE = Conditional("conditional_attention", "large-128", 32, 128, 16, 64, 16, 8)
BASE_256 = Conditional("conditional_attention", "base-256", 32, 256, 12, 64, 86, 8)
LAYER = BASE._replace(op="ca_mtl_layer", name="base-128-upper")


def _weight(parameter, normal):
    """Such that a layer's output has the size of its input, and tasks differ."""
    if parameter.dim() == 1:
        return normal(*parameter.shape, scale=0.1, shift=1.0)
    return normal(*parameter.shape, scale=0.5 * parameter.shape[1] ** -0.5)


# --- What is compared -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _layer(problem: Conditional, backend: str) -> nn.Module:
    """The layer of a problem, without memory: its weights are given with every call."""
    config = ca_mtl.CAMTLConfig(
        hidden_size=problem.channels,
        max_seq_length=problem.length,
        num_attention_heads=problem.heads,
        intermediate_size=4 * problem.channels,
        max_position_embeddings=problem.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        backend=backend,
    )
    assert config.block == problem.block
    return ca_mtl.Layer(config, conditional=True, device="meta", dtype=problem.torch_dtype)


def function(problem: Conditional, backend: str, *, compiler=lambda function: function):
    """The problem as a function of named tensors that returns a list; "eager" and "sdpa" write the bias as a matrix."""
    if problem.op == "ca_mtl_layer":
        layer = _layer(problem, backend)

        def call(weights, x, tasks, index, key_mask):
            return functional_call(layer, weights, (x, tasks, index, key_mask))[1]

        call = compiler(call)

        def run(x, tasks, index, key_mask, **weights):
            return [call({n.removeprefix(WEIGHTS): t for n, t in weights.items()}, x, tasks, index, key_mask)]

        return run
    if backend in ("eager", "sdpa"):
        call = _materialised if backend == "eager" else _sdpa
    else:

        def call(q, k, v, matrix, gain, shift, index, key_mask):
            bias = mmkernels.ops.BlockDiagonalBias(matrix, gain, shift, index)
            return mmkernels.ops.attention(q, k, v, key_mask=key_mask, bias=bias, backend=backend)

    call = compiler(call)
    return lambda **tensors: [call(**tensors)]


def _bias(matrix, gain, shift, index, key_mask):
    """What a user writes: blocks on the diagonal of a matrix of each example, with the mask added to it."""
    bias = testing.eager_block_diagonal_bias(matrix, gain, shift, index, keys=matrix.shape[0])
    return bias.masked_fill(~key_mask[:, None, None, :], float("-inf"))


def _materialised(q, k, v, matrix, gain, shift, index, key_mask):
    return testing.eager_attention(q, k, v, bias=_bias(matrix, gain, shift, index, key_mask))


def _sdpa(q, k, v, matrix, gain, shift, index, key_mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_bias(matrix, gain, shift, index, key_mask).to(q.dtype))

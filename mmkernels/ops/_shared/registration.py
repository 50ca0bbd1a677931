"""Where a backend's registered ops are found, and how their fakes are attached.

Namespaces: `mmkernels` (native, one name for CPU and CUDA tensors), `mmkernels_triton` (defined in `ops/<family>/kernels.py`),
`mmkernels_emulator` (the CUDA source on CPU tensors, in tests). All have the same op names and signatures.
"""

import importlib
import inspect

import torch

from ... import _backends, _library

_FAKES = {}
_library.load("cpu")
_library.load("cuda")


def fake(name: str):
    """Decorator: the metadata-only implementation of op `name`, attached in every namespace that defines the op."""

    def attach(function):
        _FAKES[name] = function
        if _library.load("cpu").loaded:
            torch.library.register_fake(f"mmkernels::{name}", function)
        return function

    return attach


def attach_fakes(namespace: str) -> None:
    """Registers every known fake in another namespace that defines the same ops."""
    for name, function in _FAKES.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", function)


def _define_triton_ops(family: str) -> bool:
    """Imports the family's Triton kernels, which defines their ops: on first use, also while a graph is being traced."""
    return importlib.import_module(f"mmkernels.ops.{family}.kernels") is not None


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler, which takes seconds.
_define_triton_ops._dynamo_marked_constant = True


def forward_backward(family: str, backend: str, op: str = ""):
    """The ops `op`_fwd and `op`_bwd of a family on a kernel backend; `op` is the family's own name where it is empty."""
    if backend == "triton":
        _define_triton_ops(family)
        ops = torch.ops.mmkernels_triton
    elif backend == "cuda" and _backends.emulating():
        ops = torch.ops.mmkernels_emulator
    else:
        ops = torch.ops.mmkernels
    op = op or family
    return getattr(ops, f"{op}_fwd").default, getattr(ops, f"{op}_bwd").default


def known_signature(function):
    """Class decorator of an autograd function: torch looks at the signature of its `forward` at every call, which takes longer
    than a small kernel; here it finds it made."""
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


def apply(function, *arguments):
    """`function.apply(*arguments)` of an autograd function, without what torch does first at every call, which takes longer
    than a small kernel: it binds the arguments to a signature, and looks into them for what functorch has left."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


class _OnceDifferentiable(torch.autograd.Function):
    """Passes gradients on and ties them to what they depend on, so that differentiating them again raises."""

    @staticmethod
    def forward(op, count, *tensors):
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op} has no second derivative on this backend: use backend='reference' for that call")


def once_differentiable(op: str, gradients: tuple, depend_on: tuple) -> tuple:
    """`gradients` as a backward returns them; where a graph of the gradient is being made, one that refuses to be used."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    present = [g for g in gradients if g is not None]
    tied = iter(_OnceDifferentiable.apply(op, len(present), *present, *(t for t in depend_on if t is not None)))
    return tuple(None if g is None else next(tied) for g in gradients)

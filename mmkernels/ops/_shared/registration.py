"""Where a backend's registered ops are found, and how their fakes are attached.

Namespaces: `mmkernels` (native, one name for CPU and CUDA tensors), `mmkernels_triton` (defined in `ops/<family>/kernels.py`),
`mmkernels_emulator` (the CUDA source on CPU tensors, in tests). All have the same op names and signatures.
"""

import functools
import importlib

import torch

from ... import _backends, _library

_FAKES = {}


def fake(name: str):
    """Decorator: the metadata-only implementation of op `name`, attached in every namespace that defines the op."""

    def attach(function):
        _FAKES[name] = function
        if _library.load("cpu").loaded:
            _library.load("cuda")
            torch.library.register_fake(f"mmkernels::{name}", function)
        return function

    return attach


def attach_fakes(namespace: str) -> None:
    """Registers every known fake in another namespace that defines the same ops."""
    for name, function in _FAKES.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", function)


@functools.cache
def _resolve(family: str, namespace: str):
    if namespace == "mmkernels_triton":
        importlib.import_module(f"mmkernels.ops.{family}.kernels")
    ops = getattr(torch.ops, namespace)
    return getattr(ops, f"{family}_fwd").default, getattr(ops, f"{family}_bwd").default


def forward_backward(family: str, backend: str):
    """The (forward, backward) ops of a family on a kernel backend."""
    if backend == "triton":
        return _resolve(family, "mmkernels_triton")
    if backend == "cuda" and _backends.emulating():
        return _resolve(family, "mmkernels_emulator")
    return _resolve(family, "mmkernels")

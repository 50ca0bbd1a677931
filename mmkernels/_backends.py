"""Which backend runs an op: capability as lists of reasons, one rule for choosing, one error that quotes them all.

An op family describes itself with a `Family`. `choose` runs while an op is called (and while it is traced, so it uses
plain Python only); `mmkernels.explain` runs the same code and reports instead of computing.
"""

import functools
import importlib.util
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import _library

NAMES = ("cuda", "triton", "cpp", "sdpa", "reference")
_local = threading.local()


class BackendError(RuntimeError):
    """A named backend cannot run a problem; the message carries every reason."""


class use_backend:
    """Context manager: ops called with `backend="auto"` in this thread use `name` and raise where it cannot run.

    One instance may be entered again, also while it is entered. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str):
        check_name(name)
        self.name = name
        self.previous = []

    def __enter__(self):
        self.previous.append(getattr(_local, "backend", "auto"))
        _local.backend = self.name
        return self

    def __exit__(self, *_):
        _local.backend = self.previous.pop()


def check_name(name: str) -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend is {name!r}; allowed are 'auto', {', '.join(map(repr, NAMES))}")


class Explanation(NamedTuple):
    """What `explain` returns: the backend that would run, the plan where an op has several, and the refusals."""

    op: str
    backend: str
    detail: str
    refusals: dict  # backend name -> list of reasons; an empty list: it could run, another one is preferred

    def __str__(self):
        lines = [f"{self.op} runs on {self.backend!r}" + (f" ({self.detail})" if self.detail else "")]
        for name, reasons in self.refusals.items():
            if name != self.backend:
                lines.append(f"  {name}: " + ("; ".join(reasons) if reasons else "could run; another one is preferred"))
        return "\n".join(lines)


def preference(dtype: torch.dtype) -> tuple:
    """What `auto` tries first. On a GPU Triton's kernels, which reach Hopper's wgmma where most of our CUDA C++ uses mma.sync
    (`latent_attention` has an order of its own there); in float32 CUDA C++, which multiplies on tensor cores in three tf32
    products where Triton falls back to scalar units. On a CPU the C++ kernels: CPU tensors reach the other two in tests
    alone.
    """
    gpu = ("cuda", "triton") if dtype == torch.float32 else ("triton", "cuda")
    return ("cpp", *gpu, "reference")


def choose(op: str, requested: str, order: tuple, refusals: Callable[[str], list]) -> str:
    """The first backend of `order` that has no reason to refuse; a named one runs or raises `BackendError`.

    `order` is what `auto` prefers for this problem, best first; `refusals(name)` gives the reasons of a backend, and must
    answer for every name of `NAMES`.
    """
    if requested == "auto":
        requested = getattr(_local, "backend", "auto")
    if requested == "auto":
        for name in order:
            if not refusals(name):
                return name
    elif requested in NAMES:
        if not refusals(requested):
            return requested
    else:
        check_name(requested)
    lines = [f"{op}: backend {requested!r} cannot run this problem."]
    for name in NAMES:
        reasons = refusals(name)
        lines.append(f"  {name}: " + ("; ".join(reasons) if reasons else "could run it"))
    raise BackendError("\n".join(lines))


def is_free(requested: str) -> bool:
    """Is the choice left to the op?"""
    return requested == getattr(_local, "backend", "auto") == "auto"


_TRITON_MISSING = "" if importlib.util.find_spec("triton") else "triton is not installed"


def triton_missing() -> str:
    """Why Triton cannot be used, or an empty string; looked up at import, so that a graph being traced meets a constant."""
    return _TRITON_MISSING


@functools.cache
def _capability(index: int) -> tuple:
    return torch.cuda.get_device_capability(index)


# What torch.compiler.assume_constant_result sets; calling that would import the whole compiler, which takes seconds.
_capability._dynamo_marked_constant = True


def capability(device: torch.device) -> tuple:
    """(major, minor) of a CUDA device, looked up once."""
    return _capability(device.index or 0)


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


def platform_refusals(name: str, device: torch.device, dtype: torch.dtype) -> list:
    """Reasons that hold for every op: device, dtype, what is installed. `reference` and `sdpa` refuse nothing here."""
    reasons = []
    if name in ("reference", "sdpa"):
        return reasons
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"dtype is {dtype}, it takes float32, bfloat16 and float16")
    if name == "cpp":
        if device.type != "cpu":
            reasons.append(f"tensors are on {device.type!r}, it runs on 'cpu'")
        elif not _library.load("cpu").loaded:
            reasons.append(_library.load("cpu").reason)
    elif name == "triton":
        if triton_missing():
            reasons.append(triton_missing())
        if device.type != "cuda" and not (device.type == "cpu" and INTERPRET):
            reasons.append(f"tensors are on {device.type!r}, it runs on 'cuda' (TRITON_INTERPRET=1 allows 'cpu')")
    elif name == "cuda":
        if device.type == "cpu" and emulating():
            return reasons
        if device.type != "cuda":
            reasons.append(f"tensors are on {device.type!r}, it runs on 'cuda'")
        elif not _library.load("cuda").loaded:
            reasons.append(_library.load("cuda").reason)
        elif capability(device) < (8, 0):
            reasons.append(f"the GPU has compute capability {capability(device)}, it needs 8.0 or newer")
    return reasons


def emulating() -> bool:
    """True after `mmkernels.testing.emulate_cuda()`: the `cuda` backend then takes CPU tensors."""
    return getattr(_local, "emulating", False)

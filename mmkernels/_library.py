"""The native libraries: found once, loaded once, their absence remembered and explained.

`cpu` defines every op schema and the CPU kernels; `cuda` adds implementations for CUDA tensors and is loaded only under a
CUDA torch; `emulator` is the CUDA source compiled for the CPU, which tests load by hand (`mmkernels.testing`).
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGE = Path(__file__).resolve().parent


class Status(NamedTuple):
    loaded: bool
    reason: str  # empty when loaded, else a sentence saying why it is not


@functools.cache
def build_facts() -> dict:
    """What `setup.py` built and why it left something out; empty for a tree that was never built."""
    try:
        return json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def _cpu_features() -> dict:
    """What the processor has, and which instruction set (base, v3, v4 of x86-64) the CPU kernels chose for it."""
    try:
        from . import _C_info
    except ImportError:
        return {}
    return _C_info.cpu_features()


# Looked up at import, so that a graph being traced meets constants.
_FEATURES = _cpu_features()
AVX512 = _FEATURES.get("chosen") == "v4"
# Is torch's matrix product MKL's on a processor of AMD with AVX-512, which MKL leaves unused?
SLOW_MKL = AVX512 and _FEATURES.get("vendor") == "amd" and torch.backends.mkl.is_available()
_statuses = {}


def load(name: str) -> Status:
    """Loads `_C_<name>.so` (`cpu`, `cuda` or `emulator`) and registers its ops. Never raises: the reason is kept.

    The families load `cpu` and `cuda` when they are imported, so that a graph being traced meets a dictionary only.
    """
    if name not in _statuses:
        _statuses[name] = _load(name)
    return _statuses[name]


def _load(name: str) -> Status:
    path = PACKAGE / f"_C_{name}.so"
    if name == "cuda":
        if torch.version.cuda is None:
            return Status(False, f"torch {torch.__version__} is built without CUDA")
        if not load("cpu").loaded:
            return Status(False, f"it needs the CPU library, and {load('cpu').reason}")
    if not path.is_file():
        why = build_facts().get(name, {}).get("why", "this installation was made without building it")
        return Status(False, f"the {name} library is not there: {why}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Status(False, f"the {name} library does not load: {error}")
    return Status(True, "")

"""Fused kernels for multimodal and multi-task transformers.

Importing costs nothing beyond torch: sub-packages load on first use, and no GPU, compiler, Triton or native library is
needed for that. `python -m mmkernels info` says which backends exist here, and why the others do not.
"""

import importlib

__version__ = "0.1.0"

_SUBPACKAGES = ("models", "modules", "ops", "testing", "train")
_NAMES = {
    "BackendError": "._backends",
    "convert": ".modules.convert",
    "explain": ".ops",
    "use_backend": "._backends",
}
__all__ = ["BackendError", "convert", "explain", "models", "modules", "ops", "testing", "train", "use_backend"]


def __getattr__(name: str):
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name], __name__), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})

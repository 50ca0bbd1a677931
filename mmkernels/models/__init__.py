"""Reference systems: one readable file each, loaded by `models.load(name_or_path)`."""

import importlib

from .registry import InputError, load, names

__all__ = ["InputError", "load", "names", "perceiver"]


def __getattr__(name):
    if name == "perceiver":
        return importlib.import_module(".perceiver", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

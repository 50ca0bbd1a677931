"""Reference systems: one readable file each, loaded by `models.load(name_or_path)`."""

import importlib

from .registry import MODULES, InputError, load, names

__all__ = ["InputError", "adapterhub", "ca_mtl", "hypergrid_t5", "load", "mbt", "names", "perceiver", "perceiver_io"]


def __getattr__(name):
    if name in MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

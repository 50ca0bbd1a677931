"""What every kind of problem has, whatever it measures."""

import importlib.util
import sys

import torch

# As attributes of a NamedTuple with op, name, batch and dtype, which cannot inherit them.
problem_id = property(lambda self: f"{self.op}/{self.name}-b{self.batch}-{self.dtype}")
problem_dtype = property(lambda self: getattr(torch, self.dtype))


def lacking(package: str) -> str:
    """That a package is not installed, or empty if it is."""
    return "" if package in sys.modules or importlib.util.find_spec(package) else f"{package} is not installed"

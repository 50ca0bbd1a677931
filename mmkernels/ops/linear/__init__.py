"""Linear layers, one or several in one pass over a CPU's threads."""

from .api import explain_linear, linear

__all__ = ["explain_linear", "linear"]

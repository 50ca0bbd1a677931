"""GELU of a linear layer's output, its bias added in the same pass."""

from .api import bias_gelu, explain_bias_gelu

__all__ = ["bias_gelu", "explain_bias_gelu"]

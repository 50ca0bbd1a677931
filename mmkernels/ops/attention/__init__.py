"""Attention with any head dim, a key mask, an additive bias, dropout by counter and split keys."""

from .api import BlockDiagonalBias, attention, explain_attention

__all__ = ["BlockDiagonalBias", "attention", "explain_attention"]

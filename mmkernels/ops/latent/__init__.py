"""Few queries over a long input, with the key and value projections absorbed (Perceiver, Perceiver IO encoders)."""

from .api import explain_latent_attention, latent_attention

__all__ = ["explain_latent_attention", "latent_attention"]

"""Few queries over a long input, with the key and value projections absorbed (Perceiver, Perceiver IO encoders)."""

from .api import explain_latent_attention, latent_attention
from .sharded import latent_attention_sharded
from .stream import LatentState, explain_latent_attention_stream, latent_attention_stream

__all__ = [
    "LatentState",
    "explain_latent_attention",
    "explain_latent_attention_stream",
    "latent_attention",
    "latent_attention_sharded",
    "latent_attention_stream",
]

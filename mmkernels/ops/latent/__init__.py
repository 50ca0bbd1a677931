"""Few queries over a long input, and many over few latents, with the projections absorbed (Perceiver, Perceiver IO)."""

from .api import explain_latent_attention, latent_attention
from .decode import explain_latent_decode, latent_decode
from .sharded import explain_latent_attention_sharded, latent_attention_sharded
from .stream import LatentState, explain_latent_attention_stream, latent_attention_stream

__all__ = [
    "LatentState",
    "explain_latent_attention",
    "explain_latent_attention_sharded",
    "explain_latent_attention_stream",
    "explain_latent_decode",
    "latent_attention",
    "latent_attention_sharded",
    "latent_attention_stream",
    "latent_decode",
]

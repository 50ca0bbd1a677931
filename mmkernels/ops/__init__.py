"""The ops: one folder per family. Every function validates, chooses a backend and runs; see each family's README."""

from .attention import attention, explain_attention
from .latent import explain_latent_attention, latent_attention

EXPLAINERS = {"attention": explain_attention, "latent_attention": explain_latent_attention}

__all__ = ["attention", "latent_attention"]

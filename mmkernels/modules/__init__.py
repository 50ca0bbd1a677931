"""Plain `nn.Module`s around the ops: ordinary parameters and state dicts, no hidden state."""

from .latent import LatentCrossAttention, LatentSelfAttention, set_backend
from .positions import FourierPositions

__all__ = ["FourierPositions", "LatentCrossAttention", "LatentSelfAttention", "set_backend"]

"""Self-attention of several modalities that share a few bottleneck tokens (MBT)."""

from .api import bottleneck_attention, explain_bottleneck_attention

__all__ = ["bottleneck_attention", "explain_bottleneck_attention"]

"""Adapter bottlenecks with the norms and residuals around them, one or many adapters in a batch."""

from .api import adapter, explain_adapter

__all__ = ["adapter", "explain_adapter"]

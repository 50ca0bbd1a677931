"""Adapter bottlenecks with the norms and residuals around them, one or many adapters in a batch; their fusion."""

from .api import adapter, adapter_fusion, explain_adapter, explain_adapter_fusion

__all__ = ["adapter", "adapter_fusion", "explain_adapter", "explain_adapter_fusion"]

"""HyperGrid's linear layer, whose weight is gated block by block for every example, and the gate itself."""

from .api import explain_hypergrid_gate, explain_hypergrid_linear, hypergrid_gate, hypergrid_linear

__all__ = ["explain_hypergrid_gate", "explain_hypergrid_linear", "hypergrid_gate", "hypergrid_linear"]

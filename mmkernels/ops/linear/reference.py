"""The definition of the op in plain torch, which is also the library that it is measured against: y = x Wᵀ + b."""

from torch.nn.functional import linear

__all__ = ["linear"]

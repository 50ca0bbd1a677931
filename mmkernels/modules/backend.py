"""What every module with a `backend` argument shares: the names, their change afterwards, the plain PyTorch attention."""

import torch
from torch import nn
from torch.nn import functional as F

from .._backends import NAMES
from ..ops._shared.arguments import check_key_mask

BACKENDS = ("auto", *NAMES, "eager")


class WithBackend(nn.Module):
    """A module whose attribute `backend` chooses what computes it."""

    def __init__(self, backend):
        super().__init__()
        check_backend(backend)
        self.backend = backend


def set_backend(model: nn.Module, backend: str) -> nn.Module:
    """Sets `backend` on every module of this package inside `model`; returns `model`.

    "eager" is the plain PyTorch path: `F.layer_norm`, `F.linear` and `F.scaled_dot_product_attention` with the same weights.

    Raises ValueError for an unknown backend.
    """
    check_backend(backend)
    for module in model.modules():
        if isinstance(module, WithBackend):
            module.backend = backend
    return model


def check_backend(backend):
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(map(repr, BACKENDS))}")


def own_backend(backend):
    """The backend of what is no attention, in a module that has one for both."""
    return "auto" if backend == "sdpa" else backend


def split_heads(tensor, num_heads):
    """(B, N, H D) -> (B, H, N, D)."""
    return torch.unflatten(tensor, -1, (num_heads, -1)).transpose(1, 2)


def eager_attention(q, k, v, num_heads, key_mask):
    """SDPA of (B, N, H D), (B, M, H D), (B, M, H E) -> (B, N, H E); `key_mask` bool (B, M) or None."""
    if key_mask is not None:
        check_key_mask(key_mask, k.shape[0], k.shape[1], k.device)
    q, k, v = (split_heads(t, num_heads) for t in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

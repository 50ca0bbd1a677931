"""What every module with a `backend` argument shares: the names, their change afterwards, the plain PyTorch attention."""

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from .._backends import NAMES
from ..ops._shared.arguments import check_key_mask
from ..ops.activation.api import own_is_faster as own_gelu_is_faster
from ..ops.linear.api import own_is_faster

BACKENDS = ("auto", *NAMES, "eager")


class WithBackend(nn.Module):
    """A module whose attribute `backend` chooses what computes it."""

    def __init__(self, backend="auto"):
        super().__init__()
        check_backend(backend)
        self.backend = backend


class Linear(nn.Linear, WithBackend):
    """`nn.Linear`, computed by `ops.linear` where that is the faster one."""

    def __init__(self, in_features, out_features, bias=True, *, backend="auto", device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        check_backend(backend)
        self.backend = backend

    def forward(self, x):
        return linear(x, self.weight, self.bias, self.backend)


def linear(x, weight, bias, backend):
    """x Wᵀ + b in a module with `backend`: the library's product but where ours is asked for or measured to be faster."""
    if backend in ("cpp", "reference") or (backend != "eager" and own_is_faster(x)):
        return ops.linear(x, weight, bias, backend=backend if backend in ("cpp", "reference") else "auto")
    return F.linear(x, weight, bias)


class Gelu(nn.GELU, WithBackend):
    """`nn.GELU`, computed by `ops.bias_gelu` where that is the faster one."""

    def __init__(self, approximate="none", *, backend="auto"):
        super().__init__(approximate)
        check_backend(backend)
        self.backend = backend

    def forward(self, x):
        return gelu(x, self.approximate, self.backend)


def gelu(x, approximate, backend):
    """GELU in a module with `backend`: the library's but where ours is asked for or measured to be faster."""
    backend = own_backend(backend)
    if backend == "eager" or (backend == "auto" and not own_gelu_is_faster(x, approximate)):
        return F.gelu(x, approximate=approximate)
    return ops.bias_gelu(x, approximate=approximate, backend=backend)


def gelu_form(module) -> str | None:
    """ "tanh" or "none", the form that `approximate` names, of a GELU of PyTorch or transformers; None for other modules."""
    return module.approximate if isinstance(module, nn.GELU) else _GELUS.get(type(module).__name__)


_GELUS = {
    "GELUActivation": "none",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "AccurateGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",  # in transformers before 4.54
}


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


def eager_attention(q, k, v, num_heads, key_mask, dropout=0.0):
    """SDPA of (B, N, H D), (B, M, H D), (B, M, H E) -> (B, N, H E); `key_mask` bool (B, M) or None."""
    if key_mask is not None:
        check_key_mask(key_mask, k.shape[0], k.shape[1], k.device)
    q, k, v = (split_heads(t, num_heads) for t in (q, k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)

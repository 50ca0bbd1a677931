"""Dropout by counter: a bit for every (batch, head, query, key) from a 64-bit seed, the same on every backend.

The hash is ours, because no generator is shared by torch, Triton, CUDA C++ and C++. Per row of the score matrix a 64-bit
mix (splitmix64) of seed and row number gives two 32-bit words; per element two rounds of a 32-bit mix combine them with the
key index. Rows are counted in 64 bits, so nothing wraps at 2**32 elements. `csrc/common/dropout.h` and
`ops/_shared/kernels.py` hold the same arithmetic.
"""

import torch

_M32 = 0xFFFFFFFF
_GOLDEN64 = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit: torch has no unsigned arithmetic
_GOLDEN32 = 0x9E3779B1


def threshold(dropout_p: float) -> int:
    """An element is dropped when its 32-bit draw is below this number."""
    return min(round(dropout_p * 2**32), _M32)


def draw_seed(device: torch.device) -> torch.Tensor:
    """A fresh seed from torch's generator of `device`, int64 of shape (1,): a tensor, so that CUDA graphs redraw it."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _shift64(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift64(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shift64(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shift64(z, 31)


def _mix32(u: torch.Tensor) -> torch.Tensor:
    u = ((u ^ (u >> 16)) * 0x7FEB352D) & _M32
    u = ((u ^ (u >> 15)) * 0x846CA68B) & _M32
    return u ^ (u >> 16)


def keep_mask(seed: torch.Tensor, shape: tuple, dropout_p: float, first_key: int = 0) -> torch.Tensor:
    """Boolean mask of shape (B, H, N, M), True where the attention weight survives; `first_key` keys come before these."""
    batch, heads, queries, keys = shape
    rows = torch.arange(batch * heads * queries, dtype=torch.int64, device=seed.device).view(batch, heads, queries, 1)
    z = _mix64(seed + (rows + 1) * _GOLDEN64)
    low, high = z & _M32, _shift64(z, 32)
    m = torch.arange(first_key, first_key + keys, dtype=torch.int64, device=seed.device)
    u = _mix32(low ^ ((m * _GOLDEN32) & _M32))
    u = _mix32((u + high) & _M32)
    return u >= threshold(dropout_p)

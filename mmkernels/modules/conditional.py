"""Layers that a task modulates (CA-MTL, Pilault et al. 2021, section 2): FiLM, conditional norm, attention, bottleneck.

Batches mix tasks. Every forward takes `tasks` (G, Z), a row for each task, and `index` (B,), the row of each example, so that
what depends on a task alone is computed once for it; without an index example b has row b.

`backend="eager"` is plain PyTorch: it writes the attention's bias as a matrix for each example.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..ops._shared.arguments import check_integer, check_key_mask
from .backend import WithBackend, own_backend


class FiLM(nn.Module):
    """Feature-wise linear modulation: (1 + gain) x + shift, with [gain ; shift] = Linear(task)."""

    def __init__(self, task_channels, channels, *, device=None, dtype=None):
        super().__init__()
        self.linear = nn.Linear(task_channels, 2 * channels, device=device, dtype=dtype)

    def rows(self, tasks):
        """(G, Z) -> gain and shift, (G, C) each."""
        return self.linear(tasks).chunk(2, -1)

    def forward(self, x, tasks, index=None):
        """(B, T, C) -> (B, T, C)."""
        return modulate(x, *self.rows(tasks), index)


def modulate(x, gain, shift, index=None):
    """(1 + gain) x + shift for x (B, T, C) and rows (G, C)."""
    if index is not None:
        gain, shift = gain[index], shift[index]
    return torch.addcmul(shift[:, None], x, 1.0 + gain[:, None])


def folded(gain, bias, modulation):
    """Gain and bias (G, C) of an affine map that a modulation follows, (1 + g) (gain x + bias) + s, from rows g and s."""
    g, s = modulation
    return gain * (1.0 + g), torch.addcmul(s, bias, 1.0 + g)


def add_norm(x, gain, bias, eps, index, backend, branch=None, branch_bias=None):
    """LayerNorm(x + branch + branch_bias) with a gain and bias of (C,), or of each task (G, C)."""
    if backend != "eager":
        options = {"index": index if gain.dim() + bias.dim() > 2 else None, "eps": eps, "backend": own_backend(backend)}
        if branch is None:
            return ops.film_layer_norm(x, gain, bias, **options)
        return ops.film_layer_norm(x, gain, bias, residual=branch, residual_bias=branch_bias, **options)[0]
    if branch is not None:
        x = x + (branch if branch_bias is None else branch + branch_bias)
    gain, bias = (p if p.dim() == 1 else (p if index is None else p[index])[:, None] for p in (gain, bias))
    return F.layer_norm(x, x.shape[-1:], eps=eps) * gain + bias


class ConditionalLayerNorm(WithBackend):
    """LayerNorm whose weight a task modulates, and whose bias it does not: x̂ ((1 + gain) weight + shift) + bias.

    Parameters: `weight` and `bias` (C,), as those of `nn.LayerNorm`, and `film`.
    """

    def __init__(self, channels, task_channels, *, eps=1e-12, backend="auto", device=None, dtype=None):
        super().__init__(backend)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.film = FiLM(task_channels, channels, device=device, dtype=dtype)

    def forward(self, x, tasks, index=None, *, branch=None, branch_bias=None, modulation=None):
        """(B, T, C) -> (B, T, C).

        Args:
            branch: (B, T, C), added to x in the same pass, with `branch_bias` (C,).
            modulation: gain and shift (G, C) of a FiLM that follows; costs nothing.
        """
        gain, shift = self.film.rows(tasks)
        gain, bias = torch.addcmul(shift, self.weight, 1.0 + gain), self.bias
        if modulation is not None:
            gain, bias = folded(gain, bias, modulation)
        return add_norm(x, gain, bias, self.eps, index, self.backend, branch, branch_bias)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ConditionalAlignment(WithBackend):
    """FiLM(Drop(LayerNorm(x))), of embeddings: one pass where nothing is dropped. Parameters: `norm` and `film`."""

    def __init__(self, channels, task_channels, *, eps=1e-12, dropout=0.0, backend="auto", device=None, dtype=None):
        super().__init__(backend)
        self.dropout = dropout
        self.norm = nn.LayerNorm(channels, eps=eps, device=device, dtype=dtype)
        self.film = FiLM(task_channels, channels, device=device, dtype=dtype)

    def forward(self, x, tasks, index=None, *, branch=None):
        """(B, T, C) -> (B, T, C); `branch` (B, T, C) is added to x in the same pass."""
        gain, bias = self.norm.weight, self.norm.bias
        if self.backend == "eager" or (self.training and self.dropout > 0.0):
            x = add_norm(x, gain, bias, self.norm.eps, None, self.backend, branch)
            return self.film(F.dropout(x, self.dropout, self.training), tasks, index)
        gain, bias = folded(gain, bias, self.film.rows(tasks))
        return add_norm(x, gain, bias, self.norm.eps, index, self.backend, branch)


class ConditionalAttention(WithBackend):
    """Self-attention whose scores have a bias in their diagonal blocks, a learned matrix that the task modulates.

    Sequences have one length, L, and blocks are C x C; see `ops.BlockDiagonalBias`. The scores between blocks have no bias and
    are attended as any. The output projection is the caller's.

    Parameters: `qkv` (queries, keys and values one after another), `matrix` (L, C), zero at first, and `film`.
    """

    def __init__(
        self, channels, task_channels, length, block, *, num_heads, dropout=0.0, backend="auto", device=None, dtype=None
    ):
        super().__init__(backend)
        for name, value in (("channels", channels), ("length", length), ("block", block), ("num_heads", num_heads)):
            check_integer(name, value)
        if channels % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide channels, {channels}")
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(channels, 3 * channels, device=device, dtype=dtype)
        self.matrix = nn.Parameter(torch.zeros(length, block, device=device, dtype=dtype))
        self.film = FiLM(task_channels, block, device=device, dtype=dtype)

    def forward(self, x, tasks, index=None, *, key_mask=None):
        """(B, L, C) -> (B, L, C), heads side by side; `key_mask` bool (B, L), True where a row may be attended."""
        if x.shape[1] != self.matrix.shape[0]:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, {self.matrix.shape[0]}, {self.qkv.in_features})")
        qkv = self.qkv(x) if self.backend == "eager" else linear(x, self.qkv.weight, self.qkv.bias, self.backend)
        q, k, v = torch.unflatten(qkv, -1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        bias = ops.BlockDiagonalBias(self.matrix, *self.film.rows(tasks), index)
        dropout = self.dropout if self.training else 0.0
        if self.backend == "eager":
            out = _eager_attention(q, k, v, key_mask, bias, dropout)
        else:
            out = ops.attention(q, k, v, key_mask=key_mask, bias=bias, dropout_p=dropout, backend=self.backend)
        return out.transpose(1, 2).flatten(2)

    def extra_repr(self):
        length, block = self.matrix.shape
        return f"length={length}, block={block}, num_heads={self.num_heads}, dropout={self.dropout}"


def _eager_attention(q, k, v, key_mask, bias, dropout):
    """SDPA with the bias and the mask as one matrix for each example."""
    matrix, gain, shift, index = bias
    if index is not None:
        gain, shift = gain[index], shift[index]
    length, block = matrix.shape
    blocks = torch.addcmul(shift[:, None], matrix, 1.0 + gain[:, None])
    blocks = F.pad(blocks, (0, 0, 0, -length % block)).unflatten(1, (-1, block))
    mask = torch.stack([torch.block_diag(*one) for one in blocks])[:, None, :length, :length] if len(blocks) else None
    if key_mask is not None and mask is not None:
        check_key_mask(key_mask, k.shape[0], k.shape[2], k.device)
        mask = mask.masked_fill(~key_mask[:, None, None, :], torch.finfo(mask.dtype).min)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype), dropout_p=dropout)


class ConditionalBottleneck(nn.Module):
    """Up(Down(FiLM(x))), the FiLM of a task embedding that goes through a linear layer of its own. No activation in between.

    Parameters: `transform`, `film`, `down`, `up`. The residual is the caller's.
    """

    def __init__(self, channels, task_channels, bottleneck=None, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        bottleneck = channels // 3 if bottleneck is None else bottleneck
        check_integer("bottleneck", bottleneck)
        self.transform = nn.Linear(task_channels, task_channels, **factory)
        self.film = FiLM(task_channels, channels, **factory)
        self.down = nn.Linear(channels, bottleneck, **factory)
        self.up = nn.Linear(bottleneck, channels, **factory)

    def rows(self, tasks):
        """Gain and shift (G, C) of its FiLM, for a norm before it that takes them over."""
        return self.film.rows(self.transform(tasks))

    def forward(self, x, tasks, index=None):
        """(B, T, C) -> (B, T, C)."""
        return self.up(self.down(modulate(x, *self.rows(tasks), index)))


def linear(x, weight, bias, backend):
    """`ops.linear` on the backends that it has."""
    return ops.linear(x, weight, bias, backend=backend if backend in ("cpp", "reference") else "auto")

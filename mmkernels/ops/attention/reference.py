"""The definition of the op in plain torch: any device, any float dtype, twice differentiable.

    S = scale * q k^T + bias        masked keys and -inf biases are left out
    P = softmax(S)                  a row without keys gives P = 0
    out = dropout(P) v              lse = log sum exp S

A bias of diagonal blocks A (G,N,C) with a group g(b) of every example stands for
    bias(b,h,n,m) = A[g(b), n, m mod C] where n // C = m // C, else 0

Low-precision inputs are computed in float32 and the result is rounded once.
"""

import torch


def diagonal_blocks(matrix, gain, shift, dtype):
    """A = (1 + gain) matrix + shift, (G,N,C), from (N,C) and twice (G,C)."""
    return matrix.to(dtype) * (1.0 + gain.to(dtype))[:, None] + shift.to(dtype)[:, None]


def spread_blocks(blocks, index, keys):
    """The additive bias (B,1,N,M) that diagonal blocks (G,N,C) stand for."""
    if index is not None:
        blocks = blocks[index]
    queries, width = blocks.shape[1:]
    n, m = torch.arange(queries, device=blocks.device), torch.arange(keys, device=blocks.device)
    return torch.where((n // width)[:, None] == m // width, blocks[..., m % width], 0.0)[:, None]


def attention(q, k, v, key_mask=None, bias=None, scale=1.0, keep=None, dropout_p=0.0, bias_index=None):
    """Returns (out, lse) for q (B,H,N,D), k (B,H,M,D), v (B,H,M,E); lse is float32 (float64 for float64 inputs).
    Where k and v have fewer heads, each is read by as many of q in turn.

    `keep` is the boolean dropout mask (B,H,N,M), or None for no dropout; `bias` may be diagonal blocks (G,N,C), those of
    example b in the row bias_index[b], or b.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, out_dtype = q.to(dtype), k.to(dtype), v.to(dtype), q.dtype
    if key_mask is not None:
        # Zeroed before they are used: 0 * NaN would leak what stands behind the mask.
        visible = key_mask[:, None, :, None]
        k, v = torch.where(visible, k, 0.0), torch.where(visible, v, 0.0)
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q * scale) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + (bias if bias.dim() == 4 else spread_blocks(bias, bias_index, k.shape[2])).to(dtype)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
    detached = scores.detach()
    top = detached.amax(-1, keepdim=True) if scores.shape[-1] else detached.new_full((*scores.shape[:-1], 1), float("-inf"))
    weights = (scores - top.masked_fill(top == float("-inf"), 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    probabilities = weights / total
    if keep is not None:
        probabilities = torch.where(keep, probabilities / (1.0 - dropout_p), 0.0)
    lse = (total.log() + top).squeeze(-1)  # top is -inf where the row is empty
    return (probabilities @ v).to(out_dtype), lse

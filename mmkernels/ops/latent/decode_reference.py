"""The definition of `latent_decode` in plain torch: any device, any float dtype, twice differentiable.

    Q = LayerNorm([queries ; position]) Wq^T + bq        out = concat_h(softmax(scale Q_h K_h^T) V_h) Wo^T + bo

`latent_decode` is the plain form (Perceiver IO, Jaegle et al. 2022, section 3.2); `core` is the part that the kernels compute
in the folded form.
"""

import torch

from .reference import masked_softmax, normalise


def latent_decode(
    queries, k, v, w_q, w_o, num_heads, norm_weight, norm_bias, eps, b_q, b_o, position, query_mask, key_mask, scale
):
    """queries (B|1,O,Cx), k (B,N,H*D), v (B,N,H*E), w_q (H*D,C), w_o (Cout,H*E), position (O,C-Cx) -> (B,O,Cout)."""
    out_dtype, dtype = queries.dtype, torch.promote_types(queries.dtype, torch.float32)
    k, v, w_q, w_o = k.to(dtype), v.to(dtype), w_q.to(dtype), w_o.to(dtype)
    q = _normalised(queries, position, query_mask, k.shape[0], eps)
    if norm_weight is not None:
        q = q * norm_weight.to(dtype)
    if norm_bias is not None:
        q = q + norm_bias.to(dtype)
    q = q @ w_q.T
    if b_q is not None:
        q = q + b_q.to(dtype)
    if key_mask is not None:  # 0 * NaN would leak what stands behind the mask
        k, v = (torch.where(key_mask[..., None], t, 0.0) for t in (k, v))
    q, k, v = (torch.unflatten(t, -1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q * scale) @ k.transpose(-1, -2)
    probabilities = masked_softmax(scores, None if key_mask is None else key_mask[:, None, None, :])[0]
    out = (probabilities @ v).transpose(1, 2).flatten(2)
    if query_mask is not None:
        out = torch.where(query_mask[..., None], out, 0.0)
    out = out @ w_o.T
    return (out if b_o is None else out + b_o.to(dtype)).to(out_dtype)


def core(queries, position, query_mask, k, bias, v, out_bias, key_mask, scale, eps):
    """(out, lse), float32 at least, of folded keys (B,H,N,C), their bias (B,H,N) and values (B,H,N,E); see csrc/schemas.h."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    xhat = _normalised(queries, position, query_mask, k.shape[0], eps)[:, None]
    k, bias, v = k.to(dtype), bias.to(dtype), v.to(dtype)
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if key_mask is not None:
        k, v = (torch.where(key_mask[:, None, :, None], t, 0.0) for t in (k, v))
        bias = torch.where(key_mask[:, None, :], bias, 0.0)
    probabilities, lse = masked_softmax((xhat @ k.transpose(-1, -2) + bias[:, :, None]) * scale, visible)
    out = (probabilities @ v).sum(1)
    if query_mask is not None:
        out = torch.where(query_mask[..., None], out, 0.0)
    return out if out_bias is None else out + out_bias.to(dtype), lse


def _normalised(queries, position, query_mask, batch, eps):
    dtype = torch.promote_types(queries.dtype, torch.float32)
    if query_mask is not None:
        queries = queries.expand(batch, -1, -1)
    return normalise(queries.to(dtype), None if position is None else position.to(dtype), query_mask, eps)

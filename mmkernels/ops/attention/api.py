"""`ops.attention`: signature, validation, choice of backend."""

from typing import NamedTuple

import torch

from ... import _backends
from .._shared import dropout
from .._shared.arguments import autocast_dtype, check_dense, check_key_mask, check_number, check_tensor
from . import autograd, reference

MAX_HEAD_DIM = 1024


class Problem(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int  # D, of q and k
    value_dim: int  # E, of v
    dropout: bool


def attention(
    q,
    k,
    v,
    *,
    key_mask=None,
    bias=None,
    scale=None,
    dropout_p=0.0,
    dropout_seed=None,
    return_lse=False,
    backend="auto",
):
    """softmax(scale q k^T + bias) v with masked keys left out, forward and backward without the N x M matrix.

    Args:
        q: queries (B, H, N, D), float32, bfloat16 or float16 (`reference` takes every float dtype). Any strides.
        k: keys (B, H, M, D); D from 1 to 1024, odd sizes included.
        v: values (B, H, M, E); E may differ from D, 1 to 1024.
        key_mask: bool (B, M), True where a key may be attended. What stands behind the mask never reaches the result,
            NaN included; a row without any key gives zeros, zero gradients and an lse of -inf.
        bias: added to the scaled scores, of q's dtype or float32, broadcastable to (B, H, N, M) with 4 dimensions; -inf
            leaves a key out. Its gradient is reduced over the broadcast dimensions inside the kernel.
        scale: default D ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight. The mask depends on the seed and the position
            (b, h, n, m) only: every backend drops the same elements.
        dropout_seed: int64 tensor of one element on q's device; drawn from torch's generator when None.
        return_lse: also return the log-sum-exp of the scores, float32 (B, H, N), differentiable.
        backend: "auto", "reference", "sdpa", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        (B, H, N, E) of q's dtype, or (that, lse).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    q, k, v, bias, scale, dropout_p, seed = _check(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed)
    name = _choose(q, k, v, key_mask, bias, dropout_p, return_lse, backend)
    if dropout_p > 0.0 and seed is None:
        seed = dropout.draw_seed(q.device)
    if name == "sdpa":
        return _sdpa(q, k, v, key_mask, scale)
    if name == "reference":
        keep = None
        if dropout_p > 0.0:
            keep = dropout.keep_mask(seed, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), dropout_p)
        out, lse = reference.attention(q, k, v, key_mask, bias, scale, keep, dropout_p)
    else:
        out, lse = autograd.attention(name, q, k, v, key_mask, bias, seed, scale, dropout_p)
    return (out, lse) if return_lse else out


def explain_attention(
    q,
    k,
    v,
    *,
    key_mask=None,
    bias=None,
    scale=None,
    dropout_p=0.0,
    dropout_seed=None,
    return_lse=False,
    backend="auto",
):
    """The `explain` of `attention`."""
    q, k, v, bias, scale, dropout_p, _ = _check(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed)
    name = _choose(q, k, v, key_mask, bias, dropout_p, return_lse, backend)
    problem = Problem(q.device, q.dtype, q.shape[-1], v.shape[-1], dropout_p > 0.0)
    reasons = {n: _refusals(n, problem, key_mask, bias, return_lse) for n in _backends.NAMES}
    return _backends.Explanation("attention", name, "", reasons)


def _sdpa(q, k, v, key_mask, scale):
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _choose(q, k, v, key_mask, bias, dropout_p, return_lse, backend):
    problem = Problem(q.device, q.dtype, q.shape[-1], v.shape[-1], dropout_p > 0.0)
    order = preference(problem, q.shape[2], k.shape[2], (q, k, v))
    return _backends.choose("attention", backend, order, lambda name: _refusals(name, problem, key_mask, bias, return_lse))


def preference(problem: Problem, queries: int, keys: int, tensors: tuple) -> tuple:
    """The order of `auto`: torch's own kernel first where it is the faster one, if it can do what is asked.

    CPU, measured: one or two queries, unless one of `tensors` wants a gradient, since its backward takes half as long again
    as ours. GPU, by design: the shapes that FlashAttention was made for; ours are for the ones it refuses.
    """
    order = _backends.preference(problem.dtype)
    if problem.head_dim != problem.value_dim or keys == 0:
        return order
    if problem.device.type == "cpu":
        library = queries <= 2 and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    else:
        library = problem.dtype != torch.float32 and problem.head_dim <= 256 and problem.head_dim % 8 == 0
    return ("sdpa", *order) if library else order


def _refusals(name, problem, key_mask, bias, return_lse):
    reasons = _backends.platform_refusals(name, problem.device, problem.dtype)
    if name == "sdpa":
        if bias is not None:
            reasons.append("it has no gradient for a broadcast bias")
        if key_mask is not None:
            reasons.append("it gives no guarantee for what stands behind the mask")
        if problem.dropout:
            reasons.append("its dropout mask is not the one of the other backends")
        if return_lse:
            reasons.append("it does not return the log-sum-exp")
    elif name != "reference":
        if not 1 <= problem.head_dim <= MAX_HEAD_DIM:
            reasons.append(f"the head dim of q is {problem.head_dim}, it takes 1 to {MAX_HEAD_DIM}")
        if not 1 <= problem.value_dim <= MAX_HEAD_DIM:
            reasons.append(f"the head dim of v is {problem.value_dim}, it takes 1 to {MAX_HEAD_DIM}")
    return reasons


def _check(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed):
    """Validates, applies autocast, resolves the scale. Returns (q, k, v, bias, scale, dropout_p, dropout_seed)."""
    device = getattr(q, "device", None)
    check_tensor("q", q, "BHND", "q", device)
    check_tensor("k", k, "BHMD", "q", device)
    check_tensor("v", v, "BHME", "q", device)
    if (dtype := autocast_dtype(device)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be q's, {q.dtype}")
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    if head_dim == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; its head dim must be 1 or more")
    if k.shape[0] != batch or k.shape[1] != heads or k.shape[3] != head_dim:
        raise ValueError(f"k has shape {tuple(k.shape)}; with q {tuple(q.shape)} it must be ({batch}, {heads}, M, {head_dim})")
    if v.shape[0] != batch or v.shape[1] != heads or v.shape[2] != keys:
        raise ValueError(f"v has shape {tuple(v.shape)}; with k {tuple(k.shape)} it must be ({batch}, {heads}, {keys}, E)")
    if key_mask is not None:
        check_key_mask(key_mask, batch, keys, q.device)
    if bias is not None:
        check_dense("bias", bias)
        if bias.dtype != q.dtype and bias.dtype != torch.float32:
            raise TypeError(f"bias has dtype {bias.dtype}; it must be q's, {q.dtype}, or torch.float32")
        if bias.device != q.device:
            raise ValueError(f"bias is on {bias.device}; it must be on q's device, {q.device}")
        full = (batch, heads, queries, keys)
        if bias.dim() != 4 or any(b != 1 and b != f for b, f in zip(bias.shape, full, strict=True)):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be {full} with any of them 1")
    dropout_p = check_number("dropout_p", dropout_p, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
    scale = head_dim**-0.5 if scale is None else check_number("scale", scale)
    if dropout_seed is not None:
        check_dense("dropout_seed", dropout_seed)
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
            what = f"has shape {tuple(dropout_seed.shape)} and dtype {dropout_seed.dtype}"
            raise ValueError(f"dropout_seed {what}; it must be an int64 tensor of one element, or None")
        if dropout_seed.device != q.device:
            raise ValueError(f"dropout_seed is on {dropout_seed.device}; it must be on q's device, {q.device}")
        dropout_seed = dropout_seed.reshape(1)
    return q, k, v, bias, scale, dropout_p, dropout_seed

"""`ops.attention`: signature, validation, choice of backend."""

from typing import NamedTuple

import torch

from ... import _backends
from .._shared import dropout
from .._shared.arguments import (
    autocast_dtype,
    check_dense,
    check_index,
    check_key_mask,
    check_number,
    check_seed,
    check_tensor,
)
from . import autograd, lists, reference

MAX_HEAD_DIM = 1024


class Problem(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int  # D, of q and k
    value_dim: int  # E, of v
    dropout: bool


class BlockDiagonalBias(NamedTuple):
    """A bias of the scores' diagonal blocks that every example, or every task of a batch, modulates (the conditional
    attention of CA-MTL, arXiv 2009.09139, section 2.2):

        bias(b, i, j) = (1 + gain[t, j mod C]) matrix[i, j mod C] + shift[t, j mod C]    where i // C = j // C; t = index[b]
        bias(b, i, j) = 0                                                                elsewhere

    All heads share it. Blocks that reach beyond the keys are cut off. Kernels make it of the blocks (G, N, C) on the way: no
    (B, N, M) array exists, forward or backward. Every tensor is of q's dtype or float32 and may want a gradient.
    """

    matrix: torch.Tensor  # (N, C), a row for each query; blocks are C x C
    gain: torch.Tensor  # (G, C), a row for each task; without an index for each example, G = B
    shift: torch.Tensor  # (G, C)
    index: torch.Tensor | None = None  # int32 or int64 (B,), in [0, G)


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

    Keys may come in two segments, one behind the other without being concatenated: k, v and key_mask are then pairs. And q may
    be a list of up to 8 problems of any lengths, which run in one launch: k, v and key_mask are then lists of as many entries,
    each a tensor or a pair. All problems share B, H, D and E.

    Keys may have fewer heads, G (grouped-query attention; one: multi-query): head h then reads head h // (H / G) of k and v,
    as with torch's `enable_gqa`. Neither k and v nor their gradients exist once per head of q.

    Args:
        q: queries (B, H, N, D), float32, bfloat16 or float16 (`reference` takes every float dtype). Any strides. Or a list.
        k: keys (B, H, M, D), or (B, G, M, D) with H a multiple of G; D from 1 to 1024, odd sizes included. Or a pair of
            segments, (B, H, M1, D) and (B, H, M2, D).
        v: values (B, H, M, E), or with k (B, G, M, E); E may differ from D, 1 to 1024. Or a pair.
        key_mask: bool (B, M), True where a key may be attended. What stands behind the mask never reaches the result,
            NaN included; a row without any key gives zeros, zero gradients and an lse of -inf. For two segments a pair of
            masks, (B, M1) and (B, M2), either of which may be None.
        bias: added to the scaled scores, of q's dtype or float32, broadcastable to (B, H, N, M) with 4 dimensions; -inf
            leaves a key out. Its gradient is reduced over the broadcast dimensions inside the kernel. Or a
            `BlockDiagonalBias`, if k has H heads. Not with a list of problems, nor with keys in two segments.
        scale: default D ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight. The mask depends on the seed and the position
            (b, h, n, m) only, and on a problem's place in a list: every backend drops the same elements.
        dropout_seed: int64 tensor of one element on q's device; drawn from torch's generator when None.
        return_lse: also return the log-sum-exp of the scores, float32 (B, H, N), differentiable.
        backend: "auto", "reference", "sdpa", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        (B, H, N, E) of q's dtype, or (that, lse); for a list of problems lists of these.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    if isinstance(q, (list, tuple)) or isinstance(k, (list, tuple)):
        return _attention_list(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed, return_lse, backend)
    q, k, v, bias, bias_index, scale, dropout_p, seed = _check(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed)
    name = _choose(q, k, v, key_mask, bias, dropout_p, return_lse, backend)
    if dropout_p > 0.0 and seed is None:
        seed = dropout.draw_seed(q.device)
    groups = _groups(q, k)
    if name == "reference":
        keep = None
        if dropout_p > 0.0:
            keep = dropout.keep_mask(seed, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), dropout_p)
        out, lse = reference.attention(q, k, v, key_mask, bias, scale, keep, dropout_p, bias_index)
    elif name == "sdpa":
        return _heads_as_they_were(_sdpa(_heads_as_rows(q, groups), k, v, key_mask, scale), groups)
    else:
        if groups > 1 and bias is not None and bias.shape[1:3] != (1, 1):
            bias = _heads_as_rows(bias.expand(-1, q.shape[1], q.shape[2], -1), groups)
        q = _heads_as_rows(q, groups)
        out, lse = autograd.attention(name, q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p)
        out, lse = _heads_as_they_were(out, groups), _heads_as_they_were(lse, groups)
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
    if isinstance(q, (list, tuple)) or isinstance(k, (list, tuple)):
        problems, _, dropout_p, _, _ = _check_list(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed)
        name, refusals = _choose_list(problems, dropout_p, return_lse, backend)
        return _backends.Explanation("attention", name, "", {n: refusals(n) for n in _backends.NAMES})
    q, k, v, bias, _, scale, dropout_p, _ = _check(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed)
    name = _choose(q, k, v, key_mask, bias, dropout_p, return_lse, backend)
    problem = Problem(q.device, q.dtype, q.shape[-1], v.shape[-1], dropout_p > 0.0)
    reasons = {n: _refusals(n, problem, key_mask, bias, return_lse) for n in _backends.NAMES}
    return _backends.Explanation("attention", name, "", reasons)


# Heads that share keys are more queries of them. That is all that kernels need to know of grouped-query attention: they read
# keys once for a whole group, sum dk and dv over it as over any queries, fill their tiles with few queries of many heads, and
# count rows for dropout as before, ((b G + g) H/G + i) N + n = (b H + h) N + n.


def _groups(q, k) -> int:
    """H / G: how many heads of q read one of k."""
    return q.shape[1] // k.shape[1] if q.shape[1] else 1


def _heads_as_rows(t, groups):
    """(B, H, N, ...) -> (B, G, H / G N, ...); a view where the strides have one."""
    return t if groups == 1 else t.unflatten(1, (t.shape[1] // groups, groups)).flatten(2, 3)


def _heads_as_they_were(t, groups):
    """(B, G, H / G N, ...) -> (B, H, N, ...)."""
    return t if groups == 1 else t.unflatten(2, (groups, t.shape[2] // groups)).flatten(1, 2)


def _sdpa(q, k, v, key_mask, scale):
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _choose(q, k, v, key_mask, bias, dropout_p, return_lse, backend):
    problem = Problem(q.device, q.dtype, q.shape[-1], v.shape[-1], dropout_p > 0.0)
    order = preference(problem, q.shape[2] * _groups(q, k), k.shape[2], (q, k, v))
    return _backends.choose("attention", backend, order, lambda name: _refusals(name, problem, key_mask, bias, return_lse))


def preference(problem: Problem, queries: int, keys: int, tensors: tuple) -> tuple:
    """The order of `auto`: torch's own kernel first where it is the faster one, if it can do what is asked.

    CPU, measured: one or two queries of a head of keys, unless one of `tensors` wants a gradient, since its backward takes
    half as long again as ours. GPU, by design: the shapes that FlashAttention was made for; ours are for the ones it refuses.
    """
    order = _backends.preference(problem.dtype)
    if problem.head_dim != problem.value_dim or keys == 0:
        return order
    if problem.device.type == "cpu":
        library = queries <= 2 and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    else:
        library = problem.dtype != torch.float32 and problem.head_dim <= 256 and problem.head_dim % 8 == 0
    return ("sdpa", *order) if library else order


# --- Lists of problems, and keys in two segments ----------------------------------------------------------------------------


class _Entry(NamedTuple):
    """One problem of a list; k, v and masks have an element for each segment of keys."""

    q: torch.Tensor
    k: tuple
    v: tuple
    masks: tuple


def _attention_list(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed, return_lse, backend):
    entries, scale, dropout_p, seed, is_list = _check_list(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed)
    name, _ = _choose_list(entries, dropout_p, return_lse, backend)
    groups = 1 if name == "reference" else _groups(entries[0].q, entries[0].k[0])
    entries = [one._replace(q=_heads_as_rows(one.q, groups)) for one in entries]
    if name == "sdpa":
        out = [_sdpa(one.q, torch.cat(one.k, 2), torch.cat(one.v, 2), None, scale) for one in entries]
        out = [_heads_as_they_were(one, groups) for one in out]
        return out if is_list else out[0]
    if dropout_p > 0.0 and seed is None:
        seed = dropout.draw_seed(entries[0].q.device)
    tensors, masks, problems = [], [], []

    def place(segments):
        tensors.extend(t.transpose(1, 2).unsqueeze(2) for t in segments)  # (B, T, 1, H, width)
        return tuple((len(tensors) - len(segments) + i, 0) for i in range(len(segments)))

    for one in entries:
        numbers = tuple(lists.number(mask, masks) for mask in one.masks)
        problems.append(lists.ListedProblem(place([one.q]), place(one.k), place(one.v), numbers))
    out, lse = lists.attention_list(name, tensors, problems, masks, seed, scale, dropout_p)
    out = [_heads_as_they_were(one.transpose(1, 2), groups) for one in out]
    lse = [_heads_as_they_were(one, groups) for one in lse]
    if not is_list:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def _choose_list(entries, dropout_p, return_lse, backend):
    """One backend for all problems, and what every backend has against them."""
    first = entries[0]
    problem = Problem(first.q.device, first.q.dtype, first.q.shape[-1], first.v[0].shape[-1], dropout_p > 0.0)
    masked = next((mask for one in entries for mask in one.masks if mask is not None), None)

    def refusals(name):
        return _refusals(name, problem, masked, None, return_lse)

    keys = max(sum(k.shape[2] for k in one.k) for one in entries)
    order = list_preference(problem, keys)
    return _backends.choose("attention", backend, order, refusals), refusals


def list_preference(problem: Problem, keys: int) -> tuple:
    """The order of `auto` for lists: torch's kernel, with copies that join the segments, only where it is so on a GPU."""
    if problem.device.type == "cpu":
        return _backends.preference(problem.dtype)
    return preference(problem, keys, keys, ())


def _check_list(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed):
    """Validates, applies autocast. Returns (entries, scale, dropout_p, dropout_seed, whether q is a list)."""
    is_list = isinstance(q, (list, tuple))
    if not is_list:
        entries = [_check_segments("", q, k, v, key_mask, scale, dropout_p, dropout_seed)]
    else:
        if not 1 <= len(q) <= lists.MAX_PROBLEMS:
            raise ValueError(f"q has {len(q)} problems; it must have 1 to {lists.MAX_PROBLEMS}")
        for name, value in (("k", k), ("v", v), ("key_mask", key_mask)):
            if value is None and name == "key_mask":
                continue
            if not isinstance(value, (list, tuple)):
                what = "it must be a list with an entry for each problem of q"
                raise TypeError(f"{name} is a {type(value).__name__}; {what}{', or None' if name == 'key_mask' else ''}")
            if len(value) != len(q):
                raise ValueError(f"{name} has {len(value)} entries; it must have one for each of {len(q)} problems of q")
        key_mask = [None] * len(q) if key_mask is None else key_mask
        entries = [
            _check_segments(f"[{i}]", *one, scale, dropout_p, dropout_seed)
            for i, one in enumerate(zip(q, k, v, key_mask, strict=True))
        ]
    if bias is not None:
        raise ValueError("bias is given; it must be None for a list of problems and for keys in two segments")
    first = entries[0][0]
    for i, (one, *_) in enumerate(entries):
        for name, ours, theirs in (("q", one.q, first.q), ("v", one.v[0], first.v[0])):
            if ours.device != theirs.device:
                raise ValueError(f"{name}[{i}] is on {ours.device}; it must be on {theirs.device}, as {name}[0] is")
            if ours.dtype != theirs.dtype:
                raise TypeError(f"{name}[{i}] has dtype {ours.dtype}; it must be that of {name}[0], {theirs.dtype}")
            if (*ours.shape[:2], ours.shape[3]) != (*theirs.shape[:2], theirs.shape[3]):
                b, h, _, d = theirs.shape
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(ours.shape)}; it must be ({b}, {h}, any, {d}), as {name}[0] has"
                )
    _, scale, dropout_p, seed = entries[0]
    return [one for one, *_ in entries], scale, dropout_p, seed, is_list


def _check_segments(place, q, k, v, key_mask, scale, dropout_p, dropout_seed):
    """(_Entry, scale, dropout_p, dropout_seed) of the problem that errors call q`place`, k`place`, ..."""
    paired = isinstance(k, (list, tuple))
    sides = {"k": k, "v": v, "key_mask": (None, None) if paired and key_mask is None else key_mask}
    for name, value in sides.items():
        if isinstance(value, (list, tuple)) != paired:
            what = "a pair" if paired else "a tensor"
            raise TypeError(f"{name}{place} is a {type(value).__name__}; it must be {what}, as k{place} is")
        if paired and len(value) != 2:
            raise ValueError(f"{name}{place} has {len(value)} segments; it must have 2")
    segments = list(zip(*sides.values(), strict=True)) if paired else [(k, v, key_mask)]
    checked = []
    for i, (one_k, one_v, mask) in enumerate(segments):
        names = tuple(f"{n}{place}" if n == "q" or not paired else f"{n}{place}[{i}]" for n in ("q", "k", "v", "key_mask"))
        checked.append(_check(q, one_k, one_v, mask, None, scale, dropout_p, dropout_seed, names) + (mask,))
    q, _, _, _, _, scale, dropout_p, seed, _ = checked[0]
    ks, vs, masks = (tuple(one[i] for one in checked) for i in (1, 2, 8))
    if ks[0].shape[1] != ks[-1].shape[1]:
        raise ValueError(f"k{place}[1] has {ks[1].shape[1]} heads; it must have as many as k{place}[0], {ks[0].shape[1]}")
    if vs[0].shape[3] != vs[-1].shape[3]:
        raise ValueError(
            f"v{place}[1] has shape {tuple(vs[1].shape)}; its head dim must be that of v{place}[0], {vs[0].shape[3]}"
        )
    return _Entry(q, ks, vs, masks), scale, dropout_p, seed


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


def _check(q, k, v, key_mask, bias, scale, dropout_p, dropout_seed, names=("q", "k", "v", "key_mask")):
    """Validates, applies autocast, resolves the scale. Returns (q, k, v, bias, index of its rows, scale, dropout_p,
    dropout_seed), a `BlockDiagonalBias` as its blocks (G, N, C).

    `names` is what errors call the first four."""
    q_name, k_name, v_name, mask_name = names
    device = getattr(q, "device", None)
    check_tensor(q_name, q, "BHND", q_name, device)
    check_tensor(k_name, k, "BHMD", q_name, device)
    check_tensor(v_name, v, "BHME", q_name, device)
    if (dtype := autocast_dtype(device)) is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    for name, tensor in ((k_name, k), (v_name, v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {q_name}'s, {q.dtype}")
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if head_dim == 0:
        raise ValueError(f"{q_name} has shape {tuple(q.shape)}; its head dim must be 1 or more")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        wanted = f"with {q_name} {tuple(q.shape)} it must be ({batch}, {heads}, M, {head_dim})"
        raise ValueError(f"{k_name} has shape {tuple(k.shape)}; {wanted}")
    if kv_heads != heads and (kv_heads == 0 or heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{q_name} has {heads} heads and {k_name} {kv_heads}; H must be a multiple of the number of heads of {k_name}"
        )
    if v.shape[0] != batch or v.shape[1] != kv_heads or v.shape[2] != keys:
        wanted = f"with {k_name} {tuple(k.shape)} it must be ({batch}, {kv_heads}, {keys}, E)"
        raise ValueError(f"{v_name} has shape {tuple(v.shape)}; {wanted}")
    if key_mask is not None:
        check_key_mask(key_mask, batch, keys, q.device, mask_name)
    bias_index = None
    if isinstance(bias, BlockDiagonalBias) and kv_heads != heads:
        what = f"with {heads} heads of {q_name} and {kv_heads} of {k_name} it must be a tensor or None"
        raise ValueError(f"bias is a BlockDiagonalBias; {what}")
    if isinstance(bias, BlockDiagonalBias):
        bias, bias_index = _diagonal_blocks(bias, q)
    elif bias is not None:
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
    dropout_seed = check_seed(dropout_seed, "q", q.device)
    return q, k, v, bias, bias_index, scale, dropout_p, dropout_seed


def _diagonal_blocks(bias, q):
    """The blocks (G, N, C) of a `BlockDiagonalBias` and the row of each example, or None where they have one each."""
    batch, _, queries, _ = q.shape
    for name, tensor in zip(("bias.matrix", "bias.gain", "bias.shift"), bias, strict=False):
        check_tensor(name, tensor, ("N", "C") if name == "bias.matrix" else ("G", "C"), "q", q.device)
        if tensor.dtype != q.dtype and tensor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be q's, {q.dtype}, or torch.float32")
    width = bias.matrix.shape[1]
    if bias.matrix.shape[0] != queries or width == 0:
        raise ValueError(f"bias.matrix has shape {tuple(bias.matrix.shape)}; it must be ({queries}, C), C of 1 or more")
    groups = batch if bias.index is None else bias.gain.shape[0]
    for name, tensor in (("bias.gain", bias.gain), ("bias.shift", bias.shift)):
        if tensor.shape[0] != groups or tensor.shape[1] != width:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({groups}, {width})")
    index = bias.index
    if index is not None:
        index = check_index("bias.index", index, ((batch,),), groups, "bias.gain", q.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    return reference.diagonal_blocks(bias.matrix, bias.gain, bias.shift, dtype).contiguous(), index

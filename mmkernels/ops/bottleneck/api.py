"""`ops.bottleneck_attention`: signature, validation, choice of backend."""

import torch

from ... import _backends
from .._shared.arguments import autocast_dtype, check_dense, check_key_mask, check_number
from ..attention import attention
from ..attention.api import MAX_HEAD_DIM, Problem, list_preference
from ..attention.lists import ListedProblem, attention_list, number
from . import reference

MAX_MODALITIES = 8
MAX_BOTTLENECK = 1024
QUERY_ROWS = ("all", "cls")


def bottleneck_attention(
    tokens_qkv,
    bottleneck_qkv,
    *,
    key_masks=None,
    scale=None,
    query_rows="all",
    backend="auto",
):
    """Self-attention of each modality over its own tokens and the bottleneck tokens, [x_m ; z], for all modalities at once.

    The attention of a fusion layer of MBT (Nagrani et al. 2021, section 3.2). Tokens and bottleneck come and go in separate
    buffers, which nobody joins, and one launch serves all modalities. The queries, keys and values of the bottleneck are made
    with each modality's own weights, so `bottleneck_qkv` has one entry for every modality.

    Args:
        tokens_qkv: list of 1 to 8 tensors (B, T_m, 3, H, D): queries, keys and values of modality m, as one projection makes
            them. float32, bfloat16 or float16 (`reference` takes every float dtype). Any strides.
        bottleneck_qkv: list of as many tensors (B, Z, 3, H, D), Z from 0 to 1024.
        key_masks: None, or a list of None or bool (B, T_m), True where a token may be attended. Bottleneck tokens always may.
            What stands behind the mask never reaches a result, NaN included; a row without any key (no bottleneck, every
            token masked) gives zeros and zero gradients.
        scale: default D ** -0.5.
        query_rows: "all"; or "cls", row 0 of each modality alone: what is left of a last layer under a classifier that
            reads the CLS tokens. The keys are all tokens all the same.
        backend: "auto", "reference", "sdpa", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        (tokens, bottleneck), two lists over the modalities: (B, T_m, H * D) and (B, Z, H * D), of the inputs' dtype; with
        query_rows="cls" (B, 1, H * D) and (B, 0, H * D).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    tokens_qkv, bottleneck_qkv, masks, scale = _check(tokens_qkv, bottleneck_qkv, key_masks, scale, query_rows)
    cls = query_rows == "cls"
    name = _choose(tokens_qkv, bottleneck_qkv, masks, backend)
    if name == "reference":
        return reference.bottleneck_attention(tokens_qkv, bottleneck_qkv, masks, scale, cls)
    if name == "sdpa":
        outputs = [_joined(*one, scale, cls) for one in zip(tokens_qkv, bottleneck_qkv, strict=True)]
    else:
        outputs = _listed(name, tokens_qkv, bottleneck_qkv, masks, scale, cls)
    return [out for out, _ in outputs], [out for _, out in outputs]


def explain_bottleneck_attention(
    tokens_qkv,
    bottleneck_qkv,
    *,
    key_masks=None,
    scale=None,
    query_rows="all",
    backend="auto",
):
    """The `explain` of `bottleneck_attention`."""
    tokens_qkv, bottleneck_qkv, masks, _ = _check(tokens_qkv, bottleneck_qkv, key_masks, scale, query_rows)
    name = _choose(tokens_qkv, bottleneck_qkv, masks, backend)
    reasons = {n: _refusals(n, tokens_qkv[0], masks) for n in _backends.NAMES}
    return _backends.Explanation("bottleneck_attention", name, "", reasons)


def _listed(backend, tokens_qkv, bottleneck_qkv, masks, scale, cls):
    """(out of the tokens, out of the bottleneck) of every modality, from the kernels that take them all at once."""
    count, shared = len(tokens_qkv), bottleneck_qkv[0].shape[1] > 0
    given, problems = [], []
    for i, mask in enumerate(masks):
        segments = (i, count + i) if shared else (i,)
        q, k, v = (tuple((tensor, slot) for tensor in segments) for slot in range(3))
        problems.append(ListedProblem(q[:1] if cls else q, k, v, (number(mask, given), -1), 1 if cls else -1))
    out, _ = attention_list(
        backend, [*tokens_qkv, *bottleneck_qkv] if shared else tokens_qkv, problems, given, None, scale, 0.0
    )
    out = [one.flatten(2) for one in out]
    if shared and not cls:
        return list(zip(out[::2], out[1::2], strict=True))
    # No rows of the bottleneck, and yet they have a gradient, of no rows as well.
    return [(one, bottleneck[:, :0, 0].flatten(2)) for one, bottleneck in zip(out, bottleneck_qkv, strict=True)]


def _joined(tokens, bottleneck, scale, cls):
    """The same of one modality, by way of a concatenation."""
    length, rows = (1, 1) if cls else (tokens.shape[1], None)
    joined = torch.cat([tokens, bottleneck], 1) if bottleneck.shape[1] else tokens
    q, k, v = joined.permute(2, 0, 3, 1, 4)  # (B, H, T + Z, D)
    out = attention(q[:, :, :rows], k, v, scale=scale, backend="sdpa").transpose(1, 2).flatten(2)
    if joined is tokens:  # no rows, and yet a gradient, of no rows as well
        return out, bottleneck[:, :, 0].flatten(2)
    return out[:, :length], out[:, length:]


def _choose(tokens_qkv, bottleneck_qkv, masks, backend):
    """One backend for all modalities: that of `ops.attention` for the one with the most tokens."""
    tokens, keys = tokens_qkv[0], max(t.shape[1] for t in tokens_qkv) + bottleneck_qkv[0].shape[1]
    problem = Problem(tokens.device, tokens.dtype, tokens.shape[4], tokens.shape[4], False)
    order = list_preference(problem, keys)
    return _backends.choose("bottleneck_attention", backend, order, lambda name: _refusals(name, tokens, masks))


def _refusals(name, tokens, masks):
    reasons = _backends.platform_refusals(name, tokens.device, tokens.dtype)
    if name == "sdpa":
        if any(mask is not None for mask in masks):
            reasons.append("it gives no guarantee for what stands behind the mask")
    elif name != "reference" and not 1 <= tokens.shape[4] <= MAX_HEAD_DIM:
        reasons.append(f"the head dim is {tokens.shape[4]}, it takes 1 to {MAX_HEAD_DIM}")
    return reasons


def _check(tokens_qkv, bottleneck_qkv, key_masks, scale, query_rows):
    """Validates, applies autocast, resolves the scale. Returns (tokens, bottleneck, masks, scale), all but scale lists."""
    for name, tensors in (("tokens_qkv", tokens_qkv), ("bottleneck_qkv", bottleneck_qkv)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} is a {type(tensors).__name__}; it must be a list of tensors, one for every modality")
        for i, tensor in enumerate(tensors):
            check_dense(f"{name}[{i}]", tensor)
            if not tensor.is_floating_point():
                raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}; it must be a floating-point tensor")
            if tensor.dim() != 5 or tensor.shape[2] != 3:
                raise ValueError(f"{name}[{i}] has shape {tuple(tensor.shape)}; it must be (B, length, 3, H, D)")
    count = len(tokens_qkv)
    if not 1 <= count <= MAX_MODALITIES:
        raise ValueError(f"tokens_qkv has {count} modalities; it must have 1 to {MAX_MODALITIES}")
    if len(bottleneck_qkv) != count:
        raise ValueError(f"bottleneck_qkv has {len(bottleneck_qkv)} entries; it must have one for each of {count} modalities")
    masks = [None] * count if key_masks is None else key_masks
    if not isinstance(masks, (list, tuple)):
        raise TypeError(f"key_masks is a {type(masks).__name__}; it must be None or a list over the modalities")
    if len(masks) != count:
        raise ValueError(f"key_masks has {len(masks)} entries; it must have one for each of {count} modalities")
    first = tokens_qkv[0]
    if (dtype := autocast_dtype(first.device)) is not None:
        tokens_qkv, bottleneck_qkv = ([t.to(dtype) for t in tensors] for tensors in (tokens_qkv, bottleneck_qkv))
        first = tokens_qkv[0]
    batch, _, _, heads, head_dim = first.shape
    rows = bottleneck_qkv[0].shape[1]
    for name, tensors in (("tokens_qkv", tokens_qkv), ("bottleneck_qkv", bottleneck_qkv)):
        for i, tensor in enumerate(tensors):
            if tensor.device != first.device:
                raise ValueError(f"{name}[{i}] is on {tensor.device}; it must be on {first.device}, as tokens_qkv[0] is")
            if tensor.dtype != first.dtype:
                raise TypeError(f"{name}[{i}] has dtype {tensor.dtype}; it must be that of tokens_qkv[0], {first.dtype}")
            length = "T" if name == "tokens_qkv" else rows
            if tensor.shape[0] != batch or tensor.shape[3:] != first.shape[3:] or length not in ("T", tensor.shape[1]):
                raise ValueError(
                    f"{name}[{i}] has shape {tuple(tensor.shape)}; it must be ({batch}, {length}, 3, {heads}, {head_dim})"
                )
    if rows > MAX_BOTTLENECK:
        raise ValueError(f"bottleneck_qkv has {rows} bottleneck tokens; it must have at most {MAX_BOTTLENECK}")
    for i, (mask, tokens) in enumerate(zip(masks, tokens_qkv, strict=True)):
        if mask is not None:
            check_key_mask(mask, batch, tokens.shape[1], first.device, f"key_masks[{i}]")
    if query_rows not in QUERY_ROWS:
        raise ValueError(f"query_rows is {query_rows!r}; allowed are 'all' and 'cls'")
    if query_rows == "cls":
        for i, tokens in enumerate(tokens_qkv):
            if tokens.shape[1] == 0:
                raise ValueError(f"tokens_qkv[{i}] has no tokens; query_rows='cls' needs the row of a CLS token")
    if head_dim == 0:
        raise ValueError(f"tokens_qkv[0] has shape {tuple(first.shape)}; its head dim must be 1 or more")
    scale = head_dim**-0.5 if scale is None else check_number("scale", scale)
    return list(tokens_qkv), list(bottleneck_qkv), list(masks), scale

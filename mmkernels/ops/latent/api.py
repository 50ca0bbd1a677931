"""`ops.latent_attention`: signature, validation, choice of backend and plan."""

import torch

from ... import _backends
from .._shared import dropout
from .._shared.arguments import autocast_dtype, check_key_mask, check_number, check_seed, check_tensor
from ..attention import attention
from . import autograd, plan, reference

MAX_CHANNELS = 1024


def latent_attention(
    q,
    x,
    w_k,
    w_v,
    *,
    num_heads=1,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    b_k=None,
    b_v=None,
    position=None,
    key_mask=None,
    scale=None,
    dropout_p=0.0,
    dropout_seed=None,
    backend="auto",
):
    """Attention of few queries over a long input that is normalised and projected on the way, never in memory.

    Computes softmax(scale Q K^T) V per head with K = LayerNorm([x ; position]) w_k^T + b_k and V likewise: the
    cross-attention of Perceiver (Jaegle et al. 2021, section 3.1) between its query and its output projection. Where that
    takes fewer operations (`ops/latent/plan.py`) the projections are absorbed into the N-sized side; then no tensor of
    M rows is written or saved, and a gradient of M rows exists only if `x` or `position` asks for one.

    Args:
        q: projected queries (B, N, H * D), or (1, N, H * D) shared by the batch. Any strides.
        x: input (B, M, Cx), the content channels.
        w_k: key projection (H * D, C) with C = Cx + Cp, in the layout of `nn.Linear.weight`.
        w_v: value projection (H * E, C).
        num_heads: H; head h owns the channels h*D to (h+1)*D.
        norm_weight, norm_bias: affine part of the LayerNorm over C channels, (C,), of x's dtype or float32, or None.
        eps: of the LayerNorm, positive; None leaves out the normalisation.
        b_k: accepted for completeness: it adds the same number to all scores of a row, so neither the result nor any
            gradient depends on it. Its gradient is zero.
        b_v: value bias (H * E,).
        position: (M, Cp), channels that all examples share (Fourier features, a learned table): read once, never copied
            per example.
        key_mask: bool (B, M), True where an input may be attended. A row without any gives zeros (before `b_v`, as
            in DeepMind's code) and zero gradients; NaN behind the mask never reaches the result.
        scale: default D ** -0.5.
        dropout_p: probability in [0, 1) of dropping an attention weight; the others are divided by 1 - dropout_p. The mask
            depends on the seed and the position (b, h, n, m) only, as that of `ops.attention`: every backend and every plan
            drops the same elements.
        dropout_seed: int64 tensor of one element on x's device; drawn from torch's generator when None.
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        (B, N, H * E) of x's dtype.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    if backend in ("auto", "cpp") and dropout_p == 0.0 and dropout_seed is None and not torch.compiler.is_compiling():
        out = _inference(q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale, backend)
        if out is not None:
            return out
    q, x, w_k, w_v, b_k, b_v, position, scale, eps = _check(
        q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale
    )
    dropout_p, seed = _check_dropout(dropout_p, dropout_seed, x.device)
    chosen = _plan(q, x, w_k, w_v, num_heads)
    name = _choose(x, backend, _order(q, x, w_k, w_v, position, num_heads, chosen, dropout_p))
    if dropout_p > 0.0 and seed is None:
        seed = dropout.draw_seed(x.device)
    if key_mask is not None and q.shape[0] == x.shape[0]:
        q = _zero_without_keys(q, key_mask)  # else their NaN would reach w_k's gradient
    if name == "reference":
        keep = None
        if dropout_p > 0.0:
            keep = dropout.keep_mask(seed, (x.shape[0], num_heads, q.shape[1], x.shape[1]), dropout_p)
        out = reference.latent_attention(
            q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale, keep, dropout_p
        )
        return out if key_mask is None else _zero_without_keys(out, key_mask)
    absorbed = plan.absorbed(chosen)
    if absorbed:
        out = _absorbed(
            name, q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_v, position, key_mask, scale, seed, dropout_p
        )
    else:
        out = _projected(
            *(name, chosen, q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale),
            *(seed, dropout_p),
        )
    if b_k is not None and b_k.requires_grad and absorbed:
        out = out + b_k.sum() * 0.0  # a zero gradient, as plain autograd gives, instead of none
    return out


def explain_latent_attention(
    q,
    x,
    w_k,
    w_v,
    *,
    num_heads=1,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    b_k=None,
    b_v=None,
    position=None,
    key_mask=None,
    scale=None,
    dropout_p=0.0,
    dropout_seed=None,
    backend="auto",
):
    """The `explain` of `latent_attention`."""
    q, x, w_k, w_v, *_ = _check(q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale)
    dropout_p, _ = _check_dropout(dropout_p, dropout_seed, x.device)
    chosen = _plan(q, x, w_k, w_v, num_heads)
    name = _choose(x, backend, _order(q, x, w_k, w_v, position, num_heads, chosen, dropout_p))
    detail = "" if name == "reference" else f"scores: {chosen.score}, values: {chosen.value}, {chosen.flops:.3g} operations"
    reasons = {n: _refusals(n, x) for n in _backends.NAMES}
    return _backends.Explanation("latent_attention", name, detail, reasons)


def _inference(q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale, backend):
    """The whole absorbed forward as one native call, or None where the long way must decide.

    A tiny problem costs what its calls cost, so the arguments are checked by the native op alone: what it refuses goes the
    long way, which runs it or says what is wrong.
    """
    try:
        if type(x) is not torch.Tensor or num_heads is True or torch.is_autocast_enabled("cpu"):
            return None
        if b_k is not None and (b_k.shape != w_k.shape[:1] or b_k.dtype != x.dtype or b_k.layout != x.layout):
            return None  # it has no part in the result, and yet it must be right
        grad = torch.is_grad_enabled()
        for tensor in (q, x, w_k, w_v, norm_weight, norm_bias, b_k, b_v, position, key_mask):
            if tensor is not None and (not tensor.is_cpu or (grad and tensor.requires_grad)):
                return None  # a tensor on "meta" among the others would take the call there
        if eps is None and norm_weight is None and norm_bias is None:
            eps = -1.0
        elif eps is None:
            return None
        else:
            eps = _check_eps(eps)
        if _choose(x, backend) != "cpp" or not plan.absorbed(_plan(q, x, w_k, w_v, num_heads)):
            return None
        scale = (w_k.shape[0] // num_heads) ** -0.5 if scale is None else check_number("scale", scale)
        return torch.ops.mmkernels.latent_attention.default(
            q, x, w_k, w_v, norm_weight, norm_bias, b_v, position, key_mask, num_heads, scale, eps
        )
    except Exception:
        return None


def _absorbed(
    backend, q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_v, position, key_mask, scale, seed, dropout_p
):
    absorbed = absorb_queries(q, w_k, num_heads, norm_weight)
    return _of_absorbed(
        *(backend, absorbed, x, w_v, num_heads, norm_weight, norm_bias, eps, b_v, position, key_mask, scale),
        *(seed, dropout_p),
    )


def absorb_queries(q, w_k, num_heads, norm_weight):
    """What the core takes: (B|1, N, H*D) -> (B|1, H*N, C), of q's dtype."""
    heads_q = torch.unflatten(q, -1, (num_heads, -1)).transpose(1, 2)  # (B|1, H, N, D)
    absorbed = per_head(heads_q, torch.unflatten(w_k, 0, (num_heads, -1)))  # (B|1, H, N, C)
    if norm_weight is not None:
        absorbed = (absorbed * norm_weight).to(q.dtype)
    return absorbed.flatten(1, 2)


def _of_absorbed(
    backend, absorbed, x, w_v, num_heads, norm_weight, norm_bias, eps, b_v, position, key_mask, scale, seed=None, dropout_p=0.0
):
    out, _ = autograd.core(backend, absorbed, x, position, key_mask, scale, eps, seed, dropout_p)
    return _where_keys_are(values_of_core(out, w_v, num_heads, norm_weight, norm_bias, b_v, dropout_p), x, key_mask)


def values_of_core(out, w_v, num_heads, norm_weight, norm_bias, b_v, dropout_p=0.0):
    """`project_values` of what the core returns, with dropout (B, H*N, C + 1)."""
    row_sum = None
    if dropout_p > 0.0:
        out, row_sum = out[..., :-1], out[..., -1:]
    return project_values(out, w_v, num_heads, norm_weight, norm_bias, b_v, row_sum)


def project_values(out, w_v, num_heads, norm_weight, norm_bias, b_v, row_sum=None):
    """From (B, H*N, C), float32 at least, to (B, N, H*E) of w_v's dtype.

    `row_sum` (B, H*N, 1): what the weights of a row sum to where that is not one.
    """
    out = torch.unflatten(out, 1, (num_heads, -1))
    if norm_weight is not None:
        out = out * norm_weight
    if row_sum is not None:
        row_sum = torch.unflatten(row_sum, 1, (num_heads, -1))
    if norm_bias is not None:
        out = out + (norm_bias if row_sum is None else row_sum * norm_bias)
    out = per_head(out.to(w_v.dtype), torch.unflatten(w_v, 0, (num_heads, -1)).transpose(-1, -2))
    if row_sum is not None and b_v is not None:
        out, b_v = out + (row_sum * b_v.view(num_heads, 1, -1)).to(out.dtype), None
    out = out.transpose(1, 2).flatten(2)
    return out if b_v is None else out + b_v


def per_head(rows, weights):
    """rows (B, H, N, X) @ weights (H, X, Y), without a copy of the weights, or of their gradient, for every example."""
    batch, heads, length, _ = rows.shape
    if heads == 1:
        return rows @ weights.squeeze(0)  # not [0], whose gradient is zeros of the size of all heads and a copy into them
    product = rows.transpose(0, 1).flatten(1, 2) @ weights
    return torch.unflatten(product, 1, (batch, length)).transpose(0, 1)


def absorbing_backend(queries, x, w_k, w_v, num_heads, position, backend):
    """The backend on which `latent_attention` would absorb the projections, of (B|1, N, *) queries; None where it would not.

    For a caller that keeps what `absorb_queries` returns and goes on with `attention_of_absorbed`.
    """
    chosen = _plan(queries, x, w_k, w_v, num_heads)
    name = _choose(x, backend, _preference(queries, x, position, num_heads, chosen))
    return name if name != "reference" and plan.absorbed(chosen) else None


def attention_of_absorbed(backend, absorbed, x, w_v, num_heads, norm_weight, norm_bias, eps, b_v, position, key_mask, scale):
    """`latent_attention` of queries that are absorbed already, on the backend that `absorbing_backend` names; no gradient."""
    if backend == "cpp":
        return torch.ops.mmkernels.latent_attention.default(
            absorbed, x, None, w_v, norm_weight, norm_bias, b_v, position, key_mask, num_heads, scale, eps
        )
    return _of_absorbed(backend, absorbed, x, w_v, num_heads, norm_weight, norm_bias, eps, b_v, position, key_mask, scale)


def _where_keys_are(out, x, key_mask):
    """Zeros for examples without any key: their probabilities sum to zero, and no bias may show."""
    if x.shape[1] == 0:
        return out * 0.0
    return out if key_mask is None else _zero_without_keys(out, key_mask)


def _projected(
    backend,
    chosen,
    q,
    x,
    w_k,
    w_v,
    num_heads,
    norm_weight,
    norm_bias,
    eps,
    b_k,
    b_v,
    position,
    key_mask,
    scale,
    seed,
    dropout_p,
):
    x = normalised_input(x, position, key_mask, norm_weight, norm_bias, eps)

    def heads(t):
        return torch.unflatten(t, -1, (num_heads, -1)).transpose(1, 2)

    q = heads(q.expand(x.shape[0], -1, -1))
    shared = x[:, None].expand(-1, num_heads, -1, -1)
    if chosen.score == "project":
        k = heads(torch.nn.functional.linear(x, w_k, b_k))
    else:
        q, k = q @ torch.unflatten(w_k, 0, (num_heads, -1)), shared
    summed = chosen.value != "project" and dropout_p > 0.0 and b_v is not None  # the sums of rows are b_v's factor
    if chosen.value == "project":
        v = heads(torch.nn.functional.linear(x, w_v, b_v))
    elif summed:
        v = torch.cat([x, x.new_ones(1).expand(*x.shape[:2], 1)], -1)[:, None].expand(-1, num_heads, -1, -1)
    else:
        v = shared
    out = attention(q, k, v, key_mask=key_mask, scale=scale, dropout_p=dropout_p, dropout_seed=seed, backend=backend)
    if chosen.value == "project":
        out = out.transpose(1, 2).flatten(2)
    else:
        row_sum = None
        if summed:
            out, row_sum = out[..., :-1], out[..., -1:].flatten(1, 2)
        out = project_values(out.flatten(1, 2), w_v, num_heads, None, None, b_v, row_sum)
    return _where_keys_are(out, x, key_mask)


def normalised_input(x, position, key_mask, norm_weight, norm_bias, eps):
    """What the projections read: LayerNorm([x ; position]), (B, M, C)."""
    if position is not None:
        x = torch.cat([x, position.expand(x.shape[0], -1, -1)], -1)
    if key_mask is not None:
        x = torch.where(key_mask[..., None], x, 0.0)  # NaN behind the mask must not reach a weight's gradient
    if eps < 0:
        return x
    weight = None if norm_weight is None else norm_weight.to(x.dtype)
    bias = None if norm_bias is None else norm_bias.to(x.dtype)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _plan(q, x, w_k, w_v, num_heads):
    """The op is given projected queries and returns unprojected values: only those plans are open to it."""
    qk_channels, channels = w_k.shape
    score_plans, value_plans = plan.SCORE_PLANS[:2], plan.VALUE_PLANS[:2]
    if channels > MAX_CHANNELS:
        score_plans, value_plans = score_plans[:1], value_plans[:1]
    return plan.choose_plan(
        q.shape[1],
        x.shape[1],
        0,
        channels,
        qk_channels,
        w_v.shape[0],
        0,
        num_heads,
        score_plans=score_plans,
        value_plans=value_plans,
    )


# What `auto` tries first where the CUDA kernels for sm_90 take the problem: the faster ones by the README's time models. A
# prediction until both have been measured.
HOPPER_PREFERENCE = ("cuda", "triton", "reference")


def _order(q, x, w_k, w_v, position, num_heads, chosen, dropout_p):
    """The order of the backends."""
    if not plan.absorbed(chosen) and max(w_k.shape[0], w_v.shape[0]) > num_heads * MAX_CHANNELS:
        return ("reference",)  # heads that no kernel of `ops.attention` takes
    return _preference(q, x, position, num_heads, chosen, dropout_p)


def _preference(q, x, position, num_heads, chosen, dropout_p=0.0):
    """That of the absorbed form; where the sm_90 kernels run is what csrc/latent/latent_hopper.cuh asks for."""
    channels = x.shape[2] + (0 if position is None else position.shape[1])
    if (
        x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and plan.absorbed(chosen)
        and dropout_p == 0.0
        and q.shape[1] * num_heads > 32
        and channels <= 704
        and all(t is None or t.stride(-1) == 1 for t in (x, position))
        and not _refusals("cuda", x)
        and _backends.capability(x.device)[0] == 9
    ):
        return HOPPER_PREFERENCE
    return _backends.preference(x.dtype)


def _choose(x, backend, order=None):
    order = order or _backends.preference(x.dtype)
    return _backends.choose("latent_attention", backend, order, lambda name: _refusals(name, x))


def _refusals(name, x):
    if name == "sdpa":
        return ["the op normalises and projects its input, which is no backend of its own"]
    return _backends.platform_refusals(name, x.device, x.dtype)


def _check(q, x, w_k, w_v, num_heads, norm_weight, norm_bias, eps, b_k, b_v, position, key_mask, scale):
    """Validates, applies autocast, resolves scale and eps (None becomes -1)."""
    for name, tensor, dimensions, optional in (
        ("x", x, ("B", "M", "Cx"), False),
        ("q", q, ("B", "N", "H * D"), False),
        ("w_k", w_k, ("H * D", "C"), False),
        ("w_v", w_v, ("H * E", "C"), False),
        ("b_k", b_k, ("H * D",), True),
        ("b_v", b_v, ("H * E",), True),
        ("position", position, ("M", "Cp"), True),
        ("norm_weight", norm_weight, ("C",), True),
        ("norm_bias", norm_bias, ("C",), True),
    ):
        if tensor is not None or not optional:
            check_tensor(name, tensor, dimensions, "x", getattr(x, "device", None))
    if (dtype := autocast_dtype(x.device)) is not None:
        q, x, w_k, w_v, b_k, b_v, position = (None if t is None else t.to(dtype) for t in (q, x, w_k, w_v, b_k, b_v, position))
    for name, tensor in (("q", q), ("w_k", w_k), ("w_v", w_v), ("b_k", b_k), ("b_v", b_v), ("position", position)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be x's, {x.dtype}")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None and tensor.dtype != x.dtype and tensor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be x's, {x.dtype}, or torch.float32")
    batch, keys, content = x.shape
    channels = content + (0 if position is None else position.shape[1])
    if position is not None and position.shape[0] != keys:
        raise ValueError(f"position has shape {tuple(position.shape)}; with x {tuple(x.shape)} it must be ({keys}, Cp)")
    if channels == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; with position there must be one channel or more")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads is {num_heads!r}; it must be a positive integer")
    if w_k.shape[1] != channels or w_k.shape[0] % num_heads or w_k.shape[0] == 0:
        raise ValueError(
            f"w_k has shape {tuple(w_k.shape)}; it must be (H * D, {channels}) with a multiple of num_heads = {num_heads} rows"
        )
    if w_v.shape[1] != channels or w_v.shape[0] % num_heads or w_v.shape[0] == 0:
        raise ValueError(
            f"w_v has shape {tuple(w_v.shape)}; it must be (H * E, {channels}) with a multiple of num_heads = {num_heads} rows"
        )
    if q.shape[0] not in (1, batch) or q.shape[2] != w_k.shape[0]:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be ({batch} or 1, N, {w_k.shape[0]}), the rows of w_k")
    for name, tensor, size in (
        ("norm_weight", norm_weight, channels),
        ("norm_bias", norm_bias, channels),
        ("b_k", b_k, w_k.shape[0]),
        ("b_v", b_v, w_v.shape[0]),
    ):
        if tensor is not None and tensor.shape[0] != size:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({size},)")
    if key_mask is not None:
        check_key_mask(key_mask, batch, keys, x.device)
    if eps is None:
        if norm_weight is not None or norm_bias is not None:
            raise ValueError("eps is None, which leaves out the LayerNorm; norm_weight and norm_bias must then be None too")
        eps = -1.0
    else:
        eps = _check_eps(eps)
    scale = (w_k.shape[0] // num_heads) ** -0.5 if scale is None else check_number("scale", scale)
    return q, x, w_k, w_v, b_k, b_v, position, scale, eps


def _check_dropout(dropout_p, dropout_seed, device, other="x"):
    dropout_p = check_number("dropout_p", dropout_p, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
    return dropout_p, check_seed(dropout_seed, other, device)


def _check_eps(eps):
    # Zero would make NaN of the rows behind a mask, which are zeroed.
    return check_number("eps", eps, "a positive number, or None for no LayerNorm", lambda eps: eps > 0.0)


def _zero_without_keys(tensor, key_mask):
    """`tensor` (B, ...), zeros in the examples whose `key_mask` (B, M) hides every key.

    Selected, not multiplied: neither a NaN that stands there nor a NaN gradient that arrives there passes.
    """
    return torch.where(key_mask.any(1).view(-1, *(1,) * (tensor.dim() - 1)), tensor, 0.0)

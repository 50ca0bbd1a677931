"""`ops.latent_decode`: signature, validation, choice of backend and plan."""

import torch

from ... import _backends
from .._shared.arguments import autocast_dtype, check_key_mask, check_number, check_tensor
from ..attention import attention
from . import decode_autograd, decode_reference, plan
from .api import per_head

MAX_CHANNELS = 1024  # of folded keys or values on a GPU


def latent_decode(
    queries,
    k,
    v,
    w_q,
    w_o,
    *,
    num_heads=1,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    b_q=None,
    b_o=None,
    position=None,
    query_mask=None,
    key_mask=None,
    scale=None,
    backend="auto",
):
    """Attention of many output queries to few latents, normalised and projected on the way, never in memory.

    Computes concat_h(softmax(scale Q_h K_h^T) V_h) w_o^T + b_o with Q = LayerNorm([queries ; position]) w_q^T + b_q: the
    decoder of Perceiver IO (Jaegle et al. 2022, section 3.2) between its projected latents and its outputs. Where that takes
    fewer operations (`ops/latent/plan.py`) the query projection is folded into the keys and the output projection into the
    values; then the queries are read once, the result is written once, and no other array of O rows is made, nor saved.

    Args:
        queries: (B, O, Cx), or (1, O, Cx) shared by the batch: read and normalised once for all examples. Any strides.
        k: projected keys (B, N, H * D) of the latents.
        v: projected values (B, N, H * E).
        w_q: query projection (H * D, C) with C = Cx + Cp, in the layout of `nn.Linear.weight`.
        w_o: output projection (Cout, H * E).
        num_heads: H; head h owns the channels h*D to (h+1)*D.
        norm_weight, norm_bias: affine part of the LayerNorm over C channels, (C,), of queries' dtype or float32, or None.
        eps: of the LayerNorm, positive; None leaves out the normalisation.
        b_q: query bias (H * D,).
        b_o: output bias (Cout,).
        position: (O, Cp), channels that all examples share (Fourier features, a learned table): never copied per example.
        query_mask: bool (B, O), True for queries that count. Others yield `b_o`, as in DeepMind's code, which zeroes the
            attention's result before the output projection; NaN behind the mask never leaves it.
        key_mask: bool (B, N), True where a latent may be attended. An example without any yields `b_o`.
        scale: default D ** -0.5.
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        (B, O, Cout) of queries' dtype.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    queries, k, v, w_q, w_o, b_q, b_o, position, scale, eps = _check(
        queries, k, v, w_q, w_o, num_heads, norm_weight, norm_bias, eps, b_q, b_o, position, query_mask, key_mask, scale
    )
    name = _choose(queries, backend, (k, v, w_q, w_o, num_heads))
    if key_mask is not None:  # queries of an example without keys: NaN in them must not reach a gradient
        with_keys = key_mask.any(1, keepdim=True).expand(-1, queries.shape[1])
        query_mask = with_keys if query_mask is None else query_mask & with_keys
    if name == "reference":
        return decode_reference.latent_decode(
            queries, k, v, w_q, w_o, num_heads, norm_weight, norm_bias, eps, b_q, b_o, position, query_mask, key_mask, scale
        )
    chosen = _plan(name, queries, k, w_q, w_o, num_heads)
    if key_mask is not None:  # NaN behind the mask must not reach a weight's gradient
        k, v = torch.where(key_mask[..., None], k, 0.0), torch.where(key_mask[..., None], v, 0.0)
    k, v = _heads(k, num_heads), _heads(v, num_heads)
    bias, folded_values = None, chosen.value == "output_side"
    if chosen.score == "absorb_into_keys":
        k, bias = _fold_queries(k, w_q, num_heads, norm_weight, norm_bias, b_q)
    else:
        queries = _projected(queries, w_q, norm_weight, norm_bias, eps, b_q, position, query_mask, k.shape[0])
        position, eps = None, -1.0
    if folded_values:
        v = per_head(v, torch.unflatten(w_o, 1, (num_heads, -1)).permute(1, 2, 0))
    if (bias is not None and folded_values) or (num_heads == 1 and (bias is not None or folded_values)):
        if bias is None:
            bias = torch.zeros_like(k[..., 0], dtype=torch.float32)
        out_bias = b_o if folded_values else None
        out = decode_autograd.core(name, queries, position, query_mask, k, bias, v, out_bias, key_mask, scale, eps)
        return out if folded_values else torch.nn.functional.linear(out, w_o, b_o)
    if bias is None:
        q = _heads(queries, num_heads)
    else:
        q = _projected(queries, None, None, None, eps, None, position, query_mask, k.shape[0])[:, None]
        bias = bias[:, :, None] * scale
    q = q.expand(k.shape[0], num_heads, -1, -1)
    out = attention(q, k, v, key_mask=key_mask, bias=bias, scale=scale, backend=name)
    if query_mask is not None:
        out = torch.where(query_mask[:, None, :, None], out, 0.0)
    if folded_values:
        out = out.sum(1)
        return out if b_o is None else out + b_o
    return torch.nn.functional.linear(out.transpose(1, 2).flatten(2), w_o, b_o)


def explain_latent_decode(
    queries,
    k,
    v,
    w_q,
    w_o,
    *,
    num_heads=1,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    b_q=None,
    b_o=None,
    position=None,
    query_mask=None,
    key_mask=None,
    scale=None,
    backend="auto",
):
    """The `explain` of `latent_decode`."""
    queries, k, v, w_q, w_o, *_ = _check(
        queries, k, v, w_q, w_o, num_heads, norm_weight, norm_bias, eps, b_q, b_o, position, query_mask, key_mask, scale
    )
    problem = (k, v, w_q, w_o, num_heads)
    name = _choose(queries, backend, problem)
    chosen = _plan(name, queries, k, w_q, w_o, num_heads)
    detail = "" if name == "reference" else f"scores: {chosen.score}, values: {chosen.value}, {chosen.flops:.3g} operations"
    reasons = {n: _refusals(n, queries, problem) for n in _backends.NAMES}
    return _backends.Explanation("latent_decode", name, detail, reasons)


def _heads(t, num_heads):
    return torch.unflatten(t, -1, (num_heads, -1)).transpose(1, 2)


def _fold_queries(k, w_q, num_heads, norm_weight, norm_bias, b_q):
    """k (B,H,N,D) -> keys that meet the normalised queries (B,H,N,C) and what each adds to its scores, float32 (B,H,N)."""
    shift = torch.zeros_like(w_q[:, 0], dtype=torch.float32)
    if norm_bias is not None:
        shift = (w_q.to(torch.float32) * norm_bias).sum(1)  # no matmul: autocast would round it
    if b_q is not None:
        shift = shift + b_q
    bias = (k.to(torch.float32) * torch.unflatten(shift, 0, (num_heads, 1, -1))).sum(-1)
    k = per_head(k, torch.unflatten(w_q, 0, (num_heads, -1)))
    return (k if norm_weight is None else (k * norm_weight).to(w_q.dtype)), bias


def _projected(queries, w_q, norm_weight, norm_bias, eps, b_q, position, query_mask, batch):
    """LayerNorm([queries ; position]) w_q^T + b_q (B|1,O,H*D); without w_q the normalised rows themselves."""
    if position is not None:
        queries = torch.cat([queries, position.expand(queries.shape[0], -1, -1)], -1)
    if query_mask is not None:
        queries = torch.where(query_mask[..., None], queries.expand(batch, -1, -1), 0.0)
    if eps >= 0:
        weight, bias = (None if t is None else t.to(queries.dtype) for t in (norm_weight, norm_bias))
        queries = torch.nn.functional.layer_norm(queries, queries.shape[-1:], weight, bias, eps)
    return queries if w_q is None else torch.nn.functional.linear(queries, w_q, b_q)


def _plan(backend, queries, k, w_q, w_o, num_heads):
    """The op is given projected keys and values: only those plans are open to it."""
    score_plans, value_plans = plan.SCORE_PLANS[::2], plan.VALUE_PLANS[::2]
    if backend != "cpp":
        score_plans = score_plans[: 1 + (w_q.shape[1] <= MAX_CHANNELS)]
        value_plans = value_plans[: 1 + (w_o.shape[0] <= MAX_CHANNELS)]
    qk_channels, channels = w_q.shape
    sizes = (queries.shape[1], k.shape[1], channels, 0, qk_channels, w_o.shape[1], w_o.shape[0], num_heads)
    return plan.choose_plan(*sizes, score_plans=score_plans, value_plans=value_plans)


def has_kernels(queries, backend) -> bool:
    """Would kernels run the op on `backend`, or is the reference what is asked for? Else there is `latent_attention`."""
    try:
        return _choose(queries, backend) != "reference" or backend == "reference"
    except _backends.BackendError:
        return False


def _choose(queries, backend, problem=None):
    order = _backends.preference(queries.dtype)
    return _backends.choose("latent_decode", backend, order, lambda name: _refusals(name, queries, problem))


def _refusals(name, queries, problem):
    """`problem`: (k, v, w_q, w_o, num_heads); without it, what holds for any."""
    if name == "sdpa":
        return ["the op normalises and projects its queries, which is no backend of its own"]
    reasons = _backends.platform_refusals(name, queries.device, queries.dtype)
    if name == "cuda" and problem is not None:
        k, v, w_q, w_o, num_heads = problem
        chosen = _plan(name, queries, k, w_q, w_o, num_heads)
        for what, folded, here, there in (
            ("keys", chosen.score == "absorb_into_keys", w_q.shape[1], k.shape[2] // num_heads),
            ("values", chosen.value == "output_side", w_o.shape[0], v.shape[2] // num_heads),
        ):
            if (here if folded else there) > MAX_CHANNELS:
                reasons.append(f"its {what} have {here if folded else there} channels, it takes 1 to {MAX_CHANNELS}")
    return reasons


def _check(queries, k, v, w_q, w_o, num_heads, norm_weight, norm_bias, eps, b_q, b_o, position, query_mask, key_mask, scale):
    """Validates, applies autocast, resolves scale and eps (None becomes -1)."""
    for name, tensor, dimensions, optional in (
        ("queries", queries, ("B", "O", "Cx"), False),
        ("k", k, ("B", "N", "H * D"), False),
        ("v", v, ("B", "N", "H * E"), False),
        ("w_q", w_q, ("H * D", "C"), False),
        ("w_o", w_o, ("Cout", "H * E"), False),
        ("b_q", b_q, ("H * D",), True),
        ("b_o", b_o, ("Cout",), True),
        ("position", position, ("O", "Cp"), True),
        ("norm_weight", norm_weight, ("C",), True),
        ("norm_bias", norm_bias, ("C",), True),
    ):
        if tensor is not None or not optional:
            check_tensor(name, tensor, dimensions, "queries", getattr(queries, "device", None))
    cast = (queries, k, v, w_q, w_o, b_q, b_o, position)
    if (dtype := autocast_dtype(queries.device)) is not None:
        cast = tuple(None if t is None else t.to(dtype) for t in cast)
    queries, k, v, w_q, w_o, b_q, b_o, position = cast
    for name, tensor in zip(("k", "v", "w_q", "w_o", "b_q", "b_o", "position"), cast[1:], strict=True):
        if tensor is not None and tensor.dtype != queries.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be queries', {queries.dtype}")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is not None and tensor.dtype != queries.dtype and tensor.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be queries', {queries.dtype}, or torch.float32")
    batch, keys, qk_channels = k.shape
    _, rows, content = queries.shape
    channels = content + (0 if position is None else position.shape[1])
    if queries.shape[0] not in (1, batch):
        raise ValueError(f"queries has shape {tuple(queries.shape)}; its batch must be 1 or that of k, {batch}")
    if position is not None and position.shape[0] != rows:
        raise ValueError(
            f"position has shape {tuple(position.shape)}; with queries {tuple(queries.shape)} it must be ({rows}, Cp)"
        )
    if channels == 0:
        raise ValueError(f"queries has shape {tuple(queries.shape)}; with position there must be one channel or more")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise ValueError(f"num_heads is {num_heads!r}; it must be a positive integer")
    if qk_channels == 0 or qk_channels % num_heads:
        raise ValueError(f"k has shape {tuple(k.shape)}; its channels must be a positive multiple of num_heads = {num_heads}")
    if v.shape[0] != batch or v.shape[1] != keys or v.shape[2] == 0 or v.shape[2] % num_heads:
        raise ValueError(
            f"v has shape {tuple(v.shape)}; it must be ({batch}, {keys}, H * E) with a multiple of num_heads = {num_heads}"
        )
    if w_q.shape[0] != qk_channels or w_q.shape[1] != channels:
        raise ValueError(f"w_q has shape {tuple(w_q.shape)}; it must be ({qk_channels}, {channels})")
    if w_o.shape[1] != v.shape[2] or w_o.shape[0] == 0:
        raise ValueError(f"w_o has shape {tuple(w_o.shape)}; it must be (Cout, {v.shape[2]}), the channels of v")
    for name, tensor, size in (
        ("norm_weight", norm_weight, channels),
        ("norm_bias", norm_bias, channels),
        ("b_q", b_q, qk_channels),
        ("b_o", b_o, w_o.shape[0]),
    ):
        if tensor is not None and tensor.shape[0] != size:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({size},)")
    if query_mask is not None:
        check_key_mask(query_mask, batch, rows, queries.device, "query_mask")
    if key_mask is not None:
        check_key_mask(key_mask, batch, keys, queries.device)
    if eps is None:
        if norm_weight is not None or norm_bias is not None:
            raise ValueError("eps is None, which leaves out the LayerNorm; norm_weight and norm_bias must then be None too")
        eps = -1.0
    else:
        # Zero would make NaN of the rows behind a mask, which are zeroed.
        eps = check_number("eps", eps, "a positive number, or None for no LayerNorm", lambda eps: eps > 0.0)
    scale = (qk_channels // num_heads) ** -0.5 if scale is None else check_number("scale", scale)
    return queries, k, v, w_q, w_o, b_q, b_o, position, scale, eps

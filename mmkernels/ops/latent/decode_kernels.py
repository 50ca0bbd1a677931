"""The decoder in Triton: forward, gradient of the queries, gradient of the keys.

A tile of queries is loaded once, normalised in registers, and meets the folded keys of every head. Its C channels lie side
by side as chunks (`kernels.py`), the position block first; the keys come in that order, padded (`_in_tile_order`), and so do
the values' columns. `README.md` here derives the mathematics.
"""

import math

import torch
import triton
import triton.language as tl

from ... import _tuning
from .._shared.kernels import LN_2, LOG2_E, ReportCase, _multiprocessors, ceil_div, input_precision, split_count, sum_splits
from .kernels import (
    _accumulate,
    _cast,
    _guard,
    _in_tile_order,
    _inner,
    _load_keys,
    _load_rows,
    _normalise,
    _offset,
    _scaled,
    _statistics,
    _store_gradient,
    _store_rows,
    _tiles,
    _zeros,
    chunks,
)

# --- Pieces -----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_wide(base, rows, inside, E: tl.constexpr, WIDTHS: tl.constexpr):
    """Chunks of contiguous rows of E columns, zeros beyond them."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        c = _offset(WIDTHS, i) + tl.arange(0, WIDTHS[i])
        pointers = base + rows.to(tl.int64)[:, None] * E + c[None, :]
        tiles = tiles + (tl.load(pointers, mask=inside[:, None] & (c < E)[None, :], other=0.0),)
    return tiles


@triton.jit
def _shown(mask_ptr, batch, mask_batch, mask_row, rows, inside, HIDES: tl.constexpr):
    """Which rows of an example count."""
    if HIDES:
        place = mask_ptr + batch * mask_batch + rows.to(tl.int64) * mask_row
        return inside & tl.load(place, mask=inside, other=0).to(tl.int1)
    return inside


@triton.jit
def _weights(s, top):
    """exp(s - top) of a block of scores, how earlier sums shrink, and the new top."""
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key so far: exp2(-inf - 0) = 0, not NaN
    return tl.exp2((s - shift[:, None]) * LOG2_E), tl.exp2((top - shift) * LOG2_E), new_top


@triton.jit
def _block_scores(xhat, k, bias, visible, scale, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    s = (_inner(xhat, k, WIDTHS, PRECISION) + bias[None, :]) * scale
    return tl.where(visible[None, :], s, float("-inf"))


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def decode_forward(
    x_ptr,
    position_ptr,
    shown_ptr,
    k_ptr,
    bias_ptr,
    v_ptr,
    out_bias_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    x_batch,
    x_row,
    x_column,
    position_row,
    position_column,
    shown_batch,
    shown_row,
    mask_batch,
    mask_column,
    R,
    M,
    batches,
    scale,
    eps,
    HEADS: tl.constexpr,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    E: tl.constexpr,
    V_WIDTHS: tl.constexpr,
    X_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    X_BATCHED: tl.constexpr,
    HIDES: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of queries against all keys of `batches` examples, one after another: more than one where they share it."""
    pid, tiles = tl.program_id(0), tl.cdiv(R, BLOCK_R)
    rows = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    first = (pid // tiles).to(tl.int64) * batches
    inside = rows < R
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    W: tl.constexpr = _offset(WIDTHS, len(WIDTHS))
    VW: tl.constexpr = _offset(V_WIDTHS, len(V_WIDTHS))
    x = x_ptr + first * X_BATCHED * x_batch * X_UNIT
    strides = (x_row, x_column, position_row, position_column)
    raw = _load_keys((x, position_ptr), strides, rows, inside, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, False)
    mean, rstd = _statistics(raw, inside, eps, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, NORM)
    # Rows do not meet each other: those that an example hides are computed with the others.
    xhat = _cast(_normalise(raw, mean, rstd, CX + CP, WIDTHS), WIDTHS, dtype)
    for b in range(batches):
        batch = first + b
        out = _zeros(BLOCK_R, V_WIDTHS)
        for h in range(HEADS):
            head = batch * HEADS + h
            acc = _zeros(BLOCK_R, V_WIDTHS)
            top = tl.full([BLOCK_R], float("-inf"), tl.float32)
            total = tl.full([BLOCK_R], 0.0, tl.float32)
            for start in tl.range(0, M, BLOCK_M, num_stages=STAGES):
                keys = start + tl.arange(0, BLOCK_M)
                visible = _shown(mask_ptr, batch, mask_batch, mask_column, keys, keys < M, MASKED)
                k = _load_rows(k_ptr + head * M * W, keys, visible, WIDTHS)
                bias = tl.load(bias_ptr + head * M + keys, mask=visible, other=0.0)
                s = _block_scores(xhat, k, bias, visible, scale, WIDTHS, PRECISION)
                p, shrink, top = _weights(s, top)
                total = total * shrink + tl.sum(p, 1)
                v = _load_rows(v_ptr + head * M * VW, keys, visible, V_WIDTHS)
                acc = _accumulate(_scaled(acc, shrink, V_WIDTHS), p.to(dtype), v, V_WIDTHS, PRECISION)
            tl.store(lse_ptr + head * R + rows, top + tl.log2(total) * LN_2, mask=inside)
            acc = _scaled(acc, 1.0 / tl.where(total == 0.0, 1.0, total), V_WIDTHS)
            if HEADS == 1:
                out = acc
            else:
                sums = ()
                for i in tl.static_range(len(V_WIDTHS)):
                    sums = sums + (out[i] + acc[i],)
                out = sums
        shown = _shown(shown_ptr, batch, shown_batch, shown_row, rows, inside, HIDES)
        results = ()
        for i in tl.static_range(len(V_WIDTHS)):
            result = tl.where(shown[:, None], out[i], 0.0)
            if BIASED:
                c = _offset(V_WIDTHS, i) + tl.arange(0, V_WIDTHS[i])
                result += tl.load(out_bias_ptr + c, mask=c < E, other=0.0).to(tl.float32)[None, :]
            results = results + (result,)
        _store_rows(out_ptr + batch * R * E, rows.to(tl.int64), inside, results, E, 0, E, V_WIDTHS)


@triton.jit
def decode_backward_rows(
    dout_ptr,
    out_ptr,
    x_ptr,
    position_ptr,
    shown_ptr,
    k_ptr,
    bias_ptr,
    v_ptr,
    out_bias_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dposition_ptr,
    x_batch,
    x_row,
    x_column,
    position_row,
    position_column,
    shown_batch,
    shown_row,
    mask_batch,
    mask_column,
    R,
    M,
    batches,
    scale,
    eps,
    HEADS: tl.constexpr,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    E: tl.constexpr,
    V_WIDTHS: tl.constexpr,
    X_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    X_BATCHED: tl.constexpr,
    HIDES: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_POSITION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of queries: what `decode_backward_keys` wants to know of its rows, and, where it is wanted, their gradient.

    delta = rowsum(dout * (out - out_bias)); of several heads, whose results are nowhere, sum_m P dP. Walks `batches`
    examples: more than one where a gradient is their sum, which nobody else touches: same order, same bits.
    """
    pid, tiles = tl.program_id(0), tl.cdiv(R, BLOCK_R)
    rows = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    first = (pid // tiles).to(tl.int64) * batches
    inside = rows < R
    seen = rows < 0
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    W: tl.constexpr = _offset(WIDTHS, len(WIDTHS))
    VW: tl.constexpr = _offset(V_WIDTHS, len(V_WIDTHS))
    strides = (x_row, x_column, position_row, position_column)
    grad = _zeros(BLOCK_R, WIDTHS)
    for b in range(batches):
        batch = first + b
        shown = _shown(shown_ptr, batch, shown_batch, shown_row, rows, inside, HIDES)
        seen = seen | shown
        x = x_ptr + batch * X_BATCHED * x_batch * X_UNIT
        raw = _load_keys((x, position_ptr), strides, rows, shown, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, False)
        mean, rstd = _statistics(raw, shown, eps, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, NORM)
        tl.store(mean_ptr + batch * R + rows, mean, mask=inside)
        tl.store(rstd_ptr + batch * R + rows, rstd, mask=inside)
        xhat = _cast(_normalise(raw, mean, rstd, CX + CP, WIDTHS), WIDTHS, dtype)
        dout = _load_wide(dout_ptr + batch * R * E, rows, shown, E, V_WIDTHS)
        if X_BATCHED:
            grad = _zeros(BLOCK_R, WIDTHS)
        for h in range(HEADS):
            head = batch * HEADS + h
            lse = tl.load(lse_ptr + head * R + rows, mask=shown, other=float("inf"))  # P = 0 where hidden
            lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row without keys: its scores are -inf, P = 0
            delta = tl.full([BLOCK_R], 0.0, tl.float32)
            if HEADS == 1:
                out = _load_wide(out_ptr + batch * R * E, rows, shown, E, V_WIDTHS)
                for i in tl.static_range(len(V_WIDTHS)):
                    value = out[i].to(tl.float32)
                    if BIASED:
                        c = _offset(V_WIDTHS, i) + tl.arange(0, V_WIDTHS[i])
                        value -= tl.load(out_bias_ptr + c, mask=c < E, other=0.0).to(tl.float32)[None, :]
                    delta += tl.sum(value * dout[i].to(tl.float32), 1)
            else:
                for start in tl.range(0, M, BLOCK_M, num_stages=STAGES):
                    keys = start + tl.arange(0, BLOCK_M)
                    visible = _shown(mask_ptr, batch, mask_batch, mask_column, keys, keys < M, MASKED)
                    k = _load_rows(k_ptr + head * M * W, keys, visible, WIDTHS)
                    bias = tl.load(bias_ptr + head * M + keys, mask=visible, other=0.0)
                    s = _block_scores(xhat, k, bias, visible, scale, WIDTHS, PRECISION)
                    v = _load_rows(v_ptr + head * M * VW, keys, visible, V_WIDTHS)
                    dp = _inner(dout, v, V_WIDTHS, PRECISION)
                    delta += tl.sum(tl.exp2((s - lse[:, None]) * LOG2_E) * dp, 1)
            tl.store(delta_ptr + head * R + rows, delta, mask=inside)
            if WANT_X or WANT_POSITION:
                for start in tl.range(0, M, BLOCK_M, num_stages=STAGES):
                    keys = start + tl.arange(0, BLOCK_M)
                    visible = _shown(mask_ptr, batch, mask_batch, mask_column, keys, keys < M, MASKED)
                    k = _load_rows(k_ptr + head * M * W, keys, visible, WIDTHS)
                    bias = tl.load(bias_ptr + head * M + keys, mask=visible, other=0.0)
                    s = _block_scores(xhat, k, bias, visible, scale, WIDTHS, PRECISION)
                    v = _load_rows(v_ptr + head * M * VW, keys, visible, V_WIDTHS)
                    dp = _inner(dout, v, V_WIDTHS, PRECISION)
                    ds = tl.exp2((s - lse[:, None]) * LOG2_E) * (dp - delta[:, None]) * scale
                    grad = _accumulate(grad, ds.to(dtype), k, WIDTHS, PRECISION)
        if X_BATCHED and (WANT_X or WANT_POSITION):
            # Read again: kept from above, the tile would fill the loop's registers.
            raw = _load_keys((x, position_ptr), strides, rows, shown, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, True)
            dx = dx_ptr + batch * R * CX
            _store_gradient(
                grad, raw, mean, rstd, rows, inside, dx, dposition_ptr, b > 0, CX, CP, WIDTHS, NORM, WANT_X, WANT_POSITION
            )
    if not X_BATCHED and (WANT_X or WANT_POSITION):
        raw = _load_keys((x_ptr, position_ptr), strides, rows, seen, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, True)
        mean, rstd = _statistics(raw, seen, eps, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, NORM)
        _store_gradient(
            grad, raw, mean, rstd, rows, inside, dx_ptr, dposition_ptr, False, CX, CP, WIDTHS, NORM, WANT_X, WANT_POSITION
        )


@triton.jit
def decode_backward_keys(
    dout_ptr,
    x_ptr,
    position_ptr,
    shown_ptr,
    k_ptr,
    bias_ptr,
    v_ptr,
    mask_ptr,
    lse_ptr,
    delta_ptr,
    mean_ptr,
    rstd_ptr,
    dk_ptr,
    dbias_ptr,
    dv_ptr,
    x_batch,
    x_row,
    x_column,
    position_row,
    position_column,
    shown_batch,
    shown_row,
    mask_batch,
    mask_column,
    R,
    M,
    pairs,
    split_size,
    scale,
    HEADS: tl.constexpr,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    E: tl.constexpr,
    V_WIDTHS: tl.constexpr,
    X_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    X_BATCHED: tl.constexpr,
    HIDES: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of keys of one head over one split of the queries: dk = dS^T xhat, dbias = sum dS, dv = P^T dout."""
    pid, tiles = tl.program_id(0), tl.cdiv(M, BLOCK_M)
    keys = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    head, split = (pid // tiles % pairs).to(tl.int64), pid // tiles // pairs
    batch = head // HEADS
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    W: tl.constexpr = _offset(WIDTHS, len(WIDTHS))
    VW: tl.constexpr = _offset(V_WIDTHS, len(V_WIDTHS))
    strides = (x_row, x_column, position_row, position_column)
    x = x_ptr + batch * X_BATCHED * x_batch * X_UNIT
    visible = _shown(mask_ptr, batch, mask_batch, mask_column, keys, keys < M, MASKED)
    k = _load_rows(k_ptr + head * M * W, keys, visible, WIDTHS)
    v = _load_rows(v_ptr + head * M * VW, keys, visible, V_WIDTHS)
    bias = tl.load(bias_ptr + head * M + keys, mask=visible, other=0.0)
    dk, dv = _zeros(BLOCK_M, WIDTHS), _zeros(BLOCK_M, V_WIDTHS)
    dbias = tl.full([BLOCK_M], 0.0, tl.float32)
    last = tl.minimum((split + 1) * split_size, R)
    for start in tl.range(split * split_size, last, BLOCK_R, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_R)
        shown = _shown(shown_ptr, batch, shown_batch, shown_row, rows, rows < last, HIDES)
        raw = _load_keys((x, position_ptr), strides, rows, shown, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, False)
        mean = tl.load(mean_ptr + batch * R + rows, mask=shown, other=0.0)
        rstd = tl.load(rstd_ptr + batch * R + rows, mask=shown, other=0.0)
        xhat = _cast(_normalise(raw, mean, rstd, CX + CP, WIDTHS), WIDTHS, dtype)
        dout = _load_wide(dout_ptr + batch * R * E, rows, shown, E, V_WIDTHS)
        lse = tl.load(lse_ptr + head * R + rows, mask=shown, other=float("inf"))
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        delta = tl.load(delta_ptr + head * R + rows, mask=shown, other=0.0)
        s = _block_scores(xhat, k, bias, visible, scale, WIDTHS, PRECISION)
        p = tl.exp2((s - lse[:, None]) * LOG2_E)
        ds = p * (_inner(dout, v, V_WIDTHS, PRECISION) - delta[:, None]) * scale
        dbias += tl.sum(ds, 0)
        dv = _accumulate(dv, tl.trans(p.to(dtype)), dout, V_WIDTHS, PRECISION)
        dk = _accumulate(dk, tl.trans(ds.to(dtype)), xhat, WIDTHS, PRECISION)
    base = (split * pairs + head) * M
    own = keys < M
    tl.store(dbias_ptr + base + keys, dbias, mask=own)
    _store_rows(dk_ptr + base * (CX + CP), keys.to(tl.int64), own, dk, CX, CP, CX + CP, WIDTHS)
    _store_rows(dv_ptr + base * E, keys.to(tl.int64), own, dv, E, 0, E, V_WIDTHS)


# --- Launchers --------------------------------------------------------------------------------------------------------

# queries, keys, widest chunk, -, warps, stages: by the wider of keys and values, so that neither sums nor tiles spill (kernel
# report). In the gradients 64 rows, which would become warp-group instructions, spill kilobytes.
_T = _tuning.Tiles
_SMALL, _SMALLEST = _T(32, 32, 64, 0, 8, 1), _T(16, 16, 64, 0, 8, 1)


def _by_width(kernel, *rows):
    @_tuning.default(kernel)
    def default(dims, dtype, capability):
        width = sum(chunks(dims[0]))
        for least, widest, half, tiles in rows:
            if capability >= least and width <= widest and half == (dtype != "float32"):
                return tiles
        return _T(32, 32, 0, 0, 4, 1) if capability == _tuning.INTERPRETER else _SMALLEST

    return default


_by_width(
    "latent_decode_fwd",
    (100, 704, True, _SMALL),
    (90, 512, True, _T(64, 32, 128, 0, 8, 2)),
    (80, 704, True, _SMALL),
    (80, 272, False, _SMALL),
)
_by_width(
    "latent_decode_bwd_rows",
    (100, 336, True, _SMALL),
    (100, 512, True, _SMALLEST),
    (80, 512, True, _SMALL),
    (80, 128, False, _SMALL),
)
_by_width(
    "latent_decode_bwd_keys",
    (80, 336, True, _SMALL),
    (80, 512, True, _T(16, 32, 64, 0, 8, 1)),
)


def _launch(tiles, channels, columns):
    return dict(
        WIDTHS=chunks(channels, tiles.head),
        V_WIDTHS=chunks(columns, tiles.head),
        BLOCK_R=tiles.queries,
        BLOCK_M=tiles.keys,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )


def _common(queries, position, query_mask, k, v, key_mask, scale):
    """Arguments that the three kernels share: strides, and compile-time facts."""
    shared = 0 if position is None else position.shape[1]
    x_unit = math.gcd(16, *queries.stride()[:2])
    position_unit = 1 if position is None else math.gcd(16, position.stride(0))
    strides = [queries.stride(0) // x_unit, queries.stride(1) // x_unit, queries.stride(2)]
    strides += [0, 0] if position is None else [position.stride(0) // position_unit, position.stride(1)]
    for mask in (query_mask, key_mask):
        strides += [0, 0] if mask is None else mask.stride()
    facts = dict(
        scale=scale,
        HEADS=k.shape[1],
        CX=queries.shape[2],
        CP=shared,
        E=v.shape[3],
        X_UNIT=x_unit,
        POSITION_UNIT=position_unit,
        X_BATCHED=queries.shape[0] > 1,
        HIDES=query_mask is not None,
        MASKED=key_mask is not None,
        PRECISION=input_precision(queries.dtype),
    )
    return strides, facts


def _keys_in_order(k, bias, v, content, tiles):
    widths, v_widths = chunks(k.shape[3], tiles.head), chunks(v.shape[3], tiles.head)
    return _in_tile_order(k, content, widths), bias.contiguous(), _in_tile_order(v, v.shape[3], v_widths)


@torch.library.custom_op("mmkernels_triton::latent_decode_fwd", mutates_args=())
def latent_decode_fwd(
    queries: torch.Tensor,
    position: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    k: torch.Tensor,
    bias: torch.Tensor,
    v: torch.Tensor,
    out_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_h softmax(scale (xhat k_h^T + bias_h)) v_h + out_bias and the log-sum-exp; shapes in csrc/schemas.h."""
    batch, heads, keys, channels = k.shape
    rows, content, columns = queries.shape[1], queries.shape[2], v.shape[3]
    out = queries.new_empty(batch, rows, columns)
    lse = queries.new_empty(batch, heads, rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tiles = _tiles("latent_decode_fwd", max(channels, columns), queries)
    count = ceil_div(rows, tiles.queries)
    # Shared queries are read once for all examples, unless that leaves multiprocessors without work.
    together = queries.shape[0] == 1 and (not queries.is_cuda or count >= 2 * _multiprocessors(queries.device))
    walk = batch if together else 1
    strides, facts = _common(queries, position, query_mask, k, v, key_mask, scale)
    with _guard(queries):
        decode_forward[(count * (batch // walk),)](
            queries,
            position,
            query_mask,
            *_keys_in_order(k, bias, v, content, tiles),
            None if out_bias is None else out_bias.contiguous(),
            key_mask,
            *(out, lse, *strides, rows, keys, walk),
            eps=eps,
            NORM=eps >= 0,
            BIASED=out_bias is not None,
            **facts,
            **_launch(tiles, channels, columns),
        )
    return out, lse


@torch.library.custom_op("mmkernels_triton::latent_decode_bwd", mutates_args=())
def latent_decode_bwd(
    dout: torch.Tensor,
    queries: torch.Tensor,
    position: torch.Tensor | None,
    query_mask: torch.Tensor | None,
    k: torch.Tensor,
    bias: torch.Tensor,
    v: torch.Tensor,
    out_bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    eps: float,
    wanted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, position, k, bias and v, those that `wanted` asks for; shapes in csrc/schemas.h."""
    batch, heads, keys, channels = k.shape
    rows, content, columns = queries.shape[1], queries.shape[2], v.shape[3]
    want_x, want_position, want_keys = bool(wanted & 1), bool(wanted & 2 and position is not None), bool(wanted & 4)
    dx = queries.new_empty(queries.shape if want_x else 0)
    # Summed over the batch in float32, rounded once.
    dposition = queries.new_empty(position.shape if want_position else 0, dtype=torch.float32)
    dk, dbias, dv = (t.new_empty(t.shape if want_keys else 0) for t in (k, bias, v))
    if batch == 0 or rows == 0 or keys == 0:
        return tuple(t.to(like.dtype).zero_() for t, like in ((dx, k), (dposition, k), (dk, k), (dbias, bias), (dv, v)))
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    out_bias = None if out_bias is None else out_bias.contiguous()
    delta, mean, rstd = torch.empty_like(lse), lse.new_empty(batch, rows), lse.new_empty(batch, rows)
    strides, facts = _common(queries, position, query_mask, k, v, key_mask, scale)
    with _guard(queries):
        tiles = _tiles("latent_decode_bwd_rows", max(channels, columns), queries)
        walk = batch if want_position or (want_x and queries.shape[0] == 1) else 1
        decode_backward_rows[(ceil_div(rows, tiles.queries) * (batch // walk),)](
            *(dout, out, queries, position, query_mask, *_keys_in_order(k, bias, v, content, tiles), out_bias, key_mask),
            *(lse, delta, mean, rstd, dx, dposition, *strides, rows, keys, walk),
            eps=eps,
            NORM=eps >= 0,
            BIASED=out_bias is not None,
            WANT_X=want_x and content > 0,
            WANT_POSITION=want_position,
            **facts,
            **_launch(tiles, channels, columns),
        )
        if want_keys:
            tiles = _tiles("latent_decode_bwd_keys", max(channels, columns), queries)
            blocks, pairs = ceil_div(rows, tiles.queries), batch * heads
            splits = split_count(pairs * ceil_div(keys, tiles.keys), blocks, queries.device, tiles.num_warps)
            each = ceil_div(blocks, splits)
            splits = ceil_div(blocks, each)
            parts = [lse.new_empty(splits, batch, heads, keys, width) for width in (channels, 1, columns)]
            decode_backward_keys[(splits * pairs * ceil_div(keys, tiles.keys),)](
                *(dout, queries, position, query_mask, *_keys_in_order(k, bias, v, content, tiles), key_mask),
                *(lse, delta, mean, rstd, *parts, *strides, rows, keys, pairs, each * tiles.queries),
                **facts,
                **_launch(tiles, channels, columns),
            )
            for part, gradient in zip(parts, (dk, dbias[..., None], dv), strict=True):
                sum_splits(part, [[gradient]])
    return dx, dposition.to(queries.dtype), dk, dbias, dv


# --- Kernel report ----------------------------------------------------------------------------------------------------

REPORTED = ((64, 258, 322), (512, 0, 512))  # channels of content and position, columns


def report_cases():
    """Every kernel at published widths, for the report that compiles them without a GPU."""
    for capability in (80, 90, 100):
        for dtype, code in (("bfloat16", "bf16"), ("float32", "fp32")):
            for sizes in REPORTED:
                for kernel in (decode_forward, decode_backward_rows, decode_backward_keys):
                    yield _report_case(kernel, *sizes, dtype, code, capability)


def _report_case(kernel, content, shared, columns, dtype, code, capability):
    name = {
        decode_forward: "latent_decode_fwd",
        decode_backward_rows: "latent_decode_bwd_rows",
        decode_backward_keys: "latent_decode_bwd_keys",
    }[kernel]
    wide = max(content + shared, columns)
    tiles = _tuning.tiles(name, (wide, wide), dtype, capability)
    launch = _launch(tiles, content + shared, columns)
    options = dict(num_warps=launch.pop("num_warps"), num_stages=tiles.num_stages)
    constexprs = dict(
        **dict(x_column=1, position_column=1, mask_column=1, shown_row=1),
        **dict(HEADS=1, CX=content, CP=shared, E=columns, HIDES=False, MASKED=False, PRECISION="ieee"),
        **dict(X_UNIT=math.gcd(16, content), POSITION_UNIT=math.gcd(16, shared), X_BATCHED=True),
        **dict(shown_ptr=None, mask_ptr=None),
        **launch,
    )
    constexprs |= {} if shared else dict(position_ptr=None)
    if kernel is not decode_backward_keys:
        constexprs |= dict(BIASED=True, NORM=True)
    if kernel is decode_backward_rows:
        constexprs |= dict(WANT_X=True, WANT_POSITION=False)
    half = {"x_ptr", "position_ptr", "k_ptr", "v_ptr", "out_bias_ptr", "dout_ptr", "out_ptr", "dx_ptr"}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{code}" if argument in half else "*fp32"
        else:
            signature[argument] = "fp32" if argument in ("scale", "eps") else "i32"
    return ReportCase(f"{name} {content}+{shared} to {columns} {dtype}", kernel, signature, constexprs, options, capability)

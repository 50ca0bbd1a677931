"""The family in Triton: forward, gradient of the queries, gradient of the input.

A key tile is loaded once, normalised in registers and used as key and as value. Its C channels lie side by side as chunks,
powers of two whose sum is close to C (261 = 256 + 16), so that no width is padded to the next power of two. Inside a tile
the position block comes first and the content after it: the wide block then starts at an aligned address. The queries'
channels, content first, are read and written through that rotation (`_columns`).

`README.md` here derives the mathematics and predicts each kernel's time.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl

from ... import _tuning
from .._shared import dropout
from .._shared.kernels import (
    LN_2,
    LOG2_E,
    ReportCase,
    dropout_keep,
    dropout_row,
    input_precision,
    merge_splits,
    split_count,
    sum_splits,
)
from .._shared.registration import attach_fakes

# --- Pieces of a tile -------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _offset(widths, i):
    return sum(widths[:i])


@triton.jit
def _columns(START: tl.constexpr, WIDTH: tl.constexpr, CX: tl.constexpr, CP: tl.constexpr):
    """The queries' channel numbers of a chunk (the position block first), and which of them exist."""
    c = START + tl.arange(0, WIDTH)
    return tl.where(c < CP, c + CX, c - CP), c < CX + CP


@triton.jit
def _load_rows(base, rows, inside, WIDTHS: tl.constexpr):
    """Chunks of N-sized rows, stored side by side as the chunks are (`_in_tile_order`)."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        pointers = (
            base + rows[:, None] * _offset(WIDTHS, len(WIDTHS)) + (_offset(WIDTHS, i) + tl.arange(0, WIDTHS[i]))[None, :]
        )
        tiles = tiles + (tl.load(pointers, mask=inside[:, None], other=0.0),)
    return tiles


@triton.jit
def _store_rows(base, rows, inside, tiles, CX: tl.constexpr, CP: tl.constexpr, PITCH: tl.constexpr, WIDTHS: tl.constexpr):
    for i in tl.static_range(len(WIDTHS)):
        columns, real = _columns(_offset(WIDTHS, i), WIDTHS[i], CX, CP)
        pointers = base + rows[:, None] * PITCH + columns[None, :]
        tl.store(pointers, tiles[i].to(base.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def _load_block(
    base,
    keys,
    row_stride,
    UNIT: tl.constexpr,
    column_stride,
    visible,
    c,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    LAST: tl.constexpr,
):
    """base[keys, c], zeros where the key is not visible or the column not in [0, COUNT); FIRST is the first of c.

    The stride counts units of UNIT elements, a power of two: so the compiler sees how wide a load may be.
    """
    pointers = base + keys[:, None] * row_stride * UNIT + c.to(tl.int64)[None, :] * column_stride
    mask = visible[:, None]
    if FIRST < 0:
        mask = mask & (c >= 0)[None, :]
    if FIRST + c.shape[0] > COUNT:
        mask = mask & (c < COUNT)[None, :]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first" if LAST else "")


@triton.jit
def _load_chunk(
    inputs,
    strides,
    keys,
    visible,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    CX: tl.constexpr,
    CP: tl.constexpr,
    X_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    LAST: tl.constexpr,
):
    c = START + tl.arange(0, WIDTH)
    if START + WIDTH <= CP:
        chunk = _load_block(inputs[1], keys, strides[2], POSITION_UNIT, strides[3], visible, c, START, CP, LAST)
    else:
        chunk = _load_block(inputs[0], keys, strides[0], X_UNIT, strides[1], visible, c - CP, START - CP, CX, LAST)
        if START < CP:
            position = _load_block(inputs[1], keys, strides[2], POSITION_UNIT, strides[3], visible, c, START, CP, LAST)
            chunk = tl.where((c < CP)[None, :], position, chunk)
    return chunk


@triton.jit
def _load_keys(
    inputs,
    strides,
    keys,
    visible,
    CX: tl.constexpr,
    CP: tl.constexpr,
    X_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Chunks of [position ; x] of the given keys; zeros where the key is not visible. inputs (x, position), any strides."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        chunk = _load_chunk(
            inputs, strides, keys.to(tl.int64), visible, _offset(WIDTHS, i), WIDTHS[i], CX, CP, X_UNIT, POSITION_UNIT, LAST
        )
        tiles = tiles + (chunk,)
    return tiles


@triton.constexpr_function
def _group(start, width, cp, x_unit, position_unit):
    """How many neighbouring columns of a chunk one thread holds."""
    if start < cp < start + width:
        return 1
    return min(8, position_unit if start < cp else x_unit)


@triton.jit
def _group_statistics(chunk, START: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr):
    """Sums over groups of neighbouring columns, the squares around each group's mean, and how many columns are real."""
    GROUPS: tl.constexpr = chunk.shape[1] // GROUP
    values = tl.reshape(chunk, [chunk.shape[0], GROUPS, GROUP]).to(tl.float32)
    total = tl.sum(values, 2)
    if START + chunk.shape[1] <= C:
        count = tl.full([GROUPS], GROUP, tl.float32)
        centred = values - (total * (1.0 / GROUP))[:, :, None]
    else:
        c = START + tl.reshape(tl.arange(0, chunk.shape[1]), [GROUPS, GROUP])
        count = tl.sum((c < C).to(tl.float32), 1)
        group_mean = total * (1.0 / tl.maximum(count, 1.0))[None, :]
        centred = tl.where((c < C)[None, :, :], values - group_mean[:, :, None], 0.0)
    return total, tl.sum(tl.sum(centred * centred, 2), 1), count


@triton.jit
def _statistics(
    tiles,
    visible,
    eps,
    CX: tl.constexpr,
    CP: tl.constexpr,
    X_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    WIDTHS: tl.constexpr,
    NORM: tl.constexpr,
):
    """LayerNorm's mean and 1 / deviation; 0 and 1 for no norm. Rows that are not visible get 0 and 0, whatever eps is.

    The mean may be far larger than the deviation, so squares are taken around a mean: first that of a group of columns in
    one thread, then the groups' means around the row's. No thread keeps its part of the tile in float32 for a second pass.
    """
    mean = tl.full([tiles[0].shape[0]], 0.0, tl.float32)
    rstd = tl.full([tiles[0].shape[0]], 1.0, tl.float32)
    if NORM:
        groups = ()
        squares = tl.full([tiles[0].shape[0]], 0.0, tl.float32)
        for i in tl.static_range(len(WIDTHS)):
            total, around, count = _group_statistics(
                tiles[i], _offset(WIDTHS, i), CX + CP, _group(_offset(WIDTHS, i), WIDTHS[i], CP, X_UNIT, POSITION_UNIT)
            )
            groups = groups + ((total, count),)
            squares += around
            mean += tl.sum(total, 1) / (CX + CP)
        for i in tl.static_range(len(WIDTHS)):
            count = groups[i][1][None, :]
            centred = groups[i][0] * (1.0 / tl.maximum(count, 1.0)) - mean[:, None]
            squares += tl.sum(centred * centred * count, 1)
        rstd = tl.rsqrt(squares / (CX + CP) + eps)
    return mean, tl.where(visible, rstd, 0.0)


@triton.jit
def _normalise(tiles, mean, rstd, C: tl.constexpr, WIDTHS: tl.constexpr):
    """(x - mean) / deviation in float32, zeros in the columns that are padding."""
    normalised = ()
    for i in tl.static_range(len(WIDTHS)):
        real = _offset(WIDTHS, i) + tl.arange(0, WIDTHS[i]) < C
        chunk = tl.where(real[None, :], (tiles[i].to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        normalised = normalised + (chunk,)
    return normalised


@triton.jit
def _row_totals(tiles, WIDTHS: tl.constexpr):
    total = tl.sum(tiles[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(WIDTHS)):
        total += tl.sum(tiles[i].to(tl.float32), 1)
    return total


@triton.jit
def _cast(tiles, WIDTHS: tl.constexpr, dtype: tl.constexpr):
    cast = ()
    for i in tl.static_range(len(WIDTHS)):
        cast = cast + (tiles[i].to(dtype),)
    return cast


@triton.jit
def _inner(a, b, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over all chunks."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(WIDTHS)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def _inner_pair(a, b, c, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """a c^T and b c^T, chunk by chunk: where operands pass through registers, only one chunk of c is there at a time."""
    c_t = tl.trans(c[0])
    s, t = tl.dot(a[0], c_t, input_precision=PRECISION), tl.dot(b[0], c_t, input_precision=PRECISION)
    for i in tl.static_range(1, len(WIDTHS)):
        c_t = tl.trans(c[i])
        s = tl.dot(a[i], c_t, s, input_precision=PRECISION)
        t = tl.dot(b[i], c_t, t, input_precision=PRECISION)
    return s, t


@triton.jit
def _accumulate(acc, a, b, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, chunk by chunk."""
    sums = ()
    for i in tl.static_range(len(WIDTHS)):
        sums = sums + (tl.dot(a, b[i], acc[i], input_precision=PRECISION),)
    return sums


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        tiles = tiles + (tl.full([ROWS, WIDTHS[i]], 0.0, tl.float32),)
    return tiles


@triton.jit
def _scaled(tiles, factor, WIDTHS: tl.constexpr):
    scaled = ()
    for i in tl.static_range(len(WIDTHS)):
        scaled = scaled + (tiles[i] * factor[:, None],)
    return scaled


@triton.jit
def _shifted(tiles, offset, WIDTHS: tl.constexpr):
    shifted = ()
    for i in tl.static_range(len(WIDTHS)):
        shifted = shifted + (tiles[i] - offset[:, None],)
    return shifted


@triton.jit
def _store_gradient(
    grad,
    raw,
    mean,
    rstd,
    rows,
    inside,
    dx_ptr,
    dposition_ptr,
    add,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    NORM: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_POSITION: tl.constexpr,
):
    """LayerNorm backward of the gradient of the normalised rows; the position's, in float32, is added where `add` says so."""
    C: tl.constexpr = CX + CP
    level, slope = tl.zeros_like(mean), tl.zeros_like(mean)
    if NORM:
        for i in tl.static_range(len(WIDTHS)):
            level += tl.sum(grad[i], 1)
            slope += tl.sum(grad[i] * (raw[i].to(tl.float32) - mean[:, None]), 1)
        level, slope = level / C, slope * rstd * rstd / C
    for i in tl.static_range(len(WIDTHS)):
        value = grad[i]
        if NORM:
            value = (value - level[:, None] - (raw[i].to(tl.float32) - mean[:, None]) * slope[:, None]) * rstd[:, None]
        c = _offset(WIDTHS, i) + tl.arange(0, WIDTHS[i])[None, :]
        if WANT_POSITION and _offset(WIDTHS, i) < CP:
            pointers = dposition_ptr + rows.to(tl.int64)[:, None] * CP + c
            mine = inside[:, None] & (c < CP)
            before = tl.load(pointers, mask=mine & add, other=0.0)
            tl.store(pointers, before + value, mask=mine)
        if WANT_X and _offset(WIDTHS, i) + WIDTHS[i] > CP:
            pointers = dx_ptr + rows.to(tl.int64)[:, None] * CX + (c - CP)
            tl.store(pointers, value.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & (c >= CP) & (c < C))


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def forward(
    q_ptr,
    x_ptr,
    position_ptr,
    mask_ptr,
    seed_ptr,
    out_ptr,
    top_ptr,
    total_ptr,
    x_batch,
    x_row,
    x_column,
    position_row,
    position_column,
    mask_batch,
    mask_column,
    R,
    M,
    batches,
    split_size,
    scale,
    eps,
    keep_scale,
    threshold,
    first_key,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    X_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    Q_BATCHED: tl.constexpr,
    MASKED: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of query rows over one split of the keys.

    SPLIT: writes sums of exp(s - top) xhat (S, B, R, C), top in base 2 and total (S, B, R), which `merge_splits` puts
    together. Else out (B, R, C) and, in the place of top, the log-sum-exp. DROPOUT: out has a channel more, the sums of
    what is left of the weights.
    """
    pid, tiles = tl.program_id(0), tl.cdiv(R, BLOCK_R)
    rows = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    batch, split = (pid // tiles % batches).to(tl.int64), pid // tiles // batches
    inside = rows < R
    x_ptr += batch * x_batch * X_UNIT
    strides = (x_row, x_column, position_row, position_column)
    q = _load_rows(q_ptr + batch * Q_BATCHED * R * _offset(WIDTHS, len(WIDTHS)), rows, inside, WIDTHS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = _zeros(BLOCK_R, WIDTHS)
    q_total = _row_totals(q, WIDTHS)
    offset = tl.full([BLOCK_R], 0.0, tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.full([BLOCK_R], 0.0, tl.float32)
    left = tl.full([BLOCK_R], 0.0, tl.float32)
    if DROPOUT:
        low, high = dropout_row(tl.load(seed_ptr), batch * R + rows)
    last = tl.minimum((split + 1) * split_size, M)
    for start in tl.range(split * split_size, last, BLOCK_M, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_M)
        visible = keys < last
        if MASKED:
            visible = visible & tl.load(
                mask_ptr + batch * mask_batch + keys.to(tl.int64) * mask_column, mask=visible, other=0
            ).to(tl.int1)
        raw = _load_keys((x_ptr, position_ptr), strides, keys, visible, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, False)
        mean, rstd = _statistics(raw, visible, eps, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, NORM)
        if FOLD:
            s = (_inner(q, raw, WIDTHS, PRECISION) - q_total[:, None] * mean[None, :]) * rstd[None, :] * scale
        else:
            raw = _cast(_normalise(raw, mean, rstd, CX + CP, WIDTHS), WIDTHS, dtype)
            s = _inner(q, raw, WIDTHS, PRECISION) * scale
        s = tl.where(visible[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key so far: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2((s - shift[:, None]) * LOG2_E)
        shrink = tl.exp2((top - shift) * LOG2_E)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            kept = dropout_keep(low[:, None], high[:, None], (keys + first_key)[None, :], threshold)
            p = tl.where(kept, p * keep_scale, 0.0)
            left = left * shrink + tl.sum(p, 1)
        if FOLD:
            p *= rstd[None, :]
            offset = offset * shrink + tl.sum(p.to(dtype).to(tl.float32) * mean[None, :], 1)
        acc = _accumulate(_scaled(acc, shrink, WIDTHS), p.to(dtype), raw, WIDTHS, PRECISION)
        top = new_top
    if FOLD:
        acc = _shifted(acc, offset, WIDTHS)
    base = (split * batches + batch) * R
    if SPLIT:
        tl.store(top_ptr + base + rows, top * LOG2_E, mask=inside)
        tl.store(total_ptr + base + rows, total, mask=inside)
    else:
        tl.store(top_ptr + base + rows, top + tl.log2(total) * LN_2, mask=inside)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        acc = _scaled(acc, inverse, WIDTHS)
        left *= inverse
    PITCH: tl.constexpr = CX + CP + DROPOUT
    _store_rows(out_ptr + base * PITCH, rows, inside, acc, CX, CP, PITCH, WIDTHS)
    if DROPOUT:
        tl.store(out_ptr + (base + rows) * PITCH + CX + CP, left, mask=inside)


@triton.jit
def row_sums(dout_ptr, out_ptr, dlse_ptr, delta_ptr, C: tl.constexpr, WIDTH: tl.constexpr, HAS_DLSE: tl.constexpr):
    """delta = rowsum(dout * out) - dlse."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    dout = tl.load(dout_ptr + row * C + columns, mask=columns < C, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + row * C + columns, mask=columns < C, other=0.0).to(tl.float32)
    delta = tl.sum(dout * out, 0)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row)
    tl.store(delta_ptr + row, delta)


@triton.jit
def backward_q(
    dout_ptr,
    delta_ptr,
    q_ptr,
    x_ptr,
    position_ptr,
    mask_ptr,
    lse_ptr,
    seed_ptr,
    dsum_ptr,
    dq_ptr,
    x_batch,
    x_row,
    x_column,
    position_row,
    position_column,
    mask_batch,
    mask_column,
    R,
    M,
    batches,
    split_size,
    scale,
    eps,
    keep_scale,
    threshold,
    first_key,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    X_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    Q_BATCHED: tl.constexpr,
    MASKED: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq (S, B, R, C) of one split: scale * sum_m dS xhat with dS = P (dout xhat^T - delta)."""
    pid, tiles = tl.program_id(0), tl.cdiv(R, BLOCK_R)
    rows = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    batch, split = (pid // tiles % batches).to(tl.int64), pid // tiles // batches
    inside = rows < R
    x_ptr += batch * x_batch * X_UNIT
    strides = (x_row, x_column, position_row, position_column)
    q = _load_rows(q_ptr + batch * Q_BATCHED * R * _offset(WIDTHS, len(WIDTHS)), rows, inside, WIDTHS)
    dout = _load_rows(dout_ptr + batch * R * _offset(WIDTHS, len(WIDTHS)), rows, inside, WIDTHS)
    lse = tl.load(lse_ptr + batch * R + rows, mask=inside, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row without keys: its scores are -inf, P = 0
    delta = tl.load(delta_ptr + batch * R + rows, mask=inside, other=0.0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if DROPOUT:
        low, high = dropout_row(tl.load(seed_ptr), batch * R + rows)
        dsum = tl.load(dsum_ptr + batch * R + rows, mask=inside, other=0.0)
    acc = _zeros(BLOCK_R, WIDTHS)
    q_total, dout_total = _row_totals(q, WIDTHS), _row_totals(dout, WIDTHS)
    offset = tl.full([BLOCK_R], 0.0, tl.float32)
    last = tl.minimum((split + 1) * split_size, M)
    for start in tl.range(split * split_size, last, BLOCK_M, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_M)
        visible = keys < last
        if MASKED:
            visible = visible & tl.load(
                mask_ptr + batch * mask_batch + keys.to(tl.int64) * mask_column, mask=visible, other=0
            ).to(tl.int1)
        raw = _load_keys((x_ptr, position_ptr), strides, keys, visible, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, False)
        mean, rstd = _statistics(raw, visible, eps, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, NORM)
        if FOLD:
            s, dp = _inner_pair(q, dout, raw, WIDTHS, PRECISION)
            s = (s - q_total[:, None] * mean[None, :]) * rstd[None, :]
            dp = (dp - dout_total[:, None] * mean[None, :]) * rstd[None, :]
        else:
            raw = _cast(_normalise(raw, mean, rstd, CX + CP, WIDTHS), WIDTHS, dtype)
            s, dp = _inner_pair(q, dout, raw, WIDTHS, PRECISION)
        if DROPOUT:
            kept = dropout_keep(low[:, None], high[:, None], (keys + first_key)[None, :], threshold)
            dp = tl.where(kept, (dp + dsum[:, None]) * keep_scale, 0.0)
        s *= scale
        p = tl.where(visible[None, :], tl.exp2((s - lse[:, None]) * LOG2_E), 0.0)
        ds = p * (dp - delta[:, None])
        if FOLD:
            ds *= rstd[None, :]
            offset += tl.sum(ds.to(dtype).to(tl.float32) * mean[None, :], 1)
        acc = _accumulate(acc, ds.to(dtype), raw, WIDTHS, PRECISION)
    if FOLD:
        acc = _shifted(acc, offset, WIDTHS)
    acc = _scaled(acc, tl.full([BLOCK_R], 1.0, tl.float32) * scale, WIDTHS)
    _store_rows(dq_ptr + (split * batches + batch) * R * (CX + CP), rows, inside, acc, CX, CP, CX + CP, WIDTHS)


@triton.jit
def backward_x(
    dout_ptr,
    delta_ptr,
    q_ptr,
    x_ptr,
    position_ptr,
    mask_ptr,
    lse_ptr,
    seed_ptr,
    dsum_ptr,
    dx_ptr,
    dposition_ptr,
    x_batch,
    x_row,
    x_column,
    position_row,
    position_column,
    mask_batch,
    mask_column,
    R,
    M,
    batches,
    scale,
    eps,
    keep_scale,
    threshold,
    first_key,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    X_UNIT: tl.constexpr,
    POSITION_UNIT: tl.constexpr,
    Q_BATCHED: tl.constexpr,
    MASKED: tl.constexpr,
    NORM: tl.constexpr,
    FOLD: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_POSITION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of keys over all query rows: dxhat = scale dS^T q + P^T dout, then LayerNorm backward.

    Walks `batches` examples: one, or all of them where the gradient of the shared positions is their sum. That sum is
    kept in float32 in dposition, which nobody else touches here: same order, same bits.
    """
    pid, tiles = tl.program_id(0), tl.cdiv(M, BLOCK_M)
    keys = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (pid // tiles).to(tl.int64) * batches
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    C: tl.constexpr = CX + CP
    strides = (x_row, x_column, position_row, position_column)
    for b in range(batches):
        batch = first + b
        visible = keys < M
        if MASKED:
            visible = visible & tl.load(
                mask_ptr + batch * mask_batch + keys.to(tl.int64) * mask_column, mask=visible, other=0
            ).to(tl.int1)
        x = x_ptr + batch * x_batch * X_UNIT
        raw = _load_keys((x, position_ptr), strides, keys, visible, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, False)
        mean, rstd = _statistics(raw, visible, eps, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, NORM)
        xhat = _cast(_normalise(raw, mean, rstd, C, WIDTHS), WIDTHS, dtype)
        grad = _zeros(BLOCK_M, WIDTHS)
        for start in tl.range(0, R, BLOCK_R, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_R)
            inside = rows < R
            q = _load_rows(q_ptr + batch * Q_BATCHED * R * _offset(WIDTHS, len(WIDTHS)), rows, inside, WIDTHS)
            dout = _load_rows(dout_ptr + batch * R * _offset(WIDTHS, len(WIDTHS)), rows, inside, WIDTHS)
            lse = tl.load(lse_ptr + batch * R + rows, mask=inside, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            delta = tl.load(delta_ptr + batch * R + rows, mask=inside, other=0.0)
            s, dp = _inner_pair(q, dout, xhat, WIDTHS, PRECISION)
            p = tl.where(visible[None, :], tl.exp2((s * scale - lse[:, None]) * LOG2_E), 0.0)
            if DROPOUT:
                low, high = dropout_row(tl.load(seed_ptr), batch * R + rows)
                dsum = tl.load(dsum_ptr + batch * R + rows, mask=inside, other=0.0)
                kept = dropout_keep(low[:, None], high[:, None], (keys + first_key)[None, :], threshold)
                kept = tl.where(kept, keep_scale, 0.0)
                ds = p * ((dp + dsum[:, None]) * kept - delta[:, None]) * scale
                p *= kept
            else:
                ds = p * (dp - delta[:, None]) * scale
            grad = _accumulate(grad, tl.trans(p.to(dtype)), dout, WIDTHS, PRECISION)
            grad = _accumulate(grad, tl.trans(ds.to(dtype)), q, WIDTHS, PRECISION)
        if NORM:  # read again, and said to be for the last time: kept from above, the tile would fill the loop's registers
            raw = _load_keys((x, position_ptr), strides, keys, visible, CX, CP, X_UNIT, POSITION_UNIT, WIDTHS, True)
        dx = dx_ptr + batch * M * CX
        _store_gradient(
            grad, raw, mean, rstd, keys, keys < M, dx, dposition_ptr, b > 0, CX, CP, WIDTHS, NORM, WANT_X, WANT_POSITION
        )


# --- Launchers --------------------------------------------------------------------------------------------------------


def chunks(channels: int, widest: int = 0) -> tuple:
    """Powers of two, 16 or more, that cover the channels: at most three with little padding, or as many of `widest`.

    >>> chunks(261), chunks(322), chunks(704), chunks(261, 64)
    ((256, 16), (256, 64, 16), (512, 128, 64), (64, 64, 64, 64, 64))
    """
    if 0 < widest < channels:
        return (widest,) * -(-channels // widest)
    widths = []
    while channels > 0:
        width = 1 << (channels.bit_length() - 1)
        if len(widths) == 2 or channels <= 16:
            width = max(16, 1 << (channels - 1).bit_length())
        widths.append(width)
        channels -= width
    if len(widths) > 1 and sum(widths) >= 2 * widths[0]:
        widths = [2 * widths[0]]
    return tuple(widths)


def _by_width(kernel, *rows):
    """Registers a kernel's default tiles, the first that fits of rows (capability from, most channels, 16-bit?, tiles)."""

    @_tuning.default(kernel)
    def default(dims, dtype, capability):
        width = sum(chunks(dims[0]))
        for least, widest, half, tiles in rows:
            if capability >= least and width <= widest and half == (dtype != "float32"):
                return tiles
        return rows[-1][-1]

    return default


# queries, keys, widest chunk, -, warps, stages. Chosen by the kernel report, so that registers do not spill and shared
# memory fits: on sm_90 the accumulator of 128 x 272 or 64 x 704 fills the register file, and tiles of 64 query rows or more
# become warp-group instructions; sm_80 moves operands through registers and takes small tiles.
_T = _tuning.Tiles
_SMALL, _SMALLEST = _T(32, 32, 64, 0, 8, 1), _T(16, 32, 64, 0, 8, 1)
_by_width(
    "latent_fwd",
    (100, 272, True, _T(64, 64, 0, 0, 8, 2)),
    (100, 384, True, _T(64, 64, 128, 0, 8, 1)),
    (100, 512, True, _T(64, 32, 0, 0, 8, 3)),
    (100, 1024, True, _SMALL),
    (90, 128, True, _T(128, 128, 0, 0, 8, 3)),
    (90, 272, True, _T(128, 64, 0, 0, 8, 3)),
    (90, 448, True, _T(64, 64, 128, 0, 8, 3)),
    (90, 512, True, _T(64, 64, 0, 0, 8, 3)),
    (90, 704, True, _T(64, 32, 0, 0, 8, 3)),
    (80, 64, True, _T(64, 64, 0, 0, 4, 2)),
    (80, 512, True, _T(32, 32, 64, 0, 8, 2)),
    (80, 1024, True, _SMALL),
    (80, 272, False, _SMALL),
    (80, 1024, False, _T(16, 16, 64, 0, 8, 1)),
    (_tuning.INTERPRETER, 1024, True, _T(32, 32, 0, 0, 4, 1)),
)
_by_width(
    "latent_bwd_q",
    (100, 272, True, _T(64, 32, 0, 0, 8, 2)),
    (100, 384, True, _T(64, 32, 128, 0, 8, 1)),
    (100, 512, True, _T(64, 32, 0, 0, 8, 1)),
    (90, 64, True, _T(128, 64, 0, 0, 8, 3)),
    (90, 272, True, _T(128, 32, 0, 0, 8, 3)),
    (90, 448, True, _T(64, 32, 128, 0, 8, 2)),
    (90, 512, True, _T(64, 32, 0, 0, 8, 2)),
    (90, 704, True, _T(32, 32, 64, 0, 8, 2)),
    (80, 64, True, _T(64, 64, 0, 0, 4, 2)),
    (80, 512, True, _T(32, 32, 64, 0, 8, 2)),
    (80, 1024, True, _SMALLEST),
    (80, 64, False, _SMALL),
    (90, 272, False, _T(32, 16, 64, 0, 8, 1)),
    (80, 272, False, _SMALL),
    (80, 1024, False, _T(16, 16, 64, 0, 8, 1)),
    (_tuning.INTERPRETER, 1024, True, _T(32, 32, 0, 0, 4, 1)),
)
_by_width(
    "latent_bwd_x",
    (100, 64, True, _T(64, 128, 0, 0, 8, 2)),
    (90, 64, True, _T(64, 64, 0, 0, 4, 2)),
    (80, 64, True, _T(64, 64, 0, 0, 4, 1)),
    (80, 704, True, _SMALL),
    (80, 1024, True, _SMALLEST),
    (80, 272, False, _SMALL),
    (80, 1024, False, _T(16, 16, 64, 0, 8, 1)),
    (_tuning.INTERPRETER, 1024, True, _T(32, 32, 0, 0, 4, 1)),
)


def _tiles(kernel, channels, x):
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        capability, gpu = 10 * major + minor, _tuning.gpu_folder(torch.cuda.get_device_name(x.device))
    else:
        capability, gpu = _tuning.INTERPRETER, ""
    return _tuning.tiles(kernel, (channels, channels), str(x.dtype).removeprefix("torch."), capability, gpu)


def _guard(tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _common(q, x, position, key_mask, scale, eps, dropout_p, first_key):
    """Arguments that the three kernels share: strides, and compile-time facts."""
    channels, shared = q.shape[2], 0 if position is None else position.shape[1]
    x_unit = math.gcd(16, *x.stride()[:2])
    position_unit = 1 if position is None else math.gcd(16, position.stride(0))
    strides = [x.stride(0) // x_unit, x.stride(1) // x_unit, x.stride(2)]
    strides += [0, 0] if position is None else [position.stride(0) // position_unit, position.stride(1)]
    strides += [0, 0] if key_mask is None else key_mask.stride()
    facts = dict(
        scale=scale,
        eps=eps,
        keep_scale=1.0 / (1.0 - dropout_p),
        threshold=dropout.threshold(dropout_p),
        first_key=first_key,
        CX=channels - shared,
        CP=shared,
        X_UNIT=x_unit,
        POSITION_UNIT=position_unit,
        Q_BATCHED=q.shape[0] > 1,
        MASKED=key_mask is not None,
        NORM=eps >= 0,
        FOLD=eps >= 0 and x.dtype == torch.bfloat16,
        DROPOUT=dropout_p > 0,
        PRECISION=input_precision(x.dtype),
    )
    return strides, facts


def _in_tile_order(rows, content, widths):
    """(B, R, C) as (B, R, sum of the chunks): position channels first, then the content's, then zeros. N-sized."""
    padding = sum(widths) - rows.shape[-1]
    if padding == 0 and content == rows.shape[-1]:
        return rows.contiguous()
    zeros = rows.new_zeros(1).expand(*rows.shape[:-1], padding)
    return torch.cat([rows[..., content:], rows[..., :content], zeros], -1)


def _split(batch, rows, x, tiles):
    """(splits, keys a split), in whole key tiles; every split has some."""
    blocks = triton.cdiv(x.shape[1], tiles.keys)
    splits = split_count(batch * triton.cdiv(rows, tiles.queries), blocks, x.device, tiles.num_warps)
    each = triton.cdiv(blocks, splits)
    return triton.cdiv(blocks, each), each * tiles.keys


@torch.library.custom_op("mmkernels_triton::latent_fwd", mutates_args=())
def latent_fwd(
    q: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    eps: float,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    first_key: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q xhat^T) xhat and its log-sum-exp; shapes in csrc/schemas.h."""
    batch, keys, _ = x.shape
    rows, channels = q.shape[1:]
    out = q.new_empty(batch, rows, channels + (dropout_p > 0), dtype=torch.float32)
    lse = q.new_empty(batch, rows, dtype=torch.float32)
    if keys == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if out.numel() == 0:
        return out, lse
    tiles = _tiles("latent_fwd", channels, x)
    widths = chunks(channels, tiles.head)
    splits, split_size = _split(batch, rows, x, tiles)
    part, top, total = out, lse, lse
    if splits > 1:
        part = q.new_empty(splits, *out.shape, dtype=torch.float32)
        top, total = lse.new_empty(2, splits, batch, rows)
    strides, facts = _common(q, x, position, key_mask, scale, eps, dropout_p, first_key)
    with _guard(x):
        forward[(splits * batch * triton.cdiv(rows, tiles.queries),)](
            *(
                _in_tile_order(q, x.shape[2], widths),
                x,
                position,
                key_mask,
                seed,
                part,
                top,
                total,
                *strides,
                rows,
                keys,
                batch,
                split_size,
            ),
            **facts,
            SPLIT=splits > 1,
            **_launch(tiles, channels),
        )
        if splits > 1:
            merge_splits(part, top, total, [[out[:, None]]], [lse])
    return out, lse


@torch.library.custom_op("mmkernels_triton::latent_bwd", mutates_args=())
def latent_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    eps: float,
    wanted: int,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    first_key: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, x and position, those that `wanted` asks for; shapes in csrc/schemas.h."""
    batch, keys, content = x.shape
    rows, channels = q.shape[1:]
    want_q, want_x, want_position = bool(wanted & 1), bool(wanted & 2), bool(wanted & 4 and position is not None)
    dq = q.new_empty(q.shape if want_q else 0)
    dx = q.new_empty(x.shape if want_x else 0)
    # Summed over the batch in float32, rounded once.
    dposition = q.new_empty(position.shape if want_position else 0, dtype=torch.float32)
    if batch == 0 or rows == 0 or keys == 0:
        return dq.zero_(), dx.zero_(), dposition.to(q.dtype).zero_()
    # delta is made of the dout that dP is made of: together they must vanish where dS does.
    dout, lse = dout.to(q.dtype).contiguous(), lse.contiguous()
    strides, facts = _common(q, x, position, key_mask, scale, eps, dropout_p, first_key)
    delta, dsum = torch.empty_like(lse), None
    with _guard(x):
        row_sums[(batch * rows,)](
            *(dout, out.contiguous(), None if dlse is None else dlse.contiguous(), delta),
            C=out.shape[2],
            WIDTH=_width(out.shape[2]),
            HAS_DLSE=dlse is not None,
        )

        if dropout_p > 0:
            dout, dsum = dout[..., :-1], dout[..., -1].float().contiguous()

        def inputs(tiles):
            widths = chunks(channels, tiles.head)
            rows_in_order = _in_tile_order(dout, content, widths), delta, _in_tile_order(q, content, widths)
            return *rows_in_order, x, position, key_mask, lse, seed, dsum

        if want_q:
            tiles = _tiles("latent_bwd_q", channels, x)
            splits, split_size = _split(batch, rows, x, tiles)
            part = q.new_empty(splits, batch, rows, channels, dtype=torch.float32)
            backward_q[(splits * batch * triton.cdiv(rows, tiles.queries),)](
                *(*inputs(tiles), part, *strides, rows, keys, batch, split_size), **facts, **_launch(tiles, channels)
            )
            sum_splits(part.view(-1, *q.shape), [[dq[:, None]]])
        if (want_x and content) or want_position:
            tiles = _tiles("latent_bwd_x", channels, x)
            walk = batch if want_position else 1
            backward_x[(triton.cdiv(keys, tiles.keys) * (batch // walk),)](
                *(*inputs(tiles), dx, dposition, *strides, rows, keys, walk),
                **facts,
                WANT_X=want_x,
                WANT_POSITION=want_position,
                **_launch(tiles, channels),
            )
    return dq, dx, dposition.to(q.dtype)


def _launch(tiles, channels):
    return dict(
        WIDTHS=chunks(channels, tiles.head),
        BLOCK_R=tiles.queries,
        BLOCK_M=tiles.keys,
        STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )


def _width(channels):
    return triton.next_power_of_2(channels)


# --- Kernel report ----------------------------------------------------------------------------------------------------

REPORTED = ((64, 0), (3, 258), (64, 258), (512, 0), (704, 0))  # (content, position) channels


def report_cases():
    """Every kernel at the published widths, for the report that compiles them without a GPU."""
    for capability in (80, 90, 100):
        for dtype, code in (("bfloat16", "bf16"), ("float32", "fp32")):
            for content, shared in REPORTED:
                for kernel in (forward, backward_q, backward_x):
                    yield _report_case(kernel, content, shared, dtype, code, capability)
    yield from decode_kernels.report_cases()


def _report_case(kernel, content, shared, dtype, code, capability):
    channels = content + shared
    name = {forward: "latent_fwd", backward_q: "latent_bwd_q", backward_x: "latent_bwd_x"}[kernel]
    tiles = _tuning.tiles(name, (channels, channels), dtype, capability)
    launch = _launch(tiles, channels)
    options = dict(num_warps=launch.pop("num_warps"), num_stages=tiles.num_stages)
    constexprs = dict(
        **dict(x_column=1, position_column=1, mask_column=1),
        **dict(CX=content, CP=shared, MASKED=False, NORM=True, DROPOUT=False, PRECISION="ieee"),
        FOLD=dtype == "bfloat16",
        **dict(X_UNIT=math.gcd(16, content), POSITION_UNIT=math.gcd(16, shared), Q_BATCHED=False),
        **launch,
    )
    constexprs |= dict(mask_ptr=None, seed_ptr=None) | ({} if shared else dict(position_ptr=None))  # as a launch passes them
    if kernel is forward:
        constexprs |= dict(SPLIT=True)
    if kernel is backward_x:
        constexprs |= dict(WANT_X=True, WANT_POSITION=shared > 0)
    single = {"delta_ptr", "lse_ptr", "top_ptr", "total_ptr", "dposition_ptr", "dq_ptr", "scale", "eps", "keep_scale"}
    if kernel is not forward:
        constexprs |= dict(dsum_ptr=None)
    else:
        single.add("out_ptr")
    signature = {}
    for argument in kernel.arg_names:
        pointer = "*" if argument.endswith("_ptr") else ""
        if argument in constexprs:
            signature[argument] = "constexpr"
        elif argument in single:
            signature[argument] = pointer + "fp32"
        elif pointer:
            signature[argument] = pointer + code
        else:
            signature[argument] = "i32"
    return ReportCase(f"{name} {content}+{shared} {dtype}", kernel, signature, constexprs, options, capability)


from . import decode_kernels  # noqa: E402  (made of the pieces above)

attach_fakes("mmkernels_triton")

"""Triton kernels of the `adapter` family and the ops `mmkernels_triton::adapter_{fwd,bwd}`. README.md has the derivation.

A program owns BLOCK_M rows of one adapter and walks their channels in chunks. `forward_kernel`: statistics of s, the
bottleneck, which stays in registers up to BLOCK_R wide, and the result. `backward_kernel` makes the bottleneck again and
everything that belongs to rows; the bottleneck and its gradient it leaves in scratch memory, from which `weight_kernel` makes
the sums over rows, a part of an adapter's rows and a tile of the weights in each program. `part_sum_kernel` and
`up_sum_kernel` add the parts of an adapter in their order.

Rows of a bank are taken in the order of their adapters, which `group_kernel` finds: group A has no adapter, group A + 1 a
number that is no adapter's. Where index has a number for each long example the forward takes rows as they lie.

Naming: m numbers rows over (B, T), p in the order of the adapters; c are channels, j columns of the bottleneck. Bits of SKIP,
what y is added: 1 x, 2 input_residual, 4 u.
"""

import torch
import triton
import triton.language as tl

from ... import _backends
from .._shared.dropout import threshold
from .._shared.kernels import (
    ReportCase,
    _multiprocessors,
    ceil_div,
    dropout_keep,
    dropout_row,
    gelu,
    gelu_slope,
    input_precision,
    sum_rows,
)
from .._shared.registration import attach_fakes
from . import fusion_kernels
from .autograd import NAMES, empty_gradients

RELU, GELU, GELU_TANH, SWISH, LEAKY_RELU, TANH = (tl.constexpr(i) for i in range(1, 7))
# How rows are found: all have the one adapter, an index for each example, groups of rows in the order of their adapters.
ALONE, BY_EXAMPLE, GROUPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# --- Which rows -----------------------------------------------------------------------------------------------------------


@triton.jit
def _group_of(number, ADAPTERS: tl.constexpr):
    return tl.where((number >= 0) & (number < ADAPTERS), number, tl.where(number == -1, ADAPTERS, ADAPTERS + 1))


@triton.jit
def group_kernel(index, begins, order, count, ADAPTERS: tl.constexpr, BLOCK: tl.constexpr):
    """One group: where it begins, and its items in their order. begins (A + 3), order (count)."""
    group = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        own = _group_of(tl.load(index + i, mask=i < count, other=0), ADAPTERS)
        before += ((own < group) & (i < count)).to(tl.int32)
    place = tl.sum(before, 0)
    tl.store(begins + group, place)
    tl.store(begins + ADAPTERS + 2, count)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        own = _group_of(tl.load(index + i, mask=i < count, other=0), ADAPTERS)
        ours = ((own == group) & (i < count)).to(tl.int32)
        tl.store(order + place + tl.cumsum(ours, 0) - 1, i, mask=ours != 0)
        place += tl.sum(ours, 0)


@triton.jit
def _find(begins, piece, group_rows, GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_G: tl.constexpr):
    """Groups are cut into pieces of SIZE rows: (group of `piece`, GROUPS or more if there are not so many; begin and end of
    its rows)."""
    g = tl.arange(0, BLOCK_G)
    first = tl.load(begins + g, mask=g < GROUPS, other=0).to(tl.int64) * group_rows
    last = tl.load(begins + g + 1, mask=g < GROUPS, other=0).to(tl.int64) * group_rows
    pieces = ((last - first + SIZE - 1) // SIZE).to(tl.int32)
    ends = tl.cumsum(pieces, 0)
    group = tl.sum(((ends <= piece) & (g < GROUPS)).to(tl.int32), 0)
    here = g == group
    begin = tl.sum(tl.where(here, first, 0), 0) + (piece - tl.sum(tl.where(here, ends - pieces, 0), 0)).to(tl.int64) * SIZE
    return group, begin, tl.minimum(begin + SIZE, tl.sum(tl.where(here, last, 0), 0))


@triton.jit
def _rows_of(order, p, inside, group_rows, MODE: tl.constexpr):
    """Numbers m of the rows at places p."""
    if MODE == GROUPED:
        return tl.load(order + p // group_rows, mask=inside, other=0).to(tl.int64) * group_rows + p % group_rows
    return p


@triton.jit
def _tile(
    index,
    begins,
    order,
    tile,
    rows,
    group_rows,
    ADAPTERS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """(adapter, places p, rows m, inside) of a tile; adapter A: none, A + 1: no number of one."""
    local = tl.arange(0, BLOCK_M)
    if MODE == GROUPED:
        adapter, begin, end = _find(begins, tile, group_rows, ADAPTERS + 2, BLOCK_M, BLOCK_G)
        p = begin + local
        inside = (p < end) & (adapter < ADAPTERS + 2)
    elif MODE == BY_EXAMPLE:
        tiles = tl.cdiv(group_rows, BLOCK_M)
        example = (tile // tiles).to(tl.int64)
        adapter = _group_of(tl.load(index + example), ADAPTERS).to(tl.int32)
        t = tile % tiles * BLOCK_M + local
        p = example * group_rows + t
        inside = t < group_rows
    else:
        adapter = 0
        p = tile.to(tl.int64) * BLOCK_M + local
        inside = p < rows
    return adapter, p, _rows_of(order, p, inside, group_rows, MODE), inside


@triton.jit
def _offsets(strides, m, length):
    return m // length * strides[0] + m % length * strides[1]


# --- Pieces of the mathematics --------------------------------------------------------------------------------------------


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        z = tl.where(z < 0.0, 0.0, z)  # NaN stays
    elif ACTIVATION == GELU or ACTIVATION == GELU_TANH:
        z = gelu(z, ACTIVATION == GELU_TANH)
    elif ACTIVATION == SWISH:
        z = z * tl.sigmoid(z)
    elif ACTIVATION == LEAKY_RELU:
        z = tl.where(z < 0.0, z * 0.01, z)
    elif ACTIVATION == TANH:
        e = tl.exp(tl.abs(z) * -2.0)
        magnitude = (1.0 - e) / (1.0 + e)
        z = tl.where(z < 0.0, -magnitude, magnitude)
    return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(z > 0.0, 1.0, z * 0.0)
    elif ACTIVATION == GELU or ACTIVATION == GELU_TANH:
        return gelu_slope(z, ACTIVATION == GELU_TANH)
    elif ACTIVATION == SWISH:
        sigmoid = tl.sigmoid(z)
        return sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z > 0.0, 1.0, 0.01)
    elif ACTIVATION == TANH:
        e = tl.exp(tl.abs(z) * -2.0)
        return 4.0 * e / ((1.0 + e) * (1.0 + e))
    return z * 0.0 + 1.0


@triton.jit
def _load(pointer, offsets, c, mask):
    """Columns c of rows, float32; zeros outside."""
    return tl.load(pointer + offsets[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _input(x, x_at, input_residual, input_at, c, mask):
    s = _load(x, x_at, c, mask)
    if input_residual is not None:
        s += _load(input_residual, input_at, c, mask)
    return s


@triton.jit
def _row(parameter, c, C: tl.constexpr):
    """(1, columns) of a vector, float32."""
    return tl.load(parameter + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _normed(s, mean, rstd, weight, bias, c, C: tl.constexpr):
    u = (s - mean[:, None]) * rstd[:, None] * _row(weight, c, C)
    if bias is not None:
        u += _row(bias, c, C)
    return u


@triton.jit
def _merge(mean, squares, tile, c, start, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of `start` columns, put together with those of a chunk."""
    here = tl.minimum(C - start, BLOCK_C).to(tl.float32)
    before = start.to(tl.float32)
    inside = (c < C)[None, :]
    own = tl.sum(tl.where(inside, tile, 0.0), 1) / here
    centred = tl.where(inside, tile - own[:, None], 0.0)
    delta = own - mean
    share = here / (before + here)
    return mean + delta * share, squares + tl.sum(centred * centred, 1) + delta * delta * (before * share)


@triton.jit
def _bottleneck(
    x,
    x_at,
    input_residual,
    input_at,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    w_down,
    b_down,
    adapter,
    inside,
    j,
    C: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Columns j of u W_down^T + b_down."""
    z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    weight = w_down + adapter.to(tl.int64) * (R * C) + j[:, None] * C
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        u = _input(x, x_at, input_residual, input_at, c, inside[:, None] & (c < C)[None, :])
        if norm_weight is not None:
            u = _normed(u, mean, rstd, norm_weight, norm_bias, c, C)
        w = tl.load(weight + c[None, :], mask=(j < R)[:, None] & (c < C)[None, :], other=0.0)
        z = tl.dot(u.to(w.dtype), tl.trans(w), z, input_precision=PRECISION)
    if b_down is not None:
        z += _row(b_down + adapter.to(tl.int64) * R, j, R)
    return z


@triton.jit
def _times_up(hidden, weight, c, j, acc, C: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr):
    """acc + hidden (rows, j) W_up[c, j]^T."""
    w = tl.load(weight + c[:, None] * R + j[None, :], mask=(c < C)[:, None] & (j < R)[None, :], other=0.0)
    return tl.dot(hidden, tl.trans(w), acc, input_precision=PRECISION)


@triton.jit
def _scale(scale, scale_strides, adapter, c, C: tl.constexpr):
    at = scale + adapter.to(tl.int64) * scale_strides[0] + c * scale_strides[1]
    return tl.load(at, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _gate(gate, m, inside, gate_rows):
    return tl.load(gate + m // gate_rows, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _result(
    a,
    hidden,
    p,
    w_up,
    b_up,
    scale,
    scale_strides,
    low,
    high,
    gain_of_rows,
    x,
    x_at,
    input_residual,
    input_at,
    residual,
    residual_at,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    adapter,
    known,
    inside,
    c,
    limit,
    gain,
    C: tl.constexpr,
    R: tl.constexpr,
    ADAPTERS: tl.constexpr,
    SKIP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Columns c of y. The bottleneck is `a`, or in `hidden` where it is None."""
    j = tl.arange(0, BLOCK_R)
    own = tl.where(known, adapter, 0)
    weight = w_up + own.to(tl.int64) * (C * R)
    o = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    if a is None:
        for first in range(0, R, BLOCK_R):
            part = tl.load(hidden + p[:, None] * R + first + j[None, :], mask=inside[:, None] & (first + j < R), other=0.0)
            o = _times_up(part, weight, c, first + j, o, C, R, PRECISION)
    else:
        o = _times_up(a, weight, c, j, o, C, R, PRECISION)
    if b_up is not None:
        o += _row(b_up + own.to(tl.int64) * C, c, C)
    if scale is not None:
        o *= _scale(scale, scale_strides, own, c, C)
    o *= gain_of_rows[:, None]
    if DROPOUT:
        o = tl.where(dropout_keep(low[:, None], high[:, None], c[None, :], limit), o * gain, 0.0)
    y = tl.where(known, o, tl.where(adapter == ADAPTERS, 0.0, float("nan")))
    mask = inside[:, None] & (c < C)[None, :]
    if residual is not None:
        y += _load(residual, residual_at, c, mask)
    if SKIP & 1 or (SKIP & 4 and norm_weight is not None):
        own_x = _load(x, x_at, c, mask)
    if SKIP & 2 or (SKIP & 4 and input_residual is not None):
        own_input = _load(input_residual, input_at, c, mask)
    if SKIP & 1:
        y += own_x
    if SKIP & 2:
        y += own_input
    if SKIP & 4:
        s = own_x
        if input_residual is not None:
            s += own_input
        y += _normed(s, mean, rstd, norm_weight, norm_bias, c, C)
    return y


# --- The forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    x,  # (B, T, C) by strides of B and T; input_residual and residual as well
    input_residual,
    residual,
    w_down,  # (A, R, C)
    b_down,  # (A, R)
    w_up,  # (A, C, R)
    b_up,  # (A, C)
    norm_weight,
    norm_bias,
    out_weight,
    out_bias,
    scale,
    gate,
    index,  # of BY_EXAMPLE
    begins,  # of GROUPED
    order,
    seed,
    out,  # (M, C)
    statistics,
    hidden,  # (M, R), where R > BLOCK_R
    x_strides,
    input_strides,
    residual_strides,
    scale_strides,
    rows,
    length,
    group_rows,
    gate_rows,
    eps,
    out_eps,
    factor,
    limit,
    gain,
    C: tl.constexpr,
    R: tl.constexpr,
    ADAPTERS: tl.constexpr,
    MODE: tl.constexpr,
    SKIP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    adapter, p, m, inside = _tile(
        index, begins, order, tl.program_id(0), rows, group_rows, ADAPTERS, MODE, BLOCK_M, BLOCK_G
    )  # fmt: skip
    adapter = tl.full([], 0, tl.int32) + adapter
    if adapter >= ADAPTERS + 2:
        return
    known = adapter < ADAPTERS
    own = tl.where(known, adapter, 0)
    x_at = _offsets(x_strides, m, length)
    input_at = x_at if input_residual is None else _offsets(input_strides, m, length)
    residual_at = x_at if residual is None else _offsets(residual_strides, m, length)
    mean = tl.zeros([BLOCK_M], tl.float32)
    rstd = mean
    if norm_weight is not None:
        squares = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            s = _input(x, x_at, input_residual, input_at, c, inside[:, None] & (c < C)[None, :])
            mean, squares = _merge(mean, squares, s, c, tl.full([], 0, tl.int32) + start, C, BLOCK_C)
        rstd = 1.0 / tl.sqrt_rn(squares / C + eps)
        tl.store(statistics + m, mean, mask=inside)
        tl.store(statistics + rows + m, rstd, mask=inside)
        statistics += 2 * rows.to(tl.int64)

    j = tl.arange(0, BLOCK_R)
    a = None
    if R <= BLOCK_R:
        z = _bottleneck(
            x, x_at, input_residual, input_at, mean, rstd, norm_weight, norm_bias, w_down, b_down, own, inside, j,
            C, R, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        a = _activated(z, ACTIVATION).to(w_up.dtype.element_ty)
    else:
        for first in range(0, R, BLOCK_R):
            z = _bottleneck(
                x, x_at, input_residual, input_at, mean, rstd, norm_weight, norm_bias, w_down, b_down, own, inside, first + j,
                C, R, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
            )  # fmt: skip
            z = _activated(z, ACTIVATION).to(hidden.dtype.element_ty)
            tl.store(hidden + p[:, None] * R + first + j[None, :], z, mask=inside[:, None] & (first + j < R)[None, :])
        tl.debug_barrier()

    gain_of_rows = tl.zeros([BLOCK_M], tl.float32) + factor
    if gate is not None:
        gain_of_rows *= _gate(gate, m, inside, gate_rows)
    low, high = m, m
    if seed is not None:
        low, high = dropout_row(tl.load(seed), m)
    y_mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        y = _result(
            a, hidden, p, w_up, b_up, scale, scale_strides, low, high, gain_of_rows, x, x_at, input_residual, input_at,
            residual, residual_at, mean, rstd, norm_weight, norm_bias, adapter, known, inside, c, limit, gain,
            C, R, ADAPTERS, SKIP, seed is not None, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        if out_weight is not None:
            y_mean, squares = _merge(y_mean, squares, y, c, tl.full([], 0, tl.int32) + start, C, BLOCK_C)
        tl.store(out + m[:, None] * C + c[None, :], y.to(out.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
    if out_weight is not None:
        y_rstd = 1.0 / tl.sqrt_rn(squares / C + out_eps)
        tl.store(statistics + m, y_mean, mask=inside)
        tl.store(statistics + rows + m, y_rstd, mask=inside)
        tl.debug_barrier()
        for start in range(0, C, BLOCK_C):  # what was just stored is near
            c = start + tl.arange(0, BLOCK_C)
            mask = inside[:, None] & (c < C)[None, :]
            y = _normed(_load(out, m * C, c, mask), y_mean, y_rstd, out_weight, out_bias, c, C)
            tl.store(out + m[:, None] * C + c[None, :], y.to(out.dtype.element_ty), mask=mask)


# --- The backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def backward_kernel(
    dout,  # (M, C)
    x,
    input_residual,
    residual,
    w_down,
    b_down,
    w_up,
    b_up,
    norm_weight,
    norm_bias,
    out_weight,
    scale,
    gate,
    begins,
    order,
    seed,
    statistics,
    dy,  # (M, C), with a norm of the result
    dx,  # (M, C), or None
    dinput,  # (M, C), or None
    dgate,  # float32 (M), or None
    hidden,  # (M, R): the bottleneck, rows in the order of adapters
    dhidden,  # (M, R): the gradient of what is activated
    norm_sums,  # float32 (2, tiles, C), or None: gradients of norm_weight and norm_bias
    out_sums,  # the same of the norm of the result
    x_strides,
    input_strides,
    residual_strides,
    scale_strides,
    rows,
    length,
    group_rows,
    gate_rows,
    factor,
    limit,
    gain,
    C: tl.constexpr,
    R: tl.constexpr,
    ADAPTERS: tl.constexpr,
    MODE: tl.constexpr,
    SKIP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    TYPE: tl.constexpr = dout.dtype.element_ty
    tile = tl.program_id(0)
    tiles = tl.num_programs(0).to(tl.int64)
    adapter, p, m, inside = _tile(None, begins, order, tile, rows, group_rows, ADAPTERS, MODE, BLOCK_M, BLOCK_G)
    adapter = tl.full([], 0, tl.int32) + adapter
    # A tile beyond the last one has no rows and writes zeros into sums.
    known = adapter < ADAPTERS
    own = tl.where(known, adapter, 0)
    x_at = _offsets(x_strides, m, length)
    input_at = x_at if input_residual is None else _offsets(input_strides, m, length)
    residual_at = x_at if residual is None else _offsets(residual_strides, m, length)
    at = m * C
    mean = tl.zeros([BLOCK_M], tl.float32)
    rstd = mean
    if norm_weight is not None:
        mean = tl.load(statistics + m, mask=inside, other=0.0)
        rstd = tl.load(statistics + rows + m, mask=inside, other=0.0)
        statistics += 2 * rows.to(tl.int64)
    low, high = m, m
    if seed is not None:
        low, high = dropout_row(tl.load(seed), m)
    gates = tl.zeros([BLOCK_M], tl.float32) + 1.0
    if gate is not None:
        gates = _gate(gate, m, inside, gate_rows)

    # The bottleneck, and the slope of the activation.
    j = tl.arange(0, BLOCK_R)
    for first in range(0, R, BLOCK_R):
        z = _bottleneck(
            x, x_at, input_residual, input_at, mean, rstd, norm_weight, norm_bias, w_down, b_down, own, inside, first + j,
            C, R, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        here = p[:, None] * R + first + j[None, :]
        mask = inside[:, None] & (first + j < R)[None, :]
        tl.store(hidden + here, _activated(z, ACTIVATION).to(TYPE), mask=mask)
        tl.store(dhidden + here, _slope(z, ACTIVATION).to(TYPE), mask=mask)
    tl.debug_barrier()

    # The result again, for the averages that the norm's gradient subtracts; normalised it waits in dy.
    average = tl.zeros([BLOCK_M], tl.float32)
    average_normed = tl.zeros([BLOCK_M], tl.float32)
    y_rstd = average
    if out_weight is not None:
        y_mean = tl.load(statistics + m, mask=inside, other=0.0)
        y_rstd = tl.load(statistics + rows + m, mask=inside, other=0.0)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask = inside[:, None] & (c < C)[None, :]
            y = _result(
                None, hidden, p, w_up, b_up, scale, scale_strides, low, high, gates * factor, x, x_at, input_residual,
                input_at, residual, residual_at, mean, rstd, norm_weight, norm_bias, adapter, known, inside, c, limit, gain,
                C, R, ADAPTERS, SKIP, seed is not None, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R,
            )  # fmt: skip
            normed = tl.where(mask, (y - y_mean[:, None]) * y_rstd[:, None], 0.0)
            incoming = _load(dout, at, c, mask)
            g = incoming * _row(out_weight, c, C)
            average += tl.sum(g, 1) / C
            average_normed += tl.sum(g * normed, 1) / C
            tl.store(dy + at[:, None] + c[None, :], normed.to(TYPE), mask=mask)
            if out_sums is not None:
                to = out_sums + tile.to(tl.int64) * C + c
                tl.store(to, tl.sum(incoming * normed, 0), mask=c < C)
                tl.store(to + tiles * C, tl.sum(incoming, 0), mask=c < C)
        tl.debug_barrier()

    # Through the up projection and the activation.
    of_gate = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, R, BLOCK_R):
        da = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask = inside[:, None] & (c < C)[None, :]
            if out_weight is None:
                dl = _load(dout, at, c, mask)
            else:
                dl = _load(dy, at, c, mask)
                if first == 0:
                    g = _load(dout, at, c, mask) * _row(out_weight, c, C)
                    dl = (g - average[:, None] - dl * average_normed[:, None]) * y_rstd[:, None]
                    tl.store(dy + at[:, None] + c[None, :], dl.to(TYPE), mask=mask)
            dl *= factor
            if seed is not None:
                dl = tl.where(dropout_keep(low[:, None], high[:, None], c[None, :], limit), dl * gain, 0.0)
            if scale is not None:
                dl *= _scale(scale, scale_strides, own, c, C)
            dl = tl.where(known & mask, dl, 0.0)
            if dgate is not None and b_up is not None:
                of_bias = tl.sum(dl * _row(b_up + own.to(tl.int64) * C, c, C), 1)
                of_gate += tl.where(first == 0, of_bias, 0.0)
            inside_w = (c < C)[:, None] & (first + j < R)[None, :]
            w = tl.load(w_up + own.to(tl.int64) * (C * R) + c[:, None] * R + first + j[None, :], mask=inside_w, other=0.0)
            da = tl.dot(dl.to(TYPE), w, da, input_precision=PRECISION)
        here = p[:, None] * R + first + j[None, :]
        mask = inside[:, None] & (first + j < R)[None, :]
        da = tl.where(known, da, 0.0)
        if dgate is not None:
            a = tl.load(hidden + here, mask=mask, other=0.0).to(tl.float32)
            of_gate += tl.sum(tl.where(known, a * da, 0.0), 1)
        slope = tl.load(dhidden + here, mask=mask, other=0.0).to(tl.float32)
        dz = tl.where(known, da * gates[:, None] * slope, 0.0)
        tl.store(dhidden + here, dz.to(TYPE), mask=mask)
    if dgate is not None:
        tl.store(dgate + m, of_gate, mask=inside)
    tl.debug_barrier()

    # Through the down projection and the first norm. Before its averages are known the gradient waits in dx or dinput.
    if dx is not None or dinput is not None or norm_sums is not None:
        average = tl.zeros([BLOCK_M], tl.float32)
        average_normed = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask = inside[:, None] & (c < C)[None, :]
            ds = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            for first in range(0, R, BLOCK_R):
                inside_r = first + j < R
                dz = tl.load(
                    dhidden + p[:, None] * R + first + j[None, :], mask=inside[:, None] & inside_r[None, :], other=0.0
                )
                w = w_down + own.to(tl.int64) * (R * C) + (first + j)[:, None] * C + c[None, :]
                w = tl.load(w, mask=inside_r[:, None] & (c < C)[None, :], other=0.0)
                ds = tl.dot(dz, w, ds, input_precision=PRECISION)
            ds = tl.where(known, ds, 0.0)
            if SKIP != 0:
                incoming = _load(dout if out_weight is None else dy, at, c, mask)
            if SKIP & 4:
                ds += incoming
            if norm_weight is not None:
                normed = _input(x, x_at, input_residual, input_at, c, mask)
                normed = tl.where(mask, (normed - mean[:, None]) * rstd[:, None], 0.0)
                if norm_sums is not None:
                    to = norm_sums + tile.to(tl.int64) * C + c
                    tl.store(to, tl.sum(ds * normed, 0), mask=c < C)
                    tl.store(to + tiles * C, tl.sum(ds, 0), mask=c < C)
                ds *= _row(norm_weight, c, C)
                average += tl.sum(ds, 1) / C
                average_normed += tl.sum(ds * normed, 1) / C
                if dx is not None:
                    tl.store(dx + at[:, None] + c[None, :], ds.to(TYPE), mask=mask)
                elif dinput is not None:
                    tl.store(dinput + at[:, None] + c[None, :], ds.to(TYPE), mask=mask)
            else:
                _store_rows(dx, dinput, at, ds, incoming if SKIP != 0 else None, c, mask, SKIP)
        if norm_weight is not None and (dx is not None or dinput is not None):
            tl.debug_barrier()
            for start in range(0, C, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                mask = inside[:, None] & (c < C)[None, :]
                normed = _input(x, x_at, input_residual, input_at, c, mask)
                normed = (normed - mean[:, None]) * rstd[:, None]
                ds = _load(dinput if dx is None else dx, at, c, mask)
                ds = (ds - average[:, None] - normed * average_normed[:, None]) * rstd[:, None]
                if SKIP & 3:
                    incoming = _load(dout if out_weight is None else dy, at, c, mask)
                _store_rows(dx, dinput, at, ds, incoming if SKIP & 3 else None, c, mask, SKIP)


@triton.jit
def _store_rows(dx, dinput, at, ds, dy, c, mask, SKIP: tl.constexpr):
    if dx is not None:
        value = ds + dy if SKIP & 1 else ds
        tl.store(dx + at[:, None] + c[None, :], value.to(dx.dtype.element_ty), mask=mask)
    if dinput is not None:
        value = ds + dy if SKIP & 2 else ds
        tl.store(dinput + at[:, None] + c[None, :], value.to(dinput.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(
    dy,  # (M, C)
    x,
    input_residual,
    norm_weight,
    norm_bias,
    gate,
    begins,
    order,
    seed,
    statistics,
    hidden,
    dhidden,
    down_parts,  # float32 (parts, R, C): dz^T u
    bias_parts,  # float32 (parts, R): sums of dz
    up_parts,  # float32 (parts, C, R): dl^T a, dl the gradient before `scale`
    dl_parts,  # float32 (parts, C): sums of dl
    x_strides,
    input_strides,
    rows,
    length,
    group_rows,
    gate_rows,
    factor,
    limit,
    gain,
    C: tl.constexpr,
    R: tl.constexpr,
    ADAPTERS: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    PART: tl.constexpr,  # rows of a part
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One part of an adapter's rows, one tile of the weights."""
    TYPE: tl.constexpr = hidden.dtype.element_ty
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    TILES_R: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    j = pid // TILES_C % TILES_R * BLOCK_R + tl.arange(0, BLOCK_R)
    part = pid // (TILES_C * TILES_R)
    if MODE == GROUPED:
        _, begin, end = _find(begins, part, group_rows, ADAPTERS, PART, BLOCK_G)
    else:
        begin = part.to(tl.int64) * PART
        end = tl.minimum(begin + PART, rows)
    down = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    up = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    bias = tl.zeros([BLOCK_R], tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_M):
        p = start + tl.arange(0, BLOCK_M)
        inside = p < end
        m = _rows_of(order, p, inside, group_rows, MODE)
        mask = inside[:, None] & (c < C)[None, :]
        here = p[:, None] * R + j[None, :]
        inside_j = inside[:, None] & (j < R)[None, :]
        if down_parts is not None or bias_parts is not None:
            dz = tl.load(dhidden + here, mask=inside_j, other=0.0)
            if bias_parts is not None:
                bias += tl.sum(dz.to(tl.float32), 0)
        if down_parts is not None:
            input_at = m if input_residual is None else _offsets(input_strides, m, length)
            u = _input(x, _offsets(x_strides, m, length), input_residual, input_at, c, mask)
            if norm_weight is not None:
                mean = tl.load(statistics + m, mask=inside, other=0.0)
                rstd = tl.load(statistics + rows + m, mask=inside, other=0.0)
                u = _normed(u, mean, rstd, norm_weight, norm_bias, c, C)
            down = tl.dot(tl.trans(dz), u.to(TYPE), down, input_precision=PRECISION)
        if up_parts is not None or dl_parts is not None:
            dl = _load(dy, m * C, c, mask) * factor
            if gate is not None:
                dl *= _gate(gate, m, inside, gate_rows)[:, None]
            if seed is not None:
                low, high = dropout_row(tl.load(seed), m)
                dl = tl.where(dropout_keep(low[:, None], high[:, None], c[None, :], limit), dl * gain, 0.0)
            if up_parts is not None:
                a = tl.load(hidden + here, mask=inside_j, other=0.0)
                up = tl.dot(tl.trans(dl.to(TYPE)), a, up, input_precision=PRECISION)
            total += tl.sum(dl, 0)
    part = part.to(tl.int64)
    inside_w = (c < C)[:, None] & (j < R)[None, :]
    if down_parts is not None:
        to = down_parts + part * (R * C) + j[:, None] * C + c[None, :]
        tl.store(to, down, mask=(j < R)[:, None] & (c < C)[None, :])
    if up_parts is not None:
        tl.store(up_parts + part * (R * C) + c[:, None] * R + j[None, :], up, mask=inside_w)
    if bias_parts is not None:
        tl.store(bias_parts + part * R + j, bias, mask=(j < R) & (pid % TILES_C == 0))
    if dl_parts is not None:
        tl.store(dl_parts + part * C + c, total, mask=(c < C) & (pid // TILES_C % TILES_R == 0))


@triton.jit
def _parts_of(begins, adapter, rows, group_rows, MODE: tl.constexpr, PART: tl.constexpr, BLOCK_G: tl.constexpr):
    """First and last + 1 part of an adapter, int64."""
    if MODE == GROUPED:
        g = tl.arange(0, BLOCK_G)
        first = tl.load(begins + g, mask=g <= adapter, other=0).to(tl.int64) * group_rows
        last = tl.load(begins + g + 1, mask=g <= adapter, other=0).to(tl.int64) * group_rows
        parts = (last - first + PART - 1) // PART
        end = tl.sum(parts, 0)
        return end - tl.sum(tl.where(g == adapter, parts, 0), 0), end
    else:
        end = tl.cdiv(rows.to(tl.int64), PART)
        return end * 0, end


@triton.jit
def part_sum_kernel(
    parts,  # float32 (parts, SIZE)
    out,  # (A, SIZE)
    begins,
    rows,
    group_rows,
    SIZE: tl.constexpr,
    MODE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """out[adapter] = the sum of its parts, in their order."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    adapter = pid // BLOCKS
    i = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    first, end = _parts_of(begins, adapter, rows, group_rows, MODE, PART, BLOCK_G)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(first, end):
        total += tl.load(parts + part * SIZE + i, mask=i < SIZE, other=0.0)
    tl.store(out + adapter.to(tl.int64) * SIZE + i, total.to(out.dtype.element_ty), mask=i < SIZE)


@triton.jit
def up_sum_kernel(
    up_parts,
    dl_parts,
    w_up,
    b_up,
    scale,
    begins,
    dw_up,  # (A, C, R), or None
    db_up,  # float32 (A, C), or None
    dscale,  # float32 (A, C), or None
    scale_strides,
    rows,
    group_rows,
    C: tl.constexpr,
    R: tl.constexpr,
    MODE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Sums of an adapter's parts, and with P and q those of dl^T a and of dl: scale P, scale q, <P_c, W_up_c> + q b_up."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    adapter = pid // BLOCKS
    c = pid % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    adapter_64 = adapter.to(tl.int64)
    first, end = _parts_of(begins, adapter, rows, group_rows, MODE, PART, BLOCK_G)
    factor = tl.zeros([BLOCK_C], tl.float32) + 1.0
    if scale is not None:
        own_scale = scale + adapter_64 * scale_strides[0] + c * scale_strides[1]
        factor = tl.load(own_scale, mask=(c < C) & (first < end), other=0.0).to(tl.float32)
    of_scale = tl.zeros([BLOCK_C], tl.float32)
    if up_parts is not None:
        for start in range(0, R, BLOCK_R):
            j = start + tl.arange(0, BLOCK_R)
            mask = (c < C)[:, None] & (j < R)[None, :]
            at = c[:, None] * R + j[None, :]
            total = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
            for part in range(first, end):
                total += tl.load(up_parts + part * (R * C) + at, mask=mask, other=0.0)
            at += adapter_64 * (R * C)
            if dw_up is not None:
                tl.store(dw_up + at, (total * factor[:, None]).to(dw_up.dtype.element_ty), mask=mask)
            if dscale is not None:
                of_scale += tl.sum(total * tl.load(w_up + at, mask=mask, other=0.0).to(tl.float32), 1)
    if dl_parts is not None:
        total = tl.zeros([BLOCK_C], tl.float32)
        for part in range(first, end):
            total += tl.load(dl_parts + part * C + c, mask=c < C, other=0.0)
        if db_up is not None:
            tl.store(db_up + adapter_64 * C + c, total * factor, mask=c < C)
        if dscale is not None and b_up is not None:
            of_scale += total * tl.load(b_up + adapter_64 * C + c, mask=c < C, other=0.0).to(tl.float32)
    if dscale is not None:
        # An adapter without rows gets 0, whatever its weights are.
        tl.store(dscale + adapter_64 * C + c, tl.where(first < end, of_scale, 0.0), mask=c < C)


# --- Launchers ------------------------------------------------------------------------------------------------------------


def _fit(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))


def _row_tile(c: int, r: int, dtype, warps: int = 4) -> dict:
    """Of the kernels of rows; the backward has eight warps for its many pointers and masks."""
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_C=_fit(c, 32), BLOCK_R=_fit(r, 64 if r <= 64 else 32), num_warps=warps, num_stages=2)
    return dict(BLOCK_M=64, BLOCK_C=_fit(c, 64), BLOCK_R=_fit(r, 128 if r <= 128 else 64), num_warps=warps, num_stages=2)


def _weight_tile(c: int, r: int, dtype) -> dict:
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_C=_fit(c, 32), BLOCK_R=_fit(r, 32), num_warps=8, num_stages=2)
    return dict(BLOCK_M=64, BLOCK_C=_fit(c, 64), BLOCK_R=_fit(r, 64), num_warps=4, num_stages=2)


def _dense_rows(t):
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _dense(t):
    return t if t is None else t.contiguous()


def _strides(t) -> tuple:
    return (0, 0) if t is None else t.stride()[:2]


class _Call:
    """What both directions need, made ready for the kernels."""

    def __init__(self, given, index, skip, activation):
        for name, t in zip(NAMES, given, strict=True):
            if name in ("x", "input_residual", "residual"):
                t = _dense_rows(t)
            elif name != "scale":
                t = _dense(t)
            setattr(self, name, t)
        self.index = _dense(index)
        x, w_down, scale, gate = self.x, self.w_down, self.scale, self.gate
        self.length, self.channels = x.shape[1:]
        self.rows, self.bottleneck = x.shape[0] * self.length, w_down.shape[-2]
        self.adapters = w_down.shape[0] if w_down.dim() == 3 else 1
        self.group_rows = self.length if index is not None and index.dim() == 1 else 1
        self.gate_rows = self.length if gate is not None and gate.dim() == 1 else 1
        self.scale_strides = (0, 0)
        if scale is not None:
            self.scale_strides = tuple(0 if n == 1 else step for n, step in zip(scale.shape, scale.stride(), strict=True))
        self.shared = dict(C=self.channels, R=self.bottleneck, PRECISION=input_precision(x.dtype))
        self.passes = dict(SKIP=skip, ACTIVATION=activation, **self.shared)
        self.begins = self.order = None

    def inputs(self) -> tuple:
        """Those that the kernels of rows begin with."""
        return tuple(getattr(self, name) for name in NAMES[: NAMES.index("out_weight")])

    def strides(self) -> tuple:
        return _strides(self.x), _strides(self.input_residual), _strides(self.residual), self.scale_strides

    def sizes(self) -> tuple:
        return self.rows, self.length, self.group_rows, self.gate_rows

    def group(self):
        """Finds the order of rows by adapters."""
        count = self.index.numel()
        self.begins = self.index.new_empty(self.adapters + 3, dtype=torch.int32)
        self.order = self.index.new_empty(count, dtype=torch.int32)
        block = min(4096 if count > 1024 else 1024, max(16, triton.next_power_of_2(count)))
        group_kernel[(self.adapters + 2,)](
            self.index, self.begins, self.order, count, ADAPTERS=self.adapters, BLOCK=block, num_warps=8 if block > 1024 else 4
        )

    def tiles(self, mode, size: int) -> int:
        """As many pieces of `size` rows as there may be."""
        if mode == BY_EXAMPLE.value:
            return self.x.shape[0] * ceil_div(self.length, size)
        extra = 0 if mode == ALONE.value else min(self.adapters + 2, self.index.numel())
        return ceil_div(self.rows, size) + extra

    def mode(self, mode) -> dict:
        return dict(ADAPTERS=self.adapters, MODE=mode, BLOCK_G=triton.next_power_of_2(self.adapters + 2))


def adapter_fwd(*arguments):
    """`mmkernels_triton::adapter_fwd`; csrc/schemas.h has the contract."""
    given, (index, seed, skip, activation, *numbers, save) = arguments[: len(NAMES)], arguments[len(NAMES) :]
    eps, out_eps, factor, dropout_p = numbers
    if save:
        raise ValueError("save is True; on a GPU the bottleneck is made again, and it must be False")
    call = _Call(given, index, skip, activation)
    x = call.x
    out = x.new_empty(x.shape)
    norms = 2 * (call.norm_weight is not None) + 2 * (call.out_weight is not None)
    statistics = x.new_empty((norms, *x.shape[:-1]), dtype=torch.float32)
    nothing = x.new_empty(0, dtype=torch.float32)
    if out.numel() == 0:
        return out, statistics, nothing
    tile = _row_tile(call.channels, call.bottleneck, x.dtype)
    wide = call.bottleneck > tile["BLOCK_R"]
    with torch.cuda.device_of(x):
        mode = ALONE.value
        if index is not None:
            # Tiles that end with their example, where that leaves few rows empty.
            own = call.group_rows
            mode = BY_EXAMPLE.value if own >= 4 * tile["BLOCK_M"] or own == tile["BLOCK_M"] else GROUPED.value
            if mode == GROUPED.value:
                call.group()
        forward_kernel[(call.tiles(mode, tile["BLOCK_M"]),)](
            *call.inputs(),
            call.out_weight,
            call.out_bias,
            call.scale,
            call.gate,
            call.index if mode == BY_EXAMPLE.value else None,
            call.begins,
            call.order,
            seed,
            out,
            statistics,
            x.new_empty(call.rows, call.bottleneck) if wide else None,
            *call.strides(),
            *call.sizes(),
            eps,
            out_eps,
            factor,
            threshold(dropout_p),
            1.0 / (1.0 - dropout_p),
            **call.passes,
            **call.mode(mode),
            **tile,
        )
    return out, statistics, nothing


X, INPUT, RESIDUAL, W_DOWN, B_DOWN, W_UP, B_UP, NORM_WEIGHT, NORM_BIAS, OUT_WEIGHT, OUT_BIAS, SCALE, GATE = range(len(NAMES))


def adapter_bwd(dout, *arguments):
    """`mmkernels_triton::adapter_bwd`; csrc/schemas.h has the contract."""
    given, (index, seed, statistics, _, skip, activation, *_) = arguments[: len(NAMES)], arguments[len(NAMES) :]
    factor, dropout_p, wanted = arguments[-3:]
    call = _Call(given, index, skip, activation)
    x, gate, out_weight = call.x, call.gate, call.out_weight
    want = [bool(wanted & 1 << i) for i in range(len(NAMES))]
    rows, c, r = call.rows, call.channels, call.bottleneck
    grads = list(empty_gradients(given, wanted))
    if rows == 0:
        return tuple(g.zero_() for g in grads)
    dout, statistics = dout.contiguous(), statistics.contiguous()
    mode = ALONE.value if index is None else GROUPED.value
    tile = _row_tile(c, r, x.dtype, 8)
    tiles = call.tiles(mode, tile["BLOCK_M"])

    def made(i):
        return grads[i] if want[i] else None

    def sums(*places):
        return x.new_empty(2, tiles, c, dtype=torch.float32) if any(want[i] for i in places) else None

    with torch.cuda.device_of(x):
        if index is not None:
            call.group()
        norm_sums, out_sums = sums(NORM_WEIGHT, NORM_BIAS), sums(OUT_WEIGHT, OUT_BIAS)
        hidden, dhidden = x.new_empty(rows, r), x.new_empty(rows, r)
        dy = dout
        if out_weight is not None:
            dy = grads[RESIDUAL] if want[RESIDUAL] else x.new_empty(x.shape)
        elif want[RESIDUAL]:
            grads[RESIDUAL].copy_(dout)
        dgate = x.new_empty(x.shape[:-1], dtype=torch.float32) if want[GATE] else None
        common = (*call.sizes(), factor, threshold(dropout_p), 1.0 / (1.0 - dropout_p))
        backward_kernel[(tiles,)](
            dout,
            *call.inputs(),
            call.out_weight,
            call.scale,
            call.gate,
            call.begins,
            call.order,
            seed,
            statistics,
            None if out_weight is None else dy,
            made(X),
            made(INPUT),
            dgate,
            hidden,
            dhidden,
            norm_sums,
            out_sums,
            *call.strides(),
            *common,
            **call.passes,
            **call.mode(mode),
            **tile,
        )
        for found, places in ((norm_sums, (NORM_WEIGHT, NORM_BIAS)), (out_sums, (OUT_WEIGHT, OUT_BIAS))):
            for part, i in enumerate(places):
                if want[i]:
                    sum_rows(found[part], grads[i])
        if want[GATE]:
            grads[GATE] = dgate if gate.dim() == 2 else dgate.sum(1)
        if any(want[i] for i in (W_DOWN, B_DOWN, W_UP, B_UP, SCALE)):
            _weights(call, dy, hidden, dhidden, statistics, seed, mode, common, want, grads)
    return tuple(grads)


def _weights(call, dy, hidden, dhidden, statistics, seed, mode, common, want, grads):
    rows, c, r, adapters = call.rows, call.channels, call.bottleneck, call.adapters
    tile = _weight_tile(c, r, dy.dtype)
    tiles = ceil_div(c, tile["BLOCK_C"]) * ceil_div(r, tile["BLOCK_R"])
    # As many parts as occupy the device twice, of a power of two of tiles each: a kernel is compiled for few sizes.
    wish = max(1, ceil_div(2 * _multiprocessors(dy.device), tiles))
    part = tile["BLOCK_M"] * max(1, triton.next_power_of_2(ceil_div(rows, wish * tile["BLOCK_M"])))
    parts = ceil_div(rows, part) + (0 if mode == ALONE.value else min(adapters, call.index.numel()))

    def space(needed, *shape):
        return dy.new_empty(parts, *shape, dtype=torch.float32) if needed else None

    down_parts, bias_parts = space(want[W_DOWN], r, c), space(want[B_DOWN], r)
    up_parts, dl_parts = space(want[W_UP] or want[SCALE], c, r), space(want[B_UP] or want[SCALE], c)
    weight_kernel[(parts * tiles,)](
        dy,
        call.x,
        call.input_residual,
        call.norm_weight,
        call.norm_bias,
        call.gate,
        call.begins,
        call.order,
        seed,
        statistics,
        hidden,
        dhidden,
        down_parts,
        bias_parts,
        up_parts,
        dl_parts,
        _strides(call.x),
        _strides(call.input_residual),
        *common,
        PART=part,
        **call.shared,
        **call.mode(mode),
        **tile,
    )
    places = {key: value for key, value in call.mode(mode).items() if key != "ADAPTERS"} | dict(PART=part)
    for found, i in ((down_parts, W_DOWN), (bias_parts, B_DOWN)):
        if found is not None:
            size = found[0].numel()
            block = _fit(size, 16384 if _backends.INTERPRET else 1024)
            part_sum_kernel[(adapters * ceil_div(size, block),)](
                found, grads[i], call.begins, rows, call.group_rows, SIZE=size, BLOCK=block, num_warps=4, **places
            )
    if up_parts is None and dl_parts is None:
        return
    dscale = dy.new_empty(adapters, c, dtype=torch.float32) if want[SCALE] else None
    block_r = _fit(r, 64)
    block_c = max(16, (16384 if _backends.INTERPRET else 1024) // block_r)
    up_sum_kernel[(adapters * ceil_div(c, block_c),)](
        up_parts,
        dl_parts,
        call.w_up,
        call.b_up,
        call.scale,
        call.begins,
        grads[W_UP] if want[W_UP] else None,
        grads[B_UP] if want[B_UP] else None,
        dscale,
        call.scale_strides,
        rows,
        call.group_rows,
        C=c,
        R=r,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        num_warps=4,
        **places,
    )
    if want[SCALE]:
        shared = [dim for dim in (0, 1) if call.scale.shape[dim] == 1]
        grads[SCALE] = dscale.sum(shared, keepdim=True) if shared else dscale


# --- For the kernel report ------------------------------------------------------------------------------------------------

_CODES = {"float32": "fp32", "bfloat16": "bf16"}
_INTEGERS = dict.fromkeys(("index", "seed"), "*i64") | dict.fromkeys(("begins", "order"), "*i32")
_FLOATS = ("statistics", "dgate", "norm_sums", "out_sums", "down_parts", "bias_parts", "up_parts", "dl_parts", "parts")
_FLOATS += ("db_up", "dscale", "norm_weight", "norm_bias", "out_weight", "out_bias", "b_down", "b_up", "scale", "gate")
_SCALARS = {"eps": "fp32", "out_eps": "fp32", "factor": "fp32", "gain": "fp32", "limit": "i64", "length": "i32:16"}


def _report_case(name, kernel, dtype, capability, tile, absent, **constexprs) -> ReportCase:
    """A kernel for contiguous rows whose widths are multiples of 16; `absent` names tensors that are None."""
    tile = dict(tile)
    options = {"num_warps": tile.pop("num_warps"), "num_stages": tile.pop("num_stages", 3)}
    values, signature, final = constexprs | tile | dict.fromkeys(absent), {}, {}
    plain = _SCALARS | dict.fromkeys(("rows", "group_rows", "gate_rows", "count"), "i32")
    for place, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument] = "constexpr"
            final[argument] = values[argument]
        elif argument == "scale_strides":
            signature[argument] = ("i32:16", "constexpr")
            final[place, 1] = 1
        elif argument.endswith("_strides"):
            signature[argument] = ("i32:16", "i32:16")
        elif argument in plain:
            signature[argument] = plain[argument]
        elif argument in _INTEGERS:
            signature[argument] = _INTEGERS[argument]
        else:
            signature[argument] = "*fp32" if argument in _FLOATS else f"*{_CODES[dtype]}"
    return ReportCase(f"adapter_{name} {dtype}", kernel, signature, final, options, capability)


def report_cases():
    """Pfeiffer's adapter of a base model and AdapterPlus in a bank, for the report that compiles kernels without a GPU."""
    yield from fusion_kernels.report_cases()
    c, part = 768, 512
    pfeiffer = {"input_residual", "residual", "scale", "gate", "index", "begins", "order", "seed"} - {"input_residual"}
    plus = {"input_residual", "residual", "norm_weight", "norm_bias", "out_weight", "out_bias", "index", "norm_sums"}
    plus |= {"out_sums", "dy", "dinput", "dgate", "gate", "seed"}
    for capability in (80, 90, 100):
        for code in _CODES:
            dtype = getattr(torch, code)
            for name, r, adapters, mode, skip, absent in (
                ("pfeiffer", 48, 1, ALONE.value, 3, pfeiffer),
                ("bank", 64, 64, GROUPED.value, 1, plus),
                ("wide", 384, 1, ALONE.value, 3, pfeiffer),
            ):
                shared = dict(C=c, R=r, ADAPTERS=adapters, MODE=mode, PRECISION=input_precision(dtype))
                shared |= dict(BLOCK_G=triton.next_power_of_2(adapters + 2))
                tile = _row_tile(c, r, dtype)
                passes = shared | dict(SKIP=skip, ACTIVATION=GELU_TANH.value if mode == GROUPED.value else RELU.value)
                forward = absent | ({"hidden"} if r <= tile["BLOCK_R"] else set())
                forward = forward & set(forward_kernel.arg_names)
                yield _report_case(f"fwd {name}", forward_kernel, code, capability, tile, forward, **passes)
                backward = (absent | ({"dgate"} if "gate" in absent else set())) & set(backward_kernel.arg_names)
                tile = _row_tile(c, r, dtype, 8)
                yield _report_case(f"bwd {name}", backward_kernel, code, capability, tile, backward, **passes)
                tile = _weight_tile(c, r, dtype)
                # The gradient comes from dy or dout, and is never absent.
                weight = absent & set(weight_kernel.arg_names) - {"dy"}
                yield _report_case(f"weight {name}", weight_kernel, code, capability, tile, weight, PART=part, **shared)
            places = dict(MODE=GROUPED.value, PART=part, BLOCK_G=128, num_warps=4)
            sums = dict(SIZE=64 * c, BLOCK=1024)
            yield _report_case("part_sum", part_sum_kernel, code, capability, places, (), **sums)
            sums = dict(C=c, R=64, BLOCK_C=16, BLOCK_R=64)
            yield _report_case("up_sum", up_sum_kernel, code, capability, places, (), **sums)
        group = dict(BLOCK=4096, num_warps=8)
        yield _report_case("group", group_kernel, "float32", capability, group, (), ADAPTERS=64)


# --- Registration ---------------------------------------------------------------------------------------------------------

_TENSORS = (
    "Tensor x, Tensor? input_residual, Tensor? residual, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? out_weight, Tensor? out_bias, Tensor? scale, Tensor? gate, "
    "Tensor? index, Tensor? seed"
)
_OPTIONS = "int skip, int activation, float eps, float out_eps, float factor, float dropout_p"
_SCHEMAS = {
    adapter_fwd: f"({_TENSORS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor)",
    adapter_bwd: (
        f"(Tensor dout, {_TENSORS}, Tensor statistics, Tensor? hidden, {_OPTIONS}, int wanted) -> "
        f"({', '.join(['Tensor'] * 13)})"
    ),
}
for _function, _schema in _SCHEMAS.items():
    _name = f"mmkernels_triton::{_function.__name__}"
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_name, ("cpu", "cuda"), _function)
attach_fakes("mmkernels_triton")

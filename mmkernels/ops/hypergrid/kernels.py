"""Triton kernels of the `hypergrid` family and the ops `mmkernels_triton::hypergrid_*`. README.md has the derivation.

`product_kernel` is the forward and the gradient of x: a sum over blocks p (P of them, KP wide) of the left operand's columns,
for blocks q (Q of them, KQ wide) of the result's, with one factor rho + gate[g, p, q] for a gate, a block and a block.
`weight_kernel` is the gradient of the weight, a sum over rows with one factor for each run of rows of a gate, and of the gate,
which is a sum over the same tiles before they are scaled.
"""

import torch
import triton
import triton.language as tl

from ... import _backends
from .._shared.dropout import threshold
from .._shared.kernels import (
    ReportCase,
    ceil_div,
    dropout_keep,
    dropout_row,
    gelu,
    gelu_slope,
    input_precision,
    split_count,
    sum_rows,
)
from .._shared.registration import attach_fakes

RELU, GELU, GELU_TANH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# How the factors are applied: to the partial product of a block p, one factor a column (all rows of a tile share a gate) or
# one a row (all columns share a block q), or to the left operand before it is multiplied (both).
BY_COLUMN, BY_ROW, LEFT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _relu(x):
    return tl.where(x < 0.0, 0.0, x)  # NaN stays


@triton.jit
def _kept(seed, rows, columns, threshold):
    """Dropout by counter of a tile of a(x)."""
    low, high = dropout_row(tl.load(seed), rows)
    return dropout_keep(low[:, None], high[:, None], columns[None, :], threshold)


@triton.jit
def activate_kernel(
    x,
    out,  # contiguous
    seed,
    x_stride,
    rows,
    columns,
    threshold,
    gain,  # 1 / (1 - dropout_p)
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a(x), where every tile of columns of the product would make it again."""
    blocks = tl.cdiv(columns, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    r = pid // blocks * ROWS + tl.arange(0, ROWS)
    c = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    y = tl.load(x + r[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == RELU:
        y = _relu(y)
    elif ACTIVATION != 0:
        y = gelu(y, ACTIVATION == GELU_TANH)
    if DROPOUT:
        y = tl.where(_kept(seed, r, c, threshold), y * gain, 0.0)
    tl.store(out + r[:, None] * columns + c[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_of(index, group, gates, INDEXED: tl.constexpr):
    """Numbers of gates of groups of rows."""
    if INDEXED:
        return tl.load(index + group)
    return tl.where(gates == 1, 0, group)


@triton.jit
def product_kernel(
    left,  # (M, P * KP)
    right,  # (n, k) by strides
    gate,  # (g, p, q) by strides
    index,  # int64, or None
    bias,
    x,  # of the gradient: what a() was given, (M, N)
    seed,
    out,  # (M, N), contiguous
    left_stride,
    right_strides,
    gate_strides,
    bias_stride,
    x_stride,
    rows,
    group_rows,
    gates,
    threshold,
    gain,
    P: tl.constexpr,
    KP: tl.constexpr,
    Q: tl.constexpr,
    KQ: tl.constexpr,
    MODE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    INDEXED: tl.constexpr,
    BIASED: tl.constexpr,
    RELU_LEFT: tl.constexpr,
    GRADIENT: tl.constexpr,  # multiplies the result by the derivative of a
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    N: tl.constexpr = Q * KQ
    pid = tl.program_id(0)
    if MODE == BY_COLUMN:  # tiles of columns cross blocks q
        TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
        n = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
        q = tl.minimum(n // KQ, Q - 1)
        end = N
        tile = pid // TILES_N
    else:  # tiles stay in one
        TILES_Q: tl.constexpr = (KQ + BLOCK_N - 1) // BLOCK_N
        q = pid // TILES_Q % Q
        n = q * KQ + pid % TILES_Q * BLOCK_N + tl.arange(0, BLOCK_N)
        end = (q + 1) * KQ
        tile = pid // (TILES_Q * Q)
    if MODE == BY_ROW:  # tiles of rows cross groups
        m = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside_m = m < rows
        g = tl.load(index + m // group_rows, mask=inside_m, other=0) if INDEXED else tl.where(gates == 1, 0, m // group_rows)
    else:
        tiles = tl.cdiv(group_rows, BLOCK_M)
        group = (tile // tiles).to(tl.int64)
        local = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        m = group * group_rows + local
        inside_m = local < group_rows
        g = _gate_of(index, group, gates, INDEXED)
    inside_n = n < end
    known = (g >= 0) & (g < gates)  # the factor of any other number is NaN
    factors = gate + (tl.where(known, g, 0) * gate_strides[0] + q.to(tl.int64) * gate_strides[2])
    rows_at = left + m[:, None] * left_stride
    columns_at = right + n[None, :].to(tl.int64) * right_strides[0]
    NAN: tl.constexpr = float("nan")

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if MODE == LEFT:
        for start in range(0, P * KP, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside_k = k < P * KP
            a = tl.load(rows_at + k[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0)
            b = tl.load(
                columns_at + k[:, None].to(tl.int64) * right_strides[1], mask=inside_n[None, :] & inside_k[:, None], other=0.0
            )
            factor = tl.load(factors + (k // KP) * gate_strides[1], mask=inside_k & known, other=NAN).to(tl.float32)
            if RESIDUAL:
                factor += 1.0
            if RELU_LEFT:
                a = _relu(a)
            # Beyond the last column there is nothing to scale.
            a = tl.where(inside_k[None, :], a.to(tl.float32) * factor[None, :], 0.0).to(left.dtype.element_ty)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        STEPS: tl.constexpr = (KP + BLOCK_K - 1) // BLOCK_K
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(P * STEPS):
            p = step // STEPS
            local_k = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
            k = p * KP + local_k
            inside_k = local_k < KP
            a = tl.load(rows_at + k[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0)
            b = tl.load(
                columns_at + k[:, None].to(tl.int64) * right_strides[1], mask=inside_n[None, :] & inside_k[:, None], other=0.0
            )
            if RELU_LEFT:
                a = _relu(a)
            part = tl.dot(a, b, part, input_precision=PRECISION)
            if step % STEPS == STEPS - 1:
                factor = tl.load(factors + p * gate_strides[1], mask=known, other=NAN).to(tl.float32)
                if RESIDUAL:
                    factor += 1.0
                acc += part * (factor[:, None] if MODE == BY_ROW else factor[None, :])
                part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    if BIASED:
        acc += tl.load(bias + n * bias_stride, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    mask = inside_m[:, None] & inside_n[None, :]
    if GRADIENT:
        if ACTIVATION != 0:
            y = tl.load(x + m[:, None] * x_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
            if ACTIVATION == RELU:
                acc = tl.where(y > 0.0, acc, 0.0)
            else:
                acc *= gelu_slope(y, ACTIVATION == GELU_TANH)
        if DROPOUT:
            acc = tl.where(_kept(seed, m, n, threshold), acc * gain, 0.0)
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dot_exact(a, b):
    """a b for a float32 a and a b of zeros and ones, on tensor cores: a in three parts of bfloat16."""
    high = a.to(tl.bfloat16)
    rest = a - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b)))


@triton.jit
def weight_kernel(
    left,  # a(x), (M, K)
    dy,  # (M, N)
    weight,  # (n, k) by strides
    gate,  # (g, r, c) by strides
    begins,  # int64 (G + 1): where the rows of each gate begin
    order,  # int64: the groups of rows by gate; or None
    sums,  # (splits, N, K), contiguous: gradient of the weight
    dgate,  # float32 (G * CHUNKS, tiles of n + C, tiles of k + R): the part of it that a tile has
    left_stride,
    dy_stride,
    weight_strides,
    gate_strides,
    group_rows,
    segments,  # G * CHUNKS
    split_segments,
    CHUNKS: tl.constexpr,  # that the rows of a gate are cut into
    R: tl.constexpr,
    KR: tl.constexpr,
    C: tl.constexpr,
    KC: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU_LEFT: tl.constexpr,
    ORDERED: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    WANT_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two: blocks that a tile may meet in a direction
):
    K: tl.constexpr = R * KR
    N: tl.constexpr = C * KC
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    tile_k = pid % TILES_K
    tile_n = pid // TILES_K % TILES_N
    split = (pid // (TILES_K * TILES_N)).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    inside_n = n < N
    inside_k = k < K
    c = n // KC
    r = k // KR
    mask = inside_n[:, None] & inside_k[None, :]
    blocks = tl.arange(0, PARTS)
    first_c = tile_n * BLOCK_N // KC
    first_r = tile_k * BLOCK_K // KR
    if WANT_GATE:
        of_r = (r[:, None] - first_r == blocks[None, :]).to(tl.bfloat16)
        of_c = (c[:, None] - first_c == blocks[None, :]).to(tl.bfloat16)

    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for segment in range(split * split_segments, tl.minimum((split + 1) * split_segments, segments)):
        g = segment // CHUNKS
        begin = tl.load(begins + g)
        end = tl.load(begins + g + 1)
        size = tl.cdiv(end - begin, CHUNKS)
        begin += segment % CHUNKS * size
        end = tl.minimum(begin + size, end)
        part = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(begin, end, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            inside_m = m < end
            if ORDERED:
                m = tl.load(order + m // group_rows, mask=inside_m, other=0) * group_rows + m % group_rows
            d = tl.load(dy + m[:, None] * dy_stride + n[None, :], mask=inside_m[:, None] & inside_n[None, :], other=0.0)
            a = tl.load(left + m[:, None] * left_stride + k[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0)
            if RELU_LEFT:
                a = _relu(a)
            part = tl.dot(tl.trans(d), a, part, input_precision=PRECISION)
        if WANT_WEIGHT:
            factor = tl.load(
                gate + g * gate_strides[0] + r[None, :] * gate_strides[1] + c[:, None] * gate_strides[2], mask=mask, other=0.0
            ).to(tl.float32)
            if RESIDUAL:
                factor += 1.0
            # A gate without rows has no part in the sum, whatever it is.
            acc += tl.where(begin < end, part * factor, 0.0)
        if WANT_GATE:
            weight_at = weight + n[:, None].to(tl.int64) * weight_strides[0] + k[None, :].to(tl.int64) * weight_strides[1]
            w = tl.load(weight_at, mask=mask, other=0.0).to(tl.float32)  # again: it would fill the registers
            by_r = _dot_exact(part * w, of_r)  # (BLOCK_N, PARTS)
            by_block = _dot_exact(tl.trans(by_r), of_c)  # r, c
            at = (segment * (TILES_N + C) + tile_n + first_c + blocks[None, :]) * (TILES_K + R)
            at += tile_k + first_r + blocks[:, None]
            last_c = tl.minimum(tile_n * BLOCK_N + BLOCK_N, N) - 1
            last_r = tl.minimum(tile_k * BLOCK_K + BLOCK_K, K) - 1
            met = (first_c + blocks <= last_c // KC)[None, :] & (first_r + blocks <= last_r // KR)[:, None]
            tl.store(dgate + at, by_block, mask=met)
    if WANT_WEIGHT:
        at = split * N * K + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(sums + at, acc.to(sums.dtype.element_ty), mask=mask)


@triton.jit
def gate_sum_kernel(
    parts,  # of weight_kernel
    out,  # float32 (G, R, C), contiguous
    CHUNKS: tl.constexpr,
    R: tl.constexpr,
    KR: tl.constexpr,
    C: tl.constexpr,
    KC: tl.constexpr,
    TILES_N: tl.constexpr,
    TILES_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a gate from what the tiles that its block lies in have of it, in order."""
    BLOCKS: tl.constexpr = (R * C + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    g = (pid // BLOCKS).to(tl.int64)
    i = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = i < R * C
    r = i // C
    c = i % C
    total = tl.zeros([BLOCK], tl.float32)
    first_n = c * KC // BLOCK_N
    last_n = (c * KC + KC - 1) // BLOCK_N
    first_k = r * KR // BLOCK_K
    last_k = (r * KR + KR - 1) // BLOCK_K
    for chunk in range(CHUNKS):
        for tile_n in range((KC - 2 + BLOCK_N) // BLOCK_N + 1):
            for tile_k in range((KR - 2 + BLOCK_K) // BLOCK_K + 1):
                met = inside & (first_n + tile_n <= last_n) & (first_k + tile_k <= last_k)
                at = ((g * CHUNKS + chunk) * (TILES_N + C) + first_n + tile_n + c) * (TILES_K + R) + first_k + tile_k + r
                total += tl.load(parts + at, mask=met, other=0.0)
    tl.store(out + g * R * C + i, total, mask=inside)


@triton.jit
def gate_kernel(row, column, out, row_strides, column_strides, R: tl.constexpr, C: tl.constexpr, total, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    g = i // (R * C)
    u = tl.load(row + g * row_strides[0] + i // C % R * row_strides[1], mask=inside, other=0.0).to(tl.float32)
    v = tl.load(column + g * column_strides[0] + i % C * column_strides[1], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, tl.sigmoid(u * v).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_backward_kernel(
    dgate,
    row,
    column,
    out,  # float32 (groups, R): the gradient of `row`
    dgate_strides,
    row_strides,
    column_strides,
    gates,  # that `out` sums over: all, or one
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """drow = sum over columns (and, where row is shared, gates) of dgate s (1 - s) column; of columns with roles exchanged."""
    BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    group = (pid // BLOCKS).to(tl.int64)
    r = pid % BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in range(gates):
        g = group * gates + i
        u = tl.load(row + g * row_strides[0] + r * row_strides[1], mask=r < R, other=0.0).to(tl.float32)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            mask = (r < R)[:, None] & (c < C)[None, :]
            v = tl.load(column + g * column_strides[0] + c * column_strides[1], mask=c < C, other=0.0).to(tl.float32)
            at = g * dgate_strides[0] + r[:, None] * dgate_strides[1] + c[None, :] * dgate_strides[2]
            d = tl.load(dgate + at, mask=mask, other=0.0).to(tl.float32)
            s = tl.sigmoid(u[:, None] * v[None, :])
            acc += d * (s * tl.sigmoid(-u[:, None] * v[None, :])) * v[None, :]
    tl.store(out + group * R + r, tl.sum(acc, 1), mask=r < R)


# --- Launchers ------------------------------------------------------------------------------------------------------------


def _dense_rows(t) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _fit(width: int, sizes: tuple) -> int:
    """The size whose multiples exceed `width` least, each next of `sizes` taken as a tenth dearer than the one before."""
    return min(sizes, key=lambda size: ceil_div(width, size) * size * 1.1 ** sizes.index(size))


def _mode(group_rows: int, kp: int, kq: int) -> int:
    """README.md compares the ways; groups of few rows have no choice."""
    if group_rows < 16:
        return BY_ROW.value
    return LEFT.value if kp < 64 and kq > kp else BY_COLUMN.value


def _product_tile(mode: int, rows: int, group_rows: int, kp: int, kq: int, n: int, dtype) -> dict:
    narrow = dtype == torch.float32
    block_n = _fit(n if mode == BY_COLUMN.value else kq, (64, 32, 16) if narrow else (128, 64, 32, 16))
    block_m = _fit(rows if mode == BY_ROW.value else group_rows, (64, 32, 16) if narrow else (128, 64, 32, 16))
    block_k = (32 if narrow else 64) if mode == LEFT.value else _fit(kp, (32, 16) if narrow else (64, 32, 16))
    warps = 8 if block_m * block_n > 64 * 128 or (narrow and block_m * block_n > 32 * 64) else 4
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=3)


def _activated(x, activation, dropout_p, seed):
    """(left operand, whether the kernels still have to take its ReLU): what is more than a ReLU is made once."""
    if activation in (0, 1) and seed is None:
        return x, activation == 1
    rows, columns = x.shape
    out = x.new_empty(rows, columns)
    block = min(triton.next_power_of_2(columns), 4096 if _backends.INTERPRET else 512)
    own = max(1, (65536 if _backends.INTERPRET else 2048) // block)
    activate_kernel[(ceil_div(rows, own) * ceil_div(columns, block),)](
        x,
        out,
        seed,
        x.stride(0),
        rows,
        columns,
        threshold(dropout_p),
        1.0 / (1.0 - dropout_p),
        ACTIVATION=activation,
        DROPOUT=seed is not None,
        ROWS=own,
        BLOCK=block,
        num_warps=4,
    )
    return out, False


def _product(left, right, gate, index, bias, x, seed, rows_per_gate, residual, relu, gradient, activation, dropout_p):
    """sum over p of factor (left_p right_p^T); `right` (n, k) and `gate` (g, p, q) as views."""
    rows, n = left.shape[0], right.shape[0]
    out = left.new_empty(rows, n)
    shared = gate.shape[0] == 1 and index is None
    group_rows = rows if shared else rows_per_gate
    _, p, q = gate.shape
    kp, kq = right.shape[1] // p, n // q
    mode = _mode(group_rows, kp, kq)
    tile = _product_tile(mode, rows, group_rows, kp, kq, n, left.dtype)
    if mode == BY_ROW.value:
        tiles = ceil_div(rows, tile["BLOCK_M"])
    else:
        tiles = rows // group_rows * ceil_div(group_rows, tile["BLOCK_M"])
    tiles *= ceil_div(n, tile["BLOCK_N"]) if mode == BY_COLUMN.value else q * ceil_div(kq, tile["BLOCK_N"])
    product_kernel[(tiles,)](
        left,
        right,
        gate,
        index,
        bias,
        x,
        seed,
        out,
        left.stride(0),
        right.stride(),
        gate.stride(),
        0 if bias is None else bias.stride(0),
        0 if x is None else x.stride(0),
        rows,
        group_rows,
        gate.shape[0],
        threshold(dropout_p),
        1.0 / (1.0 - dropout_p),
        P=p,
        KP=kp,
        Q=q,
        KQ=kq,
        MODE=mode,
        RESIDUAL=residual,
        INDEXED=index is not None,
        BIASED=bias is not None,
        RELU_LEFT=relu,
        GRADIENT=gradient,
        ACTIVATION=activation,
        DROPOUT=seed is not None,
        PRECISION=input_precision(left.dtype),
        **tile,
    )
    return out


def hypergrid_fwd(x, weight, gate, bias, index, rows_per_gate, residual, activation, dropout_p, seed):
    """`mmkernels_triton::hypergrid_fwd`; csrc/schemas.h has the contract."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    with torch.cuda.device_of(x):
        left, relu = _activated(_dense_rows(x), activation, dropout_p, seed)
        return _product(left, weight, gate, index, bias, None, None, rows_per_gate, residual, relu, False, 0, 0.0)


def hypergrid_bwd(
    dy,
    x,
    weight,
    gate,
    index,
    rows_per_gate,
    residual,
    activation,
    dropout_p,
    seed,
    want_x,
    want_weight,
    want_gate,
    want_bias,
):
    """`mmkernels_triton::hypergrid_bwd`; csrc/schemas.h has the contract."""
    n, k = weight.shape
    dx = x.new_empty(x.shape if want_x else (0,))
    dweight = x.new_empty((n, k) if want_weight else (0,))
    dgate = x.new_empty(gate.shape if want_gate else (0,), dtype=torch.float32)
    x, dy = _dense_rows(x), _dense_rows(dy)
    dbias = dy.sum(0, dtype=torch.float32) if want_bias else x.new_empty(0, dtype=torch.float32)
    if x.shape[0] == 0:
        return dx, dweight.zero_(), dgate.zero_(), dbias
    with torch.cuda.device_of(x):
        if want_x:
            turned = gate.transpose(1, 2)
            dx = _product(
                dy, weight.t(), turned, index, None, x, seed, rows_per_gate, residual, False, True, activation, dropout_p
            )
        if want_weight or want_gate:
            left, relu = _activated(x, activation, dropout_p, seed)
            _weight(left, relu, dy, weight, gate, index, rows_per_gate, residual, dweight, dgate)
    return dx, dweight, dgate, dbias


def _weight_tile(dtype) -> dict:
    if dtype == torch.float32:
        return dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=2)
    return dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)


def runs_of_gates(index, gates, groups, rows_per_gate, device):
    """(begins (G + 1), order or None): the rows of each gate, once the groups of rows are in the order of their gates."""
    numbers = torch.arange(gates + 1, device=device)
    if index is None:
        return (numbers * (groups if gates == 1 else 1) * rows_per_gate, None)
    ordered, order = torch.sort(index, stable=True)
    return torch.searchsorted(ordered, numbers) * rows_per_gate, order


def _weight(left, relu, dy, weight, gate, index, rows_per_gate, residual, dweight, dgate):
    rows, k = left.shape
    n = dy.shape[1]
    gates, r, c = gate.shape
    tile = _weight_tile(left.dtype)
    tiles_n, tiles_k = ceil_div(n, tile["BLOCK_N"]), ceil_div(k, tile["BLOCK_K"])
    splits = split_count(tiles_n * tiles_k, ceil_div(rows, tile["BLOCK_M"]), left.device, tile["num_warps"])
    chunks = ceil_div(splits, gates)
    segments = gates * chunks
    split_segments = ceil_div(segments, splits)
    splits = ceil_div(segments, split_segments)
    want_weight, want_gate = dweight.numel() > 0, dgate.numel() > 0
    begins, order = runs_of_gates(index, gates, rows // rows_per_gate, rows_per_gate, left.device)
    sums = dweight if splits == 1 else left.new_empty(splits if want_weight else 0, n, k, dtype=torch.float32)
    parts = left.new_empty(segments if want_gate else 0, tiles_n + c, tiles_k + r, dtype=torch.float32)
    kr, kc = k // r, n // c
    most = max(ceil_div(tile["BLOCK_N"] - 1, kc), ceil_div(tile["BLOCK_K"] - 1, kr)) + 1
    weight_kernel[(splits * tiles_n * tiles_k,)](
        left,
        dy,
        weight,
        gate,
        begins,
        order,
        sums,
        parts,
        left.stride(0),
        dy.stride(0),
        weight.stride(),
        gate.stride(),
        rows_per_gate,
        segments,
        split_segments,
        CHUNKS=chunks,
        R=r,
        KR=kr,
        C=c,
        KC=kc,
        RESIDUAL=residual,
        RELU_LEFT=relu,
        ORDERED=order is not None,
        WANT_WEIGHT=want_weight,
        WANT_GATE=want_gate,
        PRECISION=input_precision(left.dtype),
        PARTS=max(16, triton.next_power_of_2(most)),
        **tile,
    )
    if want_weight and splits > 1:
        total = dweight if dweight.dtype == torch.float32 else dweight.new_empty(n, k, dtype=torch.float32)
        sum_rows(sums.view(splits, n * k), total.view(1, n * k))
        dweight.copy_(total)
    if want_gate:
        block = 1024
        gate_sum_kernel[(gates * ceil_div(r * c, block),)](
            parts,
            dgate,
            CHUNKS=chunks,
            R=r,
            KR=kr,
            C=c,
            KC=kc,
            TILES_N=tiles_n,
            TILES_K=tiles_k,
            BLOCK_N=tile["BLOCK_N"],
            BLOCK_K=tile["BLOCK_K"],
            BLOCK=block,
            num_warps=4,
        )


def _shared_strides(t) -> tuple:
    """Strides of a factor whose first dimension may be shared."""
    return (0 if t.shape[0] == 1 else t.stride(0), t.stride(1))


def hypergrid_gate_fwd(row, column):
    """`mmkernels_triton::hypergrid_gate_fwd`; csrc/schemas.h has the contract."""
    gates = row.shape[0] if column.shape[0] == 1 else column.shape[0]
    out = row.new_empty(gates, row.shape[1], column.shape[1])
    if out.numel() == 0:
        return out
    block = 65536 if _backends.INTERPRET else 1024
    with torch.cuda.device_of(row):
        gate_kernel[(ceil_div(out.numel(), block),)](
            row,
            column,
            out,
            _shared_strides(row),
            _shared_strides(column),
            R=row.shape[1],
            C=column.shape[1],
            total=out.numel(),
            BLOCK=block,
            num_warps=4,
        )
    return out


def hypergrid_gate_bwd(dgate, row, column):
    """`mmkernels_triton::hypergrid_gate_bwd`; csrc/schemas.h has the contract."""
    gates = dgate.shape[0]
    results = []
    for ours, other, incoming in ((row, column, dgate), (column, row, dgate.transpose(1, 2))):
        out = ours.new_empty(ours.shape, dtype=torch.float32)
        results.append(out)
        if gates == 0:
            out.zero_()
            continue
        size, width = ours.shape[1], other.shape[1]
        block_r, block_c = min(64, triton.next_power_of_2(size)), min(64, triton.next_power_of_2(width))
        with torch.cuda.device_of(row):
            gate_backward_kernel[(out.shape[0] * ceil_div(size, block_r),)](
                incoming,
                ours,
                other,
                out,
                incoming.stride(),
                _shared_strides(ours),
                _shared_strides(other),
                gates // out.shape[0],
                C=width,
                R=size,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                num_warps=4,
            )
    return tuple(results)


# --- For the kernel report ------------------------------------------------------------------------------------------------

_CODES = {"float32": "fp32", "bfloat16": "bf16"}


def _report_case(name, kernel, dtype, capability, tile, **constexprs) -> ReportCase:
    """A kernel for aligned rows whose widths are multiples of 16."""
    tile = dict(tile)
    options = {"num_warps": tile.pop("num_warps"), "num_stages": tile.pop("num_stages", 3)}
    values = constexprs | tile
    absent = {"index": "INDEXED", "order": "ORDERED", "bias": "BIASED", "x": "GRADIENT", "seed": "DROPOUT"}
    values |= {a: None for a, flag in absent.items() if flag in values and not values[flag]}
    values |= {f"{a}_stride": 1 for a in ("bias",)}
    code, signature, final = f"*{_CODES[dtype]}", {}, {}
    pointers = {"index": "*i64", "order": "*i64", "begins": "*i64", "seed": "*i64", "dgate": "*fp32", "sums": "*fp32"}
    pointers |= dict.fromkeys(("left", "right", "dy", "weight", "gate", "bias", "x", "out", "row", "column"), code)
    for place, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument] = "constexpr"
            final[argument] = values[argument]
        elif argument in ("right_strides", "weight_strides"):
            unit = 0 if argument == "right_strides" and constexprs["GRADIENT"] else 1  # of the gradient: the weight turned
            signature[argument] = ("constexpr", "i32:16") if unit == 0 else ("i32:16", "constexpr")
            final[place, unit] = 1
        elif argument == "gate_strides":
            signature[argument] = ("i32:16", "i32", "i32")
        elif argument == "gain":
            signature[argument] = "fp32"
        elif argument.endswith("_stride"):
            signature[argument] = "i32:16"
        else:
            signature[argument] = pointers.get(argument, "i64" if argument == "threshold" else "i32")
    return ReportCase(f"hypergrid_{name} {dtype}", kernel, signature, final, options, capability)


def report_cases():
    """T5-base's second matrix with blocks of 96 x 24 in every mode, for the report that compiles kernels without a GPU."""
    r, kr, c, kc = 32, 96, 32, 24
    for capability in (80, 90, 100):
        for code in _CODES:
            dtype = getattr(torch, code)
            shared = dict(RESIDUAL=True, PRECISION=input_precision(dtype))
            forward = dict(P=r, KP=kr, Q=c, KQ=kc, GRADIENT=False, ACTIVATION=0, DROPOUT=False, BIASED=True, RELU_LEFT=True)
            backward = dict(P=c, KP=kc, Q=r, KQ=kr, GRADIENT=True, BIASED=False, RELU_LEFT=False)
            for name, rows, passes in (
                ("fwd", 512, forward | dict(INDEXED=False)),
                ("fwd 1 row", 1, forward | dict(INDEXED=True)),
                ("bwd_x relu", 512, backward | dict(ACTIVATION=RELU.value, DROPOUT=False, INDEXED=False)),
                ("bwd_x gelu dropout", 512, backward | dict(ACTIVATION=GELU.value, DROPOUT=True, INDEXED=True)),
            ):
                mode = _mode(rows, passes["KP"], passes["KQ"])
                tile = _product_tile(mode, 128, rows, passes["KP"], passes["KQ"], passes["Q"] * passes["KQ"], dtype)
                yield _report_case(name, product_kernel, code, capability, tile, MODE=mode, **passes, **shared)
            grid = dict(CHUNKS=1, R=r, KR=kr, C=c, KC=kc, RELU_LEFT=True, WANT_WEIGHT=True, WANT_GATE=True, PARTS=16)
            tile = _weight_tile(dtype)
            yield _report_case("bwd_weight", weight_kernel, code, capability, tile, ORDERED=True, **grid, **shared)


# --- Registration ---------------------------------------------------------------------------------------------------------

_OPTIONS = "Tensor? index, SymInt rows_per_gate, bool residual, int activation, float dropout_p, Tensor? seed"
_SCHEMAS = {
    hypergrid_fwd: f"(Tensor x, Tensor weight, Tensor gate, Tensor? bias, {_OPTIONS}) -> Tensor",
    hypergrid_bwd: f"(Tensor dy, Tensor x, Tensor weight, Tensor gate, {_OPTIONS}, bool want_x, bool want_weight, "
    "bool want_gate, bool want_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    hypergrid_gate_fwd: "(Tensor row, Tensor column) -> Tensor",
    hypergrid_gate_bwd: "(Tensor dgate, Tensor row, Tensor column) -> (Tensor, Tensor)",
}
for _function, _schema in _SCHEMAS.items():
    _name = f"mmkernels_triton::{_function.__name__}"
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_name, ("cpu", "cuda"), _function)
attach_fakes("mmkernels_triton")

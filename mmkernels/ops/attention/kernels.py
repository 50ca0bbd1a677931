"""Triton kernels of the `attention` family and the ops `mmkernels_triton::attention_{fwd,bwd}`.

README.md beside this file derives the mathematics and counts the work. Three kernels do it: `forward_kernel`;
`backward_kernel`, which serves both sides, because dq and (dk, dv) are the same walk with the roles of queries and keys
exchanged; `bias_kernel`, which reduces the gradient of a broadcast bias. With 16-bit inputs scores are kept in base 2, so
that an exponential is one instruction; with float32 in base e, because the saved lse is, and converting it would round it.

Sizes: B batch, H heads, N queries, M keys, D and E head dims of q, k and of v. A "pair" is one (b, h). A head dim is
covered by `D1 * D_STEPS + D2` columns (see `cover`): D_STEPS = 1 keeps a whole row of chunks on chip, more of them are looped
over.
"""

import torch
import triton
import triton.language as tl

from ... import _backends, _tuning
from .._shared import dropout
from .._shared.kernels import (
    LN_2,
    LOG2_E,
    ReportCase,
    aligned,
    cover,
    dropout_keep,
    dropout_row,
    input_precision,
    load_tile,
    merge_splits,
    pair_base,
    split_count,
    store_tile,
    sum_splits,
)
from .._shared.registration import attach_fakes

# --- Pieces ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _looped_product(
    a,
    a_rows,
    a_strides,
    a_inside,
    b,
    b_rows,
    b_strides,
    b_inside,
    DIM: tl.constexpr,
    FIRST: tl.constexpr,
    STEPS: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[a_rows] b[b_rows]^T over a head dim that is too wide to be held: one chunk at a time, float32."""
    CHECK: tl.constexpr = DIM < FIRST * STEPS
    product = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for step in range(STEPS):
        a_tile = load_tile(a, a_rows, a_strides[2], a_inside, step * FIRST, FIRST, DIM, CHECK)
        b_tile = load_tile(b, b_rows, b_strides[2], b_inside, step * FIRST, FIRST, DIM, CHECK)
        product = tl.dot(a_tile, tl.trans(b_tile), product, input_precision=PRECISION)
    if SECOND > 0:
        a_tile = load_tile(a, a_rows, a_strides[2], a_inside, FIRST * STEPS, SECOND, DIM, True)
        b_tile = load_tile(b, b_rows, b_strides[2], b_inside, FIRST * STEPS, SECOND, DIM, True)
        product = tl.dot(a_tile, tl.trans(b_tile), product, input_precision=PRECISION)
    return product


@triton.jit
def _visible(key_mask, mask_stride, m, inside, HAS_MASK: tl.constexpr):
    """Which of the keys m may be attended."""
    if HAS_MASK:
        return tl.load(key_mask + m.to(tl.int64) * mask_stride, mask=inside, other=0) != 0
    return inside


@triton.jit
def _exp(x, BASE2: tl.constexpr):
    return tl.exp2(x) if BASE2 else tl.exp(x)


@triton.jit
def _scores(product, scale, bias, n, m, bias_strides, inside, visible, HAS_BIAS: tl.constexpr, BASE2: tl.constexpr):
    """Scores from q k^T; n, m, `inside` (may be read) and `visible` (may be attended) broadcast to the tile."""
    scores = product * scale
    if HAS_BIAS:
        offsets = n.to(tl.int64) * bias_strides[2] + m.to(tl.int64) * bias_strides[3]
        added = tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)
        scores += added * LOG2_E if BASE2 else added
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _statistics(statistics, queries, n, inside):
    """lse and delta of the queries n; lse = +inf, so P = 0, where there is no query."""
    lse = tl.load(statistics + n, mask=inside, other=float("inf"))
    return lse, tl.load(statistics + queries + n, mask=inside, other=0.0)


# --- Forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    key_mask,
    bias,
    seed,
    out,  # (B,H,N,E) contiguous; with splits the float32 sums (splits,B,H,N,E)
    lse,  # (B,H,N) contiguous; with splits the sums of exp2(score - top), (splits,B,H,N)
    top,  # with splits the largest scores, (splits,B,H,N)
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    bias_strides,
    pairs,
    heads,
    queries,
    keys,
    split_keys,  # keys that one split walks, a multiple of BLOCK_M
    scale,  # in base 2 times log2(e), rounded once
    keep_scale,
    threshold,
    D: tl.constexpr,
    D1: tl.constexpr,
    D_STEPS: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    E1: tl.constexpr,
    E_STEPS: tl.constexpr,  # more than one: each program has one chunk of the value columns, and computes the scores again
    E2: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of queries of one pair walks its split of the keys with an online softmax."""
    BASE2: tl.constexpr = k.dtype.element_ty != tl.float32
    D1_CHECK: tl.constexpr = D < D1 * D_STEPS
    E1_CHECK: tl.constexpr = E < E1 * E_STEPS
    E_BLOCKS: tl.constexpr = 1 if E_STEPS == 1 else (E + E1 - 1) // E1
    query_tiles = tl.cdiv(queries, BLOCK_N)
    pid = tl.program_id(0)
    e = (pid % E_BLOCKS) * E1
    pid = pid // E_BLOCKS
    n = (pid % query_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // query_tiles
    pair, split = (pid % pairs).to(tl.int64), (pid // pairs).to(tl.int64)
    batch, head = pair // heads, pair % heads
    q = pair_base(q, q_strides, batch, head)
    k = pair_base(k, k_strides, batch, head)
    v = pair_base(v, v_strides, batch, head)
    if HAS_MASK:
        key_mask += batch * mask_strides[0]
    if HAS_BIAS:
        bias += batch * bias_strides[0] + head * bias_strides[1]
    n_inside = n < queries
    if DROPOUT:
        low, high = dropout_row(tl.load(seed), pair * queries + n)

    if D_STEPS == 1:
        q1 = load_tile(q, n, q_strides[2], n_inside, 0, D1, D, D1_CHECK)
        if D2 > 0:
            q2 = load_tile(q, n, q_strides[2], n_inside, D1, D2, D, True)
    m_top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc1 = tl.zeros([BLOCK_N, E1], tl.float32)
    if E2 > 0 and E_STEPS == 1:
        acc2 = tl.zeros([BLOCK_N, E2], tl.float32)

    begin = (split * split_keys).to(tl.int32)
    for start in range(begin, tl.minimum(begin + split_keys, keys), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        m_inside = m < keys
        visible = _visible(key_mask, mask_strides[1], m, m_inside, HAS_MASK)
        if D_STEPS == 1:
            k1 = load_tile(k, m, k_strides[2], visible, 0, D1, D, D1_CHECK)
            product = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            if D2 > 0:
                k2 = load_tile(k, m, k_strides[2], visible, D1, D2, D, True)
                product = tl.dot(q2, tl.trans(k2), product, input_precision=PRECISION)
        else:
            product = _looped_product(q, n, q_strides, n_inside, k, m, k_strides, visible, D, D1, D_STEPS, D2, PRECISION)
        inside = n_inside[:, None] & m_inside[None, :]
        n_, m_, visible_ = n[:, None], m[None, :], visible[None, :]
        scores = _scores(product, scale, bias, n_, m_, bias_strides, inside, visible_, HAS_BIAS, BASE2)

        m_new = tl.maximum(m_top, tl.max(scores, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key seen yet: exp(-inf - 0) is the 0 we want
        weights = _exp(scores - shift[:, None], BASE2)
        fade = _exp(m_top - shift, BASE2)
        m_top = m_new
        total = total * fade + tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(dropout_keep(low[:, None], high[:, None], m[None, :], threshold), weights, 0.0)
        weights = weights.to(v.dtype.element_ty)
        v1 = load_tile(v, m, v_strides[2], visible, e, E1, E, E1_CHECK)
        acc1 = tl.dot(weights, v1, acc1 * fade[:, None], input_precision=PRECISION)
        if E2 > 0 and E_STEPS == 1:
            v2 = load_tile(v, m, v_strides[2], visible, E1, E2, E, True)
            acc2 = tl.dot(weights, v2, acc2 * fade[:, None], input_precision=PRECISION)

    row = (split * pairs + pair) * queries
    if SPLIT:
        gain = tl.full([BLOCK_N], 1.0, tl.float32) * keep_scale
        if e == 0:
            tl.store(top + row + n, m_top, mask=n_inside)
            tl.store(lse + row + n, total, mask=n_inside)
    else:
        total = tl.where(total == 0.0, 1.0, total)  # a row without keys: 0 / 1, and log(1) + -inf
        gain = keep_scale / total
        if e == 0:
            logarithm = (m_top + tl.log2(total)) * LN_2 if BASE2 else m_top + tl.log(total)
            tl.store(lse + row + n, logarithm, mask=n_inside)
    store_tile(out + row * E, n, E, n_inside, e, acc1 * gain[:, None], E)
    if E2 > 0 and E_STEPS == 1:
        store_tile(out + row * E, n, E, n_inside, E1, acc2 * gain[:, None], E)


# --- Backward -------------------------------------------------------------------------------------------------------------


@triton.jit
def statistics_kernel(
    out,
    dout,
    lse,
    dlse,
    statistics,  # float32 (pairs, 2, queries)
    out_strides,
    dout_strides,
    dlse_strides,
    heads,
    queries,
    rows,
    E: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What the backward needs of a row: lse in the base of the scores and delta = sum_e dout * out - dlse.

    Rows without keys get lse = +inf and delta = 0, which makes their P and dS zero.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    batch, head, n = row // queries // heads, row // queries % heads, row % queries
    out_row = batch * out_strides[0] + head * out_strides[1] + n * out_strides[2]
    dout_row = batch * dout_strides[0] + head * dout_strides[1] + n * dout_strides[2]
    delta = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        mask = inside[:, None] & (e < E)[None, :]
        a = tl.load(out + out_row[:, None] + e.to(tl.int64)[None, :] * out_strides[3], mask=mask, other=0.0)
        b = tl.load(dout + dout_row[:, None] + e.to(tl.int64)[None, :] * dout_strides[3], mask=mask, other=0.0)
        delta += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if HAS_DLSE:
        offsets = batch * dlse_strides[0] + head * dlse_strides[1] + n * dlse_strides[2]
        delta -= tl.load(dlse + offsets, mask=inside, other=0.0).to(tl.float32)
    lse_row = tl.load(lse + row, mask=inside, other=0.0)
    empty = lse_row == float("-inf")
    target = statistics + row // queries * queries + row
    if out.dtype.element_ty != tl.float32:
        lse_row *= LOG2_E
    tl.store(target, tl.where(empty, float("inf"), lse_row), mask=inside)
    tl.store(target + queries, tl.where(empty, 0.0, delta), mask=inside)


@triton.jit
def backward_kernel(
    a,  # q, or k where OWN_KEYS
    a2,  # dout, or v
    b,  # k, or q
    b2,  # v, or dout
    key_mask,
    bias,
    seed,
    statistics,
    da,  # dq, or dk: contiguous; with splits float32 (splits, ...)
    da2,  # dv where OWN_KEYS
    a_strides,
    a2_strides,
    b_strides,
    b2_strides,
    mask_strides,
    bias_strides,
    pairs,
    heads,
    own_count,
    other_count,
    split_others,  # rows of the other side that one split walks, a multiple of BLOCK_OTHER
    scale,  # in base 2 times log2(e), rounded once
    keep_scale,
    threshold,
    D: tl.constexpr,
    D1: tl.constexpr,
    D_STEPS: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    E1: tl.constexpr,
    E_STEPS: tl.constexpr,
    E2: tl.constexpr,
    OUT: tl.constexpr,  # columns of the gradient that a program sums where D_STEPS, or E_STEPS, is more than one
    OWN_KEYS: tl.constexpr,
    FIRST: tl.constexpr,  # whether da is computed
    SECOND: tl.constexpr,  # whether da2 is; both at once only where whole rows are held
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """A tile of one side walks the other side: da = scale dS b and, for keys, da2 = P b2.

    With x the own and y the other index: P_xy = exp(S_xy - lse), dP = a2 b2^T, dS = P (dP - delta). lse and delta belong
    to the queries, the mask to the keys.
    """
    BASE2: tl.constexpr = b.dtype.element_ty != tl.float32
    D1_CHECK: tl.constexpr = D < D1 * D_STEPS
    E1_CHECK: tl.constexpr = E < E1 * E_STEPS
    DO: tl.constexpr = D1 if D_STEPS == 1 else OUT
    EO: tl.constexpr = E1 if E_STEPS == 1 else OUT
    D_BLOCKS: tl.constexpr = (D + DO - 1) // DO if FIRST and D_STEPS > 1 else 1
    E_BLOCKS: tl.constexpr = (E + EO - 1) // EO if SECOND and E_STEPS > 1 else 1
    own_tiles = tl.cdiv(own_count, BLOCK_OWN)
    pid = tl.program_id(0)
    block = pid % (D_BLOCKS * E_BLOCKS)
    pid = pid // (D_BLOCKS * E_BLOCKS)
    x = (pid % own_tiles) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    pid = pid // own_tiles
    pair, split = (pid % pairs).to(tl.int64), (pid // pairs).to(tl.int64)
    batch, head = pair // heads, pair % heads
    a = pair_base(a, a_strides, batch, head)
    a2 = pair_base(a2, a2_strides, batch, head)
    b = pair_base(b, b_strides, batch, head)
    b2 = pair_base(b2, b2_strides, batch, head)
    if HAS_MASK:
        key_mask += batch * mask_strides[0]
    if HAS_BIAS:
        bias += batch * bias_strides[0] + head * bias_strides[1]
    queries = other_count if OWN_KEYS else own_count
    statistics += pair * 2 * queries

    x_inside = x < own_count
    if OWN_KEYS:
        x_read = _visible(key_mask, mask_strides[1], x, x_inside, HAS_MASK)
    else:
        x_read = x_inside
        x_lse, x_delta = _statistics(statistics, queries, x, x_inside)
        row_lse, row_delta = x_lse[:, None], x_delta[:, None]
        if DROPOUT:
            low, high = dropout_row(tl.load(seed), pair * queries + x)
            low, high = low[:, None], high[:, None]
    if D_STEPS == 1:
        a_1 = load_tile(a, x, a_strides[2], x_read, 0, D1, D, D1_CHECK)
        if D2 > 0:
            a_2 = load_tile(a, x, a_strides[2], x_read, D1, D2, D, True)
    if FIRST and E_STEPS == 1:
        a2_1 = load_tile(a2, x, a2_strides[2], x_read, 0, E1, E, E1_CHECK)
        if E2 > 0:
            a2_2 = load_tile(a2, x, a2_strides[2], x_read, E1, E2, E, True)
    if FIRST:
        da_1 = tl.zeros([BLOCK_OWN, DO], tl.float32)
        if D2 > 0 and D_STEPS == 1:
            da_2 = tl.zeros([BLOCK_OWN, D2], tl.float32)
    if SECOND:
        da2_1 = tl.zeros([BLOCK_OWN, EO], tl.float32)
        if E2 > 0 and E_STEPS == 1:
            da2_2 = tl.zeros([BLOCK_OWN, E2], tl.float32)

    begin = (split * split_others).to(tl.int32)
    for start in range(begin, tl.minimum(begin + split_others, other_count), BLOCK_OTHER):
        y = start + tl.arange(0, BLOCK_OTHER)
        y_inside = y < other_count
        inside = x_inside[:, None] & y_inside[None, :]
        if OWN_KEYS:
            y_read = y_inside
            y_lse, y_delta = _statistics(statistics, queries, y, y_inside)
            row_lse, row_delta = y_lse[None, :], y_delta[None, :]
            n, m, visible = y[None, :], x[:, None], x_read[:, None]
            if DROPOUT:
                low, high = dropout_row(tl.load(seed), pair * queries + y)
                low, high = low[None, :], high[None, :]
        else:
            y_read = _visible(key_mask, mask_strides[1], y, y_inside, HAS_MASK)
            n, m, visible = x[:, None], y[None, :], y_read[None, :]

        if D_STEPS == 1:
            b_1 = load_tile(b, y, b_strides[2], y_read, 0, D1, D, D1_CHECK)
            product = tl.dot(a_1, tl.trans(b_1), input_precision=PRECISION)
            if D2 > 0:
                b_2 = load_tile(b, y, b_strides[2], y_read, D1, D2, D, True)
                product = tl.dot(a_2, tl.trans(b_2), product, input_precision=PRECISION)
        else:
            product = _looped_product(a, x, a_strides, x_read, b, y, b_strides, y_read, D, D1, D_STEPS, D2, PRECISION)
        scores = _scores(product, scale, bias, n, m, bias_strides, inside, visible, HAS_BIAS, BASE2)
        weights = _exp(scores - row_lse, BASE2)
        if DROPOUT:
            kept = tl.where(dropout_keep(low, high, m, threshold), keep_scale, 0.0)

        if SECOND:
            dropped = weights
            if DROPOUT:
                dropped = weights * kept
            dropped = dropped.to(b2.dtype.element_ty)
            if E_STEPS == 1:
                b2_1 = load_tile(b2, y, b2_strides[2], y_read, 0, E1, E, E1_CHECK)
            else:
                b2_1 = load_tile(b2, y, b2_strides[2], y_read, block * EO, EO, E, E % EO != 0)
            da2_1 = tl.dot(dropped, b2_1, da2_1, input_precision=PRECISION)
            if E2 > 0 and E_STEPS == 1:
                b2_2 = load_tile(b2, y, b2_strides[2], y_read, E1, E2, E, True)
                da2_2 = tl.dot(dropped, b2_2, da2_2, input_precision=PRECISION)

        if FIRST:
            if E_STEPS == 1:
                if not SECOND:
                    b2_1 = load_tile(b2, y, b2_strides[2], y_read, 0, E1, E, E1_CHECK)
                    if E2 > 0:
                        b2_2 = load_tile(b2, y, b2_strides[2], y_read, E1, E2, E, True)
                dweights = tl.dot(a2_1, tl.trans(b2_1), input_precision=PRECISION)
                if E2 > 0:
                    dweights = tl.dot(a2_2, tl.trans(b2_2), dweights, input_precision=PRECISION)
            else:
                dweights = _looped_product(a2, x, a2_strides, x_read, b2, y, b2_strides, y_read, E, E1, E_STEPS, E2, PRECISION)
            if DROPOUT:
                dweights *= kept
            dscores = (weights * (dweights - row_delta)).to(b.dtype.element_ty)
            if D_STEPS > 1:
                b_1 = load_tile(b, y, b_strides[2], y_read, block * DO, DO, D, D % DO != 0)
            da_1 = tl.dot(dscores, b_1, da_1, input_precision=PRECISION)
            if D2 > 0 and D_STEPS == 1:
                da_2 = tl.dot(dscores, b_2, da_2, input_precision=PRECISION)

    row = (split * pairs + pair) * own_count
    if FIRST:
        store_tile(
            da + row * D, x, D, x_inside, 0 if D_STEPS == 1 else block * DO, da_1 * (scale * LN_2 if BASE2 else scale), D
        )
        if D2 > 0 and D_STEPS == 1:
            store_tile(da + row * D, x, D, x_inside, D1, da_2 * (scale * LN_2 if BASE2 else scale), D)
    if SECOND:
        store_tile(da2 + row * E, x, E, x_inside, 0 if E_STEPS == 1 else block * EO, da2_1, E)
        if E2 > 0 and E_STEPS == 1:
            store_tile(da2 + row * E, x, E, x_inside, E1, da2_2, E)


@triton.jit
def bias_kernel(
    q,
    k,
    v,
    dout,
    key_mask,
    bias,
    seed,
    statistics,
    dbias,  # contiguous in the bias's own shape; with splits float32 (splits, ...)
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    mask_strides,
    bias_strides,  # 0 where it is broadcast
    heads,
    queries,
    keys,
    bias_batches,
    bias_heads,
    bias_queries,
    walk_heads,  # how much of each dimension one tile of the bias walks: all where it is broadcast, else 1
    walk_queries,
    walk,  # steps in all
    split_steps,
    scale,  # in base 2 times log2(e), rounded once
    keep_scale,
    threshold,
    D: tl.constexpr,
    D1: tl.constexpr,
    D_STEPS: tl.constexpr,
    D2: tl.constexpr,
    E: tl.constexpr,
    E1: tl.constexpr,
    E_STEPS: tl.constexpr,
    E2: tl.constexpr,
    SUM_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dbias = sum of dS over what the bias was broadcast over: a tile of dbias walks those (b, h, n, m) in order."""
    BASE2: tl.constexpr = q.dtype.element_ty != tl.float32
    pid = tl.program_id(0)
    key_tiles, query_tiles = tl.cdiv(keys, BLOCK_M), tl.cdiv(bias_queries, BLOCK_N)
    m_tile, pid = pid % key_tiles, pid // key_tiles
    n_tile, pid = pid % query_tiles, pid // query_tiles
    own_head, pid = pid % bias_heads, pid // bias_heads
    own_batch, split = pid % bias_batches, (pid // bias_batches).to(tl.int64)
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_inside = m < keys
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    begin = (split * split_steps).to(tl.int32)
    for step in range(begin, tl.minimum(begin + split_steps, walk)):
        n = (n_tile + step % walk_queries) * BLOCK_N + tl.arange(0, BLOCK_N)
        rest = step // walk_queries
        head = (own_head + rest % walk_heads).to(tl.int64)
        batch = (own_batch + rest // walk_heads).to(tl.int64)
        n_inside = n < queries
        visible = m_inside
        if HAS_MASK:
            visible = _visible(key_mask + batch * mask_strides[0], mask_strides[1], m, m_inside, HAS_MASK)
        pair = batch * heads + head
        row_lse, row_delta = _statistics(statistics + pair * 2 * queries, queries, n, n_inside)
        product = _looped_product(
            pair_base(q, q_strides, batch, head),
            n,
            q_strides,
            n_inside,
            pair_base(k, k_strides, batch, head),
            m,
            k_strides,
            visible,
            D,
            D1,
            D_STEPS,
            D2,
            PRECISION,
        )
        here = bias + batch * bias_strides[0] + head * bias_strides[1]
        inside = n_inside[:, None] & m_inside[None, :]
        n_, m_, visible_ = n[:, None], m[None, :], visible[None, :]
        scores = _scores(product, scale, here, n_, m_, bias_strides, inside, visible_, True, BASE2)
        weights = _exp(scores - row_lse[:, None], BASE2)
        dweights = _looped_product(
            pair_base(dout, dout_strides, batch, head),
            n,
            dout_strides,
            n_inside,
            pair_base(v, v_strides, batch, head),
            m,
            v_strides,
            visible,
            E,
            E1,
            E_STEPS,
            E2,
            PRECISION,
        )
        if DROPOUT:
            low, high = dropout_row(tl.load(seed), pair * queries + n)
            dweights *= tl.where(dropout_keep(low[:, None], high[:, None], m[None, :], threshold), keep_scale, 0.0)
        acc += weights * (dweights - row_delta[:, None])

    own_n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if SUM_N:
        acc = tl.sum(acc, 0, keep_dims=True)
        own_n = tl.zeros([1], tl.int32)
    row = ((split * bias_batches + own_batch) * bias_heads + own_head) * bias_queries + own_n
    inside = (own_n < bias_queries)[:, None] & m_inside[None, :]
    tl.store(dbias + row[:, None] * keys + m[None, :], acc.to(dbias.dtype.element_ty), mask=inside)


# --- Tiles ----------------------------------------------------------------------------------------------------------------


# Chosen with the kernel report: no spills, shared memory that fits, tensor cores fed by asynchronous copies. 272 columns
# (261 = 256 + 16) are the widest rows that a program holds.


@_tuning.default("attention_forward")
def _forward_tiles(dims, dtype, capability):
    head, value = (64 if dims[0] > 272 else 0), (256 if dims[1] > 272 else 0)
    wide = max(dims) > 128
    if capability == _tuning.INTERPRETER:
        return _tuning.Tiles(64, 64, head, value, 4, 2)
    if dtype == "float32":
        return _tuning.Tiles(32, 32, 32, 64, 4, 2)
    if head == value == 0 and wide and capability != 90:
        return _tuning.Tiles(64, 32, 0, 0, 4, 2)
    return _tuning.Tiles(128, 64, head, value, 8, 3 if max(dims) <= 64 else 2)


def _looped(queries, keys, num_warps):
    return _tuning.Tiles(queries, keys, 64, 64, num_warps, 2, 256)


@_tuning.default("attention_backward_queries")
def _backward_queries_tiles(dims, dtype, capability):
    widest = max(dims)
    if capability == _tuning.INTERPRETER:
        return _tuning.Tiles(64, 64, 0, 0, 4, 2) if widest <= 272 else _looped(64, 64, 4)
    if dtype == "float32":
        return _tuning.Tiles(32, 32, 32, 32, 4, 2, 64)
    if widest <= 128:
        return _tuning.Tiles(128, 64, 0, 0, 8, 2)
    if widest <= 256 or widest <= 272 and capability == 90:
        return _tuning.Tiles(64, 32 if capability == 100 else 64, 0, 0, 8, 2)
    return _looped(64, 64, 8)


@_tuning.default("attention_backward_keys")
def _backward_keys_tiles(dims, dtype, capability):
    widest = max(dims)
    if capability == _tuning.INTERPRETER:
        return _tuning.Tiles(64, 64, 0, 0, 4, 2) if widest <= 272 else _looped(64, 64, 4)
    if dtype == "float32":
        return _tuning.Tiles(32, 32, 32, 32, 4, 2, 64)
    if widest <= 64:
        return _tuning.Tiles(64, 128, 0, 0, 8, 2)
    if widest <= 128:
        return _tuning.Tiles(64, 64, 0, 0, 8, 2)
    if widest <= 256 or widest <= 272 and capability == 90:
        return _tuning.Tiles(32, 64, 0, 0, 8, 2)
    return _looped(64, 64, 8)


@_tuning.default("attention_backward_bias")
def _backward_bias_tiles(dims, dtype, capability):
    if dtype == "float32" and capability != _tuning.INTERPRETER:
        return _tuning.Tiles(32, 32, 32, 32, 4, 2)
    return _tuning.Tiles(64, 64, 64, 64, 4, 2)


# --- Launchers ------------------------------------------------------------------------------------------------------------


def _columns(head_dim, value_dim, tiles) -> dict:
    """The constexprs that say how the head dims are covered."""
    (d1, d_steps, d2), (e1, e_steps, e2) = cover(head_dim, tiles.head), cover(value_dim, tiles.value)
    return dict(D=head_dim, D1=d1, D_STEPS=d_steps, D2=d2, E=value_dim, E1=e1, E_STEPS=e_steps, E2=e2)


def _held(columns) -> bool:
    """Whether a program holds whole rows of both head dims, and so can compute both gradients of the keys' side."""
    return columns["D_STEPS"] == 1 and columns["E_STEPS"] == 1


class _Problem:
    """What every launch of one call shares."""

    def __init__(self, q, k, v, key_mask, bias, seed, scale, dropout_p):
        self.q, self.k, self.v, self.seed = aligned(q), aligned(k), aligned(v), seed
        self.base2 = q.dtype != torch.float32
        self.scale = scale * LOG2_E.value if self.base2 else scale
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.keys, self.value_dim = v.shape[2:]
        self.pairs = self.batch * self.heads
        self.mask = None if key_mask is None else key_mask.view(torch.uint8)
        self.bias = None if bias is None else bias.expand(self.batch, self.heads, self.queries, self.keys)
        self.dropout = dropout_p > 0.0
        self.keep_scale = 1.0 / (1.0 - dropout_p)
        self.threshold = dropout.threshold(dropout_p)

    @property
    def empty(self) -> bool:
        return 0 in (self.pairs, self.queries, self.keys)

    def strides(self, *tensors) -> tuple:
        return tuple((0, 0, 0, 0) if t is None else t.stride() for t in tensors)

    def tiles(self, kernel):
        return _tuning.device_tiles(kernel, (self.head_dim, self.value_dim), self.q.dtype, self.q.device)

    def columns(self, tiles) -> dict:
        return _columns(self.head_dim, self.value_dim, tiles)

    def options(self, tiles) -> dict:
        return dict(
            HAS_MASK=self.mask is not None,
            DROPOUT=self.dropout,
            PRECISION=input_precision(self.q.dtype),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )

    def split(self, tiles: int, steps: int, num_warps: int) -> tuple:
        """(number of splits, steps of each)."""
        splits = split_count(tiles, steps, self.q.device, num_warps)
        return splits, triton.cdiv(steps, splits)

    def partial(self, splits: int, like) -> torch.Tensor:
        """Where a launch writes: `like` itself, or float32 room for every split."""
        return like if splits == 1 else like.new_empty((splits, *like.shape), dtype=torch.float32)


def _blocks(dim: int, width: int, steps: int) -> int:
    return 1 if steps == 1 else triton.cdiv(dim, width)


def attention_fwd(q, k, v, key_mask, bias, seed, scale, dropout_p):
    """`mmkernels_triton::attention_fwd`; csrc/schemas.h has the contract."""
    p = _Problem(q, k, v, key_mask, bias, seed, scale, dropout_p)
    out = q.new_empty(p.batch, p.heads, p.queries, p.value_dim)
    lse = q.new_empty(p.batch, p.heads, p.queries, dtype=torch.float32)
    if p.empty:
        return out.zero_(), lse.fill_(float("-inf"))
    t = p.tiles("attention_forward")
    columns = p.columns(t)
    tiles = _blocks(p.value_dim, columns["E1"], columns["E_STEPS"]) * triton.cdiv(p.queries, t.queries) * p.pairs
    splits, steps = p.split(tiles, triton.cdiv(p.keys, t.keys), t.num_warps)
    target, total = p.partial(splits, out), p.partial(splits, lse)
    top = None if splits == 1 else torch.empty_like(total)
    with torch.cuda.device_of(q):
        forward_kernel[(tiles * splits,)](
            p.q,
            p.k,
            p.v,
            p.mask,
            p.bias,
            seed,
            target,
            total,
            top,
            *p.strides(p.q, p.k, p.v, p.mask, p.bias),
            p.pairs,
            p.heads,
            p.queries,
            p.keys,
            steps * t.keys,
            p.scale,
            p.keep_scale,
            p.threshold,
            **columns,
            HAS_BIAS=bias is not None,
            SPLIT=splits > 1,
            BLOCK_N=t.queries,
            BLOCK_M=t.keys,
            **p.options(t),
        )
        if splits > 1:
            merge_splits(target, top, total, out, lse, base2=p.base2)
    return out, lse


def _statistics_of(p, dout, dlse, out, lse):
    lse = lse.contiguous()
    statistics = lse.new_empty(p.pairs, 2, p.queries)
    rows, block_r = lse.numel(), 64 if _backends.INTERPRET else 16
    statistics_kernel[(triton.cdiv(rows, block_r),)](
        out,
        dout,
        lse,
        dlse,
        statistics,
        *p.strides(out, dout, dlse),
        p.heads,
        p.queries,
        rows,
        E=p.value_dim,
        HAS_DLSE=dlse is not None,
        BLOCK_R=block_r,
        BLOCK_E=min(128, max(16, triton.next_power_of_2(p.value_dim))),
        num_warps=4,
    )
    return statistics


def _one_side(p, own_keys, dout, statistics, da, da2):
    """Fills da (and da2): dq, or dk and dv. Either may be None."""
    t = p.tiles("attention_backward_keys" if own_keys else "attention_backward_queries")
    columns = p.columns(t)
    sides = (p.k, p.v, p.q, dout) if own_keys else (p.q, dout, p.k, p.v)
    own, other = (p.keys, p.queries) if own_keys else (p.queries, p.keys)
    block_own, block_other = (t.keys, t.queries) if own_keys else (t.queries, t.keys)
    tiles = triton.cdiv(own, block_own) * p.pairs
    if da is not None:
        tiles *= _blocks(p.head_dim, t.out, columns["D_STEPS"])
    if da2 is not None:
        tiles *= _blocks(p.value_dim, t.out, columns["E_STEPS"])
    splits, steps = p.split(tiles, triton.cdiv(other, block_other), t.num_warps)
    targets = [None if d is None else p.partial(splits, d) for d in (da, da2)]
    backward_kernel[(tiles * splits,)](
        *sides,
        p.mask,
        p.bias,
        p.seed,
        statistics,
        *targets,
        *p.strides(*sides, p.mask, p.bias),
        p.pairs,
        p.heads,
        own,
        other,
        steps * block_other,
        p.scale,
        p.keep_scale,
        p.threshold,
        **columns,
        OUT=t.out,
        OWN_KEYS=own_keys,
        FIRST=da is not None,
        SECOND=da2 is not None,
        HAS_BIAS=p.bias is not None,
        BLOCK_OWN=block_own,
        BLOCK_OTHER=block_other,
        **p.options(t),
    )
    for target, result in zip(targets, (da, da2), strict=True):
        if target is not result:
            sum_splits(target, result)


def _bias(p, dout, statistics, dbias):
    t = p.tiles("attention_backward_bias")
    own = dbias.shape
    block = (1, 1, t.queries)
    full = (p.batch, p.heads, p.queries)
    tiles, walk = triton.cdiv(p.keys, t.keys), []
    for size, whole, width in zip(own[:3], full, block, strict=True):
        tiles *= triton.cdiv(size, width)
        walk.append(triton.cdiv(whole, width) if size == 1 else 1)
    all_steps = walk[0] * walk[1] * walk[2]
    splits, steps = p.split(tiles, all_steps, t.num_warps)
    target = p.partial(splits, dbias)
    bias_kernel[(tiles * splits,)](
        p.q,
        p.k,
        p.v,
        dout,
        p.mask,
        p.bias,
        p.seed,
        statistics,
        target,
        *p.strides(p.q, p.k, p.v, dout, p.mask, p.bias),
        p.heads,
        p.queries,
        p.keys,
        *own[:3],
        *walk[1:],
        all_steps,
        steps,
        p.scale,
        p.keep_scale,
        p.threshold,
        **p.columns(t),
        SUM_N=own[2] == 1,
        BLOCK_N=t.queries,
        BLOCK_M=t.keys,
        **p.options(t),
    )
    if target is not dbias:
        sum_splits(target, dbias)


def attention_bwd(dout, dlse, q, k, v, out, lse, key_mask, bias, seed, scale, dropout_p, wanted):
    """`mmkernels_triton::attention_bwd`; csrc/schemas.h has the contract."""
    p = _Problem(q, k, v, key_mask, bias, seed, scale, dropout_p)

    def gradient(tensor, bit):
        if tensor is None or not wanted & bit:
            return q.new_empty(0, dtype=(q if tensor is None else tensor).dtype)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    dq, dk, dv, dbias = gradient(q, 1), gradient(k, 2), gradient(v, 2), gradient(bias, 4)
    if wanted & 4 and bias is not None and bias.shape[3] != p.keys:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; dbias may be wanted where its last size is {p.keys}")
    if p.empty:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()
    with torch.cuda.device_of(q):
        statistics = _statistics_of(p, dout, dlse, out, lse)
        dout = aligned(dout)
        if wanted & 1:
            _one_side(p, False, dout, statistics, dq, None)
        if wanted & 2:
            if _held(p.columns(p.tiles("attention_backward_keys"))):
                _one_side(p, True, dout, statistics, dk, dv)
            else:
                _one_side(p, True, dout, statistics, dk, None)
                _one_side(p, True, dout, statistics, None, dv)
        if wanted & 4 and bias is not None:
            _bias(p, dout, statistics, dbias)
    return dq, dk, dv, dbias


# --- For the kernel report ------------------------------------------------------------------------------------------------

_CODES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_REPORTED = {  # name: kernel, its tiles, constexprs, what has what kind of rows
    "forward": (forward_kernel, dict(SPLIT=False), dict(q="D", k="D", v="E")),
    "backward_queries": (
        backward_kernel,
        dict(OWN_KEYS=False, FIRST=True, SECOND=False),
        dict(a="D", a2="E", b="D", b2="E"),
    ),
    "backward_keys": (
        backward_kernel,
        dict(OWN_KEYS=True, FIRST=True, SECOND=True),
        dict(a="D", a2="E", b="D", b2="E"),
    ),
    "backward_bias": (bias_kernel, dict(SUM_N=False), dict(q="D", k="D", v="E", dout="E")),
}


def report_case(name, dims, dtype, capability, tiles=None, *, extras=False) -> ReportCase:
    """One kernel of `_REPORTED` for head dims `dims`; `extras` adds a key mask, a bias and dropout."""
    kernel, constexprs, rows = _REPORTED[name]
    if tiles is None:
        tiles = _tuning.tiles(f"attention_{name}", dims, dtype, capability)
    covered = _columns(*dims, tiles)
    blocks = dict(BLOCK_N=tiles.queries, BLOCK_M=tiles.keys)
    if kernel is backward_kernel:
        own = (tiles.keys, tiles.queries) if constexprs["OWN_KEYS"] else (tiles.queries, tiles.keys)
        blocks = dict(BLOCK_OWN=own[0], BLOCK_OTHER=own[1], OUT=tiles.out)
        if constexprs["OWN_KEYS"] and not _held(covered):
            constexprs = constexprs | dict(SECOND=False)
    values = constexprs | covered | blocks | dict(PRECISION="ieee", HAS_MASK=extras, HAS_BIAS=extras, DROPOUT=extras)
    code, signature, final = _CODES[dtype], {}, {}
    for index, argument in enumerate(kernel.arg_names):
        absent = argument in ("top",) or argument == "da2" and not values["SECOND"]
        absent |= argument in ("key_mask", "seed") and not extras
        absent |= argument == "bias" and not extras and kernel is not bias_kernel
        tensor = argument.removesuffix("_strides")
        if argument in values or absent:
            signature[argument] = "constexpr"
            final[argument] = values.get(argument)
        elif tensor != argument:
            dim = dict(D=dims[0], E=dims[1])[rows[tensor]] if tensor in rows else 16
            step = "i32:16" if dim % 16 == 0 else "i32"
            signature[argument] = (step, "constexpr") if tensor == "mask" else (step, step, step, "constexpr")
            final[index, len(signature[argument]) - 1] = 1
        elif argument in ("scale", "keep_scale"):
            signature[argument] = "fp32"
        elif argument in ("statistics", "lse"):
            signature[argument] = "*fp32"
        elif argument in ("key_mask", "seed"):
            signature[argument] = "*u8" if argument == "key_mask" else "*i64"
        elif argument in (*rows, "out", "bias", "da", "da2", "dbias"):
            signature[argument] = f"*{code}"
        else:
            signature[argument] = "i32"
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    title = f"attention_{name} {dims[0]}/{dims[1]} {dtype}" + (" mask+bias+dropout" if extras else "")
    return ReportCase(title, kernel, signature, final, options, capability)


def report_cases():
    """Every kernel at published head dims, for the report that compiles them without a GPU."""
    for capability in (80, 90, 100):
        for name in _REPORTED:
            for dim in (64, 128, 256, 261, 512, 704):
                yield report_case(name, (dim, dim), "bfloat16", capability)
            for dim in (64, 261):
                yield report_case(name, (dim, dim), "float32", capability)
            yield report_case(name, (64, 64), "bfloat16", capability, extras=True)


# --- Registration ---------------------------------------------------------------------------------------------------------

_SCHEMAS = {
    attention_fwd: "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, Tensor? seed, float scale, "
    "float dropout_p) -> (Tensor, Tensor)",
    attention_bwd: "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_mask, "
    "Tensor? bias, Tensor? seed, float scale, float dropout_p, int wanted) -> (Tensor, Tensor, Tensor, Tensor)",
}
for _function, _schema in _SCHEMAS.items():
    _name = f"mmkernels_triton::{_function.__name__}"
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_name, ("cpu", "cuda"), _function)
attach_fakes("mmkernels_triton")

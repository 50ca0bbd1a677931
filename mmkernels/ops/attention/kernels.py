"""Triton kernels of the `attention` family and the ops `mmkernels_triton::attention_{fwd,bwd}`.

README.md beside this file derives the mathematics and counts the work. Three kernels do it: `forward_kernel`;
`backward_kernel`, which serves both sides, because dq and (dk, dv) are the same walk with the roles of queries and keys
exchanged; `bias_kernel`, which reduces the gradient of a broadcast bias. With 16-bit inputs scores are kept in base 2, so
that an exponential is one instruction; with float32 in base e, because the saved lse is, and converting it would round it.

Sizes: B batch, H heads, N queries, M keys, D and E head dims of q, k and of v. A "pair" is one (b, h). A head dim is
covered by `D1 * D_STEPS + D2` columns (see `cover`): D_STEPS = 1 keeps a whole row of chunks on chip, more of them are looped
over.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import _backends, _tuning
from .._shared import dropout
from .._shared.kernels import (
    BEFORE,
    BOUNDARY,
    LENGTH,
    LN_2,
    LOG2_E,
    ReportCase,
    aligned,
    ceil_div,
    cover,
    dropout_keep,
    dropout_row,
    input_precision,
    lengths_table,
    load_tile,
    locate,
    merge_splits,
    pick,
    pick_count,
    pick_integer,
    problem_rows,
    row_pointers,
    segment_tables,
    split_count,
    store_tile,
    sum_rows,
    sum_splits,
    times_16,
    unit_of,
)
from .._shared.registration import attach_fakes
from .lists import decode

# Columns of the table `facts` (see _shared/kernels.py for tables): the problem's number in its list, where its rows begin in
# `statistics` and, where only some keys have a mask, the first that has and the one after the last. Of the table `launch`:
# the problem's first program and what a split walks.
NUMBER, STATISTICS, MASK_BEGIN, MASK_END = (tl.constexpr(column) for column in range(4))
FIRST_PROGRAM, SPLIT_ROWS = tl.constexpr(0), tl.constexpr(1)
FULL, BLOCKS = tl.constexpr(1), tl.constexpr(2)  # kinds of bias: (B, H, N, M), diagonal blocks (G, N, C); 0 for none
SEED_STEP = tl.constexpr(0x632BE59BD9B4E019)  # kSeedStep of csrc/attention/attention_list.h

# --- Pieces ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _looped_product(
    a,
    a_rows,
    a_inside,
    b,
    b_rows,
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
        a_tile = load_tile(a, a_rows, a_inside, step * FIRST, FIRST, DIM, CHECK)
        b_tile = load_tile(b, b_rows, b_inside, step * FIRST, FIRST, DIM, CHECK)
        product = tl.dot(a_tile, tl.trans(b_tile), product, input_precision=PRECISION)
    if SECOND > 0:
        a_tile = load_tile(a, a_rows, a_inside, FIRST * STEPS, SECOND, DIM, True)
        b_tile = load_tile(b, b_rows, b_inside, FIRST * STEPS, SECOND, DIM, True)
        product = tl.dot(a_tile, tl.trans(b_tile), product, input_precision=PRECISION)
    return product


@triton.jit
def _mask_rows(key_mask, mask_strides, lengths, facts, problem, batch, HAS_MASK: tl.constexpr):
    """Where the mask of a problem's keys is; where only some have one, the first that has and the one after the last."""
    if HAS_MASK:
        boundary = pick_count(lengths, BOUNDARY, problem)
        place = problem_rows(key_mask, mask_strides, problem, batch, 0, boundary, 1)
        place = (place[0], 1) if len(place) == 2 else (place[0], 1, place[2], 1, place[4])
        if len(facts[0]) == 2:
            return (place,)
        else:
            return place, pick_count(facts, MASK_BEGIN, problem), pick_count(facts, MASK_END, problem)
    else:
        return ()


@triton.jit
def _visible(mask, m, inside, HAS_MASK: tl.constexpr):
    """Which of the keys m may be attended."""
    if not HAS_MASK:
        return inside
    elif len(mask) == 1:
        return tl.load(row_pointers(mask[0], m), mask=inside, other=0) != 0
    else:
        masked = inside & (m >= mask[1]) & (m < mask[2])
        return (tl.load(row_pointers(mask[0], m), mask=masked, other=1) != 0) & inside


@triton.jit
def _result_rows(out, strides, problem, batch, head, boundary, row, WIDTH: tl.constexpr):
    """Where results go: without strides to rows that lie one after another, `row` before those of the (b, h)."""
    if strides is None:
        return out[0][0] + row * WIDTH, WIDTH
    else:
        UNIT: tl.constexpr = unit_of(out[0][0].dtype.element_ty, WIDTH)
        return problem_rows(out, strides, problem, batch, head, boundary, UNIT)


@triton.jit
def _seed_of(seed, facts, problem):
    """The seed that a problem has."""
    return tl.load(seed).to(tl.uint64) + pick_integer(facts, NUMBER, problem).to(tl.uint64) * SEED_STEP


@triton.jit
def _exp(x, BASE2: tl.constexpr):
    return tl.exp2(x) if BASE2 else tl.exp(x)


@triton.jit
def _bias_of(bias, bias_strides, bias_index, bias_width, batch, head, queries, BIAS: tl.constexpr):
    """Where the bias of one (b, h) begins."""
    if BIAS == FULL:
        return bias + batch * bias_strides[0] + head * bias_strides[1]
    elif BIAS == BLOCKS:
        group = batch
        if bias_index is not None:
            group = tl.load(bias_index + batch)
        return bias + group * queries * bias_width
    else:
        return bias


@triton.jit
def _block_places(n, m, width):
    """Places in a bias's diagonal blocks (N, C) of queries n and keys m, and which of them are in a block."""
    block = n // width
    return (n - block).to(tl.int64) * width + m, block == m // width


@triton.jit
def _scores(product, scale, bias, n, m, bias_strides, bias_width, inside, visible, BIAS: tl.constexpr, BASE2: tl.constexpr):
    """Scores from q k^T; n, m, `inside` (may be read) and `visible` (may be attended) broadcast to the tile."""
    scores = product * scale
    if BIAS > 0:
        if BIAS == FULL:
            offsets, read = n.to(tl.int64) * bias_strides[2] + m.to(tl.int64) * bias_strides[3], inside
        else:
            offsets, read = _block_places(n, m, bias_width)
            read = read & inside
        added = tl.load(bias + offsets, mask=read, other=0.0).to(tl.float32)
        scores += added * LOG2_E if BASE2 else added
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _statistics(statistics, queries, n, inside):
    """lse and delta of the queries n; lse = +inf, so P = 0, where there is no query."""
    lse = tl.load(statistics + n, mask=inside, other=float("inf"))
    return lse, tl.load(statistics + queries + n, mask=inside, other=0.0)


@triton.jit
def _answered(inside, lse, HAS_MASK: tl.constexpr):
    """Which queries are read: not those without keys, for there may be NaN in them and their gradients, and 0 * NaN is NaN."""
    return inside & (lse < float("inf")) if HAS_MASK else inside


# --- Forward --------------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    q,  # tables of the segments of queries, keys, values and masks
    k,
    v,
    key_mask,
    bias,  # of a problem by itself
    bias_index,  # int64 (B), where the bias is of diagonal blocks and has them
    seed,
    out,  # table of segments, or ((one tensor with the rows of all problems,),); with splits float32 sums (splits, rows, E)
    lse,  # table of contiguous (B,H,N); with splits likewise the sums of exp2(score - top), (splits, rows)
    top,  # with splits likewise the largest scores
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    bias_strides,
    bias_width,  # of diagonal blocks
    out_strides,
    query_lengths,
    key_lengths,
    facts,
    launch,
    pairs,
    heads,
    rows,
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
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of queries of one pair walks its split of the keys with an online softmax."""
    DTYPE: tl.constexpr = k[0][0].dtype.element_ty
    BASE2: tl.constexpr = DTYPE != tl.float32
    UNIT: tl.constexpr = unit_of(DTYPE)
    D1_CHECK: tl.constexpr = D < D1 * D_STEPS
    E1_CHECK: tl.constexpr = E < E1 * E_STEPS
    E_BLOCKS: tl.constexpr = 1 if E_STEPS == 1 else (E + E1 - 1) // E1
    problem, pid = locate(launch, FIRST_PROGRAM, tl.program_id(0))
    queries = pick_count(query_lengths, LENGTH, problem)
    keys = pick_count(key_lengths, LENGTH, problem)
    query_tiles = tl.cdiv(queries, BLOCK_N)
    e = (pid % E_BLOCKS) * E1
    pid = pid // E_BLOCKS
    n = (pid % query_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // query_tiles
    pair, split = (pid % pairs).to(tl.int64), (pid // pairs).to(tl.int64)
    batch, head = pair // heads, pair % heads
    q_boundary = pick_count(query_lengths, BOUNDARY, problem)
    k_boundary = pick_count(key_lengths, BOUNDARY, problem)
    q_rows = problem_rows(q, q_strides, problem, batch, head, q_boundary, UNIT)
    k_rows = problem_rows(k, k_strides, problem, batch, head, k_boundary, UNIT)
    v_rows = problem_rows(v, v_strides, problem, batch, head, k_boundary, UNIT)
    mask = _mask_rows(key_mask, mask_strides, key_lengths, facts, problem, batch, HAS_MASK)
    bias = _bias_of(bias, bias_strides, bias_index, bias_width, batch, head, queries, BIAS)
    n_inside = n < queries
    if DROPOUT:
        low, high = dropout_row(_seed_of(seed, facts, problem), pair * queries + n)

    if D_STEPS == 1:
        q1 = load_tile(q_rows, n, n_inside, 0, D1, D, D1_CHECK)
        if D2 > 0:
            q2 = load_tile(q_rows, n, n_inside, D1, D2, D, True)
    m_top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc1 = tl.zeros([BLOCK_N, E1], tl.float32)
    if E2 > 0 and E_STEPS == 1:
        acc2 = tl.zeros([BLOCK_N, E2], tl.float32)

    split_keys = pick_integer(launch, SPLIT_ROWS, problem)
    begin = (split * split_keys).to(tl.int32)
    for start in range(begin, tl.minimum(begin + split_keys, keys).to(tl.int32), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        m_inside = m < keys
        visible = _visible(mask, m, m_inside, HAS_MASK)
        if D_STEPS == 1:
            k1 = load_tile(k_rows, m, visible, 0, D1, D, D1_CHECK)
            product = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            if D2 > 0:
                k2 = load_tile(k_rows, m, visible, D1, D2, D, True)
                product = tl.dot(q2, tl.trans(k2), product, input_precision=PRECISION)
        else:
            product = _looped_product(q_rows, n, n_inside, k_rows, m, visible, D, D1, D_STEPS, D2, PRECISION)
        inside = n_inside[:, None] & m_inside[None, :]
        n_, m_, visible_ = n[:, None], m[None, :], visible[None, :]
        scores = _scores(product, scale, bias, n_, m_, bias_strides, bias_width, inside, visible_, BIAS, BASE2)

        m_new = tl.maximum(m_top, tl.max(scores, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key seen yet: exp(-inf - 0) is the 0 we want
        weights = _exp(scores - shift[:, None], BASE2)
        fade = _exp(m_top - shift, BASE2)
        m_top = m_new
        total = total * fade + tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(dropout_keep(low[:, None], high[:, None], m[None, :], threshold), weights, 0.0)
        weights = weights.to(DTYPE)
        v1 = load_tile(v_rows, m, visible, e, E1, E, E1_CHECK)
        acc1 = tl.dot(weights, v1, acc1 * fade[:, None], input_precision=PRECISION)
        if E2 > 0 and E_STEPS == 1:
            v2 = load_tile(v_rows, m, visible, E1, E2, E, True)
            acc2 = tl.dot(weights, v2, acc2 * fade[:, None], input_precision=PRECISION)

    row = split * rows + pick_integer(query_lengths, BEFORE, problem) + pair * queries
    if SPLIT:
        gain = tl.full([BLOCK_N], 1.0, tl.float32) * keep_scale
        if e == 0:
            tl.store(top[0][0] + row + n, m_top, mask=n_inside)
            tl.store(lse[0][0] + row + n, total, mask=n_inside)
    else:
        total = tl.where(total == 0.0, 1.0, total)  # a row without keys: 0 / 1, and log(1) + -inf
        gain = keep_scale / total
        if e == 0:
            logarithm = (m_top + tl.log2(total)) * LN_2 if BASE2 else m_top + tl.log(total)
            tl.store(pick(lse, 0, problem) + pair * queries + n, logarithm, mask=n_inside)
    out_rows = _result_rows(out, out_strides, problem, batch, head, q_boundary, row, E)
    store_tile(out_rows, n, n_inside, e, acc1 * gain[:, None], E)
    if E2 > 0 and E_STEPS == 1:
        store_tile(out_rows, n, n_inside, E1, acc2 * gain[:, None], E)


# --- Backward -------------------------------------------------------------------------------------------------------------


@triton.jit
def statistics_kernel(
    out,  # tables of segments, contiguous
    dout,  # aligned
    lse,
    dlse,
    statistics,  # float32, of each problem (pairs, 2, queries)
    out_strides,
    dout_strides,
    dlse_strides,
    query_lengths,
    heads,
    rows,
    E: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What the backward needs of a row: lse in the base of the scores and delta = sum_e dout * out - dlse.

    Rows without keys get lse = +inf and delta = 0, which makes their P and dS zero.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = index < rows
    problem, row = locate(query_lengths, BEFORE, index)
    queries, boundary = pick_integer(query_lengths, LENGTH, problem), pick_integer(query_lengths, BOUNDARY, problem)
    pair, n = row // queries, row % queries
    batch, head = pair // heads, pair % heads
    OUT_UNIT: tl.constexpr = unit_of(out[0][0].dtype.element_ty, E)
    UNIT: tl.constexpr = unit_of(out[0][0].dtype.element_ty)
    out_row = row_pointers(problem_rows(out, out_strides, problem, batch, head, boundary, OUT_UNIT), n)
    dout_row = row_pointers(problem_rows(dout, dout_strides, problem, batch, head, boundary, UNIT), n)
    delta = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        mask = inside[:, None] & (e < E)[None, :]
        a = tl.load(out_row[:, None] + e[None, :], mask=mask, other=0.0)
        b = tl.load(dout_row[:, None] + e[None, :], mask=mask, other=0.0)
        delta += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_row = row_pointers(problem_rows(dlse, dlse_strides, problem, batch, head, queries, 1), n)
        delta -= tl.load(dlse_row, mask=inside, other=0.0).to(tl.float32)
    lse_row = tl.load(pick(lse, 0, problem) + row, mask=inside, other=0.0)
    empty = lse_row == float("-inf")
    target = statistics + 2 * (index - row) + pair * queries + row
    if out[0][0].dtype.element_ty != tl.float32:
        lse_row *= LOG2_E
    tl.store(target, tl.where(empty, float("inf"), lse_row), mask=inside)
    tl.store(target + queries, tl.where(empty, 0.0, delta), mask=inside)


@triton.jit
def backward_kernel(
    a,  # tables of segments: of q, or of k where OWN_KEYS
    a2,  # dout, or v
    b,  # k, or q
    b2,  # v, or dout
    key_mask,
    bias,  # of a problem by itself
    bias_index,  # int64 (B), where the bias is of diagonal blocks and has them
    seed,
    statistics,
    da,  # dq, or dk, as the forward's out; with splits float32 (splits, rows, D)
    da2,  # dv where OWN_KEYS
    dblocks,  # float32 (B, H, N, C) for dS in the bias's diagonal blocks, where the queries walk the keys; or None
    a_strides,
    a2_strides,
    b_strides,
    b2_strides,
    mask_strides,
    bias_strides,
    bias_width,  # of diagonal blocks
    da_strides,
    da2_strides,
    own_lengths,
    other_lengths,
    facts,
    launch,
    pairs,
    heads,
    rows,
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
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):
    """A tile of one side walks the other side: da = scale dS b and, for keys, da2 = P b2.

    With x the own and y the other index: P_xy = exp(S_xy - lse), dP = a2 b2^T, dS = P (dP - delta). lse and delta belong
    to the queries, the mask to the keys.
    """
    DTYPE: tl.constexpr = b[0][0].dtype.element_ty
    BASE2: tl.constexpr = DTYPE != tl.float32
    UNIT: tl.constexpr = unit_of(DTYPE)
    D1_CHECK: tl.constexpr = D < D1 * D_STEPS
    E1_CHECK: tl.constexpr = E < E1 * E_STEPS
    DO: tl.constexpr = D1 if D_STEPS == 1 else OUT
    EO: tl.constexpr = E1 if E_STEPS == 1 else OUT
    D_BLOCKS: tl.constexpr = (D + DO - 1) // DO if FIRST and D_STEPS > 1 else 1
    E_BLOCKS: tl.constexpr = (E + EO - 1) // EO if SECOND and E_STEPS > 1 else 1
    problem, pid = locate(launch, FIRST_PROGRAM, tl.program_id(0))
    own_count = pick_count(own_lengths, LENGTH, problem)
    other_count = pick_count(other_lengths, LENGTH, problem)
    own_tiles = tl.cdiv(own_count, BLOCK_OWN)
    block = pid % (D_BLOCKS * E_BLOCKS)
    pid = pid // (D_BLOCKS * E_BLOCKS)
    x = (pid % own_tiles) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    pid = pid // own_tiles
    pair, split = (pid % pairs).to(tl.int64), (pid // pairs).to(tl.int64)
    batch, head = pair // heads, pair % heads
    own_boundary = pick_count(own_lengths, BOUNDARY, problem)
    other_boundary = pick_count(other_lengths, BOUNDARY, problem)
    a_rows = problem_rows(a, a_strides, problem, batch, head, own_boundary, UNIT)
    a2_rows = problem_rows(a2, a2_strides, problem, batch, head, own_boundary, UNIT)
    b_rows = problem_rows(b, b_strides, problem, batch, head, other_boundary, UNIT)
    b2_rows = problem_rows(b2, b2_strides, problem, batch, head, other_boundary, UNIT)
    key_lengths = own_lengths if OWN_KEYS else other_lengths
    mask = _mask_rows(key_mask, mask_strides, key_lengths, facts, problem, batch, HAS_MASK)
    queries = other_count if OWN_KEYS else own_count
    bias = _bias_of(bias, bias_strides, bias_index, bias_width, batch, head, queries, BIAS)
    statistics += pick_integer(facts, STATISTICS, problem).to(tl.int64) + pair * 2 * queries

    if DROPOUT:
        own_seed = _seed_of(seed, facts, problem)

    x_inside = x < own_count
    if OWN_KEYS:
        x_read = _visible(mask, x, x_inside, HAS_MASK)
    else:
        x_lse, x_delta = _statistics(statistics, queries, x, x_inside)
        x_read = _answered(x_inside, x_lse, HAS_MASK)
        row_lse, row_delta = x_lse[:, None], x_delta[:, None]
        if DROPOUT:
            low, high = dropout_row(own_seed, pair * queries + x)
            low, high = low[:, None], high[:, None]
    if D_STEPS == 1:
        a_1 = load_tile(a_rows, x, x_read, 0, D1, D, D1_CHECK)
        if D2 > 0:
            a_2 = load_tile(a_rows, x, x_read, D1, D2, D, True)
    if FIRST and E_STEPS == 1:
        a2_1 = load_tile(a2_rows, x, x_read, 0, E1, E, E1_CHECK)
        if E2 > 0:
            a2_2 = load_tile(a2_rows, x, x_read, E1, E2, E, True)
    if FIRST:
        da_1 = tl.zeros([BLOCK_OWN, DO], tl.float32)
        if D2 > 0 and D_STEPS == 1:
            da_2 = tl.zeros([BLOCK_OWN, D2], tl.float32)
    if SECOND:
        da2_1 = tl.zeros([BLOCK_OWN, EO], tl.float32)
        if E2 > 0 and E_STEPS == 1:
            da2_2 = tl.zeros([BLOCK_OWN, E2], tl.float32)

    split_others = pick_integer(launch, SPLIT_ROWS, problem)
    begin = (split * split_others).to(tl.int32)
    for start in range(begin, tl.minimum(begin + split_others, other_count).to(tl.int32), BLOCK_OTHER):
        y = start + tl.arange(0, BLOCK_OTHER)
        y_inside = y < other_count
        inside = x_inside[:, None] & y_inside[None, :]
        if OWN_KEYS:
            y_lse, y_delta = _statistics(statistics, queries, y, y_inside)
            y_read = _answered(y_inside, y_lse, HAS_MASK)
            row_lse, row_delta = y_lse[None, :], y_delta[None, :]
            n, m, visible = y[None, :], x[:, None], x_read[:, None]
            if DROPOUT:
                low, high = dropout_row(own_seed, pair * queries + y)
                low, high = low[None, :], high[None, :]
        else:
            y_read = _visible(mask, y, y_inside, HAS_MASK)
            n, m, visible = x[:, None], y[None, :], y_read[None, :]

        if D_STEPS == 1:
            b_1 = load_tile(b_rows, y, y_read, 0, D1, D, D1_CHECK)
            product = tl.dot(a_1, tl.trans(b_1), input_precision=PRECISION)
            if D2 > 0:
                b_2 = load_tile(b_rows, y, y_read, D1, D2, D, True)
                product = tl.dot(a_2, tl.trans(b_2), product, input_precision=PRECISION)
        else:
            product = _looped_product(a_rows, x, x_read, b_rows, y, y_read, D, D1, D_STEPS, D2, PRECISION)
        scores = _scores(product, scale, bias, n, m, bias_strides, bias_width, inside, visible, BIAS, BASE2)
        weights = _exp(scores - row_lse, BASE2)
        if DROPOUT:
            kept = tl.where(dropout_keep(low, high, m, threshold), keep_scale, 0.0)

        if SECOND:
            dropped = weights
            if DROPOUT:
                dropped = weights * kept
            dropped = dropped.to(DTYPE)
            if E_STEPS == 1:
                b2_1 = load_tile(b2_rows, y, y_read, 0, E1, E, E1_CHECK)
            else:
                b2_1 = load_tile(b2_rows, y, y_read, block * EO, EO, E, E % EO != 0)
            da2_1 = tl.dot(dropped, b2_1, da2_1, input_precision=PRECISION)
            if E2 > 0 and E_STEPS == 1:
                b2_2 = load_tile(b2_rows, y, y_read, E1, E2, E, True)
                da2_2 = tl.dot(dropped, b2_2, da2_2, input_precision=PRECISION)

        if FIRST:
            if E_STEPS == 1:
                if not SECOND:
                    b2_1 = load_tile(b2_rows, y, y_read, 0, E1, E, E1_CHECK)
                    if E2 > 0:
                        b2_2 = load_tile(b2_rows, y, y_read, E1, E2, E, True)
                dweights = tl.dot(a2_1, tl.trans(b2_1), input_precision=PRECISION)
                if E2 > 0:
                    dweights = tl.dot(a2_2, tl.trans(b2_2), dweights, input_precision=PRECISION)
            else:
                dweights = _looped_product(a2_rows, x, x_read, b2_rows, y, y_read, E, E1, E_STEPS, E2, PRECISION)
            if DROPOUT:
                dweights *= kept
            dscores = weights * (dweights - row_delta)
            if dblocks is not None:
                places, in_block = _block_places(n, m, bias_width)
                tl.store(dblocks + pair * queries * bias_width + places, dscores, mask=inside & in_block & (block == 0))
            dscores = dscores.to(DTYPE)
            if D_STEPS > 1:
                b_1 = load_tile(b_rows, y, y_read, block * DO, DO, D, D % DO != 0)
            da_1 = tl.dot(dscores, b_1, da_1, input_precision=PRECISION)
            if D2 > 0 and D_STEPS == 1:
                da_2 = tl.dot(dscores, b_2, da_2, input_precision=PRECISION)

    row = split * rows + pick_integer(own_lengths, BEFORE, problem) + pair * own_count
    if FIRST:
        gain = scale * LN_2 if BASE2 else scale
        da_rows = _result_rows(da, da_strides, problem, batch, head, own_boundary, row, D)
        store_tile(da_rows, x, x_inside, 0 if D_STEPS == 1 else block * DO, da_1 * gain, D)
        if D2 > 0 and D_STEPS == 1:
            store_tile(da_rows, x, x_inside, D1, da_2 * gain, D)
    if SECOND:
        da2_rows = _result_rows(da2, da2_strides, problem, batch, head, own_boundary, row, E)
        store_tile(da2_rows, x, x_inside, 0 if E_STEPS == 1 else block * EO, da2_1, E)
        if E2 > 0 and E_STEPS == 1:
            store_tile(da2_rows, x, x_inside, E1, da2_2, E)


@triton.jit
def bias_kernel(
    q,  # tables of one problem of one segment
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
    query_lengths,
    key_lengths,
    facts,
    heads,
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
    DTYPE: tl.constexpr = q[0][0].dtype.element_ty
    BASE2: tl.constexpr = DTYPE != tl.float32
    UNIT: tl.constexpr = unit_of(DTYPE)
    queries, keys = pick_count(query_lengths, LENGTH, 0), pick_count(key_lengths, LENGTH, 0)
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
        mask = _mask_rows(key_mask, mask_strides, key_lengths, facts, 0, batch, HAS_MASK)
        visible = _visible(mask, m, m_inside, HAS_MASK)
        pair = batch * heads + head
        row_lse, row_delta = _statistics(statistics + pair * 2 * queries, queries, n, n_inside)
        product = _looped_product(
            problem_rows(q, q_strides, 0, batch, head, queries, UNIT),
            n,
            n_inside,
            problem_rows(k, k_strides, 0, batch, head, keys, UNIT),
            m,
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
        scores = _scores(product, scale, here, n_, m_, bias_strides, 1, inside, visible_, FULL, BASE2)
        weights = _exp(scores - row_lse[:, None], BASE2)
        dweights = _looped_product(
            problem_rows(dout, dout_strides, 0, batch, head, queries, UNIT),
            n,
            n_inside,
            problem_rows(v, v_strides, 0, batch, head, keys, UNIT),
            m,
            visible,
            E,
            E1,
            E_STEPS,
            E2,
            PRECISION,
        )
        if DROPOUT:
            low, high = dropout_row(_seed_of(seed, facts, 0), pair * queries + n)
            dweights *= tl.where(dropout_keep(low[:, None], high[:, None], m[None, :], threshold), keep_scale, 0.0)
        dscores = weights * (dweights - row_delta[:, None])
        # A query without keys may be NaN, and so may its gradient: 0 * NaN must not be added.
        acc += tl.where(visible_, dscores, 0.0) if HAS_MASK else dscores

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


def _fewer_keys(tiles):
    """Tiles of the same kernel with a bias of diagonal blocks, whose places take registers."""
    return tiles._replace(keys=min(tiles.keys, 32))


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


class _Problem(NamedTuple):
    """One problem: segments (B, H, rows, width) of queries, keys and values; of each of keys its mask (B, rows) or None."""

    q: list
    k: list
    v: list
    masks: list


class _Walk(NamedTuple):
    """How one launch goes over the problems."""

    order: list  # numbers of those that have rows, the ones that take longest first
    table: tuple  # `launch` of the kernels
    programs: int
    splits: int
    rows: int  # of all pairs of all of them

    def of(self, values) -> list:
        """What there is for every problem, in the order of the launch."""
        return [values[i] for i in self.order]

    def room(self, like, *width) -> torch.Tensor:
        """Float32 room for what every split has to say of every row."""
        return like.new_empty(self.splits, self.rows, *width, dtype=torch.float32)


def _bytes(mask) -> torch.Tensor:
    """A mask as kernels read it: bytes, those of a row beside each other."""
    return (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)


def _rows(operands) -> list:
    """Rows of each problem, of the segments of one operand."""
    return [sum(t.shape[2] for t in segments) for segments in operands]


class _Call:
    """What every launch of one call shares."""

    def __init__(self, problems, bias, bias_index, seed, scale, dropout_p):
        self.q, self.k, self.v = ([[aligned(t) for t in p[side]] for p in problems] for side in range(3))
        self.queries, self.keys = _rows(self.q), _rows(self.k)
        first = self.q[0][0]
        self.dtype, self.device = first.dtype, first.device
        self.batch, self.heads, _, self.head_dim = first.shape
        self.value_dim = self.v[0][0].shape[3]
        self.pairs = self.batch * self.heads
        self.base2 = first.dtype != torch.float32
        self.scale = scale * LOG2_E.value if self.base2 else scale
        self.seed, self.dropout = seed, dropout_p > 0.0
        self.keep_scale = 1.0 / (1.0 - dropout_p)
        self.threshold = dropout.threshold(dropout_p)
        self.bias, self.bias_index, self.bias_width = bias, bias_index, 1
        self.bias_kind, self.bias_strides = 0, (0, 0, 0, 0)
        if bias is not None and bias.dim() == 3:
            self.bias_kind, self.bias_width = BLOCKS.value, bias.shape[2]
        elif bias is not None:
            self.bias = bias.expand(self.batch, self.heads, self.queries[0], self.keys[0])
            self.bias_kind, self.bias_strides = FULL.value, self.bias.stride()
        given = [mask for p in problems for mask in p.masks if mask is not None]
        self.masks = None
        if given:  # where a segment has none, `facts` says so, and its pointer is not used
            masks = [[given[0] if mask is None else mask for mask in p.masks] for p in problems]
            self.masks = [[_bytes(mask)[:, None, :, None] for mask in segments] for segments in masks]
        some = bool(given) and any(mask is None for p in problems for mask in p.masks)
        self.facts, statistics = [], 0
        for number, p in enumerate(problems):
            inner = p.k[0].shape[2]
            masked = (inner if p.masks[0] is None else 0, inner if p.masks[-1] is None else self.keys[number])
            self.facts.append(times_16(number, statistics, *(masked if some else ())))
            statistics += 2 * self.pairs * self.queries[number]

    def tiles(self, kernel):
        return _tuning.device_tiles(kernel, (self.head_dim, self.value_dim), self.dtype, self.device)

    def columns(self, tiles) -> dict:
        return _columns(self.head_dim, self.value_dim, tiles)

    def mask_tables(self, walk) -> tuple:
        return (None, None) if self.masks is None else segment_tables(walk.of(self.masks))

    def options(self, tiles) -> dict:
        return dict(
            HAS_MASK=self.masks is not None,
            DROPOUT=self.dropout,
            PRECISION=input_precision(self.dtype),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )

    def split(self, tiles: int, steps: int, num_warps: int) -> tuple:
        """(number of splits, steps of each)."""
        splits = split_count(tiles, steps, self.device, num_warps)
        return splits, ceil_div(steps, splits)

    def walk(self, problems, own, other, block_own, block_other, blocks, num_warps) -> _Walk:
        """Over the sides of `problems`, numbers, that have `own` and `other` rows; `blocks` programs share a tile."""
        order = sorted((i for i in problems if own[i] and self.pairs), key=lambda i: -other[i])
        tiles = [blocks * ceil_div(own[i], block_own) * self.pairs for i in order]
        steps = [ceil_div(other[i], block_other) for i in order]
        splits, _ = self.split(sum(tiles), max(steps, default=0), num_warps)
        table, programs = [], 0
        for count, length in zip(tiles, steps, strict=True):
            table.append(times_16(programs, ceil_div(length, splits) * block_other))
            programs += count * splits
        return _Walk(order, tuple(table), programs, splits, self.pairs * sum(own[i] for i in order))


def _blocks(dim: int, width: int, steps: int) -> int:
    return 1 if steps == 1 else ceil_div(dim, width)


def _targets(results, partial) -> tuple:
    """Tables of where a launch writes: segments of every problem, or, without strides, one contiguous tensor."""
    if partial is not None:
        return ((partial,),), None
    if len(results) == len(results[0]) == 1 and results[0][0].is_contiguous():
        return ((results[0][0],),), None
    return segment_tables(results)


def _forward(call, out, lse) -> None:
    """Fills out, of each problem the segments (B, H, rows, E), and lse, of each (B, H, N)."""
    t = call.tiles("attention_forward")
    columns = call.columns(t)
    blocks = _blocks(call.value_dim, columns["E1"], columns["E_STEPS"])
    walk = call.walk(range(len(out)), call.queries, call.keys, t.queries, t.keys, blocks, t.num_warps)
    if walk.programs == 0:
        return
    q, k, v, out, lse = map(walk.of, (call.q, call.k, call.v, out, lse))
    partial, sums, top = None, tuple((t,) for t in lse), None
    if walk.splits > 1:
        partial, total, largest = walk.room(q[0][0], call.value_dim), walk.room(q[0][0]), walk.room(q[0][0])
        sums, top = ((total,),), ((largest,),)
    out_, out_strides = _targets(out, partial)
    (q_, q_strides), (k_, k_strides), (v_, v_strides) = map(segment_tables, (q, k, v))
    mask, mask_strides = call.mask_tables(walk)
    forward_kernel[(walk.programs,)](
        q_,
        k_,
        v_,
        mask,
        call.bias,
        call.bias_index,
        call.seed,
        out_,
        sums,
        top,
        q_strides,
        k_strides,
        v_strides,
        mask_strides,
        call.bias_strides,
        call.bias_width,
        out_strides,
        lengths_table(q),
        lengths_table(k),
        tuple(walk.of(call.facts)),
        walk.table,
        call.pairs,
        call.heads,
        walk.rows,
        call.scale,
        call.keep_scale,
        call.threshold,
        **columns,
        BIAS=call.bias_kind,
        SPLIT=walk.splits > 1,
        BLOCK_N=t.queries,
        BLOCK_M=t.keys,
        **call.options(t),
    )
    if walk.splits > 1:
        merge_splits(partial, largest, total, out, lse, base2=call.base2)


def _statistics_of(call, dout, dlse, out, lse):
    """lse and delta of all queries, see `statistics_kernel`."""
    rows, block_r = call.pairs * sum(call.queries), 64 if _backends.INTERPRET else 16
    statistics = torch.empty(2 * rows, dtype=torch.float32, device=call.device)
    if rows == 0:
        return statistics
    some = [i for i, queries in enumerate(call.queries) if queries]
    out, dout, lse = ([values[i] for i in some] for values in (out, dout, lse))
    (out_, out_strides), (dout_, dout_strides) = map(segment_tables, (out, dout))
    dlse_, dlse_strides = (None, None) if dlse is None else segment_tables([[dlse[i].unsqueeze(3)] for i in some])
    statistics_kernel[(ceil_div(rows, block_r),)](
        out_,
        dout_,
        tuple((t.contiguous(),) for t in lse),
        dlse_,
        statistics,
        out_strides,
        dout_strides,
        dlse_strides,
        lengths_table(out),
        call.heads,
        rows,
        E=call.value_dim,
        HAS_DLSE=dlse is not None,
        BLOCK_R=block_r,
        BLOCK_E=min(128, max(16, triton.next_power_of_2(call.value_dim))),
        num_warps=4,
    )
    return statistics


def _one_side(call, own_keys, problems, dout, statistics, da, da2, dblocks=None):
    """Fills da (and da2) of `problems`: dq, or dk and dv, a list of segments of every problem. Either may be None."""
    t = call.tiles("attention_backward_keys" if own_keys else "attention_backward_queries")
    if call.bias_kind == BLOCKS.value and not own_keys:
        t = _fewer_keys(t)
    columns = call.columns(t)
    sides = (call.k, call.v, call.q, dout) if own_keys else (call.q, dout, call.k, call.v)
    counts = (call.keys, call.queries) if own_keys else (call.queries, call.keys)
    block_own, block_other = (t.keys, t.queries) if own_keys else (t.queries, t.keys)
    blocks = 1 if da is None else _blocks(call.head_dim, t.out, columns["D_STEPS"])
    blocks *= 1 if da2 is None else _blocks(call.value_dim, t.out, columns["E_STEPS"])
    walk = call.walk(problems, *counts, block_own, block_other, blocks, t.num_warps)
    if walk.programs == 0:
        return
    sides = [walk.of(side) for side in sides]
    results = [None if d is None else walk.of(d) for d in (da, da2)]
    partials = [None if d is None or walk.splits == 1 else walk.room(d[0][0], d[0][0].shape[3]) for d in results]
    targets = [(None, None) if d is None else _targets(d, partial) for d, partial in zip(results, partials, strict=True)]
    pointers, strides = zip(*map(segment_tables, sides), strict=True)
    mask, mask_strides = call.mask_tables(walk)
    backward_kernel[(walk.programs,)](
        *pointers,
        mask,
        call.bias,
        call.bias_index,
        call.seed,
        statistics,
        *(pointers for pointers, _ in targets),
        dblocks,
        *strides,
        mask_strides,
        call.bias_strides,
        call.bias_width,
        *(strides for _, strides in targets),
        lengths_table(sides[0]),
        lengths_table(sides[2]),
        tuple(walk.of(call.facts)),
        walk.table,
        call.pairs,
        call.heads,
        walk.rows,
        call.scale,
        call.keep_scale,
        call.threshold,
        **columns,
        OUT=t.out,
        OWN_KEYS=own_keys,
        FIRST=da is not None,
        SECOND=da2 is not None,
        BIAS=call.bias_kind,
        BLOCK_OWN=block_own,
        BLOCK_OTHER=block_other,
        **call.options(t),
    )
    for partial, result in zip(partials, results, strict=True):
        if partial is not None:
            sum_splits(partial, result)


def _backward(call, dout, statistics, dq, dk, dv, dblocks=None) -> None:
    """Fills dq, and dk and dv, each of every problem a list of segments (B, H, rows, width), or None where not wanted."""
    queries = [i for i, segments in enumerate(dq) if segments is not None]
    keys = [i for i, segments in enumerate(dk) if segments is not None]
    _one_side(call, False, queries, dout, statistics, dq, None, dblocks)
    if _held(call.columns(call.tiles("attention_backward_keys"))):
        _one_side(call, True, keys, dout, statistics, dk, dv)
    else:
        _one_side(call, True, keys, dout, statistics, dk, None)
        _one_side(call, True, keys, dout, statistics, None, dv)


def _bias(call, dout, statistics, dbias):
    t = call.tiles("attention_backward_bias")
    own = dbias.shape
    full, block = (call.batch, call.heads, call.queries[0]), (1, 1, t.queries)
    tiles, walk = ceil_div(call.keys[0], t.keys), []
    for size, whole, width in zip(own[:3], full, block, strict=True):
        tiles *= ceil_div(size, width)
        walk.append(ceil_div(whole, width) if size == 1 else 1)
    all_steps = walk[0] * walk[1] * walk[2]
    splits, steps = call.split(tiles, all_steps, t.num_warps)
    target = dbias if splits == 1 else dbias.new_empty((splits, *own), dtype=torch.float32)
    pointers, strides = zip(*map(segment_tables, (call.q, call.k, call.v, dout)), strict=True)
    mask, mask_strides = (None, None) if call.masks is None else segment_tables(call.masks)
    bias_kernel[(tiles * splits,)](
        *pointers,
        mask,
        call.bias,
        call.seed,
        statistics,
        target,
        *strides,
        mask_strides,
        call.bias_strides,
        lengths_table(call.q),
        lengths_table(call.k),
        tuple(call.facts),
        call.heads,
        *own[:3],
        *walk[1:],
        all_steps,
        steps,
        call.scale,
        call.keep_scale,
        call.threshold,
        **call.columns(t),
        SUM_N=own[2] == 1,
        BLOCK_N=t.queries,
        BLOCK_M=t.keys,
        **call.options(t),
    )
    if target is not dbias:
        sum_splits(target, [[dbias]])


# --- Ops ------------------------------------------------------------------------------------------------------------------


def attention_fwd(q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p):
    """`mmkernels_triton::attention_fwd`; csrc/schemas.h has the contract."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    with torch.cuda.device_of(q):
        _forward(_Call([_Problem([q], [k], [v], [key_mask])], bias, bias_index, seed, scale, dropout_p), [[out]], [lse])
    return out, lse


def attention_bwd(dout, dlse, q, k, v, out, lse, key_mask, bias, bias_index, seed, scale, dropout_p, wanted):
    """`mmkernels_triton::attention_bwd`; csrc/schemas.h has the contract."""

    def gradient(tensor, bit):
        if tensor is None or not wanted & bit:
            return q.new_empty(0, dtype=(q if tensor is None else tensor).dtype)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    dq, dk, dv, dbias = gradient(q, 1), gradient(k, 2), gradient(v, 2), gradient(bias, 4)
    of_blocks = bias is not None and bias.dim() == 3
    if wanted & 4 and bias is not None and not of_blocks and bias.shape[3] != k.shape[2]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; dbias may be wanted where its last size is {k.shape[2]}")
    call = _Call([_Problem([q], [k], [v], [key_mask])], bias, bias_index, seed, scale, dropout_p)
    dout, dblocks, results = [[aligned(dout)]], None, [[d] if wanted & bit else None for d, bit in ((dq, 1), (dk, 2), (dv, 2))]
    if of_blocks and wanted & 4:
        width = bias.shape[2]
        beyond = ceil_div(q.shape[2], width) * width > k.shape[2]  # blocks are cut off there, and nobody writes
        dblocks = (q.new_zeros if beyond else q.new_empty)((*q.shape[:3], width), dtype=torch.float32)
        results[0] = results[0] or [torch.empty_like(q)]  # the pass that has dS, query by query
    with torch.cuda.device_of(q):
        statistics = _statistics_of(call, dout, None if dlse is None else [dlse], [[out.contiguous()]], [lse])
        _backward(call, dout, statistics, *([d] for d in results), dblocks)
        if dbias.numel() and (0 in q.shape or dblocks is not None and k.shape[2] == 0):
            dbias.zero_()
        elif dblocks is not None:
            rows = dblocks.view(-1, q.shape[2] * width)
            sum_rows(rows, dbias.view(bias.shape[0], -1), bias_index)
        elif dbias.numel():
            _bias(call, dout, statistics, dbias)
    return dq, dk, dv, dbias


class _Slot(NamedTuple):
    """One segment: the first rows of a slot of one of the tensors."""

    tensor: int
    slot: int
    rows: int

    def of(self, tensors) -> torch.Tensor:
        rows = tensors[self.tensor].select(2, self.slot).transpose(1, 2)
        return rows if rows.shape[2] == self.rows else rows.narrow(2, 0, self.rows)


def _listed(tensors, problems, key_masks) -> list:
    """The problems with a `_Slot` in place of each tensor."""
    listed = []
    for p in decode(problems):
        q, k, v = ([_Slot(tensor, slot, tensors[tensor].shape[1]) for tensor, slot in side] for side in (p.q, p.k, p.v))
        if p.rows >= 0:
            q[0] = q[0]._replace(rows=p.rows)
        listed.append(_Problem(q, k, v, [None if i < 0 else key_masks[i] for i in p.masks[: len(k)]]))
    return listed


def _listed_call(tensors, listed, seed, scale, dropout_p) -> _Call:
    problems = [_Problem(*([slot.of(tensors) for slot in side] for side in p[:3]), p.masks) for p in listed]
    return _Call(problems, None, None, seed, scale, dropout_p)


def attention_list_fwd(tensors, problems, key_masks, seed, scale, dropout_p):
    """`mmkernels_triton::attention_list_fwd`; csrc/schemas.h has the contract."""
    listed = _listed(tensors, problems, key_masks)
    call = _listed_call(tensors, listed, seed, scale, dropout_p)
    like = tensors[0]
    out = [[like.new_empty(call.batch, slot.rows, call.heads, call.value_dim) for slot in p.q] for p in listed]
    lse = [like.new_empty(call.batch, call.heads, queries, dtype=torch.float32) for queries in call.queries]
    with torch.cuda.device_of(like):
        _forward(call, [[t.transpose(1, 2) for t in segments] for segments in out], lse)
    return [t for segments in out for t in segments], lse


def attention_list_bwd(dout, dlse, tensors, problems, key_masks, out, lse, seed, scale, dropout_p, wanted):
    """`mmkernels_triton::attention_list_bwd`; csrc/schemas.h has the contract."""
    listed = _listed(tensors, problems, key_masks)
    slots = [slot for p in listed for side in p[:3] for slot in side]
    read = {(slot.tensor, slot.slot) for slot in slots if slot.rows == tensors[slot.tensor].shape[1]}

    def gradient(i, tensor):
        if not wanted[i]:
            return tensor.new_empty(0)
        whole = all((i, slot) in read for slot in range(tensor.shape[2]))
        return (torch.empty if whole else torch.zeros)(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    gradients = [gradient(i, tensor) for i, tensor in enumerate(tensors)]

    def place(slot):
        if wanted[slot.tensor]:
            return slot.of(gradients)
        batch, _, _, heads, width = tensors[slot.tensor].shape  # comes with what is wanted, and is dropped
        return tensors[slot.tensor].new_empty(batch, heads, slot.rows, width)

    def places(*sides):
        """Where the gradients of these sides of a problem go, or None for each of them."""
        some = any(wanted[slot.tensor] for side in sides for slot in side)
        return [[place(slot) for slot in side] if some else None for side in sides]

    def by_segment(values):
        rest = iter(values)
        return [[next(rest).transpose(1, 2) for _ in p.q] for p in listed]

    call = _listed_call(tensors, listed, seed, scale, dropout_p)
    dq = [places(p.q)[0] for p in listed]
    dk, dv = zip(*(places(p.k, p.v) for p in listed), strict=True)
    dout = [[aligned(t) for t in segments] for segments in by_segment(dout)]
    with torch.cuda.device_of(tensors[0]):
        statistics = _statistics_of(call, dout, dlse or None, by_segment([t.contiguous() for t in out]), lse)
        _backward(call, dout, statistics, dq, dk, dv)
    return gradients


# --- For the kernel report ------------------------------------------------------------------------------------------------

_CODES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_REPORTED = {  # name: kernel, constexprs, its tables of pointers to inputs and to results
    "forward": (forward_kernel, {}, ("q", "k", "v"), ("out",)),
    "backward_queries": (backward_kernel, dict(OWN_KEYS=False, FIRST=True, SECOND=False), ("a", "a2", "b", "b2"), ("da",)),
    "backward_keys": (backward_kernel, dict(OWN_KEYS=True, FIRST=True, SECOND=True), ("a", "a2", "b", "b2"), ("da", "da2")),
    "backward_bias": (bias_kernel, dict(SUM_N=False), ("q", "k", "v", "dout"), ()),
}


def report_case(
    name, dims, dtype, capability, tiles=None, *, extras=False, problems=1, segments=1, blocks=False
) -> ReportCase:
    """One kernel of `_REPORTED` for head dims `dims`; `extras` adds a key mask, dropout and, to one problem, a bias: with
    `blocks` one of diagonal blocks."""
    kernel, constexprs, inputs, results = _REPORTED[name]
    if tiles is None:
        tiles = _tuning.tiles(f"attention_{name}", dims, dtype, capability)
        if blocks and name == "backward_queries":
            tiles = _fewer_keys(tiles)
    covered = _columns(*dims, tiles)
    sizes = dict(BLOCK_N=tiles.queries, BLOCK_M=tiles.keys)
    if kernel is backward_kernel:
        own = (tiles.keys, tiles.queries) if constexprs["OWN_KEYS"] else (tiles.queries, tiles.keys)
        sizes = dict(BLOCK_OWN=own[0], BLOCK_OTHER=own[1], OUT=tiles.out)
        if constexprs["OWN_KEYS"] and not _held(covered):
            constexprs, results = constexprs | dict(SECOND=False), results[:1]
    biased = kernel is bias_kernel or extras and problems == 1
    kind = BLOCKS.value if blocks else int(biased)
    flags = dict(PRECISION="ieee", HAS_MASK=extras, BIAS=kind, DROPOUT=extras, SPLIT=False)
    values = constexprs | covered | sizes | flags

    def table(kind, width):
        return ((kind,) * width,) * problems

    pointer, integer = f"*{_CODES[dtype]}", "i32:16"
    kinds = dict.fromkeys((*inputs, *results), table(pointer, segments))
    strided = kinds if problems * segments > 1 else inputs  # the results of one problem are contiguous
    kinds |= dict.fromkeys([f"{name}_strides" for name in strided], table(integer, 4 * segments))
    kinds |= dict.fromkeys(("query_lengths", "key_lengths", "own_lengths", "other_lengths"), table(integer, 3))
    kinds |= dict(
        facts=table(integer, 4 if extras and problems > 1 else 2),
        launch=table(integer, 2),
        lse=table("*fp32", 1),
        statistics="*fp32",
        dbias=pointer,
    )
    kinds |= dict.fromkeys(("scale", "keep_scale"), "fp32")
    if extras:
        kinds |= dict(key_mask=table("*u8", segments), mask_strides=table(integer, 4 * segments), seed="*i64")
    if biased:
        kinds |= dict(bias="*fp32" if blocks else pointer)
    if blocks:
        kinds |= dict(bias_index="*i64") | (dict(dblocks="*fp32") if name == "backward_queries" else {})
    absent = ("key_mask", "mask_strides", "bias", "bias_index", "dblocks", "seed", "top", "da2")
    absent += ("out_strides", "da_strides", "da2_strides")
    signature, final = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument == "bias_strides":
            signature[argument], final[index, 3] = (integer, integer, integer, "constexpr"), 1
        elif argument in kinds:
            signature[argument] = kinds[argument]
        elif argument in values or argument in absent:
            signature[argument], final[argument] = "constexpr", values.get(argument)
        else:
            signature[argument] = "i32"
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    title = f"attention_{name} {dims[0]}/{dims[1]} {dtype}"
    title += f" {problems}x{segments}" if problems * segments > 1 else ""
    title += (" mask+bias+dropout" if biased else " mask+dropout") if extras else ""
    title += " of diagonal blocks" if blocks else ""
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
            if name != "backward_bias":
                yield report_case(name, (64, 64), "bfloat16", capability, extras=True, blocks=True)
                # lists: two problems of two segments, eight of two with everything
                yield report_case(name, (64, 64), "bfloat16", capability, problems=2, segments=2)
                yield report_case(name, (64, 64), "bfloat16", capability, problems=2, segments=2, extras=True)


# --- Registration ---------------------------------------------------------------------------------------------------------

_SCHEMAS = {
    attention_fwd: "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, Tensor? bias_index, Tensor? seed, "
    "float scale, float dropout_p) -> (Tensor, Tensor)",
    attention_bwd: "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_mask, "
    "Tensor? bias, Tensor? bias_index, Tensor? seed, float scale, float dropout_p, int wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    attention_list_fwd: "(Tensor[] tensors, int[] problems, Tensor[] key_masks, Tensor? seed, float scale, float dropout_p) "
    "-> (Tensor[], Tensor[])",
    attention_list_bwd: "(Tensor[] dout, Tensor[] dlse, Tensor[] tensors, int[] problems, Tensor[] key_masks, Tensor[] out, "
    "Tensor[] lse, Tensor? seed, float scale, float dropout_p, int[] wanted) -> Tensor[]",
}
for _function, _schema in _SCHEMAS.items():
    _name = f"mmkernels_triton::{_function.__name__}"
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_name, ("cpu", "cuda"), _function)
attach_fakes("mmkernels_triton")

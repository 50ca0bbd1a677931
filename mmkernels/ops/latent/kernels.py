"""The family in Triton: forward, gradient of the queries, gradient of the input.

A key tile is loaded once, normalised in registers and used as key and as value. Its C channels lie side by side as chunks,
powers of two whose sum is close to C (261 = 256 + 16), so that no width is padded to the next power of two. Inside a tile
the position block comes first and the content after it: the wide block then starts at an aligned address. The queries'
channels, content first, are read and written through that rotation (`_columns`).

`README.md` here derives the mathematics and predicts each kernel's time.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import _backends
from .._shared.registration import attach_fakes
from .._shared.waves import split_keys

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def _load_rows(base, rows, inside, CX: tl.constexpr, CP: tl.constexpr, WIDTHS: tl.constexpr):
    """Chunks of N-sized rows: base is contiguous (rows, C)."""
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        columns, real = _columns(_offset(WIDTHS, i), WIDTHS[i], CX, CP)
        pointers = base + rows[:, None] * (CX + CP) + columns[None, :]
        tiles = tiles + (tl.load(pointers, mask=inside[:, None] & real[None, :], other=0.0),)
    return tiles


@triton.jit
def _store_rows(base, rows, inside, tiles, CX: tl.constexpr, CP: tl.constexpr, WIDTHS: tl.constexpr):
    for i in tl.static_range(len(WIDTHS)):
        columns, real = _columns(_offset(WIDTHS, i), WIDTHS[i], CX, CP)
        pointers = base + rows[:, None] * (CX + CP) + columns[None, :]
        tl.store(pointers, tiles[i].to(base.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def _load_keys(
    x,
    position,
    keys,
    visible,
    x_row,
    x_column,
    position_row,
    position_column,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Chunks of [position ; x] of the given keys, any strides; zeros where the key is not visible."""
    keys = keys.to(tl.int64)
    tiles = ()
    for i in tl.static_range(len(WIDTHS)):
        START: tl.constexpr = _offset(WIDTHS, i)
        c = (START + tl.arange(0, WIDTHS[i])).to(tl.int64)
        if START < CP:
            pointers = position + keys[:, None] * position_row + c[None, :] * position_column
            here = tl.load(pointers, mask=visible[:, None] & (c < CP)[None, :], other=0.0, eviction_policy=EVICT)
        if START + WIDTHS[i] > CP:
            pointers = x + keys[:, None] * x_row + (c - CP)[None, :] * x_column
            real = (c >= CP) & (c < CX + CP)
            content = tl.load(pointers, mask=visible[:, None] & real[None, :], other=0.0, eviction_policy=EVICT)
            if START < CP:
                here = tl.where((c < CP)[None, :], here, content)
            else:
                here = content
        tiles = tiles + (here,)
    return tiles


@triton.jit
def _normalise(tiles, visible, eps, C: tl.constexpr, WIDTHS: tl.constexpr, NORM: tl.constexpr):
    """LayerNorm without affine, statistics in two passes (the mean may be far larger than the deviation).

    Returns float32 chunks and 1 / deviation. Rows that are not visible stay zero.
    """
    total = tl.sum(tiles[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(WIDTHS)):
        total += tl.sum(tiles[i].to(tl.float32), 1)
    mean = total / C if NORM else tl.zeros_like(total)
    square = tl.zeros_like(total)
    centred = ()
    for i in tl.static_range(len(WIDTHS)):
        real = _offset(WIDTHS, i) + tl.arange(0, WIDTHS[i]) < C
        chunk = tl.where(real[None, :], tiles[i].to(tl.float32) - mean[:, None], 0.0)
        square += tl.sum(chunk * chunk, 1)
        centred = centred + (chunk,)
    rstd = tl.where(visible, tl.rsqrt(square / C + eps) if NORM else 1.0, 0.0)
    normalised = ()
    for i in tl.static_range(len(WIDTHS)):
        normalised = normalised + (centred[i] * rstd[:, None],)
    return normalised, rstd


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


# --- Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def forward(
    q_ptr,
    x_ptr,
    position_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    q_batch,
    x_batch,
    x_row,
    x_column,
    position_row,
    position_column,
    mask_batch,
    mask_column,
    R,
    M,
    splits,
    split_size,
    scale,
    eps,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASKED: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of query rows over one split of the keys: out (B, splits, R, C) and lse (B, splits, R) of that split."""
    pid, tiles = tl.program_id(0), tl.cdiv(R, BLOCK_R)
    rows = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    split, batch = pid // tiles % splits, (pid // tiles // splits).to(tl.int64)
    inside = rows < R
    x_ptr += batch * x_batch
    q = _load_rows(q_ptr + batch * q_batch, rows, inside, CX, CP, WIDTHS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = _zeros(BLOCK_R, WIDTHS)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.full([BLOCK_R], 0.0, tl.float32)
    last = tl.minimum((split + 1) * split_size, M)
    for start in tl.range(split * split_size, last, BLOCK_M, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_M)
        visible = keys < last
        if MASKED:
            visible = visible & tl.load(
                mask_ptr + batch * mask_batch + keys.to(tl.int64) * mask_column, mask=visible, other=0
            ).to(tl.int1)
        raw = _load_keys(
            x_ptr, position_ptr, keys, visible, x_row, x_column, position_row, position_column, CX, CP, WIDTHS, ""
        )
        xhat = _cast(_normalise(raw, visible, eps, CX + CP, WIDTHS, NORM)[0], WIDTHS, dtype)
        s = _inner(q, xhat, WIDTHS, PRECISION) * (scale * LOG2E)
        s = tl.where(visible[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key so far: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        acc = _accumulate(_scaled(acc, shrink, WIDTHS), p.to(dtype), xhat, WIDTHS, PRECISION)
        top = new_top
    acc = _scaled(acc, 1.0 / tl.where(total == 0.0, 1.0, total), WIDTHS)
    base = (batch * splits + split) * R
    _store_rows(out_ptr + base * (CX + CP), rows, inside, acc, CX, CP, WIDTHS)
    tl.store(lse_ptr + base + rows, (top + tl.log2(total)) * LN2, mask=inside)


@triton.jit
def merge(part_ptr, part_lse_ptr, out_ptr, lse_ptr, R, splits, C: tl.constexpr, WIDTH: tl.constexpr):
    """One query row: the splits' results weighted by exp(lse_s - lse), in the order of the splits."""
    row = tl.program_id(0)
    batch, row = (row // R).to(tl.int64), row % R
    columns = tl.arange(0, WIDTH)
    top = tl.full([], float("-inf"), tl.float32)
    for s in range(splits):
        top = tl.maximum(top, tl.load(part_lse_ptr + (batch * splits + s) * R + row))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.full([WIDTH], 0.0, tl.float32)
    for s in range(splits):
        index = (batch * splits + s) * R + row
        weight = tl.exp2((tl.load(part_lse_ptr + index) - shift) * LOG2E)
        total += weight
        acc += weight * tl.load(part_ptr + index * C + columns, mask=columns < C, other=0.0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + (batch * R + row) * C + columns, acc.to(out_ptr.dtype.element_ty), mask=columns < C)
    tl.store(lse_ptr + batch * R + row, shift + tl.log2(total) * LN2)


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
    dq_ptr,
    q_batch,
    x_batch,
    x_row,
    x_column,
    position_row,
    position_column,
    mask_batch,
    mask_column,
    R,
    M,
    splits,
    split_size,
    scale,
    eps,
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASKED: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq (B, splits, R, C) of one split: scale * sum_m dS xhat with dS = P (dout xhat^T - delta)."""
    pid, tiles = tl.program_id(0), tl.cdiv(R, BLOCK_R)
    rows = pid % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    split, batch = pid // tiles % splits, (pid // tiles // splits).to(tl.int64)
    inside = rows < R
    x_ptr += batch * x_batch
    q = _load_rows(q_ptr + batch * q_batch, rows, inside, CX, CP, WIDTHS)
    dout = _load_rows(dout_ptr + batch * R * (CX + CP), rows, inside, CX, CP, WIDTHS)
    lse = tl.load(lse_ptr + batch * R + rows, mask=inside, other=0.0) * LOG2E
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row without keys: its scores are -inf, P = 0
    delta = tl.load(delta_ptr + batch * R + rows, mask=inside, other=0.0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = _zeros(BLOCK_R, WIDTHS)
    last = tl.minimum((split + 1) * split_size, M)
    for start in tl.range(split * split_size, last, BLOCK_M, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_M)
        visible = keys < last
        if MASKED:
            visible = visible & tl.load(
                mask_ptr + batch * mask_batch + keys.to(tl.int64) * mask_column, mask=visible, other=0
            ).to(tl.int1)
        raw = _load_keys(
            x_ptr, position_ptr, keys, visible, x_row, x_column, position_row, position_column, CX, CP, WIDTHS, ""
        )
        xhat = _cast(_normalise(raw, visible, eps, CX + CP, WIDTHS, NORM)[0], WIDTHS, dtype)
        s = _inner(q, xhat, WIDTHS, PRECISION) * (scale * LOG2E)
        p = tl.where(visible[None, :], tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (_inner(dout, xhat, WIDTHS, PRECISION) - delta[:, None])
        acc = _accumulate(acc, ds.to(dtype), xhat, WIDTHS, PRECISION)
    acc = _scaled(acc, tl.full([BLOCK_R], 1.0, tl.float32) * scale, WIDTHS)
    _store_rows(dq_ptr + (batch * splits + split) * R * (CX + CP), rows, inside, acc, CX, CP, WIDTHS)


@triton.jit
def backward_x(
    dout_ptr,
    delta_ptr,
    q_ptr,
    x_ptr,
    position_ptr,
    mask_ptr,
    lse_ptr,
    dx_ptr,
    dposition_ptr,
    q_batch,
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
    CX: tl.constexpr,
    CP: tl.constexpr,
    WIDTHS: tl.constexpr,
    MASKED: tl.constexpr,
    NORM: tl.constexpr,
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
    for b in range(batches):
        batch = first + b
        visible = keys < M
        if MASKED:
            visible = visible & tl.load(
                mask_ptr + batch * mask_batch + keys.to(tl.int64) * mask_column, mask=visible, other=0
            ).to(tl.int1)
        x = x_ptr + batch * x_batch
        raw = _load_keys(x, position_ptr, keys, visible, x_row, x_column, position_row, position_column, CX, CP, WIDTHS, "")
        xhat = _cast(_normalise(raw, visible, eps, C, WIDTHS, NORM)[0], WIDTHS, dtype)
        grad = _zeros(BLOCK_M, WIDTHS)
        for start in tl.range(0, R, BLOCK_R, num_stages=STAGES):
            rows = start + tl.arange(0, BLOCK_R)
            inside = rows < R
            q = _load_rows(q_ptr + batch * q_batch, rows, inside, CX, CP, WIDTHS)
            dout = _load_rows(dout_ptr + batch * R * C, rows, inside, CX, CP, WIDTHS)
            lse = tl.load(lse_ptr + batch * R + rows, mask=inside, other=0.0) * LOG2E
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            delta = tl.load(delta_ptr + batch * R + rows, mask=inside, other=0.0)
            s = _inner(xhat, q, WIDTHS, PRECISION) * (scale * LOG2E)
            p = tl.where(visible[:, None], tl.exp2(s - lse[None, :]), 0.0)
            ds = p * (_inner(xhat, dout, WIDTHS, PRECISION) - delta[None, :]) * scale
            grad = _accumulate(grad, p.to(dtype), dout, WIDTHS, PRECISION)
            grad = _accumulate(grad, ds.to(dtype), q, WIDTHS, PRECISION)
        if NORM:
            # Loaded again: the float32 chunks would not survive the loop in registers.
            raw = _load_keys(
                x, position_ptr, keys, visible, x_row, x_column, position_row, position_column, CX, CP, WIDTHS, "evict_first"
            )
            xhat32, rstd = _normalise(raw, visible, eps, C, WIDTHS, NORM)
            mean, slope = tl.zeros_like(rstd), tl.zeros_like(rstd)
            for i in tl.static_range(len(WIDTHS)):
                mean += tl.sum(grad[i], 1) / C
                slope += tl.sum(grad[i] * xhat32[i], 1) / C
        rows = keys.to(tl.int64)[:, None]
        for i in tl.static_range(len(WIDTHS)):
            START: tl.constexpr = _offset(WIDTHS, i)
            c = START + tl.arange(0, WIDTHS[i])[None, :]
            value = grad[i]
            if NORM:
                value = (value - mean[:, None] - xhat32[i] * slope[:, None]) * rstd[:, None]
            if WANT_POSITION and START < CP:
                pointers = dposition_ptr + rows * CP + c
                mine = (keys < M)[:, None] & (c < CP)
                before = tl.load(pointers, mask=mine & (b > 0), other=0.0)
                tl.store(pointers, before + value, mask=mine)
            if WANT_X and START + WIDTHS[i] > CP:
                pointers = dx_ptr + (batch * M + rows) * CX + (c - CP)
                tl.store(pointers, value.to(dtype), mask=(keys < M)[:, None] & (c >= CP) & (c < C))


# --- Launchers --------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Sizes of a kernel's tile: query rows, keys, warps, pipeline stages, and how many fit on a multiprocessor at once."""

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int = 1


def chunks(channels: int) -> tuple:
    """At most three powers of two, 16 or more, whose sum covers the channels with the least padding.

    >>> chunks(261), chunks(322), chunks(704)
    ((256, 16), (256, 64, 16), (512, 128, 64))
    """
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


def tile(kernel: str, channels: int, dtype: torch.dtype, capability: tuple) -> Tile:
    width = sum(chunks(channels))
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    return Tile(64, 64, 4, 2) if width <= 128 else Tile(32, 32, 4, 1)


def device_facts(device: torch.device) -> tuple:
    """(compute capability, multiprocessors); those of an H200 in the interpreter."""
    if device.type != "cuda":
        return (9, 0), 132
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _guard(tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _common(q, x, position, key_mask, scale, eps):
    """Arguments that the three kernels share: strides, sizes, compile-time facts."""
    channels, shared = q.shape[2], 0 if position is None else position.shape[1]
    strides = [0 if q.shape[0] == 1 else q.stride(0), *x.stride()]
    strides += [0, 0] if position is None else position.stride()
    strides += [0, 0] if key_mask is None else key_mask.stride()
    facts = dict(
        scale=scale,
        eps=eps,
        CX=channels - shared,
        CP=shared,
        WIDTHS=chunks(channels),
        MASKED=key_mask is not None,
        NORM=eps >= 0,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    )
    return strides, facts


def _split(batch, rows, keys, sizes, multiprocessors):
    """(splits, keys a split): the wave model's count, in whole key tiles."""
    blocks = triton.cdiv(keys, sizes.keys)
    splits = split_keys(batch * triton.cdiv(rows, sizes.rows), blocks, multiprocessors * sizes.resident)
    return splits, triton.cdiv(blocks, splits) * sizes.keys


@torch.library.custom_op("mmkernels_triton::latent_fwd", mutates_args=())
def latent_fwd(
    q: torch.Tensor,
    x: torch.Tensor,
    position: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q xhat^T) xhat and its log-sum-exp; shapes in csrc/library.cpp."""
    batch, keys, _ = x.shape
    rows, channels = q.shape[1:]
    out = q.new_empty(batch, rows, channels)
    lse = q.new_empty(batch, rows, dtype=torch.float32)
    if keys == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if out.numel() == 0:
        return out, lse
    q = q.contiguous()
    capability, multiprocessors = device_facts(x.device)
    sizes = tile("forward", channels, x.dtype, capability)
    splits, split_size = _split(batch, rows, keys, sizes, multiprocessors)
    part, part_lse = out, lse
    if splits > 1:
        part = q.new_empty(batch, splits, rows, channels, dtype=torch.float32)
        part_lse = lse.new_empty(batch, splits, rows)
    strides, facts = _common(q, x, position, key_mask, scale, eps)
    with _guard(x):
        forward[(batch * splits * triton.cdiv(rows, sizes.rows),)](
            *(q, x, position, key_mask, part, part_lse, *strides, rows, keys, splits, split_size),
            **facts,
            **_launch(sizes),
        )
        if splits > 1:
            merge[(batch * rows,)](part, part_lse, out, lse, rows, splits, C=channels, WIDTH=_width(channels))
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, x and position, those that `wanted` asks for; shapes in csrc/library.cpp."""
    batch, keys, content = x.shape
    rows, channels = q.shape[1:]
    want_q, want_x, want_position = bool(wanted & 1), bool(wanted & 2), bool(wanted & 4 and position is not None)
    dq = q.new_empty(q.shape if want_q else 0)
    dx = q.new_empty(x.shape if want_x else 0)
    # Summed over the batch in float32, rounded once.
    dposition = q.new_empty(position.shape if want_position else 0, dtype=torch.float32)
    if batch == 0 or rows == 0 or keys == 0:
        return dq.zero_(), dx.zero_(), dposition.to(q.dtype).zero_()
    q, dout, out, lse = q.contiguous(), dout.contiguous(), out.contiguous(), lse.contiguous()
    capability, multiprocessors = device_facts(x.device)
    strides, facts = _common(q, x, position, key_mask, scale, eps)
    delta = torch.empty_like(lse)
    with _guard(x):
        row_sums[(batch * rows,)](
            *(dout, out, None if dlse is None else dlse.contiguous(), delta),
            C=channels,
            WIDTH=_width(channels),
            HAS_DLSE=dlse is not None,
        )
        inputs = (dout, delta, q, x, position, key_mask, lse)
        if want_q:
            sizes = tile("backward_q", channels, x.dtype, capability)
            splits, split_size = _split(batch, rows, keys, sizes, multiprocessors)
            part = q.new_empty(batch, splits, rows, channels, dtype=torch.float32)
            backward_q[(batch * splits * triton.cdiv(rows, sizes.rows),)](
                *(*inputs, part, *strides, rows, keys, splits, split_size), **facts, **_launch(sizes)
            )
            dq = part.sum((0, 1) if q.shape[0] == 1 else 1).view(q.shape).to(q.dtype)
        if (want_x and content) or want_position:
            sizes = tile("backward_x", channels, x.dtype, capability)
            walk = batch if want_position else 1
            backward_x[(triton.cdiv(keys, sizes.keys) * (batch // walk),)](
                *(*inputs, dx, dposition, *strides, rows, keys, walk),
                **facts,
                WANT_X=want_x,
                WANT_POSITION=want_position,
                **_launch(sizes),
            )
    return dq, dx, dposition.to(q.dtype)


def _launch(sizes):
    return dict(BLOCK_R=sizes.rows, BLOCK_M=sizes.keys, STAGES=sizes.stages, num_warps=sizes.warps)


def _width(channels):
    return triton.next_power_of_2(channels)


attach_fakes("mmkernels_triton")

"""Triton code that at least two op families use: tiles of a head dim, dropout by counter, splits put together again.

Naming: `BLOCK_*` are tile sizes, `*_strides` tuples of strides in elements, `rows` and `columns` vectors of indices. Offsets
are 64-bit wherever an index meets a stride.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import _backends
from . import waves

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class ReportCase(NamedTuple):
    """All that compiling one kernel for an architecture takes; see `mmkernels kernel-report`.

    `signature` maps every argument, in order, to its Triton type, "constexpr", or a tuple of them where the argument is a
    tuple. Pointers, and integers written "i32:16", are known to be divisible by 16. `constexprs` holds the values, with an
    argument's name or a path (argument index, place in the tuple) as the key; `options` what the launch says.
    """

    name: str
    kernel: object
    signature: dict
    constexprs: dict
    options: dict
    capability: int


# --- Head dims ------------------------------------------------------------------------------------------------------------


class Cover(NamedTuple):
    """A head dim as `steps` chunks of `first` and one of `second` (0: none): powers of two from 16, the excess masked."""

    first: int
    steps: int
    second: int


def _power(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def cover(dim: int, chunk: int = 0) -> Cover:
    """Covers `dim` by at most two powers of two held at once (261 = 256 + 16) or, where `chunk` says so, by a loop over
    chunks and a rest (704 = 5 * 128 + 64)."""
    if chunk and dim > chunk:
        steps, rest = divmod(dim, chunk)
        return Cover(chunk, steps + 1, 0) if rest > chunk // 2 else Cover(chunk, steps, _power(rest) if rest else 0)
    whole = _power(dim)
    first = whole // 2
    if 16 <= first < dim and first + _power(dim - first) < whole:
        return Cover(first, 1, _power(dim - first))
    return Cover(whole, 1, 0)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as `load_tile` reads it: rows that start at multiples of 16 bytes and are zero up to the next one.

    A copy where it is not so already: tiles of unaligned rows are loaded element by element, which costs more than the
    copy, and spills.
    """
    unit = 16 // tensor.element_size()
    width = tensor.shape[-1]
    steps = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    if width % unit == 0 and all(step % unit == 0 for step in steps) and tensor.data_ptr() % 16 == 0:
        if tensor.stride(-1) == 1 or width == 1:
            return tensor
    copy = tensor.new_zeros(*tensor.shape[:-1], triton.cdiv(width, unit) * unit)[..., :width]
    return copy.copy_(tensor)


@triton.constexpr_function
def unit_of(base):
    """Elements in 16 bytes: what divides every stride of an `aligned` tensor."""
    return 128 // base.dtype.element_ty.primitive_bitwidth


@triton.jit
def pair_base(base, strides, batch, head):
    """The first row of a (b, h) of an `aligned` (B, H, length, width) tensor."""
    UNIT: tl.constexpr = unit_of(base)  # dividing and multiplying again tells the compiler of the alignment
    return base + batch * (strides[0] // UNIT * UNIT) + head * (strides[1] // UNIT * UNIT)


@triton.jit
def load_tile(base, rows, row_stride, inside, start, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr):
    """base[rows, start : start + WIDTH] of an `aligned` tensor with COLUMNS columns.

    Zeros where `inside`, a vector over rows, is false and, with CHECK, beyond the last column.
    """
    UNIT: tl.constexpr = unit_of(base)
    columns = start + tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64)[:, None] * (row_stride // UNIT * UNIT) + columns[None, :]
    if CHECK:
        END: tl.constexpr = (COLUMNS + UNIT - 1) // UNIT * UNIT
        return tl.load(base + offsets, mask=inside[:, None] & (columns < END)[None, :], other=0.0)
    return tl.load(base + offsets, mask=inside[:, None], other=0.0)


@triton.jit
def store_tile(base, rows, row_stride, inside, start, tile, LIMIT: tl.constexpr):
    """base[rows, start : start + width] = tile with contiguous columns, where `inside` and below LIMIT."""
    columns = start + tl.arange(0, tile.shape[1])
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(base + offsets, tile.to(base.dtype.element_ty), mask=inside[:, None] & (columns < LIMIT)[None, :])


# --- Dropout by counter: the arithmetic of dropout.py ---------------------------------------------------------------------


@triton.jit
def dropout_row(seed, row):
    """The two words (low, high) of rows of the score matrix; `row` counts over (b, h, n) in 64 bits."""
    z = seed.to(tl.uint64) + (row.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def _mix32(u):
    u = (u ^ (u >> 16)) * 0x7FEB352D
    u = (u ^ (u >> 15)) * 0x846CA68B
    return u ^ (u >> 16)


@triton.jit
def dropout_keep(low, high, key, threshold):
    """True where the weight survives; `low`, `high` and the key index broadcast against each other."""
    draw = _mix32(_mix32(low ^ (key.to(tl.uint32) * 0x9E3779B1)) + high)
    return draw >= threshold


# --- Splits ---------------------------------------------------------------------------------------------------------------


FORCED_SPLITS = None  # tests set it: every launch then splits so many ways (as far as there are blocks)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # the interpreter plays an H200
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_count(tiles: int, blocks: int, device: torch.device, num_warps: int) -> int:
    """Into how many parts a launch of `tiles` pieces of `blocks` steps is split on `device`.

    Two thread blocks of four warps, or one of eight, are taken to be resident on a multiprocessor: these kernels use the
    whole register file.
    """
    if FORCED_SPLITS is not None:
        return max(1, min(FORCED_SPLITS, blocks))
    return waves.split_keys(tiles, blocks, _multiprocessors(device) * max(1, 8 // num_warps))


@triton.jit
def merge_kernel(
    partial,  # float32 (splits, rows, columns): sums of exp(score - top) times value
    top,  # float32 (splits, rows): largest score of the split; -inf where it has no key
    total,  # float32 (splits, rows): sum of exp(score - top)
    out,  # (rows, columns)
    lse,  # float32 (rows): natural logarithm
    rows,
    columns,
    splits,
    BASE2: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Softmax over split keys put together: out = sum_s exp(top_s - top) partial_s / sum_s exp(top_s - top) total_s."""
    column_blocks = tl.cdiv(columns, BLOCK_C)
    pid = tl.program_id(0)
    r = (pid // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (pid % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = r < rows
    mask = inside[:, None] & (c < columns)[None, :]
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    row = r  # of the current split
    for _ in range(splits):
        m_split = tl.load(top + row, mask=inside, other=float("-inf"))
        m_new = tl.maximum(m, m_split)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        keep = tl.exp2(m - shift) if BASE2 else tl.exp(m - shift)
        gain = tl.exp2(m_split - shift) if BASE2 else tl.exp(m_split - shift)
        z = z * keep + tl.load(total + row, mask=inside, other=0.0) * gain
        acc = (
            acc * keep[:, None] + tl.load(partial + row[:, None] * columns + c[None, :], mask=mask, other=0.0) * gain[:, None]
        )
        m = m_new
        row += rows
    z = tl.where(z == 0.0, 1.0, z)
    tl.store(out + r[:, None] * columns + c[None, :], (acc / z[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(lse + r, (m + tl.log2(z)) * LN_2 if BASE2 else m + tl.log(z), mask=inside & (pid % column_blocks == 0))


@triton.jit
def sum_kernel(partial, out, size, splits, BLOCK: tl.constexpr):
    """out = partial.sum(0) of (splits, size), first split first."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    acc = tl.zeros([BLOCK], tl.float32)
    source = index
    for _ in range(splits):
        acc += tl.load(partial + source, mask=mask, other=0.0)
        source += size
    tl.store(out + index, acc.to(out.dtype.element_ty), mask=mask)


def merge_splits(partial, top, total, out, lse, base2: bool = True) -> None:
    """Fills `out` (..., C) and `lse` (...) from `partial` (S, ..., C) and `top`, `total` (S, ...); all contiguous.

    `base2`: the scores are in base 2 rather than e.
    """
    splits, columns = partial.shape[0], partial.shape[-1]
    rows = lse.numel()
    block_r, block_c = (64, 1024) if _backends.INTERPRET else (4, min(256, max(16, triton.next_power_of_2(columns))))
    grid = (triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c),)
    merge_kernel[grid](
        partial, top, total, out, lse, rows, columns, splits, BASE2=base2, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4
    )


def sum_splits(partial, out) -> None:
    """Fills `out` with `partial.sum(0)`, both contiguous."""
    block = 65536 if _backends.INTERPRET else 1024
    grid = (triton.cdiv(out.numel(), block),)
    sum_kernel[grid](partial, out, out.numel(), partial.shape[0], BLOCK=block, num_warps=4)


# --- Launching ------------------------------------------------------------------------------------------------------------


def input_precision(dtype: torch.dtype) -> str:
    """What `tl.dot` makes of float32 operands: exact products unless torch has been told that TF32 will do."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"

"""Triton code that at least two op families use: tiles of a head dim, dropout by counter, splits put together again.

Naming: `BLOCK_*` are tile sizes, `*_strides` tuples of strides in elements, `rows` and `columns` vectors of indices. Offsets
are 64-bit wherever an index meets a stride.
"""

import functools
import math
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


def ceil_div(a: int, b: int) -> int:
    """On the host, where `triton.cdiv` costs microseconds."""
    return -(-a // b)


def _power(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


@functools.cache
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
    copy = tensor.new_zeros(*tensor.shape[:-1], ceil_div(width, unit) * unit)[..., :width]
    return copy.copy_(tensor)


@triton.constexpr_function
def unit_of(dtype, width=0):
    """Elements in 16 bytes, which divide every stride of an `aligned` tensor; those that also divide `width`, and so the
    strides of a contiguous one."""
    return math.gcd(128 // dtype.primitive_bitwidth, width)


# --- Rows of several problems ---------------------------------------------------------------------------------------------
#
# One launch serves several attention problems, the rows of each in one or two segments: tensors (B, H, rows, width). What is
# said of every problem comes as a table, a tuple with a tuple for each problem. The integers in it are 16 times what they
# mean: Triton would compile a kernel again for every pattern of ones and of multiples of 16 in a tuple.

BOUNDARY, LENGTH, BEFORE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # columns of `lengths_table`


def times_16(*integers) -> tuple:
    """Integers as a table has them."""
    return tuple([16 * i for i in integers])


def segment_tables(operands) -> tuple:
    """Pointers and strides of `operands`, the list of segments of each problem, for `problem_rows`."""
    width = max([len(segments) for segments in operands])
    pointers = [(*segments, *segments[-1:] * (width - len(segments))) for segments in operands]
    return tuple(pointers), tuple([times_16(*[s for t in segments for s in t.stride()]) for segments in pointers])


def lengths_table(operands) -> tuple:
    """Of each problem: rows of the first segment, of both, and of all pairs of the problems before it."""
    table, before = [], 0
    for segments in operands:
        batch, heads, first, _ = segments[0].shape
        length = sum([t.shape[2] for t in segments])
        table.append(times_16(first, length, before))
        before += batch * heads * length
    return tuple(table)


@triton.constexpr_function
def log2(power):
    return power.bit_length() - 1


@triton.jit
def pick(table, COLUMN: tl.constexpr, problem):
    """table[problem][COLUMN]; `problem` is a scalar or a vector."""
    chosen = table[0][COLUMN]
    for i in tl.static_range(1, len(table)):
        chosen = tl.where(problem == i, table[i][COLUMN], chosen)
    return chosen


@triton.jit
def pick_integer(table, COLUMN: tl.constexpr, problem, UNIT: tl.constexpr = 1):
    """An integer of a table, known to be a multiple of UNIT. Dividing and multiplying tells the compiler."""
    SHIFT: tl.constexpr = log2(16 * UNIT)
    return (pick(table, COLUMN, problem) >> SHIFT) * UNIT


@triton.jit
def pick_count(table, COLUMN: tl.constexpr, problem):
    """A number of rows, int32, of a table.

    By way of 64 bits: from a shift of 32 the compiler knows the range, and so that `count - i` does not wrap, which it then
    computes for every row i of a tile before a loop and keeps in registers.
    """
    return ((pick(table, COLUMN, problem).to(tl.int64) << 28) >> 32).to(tl.int32)


@triton.jit
def locate(table, COLUMN: tl.constexpr, index):
    """The problem that `index` belongs to and its place there; the column says where problems begin, in ascending order."""
    problem = 0
    begin = 0
    for i in tl.static_range(1, len(table)):
        here = index >= table[i][COLUMN] // 16
        problem = tl.where(here, i, problem)
        begin = tl.where(here, table[i][COLUMN] // 16, begin)
    return problem, index - begin


@triton.jit
def _segment(pointers, strides, SEGMENT: tl.constexpr, problem, batch, head, UNIT: tl.constexpr):
    base = pick(pointers, SEGMENT, problem)
    base += batch * pick_integer(strides, 4 * SEGMENT, problem, UNIT)
    base += head * pick_integer(strides, 4 * SEGMENT + 1, problem, UNIT)
    return base, pick_integer(strides, 4 * SEGMENT + 2, problem, UNIT)


@triton.jit
def problem_rows(pointers, strides, problem, batch, head, boundary, UNIT: tl.constexpr):
    """Where the rows of one (b, h) of a problem are, for `row_offsets`; UNIT divides all strides.

    Row 0's pointer and the stride; where there are second segments, also what is added to the offsets of the rows from
    `boundary` on, and their stride.
    """
    base, stride = _segment(pointers, strides, 0, problem, batch, head, UNIT)
    if len(pointers[0]) == 1:
        return base, stride
    else:
        BYTES: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8
        second, second_stride = _segment(pointers, strides, 1, problem, batch, head, UNIT)
        jump = (second.to(tl.int64) - base.to(tl.int64)) // (BYTES * UNIT) * UNIT
        return base, stride, jump - boundary.to(tl.int64) * second_stride, second_stride, boundary


@triton.jit
def row_offsets(place, rows):
    """From place[0] to the first column of `rows`."""
    if len(place) == 2:
        return rows.to(tl.int64) * place[1]
    else:
        first = rows < place[4]
        return rows.to(tl.int64) * tl.where(first, place[1], place[3]) + tl.where(first, 0, place[2])


@triton.jit
def row_pointers(place, rows):
    """Pointers to the first column of `rows`."""
    return place[0] + row_offsets(place, rows)


@triton.jit
def load_tile(place, rows, inside, start, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr):
    """Columns start : start + WIDTH of rows of an `aligned` tensor with COLUMNS columns.

    Zeros where `inside`, a vector over rows, is false and, with CHECK, beyond the last column.
    """
    columns = start + tl.arange(0, WIDTH)
    pointers = place[0] + (row_offsets(place, rows)[:, None] + columns[None, :])
    if CHECK:
        UNIT: tl.constexpr = unit_of(place[0].dtype.element_ty)
        END: tl.constexpr = (COLUMNS + UNIT - 1) // UNIT * UNIT
        return tl.load(pointers, mask=inside[:, None] & (columns < END)[None, :], other=0.0)
    return tl.load(pointers, mask=inside[:, None], other=0.0)


@triton.jit
def store_tile(place, rows, inside, start, tile, LIMIT: tl.constexpr):
    """Stores columns start : start + width, contiguous, where `inside` and below LIMIT."""
    columns = start + tl.arange(0, tile.shape[1])
    pointers = row_pointers(place, rows)[:, None] + columns[None, :]
    tl.store(pointers, tile.to(place[0].dtype.element_ty), mask=inside[:, None] & (columns < LIMIT)[None, :])


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


# --- GELU -------------------------------------------------------------------------------------------------------------------

_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2/pi)
_CUBIC = tl.constexpr(1.5957691216057308 * 0.044715)
_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _tail(y, e):
    """The normal distribution at -|y|, where e = exp(-y^2/2): e times a polynomial of 1 / (1 + 0.4 |y|) (see
    ops/activation/README.md)."""
    u = 1.0 / (tl.abs(y) * 0.4 + 1.0)
    w = u * 0.03210155 - 0.17619535
    w = w * u + 0.38083178
    w = w * u - 0.37203285
    w = w * u + 0.117794
    w = w * u - 0.02591531
    w = w * u + 0.09101176
    w = w * u + 0.13320881
    w = w * u + 0.15961935
    w = w * u + 0.1595763
    return e * (u * w)


@triton.jit
def gelu(y, TANH: tl.constexpr):
    if TANH:
        return y / (1.0 + tl.exp(-y * (y * y * _CUBIC + _LINEAR)))
    tail = _tail(y, tl.exp(y * y * -0.5))
    return y * tl.where(y > 0.0, 1.0 - tail, tail)


@triton.jit
def gelu_slope(y, TANH: tl.constexpr):
    square = y * y
    if TANH:
        e = tl.exp(-y * (square * _CUBIC + _LINEAR))
        sigmoid = 1.0 / (1.0 + e)
        near = (e * sigmoid) * (y * sigmoid) * (square * (3.0 * _CUBIC) + _LINEAR)
        return sigmoid + tl.where(square > 100.0, y * 0.0, near)  # beyond 10 less than 1e-36, and out of range
    e = tl.exp(square * -0.5)
    tail = _tail(y, e)
    return tl.where(y > 0.0, 1.0 - tail, tail) + y * (e * _DENSITY)


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
def _result_rows(out, out_strides, lengths, row, heads, UNIT: tl.constexpr):
    """The problem of each of `row`, which count through all problems, its number there and pointers to its results."""
    problem, local = locate(lengths, BEFORE, row)
    length, boundary = pick_integer(lengths, LENGTH, problem), pick_integer(lengths, BOUNDARY, problem)
    pair, n = local // length, local % length
    place = problem_rows(out, out_strides, problem, pair // heads, pair % heads, boundary, UNIT)
    return problem, local, row_pointers(place, n)


@triton.jit
def merge_kernel(
    partial,  # float32 (splits, rows, columns): sums of exp(score - top) times value
    top,  # float32 (splits, rows): largest score of the split; -inf where it has no key
    total,  # float32 (splits, rows): sum of exp(score - top)
    lse,  # table of contiguous float32 (B, H, rows): natural logarithm
    out,  # tables of (B, H, rows, columns), filled row by row
    out_strides,
    lengths,
    heads,
    rows,
    columns,
    splits,
    UNIT: tl.constexpr,  # divides the strides of the results, and 16 bytes of them
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
    problem, local, results = _result_rows(out, out_strides, lengths, r, heads, UNIT)
    tl.store(results[:, None] + c[None, :], (acc / z[:, None]).to(out[0][0].dtype.element_ty), mask=mask)
    logarithm = (m + tl.log2(z)) * LN_2 if BASE2 else m + tl.log(z)
    tl.store(pick(lse, 0, problem) + local, logarithm, mask=inside & (pid % column_blocks == 0))


@triton.jit
def sum_kernel(
    partial,  # float32 (splits, rows, columns)
    out,  # tables of (B, H, rows, columns), filled row by row
    out_strides,
    lengths,
    heads,
    rows,
    columns,
    splits,
    UNIT: tl.constexpr,  # divides the strides of the results, and 16 bytes of them
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = partial.sum(0), first split first."""
    column_blocks = tl.cdiv(columns, BLOCK_C)
    pid = tl.program_id(0)
    r = (pid // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (pid % column_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    row = r  # of the current split
    for _ in range(splits):
        acc += tl.load(partial + row[:, None] * columns + c[None, :], mask=mask, other=0.0)
        row += rows
    _, _, results = _result_rows(out, out_strides, lengths, r, heads, UNIT)
    tl.store(results[:, None] + c[None, :], acc.to(out[0][0].dtype.element_ty), mask=mask)


def _results(partial, out) -> tuple:
    """Grid, arguments and options of the two kernels above."""
    splits, rows, columns = partial.flatten(1, -2).shape
    block_r, block_c = (64, 1024) if _backends.INTERPRET else (4, min(256, max(16, triton.next_power_of_2(columns))))
    grid = (ceil_div(rows, block_r) * ceil_div(columns, block_c),)
    facts = (lengths_table(out), out[0][0].shape[1], rows, columns, splits)
    unit = math.gcd(16 // out[0][0].element_size(), columns)
    return grid, (*segment_tables(out), *facts), dict(UNIT=unit, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4)


def merge_splits(partial, top, total, out, lse, base2: bool = True) -> None:
    """Fills `out`, a list of each problem's segments (B, H, rows, C), and `lse`, of each problem contiguous (B, H, rows).

    `partial` (S, ..., C) and `top`, `total` (S, ...), contiguous, have the rows of all problems one after another. `base2`:
    the scores are in base 2 rather than e.
    """
    grid, arguments, options = _results(partial, out)
    merge_kernel[grid](partial, top, total, tuple((t,) for t in lse), *arguments, BASE2=base2, **options)


def sum_splits(partial, out) -> None:
    """Fills `out`, a list of each problem's segments (B, H, rows, C), with `partial.sum(0)`, rows in the same order."""
    grid, arguments, options = _results(partial, out)
    sum_kernel[grid](partial, *arguments, **options)


# --- Sums over rows ---------------------------------------------------------------------------------------------------------


class RowParts(NamedTuple):
    """`groups` equal groups of rows, each cut into `count` parts of `size` rows."""

    rows: int  # of a group
    groups: int
    count: int
    size: int


def row_parts(rows: int, groups: int, device: torch.device) -> RowParts:
    """As many parts as occupy `device` twice; none below 8 rows for that, as each has sums of its own to write."""
    own = rows // groups
    most = max(1, 2 * _multiprocessors(device) // groups)
    size = max(1, ceil_div(own, min(max(1, own // 8), most)))
    return RowParts(own, groups, ceil_div(own, size), size)


@triton.jit
def row_sum_kernel(partial, index, out, columns, parts, rows, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[group] = sum of partial[group * parts : (group + 1) * parts], of rows of float32, in an order that never changes.

    With `index`, partial has `parts` rows of each example, and a group those of the examples whose index it is.
    """
    blocks = tl.cdiv(columns, BLOCK_C)
    pid = tl.program_id(0)
    group = (pid // blocks).to(tl.int64)
    c = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    begin = 0
    end = parts
    if index is not None:
        end = rows
    else:
        partial += group * parts * columns
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        own = p < end
        if index is not None:
            own = own & (tl.load(index + p // parts, mask=own, other=-1) == group)
        at = p.to(tl.int64)[:, None] * columns + c[None, :]
        acc += tl.load(partial + at, mask=own[:, None] & (c < columns)[None, :], other=0.0)
    tl.store(out + group * columns + c, tl.sum(acc, 0), mask=c < columns)


def sum_rows(partial, out, index=None) -> None:
    """Fills `out` (G, C) or (C,) with sums of as many consecutive rows of `partial` (G * P, C); both contiguous float32.

    With `index`, int64 (B,), `partial` is (B * P, C) and row g of `out` has the sum of the examples whose index is g.
    """
    columns = partial.shape[-1]
    groups, rows = out.numel() // columns, partial.shape[0]
    block = 1024 if _backends.INTERPRET else 64
    row_sum_kernel[(groups * ceil_div(columns, block),)](
        partial,
        index,
        out,
        columns,
        rows // (groups if index is None else index.shape[0]),
        rows,
        BLOCK_P=32,
        BLOCK_C=block,
        num_warps=4,
    )


# --- Launching ------------------------------------------------------------------------------------------------------------


def input_precision(dtype: torch.dtype) -> str:
    """What `tl.dot` makes of float32 operands: exact products unless torch has been told that TF32 will do."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"

"""Triton kernels of the `norm` family and the ops `mmkernels_triton::norm_{fwd,bwd}`.

Up to 8192 channels a program holds whole rows (`WHOLE`) and memory is read and written once; wider rows are walked in blocks,
three times forward; their backward finds the two averages of a row in a launch of its own. README.md beside this file has the
formulas.

Naming: `BLOCK` columns of a tile, `ROWS` of its rows, C channels, `*_strides` tuples of strides in elements. Rows are numbered
over (batch, length); offsets are 64-bit. A parameter's `KIND` is 0 where there is none, 1 for (C,), 2 for (G, C), of which
example b has row `index[b]`, or b.
"""

import torch
import triton
import triton.language as tl

from ... import _backends
from .._shared.kernels import ReportCase, row_parts, sum_rows
from .._shared.registration import attach_fakes

MOST_HELD = 8192


@triton.jit
def _at(strides, example, t, c):
    """Offsets of columns c of rows t of a (B, T, C) tensor."""
    return (example * strides[0] + t * strides[1])[:, None] + c.to(tl.int64)[None, :] * strides[2]


@triton.jit
def _rows(x, x2, x_strides, x2_strides, first, example, t, inside, c, C: tl.constexpr, PAIR: tl.constexpr):
    """Columns c of rows, float32; with PAIR those from `first` on are rows of x2. Zeros outside."""
    columns = (c < C)[None, :]
    if PAIR:
        head = inside & (t < first)
        tail = inside & (t >= first)
        tile = tl.load(x + _at(x_strides, example, t, c), mask=head[:, None] & columns, other=0.0).to(tl.float32)
        at = _at(x2_strides, example, t - first, c)
        tile += tl.load(x2 + at, mask=tail[:, None] & columns, other=0.0).to(tl.float32)
    else:
        tile = tl.load(x + _at(x_strides, example, t, c), mask=inside[:, None] & columns, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _parameter(p, strides, example, inside, c, C: tl.constexpr, KIND: tl.constexpr):
    """Columns c of a parameter, float32, (1, BLOCK) or (ROWS, BLOCK)."""
    inside_columns = (c < C)[None, :]
    columns = c.to(tl.int64)[None, :] * strides[1]
    if KIND == 1:
        tile = tl.load(p + columns, mask=inside_columns, other=0.0)
    else:
        tile = tl.load(p + (example * strides[0])[:, None] + columns, mask=inside[:, None] & inside_columns, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _parameter_row(index, example, inside):
    """The row of (G, C) parameters that examples have."""
    if index is None:
        return example
    else:
        return tl.load(index + example, mask=inside, other=0)


@triton.jit
def _sums(
    x,
    x2,
    residual,
    residual_bias,
    x_strides,
    x2_strides,
    residual_strides,
    residual_bias_strides,
    first,
    example,
    t,
    inside,
    c,
    C: tl.constexpr,
    PAIR: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Columns c of s as it is stored, in float32."""
    tile = _rows(x, x2, x_strides, x2_strides, first, example, t, inside, c, C, PAIR)
    if RESIDUAL:
        branch = _rows(residual, None, residual_strides, None, first, example, t, inside, c, C, False)
        if BIASED:
            branch += _parameter(residual_bias, residual_bias_strides, example, inside, c, C, 1)
        tile = (tile + branch).to(x.dtype.element_ty).to(tl.float32)
    return tile


@triton.jit
def forward_kernel(
    x,
    x2,
    residual,
    residual_bias,
    gain,
    bias,
    index,
    out,
    total,
    mean_of,
    rstd_of,
    x_strides,
    x2_strides,
    residual_strides,
    residual_bias_strides,
    gain_strides,
    bias_strides,
    rows,
    length,
    first,
    eps,
    C: tl.constexpr,
    PAIR: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIASED: tl.constexpr,
    GAIN: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows: s, its statistics, the result."""
    WHOLE: tl.constexpr = BLOCK >= C
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    example = r // length
    own = _parameter_row(index, example, inside)
    t = r % length
    c = tl.arange(0, BLOCK)
    if WHOLE:
        s = _sums(
            x, x2, residual, residual_bias, x_strides, x2_strides, residual_strides, residual_bias_strides,
            first, example, t, inside, c, C, PAIR, RESIDUAL, BIASED,
        )  # fmt: skip
        mean = tl.sum(s, 1) / C
        centred = tl.where((c < C)[None, :], s - mean[:, None], 0.0)
        squares = tl.sum(centred * centred, 1)
    else:
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, C, BLOCK):
            sums += _sums(
                x, x2, residual, residual_bias, x_strides, x2_strides, residual_strides, residual_bias_strides,
                first, example, t, inside, start + c, C, PAIR, RESIDUAL, BIASED,
            )  # fmt: skip
        mean = tl.sum(sums, 1) / C
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, C, BLOCK):
            s = _sums(
                x, x2, residual, residual_bias, x_strides, x2_strides, residual_strides, residual_bias_strides,
                first, example, t, inside, start + c, C, PAIR, RESIDUAL, BIASED,
            )  # fmt: skip
            centred = tl.where((start + c < C)[None, :], s - mean[:, None], 0.0)
            sums += centred * centred
        squares = tl.sum(sums, 1)
    rstd = 1.0 / tl.sqrt_rn(squares / C + eps)
    tl.store(mean_of + r, mean, mask=inside)
    tl.store(rstd_of + r, rstd, mask=inside)
    for start in range(0, C, BLOCK):
        columns = start + c
        if not WHOLE:
            s = _sums(
                x, x2, residual, residual_bias, x_strides, x2_strides, residual_strides, residual_bias_strides,
                first, example, t, inside, columns, C, PAIR, RESIDUAL, BIASED,
            )  # fmt: skip
        mask = inside[:, None] & (columns < C)[None, :]
        at = r[:, None] * C + columns[None, :]
        if RESIDUAL:
            tl.store(total + at, s.to(total.dtype.element_ty), mask=mask)
        y = (s - mean[:, None]) * rstd[:, None]
        if GAIN > 0:
            y *= _parameter(gain, gain_strides, own, inside, columns, C, GAIN)
        if BIAS > 0:
            y += _parameter(bias, bias_strides, own, inside, columns, C, BIAS)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gradients(
    dout,
    rows,
    rows2,
    gain,
    index,
    mean,
    rstd,
    dout_strides,
    rows_strides,
    rows2_strides,
    gain_strides,
    first,
    example,
    t,
    inside,
    c,
    C: tl.constexpr,
    PAIR: tl.constexpr,
    GAIN: tl.constexpr,
):
    """(incoming, normalised, incoming times gain) of columns c; zeros outside."""
    incoming = _rows(dout, None, dout_strides, None, first, example, t, inside, c, C, False)
    s = _rows(rows, rows2, rows_strides, rows2_strides, first, example, t, inside, c, C, PAIR)
    normed = tl.where((c < C)[None, :], (s - mean[:, None]) * rstd[:, None], 0.0)
    g = incoming
    if GAIN > 0:
        g = incoming * _parameter(gain, gain_strides, _parameter_row(index, example, inside), inside, c, C, GAIN)
    return incoming, normed, g


@triton.jit
def averages_kernel(
    dout,
    rows,
    rows2,
    gain,
    index,
    mean_of,
    rstd_of,
    averages,  # (2, number of rows): of g and of g times the normalised row
    dout_strides,
    rows_strides,
    rows2_strides,
    gain_strides,
    count,
    length,
    first,
    C: tl.constexpr,
    PAIR: tl.constexpr,
    GAIN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For rows too wide to be held: what the gradient of every element subtracts."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = r < count
    example = r // length
    t = r % length
    mean = tl.load(mean_of + r, mask=inside, other=0.0)
    rstd = tl.load(rstd_of + r, mask=inside, other=0.0)
    a = tl.zeros([ROWS, BLOCK], tl.float32)
    b = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, C, BLOCK):
        _, normed, g = _gradients(
            dout, rows, rows2, gain, index, mean, rstd, dout_strides, rows_strides, rows2_strides, gain_strides,
            first, example, t, inside, start + tl.arange(0, BLOCK), C, PAIR, GAIN,
        )  # fmt: skip
        a += g
        b += g * normed
    tl.store(averages + r, tl.sum(a, 1) / C, mask=inside)
    tl.store(averages + count + r, tl.sum(b, 1) / C, mask=inside)


@triton.jit
def backward_kernel(
    dout,
    dsum,
    rows,
    rows2,
    gain,
    index,
    mean_of,
    rstd_of,
    averages,
    dx,
    sums,  # float32 (3, parts of all groups, C): gradients of gain, bias and residual's bias
    dout_strides,
    dsum_strides,
    rows_strides,
    rows2_strides,
    gain_strides,
    count,
    length,
    first,
    own,  # rows of a group
    parts,  # of a group
    size,  # rows of a part
    all_parts,
    C: tl.constexpr,
    PAIR: tl.constexpr,
    GAIN: tl.constexpr,
    SUMMED: tl.constexpr,  # there is a dsum
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One part of the rows, all columns of them or a block: ds = dsum + rstd (g - avg(g) - normed avg(g normed))."""
    WHOLE: tl.constexpr = BLOCK >= C
    pid = tl.program_id(0).to(tl.int64)
    part = pid % all_parts
    c = (pid // all_parts).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    begin = part // parts * own + part % parts * size
    end = tl.minimum(begin + size, (part // parts + 1) * own)
    dgain = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    dresidual_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        inside = r < end
        example = r // length
        t = r % length
        mean = tl.load(mean_of + r, mask=inside, other=0.0)
        rstd = tl.load(rstd_of + r, mask=inside, other=0.0)
        incoming, normed, g = _gradients(
            dout, rows, rows2, gain, index, mean, rstd, dout_strides, rows_strides, rows2_strides, gain_strides,
            first, example, t, inside, c, C, PAIR, GAIN,
        )  # fmt: skip
        if WHOLE:
            average = tl.sum(g, 1) / C
            average_normed = tl.sum(g * normed, 1) / C
        else:
            average = tl.load(averages + r, mask=inside, other=0.0)
            average_normed = tl.load(averages + count + r, mask=inside, other=0.0)
        if WANTED & 9:
            ds = (g - average[:, None] - normed * average_normed[:, None]) * rstd[:, None]
            if SUMMED:
                ds += _rows(dsum, None, dsum_strides, None, first, example, t, inside, c, C, False)
            if WANTED & 1:
                at = r[:, None] * C + c[None, :]
                tl.store(dx + at, ds.to(dx.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
            if WANTED & 8:
                dresidual_bias += ds
        if WANTED & 2:
            dgain += incoming * normed
        if WANTED & 4:
            dbias += incoming
    at = sums + part * C + c
    if WANTED & 2:
        tl.store(at, tl.sum(dgain, 0), mask=c < C)
    if WANTED & 4:
        tl.store(at + all_parts * C, tl.sum(dbias, 0), mask=c < C)
    if WANTED & 8:
        tl.store(at + 2 * all_parts * C, tl.sum(dresidual_bias, 0), mask=c < C)


# --- Launchers ------------------------------------------------------------------------------------------------------------


def _tile(channels: int, elements: int) -> dict:
    """ROWS, BLOCK and num_warps of tiles of about `elements`; in the interpreter the largest that still leave edges."""
    block = triton.next_power_of_2(channels) if channels <= MOST_HELD else 4096
    if _backends.INTERPRET:
        return dict(ROWS=max(1, min(32, 65536 // block)), BLOCK=block, num_warps=4)
    rows = max(1, min(16, elements // block))
    return dict(ROWS=rows, BLOCK=block, num_warps=max(1, min(16, rows * block // 512)))


# In tiles of 16 to 32 elements a thread: the backward holds three of them as sums.
def _forward_tile(channels):
    return _tile(channels, 2048)


def _backward_tile(channels):
    return _tile(channels, 2048)


def _strides(tensor) -> tuple:
    return (0, 0, 0) if tensor is None else tensor.stride()


def _of_parameter(tensor) -> tuple:
    """(kind, strides) of (C,) or (G, C)."""
    if tensor is None:
        return 0, (0, 0)
    return (1, (0, tensor.stride(0))) if tensor.dim() == 1 else (2, tensor.stride())


def norm_fwd(x, residual, residual_bias, gain, bias, index, eps):
    """`mmkernels_triton::norm_fwd`; csrc/schemas.h has the contract."""
    first, second = x[0], x[1] if len(x) > 1 else None
    batch, length, channels = first.shape[0], sum(one.shape[1] for one in x), first.shape[2]
    out = first.new_empty(batch, length, channels)
    total = first.new_empty(0) if residual is None else torch.empty_like(out)
    mean = first.new_empty(batch, length, dtype=torch.float32)
    rows, rstd = batch * length, torch.empty_like(mean)
    if rows == 0:
        return out, total, mean, rstd
    (gain_kind, gain_strides), (bias_kind, bias_strides) = _of_parameter(gain), _of_parameter(bias)
    tile = _forward_tile(channels)
    with torch.cuda.device_of(first):
        forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            first,
            second,
            residual,
            residual_bias,
            gain,
            bias,
            index,
            out,
            total,
            mean,
            rstd,
            _strides(first),
            _strides(second),
            _strides(residual),
            _of_parameter(residual_bias)[1],
            gain_strides,
            bias_strides,
            rows,
            length,
            first.shape[1],
            eps,
            C=channels,
            PAIR=second is not None,
            RESIDUAL=residual is not None,
            BIASED=residual_bias is not None,
            GAIN=gain_kind,
            BIAS=bias_kind,
            **tile,
        )
    return out, total, mean, rstd


def norm_bwd(dout, dsum, rows, mean, rstd, gain, index, groups, wanted):
    """`mmkernels_triton::norm_bwd`; csrc/schemas.h has the contract."""
    first, second = rows[0], rows[1] if len(rows) > 1 else None
    batch, length, channels = dout.shape
    gain_kind, gain_strides = _of_parameter(gain)
    per_example = (gain_kind == 2, wanted & 16 != 0, False)
    wants = [wanted & bit != 0 for bit in (2, 4, 8)]

    parameter_rows = batch if index is None else groups

    def gradient(want, own):
        shape = (parameter_rows, channels) if own else (channels,)
        return dout.new_empty(shape if want else (0,), dtype=torch.float32)

    gradients = [gradient(want, own) for want, own in zip(wants, per_example, strict=True)]
    dx = dout.new_empty(dout.shape if wanted & 1 else (0,))
    count = batch * length
    if count == 0:
        return dx, *(g.zero_() for g in gradients)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    groups = batch if any(want and own for want, own in zip(wants, per_example, strict=True)) else 1
    parts = row_parts(count, groups, dout.device)
    all_parts = groups * parts.count
    sums = dout.new_empty(3, all_parts if any(wants) else 0, channels, dtype=torch.float32)
    tile, averages = _backward_tile(channels), None
    shared = dict(C=channels, PAIR=second is not None, GAIN=gain_kind)
    with torch.cuda.device_of(dout):
        if channels > tile["BLOCK"]:
            averages = dout.new_empty(2, count, dtype=torch.float32)
            averages_kernel[(triton.cdiv(count, tile["ROWS"]),)](
                dout,
                first,
                second,
                gain,
                index,
                mean,
                rstd,
                averages,
                _strides(dout),
                _strides(first),
                _strides(second),
                gain_strides,
                count,
                length,
                first.shape[1],
                **shared,
                **tile,
                enable_fp_fusion=False,
            )
        # Without fused multiply-adds: g minus an average of g must be exactly 0 in rows of one value.
        backward_kernel[(all_parts * triton.cdiv(channels, tile["BLOCK"]),)](
            dout,
            dsum,
            first,
            second,
            gain,
            index,
            mean,
            rstd,
            averages,
            dx,
            sums,
            _strides(dout),
            _strides(dsum),
            _strides(first),
            _strides(second),
            gain_strides,
            count,
            length,
            first.shape[1],
            parts.rows,
            parts.count,
            parts.size,
            all_parts,
            **shared,
            SUMMED=dsum is not None,
            WANTED=wanted & 15,
            **tile,
            enable_fp_fusion=False,
        )
        for want, own, partial, result in zip(wants, per_example, sums, gradients, strict=True):
            if want:
                sum_rows(partial, result, index if own else None)
    return dx, *gradients


# --- For the kernel report ------------------------------------------------------------------------------------------------

_CODES = {"float32": "fp32", "bfloat16": "bf16"}
_FLOATS = ("gain", "bias", "residual_bias", "mean_of", "rstd_of", "averages", "sums")  # float32 parameters too


def report_case(name, kernel, channels, dtype, capability, tile, indexed=False, **constexprs) -> ReportCase:
    """A kernel for contiguous rows of `channels`; what `constexprs` say is absent is None."""
    absent = {"x2": not constexprs["PAIR"], "rows2": not constexprs["PAIR"], "averages": channels <= MOST_HELD}
    absent["index"] = not indexed
    options = {"num_warps": tile.pop("num_warps"), "num_stages": 3}
    if "WANTED" in constexprs:
        options["enable_fp_fusion"] = False
    values, signature, final = constexprs | tile | {"C": channels}, {}, {}
    step = "i32:16" if channels % 16 == 0 else "i32"
    for index, argument in enumerate(kernel.arg_names):
        tensor = argument.removesuffix("_strides")
        if argument in values or absent.get(argument):
            signature[argument] = "constexpr"
            final[argument] = values.get(argument)
        elif tensor != argument:
            places = 2 if tensor in ("gain", "bias", "residual_bias") else 3
            signature[argument] = (*(step,) * (places - 1), "constexpr")
            final[index, places - 1] = 1
        elif argument == "eps":
            signature[argument] = "fp32"
        elif argument in _FLOATS:
            signature[argument] = "*fp32"
        elif argument == "index":
            signature[argument] = "*i64"
        elif argument in ("x", "x2", "residual", "out", "total", "dout", "dsum", "rows", "rows2", "dx") and not (
            kernel is forward_kernel and argument == "rows"
        ):
            signature[argument] = f"*{_CODES[dtype]}"
        else:
            signature[argument] = "i32"
    return ReportCase(f"norm_{name} {channels} {dtype}", kernel, signature, final, options, capability)


def report_cases():
    """Both passes of a layer's norm with its residual, for the report that compiles them without a GPU."""
    for capability in (80, 90, 100):
        for dtype in _CODES:
            for channels in (768, 1024, 8192):
                forward = dict(PAIR=False, RESIDUAL=True, BIASED=True, GAIN=1, BIAS=1)
                backward = dict(PAIR=False, GAIN=1, SUMMED=True, WANTED=15)
                yield report_case("fwd", forward_kernel, channels, dtype, capability, _forward_tile(channels), **forward)
                yield report_case("bwd", backward_kernel, channels, dtype, capability, _backward_tile(channels), **backward)
            wide = dict(PAIR=False, GAIN=1)
            yield report_case("averages", averages_kernel, 12288, dtype, capability, _backward_tile(12288), **wide)
            wide |= dict(SUMMED=True, WANTED=15)
            yield report_case("bwd", backward_kernel, 12288, dtype, capability, _backward_tile(12288), **wide)
            wide = dict(PAIR=False, RESIDUAL=True, BIASED=True, GAIN=1, BIAS=1)
            yield report_case("fwd", forward_kernel, 12288, dtype, capability, _forward_tile(12288), **wide)
            pair = dict(PAIR=True, RESIDUAL=False, BIASED=False, GAIN=2, BIAS=2)
            yield report_case("fwd pair film", forward_kernel, 768, dtype, capability, _forward_tile(768), **pair)
            tasks = dict(PAIR=False, RESIDUAL=True, BIASED=True, GAIN=2, BIAS=1)
            yield report_case("fwd of tasks", forward_kernel, 768, dtype, capability, _forward_tile(768), True, **tasks)
            tasks = dict(PAIR=False, GAIN=2, SUMMED=True, WANTED=15)
            yield report_case("bwd of tasks", backward_kernel, 768, dtype, capability, _backward_tile(768), True, **tasks)


# --- Registration ---------------------------------------------------------------------------------------------------------

_SCHEMAS = {
    norm_fwd: "(Tensor[] x, Tensor? residual, Tensor? residual_bias, Tensor? gain, Tensor? bias, Tensor? index, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    norm_bwd: "(Tensor dout, Tensor? dsum, Tensor[] rows, Tensor mean, Tensor rstd, Tensor? gain, Tensor? index, "
    "SymInt groups, int wanted) -> (Tensor, Tensor, Tensor, Tensor)",
}
for _function, _schema in _SCHEMAS.items():
    _name = f"mmkernels_triton::{_function.__name__}"
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_name, ("cpu", "cuda"), _function)
attach_fakes("mmkernels_triton")

"""Triton kernels of the `activation` family and the ops `mmkernels_triton::bias_gelu_{fwd,bwd}`.

README.md beside this file has the formulas. Rows (rows, columns) are cut into tiles of ROWS x BLOCK; without a bias a
contiguous tensor is one row. The backward walks a part of the rows with one block of columns, so that sums of the bias's
gradient stay in registers.
"""

import torch
import triton
import triton.language as tl

from ... import _backends
from .._shared.kernels import ReportCase, gelu, gelu_slope, row_parts, sum_rows
from .._shared.registration import attach_fakes


@triton.jit
def _load(x, strides, r, c, mask):
    at = r[:, None] * strides[0] + c[None, :] * strides[1]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x,
    bias,
    out,
    x_strides,
    bias_stride,
    rows,
    columns,
    TANH: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK)
    r = pid // blocks * ROWS + tl.arange(0, ROWS)
    c = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    y = _load(x, x_strides, r, c, mask)
    if BIASED:
        y += tl.load(bias + c * bias_stride, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + r[:, None] * columns + c[None, :], gelu(y, TANH).to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dout,
    x,
    bias,
    dx,
    sums,  # float32 (parts, columns)
    dout_strides,
    x_strides,
    bias_stride,
    rows,
    columns,
    size,  # rows of a part
    TANH: tl.constexpr,
    BIASED: tl.constexpr,
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(columns, BLOCK)
    part = pid // blocks
    c = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = part * size
    end = tl.minimum(begin + size, rows)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & (c < columns)[None, :]
        y = _load(x, x_strides, r, c, mask)
        if BIASED:
            y += tl.load(bias + c * bias_stride, mask=c < columns, other=0.0).to(tl.float32)[None, :]
        d = _load(dout, dout_strides, r, c, mask) * gelu_slope(y, TANH)
        if WANTED & 1:
            tl.store(dx + r[:, None] * columns + c[None, :], d.to(dx.dtype.element_ty), mask=mask)
        if WANTED & 2:
            acc += d
    if WANTED & 2:
        tl.store(sums + part * columns + c, tl.sum(acc, 0), mask=c < columns)


# --- Launchers ------------------------------------------------------------------------------------------------------------


def _tile(columns: int) -> dict:
    """ROWS, BLOCK and num_warps: 16 elements a thread; in the interpreter large tiles that still leave edges."""
    block = min(triton.next_power_of_2(columns), 4096 if _backends.INTERPRET else 512)
    return dict(ROWS=max(1, min(32, (65536 if _backends.INTERPRET else 2048) // block)), BLOCK=block, num_warps=4)


def _matrix(tensor, columns) -> torch.Tensor:
    """(rows, columns); a copy where leading dimensions do not fall together."""
    return tensor.reshape(-1, columns)


def _columns(x, bias, *others) -> int:
    """How long rows are: without a bias they may be anything."""
    whole = bias is None and all(t.is_contiguous() for t in (x, *others))
    return x.numel() if whole else x.shape[-1]


def bias_gelu_fwd(x, bias, tanh):
    """`mmkernels_triton::bias_gelu_fwd`; csrc/schemas.h has the contract."""
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    columns = _columns(x, bias)
    flat, tile = _matrix(x, columns), _tile(columns)
    rows = flat.shape[0]
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(columns, tile["BLOCK"]),)](
            flat,
            bias,
            out,
            flat.stride(),
            0 if bias is None else bias.stride(0),
            rows,
            columns,
            TANH=tanh,
            BIASED=bias is not None,
            **tile,
        )
    return out


def bias_gelu_bwd(dout, x, bias, tanh, wanted):
    """`mmkernels_triton::bias_gelu_bwd`; csrc/schemas.h has the contract."""
    dx = x.new_empty(x.shape if wanted & 1 else (0,))
    wants_bias = bias is not None and wanted & 2 != 0
    dbias = x.new_empty(x.shape[-1:] if wants_bias else (0,), dtype=torch.float32)
    if x.numel() == 0:
        return dx, dbias.zero_()
    columns = _columns(x, bias, dout)
    flat, incoming, tile = _matrix(x, columns), _matrix(dout, columns), _tile(columns)
    parts = row_parts(flat.shape[0], 1, x.device)
    sums = x.new_empty(parts.count if wants_bias else 0, columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_kernel[(parts.count * triton.cdiv(columns, tile["BLOCK"]),)](
            incoming,
            flat,
            bias,
            dx,
            sums,
            incoming.stride(),
            flat.stride(),
            0 if bias is None else bias.stride(0),
            flat.shape[0],
            columns,
            parts.size,
            TANH=tanh,
            BIASED=bias is not None,
            WANTED=(wanted & 1) + 2 * wants_bias,
            **tile,
        )
        if wants_bias:
            sum_rows(sums, dbias)
    return dx, dbias


# --- For the kernel report ------------------------------------------------------------------------------------------------

_CODES = {"float32": "fp32", "bfloat16": "bf16"}


def report_case(name, kernel, dtype, capability, **constexprs) -> ReportCase:
    """A kernel for contiguous rows whose length is a multiple of 16."""
    tile = _tile(3072)
    options = {"num_warps": tile.pop("num_warps"), "num_stages": 3}
    values, signature, final = constexprs | tile | {"bias_stride": 1}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument] = "constexpr"
            final[argument] = values[argument]
        elif argument.endswith("_strides"):
            signature[argument] = ("i32:16", "constexpr")
            final[index, 1] = 1
        elif argument in ("bias", "sums"):
            signature[argument] = "*fp32"
        elif argument in ("x", "out", "dout", "dx"):
            signature[argument] = f"*{_CODES[dtype]}"
        else:
            signature[argument] = "i32:16" if argument == "columns" else "i32"
    form = "tanh" if constexprs["TANH"] else "erf"
    return ReportCase(f"bias_gelu_{name} {form} {dtype}", kernel, signature, final, options, capability)


def report_cases():
    """Both passes of both forms, for the report that compiles them without a GPU."""
    for capability in (80, 90, 100):
        for dtype in _CODES:
            for tanh in (True, False):
                yield report_case("fwd", forward_kernel, dtype, capability, TANH=tanh, BIASED=True)
                yield report_case("bwd", backward_kernel, dtype, capability, TANH=tanh, BIASED=True, WANTED=3)


# --- Registration ---------------------------------------------------------------------------------------------------------

_SCHEMAS = {
    bias_gelu_fwd: "(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    bias_gelu_bwd: "(Tensor dout, Tensor x, Tensor? bias, bool tanh, int wanted) -> (Tensor, Tensor)",
}
for _function, _schema in _SCHEMAS.items():
    _name = f"mmkernels_triton::{_function.__name__}"
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_name, ("cpu", "cuda"), _function)
attach_fakes("mmkernels_triton")

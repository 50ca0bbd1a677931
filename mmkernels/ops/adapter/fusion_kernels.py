"""Triton kernels of AdapterFusion's attention over the outputs of A adapters and the ops
`mmkernels_triton::adapter_fusion_{fwd,bwd}`. README.md has the derivation.

A program has all outputs of its rows in registers and reads them once where A times C is at most `MOST_HELD`; else it walks
the channels in blocks, twice: for the scores, then for the sums, when it finds the outputs in L2.

Naming: r numbers rows over (B, T), a the adapters, c channels; tiles of outputs are (ROWS, BLOCK_A, BLOCK_C). Offsets are
64-bit. Bits of WANTED: 1 dquery, 2 doutputs, 4 doffset.
"""

import torch
import triton
import triton.language as tl

from ... import _backends
from .._shared.dropout import threshold
from .._shared.kernels import ReportCase, ceil_div, dropout_keep, dropout_row
from .._shared.registration import attach_fakes

MOST_HELD = 32768  # numbers of a row's outputs: 64 in each of 512 threads


@triton.jit
def _row_tile(x, strides, example, t, inside, c, C: tl.constexpr):
    """Columns c of rows of (B, T, C), float32 (ROWS, BLOCK_C), zeros outside."""
    at = (example * strides[0] + t * strides[1])[:, None] + c.to(tl.int64)[None, :] * strides[2]
    return tl.load(x + at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _outputs_tile(outputs, strides, example, t, inside, a, c, A: tl.constexpr, C: tl.constexpr):
    """Columns c of all outputs of rows, float32 (ROWS, BLOCK_A, BLOCK_C), zeros outside."""
    at = (example * strides[0] + t * strides[1])[:, None] + a.to(tl.int64)[None, :] * strides[2]
    at = at[:, :, None] + c.to(tl.int64)[None, None, :] * strides[3]
    mask = (inside[:, None] & (a < A)[None, :])[:, :, None] & (c < C)[None, None, :]
    return tl.load(outputs + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _kept(seed, r, a, limit, gain):
    """What scores are multiplied by, (ROWS, BLOCK_A): 0 where they are dropped."""
    low, high = dropout_row(tl.load(seed), r)
    return tl.where(dropout_keep(low[:, None], high[:, None], a[None, :], limit), gain, 0.0)


@triton.jit
def fusion_forward_kernel(
    query,
    outputs,
    offset,
    seed,
    out,
    weights,
    query_strides,
    outputs_strides,
    offset_strides,
    rows,
    length,
    scale,
    limit,
    gain,
    A: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ROWS rows: scores, their softmax, the sum."""
    WHOLE: tl.constexpr = BLOCK_C >= C
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    example = r // length
    t = r % length
    a = tl.arange(0, BLOCK_A)
    c = tl.arange(0, BLOCK_C)
    if WHOLE:
        u = _outputs_tile(outputs, outputs_strides, example, t, inside, a, c, A, C)
        scores = tl.sum(u * _row_tile(query, query_strides, example, t, inside, c, C)[:, None, :], 2)
    else:
        scores = tl.zeros([ROWS, BLOCK_A], tl.float32)
        for start in range(0, C, BLOCK_C):
            u = _outputs_tile(outputs, outputs_strides, example, t, inside, a, start + c, A, C)
            scores += tl.sum(u * _row_tile(query, query_strides, example, t, inside, start + c, C)[:, None, :], 2)
    if seed is not None:
        if offset is not None:
            at = example * offset_strides[0] + t * offset_strides[1]
            scores += tl.load(offset + at, mask=inside, other=0.0).to(tl.float32)[:, None]
        kept = _kept(seed, r, a, limit, gain)
        scores = tl.where(kept == 0.0, 0.0, scores * kept)
    scores = tl.where((a < A)[None, :], scores * scale, float("-inf"))
    p = tl.exp(scores - tl.max(scores, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    tl.store(weights + r[:, None] * A + a[None, :], p, mask=inside[:, None] & (a < A)[None, :])
    for start in range(0, C, BLOCK_C):
        if not WHOLE:
            u = _outputs_tile(outputs, outputs_strides, example, t, inside, a, start + c, A, C)
        y = tl.sum(p[:, :, None] * u, 1)
        columns = start + c
        mask = inside[:, None] & (columns < C)[None, :]
        tl.store(out + r[:, None] * C + columns[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def fusion_backward_kernel(
    dout,
    query,
    outputs,
    weights,
    seed,
    dquery,
    doutputs,
    doffset,
    dout_strides,
    query_strides,
    outputs_strides,
    rows,
    length,
    scale,
    limit,
    gain,
    A: tl.constexpr,
    C: tl.constexpr,
    WANTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ROWS rows: dp_a = dout . u_a, ds_a = scale kept_a p_a (dp_a - sum p dp), then the gradients."""
    WHOLE: tl.constexpr = BLOCK_C >= C
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = r < rows
    example = r // length
    t = r % length
    a = tl.arange(0, BLOCK_A)
    c = tl.arange(0, BLOCK_C)
    places = inside[:, None] & (a < A)[None, :]
    if WHOLE:
        u = _outputs_tile(outputs, outputs_strides, example, t, inside, a, c, A, C)
        d = _row_tile(dout, dout_strides, example, t, inside, c, C)
        dp = tl.sum(u * d[:, None, :], 2)
    else:
        dp = tl.zeros([ROWS, BLOCK_A], tl.float32)
        for start in range(0, C, BLOCK_C):
            u = _outputs_tile(outputs, outputs_strides, example, t, inside, a, start + c, A, C)
            d = _row_tile(dout, dout_strides, example, t, inside, start + c, C)
            dp += tl.sum(u * d[:, None, :], 2)
    p = tl.load(weights + r[:, None] * A + a[None, :], mask=places, other=0.0)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * scale
    if seed is not None:
        kept = _kept(seed, r, a, limit, gain)
        ds = tl.where(kept == 0.0, 0.0, ds * kept)
    if WANTED & 4:
        tl.store(doffset + r, tl.sum(ds, 1).to(doffset.dtype.element_ty), mask=inside)
    for start in range(0, C, BLOCK_C):
        columns = start + c
        if WANTED & 1:
            if not WHOLE:
                u = _outputs_tile(outputs, outputs_strides, example, t, inside, a, columns, A, C)
            dq = tl.sum(ds[:, :, None] * u, 1)
            mask = inside[:, None] & (columns < C)[None, :]
            tl.store(dquery + r[:, None] * C + columns[None, :], dq.to(dquery.dtype.element_ty), mask=mask)
        if WANTED & 2:
            if not WHOLE:
                d = _row_tile(dout, dout_strides, example, t, inside, columns, C)
            q = _row_tile(query, query_strides, example, t, inside, columns, C)
            du = p[:, :, None] * d[:, None, :] + ds[:, :, None] * q[:, None, :]
            at = (r[:, None] * A + a[None, :])[:, :, None] * C + columns[None, None, :]
            tl.store(doutputs + at, du.to(doutputs.dtype.element_ty), mask=places[:, :, None] & (columns < C)[None, None, :])


# --- Launchers ------------------------------------------------------------------------------------------------------------


def _tile(adapters: int, channels: int) -> dict:
    """ROWS, BLOCK_A, BLOCK_C and num_warps; in the interpreter as many rows as still leave edges."""
    block_a, block_c = triton.next_power_of_2(adapters), max(16, triton.next_power_of_2(channels))
    if block_a * block_c > MOST_HELD:
        block_c = max(16, MOST_HELD // 4 // block_a)
    size = block_a * block_c
    rows = max(1, min(16, 65536 // size)) if _backends.INTERPRET else max(1, min(16, 1024 // size))
    return dict(ROWS=rows, BLOCK_A=block_a, BLOCK_C=block_c, num_warps=max(1, min(16, size // 2048)))


def _dropout(seed, dropout_p) -> tuple:
    return (0, 1.0) if seed is None else (threshold(dropout_p), 1.0 / (1.0 - dropout_p))


def adapter_fusion_fwd(query, outputs, offset, seed, scale, dropout_p):
    """`mmkernels_triton::adapter_fusion_fwd`; csrc/schemas.h has the contract."""
    batch, length, channels = query.shape
    adapters, rows = outputs.shape[2], batch * length
    out = query.new_empty(query.shape)
    weights = query.new_empty(outputs.shape[:-1], dtype=torch.float32)
    if rows == 0:
        return out, weights
    tile = _tile(adapters, channels)
    with torch.cuda.device_of(query):
        fusion_forward_kernel[(ceil_div(rows, tile["ROWS"]),)](
            query,
            outputs,
            offset,
            seed,
            out,
            weights,
            query.stride(),
            outputs.stride(),
            (0, 0) if offset is None else offset.stride(),
            rows,
            length,
            scale,
            *_dropout(seed, dropout_p),
            A=adapters,
            C=channels,
            **tile,
        )
    return out, weights


def adapter_fusion_bwd(dout, query, outputs, weights, seed, scale, dropout_p, wanted):
    """`mmkernels_triton::adapter_fusion_bwd`; csrc/schemas.h has the contract."""
    batch, length, channels = query.shape
    adapters, rows = outputs.shape[2], batch * length
    shapes = query.shape, outputs.shape, query.shape[:-1]
    gradients = [query.new_empty(shape if wanted & 1 << i else (0,)) for i, shape in enumerate(shapes)]
    if rows == 0 or wanted == 0:
        return tuple(gradients)
    tile = _tile(adapters, channels)
    with torch.cuda.device_of(query):
        fusion_backward_kernel[(ceil_div(rows, tile["ROWS"]),)](
            dout,
            query,
            outputs,
            weights.contiguous(),
            seed,
            *gradients,
            dout.stride(),
            query.stride(),
            outputs.stride(),
            rows,
            length,
            scale,
            *_dropout(seed, dropout_p),
            A=adapters,
            C=channels,
            WANTED=wanted,
            **tile,
        )
    return tuple(gradients)


# --- For the kernel report ------------------------------------------------------------------------------------------------

_CODES = {"float32": "fp32", "bfloat16": "bf16"}
_TYPES = {"seed": "*i64", "weights": "*fp32", "scale": "fp32", "gain": "fp32", "limit": "i64"}
_TYPES |= dict.fromkeys(("rows", "length"), "i32")


def _report_case(name, kernel, adapters, channels, dtype, capability, absent=(), **constexprs) -> ReportCase:
    """A kernel for contiguous rows; `absent` names tensors that are None."""
    tile = _tile(adapters, channels)
    options = {"num_warps": tile.pop("num_warps"), "num_stages": 3}
    values, signature, final = constexprs | tile | dict(A=adapters, C=channels) | dict.fromkeys(absent), {}, {}
    step = "i32:16" if channels % 16 == 0 else "i32"
    for place, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument] = "constexpr"
            final[argument] = values[argument]
        elif argument.endswith("_strides"):
            steps = {"outputs_strides": 3, "offset_strides": 1}.get(argument, 2)
            signature[argument] = (*(step if steps > 1 else "i32",) * steps, "constexpr")
            final[place, steps] = 1
        else:
            signature[argument] = _TYPES.get(argument, f"*{_CODES[dtype]}")
    return ReportCase(f"adapter_fusion_{name} {adapters}x{channels} {dtype}", kernel, signature, final, options, capability)


def report_cases():
    """A few adapters and many, held and walked, with dropout and without; the report compiles them without a GPU."""
    for capability in (80, 90, 100):
        for dtype in _CODES:
            for adapters, channels in ((3, 768), (8, 768), (16, 1024), (32, 1024), (64, 2048), (5, 111)):
                shared = (adapters, channels, dtype, capability)
                yield _report_case("fwd", fusion_forward_kernel, *shared, ("offset", "seed"))
                yield _report_case("bwd", fusion_backward_kernel, *shared, ("seed",), WANTED=3)
            yield _report_case("fwd dropout", fusion_forward_kernel, 8, 768, dtype, capability)
            yield _report_case("bwd dropout", fusion_backward_kernel, 8, 768, dtype, capability, WANTED=7)


# --- Registration ---------------------------------------------------------------------------------------------------------

_SCHEMAS = {
    adapter_fusion_fwd: "(Tensor query, Tensor outputs, Tensor? offset, Tensor? seed, float scale, float dropout_p) -> "
    "(Tensor, Tensor)",
    adapter_fusion_bwd: "(Tensor dout, Tensor query, Tensor outputs, Tensor weights, Tensor? seed, float scale, "
    "float dropout_p, int wanted) -> (Tensor, Tensor, Tensor)",
}
for _function, _schema in _SCHEMAS.items():
    _name = f"mmkernels_triton::{_function.__name__}"
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_name, ("cpu", "cuda"), _function)
attach_fakes("mmkernels_triton")

"""The registered ops of the family and the gradients around them.

`mmkernels::hypergrid_{fwd,bwd}` and `mmkernels::hypergrid_gate_{fwd,bwd}` (schemas in csrc/schemas.h) serve `cpp` and `cuda`;
`mmkernels_triton::` and, in tests, `mmkernels_emulator::` have the same signatures. Only inputs are saved.
"""

import torch

from .._shared.registration import fake, forward_backward, once_differentiable


@fake("hypergrid_fwd")
def _forward_fake(x, weight, gate, bias, index, rows_per_gate, residual, activation, dropout_p, seed):
    return x.new_empty(x.shape[0], weight.shape[0])


@fake("hypergrid_bwd")
def _backward_fake(
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
    return (
        x.new_empty(x.shape if want_x else (0,)),
        x.new_empty(weight.shape if want_weight else (0,)),
        x.new_empty(gate.shape if want_gate else (0,), dtype=torch.float32),
        x.new_empty(weight.shape[:1] if want_bias else (0,), dtype=torch.float32),
    )


@fake("hypergrid_gate_fwd")
def _gate_forward_fake(row, column):
    return row.new_empty(gate_count(row, column), row.shape[1], column.shape[1])


@fake("hypergrid_gate_bwd")
def _gate_backward_fake(dgate, row, column):
    return row.new_empty(row.shape, dtype=torch.float32), row.new_empty(column.shape, dtype=torch.float32)


def gate_count(row, column):
    """G of a gate: that of the factor that is not shared. Not `max`: no gates at all is less than one."""
    return row.shape[0] if column.shape[0] == 1 else column.shape[0]


def rows_per_gate(x, gate, index) -> int:
    """How many rows one after another have the same gate, or the same number in `index`.

    From shapes, not an argument: a compiler takes an integer given to an autograd function for a constant.
    """
    groups = (gate if index is None else index).shape[0]
    return x.shape[0] // groups if groups else 0


class _HyperGrid(torch.autograd.Function):
    @staticmethod
    def forward(backend, x, weight, gate, bias, index, seed, *options):
        rows = rows_per_gate(x, gate, index)
        return forward_backward("hypergrid", backend)[0](x, weight, gate, bias, index, rows, *options, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, x, weight, gate, bias, index, seed, *ctx.options = inputs
        ctx.save_for_backward(x, weight, gate, index, seed)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, dy):
        x, weight, gate, index, seed = ctx.saved_tensors
        wanted, rows = ctx.needs_input_grad[1:5], rows_per_gate(x, gate, index)
        with torch.no_grad():
            dx, dweight, dgate, dbias = forward_backward("hypergrid", ctx.backend)[1](
                dy, x, weight, gate, index, rows, *ctx.options, seed, *wanted
            )
            found = (dx, dweight, dgate.to(gate.dtype), dbias if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype))
            found = tuple(grad if need else None for need, grad in zip(wanted, found, strict=True))
        gradients = (None, *found, *(None,) * 5)
        return once_differentiable("mmkernels.ops.hypergrid_linear", gradients, (dy, x, weight, gate))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.hypergrid_linear takes any number of dimensions and has no vmap rule: give it x with the mapped "
            "dimension in front, or use backend='reference'"
        )


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(backend, row, column):
        return forward_backward("hypergrid", backend, "hypergrid_gate")[0](row, column)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, row, column = inputs
        ctx.save_for_backward(row, column)

    @staticmethod
    def backward(ctx, dgate):
        row, column = ctx.saved_tensors
        with torch.no_grad():
            found = forward_backward("hypergrid", ctx.backend, "hypergrid_gate")[1](dgate, row, column)
            found = tuple(g.to(row.dtype) if need else None for need, g in zip(ctx.needs_input_grad[1:], found, strict=True))
        return once_differentiable("mmkernels.ops.hypergrid_gate", (None, *found), (dgate, row, column))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.hypergrid_gate has a dimension of gates and no vmap rule: fold the mapped dimension into G, or use "
            "backend='reference'"
        )


def hypergrid_linear(backend, x, weight, gate, bias, index, residual, activation, dropout_p, seed):
    """(M, out) on one of the kernel backends; differentiable when a gradient is wanted."""
    options = residual, activation, dropout_p
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, gate, bias)):
        return _HyperGrid.apply(backend, x, weight, gate, bias, index, seed, *options)
    return forward_backward("hypergrid", backend)[0](
        x, weight, gate, bias, index, rows_per_gate(x, gate, index), *options, seed
    )


def hypergrid_gate(backend, row, column):
    """(G, R, C) on one of the kernel backends; differentiable when a gradient is wanted."""
    if torch.is_grad_enabled() and (row.requires_grad or column.requires_grad):
        return _Gate.apply(backend, row, column)
    return forward_backward("hypergrid", backend, "hypergrid_gate")[0](row, column)

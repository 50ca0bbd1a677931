"""`ops.hypergrid_linear` and `ops.hypergrid_gate`: signatures, validation, choice of backend."""

import torch

from ... import _backends
from .._shared import dropout
from .._shared.arguments import autocast_dtype, check_dense, check_index, check_number, check_seed, check_tensor
from . import autograd, reference

LEAST_BLOCK = 8


def hypergrid_linear(
    x,
    weight,
    gate,
    bias=None,
    *,
    gate_index=None,
    residual=False,
    activation=None,
    dropout_p=0.0,
    dropout_seed=None,
    backend="auto",
):
    """A linear layer whose weight is scaled block by block, by a grid of gates of each example: HyperGrid (Tay et al. 2021).

        y[m, n] = sum_k (rho + gate[g(m), k R // in, n C // out]) a(x)[m, k] weight[n, k] + bias[n]

    with rho = 1 if residual else 0 and a(x) = dropout(activation(x)). The gated weight is never in memory, and the residual
    form takes no second product. Gradients reach x, weight, gate and bias; sums are float32.

    Args:
        x: (..., in): examples (B, T, in), or packed rows (N, in); float32, bfloat16 or float16 (`reference` takes every
            float dtype). Any strides.
        weight: (out, in) as in `nn.Linear`, of x's dtype.
        gate: (G, R, C) of x's dtype or float32: R blocks over in, C over out. R divides in and C divides out, and blocks are 8
            wide or wider, unless there is one only. Without `gate_index` G is 1, a gate of the whole batch, or x.shape[0],
            a gate of each example.
        bias: (out,) of x's dtype, or None.
        gate_index: int32 or int64 numbers of gates, in [0, G): (x.shape[0],), one of each example, or x.shape[:-1], one of
            each row (packed examples). Numbers out of range give NaN on a GPU, IndexError on a CPU.
        residual: scales by 1 + gate instead of gate.
        activation: applied to x first: None, "relu", "gelu" (by erf) or "gelu_tanh".
        dropout_p: probability in [0, 1) of dropping an element of activation(x); which ones depends on the seed and the
            element's place alone, so that every backend drops the same.
        dropout_seed: int64 tensor of one element on x's device; drawn from torch's generator when None.
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        (..., out) of x's dtype, contiguous. Under autocast x, weight and bias are converted to its dtype.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    x, weight, bias, index, number, dropout_p, seed = _check(
        x, weight, gate, bias, gate_index, residual, activation, dropout_p, dropout_seed
    )
    name = _backends.choose(
        "hypergrid_linear", backend, _order(x, weight, gate, index), lambda name: _linear_refusals(name, x, weight, gate)
    )
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = dropout.draw_seed(x.device)
    rows = x.reshape(-1, x.shape[-1])
    if name == "reference":
        keep = None if seed is None else dropout.keep_mask(seed, (1, 1, *rows.shape), dropout_p)[0, 0]
        row_gate = index
        if row_gate is None and gate.shape[0] != 1:
            row_gate = torch.arange(gate.shape[0], device=x.device)
        if row_gate is not None:
            row_gate = row_gate[:, None].expand(-1, autograd.rows_per_gate(rows, gate, index)).reshape(-1)
        y = reference.hypergrid_linear(rows, weight, gate, bias, row_gate, residual, activation, keep, dropout_p)
    else:
        options = residual, number, dropout_p, seed
        y = autograd.hypergrid_linear(name, rows, weight, gate, bias, index, *options)
    return y.view(*x.shape[:-1], weight.shape[0])


def hypergrid_gate(row, column, *, backend="auto"):
    """The gate of `hypergrid_linear` from its two factors: sigmoid(row columnᵀ).

    Args:
        row: (G, R), or (1, R) shared by all gates; float32, bfloat16 or float16 (`reference` takes every float dtype). Any
            strides.
        column: (G, C) or (1, C), of row's dtype.
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        (G, R, C) of row's dtype, contiguous. The gradient needs row and column alone.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    _check_factors(row, column)
    name = _backends.choose("hypergrid_gate", backend, ORDER, lambda name: _refusals(name, row))
    if name == "reference":
        return reference.hypergrid_gate(row, column)
    return autograd.hypergrid_gate(name, row, column)


def explain_hypergrid_linear(
    x,
    weight,
    gate,
    bias=None,
    *,
    gate_index=None,
    residual=False,
    activation=None,
    dropout_p=0.0,
    dropout_seed=None,
    backend="auto",
):
    """The `explain` of `hypergrid_linear`."""
    x, weight, _, index, *_ = _check(x, weight, gate, bias, gate_index, residual, activation, dropout_p, dropout_seed)

    def refusals(name):
        return _linear_refusals(name, x, weight, gate)

    name = _backends.choose("hypergrid_linear", backend, _order(x, weight, gate, index), refusals)
    return _backends.Explanation("hypergrid_linear", name, "", {n: refusals(n) for n in _backends.NAMES})


def explain_hypergrid_gate(row, column, *, backend="auto"):
    """The `explain` of `hypergrid_gate`."""
    _check_factors(row, column)

    def refusals(name):
        return _refusals(name, row)

    name = _backends.choose("hypergrid_gate", backend, ORDER, refusals)
    return _backends.Explanation("hypergrid_gate", name, "", {n: refusals(n) for n in _backends.NAMES})


ORDER = ("cpp", "triton", "cuda", "reference")  # of the gate
CUDA_FIRST = ("cpp", "cuda", "triton", "reference")


def _order(x, weight, gate, index):
    """What `auto` tries first, by README.md's time models: on a GPU CUDA C++ in 16 bits too where its kernels for sm_90 or
    its splits for few rows run. A prediction until both have been measured."""
    gates, rows, columns = gate.shape
    if x.device.type == "cuda" and x.dtype != torch.float32 and not _backends.platform_refusals("cuda", x.device, x.dtype):
        groups = gates if index is None else index.shape[0]
        few = groups > 1 and x.shape[:-1].numel() < 16 * groups
        width = weight.shape[1] // rows
        whole = width % 8 == 0 and width >= 24 and weight.shape[0] % 8 == 0
        if few or (whole and _backends.capability(x.device)[0] == 9):
            return CUDA_FIRST
    return _backends.preference(x.dtype)


def _refusals(name, x):
    reasons = _backends.platform_refusals(name, x.device, x.dtype)
    if name == "sdpa":
        reasons.append("it is an attention")
    return reasons


def _linear_refusals(name, x, weight, gate):
    reasons = _refusals(name, x)
    if name not in ("reference", "sdpa"):
        for count, size, side in ((gate.shape[1], weight.shape[1], "in"), (gate.shape[2], weight.shape[0], "out")):
            if count > 1 and size // count < LEAST_BLOCK:
                reasons.append(f"blocks over {side} are {size // count} wide, it takes {LEAST_BLOCK} or more")
    return reasons


def _check(x, weight, gate, bias, gate_index, residual, activation, dropout_p, dropout_seed):
    """Validates, applies autocast. Returns (x, weight, bias, flat index, number of the activation, dropout_p, seed)."""
    check_dense("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; it must be a floating-point tensor")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., in) with in of 1 or more")
    check_tensor("weight", weight, ("out", "in"), "x", x.device)
    check_tensor("gate", gate, "GRC", "x", x.device)
    if bias is not None:
        check_tensor("bias", bias, ("out",), "x", x.device)
    if (dtype := autocast_dtype(x.device)) is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        gate = gate if gate.dtype == torch.float32 else gate.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be x's, {x.dtype}")
    if gate.dtype != x.dtype and gate.dtype != torch.float32:
        raise TypeError(f"gate has dtype {gate.dtype}; it must be x's, {x.dtype}, or torch.float32")
    out, channels = weight.shape
    if channels != x.shape[-1] or out == 0:
        hint = " (it is transposed)" if out == x.shape[-1] and channels else ""
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (out, {x.shape[-1]}), as nn.Linear has it{hint}")
    if bias is not None and bias.shape[0] != out:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({out},)")
    gates, rows, columns = gate.shape
    for letter, count, side, size in (("R", rows, "in", channels), ("C", columns, "out", out)):
        if count == 0 or size % count:
            raise ValueError(f"gate has shape {tuple(gate.shape)}; {letter} = {count} must divide {side} = {size}")
    batch = x.shape[0] if x.dim() > 1 else 1
    index = None
    if gate_index is None:
        if gates != 1 and gates != batch:
            raise ValueError(
                f"gate has shape {tuple(gate.shape)}; without gate_index G must be 1 or {batch}, the first size of x "
                f"{tuple(x.shape)}"
            )
    else:
        rows = tuple(x.shape[:-1])
        shapes = ((batch,),) if rows == (batch,) else ((batch,), rows)
        index = check_index("gate_index", gate_index, shapes, gates, "gate", x.device)
    if not isinstance(residual, bool):
        raise TypeError(f"residual is {residual!r}; it must be True or False")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed are {', '.join(map(repr, reference.ACTIVATIONS))}")
    dropout_p = check_number("dropout_p", dropout_p, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
    dropout_seed = check_seed(dropout_seed, "x", x.device)
    return x, weight, bias, index, reference.ACTIVATIONS.index(activation), dropout_p, dropout_seed


def _check_factors(row, column):
    device = getattr(row, "device", None)
    check_tensor("row", row, "GR", "row", device)
    check_tensor("column", column, "GC", "row", device)
    if column.dtype != row.dtype:
        raise TypeError(f"column has dtype {column.dtype}; it must be row's, {row.dtype}")
    if row.shape[1] == 0:
        raise ValueError(f"row has shape {tuple(row.shape)}; R must be 1 or more")
    if column.shape[1] == 0:
        raise ValueError(f"column has shape {tuple(column.shape)}; C must be 1 or more")
    if row.shape[0] != column.shape[0] and row.shape[0] != 1 and column.shape[0] != 1:
        raise ValueError(f"column has shape {tuple(column.shape)}; with row {tuple(row.shape)} G must be {row.shape[0]} or 1")

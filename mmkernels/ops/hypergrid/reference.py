"""The definition of the ops in plain torch: any device, any float dtype, twice differentiable.

    y[m, n] = sum_k (rho + gate[g(m), r(k), c(n)]) a(x)[m, k] weight[n, k] + bias[n]        rho: 1 with residual, else 0
    r(k) = k R // in     c(n) = n C // out     a(x) = dropout(activation(x))
    gate[g, r, c] = sigmoid(row[g, r] column[g, c])

Low-precision inputs are computed in float32 and the result is rounded once.
"""

import torch

# The numbers that the registered ops know them by: places in this tuple.
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh")


def activated(x, activation, keep, dropout_p):
    """a(x); `keep` is a boolean mask of x's shape, or None."""
    if activation == "relu":
        x = torch.relu(x)
    elif activation is not None:
        x = torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return x if keep is None else torch.where(keep, x / (1.0 - dropout_p), 0.0)


def hypergrid_linear(x, weight, gate, bias, row_gate, residual, activation, keep, dropout_p):
    """x (M, in) and the gate number of each of its rows, (M,), or None where all rows have gate 0. Returns (M, out)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    a = activated(x.to(dtype), activation, keep, dropout_p)
    weight = weight.to(dtype)
    _, rows, columns = gate.shape
    factor = gate.to(dtype) + (1.0 if residual else 0.0)
    factor = factor[:1] if row_gate is None else factor[row_gate]  # (1 or M, R, C)
    y = x.new_zeros(x.shape[0], columns, weight.shape[0] // columns, dtype=dtype)
    blocks = zip(a.chunk(rows, 1), weight.chunk(rows, 1), factor.unbind(1), strict=True)
    for a_block, weight_block, scale in blocks:
        y = y + scale[..., None] * torch.unflatten(a_block @ weight_block.t(), 1, (columns, -1))
    y = y.flatten(1)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


def hypergrid_gate(row, column):
    dtype = torch.promote_types(row.dtype, torch.float32)
    return torch.sigmoid(row.to(dtype)[:, :, None] * column.to(dtype)[:, None, :]).to(row.dtype)

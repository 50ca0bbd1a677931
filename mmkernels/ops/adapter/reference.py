"""The definition of the op in plain torch: any device, any float dtype, twice differentiable.

    s = x + input_residual                  u = LayerNorm(s), or s
    o = gate scale (act(u W_downᵀ + b_down) W_upᵀ + b_up)          dropped out; 0 where index is -1
    y = o + residuals                       out = LayerNorm(y), or y

Low-precision inputs are computed in float32 and the result is rounded once.
"""

import torch

# The numbers that the registered ops know them by: places in this tuple. All of them take 0 to 0.
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "swish", "leakyrelu", "tanh")


def activated(z, activation):
    if activation == "relu":
        return torch.relu(z)
    if activation in ("gelu", "gelu_tanh"):
        return torch.nn.functional.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "swish":
        return torch.nn.functional.silu(z)
    if activation == "leakyrelu":
        return torch.nn.functional.leaky_relu(z, 0.01)
    return torch.tanh(z) if activation == "tanh" else z


def activated_backward(da, z, activation):
    """The gradient of z for that of `activated(z, activation)`."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(da, z, 0.0)
    if activation in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(da, z, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "swish":
        return aten.silu_backward(da, z)
    if activation == "leakyrelu":
        return aten.leaky_relu_backward(da, z, 0.01, False)
    return aten.tanh_backward(da, torch.tanh(z)) if activation == "tanh" else da


def layer_norm(rows, weight, bias, eps):
    centred = rows - rows.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return out if bias is None else out + bias


def bottleneck(u, w_down, b_down, w_up, b_up, scale, activation):
    """scale (act(u W_downᵀ + b_down) W_upᵀ + b_up); `scale` (1,), (C,) or None."""
    z = u @ w_down.t()
    a = activated(z if b_down is None else z + b_down, activation)
    up = a @ w_up.t()
    up = up if b_up is None else up + b_up
    return up if scale is None else up * scale


def adapter(
    x,
    input_residual,
    residual,
    w_down,
    b_down,
    w_up,
    b_up,
    norm_weight,
    norm_bias,
    out_weight,
    out_bias,
    scale,
    gate,
    index,
    skip,
    activation,
    eps,
    out_eps,
    factor,
    keep,
    dropout_p,
):
    """x (B,T,C); the other tensors, and `skip`, as csrc/schemas.h has them, `keep` a boolean mask of x's shape or None."""
    dtype, out_dtype = torch.promote_types(x.dtype, torch.float32), x.dtype

    def wide(t):
        return None if t is None else t.to(dtype)

    x, input_residual, residual = wide(x), wide(input_residual), wide(residual)
    w_down, b_down, w_up, b_up, scale = wide(w_down), wide(b_down), wide(w_up), wide(b_up), wide(scale)
    s = x if input_residual is None else x + input_residual
    u = s if norm_weight is None else layer_norm(s, wide(norm_weight), wide(norm_bias), eps)
    if w_down.dim() == 2:
        o = bottleneck(u, w_down, b_down, w_up, b_up, None if scale is None else scale[0], activation)
    else:
        o = mixed(u, w_down, b_down, w_up, b_up, scale, index, activation)
    o = o * factor
    if gate is not None:
        o = o * wide(gate).reshape(x.shape[0], -1, 1)
    if keep is not None:
        o = torch.where(keep, o / (1.0 - dropout_p), 0.0)
    for term in (residual, x if skip & 1 else None, input_residual if skip & 2 else None, u if skip & 4 else None):
        o = o if term is None else o + term
    if out_weight is not None:
        o = layer_norm(o, wide(out_weight), wide(out_bias), out_eps)
    return o.to(out_dtype)


def mixed(u, w_down, b_down, w_up, b_up, scale, index, activation):
    """Every adapter on the rows that have its number in `index`; one that nobody has takes no part, NaN as it may be."""
    out = torch.zeros_like(u)
    numbers = index.reshape(u.shape[0], -1, 1)
    for number in range(w_down.shape[0]):
        rows = numbers == number
        used = rows.any()

        def own(bank, number=number, used=used):
            return None if bank is None else torch.where(used, bank[number], 0.0)

        banks = (own(bank) for bank in (w_down, b_down, w_up, b_up))
        of_rows = None if scale is None else own(scale) if scale.shape[0] > 1 else scale[0]
        up = bottleneck(torch.where(rows, u, 0.0), *banks, of_rows, activation)
        out = torch.where(rows, up, out)
    return out


def adapter_fusion(query, outputs, w_q, b_q, w_k, b_k, w_v, input_residual, residual, temperature, keep, dropout_p):
    """The plain form: every output is projected to a key and a value. `keep`: a boolean mask (..., A) or None.

    u_a = outputs_a + input_residual     q = query W_qᵀ + b_q     k_a = u_a W_kᵀ + b_k     v_a = u_a W_vᵀ
    p = softmax_a(dropout(q k_a) / temperature)     out = sum_a p_a v_a + residual

    Returns (out, p).
    """
    dtype, out_dtype = torch.promote_types(query.dtype, torch.float32), query.dtype

    def projected(rows, weight, bias):
        rows = rows.to(dtype)
        rows = rows if weight is None else rows @ weight.to(dtype).t()
        return rows if bias is None else rows + bias.to(dtype)

    u = outputs if input_residual is None else outputs.to(dtype) + input_residual.to(dtype)[..., None, :]
    q, k, v = projected(query, w_q, b_q), projected(u, w_k, b_k), projected(u, w_v, None)
    scores = (q[..., None, :] * k).sum(-1)
    if keep is not None:
        scores = torch.where(keep, scores / (1.0 - dropout_p), 0.0)
    p = torch.softmax(scores / temperature, -1)
    out = (p[..., None] * v).sum(-2)
    return (out if residual is None else out + residual.to(dtype)).to(out_dtype), p

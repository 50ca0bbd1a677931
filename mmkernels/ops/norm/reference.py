"""The definition of the op in plain torch: any device, any float dtype, twice differentiable.

    s = x + residual + residual_bias
    out = (s - mean(s)) / sqrt(var(s) + eps) * gain + bias        mean and variance of each row, the variance by 1/C

Low-precision inputs are computed in float32; s, before it is normalised, and the result are rounded once each.
"""

import torch


def film_layer_norm(x, gain, bias, residual, residual_bias, index, eps):
    """Returns (out, s) for a list x of (B,T_i,C), residual (B,T,C) or None; s is None without a residual."""
    dtype = torch.promote_types(x[0].dtype, torch.float32)
    rows, out_dtype, total = torch.cat([one.to(dtype) for one in x], 1), x[0].dtype, None
    if residual is not None:
        rows = rows + residual.to(dtype)
        if residual_bias is not None:
            rows = rows + residual_bias.to(dtype)
        total = rows.to(out_dtype)
        rows = total.to(dtype)
    centred = rows - rows.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if gain is not None:
        out = out * _of_rows(gain.to(dtype), index)
    if bias is not None:
        out = out + _of_rows(bias.to(dtype), index)
    return out.to(out_dtype), total


def _of_rows(parameter, index):
    """(C,), or those of each example as (B,1,C)."""
    if parameter.dim() == 1:
        return parameter
    return (parameter if index is None else parameter[index])[:, None]

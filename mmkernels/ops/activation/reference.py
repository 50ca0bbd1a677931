"""The definition of the op in plain torch: any device, any float dtype, twice differentiable.

    gelu(y) = y Phi(y)                                                      approximate "none"; y = x + bias
    gelu(y) = y (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3))) / 2               approximate "tanh"

Low-precision inputs are computed in float32 and the result is rounded once.
"""

import torch


def bias_gelu(x, bias, approximate):
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return torch.nn.functional.gelu(y, approximate=approximate).to(x.dtype)

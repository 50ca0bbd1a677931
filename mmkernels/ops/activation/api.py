"""`ops.bias_gelu`: signature, validation, choice of backend."""

import torch

from ... import _backends, _library
from .._shared.arguments import check_dense
from . import autograd, reference

APPROXIMATIONS = ("tanh", "none")
ORDER = ("cpp", "triton", "cuda", "reference")  # of auto; which of Triton and CUDA is the faster one is not measured yet


def bias_gelu(x, bias=None, *, approximate="tanh", backend="auto"):
    """gelu(x + bias), the bias of the linear layer that made x added in the same pass. The gradient needs x alone.

    Args:
        x: (..., C), float32, bfloat16 or float16 (`reference` takes every float dtype). Any strides.
        bias: (C,) of x's dtype or float32, or None.
        approximate: "tanh", or "none" for the error function, as in `torch.nn.functional.gelu`.
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        A contiguous tensor of x's shape and dtype, under autocast too: there x usually is a linear layer's output.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    _check(x, bias, approximate)
    name = _backends.choose("bias_gelu", backend, _order(x, bias, approximate), lambda name: _refusals(name, x))
    if name == "reference":
        return reference.bias_gelu(x, bias, approximate)
    return autograd.bias_gelu(name, x, bias, approximate == "tanh")


def explain_bias_gelu(x, bias=None, *, approximate="tanh", backend="auto"):
    """The `explain` of `bias_gelu`."""
    _check(x, bias, approximate)
    name = _backends.choose("bias_gelu", backend, _order(x, bias, approximate), lambda name: _refusals(name, x))
    return _backends.Explanation("bias_gelu", name, "", {n: _refusals(n, x) for n in _backends.NAMES})


def own_is_faster(x, approximate) -> bool:
    """Was a kernel measured to be faster than `torch.nn.functional.gelu` of `x`, which has its bias already?

    On CPUs; with AVX2 the library's error function, whose small values have fewer digits, is the faster one.
    """
    if _backends.platform_refusals("cpp", x.device, x.dtype):
        return False
    return approximate == "tanh" or x.dtype != torch.float32 or _library.AVX512


def _order(x, bias, approximate) -> tuple:
    """Of auto: the library's GELU, which `reference` calls, where it is the faster one and there is no bias to add."""
    library = bias is None and x.device.type == "cpu" and not own_is_faster(x, approximate)
    return ("reference", *ORDER[:-1]) if library else ORDER


def _refusals(name, x):
    reasons = _backends.platform_refusals(name, x.device, x.dtype)
    if name == "sdpa":
        reasons.append("it is an attention")
    return reasons


def _check(x, bias, approximate):
    check_dense("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; it must be a floating-point tensor")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (..., C) with C of 1 or more")
    if bias is not None:
        check_dense("bias", bias)
        if bias.dtype != x.dtype and bias.dtype != torch.float32:
            raise TypeError(f"bias has dtype {bias.dtype}; it must be x's, {x.dtype}, or torch.float32")
        if bias.device != x.device:
            raise ValueError(f"bias is on {bias.device}; it must be on x's device, {x.device}")
        if bias.dim() != 1 or bias.shape[0] != x.shape[-1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({x.shape[-1]},)")
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate is {approximate!r}; allowed are 'tanh' and 'none'")

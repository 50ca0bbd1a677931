"""`ops.film_layer_norm`: signature, validation, choice of backend."""

import torch

from ... import _backends
from .._shared.arguments import autocast_dtype, check_dense, check_index, check_number, check_tensor
from . import autograd, reference

ORDER = ("cpp", "triton", "cuda", "reference")  # of auto; which of Triton and CUDA is the faster one is not measured yet
MOST_HELD = 8192  # channels of a row that the CUDA kernels hold in registers


def film_layer_norm(x, gain, bias, *, residual=None, residual_bias=None, index=None, eps=1e-5, backend="auto"):
    """LayerNorm over the last dimension, with the addition of a residual branch in the same pass.

        s = x + residual + residual_bias        out = (s - mean) / sqrt(variance + eps) * gain + bias

    Gain and bias may be those of a layer, of each example (feature-wise modulation, conditional LayerNorm) or of each task of
    a batch (the conditional layer normalisation of CA-MTL, arXiv 2009.09139, section 2.3). Statistics and sums are float32.

    Args:
        x: rows (B, T, C), float32, bfloat16 or float16 (`reference` takes every float dtype). Any strides, an expanded batch
            included. Or a pair, (B, T1, C) and (B, T2, C), whose rows stand one behind the other in the result, T = T1 + T2,
            without being concatenated first.
        gain: (C,) or (B, C) of x's dtype or float32, or None for ones; with an index (C,) or (G, C).
        bias: the same; None for zeros.
        residual: (B, T, C) of x's dtype, added first.
        residual_bias: (C,) of x's dtype or float32, added with it: the bias of the linear layer that made it.
        index: int32 or int64 (B,), in [0, G): which row of a gain or bias (G, C) an example has, a task's for instance. The
            gradients of such rows are summed over their examples.
        eps: added to the variance; 0 or more.
        backend: "auto", "reference", "cpp", "triton" or "cuda". A named backend runs or raises.

    Returns:
        out (B, T, C) of x's dtype, contiguous; with a residual (out, s), both differentiable.

    Under autocast x and residual are converted to float32, which is what `torch.nn.functional.layer_norm` computes in on a
    GPU, and what adding a 16-bit branch to a float32 stream gives: out and s are float32 then.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    arguments = _check(x, gain, bias, residual, residual_bias, index, eps)
    name = _backends.choose("film_layer_norm", backend, ORDER, lambda name: _refusals(name, arguments[0]))
    if name == "reference":
        out, total = reference.film_layer_norm(*arguments)
    else:
        out, total = autograd.film_layer_norm(name, *arguments)
    return out if residual is None else (out, total)


def explain_film_layer_norm(x, gain, bias, *, residual=None, residual_bias=None, index=None, eps=1e-5, backend="auto"):
    """The `explain` of `film_layer_norm`."""
    x, *_ = _check(x, gain, bias, residual, residual_bias, index, eps)
    name = _backends.choose("film_layer_norm", backend, ORDER, lambda name: _refusals(name, x))
    return _backends.Explanation("film_layer_norm", name, "", {n: _refusals(n, x) for n in _backends.NAMES})


def _refusals(name, x):
    reasons = _backends.platform_refusals(name, x[0].device, x[0].dtype)
    if name == "sdpa":
        reasons.append("it is an attention")
    elif name == "cuda" and x[0].shape[2] > MOST_HELD:
        reasons.append(f"rows have {x[0].shape[2]} channels, it takes 1 to {MOST_HELD}")
    return reasons


def _widened(tensor):
    """In float32 what has fewer bits."""
    return tensor.float() if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _check(x, gain, bias, residual, residual_bias, index, eps):
    """Validates, applies autocast. Returns the same, x as a list."""
    paired = isinstance(x, (list, tuple))
    if paired and len(x) != 2:
        raise ValueError(f"x has {len(x)} tensors; it must be a tensor or a pair of them")
    x = list(x) if paired else [x]
    names = ("x[0]", "x[1]") if paired else ("x",)
    device = getattr(x[0], "device", None)
    for name, one in zip(names, x, strict=True):
        check_tensor(name, one, "BTC", names[0], device)
    if residual is not None:
        check_tensor("residual", residual, "BTC", names[0], device)
    if autocast_dtype(device) is not None:
        *x, gain, bias, residual, residual_bias = (_widened(t) for t in (*x, gain, bias, residual, residual_bias))
    first, batch, channels = x[0], x[0].shape[0], x[0].shape[2]
    if channels == 0:
        raise ValueError(f"{names[0]} has shape {tuple(first.shape)}; its last size must be 1 or more")
    if paired:
        if x[1].dtype != first.dtype:
            raise TypeError(f"x[1] has dtype {x[1].dtype}; it must be that of x[0], {first.dtype}")
        if x[1].shape[0] != batch or x[1].shape[2] != channels:
            raise ValueError(
                f"x[1] has shape {tuple(x[1].shape)}; with x[0] {tuple(first.shape)} it must be ({batch}, T2, {channels})"
            )
    length = sum(one.shape[1] for one in x)
    if residual is not None:
        if residual.dtype != first.dtype:
            raise TypeError(f"residual has dtype {residual.dtype}; it must be that of {names[0]}, {first.dtype}")
        if residual.shape[0] != batch or residual.shape[1] != length or residual.shape[2] != channels:
            raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be ({batch}, {length}, {channels})")
    elif residual_bias is not None:
        raise ValueError("residual_bias is given; it must be None without a residual")
    groups = batch
    if index is not None:
        first_rows = next((p for p in (gain, bias) if isinstance(p, torch.Tensor) and p.dim() == 2), None)
        if first_rows is None:
            raise ValueError("index is given; it needs a gain or bias (G, C)")
        groups = first_rows.shape[0]
        index = check_index("index", index, ((batch,),), groups, "gain or bias", device)
    for name, parameter, dims in (("gain", gain, (1, 2)), ("bias", bias, (1, 2)), ("residual_bias", residual_bias, (1,))):
        if parameter is None:
            continue
        check_dense(name, parameter)
        if parameter.dtype != first.dtype and parameter.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {parameter.dtype}; it must be {names[0]}'s, {first.dtype}, or torch.float32")
        if parameter.device != device:
            raise ValueError(f"{name} is on {parameter.device}; it must be on {names[0]}'s device, {device}")
        shape = parameter.shape
        if len(shape) not in dims or shape[-1] != channels or (len(shape) == 2 and shape[0] != groups):
            allowed = f"({channels},)" + (f" or ({groups}, {channels})" if 2 in dims else "")
            raise ValueError(f"{name} has shape {tuple(shape)}; it must be {allowed}")
    eps = check_number("eps", eps, "a finite number of 0 or more", lambda eps: eps >= 0.0)
    return x, gain, bias, residual, residual_bias, index, eps

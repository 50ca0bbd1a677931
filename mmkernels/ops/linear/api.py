"""`ops.linear`: signature, validation, choice of backend."""

import torch

from ... import _backends, _library
from .._shared.arguments import autocast_dtype, check_dense
from . import autograd, reference

LEAST_ROWS = 64  # fewer do not pay for packing the weight


def linear(x, weight, bias=None, *, backend="auto"):
    """x Wᵀ + b; of lists, those of every place, all in one pass over the threads.

    Args:
        x: (..., K), or a list of tensors, one for each layer. float32, bfloat16 or float16 (`reference` takes every float
            dtype). Any strides.
        weight: (N, K) of x's dtype; a list where x is one.
        bias: (N,) of x's dtype or float32, or None; a list of them where x is one, or None for no bias at all.
        backend: "auto", "cpp", or "reference": `torch.nn.functional.linear` of one after the other. "auto" takes "cpp" where
            it was measured to be the faster one: float32 on processors of AMD with AVX-512, where torch has MKL; see the
            family's README.

    Returns:
        (..., N) of x's dtype; a list where x is one. Under autocast the inputs are converted as those of `F.linear` are.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what it was and what is allowed.
        BackendError: the named backend cannot run this problem; the message has every reason.
    """
    name, x, weight, bias, listed = _prepare(x, weight, bias, backend)
    if name == "reference":
        out = [reference.linear(*layer) for layer in zip(x, weight, _like(bias, x), strict=True)]
    else:
        rows = autograd.linear([one.flatten(0, -2) if one.dim() > 1 else one[None] for one in x], weight, bias)
        out = [y.view(*one.shape[:-1], y.shape[1]) for one, y in zip(x, rows, strict=True)]
    return out if listed else out[0]


def explain_linear(x, weight, bias=None, *, backend="auto"):
    """The `explain` of `linear`."""
    name, x, *_ = _prepare(x, weight, bias, backend)
    return _backends.Explanation("linear", name, "", {n: _refusals(n, x) for n in _backends.NAMES})


def _prepare(x, weight, bias, backend):
    """Validates, applies autocast, chooses. Returns lists, and whether x was one."""
    listed = isinstance(x, (list, tuple))
    if listed and not x:
        raise ValueError("x is an empty list; it must have one tensor or more")
    if not listed:
        x, weight, bias = [x], [weight], [bias]
    elif bias is None:
        bias = [None] * len(x)
    for name, values in {"weight": weight, "bias": bias}.items():
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name} is a {type(values).__name__}; it must be a list, as x is one")
        if len(values) != len(x):
            raise ValueError(f"{name} has {len(values)} elements; it must have one for each of x, {len(x)}")
    for i, layer in enumerate(zip(x, weight, bias, strict=True)):
        _check(*layer, x[0], f"[{i}]" if listed else "")
    if (dtype := autocast_dtype(x[0].device)) is not None:
        x, weight, bias = ([t if t is None else t.to(dtype) for t in side] for side in (x, weight, bias))
    order = ("cpp", "reference") if own_is_faster(x[0]) else ("reference", "cpp")
    return _backends.choose("linear", backend, order, lambda name: _refusals(name, x)), x, weight, bias, listed


def own_is_faster(x) -> bool:
    """Was "cpp" measured to be faster than the library for rows such as `x`?"""
    return x.device.type == "cpu" and x.dtype == torch.float32 and _library.SLOW_MKL and x.numel() >= LEAST_ROWS * x.shape[-1]


def _like(bias, x):
    return [b if b is None else b.to(one.dtype) for b, one in zip(bias, x, strict=True)]


def _refusals(name, x):
    if name == "sdpa":
        return ["it is an attention"]
    if name in ("cuda", "triton"):
        return ["a library's matrix products are as fast on a GPU: 'reference' calls them"]
    return _backends.platform_refusals(name, x[0].device, x[0].dtype)


def _check(x, weight, bias, first, place):
    check_dense(f"x{place}", x)
    check_dense(f"weight{place}", weight)
    if not x.is_floating_point():
        raise TypeError(f"x{place} has dtype {x.dtype}; it must be a floating-point tensor")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x{place} has shape {tuple(x.shape)}; it must be (..., K) with K of 1 or more")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight{place} has shape {tuple(weight.shape)}; it must be (N, {x.shape[-1]}), K being x's last size"
        )
    if bias is not None:
        check_dense(f"bias{place}", bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias{place} has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
        if bias.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"bias{place} has dtype {bias.dtype}; it must be x's, {x.dtype}, or torch.float32")
    for name, tensor in {"x": x, "weight": weight}.items():
        if tensor.dtype != first.dtype and autocast_dtype(first.device) is None:
            of = "x[0]" if place else "x"
            raise TypeError(f"{name}{place} has dtype {tensor.dtype}; it must be that of {of}, {first.dtype}")
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name}{place} is on {tensor.device}; it must be on x's device, {first.device}")

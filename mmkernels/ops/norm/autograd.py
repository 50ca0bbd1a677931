"""The registered ops of the family and the gradient around them.

`mmkernels::norm_{fwd,bwd}` (schemas in csrc/schemas.h) serve `cpp` and `cuda`; `mmkernels_triton::` and, in tests,
`mmkernels_emulator::` have the same signatures. One autograd function serves them all.
"""

import torch

from .._shared.registration import fake, forward_backward, once_differentiable


@fake("norm_fwd")
def _forward_fake(x, residual, residual_bias, gain, bias, index, eps):
    batch, length, channels = x[0].shape[0], sum(one.shape[1] for one in x), x[0].shape[2]
    out = x[0].new_empty(batch, length, channels)
    total = x[0].new_empty(0) if residual is None else torch.empty_like(out)
    mean = x[0].new_empty(batch, length, dtype=torch.float32)
    return out, total, mean, torch.empty_like(mean)


@fake("norm_bwd")
def _backward_fake(dout, dsum, rows, mean, rstd, gain, index, groups, wanted):
    batch, length, channels = dout.shape

    def of_parameter(bit, per_example):
        shape = ((batch if index is None else groups, channels) if per_example else (channels,)) if wanted & bit else (0,)
        return dout.new_empty(shape, dtype=torch.float32)

    dx = dout.new_empty(dout.shape if wanted & 1 else (0,))
    return dx, of_parameter(2, gain is not None and gain.dim() == 2), of_parameter(4, wanted & 16), of_parameter(8, False)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(backend, residual, residual_bias, gain, bias, index, eps, *x):
        return forward_backward("norm", backend)[0](list(x), residual, residual_bias, gain, bias, index, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, residual, residual_bias, gain, bias, index, _, *x = inputs
        _, total, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.has_sum = residual is not None
        if not ctx.has_sum:
            ctx.mark_non_differentiable(total)
        ctx.lengths = [one.shape[1] for one in x]
        ctx.parameters = [None if p is None else (p.shape, p.dtype) for p in (residual_bias, gain, bias)]
        ctx.save_for_backward(mean, rstd, gain, index, *([total] if ctx.has_sum else x))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dsum, *_):
        if not ctx.has_sum:
            dsum = None  # a compiler gives zeros for it
        if dout is None and dsum is None:
            return (None,) * (7 + len(ctx.lengths))
        mean, rstd, gain, index, *rows = ctx.saved_tensors
        _, need_residual, need_residual_bias, need_gain, need_bias, _, _, *need_x = ctx.needs_input_grad
        need_rows = need_residual or any(need_x)
        per_example = need_bias and len(ctx.parameters[2][0]) == 2
        groups = next((about[0][0] for about in ctx.parameters[1:] if about and len(about[0]) == 2), 0)
        wanted = need_rows * 1 + need_gain * 2 + need_bias * 4 + need_residual_bias * 8 + per_example * 16
        with torch.no_grad():
            if dout is None:  # of s alone: LayerNorm has no part in it
                summed = dsum.sum((0, 1), dtype=torch.float32) if need_residual_bias else None
                found = dsum, *(_zeros(about, dsum) for about in ctx.parameters[1:]), summed
            else:
                found = forward_backward("norm", ctx.backend)[1](dout, dsum, rows, mean, rstd, gain, index, groups, wanted)
            ds, dgain, dbias, dresidual_bias = found
            parameters = [
                grad.to(about[1]) if need else None
                for need, grad, about in zip(
                    (need_residual_bias, need_gain, need_bias), (dresidual_bias, dgain, dbias), ctx.parameters, strict=True
                )
            ]
            parts = [None] * len(need_x)
            if any(need_x):
                parts = [ds] if len(parts) == 1 else ds.split(ctx.lengths, 1)
                if need_residual and len(parts) > 1:
                    # Where autograd keeps a part as the gradient of a leaf, it must not be memory of another leaf's.
                    parts = [part.clone() if part.is_contiguous() else part for part in parts]
                parts = [part if need else None for need, part in zip(need_x, parts, strict=True)]
        gradients = (None, ds if need_residual else None, *parameters, None, None, *parts)
        return once_differentiable("mmkernels.ops.film_layer_norm", gradients, (dout, dsum, gain, *rows))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.film_layer_norm has a batch dimension of its own and no vmap rule: fold the mapped "
            "dimension into B, or use backend='reference'"
        )


def _zeros(about, like):
    return None if about is None else like.new_zeros(about[0], dtype=torch.float32)


def film_layer_norm(backend, x, gain, bias, residual, residual_bias, index, eps):
    """(out, s) on one of the kernel backends, s None without a residual; differentiable when a gradient is wanted."""
    given = [t for t in (*x, gain, bias, residual, residual_bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        out, total, _, _ = _Norm.apply(backend, residual, residual_bias, gain, bias, index, eps, *x)
    else:
        out, total, _, _ = forward_backward("norm", backend)[0](x, residual, residual_bias, gain, bias, index, eps)
    return out, None if residual is None else total

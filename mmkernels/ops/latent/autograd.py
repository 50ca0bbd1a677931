"""The registered ops of the family and the gradient around them.

`core` is softmax(scale q xhat^T) xhat with xhat normalised on the tile. Everything around it is N-sized and left to torch:
the absorption of the projections and every weight's gradient.
"""

import torch

from .._shared import dropout
from .._shared.registration import fake, forward_backward, once_differentiable
from . import reference


@fake("latent_fwd")
def _forward_fake(q, x, position, key_mask, scale, eps, seed=None, dropout_p=0.0, first_key=0):
    shape = (x.shape[0], q.shape[1], q.shape[2] + (dropout_p > 0.0))
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape[:2], dtype=torch.float32)


@fake("latent_bwd")
def _backward_fake(dout, dlse, q, x, position, key_mask, out, lse, scale, eps, wanted, seed=None, dropout_p=0.0, first_key=0):
    def grad(tensor, bit):
        return q.new_empty(tensor.shape if tensor is not None and wanted & bit else (0,))

    return grad(q, 1), grad(x, 2), grad(position, 4)


@fake("latent_attention")
def _inference_fake(q, x, w_k, w_v, norm_weight, norm_bias, b_v, position, key_mask, num_heads, scale, eps):
    return q.new_empty(x.shape[0], q.shape[1] if w_k is not None else q.shape[1] // num_heads, w_v.shape[0])


class _Latent(torch.autograd.Function):
    @staticmethod
    def forward(backend, q, x, position, key_mask, scale, eps, seed, dropout_p):
        return forward_backward("latent", backend)[0](q, x, position, key_mask, scale, eps, seed, dropout_p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, q, x, position, key_mask, ctx.scale, ctx.eps, seed, ctx.dropout_p = inputs
        out, lse = output
        ctx.save_for_backward(q, x, position, key_mask, seed, out, lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        q, x, position, key_mask, seed, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 9
        if dout is None:
            dout = torch.zeros_like(out)
        _, need_q, need_x, need_position, *_ = ctx.needs_input_grad
        wanted = need_q * 1 + need_x * 2 + need_position * 4
        with torch.no_grad():
            dq, dx, dposition = forward_backward("latent", ctx.backend)[1](
                dout, dlse, q, x, position, key_mask, out, lse, ctx.scale, ctx.eps, wanted, seed, ctx.dropout_p
            )
        gradients = (
            None,
            dq if need_q else None,
            dx if need_x else None,
            dposition if need_position else None,
            None,
            None,
            None,
            None,
            None,
        )
        return once_differentiable("mmkernels.ops.latent_attention", gradients, (dout, dlse, q, x, position))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.latent_attention has a batch dimension of its own and no vmap rule: fold the mapped dimension "
            "into B, or use backend='reference'"
        )


def core(backend, q, x, position, key_mask, scale, eps, seed=None, dropout_p=0.0):
    """(out, lse), both float32, on one of the kernel backends; differentiable when a gradient is wanted."""
    if torch.is_grad_enabled() and (q.requires_grad or x.requires_grad or (position is not None and position.requires_grad)):
        return _Latent.apply(backend, q, x, position, key_mask, scale, eps, seed, dropout_p)
    return forward_backward("latent", backend)[0](q, x, position, key_mask, scale, eps, seed, dropout_p)


# --- An input in parts, read one after another or held by several processes ---------------------------------------------


def core_pair(backend):
    """The core's forward and backward on any backend, without autograd."""
    if backend == "reference":
        return _reference_forward, _reference_backward
    return forward_backward("latent", backend)


def _reference_forward(q, x, position, key_mask, scale, eps, seed=None, dropout_p=0.0, first_key=0):
    keep = _keep_factors(q, x, seed, dropout_p, first_key)
    return reference.core(q, x, position, key_mask, scale, eps, keep)


def _reference_backward(
    dout, dlse, q, x, position, key_mask, out, lse, scale, eps, wanted, seed=None, dropout_p=0.0, first_key=0
):
    keep = _keep_factors(q, x, seed, dropout_p, first_key)
    return reference.core_backward(dout, dlse, q, x, position, key_mask, out, lse, scale, eps, wanted, keep)


def _keep_factors(q, x, seed, dropout_p, first_key):
    """What weights (B, R, M) are multiplied by, or None without dropout."""
    if dropout_p == 0.0:
        return None
    keep = dropout.keep_mask(seed, (x.shape[0], 1, q.shape[1], x.shape[1]), dropout_p, first_key)[:, 0]
    return keep.to(torch.promote_types(x.dtype, torch.float32)) / (1.0 - dropout_p)


def merge(out, lse, other_out, other_lse):
    """(out, lse) of two parts of an input, together: the mean of out, weighted by what each part has of the sum."""
    both = torch.logaddexp(lse, other_lse)
    weight = torch.where(both == float("-inf"), 0.0, (other_lse - both).exp())
    return torch.lerp(out, other_out, weight[..., None]), both


class _Merged(torch.autograd.Function):
    """`out` and `lse` of the core over all parts, made elsewhere; `gradients(dout, out, lse, absorbed, inputs, wanted)` reads
    the parts again and returns the gradients of `absorbed` and of every one of `inputs`, as `wanted` asks for them."""

    @staticmethod
    def forward(ctx, gradients, partial, absorbed, *inputs):
        out, lse = partial
        ctx.gradients = gradients
        ctx.save_for_backward(out, lse, absorbed, *inputs)
        return out

    @staticmethod
    def backward(ctx, dout):
        out, lse, absorbed, *inputs = ctx.saved_tensors
        with torch.no_grad():
            found = ctx.gradients(dout, out, lse, absorbed, inputs, ctx.needs_input_grad[2:])
        return once_differentiable("mmkernels.ops.latent_attention", (None, None, *found), (dout, absorbed, *inputs))


def merged(gradients, out, lse, absorbed, *inputs):
    """`out`, differentiable in `absorbed` and `inputs` through `gradients` (`_Merged`)."""
    return _Merged.apply(gradients, (out, lse), absorbed, *inputs)

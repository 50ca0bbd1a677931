"""The registered ops of the family and the gradient around them.

`mmkernels::attention_{fwd,bwd}` (schemas in csrc/schemas.h) serve `cpp` and `cuda`; `mmkernels_triton::` and, in tests,
`mmkernels_emulator::` have the same signatures. One autograd function serves them all.
"""

import torch

from .._shared.registration import fake, forward_backward, once_differentiable


@fake("attention_fwd")
def _forward_fake(q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p):
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@fake("attention_bwd")
def _backward_fake(dout, dlse, q, k, v, out, lse, key_mask, bias, bias_index, seed, scale, dropout_p, wanted):
    def grad(tensor, bit):
        return q.new_empty(
            tensor.shape if tensor is not None and wanted & bit else (0,),
            dtype=(q if tensor is None else tensor).dtype,
        )

    return grad(q, 1), grad(k, 2), grad(v, 2), grad(bias, 4)


def _row_bias_gradient(bias, lse, dlse):
    """Gradient of a bias that adds one number to all scores of a row: it moves lse by as much and P not at all, so it is
    exactly that of lse, where the row has a key. Summing P (dP - delta) over the keys would give this plus rounding."""
    if dlse is None:
        return torch.zeros_like(bias)
    return torch.where(lse == float("-inf"), 0.0, dlse).unsqueeze(-1).sum_to_size(bias.shape).to(bias.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(backend, q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p):
        return forward_backward("attention", backend)[0](q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, q, k, v, key_mask, bias, bias_index, seed, ctx.scale, ctx.dropout_p = inputs
        out, lse = output
        ctx.save_for_backward(q, k, v, key_mask, bias, bias_index, seed, out, lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, key_mask, bias, bias_index, seed, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 10
        if dout is None:
            dout = torch.zeros_like(out)
        needs = ctx.needs_input_grad
        need_bias = bias is not None and needs[5]
        of_rows = need_bias and bias.dim() == 4 and bias.shape[3] == 1
        wanted = needs[1] * 1 + (needs[2] or needs[3]) * 2 + (need_bias and not of_rows) * 4
        with torch.no_grad():
            dq, dk, dv, dbias = forward_backward("attention", ctx.backend)[1](
                dout, dlse, q, k, v, out, lse, key_mask, bias, bias_index, seed, ctx.scale, ctx.dropout_p, wanted
            )
            if of_rows:
                dbias = _row_bias_gradient(bias, lse, dlse)
        gradients = (
            None,
            dq if needs[1] else None,
            dk if needs[2] else None,
            dv if needs[3] else None,
            None,
            dbias if need_bias else None,
            None,
            None,
            None,
            None,
        )
        return once_differentiable("mmkernels.ops.attention", gradients, (dout, dlse, q, k, v, bias))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.attention has a batch dimension of its own and no vmap rule: fold the mapped "
            "dimension into B, or use backend='reference'"
        )


def attention(backend, q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p):
    """(out, lse) on one of the kernel backends; differentiable when a gradient is wanted."""
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Attention.apply(backend, q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p)
    return forward_backward("attention", backend)[0](q, k, v, key_mask, bias, bias_index, seed, scale, dropout_p)

"""The registered ops of `latent_decode` and the gradient around them.

`core` is sum_h softmax(scale (xhat k_h^T + bias_h)) v_h + out_bias with xhat normalised on the tile. What makes k, bias and v
is N-sized and left to torch.
"""

import torch

from .._shared.registration import fake, forward_backward, once_differentiable


@fake("latent_decode_fwd")
def _forward_fake(queries, position, query_mask, k, bias, v, out_bias, key_mask, scale, eps):
    batch, heads, _, columns = v.shape
    rows = queries.shape[1]
    return queries.new_empty(batch, rows, columns), queries.new_empty(batch, heads, rows, dtype=torch.float32)


@fake("latent_decode_bwd")
def _backward_fake(dout, queries, position, query_mask, k, bias, v, out_bias, key_mask, out, lse, scale, eps, wanted):
    def grad(tensor, bit):
        return (queries if tensor is None else tensor).new_empty(tensor.shape if tensor is not None and wanted & bit else (0,))

    return grad(queries, 1), grad(position, 2), grad(k, 4), grad(bias, 4), grad(v, 4)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(backend, queries, position, query_mask, k, bias, v, out_bias, key_mask, scale, eps):
        forward = forward_backward("latent", backend, "latent_decode")[0]
        return forward(queries, position, query_mask, k, bias, v, out_bias, key_mask, scale, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, *tensors, ctx.scale, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _):
        *tensors, out, lse = ctx.saved_tensors
        if dout is None:
            return (None,) * 11
        _, need_queries, need_position, _, need_k, need_bias, need_v, need_out_bias, *_ = ctx.needs_input_grad
        need_keys = need_k or need_bias or need_v
        wanted = need_queries * 1 + need_position * 2 + need_keys * 4
        dqueries = dposition = dk = dbias = dv = None
        with torch.no_grad():
            if wanted:
                backward = forward_backward("latent", ctx.backend, "latent_decode")[1]
                dqueries, dposition, dk, dbias, dv = backward(dout, *tensors, out, lse, ctx.scale, ctx.eps, wanted)
            dout_bias = dout.sum((0, 1)) if need_out_bias else None
        gradients = (
            None,
            dqueries if need_queries else None,
            dposition if need_position else None,
            None,
            dk if need_k else None,
            dbias if need_bias else None,
            dv if need_v else None,
            dout_bias,
            None,
            None,
            None,
        )
        return once_differentiable("mmkernels.ops.latent_decode", gradients, (dout, *tensors))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.latent_decode has a batch dimension of its own and no vmap rule: fold the mapped dimension into B, "
            "or use backend='reference'"
        )


def core(backend, queries, position, query_mask, k, bias, v, out_bias, key_mask, scale, eps):
    """out (B,O,E) on one of the kernel backends; differentiable when a gradient is wanted."""
    tensors = (queries, position, query_mask, k, bias, v, out_bias, key_mask)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        return _Decode.apply(backend, *tensors, scale, eps)[0]
    return forward_backward("latent", backend, "latent_decode")[0](*tensors, scale, eps)[0]

"""The registered ops of the family and the gradient around them.

`mmkernels::bias_gelu_{fwd,bwd}` (schemas in csrc/schemas.h) serve `cpp` and `cuda`; `mmkernels_triton::` and, in tests,
`mmkernels_emulator::` have the same signatures. The gradient is computed from x: nothing else is saved.
"""

import torch

from .._shared.registration import fake, forward_backward, once_differentiable


@fake("bias_gelu_fwd")
def _forward_fake(x, bias, tanh):
    return x.new_empty(x.shape)


@fake("bias_gelu_bwd")
def _backward_fake(dout, x, bias, tanh, wanted):
    of_bias = x.shape[-1:] if bias is not None and wanted & 2 else (0,)
    return x.new_empty(x.shape if wanted & 1 else (0,)), x.new_empty(of_bias, dtype=torch.float32)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(backend, x, bias, tanh):
        return forward_backward("activation", backend, "bias_gelu")[0](x, bias, tanh)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, x, bias, ctx.tanh = inputs
        ctx.save_for_backward(x, bias)

    @staticmethod
    def backward(ctx, dout):
        x, bias = ctx.saved_tensors
        _, need_x, need_bias, _ = ctx.needs_input_grad
        with torch.no_grad():
            op = forward_backward("activation", ctx.backend, "bias_gelu")[1]
            dx, dbias = op(dout, x, bias, ctx.tanh, need_x * 1 + need_bias * 2)
            gradients = None, dx if need_x else None, dbias.to(bias.dtype) if need_bias else None, None
        return once_differentiable("mmkernels.ops.bias_gelu", gradients, (dout, x, bias))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.bias_gelu takes any number of dimensions and has no vmap rule: give it the tensor with the mapped "
            "dimension in front, or use backend='reference'"
        )


def bias_gelu(backend, x, bias, tanh):
    """gelu(x + bias) on one of the kernel backends; differentiable when a gradient is wanted."""
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _BiasGelu.apply(backend, x, bias, tanh)
    return forward_backward("activation", backend, "bias_gelu")[0](x, bias, tanh)

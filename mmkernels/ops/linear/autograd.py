"""The registered ops `mmkernels::linear_{fwd,bwd}` (schemas in csrc/schemas.h) and the gradient around them."""

import torch

from .._shared.registration import fake, forward_backward, once_differentiable


@fake("linear_fwd")
def _forward_fake(x, weight, bias):
    return [one.new_empty(one.shape[0], w.shape[0]) for one, w in zip(x, weight, strict=True)]


@fake("linear_bwd")
def _backward_fake(dout, x, weight, wanted):
    gradients = []
    for one, w, want in zip(x, weight, wanted, strict=True):
        gradients += [
            one.new_empty(one.shape if want & 1 else (0,)),
            one.new_empty(w.shape if want & 2 else (0,)),
            one.new_empty(w.shape[:1] if want & 4 else (0,), dtype=torch.float32),
        ]
    return gradients


class _Linear(torch.autograd.Function):
    """`layers`: the places among `tensors` of each layer's x, weight and bias (-1: none), flat. A tensor stands there once,
    whoever shares it: Dynamo traces nothing else."""

    @staticmethod
    def forward(layers, *tensors):
        return tuple(_run(*_sides(layers, tensors)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.layers, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *dout):
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        places = [ctx.layers[i : i + 3] for i, d in zip(range(0, len(ctx.layers), 3), dout, strict=True) if d is not None]
        given = [d for d in dout if d is not None]
        gradients = [None] * len(tensors)
        if not given:
            return (None, *gradients)

        def add(place, gradient):
            gradients[place] = gradient if gradients[place] is None else gradients[place] + gradient

        with torch.no_grad():
            # Where a layer's weight is frozen nothing sums its bias's gradient on the way.
            wanted = [needs[x] + 2 * needs[w] + 4 * (needs[w] and b >= 0 and needs[b]) for x, w, b in places]
            x, weight, _ = _sides([i for place in places for i in place], tensors)
            found = forward_backward("linear", "cpp")[1](given, x, weight, wanted)
            for i, (layer, want) in enumerate(zip(places, wanted, strict=True)):
                for side, place in enumerate(layer):
                    if want & 1 << side:
                        add(place, found[3 * i + side].to(tensors[place].dtype))
                    elif side == 2 and place >= 0 and needs[place]:
                        add(place, given[i].sum(0, dtype=torch.float32).to(tensors[place].dtype))
        return once_differentiable("mmkernels.ops.linear", (None, *gradients), (*given, *tensors))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.linear takes any number of dimensions and has no vmap rule: give it the tensor with the mapped "
            "dimension in front, or use backend='reference'"
        )


def _sides(layers, tensors):
    """Lists of x, weight and bias."""
    return [[tensors[i] if i >= 0 else None for i in layers[side::3]] for side in range(3)]


def _run(x, weight, bias):
    bias = [one.new_empty(0) if b is None else b for one, b in zip(x, bias, strict=True)]
    return forward_backward("linear", "cpp")[0](x, weight, bias)


def linear(x, weight, bias):
    """Lists of x (M, K), weight (N, K) and bias (N,) or None -> list of (M, N); differentiable when a gradient is wanted."""
    tensors, layers = [], []
    for tensor in (t for layer in zip(x, weight, bias, strict=True) for t in layer):
        known = [i for i, other in enumerate(tensors) if other is tensor]
        layers.append(-1 if tensor is None else known[0] if known else len(tensors))
        if layers[-1] == len(tensors):
            tensors.append(tensor)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return list(_Linear.apply(layers, *tensors))
    return _run(x, weight, bias)

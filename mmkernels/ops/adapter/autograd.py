"""The registered ops `mmkernels::adapter_{fwd,bwd}` and `adapter_fusion_{fwd,bwd}` (schemas in csrc/schemas.h) and the
gradients around them.

They serve `cpp` and `cuda`; `mmkernels_triton::` and, in tests, `mmkernels_emulator::` have the same signatures. Saved are the
inputs and the norms' statistics, on a CPU the bottleneck and what is normalised at the end as well (a GPU makes them
again), or the weights of the fusion.
"""

import torch

from ... import _library
from .._shared.registration import apply, fake, forward_backward, once_differentiable
from .reference import ACTIVATIONS, activated, activated_backward

# The differentiable arguments of both ops, in their order.
NAMES = ("x", "input_residual", "residual", "w_down", "b_down", "w_up", "b_up")
NAMES += ("norm_weight", "norm_bias", "out_weight", "out_bias", "scale", "gate")
X, INPUT_RESIDUAL, RESIDUAL, OUT_WEIGHT = 0, 1, 2, 9


@fake("adapter_fwd")
def _forward_fake(*arguments):
    given = dict(zip(NAMES, arguments, strict=False))
    x, save = given["x"], arguments[-1]
    norms = 2 * (given["norm_weight"] is not None) + 2 * (given["out_weight"] is not None)
    rows = x.shape[:-1]
    normalised = x.shape[-1] if given["out_weight"] is not None and x.dtype == torch.float32 else 0
    saved = (*rows, given["w_down"].shape[-2] + normalised) if save else (0,)
    numbers = (x.new_empty(shape, dtype=torch.float32) for shape in ((norms, *rows), saved))
    return x.new_empty(x.shape), *numbers


@fake("adapter_bwd")
def _backward_fake(dout, *arguments):
    return empty_gradients(arguments[: len(NAMES)], arguments[-1])


def empty_gradients(given, wanted):
    """Of the tensors of NAMES: what backward passes return, with no elements where bit i of `wanted` is not set."""
    x, w_down, w_up, scale, gate = (given[NAMES.index(name)] for name in ("x", "w_down", "w_up", "scale", "gate"))
    channels, bottleneck = x.shape[-1], w_down.shape[-2]
    bank = w_down.shape[:-2]  # () or (A,)
    shapes = [x.shape] * 3
    shapes += [w_down.shape, (*bank, bottleneck), w_up.shape, (*bank, channels), *((channels,),) * 4]
    shapes += [(0,) if scale is None else scale.shape, (0,) if gate is None else gate.shape]
    narrow = (X, INPUT_RESIDUAL, RESIDUAL, NAMES.index("w_down"), NAMES.index("w_up"))
    return tuple(
        x.new_empty(shape if wanted & 1 << i else (0,), dtype=x.dtype if i in narrow else torch.float32)
        for i, shape in enumerate(shapes)
    )


def library_backward_is_faster(given, index, options) -> bool:
    """Is a gradient nothing but products that are large enough for the library to win, where its products are at their
    peak? `README.md` has the table."""
    x, _, _, w_down, _, _, _, *others = given
    return (
        not _library.SLOW_MKL
        and x.is_cpu
        and x.dtype == w_down.dtype == torch.float32
        and w_down.shape[-2] >= 96
        and x.numel() >= 256 * x.shape[-1]
        and index is None
        and options[-1] == 0.0
        and all(other is None for other in others)
    )


def _library_backward(dout, given, saved, options, wanted):
    """What adapter_bwd returns, of an adapter that `library_backward_is_faster` takes, by the library's products."""
    x, input_residual, _, w_down, b_down, w_up, b_up, *_ = given
    skip, activation, _, _, factor, _ = options
    is_wanted = [wanted >> i & 1 for i in range(len(NAMES))]
    of_x, of_input, _, of_down, of_b_down, of_up, of_b_up, *_ = is_wanted

    def scaled(product):
        return product if factor == 1.0 else product.mul_(factor)

    found = [None] * len(NAMES)
    rows, z = dout.reshape(-1, dout.shape[-1]), saved.flatten(0, -2)
    if of_up:
        found[5] = scaled(rows.t() @ activated(z, ACTIVATIONS[activation]))
    if of_b_up:
        found[6] = scaled(rows.sum(0))
    if not (of_x or of_input or of_down or of_b_down):
        return found
    dz = activated_backward(scaled(rows @ w_up), z, ACTIVATIONS[activation])
    if of_down:
        u = x if input_residual is None else x + input_residual
        found[3] = dz.t() @ u.reshape(-1, u.shape[-1])
    if of_b_down:
        found[4] = dz.sum(0)
    if of_x or of_input:
        du = dz @ w_down
        found[0] = (torch.add(du, rows) if skip & 1 else du).view(x.shape) if of_x else None
        found[1] = (torch.add(du, rows) if skip & 2 else du).view(x.shape) if of_input else None
    return found


class _Adapter(torch.autograd.Function):
    """`places`: of each of NAMES among `tensors`, -1 for None. A tensor stands there once, whoever shares it (Pfeiffer's
    adapter has one LayerNorm in two places). `by_library`: the backward is `_library_backward`."""

    @staticmethod
    def forward(backend, by_library, places, options, index, seed, *tensors):
        given = [tensors[i] if i >= 0 else None for i in places]
        return forward_backward("adapter", backend)[0](*given, index, seed, *options, backend == "cpp")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.by_library, ctx.places, ctx.options, index, seed, *tensors = inputs
        _, statistics, saved = output
        ctx.mark_non_differentiable(statistics, saved)
        ctx.save_for_backward(index, seed, statistics, saved if ctx.backend == "cpp" else None, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, *_):
        needs, places, skip = ctx.needs_input_grad[6:], ctx.places, ctx.options[0]
        if dout is None:
            return (None,) * (6 + len(needs))
        index, seed, statistics, saved, *tensors = ctx.saved_tensors
        need = [place >= 0 and needs[place] for place in places]
        # Where nothing normalises y its gradient is dout; x and input_residual have one gradient unless only one of them
        # is added again.
        alike = (skip & 1) == (skip >> 1 & 1)
        asked = list(need)
        if places[OUT_WEIGHT] < 0:
            asked[RESIDUAL] = False
        if alike:
            asked[X], asked[INPUT_RESIDUAL] = need[X] or need[INPUT_RESIDUAL], False
        gradients = [None] * len(needs)
        with torch.no_grad():
            given = [tensors[i] if i >= 0 else None for i in places]
            wanted = sum(1 << i for i, is_asked in enumerate(asked) if is_asked)
            if ctx.by_library:
                found = _library_backward(dout, given, saved, ctx.options, wanted)
            else:
                call = forward_backward("adapter", ctx.backend)[1]
                found = call(dout, *given, index, seed, statistics, saved, *ctx.options, wanted)
            for i, place in enumerate(places):
                if not need[i]:
                    continue
                grad = found[i]
                if i == RESIDUAL and not asked[i]:
                    grad = dout
                elif i == INPUT_RESIDUAL and alike:
                    grad = found[X]
                dtype = tensors[place].dtype
                grad = grad if grad.dtype == dtype else grad.to(dtype)
                gradients[place] = grad if gradients[place] is None else gradients[place] + grad
        gradients = (*(None,) * 6, *gradients)
        return once_differentiable("mmkernels.ops.adapter", gradients, (dout, *tensors))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.adapter takes any number of dimensions and has no vmap rule: give it x with the mapped dimension "
            "in front, or use backend='reference'"
        )


def adapter(backend, given, index, seed, options, free=False):
    """(B,T,C) on one of the kernel backends; `given`: the tensors of NAMES, or None. Differentiable when that is wanted;
    `free`: by the library's products where they are faster."""
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in given):
        return forward_backward("adapter", backend)[0](*given, index, seed, *options, False)[0]
    by_library = free and backend == "cpp" and library_backward_is_faster(given, index, options)
    tensors, places = [], []
    for t in given:
        if t is None:
            places.append(-1)
            continue
        place = 0
        for other in tensors:
            if other is t:
                break
            place += 1
        else:
            tensors.append(t)
        places.append(place)
    return apply(_Adapter, backend, by_library, tuple(places), options, index, seed, *tensors)[0]


@fake("adapter_fusion_fwd")
def _fusion_forward_fake(query, outputs, offset, seed, scale, dropout_p):
    return query.new_empty(query.shape), query.new_empty(outputs.shape[:-1], dtype=torch.float32)


@fake("adapter_fusion_bwd")
def _fusion_backward_fake(dout, query, outputs, weights, seed, scale, dropout_p, wanted):
    shapes = query.shape, outputs.shape, query.shape[:-1]
    return tuple(query.new_empty(shape if wanted & 1 << i else (0,)) for i, shape in enumerate(shapes))


class _Fusion(torch.autograd.Function):
    """`unused`, which adds one number to all scores of a row where there is no dropout, has gradients of zero."""

    @staticmethod
    def forward(backend, scale, dropout_p, seed, query, outputs, offset, *unused):
        return forward_backward("adapter", backend, "adapter_fusion")[0](query, outputs, offset, seed, scale, dropout_p)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend, ctx.scale, ctx.dropout_p, seed, query, outputs, _, *unused = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(seed, query, outputs, output[1], *unused)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        seed, query, outputs, weights, *unused = ctx.saved_tensors
        need, need_unused = ctx.needs_input_grad[4:7], ctx.needs_input_grad[7:]
        with torch.no_grad():
            wanted = sum(1 << i for i, is_needed in enumerate(need) if is_needed)
            found = forward_backward("adapter", ctx.backend, "adapter_fusion")[1](
                dout, query, outputs, weights, seed, ctx.scale, ctx.dropout_p, wanted
            )
            found = [g if is_needed else None for g, is_needed in zip(found, need, strict=True)]
            found += [torch.zeros_like(t) if is_needed else None for t, is_needed in zip(unused, need_unused, strict=True)]
        gradients = (*(None,) * 4, *found)
        return once_differentiable("mmkernels.ops.adapter_fusion", gradients, (dout, query, outputs))

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "mmkernels.ops.adapter_fusion takes any number of dimensions and has no vmap rule: give it query and outputs with "
            "the mapped dimension in front, or use backend='reference'"
        )


def adapter_fusion(backend, query, outputs, offset, unused, seed, scale, dropout_p):
    """(B,T,C) and weights (B,T,A) of query (B,T,C), outputs (B,T,A,C) and offset (B,T) on one of the kernel backends."""
    given = [query, outputs, offset, *unused]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return apply(_Fusion, backend, scale, dropout_p, seed, *given)
    return forward_backward("adapter", backend, "adapter_fusion")[0](query, outputs, offset, seed, scale, dropout_p)

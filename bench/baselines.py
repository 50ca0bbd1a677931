"""What the ops are compared with: plain PyTorch, its compiler, its fused attention used well, and other libraries.

The only module that imports peers. A `Candidate` takes the op's own arguments, so that the runner can verify and time it
like the op. Each list is complete for a problem on a device: what cannot run there is in it, with the reason.
"""

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import mmkernels
from mmkernels import testing
from mmkernels.testing import eager_attention, eager_latent_attention

from . import adapted, adapters, conditional, decoding, fusion, launches, perceiver, products, resampler, rows, text
from .problem import lacking
from .registry import Inputs, Problem

SDPA = F.scaled_dot_product_attention


class Candidate(NamedTuple):
    name: str
    kind: str  # "mmkernels", "baseline", or "floor": less work, so that its time is what the others can hope for
    function: Callable
    reason: str = ""  # why it cannot run here; empty when it can
    note: str = ""  # what it does differently
    forward_only: str = ""  # why it has no backward here; empty when it has
    without: tuple = ()  # of a floor: arguments that it does not take, by parts of their names
    solves: tuple | None = None  # of a floor: the problem whose result is right for it

    def given(self, inputs: Inputs, names: tuple) -> tuple:
        """(inputs, names): the arguments that it takes, and those of them whose gradients are wanted."""
        if not self.without:
            return inputs, names
        tensors = {n: t for n, t in inputs.tensors.items() if not self._lacks(n)}
        return inputs._replace(tensors=tensors), tuple(n for n in names if not self._lacks(n))

    def _lacks(self, name):
        return any(part in name for part in self.without)


# --- Attention kernels, with the arguments of `eager_attention` -------------------------------------------------------


def _pad(tensor, size):
    return F.pad(tensor, (0, size - tensor.shape[-1])) if tensor.shape[-1] != size else tensor


def _multiple_of_8(*sizes):
    """The common size: the fused kernels want equal head dims of queries and values, in steps of 16 bytes."""
    return -(-max(sizes) // 8) * 8


def _mask(key_mask, bias, dtype):
    mask = None if key_mask is None else key_mask[:, None, None, :]
    if bias is None:
        return mask
    return bias.to(dtype) if mask is None else torch.where(mask, bias.to(dtype), float("-inf"))


def sdpa(q, k, v, *, key_mask=None, bias=None, scale=None):
    return SDPA(q, k, v, attn_mask=_mask(key_mask, bias, q.dtype), scale=scale)


def sdpa_padded(q, k, v, *, key_mask=None, bias=None, scale=None):
    """SDPA with head dims zero-padded to one multiple of 8; the scale stays that of the true head dim."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size, width = _multiple_of_8(q.shape[-1], v.shape[-1]), v.shape[-1]
    out = SDPA(_pad(q, size), _pad(k, size), _pad(v, size), attn_mask=_mask(key_mask, bias, q.dtype), scale=scale)
    return out[..., :width]


def _sdpa_backend(backend):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forced(*args, **options):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return sdpa_padded(*args, **options)

    return forced


@functools.cache
def _xformers():
    """xformers.ops, or None; its complaints about a C++ part that does not load are not ours to print."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import xformers.ops

            return xformers.ops
    except (ImportError, OSError):
        return None
    finally:
        logging.disable(previous)


def xformers_attention(q, k, v, *, key_mask=None, bias=None, scale=None):
    """memory_efficient_attention, which wants (B, length, H, D) and head dims in multiples of 8."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size, width = _multiple_of_8(q.shape[-1], v.shape[-1]), v.shape[-1]
    mask = _mask(key_mask, bias, q.dtype)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    q, k, v = (_pad(t, size).transpose(1, 2) for t in (q, k, v))
    return _xformers().memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale).transpose(1, 2)[..., :width]


@functools.cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, *, key_mask=None, bias=None, scale=None):
    """FlexAttention, compiled (without its compiler it writes the scores); mask and bias change the scores."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size, width = max(16, _multiple_of_8(q.shape[-1], v.shape[-1])), v.shape[-1]

    def change(score, b, h, n, m):
        if bias is not None:
            score = score + bias[0, h, n, m]
        return score if key_mask is None else torch.where(key_mask[b, m], score, -float("inf"))

    score_mod = None if bias is None and key_mask is None else change
    return _flex()(_pad(q, size), _pad(k, size), _pad(v, size), score_mod=score_mod, scale=scale)[..., :width]


# --- Latent attention -----------------------------------------------------------------------------------------------


def _normalised(x, position, eps, norm_weight=None, norm_bias=None):
    if position is not None:
        x = torch.cat([x, position.expand(x.shape[0], -1, -1)], -1)
    return F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)


def padded_projections(
    q, x, w_k, w_v, *, num_heads, norm_weight, norm_bias, b_v, eps=1e-5, position=None, key_mask=None, attention=sdpa
):
    """LayerNorm, linears and a fused kernel; the weights are padded, so that padded keys and values cost no copy."""
    batch, head_dim, value_dim = x.shape[0], w_k.shape[0] // num_heads, w_v.shape[0] // num_heads
    size = _multiple_of_8(head_dim, value_dim)
    xn = _normalised(x, position, eps, norm_weight, norm_bias)

    def heads(t):
        return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def rows(weight, dim):
        return F.pad(weight.unflatten(0, (num_heads, dim)), (0, 0, 0, size - dim)).flatten(0, 1)

    k = heads(F.linear(xn, rows(w_k, head_dim)))
    v = heads(F.linear(xn, rows(w_v, value_dim), _pad(b_v.unflatten(0, (num_heads, value_dim)), size).flatten()))
    q = _pad(heads(q.expand(batch, -1, -1)), size)
    out = attention(q, k, v, key_mask=key_mask, scale=head_dim**-0.5)[..., :value_dim]
    return out.transpose(1, 2).flatten(2)


def absorbed_by_hand(
    q, x, w_k, w_v, *, num_heads, norm_weight, norm_bias, b_v, eps=1e-5, position=None, key_mask=None, attention=sdpa
):
    """The projections absorbed into the queries and the result, keys = values = LayerNorm(x), as a user could write it."""
    batch, head_dim = x.shape[0], w_k.shape[0] // num_heads
    keys = _normalised(x, position, eps)[:, None].expand(-1, num_heads, -1, -1)
    gain_k, gain_v = ((w * norm_weight).unflatten(0, (num_heads, -1)) for w in (w_k, w_v))
    absorbed = (q.unflatten(-1, (num_heads, -1)).transpose(1, 2) @ gain_k).expand(batch, -1, -1, -1)
    out = attention(absorbed, keys, keys, key_mask=key_mask, scale=head_dim**-0.5) @ gain_v.transpose(-1, -2)
    return out.transpose(1, 2).flatten(2) + (w_v @ norm_bias + b_v)


def in_chunks(x, *, chunk, position=None, key_mask=None, **arguments):
    """`ops.latent_attention_stream` of an input that is in memory, so that all candidates are given the same."""

    def chunks():
        for start in range(0, x.shape[1], chunk):
            rows = slice(start, start + chunk)
            yield x[:, rows], None if position is None else position[rows], None if key_mask is None else key_mask[:, rows]

    parameters = [t for t in (x, position) if t is not None and t.requires_grad]
    return mmkernels.ops.latent_attention_stream(chunks=chunks, parameters=parameters, **arguments)


def perceiver_pytorch_attention(
    q, x, w_k, w_v, *, num_heads, norm_weight, norm_bias, b_v, eps=1e-5, position=None, key_mask=None
):
    """perceiver-pytorch's Attention; its query and output projections, which the op does not have, are the identity."""
    module = _perceiver_module(w_k.shape[0], w_k.shape[1], num_heads, w_k.dtype, str(w_k.device))
    weights = {"to_kv.weight": torch.cat([w_k, w_v])}
    context = _normalised(x, position, eps, norm_weight, norm_bias)
    queries = q.expand(x.shape[0], -1, -1)
    return torch.func.functional_call(module, weights, (queries,), {"context": context, "mask": key_mask}) + b_v


@functools.cache
def _perceiver_class():
    try:
        from perceiver_pytorch.perceiver_pytorch import Attention
    except ImportError:
        return None
    return Attention


@functools.lru_cache(maxsize=1)
def _perceiver_module(width, channels, heads, dtype, device):
    module = _perceiver_class()(width, channels, heads=heads, dim_head=width // heads)
    with torch.no_grad():
        for linear in (module.to_q, module.to_out):
            linear.weight.copy_(torch.eye(width))
        module.to_out.bias.zero_()
    return module.to(dtype=dtype, device=device).requires_grad_(False)


# --- The list for a problem ----------------------------------------------------------------------------------------------


def eager(op):
    """Plain PyTorch for an op: sets the error budget of the others."""
    return {"attention": eager_attention, "latent_attention": eager_latent_attention}[op]


def in_float32(function):
    """What a user does where 16-bit matrix products are slow: widen everything, compute, round."""

    def widened(**arguments):
        wide = {n: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in arguments.items()}
        return function(**wide).to(arguments["q"].dtype)

    return widened


def _compiled(function):
    return torch.compile(function, dynamic=False, fullgraph=True)


def candidates(problem: Problem, inputs: Inputs, with_compile: bool = True) -> list:
    """Every candidate for a problem, ours first; `reason` says why one cannot run here."""
    cuda = inputs.device.type == "cuda"
    if with_compile:
        launches.name_fused_loops()
    if isinstance(problem, decoding.Decoding):
        return _decoding(inputs, cuda, with_compile)
    if isinstance(problem, rows.Rows):
        return _rows(problem, inputs, cuda, with_compile)
    if isinstance(problem, conditional.Conditional):
        return _conditional(problem, inputs, cuda, with_compile)
    if isinstance(problem, resampler.Resampled):
        return _resampled(problem, inputs, cuda, with_compile)
    if isinstance(problem, products.Product):
        return _products(problem, inputs, cuda, with_compile)
    if isinstance(problem, adapters.Fused):
        plain = Candidate("eager", "baseline", testing.eager_adapter_fusion)
        compiled = [Candidate("torch.compile", "baseline", _compiled(plain.function))] if with_compile else []
        return [*_ours(problem, inputs, cuda), plain, *compiled]
    if isinstance(problem, adapters.Adapters):
        return _adapters(problem, inputs, cuda, with_compile)
    if isinstance(problem, adapted.Adapted):
        return _adapted(problem, with_compile)
    if isinstance(problem, text.Text):
        return _texts(problem, with_compile)
    if isinstance(problem, perceiver.PerceiverIO):
        return _perceivers(problem, with_compile)
    if isinstance(problem, fusion.Fusion):
        return _networks(problem, with_compile) if problem.network else _bottleneck(problem, inputs, cuda, with_compile)
    listed = [*_ours(problem, inputs, cuda)]
    function = eager(problem.op)
    listed.append(Candidate("eager", "baseline", function))
    if with_compile:
        listed.append(Candidate("torch.compile", "baseline", _compiled(function)))
    if not cuda and problem.torch_dtype in (torch.bfloat16, torch.float16):
        listed.append(Candidate("eager in float32", "baseline", in_float32(function)))

    def add(name, kernel, *facts):
        function = kernel if problem.op == "attention" else functools.partial(padded_projections, attention=kernel)
        listed.append(Candidate(name, "baseline", function, *facts))

    def add_absorbed(name, kernel, *facts):
        listed.append(Candidate(name, "baseline", functools.partial(absorbed_by_hand, attention=kernel), *facts))

    ragged = problem.head_dim % 8 or problem.value_dim % 8 or problem.head_dim != problem.value_dim
    if problem.op == "attention":
        listed.append(Candidate("sdpa", "baseline", sdpa))
        if ragged:
            add("sdpa padded", sdpa_padded)
    else:
        listed.append(Candidate("sdpa", "baseline", functools.partial(eager_latent_attention, attention=sdpa)))
        if ragged:
            add("sdpa padded", sdpa)
        add_absorbed("eager absorbed", eager_attention)
        add_absorbed("sdpa absorbed", sdpa_padded)
        listed.append(_perceiver(problem))
        if problem.chunk:
            note = f"reads {problem.chunk} rows at a time, and again for gradients"
            streamed = functools.partial(in_chunks, chunk=problem.chunk)
            listed.insert(1, Candidate("mmkernels stream", "mmkernels", streamed, note=note))
    if cuda:
        for name in ("flash", "cudnn", "efficient"):
            add(f"sdpa {name}", _sdpa_backend(f"{name}_attention".upper()))
    missing = "it has kernels for GPUs only" if not cuda else "" if _xformers() else "xformers is not installed"
    peers = {"xformers": (xformers_attention, missing)}
    if with_compile:
        peers["flex"] = flex, "", "", "" if cuda else "FlexAttention has no backward on a CPU"
    for name, (kernel, *facts) in peers.items():
        add(name, kernel, *facts)
        if problem.op == "latent_attention" and cuda:
            add_absorbed(f"{name} absorbed", kernel, *facts)
    return listed


def _ours(problem, inputs, cuda):
    """Each backend of the op that can run here, the one that "auto" takes first; `reference` only as the last resort."""
    op = getattr(mmkernels.ops, problem.op)
    explanation = mmkernels.explain(problem.op, **inputs.tensors, **inputs.options)
    yield from _backends_of(explanation, cuda, lambda name: functools.partial(op, backend=name))


def _backends_of(explanation, cuda, function):
    for name in sorted(("cuda", "triton") if cuda else ("cpp",), key=lambda n: n != explanation.backend):
        reason = "; ".join(explanation.refusals[name])
        note = f"what auto takes; {explanation.detail}".rstrip("; ") if name == explanation.backend else ""
        yield Candidate(f"mmkernels {name}", "mmkernels", function(name), reason, note)
    if explanation.backend == "reference":
        yield Candidate("mmkernels reference", "mmkernels", function("reference"), "", "what auto takes")


def _perceiver(problem):
    reason = ""
    if _perceiver_class() is None:
        reason = "perceiver-pytorch is not installed"
    elif problem.head_dim != problem.value_dim:
        reason = f"its head dims of keys and values are equal, here they are {problem.head_dim} and {problem.value_dim}"
    note = "computes two identity projections more"
    return Candidate("perceiver-pytorch", "baseline", perceiver_pytorch_attention, reason, note)


# --- Decoders ---------------------------------------------------------------------------------------------------------------


def _decoding(inputs, cuda, with_compile):
    """Projected queries, SDPA and the output projection: what a user writes."""
    explanation = mmkernels.explain("latent_decode", **inputs.tensors, **inputs.options)

    def own(backend):
        return decoding.function(mmkernels.ops.latent_decode, backend=backend)

    listed = [*_backends_of(explanation, cuda, own)]
    for name, kernel in (("eager", eager_attention), ("sdpa", sdpa)):
        plain = decoding.function(testing.eager_latent_decode, attention=kernel)
        listed.append(Candidate(name, "baseline", plain))
        if with_compile:
            listed.append(Candidate(f"{name}, compiled" if name == "sdpa" else "torch.compile", "baseline", _compiled(plain)))
    return listed


# --- Several modalities ---------------------------------------------------------------------------------------------------


def _bottleneck(problem, inputs, cuda, with_compile):
    """Bottleneck attention: what a user writes joins the rows of each modality, or of all, and takes the result apart."""
    explanation = mmkernels.explain(problem.op, *fusion.pairs(inputs.tensors), **inputs.options)
    listed = [*_backends_of(explanation, cuda, fusion.op_function)]
    listed.append(Candidate("eager", "baseline", fusion.one_by_one(eager_attention)))
    listed.append(Candidate("sdpa", "baseline", fusion.one_by_one(SDPA)))
    if with_compile:
        listed.append(Candidate("torch.compile", "baseline", _compiled(fusion.one_by_one(SDPA)), note="of sdpa"))
    if cuda:
        for name in ("flash", "cudnn", "efficient"):
            kernel = _sdpa_backend(f"{name}_attention".upper())
            listed.append(Candidate(f"sdpa {name}", "baseline", fusion.one_by_one(kernel)))
    all_rows = "" if problem.query_rows == "all" else "it has one length of queries for all rows of a sequence"
    missing = "it has kernels for GPUs only" if not cuda else "" if _xformers() else "xformers is not installed"
    function = fusion.all_at_once(_xformers_parts)
    listed.append(Candidate("xformers", "baseline", function, all_rows or missing, "block-diagonal mask"))
    if with_compile:
        backward = "" if cuda else "FlexAttention has no backward on a CPU"
        function = fusion.all_at_once(_flex_parts)
        listed.append(Candidate("flex", "baseline", function, all_rows, "block mask", backward))
    return listed


def _xformers_parts(q, k, v, lengths):
    ops = _xformers()
    batch = q.shape[0]
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(lengths) * batch)
    q, k, v = (t.transpose(1, 2).flatten(0, 1)[None] for t in (q, k, v))
    return ops.memory_efficient_attention(q, k, v, attn_bias=mask).unflatten(1, (batch, -1))[0].transpose(1, 2)


@functools.lru_cache(maxsize=1)
def _block_mask(lengths, device):
    from torch.nn.attention.flex_attention import create_block_mask

    part = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    rows = sum(lengths)
    return create_block_mask(lambda b, h, n, m: part[n] == part[m], None, None, rows, rows, device=str(device))


def _flex_parts(q, k, v, lengths):
    return _flex()(q, k, v, block_mask=_block_mask(lengths, q.device))


def _networks(problem, with_compile):
    """A layer or a model: the fused one, and its plain twin (concatenation and SDPA)."""
    listed = [Candidate("mmkernels", "mmkernels", fusion.network_function(problem, "auto"))]
    if problem.op == "mbt":
        function = fusion.network_function(problem, "auto", prune=False)
        listed.append(Candidate("mmkernels, all rows", "mmkernels", function, note="of the last layer, not the CLS row alone"))
    listed.append(Candidate("eager", "baseline", fusion.network_function(problem, "eager")))
    if with_compile:
        function = fusion.network_function(problem, "eager", compiler=_compiled)
        listed.append(Candidate("torch.compile", "baseline", function))
        function = fusion.network_function(problem, "auto", compiler=_compiled)
        listed.append(Candidate("mmkernels compiled", "mmkernels", function, note="torch.compile of the fused one"))
    return listed


# --- Rows -------------------------------------------------------------------------------------------------------------------


def _layer_norm(x, residual, residual_bias, gain, bias, index=None):
    total = x + (residual + residual_bias)
    if index is not None:
        return [F.layer_norm(total, x.shape[-1:], None, None, 1e-5) * gain[index][:, None] + bias, total]
    return [F.layer_norm(total, x.shape[-1:], gain, bias, 1e-5), total]


def _rows(problem, inputs, cuda, with_compile):
    explanation = mmkernels.explain(problem.op, **inputs.tensors)
    listed = [*_backends_of(explanation, cuda, functools.partial(rows.function, problem.op))]
    plain = rows.function(problem.op, "eager")
    listed.append(Candidate("eager", "baseline", plain))
    if problem.op == "film_layer_norm":
        plain = _layer_norm
        listed.append(Candidate("layer_norm", "baseline", plain, note="" if problem.tasks else "torch's own gain and bias"))
    if with_compile:
        listed.append(Candidate("torch.compile", "baseline", _compiled(plain)))
    return listed


# --- Conditional attention ------------------------------------------------------------------------------------------------


def _conditional(problem, inputs, cuda, with_compile):
    """The bias of diagonal blocks on the way, against a matrix of each example; or a layer and its plain twin."""
    plain = {"eager": "eager"}
    if problem.op == "ca_mtl_layer":
        listed = [Candidate("mmkernels", "mmkernels", conditional.function(problem, "auto"))]
    else:
        t = inputs.tensors
        bias = mmkernels.ops.BlockDiagonalBias(*(t[n] for n in ("matrix", "gain", "shift", "index")))
        explanation = mmkernels.explain("attention", t["q"], t["k"], t["v"], bias=bias, key_mask=t["key_mask"])
        listed = [*_backends_of(explanation, cuda, functools.partial(conditional.function, problem))]
        plain["sdpa"] = "sdpa"
    listed += [Candidate(name, "baseline", conditional.function(problem, backend)) for name, backend in plain.items()]
    if with_compile:
        for name, backend in plain.items():
            compiled = conditional.function(problem, backend, compiler=_compiled)
            listed.append(Candidate("torch.compile" if name == "eager" else f"{name}, compiled", "baseline", compiled))
    return listed


# --- Products ---------------------------------------------------------------------------------------------------------------


def _products(problem, inputs, cuda, with_compile):
    plain = {"eager": products.function(problem.op, "eager")}
    if problem.op == "hypergrid_linear":
        plain["einsum over blocks"] = products.by_blocks
    listed = [*_ours(problem, inputs, cuda)]
    listed += [Candidate(name, "baseline", function) for name, function in plain.items()]
    if problem.op == "hypergrid_linear":
        floor = problem._replace(op="linear", grid=())
        listed.append(Candidate("linear, ungated", "floor", products.ungated, without=("gate",), solves=floor))
    if with_compile:
        for name, function in plain.items():
            label, note = ("torch.compile", "") if name == "eager" else (f"{name}, compiled", "torch.compile of it")
            listed.append(Candidate(label, "baseline", _compiled(function), note=note))
    return listed


# --- Adapters ---------------------------------------------------------------------------------------------------------------


def _adapters(problem, inputs, cuda, with_compile):
    explanation = adapters.explain(problem, inputs.tensors)
    listed = [*_backends_of(explanation, cuda, functools.partial(adapters.function, problem))]
    plain = adapters.function(problem, "eager")
    listed.append(Candidate("eager", "baseline", plain, note="a loop over the adapters" if problem.adapters else ""))
    if with_compile:
        looped = "its loop over the adapters breaks the graph" if problem.adapters else ""
        listed.append(Candidate("torch.compile", "baseline", _compiled(plain), looped))
    if problem.adapters:
        first = problem._replace(first=True)
        function, floor = adapters.function(first, "auto"), {"without": ("index",), "solves": first}
        listed.append(
            Candidate(
                "one adapter",
                "floor",
                function,
                note="ours, all examples with the first; its gradient is put into the bank's",
                **floor,
            )
        )
    if problem.place != "alone":
        missing = lacking("adapters")
        note = "BatchSplit of the rows in order, as its MultiTask puts them" if problem.adapters else ""
        listed.append(Candidate("adapters", "baseline", functools.partial(_library_place, problem), missing, note))
    floor = {"without": ("stream", "norm", "index"), "solves": problem._replace(place="products")}
    listed.append(Candidate("products alone", "floor", adapters.products, note="of one adapter, by F.linear", **floor))
    return listed


@functools.lru_cache(maxsize=8)
def _library_output(problem):
    """The output module of a BERT layer with the library's adapters, as one whose forward is their place alone."""
    preset = {"pfeiffer": "seq_bn", "houlsby": "double_seq_bn", "parallel": "par_bn"}[problem.place]
    reduction = problem.channels / problem.bottleneck
    activation = {"original_ln_before": problem.place == "pfeiffer", "non_linearity": "relu", "scaling": 1.0}
    number = max(1, problem.adapters)
    network = _library_model(problem, preset, number, reduction_factor=reduction, **activation)
    names = [f"a{n}" for n in range(number)]
    if problem.adapters:
        from adapters.composition import BatchSplit

        sizes = torch.bincount(torch.arange(problem.batch) % number, minlength=number)
        network.set_active_adapters(BatchSplit(*names, batch_sizes=sizes.tolist()))
    else:
        network.set_active_adapters(names[0])
    output = network.encoder.layer[0].output

    class Place(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output = output

        def forward(self, x, stream):
            return self.output.bottleneck_layer_forward(x, stream, self.output.LayerNorm)

    return Place()


def _library_place(problem, x, w_down, b_down, w_up, b_up, stream, norm_weight, norm_bias, index=None):
    weights = {"output.LayerNorm.weight": norm_weight, "output.LayerNorm.bias": norm_bias}
    parts = {"down.0.weight": w_down, "down.0.bias": b_down, "up.weight": w_up, "up.bias": b_up}
    for name, tensor in parts.items():
        for number, one in enumerate(tensor if problem.adapters else [tensor]):
            weights[f"output.adapters.a{number}.adapter_{name}"] = one
    if index is None:
        return torch.func.functional_call(_library_output(problem), weights, (x, stream))
    order = index.argsort(stable=True)
    out = torch.func.functional_call(_library_output(problem), weights, (x[order], stream[order]))
    return torch.empty_like(out).index_copy(0, order, out)


# --- Perceiver resamplers ---------------------------------------------------------------------------------------------------


def _resampled(problem, inputs, cuda, with_compile):
    """Keys in two segments, against keys that are joined: by eager and SDPA, or in a whole resampler, its plain twin and the
    libraries that published it."""
    function = functools.partial(resampler.function, problem)
    if problem.op == "resampler":
        listed, plain = [Candidate("mmkernels", "mmkernels", function("auto"))], ["eager"]
        if with_compile:
            listed.append(Candidate("mmkernels compiled", "mmkernels", function("auto", compiler=_compiled)))
        library = "transformers" if problem.like == "idefics2" else "diffusers"
        make = functools.partial(_resampler_of, problem)
        if problem.like == "idefics2":
            note = "transformers' after mmkernels.convert"
            listed.append(Candidate("mmkernels convert", "mmkernels", _lazily(make, True), problem.missing, note))
        listed.append(Candidate(library, "baseline", _lazily(make), problem.missing))
    else:
        t = inputs.tensors
        explanation = mmkernels.explain("attention", t["q"], (t["k"], t["own_k"]), (t["v"], t["own_v"]))
        listed, plain = [*_backends_of(explanation, cuda, function)], ["eager", "sdpa"]
    listed += [Candidate(name, "baseline", function(name)) for name in plain]
    if with_compile:
        for name in plain:
            compiled = function(name, compiler=_compiled)
            listed.append(Candidate("torch.compile" if name == "eager" else f"{name}, compiled", "baseline", compiled))
    return listed


def _lazily(make, *arguments):
    """A function that is made by its first call."""
    made = functools.cache(lambda: make(*arguments))
    return lambda *args, **kwargs: made()(*args, **kwargs)


def _resampler_of(problem, convert=False):
    """The library's resampler, without memory, as a function of its context and of weights by the names of ours."""
    from mmkernels.modules import resampler as ours

    options = {}
    with torch.device("meta"):
        if problem.like == "idefics2":
            from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
            from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

            config = Idefics2PerceiverConfig(
                hidden_size=problem.channels,
                resampler_n_latents=problem.queries,
                resampler_depth=1,
                resampler_n_heads=problem.heads,
                resampler_head_dim=problem.head_dim,
                num_key_value_heads=problem.kv_heads,
            )
            network, names = Idefics2PerceiverResampler._from_config(config), (ours.IDEFICS2, "perceiver_resampler")
            # All rows count, as users of the model have it.
            options["attention_mask"] = torch.ones(problem.batch, problem.keys, device="cpu", dtype=torch.bool)
        else:
            from diffusers.models.embeddings import IPAdapterPlusImageProjection

            c, shape = problem.channels, (1, problem.head_dim, problem.heads, problem.queries)
            network, names = IPAdapterPlusImageProjection(c, c, c, *shape), (ours.IP_ADAPTER, "image_proj")
    if convert:
        mmkernels.convert(network)
    one = torch.empty(1, 1)
    theirs = {next(iter(ours.renamed({n: one, "latents": one}, *names))): n for n, _ in network.named_parameters()}

    def rename(weights):
        weights = {theirs[name]: tensor for name, tensor in weights.items()}
        return weights if problem.like == "idefics2" else weights | {"latents": weights["latents"][None]}

    return resampler.network_function(network.to(problem.torch_dtype).eval(), rename, **options)


# --- A user's BERT with adapters -------------------------------------------------------------------------------------------


def _bert(problem):
    """A BERT of one layer that drops nothing, and takes embedded rows."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=problem.channels,
        num_hidden_layers=1,
        num_attention_heads=max(1, problem.channels // 64),
        intermediate_size=4 * problem.channels,
        hidden_act=getattr(problem, "activation", "gelu"),
        max_position_embeddings=problem.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def _library_model(problem, preset, number, **changes):
    import adapters as library

    network = _bert(problem)
    library.init(network)
    for name in range(number):
        network.add_adapter(f"a{name}", config=library.AdapterConfig.load(preset, **changes))
    return network.eval()


@functools.lru_cache(maxsize=8)
def adapted_network(problem: adapted.Adapted, by: str, device: torch.device) -> torch.nn.Module:
    """`by`: "auto" or "eager", this package's adapters; "adapters" or "peft", a library's; "convert", a library's after
    `mmkernels.convert`; "transformers", the plain model."""
    names, parts = problem.names, problem.batch // max(1, problem.adapters)
    if by == "transformers":
        network = _bert(problem)
    elif problem.preset == "lora":
        import peft

        network = peft.get_peft_model(_bert(problem), _lora(), adapter_name=names[0])
        for name in names[1:]:
            network.add_adapter(name, _lora())
    elif by in ("auto", "eager"):
        from mmkernels.models.adapterhub import AdapterHub
        from mmkernels.modules import BatchSplit

        network = _bert(problem)
        hub = AdapterHub(network, backend=by)
        for name in names:
            hub.add_adapter(name, problem.preset)
        if problem.setup == "fuse":
            hub.add_adapter_fusion(names, set_active=True)
        else:
            hub.set_active(BatchSplit(*names, batch_sizes=parts) if problem.setup == "split" else names[0])
    else:
        from adapters.composition import BatchSplit, Fuse

        network = _library_model(problem, problem.preset, problem.adapters)
        if problem.setup == "fuse":
            network.add_adapter_fusion(Fuse(*names))
            network.set_active_adapters(Fuse(*names))
        else:
            split = problem.setup == "split"
            network.set_active_adapters(BatchSplit(*names, batch_sizes=[parts] * len(names)) if split else names[0])
    if by == "convert":
        mmkernels.convert(network)
    return network.to(device=device, dtype=problem.torch_dtype).eval().requires_grad_(True)


def _lora():
    import peft

    return peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])


def adapted_function(problem: adapted.Adapted, by: str, *, compiler=lambda function: function):
    """The model as a function of its embedded rows and its weights by name."""
    options = {}
    if problem.preset == "lora" and problem.setup == "split" and by != "transformers":
        options["adapter_names"] = [name for name in problem.names for _ in range(problem.batch // problem.adapters)]

    def call(network, weights, x):
        return torch.func.functional_call(network, weights, kwargs={"inputs_embeds": x, **options})[0]

    call = compiler(call)

    def run(x, **weights):
        if by == "transformers":
            weights = {n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in weights.items()}
        return [call(adapted_network(problem, by, x.device), weights, x)]

    return run


def _adapted(problem, with_compile):
    """Ours in transformers' model, the library's own, and that after `convert`; the plain model is the floor."""
    library = "peft" if problem.preset == "lora" else "adapters"
    missing = lacking(library)
    listed = []
    if library == "adapters":
        listed.append(Candidate("mmkernels", "mmkernels", adapted_function(problem, "auto")))
        listed.append(Candidate("eager", "baseline", adapted_function(problem, "eager")))
        if with_compile:
            for name, kind, by in (("mmkernels compiled", "mmkernels", "auto"), ("torch.compile", "baseline", "eager")):
                listed.append(Candidate(name, kind, adapted_function(problem, by, compiler=_compiled)))
    note = f"{library} after mmkernels.convert"
    listed.append(Candidate("mmkernels convert", "mmkernels", adapted_function(problem, "convert"), missing, note))
    listed.append(Candidate(library, "baseline", adapted_function(problem, library), missing))
    floor = {"without": adapted.OWN, "solves": problem.plain}
    plain = adapted_function(problem.plain, "transformers")
    return [*listed, Candidate("no adapters", "floor", plain, note="transformers", **floor)]


# --- Text-to-text -----------------------------------------------------------------------------------------------------------


def _hugging_face(problem):
    import transformers

    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "feed_forward_proj")
    sizes = {name: getattr(problem.config, name) for name in names}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)  # SDPA where the release has it
    model = transformers.T5ForConditionalGeneration(config)
    for stack in (model.encoder, model.decoder):
        # Older releases share the module, of which functional_call restores the weight of the call before.
        stack.embed_tokens = copy.copy(model.shared)
        stack.embed_tokens._parameters = dict(model.shared._parameters)
    return model


def _texts(problem, with_compile):
    """A T5, its plain twin and Hugging Face's; one with grids has both of those without as its floor."""
    listed = [Candidate("mmkernels", "mmkernels", text.function(problem, "auto"))]
    listed.append(Candidate("eager", "baseline", text.function(problem, "eager")))
    if with_compile and not problem.beams:
        listed.append(Candidate("torch.compile", "baseline", text.function(problem, "eager", compiler=_compiled)))
        function = text.function(problem, "auto", compiler=_compiled)
        listed.append(Candidate("mmkernels compiled", "mmkernels", function, note="torch.compile of the fused one"))
    missing = lacking("transformers")
    plain = problem._replace(grid=())
    hugging_face = text.function(plain, _hugging_face)
    if not problem.grid:
        return [*listed, Candidate("transformers", "baseline", hugging_face, missing)]
    floor = {"without": (text.GRIDS,), "solves": plain}
    listed.append(Candidate("mmkernels, no grids", "floor", text.function(plain, "auto"), **floor))
    listed.append(Candidate("transformers, no grids", "floor", hugging_face, missing, **floor))
    return listed


# --- Perceiver IO -----------------------------------------------------------------------------------------------------------


def _perceiver_library(model):
    """Hugging Face's model of the sizes of ours."""
    import transformers

    parts, encoder = model.config, model.config.encoder
    fields = {
        "num_latents": encoder["num_latents"],
        "d_latents": encoder["latent_channels"],
        "d_model": model.input.channels,
        "num_blocks": encoder["num_blocks"],
        "num_self_attends_per_block": encoder["layers_per_block"],
        "num_self_attention_heads": encoder.get("self_heads", 8),
        "num_cross_attention_heads": encoder.get("cross_heads", 1),
        "hidden_act": "gelu_pytorch_tanh",
    }
    kind = parts.output["kind"]
    if kind == "tokens":
        name = "PerceiverForMaskedLM"
        fields |= {"vocab_size": parts.input["vocab_size"], "max_position_embeddings": parts.input["max_length"]}
        fields |= {"qk_channels": encoder["self_qk_channels"], "v_channels": encoder["self_v_channels"]}
    elif kind == "flow":
        name = "PerceiverForOpticalFlow"
        fields |= {"train_size": parts.input["shape"]}
    elif kind == "multimodal":
        name = "PerceiverForMultimodalAutoencoding"
        video, sound = parts.input["modalities"]["image"], parts.input["modalities"]["audio"]
        fields |= {
            "num_frames": video["shape"][0],
            "image_size": video["shape"][1] // video["patch"][1],
            "audio_samples_per_frame": sound["shape"][0] // video["shape"][0],
            "samples_per_patch": sound["patch"][0],
            "output_shape": [1, *video["shape"]],
            "output_num_channels": parts.output["channels"],
            "_label_trainable_num_channels": parts.queries["modalities"]["label"]["channels"],
            "num_labels": parts.output["modalities"]["label"]["num_classes"],
        }
    else:
        stem, positions = parts.input["kind"], parts.input["positions"]["kind"]
        what = "ConvProcessing" if stem == "conv_stem" else "Learned" if positions == "learned" else "Fourier"
        name = f"PerceiverForImageClassification{what}"
        fields |= {"image_size": parts.input["shape"][0], "num_labels": parts.output["num_classes"]}
    weight = model.encoder.latents
    return getattr(transformers, name)(transformers.PerceiverConfig(**fields)).to(weight.device, weight.dtype)


def _perceiver_converted(model):
    network = _perceiver_library(model)
    mmkernels.convert(network)
    return network


def _perceivers(problem, with_compile):
    """Ours and its plain twin, Hugging Face's, and that after `convert`."""
    listed = [Candidate("mmkernels", "mmkernels", perceiver.function(problem, "auto"))]
    listed.append(Candidate("eager", "baseline", perceiver.function(problem, "eager")))
    if with_compile:
        for name, kind, by in (("mmkernels compiled", "mmkernels", "auto"), ("torch.compile", "baseline", "eager")):
            listed.append(Candidate(name, kind, perceiver.function(problem, by, compiler=_compiled)))
    missing = lacking("transformers")
    function, note = perceiver.function(problem, _perceiver_converted), "transformers after mmkernels.convert"
    listed.append(Candidate("mmkernels convert", "mmkernels", function, missing, note))
    return [*listed, Candidate("transformers", "baseline", perceiver.function(problem, _perceiver_library), missing)]


@contextlib.contextmanager
def quiet():
    """Within it, peers do not print warnings between the rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

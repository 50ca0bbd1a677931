"""The ops inside torch: registration, compilation, dynamic shapes, export, autocast, checkpointing, function transforms."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmkernels
from mmkernels import testing
from mmkernels.ops import attention, latent_attention
from mmkernels.ops._shared.registration import forward_backward


def attention_inputs(generator, batch=2, queries=9, keys=33, dtype=torch.float32):
    shapes = {"q": (batch, 2, queries, 16), "k": (batch, 2, keys, 16), "v": (batch, 2, keys, 24), "bias": (1, 2, 1, keys)}
    return {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


def latent_inputs(generator, batch=2, queries=9, keys=65, dtype=torch.float32):
    shapes = {"q": (1, queries, 16), "x": (batch, keys, 10), "w_k": (16, 16), "w_v": (24, 16), "position": (keys, 6)}
    shapes |= {"norm_weight": (16,), "norm_bias": (16,), "b_v": (24,)}
    return {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


OPS = {"attention": (attention, attention_inputs), "latent": (latent_attention, latent_inputs)}
family = pytest.mark.parametrize("family", OPS)


@family
def test_opcheck(backend, generator, family):
    """Schema, registration, fake tensors and AOT dispatch of the registered ops themselves, non-contiguous inputs included."""
    _, make = OPS[family]
    tensors = {n: t.detach() for n, t in make(generator).items()}
    forward, backward = forward_backward(family, backend)
    mask = torch.rand(2, 33 if family == "attention" else 65, generator=generator) < 0.8
    if family == "attention":
        q, k, v = (tensors[n].mT.contiguous().mT for n in "qkv")
        inputs = (q, k, v, mask, tensors["bias"], None, torch.tensor([5]), 0.25, 0.1)
        out, lse = forward(*inputs)
        gradient = (torch.ones(1).expand_as(out), torch.ones_like(lse), q, k, v, out, lse, *inputs[3:], 7)
    else:
        inputs = (tensors["q"], tensors["x"].mT.contiguous().mT, tensors["position"], mask, 0.25, 1e-5)
        out, lse = forward(*inputs)
        gradient = (torch.ones(1).expand_as(out), None, *inputs[:4], out, lse, 0.25, 1e-5, 7)
    torch.library.opcheck(forward, inputs)
    torch.library.opcheck(backward, gradient)


@family
def test_a_compiler_may_change_the_strides_of_anything(backend, generator, family):
    """The registered ops give the same bits for incoming gradients, results and inputs of other strides."""
    tensors = {n: t.detach() for n, t in OPS[family][1](generator).items()}
    forward, backward = forward_backward(family, backend)
    mask = torch.rand(2, 33 if family == "attention" else 65, generator=generator) < 0.8
    if family == "attention":
        inputs = [*(tensors[n] for n in "qkv"), mask, tensors["bias"], None, None]
        scalars = (0.25, 0.0)
    else:
        inputs, scalars = [tensors["q"], tensors["x"], tensors["position"], mask], (0.25, 1e-5)
    out, lse = forward(*inputs, *scalars)
    gradients = torch.randn(out.shape, generator=generator).to(out.dtype), torch.randn(lse.shape, generator=generator)

    def call(change):
        moved = [None if t is None else change(t) for t in inputs]
        results = [change(t) for t in (*gradients, out, lse)]
        at = 3 if family == "attention" else 4  # where out and lse stand among the inputs
        arguments = (*results[:2], *moved[:at], *results[2:], *moved[at:], *scalars, 7)
        return *forward(*moved, *scalars), *backward(*arguments)

    def reversed_dimensions(t):
        order = list(reversed(range(t.dim())))
        return t.permute(order).contiguous().permute(order)

    for expected, actual in zip(call(lambda t: t), call(reversed_dimensions), strict=True):
        assert torch.equal(expected, actual)


@family
def test_compiles_whole_and_once_for_every_length(backend, generator, family):
    """fullgraph=True, forward and backward, the same bits as eager; new lengths and batch sizes compile nothing."""
    op, make = OPS[family]
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda t: op(**t, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(lambda t: op(**t, backend=backend), fullgraph=True, dynamic=True, backend=counting)
    for batch, queries, keys in ((2, 9, 33), (3, 17, 50), (2, 33, 41)):
        tensors = make(generator, batch, queries, keys)
        expected = op(**tensors, backend=backend)
        actual = compiled(tensors)
        assert torch.equal(actual, expected)
        cotangent = torch.randn(expected.shape, generator=generator)
        gradients = [torch.autograd.grad(o, list(tensors.values()), cotangent) for o in (actual, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        counted(tensors)
    assert len(compilations) == 1


@family
def test_compiles_with_inductor(on, generator, family):
    """The default compiler may change strides between ops: the registered ops take any."""
    on("cpp")
    op, make = OPS[family]
    torch._dynamo.reset()
    tensors = make(generator)

    def model(tensors):
        wide = {n: t.sin() for n, t in tensors.items()}
        return op(**wide, backend="cpp").relu()

    expected, actual = model(tensors), torch.compile(model, fullgraph=True)(tensors)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(o.sum(), list(tensors.values())) for o in (actual, expected)]
    torch.testing.assert_close(*gradients)


@family
def test_compiles_under_a_default_device(on, generator, family):
    """Dynamo traces every call through another dispatch then, which Python methods such as Tensor.unflatten break."""
    on("cpp")
    op, make = OPS[family]
    torch._dynamo.reset()
    tensors = make(generator)
    compiled = torch.compile(lambda t: op(**t, backend="cpp"), fullgraph=True, backend="aot_eager")
    with torch.device("cpu"):
        assert torch.equal(compiled(tensors), op(**tensors, backend="cpp"))


@family
def test_exports_with_a_dynamic_batch(on, generator, family):
    on("cpp")
    op, make = OPS[family]
    tensors = {n: t.detach() for n, t in make(generator).items()}

    class Model(torch.nn.Module):
        def forward(self, tensors):
            return op(**tensors, backend="cpp")

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {n: {0: batch} if n in ("k", "v", "x") or (n == "q" and family == "attention") else {} for n in tensors}
    program = torch.export.export(Model(), (tensors,), dynamic_shapes=(shapes,))
    other = {n: t.detach() for n, t in make(generator, 5).items()}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), op(**other, backend="cpp"))


@family
def test_autocast_casts_once_at_the_boundary(backend, generator, family, tensor_device):
    op, make = OPS[family]
    tensors = make(generator)
    with torch.autocast(tensor_device.type, dtype=torch.bfloat16):
        out = op(**tensors, backend=backend)
    assert out.dtype == torch.bfloat16
    with torch.no_grad():
        half = {n: t if n in ("norm_weight", "norm_bias", "bias") else t.bfloat16() for n, t in tensors.items()}
        torch.testing.assert_close(out, op(**half, backend=backend), rtol=0, atol=2**-8 * float(out.detach().abs().max()))
    for name, grad in zip(tensors, torch.autograd.grad(out.sum(), list(tensors.values())), strict=True):
        assert grad.dtype == torch.float32, name


def test_activation_checkpoint_redraws_the_same_dropout(backend, generator):
    tensors = attention_inputs(generator)
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(11)

        def call(tensors):
            return attention(**tensors, dropout_p=0.4, backend=backend)

        out = checkpoint(call, tensors, use_reentrant=False) if wrapped else call(tensors)
        gradients.append(torch.autograd.grad(out.square().sum(), list(tensors.values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@family
def test_vmap_is_refused_with_a_sentence(backend, generator, family):
    op, make = OPS[family]
    tensors = make(generator)
    mapped = "q" if family == "attention" else "x"
    stacked = torch.stack([tensors[mapped]] * 3)
    with pytest.raises(RuntimeError, match="no vmap rule: fold the mapped dimension into B, or use backend='reference'"):
        torch.vmap(lambda t: op(**{**tensors, mapped: t}, backend=backend))(stacked)
    out = torch.vmap(lambda t: op(**{**tensors, mapped: t}, backend="reference"))(stacked)
    torch.testing.assert_close(out[1], op(**tensors, backend="reference"))


@family
def test_second_derivatives_are_refused_and_the_reference_has_them(backend, generator, family):
    op, make = OPS[family]
    tensors = make(generator)

    def twice(name):
        out = op(**tensors, backend=name)
        (first,) = torch.autograd.grad(out.square().sum(), tensors["q"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), tensors["q"])

    with pytest.raises(RuntimeError, match="no second derivative on this backend: use backend='reference'"):
        twice(backend)
    with mmkernels.use_backend("reference"):
        assert twice("auto")[0].isfinite().all()


@family
def test_offsets_beyond_two_to_the_31(on, generator, family):
    """A batch stride that no 32-bit offset holds: the storage is virtual (mapped, never touched), only its ends are read."""
    on("cpp")
    span = 2**31 + 64
    storage = torch.empty(span + 4096, dtype=torch.float32)  # untouched pages cost nothing
    op, make = OPS[family]
    tensors = {n: t.detach() for n, t in make(generator).items()}
    name = "k" if family == "attention" else "x"
    shape = tensors[name].shape
    inner = torch.empty(shape[1:]).stride()
    far = storage.as_strided(shape, (span, *inner))
    far.copy_(tensors[name])
    testing.assert_within_budget(
        op(**{**tensors, name: far}, backend="cpp"),
        op(**{n: t.double() for n, t in tensors.items()}, backend="reference"),
        op(**tensors, backend="reference"),
        "output",
    )


@family
def test_rows_further_apart_than_32_bits_reach(backend, generator, family):
    """Rows of one example across 2^31 elements, in virtual memory of which only the rows are touched."""
    op, make = OPS[family]
    tensors = {n: t.detach() for n, t in make(generator).items()}
    name = "k" if family == "attention" else "x"
    shape = tensors[name].shape
    row = (2**31 // (shape[-2] - 2) + 64) // 64 * 64
    strides = (32, 16, row, 1) if family == "attention" else (16, row, 1)
    far = torch.empty(row * shape[-2]).as_strided(shape, strides).copy_(tensors[name])
    assert torch.equal(op(**{**tensors, name: far}, backend=backend), op(**tensors, backend=backend))

"""`film_layer_norm`, `bias_gelu`, `adapter`, its fusion and HyperGrid's ops inside torch: registration, compilation, export,
autocast, checkpoints, transforms; instruction sets and threads of the C++ kernels."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmkernels
from mmkernels import testing
from mmkernels.ops import adapter, adapter_fusion, bias_gelu, film_layer_norm, hypergrid_gate, hypergrid_linear
from mmkernels.ops._shared.registration import forward_backward


def norm_inputs(generator, batch=2, length=9, dtype=torch.float32):
    shapes = {"x": (batch, length, 24), "x2": (batch, 3, 24), "residual": (batch, length + 3, 24), "residual_bias": (24,)}
    shapes |= {"gain": (batch, 24), "bias": (24,)}
    return {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


def norm(x, x2, gain, bias, **options):
    """One result that depends on out and on s."""
    out, s = film_layer_norm((x, x2), gain, bias, **options)
    return out * 2.0 + s


def gelu_inputs(generator, batch=2, length=9, dtype=torch.float32):
    shapes = {"x": (batch, length, 24), "bias": (24,)}
    return {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


def grid_inputs(generator, batch=2, length=9, dtype=torch.float32):
    shapes = {"x": (batch, length, 24), "weight": (16, 24), "gate": (batch, 3, 2), "bias": (16,)}
    return {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


def grid(x, weight, gate, bias, backend):
    return hypergrid_linear(x, weight, gate, bias, residual=True, activation="gelu", backend=backend)


def gate_inputs(generator, batch=2, length=9, dtype=torch.float32):
    shapes = {"row": (batch, length), "column": (1, 5)}
    return {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


def adapter_inputs(generator, batch=2, length=9, dtype=torch.float32):
    shapes = {"x": (batch, length, 24), "input_residual": (batch, length, 24), "w_down": (7, 24), "b_down": (7,)}
    shapes |= {"w_up": (24, 7), "b_up": (24,), "weight": (24,), "bias": (24,), "scale": (1,), "gate": (batch,)}
    return {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


def pfeiffer(x, input_residual, w_down, b_down, w_up, b_up, weight, bias, scale, gate, backend):
    """One norm in two places, both rows added again."""
    norms = dict(norm_weight=weight, norm_bias=bias, out_norm_weight=weight, out_norm_bias=bias)
    options = dict(input_residual=input_residual, residual=(x, input_residual), scale=scale, gate=gate, backend=backend)
    return adapter(x, w_down, b_down, w_up, b_up, **norms, **options)


def bank_inputs(generator, batch=2, length=9, dtype=torch.float32):
    shapes = {"x": (batch, length, 24), "residual": (batch, length, 24), "w_down": (3, 7, 24), "w_up": (3, 24, 7)}
    return {n: torch.randn(s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


def bank(x, residual, w_down, w_up, backend):
    index = torch.arange(x.shape[0], device=x.device) % 4 - 1
    return adapter(x, w_down, None, w_up, None, residual=residual, index=index, activation="swish", backend=backend)


def fusion_inputs(generator, batch=2, length=9, dtype=torch.float32):
    shapes = {"query": (batch, length, 24), "outputs": (batch, length, 3, 24), "residual": (batch, length, 24)}
    shapes |= {"w_q": (24, 24), "b_q": (24,), "w_k": (24, 24), "b_k": (24,), "w_v": (24, 24)}
    scales = {n: 0.2 if n in ("w_q", "w_k", "w_v") else 1.0 for n in shapes}
    return {n: (torch.randn(s, generator=generator) * scales[n]).to(dtype).requires_grad_() for n, s in shapes.items()}


def fusion(query, outputs, residual, w_q, b_q, w_k, b_k, w_v, backend):
    dropout = dict(dropout_p=0.3, dropout_seed=torch.zeros(1, dtype=torch.int64, device=query.device))
    return adapter_fusion(query, outputs, w_q, b_q, w_k, b_k, w_v, input_residual=residual, **dropout, backend=backend)


OPS = {
    "norm": (norm, norm_inputs),
    "gelu": (bias_gelu, gelu_inputs),
    "grid": (grid, grid_inputs),
    "gate": (hypergrid_gate, gate_inputs),
    "adapter": (pfeiffer, adapter_inputs),
    "bank": (bank, bank_inputs),
    "fusion": (fusion, fusion_inputs),
}
FAMILIES = {"norm": ("norm", ""), "gelu": ("activation", "bias_gelu"), "grid": ("hypergrid", "")}
FAMILIES |= {"gate": ("hypergrid", "hypergrid_gate"), "adapter": ("adapter", ""), "bank": ("adapter", "")}
FAMILIES |= {"fusion": ("adapter", "adapter_fusion")}
each_op = pytest.mark.parametrize("op", OPS)


def registered(op, backend):
    family, name = FAMILIES[op]
    return forward_backward(family, backend, name)


def arguments(op, tensors, save=False):
    """Of the registered forward, with the place of its tensors by name; `save` is that of an adapter."""
    if op == "gelu":
        return [tensors["x"], tensors["bias"], True]
    if op == "grid":
        x = tensors["x"]
        return [x.flatten(0, 1), tensors["weight"], tensors["gate"], tensors["bias"], None, x.shape[1], True, 2, 0.0, None]
    if op == "gate":
        return [tensors["row"], tensors["column"]]
    if op == "adapter":
        weights = [tensors[n] for n in ("w_down", "b_down", "w_up", "b_up", "weight", "bias", "weight", "bias")]
        rest = [tensors["scale"][None], tensors["gate"], None, torch.tensor([3]), 3, 1, 1e-5, 1e-6, 2.0, 0.3, save]
        return [tensors["x"], tensors["input_residual"], None, *weights, *rest]
    if op == "bank":
        rows, index = [tensors["x"], None, tensors["residual"]], torch.arange(tensors["x"].shape[0]) % 4 - 1
        return [*rows, tensors["w_down"], None, tensors["w_up"], *(None,) * 7, index, None, 1, 4, 1e-5, 1e-6, 1.0, 0.0, save]
    if op == "fusion":
        return [tensors["query"], tensors["outputs"], tensors["residual"][..., 0], torch.tensor([3]), 0.5, 0.3]
    return [[tensors["x"], tensors["x2"]], *(tensors[n] for n in ("residual", "residual_bias", "gain", "bias")), None, 1e-5]


def gradient_arguments(op, tensors, results, incoming):
    if op == "gelu":
        return [incoming[0], tensors["x"], tensors["bias"], True, 3]
    if op == "grid":
        x, weight, gate, _, *options = arguments(op, tensors)
        return [incoming[0], x, weight, gate, *options, True, True, True, True]
    if op == "gate":
        return [incoming[0], tensors["row"], tensors["column"]]
    if op in ("adapter", "bank"):
        given = arguments(op, tensors)
        wanted = sum(1 << i for i, t in enumerate(given[:13]) if t is not None)
        hidden = results[2] if results[2].numel() else None
        return [incoming[0], *given[:15], results[1], hidden, *given[15:-1], wanted]
    if op == "fusion":
        return [incoming[0], tensors["query"], tensors["outputs"], results[1], torch.tensor([3]), 0.5, 0.3, 7]
    return [*incoming, [results[1]], *results[2:], tensors["gain"], None, 0, 15]


@each_op
def test_opcheck(backend, generator, op):
    tensors = {n: t.detach() for n, t in OPS[op][1](generator).items()}
    forward, backward = registered(op, backend)
    first = next(iter(tensors))
    tensors[first] = tensors[first].mT.contiguous().mT
    inputs = arguments(op, tensors, save=backend == "cpp")
    results = forward(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    incoming = torch.ones(1).expand_as(results[0]), torch.randn(results[0].shape, generator=generator)
    torch.library.opcheck(forward, inputs)
    torch.library.opcheck(backward, gradient_arguments(op, tensors, results, incoming))
    if op == "norm":  # x alone, its rows saved, nothing shared
        inputs = [tensors["x"]], None, None, None, None, None, 1e-5
        out, total, mean, rstd = forward(*inputs)
        assert total.shape == (0,)
        torch.library.opcheck(forward, inputs)
        torch.library.opcheck(backward, (out, None, [tensors["x"]], mean, rstd, None, None, 0, 1))
        torch.library.opcheck(backward, (out, None, [tensors["x"]], mean, rstd, None, None, 0, 4 + 16))


@each_op
def test_a_compiler_may_change_the_strides_of_anything(backend, generator, op):
    tensors = {n: t.detach() for n, t in OPS[op][1](generator).items()}
    forward, backward = registered(op, backend)
    shapes = {
        "norm": (2, 12, 24),
        "gelu": (2, 9, 24),
        "grid": (18, 16),
        "gate": (2, 9, 5),
        "adapter": (2, 9, 24),
        "bank": (2, 9, 24),
        "fusion": (2, 9, 24),
    }
    incoming = [torch.randn(shapes[op], generator=generator) for _ in range(2)]

    def reversed_dimensions(t):
        order = list(reversed(range(t.dim())))
        return t.permute(order).contiguous().permute(order)

    def call(change):
        moved = {n: change(t) for n, t in tensors.items()}
        results = forward(*arguments(op, moved))
        results = results if isinstance(results, tuple) else (results,)
        gradients = backward(*gradient_arguments(op, moved, [change(t) for t in results], [change(t) for t in incoming]))
        return *results, *gradients

    for expected, actual in zip(call(lambda t: t), call(reversed_dimensions), strict=True):
        assert torch.equal(expected, actual)


@each_op
def test_compiles_whole_and_once_for_every_length(backend, generator, op):
    """fullgraph=True, forward and backward, the same bits as eager; new lengths and batch sizes compile nothing."""
    function, make = OPS[op]
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda t: function(**t, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(lambda t: function(**t, backend=backend), fullgraph=True, dynamic=True, backend=counting)
    for batch, length in ((2, 9), (3, 17), (2, 33)):
        tensors = make(generator, batch, length)
        expected, actual = function(**tensors, backend=backend), compiled(tensors)
        assert torch.equal(actual, expected)
        cotangent = torch.randn(expected.shape, generator=generator)
        gradients = [torch.autograd.grad(o, list(tensors.values()), cotangent) for o in (actual, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        counted(tensors)
    assert len(compilations) == 1


@each_op
def test_compiles_with_inductor(on, generator, op):
    on("cpp")
    function, make = OPS[op]
    torch._dynamo.reset()
    tensors = make(generator)

    def model(tensors):
        return function(**{n: t.sin() for n, t in tensors.items()}, backend="cpp").relu()

    expected, actual = model(tensors), torch.compile(model, fullgraph=True)(tensors)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*[torch.autograd.grad(o.sum(), list(tensors.values())) for o in (actual, expected)])


@each_op
def test_exports_with_a_dynamic_batch(on, generator, op):
    on("cpp")
    function, make = OPS[op]
    tensors = {n: t.detach() for n, t in make(generator).items()}

    class Model(torch.nn.Module):
        def forward(self, tensors):
            return function(**tensors, backend="cpp")

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {n: {0: batch} if t.shape[0] == 2 else {} for n, t in tensors.items()}
    program = torch.export.export(Model(), (tensors,), dynamic_shapes=(shapes,))
    other = {n: t.detach() for n, t in make(generator, 5).items()}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(other), function(**other, backend="cpp"))


def test_autocast_normalises_in_float32(backend, generator, tensor_device):
    """A float32 stream meets the 16-bit branch of a linear layer: both results are float32, as torch's add and norm give."""
    tensors = norm_inputs(generator)
    branch = tensors["residual"].detach().bfloat16().requires_grad_()
    with torch.autocast(tensor_device.type, dtype=torch.bfloat16):
        out = norm(**(tensors | {"residual": branch}), backend=backend)
    wide = norm(**(tensors | {"residual": branch.float()}), backend=backend)
    assert out.dtype == torch.float32 and torch.equal(out, wide)
    inputs = list((tensors | {"residual": branch}).values())
    for tensor, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert grad.dtype == tensor.dtype


def test_autocast_leaves_the_activation_its_dtype(backend, generator, tensor_device):
    tensors = gelu_inputs(generator)
    half = tensors["x"].detach().bfloat16()
    with torch.autocast(tensor_device.type, dtype=torch.bfloat16):
        out = bias_gelu(half, tensors["bias"], backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, bias_gelu(half, tensors["bias"], backend=backend))


@each_op
def test_activation_checkpoint(backend, generator, op):
    function, make = OPS[op]
    tensors = make(generator)
    gradients = []
    for wrapped in (False, True):
        call = lambda t: function(**t, backend=backend)  # noqa: E731
        out = checkpoint(call, tensors, use_reentrant=False) if wrapped else call(tensors)
        gradients.append(torch.autograd.grad(out.square().sum(), list(tensors.values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@each_op
def test_vmap_is_refused_with_a_sentence(backend, generator, op):
    function, make = OPS[op]
    tensors = make(generator)
    first = next(iter(tensors))
    stacked = torch.stack([tensors[first]] * 3)
    with pytest.raises(RuntimeError, match="no vmap rule.* or use backend='reference'"):
        torch.vmap(lambda x: function(**{**tensors, first: x}, backend=backend))(stacked)
    out = torch.vmap(lambda x: function(**{**tensors, first: x}, backend="reference"))(stacked)
    torch.testing.assert_close(out[1], function(**tensors, backend="reference"))


@each_op
def test_second_derivatives_are_refused_and_the_reference_has_them(backend, generator, op):
    function, make = OPS[op]
    tensors = make(generator)

    x = next(iter(tensors.values()))

    def twice(name):
        (first,) = torch.autograd.grad(function(**tensors, backend=name).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)

    with pytest.raises(RuntimeError, match="no second derivative on this backend: use backend='reference'"):
        twice(backend)
    with mmkernels.use_backend("reference"):
        assert twice("auto")[0].isfinite().all()


@pytest.mark.parametrize("op", ["norm", "gelu", "grid", "adapter", "bank"])
def test_rows_further_apart_than_32_bits_reach(backend, generator, op):
    """Examples and rows across 2^31 elements, in virtual memory of which only the rows are touched."""
    function, make = OPS[op]
    tensors = {n: t.detach() for n, t in make(generator).items()}
    row = 2**28 + 64  # of nine
    far = torch.empty(row * 18).as_strided((2, 9, 24), (9 * row, row, 1)).copy_(tensors["x"])
    assert torch.equal(function(**{**tensors, "x": far}, backend=backend), function(**tensors, backend=backend))


# --- The C++ kernels --------------------------------------------------------------------------------------------------------


def stacked(function):
    return lambda **arguments: torch.stack(function(**arguments))


def awkward_rows():
    """Run as a script, once for every instruction set: lengths around vectors and groups of four of them, all dtypes."""
    generator = torch.Generator().manual_seed(7)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for channels in (1, 3, 16, 31, 64, 65, 145):
            x, residual, grad, s_grad = (torch.randn(2, 35, channels, generator=generator).to(dtype) for _ in range(4))
            gain, bias = torch.randn(2, channels, generator=generator), torch.randn(channels, generator=generator).to(dtype)
            tensors = {"x": x, "residual": residual, "residual_bias": bias, "gain": gain.to(dtype), "bias": bias}

            pair = stacked(film_layer_norm), stacked(testing.eager_film_layer_norm)
            testing.check_op(*pair, tensors, tuple(tensors), "cpp", torch.stack([grad, s_grad]))
            tensors = {"x": x * 5.0, "bias": bias}
            for approximate in ("tanh", "none"):
                options = dict(approximate=approximate)
                testing.check_op(bias_gelu, testing.eager_bias_gelu, tensors, ("x", "bias"), "cpp", grad, **options)


@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_every_instruction_set(on, isa):
    """A set that this processor lacks falls back to the widest it has, so this runs everywhere."""
    on("cpp")
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_row_ops; test_row_ops.awkward_rows()"
    run = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__)],
        env={**os.environ, "MMKERNELS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("op", [op for op in OPS if op != "fusion"])  # its products are torch's
def test_the_number_of_threads_changes_no_bit(on, generator, op):
    on("cpp")
    function, make = OPS[op]
    tensors, before, runs = make(generator, 3, 3000), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(testing.run(function, tensors, tuple(tensors), backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert torch.equal(runs[0].output, other.output)
        assert all(torch.equal(runs[0].gradients[n], other.gradients[n]) for n in tensors)

"""HyperGridLinear against the weights that it never writes: every variant, gradients, gates made once, bad input."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmkernels.modules import HyperGridLinear, set_backend
from mmkernels.modules.hypergrid import VARIANTS
from mmkernels.testing import assert_within_budget

B, T, IN, OUT, STATE = 3, 5, 32, 24, 12
GRIDS = {"row": (4, 1), "column": (1, 3)}
NAMES = {
    "L2": {"L_r": (STATE, 4), "L_c": (STATE, 3)},
    "LG": {"L_r": (STATE, 4), "G_c": (3,)},
    "GL": {"G_r": (4,), "L_c": (STATE, 3)},
    "GG": {"G_r": (4,), "G_c": (3,)},
    "row": {"L_r": (STATE, 4)},
    "column": {"L_c": (STATE, 3)},
}


def make(variant="L2", *, seed=0, **options):
    torch.manual_seed(seed)
    return HyperGridLinear(IN, OUT, GRIDS.get(variant, (4, 3)), state_features=STATE, variant=variant, **options)


def inputs(dtype=torch.float32, *shape):
    generator = torch.Generator().manual_seed(1)
    x, state = torch.randn(*(shape or (B, T)), IN, generator=generator), torch.randn(B, STATE, generator=generator)
    return x.to(dtype), state.to(dtype)


def written(parameters, x, state, variant, residual, activation):
    """The definition, weight by weight, over the layer's own parameters."""
    ones = x.new_ones(1, 1)
    row = state @ parameters["hypergrid.L_r"] if variant in ("L2", "LG", "row") else parameters.get("hypergrid.G_r", ones)
    column = (
        state @ parameters["hypergrid.L_c"] if variant in ("L2", "GL", "column") else parameters.get("hypergrid.G_c", ones)
    )
    y = []
    for b in range(x.shape[0]):
        r, c = (factor[b] if factor.dim() == 2 and len(factor) > 1 else factor.reshape(-1) for factor in (row, column))
        grid = torch.sigmoid(torch.outer(r, c))
        expanded = grid.repeat_interleave(IN // len(r), 0).repeat_interleave(OUT // len(c), 1)  # (in, out)
        weight = parameters["weight"].T * (expanded + 1 if residual else expanded)
        a = {None: x[b], "relu": F.relu(x[b]), "gelu": F.gelu(x[b]), "gelu_tanh": F.gelu(x[b], approximate="tanh")}
        y.append(a[activation] @ weight + parameters["bias"])
    return torch.stack(y)


def gradients(y, tensors):
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return torch.autograd.grad(y, tensors, cotangent, materialize_grads=True)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, residual):
    activation = {"L2": "relu", "LG": "gelu", "GL": "gelu_tanh"}.get(variant)
    layer = make(variant, residual=residual, activation=activation)
    assert {n.removeprefix("hypergrid."): tuple(p.shape) for n, p in layer.named_parameters() if "hypergrid" in n} == NAMES[
        variant
    ]
    results = {}
    for name, dtype in (
        ("written", torch.float64),
        ("reference", torch.float64),
        ("eager", torch.float32),
        ("auto", torch.float32),
    ):
        parameters = {n: p.detach().to(dtype).requires_grad_() for n, p in layer.named_parameters()}
        tensors = (*(t.requires_grad_() for t in inputs(dtype)), *parameters.values())
        if name == "written":
            y = written(parameters, *tensors[:2], variant, residual, activation)
        else:
            y = torch.func.functional_call(set_backend(layer, name), parameters, tensors[:2])
        results[name] = (y, *gradients(y, tensors))
    for what, exact, reference, eager, auto in zip(
        ("y", "x", "state", *(n for n, _ in layer.named_parameters())), *results.values(), strict=True
    ):
        assert torch.allclose(reference, exact, rtol=1e-12, atol=1e-12), what
        assert torch.allclose(eager.double(), exact, rtol=1e-4, atol=1e-5), what
        assert_within_budget(auto, exact, eager, what, factor=4.0, typical=1e-7)


def test_takes_the_place_of_a_linear_and_its_weights():
    linear = nn.Linear(IN, OUT).eval()
    layer = HyperGridLinear.from_linear(linear, (4, 3), residual=True)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert layer.hypergrid.L_r.device == linear.weight.device and layer.hypergrid.L_r.std() > 0
    other = HyperGridLinear(IN, OUT, (4, 3), residual=True)
    missing, unexpected = other.load_state_dict(linear.state_dict(), strict=False)
    assert set(missing) == {"hypergrid.L_r", "hypergrid.L_c"} and unexpected == []
    other.load_state_dict(layer.state_dict())
    x, _ = inputs()
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():  # every gate is a half
        layer.hypergrid.L_c.zero_()
        assert torch.allclose(layer(x), 1.5 * (linear(x) - linear.bias) + linear.bias, atol=1e-5)
    without = HyperGridLinear.from_linear(nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16), (4, 1), variant="row")
    assert without.bias is None and without.hypergrid.L_r.dtype == torch.bfloat16


def test_the_default_state_is_the_first_token():
    layer = HyperGridLinear(IN, OUT, (4, 3))
    x, _ = inputs()
    assert torch.equal(layer(x), layer(x, x[:, 0]))
    assert torch.equal(layer(x[:, 0]), layer(x[:, 0], x[:, 0]))  # examples of one token
    deep = x[:, :4].reshape(B, 2, 2, IN)
    assert torch.equal(layer(deep), layer(x[:, :4]).view(B, 2, 2, OUT))
    with pytest.raises(ValueError, match=r"state is None; .* x, which has shape \(3, 5, 32\) .* state_features, 12"):
        make()(x)
    assert torch.equal(make("GG")(x), make("GG")(x, gate=make("GG").gate()))  # which needs none


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_gates_are_made_once_and_shared(backend):
    layer = make("L2", residual=True, backend=backend)
    x, state = inputs()
    gate, whole = layer.gate(state), layer(x, state)
    assert gate.shape == (B, 4, 3)
    steps = [layer(x[:, t : t + 1], gate=gate) for t in range(T)]  # decoding: a row of each example
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)

    index = torch.tensor([2, 0, 2, 1])  # examples of few tasks
    several = layer(x[index], state, gate_index=index)
    assert torch.allclose(several, whole[index], atol=1e-5)
    rows = torch.tensor([0, 0, 2, 1, 1, 1, 0])  # packed examples
    packed = layer(x[rows, 0], state, gate_index=rows)
    assert torch.allclose(packed, whole[rows, 0], atol=1e-5)
    of_rows = layer(x[:, :2], state, gate_index=torch.tensor([[0, 1], [1, 1], [2, 0]]))
    assert torch.allclose(of_rows[0, 1], layer(x[:1, 1:2], state[1:2])[0, 0], atol=1e-5)
    shared = layer(x, gate=gate[:1])
    assert torch.allclose(shared[2], layer(x[2:], state[:1])[0], atol=1e-5)


def test_dropout_is_of_what_goes_in_and_in_training_only():
    layer = make("GG", dropout=0.5, activation="relu", bias=False)
    x = torch.ones(1, 1000, IN)
    layer.eval()
    assert torch.equal(layer(x)[0, 0], layer(x)[0, 1])
    for backend in ("auto", "eager"):
        torch.manual_seed(3)
        y = set_backend(layer, backend).train()(x)
        assert y[0].std(0).min() > 0
        error = y.mean(1) - layer.eval()(x)[:, 0]
        assert error.abs().max() < 6 * (y.std(1) / 1000**0.5).max(), backend  # six deviations of the mean


@pytest.mark.parametrize("variant", ["L2", "LG"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_low_precision_and_autocast(backend, variant):
    layer = make(variant, backend=backend)
    x, state = inputs()
    exact = layer(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, state)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), exact, atol=0.05)
    assert layer.to(torch.bfloat16).gate(state.bfloat16()).dtype == torch.float32  # gates cost nothing
    y = layer(x.bfloat16(), state.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), exact, atol=0.05)
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16 and layer.hypergrid.L_r.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_checkpointing_drops_the_same_elements_again(backend):
    layer = make(dropout=0.4, activation="relu", backend=backend)
    results = []
    for function in (layer, lambda *args: checkpoint(layer, *args, use_reentrant=False)):
        torch.manual_seed(4)
        tensors = tuple(t.requires_grad_() for t in inputs())
        y = function(*tensors)
        results.append((y, *gradients(y, tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_once_for_every_length():
    layer = make(residual=True, activation="relu")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter), []
    for length in (35, 50, 17):
        x, state = inputs(torch.float32, B, length)
        y, expected = compiled(x, state), layer(x, state)
        assert torch.allclose(y, expected, atol=1e-6)
        ours, theirs = (torch.autograd.grad(t.sum(), list(layer.parameters())) for t in (y, expected))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"grid is \(5, 3\); R = 5 must divide in_features = 32", {"grid": (5, 3)}),
        (ValueError, r"grid is \(4, 7\); C = 7 must divide out_features = 24", {"grid": (4, 7)}),
        (ValueError, r"grid is 4; it must be a pair", {"grid": 4}),
        (ValueError, r"grid\[0\] is 0; it must be an integer of 1 or more", {"grid": (0, 3)}),
        (ValueError, r"grid\[1\] is 3; with variant 'row' it must be 1", {"variant": "row"}),
        (ValueError, r"grid\[0\] is 4; with variant 'column' it must be 1", {"variant": "column"}),
        (ValueError, r"variant is 'LL'; allowed are 'L2', 'LG', 'GL', 'GG', 'row', 'column'", {"variant": "LL"}),
        (ValueError, r"activation is 'tanh'; allowed are None, 'relu'", {"activation": "tanh"}),
        (ValueError, r"dropout is 1.0; it must be in \[0, 1\)", {"dropout": 1.0}),
        (ValueError, r"state_features is 0; it must be an integer of 1 or more", {"state_features": 0}),
        (ValueError, r"backend is 'magic'; allowed are 'auto'", {"backend": "magic"}),
    ],
)
def test_bad_construction(error, message, options):
    with pytest.raises(error, match=message):
        HyperGridLinear(IN, OUT, **{"grid": (4, 3), **options})


def test_bad_calls():
    layer = make()
    x, state = inputs()
    for error, message, call in (
        (TypeError, r"state is None; variant 'L2' needs a tensor \(G, 12\)", lambda: layer.gate()),
        (TypeError, r"state is a list; variant 'L2' needs a tensor", lambda: layer(x, [1.0])),
        (ValueError, r"state has shape \(3, 5\); variant 'L2' needs a tensor \(G, 12\)", lambda: layer(x, state[:, :5])),
        (ValueError, r"gate_index is given; it needs the states", lambda: layer(x, gate_index=torch.arange(B))),
        (ValueError, r"state and gate are given", lambda: layer(x, state, gate=layer.gate(state))),
        (ValueError, r"gate has shape \(2, 4, 3\); without gate_index G must be 1 or 3", lambda: layer(x, state[:2])),
        (
            TypeError,
            r"linear is a Conv1d; it must be an nn.Linear",
            lambda: HyperGridLinear.from_linear(nn.Conv1d(1, 1, 1), (1, 1)),
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_nothing_is_hidden_from_nan_and_empty_batches():
    layer = make()
    x, state = inputs()
    state[1, 0] = float("nan")
    y = layer(x, state)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
    assert layer(x[:0], state[:0]).shape == (0, T, OUT)

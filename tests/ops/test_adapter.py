"""`ops.adapter` on every backend: against float64 with plain eager's error as the budget, and by its meaning."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import mmkernels
from mmkernels import _library, ops, testing
from mmkernels.ops._shared.registration import forward_backward
from mmkernels.ops.adapter import autograd

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def adapter(*, terms=(), **arguments):
    """The op with residuals by name, so that tests can copy tensors: `terms` of x, input_residual and extra."""
    return ops.adapter(**_with_residuals(terms, arguments))


def eager(*, terms=(), **arguments):
    return testing.eager_adapter(**_with_residuals(terms, arguments))


def _with_residuals(terms, arguments):
    extra = arguments.pop("extra", None)
    named = {**arguments, "extra": extra}
    return arguments | {"residual": tuple(named[t] for t in terms) or None}


def make(
    generator, shape, bottleneck, dtype=torch.float32, *, bank=0, index="", biases=True, norms="", scale="", gate="", terms=()
):
    """Named tensors. `index` and `gate`: "rows" or "examples" for one of each; `norms`: of "in" and "out"; `scale`: "one" or
    "channels" (of each adapter of a bank)."""
    channels, leading = shape[-1], (bank,) if bank else ()

    def normal(*sizes, factor=1.0, shift=0.0, dtype=dtype):
        return (torch.randn(sizes, generator=generator, device=generator.device) * factor + shift).to(dtype)

    tensors = {"x": normal(*shape, shift=0.2)}
    tensors["w_down"] = normal(*leading, bottleneck, channels, factor=channels**-0.5)
    tensors["b_down"] = normal(*leading, bottleneck) if biases else None
    tensors["w_up"] = normal(*leading, channels, bottleneck, factor=bottleneck**-0.5)
    tensors["b_up"] = normal(*leading, channels) if biases else None
    tensors |= {n: normal(*shape) for n in terms if n != "x"}
    for place, name in (("in", "norm"), ("out", "out_norm")):
        if place in norms:
            tensors[f"{name}_weight"] = normal(channels, factor=0.2, shift=1.0)
            tensors[f"{name}_bias"] = normal(channels, factor=0.2)
    if scale:
        tensors["scale"] = normal(*(leading if bank else ()), channels if scale == "channels" else 1, shift=0.5)
    sizes = {"rows": shape[:-1], "examples": shape[:1]}
    if gate:
        tensors["gate"] = torch.rand(sizes[gate], generator=generator, device=generator.device).to(dtype)
    if bank:
        tensors["index"] = torch.randint(bank, sizes[index or "examples"], generator=generator, device=generator.device)
    return {n: t for n, t in tensors.items()}


def wanted_of(tensors):
    return tuple(n for n, t in tensors.items() if t is not None and t.is_floating_point())


def check(generator, tensors, backend, wanted=None, **options):
    grad = torch.randn(tensors["x"].shape, generator=generator, device=generator.device)
    with testing.poisoned_memory():
        return testing.check_op(adapter, eager, tensors, wanted or wanted_of(tensors), backend, grad, **options)


# --- Against float64 -----------------------------------------------------------------------------------------------------

# x, bottleneck, what `make` makes, options. Rows, channels and bottlenecks that end anywhere.
PROBLEMS = {
    "alone": ((2, 9, 48), 8, {}, {}),
    "Pfeiffer": ((2, 17, 64), 12, dict(norms="in out", terms=("x", "input_residual")), dict(activation="relu")),
    "Houlsby": ((3, 11, 63), 7, dict(norms="out", terms=("x", "extra")), dict(activation="swish")),
    "pre-LN": ((2, 9, 97), 6, dict(terms=("input_residual",)), dict(skip=True, activation="gelu_tanh", scale=4.0)),
    "norm added again": ((2, 9, 32), 5, dict(norms="in", terms=("input_residual",)), dict(skip=True, activation="gelu")),
    "scaled": ((2, 9, 111), 63, dict(scale="one", biases=False), dict(activation="leakyrelu")),
    "AdapterPlus": ((2, 9, 40), 3, dict(scale="channels", terms=("x",)), dict(activation="gelu")),
    "gate an example": ((3, 9, 40), 16, dict(gate="examples", norms="out", scale="one"), dict(activation="tanh")),
    "gate a row": ((3, 9, 40), 16, dict(gate="rows", terms=("extra",)), dict(activation=None)),
    "two extra residuals": ((2, 5, 24), 4, dict(terms=("extra", "input_residual", "x", "x")), {}),
    "packed rows": ((33, 45), 17, dict(norms="in out", terms=("x",)), {}),
    "four dimensions": ((2, 2, 5, 16), 8, dict(gate="examples"), {}),
    "one by one": ((1, 1, 1), 1, {}, dict(activation=None)),
    "one row": ((21,), 4, {}, dict(activation="tanh")),
    "wider than C": ((2, 9, 16), 111, dict(terms=("x",)), {}),
    "bank": ((6, 9, 40), 12, dict(bank=4, terms=("x", "input_residual"), norms="in out"), {}),
    "bank by rows": (
        (3, 13, 33),
        10,
        dict(bank=5, index="rows", terms=("extra",), scale="channels"),
        dict(activation="swish"),
    ),
    "bank, gated": ((5, 7, 24), 9, dict(bank=3, gate="rows", scale="one", biases=False), dict(activation="gelu")),
    "bank of packed rows": ((37, 24), 9, dict(bank=3, norms="out"), dict(activation="gelu_tanh")),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_matches_float64(backend, generator, problem, dtype):
    shape, bottleneck, made, options = PROBLEMS[problem]
    tensors = make(generator, shape, bottleneck, dtype, **made)
    check(generator, tensors, backend, terms=made.get("terms", ()) if "skip" not in options else (), **options)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_reference_is_what_plain_torch_makes(generator, problem):
    shape, bottleneck, made, options = PROBLEMS[problem]
    tensors = make(generator, shape, bottleneck, torch.float64, **made)
    options = dict(terms=() if "skip" in options else made.get("terms", ()), **options)
    ours = testing.run(adapter, tensors, wanted_of(tensors), backend="reference", **options)
    plain = testing.run(eager, tensors, wanted_of(tensors), **options)
    torch.testing.assert_close(ours.output, plain.output)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", (None, "relu", "gelu", "gelu_tanh", "swish", "leakyrelu", "tanh"))
@pytest.mark.parametrize("terms", ((), ("x",), ("input_residual", "extra")), ids=str)
def test_the_library_multiplies_where_it_is_faster(generator, monkeypatch, activation, terms):
    monkeypatch.setattr(_library, "SLOW_MKL", False)
    tensors = make(generator, (2, 130, 40), 100, terms=terms)
    arguments = {n: t for n, t in tensors.items() if n != "extra"}
    assert "backward by the library" in str(mmkernels.explain("adapter", **arguments, activation=activation, scale=2.0))
    assert "library" not in str(mmkernels.explain("adapter", **arguments, backend="cpp"))
    wanted = wanted_of(tensors)
    for some in (wanted, wanted[:1], wanted[1:3], wanted[3:]):
        check(generator, tensors, "auto", some, terms=terms, activation=activation, scale=2.0)
    monkeypatch.setattr(_library, "SLOW_MKL", True)
    assert "library" not in str(mmkernels.explain("adapter", **arguments))


# --- By its meaning -------------------------------------------------------------------------------------------------------


def test_a_tiny_case_by_hand():
    x, down, up = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0], [0.5]])
    out = ops.adapter(x, down, torch.tensor([1.0]), up, torch.tensor([0.0, 1.0]), residual=x, scale=2.0, backend="reference")
    assert out.tolist() == [[9.0, 2.0]]  # z = 3 - 2 + 1 = 2; 2 (4, 2) + (1, -2)


class Plain:
    """One place of an AdapterHub model, step by step as its library orders them."""

    def __init__(self, tensors, activation, scale):
        self.t, self.activation, self.scale = tensors, activation, scale

    def up(self, x):
        t = self.t
        return self.scale * (self.activation(x @ t["w_down"].T + t["b_down"]) @ t["w_up"].T + t["b_up"])

    def norm(self, rows):
        return functional.layer_norm(rows, rows.shape[-1:], self.t["weight"], self.t["bias"]) if "weight" in self.t else rows

    def sequential(self, h, r, norm_before, residual_before_norm, norm_after):
        residual = h
        x = h
        if norm_before:
            x = self.norm(h + r)
            if residual_before_norm == "post_add":
                residual = h + r
        if residual_before_norm is False:
            residual = x
        y = self.up(x) + residual
        return self.norm(y + r) if norm_after else y

    def parallel(self, h, r):
        return self.norm(self.up(r) + h + r)


@pytest.mark.parametrize("normed", [True, False], ids=["post-LN", "pre-LN"])
@pytest.mark.parametrize("place", ["pfeiffer", "houlsby", "parallel", "adapter+", "post_add"])
def test_the_places_of_adapter_models(generator, place, normed):
    tensors = {n: t.double() for n, t in make(generator, (2, 7, 12), 5).items()}
    h, r, weight, bias = (torch.randn(s, generator=generator).double() for s in ((2, 7, 12), (2, 7, 12), 12, 12))
    weights = tuple(tensors[n] for n in ("w_down", "b_down", "w_up", "b_up"))
    before = dict(norm_weight=weight, norm_bias=bias) if normed else {}
    after = dict(out_norm_weight=weight, out_norm_bias=bias) if normed else {}
    plain = Plain(tensors | (dict(weight=weight, bias=bias) if normed else {}), torch.relu, 4.0)
    if place == "pfeiffer":
        expected = plain.sequential(h, r, True, True, True)
        out = ops.adapter(h, *weights, input_residual=r, **before, residual=(h, r), scale=4.0, **after)
    elif place == "houlsby":
        expected = plain.sequential(h, r, False, True, True)
        out = ops.adapter(h, *weights, residual=(h, r), scale=4.0, **after)
    elif place == "adapter+":
        expected = plain.sequential(h, r, True, False, False)
        out = ops.adapter(h, *weights, input_residual=r, **before, skip=True, scale=4.0)
    elif place == "post_add":
        expected = plain.sequential(h, r, True, "post_add", True) if normed else plain.sequential(h, r, True, False, True)
        out = ops.adapter(h, *weights, input_residual=r, **before, residual=(h, r, r), scale=4.0, **after)
    else:
        expected = plain.parallel(h, r)
        out = ops.adapter(r, *weights, residual=(h, r), scale=4.0, **after)
    torch.testing.assert_close(out, expected)


def test_reference_in_float64_has_two_derivatives(generator):
    made = dict(bank=2, norms="in out", terms=("x", "input_residual"), scale="channels", gate="examples")
    tensors = make(generator, (2, 3, 5), 3, torch.float64, **made)
    index, reference = tensors.pop("index"), dict(backend="reference")
    inputs = [t.requires_grad_() for t in tensors.values()]
    call = lambda *values: adapter(  # noqa: E731
        **dict(zip(tensors, values, strict=True)),
        index=index,
        terms=("x", "input_residual"),
        activation="gelu_tanh",
        **reference,
    )
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "swish", "leakyrelu", "tanh", None])
def test_an_adapter_filled_up_with_zeros_is_the_same(generator, activation):
    tensors = make(generator, (2, 5, 12), 4)
    padded = dict(tensors)
    padded["w_down"] = functional.pad(tensors["w_down"], (0, 0, 0, 3))
    padded["b_down"] = functional.pad(tensors["b_down"], (0, 3))
    padded["w_up"] = functional.pad(tensors["w_up"], (0, 3))
    names = ("x", "w_down", "w_up", "b_down")
    alone, filled = (testing.run(adapter, t, names, activation=activation, backend="reference") for t in (tensors, padded))
    torch.testing.assert_close(alone.output, filled.output)
    torch.testing.assert_close(alone.gradients["x"], filled.gradients["x"])
    assert not filled.gradients["w_down"][4:].any() and not filled.gradients["w_up"][:, 4:].any()
    assert not filled.gradients["b_down"][4:].any()


# --- Layouts, sizes -------------------------------------------------------------------------------------------------------


EVERYTHING = dict(norms="in out", terms=("x", "input_residual", "extra"), scale="channels", gate="rows")


@pytest.mark.parametrize("index", ["", "examples", "rows"])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(backend, generator, layout, index):
    """With the same bits as when everything is dense."""
    tensors = make(generator, (3, 9, 32), 20, bank=4 if index else 0, index=index, **EVERYTHING)
    wanted, options = wanted_of(tensors), dict(terms=EVERYTHING["terms"], activation="gelu")

    def changed(t):
        if layout == "sliced":
            return torch.stack([t, t], -1).flatten(-2)[..., ::2]
        return t.mT.contiguous().mT if t.dim() > 1 else t

    if layout == "expanded":
        tensors |= {n: tensors[n][:1].expand(3, -1, -1) for n in ("x", "input_residual", "extra")}
        wanted = tuple(n for n in wanted if n not in ("x", "input_residual", "extra"))
    else:
        tensors = {n: changed(t) for n, t in tensors.items()}
    run = check(generator, tensors, backend, wanted, **options)
    testing.run(adapter, tensors, wanted, backend=backend, **options)  # an incoming gradient of stride 0
    packed = testing.run(adapter, {n: t.contiguous() for n, t in tensors.items()}, (), backend=backend, **options)
    assert torch.equal(run.output, packed.output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles(backend, generator, dtype):
    """Several blocks of rows, several parts of an adapter's rows, several panels of channels and of the bottleneck."""
    length = 60 if backend != "cpp" else 700
    check(generator, make(generator, (1, length, 80), 70, dtype, norms="in out", scale="channels"), backend)
    index = dict(bank=3, index="rows", terms=("x",))
    check(generator, make(generator, (3, length // 2, 48), 16, dtype, **index), backend, terms=("x",), activation="tanh")
    check(generator, make(generator, (1, 20, 1100), 33, dtype, norms="out"), backend)


@pytest.mark.parametrize("bank", [0, 3])
@pytest.mark.parametrize("shape", [(0, 7, 32), (3, 0, 32), (0, 32)], ids=str)
def test_empty_batches(backend, generator, shape, bank):
    tensors = make(generator, shape, 8, bank=bank, **EVERYTHING)
    run = testing.run(adapter, tensors, wanted_of(tensors), backend=backend, terms=EVERYTHING["terms"])
    assert run.output.shape == shape
    assert all(g.shape == tensors[n].shape and not g.any() for n, g in run.gradients.items())


# --- Many adapters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["examples", "rows"])
def test_a_mixed_batch_is_its_adapters_alone(backend, generator, index):
    """Rows in any order, one adapter that nobody has (NaN even), one with a single row, rows without an adapter."""
    tensors = make(generator, (9, 5, 24), 10, bank=6, index=index, norms="out", terms=("x",), scale="one")
    numbers = tensors["index"]
    numbers[numbers == 4] = 1
    numbers[numbers == 3] = -1
    numbers[numbers == 2] = 0
    numbers.view(-1)[3] = 2
    banks = ("w_down", "b_down", "w_up", "b_up", "scale")
    for name in banks:
        tensors[name][4] = float("nan")
    grad = torch.randn(9, 5, 24, generator=generator, device=generator.device)
    run = testing.run(adapter, tensors, wanted_of(tensors), grad, backend=backend, terms=("x",))
    rows = numbers if index == "rows" else numbers[:, None].expand(9, 5)
    norm = {"out_norm_weight": tensors["out_norm_weight"], "out_norm_bias": tensors["out_norm_bias"]}
    for number in range(6):
        mine = rows == number
        alone = {n: t[number] for n, t in tensors.items() if n in banks} | {"x": tensors["x"][mine]} | norm
        one = testing.run(adapter, alone, ("x", *banks), grad[mine], backend="reference", terms=("x",))
        torch.testing.assert_close(run.output[mine], one.output)
        torch.testing.assert_close(run.gradients["x"][mine], one.gradients["x"], rtol=1e-4, atol=1e-5)
        for name in banks:
            expected = one.gradients[name] if mine.any() else torch.zeros_like(one.gradients[name])
            torch.testing.assert_close(run.gradients[name][number], expected, rtol=1e-4, atol=1e-5)
    none = rows < 0
    plain = torch.nn.functional.layer_norm(tensors["x"][none], (24,), *norm.values())
    torch.testing.assert_close(run.output[none], plain)
    assert torch.equal(run.output, adapter(**tensors | {"index": numbers.int()}, backend=backend, terms=("x",)))


def test_nobody_has_an_adapter(backend, generator):
    tensors = make(generator, (3, 5, 24), 10, bank=2, gate="rows", terms=("x",), norms="in")
    tensors["index"].fill_(-1)
    run = testing.run(adapter, tensors, wanted_of(tensors), backend=backend, terms=("x",))
    assert torch.equal(run.output, tensors["x"])
    assert all(g.any() == (n == "x") for n, g in run.gradients.items())


def test_numbers_out_of_range_give_nan(on, generator):
    """Where the values cannot be looked at, on a GPU, a wrong number must be seen in the result and read no memory."""
    for name in ("triton", "cuda"):
        on(name)
        tensors = make(generator, (4, 3, 16), 5, bank=2, index="rows")
        tensors["index"][1, 2], tensors["index"][3, 0] = 2, -2
        weights = (tensors[n] for n in ("w_down", "b_down", "w_up", "b_up"))
        given = [tensors["x"], None, None, *weights, *(None,) * 6, tensors["index"]]
        out, *_ = forward_backward("adapter", name)[0](*given, None, 0, 1, 1e-5, 1e-5, 1.0, 0.0, False)
        wrong = (tensors["index"] < -1) | (tensors["index"] > 1)
        assert torch.equal(out.isnan().all(-1), wrong) and torch.equal(out.isnan().any(-1), wrong)


# --- What it is in training --------------------------------------------------------------------------------------------------


def test_nan_rows_stay_alone(backend, generator):
    tensors = make(generator, (2, 9, 33), 12, norms="in out", terms=("x",))
    tensors["x"][1, 4, 7] = -float("nan")
    run = testing.run(adapter, tensors, ("x",), backend=backend, terms=("x",))
    expected = torch.zeros(2, 9, dtype=torch.bool, device=generator.device)
    expected[1, 4] = True
    for result in (run.output, run.gradients["x"]):
        assert torch.equal(result.isnan().any(-1), expected) and torch.equal(result.isnan().all(-1), expected)


def test_a_residual_that_is_the_input_is_the_same_as_a_copy(backend, generator):
    tensors = make(generator, (2, 9, 32), 12, norms="in out", terms=("x", "input_residual"))
    names = wanted_of(tensors)
    same = testing.run(adapter, tensors, names, backend=backend, terms=("x", "input_residual"))
    copies = tensors | {"extra": tensors["x"] + tensors["input_residual"]}
    copied = testing.run(adapter, copies, (*names, "extra"), backend=backend, terms=("extra",))
    torch.testing.assert_close(same.output, copied.output)
    for name in names:
        expected = copied.gradients[name]
        if name in ("x", "input_residual"):
            expected = expected + copied.gradients["extra"]
        torch.testing.assert_close(same.gradients[name], expected, rtol=1e-4, atol=1e-5)


def test_one_norm_in_two_places_has_one_gradient(backend, generator):
    tensors = make(generator, (2, 9, 32), 12, norms="in out")
    shared = {n: t for n, t in tensors.items() if not n.startswith("out")}

    def call(norm_weight, norm_bias, **arguments):
        norms = dict(norm_weight=norm_weight, norm_bias=norm_bias, out_norm_weight=norm_weight, out_norm_bias=norm_bias)
        return ops.adapter(**arguments, **norms)

    run, exact = (testing.run(call, shared, wanted_of(shared), backend=b) for b in (backend, "reference"))
    for name in shared:
        torch.testing.assert_close(run.gradients[name], exact.gradients[name], rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_wanted(backend, generator):
    """The same ones, bit by bit, whatever else is wanted; empty tensors for the others."""
    tensors = make(generator, (5, 9, 24), 7, bank=3, index="rows", **EVERYTHING)
    names = ["out_weight" if n == "out_norm_weight" else "out_bias" if n == "out_norm_bias" else n for n in tensors]
    tensors = dict(zip(names, tensors.values(), strict=True)) | {"residual": tensors["extra"]}
    given = [tensors.get(n) for n in autograd.NAMES]
    forward, backward = forward_backward("adapter", backend)
    options = 1, 4, 1e-5, 1e-5, 1.0, 0.0
    out, statistics, hidden = forward(*given, tensors["index"], None, *options, backend == "cpp")
    hidden = hidden if backend == "cpp" else None
    dout = torch.randn(out.shape, generator=generator, device=generator.device)
    call = lambda wanted: backward(dout, *given, tensors["index"], None, statistics, hidden, *options, wanted)  # noqa: E731
    everything = call(2 ** len(autograd.NAMES) - 1)
    for bit in range(len(autograd.NAMES)):
        for i, (found, whole) in enumerate(zip(call(1 << bit), everything, strict=True)):
            assert torch.equal(found, whole) if i == bit else found.shape == (0,)
    assert all(g.shape == (0,) for g in call(0))


@pytest.mark.parametrize("wanted", [("x",), ("w_up",), ("b_up",), ("w_down",), ("b_down",), ("gate",), ("scale",), ("extra",)])
def test_one_gradient_alone(backend, generator, wanted):
    tensors = make(generator, (4, 7, 24), 7, bank=2, terms=("extra",), scale="one", gate="examples")
    check(generator, tensors, backend, wanted, terms=("extra",))


@pytest.mark.parametrize("norms", ["", "in out"])
def test_dropout_is_that_of_the_reference(backend, generator, norms):
    tensors = make(generator, (3, 9, 40), 12, norms=norms, gate="rows", scale="channels", bank=2)
    options = dict(activation="gelu", dropout_p=0.4, dropout_seed=torch.tensor([77], device=generator.device))
    names = wanted_of(tensors)
    run, exact = (testing.run(adapter, tensors, names, backend=b, **options) for b in (backend, "reference"))
    torch.testing.assert_close(run.output, exact.output, rtol=1e-4, atol=1e-5)
    for name in names:
        torch.testing.assert_close(run.gradients[name], exact.gradients[name], rtol=1e-4, atol=1e-4)
    if not norms:
        assert 0.3 < (exact.output == 0).float().mean() < 0.5 and torch.equal(run.output == 0, exact.output == 0)


def test_activation_checkpoint_redraws_the_same_dropout(backend, generator):
    tensors = {n: t.requires_grad_() for n, t in make(generator, (3, 9, 32), 24, norms="out").items()}
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        call = lambda t: adapter(**t, dropout_p=0.4, backend=backend)  # noqa: E731
        out = checkpoint(call, tensors, use_reentrant=False) if wrapped else call(tensors)
        gradients.append(torch.autograd.grad(out.square().sum(), list(tensors.values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    torch.manual_seed(4)
    assert not torch.equal(adapter(**tensors, dropout_p=0.4, backend=backend), out)


def test_autocast_computes_as_a_linear_layer_does(backend, generator, tensor_device):
    made = make(generator, (3, 9, 32), 24, norms="in out", terms=("x",), scale="one")
    tensors = {n: t.requires_grad_() for n, t in made.items()}
    with torch.autocast(tensor_device.type, dtype=torch.bfloat16):
        out = adapter(**tensors, backend=backend, terms=("x",))
    low = {n: t.bfloat16() if n[:2] in ("x", "w_", "b_") else t for n, t in tensors.items()}
    assert out.dtype == torch.bfloat16 and torch.equal(out, adapter(**low, backend=backend, terms=("x",)))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), list(tensors.values())))


def test_saved_are_the_inputs_four_numbers_a_row_and_on_a_cpu_the_bottleneck_and_y(backend, generator):
    tensors = make(generator, (3, 9, 32), 24, norms="in out", terms=("x",), bank=2)
    tensors = {n: t.requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapter(**tensors, backend=backend, terms=("x",))
    own = [t for t in saved if t.data_ptr() not in {t.data_ptr() for t in tensors.values()}]
    assert len(saved) > 5 and sum(t.numel() for t in own) <= 27 * (4 + (24 + 32) * (backend == "cpp"))


def test_the_same_bits_every_time(backend, generator):
    tensors = make(generator, (3, 40, 64), 24, torch.bfloat16, bank=2, index="rows", **EVERYTHING)
    names = wanted_of(tensors)
    first, second = (testing.run(adapter, tensors, names, backend=backend, terms=EVERYTHING["terms"]) for _ in range(2))
    assert torch.equal(first.output, second.output)
    assert all(torch.equal(first.gradients[n], second.gradients[n]) for n in names)


# --- The C++ kernels --------------------------------------------------------------------------------------------------------


def awkward_adapters():
    """Run as a script, once for every instruction set: channels and bottlenecks around vectors and panels, all activations."""
    generator = torch.Generator().manual_seed(7)
    activations = (None, "relu", "gelu", "gelu_tanh", "swish", "leakyrelu", "tanh")
    sizes = ((1, 1), (3, 2), (16, 31), (31, 16), (64, 33), (65, 8), (145, 48))
    for activation, (channels, bottleneck) in zip(activations, sizes, strict=True):
        for dtype in DTYPES:
            tensors = make(generator, (2, 35, channels), bottleneck, dtype, bank=2, **EVERYTHING)
            tensors["x"] *= 4.0  # also where activations are flat
            check(generator, tensors, "cpp", terms=EVERYTHING["terms"], activation=activation)


@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_every_instruction_set(on, isa):
    """A set that this processor lacks falls back to the widest it has, so this runs everywhere."""
    on("cpp")
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_adapter; test_adapter.awkward_adapters()"
    run = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__)],
        env={**os.environ, "MMKERNELS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "swish", "leakyrelu", "tanh"])
def test_activations_of_any_number(on, generator, activation):
    """An adapter of one channel and one weight is its activation: near 0, where it is flat, at the ends of float32."""
    on("cpp")
    ends = [0.0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 88.0, -88.0, 100.0, -100.0, 1e15, -1e15]
    x = torch.cat([torch.tensor(ends), torch.linspace(-12, 12, 4001)])[:, None].requires_grad_()
    one = torch.ones(1, 1)
    outs = [ops.adapter(t, one.to(t.dtype), None, one.to(t.dtype), None, activation=activation) for t in (x, x.double())]
    torch.testing.assert_close(outs[0].double(), outs[1], rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(out.sum(), x)[0] for out in outs]
    torch.testing.assert_close(*gradients, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_bottlenecks_of_many_rows(on, generator, dtype):
    """Sums that fit no cache: they are added to after every 1024 rows, which may end inside of an adapter's."""
    on("cpp")
    tensors = make(generator, (3, 420, 400), 176, dtype, bank=2, index="rows", norms="out", terms=("x",))
    check(generator, tensors, "cpp", terms=("x",))


@pytest.mark.parametrize("index, sizes", [("", (96, 24)), ("rows", (96, 24)), ("rows", (400, 176))])
def test_the_number_of_threads_changes_no_bit(on, generator, index, sizes):
    on("cpp")
    channels, bottleneck = sizes
    tensors = make(generator, (3, 400, channels), bottleneck, bank=3 if index else 0, index=index, **EVERYTHING)
    names, before, runs = wanted_of(tensors), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(testing.run(adapter, tensors, names, backend="cpp", terms=EVERYTHING["terms"]))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert torch.equal(runs[0].output, other.output)
        assert all(torch.equal(runs[0].gradients[n], other.gradients[n]) for n in names)


# --- Errors -----------------------------------------------------------------------------------------------------------------


def arguments(**changes):
    tensors = {"x": torch.zeros(2, 3, 8), "w_down": torch.zeros(4, 8), "b_down": torch.zeros(4)}
    return tensors | {"w_up": torch.zeros(8, 4), "b_up": torch.zeros(8)} | changes


def bank(**changes):
    tensors = dict(w_down=torch.zeros(5, 4, 8), b_down=torch.zeros(5, 4), w_up=torch.zeros(5, 8, 4), b_up=torch.zeros(5, 8))
    return arguments(**tensors) | changes


@pytest.mark.parametrize(
    "given, error, message",
    [
        (arguments(x=torch.zeros(2, 3, 8, dtype=torch.int64)), TypeError, "x has dtype torch.int64"),
        (arguments(x=torch.zeros(2, 3, 0)), ValueError, r"x has shape \(2, 3, 0\)"),
        (arguments(w_down=torch.zeros(8, 4)), ValueError, r"w_down has shape \(8, 4\); it must be \(r, 8\) or \(A, r, 8\)"),
        (arguments(w_up=torch.zeros(4, 8)), ValueError, r"w_up has shape \(4, 8\); with w_down \(4, 8\) it must be \(8, 4\)"),
        (arguments(w_down=[torch.zeros(4, 8)]), TypeError, "w_down is a list; several adapters are one tensor"),
        (arguments(w_down=torch.zeros(4, 8).half()), TypeError, "w_down has dtype torch.float16; it must be x's"),
        (arguments(b_down=torch.zeros(8)), ValueError, r"b_down has shape \(8,\); it must be \(4,\)"),
        (arguments(b_up=torch.zeros(8).half()), TypeError, "b_up has dtype torch.float16; it must be x's, torch.float32, or"),
        (arguments(norm_bias=torch.zeros(8)), ValueError, "norm_bias is given; without norm_weight it must be None"),
        (arguments(out_norm_weight=torch.zeros(4)), ValueError, r"out_norm_weight has shape \(4,\); it must be \(8,\)"),
        (arguments(input_residual=torch.zeros(3, 8)), ValueError, r"input_residual has shape \(3, 8\)"),
        (arguments(residual=torch.zeros(2, 3, 7)), ValueError, r"residual has shape \(2, 3, 7\); it must be that of x"),
        (arguments(residual=(torch.zeros(2, 3, 8).half(),)), TypeError, r"residual\[0\] has dtype torch.float16"),
        (arguments(residual=(None,)), TypeError, r"residual\[0\] is a NoneType"),
        (arguments(activation="silu"), ValueError, "activation is 'silu'; allowed are None, 'relu', 'gelu', 'gelu_tanh'"),
        (arguments(scale="big"), TypeError, "scale is 'big'; it must be a finite number or a tensor"),
        (arguments(scale=torch.zeros(4)), ValueError, r"scale has shape \(4,\); it must be \(\) or \(1,\) or \(8,\)"),
        (
            arguments(gate=torch.zeros(3)),
            ValueError,
            r"gate has shape \(3,\); with x .* must be \(2,\) or \(2, 3\)",
        ),
        (arguments(skip=1), TypeError, "skip is 1; it must be True or False"),
        (arguments(eps=0.0), ValueError, "eps is 0.0; it must be a number above 0"),
        (arguments(dropout_p=1.0), ValueError, "dropout_p is 1.0"),
        (arguments(dropout_p=0.5, dropout_seed=torch.zeros(1)), ValueError, "dropout_seed has shape"),
        (arguments(index=torch.zeros(2, dtype=torch.int64)), ValueError, "index is given; with weights of one adapter"),
        (bank(), ValueError, "index is None; a bank of adapters"),
        (bank(index=torch.zeros(2)), TypeError, "index has dtype torch.float32"),
        (bank(index=torch.zeros(3, dtype=torch.int64)), ValueError, r"index has shape \(3,\); with x \(2, 3, 8\)"),
        (bank(index=torch.tensor([0, 5])), IndexError, r"index has numbers from 0 to 5; they must be in \[0, 5\), or -1"),
        (bank(index=torch.tensor([-2, 4])), IndexError, "index has numbers from -2 to 4"),
        (bank(b_down=torch.zeros(4)), ValueError, r"b_down has shape \(4,\); it must be \(5, 4\)"),
        (arguments(backend="magic"), ValueError, "backend is 'magic'"),
        (arguments(backend="sdpa"), mmkernels.BackendError, "it is an attention"),
    ],
    ids=str,
)
def test_errors_name_the_argument(given, error, message):
    with pytest.raises(error, match=message):
        ops.adapter(**given)

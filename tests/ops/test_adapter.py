"""`ops.adapter` on every backend: against float64 with plain eager's error as the budget, and by its meaning."""

import pytest
import torch
from torch.nn import functional

import mmkernels
from mmkernels import ops, testing
from mmkernels.ops.adapter import api

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
    if backend in api.MISSING:
        pytest.skip(f"there are no {backend} kernels")
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
    "one row": ((20,), 4, {}, dict(activation="tanh")),
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

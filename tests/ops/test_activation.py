"""`ops.bias_gelu` on every backend: against float64 with plain eager's error as the budget, and by its meaning."""

import pytest
import torch

import mmkernels
from mmkernels import testing
from mmkernels.ops import bias_gelu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_form = pytest.mark.parametrize("approximate", ["tanh", "none"])


def make(generator, shape, dtype=torch.float32, bias=True):
    x = torch.randn(shape, generator=generator).mul(2.0).to(dtype)
    return {"x": x} | ({"bias": torch.randn(shape[-1], generator=generator).to(dtype)} if bias else {})


def check(generator, tensors, backend, approximate="tanh", wanted=None, grad="random"):
    if isinstance(grad, str):
        grad = torch.randn(tensors["x"].shape, generator=generator).to(tensors["x"].dtype)
    wanted = tuple(tensors) if wanted is None else wanted
    return testing.check_op(bias_gelu, testing.eager_bias_gelu, tensors, wanted, backend, grad, approximate=approximate)


# --- Against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_form
@pytest.mark.parametrize("shape", [(1,), (97,), (63, 1), (5, 7, 111), (2, 33, 64), (200, 3), (3, 8192), (2, 9001)], ids=str)
def test_matches_float64(backend, generator, shape, approximate, dtype):
    check(generator, make(generator, shape, dtype), backend, approximate)


@each_form
@pytest.mark.parametrize("shape", [(1,), (5, 7, 111), (4096,), (3, 5000), (70, 1)], ids=str)
def test_without_bias(backend, generator, shape, approximate):
    check(generator, make(generator, shape, bias=False), backend, approximate)


@each_form
def test_every_magnitude(backend, approximate):
    """Relative to |x|, and in the negative tail, where 1 + tanh and 1 + erf cancel, to the result."""
    x = torch.cat([torch.linspace(-15.0, 15.0, 4001), torch.logspace(-30, 0, 500), -torch.logspace(-30, 0, 500)])
    if approximate == "tanh":
        inner = (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)
        exact = x.double() * torch.sigmoid(2 * inner)
    else:
        exact = x.double() * torch.special.erfc(-x.double() * 0.5**0.5) * 0.5
    error = (bias_gelu(x, approximate=approximate, backend=backend).double() - exact).abs()
    size, near = x.double().abs(), x > -3.0
    assert (error <= 3e-7 * size + 1e-37)[near].all()
    # The exponential's argument, up to 87, is rounded to 2^-18; probabilities below 2^-126 become 0.
    assert (error <= 2e-5 * exact.abs() + 2.0**-126 * size)[~near].all()


@each_form
def test_large_values_are_exact(backend, approximate):
    x = torch.tensor([12.0, 1e3, 1e10, 1e20, 3e38, -20.0, -1e3, -1e10, -1e20, -3e38] * 7).requires_grad_()
    out = bias_gelu(x, approximate=approximate, backend=backend)
    assert torch.equal(out, torch.where(x > 0, x, 0.0))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], (x > 0).float())


@each_form
def test_what_is_not_finite(backend, generator, approximate):
    """As in F.gelu: infinity stays, the other one and NaN give NaN, as do the gradients of all three; the others' stay."""
    x = torch.randn(4, 50, generator=generator)
    x[1, 3], x[2, 7], x[3, 40] = float("nan"), float("inf"), float("-inf")
    clean = torch.where(x.isfinite(), x, 0.5).requires_grad_()
    x.requires_grad_()
    results = []
    for tensor in (x, clean):
        out = bias_gelu(tensor, approximate=approximate, backend=backend)
        results.append((out, torch.autograd.grad(out.sum(), tensor)[0]))
    (out, grad), (out_clean, grad_clean) = results
    finite = x.isfinite()
    assert torch.equal(out[finite], out_clean[finite]) and torch.equal(grad[finite], grad_clean[finite])
    assert out[2, 7] == float("inf") and out[1, 3].isnan() and out[3, 40].isnan()
    assert grad[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_bias_with_half_inputs(backend, generator, dtype):
    tensors = make(generator, (33, 40), dtype)
    tensors["bias"] = torch.randn(40, generator=generator)
    run = check(generator, tensors, backend)
    assert run.gradients["bias"].dtype == torch.float32 and run.output.dtype == dtype


@pytest.mark.parametrize("layout", ["sliced", "transposed", "flipped", "expanded", "five dimensions"])
@pytest.mark.parametrize("bias", [False, True])
def test_any_strides(backend, generator, layout, bias):
    def strided():
        if layout == "sliced":
            return torch.randn(3, 9, 80, generator=generator)[..., ::2]
        if layout == "transposed":
            return torch.randn(3, 40, 9, generator=generator).mT
        if layout == "flipped":
            return torch.randn(40, 9, 3, generator=generator).permute(2, 1, 0)
        if layout == "expanded":
            return torch.randn(1, 9, 1, generator=generator).expand(3, -1, 40)
        return torch.randn(2, 3, 4, 5, 6, generator=generator).permute(3, 0, 4, 1, 2)

    tensors = {"x": strided()} | ({"bias": torch.randn(3, strided().shape[-1], generator=generator).T[:, 1]} if bias else {})
    check(generator, tensors, backend, grad=strided())


def test_stride_zero_gradient(backend, generator):
    check(generator, make(generator, (3, 33, 40)), backend, grad=None)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)], ids=str)
def test_empty(backend, generator, shape):
    tensors = {n: t.requires_grad_() for n, t in make(generator, shape).items()}
    out = bias_gelu(**tensors, backend=backend)
    assert out.shape == shape
    for tensor, grad in zip(tensors.values(), torch.autograd.grad(out.sum(), list(tensors.values())), strict=True):
        assert grad.shape == tensor.shape and (grad == 0).all()


def test_same_bits_every_time(backend, generator):
    tensors = make(generator, (150, 40), torch.bfloat16)
    first, again = (testing.run(bias_gelu, tensors, tuple(tensors), backend=backend) for _ in range(2))
    assert torch.equal(first.output, again.output)
    assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in first.gradients)


def test_uninitialised_memory_is_never_read(backend, generator):
    tensors = make(generator, (66, 41))
    clean = testing.run(bias_gelu, tensors, tuple(tensors), backend=backend)
    with testing.poisoned_memory():
        poisoned = testing.run(bias_gelu, tensors, tuple(tensors), backend=backend)
    assert torch.equal(clean.output, poisoned.output)
    assert all(torch.equal(clean.gradients[n], poisoned.gradients[n]) for n in clean.gradients)


def test_only_wanted_gradients_are_computed(backend, generator):
    for wanted in (("x",), ("bias",)):
        check(generator, make(generator, (33, 40)), backend, wanted=wanted)


def test_x_alone_is_saved(backend, generator):
    tensors = {n: t.requires_grad_() for n, t in make(generator, (101, 64)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bias_gelu(**tensors, backend=backend)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in tensors.values()]


# --- Choice, errors -------------------------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 8)
WRONG = {
    "list": (dict(x=[1.0]), TypeError, "x is a list; it must be a tensor"),
    "integer": (dict(x=X.int()), TypeError, "x has dtype torch.int32; it must be a floating-point tensor"),
    "scalar": (dict(x=torch.tensor(1.0)), ValueError, r"x has shape \(\); it must be \(..., C\)"),
    "channels": (dict(x=X[..., :0]), ValueError, r"x has shape \(2, 3, 0\); it must be \(..., C\) with C of 1 or more"),
    "sparse": (dict(x=X.to_sparse()), TypeError, "x is a torch.sparse_coo tensor"),
    "bias": (dict(bias=torch.zeros(7)), ValueError, r"bias has shape \(7,\); it must be \(8,\)"),
    "bias rank": (dict(bias=torch.zeros(1, 8)), ValueError, r"bias has shape \(1, 8\); it must be \(8,\)"),
    "bias dtype": (dict(bias=torch.zeros(8).double()), TypeError, "bias has dtype torch.float64; it must be x's"),
    "device": (dict(bias=torch.zeros(8, device="meta")), ValueError, "bias is on meta; it must be on x's device, cpu"),
    "form": (dict(approximate="fast"), ValueError, "approximate is 'fast'; allowed are 'tanh' and 'none'"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; allowed are"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, error, message = WRONG[case]
    for call in (bias_gelu, lambda **kw: mmkernels.explain("bias_gelu", **kw)):
        with pytest.raises(error, match=message):
            call(**{**dict(x=X), **changes})


def test_what_auto_takes(on):
    on("cpp")
    assert mmkernels.explain("bias_gelu", X).backend == "cpp"
    told = mmkernels.explain("bias_gelu", X.double())
    assert told.backend == "reference" and "it is an attention" in told.refusals["sdpa"]
    with pytest.raises(mmkernels.BackendError, match="dtype is torch.float64"):
        bias_gelu(X.double(), backend="cpp")


@each_form
def test_the_reference_is_twice_differentiable(generator, approximate):
    x, bias = (t.double().requires_grad_() for t in make(generator, (2, 3)).values())

    def function(x, bias):
        return bias_gelu(x, bias, approximate=approximate, backend="reference")

    assert torch.autograd.gradcheck(function, (x, bias)) and torch.autograd.gradgradcheck(function, (x, bias))

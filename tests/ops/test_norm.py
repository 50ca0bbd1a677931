"""`ops.film_layer_norm` on every backend: against float64 with plain eager's error as the budget, and by its meaning."""

import pytest
import torch

import mmkernels
from mmkernels import testing
from mmkernels.ops import film_layer_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(generator, shape, dtype=torch.float32, *, second=None, residual=False, gain="bc", bias="c", parameters=None):
    """Named tensors: x, or x and x2 where `second` is the length of another segment; "c", "bc" or "" for gain and bias."""
    batch, length, channels = shape
    sizes = {"x": shape}
    if second is not None:
        sizes["x2"] = (batch, second, channels)
    if residual:
        sizes |= {"residual": (batch, length + (second or 0), channels), "residual_bias": (channels,)}
    for name, kind in (("gain", gain), ("bias", bias)):
        if kind:
            sizes[name] = (batch, channels) if kind == "bc" else (channels,)
    made = {n: torch.randn(size, generator=generator) for n, size in sizes.items()}
    of_parameters = ("gain", "bias", "residual_bias")
    return {n: t.to(parameters if parameters is not None and n in of_parameters else dtype) for n, t in made.items()}


def one_result(function):
    """`function` with a pair as x and x2, and (out, s) stacked."""

    def call(x, x2=None, gain=None, bias=None, **options):
        result = function(x if x2 is None else (x, x2), gain, bias, **options)
        return torch.stack(result) if isinstance(result, tuple) else result

    return call


ours, eager = one_result(film_layer_norm), one_result(testing.eager_film_layer_norm)


def cotangent(generator, tensors):
    x, x2 = tensors["x"], tensors.get("x2")
    shape = (x.shape[0], x.shape[1] + (0 if x2 is None else x2.shape[1]), x.shape[2])
    return torch.randn((2, *shape) if "residual" in tensors else shape, generator=generator).to(x.dtype)


def check(generator, tensors, backend, wanted=None, grad="random"):
    grad = cotangent(generator, tensors) if isinstance(grad, str) else grad
    return testing.check_op(ours, eager, tensors, tuple(tensors) if wanted is None else wanted, backend, grad)


# --- Against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 63, 97), (3, 33, 64), (1, 97, 111), (2, 20, 768), (33, 1, 17)], ids=str)
def test_matches_float64(backend, generator, shape, residual, dtype):
    check(generator, make(generator, shape, dtype, residual=residual), backend)


@pytest.mark.parametrize("channels", [4095, 8192, 9001])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_wide_rows(backend, generator, channels, residual):
    if backend == "cuda" and channels > 8192:
        with pytest.raises(mmkernels.BackendError, match="rows have 9001 channels, it takes 1 to 8192"):
            film_layer_norm(torch.zeros(1, 1, channels), None, None, backend="cuda")
        return
    check(generator, make(generator, (2, 5, channels), residual=residual), backend)


@pytest.mark.parametrize("gain", ["", "c", "bc"])
@pytest.mark.parametrize("bias", ["", "c", "bc"])
def test_parameters_of_a_layer_or_of_each_example(backend, generator, gain, bias):
    tensors = make(generator, (3, 41, 40), gain=gain, bias=bias, residual=True)
    run = check(generator, tensors, backend)
    assert all(run.gradients[n].shape == tensors[n].shape for n in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain, bias", [("bc", "c"), ("bc", "bc"), ("c", "bc"), ("", "bc")])
@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_parameters_of_tasks(backend, generator, tasks, gain, bias, dtype):
    """Rows of tasks with an index; of seven, two at least have no example and no gradient."""
    tensors = make(generator, (5, 21, 40), dtype, gain=gain, bias=bias, residual=True)
    for name, kind in (("gain", gain), ("bias", bias)):
        if kind == "bc":
            tensors[name] = torch.randn(tasks, 40, generator=generator).to(dtype)
    index = torch.randint(tasks, (5,), generator=generator)
    names = tuple(tensors)
    run = check(generator, tensors | {"index": index}, backend, names)
    absent = [t for t in range(tasks) if t not in index]
    for name, kind in (("gain", gain), ("bias", bias)):
        if kind == "bc":
            assert run.gradients[name].shape == (tasks, 40) and (run.gradients[name][absent] == 0).all()
    gathered = {n: t[index] if n in ("gain", "bias") and t.dim() == 2 else t for n, t in tensors.items()}
    assert torch.equal(run.output, ours(**gathered, backend=backend))
    assert torch.equal(run.output, ours(**tensors, index=index.int(), backend=backend))


@pytest.mark.parametrize("lengths", [(20, 4), (1, 63), (0, 9), (9, 0)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_two_tensors_of_rows_are_one_behind_the_other(backend, generator, lengths, residual):
    tensors = make(generator, (2, lengths[0], 33), second=lengths[1], residual=residual)
    run = check(generator, tensors, backend)
    whole = {n: t for n, t in tensors.items() if n != "x2"} | {"x": torch.cat([tensors["x"], tensors["x2"]], 1)}
    assert torch.equal(run.output, ours(**whole, backend=backend))


def test_the_second_tensor_may_be_one_example_for_all(backend, generator):
    """A bottleneck that all examples share: an expanded tensor, whose gradient is summed over them."""
    tensors = make(generator, (3, 7, 33), second=4)
    tensors["x2"] = tensors["x2"][:1]

    def shared(function):
        return lambda x2, **options: function(x2=x2.expand(3, -1, -1), **options)

    grad = torch.randn(3, 11, 33, generator=generator)
    testing.check_op(shared(ours), shared(eager), tensors, tuple(tensors), backend, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_with_half_inputs(backend, generator, dtype):
    tensors = make(generator, (2, 33, 40), dtype, residual=True, parameters=torch.float32)
    run = check(generator, tensors, backend)
    assert run.gradients["gain"].dtype == run.gradients["residual_bias"].dtype == torch.float32


@pytest.mark.parametrize("layout", ["sliced", "transposed", "flipped", "expanded", "narrowed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(backend, generator, layout, dtype):
    b, t, c = 2, 19, 24

    def strided(*shape):
        if layout == "sliced":
            return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)[..., ::2]
        if layout == "transposed":
            return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).to(dtype).mT
        if layout == "flipped":
            return torch.randn(*reversed(shape), generator=generator).to(dtype).permute(*reversed(range(len(shape))))
        if layout == "expanded":
            return torch.randn(1, *shape[1:], generator=generator).to(dtype).expand(shape)
        return torch.randn(*shape[:-1], shape[-1] + 3, generator=generator).to(dtype)[..., 1 : 1 + shape[-1]]

    tensors = {"x": strided(b, t, c), "x2": strided(b, 5, c), "residual": strided(b, t + 5, c), "gain": strided(b, c)}
    tensors["bias"] = torch.randn(2 * c, generator=generator).to(dtype)[::2]
    check(generator, tensors, backend, grad=strided(2, b, t + 5, c))


def test_stride_zero_gradient(backend, generator):
    check(generator, make(generator, (2, 33, 40), residual=True), backend, grad=None)


@pytest.mark.parametrize("through", ["out", "sum"])
def test_gradient_through_one_result_alone(backend, generator, through):
    tensors = make(generator, (2, 21, 40), residual=True)
    grad = torch.randn(2, 21, 40, generator=generator)

    def gradients(name, dtype):
        inputs = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        function = film_layer_norm if name else testing.eager_film_layer_norm
        results = function(**inputs, **({"backend": name} if name else {}))
        result = results[0 if through == "out" else 1]
        return torch.autograd.grad(result, list(inputs.values()), grad.to(dtype), allow_unused=True, materialize_grads=True)

    found, exact, plain = (
        gradients(backend, torch.float32),
        gradients("reference", torch.float64),
        gradients("", torch.float32),
    )
    for name, *three in zip(tensors, found, exact, plain, strict=True):
        testing.assert_within_budget(*three, f"gradient of {name}", 3.0, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_rows_far_from_zero(backend, generator, offset):
    """One pass over sums of squares would lose everything: the variance is 1, the squared mean 1e8."""
    tensors = make(generator, (2, 9, 300))
    tensors["x"] += offset
    check(generator, tensors, backend)


def test_rows_of_one_value(backend, generator):
    tensors = make(generator, (2, 3, 65), gain="", residual=True)
    tensors["x"], tensors["residual"] = torch.full((2, 3, 65), 0.5), torch.full((2, 3, 65), 0.25)
    tensors["residual_bias"].zero_()
    out, s = film_layer_norm(**tensors, gain=None, backend=backend)
    assert torch.equal(out, tensors["bias"].expand_as(out)) and (s == 0.75).all()


def test_the_sum_is_that_of_the_inputs(backend, generator):
    tensors = make(generator, (2, 9, 40), torch.bfloat16, residual=True)
    exact = tensors["x"].double() + tensors["residual"].double() + tensors["residual_bias"].double()
    s = film_layer_norm(**tensors, backend=backend)[1]
    assert (s.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    whole = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    x, residual, bias = (t.expand(1, 1, 9).contiguous() for t in whole)
    assert (film_layer_norm(x, None, None, residual=residual, residual_bias=bias[0, 0], backend=backend)[1] == 6.0).all()


# --- Meaning ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(backend, generator, value):
    tensors = make(generator, (2, 20, 97), residual=True)
    grad = torch.randn(2, 20, 97, generator=generator)

    def run(poison):
        inputs = {n: t.clone() for n, t in tensors.items()}
        if poison:
            inputs["x"][1, 3, 5] = value
        x = inputs["x"].requires_grad_()
        results = film_layer_norm(**inputs, backend=backend)
        return *results, *torch.autograd.grad(results, x, (grad, grad))

    others = torch.ones(2, 20, dtype=torch.bool)
    others[1, 3] = False
    for clean, poisoned in zip(run(False), run(True), strict=True):
        assert torch.equal(clean[others], poisoned[others])
        assert not poisoned[1, 3, 5].isfinite()


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7)], ids=str)
@pytest.mark.parametrize("gain", ["c", "bc"])
def test_empty(backend, generator, shape, gain):
    tensors = {n: t.requires_grad_() for n, t in make(generator, shape, residual=True, gain=gain).items()}
    out, s = film_layer_norm(**tensors, backend=backend)
    assert out.shape == s.shape == shape
    for tensor, grad in zip(tensors.values(), torch.autograd.grad(out.sum(), list(tensors.values())), strict=True):
        assert grad.shape == tensor.shape and (grad == 0).all()


def test_same_bits_every_time(backend, generator):
    tensors = make(generator, (2, 150, 40), torch.bfloat16, residual=True)
    grad = cotangent(generator, tensors)
    first = testing.run(ours, tensors, tuple(tensors), grad, backend=backend)
    again = testing.run(ours, tensors, tuple(tensors), grad, backend=backend)
    assert torch.equal(first.output, again.output)
    assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in first.gradients)


def test_uninitialised_memory_is_never_read(backend, generator):
    tensors = make(generator, (2, 33, 41), second=5, residual=True)
    grad = cotangent(generator, tensors)
    clean = testing.run(ours, tensors, tuple(tensors), grad, backend=backend)
    with testing.poisoned_memory():
        poisoned = testing.run(ours, tensors, tuple(tensors), grad, backend=backend)
    assert torch.equal(clean.output, poisoned.output)
    assert all(torch.equal(clean.gradients[n], poisoned.gradients[n]) for n in clean.gradients)


def test_only_wanted_gradients_are_computed(backend, generator):
    tensors = make(generator, (2, 33, 24), second=4, residual=True)
    for wanted in (*((name,) for name in tensors), ("gain", "bias"), ("x2", "residual_bias")):
        check(generator, tensors, backend, wanted)


def test_leaves_keep_gradients_of_their_own(backend, generator):
    """Twice through the graph: what autograd adds in place to one leaf's gradient must not be memory of another's."""
    tensors = make(generator, (1, 5, 8), second=3, residual=True)
    sums = {}
    for passes in (1, 2):
        inputs = {n: t.clone().requires_grad_() for n, t in tensors.items()}
        out = ours(**inputs, backend=backend)
        for i in range(passes):
            out.square().sum().backward(retain_graph=i + 1 < passes)
        sums[passes] = {n: t.grad for n, t in inputs.items()}
    for name in tensors:
        torch.testing.assert_close(sums[2][name], 2 * sums[1][name])


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_what_is_saved(backend, generator, residual):
    """s (or x), the gain, and two numbers a row; nothing else of the rows' size."""
    tensors = {n: t.requires_grad_() for n, t in make(generator, (2, 101, 64), residual=residual).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = film_layer_norm(**tensors, backend=backend)
    assert sum(t.numel() for t in saved) == 2 * 101 * (64 + 2) + 2 * 64
    kept = result[1] if residual else tensors["x"]
    assert any(t.data_ptr() == kept.data_ptr() for t in saved)


def test_eps(backend, generator):
    x = torch.randn(1, 4, 40, generator=generator) * 1e-3
    for eps in (0.0, 1e-6, 1.0):
        torch.testing.assert_close(
            film_layer_norm(x, None, None, eps=eps, backend=backend), torch.nn.functional.layer_norm(x, (40,), eps=eps)
        )


# --- Choice, errors ---------------------------------------------------------------------------------------------------------

ROWS = torch.zeros(2, 3, 8)
WRONG = {
    "list": (dict(x=[ROWS]), ValueError, "x has 1 tensors; it must be a tensor or a pair"),
    "number": (dict(x=1.0), TypeError, "x is a float; it must be a tensor"),
    "rank": (dict(x=ROWS[0]), ValueError, r"x has shape \(3, 8\); it must have 3 dimensions \(B, T, C\)"),
    "integer": (dict(x=ROWS.int()), TypeError, "x has dtype torch.int32; it must be a floating-point tensor"),
    "channels": (dict(x=ROWS[..., :0]), ValueError, r"x has shape \(2, 3, 0\); its last size must be 1 or more"),
    "second": (dict(x=(ROWS, ROWS[:1])), ValueError, r"x\[1\] has shape \(1, 3, 8\); with .* it must be \(2, T2, 8\)"),
    "second dtype": (dict(x=(ROWS, ROWS.half())), TypeError, r"x\[1\] has dtype torch.float16; it must be that of x\[0\]"),
    "residual": (dict(residual=ROWS[:, :2]), ValueError, r"residual has shape \(2, 2, 8\); it must be \(2, 3, 8\)"),
    "residual dtype": (dict(residual=ROWS.half()), TypeError, "residual has dtype torch.float16; it must be that of x"),
    "residual bias": (dict(residual_bias=ROWS[0, 0]), ValueError, "residual_bias is given; it must be None without"),
    "bias shape": (
        dict(residual=ROWS, residual_bias=ROWS[:, 0]),
        ValueError,
        r"residual_bias has shape \(2, 8\); it must be \(8,\)",
    ),
    "gain": (dict(gain=torch.zeros(3, 8)), ValueError, r"gain has shape \(3, 8\); it must be \(8,\) or \(2, 8\)"),
    "gain size": (dict(gain=torch.zeros(7)), ValueError, r"gain has shape \(7,\); it must be \(8,\)"),
    "gain dtype": (dict(gain=torch.zeros(8).double()), TypeError, "gain has dtype torch.float64; it must be x's"),
    "gain sparse": (dict(gain=torch.zeros(8).to_sparse()), TypeError, "gain is a torch.sparse_coo tensor"),
    "device": (dict(bias=torch.zeros(8, device="meta")), ValueError, "bias is on meta; it must be on x's device, cpu"),
    "eps": (dict(eps=-1e-5), ValueError, "eps is -1e-05; it must be a finite number of 0 or more"),
    "eps text": (dict(eps="small"), TypeError, "eps is 'small'; it must be"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; allowed are"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, error, message = WRONG[case]
    for call in (film_layer_norm, lambda **kw: mmkernels.explain("film_layer_norm", **kw)):
        with pytest.raises(error, match=message):
            call(**{**dict(x=ROWS, gain=None, bias=None), **changes})


def test_what_auto_takes(on):
    on("cpp")
    assert mmkernels.explain("film_layer_norm", ROWS, None, None).backend == "cpp"
    told = mmkernels.explain("film_layer_norm", ROWS.double(), None, None)
    assert told.backend == "reference" and "it is an attention" in told.refusals["sdpa"]
    with pytest.raises(mmkernels.BackendError, match="dtype is torch.float64"):
        film_layer_norm(ROWS.double(), None, None, backend="cpp")


def test_the_reference_is_twice_differentiable(generator):
    tensors = {n: t.double().requires_grad_() for n, t in make(generator, (2, 2, 3), second=1, residual=True).items()}
    names = list(tensors)

    def function(*values):
        return ours(**dict(zip(names, values, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()))


def test_the_reference_is_plain_layer_norm(generator):
    tensors = make(generator, (2, 5, 16), torch.float64, second=2, residual=True)
    torch.testing.assert_close(ours(**tensors, backend="reference"), eager(**tensors))

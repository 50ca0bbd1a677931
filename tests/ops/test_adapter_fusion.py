"""`ops.adapter_fusion` on every backend: against float64 with plain eager's error as the budget, and by its meaning. What it
is inside torch is held by test_row_ops.py."""

import pytest
import torch

import mmkernels
from mmkernels import ops, testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fuse, eager = ops.adapter_fusion, testing.eager_adapter_fusion


def make(generator, leading, adapters, channels, dtype=torch.float32, *, width=None, values=None, without=()):
    def normal(*sizes, factor=1.0):
        return (torch.randn(sizes, generator=generator, device=generator.device) * factor).to(dtype)

    width, values = width or channels, values or channels
    tensors = {"query": normal(*leading, channels), "outputs": normal(*leading, adapters, channels)}
    tensors |= {"w_q": normal(width, channels, factor=channels**-0.5), "b_q": normal(width)}
    tensors |= {"w_k": normal(width, channels, factor=width**-0.5 * channels**-0.5), "b_k": normal(width)}
    tensors |= {"w_v": normal(values, channels, factor=channels**-0.5), "residual": normal(*leading, values)}
    return {n: None if n in without else t for n, t in tensors.items()}


def wanted_of(tensors):
    return tuple(n for n, t in tensors.items() if t is not None)


def check(generator, tensors, backend, wanted=None, **options):
    out = eager(**tensors)
    grad = torch.randn(out.shape, generator=generator, device=generator.device)
    with testing.poisoned_memory():
        return testing.check_op(fuse, eager, tensors, wanted or wanted_of(tensors), backend, grad, **options)


PROBLEMS = {
    "8 adapters": (((2, 9), 8, 48), {}),
    "odd": (((3, 7), 3, 63), dict(width=20, values=97)),
    "one adapter": (((2, 5), 1, 16), {}),
    "static": (((2, 9), 5, 33), dict(without=("w_v", "residual"))),
    "no biases": (((2, 9), 16, 40), dict(without=("b_q", "b_k"))),
    "rows": (((17,), 4, 111), {}),
    "four dimensions": (((2, 2, 3), 4, 24), {}),
    "one by one": (((1, 1), 1, 1), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_matches_float64(backend, generator, problem, dtype):
    sizes, options = PROBLEMS[problem]
    tensors = make(generator, *sizes, dtype, **options)
    wanted = tuple(n for n in wanted_of(tensors) if n != "b_k")
    check(generator, tensors, backend, wanted, temperature=2.0)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_reference_is_what_plain_torch_makes(generator, problem):
    sizes, options = PROBLEMS[problem]
    tensors = make(generator, *sizes, torch.float64, **options)
    options = dict(temperature=1.7)
    ours = testing.run(fuse, tensors, wanted_of(tensors), backend="reference", **options)
    plain = testing.run(eager, tensors, wanted_of(tensors), **options)
    torch.testing.assert_close(ours.output, plain.output)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient)


def test_a_temperature_flattens(backend, generator):
    tensors = make(generator, (2, 5), 4, 24)
    run, exact = (testing.run(fuse, tensors, wanted_of(tensors), backend=b, temperature=3.0) for b in (backend, "reference"))
    torch.testing.assert_close(run.output, exact.output)
    for name in tensors:
        torch.testing.assert_close(run.gradients[name], exact.gradients[name], rtol=1e-4, atol=1e-5)
    hot = fuse(**tensors | {"w_v": None, "residual": None}, temperature=1e6, backend=backend)
    torch.testing.assert_close(hot, tensors["outputs"].mean(-2), rtol=1e-3, atol=1e-4)


def test_the_bias_of_the_keys_has_a_gradient_of_zero(backend, generator):
    run = testing.run(fuse, make(generator, (2, 5), 4, 24), ("b_k", "w_k"), backend=backend)
    assert not run.gradients["b_k"].any() and run.gradients["w_k"].any()


def test_without_projections_it_is_an_attention_over_the_outputs(backend, generator):
    query, outputs = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 4, 5, 8, generator=generator)
    p = torch.einsum("btc,btac->bta", query, outputs).softmax(-1)
    out = fuse(query, outputs, *(None,) * 5, backend=backend)
    torch.testing.assert_close(out, torch.einsum("bta,btac->btc", p, outputs))


@pytest.mark.parametrize("layout", ["adapters first", "sliced", "transposed", "expanded"])
def test_any_strides(backend, generator, layout):
    tensors = make(generator, (3, 9), 4, 32)

    def changed(name, t):
        if layout == "sliced":
            return torch.stack([t, t], -1).flatten(-2)[..., ::2]
        if layout == "adapters first":  # a stack of the outputs of one adapter after the other
            return t.movedim(2, 0).contiguous().movedim(0, 2) if name == "outputs" else t
        if layout == "expanded":
            return t[:1].expand_as(t) if name in ("query", "outputs") else t
        return t.mT.contiguous().mT if t.dim() > 1 else t

    tensors = {n: changed(n, t) for n, t in tensors.items()}
    wanted = tuple(n for n in tensors if n != "b_k" and not (layout == "expanded" and n in ("query", "outputs")))
    run = check(generator, tensors, backend, wanted)
    testing.run(fuse, tensors, wanted, backend=backend)  # an incoming gradient of stride 0
    packed = testing.run(fuse, {n: t.contiguous() for n, t in tensors.items()}, (), backend=backend)
    torch.testing.assert_close(run.output, packed.output)


@pytest.mark.parametrize("leading", [(0, 7), (3, 0), (0,)], ids=str)
def test_empty_batches(backend, generator, leading):
    tensors = make(generator, leading, 4, 24)
    run = testing.run(fuse, tensors, wanted_of(tensors), backend=backend)
    assert run.output.shape == (*leading, 24)
    assert all(g.shape == tensors[n].shape and not g.any() for n, g in run.gradients.items())


def test_nan_rows_stay_alone(backend, generator):
    tensors = make(generator, (2, 9), 4, 33)
    tensors["outputs"][1, 4, 2, 7] = float("nan")
    run = testing.run(fuse, tensors, ("query",), backend=backend)
    for result in (run.output, run.gradients["query"]):
        rows = result.isnan().any(-1)
        assert rows[1, 4] and rows.sum() == 1


def test_scores_of_any_size(backend, generator):
    tensors = make(generator, (2, 9), 4, 16)
    tensors["query"] *= 1e4
    run, exact = (testing.run(fuse, tensors, ("outputs",), backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(run.output, exact.output, rtol=1e-3, atol=1e-3)


def test_the_number_of_threads_changes_no_bit(on, generator):
    on("cpp")
    tensors, before, runs = make(generator, (3, 900), 4, 96, without=("w_q", "w_k", "w_v")), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(testing.run(fuse, tensors, ("query", "outputs"), backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert torch.equal(runs[0].output, other.output)
        assert all(torch.equal(runs[0].gradients[n], other.gradients[n]) for n in runs[0].gradients)


def test_reference_in_float64_has_two_derivatives(generator):
    tensors = make(generator, (2, 3), 3, 5, torch.float64)
    inputs = [t.requires_grad_() for t in tensors.values()]
    call = lambda *values: fuse(**dict(zip(tensors, values, strict=True)), backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def arguments(**changes):
    tensors = {"query": torch.zeros(2, 3, 8), "outputs": torch.zeros(2, 3, 4, 8), "w_q": torch.zeros(6, 8), "b_q": None}
    return tensors | {"w_k": torch.zeros(6, 8), "b_k": None, "w_v": torch.zeros(5, 8)} | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(query=torch.zeros(2, 3, 8).int()), TypeError, "query has dtype torch.int32"),
        (dict(outputs=torch.zeros(2, 3, 8)), ValueError, r"outputs has shape \(2, 3, 8\); with query .* \(2, 3, A, 8\)"),
        (dict(outputs=torch.zeros(2, 3, 0, 8)), ValueError, "A of 1 or more"),
        (dict(outputs=torch.zeros(2, 3, 4, 8).half()), TypeError, "outputs has dtype torch.float16; it must be query's"),
        (dict(w_q=torch.zeros(6, 7)), ValueError, r"w_q has shape \(6, 7\); it must be \(6, 8\)"),
        (dict(w_k=torch.zeros(8, 8)), ValueError, r"w_k has shape \(8, 8\); it must be \(6, 8\)"),
        (dict(w_k=None), ValueError, r"w_k is None; with w_q \(6, 8\) it must be \(6, 8\)"),
        (dict(b_k=torch.zeros(8)), ValueError, r"b_k has shape \(8,\); it must be \(6,\)"),
        (dict(w_v=torch.zeros(8)), ValueError, r"w_v has shape \(8,\)"),
        (dict(residual=torch.zeros(2, 3, 8)), ValueError, r"residual has shape \(2, 3, 8\); it must be \(2, 3, 5\)"),
        (dict(temperature=0.0), ValueError, "temperature is 0.0; it must be a number above 0"),
        (dict(backend="sdpa"), mmkernels.BackendError, "it is an attention"),
    ],
    ids=str,
)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        fuse(**arguments(**changes))

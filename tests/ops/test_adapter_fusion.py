"""`ops.adapter_fusion` on every backend: against float64 with plain eager's error as the budget, and by its meaning. What it
is inside torch is held by test_row_ops.py."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmkernels
from mmkernels import ops, testing
from mmkernels.ops._shared.dropout import keep_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
fuse = ops.adapter_fusion


def eager(outputs, dropout_p=0.0, dropout_seed=None, **options):
    """Plain eager, with dropout by the counter."""
    kept = None
    if dropout_p:
        shape = outputs.shape[:-1]
        kept = keep_mask(dropout_seed, (1, 1, shape[:-1].numel(), shape[-1]), dropout_p).view(shape) / (1.0 - dropout_p)
    return testing.eager_adapter_fusion(outputs=outputs, kept=kept, **options)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_dropped_scores_match_float64(backend, generator, tensor_device, problem, dtype):
    """Here b_k and a residual of the outputs have their part in the scores."""
    sizes, options = PROBLEMS[problem]
    tensors = make(generator, *sizes, dtype, **options)
    tensors["input_residual"] = torch.randn_like(tensors["query"], generator=generator)
    seed = torch.tensor([-(2**62) + 77], device=tensor_device)
    check(generator, tensors, backend, temperature=1.3, dropout_p=0.4, dropout_seed=seed)


def test_every_backend_drops_the_same_scores(backend, generator, tensor_device):
    """All scores are alike; those that are kept become larger by log 100 than those that are dropped."""
    shape, p, seed = (3, 11, 70), 0.3, torch.tensor([5], device=tensor_device)
    query = torch.full((3, 11, 8), 0.125 * math.log(100.0) * (1.0 - p))
    options = dict(dropout_p=p, dropout_seed=seed, return_weights=True, backend=backend)
    _, weights = fuse(query, torch.ones(*shape, 8), *(None,) * 5, **options)
    kept = keep_mask(seed, (1, 1, 33, 70), p).view(shape)
    assert kept.any(-1).all() and 0.65 < kept.float().mean() < 0.75
    assert torch.equal(weights > 0.5 * weights.amax(-1, keepdim=True), kept)


def test_dropout_draws_its_seed_and_a_checkpoint_draws_it_again(backend, generator):
    tensors = {n: t.requires_grad_() for n, t in make(generator, (3, 9), 5, 32).items()}
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        call = lambda t: fuse(**t, dropout_p=0.4, backend=backend)  # noqa: E731
        out = checkpoint(call, tensors, use_reentrant=False) if wrapped else call(tensors)
        gradients.append(torch.autograd.grad(out.square().sum(), list(tensors.values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    torch.manual_seed(4)
    assert not torch.equal(fuse(**tensors, dropout_p=0.4, backend=backend), out)


@pytest.mark.parametrize("leading", [(2, 9), (2, 2, 3), (5,), ()], ids=str)
def test_weights_come_with_the_result(backend, generator, leading):
    tensors = make(generator, leading, 4, 24)
    tensors["query"].requires_grad_()
    (out, weights), (_, exact) = (fuse(**tensors, return_weights=True, backend=b) for b in (backend, "reference"))
    assert torch.equal(out, fuse(**tensors, backend=backend)) and not weights.requires_grad
    assert weights.shape == (*leading, 4) and weights.dtype == torch.float32
    torch.testing.assert_close(weights, exact)


@pytest.mark.parametrize("name", ["query", "outputs", "w_q", "b_k", "input_residual"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_one_gradient_alone(backend, generator, tensor_device, name, dropout_p):
    tensors = make(generator, (2, 9), 5, 24)
    tensors["input_residual"] = torch.randn_like(tensors["query"], generator=generator)
    check(generator, tensors, backend, (name,), dropout_p=dropout_p, dropout_seed=torch.tensor([1], device=tensor_device))


# Rows that the blocks of the GPU kernels hold and rows that they walk: more adapters than a chunk, or a warp, has; more
# channels than a block has, of 16 bytes and one by one.
@pytest.mark.parametrize(
    "adapters, channels, dtype",
    [
        (11, 264, torch.bfloat16),
        (37, 72, torch.float32),
        (3, 2052, torch.float32),
        (64, 520, torch.bfloat16),
        (9, 517, torch.float16),
        (3, 4100, torch.float32),
        (5, 8200, torch.bfloat16),
        (4, 1031, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_rows_of_every_size(backend, generator, tensor_device, monkeypatch, adapters, channels, dtype, dropout_p):
    monkeypatch.setenv("MMKERNELS_EMULATOR_SEED", str(adapters))
    tensors = make(generator, (1, 3), adapters, channels, dtype, without=("w_q", "b_q", "w_k", "b_k", "w_v", "residual"))
    tensors["query"] *= channels**-0.5
    check(generator, tensors, backend, dropout_p=dropout_p, dropout_seed=torch.tensor([1], device=tensor_device))


def test_outputs_further_apart_than_32_bits_reach(backend, generator):
    """Across 2^31 elements, in virtual memory of which only the rows are touched."""
    tensors = make(generator, (2, 9), 3, 24)
    step = 2**28 + 64
    far = torch.empty(18 * step).as_strided((2, 9, 3, 24), (9 * step, step, step // 4, 1)).copy_(tensors["outputs"])
    expected, actual = (testing.run(fuse, t, ("query",), backend=backend) for t in (tensors, tensors | {"outputs": far}))
    assert torch.equal(expected.output, actual.output) and torch.equal(*(r.gradients["query"] for r in (expected, actual)))


def test_more_adapters_than_the_gpu_kernels_take(on, generator):
    tensors = make(generator, (1, 1), 4097, 1, torch.bfloat16)
    for name in ("triton", "cuda"):
        on(name)
        with pytest.raises(mmkernels.BackendError, match="outputs are those of 4097 adapters, it takes up to 4096"):
            fuse(**tensors, backend=name)
    tensors = {n: t[..., 1:, :] if n == "outputs" else t for n, t in tensors.items()}
    for name in ("triton", "cuda"):
        testing.check_op(fuse, eager, tensors, ("query", "outputs"), name)


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
        (dict(input_residual=torch.zeros(2, 3, 5)), ValueError, r"input_residual has shape \(2, 3, 5\); .* \(2, 3, 8\)"),
        (dict(temperature=0.0), ValueError, "temperature is 0.0; it must be a number above 0"),
        (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0"),
        (dict(dropout_p=0.5, dropout_seed=torch.zeros(1)), ValueError, "dropout_seed has shape"),
        (dict(backend="sdpa"), mmkernels.BackendError, "it is an attention"),
    ],
    ids=str,
)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        fuse(**arguments(**changes))

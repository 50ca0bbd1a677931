"""What only the GPU kernels of adapters have (tiles of rows by adapter, chunks of wide bottlenecks, parts of the rows that
sum for themselves) in Triton's interpreter and in the emulator."""

import pytest
import torch
from test_adapter import adapter, check, make, wanted_of

from mmkernels import testing
from mmkernels.ops._shared.registration import forward_backward

EVERYTHING = dict(norms="in out", terms=("x", "extra"), scale="channels", gate="rows")


@pytest.fixture(params=["triton", "cuda"])
def backend(request, on):
    return on(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bottleneck", [80, 150])
def test_bottlenecks_of_several_chunks(backend, generator, bottleneck, dtype):
    tensors = make(generator, (2, 9, 70), bottleneck, dtype, **EVERYTHING)
    check(generator, tensors, backend, terms=EVERYTHING["terms"], activation="swish")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_of_any_size(backend, generator, dtype):
    """Several tiles of one adapter, few rows, none: rows without an adapter get their residuals alone, and what is in an
    adapter that nobody has does not matter."""
    tensors = make(generator, (3, 61, 40), 10, dtype, bank=5, index="rows", **EVERYTHING)
    index = tensors["index"]
    index[index == 3] = -1
    index[index == 2] = 0
    index[0, 7] = 2
    for name in ("w_down", "b_down", "w_up", "b_up", "scale"):
        tensors[name][3] = 0.0
    ours = check(generator, tensors, backend, terms=EVERYTHING["terms"], activation="gelu")
    assert all(not ours.gradients[n][3].any() for n in ("w_down", "b_down", "w_up", "b_up", "scale"))
    poisoned = dict(tensors)
    for name in ("w_down", "b_down", "w_up", "b_up", "scale"):
        poisoned[name] = tensors[name].clone()
        poisoned[name][3] = float("nan")
    cotangent = torch.randn(3, 61, 40, generator=generator)
    options = dict(backend=backend, terms=EVERYTHING["terms"], activation="gelu")
    first, second = (testing.run(adapter, t, wanted_of(t), cotangent, **options) for t in (tensors, poisoned))
    assert torch.equal(first.output, second.output)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


def test_long_examples_keep_their_order(backend, generator):
    made = dict(bank=3, norms="in", terms=("x", "input_residual"), scale="one", gate="examples")
    tensors = make(generator, (4, 64, 24), 9, **made)
    tensors["index"] = torch.tensor([2, -1, 0, 2])
    check(generator, tensors, backend, terms=made["terms"])


def test_a_number_that_is_no_adapters(backend, generator):
    """NaN rows, and no part in the gradients of the weights."""
    tensors = make(generator, (2, 5, 24), 9, bank=3, index="rows")
    x, index = tensors["x"], tensors["index"]
    weights = tuple(tensors[n] for n in ("w_down", "b_down", "w_up", "b_up"))
    forward, backward = forward_backward("adapter", backend)
    options = (1, 1, 1e-5, 1e-5, 1.0, 0.0)
    results = {}
    for number in (-1, 7):
        index[1, 2] = number
        given = (x, None, None, *weights, None, None, None, None, None, None, index, None)
        out, statistics = forward(*given, *options)
        results[number] = out, backward(torch.ones_like(x), *given, statistics, *options, 0b1111000)
    (none, of_none), (wrong, of_wrong) = results[-1], results[7]
    assert torch.equal(none[1, 2], x[1, 2]) and wrong[1, 2].isnan().all()
    wrong[1, 2] = none[1, 2]
    assert torch.equal(none, wrong)
    assert all(torch.equal(a, b) for a, b in zip(of_none, of_wrong, strict=True))


@pytest.mark.parametrize(
    "made", [dict(norms="out", gate="rows", terms=("x",)), dict(bank=2, index="rows", scale="channels")], ids=str
)
def test_dropout_is_that_of_the_reference(backend, generator, made):
    tensors = make(generator, (2, 7, 33), 5, **made)
    seed = torch.tensor([1 << 40], dtype=torch.int64)
    cotangent = torch.randn(2, 7, 33, generator=generator)
    options = dict(dropout_p=0.4, dropout_seed=seed, activation="tanh", terms=made.get("terms", ()))
    ours = testing.run(adapter, tensors, wanted_of(tensors), cotangent, backend=backend, **options)
    exact = testing.run(adapter, tensors, wanted_of(tensors), cotangent, backend="reference", **options)
    torch.testing.assert_close(ours.output, exact.output, atol=1e-5, rtol=1e-5)
    for name, gradient in exact.gradients.items():
        error = testing.max_error(ours.gradients[name], gradient)
        assert error <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_every_gradient_alone_and_the_same_bits(backend, generator):
    made = EVERYTHING | dict(terms=("x", "input_residual", "extra"))
    tensors = make(generator, (2, 11, 40), 10, **made)
    cotangent = torch.randn(2, 11, 40, generator=generator)
    options = dict(backend=backend, terms=made["terms"])
    with testing.poisoned_memory():
        together = testing.run(adapter, tensors, wanted_of(tensors), cotangent, **options)
        for name in wanted_of(tensors):
            alone = testing.run(adapter, tensors, (name,), cotangent, **options)
            assert torch.equal(alone.gradients[name], together.gradients[name]), name
            assert torch.equal(alone.output, together.output)


def test_any_strides(backend, generator):
    tensors = make(generator, (3, 8, 21), 6, norms="out", terms=("x", "extra"), scale="channels", gate="examples")
    expected = testing.run(adapter, tensors, wanted_of(tensors), backend=backend, terms=("x", "extra"))
    strided = dict(tensors)
    strided["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["extra"] = tensors["extra"].mT.contiguous().mT
    strided["w_down"], strided["w_up"] = (tensors[n].t().contiguous().t() for n in ("w_down", "w_up"))
    for name in ("b_up", "out_norm_weight", "scale"):
        strided[name] = torch.stack([tensors[name], tensors[name]], -1)[..., 0]
    ours = testing.run(adapter, strided, wanted_of(strided), backend=backend, terms=("x", "extra"))
    assert torch.equal(ours.output, expected.output)
    for name, gradient in expected.gradients.items():
        assert torch.equal(ours.gradients[name], gradient), name


def test_no_rows(backend, generator):
    tensors = make(generator, (0, 8, 21), 6, norms="in out", bank=2)
    ours = testing.run(adapter, tensors, wanted_of(tensors), backend=backend)
    assert ours.output.shape == (0, 8, 21) and not ours.gradients["w_up"].any()

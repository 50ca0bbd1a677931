"""`linear` against float64 and within the budget of plain PyTorch, its lists, its sums' order, and its choice of backend."""

import pytest
import torch
from torch.nn import functional as F

import mmkernels
from mmkernels import _library
from mmkernels.ops import linear
from mmkernels.ops._shared.registration import forward_backward
from mmkernels.testing import assert_within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows, in, out): tiles and panels exactly, one more, one less; sums in one stretch and in several; nothing to do
SIZES = [
    (1, 1, 1),
    (12, 16, 32),
    (13, 17, 33),
    (11, 191, 31),
    (97, 193, 111),
    (63, 769, 97),
    (5, 2000, 3),
    (0, 8, 5),
    (300, 40, 900),
]


@pytest.fixture(autouse=True)
def cpp(on):
    on("cpp")


def make(generator, rows, k, n, dtype=torch.float32):
    tensors = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator) / k**0.5
    return [t.to(dtype).requires_grad_() for t in (*tensors, torch.randn(n, generator=generator))]


def results(function, tensors, cotangent):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, cotangent)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_float64(generator, sizes, dtype):
    tensors = make(generator, *sizes, dtype)
    cotangent = torch.randn(sizes[0], sizes[2], generator=generator).to(dtype)
    ours = results(lambda *t: linear(*t, backend="cpp"), tensors, cotangent)
    eager = results(F.linear, tensors, cotangent)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    exact = results(F.linear, wide, cotangent.double())
    for name, a, e, x in zip(("out", "dx", "dweight", "dbias"), ours, eager, exact, strict=True):
        assert a.dtype == dtype and a.shape == x.shape
        assert_within_budget(a, x, e, name)


def test_any_strides(generator):
    x, weight, bias = make(generator, 30, 70, 50)
    cotangent = torch.randn(30, 50, generator=generator)
    expected = results(lambda *t: linear(*t, backend="cpp"), (x, weight, bias), cotangent)
    apart = torch.zeros(30, 140)
    apart[:, ::2] = x.detach()
    moved = apart[:, ::2].requires_grad_(), weight.detach().T.contiguous().T.requires_grad_(), bias
    for incoming in (cotangent, cotangent.T.contiguous().T):
        for a, b in zip(expected, results(lambda *t: linear(*t, backend="cpp"), moved, incoming), strict=True):
            assert torch.equal(a, b)
    ones = torch.ones(()).expand(30, 50)
    for a, b in zip(*(results(lambda *t: linear(*t, backend="cpp"), moved, c) for c in (ones, ones.clone())), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_gradients_that_are_wanted(generator, frozen):
    tensors = make(generator, 40, 30, 20)
    for i in frozen:
        tensors[i].requires_grad_(False)
    linear(*tensors, backend="cpp").square().sum().backward()
    found = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    F.linear(*tensors).square().sum().backward()
    for i, (a, t) in enumerate(zip(found, tensors, strict=True)):
        assert (a is None) == (i in frozen)
        if a is not None:
            torch.testing.assert_close(a, t.grad, rtol=1e-4, atol=1e-4)


def test_a_list_is_its_elements(generator):
    """Unequal sizes, more dimensions, no bias, a shared weight, and outputs that nobody uses."""
    a, b, c = (make(generator, *sizes) for sizes in ((24, 48, 32), (2, 48, 32), (35, 20, 10)))
    x = [a[0].view(2, 3, 4, 48), b[0], c[0]]
    weight, bias = [a[1], a[1], c[1]], [a[2], None, c[2]]
    outs = linear(x, weight, bias, backend="cpp")
    for out, *layer in zip(outs, x, weight, bias, strict=True):
        assert torch.equal(out, linear(*layer, backend="cpp"))
        assert out.shape == (*layer[0].shape[:-1], layer[1].shape[0])
    found = torch.autograd.grad(outs[0].sum() + outs[1].square().sum(), [a[0], a[1], b[0], c[1]], allow_unused=True)
    plain = F.linear(x[0], a[1], a[2]).sum() + F.linear(b[0], a[1]).square().sum()
    for g, e in zip(found, torch.autograd.grad(plain, [a[0], a[1], b[0], c[1]], allow_unused=True), strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_same_bits_for_any_number_of_threads(generator):
    tensors = make(generator, 500, 400, 700)
    cotangent = torch.randn(500, 700, generator=generator)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(lambda *t: linear(*t, backend="cpp"), tensors, cotangent))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_opcheck(generator):
    x, weight, bias = (t.detach() for t in make(generator, 9, 8, 7))
    forward, backward = forward_backward("linear", "cpp")
    torch.library.opcheck(forward, ([x, x.mT.contiguous().mT], [weight, weight], [bias, x.new_empty(0)]))
    dout = torch.randn(9, 7, generator=generator)
    torch.library.opcheck(backward, ([dout, dout.mT.contiguous().mT], [x, x], [weight, weight], [7, 1]))


def test_compiles_whole_and_once_for_every_length(generator):
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()

    def model(x, weight, bias):
        return sum(y.sum() for y in linear([x, x * 2.0], [weight, weight], [bias, None], backend="cpp"))

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(model, fullgraph=True, dynamic=True, backend=counting)
    for rows in (9, 17, 33):
        tensors = make(generator, rows, 24, 10)
        expected, actual = model(*tensors), compiled(*tensors)
        assert torch.equal(actual, expected)
        for pair in zip(*(torch.autograd.grad(o, tensors) for o in (actual, expected)), strict=True):
            assert torch.equal(*pair)
        counted(*tensors)
    assert len(compilations) == 1


def test_autocast_is_that_of_linear(generator):
    tensors = make(generator, 20, 30, 10)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("auto", "cpp", "reference"):
            out = linear(*tensors, backend=backend)
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out, F.linear(*tensors), rtol=2e-2, atol=2e-2)
        assert mmkernels.explain("linear", *tensors).backend == "reference"


def test_what_auto_takes(generator, monkeypatch):
    many, few = make(generator, 64, 30, 10), make(generator, 63, 30, 10)
    for slow, expected in ((True, ("cpp", "reference")), (False, ("reference", "reference"))):
        monkeypatch.setattr(_library, "SLOW_MKL", slow)
        assert tuple(mmkernels.explain("linear", *t).backend for t in (many, few)) == expected
    assert mmkernels.explain("linear", *(t.bfloat16() for t in many)).backend == "reference"
    with pytest.raises(mmkernels.BackendError, match="triton: a library's matrix products"):
        linear(*many, backend="triton")
    with pytest.raises(mmkernels.BackendError, match="dtype is torch.float64"):
        linear(*(t.double() for t in many), backend="cpp")


def test_second_derivatives_and_vmap_are_refused(generator):
    x, weight, bias = make(generator, 6, 5, 4)
    (dx,) = torch.autograd.grad(linear(x, weight, bias, backend="cpp").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"mmkernels\.ops\.linear has no second derivative"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match="has no vmap rule"):
        torch.vmap(lambda one: linear(one, weight, bias, backend="cpp"))(torch.randn(3, 6, 5))


X, W = torch.zeros(2, 3, 8), torch.zeros(4, 8)
BAD = [
    (([], []), ValueError, "x is an empty list; it must have one tensor or more"),
    (([1.0], [W]), TypeError, r"x\[0\] is a float"),
    ((X.long(), W), TypeError, "x has dtype torch.int64"),
    ((torch.zeros(()), W), ValueError, r"x has shape \(\); it must be \(..., K\)"),
    ((X, torch.zeros(4, 7)), ValueError, r"weight has shape \(4, 7\); it must be \(N, 8\)"),
    ((X, W.double()), TypeError, "weight has dtype torch.float64; it must be that of x"),
    ((X, W, torch.zeros(5)), ValueError, r"bias has shape \(5,\); it must be \(4,\)"),
    ((X, W, torch.zeros(4).half()), TypeError, "bias has dtype torch.float16"),
    (([X, X], [W]), ValueError, "weight has 1 elements; it must have one for each of x, 2"),
    (([X], W), TypeError, "weight is a Tensor; it must be a list"),
    (([X, X.double()], [W, W.double()]), TypeError, r"x\[1\] has dtype torch.float64; it must be that of x\[0\]"),
    ((X, W.to("meta")), ValueError, "weight is on meta; it must be on x's device, cpu"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments(arguments, error, message):
    for function in (linear, lambda *a: mmkernels.explain("linear", *a)):
        with pytest.raises(error, match=message):
            function(*arguments)

"""The CUDA kernels of the decoder, their own source in the emulator: every tile, thread order, copy timing and split.

What the op means is tested for all backends in test_latent_decode.py; here is what only these kernels have.
"""

import pytest
import torch

from mmkernels import testing
from mmkernels.ops._shared.registration import forward_backward
from mmkernels.ops.latent import decode_reference

NAMES = ("out", "lse", "dqueries", "dposition", "dk", "dbias", "dv")
SM80, SM90 = 163 * 1024, 227 * 1024  # bytes of shared memory a block


@pytest.fixture
def ops(on):
    return forward_backward("latent", on("cuda"), "latent_decode")


@pytest.fixture
def emulator(monkeypatch):
    """emulator(seed=.., copies=.., multiprocessors=.., shared=..): what the emulator reads at every launch."""

    def set(**options):
        for name, value in options.items():
            monkeypatch.setenv(f"MMKERNELS_EMULATOR_{name.upper()}", str(value))

    return set


def make(generator, sizes, channels, heads=1, dtype=torch.float32, shared=False, mask=False):
    """Arguments of latent_decode_fwd for (B, O, M) and (Cx, Cp, E), without scale and eps, and the gradient of out."""
    (b, o, m), (content, position, e) = sizes, channels
    c = content + position

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    arguments = [
        normal(1 if shared else b, o, content),
        normal(o, position) if position else None,
        torch.rand(b, o, generator=generator) < 0.7 if mask else None,
        normal(b, heads, m, c),
        torch.randn(b, heads, m, generator=generator),
        normal(b, heads, m, e),
        normal(e),
        torch.rand(b, m, generator=generator) < 0.7 if mask else None,
    ]
    return arguments, normal(b, o, e)


def run(ops, arguments, dout, eps=1e-5, wanted=7):
    """(out, lse, dqueries, dposition, dk, dbias, dv) of the kernels."""
    forward, backward = ops
    scale = arguments[3].shape[3] ** -0.5
    out, lse = forward(*arguments, scale, eps)
    return out, lse, *backward(dout, *arguments, out, lse, scale, eps, wanted)


def plain(queries, position, query_mask, k, bias, v, out_bias, key_mask, scale, eps):
    """decode_reference.core with xhat, products and weights in the inputs' dtype."""
    xhat = decode_reference._normalised(queries, position, query_mask, k.shape[0], eps)[:, None].to(k.dtype)
    if key_mask is not None:
        k, v = (torch.where(key_mask[:, None, :, None], t, 0.0) for t in (k, v))
    scores = (xhat @ k.transpose(-1, -2) + bias[:, :, None].to(k.dtype)) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
    out = (scores.softmax(-1) @ v).sum(1)
    if query_mask is not None:
        out = torch.where(query_mask[..., None], out, 0.0)
    return out + out_bias, scores.float().logsumexp(-1)


def differentiate(function, arguments, dout, dtype, eps):
    inputs = [t if t is None or not t.is_floating_point() else t.to(dtype).requires_grad_() for t in arguments]
    out, lse = function(*inputs, arguments[3].shape[3] ** -0.5, eps)
    wanted = [inputs[i] for i in (0, 1, 3, 4, 5)]
    gradients = iter(torch.autograd.grad(out, [t for t in wanted if t is not None], dout.to(out.dtype)))
    return out, lse, *(None if t is None else next(gradients) for t in wanted)


def check(ops, arguments, dout, eps=1e-5):
    ours = run(ops, arguments, dout, eps)
    exact = differentiate(decode_reference.core, arguments, dout, torch.float64, eps)
    eager = differentiate(plain, arguments, dout, arguments[0].dtype, eps)
    for name, *three in zip(NAMES, ours, exact, eager, strict=True):
        if three[1] is None:
            continue
        if name == "lse" and arguments[2] is not None:  # of hidden queries it may be anything
            three = [torch.where(arguments[2][:, None], t, 0.0) for t in three]
        testing.assert_within_budget(*three, name, 2.0 if name in ("out", "lse") else 3.0)
    return ours


def same_bits(first, second):
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {i} of {len(first)}"


@pytest.mark.parametrize("shared", [SM80, SM90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "sizes, channels",
    [
        ((1, 70, 70), (64, 0, 64)),
        ((1, 97, 70), (3, 258, 288)),
        ((1, 70, 97), (64, 258, 322)),
        ((1, 33, 35), (512, 0, 700)),
        ((1, 17, 18), (1024, 0, 1024)),
        ((1, 33, 70), (20, 0, 1024)),
        ((1, 70, 33), (500, 24, 20)),
    ],
    ids=str,
)
def test_every_tile(ops, generator, emulator, sizes, channels, dtype, shared):
    """Few and many rows, narrow and wide keys and values, with both amounts of shared memory of the supported GPUs."""
    emulator(shared=shared)
    check(ops, *make(generator, sizes, channels, dtype=dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_splits(ops, generator, emulator, dtype):
    """One multiprocessor walks over all queries; 256 split them, the last split shorter than the others."""
    arguments, dout = make(generator, (2, 300, 21), (3, 18, 20), 2, dtype, mask=True)
    arguments[2][0, 100:] = False  # whole splits without a query that counts
    emulator(multiprocessors=1)
    whole = check(ops, arguments, dout)
    emulator(multiprocessors=256)
    parts = check(ops, arguments, dout)
    assert not all(torch.equal(a, b) for a, b in zip(whole[4:], parts[4:], strict=True)), "the queries were not split"
    same_bits(parts, run(ops, arguments, dout))


@pytest.mark.parametrize("heads", (1, 2))
def test_shared_queries_are_read_once_or_for_each_example(ops, generator, emulator, heads):
    """With enough tiles a block takes all examples: the same bits."""
    arguments, dout = make(generator, (3, 300, 21), (10, 6, 12), heads, shared=True, mask=True)
    emulator(multiprocessors=1)
    together = check(ops, arguments, dout)
    emulator(multiprocessors=256)
    apart = run(ops, arguments, dout)
    same_bits(together[:4], apart[:4])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("heads", (1, 2))
def test_only_what_is_wanted(ops, generator, heads, shared):
    arguments, dout = make(generator, (2, 35, 17), (6, 10, 12), heads, torch.bfloat16, shared)
    everything = run(ops, arguments, dout)
    for wanted in range(8):
        some = run(ops, arguments, dout, wanted=wanted)
        for bit, name, a, b in zip((1, 2, 4, 4, 4), NAMES[2:], everything[2:], some[2:], strict=True):
            assert torch.equal(a, b) if wanted & bit else b.numel() == 0, (wanted, name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("channels", [(12, 9, 20), (3, 258, 33), (400, 0, 500)], ids=str)
def test_any_order_of_threads_and_copies(ops, generator, emulator, channels, dtype):
    """A missing barrier or wait gives other bits in some order. Several tiles of latents and of queries."""
    sizes = (2, 140, 130) if channels[2] < 100 else (1, 70, 70)
    arguments, dout = make(generator, sizes, channels, 2 if channels[2] < 30 else 1, dtype, mask=True)
    emulator(multiprocessors=1, copies="late", seed=0)
    first = check(ops, arguments, dout)
    for seed, copies in ((1, "early"), (2, "random"), (3, "late"), (4, "random")):
        emulator(seed=seed, copies=copies)
        same_bits(first, run(ops, arguments, dout))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("columns", (9, 10, 16))
def test_any_strides(ops, generator, dtype, columns):
    """Gaps between the elements of every argument, dout rows at any address: the bits of dense arguments."""
    arguments, dout = make(generator, (2, 35, 17), (6, 11, columns), 2, dtype, mask=True)
    dense = run(ops, arguments, dout)

    def every_second(t):
        wide = torch.full([2 * n for n in t.shape], float("nan") if t.is_floating_point() else 1).to(t.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
        view.copy_(t)
        return view

    same_bits(dense, run(ops, [None if t is None else every_second(t) for t in arguments], every_second(dout)))
    odd = torch.empty(dout.numel() + 1, dtype=dtype)[1:].view_as(dout).copy_(dout)
    same_bits(dense, run(ops, arguments, odd))


@pytest.mark.parametrize("eps", (1e-5, -1.0))
@pytest.mark.parametrize("shared", [False, True])
def test_nan_behind_the_masks(ops, generator, eps, shared):
    """Not even in queries that all examples share, which are normalised without a mask."""
    arguments, dout = make(generator, (2, 70, 40), (9, 7, 12), 2, torch.bfloat16, shared, mask=True)
    clean = run(ops, arguments, dout, eps)
    queries, position, shown, k, bias, v, out_bias, visible = arguments
    hidden = ~(shown.any(0, keepdim=True) if shared else shown)
    arguments[0] = queries.masked_fill(hidden[..., None], float("nan"))
    arguments[1] = position.masked_fill(~shown.any(0)[:, None], float("nan"))
    arguments[3], arguments[5] = (t.masked_fill(~visible[:, None, :, None], float("nan")) for t in (k, v))
    arguments[4] = bias.masked_fill(~visible[:, None], float("nan"))
    poisoned = run(ops, arguments, dout.masked_fill(~shown[..., None], float("nan")), eps)
    for name, a, b in zip(NAMES, clean, poisoned, strict=True):
        if name == "lse":
            a, b = (torch.where(shown[:, None], t, 0.0) for t in (a, b))
        assert torch.equal(a, b), name


def test_no_tile_fits(ops, generator, emulator):
    emulator(shared=48 * 1024)
    with pytest.raises(RuntimeError, match="no tile for 1024 channels of keys and 1024 of values fits into the shared memory"):
        run(ops, *make(generator, (1, 3, 3), (1024, 0, 1024)))

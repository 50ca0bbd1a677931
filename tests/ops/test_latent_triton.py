"""The Triton kernels of the latent family in the interpreter, at the level of the registered op: what only they have
(chunks of channels, splits of the keys, the norm folded into the scores) against float64."""

import pytest
import torch

from mmkernels import _backends, _tuning, testing
from mmkernels.ops import latent_attention
from mmkernels.ops.latent import autograd, reference

pytestmark = pytest.mark.skipif(
    bool(_backends.triton_missing()) or not _backends.INTERPRET, reason="needs triton and TRITON_INTERPRET=1"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eager_core(q, x, position, key_mask, scale, eps):
    """`reference.core` as a user writes it, every step in the inputs' dtype."""
    if position is not None:
        x = torch.cat([x, position.expand(x.shape[0], -1, -1)], -1)
    if key_mask is not None:
        x = torch.where(key_mask[..., None], x, 0.0)
    xhat = x if eps < 0 else torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    scores = (q * scale) @ xhat.mT
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, :], float("-inf"))
    return scores.softmax(-1) @ xhat, scores.logsumexp(-1)


def make(generator, batch, rows, keys, content, shared=0, dtype=torch.float32, batch_q=None):
    """q, x, position of random normal numbers."""
    q = torch.randn(batch_q or batch, rows, content + shared, generator=generator)
    x = torch.randn(batch, keys, content, generator=generator)
    position = torch.randn(keys, shared, generator=generator) if shared else None
    return [None if t is None else t.to(dtype) for t in (q, x, position)]


def outputs_and_gradients(function, inputs, dtype, cotangents, key_mask, scale, eps):
    """(out, lse, *gradients) with the inputs in `dtype`; cotangents of out and (None: not used) of lse."""
    inputs = [None if t is None else t.to(dtype).detach().requires_grad_() for t in inputs]
    out, lse = function(*inputs, key_mask, scale, eps)
    pairs = [(out, cotangents[0].to(out.dtype))]
    if cotangents[1] is not None:
        pairs.append((lse, cotangents[1].to(lse.dtype)))
    wanted = [t for t in inputs if t is not None]
    return out, lse, *torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs])


def triton_core(*arguments):
    return autograd.core("triton", *arguments)


def check(inputs, cotangents, key_mask=None, scale=None, eps=1e-5, factors=(2.0, 2.0, 3.0, 3.0, 3.0)):
    """Every result of the op against float64, in the budget that eager sets."""
    dtype, scale = inputs[0].dtype, inputs[0].shape[2] ** -0.5 if scale is None else scale
    settings = (cotangents, key_mask, scale, eps)
    ours = outputs_and_gradients(triton_core, inputs, dtype, *settings)
    exact = outputs_and_gradients(reference.core, inputs, torch.float64, *settings)
    plain = outputs_and_gradients(eager_core, inputs, dtype, *settings)
    names = ("out", "lse", "dq", "dx", "dposition")
    for name, factor, a, e, p in zip(names[: len(ours)], factors, ours, exact, plain, strict=False):
        testing.assert_within_budget(a, e, p, name, factor)
    return ours


def cotangents(generator, inputs, with_lse=True):
    shape = (inputs[1].shape[0], *inputs[0].shape[1:])
    return torch.randn(shape, generator=generator), torch.randn(shape[:2], generator=generator) if with_lse else None


@pytest.fixture
def tile(monkeypatch):
    """`tile(queries, keys, widest chunk)` fixes the tiles of the three kernels."""

    def fix(queries, keys, head=0):
        for name in ("latent_fwd", "latent_bwd_q", "latent_bwd_x"):
            monkeypatch.setitem(_tuning._DEFAULTS, name, lambda *_: _tuning.Tiles(queries, keys, head, 0, 4, 1))
        _tuning.tiles.cache_clear()

    yield fix
    _tuning.tiles.cache_clear()


@pytest.fixture
def splits(monkeypatch):
    """`splits(n)` makes every launch split its keys n ways (as far as there are key tiles)."""
    from mmkernels.ops._shared import kernels

    return lambda count: monkeypatch.setattr(kernels, "FORCED_SPLITS", count)


# --- Against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, rows, keys, content, shared",
    [(1, 1, 111, 5, 0), (2, 63, 97, 64, 0), (1, 97, 63, 3, 258), (2, 111, 40, 1, 0), (1, 17, 111, 40, 24)],
    ids=str,
)
def test_matches_float64(generator, batch, rows, keys, content, shared, dtype):
    inputs = make(generator, batch, rows, keys, content, shared, dtype)
    check(inputs, cotangents(generator, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(generator, dtype):
    """P = 1: out is the normalised key, and dq is zero but for the rounding of two sums of C products that cancel."""
    q, x, position = make(generator, 2, 111, 1, 7, 9, dtype)
    grad, _ = cotangents(generator, (q, x))
    settings = ((grad, None), None, 0.3, 1e-5)
    out, _, dq, dx, dposition = outputs_and_gradients(triton_core, (q, x, position), dtype, *settings)
    exact = outputs_and_gradients(reference.core, (q, x, position), torch.float64, *settings)
    plain = outputs_and_gradients(eager_core, (q, x, position), dtype, *settings)
    testing.assert_within_budget(out, exact[0], plain[0], "out")
    xhat, eps = exact[0].detach().abs(), torch.finfo(dtype).eps
    sums = (grad.abs() * xhat).sum(-1, keepdim=True)  # of what dP and delta add up: each is off by eps times this or less
    assert (dq.double().abs() <= 0.3 * 2 * eps * sums * xhat).all()
    for name, a, e, p in (("dx", dx, exact[3], plain[3]), ("dposition", dposition, exact[4], plain[4])):
        testing.assert_within_budget(a, e, p, name, 3.0)


@pytest.mark.parametrize("channels, widest", [((261, 0), 64), ((50, 211), 128), ((322, 0), 0), ((100, 604), 256)], ids=str)
def test_chunks_of_any_width(generator, tile, channels, widest):
    """The border of content and position, and the end of the channels, fall anywhere in a chunk."""
    tile(32, 32, widest)
    inputs = make(generator, 1, 19, 45, *channels, torch.bfloat16)
    check(inputs, cotangents(generator, inputs))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("count", (1, 2, 5))
def test_splits_of_the_keys(generator, splits, count, dtype):
    splits(count)
    inputs = make(generator, 2, 20, 150, 21, 12, dtype, batch_q=1)
    mask = torch.rand(2, 150, generator=generator) < 0.8
    mask[0, :70] = False  # whole splits without a key
    check(inputs, cotangents(generator, inputs), mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (100.0, -1000.0))
def test_means_far_larger_than_the_deviation(generator, offset, dtype):
    """Folded into the scores or not, the norm must not cancel."""
    q, x, position = make(generator, 1, 20, 63, 33, 4, torch.float32)
    inputs = [t.to(dtype) for t in (q, x + offset, position + offset)]
    check(inputs, cotangents(generator, inputs))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("eps", (-1.0, 0.0, 0.5))
def test_with_and_without_the_norm(generator, eps, dtype):
    inputs = make(generator, 2, 20, 40, 20, 13, dtype)
    mask = torch.rand(2, 40, generator=generator) < 0.7
    check(inputs, cotangents(generator, inputs), mask, eps=eps)


@pytest.mark.parametrize("scale", (0.0, -0.4, 3.0))
def test_any_scale(generator, scale):
    inputs = make(generator, 1, 9, 70, 24)
    check(inputs, cotangents(generator, inputs), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ("left", "right", "holes"))
def test_nothing_behind_the_mask_leaks(generator, padding, dtype):
    q, x, _ = make(generator, 3, 11, 77, 9, 0, dtype)
    mask = torch.ones(3, 77, dtype=torch.bool)
    if padding == "holes":
        mask = torch.rand(3, 77, generator=generator) < 0.5
    else:
        for row, hidden in enumerate((5, 70, 0)):
            mask[row, slice(0, hidden) if padding == "left" else slice(77 - hidden, 77)] = False
    grads = cotangents(generator, (q, x))
    clean = check((q, x.masked_fill(~mask[..., None], 0.0), None), grads, mask)
    poisoned = (q, x.masked_fill(~mask[..., None], float("nan")), None)
    dirty = outputs_and_gradients(triton_core, poisoned, dtype, grads, mask, 9**-0.5, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert (dirty[3][~mask] == 0).all()


@pytest.mark.parametrize("count", (1, 3))
def test_rows_without_keys(generator, splits, count):
    splits(count)
    inputs = make(generator, 2, 11, 100, 9, 5)
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1] = False
    grads = cotangents(generator, inputs)
    out, lse, dq, dx, dposition = outputs_and_gradients(triton_core, inputs, torch.float32, grads, mask, 0.3, 1e-5)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all() and (dq[1] == 0).all() and (dx[1] == 0).all()
    alone = [inputs[0][:1], inputs[1][:1], inputs[2]]
    first = outputs_and_gradients(triton_core, alone, torch.float32, [g[:1] for g in grads], mask[:1], 0.3, 1e-5)
    for a, b in zip((out[:1], lse[:1], dq[:1], dx[:1], dposition), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_empty(generator, sizes):
    inputs = make(generator, *sizes, 6, 3)
    results = outputs_and_gradients(triton_core, inputs, torch.float32, cotangents(generator, inputs), None, 0.3, 1e-5)
    shapes = [(*sizes[:2], 9), sizes[:2], *(t.shape for t in inputs)]
    assert [t.shape for t in results] == [torch.Size(s) for s in shapes]
    assert (results[0] == 0).all() and (results[1] == -torch.inf).all() and all((g == 0).all() for g in results[2:])


# --- Layouts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("transposed", "expanded", "channels first", "every second"))
def test_any_strides(generator, layout):
    q, x, position = make(generator, 3, 9, 41, 16, 8)
    if layout == "transposed":
        x, q = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, q))
    elif layout == "expanded":
        x, position = x[:1].expand(3, -1, -1), position[:1].expand(41, -1)
    elif layout == "channels first":
        x, position, q = (t.mT.contiguous().mT for t in (x, position, q))
    else:
        x, position = torch.randn(3, 82, 32, generator=generator)[:, ::2, ::2], position.repeat(1, 2)[:, ::2]
    mask = (torch.rand(41, 3, generator=generator) < 0.8).T
    # Cotangents of stride 0, which is what sum() sends.
    check((q, x, position), (torch.full((), 0.7).expand(3, 9, 24), torch.full((), 0.2).expand(3, 9)), mask)


# --- Through the public op --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_public_op_with_two_heads(generator, dtype):
    def normal(*shape, gain=1.0):
        return (gain * torch.randn(*shape, generator=generator)).to(dtype)

    tensors = dict(
        q=normal(1, 19, 48),
        x=normal(2, 97, 3),
        w_k=normal(48, 61, gain=61**-0.5),
        w_v=normal(40, 61, gain=61**-0.5),
        norm_weight=1 + normal(61, gain=0.3),
        norm_bias=normal(61, gain=0.3),
        b_v=normal(40),
        position=normal(97, 58),
    )
    mask = torch.rand(2, 97, generator=generator) < 0.8
    testing.check_op(
        latent_attention,
        testing.eager_latent_attention,
        tensors,
        tuple(tensors),
        "triton",
        normal(2, 19, 40),
        num_heads=2,
        key_mask=mask,
    )


# --- Promises ---------------------------------------------------------------------------------------------------------------


def test_only_what_is_wanted_is_computed(generator):
    """Without a gradient for x and position nothing of their size is allocated; each alone gives the same bits."""
    q, x, position = make(generator, 2, 9, 1111, 5, 3)
    out, lse = torch.ops.mmkernels_triton.latent_fwd(q, x, position, None, 0.3, 1e-5)
    dout = torch.randn(out.shape, generator=generator)
    arguments = (dout, None, q, x, position, None, out, lse, 0.3, 1e-5)
    everything = torch.ops.mmkernels_triton.latent_bwd(*arguments, 7)
    for wanted in range(8):
        for i, gradient in enumerate(torch.ops.mmkernels_triton.latent_bwd(*arguments, wanted)):
            if wanted >> i & 1:
                assert torch.equal(gradient, everything[i])
            else:
                assert gradient.numel() == 0


def test_same_bits_every_time(generator, splits):
    splits(3)
    inputs = make(generator, 2, 17, 150, 10, 14, torch.bfloat16, batch_q=1)
    grads = cotangents(generator, inputs)
    first, *rest = (outputs_and_gradients(triton_core, inputs, torch.bfloat16, grads, None, 0.2, 1e-5) for _ in range(3))
    for again in rest:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_opcheck(generator):
    q, x, position = make(generator, 2, 5, 20, 5, 3)
    mask = torch.ones(2, 20, dtype=torch.bool)
    torch.library.opcheck(torch.ops.mmkernels_triton.latent_fwd.default, (q, x, position, mask, 0.3, 1e-5))
    out, lse = torch.ops.mmkernels_triton.latent_fwd(q, x, position, mask, 0.3, 1e-5)
    arguments = (torch.ones_like(out), None, q, x, position, mask, out, lse, 0.3, 1e-5)
    torch.library.opcheck(torch.ops.mmkernels_triton.latent_bwd.default, (*arguments, 5))


@pytest.mark.parametrize(
    "channels, widest, widths",
    [
        (1, 0, (16,)),
        (64, 0, (64,)),
        (97, 0, (64, 32, 16)),
        (261, 0, (256, 16)),
        (704, 0, (512, 128, 64)),
        (1024, 256, (256,) * 4),
    ],
)
def test_chunks_cover_the_channels(channels, widest, widths):
    from mmkernels.ops.latent import kernels

    assert kernels.chunks(channels, widest) == widths
    for c in range(1, 1025):
        total = sum(kernels.chunks(c))
        assert c <= total <= max(-(-c // 16) * 16, 1.25 * c), c  # no chunk is narrower than 16

"""The CUDA kernels of the latent family, their own source in the emulator: every tile, thread order, copy timing and split.

What the op means is tested for all backends in test_latent.py; here is what only these kernels have.
"""

import pytest
import torch

from mmkernels import testing
from mmkernels.ops._shared.registration import forward_backward
from mmkernels.ops.latent import reference

NAMES = ("out", "lse", "dq", "dx", "dposition")
SM80, SM90, SM100 = dict(shared=163 * 1024, capability=8), dict(capability=9), dict(capability=10)
HALVES = (torch.bfloat16, torch.float16)
# The kernels there are: for every GPU, and for sm_90 (16 bits; they take 33 rows and more).
KERNELS = [(torch.float32, SM80), (torch.bfloat16, SM80), (torch.bfloat16, SM90), (torch.float16, SM90)]
every_kernel = pytest.mark.parametrize("dtype, gpu", KERNELS, ids=["fp32", "bf16", "bf16-hopper", "fp16-hopper"])


@pytest.fixture
def ops(on):
    return forward_backward("latent", on("cuda"))


@pytest.fixture
def emulator(monkeypatch):
    """emulator(seed=.., copies=.., multiprocessors=.., shared=.., capability=..): what the emulator reads at every launch."""

    def set(**options):
        for name, value in options.items():
            monkeypatch.setenv(f"MMKERNELS_EMULATOR_{name.upper()}", str(value))

    return set


def make(generator, sizes, channels, dtype=torch.float32, shared_q=False, mask=False):
    """Arguments of latent_fwd for (B, R, M) and (Cx, Cp), without scale and eps, and the float32 gradients of out and lse."""
    (b, r, m), (content, position) = sizes, channels
    c = content + position
    q = torch.randn(1 if shared_q else b, r, c, generator=generator).to(dtype)
    x = torch.randn(b, m, content, generator=generator).to(dtype)
    table = torch.randn(m, position, generator=generator).to(dtype) if position else None
    key_mask = torch.rand(b, m, generator=generator) < 0.7 if mask else None
    gradients = torch.randn(b, r, c, generator=generator), torch.randn(b, r, generator=generator)
    return [q, x, table, key_mask], gradients


def run(ops, arguments, gradients, eps=1e-5, wanted=7):
    """(out, lse, dq, dx, dposition) of the kernels."""
    forward, backward = ops
    scale = arguments[0].shape[2] ** -0.5
    out, lse = forward(*arguments, scale, eps)
    return out, lse, *backward(*gradients, *arguments, out, lse, scale, eps, wanted)


def plain(q, x, position, key_mask, scale, eps):
    """reference.core with every step in the inputs' dtype."""
    xhat = reference.normalise(x, position, key_mask, eps)
    scores = (q @ xhat.transpose(-1, -2)) * scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None], float("-inf"))
    return scores.softmax(-1) @ xhat, scores.float().logsumexp(-1)


def differentiate(function, arguments, gradients, dtype, eps):
    q, x, position, key_mask = arguments
    q, x, position = inputs = [None if t is None else t.to(dtype).requires_grad_() for t in (q, x, position)]
    inputs = [t for t in inputs if t is not None]
    outputs = function(q, x, position, key_mask, q.shape[2] ** -0.5, eps)
    cotangents = [g.to(o.dtype) for o, g in zip(outputs, gradients, strict=True)]
    return *outputs, *torch.autograd.grad(outputs, inputs, cotangents)


def check(ops, arguments, gradients, eps=1e-5, wanted=7):
    """`wanted` as in latent_bwd; the results that it leaves out are not looked at."""
    ours = run(ops, arguments, gradients, eps, wanted)
    exact = differentiate(reference.core, arguments, gradients, torch.float64, eps)
    eager = differentiate(plain, arguments, gradients, arguments[0].dtype, eps)
    for name, *three in zip(NAMES, ours, exact, eager, strict=False):
        if wanted & dict(dq=1, dx=2, dposition=4).get(name, 7):
            testing.assert_within_budget(*three, name, 2.0 if name in ("out", "lse") else 3.0)
    return ours


def same_bits(first, second):
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"result {i} of {len(first)}"


# --- Against float64: sizes, and every tile that a launcher can choose ---------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "sizes, channels",
    [((2, 1, 1), (5, 0)), ((1, 63, 97), (64, 0)), ((2, 97, 63), (3, 37)), ((1, 33, 111), (3, 258)), ((2, 1, 200), (40, 0))],
    ids=str,
)
def test_matches_float64(ops, generator, sizes, channels, dtype):
    check(ops, *make(generator, sizes, channels, dtype))


@pytest.mark.parametrize("gpu", [SM80, SM100], ids=["sm_80", "sm_100"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "rows, channels",
    [(70, (288, 0)), (35, (320, 2)), (35, (528, 0)), (33, (577, 0)), (35, (704, 0)), (7, (40, 0)), (17, (20, 1004))],
    ids=str,
)
def test_every_tile(ops, generator, emulator, rows, channels, dtype, gpu):
    """Few and many rows, narrow and wide inputs, with both amounts of shared memory of the supported GPUs."""
    emulator(**gpu)
    keys = (140 if dtype == torch.bfloat16 else 70) // (1 if sum(channels) < 500 else 2)
    check(ops, *make(generator, (1, rows, keys), channels, dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "rows, keys, channels",
    [
        (33, 1, (1, 0)),
        (64, 64, (64, 0)),
        (66, 140, (64, 0)),
        (65, 63, (0, 128)),
        (70, 257, (129, 0)),
        (70, 97, (3, 197)),
        (40, 200, (3, 258)),
        (129, 160, (3, 258)),
        (97, 70, (264, 0)),
        (64, 140, (264, 0)),
        (35, 190, (64, 258)),
        (40, 150, (256, 64)),
        (66, 110, (64, 258)),
        (97, 70, (256, 64)),
        (64, 150, (384, 0)),
        (40, 150, (3, 509)),
        (64, 150, (512, 0)),
        (40, 100, (600, 97)),
        (35, 110, (704, 0)),
        (100, 160, (704, 0)),
        (40, 100, (3, 530)),
    ],
    ids=str,
)
def test_every_tile_of_hopper(ops, generator, emulator, rows, keys, channels, dtype):
    """Each tile with rows that are copied straight into it and with rows that are not; ragged rows, keys and channels."""
    arguments, gradients = make(generator, (1, rows, keys), channels, dtype, mask=keys > 150)
    results = check(ops, arguments, gradients, wanted=3)
    emulator(**SM100)
    others = run(ops, arguments, gradients, wanted=3)
    assert keys == 1 or not torch.equal(results[1], others[1]), "the same kernel"
    assert keys == 1 or dtype == torch.float16 or not torch.equal(results[2], others[2]), "the same kernel"


@every_kernel
def test_without_normalisation(ops, generator, emulator, dtype, gpu):
    emulator(**gpu)
    check(ops, *make(generator, (2, 39 if gpu is SM90 else 19, 70), (10, 7), dtype), eps=-1.0)


@every_kernel
def test_moments_do_not_cancel(ops, generator, emulator, dtype, gpu):
    """A large mean; rows whose first element, about which 16-bit moments are taken, is far from the others."""
    emulator(**gpu)
    arguments, gradients = make(generator, (1, 39 if gpu is SM90 else 9, 130), (33, 0), dtype)
    arguments[1][:, ::2] += 100.0
    arguments[1][:, 1::4, 0] = 1000.0
    check(ops, arguments, gradients)


# --- Split keys, shared queries ----------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("shared_q", (False, True))
def test_splits(ops, generator, emulator, dtype, gpu, shared_q):
    """One multiprocessor walks over all keys; 256 split them, the last split shorter than the others."""
    arguments, gradients = make(generator, (2, 37 if gpu is SM90 else 17, 600), (3, 18), dtype, shared_q, mask=True)
    arguments[3][0, 100:] = False  # whole splits without a visible key
    emulator(**gpu)
    emulator(multiprocessors=1)
    whole = check(ops, arguments, gradients)
    emulator(multiprocessors=256)
    parts = check(ops, arguments, gradients)
    assert not all(torch.equal(a, b) for a, b in zip(whole[:3], parts[:3], strict=True)), "the keys were not split"
    same_bits(parts, run(ops, arguments, gradients))


def test_gradients_of_shared_operands_are_sums(ops, generator):
    arguments, gradients = make(generator, (3, 20, 90), (6, 10), shared_q=True)
    dq, _, dposition = check(ops, arguments, gradients)[2:]
    assert dq.shape == arguments[0].shape and dposition.shape == arguments[2].shape


@pytest.mark.parametrize("wanted", range(8))
def test_only_what_is_wanted(ops, generator, wanted):
    arguments, gradients = make(generator, (2, 5, 70), (6, 10), torch.bfloat16)
    everything = run(ops, arguments, gradients)
    some = run(ops, arguments, gradients, wanted=wanted)
    for bit, a, b in zip((1, 2, 4), everything[2:], some[2:], strict=True):
        assert torch.equal(a, b) if wanted & bit else b.numel() == 0


def test_memory_does_not_grow_with_the_keys(ops, generator):
    """Neither pass allocates anything of M rows unless a gradient of M rows is wanted."""

    def allocated(keys):
        arguments, gradients = make(generator, (1, 5, keys), (6, 10), shared_q=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run(ops, arguments, gradients, wanted=1)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())

    few, many = allocated(700), allocated(2800)
    assert 0 < many <= few + 2048, "bytes allocated for 700 and for 2800 keys"


# --- Thread orders and copies in flight ----------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("channels", [(12, 9), (3, 258)], ids=str)
def test_any_order_of_threads_and_copies(ops, generator, emulator, channels, dtype, gpu):
    """A missing barrier or wait gives other bits in some order. Five key tiles and more turn every buffer over."""
    sizes = (1, 70 if channels[1] < 100 else 34, 270 if dtype == torch.bfloat16 else 135)
    orders(ops, emulator, *make(generator, sizes, channels, dtype, mask=True), gpu)


@pytest.mark.parametrize("channels", [(16, 0), (264, 0), (512, 0), (500, 4), (704, 0), (697, 0)], ids=str)
def test_any_order_of_hopper(ops, generator, emulator, channels):
    """Six tiles and more, copied straight and not, with two and three buffers, one and two copies ahead."""
    orders(ops, emulator, *make(generator, (1, 40, 330), channels, torch.bfloat16), SM90, wanted=1)


@pytest.mark.parametrize(
    "sizes, channels", [((1, 200, 200), (24, 0)), ((2, 110, 70), (3, 258)), ((1, 70, 70), (3, 509))], ids=str
)
def test_any_order_of_many_rows_on_hopper(ops, generator, emulator, sizes, channels):
    """128 rows a block; gradients of keys that walk over several tiles of rows, and over examples."""
    orders(ops, emulator, *make(generator, sizes, channels, torch.bfloat16, mask=True), SM90)


def orders(ops, emulator, arguments, gradients, gpu, wanted=7):
    emulator(**gpu, multiprocessors=1, copies="late", seed=0)
    first = check(ops, arguments, gradients, wanted=wanted)
    for seed, copies in ((1, "early"), (2, "random"), (3, "late"), (4, "early"), (5, "random")):
        emulator(seed=seed, copies=copies)
        same_bits(first, run(ops, arguments, gradients, wanted=wanted))


# --- Layouts ----------------------------------------------------------------------------------------------------------------


def every_second(t):
    """The same values with gaps between them, in every dimension; the gaps are NaN."""
    wide = torch.full([2 * n for n in t.shape], float("nan"), dtype=t.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def odd_rows(t):
    """Dense rows, an odd number of elements apart, the first at an odd address."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3 - t.shape[-1] % 2), float("nan"), dtype=t.dtype)
    wide[..., 1 : t.shape[-1] + 1] = t
    return wide[..., 1 : t.shape[-1] + 1]


def reversed_dimensions(t):
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


@pytest.mark.parametrize("layout", [every_second, odd_rows, reversed_dimensions], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("channels", [(16, 0), (3, 14)], ids=str)
def test_any_strides(ops, generator, layout, dtype, channels):
    arguments, gradients = make(generator, (2, 9, 70), channels, dtype, mask=True)
    dense = run(ops, arguments, gradients)
    moved = [None if t is None else layout(t) if t.is_floating_point() else reversed_dimensions(t) for t in arguments]
    out, lse = dense[:2]
    scale = arguments[0].shape[2] ** -0.5
    same_bits(dense[:2], ops[0](*moved, scale, 1e-5))
    moved_gradients = [layout(g) for g in gradients]
    same_bits(dense[2:], ops[1](*moved_gradients, *moved, layout(out), layout(lse), scale, 1e-5, 7))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channels", [(16, 0), (3, 14), (16, 8)], ids=str)
def test_unaligned_rows_on_hopper(ops, generator, dtype, channels):
    """Rows that cannot be copied straight into a tile give the bits of rows that can."""
    arguments, gradients = make(generator, (2, 39, 150), channels, dtype, mask=True)
    scale = arguments[0].shape[2] ** -0.5
    dense = run(ops, arguments, gradients, wanted=1)[:3]
    moved = [None if t is None else odd_rows(t) if t.is_floating_point() else reversed_dimensions(t) for t in arguments]
    out, lse = ops[0](*moved, scale, 1e-5)
    dq = ops[1](*map(odd_rows, gradients), *moved, odd_rows(out), odd_rows(lse), scale, 1e-5, 1)[0]
    same_bits(dense, (out, lse, dq))


@pytest.mark.parametrize("rows", (9, 34))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_stride_zero(ops, generator, dtype, rows):
    """x, position and the incoming gradients broadcast by stride 0."""
    arguments, _ = make(generator, (3, rows, 70), (8, 8), dtype)
    arguments[1] = arguments[1][:1, :1].expand(3, 70, -1)
    arguments[2] = arguments[2][:, :1].expand(-1, 8)
    gradients = torch.ones(()).expand(3, rows, 16), torch.ones(()).expand(3, rows)
    check(ops, arguments, gradients)


# --- Masks ------------------------------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("channels", [(9, 7), (8, 16)], ids=str)
@pytest.mark.parametrize("hidden", ["left", "right", "holes"])
def test_nan_behind_the_mask(ops, generator, emulator, dtype, gpu, channels, hidden):
    arguments, gradients = make(generator, (2, 39 if gpu is SM90 else 19, 200), channels, dtype, mask=True)
    emulator(**gpu)
    mask = arguments[3]
    if hidden != "holes":
        mask[:] = True
        for row, count in enumerate((131, 5)):
            mask[row, slice(0, count) if hidden == "left" else slice(200 - count, 200)] = False
    nowhere = ~mask.any(0)
    clean = check(ops, arguments, gradients)
    arguments[1] = arguments[1].masked_fill(~mask[..., None], float("nan"))
    arguments[2] = arguments[2].masked_fill(nowhere[:, None], float("nan"))
    poisoned = run(ops, arguments, gradients)
    same_bits(clean, poisoned)
    assert (poisoned[3][~mask] == 0).all() and (poisoned[4][nowhere] == 0).all()


@pytest.mark.parametrize("rows", (19, 39))
@pytest.mark.parametrize("multiprocessors", (1, 256))
def test_rows_without_keys(ops, generator, emulator, multiprocessors, rows):
    emulator(multiprocessors=multiprocessors)
    arguments, gradients = make(generator, (2, rows, 200), (9, 7), torch.bfloat16, mask=True)
    arguments[3][1] = False
    out, lse, dq, dx, dposition = run(ops, arguments, gradients)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all() and (dq[1] == 0).all() and (dx[1] == 0).all()
    alone = run(
        ops, [t if t is None or t.dim() == 2 and t is arguments[2] else t[:1] for t in arguments], [g[:1] for g in gradients]
    )
    for name, both, one in zip(NAMES[:4], (out, lse, dq, dx), alone, strict=False):
        testing.assert_within_budget(both[:1], one.double(), one, name)
    assert dposition.isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_empty(ops, generator, sizes):
    out, lse, dq, dx, dposition = run(ops, *make(generator, sizes, (6, 2)))
    assert out.shape == (*sizes[:2], 8) and (out == 0).all() and (lse == float("-inf")).all()
    assert all((g == 0).all() for g in (dq, dx, dposition))


@pytest.mark.parametrize("rows", (19, 39))
def test_uninitialised_memory_is_never_read(ops, generator, emulator, rows):
    emulator(multiprocessors=256)
    arguments, gradients = make(generator, (2, rows, 200), (9, 7), torch.bfloat16, shared_q=True)
    clean = run(ops, arguments, gradients)
    with testing.poisoned_memory():
        same_bits(clean, run(ops, arguments, gradients))


@pytest.mark.parametrize(
    "position, wrong, message",
    [
        (0, torch.zeros(2, 5, 9), "q has size 9 in dimension 2; it must be 8"),
        (0, torch.zeros(3, 5, 8), "q has batch 3; it must be 1 or 2"),
        (0, torch.zeros(2, 5, 8).half(), "q has dtype Half; it must be Float"),
        (1, torch.zeros(2, 7, 6).double(), "x has dtype Double; it must be Float, BFloat16 or Half"),
        (1, torch.zeros(7, 6), "x has 2 dimensions; it must have 3"),
        (1, torch.zeros(2, 7, 1100), "x and position have 1102 channels; 1 to 1024 are allowed"),
        (2, torch.zeros(6, 2), "position has size 6 in dimension 0; it must be 7"),
        (3, torch.ones(2, 6, dtype=torch.bool), "key_mask has size 6 in dimension 1; it must be 7"),
        (3, torch.ones(2, 7), "key_mask has dtype Float; it must be Bool"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_wrong_arguments(ops, position, wrong, message):
    arguments = [torch.zeros(2, 5, 8), torch.zeros(2, 7, 6), torch.zeros(7, 2), torch.ones(2, 7, dtype=torch.bool)]
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=message):
        ops[0](*arguments, 1.0, 1e-5)

"""`ops.attention` with a `BlockDiagonalBias` on every backend: against float64, and by its meaning."""

import pytest
import torch

import mmkernels
from mmkernels import testing
from mmkernels.ops import BlockDiagonalBias, attention
from mmkernels.ops.attention import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = ("matrix", "gain", "shift")


def make(generator, shape, width, dims=(16, 16), dtype=torch.float32, tasks=None, of_bias=None):
    """q, k, v for (B, H, N, M) and (D, E), and the parts of a bias with blocks of `width`, for `tasks` or each example."""
    (b, h, n, m), (d, e) = shape, dims
    groups = b if tasks is None else tasks
    sizes = {"q": (b, h, n, d), "k": (b, h, m, d), "v": (b, h, m, e)}
    sizes |= {"matrix": (n, width), "gain": (groups, width), "shift": (groups, width)}
    # Half as large where a bias is added to scores, so that no key has nearly all the weight of a row.
    tensors = {n: torch.randn(size, generator=generator) * (0.5 if n in PARTS else 1.0) for n, size in sizes.items()}
    tensors = {name: t.to(of_bias if of_bias is not None and name in PARTS else dtype) for name, t in tensors.items()}
    if tasks is not None:
        tensors["index"] = torch.randint(tasks, (b,), generator=generator)
    return tensors


def with_bias(function):
    def call(q, k, v, matrix, gain, shift, index=None, **options):
        return function(q, k, v, bias=BlockDiagonalBias(matrix, gain, shift, index), **options)

    return call


ours, eager = with_bias(attention), with_bias(testing.eager_attention)


def check(generator, tensors, backend, wanted=("q", "k", "v", *PARTS), **options):
    q, v = tensors["q"], tensors["v"]
    grad = torch.randn(*q.shape[:3], v.shape[3], generator=generator).to(q.dtype)
    return testing.check_op(ours, eager, tensors, wanted, backend, grad, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, width, tasks",
    [
        ((4, 2, 33, 33), 7, 3),  # the last block cut off
        ((2, 1, 128, 128), 22, 2),  # the base model's
        ((3, 2, 64, 64), 16, None),  # blocks of the tile's grid, a row for each example
        ((3, 1, 5, 5), 2, 2),  # three blocks where H // L says two
        ((4, 2, 7, 50), 4, 2),  # few queries, more keys
        ((2, 1, 40, 5), 4, 2),  # few keys
        ((2, 1, 97, 150), 86, 1),
        ((2, 1, 20, 20), 30, 2),  # one block wider than all
        ((2, 2, 19, 21), 1, 5),  # a diagonal; tasks without an example
    ],
    ids=str,
)
def test_matches_float64(backend, generator, shape, width, tasks, dtype):
    run = check(generator, make(generator, shape, width, dtype=dtype, tasks=tasks), backend)
    assert run.gradients["matrix"].shape == (shape[2], width)


@pytest.mark.parametrize("dims", [(5, 40), (261, 33), (512, 64)], ids=str)
def test_head_dims(backend, generator, dims):
    check(generator, make(generator, (2, 1, 40, 40), 12, dims, tasks=2), backend)


def test_float32_parts_with_half_inputs(backend, generator):
    tensors = make(generator, (3, 2, 33, 33), 7, dtype=torch.bfloat16, tasks=2, of_bias=torch.float32)
    assert check(generator, tensors, backend).gradients["gain"].dtype == torch.float32


@pytest.mark.parametrize("wanted", [PARTS, ("matrix",), ("q", "gain"), ("k", "v", "shift"), ("q", "k", "v"), ()], ids=str)
def test_any_of_the_gradients(backend, generator, wanted):
    check(generator, make(generator, (3, 2, 33, 33), 7, tasks=2), backend, wanted)


def test_key_mask(backend, generator):
    """NaN behind the mask reaches nothing; an example without a key adds nothing to any gradient."""
    tensors = make(generator, (3, 2, 33, 33), 7, tasks=2)
    mask = torch.rand(3, 33, generator=generator) < 0.6
    mask[1] = False
    for name in ("k", "v"):
        tensors[name] = torch.where(mask[:, None, :, None], tensors[name], float("nan"))
    clean = {n: t.nan_to_num(0.0) if t.is_floating_point() else t for n, t in tensors.items()}
    grad = torch.randn(3, 2, 33, 16, generator=generator)
    wanted = ("q", "k", "v", *PARTS)
    found = testing.run(ours, tensors, wanted, grad, backend=backend, key_mask=mask)
    exact = testing.run(
        ours, {n: t.double() if t.is_floating_point() else t for n, t in clean.items()}, wanted, grad.double(),
        backend="reference", key_mask=mask,
    )  # fmt: skip
    torch.testing.assert_close(found.output, exact.output.float(), atol=1e-5, rtol=1e-5)
    for name in wanted:
        torch.testing.assert_close(found.gradients[name], exact.gradients[name].float(), atol=1e-4, rtol=1e-4, msg=name)


def test_dropout(backend, generator):
    tensors = make(generator, (2, 2, 40, 40), 9, tasks=2)
    options = dict(dropout_p=0.3, dropout_seed=torch.tensor([7]))
    grad = torch.randn(2, 2, 40, 16, generator=generator)
    wanted = ("q", "k", "v", *PARTS)
    found = testing.run(ours, tensors, wanted, grad, backend=backend, **options)
    doubled = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    exact = testing.run(ours, doubled, wanted, grad.double(), backend="reference", **options)
    torch.testing.assert_close(found.output, exact.output.float(), atol=1e-5, rtol=1e-5)
    for name in wanted:
        torch.testing.assert_close(found.gradients[name], exact.gradients[name].float(), atol=1e-4, rtol=1e-4, msg=name)


def test_the_bias_it_stands_for(backend, generator):
    """The formula, element by element, as an additive bias gives the same result."""
    t = make(generator, (3, 2, 11, 13), 4, tasks=2)
    full = torch.zeros(3, 1, 11, 13)
    for b in range(3):
        task = int(t["index"][b])
        for i in range(11):
            for j in range(13):
                if i // 4 == j // 4:
                    full[b, 0, i, j] = (1 + t["gain"][task, j % 4]) * t["matrix"][i, j % 4] + t["shift"][task, j % 4]
    expected = attention(t["q"], t["k"], t["v"], bias=full, backend="reference")
    torch.testing.assert_close(ours(**t, backend=backend), expected)
    peer = testing.eager_block_diagonal_bias(t["matrix"], t["gain"], t["shift"], t["index"], keys=13)
    torch.testing.assert_close(peer, full)


def test_no_array_of_queries_by_keys(generator, monkeypatch):
    """The C++ backend makes no (B, N, M) array: its largest allocation stays below one."""
    t = make(generator, (4, 2, 256, 256), 16, tasks=2)
    t = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in t.items()}
    with torch.profiler.profile(profile_memory=True) as profile:
        ours(**t, backend="cpp").sum().backward()
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert 0 < largest < 4 * 256 * 256 * 4


def test_same_bits_again(backend, generator):
    tensors = make(generator, (5, 2, 70, 70), 9, tasks=2)
    runs = [testing.run(ours, tensors, ("q", *PARTS), backend=backend) for _ in range(2)]
    assert all(torch.equal(runs[0].gradients[n], runs[1].gradients[n]) for n in ("q", *PARTS))


def test_empty(backend, generator):
    for shape in ((0, 2, 9, 9), (2, 2, 9, 0)):
        tensors = make(generator, shape, 4, tasks=2)
        run = testing.run(ours, tensors, ("q", "k", "v", *PARTS), backend=backend)
        assert run.output.shape == (*shape[:3], 16) and all((g == 0).all() for g in run.gradients.values())


def test_second_derivative_on_the_reference(generator):
    t = make(generator, (2, 1, 5, 5), 2, (3, 3), torch.float64, tasks=2)
    index = t.pop("index")
    assert torch.autograd.gradgradcheck(
        lambda *a: ours(*a, index=index, backend="reference"), [x.requires_grad_() for x in t.values()]
    )


def test_compiled_without_a_graph_break(generator, on):
    on("cpp")
    t = make(generator, (2, 2, 33, 33), 7, tasks=2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**t, backend="cpp"), ours(**t, backend="cpp"))


def test_explain(generator):
    t = make(generator, (2, 2, 33, 33), 7, tasks=2)
    explained = mmkernels.explain(
        "attention", t["q"], t["k"], t["v"], bias=BlockDiagonalBias(*(t[n] for n in (*PARTS, "index")))
    )
    assert explained.backend in ("cpp", "reference")
    assert any("bias" in reason for reason in explained.refusals["sdpa"])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(matrix=torch.zeros(8, 4)), ValueError, r"bias.matrix has shape \(8, 4\); it must be \(9, C\)"),
        (dict(matrix=torch.zeros(9, 0)), ValueError, r"bias.matrix has shape \(9, 0\)"),
        (dict(gain=torch.zeros(2, 5)), ValueError, r"bias.gain has shape \(2, 5\); it must be \(2, 4\)"),
        (dict(shift=torch.zeros(3, 4)), ValueError, r"bias.shift has shape \(3, 4\); it must be \(2, 4\)"),
        (dict(index=None), ValueError, r"bias.gain has shape \(2, 4\); it must be \(3, 4\)"),
        (dict(index=torch.tensor([0, 1, 2])), IndexError, r"bias.index has numbers from 0 to 2; they must be in \[0, 2\)"),
        (dict(index=torch.zeros(2, dtype=torch.int64)), ValueError, r"bias.index has shape \(2,\); it must be \(3,\)"),
        (dict(gain=torch.zeros(2, 4, dtype=torch.float64)), TypeError, "bias.gain has dtype torch.float64"),
    ],
)
def test_errors(generator, change, error, message):
    tensors = make(generator, (3, 1, 9, 9), 4, tasks=2) | change
    with pytest.raises(error, match=message):
        ours(**tensors)


def test_not_with_lists(generator):
    t = make(generator, (3, 1, 9, 9), 4)
    with pytest.raises(ValueError, match="bias is given"):
        attention([t["q"]], [t["k"]], [t["v"]], bias=BlockDiagonalBias(t["matrix"], t["gain"], t["shift"]))


def test_reference_spreads_the_blocks(generator):
    t = make(generator, (3, 1, 9, 14), 4, tasks=2)
    blocks = reference.diagonal_blocks(t["matrix"], t["gain"], t["shift"], torch.float32)
    peer = testing.eager_block_diagonal_bias(t["matrix"], t["gain"], t["shift"], t["index"], keys=14)
    torch.testing.assert_close(reference.spread_blocks(blocks, t["index"], 14), peer)

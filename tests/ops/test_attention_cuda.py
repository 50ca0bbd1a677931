"""The CUDA attention kernels in the emulator: what their own geometry adds to `test_attention.py`.

Row tiles of 1 to 8 warps, rows kept in shared memory or read again, splits of either walk, every width of copy, several
tiles of values, all orders of threads.
"""

import pytest
import torch

from mmkernels import testing
from mmkernels.ops import attention
from mmkernels.ops._shared.registration import forward_backward
from mmkernels.ops.attention import lists

ALL = ("q", "k", "v")


@pytest.fixture
def cuda(on, monkeypatch):
    """Enters the emulator on a device of `multiprocessors`: many of them force splits."""
    on("cuda")

    def device(multiprocessors=1, copies="late", seed=0):
        monkeypatch.setenv("MMKERNELS_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
        monkeypatch.setenv("MMKERNELS_EMULATOR_COPIES", copies)
        monkeypatch.setenv("MMKERNELS_EMULATOR_SEED", str(seed))

    device()
    return device


def make(generator, shape, dims, dtype=torch.float32):
    (b, h, n, m), (d, e) = shape, dims
    sizes = {"q": (b, h, n, d), "k": (b, h, m, d), "v": (b, h, m, e), "grad": (b, h, n, e)}
    tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    return tensors, tensors.pop("grad")


def check(tensors, grad, wanted=ALL, **options):
    return testing.check_op(attention, testing.eager_attention, tensors, wanted, "cuda", grad, **options)


def same(left, right):
    assert torch.equal(left.output, right.output)
    for name in left.gradients:
        assert torch.equal(left.gradients[name], right.gradients[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [16, 17, 64, 65, 130])
def test_row_tiles_of_one_to_eight_warps(cuda, generator, rows, dtype):
    check(*make(generator, (1, 1, rows, 70), (16, 24), dtype))


@pytest.mark.parametrize("copies", ["early", "late", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_order_of_threads_gives_the_same_bits(cuda, generator, dtype, copies):
    """Six key tiles: every stage of the pipeline is used again."""
    tensors, grad = make(generator, (1, 1, 33, 330), (40, 17), dtype)
    mask = torch.rand(1, 330, generator=generator) < 0.8
    first = check(tensors, grad, key_mask=mask)
    for seed in (1, 2):
        cuda(copies=copies, seed=seed)
        same(first, testing.run(attention, tensors, ALL, grad, backend="cuda", key_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 4, 400), (1, 2, 200, 30), (1, 1, 1, 65)], ids=str)
def test_split_walks(cuda, generator, shape, dtype):
    tensors, grad = make(generator, shape, (24, 20), dtype)
    mask = torch.rand(shape[0], shape[3], generator=generator) < 0.7
    mask[:, 64:130] = False  # a split without any key
    whole = testing.run(attention, tensors, ALL, grad, backend="cuda", key_mask=mask)
    cuda(multiprocessors=64)
    split = check(tensors, grad, key_mask=mask)
    same(split, testing.run(attention, tensors, ALL, grad, backend="cuda", key_mask=mask))
    changed = [not torch.equal(whole.gradients[n], split.gradients[n]) for n in ALL]
    assert any(changed) or shape == (1, 1, 1, 65)  # it was split


def test_split_log_sum_exp_and_rows_without_keys(cuda, generator):
    cuda(multiprocessors=64)
    tensors, _ = make(generator, (2, 1, 3, 300), (8, 8))
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1] = False
    inputs = {n: t.requires_grad_() for n, t in tensors.items()}
    out, lse = attention(**inputs, key_mask=mask, return_lse=True, backend="cuda")
    exact = (tensors["q"][0].double() @ tensors["k"][0].double().mT * 8**-0.5).logsumexp(-1)
    torch.testing.assert_close(lse[0].double(), exact, rtol=1e-6, atol=1e-6)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all()
    for grad in torch.autograd.grad(out.sum() + lse[0].sum(), list(inputs.values())):
        assert (grad[1] == 0).all() and grad.isfinite().all() and (grad[0] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 68, 66, 65])
def test_every_width_of_copy(cuda, generator, dim, dtype):
    """Rows of 16-, 8-, 4- and 2-byte alignment, in tensors that end where their last row ends."""
    check(*make(generator, (1, 2, 19, 35), (dim, dim), dtype))


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_views_at_any_offset(cuda, generator, offset):
    tensors, grad = make(generator, (1, 2, 19, 35), (32, 32), torch.bfloat16)
    for name in ALL:
        room = torch.full((tensors[name].numel() + 8,), float("nan"), dtype=torch.bfloat16)
        view = room[offset : offset + tensors[name].numel()].view(tensors[name].shape)
        tensors[name] = view.copy_(tensors[name])
    assert tensors["q"].storage_offset() == offset
    options = dict(backend="cuda")
    same(
        testing.run(attention, tensors, (), **options),
        testing.run(attention, {n: t.clone() for n, t in tensors.items()}, (), **options),
    )
    check(tensors, grad)


@pytest.mark.parametrize("dtype, dims", [(torch.bfloat16, (700, 16)), (torch.float32, (16, 300)), (torch.float16, (20, 560))])
def test_rows_read_again_and_tiles_of_values(cuda, generator, dtype, dims):
    """Head dims whose rows exceed shared memory, values wider than one accumulator."""
    check(*make(generator, (1, 1, 66, 40), dims, dtype))


@pytest.mark.parametrize("multiprocessors", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias_shape", [(2, 2, 70, 90), (1, 1, 70, 90), (2, 1, 1, 90), (1, 2, 70, 1), (1, 1, 1, 1)], ids=str)
def test_bias_gradient_over_several_tiles(cuda, generator, bias_shape, dtype, multiprocessors):
    cuda(multiprocessors)
    tensors, grad = make(generator, (2, 2, 70, 90), (16, 8), dtype)
    tensors["bias"] = torch.randn(bias_shape, generator=generator).to(dtype)
    mask = torch.rand(2, 90, generator=generator) < 0.7
    check(tensors, grad, ("bias",), key_mask=mask)


def test_dropout_does_not_depend_on_the_geometry(cuda, generator):
    """One launch of whole rows and one of many splits drop the same weights, forward and backward."""
    tensors, grad = make(generator, (1, 2, 40, 200), (16, 16))
    options = dict(backend="cuda", dropout_p=0.4, dropout_seed=torch.tensor([11]))
    whole = testing.run(attention, tensors, ALL, grad, **options)
    cuda(multiprocessors=64)
    split = testing.run(attention, tensors, ALL, grad, **options)
    torch.testing.assert_close(split.output, whole.output)
    for name in ALL:
        torch.testing.assert_close(split.gradients[name], whole.gradients[name])


def test_only_written_memory_is_read(cuda, generator):
    cuda(multiprocessors=64)
    tensors, grad = make(generator, (1, 2, 20, 150), (17, 24), torch.bfloat16)
    with testing.poisoned_memory():
        check(tensors, grad)


# --- Lists: three problems, whose segments share tiles, in one launch ---


def make_list(generator, dtype, dims=(24, 20), rows=-1):
    """Tensors, problems and masks of two segments whose boundaries lie at odd places of a tile, and of single ones."""
    sizes = ((37, 1, dims[0]), (5, 1, dims[0]), (83, 1, dims[0]), (83, 1, dims[1]), (30, 1, dims[0]), (30, 1, dims[1]))
    sizes += ((3, 2, dims[0]), (150, 1, dims[0]), (150, 1, dims[1]), (70, 1, dims[0]), (9, 1, dims[0]), (9, 1, dims[1]))
    tensors = [torch.randn(2, t, s, 2, w, generator=generator).to(dtype) for t, s, w in sizes]
    masks = [torch.rand(2, n, generator=generator) < 0.7 for n in (83, 150)]
    masks[1][:, 20:140] = False  # splits without any key
    problems = [
        lists.ListedProblem(((0, 0), (1, 0)), ((2, 0), (4, 0)), ((3, 0), (5, 0)), (0, -1), rows),
        lists.ListedProblem(((6, 1),), ((7, 0),), ((8, 0),), (1, -1)),
        lists.ListedProblem(((9, 0),), ((10, 0),), ((11, 0),)),
    ]
    return tensors, problems, masks


def incoming(result):
    """A gradient that differs from element to element."""
    return torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape).to(result.dtype)


def run_list(backend, tensors, problems, masks, dropout_p=0.0):
    """Outputs, log-sum-exps and gradients of a list."""
    inputs = [t.detach().requires_grad_() for t in tensors]
    seed = torch.tensor([7]) if dropout_p else None
    out, lse = lists.attention_list(backend, inputs, problems, masks, seed, 0.2, dropout_p)
    results = [*out, *lse]
    return [*results, *torch.autograd.grad(results, inputs, [incoming(t) for t in results])]


def sides(problem, tensors):
    """q, k and v of a problem, their segments joined, (B, H, rows, width)."""
    segments = [[tensors[t][:, :, slot] for t, slot in side] for side in (problem.q, problem.k, problem.v)]
    if problem.rows >= 0:
        segments[0][0] = segments[0][0][:, : problem.rows]
    return [torch.cat(side, 1).transpose(1, 2) for side in segments]


def eager_list(tensors, problems, masks):
    """What plain PyTorch makes of a list, in the dtype of the tensors."""
    inputs, outputs, statistics = [t.detach().requires_grad_() for t in tensors], [], []
    for problem in problems:
        q, k, v = sides(problem, inputs)
        scores, mask = q @ k.mT * 0.2, lists.joined_mask(problem, tensors, masks)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        out, rows = (scores.softmax(-1) @ v).transpose(1, 2), [inputs[t].shape[1] for t, _ in problem.q]
        outputs += out.split([problem.rows, *rows[1:]] if problem.rows >= 0 else rows, 1)
        statistics.append(scores.logsumexp(-1))
    results = [*outputs, *statistics]
    return [*results, *torch.autograd.grad(results, inputs, [incoming(t) for t in results])]


def check_list(case):
    """Runs a list and holds all results against float64."""
    tensors, *rest = case
    ours, eager = run_list("cuda", *case), eager_list(*case)
    exact = eager_list([t.double() for t in tensors], *rest)
    for i, results in enumerate(zip(ours, exact, eager, strict=True)):
        testing.assert_within_budget(*results, f"result {i}", typical=torch.finfo(ours[0].dtype).eps)
    return ours


@pytest.mark.parametrize("copies", ["early", "late", "random"])
@pytest.mark.parametrize("multiprocessors", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lists_in_any_order_of_threads(cuda, generator, dtype, multiprocessors, copies):
    case = make_list(generator, dtype)
    cuda(multiprocessors, copies)
    first = check_list(case)
    for seed in (1, 2):
        cuda(multiprocessors, copies, seed)
        with testing.poisoned_memory():
            again = run_list("cuda", *case)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (first[-6][:, :, 0] == 0).all() and (first[-6][:, :, 1] != 0).any()  # the slot that nobody reads


@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_dropout_of_lists(cuda, generator, multiprocessors):
    """The launch has the longest walk first; the seed goes by the place in the list."""
    cuda(multiprocessors)
    case = make_list(generator, torch.float32)
    exact = run_list("reference", [t.double() for t in case[0]], *case[1:], dropout_p=0.4)
    for ours, expected in zip(run_list("cuda", *case, dropout_p=0.4), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_problems_of_a_list_are_split_each_by_its_length(cuda, generator):
    """Splitting changes how the long walk is summed, and not the walk of one tile."""
    case = make_list(generator, torch.float32)
    whole = run_list("cuda", *case)
    cuda(multiprocessors=64)
    split = run_list("cuda", *case)
    same_bits = [torch.equal(a, b) for a, b in zip(whole[:4], split[:4], strict=True)]
    assert same_bits == [False, False, False, True]


@pytest.mark.parametrize("problem", [0, 1, 2])
def test_a_list_has_the_bits_of_the_plain_op(cuda, generator, problem):
    """One walk serves both: a problem of a list, its segments joined, is the plain op's problem."""
    tensors, problems, masks = make_list(generator, torch.float32)
    listed, one = run_list("cuda", tensors, problems, masks), problems[problem]
    mask = lists.joined_mask(one, tensors, masks)
    out, lse = attention(*sides(one, tensors), key_mask=mask, scale=0.2, return_lse=True, backend="cuda")
    first = sum(len(p.q) for p in problems[:problem])
    assert torch.equal(torch.cat(listed[first : first + len(one.q)], 1).transpose(1, 2), out)
    assert torch.equal(listed[4 + problem], lse)


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_segments_of_different_alignment(cuda, generator, offset):
    """The second segment of keys starts at any element; what lies around it is NaN."""
    tensors, problems, masks = make_list(generator, torch.bfloat16, dims=(32, 32))
    exact = run_list("cuda", tensors, problems, masks)
    for i in (4, 5, 1):
        room = torch.full((tensors[i].numel() + 8,), float("nan"), dtype=torch.bfloat16)
        tensors[i] = room[offset : offset + tensors[i].numel()].view(tensors[i].shape).copy_(tensors[i])
    ours = run_list("cuda", tensors, problems, masks)
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 16, 36])
@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_only_the_first_rows_of_a_segment(cuda, generator, rows, multiprocessors):
    """Queries beyond them take no part, and their gradient is zero; the other segment follows at once."""
    cuda(multiprocessors)
    ours = check_list(make_list(generator, torch.float32, rows=rows))
    assert ours[0].shape == (2, rows, 2, 20) and (ours[7][:, rows:] == 0).all() and (ours[7][:, :rows] != 0).all()


@pytest.mark.parametrize("dtype, dims", [(torch.bfloat16, (700, 16)), (torch.float32, (16, 300)), (torch.float16, (17, 261))])
def test_wide_rows_of_lists(cuda, generator, dtype, dims):
    """Rows that are read again with every column tile, several tiles of values, copies by element."""
    check_list(make_list(generator, dtype, dims))


@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_gradients_that_nobody_wants(cuda, generator, multiprocessors):
    """Of one of two segments, of keys without their values: the others keep their bits."""
    cuda(multiprocessors)
    tensors, problems, masks = make_list(generator, torch.float32)
    everything = run_list("cuda", tensors, problems, masks)
    forward, backward = forward_backward("attention", "cuda", "attention_list")
    inputs = (tensors, lists.encode(problems), masks)
    out, lse = forward(*inputs, None, 0.2, 0.0)
    dout, dlse = ([incoming(t) for t in some] for some in (out, lse))
    for names in ((0,), (1, 2), (4, 8), (5, 9, 10), ()):
        wanted = [int(i in names) for i in range(len(tensors))]
        with testing.poisoned_memory():
            gradients = backward(dout, dlse, *inputs, out, lse, None, 0.2, 0.0, wanted)
        for i, gradient in enumerate(gradients):
            assert torch.equal(gradient, everything[7 + i]) if i in names else gradient.shape == (0,)

"""The CUDA attention kernels in the emulator: what their own geometry adds to `test_attention.py`.

Row tiles of 1 to 8 warps, rows kept in shared memory or read again, splits of either walk, every width of copy, several
tiles of values, all orders of threads.
"""

import pytest
import torch

from mmkernels import testing
from mmkernels.ops import attention

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

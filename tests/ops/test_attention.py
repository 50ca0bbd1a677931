"""`ops.attention` on every backend: against float64 with plain eager's error as the budget, and by its meaning."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels
from mmkernels import testing
from mmkernels.ops import BlockDiagonalBias, attention
from mmkernels.ops._shared import dropout
from mmkernels.ops.attention import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(generator, shape=(2, 2, 33, 65), dims=(17, 40), dtype=torch.float32):
    """q, k, v for (B, H, N, M) and (D, E)."""
    (b, h, n, m), (d, e) = shape, dims
    sizes = {"q": (b, h, n, d), "k": (b, h, m, d), "v": (b, h, m, e)}
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


def cotangent(generator, tensors):
    q, v = tensors["q"], tensors["v"]
    return torch.randn(*q.shape[:-1], v.shape[-1], generator=generator).to(q.dtype)


# --- Against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, dims",
    [
        ((1, 1, 1, 1), (1, 1)),
        ((1, 2, 63, 97), (5, 5)),
        ((2, 1, 97, 63), (64, 64)),
        ((1, 1, 33, 111), (261, 261)),
        ((1, 2, 4, 200), (17, 40)),
        ((2, 1, 111, 3), (40, 17)),
    ],
    ids=str,
)
def test_matches_float64(backend, generator, shape, dims, dtype):
    tensors = make(generator, shape, dims, dtype)
    testing.check_op(attention, testing.eager_attention, tensors, ("q", "k", "v"), backend, cotangent(generator, tensors))


@pytest.mark.parametrize("dims", [(512, 33), (33, 704), (1024, 1)], ids=str)
def test_wide_head_dims(backend, generator, dims):
    tensors = make(generator, (1, 1, 16, 48), dims)
    testing.check_op(attention, testing.eager_attention, tensors, ("q", "k", "v"), backend, cotangent(generator, tensors))


@pytest.mark.parametrize("broadcast", ["bhnm", "1hnm", "b1nm", "bh1m", "bhn1", "11nm", "1h1m", "1111"])
def test_bias_and_its_gradient(backend, generator, broadcast):
    tensors = make(generator, (2, 3, 20, 37), (16, 16))
    full = (2, 3, 20, 37)
    tensors["bias"] = torch.randn([f if c != "1" else 1 for c, f in zip(broadcast, full, strict=True)], generator=generator)
    run = testing.check_op(
        attention, testing.eager_attention, tensors, ("q", "k", "v", "bias"), backend, cotangent(generator, tensors)
    )
    assert run.gradients["bias"].shape == tensors["bias"].shape


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 20, 1), (1, 3, 1, 1), (1, 1, 1, 1)], ids=str)
def test_a_bias_of_whole_rows_moves_the_log_sum_exp_alone(backend, generator, shape, dtype):
    """Its gradient is that of lse where a row has a key, and zero to the bit where nobody asks for lse."""
    tensors = make(generator, (2, 3, 20, 37), (16, 16), dtype)
    bias = torch.randn(shape, generator=generator).requires_grad_()
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1] = False
    out, lse = attention(**tensors, bias=bias, key_mask=mask, return_lse=True, backend=backend)
    of_lse = torch.randn(2, 3, 20, generator=generator)
    (none,) = torch.autograd.grad(out, bias, torch.randn(out.shape, generator=generator).to(dtype), retain_graph=True)
    assert none.shape == shape and (none == 0).all()
    (grad,) = torch.autograd.grad(lse[:1].mul(of_lse[:1]).sum() + out.sum(), bias)
    expected = of_lse.double()[..., None] * mask.any(1)[:, None, None, None]
    torch.testing.assert_close(grad, expected.sum_to_size(shape).float())


def test_float32_bias_with_half_inputs(backend, generator):
    tensors = make(generator, (1, 2, 20, 37), (16, 16), torch.bfloat16)
    tensors["bias"] = torch.randn(1, 2, 1, 37, generator=generator)
    run = testing.check_op(
        attention, testing.eager_attention, tensors, ("q", "k", "v", "bias"), backend, cotangent(generator, tensors)
    )
    assert run.gradients["bias"].dtype == torch.float32


@pytest.mark.parametrize("layout", ["sliced", "transposed", "flipped-batch", "expanded"])
def test_any_strides(backend, generator, layout):
    b, h, n, m, d = 2, 3, 19, 41, 24

    def strided(length):
        if layout == "sliced":
            return torch.randn(b, h, length, 2 * d, generator=generator)[..., ::2]
        if layout == "transposed":  # what a fused projection gives: (B, T, H, D)
            return torch.randn(b, length, h, d, generator=generator).transpose(1, 2)
        if layout == "flipped-batch":
            return torch.randn(length, h, d, b, generator=generator).permute(3, 1, 0, 2)
        return torch.randn(b, 1, length, d, generator=generator).expand(-1, h, -1, -1)

    tensors = {"q": strided(n), "k": strided(m), "v": strided(m)}
    grad = strided(n)
    testing.check_op(attention, testing.eager_attention, tensors, ("q", "k", "v"), backend, grad)


def test_stride_zero_gradient(backend, generator):
    """loss.sum() hands the backward a gradient whose strides are all zero; kernels that assume a layout read past its end."""
    tensors = make(generator)
    testing.check_op(attention, testing.eager_attention, tensors, ("q", "k", "v"), backend, None)


def test_log_sum_exp_and_its_gradient(backend, generator):
    tensors = make(generator, (1, 2, 21, 50), (16, 24))
    out_grad, lse_grad = cotangent(generator, tensors), torch.randn(1, 2, 21, generator=generator)

    def both(double, name):
        inputs = {n: (t.double() if double else t).requires_grad_() for n, t in tensors.items()}
        out, lse = attention(**inputs, return_lse=True, backend=name)
        loss = (out * out_grad.to(out.dtype)).sum() + (lse * lse_grad.to(lse.dtype)).sum()
        return lse, torch.autograd.grad(loss, list(inputs.values()))

    tensors = {n: t.detach() for n, t in tensors.items()}
    (lse, grads), (exact, exact_grads) = both(False, backend), both(True, "reference")
    plain, plain_grads = both(False, "reference")
    assert lse.dtype == torch.float32
    testing.assert_within_budget(lse, exact, plain, "lse")
    for name, *three in zip("qkv", grads, exact_grads, plain_grads, strict=True):
        testing.assert_within_budget(*three, f"gradient of {name}", 3.0)


def test_gradient_of_the_log_sum_exp_alone(backend, generator):
    tensors = make(generator, (1, 1, 9, 20), (8, 8))
    q = tensors["q"].requires_grad_()
    (grad,) = torch.autograd.grad(attention(**tensors, return_lse=True, backend=backend)[1].sum(), q)
    expected = (q @ tensors["k"].mT * 8**-0.5).softmax(-1) @ tensors["k"] * 8**-0.5
    torch.testing.assert_close(grad, expected)


# --- Masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_nothing_behind_the_mask_leaks(backend, generator, padding):
    tensors = make(generator, (3, 2, 20, 77), (24, 24))
    mask = torch.ones(3, 77, dtype=torch.bool)
    if padding == "holes":
        mask = torch.rand(3, 77, generator=generator) < 0.5
    else:
        for row, hidden in enumerate((5, 70, 0)):
            mask[row, slice(0, hidden) if padding == "left" else slice(77 - hidden, 77)] = False
    clean = {n: t.clone() for n, t in tensors.items()}
    for name in ("k", "v"):
        hidden = ~mask[:, None, :, None].expand_as(tensors[name])
        clean[name] = clean[name].masked_fill(hidden, 0.0)
        tensors[name] = tensors[name].masked_fill(hidden, float("nan"))
    grad = cotangent(generator, tensors)
    poisoned = testing.run(attention, tensors, ("q", "k", "v"), grad, backend=backend, key_mask=mask)
    plain = testing.check_op(attention, testing.eager_attention, clean, ("q", "k", "v"), backend, grad, key_mask=mask)
    assert torch.equal(poisoned.output, plain.output)
    for name in ("q", "k", "v"):
        assert torch.equal(poisoned.gradients[name], plain.gradients[name]), name
        if name != "q":
            assert (poisoned.gradients[name][~mask[:, None, :, None].expand_as(tensors[name])] == 0).all()


def test_rows_without_keys_are_zero(backend, generator):
    tensors = make(generator, (2, 2, 7, 33), (16, 8))
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[1] = False
    inputs = {n: t.requires_grad_() for n, t in tensors.items()}
    out, lse = attention(**inputs, key_mask=mask, return_lse=True, backend=backend)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all() and lse[0].isfinite().all()
    for grad in torch.autograd.grad(out.sum() + lse[0].sum(), list(inputs.values())):
        assert (grad[1] == 0).all() and grad.isfinite().all() and (grad[0] != 0).any()


def test_nan_in_an_example_without_keys_stays_there(backend, generator):
    """In its q, k, v, bias and incoming gradients: the others' results keep their bits, its own gradients are zero."""
    tensors = make(generator, (2, 2, 9, 33), (16, 8)) | {"bias": torch.randn(2, 1, 9, 33, generator=generator)}
    mask = torch.rand(2, 33, generator=generator) < 0.6
    mask[1] = False
    grads = cotangent(generator, tensors), torch.randn(2, 2, 9, generator=generator)

    def run(nan):
        inputs = {n: t.clone() for n, t in tensors.items()}
        incoming = [g.clone() for g in grads]
        if nan:
            inputs["bias"][0].masked_fill_(~mask[0], float("nan"))
            for tensor in (*inputs.values(), *incoming):
                tensor[1] = float("nan")
        inputs = {n: t.requires_grad_() for n, t in inputs.items()}
        results = attention(**inputs, key_mask=mask, return_lse=True, backend=backend)
        return *results, *torch.autograd.grad(results, list(inputs.values()), incoming)

    for clean, poisoned in zip(run(False), run(True), strict=True):
        assert torch.equal(clean, poisoned)
    assert all((gradient[1] == 0).all() for gradient in run(True)[2:])


def test_nothing_of_both_lengths_is_saved(backend, generator):
    """Saved for backward: the inputs, out and a number a query. Not the weights, nor their mask of dropped elements."""
    tensors = {n: t.requires_grad_() for n, t in make(generator, (2, 2, 101, 203), (16, 8)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = attention(**tensors, dropout_p=0.2, backend=backend)
    assert saved and not [t.shape for t in saved if {101, 203} <= set(t.shape)]
    sizes = sum(t.numel() * t.element_size() for t in saved)
    assert sizes <= sum(t.numel() * 4 for t in (*tensors.values(), out)) + 4 * 2 * 2 * 101 + 8
    out.sum().backward()


def test_minus_infinity_in_the_bias_leaves_a_key_out(backend, generator):
    tensors = make(generator, (2, 2, 9, 33), (16, 16))
    bias = torch.randn(2, 1, 9, 33, generator=generator)
    bias[..., 20:] = float("-inf")
    bias[0, 0, 3] = float("-inf")  # a row without keys
    bias = bias.requires_grad_()
    out = attention(**tensors, bias=bias, backend=backend)
    rows = [r for r in range(9) if r != 3]
    short = {"q": tensors["q"][:, :, rows], "k": tensors["k"][:, :, :20], "v": tensors["v"][:, :, :20]}
    exact = testing.eager_attention(**{n: t.double() for n, t in short.items()}, bias=bias.detach()[:, :, rows, :20].double())
    plain = testing.eager_attention(**short, bias=bias.detach()[:, :, rows, :20])
    testing.assert_within_budget(out[:, :, rows][0], exact[0], plain[0], "output")
    assert (out[0, :, 3] == 0).all() and (out[1, :, 3] != 0).any()
    (grad,) = torch.autograd.grad(out.square().sum(), bias)
    assert grad.isfinite().all() and (grad[..., 20:] == 0).all() and (grad[0, 0, 3] == 0).all()


def test_a_large_finite_bias_is_no_mask(backend, generator):
    """-1e30 everywhere shifts all scores alike: uniform attention, as plain softmax gives, not zeros."""
    tensors = make(generator, (1, 1, 5, 21), (8, 8))
    out = attention(**tensors, bias=torch.full((1, 1, 1, 1), -1e30), backend=backend)
    torch.testing.assert_close(out, tensors["v"].mean(2, keepdim=True).expand_as(out))


@pytest.mark.parametrize("shape", [(0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)], ids=str)
def test_empty(backend, generator, shape):
    tensors = {n: t.requires_grad_() for n, t in make(generator, shape, (8, 6)).items()}
    out, lse = attention(**tensors, return_lse=True, backend=backend)
    assert out.shape == (*shape[:3], 6) and (out == 0).all()
    assert lse.shape == shape[:3] and (lse == float("-inf")).all()
    for tensor, grad in zip(tensors.values(), torch.autograd.grad(out.sum(), list(tensors.values())), strict=True):
        assert grad.shape == tensor.shape and (grad == 0).all()


# --- Dropout ----------------------------------------------------------------------------------------------------------------


def test_dropout_is_the_reference_mask(backend, generator):
    tensors = make(generator, (2, 3, 33, 65), (16, 16))
    seed = torch.tensor([-(2**62) + 12345])
    grad = cotangent(generator, tensors)
    arguments = dict(dropout_p=0.3, dropout_seed=seed)

    def plain(q, k, v, **_):
        keep = dropout.keep_mask(seed, (2, 3, 33, 65), 0.3)
        p = (q @ k.mT * 16**-0.5).softmax(-1)
        return torch.where(keep, p / 0.7, 0.0) @ v

    testing.check_op(attention, plain, tensors, ("q", "k", "v"), backend, grad, **arguments)


def test_dropout_statistics_and_seed(backend, generator):
    """With v = identity the output is the dropped weight matrix itself."""
    q, k = torch.zeros(1, 2, 64, 8), torch.zeros(1, 2, 128, 8)
    v = torch.eye(128).expand(1, 2, 128, 128)
    out = attention(q, k, v, dropout_p=0.25, dropout_seed=torch.tensor([7]), backend=backend)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / 128 / 0.75))
    n = kept.numel()
    assert abs(kept.double().mean() - 0.75) < 4 * (0.25 * 0.75 / n) ** 0.5
    other = attention(q, k, v, dropout_p=0.25, dropout_seed=torch.tensor([8]), backend=backend) != 0
    assert abs((kept == other).double().mean() - (0.75**2 + 0.25**2)) < 5 * 0.5 / n**0.5
    assert abs((kept[0, 0] == kept[0, 1]).double().mean() - 0.625) < 5 * 0.5 / (n / 2) ** 0.5


def test_dropout_draws_a_seed_from_torch(backend, generator):
    tensors = make(generator, (1, 1, 8, 32), (8, 8))
    torch.manual_seed(3)
    first, second = (attention(**tensors, dropout_p=0.5, backend=backend) for _ in range(2))
    torch.manual_seed(3)
    again = attention(**tensors, dropout_p=0.5, backend=backend)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_the_hash_is_the_documented_one():
    """Against an independent implementation in Python integers, with rows beyond 2**32 elements."""

    def bits(seed, row, m):
        z = (seed + (row + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        u = (z ^ (m * 0x9E3779B1)) % 2**32
        for add in (0, z >> 32):
            u = (u + add) % 2**32
            u = (u ^ (u >> 16)) * 0x7FEB352D % 2**32
            u = (u ^ (u >> 15)) * 0x846CA68B % 2**32
            u ^= u >> 16
        return u

    for seed, p in ((0, 0.5), (-1, 0.1), (2**63 - 1, 0.9)):
        keep = dropout.keep_mask(torch.tensor([seed]), (2, 3, 5, 7), p).flatten(0, 2)
        expected = [[bits(seed % 2**64, r, m) >= round(p * 2**32) for m in range(7)] for r in range(30)]
        assert keep.tolist() == expected


# --- Choice, errors, bookkeeping ---------------------------------------------------------------------------------------------


def test_scale(backend, generator):
    tensors = make(generator)
    torch.testing.assert_close(attention(**tensors, scale=0.5, backend=backend), testing.eager_attention(**tensors, scale=0.5))


def test_same_bits_every_time(backend, generator):
    tensors = make(generator, (1, 2, 33, 130), (24, 24), torch.bfloat16)
    tensors["bias"] = torch.randn(1, 1, 1, 130, generator=generator)
    grad = cotangent(generator, tensors)
    first = testing.run(attention, tensors, ("q", "k", "v", "bias"), grad, backend=backend)
    for _ in range(3):
        again = testing.run(attention, tensors, ("q", "k", "v", "bias"), grad, backend=backend)
        assert torch.equal(first.output, again.output)
        assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in first.gradients)


def test_an_example_does_not_depend_on_its_neighbours(on, generator):
    """The reference's rows are independent; kernels may split keys by batch size, so they promise closeness only."""
    on("reference")
    tensors = make(generator, (3, 1, 9, 33), (8, 8))
    alone = attention(**{n: t[1:2] for n, t in tensors.items()}, backend="reference")
    torch.testing.assert_close(attention(**tensors, backend="reference")[1:2], alone)


def test_uninitialised_memory_is_never_read(backend, generator):
    tensors = make(generator, (2, 2, 33, 65), (17, 40))
    tensors["bias"] = torch.randn(1, 2, 1, 65, generator=generator)
    mask = torch.rand(2, 65, generator=generator) < 0.7
    grad = cotangent(generator, tensors)
    clean = testing.run(attention, tensors, tuple(tensors), grad, backend=backend, key_mask=mask)
    with testing.poisoned_memory():
        assert torch.empty(3).isnan().all()
        poisoned = testing.run(attention, tensors, tuple(tensors), grad, backend=backend, key_mask=mask)
    assert torch.equal(clean.output, poisoned.output)
    assert all(torch.equal(clean.gradients[n], poisoned.gradients[n]) for n in clean.gradients)


def test_saved_tensors_are_left_alone(backend, generator):
    """Twice through the same graph gives the same gradients: the backward wrote into nothing it was given."""
    tensors = {n: t.requires_grad_() for n, t in make(generator).items()}
    out = attention(**tensors, backend=backend)
    grads = [torch.autograd.grad(out.sum(), list(tensors.values()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_only_wanted_gradients_are_computed(backend, generator):
    for wanted in (("q",), ("k",), ("v",), ("bias",)):
        tensors = make(generator, (1, 2, 9, 33), (8, 8))
        tensors["bias"] = torch.randn(1, 2, 9, 33, generator=generator)
        testing.check_op(attention, testing.eager_attention, tensors, wanted, backend, cotangent(generator, tensors))


# --- Heads that share keys ------------------------------------------------------------------------------------------------


def make_grouped(generator, heads=6, groups=2, batch=2, queries=5, keys=33, dims=(17, 40), dtype=torch.float32):
    sizes = {"q": (heads, queries, dims[0]), "k": (groups, keys, dims[0]), "v": (groups, keys, dims[1])}
    return {name: torch.randn(batch, *size, generator=generator).to(dtype) for name, size in sizes.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, groups, queries, keys", [(6, 2, 5, 33), (4, 1, 1, 71), (2, 1, 33, 3)])
def test_heads_that_share_keys(backend, generator, heads, groups, queries, keys, dtype):
    tensors = make_grouped(generator, heads, groups, queries=queries, keys=keys, dtype=dtype)
    run = testing.check_op(
        attention, testing.eager_attention, tensors, ("q", "k", "v"), backend, cotangent(generator, tensors)
    )
    assert run.gradients["k"].shape == tensors["k"].shape


@pytest.mark.parametrize("broadcast", [None, "bhnm", "11nm", "1h1m", "b11m", "bhn1"])
def test_shared_keys_with_masks_and_biases(backend, generator, broadcast):
    """Projections as they come, (B, N, H, D), a mask of keys, and each way that a bias can be broadcast."""
    tensors = make_grouped(generator, queries=20, keys=37, dims=(16, 16))
    tensors = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in tensors.items()}
    mask = torch.rand(2, 37, generator=generator) < 0.7
    grad, wanted = cotangent(generator, tensors), ("q", "k", "v")
    if broadcast:
        full = (2, 6, 20, 37)
        sizes = [f if c != "1" else 1 for c, f in zip(broadcast, full, strict=True)]
        tensors["bias"], wanted = torch.randn(sizes, generator=generator), (*wanted, "bias")

    def masked(**kw):
        return attention(**kw, key_mask=mask)

    def eager(**kw):
        return testing.eager_attention(**kw, key_mask=mask)

    testing.check_op(masked, eager, tensors, wanted, backend, grad)


def test_shared_keys_drop_the_same_weights_and_have_the_same_statistics(backend, generator):
    """As with keys repeated for every head: to which float64 agrees, dropout, lse and their gradients included."""
    tensors = make_grouped(generator, batch=1, dims=(16, 16))
    seed, grads = torch.tensor([7]), (cotangent(generator, tensors), torch.randn(1, 6, 5, generator=generator))

    def gradients(dtype, name, repeats):
        leaves = {n: t.to(dtype).requires_grad_() for n, t in tensors.items()}
        q, k, v = leaves["q"], *(leaves[n].repeat_interleave(repeats, 1) for n in "kv")
        results = attention(q, k, v, dropout_p=0.4, dropout_seed=seed, return_lse=True, backend=name)
        grad = [g.to(dtype) if r.dtype == dtype else g for g, r in zip(grads, results, strict=True)]
        return (*results, *torch.autograd.grad(results, list(leaves.values()), grad))

    exact = gradients(torch.float64, "reference", 3)
    for ours, right in zip(gradients(torch.float32, backend, 1), exact, strict=True):
        torch.testing.assert_close(ours, right.float(), rtol=1e-4, atol=1e-5)
    for ours, right in zip(gradients(torch.float64, "reference", 1), exact, strict=True):
        torch.testing.assert_close(ours, right)


class _Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        self.size = max([self.size, *(t.untyped_storage().nbytes() for t in tensors)])
        return out


def test_nothing_is_as_large_as_keys_of_every_head(backend, generator):
    tensors = {n: t.requires_grad_() for n, t in make_grouped(generator, 4, 1, 1, 2, 600, (16, 16)).items()}
    with _Largest() as largest:
        out = attention(**tensors, backend=backend)
        torch.autograd.grad(out.sum(), list(tensors.values()))
    assert largest.size <= 2 * tensors["k"].numel() * 4  # dk and dv may come as one


def test_the_library_takes_shared_keys_too(generator):
    tensors = make_grouped(generator, queries=1, dims=(16, 16))
    tensors["q"] = tensors["q"][:, :2]
    assert mmkernels.explain("attention", **tensors).backend == "sdpa"  # a query of each head of keys
    torch.testing.assert_close(attention(**tensors, backend="sdpa"), testing.eager_attention(**tensors))
    tensors = make_grouped(generator, queries=1, dims=(16, 16))
    assert mmkernels.explain("attention", **tensors).backend == "cpp"  # three of them
    torch.testing.assert_close(attention(**tensors, backend="sdpa"), testing.eager_attention(**tensors))


WRONG = {
    "q is a list": (dict(q=[1.0]), TypeError, "k is a Tensor; it must be a list with an entry for each problem of q"),
    "rank": (dict(q=torch.zeros(3, 4, 5)), ValueError, r"q has shape \(3, 4, 5\); it must have 4 dimensions"),
    "integer": (dict(v=torch.zeros(2, 2, 7, 8, dtype=torch.int32)), TypeError, "v has dtype torch.int32"),
    "dtype": (dict(k=torch.zeros(2, 2, 7, 8).bfloat16()), TypeError, "k has dtype torch.bfloat16; it must be q's"),
    "head dim": (dict(k=torch.zeros(2, 2, 7, 9)), ValueError, r"k has shape \(2, 2, 7, 9\).*\(2, 2, M, 8\)"),
    "heads": (
        dict(q=torch.zeros(2, 6, 5, 8), k=torch.zeros(2, 4, 7, 8)),
        ValueError,
        "q has 6 heads and k 4; H must be a multiple of the number of heads of k",
    ),
    "heads of values": (dict(v=torch.zeros(2, 1, 7, 8)), ValueError, r"v has shape .*must be \(2, 2, 7, E\)"),
    "blocks and shared keys": (
        dict(k=torch.zeros(2, 1, 7, 8), v=torch.zeros(2, 1, 7, 8), bias=BlockDiagonalBias(*3 * (torch.zeros(5, 7),))),
        ValueError,
        "bias is a BlockDiagonalBias; with 2 heads of q and 1 of k it must be a tensor or None",
    ),
    "length": (dict(v=torch.zeros(2, 2, 6, 8)), ValueError, r"v has shape .*must be \(2, 2, 7, E\)"),
    "mask dtype": (dict(key_mask=torch.ones(2, 7)), TypeError, "key_mask is a torch.float32; it must be a bool tensor"),
    "mask shape": (dict(key_mask=torch.ones(2, 8, dtype=torch.bool)), ValueError, r"key_mask has shape .*\(2, 7\)"),
    "bias shape": (
        dict(bias=torch.zeros(2, 3, 5, 7)),
        ValueError,
        r"bias has shape \(2, 3, 5, 7\); it must be \(2, 2, 5, 7\)",
    ),
    "bias rank": (dict(bias=torch.zeros(5, 7)), ValueError, r"bias has shape \(5, 7\)"),
    "bias dtype": (dict(bias=torch.zeros(1, 1, 5, 7).double()), TypeError, "bias has dtype torch.float64"),
    "no channels": (dict(q=torch.zeros(2, 2, 5, 0), k=torch.zeros(2, 2, 7, 0)), ValueError, "its head dim must be 1 or more"),
    "sparse": (
        dict(k=torch.zeros(2, 2, 7, 8).to_sparse()),
        TypeError,
        "k is a torch.sparse_coo tensor; it must be a dense one",
    ),
    "sparse bias": (dict(bias=torch.zeros(2, 2, 5, 7).to_sparse()), TypeError, "bias is a torch.sparse_coo tensor"),
    "scale nan": (dict(scale=float("nan")), ValueError, "scale is nan; it must be a finite number"),
    "scale infinite": (dict(scale=float("-inf")), ValueError, "scale is -inf"),
    "scale text": (dict(scale="1"), TypeError, "scale is '1'; it must be a finite number"),
    "scale tensor": (dict(scale=torch.tensor(1.0)), TypeError, "scale is a Tensor; it must be a finite number"),
    "dropout": (dict(dropout_p=1.0), ValueError, r"dropout_p is 1.0; it must be a number in \[0, 1\)"),
    "dropout nan": (dict(dropout_p=float("nan")), ValueError, "dropout_p is nan"),
    "dropout none": (dict(dropout_p=None), TypeError, "dropout_p is None; it must be a number"),
    "seed": (dict(dropout_p=0.5, dropout_seed=3), TypeError, "dropout_seed is a int; it must be a tensor"),
    "seeds": (dict(dropout_seed=torch.zeros(2, dtype=torch.int64)), ValueError, "dropout_seed has shape .* of one element"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; allowed are 'auto', 'cuda'"),
    "device": (dict(k=torch.zeros(2, 2, 7, 8, device="meta")), ValueError, "k is on meta; it must be on q's device, cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, error, message = WRONG[case]
    arguments = dict(q=torch.zeros(2, 2, 5, 8), k=torch.zeros(2, 2, 7, 8), v=torch.zeros(2, 2, 7, 8))
    for call in (attention, lambda **kw: mmkernels.explain("attention", **kw)):
        with pytest.raises(error, match=message):
            call(**{**arguments, **changes})


@pytest.mark.parametrize("backend_name", ["auto", "reference"])
def test_the_seed_may_have_any_shape_of_one_element(backend_name, generator):
    tensors = make(generator, (1, 2, 5, 7), (8, 8))
    seed = torch.tensor([[3]])
    options = dict(dropout_p=0.5, backend=backend_name)
    shaped = [attention(**tensors, dropout_seed=s, **options) for s in (seed, seed[0], seed[0, 0])]
    assert torch.equal(shaped[0], shaped[1]) and torch.equal(shaped[0], shaped[2])


def test_the_reference_without_keys_has_zero_gradients(generator):
    tensors = {n: t.requires_grad_() for n, t in make(generator, (2, 2, 3, 0), (8, 4)).items()}
    out, lse = attention(**tensors, return_lse=True, backend="reference")
    assert out.shape == (2, 2, 3, 4) and not out.any() and lse.isneginf().all()
    assert not torch.autograd.grad(out.sum(), tensors["q"])[0].any()


def test_a_named_backend_raises_with_every_reason():
    tensors = {n: torch.zeros(1, 1, 3, 8, dtype=torch.float64) for n in "qkv"}
    with pytest.raises(mmkernels.BackendError) as error:
        attention(**tensors, backend="cpp")
    message = str(error.value)
    assert "dtype is torch.float64, it takes float32, bfloat16 and float16" in message
    for name in mmkernels._backends.NAMES:
        assert f"  {name}: " in message
    assert attention(**tensors).dtype == torch.float64  # auto finds the reference


def test_wide_heads_are_refused_by_kernels_and_run_on_the_reference(generator):
    tensors = make(generator, (1, 1, 2, 3), (1025, 1025))
    with pytest.raises(mmkernels.BackendError, match="the head dim of q is 1025, it takes 1 to 1024"):
        attention(**tensors, backend="cpp")
    torch.testing.assert_close(attention(**tensors), testing.eager_attention(**tensors))


def test_use_backend_and_explain(generator):
    tensors = make(generator)
    with mmkernels.use_backend("reference"):
        told = mmkernels.explain("attention", **tensors)
        assert told.backend == "reference" and "attention runs on 'reference'" in str(told)
        with mmkernels.use_backend("cuda"), pytest.raises(mmkernels.BackendError):
            attention(**tensors)
        assert mmkernels.explain("attention", **tensors).backend == "reference"
    with pytest.raises(ValueError, match="backend is 'tpu'"):
        mmkernels.use_backend("tpu")
    with pytest.raises(ValueError, match="op_name is 'atention'"):
        mmkernels.explain("atention")
    assert mmkernels.explain("attention", **tensors, backend="reference").refusals["cuda"]


def test_auto_leaves_to_the_library_what_it_does_faster(on, generator):
    on("cpp")
    one = make(generator, (2, 2, 1, 50), (16, 16))
    assert mmkernels.explain("attention", **one).backend == "sdpa"
    torch.testing.assert_close(attention(**one), testing.eager_attention(**one))
    mask = torch.ones(2, 50, dtype=torch.bool)
    for changed in (dict(key_mask=mask), dict(bias=torch.zeros(1, 1, 1, 50)), dict(dropout_p=0.1), dict(return_lse=True)):
        assert mmkernels.explain("attention", **one, **changed).backend == "cpp"
    assert mmkernels.explain("attention", **(one | {"k": one["k"].clone().requires_grad_()})).backend == "cpp"
    assert mmkernels.explain("attention", **make(generator, (2, 2, 1, 50), (16, 8))).backend == "cpp"
    assert mmkernels.explain("attention", **make(generator, (2, 2, 1, 0), (16, 16))).backend == "cpp"
    assert mmkernels.explain("attention", **make(generator, (2, 2, 3, 50), (16, 16))).backend == "cpp"


def test_reference_is_twice_differentiable(generator):
    tensors = [t.double().requires_grad_() for t in make(generator, (1, 1, 3, 4), (3, 2)).values()]
    mask = torch.tensor([[True, False, True, True]])
    bias = torch.randn(1, 1, 1, 4, generator=generator, dtype=torch.float64).requires_grad_()

    def function(q, k, v, bias):
        return attention(q, k, v, bias=bias, key_mask=mask, return_lse=True, backend="reference")

    assert torch.autograd.gradcheck(function, (*tensors, bias))
    assert torch.autograd.gradgradcheck(function, (*tensors, bias))
    heads = tensors[0].detach().repeat(1, 2, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(function, (heads, *tensors[1:], bias))


def test_the_reference_is_plain_attention(generator):
    tensors = make(generator, dtype=torch.float64)
    out, lse = reference.attention(**tensors, scale=17**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(tensors["q"], tensors["k"], tensors["v"])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, (tensors["q"] @ tensors["k"].mT * 17**-0.5).logsumexp(-1))

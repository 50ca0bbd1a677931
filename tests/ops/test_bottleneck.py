"""`ops.bottleneck_attention` on every backend: against float64 with plain eager's error as the budget, and by its meaning."""

import pytest
import torch

import mmkernels
from mmkernels import testing
from mmkernels.ops import attention, bottleneck_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(generator, lengths=(33, 18), rows=5, batch=2, heads=2, dim=16, dtype=torch.float32):
    """{"tokens0": (B,T_0,3,H,D), "bottleneck0": (B,Z,3,H,D), "tokens1": ...}."""
    tensors = {}
    for i, length in enumerate(lengths):
        for name, count in (("tokens", length), ("bottleneck", rows)):
            tensors[f"{name}{i}"] = torch.randn(batch, count, 3, heads, dim, generator=generator).to(dtype)
    return tensors


def joined(function, masks=None, **fixed):
    """`function` over a dict of tensors as `make` gives, its outputs joined to one tensor, so that `check_op` takes it."""

    def call(**tensors):
        options = fixed | {n: t for n, t in tensors.items() if not isinstance(t, torch.Tensor)}
        count = sum(n.startswith("tokens") for n in tensors)
        lists = [[tensors[f"{name}{i}"] for i in range(count)] for name in ("tokens", "bottleneck")]
        tokens, bottleneck = function(*lists, key_masks=masks, **options)
        return torch.cat([t for pair in zip(tokens, bottleneck, strict=True) for t in pair], 1)

    return call


def eager(tokens_qkv, bottleneck_qkv, key_masks=None, scale=None, query_rows="all"):
    """Concatenate, attend, take apart: every step in the inputs' dtype."""
    outputs = []
    for i, (tokens, bottleneck) in enumerate(zip(tokens_qkv, bottleneck_qkv, strict=True)):
        q, k, v = (t.transpose(1, 2) for t in torch.cat([tokens, bottleneck], 1).unbind(2))
        mask = None if key_masks is None else key_masks[i]
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, bottleneck.shape[1]), value=True)
        length = tokens.shape[1]
        if query_rows == "cls":
            q, length = q[:, :, :1], 1
        out = testing.eager_attention(q, k, v, key_mask=mask, scale=scale).transpose(1, 2).flatten(2)
        outputs.append((out[:, :length], out[:, length:]))
    return [o for o, _ in outputs], [o for _, o in outputs]


def check(tensors, backend, generator, masks=None, **options):
    grad = torch.randn(joined(eager, masks, **options)(**tensors).shape, generator=generator)
    op, plain = joined(bottleneck_attention, masks, **options), joined(eager, masks, **options)
    return testing.check_op(op, plain, tensors, tuple(tensors), backend, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(lengths=(63, 97), rows=4),
        dict(lengths=(1,), rows=1, batch=1, heads=1, dim=8),
        dict(lengths=(33, 1, 111), rows=5, dim=17),
        dict(lengths=(40, 30), rows=0),
        dict(lengths=(7, 3), rows=65, batch=1),
        dict(lengths=(3, 5, 2, 7, 1, 4, 6, 9), rows=2, batch=1, heads=1, dim=8),
    ],
    ids=str,
)
def test_matches_float64(backend, generator, sizes, dtype):
    check(make(generator, dtype=dtype, **sizes), backend, generator)


@pytest.mark.parametrize("rows", [0, 4])
def test_cls_rows_are_those_of_the_whole(backend, generator, rows):
    tensors = make(generator, rows=rows)
    check(tensors, backend, generator, query_rows="cls")
    lists = [[tensors[f"{name}{i}"] for i in range(2)] for name in ("tokens", "bottleneck")]
    whole, _ = bottleneck_attention(*lists, backend=backend)
    cls, nothing = bottleneck_attention(*lists, query_rows="cls", backend=backend)
    for one, full, empty in zip(cls, whole, nothing, strict=True):
        assert one.shape == (2, 1, 32) and empty.shape == (2, 0, 32)
        torch.testing.assert_close(one, full[:, :1])


@pytest.mark.parametrize("query_rows", ["all", "cls"])
def test_nothing_behind_the_mask_leaks(backend, generator, query_rows):
    tensors = make(generator, lengths=(40, 20), batch=3)
    masks = [torch.rand(3, 40, generator=generator) < 0.5, None]
    masks[0][1] = False  # an example that sees the bottleneck alone
    poisoned, clean = dict(tensors), dict(tensors)
    hidden = ~masks[0][:, :, None, None, None] & torch.tensor([False, True, True])[:, None, None]  # its queries stay
    for bag, value in ((poisoned, float("nan")), (clean, 0.0)):
        bag["tokens0"] = tensors["tokens0"].masked_fill(hidden, value)
    ours = check(clean, backend, generator, masks, query_rows=query_rows)
    op = joined(bottleneck_attention, masks, query_rows=query_rows, backend=backend)
    run = testing.run(op, poisoned, tuple(poisoned), torch.ones_like(ours.output))
    again = testing.run(op, clean, tuple(clean), torch.ones_like(ours.output))
    assert torch.equal(run.output, ours.output)
    for name, gradient in run.gradients.items():
        assert torch.equal(gradient, again.gradients[name]), name
    assert (run.gradients["tokens0"][hidden.expand_as(tensors["tokens0"])] == 0).all()


def test_rows_without_keys_are_zero(backend, generator):
    tensors = make(generator, rows=0)
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[1] = False
    run = testing.run(joined(bottleneck_attention, [mask, None], backend=backend), tensors, tuple(tensors))
    assert (run.output[1, :33] == 0).all() and (run.output[0, :33] != 0).any() and (run.output[1, 33:] != 0).any()
    assert (run.gradients["tokens0"][1] == 0).all() and all(g.isfinite().all() for g in run.gradients.values())


@pytest.mark.parametrize("sizes", [dict(batch=0), dict(lengths=(0, 4)), dict(lengths=(0, 0), rows=0), dict(heads=0)], ids=str)
def test_empty(backend, generator, sizes):
    tensors = make(generator, **sizes)
    run = testing.run(joined(bottleneck_attention, backend=backend), tensors, tuple(tensors))
    assert run.output.isfinite().all()
    assert all(g.shape == tensors[n].shape and g.isfinite().all() for n, g in run.gradients.items())


def test_modalities_do_not_see_each_other(backend, generator):
    tensors = make(generator)
    op = joined(bottleneck_attention, backend=backend)
    before = op(**tensors)
    tensors["tokens1"] = torch.randn(2, 18, 3, 2, 16, generator=generator)
    after = op(**tensors)
    assert torch.equal(before[:, :38], after[:, :38]) and not torch.equal(before[:, 38:], after[:, 38:])


def test_any_strides(backend, generator):
    tensors = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in make(generator).items()}
    tensors["tokens0"] = torch.randn(2, 33, 3, 2, 32, generator=generator)[..., ::2]
    tensors["bottleneck0"] = torch.randn(1, 5, 3, 2, 16, generator=generator).expand(2, -1, -1, -1, -1)
    check(tensors, backend, generator)
    again = testing.run(joined(bottleneck_attention, backend=backend), tensors, tuple(tensors))
    assert all(g.isfinite().all() for g in again.gradients.values())


def test_same_bits_and_no_uninitialised_memory(backend, generator):
    tensors = make(generator, dtype=torch.bfloat16)
    op = joined(bottleneck_attention, backend=backend)
    first = testing.run(op, tensors, tuple(tensors))
    with testing.poisoned_memory():
        again = testing.run(op, tensors, tuple(tensors))
    assert torch.equal(first.output, again.output)
    assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in tensors)


def test_it_is_attention_over_both_segments(generator):
    """The reference against `ops.attention`, whose own definition is proven elsewhere."""
    tensors = make(generator, lengths=(9,), rows=3, dtype=torch.float64)
    q, k, v = torch.cat([tensors["tokens0"], tensors["bottleneck0"]], 1).permute(2, 0, 3, 1, 4)
    expected = attention(q, k, v, scale=0.3, backend="reference").transpose(1, 2).flatten(2)
    out = joined(bottleneck_attention, scale=0.3, backend="reference")(**tensors)
    torch.testing.assert_close(out, expected)


def test_reference_is_twice_differentiable(generator):
    tensors = make(generator, lengths=(3, 2), rows=1, batch=1, heads=1, dim=2, dtype=torch.float64)
    masks = [torch.tensor([[True, False, True]]), None]
    names, op = tuple(tensors), joined(bottleneck_attention, masks, backend="reference")
    values = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda *t: op(**dict(zip(names, t, strict=True))), values)
    assert torch.autograd.gradgradcheck(lambda *t: op(**dict(zip(names, t, strict=True))), values)


def test_autocast_and_compile(on, generator):
    on("cpp")
    tensors = make(generator)
    op = joined(bottleneck_attention)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(**tensors).dtype == torch.bfloat16
    compiled = torch.compile(op, fullgraph=True)
    torch.testing.assert_close(compiled(**tensors), op(**tensors))


T, Z = torch.zeros(2, 5, 3, 2, 8), torch.zeros(2, 4, 3, 2, 8)
WRONG = {
    "no list": (dict(tokens_qkv=T), TypeError, "tokens_qkv is a Tensor; it must be a list of tensors"),
    "no tensor": (dict(tokens_qkv=[T, None]), TypeError, r"tokens_qkv\[1\] is a NoneType; it must be a tensor"),
    "integers": (dict(bottleneck_qkv=[Z, Z.int()]), TypeError, r"bottleneck_qkv\[1\] has dtype torch.int32"),
    "rank": (dict(tokens_qkv=[T, T[0]]), ValueError, r"tokens_qkv\[1\] has shape \(5, 3, 2, 8\); it must be \(B, length, 3"),
    "no qkv": (dict(tokens_qkv=[T[:, :, :2], T]), ValueError, r"tokens_qkv\[0\] has shape \(2, 5, 2, 2, 8\)"),
    "none": (dict(tokens_qkv=[], bottleneck_qkv=[]), ValueError, "tokens_qkv has 0 modalities; it must have 1 to 8"),
    "many": (dict(tokens_qkv=[T] * 9), ValueError, "tokens_qkv has 9 modalities; it must have 1 to 8"),
    "unequal lists": (dict(bottleneck_qkv=[Z]), ValueError, "bottleneck_qkv has 1 entries; it must have one for each of 2"),
    "batch": (dict(tokens_qkv=[T, T[:1]]), ValueError, r"tokens_qkv\[1\] has shape .*; it must be \(2, T, 3, 2, 8\)"),
    "heads": (dict(bottleneck_qkv=[Z, Z[..., :1, :]]), ValueError, r"bottleneck_qkv\[1\] .* it must be \(2, 4, 3, 2, 8\)"),
    "head dim": (dict(tokens_qkv=[T, T[..., :4]]), ValueError, r"tokens_qkv\[1\] has shape \(2, 5, 3, 2, 4\)"),
    "bottlenecks": (dict(bottleneck_qkv=[Z, Z[:, :3]]), ValueError, r"bottleneck_qkv\[1\] .* it must be \(2, 4, 3, 2, 8\)"),
    "dtype": (dict(tokens_qkv=[T, T.double()]), TypeError, r"tokens_qkv\[1\] has dtype torch.float64; it must be that of"),
    "device": (dict(tokens_qkv=[T, T.to("meta")]), ValueError, r"tokens_qkv\[1\] is on meta; it must be on cpu"),
    "too many": (
        dict(bottleneck_qkv=[torch.zeros(2, 1025, 3, 2, 8)] * 2),
        ValueError,
        "1025 bottleneck tokens; .* at most 1024",
    ),
    "masks": (dict(key_masks=torch.ones(2, 5)), TypeError, "key_masks is a Tensor; it must be None or a list"),
    "mask count": (dict(key_masks=[None]), ValueError, "key_masks has 1 entries"),
    "mask length": (
        dict(key_masks=[None, torch.ones(2, 9, dtype=torch.bool)]),
        ValueError,
        r"key_masks\[1\] has shape \(2, 9\); it must be \(B, M\) = \(2, 5\)",
    ),
    "query rows": (dict(query_rows="first"), ValueError, "query_rows is 'first'; allowed are 'all' and 'cls'"),
    "no cls": (dict(tokens_qkv=[T, T[:, :0]], query_rows="cls"), ValueError, r"tokens_qkv\[1\] has no tokens"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; allowed are 'auto', 'cuda'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, error, message = WRONG[case]
    arguments = dict(tokens_qkv=[T, T], bottleneck_qkv=[Z, Z]) | changes
    for call in (bottleneck_attention, lambda **kw: mmkernels.explain("bottleneck_attention", **kw)):
        with pytest.raises(error, match=message):
            call(**arguments)

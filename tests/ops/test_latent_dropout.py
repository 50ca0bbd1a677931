"""Dropout of `ops.latent_attention`'s weights: the mask of `ops.attention`, under every plan and on every backend."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmkernels
from mmkernels import testing
from mmkernels.ops import latent_attention
from mmkernels.ops._shared import dropout
from mmkernels.ops._shared.registration import forward_backward
from mmkernels.ops.latent import api, autograd, plan

P = 0.3
SEED = torch.tensor([20240607])


@pytest.fixture(autouse=True)
def absorbed(monkeypatch):
    """Sizes of any kind run on the core, which is what is new here."""
    monkeypatch.setattr(api, "_plan", lambda *_: plan.Plan("absorb_into_queries", "raw_input", 0))


def make(generator, sizes=(2, 9, 150), channels=(13, 8), heads=2, batch_q=None, dtype=torch.float32):
    (batch, queries, keys), c = sizes, sum(channels)

    def random(*shape, scale=1.0, shift=0.0):
        return (scale * torch.randn(*shape, generator=generator) + shift).to(dtype)

    made = dict(
        q=random(batch_q or batch, queries, 12 * heads),
        x=random(batch, keys, channels[0]),
        w_k=random(12 * heads, c, scale=c**-0.5),
        w_v=random(10 * heads, c, scale=c**-0.5),
        norm_weight=random(c, scale=0.3, shift=1.0),
        norm_bias=random(c, scale=0.3),
        b_v=random(10 * heads),
    )
    return made | (dict(position=random(keys, channels[1])) if channels[1] else {})


def eager(**arguments):
    """The definition with the mask written out."""

    def attention(q, k, v, *, key_mask=None, scale=None):
        scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
        weights = scores.softmax(-1).nan_to_num()
        return (weights * dropout.keep_mask(SEED, weights.shape, P) / (1 - P)) @ v

    return testing.eager_latent_attention(**arguments, attention=attention)


def op_or_definition(*, backend, **arguments):
    """What `testing.check_op` compares with, "reference", is the definition above."""
    if backend == "reference":
        return eager(**arguments)
    return latent_attention(**arguments, backend=backend, dropout_p=P, dropout_seed=SEED)


def check(backend, generator, tensors, wanted=None, **options):
    wanted = tuple(tensors) if wanted is None else wanted
    shape = (tensors["x"].shape[0], tensors["q"].shape[1], tensors["w_v"].shape[0])
    grad = torch.randn(shape, generator=generator)
    return testing.check_op(op_or_definition, eager, tensors, wanted, backend, grad, **options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "sizes, channels, heads", [((2, 9, 150), (13, 8), 2), ((1, 33, 70), (64, 0), 1), ((3, 1, 40), (3, 29), 1)], ids=str
)
def test_matches_float64(backend, generator, sizes, channels, heads, dtype):
    tensors = make(generator, sizes, channels, heads, dtype=dtype)
    check(backend, generator, tensors, num_heads=heads)


@pytest.mark.parametrize("score", plan.SCORE_PLANS[:2])
@pytest.mark.parametrize("value", plan.VALUE_PLANS[:2])
def test_every_plan_drops_the_same(backend, generator, monkeypatch, score, value):
    tensors = make(generator, (2, 7, 60))
    mask = torch.rand(2, 60, generator=generator) < 0.7
    monkeypatch.setattr(api, "_plan", lambda *_: plan.Plan(score, value, 0))
    check(backend, generator, tensors, num_heads=2, key_mask=mask)


def test_the_reference_is_the_definition(generator):
    tensors = make(generator, dtype=torch.float64)
    out = latent_attention(**tensors, num_heads=2, dropout_p=P, dropout_seed=SEED, backend="reference")
    torch.testing.assert_close(out, eager(**tensors, num_heads=2))


def test_wide_rows_and_shared_queries(backend, generator):
    check(backend, generator, make(generator, (3, 5, 40), (130, 131), batch_q=1), num_heads=2)


@pytest.mark.parametrize("missing", ["norm_bias", "b_v", "position"])
def test_without_a_part(backend, generator, missing):
    tensors = make(generator, (1, 5, 40), (16, 0 if missing == "position" else 4))
    tensors.pop(missing, None)
    check(backend, generator, tensors, num_heads=2)
    check(backend, generator, tensors, ("q", "w_v"), num_heads=2)


def test_rows_without_keys_and_nan_behind_the_mask(backend, generator):
    tensors = make(generator, (2, 5, 40))
    mask = torch.rand(2, 40, generator=generator) < 0.6
    mask[1] = False
    options = dict(num_heads=2, key_mask=mask, backend=backend, dropout_p=P, dropout_seed=SEED)
    clean = testing.run(latent_attention, tensors, tuple(tensors), **options)
    tensors["x"] = tensors["x"].masked_fill(~mask[..., None], float("nan"))
    poisoned = testing.run(latent_attention, tensors, tuple(tensors), **options)
    assert (clean.output[1] == 0).all() and torch.equal(clean.output, poisoned.output)
    assert all(torch.equal(clean.gradients[n], poisoned.gradients[n]) for n in tensors)


def test_drawn_seeds_and_checkpointing(backend, generator):
    tensors = {n: t.requires_grad_() for n, t in make(generator, (1, 5, 60)).items()}

    def call(q, x):
        return latent_attention(**{**tensors, "q": q, "x": x}, num_heads=2, dropout_p=P, backend=backend)

    torch.manual_seed(3)
    first, second = (call(tensors["q"], tensors["x"]) for _ in range(2))
    torch.manual_seed(3)
    again = checkpoint(call, tensors["q"], tensors["x"], use_reentrant=False)
    assert torch.equal(first, again) and not torch.equal(first, second)
    wanted = list(tensors.values())
    gradients = [torch.autograd.grad(y.square().sum(), wanted) for y in (first, again)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiles_whole(backend, generator):
    torch._dynamo.reset()
    tensors = {n: t.requires_grad_() for n, t in make(generator, (1, 5, 60), (16, 0), heads=1).items()}
    call = functools.partial(latent_attention, dropout_p=P, dropout_seed=SEED, backend=backend)
    compiled = torch.compile(lambda t: call(**t), fullgraph=True, backend="aot_eager")
    outputs = call(**tensors), compiled(tensors)
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(y.square().sum(), list(tensors.values())) for y in outputs]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_opcheck(backend, generator):
    q, x = torch.randn(1, 6, 10, generator=generator), torch.randn(2, 30, 7, generator=generator)
    position, mask = torch.randn(30, 3, generator=generator), torch.rand(2, 30, generator=generator) < 0.7
    forward, backward = forward_backward("latent", backend)
    torch.library.opcheck(forward, (q, x, position, mask, 0.3, 1e-5, SEED, P))
    out, lse = forward(q, x, position, mask, 0.3, 1e-5, SEED, P)
    assert out.shape == (2, 6, 11)
    grads = torch.randn_like(out), torch.randn_like(lse)
    torch.library.opcheck(backward, (*grads, q, x, position, mask, out, lse, 0.3, 1e-5, 7, SEED, P))


def test_the_sum_of_a_row(backend, generator):
    """The core's last channel, with keys in several splits."""
    q, x = torch.randn(2, 20, 16, generator=generator), torch.randn(2, 700, 16, generator=generator)
    out, lse = forward_backward("latent", backend)[0](q, x, None, None, 0.3, 1e-5, SEED, P)
    xhat = torch.nn.functional.layer_norm(x.double(), (16,))
    scores = 0.3 * q.double() @ xhat.mT
    weights = scores.softmax(-1) * dropout.keep_mask(SEED, (2, 1, 20, 700), P)[:, 0] / (1 - P)
    torch.testing.assert_close(out[..., -1].double(), weights.sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[..., :-1].double(), weights @ xhat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("first_key", [0, 7, 2**31 - 5, 2**32 - 5, 2**33 + 3])
def test_the_mask_of_a_part(backend, generator, rows, first_key):
    """With keys that are unit vectors the core returns its weights, and so shows to the bit what it dropped."""
    q, x = torch.randn(2, rows, 48, generator=generator), torch.eye(48).expand(2, -1, -1)
    forward = forward_backward("latent", backend)[0]
    keep = dropout.keep_mask(SEED, (2, 1, rows, 48 + first_key % 100), P, first_key // 100 * 100)[:, 0, :, first_key % 100 :]
    for own in (forward, autograd.core_pair("reference")[0]):
        out, _ = own(q, x, None, None, 0.3, -1.0, SEED, P, first_key)
        assert torch.equal(out[..., :-1] > 0, keep)


def test_wrong_dropout(generator):
    tensors = make(generator)
    for changes, error, message in (
        (dict(dropout_p=1.0), ValueError, r"dropout_p is 1.0; it must be a number in \[0, 1\)"),
        (dict(dropout_p=None), TypeError, "dropout_p is None; it must be a number"),
        (dict(dropout_p=0.5, dropout_seed=3), TypeError, "dropout_seed is a int; it must be a tensor"),
        (dict(dropout_seed=torch.zeros(2, dtype=torch.int64)), ValueError, "dropout_seed has shape .* of one element"),
        (dict(dropout_seed=SEED.to("meta")), ValueError, "dropout_seed is on meta; it must be on x's device, cpu"),
    ):
        for call in (latent_attention, functools.partial(mmkernels.explain, "latent_attention")):
            with pytest.raises(error, match=message):
                call(**tensors, num_heads=2, **changes)

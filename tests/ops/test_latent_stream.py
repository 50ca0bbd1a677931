"""Streams of chunks and sharded inputs: the whole input's result and gradients, constant memory, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

import mmkernels
from mmkernels import _library, ops, testing
from mmkernels.ops import LatentState, latent_attention, latent_attention_stream
from mmkernels.ops._shared.dropout import draw_seed, keep_mask
from mmkernels.ops.latent import plan

WEIGHTS = ("q", "w_k", "w_v", "norm_weight", "norm_bias", "b_v")


@pytest.fixture(params=["absorbed", "projected"])
def form(request, monkeypatch):
    """What the chunks become, whatever takes fewer operations."""
    monkeypatch.setattr(plan, "absorbing_share", lambda *_: 0.5 if request.param == "absorbed" else 2.0)
    return request.param


def make(generator, batch=2, queries=9, keys=150, content=13, shared=8, heads=2, dtype=torch.float32):
    c = content + shared

    def random(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    weights = dict(
        q=random(batch, queries, 12 * heads),
        w_k=random(12 * heads, c, scale=c**-0.5),
        w_v=random(10 * heads, c, scale=c**-0.5),
        norm_weight=1 + random(c, scale=0.3),
        norm_bias=random(c, scale=0.3),
        b_v=random(10 * heads),
    )
    x, position = random(batch, keys, content), random(keys, shared) if shared else None
    mask = torch.rand(batch, keys, generator=generator) < 0.7
    return weights, x, position, mask


def cut(x, position, mask, sizes=(1, 64, 0, 40, 45)):
    return list(
        zip(
            x.split(sizes, 1),
            [None] * len(sizes) if position is None else position.split(sizes),
            [None] * len(sizes) if mask is None else mask.split(sizes, 1),
            strict=True,
        )
    )


def exact(weights, x, position, mask, **options):
    """Float64 by the definition, and plain eager in the dtype of the inputs: the budget."""
    wide = {n: t.double() for n, t in weights.items()}
    place = None if position is None else position.double()
    best = latent_attention(**wide, x=x.double(), position=place, key_mask=mask, backend="reference", **options)
    return best, testing.eager_latent_attention(**weights, x=x, position=position, key_mask=mask, **options)


# --- The state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_state_equals_the_whole(backend, generator, form, dtype):
    weights, x, position, mask = make(generator, dtype=dtype)
    state = LatentState(**weights, num_heads=2, backend=backend)
    for chunk in cut(x, position, mask):
        assert state.update(*chunk) is state
    best, plain = exact(weights, x, position, mask, num_heads=2)
    testing.assert_within_budget(state.result(), best, plain, "output")


def test_states_merge_in_any_grouping(generator, form):
    weights, x, position, mask = make(generator)
    chunks = cut(x, position, mask)
    states = [LatentState(**weights, num_heads=2).update(*chunk) for chunk in reversed(chunks)]
    empty = LatentState(**weights, num_heads=2)
    whole = empty.merge(states[0].merge(states[1])).merge(states[4].merge(states[3])).merge(states[2])
    whole.merge(LatentState(**{n: t.clone() for n, t in weights.items()}, num_heads=2))
    best, plain = exact(weights, x, position, mask, num_heads=2)
    testing.assert_within_budget(whole.result(), best, plain, "output")


def test_state_without_norm_and_position_and_with_shared_queries(backend, generator, form):
    weights, x, _, _ = make(generator, shared=0, heads=1)
    weights = {n: weights[n] for n in ("q", "w_k", "w_v")}
    weights["q"] = weights["q"][:1]
    state = LatentState(**weights, eps=None, scale=0.1, backend=backend)
    for chunk in x.split(33, 1):
        state.update(chunk)
    best, plain = exact(weights, x, None, None, eps=None, scale=0.1)
    testing.assert_within_budget(state.result(), best, plain, "output")


def test_rows_without_keys_are_zero(backend, generator, form):
    weights, x, position, mask = make(generator)
    mask[1] = False
    state = LatentState(**weights, num_heads=2, backend=backend)
    assert torch.equal(state.result(), torch.zeros(2, 9, 20))
    for i, (part, place, visible) in enumerate(cut(x, position, mask)):
        state.update(torch.where(visible[..., None], part, float("nan")), place, visible)
        assert i == 0 or (state.result()[1] == 0).all()
    whole = latent_attention(**weights, x=x, position=position, key_mask=mask, num_heads=2, backend=backend)
    torch.testing.assert_close(state.result(), whole)
    assert (state.result()[0] != 0).any()


def test_large_scores_do_not_overflow(generator, form):
    """Every chunk's sum of exponentials would be infinite or zero on its own scale of another one."""
    weights, x, position, _ = make(generator)
    weights["q"] = weights["q"] * 300
    state = LatentState(**weights, num_heads=2)
    for chunk in cut(x, position, None):
        state.update(*chunk)
    best, plain = exact(weights, x, position, None, num_heads=2)
    testing.assert_within_budget(state.result(), best, plain, "output")


def test_state_in_float64_and_beyond_the_kernels(generator):
    weights, x, position, mask = make(generator, content=1030, dtype=torch.float64)
    state = LatentState(**weights, num_heads=2)
    for chunk in cut(x, position, mask):
        state.update(*chunk)
    torch.testing.assert_close(
        state.result(), latent_attention(**weights, x=x, position=position, key_mask=mask, num_heads=2), rtol=1e-10, atol=1e-10
    )
    single = LatentState(**{n: t.float() for n, t in weights.items()}, num_heads=2, backend="cpp")
    with pytest.raises(mmkernels.BackendError, match="the input has 1038 channels; its absorbed kernels take up to 1024"):
        single.update(x.float(), position.float())


def test_state_under_autocast(generator, form):
    weights, x, position, mask = make(generator)
    with torch.autocast("cpu", torch.bfloat16):
        state = LatentState(**weights, num_heads=2)
        for chunk in cut(x, position, mask):
            state.update(*chunk)
        out = state.result()
        plain = testing.eager_latent_attention(**weights, x=x, position=position, key_mask=mask, num_heads=2)
    assert out.dtype == torch.bfloat16
    best, _ = exact(weights, x, position, mask, num_heads=2)
    testing.assert_within_budget(out, best, plain, "output")


# --- Gradients -------------------------------------------------------------------------------------------------------


def gradients(function, weights, loss):
    inputs = {n: t.detach().clone().requires_grad_() for n, t in weights.items()}
    out = function(**inputs)
    return out, dict(zip(inputs, torch.autograd.grad((out * loss.to(out.dtype)).sum(), list(inputs.values())), strict=True))


@pytest.mark.parametrize("case", ["plain", "masked", "shared queries", "bfloat16"])
def test_gradients_equal_the_whole(backend, generator, form, case):
    weights, x, position, mask = make(generator, dtype=torch.bfloat16 if case == "bfloat16" else torch.float32)
    if case == "shared queries":
        weights["q"] = weights["q"][:1]
    mask = mask if case == "masked" else None
    loss = torch.randn(2, 9, 20, generator=generator)
    chunks = cut(x, position, mask)
    ours = gradients(lambda **w: latent_attention_stream(chunks=chunks, num_heads=2, backend=backend, **w), weights, loss)
    wide = {n: t.double() for n, t in weights.items()}
    common = dict(key_mask=mask, num_heads=2)
    best = gradients(
        lambda **w: latent_attention(x=x.double(), position=position.double(), backend="reference", **common, **w), wide, loss
    )
    plain = gradients(lambda **w: testing.eager_latent_attention(x=x, position=position, **common, **w), weights, loss)
    testing.assert_within_budget(ours[0], best[0], plain[0], "output")
    for name in weights:
        testing.assert_within_budget(ours[1][name], best[1][name], plain[1][name], name, 3.0)


@pytest.mark.parametrize("case", ["plain", "masked", "shared queries", "bfloat16"])
def test_dropout_drops_what_it_drops_of_the_whole(backend, generator, form, case):
    """Gradients of weights and of what the chunks are made of, against the definition with the mask written out."""
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    weights, x, position, mask = make(generator, dtype=dtype)
    if case == "shared queries":
        weights["q"] = weights["q"][:1]
    mask = mask if case == "masked" else None
    p, seed, loss = 0.4, torch.tensor([77]), torch.randn(2, 9, 20, generator=generator)
    keep = keep_mask(seed, (2, 2, 9, 150), p)

    def attention(q, k, v, *, key_mask=None, scale=None):
        scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], float("-inf"))
        return (scores.softmax(-1) * keep / (1 - p)) @ v

    def definition(x, position, **w):
        return testing.eager_latent_attention(x=x, position=position, key_mask=mask, num_heads=2, attention=attention, **w)

    def stream(x, position, **w):
        options = dict(num_heads=2, dropout_p=p, dropout_seed=seed, backend=backend)
        return latent_attention_stream(chunks=lambda: cut(x, position, mask), parameters=(x, position), **options, **w)

    every = {**weights, "x": x, "position": position}
    ours, plain = gradients(stream, every, loss), gradients(definition, every, loss)
    best = gradients(definition, {n: t.double() for n, t in every.items()}, loss)
    testing.assert_within_budget(ours[0], best[0], plain[0], "output")
    for name in every:
        testing.assert_within_budget(ours[1][name], best[1][name], plain[1][name], name, 3.0)


def test_dropout_is_drawn_before_the_chunks(generator):
    """The backward pass reads chunks again that are drawn by the same generator."""
    weights, _, _, _ = make(generator, shared=0)
    weights["q"].requires_grad_()
    torch.manual_seed(4)
    outs = [
        latent_attention_stream(
            chunks=lambda: (torch.randn(2, 30, 13) for _ in range(3)), num_heads=2, dropout_p=0.5, **weights
        )
        for _ in range(2)
    ]
    assert not torch.equal(*outs)
    torch.manual_seed(4)
    seed = draw_seed(torch.device("cpu"))
    x = torch.cat([torch.randn(2, 30, 13) for _ in range(3)], 1)
    whole = latent_attention(x=x, num_heads=2, dropout_p=0.5, dropout_seed=seed, **weights)
    torch.testing.assert_close(outs[0], whole)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), weights["q"])[0] for y in (outs[0], whole)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_one_weight_alone(generator, form, name):
    weights, x, position, mask = make(generator, dtype=torch.float64)
    weights[name].requires_grad_()
    stream = latent_attention_stream(chunks=cut(x, position, mask), num_heads=2, **weights)
    whole = latent_attention(x=x, position=position, key_mask=mask, num_heads=2, **weights)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), weights[name]) for y in (stream, whole)))


def test_gradients_in_float64(generator, form):
    weights, x, position, mask = make(generator, dtype=torch.float64)
    mask[1] = False
    x[1] = weights["q"][1] = float("nan")  # of an example without keys: no weight's gradient may see it
    loss = torch.randn(2, 9, 20, generator=generator)
    common = dict(num_heads=2, backend="reference")
    stream = gradients(lambda **w: latent_attention_stream(chunks=cut(x, position, mask), **common, **w), weights, loss)
    whole = gradients(lambda **w: latent_attention(x=x, position=position, key_mask=mask, **common, **w), weights, loss)
    torch.testing.assert_close(stream, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["list", "generator function", "dataset", "loader"])
def test_what_chunks_may_be(generator, kind):
    weights, x, position, _ = make(generator)
    pieces = cut(x, position, None, (50, 50, 50))
    pieces = [piece[:2] for piece in pieces]

    class Chunks(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return pieces[range(3)[i]]

    chunks = {
        "list": pieces,
        "generator function": lambda: iter(pieces),
        "dataset": Chunks(),
        "loader": torch.utils.data.DataLoader(Chunks(), batch_size=None, shuffle=True),  # replayed by the generators' state
    }[kind]
    w_k = weights["w_k"].requires_grad_()
    out = latent_attention_stream(chunks=chunks, num_heads=2, **weights)
    whole = latent_attention(x=x, position=position, num_heads=2, **weights)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), w_k)[0] for y in (out, whole)))


def test_chunks_made_of_parameters(backend, generator, form):
    """A preprocessor with dropout, and a learned table of positions."""
    weights, _, _, mask = make(generator)
    raw = torch.randn(2, 150, 5, generator=generator)
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(5, 13), nn.Dropout(0.2))
    unused = nn.Parameter(torch.zeros(3))
    table = nn.Parameter(torch.randn(150, 8, generator=generator))
    graphs = []

    def chunks():
        for part, place, visible in zip(raw.split(50, 1), table.split(50), mask.split(50, 1), strict=True):
            made = layer(part)
            graphs.append(made.requires_grad)
            yield made, place, visible

    parameters = [*layer.parameters(), table, unused]
    query = weights["q"].requires_grad_()
    before = torch.get_rng_state()
    out = latent_attention_stream(chunks=chunks, num_heads=2, parameters=parameters, backend=backend, **weights)
    ours = torch.autograd.grad(out.square().sum(), [query, *parameters], allow_unused=True)
    assert graphs == [False] * 3 + [True] * 3
    torch.set_rng_state(before)
    made = torch.cat([layer(part) for part in raw.split(50, 1)], 1)
    whole = latent_attention(x=made, position=table, key_mask=mask, num_heads=2, backend=backend, **weights)
    expected = torch.autograd.grad(whole.square().sum(), [query, *parameters], allow_unused=True)
    torch.testing.assert_close(out, whole)
    assert ours[-1] is None and expected[-1] is None
    torch.testing.assert_close(ours[:-1], expected[:-1], rtol=1e-4, atol=1e-5)


def test_parameters_under_autocast(generator, form):
    weights, _, _, _ = make(generator, shared=0)
    raw, layer = torch.randn(2, 100, 5, generator=generator), nn.Linear(5, 13)
    with torch.autocast("cpu", torch.bfloat16):
        out = latent_attention_stream(
            chunks=lambda: map(layer, raw.split(50, 1)), parameters=layer.parameters(), num_heads=2, **weights
        )
        whole = latent_attention(x=layer(raw), num_heads=2, **weights)
        plain = testing.eager_latent_attention(x=layer(raw), num_heads=2, **weights)
    testing.assert_within_budget(out, exact(weights, layer(raw), None, None, num_heads=2)[0], plain, "output")
    ours, expected = (torch.autograd.grad(y.float().square().sum(), layer.weight)[0] for y in (out, whole))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_no_chunk_at_all(generator, form):
    weights, *_ = make(generator)
    out, grads = gradients(lambda **w: latent_attention_stream(chunks=[], num_heads=2, **w), weights, torch.ones(2, 9, 20))
    assert torch.equal(out, torch.zeros(2, 9, 20))
    assert all(torch.equal(g, torch.zeros_like(weights[n])) for n, g in grads.items())


def test_the_key_bias_has_a_zero_gradient(generator, form):
    weights, x, position, _ = make(generator)
    b_k = torch.randn(24, generator=generator).requires_grad_()
    out = latent_attention_stream(chunks=[(x, position)], b_k=b_k, num_heads=2, **weights)
    assert torch.equal(torch.autograd.grad(out.sum(), b_k)[0], torch.zeros(24))


def test_nothing_of_a_chunk_is_kept(generator, form):
    weights, x, position, _ = make(generator)
    weights = {n: t.requires_grad_() for n, t in weights.items()}
    saved, read = [], []

    def chunks():
        for part in x.split(25, 1):
            read.append(0)
            yield torch.cat([part, position[:25].expand(2, -1, -1)], -1)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = latent_attention_stream(chunks=chunks, num_heads=2, **weights)
    assert saved and not any(25 in shape or 150 in shape for shape in saved)
    out.sum().backward()
    assert len(read) == 12
    with pytest.raises(RuntimeError, match="no second derivative"):
        again = latent_attention_stream(chunks=chunks, num_heads=2, **weights)
        (first,) = torch.autograd.grad(again.square().sum(), weights["q"], create_graph=True)
        torch.autograd.grad(first.sum(), weights["w_k"])


# --- What is refused -------------------------------------------------------------------------------------------------


def second(chunks, other):
    """Gives `chunks` when first read and `other` afterwards."""
    readings = iter([chunks, other])
    return lambda: iter(next(readings))


CHANGED = {
    "fewer": (lambda c: c[:2], "there were 3 of them and are 2"),
    "more": (lambda c: [*c, c[0]], "there were 3 of them and are more"),
    "shape": (lambda c: [c[0], c[1][:, 1:], c[2]], r"chunks\[1\] was \(2, 50, 13\) of torch.float32 and is \(2, 49, 13\)"),
    "values": (lambda c: [c[0], c[1], c[2] * 1.0001], r"chunks\[2\] has other values"),
    "order of rows": (lambda c: [c[0], c[1].flip(1), c[2]], r"chunks\[1\] has other values"),
    "examples": (lambda c: [c[0].flip(0), *c[1:]], r"chunks\[0\] has other values"),
    "mask": (lambda c: [(c[0], None, torch.ones(2, 50) > 0), *c[1:]], r"chunks\[0\] key_mask was None and is \(2, 50\)"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_second_reading_that_differs(generator, form, case):
    weights, x, _, _ = make(generator, shared=0)
    weights["q"].requires_grad_()
    chunks = list(x.split(50, 1))
    change, message = CHANGED[case]
    out = latent_attention_stream(chunks=second(chunks, change(chunks)), num_heads=2, **weights)
    with pytest.raises(
        RuntimeError, match=f"the second reading of chunks, for the gradient, differs from the first: {message}"
    ):
        out.sum().backward()


WRONG = {
    "iterator": (lambda x: iter([x]), TypeError, "chunks is a list_iterator, which can be read once"),
    "tensor": (lambda x: x, TypeError, r"chunks is a Tensor; it must be a series of them, as x.split\(4096, 1\)"),
    "number": (lambda x: 3, TypeError, "chunks is a int; it must be iterable, or a function"),
    "parts": (lambda x: [(x, None, None, None)], ValueError, r"chunks\[0\] has 4 parts; it must be x, \(x, position\)"),
    "gradient": (
        lambda x: [x * torch.ones(1, requires_grad=True)],
        ValueError,
        r"chunks\[0\] wants a gradient; name in `para",
    ),
    "no tensor": (lambda x: [x, "text"], TypeError, r"chunks\[1\] is a str; it must be a tensor"),
    "rank": (lambda x: [x[0]], ValueError, r"chunks\[0\] has shape \(150, 13\); it must have 3 dimensions \(B, m, Cx\)"),
    "width": (lambda x: [x[..., :9]], ValueError, r"chunks\[0\] is of batch 2, 9 channels; the channels together.*w_k, 13"),
    "batch": (lambda x: [x, x[:1]], ValueError, r"chunks\[1\] is of batch 1, 13 channels; those before it are of batch 2, 13"),
    "queries": (lambda x: [x[:1]], ValueError, r"chunks\[0\] has batch 1; it must be that of q, 2"),
    "dtype": (lambda x: [x.double()], TypeError, r"chunks\[0\] has dtype torch.float64; it must be q's, torch.float32"),
    "device": (lambda x: [x.to("meta")], ValueError, r"chunks\[0\] is on meta; it must be on q's device, cpu"),
    "position": (
        lambda x: [(x[..., :5], torch.zeros(9, 8))],
        ValueError,
        r"position has shape \(9, 8\); with chunks\[0\] \(2, 150, 5\) it must be \(150, Cp\)",
    ),
    "mask": (lambda x: [(x, None, torch.ones(2, 9) > 0)], ValueError, r"key_mask has shape \(2, 9\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_chunks(generator, form, case):
    weights, x, _, _ = make(generator, shared=0)
    weights["q"].requires_grad_()
    chunks, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        latent_attention_stream(chunks=chunks(x), num_heads=2, **weights)


def test_wrong_weights_and_parameters(generator):
    weights, x, _, _ = make(generator, shared=0)
    for call in (
        lambda **w: LatentState(**w),
        lambda **w: latent_attention_stream(chunks=[x], **w),
        lambda **w: mmkernels.explain("latent_attention_stream", chunks=[x], **w),
        lambda **w: mmkernels.explain("latent_attention_sharded", x=x, **w),
    ):
        for changes, error, message in (
            (dict(q=None), TypeError, "q is a NoneType; it must be a tensor"),
            (dict(w_k=torch.zeros(24)), ValueError, r"w_k has shape \(24,\); it must have 2 dimensions"),
            (dict(w_v=torch.zeros(20, 9)), ValueError, r"w_v has shape \(20, 9\); it must be \(H \* E, 13\)"),
            (dict(num_heads=5), ValueError, "a multiple of num_heads = 5 rows"),
            (dict(eps=-1.0), ValueError, "eps is -1.0"),
            (dict(backend="numpy"), ValueError, "backend is 'numpy'; allowed are 'auto'"),
        ):
            with pytest.raises(error, match=message):
                call(**{**weights, "num_heads": 2, **changes})
    with pytest.raises(TypeError, match=r"parameters\[0\] is a str; it must be a tensor"):
        latent_attention_stream(chunks=[x], parameters=["weight"], num_heads=2, **weights)


def test_state_refuses(generator):
    weights, x, position, _ = make(generator)
    state = LatentState(**weights, num_heads=2).update(x, position)
    for what, message in (
        (dict(b_v=weights["b_v"] + 1), "other has a different b_v; it must be made of the same queries and weights"),
        (dict(norm_bias=None), "other has a different norm_bias"),
        (dict(scale=0.5), "other has scale 0.5; it must be the same, 0.288"),
    ):
        with pytest.raises(ValueError, match=message):
            state.merge(LatentState(**{**weights, "num_heads": 2, **what}).update(x, position))
    with pytest.raises(TypeError, match="other is a Tensor; it must be a LatentState"):
        state.merge(x)
    with pytest.raises(
        ValueError, match="chunk is of batch 2, 21 channels; those before it are of batch 2, 13 channels and 8 of"
    ):
        state.update(torch.cat([x, position.expand(2, -1, -1)], -1))
    with pytest.raises(ValueError, match="chunk wants a gradient, which a LatentState does not keep"):
        state.update(x.clone().requires_grad_(), position)
    other = LatentState(**{**weights, "q": weights["q"][:1]}, num_heads=2)
    with pytest.raises(ValueError, match="chunk wants a gradient"):
        other.update(x[:1].clone().requires_grad_(), position)
    assert other.update(x, position).result().shape == (2, 9, 20)  # what was refused left nothing behind
    trained = {**weights, "w_v": weights["w_v"].clone().requires_grad_()}
    with pytest.raises(
        ValueError, match="w_v wants a gradient, which a LatentState does not keep: use ops.latent_attention_s"
    ):
        LatentState(**trained, num_heads=2)
    with torch.no_grad():
        torch.testing.assert_close(LatentState(**trained, num_heads=2).update(x, position).result(), state.result())


def test_explain(generator, monkeypatch):
    weights, x, _, _ = make(generator, shared=0)
    told = mmkernels.explain("latent_attention_stream", chunks=[x], num_heads=2, backend="reference", **weights)
    assert (told.op, told.backend) == ("latent_attention_stream", "reference") and told.refusals["sdpa"]
    assert mmkernels.explain("latent_attention_stream", chunks=[], num_heads=2, **weights).backend
    assert told.detail == "absorbed, chunk by chunk"
    monkeypatch.setattr(plan, "absorbing_share", lambda *_: 1.5)
    for grad in (False, True):  # with gradients, which cost more where weights are on the chunks' side
        weights["w_v"].requires_grad_(grad)
        told = mmkernels.explain("latent_attention_stream", chunks=[x], num_heads=2, **weights)
        assert told.detail == f"{'absorbed' if grad else 'projected'}, chunk by chunk"
    monkeypatch.undo()
    weights["w_v"].requires_grad_(False)
    wide = dict(w_v=torch.randn(2050, 13, generator=generator), b_v=torch.randn(2050, generator=generator))
    many = weights | wide  # heads that the kernels of ops.attention do not take
    monkeypatch.setattr(plan, "absorbing_share", lambda *_: 2.0)
    told = mmkernels.explain("latent_attention_stream", chunks=[x], num_heads=2, **many)
    assert told.detail == "absorbed, chunk by chunk"
    monkeypatch.undo()
    many = {**weights, "q": weights["q"].repeat(1, 20, 1)}
    told = mmkernels.explain("latent_attention_stream", chunks=[x], num_heads=2, backend="reference", **many)
    assert (told.op, told.backend, told.detail) == ("latent_attention_stream", "reference", "projected, chunk by chunk")
    told = mmkernels.explain("latent_attention_stream", chunks=[x], num_heads=2, dropout_p=0.1, **many)
    assert told.detail == "absorbed, chunk by chunk"
    told = mmkernels.explain("latent_attention_sharded", x=x, num_heads=2, dropout_p=0.5, backend="reference", **weights)
    assert (told.op, told.backend) == ("latent_attention_sharded", "reference") and told.refusals["sdpa"]
    rows, sent = 2 * 2 * 9, (2 * 2 * 9) * (13 + 3) * 4  # maxima; sums, with those of dropped weights
    assert told.detail == (
        f"absorbed, {4 * rows * 150 * 13:.3g} operations for this rank's 150 rows; all-reduces of {sent:.3g} bytes forward "
        f"and {rows * 13 * 4:.3g} bytes backward"
    )
    assert ops.LatentState is LatentState


# --- Shards -------------------------------------------------------------------------------------------------------------


def test_shards_in_three_processes(run_ranks):
    backend = "cpp" if _library.load("cpu").loaded else "reference"
    for output in run_ranks(Path(__file__).with_name("sharded.py"), 3, backend):
        assert "the whole input's result" in output, output


def test_shards_need_a_process_group(generator):
    weights, x, _, _ = make(generator, shared=0)
    with pytest.raises(RuntimeError, match="needs a process group: call torch.distributed.init_process_group first"):
        ops.latent_attention_sharded(x=x, num_heads=2, **weights)

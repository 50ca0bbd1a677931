"""`ops.latent_decode` on every backend: against float64 with plain eager's error as the budget, and by its meaning."""

import pytest
import torch

import mmkernels
from mmkernels import testing
from mmkernels.ops import latent_decode
from mmkernels.ops._shared.registration import forward_backward
from mmkernels.ops.latent import decode, decode_autograd, decode_reference, plan

EVERYTHING = ("queries", "k", "v", "w_q", "w_o", "norm_weight", "norm_bias", "b_q", "b_o", "position")
FOLDED = plan.Plan("absorb_into_keys", "output_side", 0)


def make(generator, sizes=(2, 61, 7), channels=(21, 0), dims=(24, 40, 20), shared=False, dtype=torch.float32, affine=True):
    """Arguments for (B, O, N), (Cx, Cp) and the projected sizes (H*D, H*E, Cout)."""
    (b, o, n), (content, position), (qk, v, out) = sizes, channels, dims
    c = content + position
    made = {
        "queries": torch.randn(1 if shared else b, o, content, generator=generator),
        "k": torch.randn(b, n, qk, generator=generator),
        "v": torch.randn(b, n, v, generator=generator),
        "w_q": torch.randn(qk, c, generator=generator) * c**-0.5,
        "w_o": torch.randn(out, v, generator=generator) * v**-0.5,
    }
    if affine:
        made["norm_weight"] = 1 + 0.3 * torch.randn(c, generator=generator)
        made["norm_bias"] = 0.3 * torch.randn(c, generator=generator)
        made["b_q"] = torch.randn(qk, generator=generator)
        made["b_o"] = torch.randn(out, generator=generator)
    if position:
        made["position"] = torch.randn(o, position, generator=generator)
    return {name: t.to(dtype) for name, t in made.items()}


def cotangent(generator, tensors):
    shape = (tensors["k"].shape[0], tensors["queries"].shape[1], tensors["w_o"].shape[0])
    return torch.randn(shape, generator=generator).to(tensors["queries"].dtype)


def check(backend, generator, tensors, wanted=None, **options):
    wanted = tuple(n for n in EVERYTHING if n in tensors) if wanted is None else wanted
    grad = cotangent(generator, tensors)
    return testing.check_op(latent_decode, testing.eager_latent_decode, tensors, wanted, backend, grad, **options)


@pytest.fixture
def folded(monkeypatch):
    """Both sides are folded, whatever the sizes: what the kernels are for."""
    monkeypatch.setattr(decode, "_plan", lambda *_: FOLDED)


# --- Against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "sizes, channels, dims",
    [
        ((3, 1, 5), (5, 0), (5, 5, 3)),
        ((2, 63, 97), (64, 0), (64, 64, 64)),
        ((1, 97, 63), (3, 258), (64, 64, 33)),
        ((1, 130, 33), (40, 7), (64, 47, 130)),
    ],
    ids=str,
)
def test_matches_float64(backend, generator, folded, sizes, channels, dims, dtype):
    check(backend, generator, make(generator, sizes, channels, dims, dtype=dtype))


def test_one_key(backend, generator, folded):
    """Its weight is one: the scores have no gradient."""
    tensors = make(generator, (2, 97, 1), (13, 0), (8, 8, 5))
    run = check(backend, generator, tensors, ("v", "w_o", "b_o"))
    torch.testing.assert_close(run.output[0], run.output[0, :1].expand(97, -1))
    grads = testing.run(latent_decode, tensors, ("queries", "k", "w_q"), cotangent(generator, tensors), backend=backend)
    assert all(g.abs().max() < 1e-4 for g in grads.gradients.values())


def test_the_plan_folds_what_a_flow_decoder_has(backend, generator):
    tensors = make(generator, (1, 300, 40), (20, 12), (96, 96, 24))
    assert decode._plan(backend, *(tensors[n] for n in ("queries", "k", "w_q", "w_o")), 1)[:2] == FOLDED[:2]
    check(backend, generator, tensors)


@pytest.mark.parametrize("channels, out", [((64, 258), 322), ((512, 0), 36)], ids=str)
def test_wide(backend, generator, folded, channels, out):
    check(backend, generator, make(generator, (1, 33, 33), channels, (64, 64, out)))


@pytest.mark.parametrize("heads, shared", [(2, False), (3, True)])
def test_heads(backend, generator, folded, heads, shared):
    tensors = make(generator, (2, 33, 21), (16, 4), (heads * 6, heads * 4, 19), shared)
    check(backend, generator, tensors, num_heads=heads)


@pytest.mark.parametrize("heads", (1, 2))
@pytest.mark.parametrize("score", ("project", "absorb_into_keys"))
@pytest.mark.parametrize("value", ("project", "output_side"))
def test_every_plan_gives_the_same(backend, generator, monkeypatch, score, value, heads):
    """The chooser may take any pair of plans: all are the same function. Here the pair is forced, at sizes of any kind."""
    tensors = make(generator, (2, 50, 12), (20, 4), (16, 24, 18))
    tensors["queries"] = tensors["queries"].clone()
    mask, query_mask = torch.rand(2, 12, generator=generator) < 0.8, torch.rand(2, 50, generator=generator) < 0.8
    monkeypatch.setattr(decode, "_plan", lambda *_: plan.Plan(score, value, 0))
    check(backend, generator, tensors, num_heads=heads, key_mask=mask, query_mask=query_mask)


@pytest.mark.parametrize("channels", [(24, 0), (8, 16), (0, 24)], ids=str)
def test_queries_shared_by_the_batch(backend, generator, folded, channels):
    tensors = make(generator, (3, 41, 17), channels, (24, 24, 20), shared=True)
    run = check(backend, generator, tensors)
    assert run.gradients["queries"].shape == (1, 41, channels[0])


@pytest.mark.parametrize("missing", ["norm_weight", "norm_bias", "b_q", "b_o", "all"])
def test_optional_parts(backend, generator, folded, missing):
    tensors = make(generator, (2, 33, 9), (16, 0), (16, 16, 12), affine=missing != "all")
    tensors.pop(missing, None)
    check(backend, generator, tensors)


def test_without_normalisation(backend, generator, folded):
    check(backend, generator, make(generator, (2, 33, 9), (10, 6), (16, 16, 12), affine=False), eps=None)


def test_scale_and_eps(backend, generator, folded):
    check(backend, generator, make(generator, (2, 33, 9), (16, 0), (16, 16, 12)), scale=0.1, eps=0.5)


def test_norm_in_float32_beside_bfloat16(backend, generator, folded):
    tensors = make(generator, (2, 33, 9), (16, 8), (16, 16, 12), dtype=torch.bfloat16)
    tensors |= {n: tensors[n].float() for n in ("norm_weight", "norm_bias")}
    check(backend, generator, tensors)


def test_large_offsets_of_the_queries(backend, generator, folded):
    """The mean is far larger than the deviation: one-pass statistics would cancel."""
    tensors = make(generator, (1, 64, 9), (32, 0), (32, 32, 16))
    tensors["queries"] = tensors["queries"] + 100.0
    check(backend, generator, tensors)


def test_constant_rows(backend, generator, folded):
    """A row whose channels are equal has no deviation; eps alone keeps it finite."""
    tensors = make(generator, (1, 64, 9), (32, 0), (32, 32, 16))
    tensors["queries"][:, 3] = 2.0
    check(backend, generator, tensors)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "channels-first"])
def test_any_strides(backend, generator, folded, layout):
    tensors = make(generator, (3, 34, 9), (16, 8), (24, 24, 12))
    queries = tensors["queries"]
    if layout == "sliced":
        queries = torch.randn(3, 68, 32, generator=generator)[:, ::2, ::2]
        tensors["v"] = torch.randn(3, 9, 48, generator=generator)[..., ::2]
    elif layout == "transposed":
        queries = queries.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        queries = queries[:1].expand(3, -1, -1)
    else:
        queries = queries.mT.contiguous().mT
        for name in ("position", "k", "w_q", "w_o"):
            tensors[name] = tensors[name].mT.contiguous().mT
    tensors["queries"] = queries
    check(backend, generator, tensors)


def test_stride_zero_gradient(backend, generator, folded):
    tensors = make(generator)
    wanted = tuple(n for n in EVERYTHING if n in tensors)
    testing.check_op(latent_decode, testing.eager_latent_decode, tensors, wanted, backend, None)


def test_one_gradient_alone(on, generator, folded):
    """What is not asked for changes nothing of what is."""
    backend = on("cpp")
    tensors = make(generator, (2, 33, 9), (10, 6), (16, 16, 12))
    grad = cotangent(generator, tensors)
    everything = testing.run(latent_decode, tensors, EVERYTHING, grad, backend=backend)
    for name in EVERYTHING:
        alone = testing.run(latent_decode, tensors, (name,), grad, backend=backend)
        torch.testing.assert_close(alone.gradients[name], everything.gradients[name], rtol=1e-5, atol=1e-5)


def test_no_gradient(backend, generator, folded):
    check(backend, generator, make(generator, (2, 33, 9), (10, 6), (16, 24, 12)), ())


def test_long(on, generator, folded):
    """Several tiles and blocks of keys, and the keys' gradients from each of them."""
    check(on("cpp"), generator, make(generator, (1, 1300, 150), (16, 4), (16, 16, 12)))


# --- Masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, shared", [(1, False), (2, False), (1, True)])
def test_nothing_behind_the_masks_leaks(backend, generator, folded, heads, shared):
    tensors = make(generator, (3, 45, 19), (12, 9), (16, 16, 12), shared)
    mask = torch.rand(3, 19, generator=generator) < 0.5
    mask[2] = False  # an example without any key
    query_mask = torch.rand(3, 45, generator=generator) < 0.7
    query_mask[:, 5:9] = False
    grad = cotangent(generator, tensors)
    clean = dict(tensors)
    hidden = ~(query_mask & mask.any(1, keepdim=True))
    hidden = hidden.all(0, keepdim=True) if shared else hidden
    for name, rows in (("queries", hidden), ("k", ~mask), ("v", ~mask)):
        clean[name] = tensors[name].masked_fill(rows[..., None], 0.0)
        tensors[name] = tensors[name].masked_fill(rows[..., None], float("nan"))
    clean["position"] = tensors["position"].clone()
    tensors["position"][5:9], clean["position"][5:9] = float("nan"), 0.0
    wanted = tuple(n for n in EVERYTHING if n in tensors)
    options = dict(num_heads=heads, key_mask=mask, query_mask=query_mask)
    poisoned = testing.run(latent_decode, tensors, wanted, grad, backend=backend, **options)
    plain = testing.run(latent_decode, clean, wanted, grad, backend=backend, **options)
    exact = testing.run(latent_decode, tensors, wanted, grad, backend="reference", **options)
    assert torch.equal(poisoned.output, plain.output)
    torch.testing.assert_close(poisoned.output, exact.output, rtol=1e-5, atol=1e-5)
    for name in wanted:
        assert torch.equal(poisoned.gradients[name], plain.gradients[name]), name
        torch.testing.assert_close(poisoned.gradients[name], exact.gradients[name], rtol=1e-4, atol=1e-4)
    assert (poisoned.output[~query_mask] == tensors["b_o"]).all() and (poisoned.output[2] == tensors["b_o"]).all()
    assert (poisoned.gradients["queries"][hidden] == 0).all()
    assert all((poisoned.gradients[n][~mask] == 0).all() for n in "kv")


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_empty(backend, generator, folded, sizes):
    tensors = {n: t.requires_grad_() for n, t in make(generator, sizes, (6, 2), (8, 8, 4)).items()}
    out = latent_decode(**tensors, backend=backend)
    assert out.shape == (sizes[0], sizes[1], 4)
    assert sizes[2] or (out == tensors["b_o"]).all()
    for tensor, grad in zip(tensors.values(), torch.autograd.grad(out.sum(), list(tensors.values())), strict=True):
        assert grad.shape == tensor.shape and grad.isfinite().all()


# --- The core op ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", (1, 3))
def test_core_and_its_log_sum_exp(backend, generator, heads):
    queries, position = torch.randn(1, 70, 10, generator=generator), torch.randn(70, 4, generator=generator)
    k, v = torch.randn(3, heads, 21, 14, generator=generator), torch.randn(3, heads, 21, 9, generator=generator)
    bias, out_bias = torch.randn(3, heads, 21, generator=generator), torch.randn(9, generator=generator)
    query_mask, key_mask = (torch.rand(3, n, generator=generator) < 0.7 for n in (70, 21))
    arguments = (queries, position, query_mask, k, bias, v, out_bias, key_mask)
    ours = forward_backward("latent", backend, "latent_decode")[0](*arguments, 0.3, 1e-5)
    plain = decode_reference.core(*arguments, 0.3, 1e-5)
    exact = decode_reference.core(*(t.double() if t.is_floating_point() else t for t in arguments), 0.3, 1e-5)
    for name, *three in zip(("out", "lse"), ours, exact, plain, strict=True):
        if name == "lse":  # of hidden queries it may be anything
            three = [torch.where(query_mask[:, None], t, 0.0) for t in three]
        testing.assert_within_budget(*three, name, 3.0)
    assert torch.equal(decode_autograd.core(backend, *arguments, 0.3, 1e-5), ours[0])


# --- Promises ---------------------------------------------------------------------------------------------------------------


def test_nothing_else_of_the_queries_length_is_saved(backend, generator, folded):
    """Saved for backward: the inputs, the result and one number for each row."""
    tensors = {n: t.requires_grad_() for n, t in make(generator, (2, 101, 5), (16, 8), (24, 24, 20)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = latent_decode(**tensors, backend=backend)
    known = {t.data_ptr() for t in (out, tensors["queries"], tensors["position"])}
    long = [t for t in saved if 101 in t.shape and t.data_ptr() not in known]
    assert saved and [t.shape for t in long] == [(2, 1, 101)]
    out.sum().backward()
    assert tensors["w_q"].grad is not None


@pytest.mark.parametrize("shared", [False, True])
def test_same_bits_every_time(backend, generator, folded, shared):
    tensors = make(generator, (2, 70, 17), (10, 14), (24, 24, 20), shared, dtype=torch.bfloat16)
    wanted = tuple(n for n in EVERYTHING if n in tensors)
    grad = cotangent(generator, tensors)
    first = testing.run(latent_decode, tensors, wanted, grad, backend=backend)
    again = testing.run(latent_decode, tensors, wanted, grad, backend=backend)
    assert torch.equal(first.output, again.output)
    assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in wanted)


@pytest.mark.parametrize("heads", [1, 2])
def test_uninitialised_memory_is_never_read(backend, generator, folded, heads):
    tensors = make(generator, (2, 33, 17), (10, 13), (24, 24, 19))
    wanted = tuple(n for n in EVERYTHING if n in tensors)
    mask = torch.rand(2, 17, generator=generator) < 0.7
    grad, options = cotangent(generator, tensors), dict(backend=backend, key_mask=mask, num_heads=heads)
    clean = testing.run(latent_decode, tensors, wanted, grad, **options)
    with testing.poisoned_memory():
        poisoned = testing.run(latent_decode, tensors, wanted, grad, **options)
    assert torch.equal(clean.output, poisoned.output)
    assert all(torch.equal(clean.gradients[n], poisoned.gradients[n]) for n in wanted)


@pytest.mark.parametrize("threads", [2, 7])
def test_threads(on, generator, folded, threads):
    """However tiles and examples are shared out, the sums are the same but for their order."""
    on("cpp")
    before = torch.get_num_threads()
    try:
        for shared, content in ((False, 24), (True, 24), (False, 10), (True, 0)):
            tensors = make(generator, (3, 1200, 40), (content, 24 - content), (24, 24, 20), shared)
            wanted = tuple(n for n in EVERYTHING if n in tensors)
            grad = cotangent(generator, tensors)
            torch.set_num_threads(1)
            one = testing.run(latent_decode, tensors, wanted, grad, backend="cpp")
            torch.set_num_threads(threads)
            many = testing.run(latent_decode, tensors, wanted, grad, backend="cpp")
            torch.testing.assert_close(one.output, many.output, rtol=1e-5, atol=1e-5)
            for n in wanted:
                torch.testing.assert_close(one.gradients[n], many.gradients[n], rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_the_reference_is_the_plain_form(generator):
    tensors = make(generator, (2, 33, 9), (16, 4), (32, 48, 12), dtype=torch.float64)
    query_mask = torch.rand(2, 33, generator=generator) < 0.7
    options = dict(num_heads=4, query_mask=query_mask)
    sdpa = lambda q, k, v, *, key_mask, scale: torch.nn.functional.scaled_dot_product_attention(q, k, v)  # noqa: E731
    expected = testing.eager_latent_decode(**tensors, **options, attention=sdpa)
    torch.testing.assert_close(latent_decode(**tensors, **options, backend="reference"), expected)


def test_reference_is_twice_differentiable(generator):
    tensors = make(generator, (1, 3, 3), (2, 1), (2, 2, 2), dtype=torch.float64)
    names = list(tensors)
    masks = dict(key_mask=torch.tensor([[True, False, True]]), query_mask=torch.tensor([[True, True, False]]))

    def function(*values):
        return latent_decode(**dict(zip(names, values, strict=True)), **masks, backend="reference")

    inputs = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_kernels_refuse_a_second_derivative(backend, generator, folded):
    tensors = {n: t.requires_grad_() for n, t in make(generator).items()}
    (grad,) = torch.autograd.grad(latent_decode(**tensors, backend=backend).sum(), tensors["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="latent_decode has no second derivative on this backend"):
        grad.sum().backward()


# --- Inside torch -----------------------------------------------------------------------------------------------------------


def test_opcheck(backend, generator):
    queries, position = torch.randn(1, 33, 10, generator=generator).mT.contiguous().mT, torch.randn(33, 4, generator=generator)
    k, v = torch.randn(2, 2, 9, 14, generator=generator), torch.randn(2, 2, 9, 5, generator=generator)
    bias, out_bias = torch.randn(2, 2, 9, generator=generator), torch.randn(5, generator=generator)
    query_mask, key_mask = (torch.rand(2, n, generator=generator) < 0.7 for n in (33, 9))
    inputs = (queries, position, query_mask, k, bias, v, out_bias, key_mask)
    forward, backward = forward_backward("latent", backend, "latent_decode")
    out, lse = forward(*inputs, 0.3, 1e-5)
    torch.library.opcheck(forward, (*inputs, 0.3, 1e-5))
    torch.library.opcheck(backward, (torch.ones(1).expand_as(out), *inputs, out, lse, 0.3, 1e-5, 7))
    torch.library.opcheck(
        backward, (torch.ones_like(out), queries, None, None, k[..., :10], *inputs[4:6], None, None, out, lse, 0.3, -1.0, 4)
    )


def test_compiles_whole_and_once_for_every_length(on, generator, folded):
    on("cpp")
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda t: latent_decode(**t, backend="cpp"), fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(lambda t: latent_decode(**t, backend="cpp"), fullgraph=True, dynamic=True, backend=counting)
    for sizes in ((2, 33, 9), (3, 50, 17)):
        tensors = {n: t.requires_grad_() for n, t in make(generator, sizes, (10, 6)).items()}
        expected, actual = latent_decode(**tensors, backend="cpp"), compiled(tensors)
        assert torch.equal(actual, expected)
        grad = cotangent(generator, tensors)
        gradients = [torch.autograd.grad(o, list(tensors.values()), grad) for o in (actual, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        counted(tensors)
    assert len(compilations) == 1


def test_autocast(on, generator, folded):
    on("cpp")
    tensors = make(generator)
    with torch.autocast("cpu", torch.bfloat16):
        out = latent_decode(**tensors)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), latent_decode(**tensors), rtol=0.05, atol=0.05)


def test_vmap_says_what_to_do(on, generator, folded):
    on("cpp")
    tensors = {n: t.requires_grad_() for n, t in make(generator).items()}
    with pytest.raises(RuntimeError, match="latent_decode has a batch dimension of its own"):
        torch.vmap(lambda q: latent_decode(**{**tensors, "queries": q}, backend="cpp"))(tensors["queries"][None])


# --- Arguments ------------------------------------------------------------------------------------------------------------

WRONG = {
    "queries is none": (dict(queries=None), TypeError, "queries is a NoneType; it must be a tensor"),
    "rank": (dict(k=torch.zeros(5, 8)), ValueError, r"k has shape \(5, 8\); it must have 3 dimensions \(B, N, H \* D\)"),
    "integer": (dict(queries=torch.zeros(2, 7, 6, dtype=torch.uint8)), TypeError, "queries has dtype torch.uint8"),
    "dtype": (
        dict(w_o=torch.zeros(5, 4).half()),
        TypeError,
        "w_o has dtype torch.float16; it must be queries', torch.float32",
    ),
    "channels": (dict(w_q=torch.zeros(8, 5)), ValueError, r"w_q has shape \(8, 5\); it must be \(8, 6\)"),
    "heads": (dict(num_heads=3), ValueError, r"k has shape \(2, 3, 8\).*a positive multiple of num_heads = 3"),
    "no heads": (dict(num_heads=0), ValueError, "num_heads is 0; it must be a positive integer"),
    "heads true": (dict(num_heads=True), ValueError, "num_heads is True; it must be a positive integer"),
    "values": (dict(v=torch.zeros(2, 4, 4)), ValueError, r"v has shape \(2, 4, 4\); it must be \(2, 3, H \* E\)"),
    "output": (dict(w_o=torch.zeros(5, 3)), ValueError, r"w_o has shape \(5, 3\); it must be \(Cout, 4\)"),
    "batch": (dict(queries=torch.zeros(3, 7, 6)), ValueError, r"queries has shape \(3, 7, 6\); its batch must be 1 or.*2"),
    "position": (dict(position=torch.zeros(6, 2)), ValueError, r"position has shape \(6, 2\).*\(7, Cp\)"),
    "norm size": (dict(norm_weight=torch.zeros(7)), ValueError, r"norm_weight has shape \(7,\); it must be \(6,\)"),
    "norm dtype": (dict(norm_bias=torch.zeros(6).half()), TypeError, "norm_bias has dtype torch.float16"),
    "bias size": (dict(b_q=torch.zeros(6)), ValueError, r"b_q has shape \(6,\); it must be \(8,\)"),
    "output bias": (dict(b_o=torch.zeros(6)), ValueError, r"b_o has shape \(6,\); it must be \(5,\)"),
    "query mask": (
        dict(query_mask=torch.ones(2, 6, dtype=torch.bool)),
        ValueError,
        r"query_mask has shape \(2, 6\).*\(2, 7\)",
    ),
    "key mask": (dict(key_mask=torch.ones(2, 6, dtype=torch.bool)), ValueError, r"key_mask has shape \(2, 6\).*\(2, 3\)"),
    "key mask dtype": (dict(key_mask=torch.ones(2, 3)), TypeError, "key_mask is a torch.float32; it must be a bool tensor"),
    "eps": (dict(eps=0.0), ValueError, "eps is 0.0; it must be a positive number, or None"),
    "eps none": (dict(eps=None, norm_weight=torch.zeros(6)), ValueError, "eps is None, which leaves out the LayerNorm"),
    "scale": (dict(scale=float("nan")), ValueError, "scale is nan; it must be a finite number"),
    "no channels": (dict(queries=torch.zeros(2, 7, 0), w_q=torch.zeros(8, 0)), ValueError, r"queries has shape.*one channel"),
    "backend": (dict(backend="numpy"), ValueError, "backend is 'numpy'; allowed are 'auto'"),
    "device": (dict(k=torch.zeros(2, 3, 8, device="meta")), ValueError, "k is on meta; it must be on queries's device, cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, error, message = WRONG[case]
    arguments = dict(queries=torch.zeros(2, 7, 6), k=torch.zeros(2, 3, 8), v=torch.zeros(2, 3, 4))
    arguments |= dict(w_q=torch.zeros(8, 6), w_o=torch.zeros(5, 4))
    for call in (latent_decode, lambda **kw: mmkernels.explain("latent_decode", **kw)):
        with pytest.raises(error, match=message):
            call(**{**arguments, **changes})


@pytest.mark.parametrize("wide, what", [(dict(dims=(1032, 8, 4)), "keys"), (dict(dims=(8, 1032, 1030)), "values")])
def test_cuda_refuses_what_is_too_wide(on, generator, wide, what):
    """Neither folded nor projected do they fit; nothing falls back silently from a named backend."""
    tensors = make(generator, (1, 5, 7), (1026 if what == "keys" else 6, 0), **wide)
    with pytest.raises(mmkernels.BackendError, match=rf"cuda: its {what} have 103. channels, it takes 1 to 1024"):
        latent_decode(**tensors, backend=on("cuda"))
    told = mmkernels.explain("latent_decode", **tensors)
    assert told.refusals["cuda"] and told.backend == "cpp"


def test_explain_tells_the_plan(on, generator):
    on("cpp")
    tensors = make(generator, (1, 300, 40), (20, 12), (96, 96, 24))
    told = mmkernels.explain("latent_decode", **tensors)
    assert told.backend == "cpp" and told.refusals["sdpa"]
    assert "scores: absorb_into_keys, values: output_side" in told.detail
    assert mmkernels.explain("latent_decode", **tensors, backend="reference").detail == ""

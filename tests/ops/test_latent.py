"""`ops.latent_attention` on every backend: against float64 with plain eager's error as the budget, and by its meaning."""

from types import SimpleNamespace

import pytest
import torch

import mmkernels
from mmkernels import testing
from mmkernels.ops import latent_attention
from mmkernels.ops.latent import api, autograd, plan, reference

EVERYTHING = ("q", "x", "w_k", "w_v", "norm_weight", "norm_bias", "b_v", "position")


def make(generator, sizes=(2, 19, 77), channels=(21, 0), dims=(24, 40), batch_q=None, dtype=torch.float32, affine=True):
    """Arguments for (B, N, M), (Cx, Cp) and the projected sizes (H*D, H*E)."""
    (b, n, m), (content, shared), (qk, v) = sizes, channels, dims
    c = content + shared
    made = {
        "q": torch.randn(batch_q or b, n, qk, generator=generator),
        "x": torch.randn(b, m, content, generator=generator),
        "w_k": torch.randn(qk, c, generator=generator) * c**-0.5,
        "w_v": torch.randn(v, c, generator=generator) * c**-0.5,
    }
    if affine:
        made["norm_weight"] = 1 + 0.3 * torch.randn(c, generator=generator)
        made["norm_bias"] = 0.3 * torch.randn(c, generator=generator)
        made["b_v"] = torch.randn(v, generator=generator)
    if shared:
        made["position"] = torch.randn(m, shared, generator=generator)
    return {name: t.to(dtype) for name, t in made.items()}


def cotangent(generator, tensors):
    shape = (tensors["x"].shape[0], tensors["q"].shape[1], tensors["w_v"].shape[0])
    return torch.randn(shape, generator=generator).to(tensors["x"].dtype)


def check(backend, generator, tensors, wanted=None, **options):
    wanted = tuple(n for n in EVERYTHING if n in tensors) if wanted is None else wanted
    grad = cotangent(generator, tensors)
    return testing.check_op(latent_attention, testing.eager_latent_attention, tensors, wanted, backend, grad, **options)


def absorbed(tensors, heads=1):
    return plan.absorbed(api._plan(tensors["q"], tensors["x"], tensors["w_k"], tensors["w_v"], heads))


# --- Against float64 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "sizes, channels, dims",
    [
        ((3, 1, 111), (5, 0), (5, 5)),
        ((2, 63, 97), (64, 0), (64, 64)),
        ((2, 19, 111), (3, 258), (261, 261)),
        ((1, 33, 200), (40, 7), (64, 47)),
    ],
    ids=str,
)
def test_matches_float64(backend, generator, sizes, channels, dims, dtype):
    tensors = make(generator, sizes, channels, dims, dtype=dtype)
    assert absorbed(tensors)
    check(backend, generator, tensors)


@pytest.mark.parametrize("channels", [(322, 0), (3, 509), (704, 0), (1, 1023)], ids=str)
def test_wide_inputs(backend, generator, channels):
    tensors = make(generator, (1, 16, 48), channels, (512, 512))
    assert absorbed(tensors)
    check(backend, generator, tensors)


@pytest.mark.parametrize("channels", [(3, 258), (64, 258), (512, 0), (704, 0)], ids=str)
def test_wide_inputs_and_many_queries_in_bfloat16(backend, generator, channels):
    """What the kernels for sm_90 take, on a GPU that has them."""
    tensors = make(generator, (1, 40, 150), channels, (512, 512), dtype=torch.bfloat16)
    assert absorbed(tensors)
    check(backend, generator, tensors)


@pytest.mark.parametrize("heads", (2, 8))
def test_heads(backend, generator, heads):
    tensors = make(generator, (2, 5, 130), (16, 4), (heads * 24, heads * 16))
    assert absorbed(tensors, heads)
    check(backend, generator, tensors, num_heads=heads)


@pytest.mark.parametrize(
    "score, value", [("project", "project"), ("absorb_into_queries", "project"), ("project", "raw_input")]
)
def test_every_plan_gives_the_same(backend, generator, monkeypatch, score, value):
    """The chooser may take any pair of plans: all are the same function. Here the pair is forced, at sizes of any kind."""
    tensors = make(generator, (2, 12, 50), (20, 4), (16, 24))
    tensors["b_k"] = torch.randn(16, generator=generator)
    mask = torch.rand(2, 50, generator=generator) < 0.8
    monkeypatch.setattr(api, "_plan", lambda *_: plan.Plan(score, value, 0))
    wanted = tuple(n for n in EVERYTHING if n in tensors)
    check(backend, generator, tensors, wanted, num_heads=2, key_mask=mask)


def test_queries_shared_by_the_batch(backend, generator):
    tensors = make(generator, (3, 17, 65), (8, 16), (24, 24), batch_q=1)
    run = check(backend, generator, tensors)
    assert run.gradients["q"].shape == (1, 17, 24)


@pytest.mark.parametrize("missing", ["norm_weight", "norm_bias", "b_v", "all"])
def test_optional_parts(backend, generator, missing):
    tensors = make(generator, (2, 9, 40), (16, 0), (16, 16), affine=missing != "all")
    tensors.pop(missing, None)
    check(backend, generator, tensors)


def test_without_normalisation(backend, generator):
    check(backend, generator, make(generator, (2, 9, 40), (10, 6), (16, 16), affine=False), eps=None)


def test_scale_and_eps(backend, generator):
    check(backend, generator, make(generator, (2, 9, 40), (16, 0), (16, 16)), scale=0.1, eps=0.5)


@pytest.mark.parametrize("offsets", ["none", "of some rows", "of all rows"])
@pytest.mark.parametrize("heads, queries", [(1, 1), (1, 2), (4, 2)], ids=str)
def test_few_queries(backend, generator, heads, queries, offsets):
    """The C++ kernel leaves rows as they lie for them, and only where no mean is larger than the deviation."""
    tensors = make(generator, (3, queries, 150), (64, 0), (heads * 64, heads * 64), batch_q=1)
    if offsets != "none":
        rows = torch.rand(3, 150, 1, generator=generator) < (0.05 if offsets == "of some rows" else 1.0)
        tensors["x"] += 5.0 * rows
    mask = torch.rand(3, 150, generator=generator) < 0.9
    mask[0] = True
    assert absorbed(tensors, heads)
    check(backend, generator, tensors, num_heads=heads)
    check(backend, generator, tensors, num_heads=heads, key_mask=mask)


def test_large_offsets_of_the_input(backend, generator):
    """The mean is far larger than the deviation: a norm folded into the scores, or one-pass statistics, would cancel."""
    tensors = make(generator, (1, 9, 64), (32, 0), (32, 32))
    tensors["x"] = tensors["x"] + 100.0
    check(backend, generator, tensors)


def test_constant_rows(backend, generator):
    """A row whose channels are equal has no deviation; eps alone keeps it finite."""
    tensors = make(generator, (1, 9, 64), (32, 0), (32, 32))
    tensors["x"][:, 3] = 2.0
    check(backend, generator, tensors)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "channels-first"])
def test_any_strides(backend, generator, layout):
    tensors = make(generator, (3, 9, 41), (16, 8), (24, 24))
    x = tensors["x"]
    if layout == "sliced":
        x = torch.randn(3, 82, 32, generator=generator)[:, ::2, ::2]
    elif layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        x = x[:1].expand(3, -1, -1)
    else:
        x = x.mT.contiguous().mT
        tensors["position"] = tensors["position"].mT.contiguous().mT
        tensors["w_k"] = tensors["w_k"].mT.contiguous().mT
    tensors["x"] = x
    check(backend, generator, tensors)


def test_stride_zero_gradient(backend, generator):
    tensors = make(generator)
    wanted = tuple(n for n in EVERYTHING if n in tensors)
    testing.check_op(latent_attention, testing.eager_latent_attention, tensors, wanted, backend, None)


@pytest.mark.parametrize("wanted", ["q", "x", "position", "w_k", "w_v", "norm_weight", "norm_bias", "b_v"])
def test_one_gradient_alone(backend, generator, wanted):
    check(backend, generator, make(generator, (2, 9, 40), (10, 6), (16, 16)), (wanted,))


def test_no_gradient(backend, generator):
    """The inference path."""
    tensors = make(generator, (2, 9, 40), (10, 6), (16, 24))
    check(backend, generator, tensors, ())
    mask = torch.rand(2, 40, generator=generator) < 0.6
    mask[1] = False
    check(backend, generator, {**tensors, "x": tensors["x"].clone()}, (), key_mask=torch.ones_like(mask))
    out = latent_attention(**tensors, key_mask=mask, backend=backend)
    exact = latent_attention(**{n: t.double() for n, t in tensors.items()}, key_mask=mask, backend="reference")
    plain = testing.eager_latent_attention(**tensors, key_mask=mask).nan_to_num(0.0)
    testing.assert_within_budget(out[0], exact[0], plain[0], "output")


# --- Masks ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_nothing_behind_the_mask_leaks(backend, generator, padding):
    tensors = make(generator, (3, 9, 77), (12, 9), (16, 16))
    mask = torch.ones(3, 77, dtype=torch.bool)
    if padding == "holes":
        mask = torch.rand(3, 77, generator=generator) < 0.5
    else:
        for row, hidden in enumerate((5, 70, 0)):
            mask[row, slice(0, hidden) if padding == "left" else slice(77 - hidden, 77)] = False
    clean = dict(tensors)
    clean["x"] = tensors["x"].masked_fill(~mask[..., None], 0.0)
    tensors["x"] = tensors["x"].masked_fill(~mask[..., None], float("nan"))
    grad = cotangent(generator, tensors)
    wanted = tuple(n for n in EVERYTHING if n in tensors)
    poisoned = testing.run(latent_attention, tensors, wanted, grad, backend=backend, key_mask=mask)
    plain = testing.check_op(latent_attention, testing.eager_latent_attention, clean, wanted, backend, grad, key_mask=mask)
    assert torch.equal(poisoned.output, plain.output)
    for name in wanted:
        assert torch.equal(poisoned.gradients[name], plain.gradients[name]), name
    assert (poisoned.gradients["x"][~mask] == 0).all()


def test_rows_without_keys_are_zero(backend, generator):
    """DeepMind's code zeroes such rows after the value projection, bias included."""
    tensors = {n: t.requires_grad_() for n, t in make(generator, (2, 9, 33), (10, 6), (16, 16)).items()}
    mask = torch.ones(2, 33, dtype=torch.bool)
    mask[1] = False
    out = latent_attention(**tensors, key_mask=mask, backend=backend)
    assert (out[1] == 0).all() and (out[0] != 0).any()
    grads = dict(zip(tensors, torch.autograd.grad(out.square().sum(), list(tensors.values())), strict=True))
    assert all(g.isfinite().all() for g in grads.values())
    assert (grads["x"][1] == 0).all() and (grads["q"][1] == 0).all()


@pytest.mark.parametrize("name", ["backend", "reference"])
def test_nan_in_an_example_without_keys_stays_there(backend, generator, name):
    """In its q, x and incoming gradient: no weight's gradient, which sums over the batch, may see it."""
    tensors = make(generator, (2, 9, 33), (10, 6), (16, 24))
    mask = torch.rand(2, 33, generator=generator) < 0.6
    mask[1] = False
    grad, wanted = cotangent(generator, tensors), tuple(tensors)
    options = dict(backend=backend if name == "backend" else name, key_mask=mask)
    clean = testing.run(latent_attention, tensors, wanted, grad, **options)
    for tensor in (tensors["q"], tensors["x"], grad):
        tensor[1] = float("nan")
    poisoned = testing.run(latent_attention, tensors, wanted, grad, **options)
    assert torch.equal(clean.output, poisoned.output)
    for n in wanted:
        assert torch.equal(clean.gradients[n], poisoned.gradients[n]), n
    assert (poisoned.gradients["q"][1] == 0).all() and (poisoned.gradients["x"][1] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=str)
def test_empty(backend, generator, sizes):
    tensors = {n: t.requires_grad_() for n, t in make(generator, sizes, (6, 2), (8, 8)).items()}
    out = latent_attention(**tensors, backend=backend)
    assert out.shape == (sizes[0], sizes[1], 8)
    assert sizes[2] or (out == 0).all()
    for tensor, grad in zip(tensors.values(), torch.autograd.grad(out.sum(), list(tensors.values())), strict=True):
        assert grad.shape == tensor.shape and grad.isfinite().all()


# --- The core op ------------------------------------------------------------------------------------------------------------


def test_core_and_its_log_sum_exp(backend, generator):
    q, x = torch.randn(1, 11, 14, generator=generator), torch.randn(3, 50, 10, generator=generator)
    position = torch.randn(50, 4, generator=generator)
    mask = torch.rand(3, 50, generator=generator) < 0.7
    out_grad, lse_grad = torch.randn(3, 11, 14, generator=generator), torch.randn(3, 11, generator=generator)

    def both(dtype, function):
        inputs = [t.to(dtype).requires_grad_() for t in (q, x, position)]
        out, lse = function(*inputs, mask, 0.3, 1e-5)
        loss = (out * out_grad.to(dtype)).sum() + (lse * lse_grad.to(lse.dtype)).sum()
        return out, lse, *torch.autograd.grad(loss, inputs)

    ours = both(torch.float32, lambda *a: autograd.core(backend, *a))
    exact, plain = both(torch.float64, reference.core), both(torch.float32, reference.core)
    for name, *three in zip(("out", "lse", "dq", "dx", "dposition"), ours, exact, plain, strict=True):
        testing.assert_within_budget(*three, name, 3.0)


# --- Promises ---------------------------------------------------------------------------------------------------------------


def test_the_key_bias_changes_nothing(backend, generator):
    tensors = make(generator, (2, 9, 40), (16, 0), (16, 16))
    b_k = (10 * torch.randn(16, generator=generator)).requires_grad_()
    plain = latent_attention(**tensors, backend=backend)
    biased = latent_attention(**tensors, b_k=b_k, backend=backend)
    torch.testing.assert_close(biased, plain)
    (grad,) = torch.autograd.grad(biased.square().sum(), b_k)
    assert (grad == 0).all()


def test_nothing_of_the_inputs_length_is_saved(backend, generator):
    """Saved for backward: the inputs and tensors of N rows. A raw input keeps M-sized memory to the input itself."""
    tensors = make(generator, (2, 5, 601), (16, 8), (24, 24))
    for name in tensors:
        if name not in ("x", "position"):
            tensors[name].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = latent_attention(**tensors, backend=backend)
    assert saved
    for t in saved:
        if 601 in t.shape:
            assert t.data_ptr() in (tensors["x"].data_ptr(), tensors["position"].data_ptr())
    out.sum().backward()
    assert tensors["w_k"].grad is not None


def test_same_bits_every_time(backend, generator):
    tensors = make(generator, (2, 17, 150), (10, 14), (24, 24), dtype=torch.bfloat16)
    wanted = tuple(n for n in EVERYTHING if n in tensors)
    grad = cotangent(generator, tensors)
    first = testing.run(latent_attention, tensors, wanted, grad, backend=backend)
    for _ in range(3):
        again = testing.run(latent_attention, tensors, wanted, grad, backend=backend)
        assert torch.equal(first.output, again.output)
        assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in wanted)


def test_uninitialised_memory_is_never_read(backend, generator):
    tensors = make(generator, (2, 17, 65), (10, 14), (24, 24))
    wanted = tuple(n for n in EVERYTHING if n in tensors)
    mask = torch.rand(2, 65, generator=generator) < 0.7
    grad = cotangent(generator, tensors)
    clean = testing.run(latent_attention, tensors, wanted, grad, backend=backend, key_mask=mask)
    with testing.poisoned_memory():
        poisoned = testing.run(latent_attention, tensors, wanted, grad, backend=backend, key_mask=mask)
    assert torch.equal(clean.output, poisoned.output)
    assert all(torch.equal(clean.gradients[n], poisoned.gradients[n]) for n in wanted)


def test_the_reference_is_the_plain_module(generator):
    """LayerNorm, Linear and SDPA as torch defines them."""
    tensors = make(generator, (2, 9, 40), (16, 0), (32, 48), dtype=torch.float64)
    b_k = torch.randn(32, generator=generator, dtype=torch.float64)
    x = torch.nn.functional.layer_norm(tensors["x"], (16,), tensors["norm_weight"], tensors["norm_bias"])
    q, k, v = (
        t.unflatten(-1, (4, -1)).transpose(1, 2)
        for t in (
            tensors["q"],
            torch.nn.functional.linear(x, tensors["w_k"], b_k),
            torch.nn.functional.linear(x, tensors["w_v"], tensors["b_v"]),
        )
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(latent_attention(**tensors, b_k=b_k, num_heads=4, backend="reference"), expected)


def test_reference_is_twice_differentiable(generator):
    tensors = make(generator, (1, 2, 4), (2, 1), (3, 2), dtype=torch.float64)
    names = list(tensors)
    mask = torch.tensor([[True, False, True, True]])

    def function(*values):
        return latent_attention(**dict(zip(names, values, strict=True)), key_mask=mask, backend="reference")

    inputs = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


WRONG = {
    "x is none": (dict(x=None), TypeError, "x is a NoneType; it must be a tensor"),
    "rank": (dict(q=torch.zeros(5, 8)), ValueError, r"q has shape \(5, 8\); it must have 3 dimensions"),
    "integer": (dict(x=torch.zeros(2, 7, 6, dtype=torch.uint8)), TypeError, "x has dtype torch.uint8"),
    "dtype": (dict(w_v=torch.zeros(8, 6).half()), TypeError, "w_v has dtype torch.float16; it must be x's, torch.float32"),
    "channels": (dict(w_k=torch.zeros(8, 5)), ValueError, r"w_k has shape \(8, 5\); it must be \(H \* D, 6\)"),
    "heads": (dict(num_heads=3), ValueError, r"w_k has shape \(8, 6\).*a multiple of num_heads = 3 rows"),
    "no heads": (dict(num_heads=0), ValueError, "num_heads is 0; it must be a positive integer"),
    "queries": (dict(q=torch.zeros(2, 5, 9)), ValueError, r"q has shape \(2, 5, 9\); it must be \(2 or 1, N, 8\)"),
    "batch": (dict(q=torch.zeros(3, 5, 8)), ValueError, r"q has shape \(3, 5, 8\)"),
    "position": (dict(position=torch.zeros(6, 2)), ValueError, r"position has shape \(6, 2\).*\(7, Cp\)"),
    "norm size": (dict(norm_weight=torch.zeros(7)), ValueError, r"norm_weight has shape \(7,\); it must be \(6,\)"),
    "norm dtype": (dict(norm_bias=torch.zeros(6).half()), TypeError, "norm_bias has dtype torch.float16"),
    "bias size": (dict(b_v=torch.zeros(6)), ValueError, r"b_v has shape \(6,\); it must be \(8,\)"),
    "mask": (dict(key_mask=torch.ones(2, 6, dtype=torch.bool)), ValueError, r"key_mask has shape \(2, 6\).*\(2, 7\)"),
    "eps": (dict(eps=-1.0), ValueError, "eps is -1.0; it must be a positive number, or None"),
    "eps zero": (dict(eps=0.0), ValueError, "eps is 0.0; it must be a positive number, or None"),
    "eps infinite": (dict(eps=float("inf")), ValueError, "eps is inf"),
    "eps text": (dict(eps="small"), TypeError, "eps is 'small'"),
    "scale nan": (dict(scale=float("nan")), ValueError, "scale is nan; it must be a finite number"),
    "scale tensor": (dict(scale=torch.tensor(1.0)), TypeError, "scale is a Tensor; it must be a finite number"),
    "heads true": (dict(num_heads=True), ValueError, "num_heads is True; it must be a positive integer"),
    "heads float": (dict(num_heads=2.0), ValueError, "num_heads is 2.0; it must be a positive integer"),
    "sparse": (dict(b_k=torch.zeros(8).to_sparse()), TypeError, "b_k is a torch.sparse_coo tensor; it must be a dense one"),
    "no channels": (
        dict(x=torch.zeros(2, 7, 0), w_k=torch.zeros(8, 0), w_v=torch.zeros(8, 0)),
        ValueError,
        r"x has shape \(2, 7, 0\).*one channel or more",
    ),
    "eps none": (dict(eps=None, norm_weight=torch.zeros(6)), ValueError, "eps is None, which leaves out the LayerNorm"),
    "backend": (dict(backend="numpy"), ValueError, "backend is 'numpy'; allowed are 'auto'"),
    "device": (dict(w_k=torch.zeros(8, 6, device="meta")), ValueError, "w_k is on meta; it must be on x's device, cpu"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("backend_name", ["auto", "reference"])
def test_wrong_arguments(case, backend_name):
    changes, error, message = WRONG[case]
    arguments = dict(q=torch.zeros(2, 5, 8), x=torch.zeros(2, 7, 6), w_k=torch.zeros(8, 6), w_v=torch.zeros(8, 6))
    for call in (latent_attention, lambda **kw: mmkernels.explain("latent_attention", **kw)):
        with pytest.raises(error, match=message):
            call(**{**arguments, "backend": backend_name, **changes})


def test_explain_tells_the_plan(generator):
    tensors = make(generator, (1, 8, 500), (32, 0), (32, 32))
    told = mmkernels.explain("latent_attention", **tensors, backend="reference")
    assert told.backend == "reference" and told.refusals["sdpa"]
    if not told.refusals["cpp"]:
        assert "scores: absorb_into_queries, values: raw_input" in mmkernels.explain("latent_attention", **tensors).detail


def test_what_hopper_prefers(monkeypatch):
    """The sm_90 kernels where they take the problem, else the order of every op."""

    def first(capability=(9, 0), dtype=torch.bfloat16, rows=512, channels=704, stride=1, score="absorb_into_queries", p=0.0):
        monkeypatch.setattr(api._backends, "platform_refusals", lambda *_: [])
        monkeypatch.setattr(api._backends, "capability", lambda _: capability)
        x = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(8, 50176, channels), stride=lambda _: stride)
        chosen = plan.Plan(score, "raw_input", 0)
        order = api._preference(SimpleNamespace(shape=(8, rows, 64)), x, None, 1, chosen, p)
        return api._choose(x, "auto", [name for name in order if name != "cpp"])

    assert first() == first(dtype=torch.float16) == first(rows=33, channels=3) == "cuda"
    assert first(dtype=torch.float32) == "cuda"  # for its own reason
    for other in (dict(capability=(8, 0)), dict(capability=(10, 0)), dict(rows=32), dict(channels=705), dict(stride=2)):
        assert first(**other) == "triton", other
    assert first(score="project") == first(p=0.1) == "triton"

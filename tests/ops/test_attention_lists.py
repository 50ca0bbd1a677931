"""Lists of problems and keys in two segments, on every backend, against float64 with plain eager's error as the budget.

And the registered ops underneath, which read from and write to packed projections.
"""

import pytest
import torch

import mmkernels
from mmkernels import testing
from mmkernels.ops import attention
from mmkernels.ops._shared.registration import forward_backward
from mmkernels.ops.attention import lists

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TWO = ((33, (40, 7)), (5, (18,)))  # queries and the segments of keys of each problem


def make(generator, problems=TWO, batch=2, heads=2, dims=(16, 16), dtype=torch.float32, groups=None):
    """{"q0": (B,H,N,D), "k0_0": a segment of the first problem's keys, ...}; those have `groups` heads, default H."""
    tensors = {}
    for i, (queries, segments) in enumerate(problems):
        shapes = {f"q{i}": (queries, dims[0])}
        for j, keys in enumerate(segments):
            shapes |= {f"k{i}_{j}": (keys, dims[0]), f"v{i}_{j}": (keys, dims[1])}
        for name, shape in shapes.items():
            own = heads if name[0] == "q" else groups or heads
            tensors[name] = torch.randn(batch, own, *shape, generator=generator).to(dtype)
    return tensors


def arguments(tensors):
    """q, k, v as `attention` takes them."""
    count = sum(name[0] == "q" for name in tensors)
    sides = {"q": [tensors[f"q{i}"] for i in range(count)], "k": [], "v": []}
    for i in range(count):
        for side in "kv":
            segments = [t for name, t in tensors.items() if name.startswith(f"{side}{i}_")]
            sides[side].append(segments[0] if len(segments) == 1 else tuple(segments))
    return sides


def op(**tensors):
    """`attention` of a list, its results joined to one tensor."""
    options = {n: t for n, t in tensors.items() if n in ("backend", "key_mask", "dropout_p", "dropout_seed", "scale")}
    outputs = attention(**arguments({n: t for n, t in tensors.items() if n not in options}), **options)
    return torch.cat(outputs, 2)


def joined(segments, dim):
    return segments if isinstance(segments, torch.Tensor) else torch.cat(segments, dim)


def eager(key_mask=None, dropout_seed=None, **tensors):
    """One problem after the other, its segments concatenated."""
    sides, outputs = arguments({n: t for n, t in tensors.items() if isinstance(t, torch.Tensor)}), []
    for i, (q, k, v) in enumerate(zip(*sides.values(), strict=True)):
        mask = None if key_mask is None or key_mask[i] is None else key_mask[i]
        if isinstance(mask, tuple):
            shapes = [one.shape[2] for one in k]
            mask = torch.cat(
                [torch.ones(q.shape[0], n, dtype=torch.bool) if m is None else m for m, n in zip(mask, shapes, strict=True)], 1
            )
        outputs.append(testing.eager_attention(q, joined(k, 2), joined(v, 2), key_mask=mask))
    return torch.cat(outputs, 2)


def check(tensors, backend, generator, **options):
    grad = torch.randn(eager(**tensors).shape, generator=generator)
    return testing.check_op(op, eager, tensors, tuple(tensors), backend, grad, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(problems=TWO),
        dict(problems=((63, (97,)), (111, (1, 63))), dims=(17, 40)),
        dict(problems=((4, (111, 4)), (1, (63,)), (97, (3,))), batch=1),
        dict(problems=((40, (60, 70)),), heads=1, dims=(64, 64)),
        dict(problems=((20, (49, 9)), (7, (18,))), batch=1, heads=4, groups=2, dims=(17, 40)),
        dict(
            dict(problems=tuple((n, (m, 2)) for n, m in zip(range(20, 28), (17, 31, 26, 1, 35, 19, 24, 48), strict=True))),
        ),
    ],
    ids=lambda sizes: (
        "-".join(f"{n}x{'+'.join(map(str, m))}" for n, m in sizes["problems"]) + "-grouped" * ("groups" in sizes)
    ),
)
def test_matches_float64(backend, generator, sizes, dtype):
    check(make(generator, dtype=dtype, **sizes), backend, generator)


@pytest.mark.parametrize("dims", [(261, 261), (24, 300)], ids=str)
def test_wide_head_dims(backend, generator, dims):
    check(make(generator, ((20, (33, 6)), (9, (30,))), 1, 1, dims), backend, generator)


@pytest.mark.parametrize("groups", [2, 1])
def test_two_segments_of_one_problem(backend, generator, groups):
    """q is a tensor, so the result is one; out and the log-sum-exp."""
    tensors = make(generator, ((20, (33, 12)),), groups=groups)
    mask = torch.rand(2, 12, generator=generator) < 0.5
    whole = torch.nn.functional.pad(mask, (33, 0), value=True)

    def one(q0, k0_0, k0_1, v0_0, v0_1, backend):
        results = attention(q0, (k0_0, k0_1), (v0_0, v0_1), key_mask=(None, mask), return_lse=True, scale=0.3, backend=backend)
        return torch.cat([t.flatten() for t in results])

    def plain(q0, k0_0, k0_1, v0_0, v0_1):
        scores = (q0 @ torch.cat([k0_0, k0_1], 2).mT * 0.3).masked_fill(~whole[:, None, None], float("-inf"))
        results = scores.softmax(-1) @ torch.cat([v0_0, v0_1], 2), scores.logsumexp(-1)  # of one head, broadcast
        return torch.cat([t.flatten() for t in results])

    testing.check_op(one, plain, tensors, tuple(tensors), backend)


def test_any_strides(backend, generator):
    tensors = make(generator)
    tensors["q0"] = torch.randn(2, 2, 16, 33, generator=generator).mT
    tensors["k0_1"] = torch.randn(2, 7, 2, 16, generator=generator).transpose(1, 2)
    tensors["v0_1"] = torch.randn(2, 2, 7, 32, generator=generator)[..., ::2]
    tensors["v1_0"] = torch.randn(1, 2, 18, 16, generator=generator).expand(2, -1, -1, -1)
    check(tensors, backend, generator)
    again = testing.run(op, tensors, tuple(tensors), backend=backend)  # an incoming gradient of strides 0
    assert all(g.isfinite().all() for g in again.gradients.values())


@pytest.mark.parametrize("given", ["both", "first", "second", "none of the first problem"])
def test_nothing_behind_the_mask_leaks(backend, generator, given):
    tensors = make(generator, ((20, (77, 9)), (11, (30,))), batch=3)
    first, second, other = (torch.rand(3, n, generator=generator) < 0.5 for n in (77, 9, 30))
    first[0], first[1, :70] = True, False
    masks = {
        "both": [(first, second), other],
        "first": [(first, None), None],
        "second": [(None, second), other],
        "none of the first problem": [None, other],
    }[given]
    pairs = masks[0] if masks[0] is not None else (None, None)
    clean, poisoned = dict(tensors), dict(tensors)
    for name, mask in (("0_0", pairs[0]), ("0_1", pairs[1]), ("1_0", masks[1])):
        for side in "kv":
            if mask is not None:
                hidden = ~mask[:, None, :, None]
                clean[side + name] = tensors[side + name].masked_fill(hidden, 0.0)
                poisoned[side + name] = tensors[side + name].masked_fill(hidden, float("nan"))
    grad = torch.randn(eager(**tensors).shape, generator=generator)
    ours = testing.check_op(op, eager, clean, tuple(clean), backend, grad, key_mask=masks)
    again = testing.run(op, poisoned, tuple(poisoned), grad, backend=backend, key_mask=masks)
    assert torch.equal(again.output, ours.output)
    for name, gradient in again.gradients.items():
        assert torch.equal(gradient, ours.gradients[name]), name
    if pairs[1] is not None:
        assert (again.gradients["k0_1"][~second[:, None, :, None].expand_as(tensors["k0_1"])] == 0).all()


def test_nan_in_an_example_without_keys_stays_there(backend, generator):
    """In its queries, keys, values and incoming gradients: all else keeps its bits, its own gradients are zero."""
    tensors = make(generator, ((9, (20, 13)), (7, (11,))))
    masks = [tuple(torch.rand(2, n, generator=generator) < 0.6 for n in (20, 13)), None]
    for mask in masks[0]:
        mask[1] = False
    grads = [torch.randn(2, 2, n, 16, generator=generator) for n in (9, 7)]
    grads += [torch.randn(2, 2, n, generator=generator) for n in (9, 7)]

    def run(nan):
        inputs, incoming = {n: t.clone() for n, t in tensors.items()}, [g.clone() for g in grads]
        if nan:
            for tensor in [t for n, t in inputs.items() if n[1] == "0"] + [incoming[0], incoming[2]]:
                tensor[1] = float("nan")
        inputs = {n: t.requires_grad_() for n, t in inputs.items()}
        out, lse = attention(**arguments(inputs), key_mask=masks, return_lse=True, backend=backend)
        return *out, *lse, *torch.autograd.grad([*out, *lse], list(inputs.values()), incoming)

    clean, poisoned = run(False), run(True)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
    assert (clean[0][1] == 0).all() and (clean[2][1] == float("-inf")).all()
    for name, gradient in zip(tensors, poisoned[4:], strict=True):
        assert (gradient[1] == 0).all() == (name[1] == "0"), name


def test_log_sum_exp_and_its_gradient(backend, generator):
    tensors = make(generator)

    def statistics(**inputs):
        out, lse = attention(
            **arguments({n: t for n, t in inputs.items() if n != "backend"}), return_lse=True, backend=backend_of(inputs)
        )
        return torch.cat([o.sum(3) for o in out], 2) * 0.5 + torch.cat(lse, 2) * torch.linspace(-1, 1, 38)

    def backend_of(inputs):
        return inputs.get("backend", "auto")

    def plain(**inputs):
        sides, results = arguments(inputs), []
        for q, k, v in zip(*sides.values(), strict=True):
            scores = q @ joined(k, 2).mT * 0.25
            results.append(((scores.softmax(-1) @ joined(v, 2)).sum(3) * 0.5, scores.logsumexp(-1)))
        return torch.cat([o for o, _ in results], 2) + torch.cat([s for _, s in results], 2) * torch.linspace(-1, 1, 38)

    testing.check_op(statistics, plain, tensors, tuple(tensors), backend, torch.randn(2, 2, 38, generator=generator))


def test_results_that_nobody_differentiates(backend, generator):
    """Only one problem's out, then only another's lse, has an incoming gradient."""
    tensors = {n: t.requires_grad_() for n, t in make(generator).items()}
    out, lse = attention(**arguments(tensors), return_lse=True, backend=backend)
    alone = attention(tensors["q1"], tensors["k1_0"], tensors["v1_0"], return_lse=True, backend=backend)
    for ours, single in ((out[1], alone[0]), (lse[1], alone[1])):
        found = torch.autograd.grad(ours.sum(), list(tensors.values()), retain_graph=True)
        expected = torch.autograd.grad(
            single.sum(), [tensors[n] for n in ("q1", "k1_0", "v1_0")], retain_graph=True, materialize_grads=True
        )
        by_name = dict(zip(tensors, found, strict=True))
        for name, gradient in zip(("q1", "k1_0", "v1_0"), expected, strict=True):
            torch.testing.assert_close(by_name[name], gradient, rtol=1e-4, atol=1e-5)
        assert all((by_name[n] == 0).all() for n in tensors if n[1] == "0")


@pytest.mark.parametrize("groups", [2, 1])
def test_dropout_is_the_reference_mask(backend, generator, groups):
    """The same elements on every backend, others in every problem, the first problem's those of a call by itself."""
    tensors = make(generator, groups=groups)
    seed = torch.tensor([-(2**62) + 12345])
    options = dict(dropout_p=0.3, dropout_seed=seed)
    exact = testing.run(op, {n: t.double() for n, t in tensors.items()}, tuple(tensors), backend="reference", **options)
    ours = testing.run(op, tensors, tuple(tensors), backend=backend, **options)
    torch.testing.assert_close(ours.output.double(), exact.output, rtol=1e-4, atol=1e-5)
    for name, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient.double(), exact.gradients[name], rtol=1e-4, atol=1e-4)
    q, k, v = (torch.cat([t for n, t in tensors.items() if n[:2] == f"{side}0"], 2) for side in "qkv")
    torch.testing.assert_close(ours.output[:, :, :33], attention(q, k, v, backend=backend, **options))
    twice = attention([q, q], [k, k], [v, v], backend=backend, **options)
    assert not torch.equal(*twice)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(batch=0),
        dict(heads=0),
        dict(problems=((0, (5, 2)), (3, (0,)))),
        dict(problems=((4, (0, 0)), (3, (0, 2)))),
        dict(problems=((0, (0,)),)),
    ],
    ids=str,
)
def test_empty(backend, generator, sizes):
    tensors = make(generator, **sizes)
    run = testing.run(op, tensors, tuple(tensors), backend=backend)
    assert run.output.isfinite().all()
    assert all(g.shape == tensors[n].shape and g.isfinite().all() for n, g in run.gradients.items())


def test_same_bits_and_no_uninitialised_memory(backend, generator):
    tensors = make(generator, dtype=torch.bfloat16)
    first = testing.run(op, tensors, tuple(tensors), backend=backend)
    with testing.poisoned_memory():
        again = testing.run(op, tensors, tuple(tensors), backend=backend)
    assert torch.equal(first.output, again.output)
    assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in tensors)


def test_only_wanted_gradients(backend, generator):
    tensors = make(generator)
    everything = testing.run(op, tensors, tuple(tensors), backend=backend).gradients
    for names in (("q0",), ("k0_1",), ("v1_0", "q1"), ("k0_0", "v0_0")):
        some = testing.run(op, tensors, names, backend=backend).gradients
        for name in names:
            torch.testing.assert_close(some[name], everything[name], rtol=1e-5, atol=1e-5)


# --- The registered ops -----------------------------------------------------------------------------------------------------


def packed(generator, dtype=torch.float32):
    """Two packed projections that attend to each other's keys and to a tensor of keys and values beside them; cls rows."""
    tensors = [torch.randn(2, n, s, 2, 16, generator=generator).to(dtype) for n, s in ((19, 3), (35, 3), (6, 2), (4, 1))]
    masks = [torch.rand(2, 35, generator=generator) < 0.7, torch.rand(2, 6, generator=generator) < 0.7]
    problems = [
        lists.ListedProblem(((0, 0), (3, 0)), ((1, 1), (2, 1)), ((1, 2), (2, 0)), (0, 1), rows=3),
        lists.ListedProblem(((1, 0),), ((0, 1),), ((0, 2),)),
    ]
    return tensors, problems, masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_projections(backend, generator, dtype):
    tensors, problems, masks = packed(generator, dtype)
    names = tuple(f"tensor{i}" for i in range(len(tensors)))
    shapes = [(2, 3, 2, 16), (2, 4, 2, 16), (2, 35, 2, 16)]

    def listed(backend, **inputs):
        out, lse = lists.attention_list(backend, list(inputs.values()), problems, masks, None, 0.25, 0.0)
        assert [tuple(o.shape) for o in out] == shapes and [tuple(s.shape) for s in lse] == [(2, 2, 7), (2, 2, 35)]
        return torch.cat([o.flatten() for o in out])

    def plain(tensor0, tensor1, tensor2, tensor3):
        """The two problems of `packed`, written out."""

        def attend(q, k, v, mask=None):
            return testing.eager_attention(*(t.transpose(1, 2) for t in (q, k, v)), key_mask=mask, scale=0.25).transpose(1, 2)

        q = torch.cat([tensor0[:, :3, 0], tensor3[:, :, 0]], 1)
        k, v = torch.cat([tensor1[:, :, 1], tensor2[:, :, 1]], 1), torch.cat([tensor1[:, :, 2], tensor2[:, :, 0]], 1)
        first = attend(q, k, v, torch.cat(masks, 1))
        second = attend(tensor1[:, :, 0], tensor0[:, :, 1], tensor0[:, :, 2])
        return torch.cat([o.flatten() for o in (first[:, :3], first[:, 3:], second)])

    given = dict(zip(names, tensors, strict=True))
    cotangent = torch.randn(plain(**given).shape, generator=generator)
    ours = testing.check_op(listed, plain, given, names, backend, cotangent)
    queries = ours.gradients["tensor0"][:, :, 0]
    assert (queries[:, 3:] == 0).all() and (queries[:, :3] != 0).any()  # those beyond the rows that count


def test_opcheck(backend, generator):
    tensors, problems, masks = packed(generator)
    tensors[2] = torch.randn(2, 6, 2, 16, 2, generator=generator).mT
    forward, backward = forward_backward("attention", backend, "attention_list")
    inputs = (tensors, lists.encode(problems), masks, torch.tensor([5]), 0.25, 0.1)
    out, lse = forward(*inputs)
    dout = [torch.ones(1).expand_as(o) for o in out]
    torch.library.opcheck(forward, inputs)
    torch.library.opcheck(
        backward, (dout, [torch.ones_like(s) for s in lse], *inputs[:3], out, lse, *inputs[3:], [1, 1, 0, 1])
    )


def test_compiles_whole_and_once_for_every_length(backend, generator):
    """fullgraph=True, forward and backward, the same bits as eager; new lengths and batch sizes compile nothing."""
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda t: op(**t, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager")
    counted = torch.compile(lambda t: op(**t, backend=backend), fullgraph=True, dynamic=True, backend=counting)
    for batch, queries, keys in ((2, 9, 33), (4, 17, 50), (2, 33, 41)):
        tensors = make(generator, ((queries, (keys, 7)), (5, (keys + 1,))), batch, heads=3)
        expected, actual = (
            testing.run(function, tensors, tuple(tensors)) for function in (plain_of(backend), joined_of(compiled))
        )
        assert torch.equal(actual.output, expected.output)
        assert all(torch.equal(actual.gradients[name], expected.gradients[name]) for name in tensors)
        counted({n: t.requires_grad_() for n, t in tensors.items()})
    assert len(compilations) == 1


def plain_of(backend):
    return lambda **tensors: op(**tensors, backend=backend)


def joined_of(compiled):
    return lambda **tensors: compiled(tensors)


def test_autocast_casts_all_problems(backend, generator, tensor_device):
    tensors = make(generator)
    with torch.autocast(tensor_device.type, torch.bfloat16):
        run = testing.run(op, tensors, tuple(tensors), backend=backend)
    assert run.output.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in run.gradients.values())


def test_vmap_and_second_derivatives_are_refused(backend, generator):
    tensors = {n: t.requires_grad_() for n, t in make(generator).items()}
    with pytest.raises(RuntimeError, match="no vmap rule"):
        torch.vmap(lambda q: op(**{**tensors, "q0": q}, backend=backend))(torch.stack([tensors["q0"]] * 2))
    q = tensors["q0"].detach().requires_grad_()
    (first,) = torch.autograd.grad((op(**{**tensors, "q0": q}, backend=backend) ** 2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), q)


# --- Wrong arguments --------------------------------------------------------------------------------------------------------

Q, K, M = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.ones(2, 7, dtype=torch.bool)
WRONG = {
    "none": (dict(q=[], k=[], v=[]), ValueError, "q has 0 problems; it must have 1 to 8"),
    "many": (dict(q=[Q] * 9, k=[K] * 9, v=[K] * 9), ValueError, "q has 9 problems; it must have 1 to 8"),
    "no list": (dict(k=K), TypeError, "k is a Tensor; it must be a list with an entry for each problem of q"),
    "mask no list": (dict(key_mask=M), TypeError, "key_mask is a Tensor; it must be a list .* or None"),
    "unequal": (dict(v=[K]), ValueError, "v has 1 entries; it must have one for each of 2 problems of q"),
    "masks unequal": (dict(key_mask=[None]), ValueError, "key_mask has 1 entries; it must have one for each of 2"),
    "no pair": (dict(v=[K, K]), TypeError, r"v\[1\] is a Tensor; it must be a pair, as k\[1\] is"),
    "mask no pair": (dict(key_mask=[None, M]), TypeError, r"key_mask\[1\] is a Tensor; it must be a pair"),
    "mask a pair": (dict(key_mask=[(None, None), None]), TypeError, r"key_mask\[0\] is a tuple; it must be a tensor"),
    "three": (dict(k=[K, (K, K, K)], v=[K, (K, K, K)], key_mask=None), ValueError, r"k\[1\] has 3 segments; it must have 2"),
    "no tensor": (dict(q=[Q, 3]), TypeError, r"q\[1\] is a int; it must be a tensor"),
    "keys": (dict(v=[K, (K, K[:, :, 1:])]), ValueError, r"v\[1\]\[1\] has shape \(2, 3, 6, 8\); with k\[1\]\[1\]"),
    "head dim": (dict(k=[K, (K, K[..., 1:])]), ValueError, r"k\[1\]\[1\] has shape \(2, 3, 7, 7\); with q\[1\]"),
    "value dim": (
        dict(v=[K, (K, K[..., 1:])]),
        ValueError,
        r"v\[1\]\[1\] has shape .*; its head dim must be that of v\[1\]\[0\], 8",
    ),
    "dtype": (dict(k=[K, (K, K.half())]), TypeError, r"k\[1\]\[1\] has dtype torch.float16; it must be q\[1\]'s"),
    "problems' dtypes": (
        dict(q=[Q, Q.half()], k=[K, (K.half(),) * 2], v=[K, (K.half(),) * 2]),
        TypeError,
        r"q\[1\] has dtype torch.float16; it must be that of q\[0\], torch.float32",
    ),
    "problems' heads": (
        dict(q=[Q, Q[:, :1]], k=[K, (K[:, :1],) * 2], v=[K, (K[:, :1],) * 2]),
        ValueError,
        r"q\[1\] has shape \(2, 1, 5, 8\); it must be \(2, 3, any, 8\), as q\[0\] has",
    ),
    "problems' shared keys": (
        dict(k=[K, (K[:, :1],) * 2], v=[K, (K[:, :1],) * 2]),
        ValueError,
        r"v\[1\] has shape .* it must be \(2, 3, any, 8\)",
    ),
    "segments' heads": (
        dict(k=[K, (K, K[:, :1])], v=[K, (K, K[:, :1])]),
        ValueError,
        r"k\[1\]\[1\] has 1 heads; it must have as many as k\[1\]\[0\], 3",
    ),
    "problems' values": (dict(v=[K[..., :4], (K, K)]), ValueError, r"v\[1\] has shape .* it must be \(2, 3, any, 4\)"),
    "mask": (
        dict(key_mask=[None, (None, M[:, 1:])]),
        ValueError,
        r"key_mask\[1\]\[1\] has shape \(2, 6\); it must be \(B, M\)",
    ),
    "bias": (dict(bias=torch.zeros(1, 1, 1, 7)), ValueError, "bias is given; it must be None for a list of problems"),
    "dropout": (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0; it must be a number in"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; allowed are 'auto', 'cuda'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, error, message = WRONG[case]
    given = dict(q=[Q, Q], k=[K, (K, K)], v=[K, (K, K)]) | changes
    for call in (attention, lambda **kw: mmkernels.explain("attention", **kw)):
        with pytest.raises(error, match=message):
            call(**given)


def test_wrong_arguments_of_two_segments():
    with pytest.raises(TypeError, match="v is a Tensor; it must be a pair, as k is"):
        attention(Q, (K, K), K)
    with pytest.raises(ValueError, match=r"key_mask\[0\] has shape \(2, 6\)"):
        attention(Q, (K, K), (K, K), key_mask=(M[:, 1:], None))


def test_auto_and_the_library(generator):
    tensors = make(generator)
    assert mmkernels.explain("attention", **arguments(tensors)).backend == "cpp"
    library, ours = (op(**tensors, backend=name) for name in ("sdpa", "reference"))
    torch.testing.assert_close(library, ours)
    with pytest.raises(mmkernels.BackendError, match="no guarantee for what stands behind the mask"):
        attention([Q], [K], [K], key_mask=[M], backend="sdpa")


def test_ints_say_what_the_problems_do(generator):
    problems = packed(generator)[1]
    assert lists.decode(lists.encode(problems)) == [problem._replace(masks=(*problem.masks, -1)[:2]) for problem in problems]

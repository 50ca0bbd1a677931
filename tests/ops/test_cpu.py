"""What only the C++ backend has: instruction sets, threads, parts of rows and keys, memory, the one-call inference."""

import os
import subprocess
import sys

import pytest
import torch

from mmkernels import testing
from mmkernels.ops import attention, latent_attention
from mmkernels.ops.attention import lists
from mmkernels.ops.latent import reference

WANTED = ("q", "x", "w_k", "w_v", "norm_weight", "norm_bias", "b_v", "position")


@pytest.fixture(autouse=True)
def cpp(on):
    return on("cpp")


@pytest.fixture
def threads():
    """Sets the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def qkv(generator, batch, heads, queries, keys, dim, value_dim, dtype=torch.float32):
    sizes = {"q": (queries, dim), "k": (keys, dim), "v": (keys, value_dim)}
    return {n: torch.randn(batch, heads, *s, generator=generator).to(dtype) for n, s in sizes.items()}


def latent_arguments(generator, batch, queries, keys, content, shared, dtype=torch.float32, shared_queries=False):
    c = content + shared
    sizes = {"q": (1 if shared_queries else batch, queries, 24), "x": (batch, keys, content), "w_k": (24, c), "w_v": (40, c)}
    sizes |= {"norm_weight": (c,), "norm_bias": (c,), "b_v": (40,)} | ({"position": (keys, shared)} if shared else {})
    scale = c**-0.5 if c > 100 else 1.0  # of the weights: scores of wide rows would have one key win
    scales = {"w_k": scale, "w_v": scale}
    return {n: (torch.randn(s, generator=generator) * scales.get(n, 1.0)).to(dtype) for n, s in sizes.items()}


def check_attention(generator, sizes, **options):
    tensors = qkv(generator, *sizes)
    grad = torch.randn(*tensors["q"].shape[:-1], tensors["v"].shape[-1], generator=generator)
    wanted = ("q", "k", "v")
    if "bias" in options:
        tensors["bias"], wanted = options.pop("bias"), (*wanted, "bias")
    return testing.check_op(attention, testing.eager_attention, tensors, wanted, "cpp", grad, **options)


def check_latent(generator, *sizes, key_mask=None, **options):
    tensors = latent_arguments(generator, *sizes, **options)
    wanted = tuple(n for n in WANTED if n in tensors)
    grad = torch.randn(tensors["x"].shape[0], tensors["q"].shape[1], 40, generator=generator).to(tensors["x"].dtype)
    options = {"num_heads": 2, "key_mask": key_mask}
    return testing.check_op(latent_attention, testing.eager_latent_attention, tensors, wanted, "cpp", grad, **options)


# Sizes around the edges of panels (4 to 32 queries), chunks of rows (128), blocks of keys (144), tiles (4 to 12), and of
# the forms for up to 8 queries or keys, copied (odd head dims) and in place.
AWKWARD = [
    (1, 1, 1, 145, 1, 3),
    (1, 2, 33, 288, 17, 31),
    (1, 1, 129, 63, 40, 24),
    (2, 1, 97, 111, 33, 65),
    (3, 1, 3, 300, 64, 64),
    (1, 1, 8, 20, 19, 5),
    (1, 2, 300, 5, 12, 16),
    (2, 2, 131, 8, 64, 32),
]


def check_joined(generator, problems, dims=(16, 16), dtype=torch.float32, masked=False, dropout_p=0.0, rows=-1):
    """A list has the bits of one call for each of its problems, whose segments are joined in memory.

    `problems`: the lengths of the segments of queries and of keys. `rows` of the first segment's queries count.
    """
    tensors, masks, places = [], [], []
    for queries, keys in problems:
        start, first_mask = len(tensors), len(masks)
        tensors += [torch.randn(2, n, 2, 2, dims[0], generator=generator).to(dtype) for n in queries]  # slot 0 is not read
        for width in dims:
            tensors += [torch.randn(2, 2, 1, n, width, generator=generator).to(dtype).transpose(1, 3) for n in keys]
        if masked:  # the second segment only where there is one
            masks.append(torch.rand(2, keys[-1], generator=generator) < 0.6)
        mask = {1: (first_mask,), 2: (-1, first_mask)}[len(keys)] if masked else (-1, -1)
        numbers = iter(range(start, len(tensors)))
        q, k, v = (tuple((next(numbers), slot) for _ in side) for side, slot in ((queries, 1), (keys, 0), (keys, 0)))
        places.append(lists.ListedProblem(q, k, v, mask, rows))
    seed = 2**63 - 5  # the second problem's wraps
    options = (torch.tensor([seed]), 0.3, dropout_p)
    out, lse = torch.ops.mmkernels.attention_list_fwd(tensors, lists.encode(places), masks, *options)
    dout = [torch.randn(o.shape, generator=generator).to(dtype) for o in out]
    dlse = [torch.randn(s.shape, generator=generator) for s in lse]
    wanted = [1] * len(tensors)
    found = torch.ops.mmkernels.attention_list_bwd(
        dout, dlse, tensors, lists.encode(places), masks, out, lse, *options, wanted
    )
    outs, douts = iter(out), iter(dout)
    for i, ((queries, _), place) in enumerate(zip(problems, places, strict=True)):
        q, k, v = (torch.cat([tensors[t][:, :, s] for t, s in side], 1).transpose(1, 2) for side in place[:3])
        if rows >= 0:
            q = torch.cat([q[:, :, :rows], q[:, :, queries[0] :]], 2)
        own_seed = (seed + i * lists._SEED_STEP + 2**63) % 2**64 - 2**63
        own = (lists.joined_mask(place, tensors, masks), None, None, torch.tensor([own_seed]), *options[1:])
        expected_out, expected_lse = torch.ops.mmkernels.attention_fwd(q, k, v, *own)
        ours, grad = (torch.cat([next(each) for _ in queries], 1).transpose(1, 2) for each in (outs, douts))
        assert torch.equal(ours, expected_out) and torch.equal(lse[i], expected_lse)
        expected = torch.ops.mmkernels.attention_bwd(grad, dlse[i], q, k, v, ours, lse[i], *own, 3)
        for side, gradient in zip(place[:3], expected, strict=False):
            parts = [found[t][:, :, s] for t, s in side]
            if side is place.q:
                assert all((found[t][:, :, 0] == 0).all() for t, _ in side)
                if rows >= 0:
                    assert (parts[0][:, rows:] == 0).all()
                    parts[0] = parts[0][:, :rows]
            assert torch.equal(torch.cat(parts, 1).transpose(1, 2), gradient)


# Lengths of a first segment around the edges of panels, chunks and blocks.
EDGES = (0, 1, 7, 15, 31, 32, 33, 127, 128, 143, 144, 145, 300)


def awkward_lists():
    """Boundaries at every edge of queries, of keys and of both, in the forms for many and for few queries and keys."""
    generator = torch.Generator().manual_seed(9)
    for first in EDGES:
        lengths = [(first, second) for second in (1, 6, 40)]
        check_joined(generator, [(n, n) for n in lengths])
        check_joined(generator, [(n, (25, 20)) for n in lengths], (40, 19), dropout_p=0.3)
        check_joined(generator, [((20,), n) for n in lengths], (64, 32), masked=True)
        check_joined(generator, [((1, 2), n) for n in lengths], (32, 64), masked=True, dropout_p=0.3)
        check_joined(generator, [((4,), n) for n in lengths], (64, 64))
        check_joined(generator, [(n, (3, 4)) for n in lengths], (64, 16))
        check_joined(generator, [(n, (2, 1)) for n in lengths], (17, 48), masked=True)
        for dtype in (torch.bfloat16, torch.float16):
            check_joined(generator, [(n, n) for n in lengths], (33, 16), dtype, rows=min(first, 17))


def awkward_sizes():
    """Run as a script, once for every instruction set."""
    awkward_lists()
    generator = torch.Generator().manual_seed(7)
    for sizes in AWKWARD:
        check_attention(generator, sizes)
    mask = torch.rand(2, 150, generator=generator) < 0.7
    for queries in (7, 70):
        bias = torch.randn(1, 2, queries, 150, generator=generator)
        check_attention(generator, (2, 2, queries, 150, 16, 16), bias=bias, key_mask=mask)
        tensors = qkv(generator, 2, 2, queries, 150, 16, 16) | {"bias": bias}
        testing.check_op(attention, testing.eager_attention, tensors, ("q", "k", "v"), "cpp", key_mask=mask)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_latent(generator, 2, 63, 200, 30, 19, dtype=dtype)
        for channels in ((1024, 0), (700, 5)):  # few queries of wide keys: blocks of their own size, in place and copied
            check_latent(generator, 2, 3, 150, *channels, dtype=dtype, key_mask=mask)
    for queries in (5, 50):
        tensors, seed = qkv(generator, 1, 2, queries, 150, 16, 16), torch.tensor([11])
        grad = torch.randn(1, 2, queries, 16, generator=generator)
        ours, exact = (
            testing.run(attention, tensors, ("q", "k", "v"), grad, dropout_p=0.3, dropout_seed=seed, backend=backend)
            for backend in ("cpp", "reference")
        )
        for a, b in zip((ours.output, *ours.gradients.values()), (exact.output, *exact.gradients.values()), strict=True):
            assert testing.max_error(a, b) < 1e-5  # one element kept or dropped wrongly is worth 1e-3


@pytest.mark.parametrize("isa", ["base", "v3", "v4"])
def test_every_instruction_set(isa):
    """A set that this processor lacks falls back to the widest it has, so this runs everywhere."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_cpu; test_cpu.awkward_sizes()"
    run = subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__)],
        env={**os.environ, "MMKERNELS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("queries, keys", [(63, 400), (5, 400), (63, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_keys_and_values_share_costs_no_precision(generator, queries, keys, dtype):
    """Sums over keys: what all values share is in every one of them, and the gradient of q has what all keys share times the
    sum of dS, which is zero."""
    shapes = ((queries, 12), (keys, 12), (keys, 20), (queries, 20))
    q, k, v, grad = (torch.randn(4, 16, *shape, generator=generator) for shape in shapes)
    k, v = k + torch.randn(16, 1, 12, generator=generator), v + torch.randn(16, 1, 20, generator=generator)
    tensors, grad = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}, grad.to(dtype)
    exact = testing.run(attention, {n: t.double() for n, t in tensors.items()}, ("q",), grad.double(), backend="reference")
    plain = testing.run(testing.eager_attention, tensors, ("q",), grad)
    ours = testing.run(attention, tensors, ("q",), grad, backend="cpp")

    def typical(run):
        differences = run.output - exact.output, run.gradients["q"] - exact.gradients["q"]
        return [float(d.square().mean().sqrt()) for d in differences]

    factors = (0.8 if dtype == torch.float32 and keys > 8 else 1.1, 0.9)
    for what, own, eager, factor in zip(("output", "gradient of q"), typical(ours), typical(plain), factors, strict=True):
        assert own <= factor * eager, f"{what}: typical error {own:.2e}, eager's is {eager:.2e}"


def test_a_gradient_of_lse_is_no_error_to_be_centred(generator):
    """Where lse has a gradient a row's dS adds up to that; masked keys have no part in the mean."""
    mask = torch.rand(2, 60, generator=generator) < 0.7
    mask[1] = False
    for queries, keys in ((20, 60), (3, 60), (20, 7)):
        tensors = qkv(generator, 2, 2, queries, keys, 16, 16)
        tensors["k"] = (tensors["k"] + 5.0 * torch.randn(16, generator=generator)).requires_grad_()
        weights = torch.randn(2, 2, queries, generator=generator)

        def gradient(dtype, backend, tensors=tensors, weights=weights, visible=mask[:, :keys]):
            given = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
            out, lse = attention(**given, key_mask=visible, return_lse=True, backend=backend)
            loss = out.sum() + (lse[:1] * weights[:1].to(dtype)).sum()
            return torch.autograd.grad(loss, given["q"])[0]

        ours, exact = gradient(torch.float32, "cpp"), gradient(torch.float64, "reference")
        torch.testing.assert_close(ours, exact.float(), rtol=1e-5, atol=1e-5)
        assert not ours[1].any()


@pytest.mark.parametrize("channels", [5, 64, 512, 700])
def test_rows_are_normalised_in_full_precision(generator, channels):
    """One key's result is its normalised row, whose statistics start from what it begins with: a good guess or a bad one."""
    for offset, count in ((0.0, 0), (1000.0, channels), (1000.0, 3), (-1000.0, 16), (1e5, 1)):
        x = torch.randn(2, 1, channels, generator=generator)
        x[..., :count] += offset
        row, _ = torch.ops.mmkernels.latent_fwd(torch.zeros(1, 1, channels), x, None, None, 1.0, 1e-5, None, 0.0, 0)
        exact, plain = (torch.nn.functional.layer_norm(each, (channels,)) for each in (x.double(), x))
        testing.assert_within_budget(row, exact, plain, f"a row of which {count} channels are {offset} off")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_thread_counts(threads, generator, count):
    """Large enough for every thread to get a part: rows cut, keys cut forward and backward, both, and neither."""
    threads(count)
    for sizes in [(1, 1, 300, 700, 24, 24), (1, 1, 9, 3000, 40, 40), (1, 1, 2000, 50, 16, 24), (2, 3, 40, 300, 32, 32)]:
        first = check_attention(generator, sizes)
        assert torch.isfinite(first.output).all()
    check_latent(generator, 1, 150, 900, 13, 20)
    check_latent(generator, 3, 40, 500, 13, 20, shared_queries=True)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_list_over_threads(threads, generator, count):
    """Problems that cut rows, keys or neither, long and short, in one pool."""
    threads(count)
    problems = [((700, 5), (700, 5)), ((1,), (900, 5)), ((3, 2), (4,)), ((1000, 30), (40, 7)), ((300,), (5, 2))]
    check_joined(generator, problems, (24, 40))
    check_joined(generator, problems[::-1], (64, 64), masked=True, dropout_p=0.1)


def test_list_gradients_that_nobody_wants(generator):
    """Gradients of some segments only; of none; and the bits do not depend on what else is wanted."""
    sizes = ((40, 3), (5, 3), (150, 3), (9, 1))
    tensors = [torch.randn(2, n, slots, 2, 16, generator=generator) for n, slots in sizes]
    problems = [
        lists.ListedProblem(((0, 0), (1, 0)), ((0, 1), (1, 1)), ((0, 2), (1, 2))),
        lists.ListedProblem(((3, 0),), ((2, 1),), ((2, 2),)),
    ]
    inputs = (tensors, lists.encode(problems), [])
    out, lse = torch.ops.mmkernels.attention_list_fwd(*inputs, None, 0.25, 0.0)

    def gradients(wanted):
        dout = [torch.ones(1).expand_as(o) for o in out]
        return torch.ops.mmkernels.attention_list_bwd(dout, [], *inputs, out, lse, None, 0.25, 0.0, wanted)

    everything = gradients([1] * 4)
    assert (everything[2][:, :, 0] == 0).all()
    for number in range(16):
        wanted = [number >> i & 1 for i in range(4)]
        for want, some, whole in zip(wanted, gradients(wanted), everything, strict=True):
            assert torch.equal(some, whole) if want else some.shape == (0,)


WRONG_LISTS = {
    "integers": (dict(problems=[-1]), "problems has 1 integers"),
    "no tensors": (dict(tensors=[]), "tensors is empty"),
    "dimensions": (dict(tensors=[torch.zeros(2, 5, 3, 8)]), r"tensors\[0\] has 4 dimensions"),
    "dtype": (dict(tensors=[torch.zeros(2, 5, 3, 2, 8).double()]), "has dtype Double; it must be float32"),
    "tensor": (dict(problems=[-1, 0, 0, -1, -1, 1, 1, -1, -1, 0, 2, -1, -1, -1, -1]), "names tensor 1; there are 1"),
    "slot": (dict(problems=[-1, 0, 3, -1, -1, 0, 1, -1, -1, 0, 2, -1, -1, -1, -1]), "names slot 3"),
    "twice": (dict(problems=[-1, 0, 1, -1, -1, 0, 1, -1, -1, 0, 2, -1, -1, -1, -1]), "twice"),
    "rows": (dict(problems=[6, 0, 0, -1, -1, 0, 1, -1, -1, 0, 2, -1, -1, -1, -1]), "wants 6 rows of queries; there are 5"),
    "mask": (dict(problems=[-1, 0, 0, -1, -1, 0, 1, -1, -1, 0, 2, -1, -1, 0, -1]), "names mask 0; there are 0"),
    "seed": (dict(dropout_p=0.5), "seed is None"),
    "dout": (dict(dout=[torch.zeros(2, 4, 2, 8)]), "one of dout has shape"),
    "few dout": (dict(dout=[]), "dout has 0 elements; it must have 1"),
    "dlse": (dict(dlse=[torch.zeros(2, 2, 4)]), "one of dlse has shape"),
    "out": (dict(out=[torch.zeros(2, 5, 2, 8).half()]), "one of out has dtype Half"),
    "lse": (dict(lse=[]), "lse has 0 elements; it must have 1"),
    "wanted": (dict(wanted=[1, 1]), "wanted has 2 elements; it must have 1"),
}


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_wrong_lists(case):
    """Whatever is indexed is checked in the op itself."""
    changes, message = WRONG_LISTS[case]
    one = [-1, 0, 0, -1, -1, 0, 1, -1, -1, 0, 2, -1, -1, -1, -1]
    given = dict(dout=[torch.zeros(2, 5, 2, 8)], dlse=[], tensors=[torch.zeros(2, 5, 3, 2, 8)], problems=one, key_masks=[])
    given |= dict(out=[torch.zeros(2, 5, 2, 8)], lse=[torch.zeros(2, 2, 5)], seed=None, scale=1.0, dropout_p=0.0, wanted=[1])
    torch.ops.mmkernels.attention_list_bwd(**given)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mmkernels.attention_list_bwd(**given | changes)


@pytest.mark.parametrize("shape", [(1, 1, 300, 690), (2, 2, 1, 690), (1, 2, 300, 1), (1, 1, 1, 690), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("queries, keys", [(300, 690), (690, 300)], ids=str)
def test_bias_gradient_over_threads(threads, generator, shape, queries, keys):
    """Parts that add to the same element of a broadcast bias have copies of their own; parts that do not share one."""
    threads(3)
    batch, heads, rows, columns = shape
    bias = torch.randn(batch, heads, queries if rows > 1 else 1, keys if columns > 1 else 1, generator=generator)
    check_attention(generator, (2, 2, queries, keys, 8, 8), bias=bias)


def test_same_bits_for_the_same_threads(threads, generator):
    threads(3)
    tensors = latent_arguments(generator, 2, 150, 900, 13, 20, shared_queries=True)
    wanted = tuple(tensors)
    runs = [testing.run(latent_attention, tensors, wanted, backend="cpp") for _ in range(5)]
    for other in runs[1:]:
        assert torch.equal(runs[0].output, other.output)
        assert all(torch.equal(runs[0].gradients[n], other.gradients[n]) for n in wanted)


def test_blocks_without_visible_keys(generator):
    """Whole blocks of keys masked first, in the middle and last: the running maximum is still -inf after the first one."""
    tensors = qkv(generator, 1, 2, 20, 600, 16, 16)
    mask = torch.zeros(1, 600, dtype=torch.bool)
    mask[:, 290:300] = mask[:, 440:445] = True
    for name in ("k", "v"):
        tensors[name][:, :, ~mask[0]] = float("nan")
    shown = {n: t if n == "q" else t[:, :, mask[0]] for n, t in tensors.items()}
    ours = testing.run(attention, tensors, ("q", "k", "v"), key_mask=mask, backend="cpp")
    exact = testing.run(attention, {n: t.double() for n, t in shown.items()}, ("q", "k", "v"), backend="reference")
    plain = testing.run(testing.eager_attention, shown, ("q", "k", "v"))
    testing.assert_within_budget(ours.output, exact.output, plain.output, "output")
    for name in ("q", "k", "v"):
        gradient = ours.gradients[name]
        if name != "q":
            assert not gradient[:, :, ~mask[0]].any()
            gradient = gradient[:, :, mask[0]]
        testing.assert_within_budget(gradient, exact.gradients[name], plain.gradients[name], name, 3.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("sizes", [(1, 8, 32, 16, 0), (2, 1, 1, 1, 0), (2, 150, 300, 21, 12), (3, 5, 0, 4, 4)], ids=str)
@pytest.mark.parametrize("heads", (1, 2))
def test_inference_in_one_call(generator, sizes, heads, dtype):
    tensors = latent_arguments(generator, *sizes, dtype=dtype)
    mask = torch.rand(sizes[0], sizes[2], generator=generator) < 0.7
    mask[0] = False
    names = ("q", "x", "w_k", "w_v", "norm_weight", "norm_bias", "b_v", "position")
    out = torch.ops.mmkernels.latent_attention(*(tensors.get(n) for n in names), mask, heads, 0.2, 1e-5)
    options = {"num_heads": heads, "key_mask": mask, "scale": 0.2}
    exact = latent_attention(**{n: t.double() for n, t in tensors.items()}, **options, backend="reference")
    plain = testing.eager_latent_attention(**tensors, **options).nan_to_num()  # eager divides 0 by 0 in rows without keys
    assert not out[0].any()
    testing.assert_within_budget(out, exact, plain, "output")


def test_inference_takes_the_short_way(generator, monkeypatch):
    """Without gradients the absorbed plan is one native call; with one, or with wrong arguments, it is not taken."""
    tensors = latent_arguments(generator, 1, 8, 32, 16, 0)
    calls = []
    op = torch.ops.mmkernels.latent_attention
    monkeypatch.setattr(torch.ops.mmkernels, "latent_attention", Counted(op, calls))
    latent_attention(**tensors, backend="cpp")
    assert len(calls) == 1
    tensors["w_v"].requires_grad_()
    latent_attention(**tensors, backend="cpp")
    assert len(calls) == 1
    with torch.no_grad():
        latent_attention(**tensors, backend="cpp")
        assert len(calls) == 2
        with pytest.raises(ValueError, match="norm_weight"):
            latent_attention(**{**tensors, "norm_weight": torch.ones(3)}, backend="cpp")


class Counted:
    def __init__(self, op, calls):
        self.op, self.calls = op, calls

    @property
    def default(self):
        self.calls.append(1)
        return self.op.default


MEMORY = """
import resource, sys, torch
from mmkernels.ops import latent_attention
torch.set_num_threads(2)
def arguments(keys):
    return dict(q=torch.randn(1, 512, 261), x=torch.randn(1, keys, 261), w_k=torch.randn(261, 261), w_v=torch.randn(261, 261))
def step(a, train):
    for name in ("q", "w_k", "w_v"):
        a[name].requires_grad_(train)
    out = latent_attention(**a, backend="cpp")
    if train:
        out.sum().backward()
train = sys.argv[1] == "train"
large = arguments(20000)
step(arguments(300), train)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(large, train)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("mode, limit", [("infer", 10), ("train", 20)])
def test_memory_does_not_grow_with_the_keys(mode, limit):
    """Megabytes at the peak beyond a small problem's: the normalised input, a key or a value tensor would each be 20."""
    run = subprocess.run([sys.executable, "-c", MEMORY, mode], capture_output=True, text=True, check=True)
    assert float(run.stdout) < limit


LIST_MEMORY = """
import resource, torch
from mmkernels.ops.attention import lists
torch.set_num_threads(2)
problem = lists.ListedProblem(((0, 0), (1, 0)), ((0, 1), (1, 1)), ((0, 2), (1, 2)), (-1, 0), rows=64)
mask = torch.arange(2000)[None] % 3 > 0
def step(tensors, mask):
    args = tensors, lists.encode([problem]), [mask]
    out, lse = torch.ops.mmkernels.attention_list_fwd(*args, None, 0.1, 0.0)
    grads = torch.ops.mmkernels.attention_list_bwd(out, [], *args, out, lse, None, 0.1, 0.0, [1, 1])
    return sum(t.nbytes for t in (*out, *lse, *grads))
def tensors(rows, more):
    return [torch.randn(1, n, 3, 2, 64) for n in (rows, more)]
large = tensors(20000, 2000)
step(tensors(300, 20), mask[:, :20])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
results = step(large, mask)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - results / 2**20)
"""


def test_lists_join_nothing_in_memory():
    """Megabytes at the peak beyond a small problem's and the results: the keys joined would be 11."""
    run = subprocess.run([sys.executable, "-c", LIST_MEMORY], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 6


def test_the_reference_core_is_what_the_native_core_computes(generator):
    q, x = torch.randn(2, 40, 33, generator=generator), torch.randn(2, 300, 20, generator=generator)
    position, mask = torch.randn(300, 13, generator=generator), torch.rand(2, 300, generator=generator) < 0.5
    out, lse = torch.ops.mmkernels.latent_fwd(q, x, position, mask, 0.2, 1e-5)
    exact = reference.core(q.double(), x.double(), position.double(), mask, 0.2, 1e-5)
    plain = reference.core(q, x, position, mask, 0.2, 1e-5)
    testing.assert_within_budget(out, exact[0], plain[0], "out")
    testing.assert_within_budget(lse, exact[1], plain[1], "lse")

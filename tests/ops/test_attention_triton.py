"""What is particular to the Triton kernels: splits, chunked head dims, alignment, wide offsets, tile tables, report cases.

`test_attention.py` holds them to the op's contract. Sizes are small because every turn of an inner loop costs the interpreter
some 10 ms.
"""

import itertools
import json

import pytest
import torch

from mmkernels import _backends, _tuning, testing
from mmkernels.ops import attention

if _backends.triton_missing() or not _backends.INTERPRET:
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import triton
import triton.language as tl

from mmkernels.ops._shared import kernels as shared
from mmkernels.ops.attention import kernels, lists

BACKEND = "triton"


def make(generator, shape, dims, dtype=torch.float32):
    (b, h, n, m), (d, e) = shape, dims
    sizes = {"q": (b, h, n, d), "k": (b, h, m, d), "v": (b, h, m, e)}
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


def cotangent(generator, tensors):
    q, v = tensors["q"], tensors["v"]
    return torch.randn(*q.shape[:-1], v.shape[-1], generator=generator).to(q.dtype)


# --- Splits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_change_nothing(monkeypatch, generator, splits, dtype):
    """97 queries and 300 keys, of which the first split of an example sees none."""
    monkeypatch.setattr(shared, "FORCED_SPLITS", splits)
    tensors = make(generator, (1, 1, 97, 300), (17, 40), dtype)
    tensors["bias"] = torch.randn(1, 1, 1, 300, generator=generator)
    mask = torch.rand(1, 300, generator=generator) < 0.8
    mask[:, :70] = False
    grad = cotangent(generator, tensors)
    names = ("q", "k", "v", "bias")
    first, second = (
        testing.check_op(attention, testing.eager_attention, tensors, names, BACKEND, grad, key_mask=mask) for _ in range(2)
    )
    assert torch.equal(first.output, second.output)
    assert all(torch.equal(first.gradients[n], second.gradients[n]) for n in names)


def test_splits_of_rows_without_keys(monkeypatch, generator):
    monkeypatch.setattr(shared, "FORCED_SPLITS", 3)
    tensors = {n: t.requires_grad_() for n, t in make(generator, (2, 1, 5, 150), (8, 8)).items()}
    mask = torch.ones(2, 150, dtype=torch.bool)
    mask[1] = False
    out, lse = attention(**tensors, key_mask=mask, return_lse=True, backend=BACKEND)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all() and lse[0].isfinite().all()
    for grad in torch.autograd.grad(out.sum() + lse[0].sum(), list(tensors.values())):
        assert (grad[1] == 0).all() and grad.isfinite().all()


def test_few_queries_are_split_by_themselves(generator, monkeypatch):
    """One tile of queries on 132 multiprocessors: the wave model hands the merge something to do."""
    merged = []
    merge = kernels.merge_splits
    monkeypatch.setattr(
        kernels, "merge_splits", lambda partial, *rest, **kw: (merged.append(len(partial)), merge(partial, *rest, **kw))
    )
    tensors = make(generator, (1, 1, 3, 1000), (16, 16))
    testing.check_op(attention, testing.eager_attention, tensors, ("q",), BACKEND, cotangent(generator, tensors))
    assert merged and merged[0] > 1


@pytest.mark.parametrize("broadcast", ["bhnm", "1hnm", "b11m", "bhn1", "1111"])
def test_split_bias_gradients(monkeypatch, generator, broadcast):
    monkeypatch.setattr(shared, "FORCED_SPLITS", 2)
    full = (2, 2, 70, 20)
    tensors = make(generator, full, (8, 8))
    tensors["bias"] = torch.randn([f if c != "1" else 1 for c, f in zip(broadcast, full, strict=True)], generator=generator)
    testing.check_op(attention, testing.eager_attention, tensors, ("bias",), BACKEND, cotangent(generator, tensors))


# --- Head dims --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 64, 128])
def test_a_cover_is_enough_and_wastes_little(chunk):
    for dim in range(1, 1025):
        first, steps, second = shared.cover(dim, chunk)
        width = first * steps + second
        assert width >= dim and width - dim < max(16, 0.5 * dim)
        assert all(c == 0 or c >= 16 and c & (c - 1) == 0 for c in (first, second))
        assert steps == 1 or chunk and first == chunk
    assert shared.cover(261) == (256, 1, 16) and shared.cover(704, 128) == (128, 5, 64)


@pytest.mark.parametrize("dims", [(300, 300), (300, 20), (20, 300)], ids=str)
def test_looped_head_dims_with_splits(monkeypatch, generator, dims):
    monkeypatch.setattr(shared, "FORCED_SPLITS", 2)
    tensors = make(generator, (1, 1, 63, 97), dims)
    testing.check_op(attention, testing.eager_attention, tensors, ("q", "k", "v"), BACKEND, cotangent(generator, tensors))


def test_looped_head_dims_with_everything(generator):
    """Key mask with NaN behind it, bias, dropout and the gradient of lse on the path that loops over the head dim."""
    tensors = make(generator, (1, 2, 20, 65), (290, 280))
    tensors["bias"] = torch.randn(1, 2, 1, 65, generator=generator)
    mask = torch.rand(1, 65, generator=generator) < 0.7
    hidden = ~mask[:, None, :, None]
    options = dict(key_mask=mask, dropout_p=0.2, dropout_seed=torch.tensor([99]), return_lse=True)
    out_grad, lse_grad = cotangent(generator, tensors), torch.randn(1, 2, 20, generator=generator)

    def gradients(dtype, backend, poison):
        inputs = {n: t.to(dtype) for n, t in tensors.items()}
        inputs |= {n: inputs[n].masked_fill(hidden, poison) for n in "kv"}
        inputs = {n: t.requires_grad_() for n, t in inputs.items()}
        out, lse = attention(**inputs, **options, backend=backend)
        loss = (out * out_grad.to(dtype)).sum() + (lse * lse_grad).sum()
        return out, lse, *torch.autograd.grad(loss, list(inputs.values()))

    ours = gradients(torch.float32, BACKEND, float("nan"))
    exact, plain = (gradients(dtype, "reference", 0.0) for dtype in (torch.float64, torch.float32))
    for name, *three in zip(("out", "lse", "dq", "dk", "dv", "dbias"), ours, exact, plain, strict=True):
        testing.assert_within_budget(*three, name, 3.0)


# --- Layouts ----------------------------------------------------------------------------------------------------------------


def test_aligned_copies_only_what_it_must():
    whole = torch.randn(2, 3, 5, 64)
    for tensor in (
        whole,
        whole.transpose(1, 2),
        whole[..., :32],
        whole[:, :, 1:],
        whole[:1],
        whole[:, :1].expand(-1, 4, -1, -1),
    ):
        assert shared.aligned(tensor) is tensor
    for tensor in (whole[..., 1:33], whole[..., ::2], whole.transpose(2, 3), whole[..., :33], whole[..., :1].expand_as(whole)):
        copy = shared.aligned(tensor)
        assert copy is not tensor and torch.equal(copy, tensor)
        assert copy.stride(-1) == 1 and copy.stride(-2) % 4 == 0 and copy.data_ptr() % 16 == 0
    padded = shared.aligned(whole[..., :33])
    assert (padded.as_strided((2, 3, 5, 36), padded.stride())[..., 33:] == 0).all()


def test_offsets_beyond_two_to_the_31(generator):
    """Rows, heads and examples further apart than 32 bits reach: in an untouched, so never resident, buffer."""
    buffer = torch.empty(3 * 2**31, dtype=torch.float16)
    tensors = make(generator, (1, 1, 4, 3), (8, 8), torch.float16)
    for name, size in (("q", 4), ("k", 3), ("v", 3)):
        far = buffer.as_strided((1, 1, size, 8), (0, 0, 3 * 2**29, 1))
        tensors[name] = far.copy_(tensors[name])
        assert shared.aligned(far) is far
    near = {n: t.contiguous() for n, t in tensors.items()}
    grad = cotangent(generator, near)
    ours, expected = (testing.run(attention, t, (), backend=BACKEND) for t in (tensors, near))
    assert torch.equal(ours.output, expected.output)
    out, lse = attention(**near, return_lse=True, backend=BACKEND)
    backward = torch.ops.mmkernels_triton.attention_bwd
    rest = (out, lse, None, None, None, None, 0.3, 0.0, 7)
    for far, close in zip(
        backward(grad, None, *tensors.values(), *rest), backward(grad, None, *near.values(), *rest), strict=True
    ):
        assert torch.equal(far, close)


def test_a_compiler_may_change_the_strides_of_what_was_saved(generator):
    tensors = make(generator, (2, 3, 9, 20), (8, 12))
    out, lse = attention(**tensors, return_lse=True, backend=BACKEND)
    grad, dlse = cotangent(generator, tensors), torch.ones(()).expand(2, 3, 9)
    backward, rest = torch.ops.mmkernels_triton.attention_bwd, (None, None, None, None, 0.3, 0.0, 7)
    expected = backward(grad, dlse.contiguous(), *tensors.values(), out, lse, *rest)

    def permuted(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    actual = backward(permuted(grad), dlse, *map(permuted, tensors.values()), permuted(out), permuted(lse), *rest)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


def test_opcheck(generator):
    tensors = make(generator, (1, 2, 5, 9), (8, 8))
    out, lse = attention(**tensors, return_lse=True, backend=BACKEND)
    ops = torch.ops.mmkernels_triton
    torch.library.opcheck(ops.attention_fwd.default, (*tensors.values(), None, None, None, None, 0.3, 0.0))
    torch.library.opcheck(
        ops.attention_bwd.default,
        (torch.ones_like(out), None, *tensors.values(), out, lse, None, None, None, None, 0.3, 0.0, 3),
    )


# --- Lists of problems ------------------------------------------------------------------------------------------------------


def listed(generator, width, dtype=torch.float32):
    """Two packed projections and their shared rows, whose boundaries lie inside tiles; masks with NaN behind them.

    The first problem's second keys have no mask, the second problem has none at all and reads only some rows of its queries.
    """
    lengths = ((70, 3), (33, 3), (5, 3), (5, 3))
    tensors = [torch.randn(2, n, s, 2, width, generator=generator).to(dtype) for n, s in lengths]
    mask = torch.rand(2, 70, generator=generator) < 0.7
    mask[1, :64] = False  # a whole tile
    tensors[0][:, :, 1:][~mask] = float("nan")
    problems = [
        lists.ListedProblem(((0, 0), (2, 0)), ((0, 1), (2, 1)), ((0, 2), (2, 2)), (0, -1)),
        lists.ListedProblem(((1, 0), (3, 0)), ((1, 1), (3, 1)), ((1, 2), (3, 2)), (-1, -1), rows=20),
    ]
    return tensors, problems, [mask]


def check_list(tensors, problems, masks, generator, **options):
    """Holds results and gradients to eager's error; returns them."""
    options = dict(seed=None, dropout_p=0.0) | options
    incoming = None

    def run(backend, dtype):
        nonlocal incoming
        inputs = [(t if backend == BACKEND else t.nan_to_num(0.0)).to(dtype).requires_grad_() for t in tensors]
        results = [*itertools.chain(*lists.attention_list(backend, inputs, problems, masks, scale=0.3, **options))]
        incoming = incoming or [torch.randn(r.shape, generator=generator) for r in results]
        gradients = torch.autograd.grad(results, inputs, [g.to(r.dtype) for g, r in zip(incoming, results, strict=True)])
        return *(r.detach() for r in results), *gradients

    dtype = tensors[0].dtype
    ours, exact, plain = run(BACKEND, dtype), run("reference", torch.float64), run("reference", dtype)
    for number, three in enumerate(zip(ours, exact, plain, strict=True)):
        testing.assert_within_budget(*three, number, 3.0)
    return ours


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("width", [16, 17, 40])
def test_lists_of_segments(monkeypatch, generator, splits, width):
    monkeypatch.setattr(shared, "FORCED_SPLITS", splits)
    arguments = listed(generator, width)
    first, second = (check_list(*arguments, torch.Generator().manual_seed(1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("splits", [1, 2])
def test_lists_with_dropout(monkeypatch, generator, splits):
    monkeypatch.setattr(shared, "FORCED_SPLITS", splits)
    seed = torch.tensor([2**63 - 5])  # the second problem's wraps
    check_list(*listed(generator, 16, torch.bfloat16), generator, seed=seed, dropout_p=0.25)


@pytest.mark.parametrize("splits", [1, 2])
def test_lists_with_looped_head_dims(monkeypatch, generator, splits):
    monkeypatch.setattr(shared, "FORCED_SPLITS", splits)
    tensors = [torch.randn(1, n, 3, 1, 290, generator=generator) for n in (66, 3)]
    problem = lists.ListedProblem(((0, 0), (1, 0)), ((1, 1), (0, 1)), ((1, 2), (0, 2)))
    check_list(tensors, [problem], [], generator)


def watch(monkeypatch, module, name, note):
    """Calls `note` with the grid of every launch of a kernel."""

    class Watched:
        def __getitem__(self, grid):
            note(grid)
            return kernel[grid]

    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, Watched())


def test_a_list_is_one_launch_a_pass(monkeypatch, generator):
    """Eight problems, of which one has no queries and one no keys: forward, statistics, dq, dk and dv."""
    launched = []
    for module, names in ((kernels, ("forward", "statistics", "backward")), (shared, ("merge", "sum"))):
        for name in names:
            watch(monkeypatch, module, f"{name}_kernel", lambda grid, name=name: launched.append(name))
    sizes = ((3, 9), (0, 4), (5, 0), (1, 70), (9, 2), (2, 2), (4, 1), (7, 5))
    tensors = [torch.randn(1, n, s, 1, 16, generator=generator) for rows in sizes for n, s in zip(rows, (1, 2), strict=True)]
    problems = [lists.ListedProblem(((2 * i, 0),), ((2 * i + 1, 0),), ((2 * i + 1, 1),)) for i in range(8)]
    monkeypatch.setattr(shared, "FORCED_SPLITS", 1)
    check_list(tensors, problems, [], generator)
    assert launched == ["forward", "statistics", "backward", "backward"]
    launched.clear()
    monkeypatch.setattr(shared, "FORCED_SPLITS", 2)  # of 70 keys there are two tiles, of 9 queries one
    check_list(tensors, problems, [], generator)
    assert launched == ["forward", "merge", "statistics", "backward", "sum", "backward"]


def test_only_problems_whose_gradients_are_wanted_are_walked(monkeypatch, generator):
    programs = []
    watch(monkeypatch, kernels, "backward_kernel", lambda grid: programs.append(grid[0]))
    monkeypatch.setattr(shared, "FORCED_SPLITS", 1)
    tensors = [torch.randn(1, n, s, 1, 16, generator=generator) for n, s in ((3, 1), (9, 2), (70, 1), (130, 2))]
    problems = [lists.ListedProblem(((i, 0),), ((i + 1, 0),), ((i + 1, 1),)) for i in (0, 2)]
    ints, ops = lists.encode(problems), torch.ops.mmkernels_triton
    out, lse = ops.attention_list_fwd(tensors, ints, [], None, 0.3, 0.0)

    def backward(*wanted):
        programs.clear()
        return ops.attention_list_bwd(out, [], tensors, ints, [], out, lse, None, 0.3, 0.0, wanted)

    whole = backward(1, 1, 1, 1)
    assert programs == [1 + 2, 1 + 3]
    for wanted, walked in (((1, 0, 0, 0), [1]), ((0, 0, 0, 1), [3]), ((0, 1, 1, 0), [2, 1])):
        for gradient, expected, want in zip(backward(*wanted), whole, wanted, strict=True):
            assert torch.equal(gradient, expected) if want else gradient.numel() == 0
        assert programs == walked


# --- Shared pieces ----------------------------------------------------------------------------------------------------------


@triton.jit
def _draw_kernel(seed, out, first_row, first_key, threshold, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    low, high = shared.dropout_row(tl.load(seed), first_row + index)
    keep = shared.dropout_keep(low[:, None], high[:, None], first_key + index[None, :], threshold)
    tl.store(out + index[:, None] * BLOCK + index[None, :], keep.to(tl.int8))


def test_dropout_of_rows_beyond_32_bits():
    """Against the formula in Python integers, where a row number cut to 32 bits, or signed arithmetic, would show."""

    def mix(u):
        u = (u ^ (u >> 16)) * 0x7FEB352D % 2**32
        u = (u ^ (u >> 15)) * 0x846CA68B % 2**32
        return u ^ (u >> 16)

    seed, first, first_key, threshold = -(2**61) + 7, 2**33 + 5, 2**31 - 16, 3 * 2**30
    out = torch.empty(16, 16, dtype=torch.int8)
    _draw_kernel[(1,)](torch.tensor([seed]), out, first, first_key, threshold, BLOCK=16)
    for i in range(16):
        z = (seed + (first + i + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        for j in range(16):
            draw = mix((mix((z ^ ((first_key + j) * 0x9E3779B1)) % 2**32) + (z >> 32)) % 2**32)
            assert out[i, j] == (draw >= threshold)


@pytest.mark.parametrize("base2", [True, False])
def test_merge_of_splits(generator, base2):
    scores = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64) * 4  # (splits, rows, keys)
    values = torch.randn(3, 7, 20, generator=generator, dtype=torch.float64)
    scores[1, 2] = scores[:, 4] = float("-inf")  # a row without keys in one split, and one without any
    power = torch.exp2 if base2 else torch.exp
    top = scores.amax(-1)
    weights = power(scores - top.clamp_min(-1e9)[..., None])
    parts = [t.float().contiguous() for t in (weights @ values, top, weights.sum(-1))]
    out, lse = torch.empty(5, 20), torch.empty(5)
    shared.merge_splits(*parts, [[out[None, None]]], [lse], base2=base2)
    natural = scores.transpose(0, 1).flatten(1) * (torch.tensor(2.0).log().double() if base2 else 1.0)
    torch.testing.assert_close(out, (natural.softmax(-1).nan_to_num(0.0) @ values.flatten(0, 1)).float())
    torch.testing.assert_close(lse, natural.logsumexp(-1).float())


def test_sum_of_splits(generator):
    partial = torch.randn(4, 3, 50, generator=generator)
    out = torch.empty(3, 50, dtype=torch.bfloat16)
    shared.sum_splits(partial, [[out[None, None]]])
    assert torch.equal(out, (partial[0] + partial[1] + partial[2] + partial[3]).bfloat16())


# --- Tile tables and report cases -------------------------------------------------------------------------------------------


def test_measured_tables_override_the_heuristic_by_nearest_dims(monkeypatch, tmp_path):
    assert _tuning.gpu_folder("NVIDIA H200 NVL") == "nvidia_h200_nvl"
    table = [
        {"dims": [256, 256], "dtype": "bfloat16", "tiles": {"queries": 32}},
        {"dims": [140, 140], "dtype": "bfloat16", "tiles": {"queries": 16, "num_warps": 1}},
    ]
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "attention_forward.json").write_text(json.dumps(table))
    monkeypatch.setattr(_tuning, "CONFIGS", tmp_path)
    _tuning._table.cache_clear()
    _tuning.tiles.cache_clear()
    default = _tuning.tiles("attention_forward", (250, 250), "bfloat16", 90)
    assert _tuning.tiles("attention_forward", (250, 250), "bfloat16", 90, "gpu") == default._replace(queries=32)
    assert _tuning.tiles("attention_forward", (150, 129), "bfloat16", 90, "gpu") == _tuning.tiles(
        "attention_forward", (150, 129), "bfloat16", 90
    )._replace(queries=16, num_warps=1)
    for dims, dtype, gpu in (((64, 64), "bfloat16", "gpu"), ((250, 250), "float16", "gpu"), ((250, 250), "bfloat16", "none")):
        assert _tuning.tiles("attention_forward", dims, dtype, 90, gpu) == _tuning.tiles("attention_forward", dims, dtype, 90)
    _tuning._table.cache_clear()
    _tuning.tiles.cache_clear()


def test_report_cases_describe_every_argument():
    cases = list(kernels.report_cases())
    assert len({(case.name, case.capability) for case in cases}) == len(cases)
    for case in cases:
        assert list(case.signature) == case.kernel.arg_names
        for index, (name, kind) in enumerate(case.signature.items()):
            parts = kind if isinstance(kind, tuple) else (kind,)
            for place, part in enumerate(parts):
                path = (index, place) if isinstance(kind, tuple) else name
                assert (part == "constexpr") == (path in case.constexprs), (case.name, name)

"""`ops.hypergrid_linear` and `ops.hypergrid_gate` on every backend: against float64 with plain eager's error as the budget,
and by their meaning. What they are inside torch is held by test_row_ops.py."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mmkernels
from mmkernels import ops, testing
from mmkernels.ops._shared import dropout
from mmkernels.ops._shared import kernels as shared_kernels
from mmkernels.ops._shared.registration import forward_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
linear, eager = ops.hypergrid_linear, testing.eager_hypergrid_linear


def make(generator, x, out, grid, dtype=torch.float32, *, index="", gate_dtype=None):
    """Named tensors; `index` is "rows" or "examples" for one of each, else "". Gates are those of a sigmoid, in (0, 1)."""
    device = generator.device
    tensors = {"x": x, "weight": (out, x[-1]), "bias": (out,)}
    tensors = {n: torch.randn(s, generator=generator, device=device) for n, s in tensors.items()}
    tensors["weight"] *= x[-1] ** -0.5
    tensors["gate"] = torch.rand(grid, generator=generator, device=device)
    tensors = {n: t.to(gate_dtype or dtype if n == "gate" else dtype) for n, t in tensors.items()}
    if index:
        sizes = x[:-1] if index == "rows" else x[:1]
        tensors["gate_index"] = torch.randint(grid[0], sizes, generator=generator, device=device)
    return tensors


WANTED = ("x", "weight", "gate", "bias")


def check(generator, tensors, backend, wanted=WANTED, **options):
    shape = (*tensors["x"].shape[:-1], tensors["weight"].shape[0])
    grad = torch.randn(shape, generator=generator, device=generator.device)
    with testing.poisoned_memory():
        return testing.check_op(linear, eager, tensors, wanted, backend, grad, **options)


# --- Against float64 -----------------------------------------------------------------------------------------------------

# x, out, (G, R, C), index, options: blocks of 8, of odd widths, of one row or column; tiles and groups that end anywhere.
PROBLEMS = {
    "a gate an example": ((2, 37, 48), 24, (2, 3, 3), "", {}),
    "a gate for all": ((2, 20, 96), 72, (1, 1, 3), "", dict(activation="relu", residual=True)),
    "one row each": ((5, 1, 64), 40, (5, 8, 5), "", dict(residual=True)),
    "packed rows": ((33, 45), 66, (3, 5, 6), "rows", dict(activation="gelu")),
    "a gate a group": ((3, 17, 144), 144, (2, 9, 18), "examples", dict(activation="gelu_tanh")),
    "columns alone": ((2, 16, 40), 200, (2, 5, 1), "", dict(activation="relu")),
    "rows of tokens": ((3, 11, 16), 34, (4, 2, 2), "rows", {}),
    "one by one": ((1, 1), 1, (1, 1, 1), "", {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_matches_float64(backend, generator, problem, dtype):
    x, out, grid, index, options = PROBLEMS[problem]
    check(generator, make(generator, x, out, grid, dtype, index=index), backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles(backend, generator, dtype):
    """Several tiles in every direction, several stages of a pipeline in a block of the grid, whole tiles in a group."""
    if backend == "triton" and dtype == torch.float32 and generator.device.type == "cpu":
        pytest.skip("four seconds of the interpreter, which bfloat16 spends for both")
    length = 40 if backend == "triton" else 140
    check(generator, make(generator, (2, length, 200), 136, (2, 1, 17), dtype), backend, activation="relu")
    check(generator, make(generator, (1, 128, 80), 144, (1, 2, 3), dtype), backend, residual=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_gates_of_half_inputs(backend, generator, dtype):
    tensors = make(generator, (2, 19, 32), 48, (2, 4, 3), dtype, gate_dtype=torch.float32)
    run = check(generator, tensors, backend)
    assert run.gradients["gate"].dtype == torch.float32 and run.output.dtype == dtype


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(backend, generator, layout):
    tensors = make(generator, (3, 9, 32), 48, (3, 4, 3))
    wanted = WANTED

    def changed(t):
        if layout == "sliced":
            return torch.stack([t, t], -1).flatten(-2)[..., ::2]
        return t.mT.contiguous().mT if t.dim() > 1 else t

    if layout == "expanded":
        tensors |= {"x": tensors["x"][:1].expand(3, -1, -1), "gate": tensors["gate"][:1].expand(3, -1, -1)}
        wanted = ("weight", "bias")
    else:
        tensors = {n: changed(t) for n, t in tensors.items()}
    run = check(generator, tensors, backend, wanted)
    testing.run(linear, tensors, wanted, backend=backend)  # an incoming gradient of stride 0
    packed = testing.run(linear, {n: t.contiguous() for n, t in tensors.items()}, (), backend=backend)
    assert torch.equal(run.output.reshape(packed.output.shape), packed.output)


@pytest.mark.parametrize("index", ["examples", "rows"])
def test_gates_without_rows_and_rows_in_any_order(backend, generator, index):
    """The same as with gates written out for every example or row; a gate nobody has, NaN even, has no part in anything."""
    tensors = make(generator, (7, 3, 24), 16, (6, 3, 2), index=index)
    numbers = tensors["gate_index"]
    numbers[numbers == 4] = 1
    tensors["gate"][4] = float("nan")
    run = testing.run(linear, tensors, WANTED, backend=backend)
    written = tensors["gate"][numbers].reshape(-1, 3, 2)
    alone = {**tensors, "gate": written, "x": tensors["x"] if index == "examples" else tensors["x"].reshape(-1, 24)}
    del alone["gate_index"]
    whole = testing.run(linear, alone, WANTED, backend="reference")
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.output.reshape(whole.output.shape), whole.output, **close)
    torch.testing.assert_close(run.gradients["weight"], whole.gradients["weight"], **close)
    summed = torch.zeros(6, 3, 2, device=numbers.device).index_add(0, numbers.reshape(-1), whole.gradients["gate"])
    torch.testing.assert_close(run.gradients["gate"], summed, **close)
    assert torch.equal(run.output, linear(**tensors | {"gate_index": numbers.int()}, backend=backend))


# --- By its meaning -------------------------------------------------------------------------------------------------------


def test_a_tiny_case_by_hand():
    x, weight = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 5.0]])
    assert linear(x, weight, torch.tensor([[[0.5]]])).item() == 0.5 * (3 - 10)
    assert linear(x, weight, torch.tensor([[[0.5]]]), torch.tensor([1.0]), residual=True, activation="relu").item() == 5.5


def test_reference_in_float64_has_two_derivatives(generator):
    tensors = make(generator, (2, 3, 16), 16, (2, 2, 1), torch.float64)
    inputs = [t.requires_grad_() for t in tensors.values()]
    names = list(tensors)
    call = lambda *values: linear(**dict(zip(names, values, strict=True)), activation="gelu_tanh", backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True) and torch.autograd.gradgradcheck(
        call, inputs, fast_mode=True
    )


def test_a_gate_for_every_weight_runs_on_the_reference(generator):
    """The limit of full gates: blocks of one, which no kernel takes."""
    tensors = make(generator, (2, 3, 5), 4, (2, 5, 4))
    weights = tensors["gate"].mT * tensors["weight"]
    torch.testing.assert_close(linear(**tensors), tensors["x"] @ weights.mT + tensors["bias"])
    explanation = mmkernels.explain("hypergrid_linear", **tensors)
    assert explanation.backend == "reference" and "blocks over in are 1 wide" in str(explanation)


def test_gates_of_one_are_a_linear_layer(backend, generator):
    tensors = make(generator, (2, 9, 32), 24, (2, 2, 3))
    tensors["gate"] = torch.ones_like(tensors["gate"])
    plain = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    torch.testing.assert_close(linear(**tensors, backend=backend), plain)


def test_nan_gates_reach_their_block_alone(backend, generator):
    tensors = make(generator, (3, 9, 32), 24, (3, 2, 3))
    tensors["gate"][1, 0, 2] = float("nan")
    run = testing.run(linear, tensors, ("x", "weight"), backend=backend)
    expected = torch.zeros(3, 9, 24, dtype=torch.bool, device=generator.device)
    expected[1, :, 16:] = True
    assert torch.equal(run.output.isnan(), expected)
    assert run.gradients["x"][1, :, :16].isnan().all() and run.gradients["x"][1, :, 16:].isfinite().all()
    assert run.gradients["x"][[0, 2]].isfinite().all()
    assert run.gradients["weight"][16:, :16].isnan().all() and run.gradients["weight"][:16].isfinite().all()


def test_nan_inputs_stay_through_the_relu(backend, generator):
    tensors = make(generator, (2, 9, 32), 24, (2, 2, 3), torch.bfloat16)
    tensors["x"][0, 3, 5] = -float("nan")
    out = linear(**tensors, activation="relu", backend=backend)
    assert out[0, 3].isnan().all() and out[0, :3].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 7, 32), (3, 0, 32), (0, 32)], ids=str)
def test_empty_batches(backend, generator, shape):
    gates = 1 if len(shape) == 2 else shape[0]
    run = testing.run(linear, make(generator, shape, 24, (gates, 2, 3)), WANTED, backend=backend)
    assert run.output.shape == (*shape[:-1], 24)
    assert all(not run.gradients[n].any() for n in WANTED)


def test_only_the_gradients_that_are_wanted(backend, generator):
    tensors = make(generator, (2, 9, 32), 24, (2, 2, 3))
    x, dy = tensors["x"].reshape(18, 32), torch.randn(18, 24, generator=generator, device=generator.device)
    op = forward_backward("hypergrid", backend)[1]
    arguments = (dy, x, tensors["weight"], tensors["gate"], None, 9, False, 2, 0.0, None)
    everything = op(*arguments, True, True, True, True)
    for wanted in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)):
        found = op(*arguments, *map(bool, wanted))
        for need, one, whole in zip(wanted, found, everything, strict=True):
            assert torch.equal(one, whole) if need else one.shape == (0,)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
def test_dropout_is_that_of_the_reference(backend, generator, activation):
    tensors = make(generator, (3, 9, 32), 24, (3, 2, 3))
    options = dict(activation=activation, dropout_p=0.4, dropout_seed=torch.tensor([77], device=generator.device))
    run, exact = (testing.run(linear, tensors, WANTED, backend=b, **options) for b in (backend, "reference"))
    torch.testing.assert_close(run.output, exact.output, rtol=1e-4, atol=1e-5)
    for name in WANTED:
        torch.testing.assert_close(run.gradients[name], exact.gradients[name], rtol=1e-4, atol=1e-4)
    dropped = exact.gradients["x"] == 0
    assert 0.2 < dropped.float().mean() < 0.8 and torch.equal(run.gradients["x"] == 0, dropped)


def test_activation_checkpoint_redraws_the_same_dropout(backend, generator):
    tensors = {n: t.requires_grad_() for n, t in make(generator, (3, 9, 32), 24, (3, 2, 3)).items()}
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(3)
        call = lambda t: linear(**t, dropout_p=0.4, backend=backend)  # noqa: E731
        out = checkpoint(call, tensors, use_reentrant=False) if wrapped else call(tensors)
        gradients.append(torch.autograd.grad(out.square().sum(), list(tensors.values())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    torch.manual_seed(4)
    assert not torch.equal(linear(**tensors, dropout_p=0.4, backend=backend), out)


def test_autocast_computes_as_a_linear_layer_does(backend, generator, tensor_device):
    tensors = {n: t.requires_grad_() for n, t in make(generator, (3, 9, 32), 24, (3, 2, 3)).items()}
    with torch.autocast(tensor_device.type, dtype=torch.bfloat16):
        out = linear(**tensors, backend=backend)
    low = {n: t if n == "gate" else t.bfloat16() for n, t in tensors.items()}
    assert out.dtype == torch.bfloat16 and torch.equal(out, linear(**low, backend=backend))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), list(tensors.values())))


def test_only_the_inputs_are_saved(backend, generator):
    tensors = {n: t.requires_grad_() for n, t in make(generator, (3, 9, 32), 24, (3, 2, 3)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        linear(**tensors, activation="gelu", backend=backend)
    assert saved and set(saved) <= {t.data_ptr() for t in tensors.values()}


def test_the_same_bits_every_time(backend, generator):
    tensors = make(generator, (3, 40, 64), 48, (2, 4, 6), torch.bfloat16, index="examples")
    first, second = (testing.run(linear, tensors, WANTED, backend=backend) for _ in range(2))
    assert torch.equal(first.output, second.output)
    assert all(torch.equal(first.gradients[n], second.gradients[n]) for n in WANTED)


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("gates", [1, 2])
def test_sums_split_over_blocks_of_threads(on, generator, monkeypatch, splits, gates):
    """Rows, or gates, of the weight's gradient, whatever number of parts the device asks for."""
    on("triton")
    monkeypatch.setattr(shared_kernels, "FORCED_SPLITS", splits)
    check(generator, make(generator, (2, 150, 48), 24, (gates, 3, 3)), "triton")


@pytest.mark.parametrize("copies, seed", [("early", 1), ("late", 2), ("random", 3)])
@pytest.mark.parametrize("multiprocessors", [1, 64])
def test_the_emulator_in_every_order(on, generator, monkeypatch, copies, seed, multiprocessors):
    on("cuda")
    monkeypatch.setenv("MMKERNELS_EMULATOR_COPIES", copies)
    monkeypatch.setenv("MMKERNELS_EMULATOR_SEED", str(seed))
    monkeypatch.setenv("MMKERNELS_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
    check(generator, make(generator, (2, 150, 272), 136, (2, 2, 17), torch.bfloat16), "cuda", activation="relu")
    check(generator, make(generator, (5, 1, 96), 136, (5, 12, 17), torch.bfloat16), "cuda")
    check(generator, make(generator, (100, 96), 40, (3, 1, 5), torch.float32, index="rows"), "cuda")


# Rows that fill tiles of 256 and not, gates of 64 rows and more, blocks of one to four steps of wgmma and of several tiles.
WGMMA_PROBLEMS = {
    "gates of 192 rows": ((3, 192, 96), 200, (3, 1, 25), "", dict(activation="relu", residual=True)),
    "numbered gates": ((5, 128, 264), 136, (2, 33, 17), "examples", dict(activation="gelu")),
    "gates of 64 rows": ((9, 64, 136), 264, (9, 1, 3), "", dict(activation="relu")),
    "a gate for all": ((1, 700, 144), 264, (1, 2, 3), "", {}),
    "numbered gates, some without rows": ((2, 64, 520), 392, (6, 5, 7), "examples", {}),
    "dx in parts of 96": ((5, 128, 384), 264, (5, 4, 11), "", dict(residual=True)),
    "dx in parts of 64": ((9, 64, 640), 200, (9, 5, 1), "", dict(activation="gelu_tanh")),
    "dx in parts of 48": ((3, 192, 192), 136, (3, 4, 17), "examples", dict(activation="relu")),
}


@pytest.mark.parametrize(
    "copies, seed, dtype", [("early", 1, torch.bfloat16), ("late", 2, torch.float16), ("random", 3, torch.bfloat16)]
)
@pytest.mark.parametrize("problem", WGMMA_PROBLEMS)
def test_wgmma_and_tma(on, generator, monkeypatch, problem, copies, seed, dtype):
    on("cuda")
    monkeypatch.setenv("MMKERNELS_EMULATOR_COPIES", copies)
    monkeypatch.setenv("MMKERNELS_EMULATOR_SEED", str(seed))
    x, out, grid, index, options = WGMMA_PROBLEMS[problem]
    tensors = make(generator, x, out, grid, dtype, index=index)
    check(generator, tensors, "cuda", **options)
    monkeypatch.setenv("MMKERNELS_EMULATOR_SHARED", "166912")  # of sm_80: too little for them, so they did run
    for wanted in ("bias", "x", "weight"):
        if (wanted == "weight" and x[-1] <= 128) or (wanted == "x" and (x[0] * x[1] < 512 or x[-1] // grid[1] < 24)):
            continue  # so narrow a weight or block, and for so few rows a turned weight, are left to mma.sync
        with pytest.raises(RuntimeError, match="bytes of shared memory"):
            op = forward_backward("hypergrid", "cuda")[wanted != "bias"]
            rows, groups = tensors["x"].flatten(0, 1), tensors.get("gate_index")
            per_gate = len(rows) if groups is None and grid[0] == 1 else x[1]
            given = (rows, tensors["weight"], tensors["gate"])
            if wanted == "bias":
                op(*given, None, groups, per_gate, False, 0, 0.0, None)
            else:
                dy = torch.zeros(len(rows), out, dtype=dtype)
                op(dy, *given, groups, per_gate, False, 0, 0.0, None, wanted == "x", wanted == "weight", False, False)
    monkeypatch.setenv("MMKERNELS_EMULATOR_CAPABILITY", "8")  # where mma.sync takes the same problem
    check(generator, tensors, "cuda", **options)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dropout_by_wgmma_is_that_of_the_reference(on, generator, activation):
    on("cuda")
    tensors = make(generator, (5, 128, 192), 136, (5, 2, 17), torch.bfloat16)
    seed, share = torch.tensor([77]), 0.4
    keep = dropout.keep_mask(seed, (1, 1, 640, 192), share).view(5, 128, 192)

    def fused(**tensors):
        return linear(**tensors, activation=activation, dropout_p=share, dropout_seed=seed)

    def plain(x, **rest):
        return eager(torch.where(keep, getattr(torch.nn.functional, activation)(x) / (1 - share), 0.0), **rest)

    grad = torch.randn(5, 128, 136, generator=generator)
    run = testing.check_op(fused, plain, tensors, ("x", "weight"), "cuda", grad)
    assert not run.gradients["x"][~keep].any()


# --- The gate ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(4, 7, 4, 5), (1, 7, 4, 70), (4, 100, 1, 5), (1, 3, 1, 1)], ids=str)
def test_the_gate_matches_float64(backend, generator, sizes, dtype):
    row, column = torch.randn(sizes[:2], generator=generator), torch.randn(sizes[2:], generator=generator)
    grad = torch.randn(max(sizes[0], sizes[2]), sizes[1], sizes[3], generator=generator)
    pair = ops.hypergrid_gate, testing.eager_hypergrid_gate
    tensors = {"row": row.to(dtype), "column": column.to(dtype)}
    testing.check_op(*pair, tensors, tuple(tensors), backend, grad)
    moved = {n: t.mT.contiguous().mT for n, t in tensors.items()}
    testing.check_op(*pair, moved, tuple(tensors), backend)  # an incoming gradient of stride 0


def test_no_gates(backend):
    row, column = torch.ones(1, 3, requires_grad=True), torch.ones(0, 2, requires_grad=True)
    out = ops.hypergrid_gate(row, column, backend=backend)
    assert out.shape == (0, 3, 2)
    gradients = torch.autograd.grad(out.sum(), (row, column))
    assert not gradients[0].any() and gradients[1].shape == (0, 2)


# --- Errors -----------------------------------------------------------------------------------------------------------------


def arguments(**changes):
    tensors = {"x": torch.zeros(2, 3, 32), "weight": torch.zeros(24, 32), "gate": torch.zeros(2, 2, 3)}
    return tensors | {"bias": torch.zeros(24)} | changes


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(x=torch.zeros(2, 3, 32, dtype=torch.int64)), TypeError, "x has dtype torch.int64"),
        (dict(x=torch.zeros(2, 3, 0)), ValueError, r"x has shape \(2, 3, 0\)"),
        (dict(weight=torch.zeros(32, 24)), ValueError, r"weight has shape \(32, 24\); it must be \(out, 32\).*transposed"),
        (dict(weight=torch.zeros(24, 32).half()), TypeError, "weight has dtype torch.float16; it must be x's"),
        (dict(gate=torch.zeros(2, 3, 3)), ValueError, "R = 3 must divide in = 32"),
        (dict(gate=torch.zeros(2, 2, 5)), ValueError, "C = 5 must divide out = 24"),
        (
            dict(gate=torch.zeros(2, 2, 6), backend="cpp"),
            mmkernels.BackendError,
            "blocks over out are 4 wide, it takes 8 or more",
        ),
        (dict(gate=torch.zeros(2, 2, 0)), ValueError, "C = 0 must divide out = 24"),
        (dict(gate=torch.zeros(3, 2, 3)), ValueError, "without gate_index G must be 1 or 2, the first size of x"),
        (dict(gate=torch.zeros(2, 2)), ValueError, r"gate has shape \(2, 2\); it must have 3 dimensions"),
        (dict(gate=torch.zeros(2, 2, 3).half()), TypeError, "gate has dtype torch.float16; it must be x's, torch.float32"),
        (dict(bias=torch.zeros(32)), ValueError, r"bias has shape \(32,\); it must be \(24,\)"),
        (dict(gate_index=torch.zeros(2)), TypeError, "gate_index has dtype torch.float32"),
        (dict(gate_index=torch.zeros(3, dtype=torch.int64)), ValueError, r"gate_index has shape \(3,\).*\(2,\) or \(2, 3\)"),
        (dict(gate_index=torch.tensor([0, 2])), IndexError, r"gate_index has numbers from 0 to 2; they must be in \[0, 2\)"),
        (dict(residual=1), TypeError, "residual is 1"),
        (dict(activation="silu"), ValueError, "activation is 'silu'; allowed are None, 'relu', 'gelu', 'gelu_tanh'"),
        (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0"),
        (dict(dropout_p=0.5, dropout_seed=torch.zeros(1)), ValueError, "dropout_seed has shape"),
        (dict(backend="magic"), ValueError, "backend is 'magic'"),
        (dict(backend="sdpa"), mmkernels.BackendError, "it is an attention"),
    ],
    ids=str,
)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        linear(**arguments(**changes))


@pytest.mark.parametrize(
    "row, column, message",
    [
        (torch.zeros(2, 3), torch.zeros(3, 4), r"column has shape \(3, 4\); with row \(2, 3\) G must be 2 or 1"),
        (torch.zeros(2), torch.zeros(2, 4), r"row has shape \(2,\)"),
        (torch.zeros(2, 0), torch.zeros(2, 4), "R must be 1 or more"),
        (torch.zeros(2, 3), torch.zeros(2, 0), "C must be 1 or more"),
    ],
    ids=str,
)
def test_errors_of_the_gate(row, column, message):
    with pytest.raises(ValueError, match=message):
        ops.hypergrid_gate(row, column)


def test_numbers_out_of_range_give_nan(on, generator):
    """Where the values cannot be looked at, on a GPU, a wrong number must be seen in the result and read no memory."""
    for name in ("triton", "cuda"):
        on(name)
        tensors = make(generator, (3, 9, 32), 24, (2, 2, 3))
        forward = forward_backward("hypergrid", name)[0]
        for rows_per_gate, count in ((9, 3), (1, 27)):
            index = torch.zeros(count, dtype=torch.int64)
            index[-1], index[0] = 2, -1
            x = tensors["x"].reshape(27, 32)
            out = forward(x, tensors["weight"], tensors["gate"], None, index, rows_per_gate, False, 0, 0.0, None)
            wrong = ((index < 0) | (index > 1)).repeat_interleave(rows_per_gate)
            assert torch.equal(out.isnan().all(1), wrong) and torch.equal(out.isnan().any(1), wrong)

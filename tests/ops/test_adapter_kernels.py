"""What only the GPU kernels of adapters have (tiles of rows by adapter, chunks of wide bottlenecks, parts of the rows that
sum for themselves) in Triton's interpreter and in the emulator."""

import pytest
import torch
from test_adapter import adapter, check, make, wanted_of

from mmkernels import BackendError, testing
from mmkernels.ops._shared.registration import forward_backward

EVERYTHING = dict(norms="in out", terms=("x", "extra"), scale="channels", gate="rows")


@pytest.fixture(params=["triton", "cuda"])
def backend(request, on):
    return on(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bottleneck", [80, 150])
def test_bottlenecks_of_several_chunks(backend, generator, bottleneck, dtype):
    tensors = make(generator, (2, 9, 70), bottleneck, dtype, **EVERYTHING)
    check(generator, tensors, backend, terms=EVERYTHING["terms"], activation="swish")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_of_any_size(backend, generator, dtype):
    """Several tiles of one adapter, few rows, none: rows without an adapter get their residuals alone, and what is in an
    adapter that nobody has does not matter."""
    tensors = make(generator, (3, 41, 24), 10, dtype, bank=5, index="rows", **EVERYTHING)
    index = tensors["index"]
    index[index == 3] = -1
    index[index == 2] = 0
    index[0, 7] = 2
    for name in ("w_down", "b_down", "w_up", "b_up", "scale"):
        tensors[name][3] = 0.0
    ours = check(generator, tensors, backend, terms=EVERYTHING["terms"], activation="gelu")
    assert all(not ours.gradients[n][3].any() for n in ("w_down", "b_down", "w_up", "b_up", "scale"))
    if dtype != torch.float32:
        return
    poisoned = dict(tensors)
    for name in ("w_down", "b_down", "w_up", "b_up", "scale"):
        poisoned[name] = tensors[name].clone()
        poisoned[name][3] = float("nan")
    cotangent = torch.randn(3, 41, 24, generator=generator)
    options = dict(backend=backend, terms=EVERYTHING["terms"], activation="gelu")
    first, second = (testing.run(adapter, t, wanted_of(t), cotangent, **options) for t in (tensors, poisoned))
    assert torch.equal(first.output, second.output)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name]), name


def test_long_examples_keep_their_order(backend, generator):
    made = dict(bank=3, norms="in", terms=("x", "input_residual"), scale="one", gate="examples")
    tensors = make(generator, (4, 64, 24), 9, **made)
    tensors["index"] = torch.tensor([2, -1, 0, 2])
    check(generator, tensors, backend, terms=made["terms"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_number_that_is_no_adapters(backend, generator, dtype):
    """NaN rows, and no part in the gradients of the weights."""
    tensors = make(generator, (2, 5, 24), 9, dtype, bank=3, index="rows")
    x, index = tensors["x"], tensors["index"]
    weights = tuple(tensors[n] for n in ("w_down", "b_down", "w_up", "b_up"))
    forward, backward = forward_backward("adapter", backend)
    options = (1, 1, 1e-5, 1e-5, 1.0, 0.0)
    results = {}
    for number in (-1, 7):
        index[1, 2] = number
        given = (x, None, None, *weights, None, None, None, None, None, None, index, None)
        out, statistics, _ = forward(*given, *options, False)
        results[number] = out, backward(torch.ones_like(x), *given, statistics, None, *options, 0b1111000)
    (none, of_none), (wrong, of_wrong) = results[-1], results[7]
    assert torch.equal(none[1, 2], x[1, 2]) and wrong[1, 2].isnan().all()
    wrong[1, 2] = none[1, 2]
    assert torch.equal(none, wrong)
    assert all(torch.equal(a, b) for a, b in zip(of_none, of_wrong, strict=True))


# Multiprocessors and shared memory decide on the rows of a tile and on whether they stay in shared memory.
@pytest.mark.parametrize(
    "processors, shared, copies", [(1, 232448, "early"), (1, 60000, "late"), (3, 232448, "random")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_every_size(on, generator, monkeypatch, processors, shared, copies, dtype):
    on("cuda")
    monkeypatch.setenv("MMKERNELS_EMULATOR_MULTIPROCESSORS", str(processors))
    monkeypatch.setenv("MMKERNELS_EMULATOR_SHARED", str(shared))
    monkeypatch.setenv("MMKERNELS_EMULATOR_COPIES", copies)
    monkeypatch.setenv("MMKERNELS_EMULATOR_SEED", str(processors))
    for made in (EVERYTHING, dict(terms=("x",))):
        tensors = make(generator, (1, 137, 72), 10, dtype, **made)
        check(generator, tensors, "cuda", terms=made["terms"], activation="leakyrelu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_widest_bottlenecks(on, generator, monkeypatch, dtype):
    on("cuda")
    monkeypatch.setenv("MMKERNELS_EMULATOR_SHARED", str(163 * 1024))  # of sm_80
    tensors = make(generator, (1, 5, 24), 1024, dtype, terms=("x",))
    check(generator, tensors, "cuda", terms=("x",))
    tensors = make(generator, (1, 1, 24), 1025, dtype)
    with pytest.raises(BackendError, match="the bottleneck has 1025 columns, it takes up to 1024"):
        adapter(**tensors, backend="cuda")


# What clusters serve: places of a norm before, behind, of two and of none; channels of one block of the cluster and of four
# that end anywhere; bottlenecks of one and of four sixteens; rows of one tile, of several a team, in parts.
CLUSTERS = {
    "alone": ((1, 150, 264), 48, dict(terms=("x",))),
    "many tiles": ((1, 300, 24), 5, dict(norms="out", terms=("x", "extra"))),
    "no residual": ((1, 9, 8), 3, {}),
    "a residual beside": ((2, 41, 72), 12, dict(norms="in out", terms=("x", "extra"))),
    "Houlsby": ((2, 41, 136), 40, dict(norms="out", terms=("x", "extra"))),
    "a residual instead": ((1, 33, 80), 8, dict(norms="out", terms=("extra",), biases=False)),
    "Pfeiffer": ((2, 41, 136), 20, dict(norms="in out", terms=("x", "input_residual"))),
    "a norm before": ((1, 70, 200), 64, dict(norms="in", terms=("x", "input_residual"), biases=False)),
    "wide rows": ((1, 33, 1024), 64, dict(norms="in out", terms=("x", "input_residual"))),
    "wide rows in many tiles": ((1, 190, 1000), 33, dict(norms="in out", terms=("x", "input_residual"))),
    "wide rows, a residual beside": ((1, 170, 1024), 48, dict(norms="out", terms=("x", "extra"))),
    "bank": ((3, 41, 72), 9, dict(norms="in out", terms=("x", "input_residual"), bank=3, index="rows")),
    "bank of many rows": ((3, 90, 24), 4, dict(norms="out", terms=("x", "extra"), bank=3, index="rows")),
    "bank by example": ((5, 41, 40), 9, dict(terms=("x",), bank=3)),
}


@pytest.mark.parametrize("shared, copies", [(232448, "late"), (120000, "random")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", CLUSTERS)
def test_clusters(on, generator, monkeypatch, problem, dtype, shared, copies):
    on("cuda")
    monkeypatch.setenv("MMKERNELS_EMULATOR_SHARED", str(shared))
    monkeypatch.setenv("MMKERNELS_EMULATOR_COPIES", copies)
    shape, bottleneck, made = CLUSTERS[problem]
    tensors = make(generator, shape, bottleneck, dtype, **made)
    if "index" in tensors:
        tensors["index"].view(-1)[::7] = -1
        tensors["index"][tensors["index"] == 1] = 2
    frozen = ("norm_weight", "norm_bias", "out_norm_weight", "out_norm_bias")
    wanted = tuple(n for n in wanted_of(tensors) if n not in frozen)
    check(generator, tensors, "cuda", wanted, terms=made.get("terms", ()), activation="gelu", scale=0.5)


def test_clusters_of_long_examples(on, generator, monkeypatch):
    """Whose parts are found by example, without an order of rows; rows between those of another tensor."""
    on("cuda")
    monkeypatch.setenv("MMKERNELS_EMULATOR_MULTIPROCESSORS", "8")
    tensors = make(generator, (2, 1030, 8), 4, torch.bfloat16, bank=3, norms="out", terms=("x",))
    tensors["index"] = torch.tensor([2, 0])
    tensors["x"] = torch.stack([tensors["x"], tensors["x"]], 1)[:, 0]
    check(generator, tensors, "cuda", wanted_of(tensors)[:5], terms=("x",))


def test_clusters_repeat_to_the_bit(on, generator, monkeypatch):
    """Whatever order warps and copies come in; compute capability 8 has the other kernels, which round elsewhere."""
    on("cuda")
    made = dict(norms="in out", terms=("x", "input_residual"), bank=2, index="rows")
    tensors = make(generator, (2, 75, 136), 20, torch.bfloat16, **made)
    cotangent = torch.randn(2, 75, 136, generator=generator).bfloat16()
    names = ("x", "input_residual", "w_down", "b_down", "w_up", "b_up")

    def results(**environment):
        with monkeypatch.context() as patched, testing.poisoned_memory():
            for name, value in environment.items():
                patched.setenv(f"MMKERNELS_EMULATOR_{name}", str(value))
            return testing.run(adapter, tensors, names, cotangent, backend="cuda", terms=made["terms"])

    first, second, other = results(), results(SEED=7, COPIES="random"), results(CAPABILITY=8)
    assert torch.equal(first.output, second.output) and not torch.equal(first.output, other.output)
    assert all(torch.equal(first.gradients[name], second.gradients[name]) for name in names)
    assert not all(torch.equal(first.gradients[name], other.gradients[name]) for name in names)

"""The benchmark suite: what it counts, how it checks, what a row says. Nothing here depends on wall time."""

import argparse
import json
import math
import os
import time

import pytest
import torch

from bench import (
    adapted,
    adapters,
    baselines,
    build,
    cli,
    conditional,
    decoding,
    fusion,
    launches,
    memory,
    perceiver,
    plots,
    products,
    registry,
    resampler,
    roofline,
    rows,
    run,
    text,
    tune,
    verify,
    visit,
)
from mmkernels import _tuning, ops

CPU = torch.device("cpu")
LATENT = registry.Problem("latent_attention", "test", 2, 5, 37, 2, 12, 12, 24, position=8, masked=True, chunk=16)
ATTENTION = registry.Problem("attention", "test", 2, 5, 37, 2, 12, 20, masked=True, bias=True)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    return parser.parse_args(["bench", *arguments])


# --- Registry -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", registry.PRESETS)
def test_ids_are_unique_and_passes_known(preset):
    cases = registry.PRESETS[preset]
    ids = [case.id for case in cases]
    assert len(set(ids)) == len(ids)
    assert {case.pass_ for case in cases} <= set(registry.PASSES)
    others = {"fusion_layer", "mbt", "hypergrid_t5", "conditional_attention", "ca_mtl_layer", "adapted_layer", "perceiver_io"}
    others |= {"resampler", "resampler_attention"}
    parts = {"latent_attention_stream", "latent_attention_sharded"}  # of an input; the first a candidate of latent_attention
    own = set(ops.EXPLAINERS) - parts
    assert {case.problem.op for case in cases} == own | (others if preset != "quick" else set())


def test_select_names_what_is_wrong():
    with pytest.raises(ValueError, match="preset is 'fast'; allowed are 'quick', 'paper', 'gpu'"):
        registry.select("fast")
    with pytest.raises(
        ValueError,
        match="op is 'norm'; preset 'quick' has cases of 'adapter', 'adapter_fusion', 'attention', 'bias_gelu', 'bottleneck",
    ):
        registry.select("quick", op="norm")
    with pytest.raises(ValueError, match="case is 'nothing'; it matches none of .* such as"):
        registry.select("quick", patterns=["nothing"])
    assert [c.id for c in registry.select("paper", patterns=["latent_attention/imagenet-fourier-b1-float32/forward"])]


# --- Candidates and their verification ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [LATENT, ATTENTION, ATTENTION._replace(value_dim=12, bias=False)], ids=lambda p: p.op)
@pytest.mark.parametrize("pass_", ["forward", "step", "step-dx"])
def test_every_candidate_computes_the_same(problem, pass_):
    inputs, names = registry.make_inputs(problem, CPU), registry.wanted(problem, pass_)
    exact = verify.exact(problem, inputs, names)
    plain = verify.run(baselines.Candidate("eager", "baseline", baselines.eager(problem.op)), inputs, names)
    checked = 0
    for candidate in baselines.candidates(problem, inputs, with_compile=False):
        if not candidate.reason:
            errors = verify.check(candidate, verify.run(candidate, inputs, names), exact, plain)
            assert set(errors) == {"output", *(f"gradient of {name}" for name in names)}
            checked += 1
    assert checked >= (3 if problem.op == "attention" else 6)


MODALITIES = fusion.SECONDS_4._replace(tokens=(20, 9), heads=2, head_dim=8)


@pytest.mark.parametrize(
    "problem",
    [
        MODALITIES,
        MODALITIES._replace(query_rows="cls"),
        MODALITIES._replace(op="fusion_layer"),
        fusion.MODEL._replace(tokens=(197, 9), heads=2, head_dim=8),
        decoding.FLOW._replace(queries=40, latents=7, channels=14, position=6, qk=24, v=24, out=5),
        decoding.MLM._replace(queries=9, latents=5, channels=12, qk=16, v=24, out=10),
        rows.NORM._replace(length=9, channels=24),
        rows.GELU._replace(length=9, channels=24),
        rows.TASKS._replace(batch=5, length=9, channels=24, tasks=3),
        conditional.BASE._replace(batch=5, length=24, heads=2, head_dim=12, block=9, tasks=3),
        conditional.LAYER._replace(batch=3, length=16, heads=2, head_dim=16, block=8, tasks=2),
        resampler.LARGE.small(),
        resampler.MODULES[0].small(),
        resampler.MODULES[3].small(),
    ],
    ids=lambda p: f"{p.op}-{p.name}-{getattr(p, 'query_rows', '')}",
)
@pytest.mark.parametrize("pass_", ["forward", "step"])
def test_every_candidate_of_several_outputs_computes_the_same(problem, pass_):
    inputs, names = registry.make_inputs(problem, CPU), registry.wanted(problem, pass_)
    exact = verify.exact(problem, inputs, names)
    listed = {c.name: c for c in baselines.candidates(problem, inputs, with_compile=False) if not c.reason}
    plain = verify.eager(problem, listed["eager"], inputs, names, exact)
    for candidate in listed.values():
        errors = verify.check(candidate, verify.run(candidate, inputs, names), exact, plain)
        assert {f"gradient of {name}" for name in names} < set(errors)
    assert len(listed) >= 2
    if names:  # a gradient that is zero everywhere would pass any check
        assert all(gradient.any() for gradient in exact.gradients.values())


@pytest.mark.parametrize("place", ["alone", "pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("pass_", ["forward", "step"])
def test_adapters_and_their_floors_are_verified(place, pass_, monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda *_: None)
    for problem in (adapters.PFEIFFER[0], adapters.MIXED[0]):
        case = registry.Case(problem.small()._replace(place=place), pass_)
        found = {r["candidate"]: r for r in run.run_problem([case], CPU, seconds=0.01, with_compile=False)}
        assert {r["status"] for r in found.values()} <= {"ok", "unsupported"}
        assert found["products alone"]["kind"] == "floor" and found["eager"]["speedup_over"]["products alone"] > 0
        assert ("one adapter" in found) == (problem.adapters > 0)
        errors = set(found["eager"]["errors"])
        assert ("gradient of stream" in errors) == (place != "alone" and pass_ == "step")


@pytest.mark.parametrize(
    "problem", [adapted.ONE[1], adapted.SPLIT[0], adapted.FUSE[0], adapted.LORA, adapted.LORA_8], ids=lambda p: p.name
)
@pytest.mark.parametrize("pass_", ["forward", "step"])
def test_models_with_adapters_are_verified_beside_their_libraries(problem, pass_, monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda *_: None)
    case = registry.Case(problem.small(), pass_)
    found = {r["candidate"]: r for r in run.run_problem([case], CPU, seconds=0.01, with_compile=False)}
    assert {r["status"] for r in found.values()} == {"ok"}, [r.get("reason") for r in found.values()]
    library = "peft" if problem.preset == "lora" else "adapters"
    assert {library, "mmkernels convert", "no adapters"} <= set(found)
    assert (len(found[library]["errors"]) > 1) == (pass_ == "step")


@pytest.mark.parametrize("problem", perceiver.MODELS, ids=lambda p: p.name)
def test_whole_perceivers_are_verified_beside_their_library(problem, monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda *_: None)
    case = registry.Case(problem.small(), "step")
    found = {r["candidate"]: r for r in run.run_problem([case], CPU, seconds=0.01, with_compile=False)}
    assert {r["status"] for r in found.values()} == {"ok"}, [r.get("reason") for r in found.values()]
    assert {"mmkernels", "eager", "mmkernels convert", "transformers"} == set(found)
    assert any(name.startswith("gradient of encoder") for name in found["transformers"]["errors"])
    operations, moved = problem.counts("forward")
    assert operations > 1e9 and moved > 4e6


@pytest.mark.parametrize("pass_", ["forward", "step"])
def test_the_fusion_of_adapters_is_verified(pass_, monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda *_: None)
    case = registry.Case(adapters.FUSED[0].small(), pass_)
    found = {r["candidate"]: r for r in run.run_problem([case], CPU, seconds=0.01, with_compile=False)}
    assert {r["status"] for r in found.values()} <= {"ok", "unsupported"} and found["eager"]["status"] == "ok"
    assert len(found["eager"]["errors"]) == (1 if pass_ == "forward" else 7)


@pytest.mark.parametrize("pass_", ["forward", "step"])
def test_a_floor_is_verified_as_the_problem_it_solves(pass_, monkeypatch):
    monkeypatch.setattr(memory, "peak", lambda *_: None)
    problem = products.DECODE._replace(batch=3, channels=32, outputs=48, grid=(2, 3))
    rows = {r["candidate"]: r for r in run.run_problem([registry.Case(problem, pass_)], CPU, seconds=0.01, with_compile=False)}
    floor = rows["linear, ungated"]
    assert (floor["kind"], floor["status"]) == ("floor", "ok")
    gradients = {f"gradient of {name}" for name in ("x", "weight")} if pass_ == "step" else set()
    assert set(floor["errors"]) == {"output", *gradients}
    assert rows["eager"]["speedup_over"]["linear, ungated"] > 0
    inputs = registry.make_inputs(problem, CPU)
    gated = baselines.Candidate("gated", "floor", lambda x, weight: 1.5 * x @ weight.T, without=("gate",))
    with pytest.raises(verify.WrongResult):
        gated = gated._replace(solves=problem._replace(op="linear", grid=()))
        given, names = gated.given(inputs, ())
        verify.errors(problem, gated, given, names, verify.run(gated, given, names), None, None)


T5 = text.SMALL._replace(batch=2, size="tiny", sources=7, targets=6, grid=(4, 2))


@pytest.mark.parametrize("problem", [T5, T5._replace(grid=())], ids=["grids", "plain"])
def test_a_step_of_t5_is_that_of_its_peers(problem):
    inputs, names = registry.make_inputs(problem, CPU), registry.wanted(problem, "step")
    exact = verify.exact(problem, inputs, names)
    listed = {c.name: c for c in baselines.candidates(problem, inputs, with_compile=False)}
    plain = verify.run(listed["eager"], inputs, names)
    for candidate in listed.values():
        given, own = candidate.given(inputs, names)
        found = verify.errors(problem, candidate, given, own, verify.run(candidate, given, own), exact, plain)
        grids = any(text.GRIDS in name for name in found)
        assert grids == (bool(problem.grid) and candidate.kind != "floor") and len(found) == 2 + len(own)
    assert len(listed) == (4 if problem.grid else 3)
    assert all(gradient.any() for gradient in exact.gradients.values())


@pytest.mark.parametrize("beams", [1, 4])
def test_generated_tokens_are_verified_by_what_they_lose(beams):
    problem = T5._replace(beams=beams)
    inputs = registry.make_inputs(problem, CPU)
    exact = verify.exact(problem, inputs, ())
    assert exact.output.shape == (2, 1 + problem.targets)  # nothing ends early
    for candidate in baselines.candidates(problem, inputs, with_compile=False):
        given, names = candidate.given(inputs, ())
        found = verify.errors(problem, candidate, given, names, verify.run(candidate, given, names), exact, None)
        assert found["tokens"] < 1e-6
    assert text.lost_by_tokens(problem, inputs, exact.output, exact.output) == 0
    other = exact.output.clone()
    other[1, 3] = (other[1, 3] + 1) % problem.config.vocab_size
    assert text.lost_by_tokens(problem, inputs, other, exact.output) > text.TIES
    assert text.lost_by_tokens(problem, inputs, other[:, :-1], exact.output) == float("inf")


def test_the_parts_of_one_sequence_do_not_see_each_other():
    problem = MODALITIES._replace(heads=1, head_dim=16)
    inputs = registry.make_inputs(problem, CPU)
    flex = next(c for c in baselines.candidates(problem, inputs) if c.name == "flex")
    with baselines.quiet():
        verify.check(flex, verify.run(flex, inputs, ()), verify.exact(problem, inputs, ()), None)


def test_flex_attention_computes_the_same_and_says_what_it_cannot():
    problem = ATTENTION._replace(head_dim=13)
    inputs = registry.make_inputs(problem, CPU)
    candidate = next(c for c in baselines.candidates(problem, inputs) if c.name == "flex")
    with baselines.quiet():
        verify.check(candidate, verify.run(candidate, inputs, ()), verify.exact(problem, inputs, ()), None)
    rows = run.run_problem([registry.Case(problem, "step")], CPU, seconds=0.01, memory_of="ours", only=["flex"])
    row = {row["candidate"]: row for row in rows}["flex"]
    assert row["status"] == "unsupported" and row["reason"] == "FlexAttention has no backward on a CPU"


def test_the_exact_result_does_not_depend_on_the_chunks(monkeypatch):
    inputs, names = registry.make_inputs(LATENT, CPU), registry.wanted(LATENT, "step-dx")
    whole = verify.exact(LATENT, inputs, names)
    monkeypatch.setattr(verify, "CHUNK_BYTES", 1)  # a query at a time
    parts = verify.exact(LATENT, inputs, names)
    assert verify.relative_error(parts.output, whole.output) < 1e-14
    for name in names:
        assert verify.relative_error(parts.gradients[name], whole.gradients[name]) < 1e-13


@pytest.mark.parametrize("kind", ["mmkernels", "baseline"])
@pytest.mark.parametrize("broken", ["output", "gradient", "nan"])
def test_a_wrong_candidate_gets_no_number(kind, broken):
    inputs, names = registry.make_inputs(ATTENTION, CPU), registry.wanted(ATTENTION, "step")
    exact = verify.exact(ATTENTION, inputs, names)
    plain = verify.run(baselines.Candidate("eager", "baseline", baselines.eager("attention")), inputs, names)
    actual = verify.run(baselines.Candidate("same", kind, baselines.eager("attention")), inputs, names)
    if broken == "gradient":
        actual.gradients["k"][1, 1, 36, 0] += 0.1 * actual.gradients["k"].abs().max()
    else:
        actual.output[1, 1, 4, 19] = actual.output.abs().max() * 1.1 if broken == "output" else float("nan")
    with pytest.raises(verify.WrongResult, match="gradient of k" if broken == "gradient" else "output"):
        verify.check(baselines.Candidate("wrong", kind, None), actual, exact, plain)


# --- Counting ----------------------------------------------------------------------------------------------------------------


def test_counts_of_the_published_shape():
    """kernels.md's own numbers: 4 N M C forward, 6 backward without and 10 with a gradient of the input."""
    product = 512 * 50176 * 261
    for pass_, factor in (("forward", 4), ("backward", 6), ("backward-dx", 10), ("step", 10), ("step-dx", 14)):
        operations, n_sized = roofline.counts(registry.IMAGENET, pass_).operations, 12 * 512 * 261 * 261
        assert 0 <= operations - factor * product <= n_sized, pass_
    moved = roofline.counts(registry.IMAGENET, "forward").bytes
    assert moved == 4 * (2 * 512 * 261 + 50176 * 261 + 2 * 261 * 261 + 3 * 261)
    split = roofline.counts(registry.IMAGENET_SPLIT._replace(batch=8), "forward").bytes
    assert split < roofline.counts(registry.IMAGENET._replace(batch=8), "forward").bytes / 6  # positions are read once


def test_launches_of_known_functions():
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 8), (5, 8), (5,)))
    q = torch.randn(1, 2, 3, 8)

    def layer():
        return torch.nn.functional.linear(x, weight, bias).relu()

    def step():
        torch.autograd.grad(layer(), [x, weight, bias], torch.ones(3, 5))

    for call, expected in (
        (lambda: x.t().unflatten(0, (2, 4)).flatten()[:3].detach(), 1),  # flatten has to copy; the rest are views
        (lambda: (torch.empty(3), x.reshape(4, 6)), 0),
        (layer, 2),  # addmm, relu
        (step, 2 + 5),  # ones, relu's mask, two products, the sum for the bias
        (lambda: q.softmax(-1).max(-1).values.add_(1), 3),
        (lambda: torch.nn.functional.layer_norm(x, (8,)), 1),
        (lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), 1),
        (lambda: [torch.add(q, i) for i in range(10)], 10),
    ):
        assert launches.count(call, CPU) == expected
    if ops.explain("attention", q, q, q).backend == "cpp":
        assert launches.count(lambda: ops.attention(q, q, q), CPU) == 1


def test_launches_of_a_compiled_function():
    """A matrix product and one loop for all that follows it."""
    x, weight = torch.randn(3, 8), torch.randn(8, 5)
    launches.name_fused_loops()
    torch._dynamo.reset()
    function = torch.compile(lambda x, weight: (torch.mm(x, weight).relu() * 2).add(1).tanh())
    function(x, weight)
    assert launches.count(lambda: function(x, weight), CPU) == 2


@pytest.mark.gpu
def test_launches_on_a_gpu():
    x = torch.randn(64, 64, device="cuda")
    torch.add(x, 1).relu()
    assert launches.count(lambda: torch.add(x, 1).relu().clone(), x.device) == 3


# --- Rounds ----------------------------------------------------------------------------------------------------------------


class Clock(run.Timer):
    """Takes times from a list, and notes whose turn it was."""

    def __init__(self, name, times, turns):
        self.name, self.times, self.turns = name, iter(times), turns
        self.inner, self.seconds, self.cpu_seconds = 1, [], []

    def settle(self):
        pass

    def measure(self):
        self.turns.append(self.name)
        self.seconds.append(next(self.times))


def test_rounds_take_turns_and_ratios_are_within_a_round():
    """A machine that is ten times slower in half of the rounds changes no ratio; medians would compare different rounds."""
    busy = [1.0, 10.0] * run.MAX_ROUNDS
    turns = []
    timers = {n: Clock(n, [factor * b for b in busy], turns) for n, factor in (("a", 0.001), ("b", 0.003), ("c", 0.002))}
    run.time_in_turns(timers, 1e9, seed=3)
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert len(rounds) == run.MAX_ROUNDS and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) == 6, "every order comes up"
    assert run.paired(timers["a"], timers["b"]) == pytest.approx((3, 3, 3))
    again = []
    run.time_in_turns({n: Clock(n, busy, again) for n in "abc"}, 1e9, seed=3)
    assert again == turns, "the seed gives the order"


def test_a_candidate_out_of_time_is_compared_over_its_rounds():
    turns = []
    timers = {"fast": Clock("fast", [1.0, 2.0] * 50, turns), "slow": Clock("slow", [30.0, 80.0], turns)}
    run.time_in_turns(timers, 100.0)
    assert len(timers["slow"].seconds) == 2 and len(timers["fast"].seconds) > 2
    assert run.paired(timers["fast"], timers["slow"]) == (35.0, 30.0, 40.0)


def test_the_interval_holds_the_median_with_95_percent():
    """The tables of the sign test, and the promise itself over random samples."""
    assert [run.interval(n) for n in (1, 5, 6, 9, 12, 15, 50)] == [
        (0, 0), (0, 4), (0, 5), (1, 7), (2, 9), (3, 11), (17, 32)
    ]  # fmt: skip
    samples = torch.empty(4000, 15).exponential_(generator=torch.Generator().manual_seed(0)).sort(1).values
    low, high = run.interval(15)
    median = math.log(2)
    held = ((samples[:, low] <= median) & (median <= samples[:, high])).double().mean()
    assert 0.95 < held < 0.98


def test_counts_of_attention():
    operations, moved = roofline.counts(registry.TOKENS, "forward")
    assert operations == 4 * 2 * 12 * 1568 * 1568 * 64
    assert moved == 4 * 4 * 2 * 12 * 1568 * 64
    assert roofline.counts(registry.TOKENS, "backward").operations == operations * 5 // 2


def test_counts_of_mbt():
    """The published sizes of MBT-B with clips of 4 s, 192.4 GFLOP an example without the tokenisers."""
    model = fusion.MODEL
    assert abs(roofline.counts(model, "forward").operations / 192.4e9 - 1) < 0.01
    layer = roofline.counts(fusion.LAYER, "forward").operations
    op = roofline.counts(fusion.SECONDS_4, "forward").operations
    assert op == 4 * 2 * 768 * (790**2 + 206**2) and layer == op + 2 * 24 * 996 * 768**2


def test_prediction_follows_the_problem():
    case = registry.IMAGENET._replace(dtype="bfloat16", batch=8)
    forward, step = roofline.predict(case, "forward"), roofline.predict(case, "step")
    assert forward.floor < forward.seconds < step.seconds
    assert forward.bound == "compute" and forward.filled > 0.9
    alone = roofline.predict(case._replace(batch=1), "forward")
    assert alone.splits > forward.splits and forward.seconds / 8 < alone.seconds < forward.seconds / 3
    few = registry.FEW_KEYS._replace(dtype="bfloat16", batch=64)
    assert roofline.predict(few, "forward").bound == "memory"
    assert roofline.predict(few, "forward", roofline.H100).seconds > 1.3 * roofline.predict(few, "forward").seconds
    assert roofline.predict(case, "forward", instruction="mma.sync").seconds > 1.5 * forward.seconds


def test_prediction_of_the_fusion_of_adapters():
    """The products grow with the tokens alone, what the kernel moves with the adapters."""
    one, many = (adapters.FUSED[3]._replace(dtype="bfloat16", adapters=a) for a in (1, 33))
    for pass_, extra in (("forward", 32), ("backward", 64)):
        first, second = roofline.predict(one, pass_), roofline.predict(many, pass_)
        assert first.bound == "compute" and second.bound == "memory" and second.floor < second.seconds
        moved = 32 * 128 * (768 * 2 * extra + 32 * 4)
        assert second.seconds - first.seconds == pytest.approx(moved / (0.9 * 4.8e12))


def test_prediction_of_adapters():
    case = adapters.Adapters("adapter", "", 128, 512, 768, 48, "alone", dtype="bfloat16")
    forward, backward, step = (roofline.predict(case, pass_) for pass_ in ("forward", "backward", "step"))
    assert forward.floor < forward.seconds < backward.seconds < step.seconds
    array = 2 * 128 * 512 * 768
    (work,) = roofline.adapter_launches(case, "forward")
    assert work.memory == 2 * array + 4 * 768 * 48 and work.l2 == array + 32 * 4 * 768 * 48 and forward.bound == "memory"
    passes = roofline.adapter_launches(case, "backward")
    assert [w.name for w in passes] == ["one pass", "sums of parts"]
    assert passes[0].memory == 3 * array + 32 * 8 * 768 * 48  # x, dout, dx and the parts of both weights
    moved = [roofline.adapter_launches(case._replace(place=place), "backward")[0].memory for place in ("houlsby", "pfeiffer")]
    assert moved[0] - moved[1] == array  # whose gradients of the inputs are one array
    with pytest.raises(ValueError, match="1032 channels"):
        roofline.adapter_launches(case._replace(channels=1032), "forward")
    for place, most in (("alone", 1.15), ("houlsby", 1.1), ("pfeiffer", 1.1)):
        one, mixed = (roofline.predict(case._replace(place=place, adapters=a), "forward") for a in (0, 64))
        assert one.seconds < mixed.seconds < most * one.seconds
    double = roofline.predict(case._replace(batch=256), "forward")
    assert 1.8 < double.seconds / forward.seconds < 2.0 and double.bound == "memory"
    assert any("pfeiffer, 1024, 64" in line for line in roofline.adapter_report())


# --- Rows ------------------------------------------------------------------------------------------------------------------


def test_rows_say_it_all(tmp_path, capsys):
    cases = [registry.Case(LATENT, pass_) for pass_ in ("forward", "step", "backward")]
    output = tmp_path / "rows.jsonl"
    rows = cli.run_cases(cases, CPU, output, preset="quick", seconds=0.01, with_compile=False)
    assert [json.loads(text) for text in output.read_text().splitlines()] == json.loads(json.dumps(rows))
    assert not list(tmp_path.glob("*.partial"))
    assert {row["case"] for row in rows} == {case.id for case in cases}
    for row in rows:
        assert {"device", "torch", "commit", "operations", "bytes", "sizes", "candidate", "status"} <= set(row)
        if row["status"] == "ok":
            assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["rounds"] >= 1
            assert row["launches"] >= 1
            assert row["candidate"] == "eager" or row["speedup_over"]["eager"] > 0
            for name, ratio in row["speedup_over"].items():
                low, high = row["speedup_interval"][name]
                assert low <= ratio <= high
        else:
            assert row["reason"] and "ms" not in row
    eager = [row for row in rows if row["candidate"] == "eager" and row["pass"] != "backward"]
    assert all(row["peak_bytes"] is not None for row in eager)
    assert "median ms" in capsys.readouterr().out
    assert cli.failed(rows) == 0
    assert {path.name for path in plots.draw(rows, tmp_path)} == {"ratios.png", "roofline.png"}
    cli.run_cases(cases[:1], CPU, output, preset="quick", seconds=0.01, only=["auto"], with_compile=False)
    merged = [json.loads(text) for text in output.read_text().splitlines()]
    assert merged[: -len([r for r in merged if r["case"] == cases[0].id])] == [
        row for row in json.loads(json.dumps(rows)) if row["case"] != cases[0].id
    ], "measuring one case again touched the rows of others"


def test_a_failing_candidate_is_a_row(monkeypatch):
    def listed(problem, inputs, with_compile=True):
        def explode(**_):
            raise MemoryError("no room\nat all")

        def wrong(**arguments):
            return baselines.eager("attention")(**arguments) * 1.01

        yield baselines.Candidate("eager", "baseline", baselines.eager("attention"))
        yield baselines.Candidate("explodes", "baseline", explode)
        yield baselines.Candidate("mmkernels wrong", "mmkernels", wrong)
        yield baselines.Candidate("absent", "baseline", None, "it is not installed")

    monkeypatch.setattr(baselines, "candidates", lambda *args, **options: list(listed(*args, **options)))
    case = registry.Case(ATTENTION, "forward")
    rows = {r["candidate"]: r for r in run.run_problem([case], CPU, seconds=0.01, memory_of="ours", seed=1)}
    assert (rows["explodes"]["status"], rows["explodes"]["reason"]) == ("error", "MemoryError: no room")
    assert rows["mmkernels wrong"]["status"] == "wrong" and "over the budget" in rows["mmkernels wrong"]["reason"]
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("unsupported", "it is not installed")
    assert rows["eager"]["status"] == "ok"
    assert cli.failed(list(rows.values())) == 1


def test_peak_memory_sees_the_score_matrix():
    """Plain attention keeps its scores (64 MB here) and their softmax; nothing else in the call is of that size."""
    problem = registry.Problem("attention", "memory", 1, 2048, 8192, 1, 16, 16)
    case, scores = registry.Case(problem, "forward"), 4 * 2048 * 8192
    peak = memory.peak(case, "eager", CPU, None)
    assert peak is None or 1.9 * scores < peak < 3.3 * scores


def test_plots_against_the_number_of_inputs(tmp_path):
    rows = []
    for keys in (64, 128, 256):
        case = registry.Case(LATENT._replace(name=f"keys-{keys}", keys=keys), "forward")
        rows += run.run_problem([case], CPU, seconds=0.01, with_compile=False, memory_of="ours", only=["none"])
    assert {path.name for path in plots.draw(rows, tmp_path)} == {"time.png", "memory.png", "roofline.png"}


# --- The command line -----------------------------------------------------------------------------------------------------


def test_bad_arguments_are_one_line(capsys):
    for arguments, told in (
        (["--op", "norm"], "op is 'norm'"),
        (["--device", "tpu"], "--device is 'tpu'; allowed are 'cpu', 'cuda'"),
        (["--threads", "0"], "--threads is 0; it must be 1 or more"),
    ):
        parsed = parse(*arguments)
        assert parsed.run(parsed) == 2
        assert told in capsys.readouterr().err
    if not torch.cuda.is_available():
        parsed = parse("--preset", "gpu")
        assert parsed.run(parsed) == 2
        assert "--preset gpu needs a CUDA device" in capsys.readouterr().err


def test_list_prints_ids(capsys):
    parsed = parse("--list", "--preset", "gpu")
    assert parsed.run(parsed) == 0
    assert capsys.readouterr().out.splitlines() == [case.id for case in registry.PRESETS["gpu"]]


# --- Tuning -----------------------------------------------------------------------------------------------------------------


def test_every_tuned_kernel_has_a_pass():
    pytest.importorskip("triton")
    import mmkernels.ops.attention.kernels
    import mmkernels.ops.latent.kernels  # noqa: F401

    assert {name for kernels in tune.KERNELS.values() for name in kernels} == set(_tuning._DEFAULTS)
    for task in tune.tasks(registry.PRESETS["gpu"]):
        default = _tuning.tiles(task.kernel, task.dims, task.problem.dtype, 90)
        tried = tune.candidates(default)
        assert default not in tried and 1 <= len(tried) <= tune.TRIES
        with tune.forced(task.kernel, tried[0]):
            assert _tuning.tiles(task.kernel, task.dims, task.problem.dtype, 90) == tried[0]
        assert _tuning.tiles(task.kernel, task.dims, task.problem.dtype, 90) == default


def test_tables_are_replaced_entry_by_entry(tmp_path):
    path, tiles = tmp_path / "gpu" / "latent_fwd.json", _tuning.Tiles(64, 32, 0, 0, 8, 2)
    task = tune.Task("latent_fwd", registry.IMAGENET, "forward")
    other = task._replace(problem=registry.KINETICS)
    tune.store(path, task, tiles)
    tune.store(path, other, tiles)
    tune.store(path, task, tiles._replace(keys=128))
    rows = {tuple(row["dims"]): row["tiles"]["keys"] for row in json.loads(path.read_text())}
    assert rows == {(261, 261): 128, (704, 704): 32}
    tune.store(path, other, None)
    assert [row["dims"] for row in json.loads(path.read_text())] == [[261, 261]]


# --- A visit to a GPU --------------------------------------------------------------------------------------------------------


def test_a_visit_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    done, interrupted = [], [True]

    def rows_of(group, device, only=None, **_):
        for case in group:
            done.append(case.id if only is None else f"{case.id} again")
            facts = {"candidate": "mmkernels cuda", "kind": "mmkernels", "status": "unsupported", "reason": "no GPU"}
            yield {"case": case.id, "commit": run.commit(), "operations": 1, "bytes": 1, **facts}

    def gpu_tests(output, seconds):
        if interrupted.pop() if interrupted else False:
            raise InterruptedError
        return "3 passed"

    monkeypatch.setattr(run, "run_problem", rows_of)
    monkeypatch.setattr(visit, "sweep", lambda device, output, seconds: done.append("sweep") or "all right")
    monkeypatch.setattr(visit, "gpu_tests", gpu_tests)
    monkeypatch.setattr(tune, "tune", lambda *args, **options: done.append("tune"))
    monkeypatch.setattr(tune, "tasks", lambda cases: [])
    monkeypatch.setattr(visit, "FIRST", 1)
    cases = [registry.Case(problem, "forward") for problem in (LATENT, ATTENTION)]
    arguments = parse("--preset", "gpu", "--output", str(tmp_path))

    def go(start=None):
        done.clear()
        return visit.main(arguments, cases, CPU, time.monotonic() if start is None else start, "the CUDA library was there")

    with pytest.raises(InterruptedError):
        go()
    assert done == ["sweep"]
    assert go() == 0
    assert done == [cases[0].id, "tune", f"{cases[0].id} again", cases[1].id]  # the rest, once
    assert capsys.readouterr().out.rstrip().endswith("all done")
    assert go() == 0 and done == []
    arguments.fresh = True
    assert go(start=time.monotonic() - visit.BUDGET) == 0 and done == []
    assert "left: correctness, gpu tests, first cases, tuning" in capsys.readouterr().out


def test_the_sweep_writes_a_row_a_problem(tmp_path, monkeypatch):
    problems = [LATENT, ATTENTION._replace(dtype="bfloat16")]
    monkeypatch.setattr(visit, "sweep_problems", lambda: problems)
    monkeypatch.setattr(tune, "workers", lambda: 2)
    output = tmp_path / "correctness.jsonl"
    assert visit.sweep(CPU, output, 120) == "{'mmkernels cpp': {'ok': 2}, 'mmkernels stream': {'ok': 1}}"
    rows = [json.loads(text) for text in output.read_text().splitlines()]
    assert {row["sizes"]["op"] for row in rows} == {problem.op for problem in problems}
    assert all(row["errors"]["gradient of q"] < 0.1 and row["commit"] == run.commit() for row in rows)


def broken_worker(sender, problems, device):
    """Stands for a kernel that is wrong, one that takes its process with it, and one that never ends."""
    if problems[0].op == "attention":
        sender.send({"sizes": problems[0]._asdict(), "candidate": "mmkernels cuda", "status": "wrong", "reason": "far off"})
        os._exit(3)
    time.sleep(600)


def test_the_sweep_survives_kernels_that_kill_or_hang(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visit, "sweep_problems", lambda: [ATTENTION, LATENT])
    monkeypatch.setattr(tune, "workers", lambda: 2)
    monkeypatch.setattr(visit, "_worker", broken_worker)
    told = visit.sweep(CPU, tmp_path / "rows", 20)
    assert told.startswith(
        "FAILED {'mmkernels cuda': {'wrong': 1}}; its process ended with status 3, at or after ('attention'"
    )
    assert "no answer after 20 s, at or after ('latent_attention'" in told
    assert "far off" in capsys.readouterr().out


def test_a_visit_that_ran_no_gpu_test_has_not_passed_them(tmp_path, monkeypatch):
    (tmp_path / "tests/ops").mkdir(parents=True)
    monkeypatch.setattr(visit, "ROOT", tmp_path)
    assert visit.gpu_tests(tmp_path / "tests.txt", 60).startswith("FAILED")


def test_a_build_for_a_visit(tmp_path, monkeypatch):
    """Built where the kernels do not run or were built from other sources, for this GPU; what was done is told."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "build/native").mkdir(parents=True)
    (tmp_path / "csrc/kernel.cu").write_text("1")
    # Stands for the real one: notes what it is asked for, and makes the kernels run.
    (tmp_path / "setup.py").write_text(
        "import os; open('asked', 'a').write(os.environ['MMKERNELS_CUDA_ARCHS'] + ' '); open('library', 'w').close()"
    )
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "STAMP", tmp_path / "build/native/visit.sha256")
    monkeypatch.setattr(build, "WORKS", "import os, sys; os.path.exists('library') or sys.exit('no kernel image')")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv("MMKERNELS_CUDA_ARCHS", raising=False)
    assert build.ensure(CPU) == "built for sm_90a; before: no kernel image"
    assert build.ensure(CPU) == "the CUDA library was there"
    (tmp_path / "csrc/kernel.cu").write_text("2")
    assert build.ensure(CPU) == "built for sm_90a; before: its sources have changed"
    assert (tmp_path / "asked").read_text() == "90a 90a "
    (tmp_path / "library").unlink()
    (tmp_path / "setup.py").write_text("print('nvcc: error')")
    assert build.ensure(CPU) == "FAILED: no kernel image"

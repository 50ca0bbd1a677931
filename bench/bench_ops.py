"""The registry under pytest-benchmark: `pytest bench/`, `pytest bench/ --preset paper --bench-case '*imagenet*'`.

Each entry checks its candidate against float64 first; a candidate that cannot run here is skipped with the reason.
"""

import pytest
import torch

from bench import baselines, registry, roofline, run, verify


def pytest_generate_tests(metafunc):
    option = metafunc.config.getoption
    cases = registry.select(option("--preset"), option("--bench-op"), option("--bench-case"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries = []
    for case in cases:
        # The list of candidates depends on the problem's sizes and the device, not on the values: meta tensors would not
        # say which backend can run, so tiny problems stand in for the names only.
        for name in candidate_names(case.problem, device):
            entries.append(pytest.param(case, name, id=f"{case.id}/{name}".replace(" ", "-")))
    metafunc.parametrize(("case", "name"), entries)


def candidate_names(problem, device):
    small = problem.small()
    inputs = registry.make_inputs(small, device)
    return [c.name for c in baselines.candidates(small, inputs, with_compile=False)]


@pytest.fixture(scope="module")
def prepared():
    """Inputs, exact result and eager's result of the last case: entries of one case follow each other."""
    return {}


def prepare(case, device, cache):
    if case not in cache:
        cache.clear()
        inputs = registry.make_inputs(case.problem, device)
        names = registry.wanted(case.problem, case.pass_)
        listed = {c.name: c for c in baselines.candidates(case.problem, inputs, with_compile=False)}
        exact = verify.exact(case.problem, inputs, names)
        cache[case] = inputs, names, listed, exact, verify.eager(case.problem, listed["eager"], inputs, names, exact)
    return cache[case]


def test_op(case, name, benchmark, prepared):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs, names, listed, exact, plain = prepare(case, device, prepared)
    candidate = listed.get(name)
    if candidate is None or candidate.reason:
        pytest.skip(candidate.reason if candidate else f"{name} is no candidate at this size")
    inputs, names = candidate.given(inputs, names)
    with baselines.quiet():
        errors = verify.errors(case.problem, candidate, inputs, names, verify.run(candidate, inputs, names), exact, plain)
        timer = run.Timer(candidate.function, inputs, case.pass_, names, lambda: None)
        benchmark.group = case.id
        benchmark.pedantic(timer.measure, rounds=5, warmup_rounds=1)
    counted, median = roofline.counts(case.problem, case.pass_), timer.quantile(0.5)
    benchmark.extra_info.update(
        operations=counted.operations,
        bytes=counted.bytes,
        tflops=counted.operations / median * 1e-12,
        roofline_share=roofline.measured(device, case.problem.torch_dtype).floor(counted) / median,
        errors=errors,
    )

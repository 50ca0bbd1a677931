"""`python -m mmkernels bench --preset gpu`: all that a short visit to a GPU has to bring back, in one command.

The CUDA library is built where it is missing (`build.py`). Then, the most valuable first: check both kernel backends against
float64, time the first cases against every peer, tune the tiles and time ours again, run the tests marked `gpu`, time the
rest. A state file records what is finished, so the same command goes on after an interruption; rows are appended as they
are measured.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from mmkernels import _tuning

from . import baselines, cli, registry, run, tune, verify

ROOT = run.ROOT
BUDGET = 560  # seconds in all; a part begins only before its share of it is over
FIRST = 12  # cases timed before tuning
PARTS = ("correctness", "first cases", "tuning", "first cases again", "gpu tests", "all cases")


class State:
    """What is finished, kept in a file that is replaced whole."""

    def __init__(self, path: Path, fresh: bool):
        self.path = path
        self.facts = {"commit": run.commit(), "parts": {}, "tuned": []}
        if path.is_file() and not fresh:
            earlier = json.loads(path.read_text())
            if earlier["commit"] == self.facts["commit"]:
                self.facts = earlier

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".partial")
        temporary.write_text(json.dumps(self.facts, indent=1))
        os.replace(temporary, self.path)

    def finish(self, part: str, outcome):
        self.facts["parts"][part] = outcome
        self.save()


def main(arguments, cases: list, device: torch.device, start: float, built: str) -> int:
    """Runs the parts that are not finished; `start` is when the visit began, by `time.monotonic`, and `built` what
    `build.ensure` said. `--output` names the folder of state, rows and tables. Returns 1 when a kernel gave a wrong result
    or a GPU test failed."""
    folder = arguments.output or cli.RESULTS / run.device_folder(device)
    state = State(folder / "visit.json", arguments.fresh)
    rows_file = folder / "gpu.jsonl"
    if arguments.fresh:
        rows_file.unlink(missing_ok=True)

    def within(share):
        return time.monotonic() - start < BUDGET * share

    def part(name, function, share=1.0):
        """Runs a part once; it returns what the state remembers, or None when it is not finished."""
        if name in state.facts["parts"]:
            print(f"== {name}: done before", flush=True)
        elif not within(share):
            print(f"== {name}: no time left", flush=True)
        else:
            print(f"== {name} ({time.monotonic() - start:.0f} s)", flush=True)
            outcome = function()
            if outcome is not None:
                state.finish(name, outcome)
            print(f"   {outcome}", flush=True)

    def bench(some, share, with_compile):
        """Times the cases that have no rows of this commit yet; None when some are left."""
        have = _measured(rows_file, state.facts["commit"])
        todo = [case for case in some if case.id not in have]
        cli.run_cases(
            todo, device, rows_file, preset="gpu", seconds=arguments.seconds, only=arguments.candidate, seed=arguments.seed,
            with_compile=with_compile, append=True, stop_at=start + BUDGET * share,
        )  # fmt: skip
        return None if set(c.id for c in some) - _measured(rows_file, state.facts["commit"]) else f"{len(some)} cases"

    def again():
        cli.run_cases(
            cases[:FIRST], device, rows_file, preset="gpu", seconds=arguments.seconds, only="mmkernels", seed=arguments.seed,
            with_compile=False, append=True, stop_at=start + BUDGET * 0.85,
        )  # fmt: skip
        return "with tuned tiles"

    def tuned():
        _restore_tables(folder / "configs")
        done = state.facts["tuned"]
        tune.tune(
            cases,
            device,
            [_tuning.CONFIGS, folder / "configs"],
            lambda: within(0.8),
            done,
            lambda key: (done.append(key), state.save()),
        )
        return f"{len(done)} kernels and shapes" if len(done) >= len(tune.tasks(cases)) else None

    print(f"== build: {built}", flush=True)
    part("correctness", lambda: sweep(device, folder / "correctness.jsonl"), 0.3)
    part("first cases", lambda: bench(cases[:FIRST], 0.5, True), 0.45)
    part("tuning", tuned, 0.75)
    part("first cases again", again, 0.8)
    part("gpu tests", lambda: gpu_tests(folder / "gpu-tests.txt", max(30.0, BUDGET * 0.9 - (time.monotonic() - start))), 0.8)
    part("all cases", lambda: bench(cases, 1.0, False), 0.95)
    rows = [json.loads(text) for text in rows_file.read_text().splitlines()] if rows_file.is_file() else []
    from . import plots

    print("plots: " + ", ".join(map(str, plots.draw(rows, folder))))
    left = [name for name in PARTS if name not in state.facts["parts"]]
    print(
        f"{time.monotonic() - start:.0f} s; " + (f"left: {', '.join(left)}; the same command goes on" if left else "all done")
    )
    bad = any("FAILED" in str(outcome) for outcome in (built, *state.facts["parts"].values()))
    return int(bad) or cli.failed(rows)


def _measured(rows_file: Path, commit: str) -> set:
    if not rows_file.is_file():
        return set()
    rows = map(json.loads, rows_file.read_text().splitlines())
    return {row["case"] for row in rows if row["commit"] == commit}


def _restore_tables(folder: Path) -> None:
    """Tables that an earlier visit brought back, for kernels that have none here."""
    for path in folder.glob("*/*.json"):
        target = _tuning.CONFIGS / path.parent.name / path.name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


# (queries, keys, heads, D, E) and (queries, keys, heads, channels, position): sizes that no tile divides.
ATTENTION_SIZES = (
    (1, 1, 1, 1, 1), (63, 97, 2, 64, 64), (97, 111, 1, 261, 261), (128, 300, 4, 32, 160), (17, 513, 1, 512, 512),
    (4, 1568, 12, 64, 64), (1568, 4, 12, 64, 64), (33, 4097, 1, 128, 128), (5, 70, 1, 1000, 700),
)  # fmt: skip
LATENT_SIZES = (
    (8, 32, 1, 16, 0), (63, 97, 1, 64, 0), (97, 1111, 1, 261, 258), (33, 5003, 1, 322, 64), (17, 513, 1, 704, 0),
    (31, 300, 8, 768, 0), (1, 512, 1, 1024, 0),
)  # fmt: skip


def sweep_problems() -> list:
    problems = []
    for dtype in ("bfloat16", "float16", "float32"):
        for n, m, h, d, e in ATTENTION_SIZES:
            for extra in ({}, {"masked": True, "bias": True}):
                problems.append(registry.Problem("attention", "sweep", 2, n, m, h, d, e, dtype=dtype, **extra))
        for n, m, h, c, p in LATENT_SIZES:
            for extra in ({"shared_queries": True}, {"masked": True}):
                d = c // h
                problems.append(registry.Problem("latent_attention", "sweep", 2, n, m, h, d, d, c, p, dtype=dtype, **extra))
    return problems


def sweep(device: torch.device, output: Path) -> str:
    """Output and every gradient of both kernel backends against float64; one row a problem and backend."""
    counts, output_rows = {}, []
    for problem in sweep_problems():
        inputs, names = registry.make_inputs(problem, device), registry.wanted(problem, "step-dx")
        exact = verify.exact(problem, inputs, names)
        plain = verify.run(baselines.Candidate("eager", "baseline", baselines.eager(problem.op)), inputs, names)
        for candidate in baselines.candidates(problem, inputs, with_compile=False):
            if candidate.kind != "mmkernels":
                continue
            row = {"sizes": problem._asdict(), "candidate": candidate.name, "status": "ok"}
            if candidate.reason:
                row |= {"status": "unsupported", "reason": candidate.reason}
            else:
                try:
                    row["errors"] = verify.check(candidate, run._run_once(candidate, inputs, names), exact, plain)
                except Exception as error:  # wrong, out of memory, a launch that fails: all of it belongs in the table
                    row |= {"status": "wrong", "reason": f"{type(error).__name__}: {error}"[:400]}
                    print(f"   {candidate.name} {tuple(problem)}: {row['reason']}", flush=True)
            counts.setdefault(candidate.name, {}).setdefault(row["status"], 0)
            counts[candidate.name][row["status"]] += 1
            output_rows.append(json.dumps(row))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(output_rows) + "\n")
    bad = any("wrong" in statuses for statuses in counts.values())
    return ("FAILED " if bad else "") + f"{counts}"


def gpu_tests(output: Path, seconds: float) -> str:
    """The tests marked `gpu`."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "--maxfail=20"]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment)
        text, failed = process.stdout + process.stderr, process.returncode not in (0, 5)  # 5: no such tests
    except subprocess.TimeoutExpired as error:
        text, failed = (error.stdout or b"").decode() + f"\nstopped after {seconds:.0f} s", True
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    return ("FAILED " if failed else "") + text.strip().splitlines()[-1]

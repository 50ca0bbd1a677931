"""`python -m mmkernels bench --preset gpu`: all that a short visit to a GPU has to bring back, in one command.

The CUDA library is built where it is missing or stale (`build.py`). Then, the most valuable first: check both kernel backends
against float64, run the tests marked `gpu`, time the first cases against every peer, tune the tiles and time ours again, time
the rest. A state file records what is finished, so the same command goes on after an interruption; rows are appended as
they are measured.
"""

import importlib.util
import json
import multiprocessing
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
PARTS = ("correctness", "gpu tests", "first cases", "tuning", "first cases again", "all cases")


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
            cases[:FIRST], device, rows_file, preset="gpu", seconds=arguments.seconds, only=["mmkernels"], seed=arguments.seed,
            with_compile=False, append=True, stop_at=start + BUDGET * 0.9,
        )  # fmt: skip
        return "with tuned tiles"

    def tuned():
        _restore_tables(folder / "configs")
        done = state.facts["tuned"]
        tune.tune(
            cases,
            device,
            [_tuning.CONFIGS, folder / "configs"],
            lambda: within(0.82),
            done,
            lambda key: (done.append(key), state.save()),
        )
        return f"{len(done)} kernels and shapes" if len(done) >= len(tune.tasks(cases)) else None

    print(f"== build: {built}", flush=True)
    part("correctness", lambda: sweep(device, folder / "correctness.jsonl", BUDGET * 0.2), 0.35)
    part("gpu tests", lambda: gpu_tests(folder / "gpu-tests.txt", BUDGET * 0.3), 0.45)
    part("first cases", lambda: bench(cases[:FIRST], 0.65, True), 0.65)
    part("tuning", tuned, 0.75)
    part("first cases again", again, 0.85)
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


def check_problems(problems: list, device: torch.device, send) -> None:
    """Calls `send(row)` for each problem and kernel backend: output and every gradient against float64."""
    for problem in problems:
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
            send(row | run.header(device))


def _worker(sender, problems, device):
    with baselines.quiet():
        check_problems(problems, device, sender.send)
    sender.send(None)


def sweep(device: torch.device, output: Path, seconds: float) -> str:
    """Both kernel backends against float64, a row a problem and backend.

    In processes of their own, which compile side by side: a kernel that reads where it must not, or never ends, costs the rows
    of one of them and leaves this process its GPU.
    """
    context, problems, deadline = multiprocessing.get_context("spawn"), sweep_problems(), time.monotonic() + seconds
    started, rows, broken = [], [], []
    for i in range(tune.workers()):
        part = problems[i :: tune.workers()]
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(sender, part, device))
        process.start()
        sender.close()
        started.append((process, receiver, part))
    for process, receiver, part in started:
        seen, why = set(), ""
        try:
            while not why:
                if not receiver.poll(max(0.0, deadline - time.monotonic())):
                    why = f"no answer after {seconds:.0f} s"
                elif (row := receiver.recv()) is None:
                    break
                else:
                    rows.append(row)
                    seen.add(registry.Problem(**row["sizes"]))
        except EOFError:
            process.join()
            why = f"its process ended with status {process.exitcode}"
        process.kill()
        process.join()
        if why:
            left = [problem for problem in part if problem not in seen]
            broken.append(f"{why}, at or after {tuple(left[0] if left else part[-1])}")
    counts = {}
    for row in rows:
        statuses = counts.setdefault(row["candidate"], {})
        statuses[row["status"]] = statuses.get(row["status"], 0) + 1
        if row["status"] == "wrong":
            print(f"   {row['candidate']} {tuple(row['sizes'].values())}: {row['reason']}", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad = broken or any("wrong" in statuses for statuses in counts.values())
    return "; ".join([("FAILED " if bad else "") + f"{counts}", *broken])


def gpu_tests(output: Path, seconds: float) -> str:
    """The tests marked `gpu`: the contracts of the ops on both backends, and what only a GPU shows."""
    if importlib.util.find_spec("pytest") is None:
        return "FAILED pytest is not installed"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/ops",
        "tests/bench",
        "-m",
        "gpu",
        "-q",
        "--maxfail=20",
        "-p",
        "no:cacheprovider",
    ]
    if importlib.util.find_spec("xdist"):  # most of the time is Triton compiling
        command += ["-n", str(tune.workers())]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment)
        text, failed = process.stdout + process.stderr, process.returncode != 0
    except subprocess.TimeoutExpired as error:
        text, failed = (error.stdout or b"").decode() + f"\nstopped after {seconds:.0f} s", True
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    return ("FAILED " if failed else "") + (text.strip().splitlines() or ["no output"])[-1]

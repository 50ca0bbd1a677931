"""The runner: verifies every candidate, then times all of them in turns, and yields one row a candidate.

Rounds make a busy neighbour hurt all candidates alike: they are compared within a round, and the median over the rounds is
their ratio. On a GPU each call is timed by events with a cold L2 cache, on a CPU wall time stands beside the process's own CPU
time.
"""

import functools
import gc
import hashlib
import math
import os
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch

import mmkernels
from mmkernels import testing

from . import baselines, launches, memory, roofline, verify
from .registry import Inputs, make_inputs, wanted

ROOT = Path(__file__).resolve().parent.parent
MIN_ROUNDS = 6  # the fewest that bound a median with 95 %
MAX_ROUNDS = 50
INNER_BELOW = 1e-3  # seconds: faster calls are timed many at a time
INNER_TIME = 5e-3
LARGE_BLOCK = 30 * 2**20  # bytes: below the most that glibc's threshold grows to, 32 MiB


# --- What a row says about where it was measured ------------------------------------------------------


def device_name(device: torch.device) -> str:
    """As the vendor calls it, for a CPU with the numbers of its family and model where the name has none: virtual machines
    call every generation the same."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= facts.keys() and not any(c.isdigit() for c in name):
        name += f" family {facts['cpu family']} model {facts['model']}"
    return name


def device_folder(device: torch.device) -> str:
    """The device's name as a folder below results/; the CPU's with its threads, which its times depend on."""
    name = device_name(device) if device.type == "cuda" else f"{device_name(device)} {torch.get_num_threads()} threads"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


@functools.cache
def commit() -> str:
    """Which code was measured: the commit, with a digest of the sources after `+` where they differ from it or in its place
    outside of a repository."""
    folders = ("mmkernels", "csrc", "bench")
    files = sorted(
        p for folder in folders for p in (ROOT / folder).rglob("*.*") if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")
    )
    digest = "+" + hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]

    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "mmkernels/*.py", "bench/*.py")
        return git("rev-parse", "--short=12", "HEAD") + (digest if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return digest


def header(device: torch.device) -> dict:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "mmkernels": mmkernels.__version__,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # above the threads in use: the machine was busy
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# --- Timing ---------------------------------------------------------------------------------------------------------------


class Timer:
    """One candidate's call, ready to be timed; `backward` passes build their graph outside of the clock."""

    def __init__(self, function, inputs: Inputs, pass_: str, names: tuple, flush):
        self.function, self.inputs, self.pass_, self.flush = function, inputs, pass_, flush
        self.cuda = inputs.device.type == "cuda"
        self.tensors = {n: t.detach().requires_grad_() if n in names else t for n, t in inputs.tensors.items()}
        self.leaves = [self.tensors[n] for n in names]
        self.inner = 1
        self.seconds, self.cpu_seconds = [], []

    def forward(self):
        with torch.set_grad_enabled(bool(self.leaves)):
            return self.function(**self.tensors, **self.inputs.options)

    def step(self):
        return torch.autograd.grad(self.forward(), self.leaves, self.inputs.cotangent)

    def call(self):
        """What is timed, as a function; the graph of a backward pass has been made."""
        if not self.pass_.startswith("backward"):
            return self.forward if self.pass_ == "forward" else self.step
        output = self.forward()
        return lambda: torch.autograd.grad(output, self.leaves, self.inputs.cotangent)

    def measure(self) -> float:
        """Times one round; returns seconds a call."""
        call = self.call()
        cpu = time.process_time()
        if self.cuda and self.inner == 1:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush()
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) * 1e-3
        else:
            start = time.perf_counter()
            for _ in range(self.inner):
                call()
            if self.cuda:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / self.inner
        self.cpu_seconds.append((time.process_time() - cpu) / self.inner)
        self.seconds.append(seconds)
        return seconds

    def settle(self) -> None:
        """Warms up and chooses how many calls a round makes: call overhead is below what one call can show."""
        first = self.measure()
        if first < 0.1:
            first = min(self.measure() for _ in range(3))
        # On a GPU events time a single call well; only problems that are all overhead are timed in bulk, host included.
        if first < INNER_BELOW and not self.pass_.startswith("backward") and (not self.cuda or self.tiny()):
            self.inner = max(1, int(INNER_TIME / first))
        self.seconds.clear()
        self.cpu_seconds.clear()

    def tiny(self):
        return sum(t.numel() for t in self.tensors.values()) < 1 << 16

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    def median_cpu(self) -> float:
        return sorted(self.cpu_seconds)[len(self.cpu_seconds) // 2]


@functools.cache
def _flusher(device: torch.device):
    """A function that drives everything out of the L2 cache."""
    if device.type != "cuda":
        return lambda: None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(max(size, 1 << 26), dtype=torch.int8, device=device)
    return buffer.zero_


def time_in_turns(timers: dict, seconds: float, seed: int = 0) -> None:
    """Times rounds that take turns over the candidates, in an order shuffled anew, for about `seconds` in all but
    `MIN_ROUNDS` at least.

    A candidate that alone has used up `seconds` sits out from then on: one round of it may take a minute.
    """
    for timer in timers.values():
        timer.settle()
    order, shuffled = list(timers.values()), random.Random(seed)
    start, rounds = time.perf_counter(), 0
    while rounds < MAX_ROUNDS and (rounds < MIN_ROUNDS or time.perf_counter() - start < seconds):
        shuffled.shuffle(order)
        for timer in order:
            if sum(timer.seconds) * timer.inner < seconds or not timer.seconds:
                timer.measure()
        rounds += 1


def paired(ours: Timer, rival: Timer) -> tuple:
    """(median, low, high) of how many times longer a rival took in the same round, over the rounds that both were in."""
    ratios = sorted(r / o for o, r in zip(ours.seconds, rival.seconds, strict=False))
    low, high = interval(len(ratios))
    return statistics.median(ratios), ratios[low], ratios[high]


def interval(count: int) -> tuple:
    """Numbers of the two of `count` ordered values between which the median lies with 95 %, whatever their distribution.

    By the binomial distribution of how many lie below it (a sign test); fewer than six values cannot do better than all.
    """
    below, tail = 0, 0.5**count
    while tail + math.comb(count, below + 1) * 0.5**count <= 0.025:
        below += 1
        tail += math.comb(count, below) * 0.5**count
    return below, count - 1 - below


# --- A case ------------------------------------------------------------------------------------------------------------------


def run_problem(cases: list, device: torch.device, *, seconds=10.0, with_compile=True, memory_of="all", only=None, seed=0):
    """Yields the rows of some cases of one problem, measured on `device`.

    `seconds` is the time to spend on timing a case; `memory_of` "all" or "ours" (and eager) says whose peak memory is
    measured; `only` keeps the candidates whose name contains one of some (eager stays: it sets the error budget). A candidate
    that fails is a row with the reason.
    """
    problem = cases[0].problem
    if missing := getattr(problem, "missing", ""):
        for case in cases:
            counted = roofline.counts(problem, case.pass_)
            reason = {"candidate": "all", "kind": "baseline", "note": "", "status": "unsupported", "reason": missing}
            yield {"case": case.id, "op": problem.op, "pass": case.pass_, **counted._asdict(), **header(device), **reason}
        return
    torch._dynamo.reset()
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what is imported need not be gone through after every candidate, nor while one is timed
    if device.type == "cpu":
        # From a large block on that was freed, the system's allocator keeps blocks up to that size, as in any process that has
        # had a model; before, every call of a candidate would get its results page by page.
        torch.empty(LARGE_BLOCK, dtype=torch.int8).zero_()
    inputs = make_inputs(problem, device, seed)
    listed = baselines.candidates(problem, inputs, with_compile)
    if only is not None:
        listed = [c for c in listed if c.name == "eager" or any(part in c.name for part in only)]
    ceilings = roofline.measured(device, problem.torch_dtype)
    exact = verify.exact(problem, inputs, max((wanted(c.problem, c.pass_) for c in cases), key=len))
    for case in cases:
        names = wanted(problem, case.pass_)
        plain = None
        rows, timers = {}, {}
        # Eager goes first: its error is the budget of the others.
        for candidate in sorted(listed, key=lambda c: c.name != "eager"):
            row = {"candidate": candidate.name, "kind": candidate.kind, "note": candidate.note, "status": "unsupported"}
            rows[candidate.name] = row
            reason = candidate.reason or (candidate.forward_only if names else "")
            if reason:
                row["reason"] = reason
                continue
            try:
                given, own = candidate.given(inputs, names)
                with baselines.quiet():
                    actual = _run_once(candidate, given, own)
                if candidate.name == "eager":
                    plain = verify.eager(problem, candidate, given, own, exact, actual)
                row["errors"] = verify.errors(problem, candidate, given, own, actual, exact, plain)
                timers[candidate.name] = Timer(candidate.function, given, case.pass_, own, _flusher(device))
                timers[candidate.name].measure()
                row["status"] = "ok"
            except verify.WrongResult as error:
                row.update(status="wrong", reason=str(error))
            except Exception as error:  # a peer may fail in any way: out of memory, not implemented, its compiler
                row.update(status="error", reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
            if row["status"] != "ok":
                timers.pop(candidate.name, None)
            actual = None
            _free(device)
        plain = None
        with baselines.quiet():
            time_in_turns(timers, seconds, seed)
        for candidate in listed:
            row = rows[candidate.name]
            if row["status"] == "ok":
                with baselines.quiet():
                    row["launches"] = launches.count(timers[candidate.name].call(), device)
            of_interest = memory_of == "all" or candidate.kind == "mmkernels" or candidate.name == "eager"
            if row["status"] == "ok" and of_interest and not case.pass_.startswith("backward"):
                with baselines.quiet():
                    row["peak_bytes"] = memory.peak(case, candidate.name, device, timers[candidate.name], seed)
        counted = roofline.counts(problem, case.pass_)
        rivals = {n: timers[n] for n, r in rows.items() if r["kind"] != "mmkernels" and n in timers}
        for candidate in listed:
            row = rows[candidate.name]
            if row["status"] == "ok":
                timer = timers[candidate.name]
                median = timer.quantile(0.5)
                ratios = {n: paired(timer, rival) for n, rival in rivals.items() if n != candidate.name}
                row.update(
                    ms=median * 1e3,
                    ms_p20=timer.quantile(0.2) * 1e3,
                    ms_p80=timer.quantile(0.8) * 1e3,
                    cpu_ms=timer.median_cpu() * 1e3,
                    rounds=len(timer.seconds),
                    calls_per_round=timer.inner,
                    tflops=counted.operations / median * 1e-12,
                    gbytes_per_second=counted.bytes / median * 1e-9,
                    roofline_share=ceilings.floor(counted) / median,
                    speedup_over={n: ratio for n, (ratio, _, _) in ratios.items()},
                    speedup_interval={n: bounds for n, (_, *bounds) in ratios.items()},
                )
            yield {
                "case": case.id,
                "op": problem.op,
                "pass": case.pass_,
                "sizes": {k: v for k, v in problem._asdict().items() if k not in ("op", "name")},
                "operations": counted.operations,
                "bytes": counted.bytes,
                "ceilings": {"tflops": ceilings.flops * 1e-12, "gbytes_per_second": ceilings.bandwidth * 1e-9},
                **header(device),
                **row,
            }
        timers.clear()
        _free(device)


def _run_once(candidate, inputs, names):
    """A verified run has its uninitialised memory poisoned, so an element that nobody writes is a NaN."""
    if candidate.kind != "mmkernels":
        return verify.run(candidate, inputs, names)
    with testing.poisoned_memory():
        return verify.run(candidate, inputs, names)


def _free(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def group(cases: list) -> list:
    """Cases in lists of one problem each, in the order of the registry: they share inputs and the exact result."""
    problems = {}
    for case in cases:
        problems.setdefault(case.problem, []).append(case)
    return list(problems.values())

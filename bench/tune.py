"""Measures tile sizes of the Triton kernels on this GPU and writes the tables that `mmkernels/_tuning.py` reads.

Compiling takes most of the time and no GPU: worker processes first run every candidate once, which fills Triton's cache on
disk; then one process times them. One kernel is tuned at a time, the others keep their tiles, and a candidate enters the table
when the whole pass is faster than with the default by more than the noise.
"""

import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
from pathlib import Path
from typing import NamedTuple

import torch

import mmkernels
from mmkernels import _tuning

from . import registry, run

# Kernels by op: the name in the tables and the pass that runs it.
KERNELS = {
    "latent_attention": {"latent_fwd": "forward", "latent_bwd_q": "backward", "latent_bwd_x": "backward-dx"},
    "latent_decode": {
        "latent_decode_fwd": "forward",
        "latent_decode_bwd_rows": "backward-dx",
        "latent_decode_bwd_keys": "backward",
    },
    "attention": {
        "attention_forward": "forward",
        "attention_backward_queries": "backward",
        "attention_backward_keys": "backward",
        "attention_backward_bias": "backward",
    },
}
WORTHWHILE = 0.97  # of the default's time
TRIES = 12  # candidates a kernel and shape, the ones nearest to the default first


class Task(NamedTuple):
    kernel: str
    problem: registry.Problem
    pass_: str

    @property
    def dims(self) -> tuple:
        """What the tables are keyed by: channels for latent kernels, head dims for attention."""
        p = self.problem
        if p.op == "latent_decode":
            return (max(p.channels, p.out),) * 2
        return (p.channels, p.channels) if p.op == "latent_attention" else (p.head_dim, p.value_dim)


def tasks(cases) -> list:
    """One task per kernel, dims and dtype, at the first shape that needs it."""
    seen = {}
    for problem in dict.fromkeys(case.problem for case in cases):
        for kernel, pass_ in KERNELS.get(problem.op, {}).items():  # bottleneck_attention runs those of attention
            if kernel.endswith("bias") and not problem.bias:
                continue
            task = Task(kernel, problem, pass_)
            seen.setdefault((kernel, task.dims, problem.dtype), task)
    return list(seen.values())


def candidates(default: _tuning.Tiles) -> list:
    """Tiles worth trying around the default: each size halved, kept or doubled, four or eight warps, one to four stages."""

    def near(size):
        return sorted({max(16, size // 2), size, min(256, size * 2)}) if size else [0]

    def distance(tiles):
        return sum(abs(a.bit_length() - b.bit_length()) for a, b in zip(tiles, default, strict=True))

    grid = itertools.product(
        near(default.queries), near(default.keys), near(default.head), near(default.value), (4, 8), (1, 2, 3, 4)
    )
    found = sorted((_tuning.Tiles(*values) for values in grid), key=distance)
    return [tiles for tiles in found if tiles != default][:TRIES]


@contextlib.contextmanager
def forced(kernel: str, tiles: _tuning.Tiles):
    """Within it, every launch of `kernel` uses `tiles`."""
    original = _tuning.tiles

    def choose(name, *arguments, **options):
        return tiles if name == kernel else original(name, *arguments, **options)

    _tuning.tiles = choose
    try:
        yield
    finally:
        _tuning.tiles = original


def default_tiles(task: Task, device: torch.device) -> _tuning.Tiles:
    major, minor = torch.cuda.get_device_capability(device)
    return _tuning.tiles(task.kernel, task.dims, task.problem.dtype, 10 * major + minor)


def _timer(task, device):
    inputs = registry.make_inputs(task.problem, device)
    op = getattr(mmkernels.ops, task.problem.op)

    def function(**arguments):
        out = op(**arguments, backend="triton")
        return [out] if isinstance(inputs.cotangent, list) else out

    names = registry.wanted(task.problem, task.pass_)
    return run.Timer(function, inputs, task.pass_, names, run._flusher(device))


def compile_once(task: Task, tiles_list: list) -> None:
    """In a worker: runs each candidate on a small batch, so that its code is in Triton's cache."""
    device = torch.device("cuda")
    small = task._replace(problem=task.problem._replace(batch=1))
    for tiles in tiles_list:
        with forced(task.kernel, tiles), contextlib.suppress(Exception):  # too large for this GPU: timing finds out again
            timer = _timer(small, device)
            timer.measure()


def tune_task(task: Task, device: torch.device, tiles_list: list, rounds: int = 5) -> tuple:
    """(best tiles or None, {tiles: median seconds or the error})."""
    default = default_tiles(task, device)
    timers, times = {}, {}
    for tiles in (default, *tiles_list):
        try:
            with forced(task.kernel, tiles):
                timers[tiles] = _timer(task, device)
                timers[tiles].measure()
        except Exception as error:  # out of shared memory, or a compiler's refusal: not a candidate
            times[tiles] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            timers.pop(tiles, None)
    for timer in timers.values():
        timer.seconds.clear()
    for _ in range(rounds):
        for tiles, timer in timers.items():
            with forced(task.kernel, tiles):
                timer.measure()
    times |= {tiles: timer.quantile(0.5) for tiles, timer in timers.items()}
    if default not in timers:
        return None, times
    best = min(timers, key=lambda tiles: times[tiles])
    return (best if times[best] < WORTHWHILE * times[default] else None), times


def workers() -> int:
    """Processes that compile at a time; each holds a context on the GPU."""
    return max(1, min(12, (os.cpu_count() or 2) - 2))


def tune(cases, device: torch.device, folders: list, within=lambda: True, done=(), finished=lambda key: None) -> None:
    """Tunes every kernel at the shapes of `cases` and writes tables below each of `folders`.

    `within()` turns false when time is up; tasks whose key is in `done` are left out, `finished(key)` hears of each.
    """
    todo = {f"{t.kernel} {t.dims} {t.problem.dtype}": t for t in tasks(cases)}
    todo = {key: task for key, task in todo.items() if key not in done}
    lists = {key: candidates(default_tiles(task, device)) for key, task in todo.items()}
    gpu = _tuning.gpu_folder(torch.cuda.get_device_name(device))
    count = workers()
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = {
            key: [pool.submit(compile_once, task, lists[key][i::count]) for i in range(count)] for key, task in todo.items()
        }
        for key, task in todo.items():
            if not within():
                pool.shutdown(cancel_futures=True)
                return
            concurrent.futures.wait(compiled[key])
            best, times = tune_task(task, device, lists[key])
            default = default_tiles(task, device)
            seconds = times[default]
            print(
                f"  {key}: default {tuple(default)} {seconds if isinstance(seconds, str) else f'{seconds * 1e3:.3f} ms'}",
                end="",
            )
            print(f", best {tuple(best)} {times[best] * 1e3:.3f} ms" if best else ", kept", flush=True)
            for folder in folders:
                store(Path(folder) / gpu / f"{task.kernel}.json", task, best)
            finished(key)
    _tuning._table.cache_clear()
    _tuning.tiles.cache_clear()


def store(path: Path, task: Task, tiles) -> None:
    """Puts an entry into a table, in place of the one for the same dims and dtype; None takes that one out."""
    rows = json.loads(path.read_text()) if path.is_file() else []
    rows = [row for row in rows if (row["dims"], row["dtype"]) != (list(task.dims), task.problem.dtype)]
    if tiles is not None:
        rows.append({"dims": list(task.dims), "dtype": task.problem.dtype, "tiles": tiles._asdict()})
    if not rows and not path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text("[\n" + ",\n".join(json.dumps(row) for row in sorted(rows, key=str)) + "\n]\n")
    os.replace(temporary, path)

"""`python -m mmkernels bench`: runs a preset, prints a table a case, writes rows, draws plots."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
# Seconds spent on timing a case, and whose peak memory is measured.
PRESETS = {"quick": (0.5, "ours"), "paper": (10.0, "all"), "gpu": (1.0, "all")}


def add_commands(subparsers) -> None:
    """Adds the `bench` command to the subparsers of `python -m mmkernels`."""
    parser = subparsers.add_parser("bench", help="time the ops and their peers", description=__doc__)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="quick")
    parser.add_argument("--op", help="only this op, or layer or model, as in attention, fusion_layer, hypergrid_t5")
    parser.add_argument(
        "--case", action="append", help="only cases whose id matches this pattern, as in '*imagenet*/forward', or another one"
    )
    parser.add_argument(
        "--candidate", action="append", help="only candidates whose name contains this, or another one, and eager"
    )
    parser.add_argument("--list", action="store_true", help="print the ids of the cases and stop")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    parser.add_argument("--seconds", type=float, help="time to spend on timing a case")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes, which takes minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument(
        "--output", type=Path, help="JSON lines; default of paper and gpu: bench/results/<device>/<preset>.jsonl"
    )
    parser.add_argument("--plot", action="store_true", help="draw plots next to the rows")
    parser.add_argument("--fresh", action="store_true", help="preset gpu: forget the parts that an earlier visit finished")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 1 when a candidate of ours gave a wrong result or failed, 2 for bad arguments."""
    import torch

    from . import registry

    if arguments.threads is not None:
        if arguments.threads < 1:
            return _bad(f"--threads is {arguments.threads}; it must be 1 or more")
        torch.set_num_threads(arguments.threads)
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        return _bad(f"--device is {name!r}; allowed are 'cpu', 'cuda'")
    if name.startswith("cuda") and not torch.cuda.is_available():
        return _bad("--device is 'cuda'; torch sees no CUDA device here")
    try:
        cases = registry.select(arguments.preset, arguments.op, arguments.case)
    except ValueError as error:
        return _bad(str(error))
    if arguments.list:
        print("\n".join(case.id for case in cases))
        return 0
    if arguments.preset == "gpu":
        if not name.startswith("cuda"):
            return _bad("--preset gpu needs a CUDA device; --preset paper measures the published shapes on this one")
        from . import build

        start, built = time.monotonic(), build.ensure(torch.device(name))
        from . import visit

        return visit.main(arguments, cases, torch.device(name), start, built)
    device = torch.device(name)
    output = arguments.output or (default_output(device, arguments.preset) if arguments.preset == "paper" else None)
    rows = run_cases(
        cases,
        device,
        output,
        preset=arguments.preset,
        seconds=arguments.seconds,
        only=arguments.candidate,
        seed=arguments.seed,
        with_compile=arguments.preset != "quick" and not arguments.no_compile,
    )
    if arguments.plot:
        from . import plots

        folder, drawn = Path("runs") / "bench", rows
        if output is not None:
            folder, drawn = output.parent, [json.loads(line) for line in output.read_text().splitlines()]
        print("plots: " + ", ".join(map(str, plots.draw(drawn, folder))))
    return failed(rows)


def default_output(device, preset: str) -> Path:
    from . import run

    return RESULTS / run.device_folder(device) / f"{preset}.jsonl"


def run_cases(
    cases, device, output, *, preset, seconds=None, only=None, seed=0, with_compile=True, append=False, stop_at=None
) -> list:
    """Measures cases, prints a table each, and writes the rows of each problem to `output` when they are all measured: in the
    place of earlier rows of the same cases (with `append` one by one, behind whatever is there).

    `stop_at` is a time of `time.monotonic`: no further problem is begun after it.
    """
    from . import run

    per_case, memory_of = PRESETS[preset]
    options = {"seconds": seconds or per_case, "memory_of": memory_of, "only": only, "seed": seed}
    rows = []
    for group in run.group(cases):
        if stop_at is not None and time.monotonic() > stop_at:
            break
        measured, shown = [], []
        for row in run.run_problem(group, device, with_compile=with_compile, **options):
            measured.append(row)
            if append and output is not None:
                _write([row], output, "a")
            if shown and shown[-1]["case"] != row["case"]:
                print_table(shown)
                shown = []
            shown.append(row)
        print_table(shown)
        rows += measured
        if output is not None and not append:
            _replace_rows(measured, output)
    if output is not None:
        print(f"{len(rows)} rows in {output}")
    return rows


def _replace_rows(rows: list, output: Path) -> None:
    """Puts rows in the place of earlier ones of the same cases, all or none of them."""
    cases = {row["case"] for row in rows}
    earlier = output.read_text().splitlines() if output.exists() else []
    kept = [row for row in map(json.loads, earlier) if row["case"] not in cases]
    partial = output.with_name(output.name + ".partial")
    _write([*kept, *rows], partial, "w")
    os.replace(partial, output)


def _write(rows: list, file: Path, mode: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open(mode) as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows)


def print_table(rows: list) -> None:
    """One case: a line a candidate, the fastest first, and what could not run."""
    if not rows:
        return
    first = rows[0]
    print(f"\n{first['case']}   {first['operations'] / 1e9:.3g} GFLOP, {first['bytes'] / 1e6:.3g} MB", flush=True)
    names = ("median ms", "p20", "p80", "CPU ms", "peak MB", "roofline", "launches", "eager/this")
    print(" " * 30 + "{:>10}{:>10}{:>10}{:>10}{:>9}{:>9}{:>10}{:>12}".format(*names))
    for row in sorted(rows, key=lambda r: r.get("ms", float("inf"))):
        if row["status"] != "ok":
            print(f"  {row['candidate']:28}{row['status']}: {row['reason']}")
            continue
        peak = f"{row['peak_bytes'] / 1e6:9.1f}" if row.get("peak_bytes") is not None else " " * 9
        eager = f"{row['speedup_over'].get('eager', 1.0 if row['candidate'] == 'eager' else float('nan')):12.2f}"
        if "eager" in row["speedup_over"]:
            eager += " [{:.2f}, {:.2f}]".format(*row["speedup_interval"]["eager"])
        launches = f"{row['launches']:10}" if row["launches"] is not None else " " * 10
        times = "".join(f"{row[key]:10.3f}" for key in ("ms", "ms_p20", "ms_p80", "cpu_ms"))
        print(f"  {row['candidate']:28}{times}{peak}{row['roofline_share']:9.1%}{launches}{eager}", flush=True)


def failed(rows: list) -> int:
    """1 when one of ours was wrong or broke; the peers' failures are rows, not failures."""
    return int(any(r["kind"] == "mmkernels" and r["status"] in ("wrong", "error") for r in rows))


def _bad(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2

"""Pictures of measured rows: time and memory against M, ratios to the baselines, the roofline."""

import collections
from pathlib import Path


def draw(rows: list, folder: Path) -> list:
    """Writes the pictures that the rows have data for into `folder`; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in rows if row["status"] == "ok"]
    folder.mkdir(parents=True, exist_ok=True)
    pictures = (_against_keys(rows, "ms", "time (ms)"), _against_keys(rows, "peak_bytes", "extra peak memory (MB)"))
    paths = []
    for name, figure in zip(
        ("time", "memory", "ratios", "roofline"), (*pictures, _ratios(rows), _roofline(rows)), strict=True
    ):
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
    return paths


def _figure(width=7.0, height=4.5):
    from matplotlib.figure import Figure

    figure = Figure((width, height))
    return figure, figure.subplots()


def _title(row):
    return f"{row['device']}, torch {row['torch']}, {row['sizes']['dtype']}"


def _against_keys(rows, field, label):
    """Latent attention of one width over inputs of growing length."""
    series = collections.defaultdict(dict)
    for row in rows:
        if "/keys-" in row["case"] and row["pass"] == "forward" and row.get(field) is not None:
            series[row["candidate"]][row["sizes"]["keys"]] = row[field] / (1e6 if field == "peak_bytes" else 1)
    if not any(len(points) > 1 for points in series.values()):
        return None
    figure, axes = _figure()
    for name, points in series.items():
        ours = name.startswith("mmkernels")
        axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=name, linewidth=3 if ours else 1.2)
    axes.set(xlabel="inputs M", ylabel=label, xscale="log", title=_title(rows[0]))
    axes.set_yscale("symlog" if field == "peak_bytes" else "log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _ratios(rows):
    """Per case: how many times faster our first candidate is than each other one, and between which ratios with 95 %."""
    best = {}
    for row in rows:
        if row["kind"] == "mmkernels" and row["speedup_over"]:
            best.setdefault(row["case"], row)
    if not best:
        return None
    names = list(dict.fromkeys(name for row in best.values() for name in row["speedup_over"]))
    figure, axes = _figure(9.0, 1.5 + 0.16 * len(names) * len(best))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [j + i * height for j, row in enumerate(best.values()) if name in row["speedup_over"]]
        chosen = [row for row in best.values() if name in row["speedup_over"]]
        values = [row["speedup_over"][name] for row in chosen]
        bounds = [row.get("speedup_interval", {}).get(name, [v, v]) for row, v in zip(chosen, values, strict=True)]
        errors = [
            [v - low for v, (low, _) in zip(values, bounds, strict=True)],
            [high - v for v, (_, high) in zip(values, bounds, strict=True)],
        ]
        axes.barh(
            places, [value - 1 for value in values], height, left=1.0, label=f"over {name}", xerr=errors, error_kw={"lw": 0.8}
        )
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(best))], list(best), fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="times faster", xscale="log", title=_title(next(iter(best.values()))))
    axes.legend(fontsize=7)
    return figure


def _roofline(rows):
    """Operations a second over operations a byte, under the two ceilings that this machine was measured to have."""
    if not rows:
        return None
    figure, axes = _figure()
    dtype = collections.Counter(row["sizes"]["dtype"] for row in rows).most_common(1)[0][0]
    rows = [row for row in rows if row["sizes"]["dtype"] == dtype]
    ceilings = rows[0]["ceilings"]
    intensities = [row["operations"] / row["bytes"] for row in rows]
    low, high = min(intensities) / 2, max(max(intensities) * 2, ceilings["tflops"] * 1e3 / ceilings["gbytes_per_second"] * 2)
    grid = [low * (high / low) ** (i / 99) for i in range(100)]
    roof = [min(ceilings["tflops"], x * ceilings["gbytes_per_second"] * 1e-3) for x in grid]
    axes.plot(grid, roof, color="black", label="measured ceilings")
    for name in dict.fromkeys(row["candidate"] for row in rows):
        points = [(row["operations"] / row["bytes"], row["tflops"]) for row in rows if row["candidate"] == name]
        style = {"marker": "D", "s": 40} if name.startswith("mmkernels") else {"marker": "o", "s": 14}
        axes.scatter(*zip(*points, strict=True), label=name, **style)
    axes.set(xlabel="operations a byte", ylabel="TFLOP/s", xscale="log", yscale="log", title=_title(rows[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure

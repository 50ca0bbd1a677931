"""Operations and bytes that a problem cannot do without, the ceilings of a device, and the time that follows.

Operations are multiplications and additions of the cheapest plan (`mmkernels.ops.latent.plan`); bytes count every input read
once and every output written once. Both belong to the problem, not to a candidate, so shares of the roofline compare.
"""

import functools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

from mmkernels import _library
from mmkernels.ops import linear
from mmkernels.ops._shared.waves import MERGE, START, split_keys
from mmkernels.ops.latent import plan

from . import adapters, fusion
from .registry import Problem, wanted

RESULTS = Path(__file__).resolve().parent / "results"


class Counts(NamedTuple):
    operations: int
    bytes: int


def counts(problem: Problem, pass_: str) -> Counts:
    """Of one pass. `backward` recomputes the scores, as every fused kernel does; `step` is forward and backward."""
    if not isinstance(problem, Problem):
        return Counts(*problem.counts(pass_))
    b, n, m, h, d, e = problem[2:8]
    item = problem.torch_dtype.itemsize
    if problem.op == "attention":
        forward = 2 * b * h * n * m * (d + e)
        backward = 2 * b * h * n * m * (3 * d + 2 * e)
        inputs = b * h * (n * d + m * (d + e)) + (h * n * m if problem.bias else 0)
        output = b * h * n * e
        gradients = inputs
    else:
        forward, backward = (b * flops for flops in _latent_operations(problem, pass_))
        c, p = problem.channels, problem.position
        queries = (1 if problem.shared_queries else b) * n * h * d
        weights = (h * d + h * e + 2) * c + h * e
        inputs = queries + b * m * (c - p) + m * p + weights
        output = b * n * h * e
        gradients = queries + weights + (b * m * (c - p) if "x" in wanted(problem, pass_) else 0)
    if pass_ == "forward":
        return Counts(forward, item * (inputs + output))
    backward_bytes = item * (inputs + 2 * output + gradients)  # reads the output and its gradient
    if pass_.startswith("backward"):
        return Counts(backward, backward_bytes)
    return Counts(forward + backward, item * (inputs + output) + backward_bytes)


def _latent_operations(problem, pass_):
    """(forward, backward) of one example, the projections of its M-sized or N-sized side included."""
    n, m, h, d, e = problem[3:8]
    c, input_gradient = problem.channels, "x" in wanted(problem, pass_)
    best = plan.choose_plan(n, m, 0, c, h * d, h * e, 0, h, score_plans=plan.SCORE_PLANS[:2], value_plans=plan.VALUE_PLANS[:2])
    backward = 0
    # Per side: its product with the scores once more, its gradient on the N side and, where a gradient reaches M, there.
    for absorbed, size in ((best.score != "project", d), (best.value != "project", e)):
        width = c if absorbed else size
        reaches_keys = input_gradient or not absorbed
        products = (2 if size is d else 1) + reaches_keys  # the score side: recompute S, dq; the value side: dP
        backward += 2 * n * m * h * width * products
        linear = 2 * (n if absorbed else m) * c * h * size
        backward += linear * (2 if absorbed or input_gradient else 1)
    return best.flops, backward


# --- Ceilings -------------------------------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    flops: float  # of a large matrix product, a second
    bandwidth: float  # of a large copy, bytes read and written a second

    def floor(self, counted: Counts) -> float:
        """Seconds below which no implementation can go."""
        return max(counted.operations / self.flops, counted.bytes / self.bandwidth)


def _best_time(function, device, repeats=5):
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def measured(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The two ceilings of this machine, measured once a process.

    On a CPU the matrix product is always float32: kernels widen 16-bit blocks in cache, because 16-bit products are slower.
    """
    cuda = device.type == "cuda"
    size, dtype = (8192, dtype) if cuda else (1536, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    seconds = _best_time(lambda: torch.mm(a, b, out=out), device)
    if not cuda and _library.load("cpu").loaded:  # some CPUs get less from the BLAS of torch than they have
        seconds = min(seconds, _best_time(lambda: linear(a, b, backend="cpp"), device))
    flops = 2 * size**3 / seconds
    source = torch.randn((2**30 if cuda else 2**26) // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    bandwidth = 2 * source.nbytes / _best_time(lambda: target.copy_(source), device)
    return Ceilings(flops, bandwidth)


# --- Times predicted for a GPU ----------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """Rates by the vendor's data sheet (dense), and the part of them that large products and copies were seen to reach."""

    name: str
    multiprocessors: int
    flops: dict  # dtype name -> operations a second on the tensor cores (float32: tf32 is not used, plain cores)
    bandwidth: float
    product_share: float
    copy_share: float
    launch: float = 4e-6  # seconds a kernel costs beside its work


H100 = Gpu("H100 SXM", 132, {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}, 3.35e12, 0.80, 0.90)
H200 = Gpu("H200", 132, {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}, 4.8e12, 0.80, 0.90)
# Of a large product's rate, what an attention loop reaches when the chip is full: the exponentials, the running maximum and
# the rescaling stand between its two products. Published kernels with wgmma reach 0.6 to 0.75 forward; on Hopper mma.sync
# gets at about six tenths of what wgmma gets.
LOOP_SHARE = {"forward": 0.6, "backward": 0.45}
INSTRUCTION_SHARE = {"wgmma": 1.0, "mma.sync": 0.6}


class Prediction(NamedTuple):
    seconds: float
    floor: float  # seconds by Ceilings.floor with the reachable rates: the best that any kernel could do
    bound: str  # "compute" or "memory"
    splits: int  # parts of the keys
    filled: float  # share of the chip that has work, over the time of the kernel


def predict(
    problem: Problem, pass_: str, gpu: Gpu = H200, instruction="wgmma", rows: int = 128, block: int = 64, resident: int = 1
) -> Prediction:
    """Time of a pass from its operations, bytes and waves of thread blocks, for kernels that do not spill.

    A thread block owns `rows` queries and walks the keys `block` at a time; `resident` of them share a multiprocessor.
    Seconds = max(operations / (rate * LOOP_SHARE * INSTRUCTION_SHARE * filled), bytes / bandwidth) + launches.
    """
    if isinstance(problem, adapters.Adapters):
        return _predict_adapter(problem, pass_, gpu)
    if pass_.startswith("step"):
        forward = predict(problem, "forward", gpu, instruction, rows, block, resident)
        backward = predict(problem, "backward" + pass_.removeprefix("step"), gpu, instruction, rows, block, resident)
        seconds, floor = forward.seconds + backward.seconds, forward.floor + backward.floor
        return Prediction(seconds, floor, backward.bound, forward.splits, min(forward.filled, backward.filled))
    counted, kind = counts(problem, pass_), "forward" if pass_ == "forward" else "backward"
    ceilings = Ceilings(gpu.flops[problem.dtype] * gpu.product_share, gpu.bandwidth * gpu.copy_share)
    slots = gpu.multiprocessors * resident
    if isinstance(problem, adapters.Fused):
        # A kernel that memory bounds and the library's products before and after it, one waiting for the other.
        operations, moved, launches = problem.parts(kind)
        compute, memory = operations / ceilings.flops, moved / ceilings.bandwidth
        seconds, bound = compute + memory + launches * gpu.launch, "compute" if compute > memory else "memory"
        return Prediction(seconds, ceilings.floor(counted), bound, 1, 1.0)
    if isinstance(problem, fusion.Fusion):
        # One launch has the tiles of all modalities; the longest come first, so the last wave is that of the shortest.
        groups, splits = problem.batch * problem.heads, 1
        work = [(groups * -(-n // rows), -(-m // block)) for n, m in problem.attended()]
        tiles = sum(count for count, _ in work)
        mean = sum(count * (blocks + START) for count, blocks in work) / tiles
        makespan = max(-(-tiles // slots) * mean, max(blocks for _, blocks in work) + START)
        filled = sum(count * blocks for count, blocks in work) / slots / makespan
    else:
        # latent_attention stacks the rows of all heads: they share the keys.
        groups, stacked = problem.batch * problem.heads, problem.queries
        if problem.op == "latent_attention":
            groups, stacked = problem.batch, problem.queries * problem.heads
        tiles, blocks = groups * -(-stacked // rows), -(-problem.keys // block)
        splits = split_keys(tiles, blocks, slots)
        steps = -(-blocks // splits)
        makespan = -(-tiles * splits // slots) * (steps + START) + (MERGE * splits if splits > 1 else 0.0)
        filled = tiles * blocks / slots / makespan
    rate = ceilings.flops * LOOP_SHARE[kind]
    if problem.dtype != "float32":
        rate *= INSTRUCTION_SHARE[instruction]
    compute, memory = counted.operations / (rate * filled), counted.bytes / ceilings.bandwidth
    launches = 3 if kind == "backward" else 1 if splits == 1 else 2
    return Prediction(
        max(compute, memory) + launches * gpu.launch,
        ceilings.floor(counted),
        "compute" if compute > memory else "memory",
        splits,
        filled,
    )


# --- Adapters in CUDA C++ ---------------------------------------------------------------------------------------------------

# Of a multiprocessor, each clock: bytes from L2, multiply-adds by mma.sync, lanes of instructions.
CLOCK, L2_BYTES, PRODUCTS, LANES = 1.7e9, 24, 1300, 128
# Instructions a warp has for a tile of 32 rows, read off the machine code of the kernels by clusters, compiled with a
# place's options and relu as constants; loops count as often as they run. Forward: for a block's whole tile, and more for
# every 64 of its channels. Backward: what all 16 warps do (at 768 channels, 1024), what warps do that add up a row, and those
# that multiply 16 columns of the bottleneck, 16 channels, and sums of rows.
FORWARD = {"alone": (387, 141), "houlsby": (595, 243), "pfeiffer": (719, 327)}
ALL_WARPS = {"alone": (309, 345), "houlsby": (615, 732), "pfeiffer": (602, 719)}
OF_ROW = {"alone": 157, "houlsby": 246, "pfeiffer": 322}
OF_COLUMNS, OF_CHANNELS, OF_SUMS = (80, 28), 108, (200, 67)
BRANCHES = 1.1  # the options that a place has not; an estimate
# Seconds before a part's first tile: its weights come, and the cluster meets. An estimate.
PART = 2e-6
# Seconds more where every block puts the examples in order itself, which it does with up to FEW of them. An estimate.
ORDER, FEW = 1e-6, 256


class Work(NamedTuple):
    """What a launch moves and computes: bytes of device memory and from L2, multiply-adds, lanes of instructions."""

    name: str
    memory: float
    l2: float
    products: float
    lanes: float
    multiprocessors: int = 132
    parts: float = 0.0  # that a cluster has, one after another
    of_part: float = PART  # seconds before its first tile

    def seconds(self, gpu: Gpu) -> tuple:
        """(time, what bounds it): resources are used at the same time, nothing is lost to latencies."""
        clocks = self.multiprocessors * CLOCK
        times = {"memory": self.memory / (gpu.bandwidth * gpu.copy_share), "L2": self.l2 / (clocks * L2_BYTES)}
        times |= {"products": self.products / (clocks * PRODUCTS), "instructions": self.lanes / (clocks * LANES)}
        bound = max(times, key=times.get)
        return times[bound] + self.parts * self.of_part, bound


def adapter_launches(problem, pass_: str) -> list:
    """The launches of `forward` or `backward` of a 16-bit adapter with frozen norms that clusters serve: at most 1024
    channels and a bottleneck of 64. Inputs come from L2 once; clusters of four leave four multiprocessors without work."""
    if problem.bottleneck > 64 or problem.channels > 1024:
        raise ValueError(f"no model of {problem.channels} channels and a bottleneck of {problem.bottleneck}")
    m, c, r, place = problem.batch * problem.length, problem.channels, problem.bottleneck, problem.place
    array, weight, product, inputs = 2 * m * c, 2 * r * c, m * c * r, 1 if place == "alone" else 2
    chunks, wide = -(-c // 256), max(32, -(-r // 16) * 16)
    clusters = 32
    parts = clusters
    if problem.adapters:  # which examples have in turn
        parts = problem.adapters * math.ceil(2 * clusters / problem.adapters)
    order = [Work("order of rows", 0, 0, 0, 0)] if problem.adapters else []
    blocks = dict(multiprocessors=4 * clusters, parts=parts / clusters)
    if pass_ == "forward":
        fixed, of_chunk = FORWARD[place]
        warps = m / 32 * 4 * 4 * (fixed + of_chunk * chunks) * BRANCHES
        moved = (inputs + 1) * array + 2 * weight * max(problem.adapters, 1)
        if problem.adapters and problem.length < 1024 and problem.batch <= FEW:
            blocks["of_part"] = PART + ORDER
        if problem.length >= 1024 or problem.batch <= FEW:
            order = []
        return [*order, Work("forward", moved, inputs * array + 2 * weight * parts, 2 * product, 32 * warps, **blocks)]
    norms = place != "alone"
    of_columns, of_sums = (a + b * chunks for a, b in (OF_COLUMNS, OF_SUMS))
    warps = 16 * ALL_WARPS[place][chunks > 3] + 8 * OF_ROW[place] + 4 * chunks * OF_CHANNELS
    warps += wide // 16 * (3 if norms else 2) * of_columns + norms * of_sums
    sums = 8 * r * c * parts  # float32, of both weights
    moved = (inputs + 2 + (place == "houlsby")) * array + sums
    work = Work("one pass", moved, moved, (5 + 2 * norms) * product, m / 32 * 4 * 32 * warps * BRANCHES, **blocks)
    return [*order, work, Work("sums of parts", 0, sums, 0, 0)]


def _predict_adapter(problem, pass_: str, gpu: Gpu = H200) -> Prediction:
    """Time of a pass of a 16-bit adapter with all its rows' and weights' gradients: the launches, one after another."""
    if pass_ == "step":
        forward, backward = (_predict_adapter(problem, name, gpu) for name in ("forward", "backward"))
        return Prediction(forward.seconds + backward.seconds, forward.floor + backward.floor, backward.bound, 1, 1.0)
    launches = adapter_launches(problem, pass_)
    times = [work.seconds(gpu) for work in launches]
    seconds = sum(time for time, _ in times) + gpu.launch * len(times)
    ceilings = Ceilings(gpu.flops[problem.dtype] * gpu.product_share, gpu.bandwidth * gpu.copy_share)
    filled = launches[0].multiprocessors / gpu.multiprocessors
    return Prediction(seconds, ceilings.floor(counts(problem, pass_)), max(times)[1], 1, filled)


def adapter_report(gpu: Gpu = H200) -> list:
    """Lines of Markdown: shares of the floor, of 65536 rows."""
    lines = [
        f"## Adapters in CUDA C++, predicted on an {gpu.name}",
        "",
        "65536 rows, bfloat16; microseconds, and the floor's share of them (each input read once, each output written once).",
        "Launches cost what device memory, L2, tensor cores or instructions need longest, 4 us, and 2 us before a part's",
        "first tile; latencies cost nothing.",
        "",
        "| place, channels, bottleneck | forward | share | bound | backward | share | bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for c, r in ((768, 48), (768, 64), (1024, 64)):
        for place in ("alone", "houlsby", "pfeiffer"):
            problem = adapters.Adapters("adapter", "", 128, 512, c, r, place, dtype="bfloat16")
            cells = []
            for pass_ in ("forward", "backward"):
                found = predict(problem, pass_, gpu)
                cells.append(f"{found.seconds * 1e6:.0f} | {found.floor / found.seconds:.0%} | {found.bound}")
            lines.append(f"| {place}, {c}, {r} | {' | '.join(cells)} |")
    return [*lines, ""]


def report(gpu: Gpu = H200) -> list:
    """Lines of Markdown: predicted times of the `gpu` preset, beside the newest measured ones on such a GPU."""
    from .registry import PRESETS

    measured_rows = {}
    for path in sorted(RESULTS.glob(f"*{gpu.name.lower().split()[0]}*/*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if row["kind"] == "mmkernels" and row["status"] == "ok":
                measured_rows[row["case"], row["candidate"]] = row
    shares = [f"{share:.0%}" for share in (gpu.product_share, gpu.copy_share, *LOOP_SHARE.values())]
    lines = [
        f"## Predicted times on an {gpu.name}",
        "",
        "By `bench/roofline.py`: operations of the cheapest plan, bytes read and written once, waves of thread blocks. The",
        f"floor allows {shares[0]} of the data sheet's product rate and {shares[1]} of its bandwidth. The prediction takes",
        f"{shares[2]} (backward {shares[3]}) of that rate for a full chip, and {INSTRUCTION_SHARE['mma.sync']:.0%} of it with",
        "`mma.sync` (the CUDA kernels, but for `latent_attention`). Spills are not in the model.",
        "`adapter_fusion`: its products at the reachable rate, plus the bytes of its kernel at that of a copy.",
        "",
        "| case | GFLOP | MB | floor ms | splits | filled | Triton ms (TFLOP/s) | CUDA ms (TFLOP/s) | measured Triton, CUDA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in PRESETS["gpu"]:
        if not isinstance(case.problem, Problem) and case.problem.op not in ("bottleneck_attention", "adapter_fusion"):
            continue  # mostly the library's work, or nothing but bytes
        counted = counts(case.problem, case.pass_)
        by_wgmma = case.problem.op == "latent_attention"
        triton = predict(case.problem, case.pass_, gpu, "wgmma")
        cuda = predict(case.problem, case.pass_, gpu, "wgmma" if by_wgmma else "mma.sync")
        times = [f"{p.seconds * 1e3:.3f} ({counted.operations / p.seconds * 1e-12:.0f})" for p in (triton, cuda)]
        seen = [measured_rows.get((case.id, f"mmkernels {name}")) for name in ("triton", "cuda")]
        told = [f"{row['ms']:.3f} ({row['tflops']:.0f})" if row else "–" for row in seen]
        lines.append(
            f"| {case.id} | {counted.operations / 1e9:.3g} | {counted.bytes / 1e6:.3g} | {triton.floor * 1e3:.3f} | "
            f"{triton.splits} | {triton.filled:.0%} | {times[0]} | {times[1]} | {', '.join(told)} |"
        )
    return [*lines, "", *adapter_report(gpu)]

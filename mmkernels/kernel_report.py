"""`python -m mmkernels kernel-report`: compiles every GPU kernel without a GPU and reads the machine code.

Registers, stack, shared memory, tensor-core, copy and spill instructions and the occupancy that follows, for each Triton
kernel (`report_cases()` of the families) and each CUDA kernel (`csrc/*/*_cuda.cu`) on each architecture. `ops/KERNELS.md`
and `ops/kernels.json` hold the last report, `ops/kernel_budgets.json` what a kernel may use: `--check` fails on the rest.
Triton kernels that the last report was made from, by the same compiler, are taken from it; without `kernels.json` all are
compiled.
"""

import argparse
import collections
import concurrent.futures
import fnmatch
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CSRC = PACKAGE.parent / "csrc"
REPORT, TABLE, BUDGETS = (PACKAGE / "ops" / name for name in ("kernels.json", "KERNELS.md", "kernel_budgets.json"))
WORKERS = 2

# What a multiprocessor has, by architecture: registers, threads, blocks, bytes of shared memory, and the most a block may
# ask for. (CUDA C++ programming guide, table of technical specifications.)
LIMITS = {
    80: {"registers": 65536, "threads": 2048, "blocks": 32, "shared": 164 * 1024, "block_shared": 163 * 1024},
    90: {"registers": 65536, "threads": 2048, "blocks": 32, "shared": 228 * 1024, "block_shared": 227 * 1024},
    100: {"registers": 65536, "threads": 2048, "blocks": 32, "shared": 228 * 1024, "block_shared": 227 * 1024},
}
# Tensor cores, asynchronous copies, loads for the tensor cores, and what spilling and arrays in local memory cost.
COUNTED = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "LDGSTS", "LDSM", "LDTM", "FFMA", "MUFU", "USETMAXREG", "LDL", "STL")
TENSOR = ("HGMMA", "UTCHMMA", "HMMA")


def add_commands(subparsers) -> None:
    """Adds the `kernel-report` command to the subparsers of `python -m mmkernels`."""
    parser = subparsers.add_parser("kernel-report", help="compile every kernel and read its code", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a kernel is over its budget")
    parser.add_argument("--write", action="store_true", help="write the report beside the ops")
    parser.add_argument("--arch", type=int, nargs="+", choices=tuple(LIMITS), default=list(LIMITS), metavar="SM")
    parser.add_argument("--kernel", default="*", help="only kernels whose name matches this pattern, as in 'triton/latent*'")
    parser.set_defaults(run=main)


def main(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 1 with --check and a violation, 2 when the tools are missing."""
    if importlib.util.find_spec("triton") is None:
        print("kernel-report: triton is not installed; it brings the disassembler as well", file=sys.stderr)
        return 2
    if arguments.write and (arguments.kernel != "*" or set(arguments.arch) != set(LIMITS)):
        print("kernel-report: --write needs all kernels and architectures; leave out --kernel and --arch", file=sys.stderr)
        return 2
    results, left_out = collect(arguments.arch, arguments.kernel, progress=lambda r: print(line(r), flush=True))
    for reason in left_out:
        print(f"left out: {reason}")
    if not results:
        print(f"kernel-report: no kernel matches {arguments.kernel!r}", file=sys.stderr)
        return 2
    if arguments.write:
        write(results, left_out)
        print(f"wrote {REPORT} and {TABLE}")
    if not arguments.check:
        return 0
    problems = violations(results, json.loads(BUDGETS.read_text()))
    if arguments.kernel == "*" and set(arguments.arch) == set(LIMITS) and not arguments.write:
        problems += outdated(results, left_out)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(results)} kernels, {len(problems)} violations")
    return 1 if problems else 0


# --- Compiling ------------------------------------------------------------------------------------------------------------


def collect(architectures, pattern="*", progress=lambda result: None):
    """(results, reasons why something was left out). A result is a dict, see `read_machine_code`; `progress` sees each."""
    results, left_out = [], []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=spawn, initializer=_compile_not_interpret) as pool:
        cases = pool.submit(_triton_cases).result()
        cubins, reason = _cuda_jobs(architectures, pattern)  # they take longest, and so go first
        jobs = [pool.submit(function, *arguments) for function, *arguments in cubins]
        for name, capability, family, index in cases:
            if capability in architectures and fnmatch.fnmatch(name, pattern):
                jobs.append(pool.submit(_triton_result, family, index))
        if reason:
            left_out.append(reason)
        try:
            for job in concurrent.futures.as_completed(jobs):
                for result in job.result():
                    if fnmatch.fnmatch(result["name"], pattern) and result["arch"] in architectures:
                        results.append(result)
                        progress(result)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(results, key=lambda r: (r["name"], r["arch"])), left_out


def _compile_not_interpret():
    """Runs first in a worker: `TRITON_INTERPRET` would turn every kernel of the process into an interpreted one."""
    os.environ.pop("TRITON_INTERPRET", None)


@functools.cache
def _report_cases(family: str) -> tuple:
    return tuple(importlib.import_module(f"mmkernels.ops.{family}.kernels").report_cases())


def _triton_cases() -> list:
    """(name, capability, family, index) of every case of every family."""
    families = sorted(path.parent.name for path in (PACKAGE / "ops").glob("*/kernels.py"))
    cases = []
    for family in families:
        if hasattr(importlib.import_module(f"mmkernels.ops.{family}.kernels"), "report_cases"):
            for index, case in enumerate(_report_cases(family)):
                cases.append((f"triton/{case.name}", case.capability, family, index))
    return cases


def _triton_result(family: str, index: int) -> list:
    return [triton_result(_report_cases(family)[index])]


def triton_result(case) -> dict:
    """Compiles a `ReportCase` and reads its code. What the report says of the same case by the same tools is taken from there,
    but for one case in sixteen, which is compiled all the same: it would show that the report is not what the tools make."""
    key = _triton_key(case)
    known = _committed().get((f"triton/{case.name}", case.capability), {})
    if known.get("key") == key and not key.startswith("0"):
        return known
    return _cached(lambda: _compile_triton(case), key)[0] | {"key": key}


def _triton_key(case) -> str:
    import triton

    facts = (case.kernel.cache_key, case.name, case.signature, sorted(case.constexprs.items(), key=str), case.options)
    return _key(triton.__version__, case.capability, *facts)


@functools.cache
def _committed() -> dict:
    """The report's rows by name and architecture."""
    try:
        return {(r["name"], r["arch"]): r for r in json.loads(REPORT.read_text())["kernels"]}
    except (OSError, ValueError):
        return {}


def _compile_triton(case) -> list:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for position, (name, kind) in enumerate(case.signature.items()):
        signature[name] = _plain_type(kind, (position,), attributes)
    source = ASTSource(case.kernel, signature, case.constexprs, attributes)
    head = {"name": f"triton/{case.name}", "arch": case.capability}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=case.options)
    except Exception as error:  # Triton raises many kinds; each means that the kernel does not build for this GPU
        lines = str(error).strip().splitlines()
        return [head | {"error": f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"}]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (facts,) = read_machine_code(cubin).values()
    facts["shared"] = compiled.metadata.shared
    facts["threads"] = facts["threads"] or 32 * case.options.get("num_warps", 4)  # more than asked for when warps specialise
    return [head | facts | {"blocks": resident_blocks(case.capability, facts)}]


def _plain_type(kind, path, attributes):
    """The Triton type; notes in `attributes` that pointers, and integers written "i32:16", are divisible by 16."""
    if isinstance(kind, tuple):
        return tuple(_plain_type(part, (*path, i), attributes) for i, part in enumerate(kind))
    name, _, divisor = kind.partition(":")
    if name.startswith("*") or divisor == "16":
        attributes[path] = [["tt.divisibility", 16]]
    return name


def _cuda_jobs(architectures, pattern):
    """(jobs that give the CUDA kernels' results, why there are none)."""
    sources = sorted(CSRC.glob("*/*_cuda.cu"))
    backend, slash, _ = pattern.partition("/")
    if slash and not fnmatch.fnmatch("cuda", backend):
        return [], ""
    if not sources:
        return [], "CUDA kernels: their sources are not part of an installed package"
    library = PACKAGE / "_C_cuda.so"
    read = [path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".h")]
    if library.is_file() and library.stat().st_mtime > max(path.stat().st_mtime for path in read):
        return [(_library_results, str(library), arch) for arch in architectures], ""
    nvcc = _nvcc()
    if not nvcc:
        return [], f"CUDA kernels: nvcc was not found, and {library.name} is missing or older than its sources"
    digests = {source: _digest_with_headers(source) for source in sources}
    return [(_source_results, nvcc, str(source), arch, digests[source]) for source in sources for arch in architectures], ""


def _digest_with_headers(source: Path) -> str:
    """Of a CUDA file and of the headers that it includes, which its kernels depend on alone."""
    read, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path not in read:
            read.add(path)
            waiting += [CSRC / name for name in re.findall(r'^#include "(.+)"', path.read_text(), re.M)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(read))).hexdigest()


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")


def _source_results(nvcc: str, source: str, arch: int, digest: str) -> list:
    """Kernels of one CUDA file, compiled as setup.py does."""
    file, target = Path(source).name, "90a" if arch == 90 else str(arch)
    ptx = target if "_hopper_" in file and arch == 90 else "90" if "_cluster_" in file and arch >= 90 else "80"
    command = [nvcc, "-std=c++20", "-O3", f"-I{CSRC}", "-cubin", "-gencode", f"arch=compute_{ptx},code=sm_{target}"]

    def compile():
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            process = subprocess.run([*command, source, "-o", str(cubin)], capture_output=True, text=True)
            if process.returncode:
                errors = [text for text in process.stderr.splitlines() if "error" in text] or [process.stderr[-300:]]
                return [{"name": f"cuda/{Path(source).name}", "arch": arch, "error": errors[0]}]
            return _cuda_results(cubin, arch)

    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return _cached(compile, _key(version, source, command[-1], digest))


def _library_results(library: str, arch: int) -> list:
    """Kernels of the built library for one architecture."""

    def read():
        results = []
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([_tool("cuobjdump"), "-xelf", f"sm_{arch}", library], cwd=folder, check=True, capture_output=True)
            for cubin in sorted(Path(folder).glob("*.cubin")):
                results += _cuda_results(cubin, arch)
        return results

    return _cached(read, _key(hashlib.sha256(Path(library).read_bytes()).hexdigest(), arch))


def _cuda_results(cubin: Path, arch: int) -> list:
    results = []
    for symbol, facts in read_machine_code(cubin).items():
        # Dynamic shared memory is chosen at launch, within what the device has; the cubin does not know it.
        facts["shared"] = None
        results.append(
            {"name": f"cuda/{kernel_name(symbol)}", "arch": arch} | facts | {"blocks": resident_blocks(arch, facts)}
        )
    return results


def kernel_name(symbol: str) -> str:
    """A mangled kernel name as `family/kernel<type, numbers>`."""
    name = symbol
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", symbol], capture_output=True, text=True).stdout.strip()
    name = name.partition(" [clone")[0].removeprefix("void ")
    depth, end = 0, len(name)
    for i, character in enumerate(name):  # the argument list begins at the first bracket outside of <> and not a namespace
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0 and not name.startswith("(anonymous namespace)", i):
            end = i
            break
    name = name[:end].replace("(anonymous namespace)::", "").replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    name = re.sub(r"mmk::(\w+)::", r"\1/", name, count=1)
    name = re.sub(r"mmk::(\w+::)?", "", name)
    return re.sub(r"\((\w|::)+\)", "", name).replace(" ", "").replace(",", ", ")


# --- Reading machine code -----------------------------------------------------------------------------------------------


@functools.cache
def _tool(name: str) -> str:
    """cuobjdump: the one of Triton's wheel, else of the CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    if not found:
        raise RuntimeError(f"{name} is neither in Triton's package nor on PATH")
    return found


def _dump(cubin: Path, option: str) -> str:
    return subprocess.run([_tool("cuobjdump"), option, str(cubin)], capture_output=True, text=True, check=True).stdout


def read_machine_code(cubin: Path) -> dict:
    """Kernel symbol -> registers, stack (bytes a thread), static_shared, threads (bound, or None), instructions, counts."""
    kernels = {}
    for symbol, registers, stack, shared in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", _dump(cubin, "--dump-resource-usage")
    ):
        kernels[symbol] = {"registers": int(registers), "stack": int(stack), "static_shared": int(shared), "threads": None}
    for part in re.split(r"^\s*Function : ", _dump(cubin, "--dump-sass"), flags=re.M)[1:]:
        symbol = part.split(maxsplit=1)[0]
        opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", part, re.M)
        counts = collections.Counter(opcodes)
        kernels[symbol]["instructions"] = len(opcodes)
        kernels[symbol]["counts"] = {name: counts[name] for name in COUNTED if counts[name]}
    for symbol, text in re.findall(r"^\.nv\.info\.(\S+)$(.*?)(?=^\.\S|\Z)", _dump(cubin, "--dump-elf"), re.M | re.S):
        bound = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\S+\s+Value:\s+(\S+) (\S+) (\S+)", text)
        if bound and symbol in kernels:
            x, y, z = (int(value, 16) for value in bound.groups())
            kernels[symbol]["threads"] = x * y * z
    return kernels


def resident_blocks(arch: int, facts: dict) -> int | None:
    """Thread blocks that a multiprocessor holds at a time; None where the number of threads is not known."""
    limits, threads = LIMITS[arch], facts["threads"]
    if threads is None:
        return None
    warps = -(-threads // 32)
    registers = -(-facts["registers"] * 32 // 256) * 256 * warps  # given to a warp in units of 256
    shared = (facts["shared"] or 0) + 1024  # the system's share of each block
    return min(
        limits["blocks"], limits["threads"] // (32 * warps), limits["registers"] // registers, limits["shared"] // shared
    )


def _key(*facts) -> str:
    """Of what a result depends on, how the code is read included."""
    reader = [inspect.getsource(function) for function in (read_machine_code, resident_blocks, _cuda_results, _compile_triton)]
    return hashlib.sha256(repr((COUNTED, LIMITS, *reader, *facts)).encode()).hexdigest()[:20]


def _cached(compute, key):
    """`compute()`, or what it gave before for the same key; only successes are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmkernels" / "kernel-report"
    path = root / key
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        results = compute()
    if not any("error" in result for result in results):
        try:
            root.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(results))
            os.replace(temporary, path)
        except OSError:
            pass  # a read-only home costs time, nothing else
    return results


# --- Judging --------------------------------------------------------------------------------------------------------------


def budget_of(result: dict, budgets: dict) -> dict:
    """The default budget with every rule that matches the kernel laid over it, in their order."""
    budget = dict(budgets["default"])
    for rule in budgets["rules"]:
        if fnmatch.fnmatch(result["name"], rule["kernel"]) and result["arch"] in rule.get("arch", LIMITS):
            budget |= {key: value for key, value in rule.items() if key not in ("kernel", "arch", "why")}
    return budget


def violations(results: list, budgets: dict) -> list:
    """A sentence for each way in which a kernel is over its budget."""
    sentences = []
    for result in results:
        who = f"{result['name']} on sm_{result['arch']}"
        if "error" in result:
            sentences.append(f"{who}: does not compile: {result['error']}")
            continue
        budget, counts = budget_of(result, budgets), result["counts"]
        if result["stack"] > budget["stack"]:
            sentences.append(f"{who}: {result['stack']} bytes of stack (spills), the budget is {budget['stack']}")
        spills = counts.get("LDL", 0) + counts.get("STL", 0)
        if spills > budget["local"]:
            sentences.append(f"{who}: {spills} loads and stores of local memory, the budget is {budget['local']}")
        limit = LIMITS[result["arch"]]["block_shared"]
        if (result["shared"] or 0) > limit:
            sentences.append(f"{who}: {result['shared']} bytes of shared memory, a block may have {limit}")
        allowed = budget["tensor_core"] and budget["tensor_core"][str(result["arch"])]
        if allowed and not any(counts.get(name) for name in allowed):
            sentences.append(f"{who}: no tensor-core instruction ({' or '.join(allowed)})")
        if result["blocks"] == 0:
            sentences.append(f"{who}: a multiprocessor cannot hold one block of {result['threads']} threads")
    return sentences


def outdated(results: list, left_out: list) -> list:
    """A sentence where the committed report says something else of kernels that the same tools compiled."""
    try:
        committed = json.loads(REPORT.read_text())
    except (OSError, ValueError):
        return [f"{REPORT.name} is missing: python -m mmkernels kernel-report --write"]
    now, then = ({(r["name"], r["arch"]): r for r in rows} for rows in (results, committed["kernels"]))
    if left_out:
        then = {key: r for key, r in then.items() if key[0].startswith("triton/")}
    sentences = []
    for what, names in (("lacks", now.keys() - then.keys()), ("still lists", then.keys() - now.keys())):
        if names:
            some = ", ".join(f"{name} (sm_{arch})" for name, arch in sorted(names)[:5])
            sentences.append(f"{REPORT.name} {what} {len(names)} kernels, among them {some}: kernel-report --write")
    if committed["tools"] == tools():
        changed = sorted(which for which in now.keys() & then.keys() if _code(now[which]) != _code(then[which]))
        if changed:
            some = ", ".join(f"{name} (sm_{arch})" for name, arch in changed[:5])
            sentences.append(
                f"{REPORT.name} is of older code for {len(changed)} kernels, among them {some}: kernel-report --write"
            )
    return sentences


def _code(result: dict) -> dict:
    """What is known of the code; lines that have moved make another key for the same code."""
    return {name: value for name, value in result.items() if name != "key"}


# --- Writing --------------------------------------------------------------------------------------------------------------


def tools() -> dict:
    """Versions that the machine code depends on."""
    import triton

    nvcc = _nvcc()
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    release = re.search(r"release [\d.]+, V([\d.]+)", output)
    return {"triton": triton.__version__, "nvcc": release[1] if release else None}


def line(result: dict) -> str:
    """One kernel in a line of the terminal."""
    return f"{result['name']:64} sm_{result['arch']:<4}{cell(result)}"


def cell(result: dict) -> str:
    """What a table says of a kernel on an architecture."""
    if "error" in result:
        return result["error"]
    counts = result["counts"]
    parts = [f"{result['registers']} reg"]
    if result["stack"]:
        parts.append(f"stack {result['stack']}")
    spills = counts.get("LDL", 0) + counts.get("STL", 0)
    if spills:
        parts.append(f"{spills} local")
    if result["shared"]:
        parts.append(f"{result['shared'] / 1024:.0f} KB")
    if result["blocks"] is not None:
        parts.append(f"{result['blocks']}×{result['threads']}")
    parts += [f"{counts[name]} {name}" for name in (*TENSOR, "UTMALDG", "LDGSTS") if name in counts]
    return ", ".join(parts)


def write(results: list, left_out: list) -> None:
    """The machine-readable report and its table."""
    report = {"tools": tools(), "left_out": left_out, "kernels": results}
    kernels = ",\n".join(json.dumps(result) for result in results)
    head = json.dumps({"tools": report["tools"], "left_out": left_out}, indent=1).removesuffix("\n}")
    _replace(REPORT, f'{head},\n "kernels": [\n{kernels}\n]}}\n')
    _replace(TABLE, table(report))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def table(report: dict) -> str:
    """KERNELS.md."""
    versions = ", ".join(f"{name} {version}" for name, version in report["tools"].items() if version)
    rows = {}
    for result in report["kernels"]:
        rows.setdefault(result["name"], {})[result["arch"]] = cell(result)
    lines = [
        "# Every GPU kernel, read off its machine code",
        "",
        f"Written by `python -m mmkernels kernel-report --write` ({versions}); do not edit. `kernels.json` beside this",
        "file has every number, `kernel_budgets.json` the budgets that `--check` enforces.",
        "",
        "A cell: registers a thread; bytes of stack, and loads and stores of local memory, where there are any (spills);",
        "dynamic shared memory (of CUDA kernels the launcher chooses it, within what the device has); resident blocks of a",
        "multiprocessor × threads of a block (for CUDA kernels by registers and threads alone); tensor-core instructions",
        "(HMMA `mma.sync`, HGMMA `wgmma`, UTCHMMA `tcgen05`); asynchronous copies (LDGSTS `cp.async`, UTMALDG TMA).",
        "",
        "| kernel | " + " | ".join(f"sm_{arch}" for arch in LIMITS) + " |",
        "|---|" + "---|" * len(LIMITS),
    ]
    for name, cells in rows.items():
        lines.append(f"| `{name}` | " + " | ".join(cells.get(arch, "–") for arch in LIMITS) + " |")
    lines += [f"\nLeft out: {reason}." for reason in report["left_out"]]
    return "\n".join([*lines, "", *_predictions()])


def _predictions() -> list:
    """Predicted times beside measured ones, by bench/roofline.py; nothing where the source tree is not there."""
    if importlib.util.find_spec("bench") is None:
        return []
    roofline = importlib.import_module("bench.roofline")
    return roofline.report()

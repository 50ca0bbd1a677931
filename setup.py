"""Builds the native libraries beside the Python package, with ninja and without asking pip for anything.

    _C_cpu.so       op schemas and CPU kernels      csrc/library.cpp, csrc/*/*_cpu.cpp, csrc/*/*_simd.cpp
    _C_cuda.so      CUDA kernels                    csrc/*/*_cuda.cu, csrc/*/*_cuda.cpp
    _C_emulator.so  the CUDA kernels on a CPU       the same files and csrc/emulator/*.cpp, all as C++
    _C_info.*.so    pybind11 module, no torch       csrc/info.cpp

The first three use torch's stable ABI and no Python symbols: one build serves every torch from 2.10 on and every Python.
What cannot be built is left out; `mmkernels/_build.json` says why, and `python -m mmkernels info` shows it. The knobs are
in the README.
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH, TORCH_TARGET = (2, 10), "0x020a000000000000"
OLDEST_NVCC = (12, 0)  # the first one with C++20
CUDA_ARCHS = "80;90a;100"


class Unavailable(Exception):
    """A library cannot be built here; the message says why."""


# --- What is there -------------------------------------------------------------------------------------------------------


@functools.cache
def torch_folder() -> Path:
    """The installed torch, found without importing it (seconds, and it may be broken)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("torch was not found while building (pip hides it unless called with --no-build-isolation)")
    if version_tuple(torch_version()) < OLDEST_TORCH:
        raise Unavailable(f"torch {torch_version()} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    return Path(spec.submodule_search_locations[0])


def torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_tuple(version: str) -> tuple:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@functools.cache
def compiler() -> str:
    """The C++ compiler: CXX, or the first of c++, g++, clang++ on PATH."""
    if sys.platform == "win32":
        raise Unavailable("the native libraries are built on Linux and macOS only")
    wish = os.environ.get("CXX")
    for name in [wish] if wish else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise Unavailable(f"CXX is {wish!r}, which is not on PATH" if wish else "no C++ compiler (c++, g++, clang++) is on PATH")


@functools.cache
def ninja() -> str:
    try:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            raise Unavailable("ninja is not installed (pip install ninja)") from None
        return found


@functools.cache
def nvcc() -> Path:
    """The compiler of CUDA_HOME, or the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    found = Path(home) / "bin/nvcc" if home else shutil.which("nvcc")
    if home and not found.is_file():
        raise Unavailable(f"CUDA_HOME is {home!r}, which holds no bin/nvcc")
    if not found:
        raise Unavailable("nvcc is not on PATH and CUDA_HOME is not set")
    return Path(found)


def cuda_home() -> Path:
    """The toolkit of `nvcc`, as it says itself: the file on PATH may be a wrapper somewhere else."""
    process = subprocess.run([nvcc(), "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", process.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else nvcc().resolve().parent.parent


def output_of(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True).stdout


def compiler_version() -> str:
    return output_of(*shlex.split(compiler()), "--version").partition("\n")[0]


def quote(path) -> str:
    return shlex.quote(str(path))


def cuda_archs() -> tuple:
    """(architectures that this nvcc can compile for, {architecture: why it is left out})."""
    known = {int(number) for number in re.findall(r"sm_(\d+)", output_of(nvcc(), "--list-gpu-code"))}
    archs, left_out = [], {}
    for arch in filter(None, re.split(r"[;, ]+", os.environ.get("MMKERNELS_CUDA_ARCHS", CUDA_ARCHS))):
        match = re.fullmatch(r"(\d+)[af]?", arch)
        if not match:
            raise SystemExit(f"MMKERNELS_CUDA_ARCHS has {arch!r}; allowed are numbers such as {CUDA_ARCHS}")
        if int(match[1]) in known:
            archs.append(arch)
        else:
            left_out[f"sm_{arch}"] = "this nvcc does not know it"
    if not archs:
        raise Unavailable(f"this nvcc knows none of {', '.join(left_out)}")
    return archs, left_out


def cuda_targets(file: str, archs) -> str:
    """nvcc's flags for the GPUs of `archs`, and for newer ones.

    PTX takes as long to make as a GPU's machine code, so that of the oldest GPU serves all. Kernels for clusters need that of
    9.0 at least, and Hopper's have instructions of sm_90a.
    """
    numbers = {arch: int(re.match(r"\d+", arch)[0]) for arch in archs}

    def oldest(number):
        return min(n for n in numbers.values() if "_cluster_" not in file or (n >= 90) == (number >= 90))

    targets = []
    for arch, number in numbers.items():
        ptx = arch if "_hopper_" in file and number == 90 else oldest(number)
        targets.append(f"-gencode arch=compute_{ptx},code=sm_{arch}")
    ptx = oldest(max(numbers.values()))
    return " ".join([*targets, f"-gencode arch=compute_{ptx},code=compute_{ptx}"])


def sources(*patterns) -> list:
    return sorted({str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)})


# --- What to build: each plan fills the library's Graph and returns its facts, or raises Unavailable ---------------------


class Graph:
    """The build.ninja of one library. Paths inside are relative to the repository, so that none of this machine's gets
    into the library."""

    def __init__(self, name: str):
        self.name, self.folder = name, Path("build/native") / name
        self.lines = ["ninja_required_version = 1.5", f"builddir = {self.folder}"]
        self.rule("cxx", f"{compiler()} $flags -MD -MF $out.d -c $in -o $out", depfile=True)
        self.rule("link", f"{compiler()} -shared -o $out $in $flags")

    def rule(self, name, command, depfile=False):
        self.lines += [f"rule {name}", f"  command = {command}", "  description = $out"]
        if depfile:  # what makes the build incremental: an edited header rebuilds whatever includes it
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def add(self, rule, output, inputs, flags, implicit=()):
        """One step; `implicit` are inputs that are not on the command line."""
        self.lines += [f"build {output}: {rule} {' '.join(map(str, inputs))} | {' '.join(map(str, implicit))}"]
        self.lines += [f"  flags = {flags}"]
        return output

    def objects(self, files, flags, rule="cxx", tag=""):
        return [self.add(rule, self.folder / f"{file}{tag}.o", [file], flags) for file in files]

    def link(self, objects, flags, implicit=()):
        self.add("link", self.folder / library_name(self.name), objects, flags, implicit)

    def run(self) -> str:
        """Builds. Returns an empty string, or the first error of a compiler after printing all of its output."""
        script = ROOT / self.folder / "build.ninja"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text("\n".join(self.lines) + "\n")
        command = [ninja(), "-f", str(self.folder / "build.ninja"), "-j", str(jobs())]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
        if process.wait() == 0:
            return ""
        errors = re.compile(r"error\b(?!: ld returned)|undefined|cannot find", re.IGNORECASE)
        return next(filter(errors.search, lines), lines[-1] if lines else "ninja failed")


def torch_flags() -> str:
    # Hidden, because torch loads libraries with RTLD_GLOBAL, and the CUDA library and its emulator hold the same names.
    return (
        "-std=c++20 -fPIC -Wall -fvisibility=hidden -Icsrc "
        f"-isystem {quote(torch_folder() / 'include')} -DTORCH_TARGET_VERSION={TORCH_TARGET}"
    )


def torch_libraries() -> str:
    complete = "-Wl,--no-undefined " if sys.platform == "linux" else ""
    return f"{complete}-L{quote(torch_folder() / 'lib')} -lc10 -ltorch_cpu"


def plan_cpu(graph):
    flags = f"{torch_flags()} -O3"
    isas = {"base": ""}
    if platform.machine() in ("x86_64", "AMD64"):
        isas |= {"v3": "-march=x86-64-v3", "v4": "-march=x86-64-v4"}
    objects = graph.objects(sources("csrc/library.cpp", "csrc/*/*_cpu.cpp"), flags)
    # From narrow to wide: of an inline function that several objects hold the linker keeps the first copy, and code that
    # runs on every CPU must not end up with one that was compiled for AVX.
    for isa, march in isas.items():
        objects += graph.objects(sources("csrc/*/*_simd.cpp"), f"{flags} {march} -DMMK_ISA={isa}", tag=f".{isa}")
    graph.link(objects, torch_libraries())
    return {"compiler": compiler_version(), "isas": list(isas)}


def plan_cuda(graph):
    if sys.platform != "linux":
        raise Unavailable("the CUDA library is built on Linux only")
    release = re.search(r"release (\d+\.\d+)", output_of(nvcc(), "--version"))
    if not release or version_tuple(release[1]) < OLDEST_NVCC:
        raise Unavailable(f"nvcc {release[1] if release else 'of unknown version'} is older than 12.0")
    cuda, (archs, left_out) = cuda_home(), cuda_archs()
    graph.rule(
        "nvcc", f"{quote(nvcc())} -ccbin {shlex.split(compiler())[-1]} $flags -MD -MF $out.d -c $in -o $out", depfile=True
    )
    flags, objects = "-std=c++20 -O3 -Icsrc -Xcompiler -fPIC,-fvisibility=hidden", []
    for file in sources("csrc/*/*_cuda.cu"):
        objects += graph.objects([file], f"{flags} {cuda_targets(file, archs)}", rule="nvcc")
    bindings = f"{torch_flags()} -O2 -DUSE_CUDA -isystem {quote(cuda / 'include')}"
    objects += graph.objects(sources("csrc/*/*_cuda.cpp"), bindings)
    folder, stubs = torch_folder() / "lib", []
    if not (folder / "libtorch_cuda.so").is_file():
        # A torch without CUDA: empty libraries under the two names that the loader finds in a torch with it.
        folder = graph.folder / "stubs"
        graph.rule("stub", f"echo | {compiler()} -shared -fPIC -x c++ - -o $out $flags")
        for name in ("libc10_cuda.so", "libtorch_cuda.so"):
            stubs.append(graph.add("stub", folder / name, [], f"-Wl,-soname,{name}"))
    graph.link(
        objects,
        f"-L{quote(torch_folder() / 'lib')} -lc10 -ltorch_cpu "
        f"-L{quote(folder)} -Wl,--no-as-needed -lc10_cuda -ltorch_cuda -Wl,--as-needed "
        f"-L{quote(cuda / 'lib64')} -lcudart_static -ldl -lrt -lpthread",
        implicit=stubs,
    )
    oldest = min((re.match(r"\d+", arch)[0] for arch in archs), key=int)
    facts = {"compiler": f"nvcc {release[1]}", "archs": [f"sm_{arch}" for arch in archs], "ptx": f"compute_{oldest}"}
    return facts | ({"left_out": left_out} if left_out else {})


def plan_emulator(graph):
    flags = f"{torch_flags()} -O2 -Wno-unknown-pragmas -DMMK_EMULATOR"
    objects = graph.objects(sources("csrc/*/*_cuda.cu"), f"{flags} -x c++")
    objects += graph.objects(sources("csrc/*/*_cuda.cpp", "csrc/emulator/*.cpp"), flags)
    graph.link(objects, torch_libraries())
    return {"compiler": compiler_version()}


def plan_info(graph):
    if importlib.util.find_spec("pybind11") is None:
        raise Unavailable("pybind11 is not installed (pip install pybind11)")
    import pybind11

    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        raise Unavailable(f"this Python has no headers: {headers / 'Python.h'} is missing")
    include = f"-isystem {quote(pybind11.get_include())} -isystem {quote(headers)}"
    abi = sysconfig.get_config_var("SOABI")  # objects of other Pythons may lie beside these
    objects = graph.objects(
        ["csrc/info.cpp"], f"-std=c++20 -O2 -fPIC -Wall -fvisibility=hidden -Icsrc {include}", tag=f".{abi}"
    )
    # The interpreter that loads a module brings Python's symbols; macOS wants that said.
    graph.link(objects, "-undefined dynamic_lookup" if sys.platform == "darwin" else "")
    return {"compiler": compiler_version(), "python": abi}


# name -> (how, the knob that decides, its default; None: there is none)
LIBRARIES = {
    "cpu": (plan_cpu, "MMKERNELS_BUILD_CPU", "auto"),
    "cuda": (plan_cuda, "MMKERNELS_BUILD_CUDA", "auto"),
    "emulator": (plan_emulator, "MMKERNELS_BUILD_EMULATOR", "0"),
    "info": (plan_info, None, "auto"),
}


def library_name(name: str) -> str:
    return f"_C_{name}" + (sysconfig.get_config_var("EXT_SUFFIX") if name == "info" else ".so")


# --- Building ------------------------------------------------------------------------------------------------------------


def jobs() -> int:
    """MAX_JOBS, or one process per core and per 2 GB of free memory: a compiler that swaps helps nobody."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free_kib = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return cores
    return max(1, min(cores, free_kib // (2 * 1024**2)))


def build(name: str) -> dict:
    """Builds one library under build/native and returns its facts. Ends the build where leaving it out is not allowed:
    it was asked for, or it is the CPU library and a compiler is there but fails."""
    plan, knob, default = LIBRARIES[name]
    wish = os.environ.get(knob, default) if knob else default
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"{knob} is {wish!r}; allowed are 0, 1 and auto")
    if wish == "0":
        return {"built": False, "why": f"{knob} is 0"}
    try:
        if name != "info":
            torch_folder()
        graph = Graph(name)
        facts = plan(graph)
        ninja()
    except Unavailable as reason:
        if wish == "1":
            raise SystemExit(f"{knob} is 1, but {reason}") from None
        return {"built": False, "why": str(reason)}
    error = graph.run()
    if not error:
        return {"built": True} | facts
    if wish == "1" or name == "cpu":
        raise SystemExit(f"the {name} library does not compile: {error}")
    return {"built": False, "why": f"it does not compile: {error}"} | facts


def replace_file(target: Path, data: bytes) -> None:
    """Atomically, as a new file: a process that has the old library open keeps it."""
    temporary = target.with_name(target.name + ".new")
    temporary.write_bytes(data)
    temporary.replace(target)


class BuildLibraries(build_ext):
    """Builds every library, puts them and _build.json into the package, and removes what an earlier build left there."""

    facts = {}

    def run(self):
        package = ROOT / "mmkernels" if self.inplace else Path(self.build_lib) / "mmkernels"
        package.mkdir(parents=True, exist_ok=True)
        for name in LIBRARIES:
            self.facts[name] = build(name)
            target = package / library_name(name)
            if self.facts[name]["built"]:
                replace_file(target, (ROOT / "build/native" / name / target.name).read_bytes())
            else:
                target.unlink(missing_ok=True)
        record = {"platform": platform.platform(), "torch": torch_version() or None, **self.facts}
        replace_file(package / "_build.json", json.dumps(record, indent=2).encode() + b"\n")
        left_out = {name: facts["why"] for name, facts in self.facts.items() if not facts["built"]}
        if len(left_out) == len(LIBRARIES):
            left_out = {"native": left_out["cpu"]}
        for name, why in left_out.items():
            print(f"mmkernels: built without the {name} library: {why}", file=sys.stderr)

    # The libraries are no extensions of setuptools' kind: it has nothing to copy, list or look for.
    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class Wheel(bdist_wheel):
    """Tagged py3-none-<platform>: the libraries serve every Python. _C_info is made for one, which its file name says: the
    others do not see it and do without."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        native = any(facts["built"] for facts in BuildLibraries.facts.values())
        return "py3", "none", super().get_tag()[2] if native else "any"


class Sources(sdist):
    """With what the package is built and tested from, beside what setuptools finds by itself."""

    def make_distribution(self):
        for folder in ("csrc", "tests", "bench", ".ci"):
            files = (
                path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so", ".o")
            )
            self.filelist.extend(str(path.relative_to(ROOT)) for path in files)
        super().make_distribution()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("mmkernels._C", [])],  # a placeholder that makes setuptools call build_ext
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel, "sdist": Sources},
    )

"""setup.py on a small tree of its own: what it builds, rebuilds, leaves out and refuses, and what it says."""

import ctypes
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPORT = '#define EXPORT extern "C" __attribute__((visibility("default")))\n'
# Not inlined, so that every object brings a copy of its own and the linker keeps one: the trap of one file compiled for
# several instruction sets.
VECTOR_WIDTH = """
__attribute__((noinline)) inline int vector_width() {
#if defined(__AVX512F__)
  return 16;
#elif defined(__AVX2__)
  return 8;
#else
  return 4;
#endif
}
"""
SOURCES = {
    "csrc/library.cpp": EXPORT + "EXPORT int answer() { return 42; }\n",
    "csrc/common/width.h": VECTOR_WIDTH,
    "csrc/one/one_cpu.cpp": '#include "common/width.h"\n'
    + EXPORT
    + "EXPORT int width_on_any_cpu() { return vector_width(); }\n",
    "csrc/one/one_simd.cpp": '#include "common/width.h"\nnamespace MMK_ISA { int width() { return vector_width(); } }\n',
    "csrc/two/two_cpu.cpp": "int unrelated = 1;\n",
    "csrc/one/one_cuda.cu": "int kernel = 1;\n",
    "csrc/one/one_cuda.cpp": "int binding = 1;\n",
    "csrc/emulator/emulator.cpp": "int emulator = 1;\n",
}
# Answers as nvcc does, and compiles with the C++ compiler.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  *--list-gpu-code*) echo sm_80; echo sm_90 ;;
  *--dryrun*) echo '#$ TOP={home}' >&2 ;;
  *) {compile} ;;
esac
"""
NO_NATIVE = dict(MMKERNELS_BUILD_CPU="0", MMKERNELS_BUILD_CUDA="0")


@pytest.fixture
def tree(tmp_path):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in SOURCES.items() | {("README.md", ""), ("mmkernels/__init__.py", "")}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def build(tree, **knobs):
    """Runs the build in place; the knobs of the surrounding run do not count."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MMKERNELS_") and name != "CUDA_HOME"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=kept | knobs, capture_output=True, text=True)


def built(tree, **knobs):
    """Builds, and returns the recorded facts."""
    process = build(tree, **knobs)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads((tree / "mmkernels/_build.json").read_text())


def fake_cuda(tree, compile):
    home = tree / "cuda"
    for folder in ("bin", "lib64", "include"):
        (home / folder).mkdir(parents=True)
    (home / "bin/nvcc").write_text(FAKE_NVCC.format(home=home, compile=compile))
    (home / "bin/nvcc").chmod(stat.S_IRWXU)
    subprocess.run(["ar", "rcs", home / "lib64/libcudart_static.a"], check=True)
    return str(home)


COMPILES = 'while [ $# -gt 3 ]; do shift; done; touch "$3.d"; exec c++ -x c++ -fPIC -c "$1" -o "$3"'
FAILS = "echo 'one_cuda.cu(1): error: no such thing' >&2; exit 2"


def test_facts_and_result(tree):
    facts = built(tree, MMKERNELS_BUILD_CUDA="0")
    assert facts["cpu"]["built"] and "base" in facts["cpu"]["isas"]
    assert facts["cuda"] == {"built": False, "why": "MMKERNELS_BUILD_CUDA is 0"}
    assert facts["emulator"] == {"built": False, "why": "MMKERNELS_BUILD_EMULATOR is 0"}
    library = ctypes.CDLL(str(tree / "mmkernels/_C_cpu.so"))
    assert library.answer() == 42


def test_code_for_every_cpu_keeps_its_own_inline_functions(tree):
    built(tree, MMKERNELS_BUILD_CUDA="0")
    assert ctypes.CDLL(str(tree / "mmkernels/_C_cpu.so")).width_on_any_cpu() == 4


def test_an_edited_header_rebuilds_what_includes_it(tree):
    built(tree, MMKERNELS_BUILD_CUDA="0")

    def times():
        return {path.name: path.stat().st_mtime_ns for path in (tree / "build/native/cpu").rglob("*.o")}

    before = times()
    built(tree, MMKERNELS_BUILD_CUDA="0")
    assert times() == before
    header = tree / "csrc/common/width.h"
    header.write_text(header.read_text() + "// edited\n")
    built(tree, MMKERNELS_BUILD_CUDA="0")
    changed = {name for name, time in times().items() if time != before[name]}
    assert changed == {name for name in before if name.startswith("one_")} and len(changed) >= 2


def test_what_an_earlier_build_left_is_removed(tree):
    assert built(tree, MMKERNELS_BUILD_CPU="0", MMKERNELS_BUILD_CUDA="0", MMKERNELS_BUILD_EMULATOR="1")["emulator"]["built"]
    assert (tree / "mmkernels/_C_emulator.so").is_file()
    assert not built(tree, **NO_NATIVE)["emulator"]["built"]
    assert not list((tree / "mmkernels").glob("_C_[ce]*.so"))


def test_broken_cpu_code_ends_the_build_with_the_compilers_error(tree):
    (tree / "csrc/two/two_cpu.cpp").write_text("int broken = nonsense;\n")
    process = build(tree, MMKERNELS_BUILD_CUDA="0")
    assert process.returncode != 0
    assert "nonsense" in process.stdout and "the cpu library does not compile" in process.stderr
    assert not (tree / "mmkernels/_C_cpu.so").exists()


def test_without_a_compiler(tree):
    assert built(tree, PATH="")["cpu"]["why"] == "no C++ compiler (c++, g++, clang++) is on PATH"
    process = build(tree, PATH="", MMKERNELS_BUILD_CPU="1")
    assert process.returncode != 0 and "MMKERNELS_BUILD_CPU is 1, but no C++ compiler" in process.stderr


@pytest.mark.parametrize(("version", "why"), [(None, "torch was not found while building"), ("2.9.1", "torch 2.9.1 is older")])
def test_without_a_fitting_torch(tree, version, why):
    # sitecustomize runs first in every interpreter: it hides torch from the build, or makes it look old.
    (tree / "site").mkdir()
    (tree / "site/sitecustomize.py").write_text(
        "import importlib.metadata, importlib.util\n"
        "find, version = importlib.util.find_spec, importlib.metadata.version\n"
        + (
            f"importlib.metadata.version = lambda name: {version!r} if name == 'torch' else version(name)\n"
            if version
            else "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        )
    )
    process = build(tree, PYTHONPATH=str(tree / "site"), MMKERNELS_BUILD_EMULATOR="auto")
    assert process.returncode == 0, process.stderr
    facts = json.loads((tree / "mmkernels/_build.json").read_text())
    for name in ("cpu", "cuda", "emulator"):
        assert why in facts[name]["why"]
    assert why in process.stderr


def test_the_python_package_alone_is_one_line(tree):
    process = build(tree, PATH="", CXX="")
    assert process.returncode == 0 and not list((tree / "mmkernels").glob("_C_*"))
    assert process.stderr == "mmkernels: built without the native library: no C++ compiler (c++, g++, clang++) is on PATH\n"


def test_cuda_library_for_the_architectures_that_nvcc_knows(tree):
    for kind in ("hopper", "cluster"):
        (tree / f"csrc/one/one_{kind}_cuda.cu").write_text(f"int {kind} = 1;\n")
    facts = built(tree, MMKERNELS_BUILD_CPU="0", CUDA_HOME=fake_cuda(tree, COMPILES))["cuda"]
    assert facts["built"] and facts["compiler"] == "nvcc 12.4"
    assert facts["archs"] == ["sm_80", "sm_90a"] and facts["ptx"] == "compute_80"
    assert facts["left_out"] == {"sm_100": "this nvcc does not know it"}
    assert (tree / "mmkernels/_C_cuda.so").is_file()
    steps = (tree / "build/native/cuda/build.ninja").read_text().split("\nbuild ")
    for name, for_90, for_newer in (("one", 80, 80), ("one_hopper", "90a", 80), ("one_cluster", 90, 90)):
        (step,) = (text for text in steps if f" nvcc csrc/one/{name}_cuda.cu" in text)
        targets = [text.split()[0] for text in step.split("-gencode arch=compute_")[1:]]
        assert targets == ["80,code=sm_80", f"{for_90},code=sm_90a", f"{for_newer},code=compute_{for_newer}"]


def test_chosen_architectures(tree):
    home = fake_cuda(tree, COMPILES)
    facts = built(tree, MMKERNELS_BUILD_CPU="0", CUDA_HOME=home, MMKERNELS_CUDA_ARCHS="80")["cuda"]
    assert facts["archs"] == ["sm_80"] and facts["ptx"] == "compute_80"
    facts = built(tree, MMKERNELS_BUILD_CPU="0", CUDA_HOME=home, MMKERNELS_CUDA_ARCHS="120")["cuda"]
    assert facts["why"] == "this nvcc knows none of sm_120"


def test_cuda_code_that_does_not_compile_is_left_out_aloud(tree):
    knobs = dict(MMKERNELS_BUILD_CPU="0", CUDA_HOME=fake_cuda(tree, FAILS))
    process = build(tree, **knobs)
    assert process.returncode == 0 and "error: no such thing" in process.stdout
    facts = json.loads((tree / "mmkernels/_build.json").read_text())
    assert facts["cuda"]["why"] == "it does not compile: one_cuda.cu(1): error: no such thing"
    process = build(tree, MMKERNELS_BUILD_CUDA="1", **knobs)
    assert process.returncode != 0 and "the cuda library does not compile: one_cuda.cu(1)" in process.stderr


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(MMKERNELS_BUILD_CUDA="yes"), "MMKERNELS_BUILD_CUDA is 'yes'; allowed are 0, 1 and auto"),
        (dict(MMKERNELS_BUILD_CUDA="1", CUDA_HOME="/nowhere"), "CUDA_HOME is '/nowhere', which holds no bin/nvcc"),
        (dict(MMKERNELS_BUILD_CPU="1", CXX="no-such-compiler"), "CXX is 'no-such-compiler', which is not on PATH"),
    ],
)
def test_wrong_knobs(tree, knobs, message):
    process = build(tree, **({"MMKERNELS_BUILD_CPU": "0"} | knobs))
    assert process.returncode != 0 and message in process.stderr


def test_wrong_architecture(tree):
    process = build(tree, MMKERNELS_BUILD_CPU="0", CUDA_HOME=fake_cuda(tree, COMPILES), MMKERNELS_CUDA_ARCHS="hopper")
    assert process.returncode != 0 and "MMKERNELS_CUDA_ARCHS has 'hopper'" in process.stderr


def test_parallelism_follows_free_memory(monkeypatch):
    specification = importlib.util.spec_from_file_location("mmkernels_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(setup)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(setup.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    free = {"kib": 9 * 1024**2}
    monkeypatch.setattr(setup.Path, "read_text", lambda _: f"MemTotal: 1 kB\nMemAvailable:   {free['kib']} kB\n")
    assert setup.jobs() == 4
    free["kib"] = 1024
    assert setup.jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup.jobs() == 7

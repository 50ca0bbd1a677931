"""The wheel and the source archive: what is inside, what the libraries ask of a machine, and that an installed one works."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*command, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree with its object files, so that nothing is compiled twice."""
    tree = tmp_path_factory.mktemp("wheel") / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", ".ci", "mmkernels", "csrc", "bench", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree / name)
    if (ROOT / "build/native").is_dir():
        shutil.copytree(ROOT / "build/native", tree / "build/native")
    (tree / "mmkernels/_C_emulator.so").write_bytes(b"left by an editable installation; no wheel may take it along")
    return tree


@pytest.fixture(scope="module")
def wheel(tree):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", tree / "dist", "."]
    run(*pip, cwd=tree, MMKERNELS_BUILD_CUDA="0", MMKERNELS_BUILD_EMULATOR="0", MMKERNELS_BUILD_CPU="1")
    (wheel,) = (tree / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def test_tag_and_contents(wheel):
    assert re.fullmatch(r"mmkernels-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mmkernels/_C_cpu.so", "mmkernels/_build.json", "mmkernels/ops/latent/api.py"} <= names
    assert {f"mmkernels/train/data/spoken_digits/{name}" for name in ("speakers.csv", "ian/3.wav")} <= names
    assert not any(name.startswith(("csrc", "tests", "bench", "mmkernels/_C_emulator")) for name in names)


def test_the_library_asks_for_no_python_and_no_unstable_torch(installed):
    wanted = run("nm", "-DC", "--undefined-only", installed / "mmkernels/_C_cpu.so", cwd=installed)
    symbols = [line.split(maxsplit=1)[1] for line in wanted.splitlines()]
    assert symbols and not [name for name in symbols if re.match(r"_?Py[A-Z_]", name)]
    assert not [name for name in symbols if re.search(r"\b(c10|at|torch)::", name)]


def test_it_asks_pip_for_nothing(wheel):
    """Not even for torch: pip would take that for a wish to replace the build that is there."""
    (name,) = (n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA"))
    asked = re.findall(r"^Requires-Dist: (.*)$", zipfile.ZipFile(wheel).read(name).decode(), re.MULTILINE)
    assert asked and all("extra ==" in line for line in asked)


@pytest.mark.parametrize("name", ["cuda", "emulator"])
def test_the_kernel_libraries_ask_torch_for_c_functions_that_it_has(name):
    """Made beside a torch without CUDA, the CUDA library meets its torch only at a user's: nothing may be missing there."""
    library = ROOT / f"mmkernels/_C_{name}.so"
    if not library.is_file():
        pytest.skip(f"the {name} library was not built")

    def symbols(which, path):
        table = run("nm", "-D", which, path, cwd=ROOT)
        return {line.split()[-1].partition("@")[0] for line in table.splitlines()}

    wanted = symbols("--undefined-only", library)
    assert not [s for s in wanted if re.match(r"_ZN?K?(2at|3c10|5torch)", s) or re.match(r"_?Py[A-Z_]|cu[A-Z]", s)]
    mine = {s for s in wanted if s.startswith(("aoti_", "torch_"))}
    # The one of these that lives in libtorch_cuda, in every torch from 2.10 on.
    cuda_only = {"aoti_torch_get_current_cuda_stream"} if name == "cuda" else set()
    there = symbols("--defined-only", Path(torch.__file__).parent / "lib/libtorch_cpu.so")
    assert mine and mine - there <= cuda_only


def test_an_installed_wheel_computes(installed):
    code = (
        "import torch, mmkernels; from mmkernels import ops\n"
        "q = torch.randn(1, 2, 5, 3, requires_grad=True)\n"
        "ops.attention(q, q, q, backend='cpp').sum().backward()\n"
        "print(mmkernels.__file__, bool(q.grad.isfinite().all()))"
    )
    file, finite = run(sys.executable, "-c", code, cwd=installed).split()
    assert Path(file).is_relative_to(installed) and finite == "True"
    facts = json.loads(run(sys.executable, "-m", "mmkernels", "info", "--json", cwd=installed))
    assert facts["build"]["cpu"]["built"] and facts["libraries"]["cpu"]["loaded"]
    assert facts["build"]["cuda"]["why"] == "MMKERNELS_BUILD_CUDA is 0"


def test_source_archive(tree):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tree / "sdist", cwd=tree)
    (archive,) = (tree / "sdist").glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names and {"setup.py", "README.md", ".ci/requirements.txt", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", "_build.json"))]

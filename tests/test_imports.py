"""Who may import whom, read from the source; what `import mmkernels` costs and does, in fresh processes."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmkernels"
FILES = sorted(PACKAGE.rglob("*.py"))
# A room may import itself and the rooms to its left.
ROOMS = ("ground", "ops", "modules", "models", "train")
GROUND = {"_library", "_backends", "_tuning"}
FAMILY_GROUND = {"_shared", "attention"}  # what another family may stand on
PEERS = {"xformers", "perceiver_pytorch", "transformers", "flash_attn", "adapters", "peft", "ffpa_attn"}
PEERS |= {"diffusers", "flamingo_pytorch"}


def room(parts: tuple) -> str:
    """The room of a module, given by its path inside the package: () is the package itself."""
    if not parts:
        return ""
    return "ground" if parts[0] in GROUND else parts[0]


def imports(path: Path):
    """Yields (level, parts, line) for every import in a file, those inside functions included; level 0 is absolute.

    Relative ones are resolved to a path inside the package.
    """
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, tuple(alias.name.split(".")), node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield 0, tuple(node.module.split(".")), node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + tuple(node.module.split(".") if node.module else ())
            for alias in node.names:
                # `from . import name` may import a module or a name of the package.
                target = base + (alias.name,)
                is_module = (PACKAGE.joinpath(*target).with_suffix(".py")).is_file() or PACKAGE.joinpath(*target).is_dir()
                yield node.level, target if is_module else base, node.lineno


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_arrows(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts
    own = room(here)
    for level, target, line in imports(path):
        if level == 0 or not target or own not in ROOMS:
            continue
        where = f"{name_of(path)}:{line}"
        other = room(target)
        assert other in ROOMS, f"{where} imports mmkernels.{'.'.join(target)}, which is above every room"
        assert ROOMS.index(other) <= ROOMS.index(own), f"{where}: {own!r} must not import {other!r}"
        if own == other == "ops" and len(here) > 2 and len(target) > 1 and target[1] != here[1]:
            assert target[1] in FAMILY_GROUND, f"{where}: family {here[1]!r} imports family {target[1]!r}"
            assert here[1] != "_shared", f"{where}: what families share must not import a family"
            assert here[1] != "attention" or target[1] == "_shared", f"{where}: attention stands on _shared alone"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_outside_imports(path):
    """ops and modules: the standard library, torch and triton; a reference: torch alone; peers: nowhere in the package."""
    own = room(path.relative_to(PACKAGE).with_suffix("").parts)
    for level, target, line in imports(path):
        where = f"{name_of(path)}:{line}"
        if level == 0:
            assert target[0] != "mmkernels", f"{where} imports mmkernels absolutely; imports inside the package are relative"
            assert target[0] not in PEERS, f"{where} imports {target[0]}; peers belong into bench/baselines.py"
            if own in ("ground", "ops", "modules"):
                allowed = target[0] in sys.stdlib_module_names or target[0] in ("torch", "triton")
                assert allowed, f"{where} imports {target[0]}; {own!r} may use the standard library, torch and triton"
        if path.name == "reference.py":
            assert level == 0 and target[0] == "torch", f"{where}: a reference imports torch alone"


def test_peers_are_imported_in_one_file_of_the_benchmarks():
    for path in sorted((ROOT / "bench").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            found = {name.split(".")[0] for name in names} & PEERS
            assert not found or path.name == "baselines.py", f"{name_of(path)}:{node.lineno} imports {found}"


# --- In fresh processes ----------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import mmkernels
seconds = time.process_time() - start
print(json.dumps({"modules": sorted(set(sys.modules) - before), "seconds": seconds}))
"""
WORKS = """
import torch
from mmkernels import explain, ops
q = torch.randn(1, 2, 3, 4)
explanation = explain("attention", q, q, q)
print(*explanation.refusals["cpp"], tuple(ops.attention(q, q, q).shape), explanation.backend, sep="|")
"""
HIDE_TRITON = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Hidden())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
"""


def python(code, *arguments, cwd=ROOT, **environment):
    """Runs code in a fresh interpreter; returns what it printed, and fails on anything on stderr."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code, *arguments]
    process = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == "", process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def without_libraries(tmp_path_factory):
    """A folder with a copy of the Python files alone, as an installation without a compiler leaves it."""
    folder = tmp_path_factory.mktemp("pure")
    shutil.copytree(PACKAGE, folder / "mmkernels", ignore=shutil.ignore_patterns("_C_*", "_build.json", "__pycache__"))
    return folder


def test_import_is_quick_and_silent():
    printed = python(MEASURE)
    facts = json.loads(printed)  # fails on anything else on stdout
    assert facts["modules"] == ["mmkernels"]
    assert facts["seconds"] < 0.05


def test_sub_packages_import_no_optional_dependency():
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import mmkernels.ops, mmkernels.modules, mmkernels.models, mmkernels.train, mmkernels.testing\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    assert set(python(code).split()) <= {"mmkernels", "torch"}


# Each thing that may be missing alone, and all together.
@pytest.mark.parametrize("missing", ["triton", "library", "gpu", "triton library gpu"])
def test_ops_work_without(missing, without_libraries):
    code = (HIDE_TRITON if "triton" in missing else "") + WORKS
    printed = python(
        code,
        cwd=without_libraries if "library" in missing else ROOT,
        **({"CUDA_VISIBLE_DEVICES": ""} if "gpu" in missing else {}),
    )
    *reasons, shape, backend = printed.strip().split("|")
    assert shape == "(1, 2, 3, 4)"
    if "library" in missing:
        assert backend == "reference"
        assert reasons == ["the cpu library is not there: this installation was made without building it"]


def test_a_library_that_does_not_load_is_explained(without_libraries, tmp_path):
    shutil.copytree(without_libraries / "mmkernels", tmp_path / "mmkernels")
    (tmp_path / "mmkernels/_C_cpu.so").write_bytes(b"not a library")
    code = "import torch; from mmkernels import explain; q = torch.ones(1, 1, 3, 1); print(explain('attention', q, q, q))"
    printed = python(code, cwd=tmp_path)
    assert "runs on 'reference'" in printed and "the cpu library does not load" in printed

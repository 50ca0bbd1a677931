"""The command line's front, and what `info` says."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels import __main__, __version__, _info, _library, ops
from mmkernels.ops._shared import waves

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments, cwd=ROOT, **environment):
    process = [sys.executable, "-m", "mmkernels", *arguments]
    return subprocess.run(process, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def test_without_arguments_it_prints_the_commands(capsys):
    assert __main__.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in __main__.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"]], ids=str)
def test_the_front_imports_nothing_heavy(arguments):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['mmkernels', *{arguments!r}]\n"
        "try: runpy.run_module('mmkernels', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'numpy', 'triton', 'bench', 'mmkernels._info'} & set(sys.modules)), file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stderr == "[]\n"


def test_unknown_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["dance"])
    assert "'dance'" in capsys.readouterr().err


def test_missing_package_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(__main__.COMMANDS, "train", ("a_package_nobody_has.cli", ""))
    assert __main__.main(["train"]) == 1
    error = capsys.readouterr().err
    assert error == "python -m mmkernels train: it needs a_package_nobody_has, which is not installed\n"


def test_bench_outside_a_source_tree(tmp_path):
    shutil.copytree(ROOT / "mmkernels", tmp_path / "mmkernels", ignore=shutil.ignore_patterns("__pycache__", "_C_*"))
    process = command("bench", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr == (
        "python -m mmkernels bench: it needs a source tree: the folder bench/ is not part of the installed package\n"
    )


@pytest.mark.parametrize("name", list(__main__.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        __main__.main([name, "--help"])
    assert f"python -m mmkernels {name}" in capsys.readouterr().out


def test_json(capsys):
    assert __main__.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["mmkernels"] == __version__
    assert facts["versions"]["python"] == "{}.{}.{}".format(*sys.version_info)
    assert "cpu" in facts["devices"]
    assert set(facts["backends"]["cpu"]) == set(ops.EXPLAINERS), "info has a sample problem for every op"
    for refusals in facts["backends"]["cpu"].values():
        assert refusals["reference"] == []
        assert refusals["cuda"], "no CUDA kernel takes CPU tensors"
        assert (refusals["cpp"] == []) == facts["libraries"]["cpu"]["loaded"]


def test_text_says_what_json_says():
    facts = _info.collect()
    text = _info.as_text(facts)
    for reasons in (r for ops_ in facts["backends"].values() for op in ops_.values() for r in op.values()):
        assert all(reason in text for reason in reasons)


def test_text_of_a_full_and_of_an_empty_build():
    facts = _info.collect()
    compiler = {"built": True, "compiler": "c++ 12"}
    facts["build"] = {
        "cpu": compiler | {"isas": ["base", "v3"]},
        "cuda": compiler | {"archs": ["sm_80"], "ptx": "compute_80", "left_out": {"sm_100a": "this nvcc does not know it"}},
        "info": compiler,
    }
    facts["libraries"]["cuda"] = {"loaded": False, "reason": "torch is built without CUDA"}
    text = _info.as_text(facts)
    assert "instruction sets base, v3" in text
    assert "sm_80 and PTX of compute_80; without sm_100a (this nvcc does not know it)" in text
    assert "not loaded: torch is built without CUDA" in text
    facts["build"] = {}
    assert _info.as_text(facts).count("not built: this installation was made without building it") == 4


def test_without_the_info_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmkernels._C_info", None)  # makes the import fail
    monkeypatch.delattr("mmkernels._C_info", raising=False)
    features = _info.cpu_features()
    assert features["chosen"] is None and "the info library is not there" in features["why"]


@pytest.fixture
def info_library():
    """The compiled module, where it was built: on every machine with a compiler and Python's headers."""
    facts = _library.build_facts().get("info", {})
    if not facts.get("built"):
        why = f"the info library is not there: {facts.get('why', 'nothing was built')}"
        pytest.fail(why) if os.environ.get("MMKERNELS_REQUIRE_BACKENDS") else pytest.skip(why)
    from mmkernels import _C_info

    return _C_info


def test_split_planners_are_one_function(info_library):
    tiles = [0, 1, 2, 3, 4, 7, 31, 32, 131, 132, 133, 264, 1000, 4096]
    blocks = [0, 1, 2, 3, 5, 8, 63, 64, 97, 255, 256, 257, 392, 784, 1568, 100_000]
    slots = [1, 2, 3, 108, 132, 264, 296]
    for shape in itertools.product(tiles, blocks, slots):
        assert info_library.split_keys(*shape) == waves.split_keys(*shape), shape


def test_split_planner_refuses_nonsense(info_library):
    with pytest.raises(ValueError, match="slots must be positive"):
        info_library.split_keys(1, 1, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        info_library.split_keys(-1, 1, 1)


def test_cpu_features(info_library):
    features = info_library.cpu_features()
    assert features["supported"][0] == "base" and features["chosen"] == features["supported"][-1]


def test_the_instruction_set_can_be_narrowed(info_library):
    process = command("info", "--json", MMKERNELS_CPU_ISA="base")
    assert json.loads(process.stdout)["cpu_instruction_sets"]["chosen"] == "base"


def test_build_facts(info_library):
    facts = info_library.build_facts()
    assert facts["cpp_standard"] >= 202002 and facts["compiler"] and facts["pybind11"]

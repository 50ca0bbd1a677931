"""The README says what is: its examples run, its commands exist, its table has every knob."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmkernels import __main__, _backends

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SETUP = [line for line in README.splitlines() if line.startswith("python3 -m venv")]


def test_examples_run():
    """As a user runs them: in a process of their own, where Triton's interpreter does not stand in for a GPU."""
    code = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)) + "print(*latents.shape, *out.shape)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.stderr == "" and process.stdout.splitlines()[-1] == "2 512 1024 1 8 100 64"


def test_both_setups_are_the_same_but_for_the_emulator():
    train, tests = SETUP
    assert train.removesuffix("-m mmkernels train perceiver-digits") == tests.removesuffix("-m pytest").replace(
        "MMKERNELS_BUILD_EMULATOR=1 ", ""
    )


@pytest.mark.parametrize("line", re.findall(r"^python -m mmkernels (\S+(?: [^#\s]+)*)", README, re.MULTILINE))
def test_commands_exist(line, monkeypatch, capsys):
    arguments = line.replace("...", "").split()
    with pytest.raises(SystemExit, match="0"):  # everything before --help was accepted
        __main__.main([*arguments, "--help"])
    assert arguments[0] in __main__.COMMANDS


def test_every_knob_is_in_the_table():
    read = {"setup.py": (ROOT / "setup.py").read_text()}
    for path in [
        *(ROOT / "mmkernels").rglob("*.py"),
        *(ROOT / "csrc/common").glob("*.h"),
        *(ROOT / "tests").rglob("conftest.py"),
    ]:
        read[path.name] = read.get(path.name, "") + path.read_text()
    knobs = set(re.findall(r"MMKERNELS_[A-Z0-9_]+", "".join(read.values())))
    assert knobs <= set(re.findall(r"^\| `(MMKERNELS_[A-Z0-9_]+)`", README, re.MULTILINE))


def test_every_backend_is_in_the_table():
    table = README.partition("## Backends")[2].partition("##")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == list(_backends.NAMES)

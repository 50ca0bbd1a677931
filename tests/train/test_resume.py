"""A training that is killed at any moment goes on to the same bits."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from mmkernels.__main__ import main
from mmkernels.models import InputError
from mmkernels.train import checkpoint

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "train perceiver-digits --image-size 8 --latents 4 --latent-dim 8 --heads 2 --cross-attends 2 --layers 1 --bands 2 "
    "--epochs 3 --batch-size 100 --save-every 3 --threads 1 --no-compare --backend eager"
).split()


def run(output, attempts):
    request = {"arguments": [*OPTIONS, "--output", str(output)], "attempts": attempts}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_and_resume.py")), json.dumps(request)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status")], done


def content(path):
    with safe_open(path, "pt") as file:
        return {**(file.metadata() or {}), **{name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    statuses, _ = run(output, [{}])
    assert statuses == [0]
    return {name: content(output / name) for name in ("model.safetensors", checkpoint.NAME)}


def check_same(output, uninterrupted):
    for name, expected in uninterrupted.items():
        assert content(output / name) == expected, name
    assert not list(output.glob(".*.part")), "a temporary file was left"


def test_killed_at_random_moments(tmp_path, uninterrupted):
    moments = [round(random.uniform(0.1, 1.2), 2) for _ in range(4)]
    print("killed after", moments)
    statuses, done = run(tmp_path, [{"after": seconds} for seconds in moments] + [{}])
    assert statuses[-1] == 0 and set(statuses[:-1]) <= {-9, 0}, done.stderr
    check_same(tmp_path, uninterrupted)


def test_killed_while_saving(tmp_path, uninterrupted):
    """In front of the write to disk and of the rename, of a state and of each result file."""
    attempts = [{"call": call, "number": number} for call in ("fsync", "replace") for number in (1, 4)]
    ends = [{"call": "replace", "number": number} for number in (1, 2, 3, 4)]  # nothing is left to train: the results
    statuses, done = run(tmp_path, [*attempts, {"call": "replace", "number": 999}, *ends, {}])
    assert statuses == [-9] * len(attempts) + [0] + [-9] * len(ends) + [0], done.stderr
    assert "resuming" in done.stdout
    check_same(tmp_path, uninterrupted)


def test_the_same_command_only(tmp_path, capsys):
    arguments = [*OPTIONS, "--output", str(tmp_path)]
    arguments[arguments.index("--epochs") + 1] = "1"
    assert main(arguments) == 0
    capsys.readouterr()
    before = content(tmp_path / checkpoint.NAME)
    for change, message in (
        (["--epochs", "2"], "epochs 1, asked for is 2"),
        (["--lr", "0.1"], "learning_rate"),
        (["--latents", "5"], "num_latents 4"),
        (["--seed", "1"], "seed"),
    ):
        assert main([*arguments, *change]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1
    assert content(tmp_path / checkpoint.NAME) == before
    assert main([*arguments, "--resume"]) == 0
    assert "resuming" in capsys.readouterr().out
    assert main([*arguments, "--epochs", "2", "--restart"]) == 0
    assert main([*arguments, "--output", str(tmp_path / "none"), "--resume"]) == 2
    assert "holds no training to resume" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["empty", "half", "foreign", "other safetensors"])
def test_broken_state(tmp_path, damage, capsys):
    arguments = [*OPTIONS, "--output", str(tmp_path)]
    if damage == "other safetensors":
        from safetensors.torch import save_file
        from torch import zeros

        save_file({"a": zeros(1)}, tmp_path / checkpoint.NAME)
    else:
        (tmp_path / checkpoint.NAME).write_bytes(
            {"empty": b"", "half": b"\x10\x00\x00", "foreign": b"PK\x03\x04" * 99}[damage]
        )
    before = (tmp_path / checkpoint.NAME).read_bytes()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert checkpoint.NAME in error and "--restart" in error and "Traceback" not in error
    assert (tmp_path / checkpoint.NAME).read_bytes() == before


def test_one_training_per_folder(tmp_path):
    with checkpoint.locked(tmp_path):
        with pytest.raises(InputError, match="another training is running"), checkpoint.locked(tmp_path):
            pass

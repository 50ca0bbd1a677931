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
    "--epochs 2 --batch-size 100 --save-every 3 --threads 1 --no-compare --backend eager"
).split()


SAVES = [{"call": "fsync", "number": 2}, {"call": "replace", "number": 1}, {"call": "replace", "number": 4}]
RESULTS = [{"call": "replace", "number": number} for number in (2, 4)]


def content(path):
    with safe_open(path, "pt") as file:
        return {**(file.metadata() or {}), **{name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}}


MBT_OPTIONS = (
    "train mbt-digits --clips 40 --epochs 2 --batch-size 20 --save-every 1 --threads 1 --mixup 0.5 --mixmod "
    "--stochastic-depth 0.3 --backend eager"
).split()


def run_plans(options, plans, tmp_path_factory):
    """{name: (folder, exit statuses)} of a training for each of `plans`, {name: attempts}."""
    folders = {name: tmp_path_factory.mktemp(name) for name in plans}
    request = [[[*options, "--output", str(folders[name])], attempts] for name, attempts in plans.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_and_resume.py")), json.dumps(request)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    statuses = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("statuses")]
    return {name: (folders[name], status) for name, status in zip(plans, statuses, strict=True)}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """A training that nobody disturbs and two that are killed."""
    moments = [round(random.uniform(0.1, 1.0), 2) for _ in range(3)]
    print("killed after", moments)
    plans = {
        "whole": [{}],
        "random": [*({"after": seconds} for seconds in moments), {}],
        "saving": [*SAVES, {"call": "replace", "number": 999}, *RESULTS, {}],
    }
    return run_plans(OPTIONS, plans, tmp_path_factory)


def check_same(trainings, name, part="."):
    folder = trainings[name][0] / part
    for file in ("model.safetensors", checkpoint.NAME):
        assert content(folder / file) == content(trainings["whole"][0] / part / file), file
    assert not list(folder.glob(".*.part")), "a temporary file was left"


def test_killed_at_random_moments(trainings):
    assert trainings["whole"][1] == [0]
    assert trainings["random"][1][-1] == 0 and set(trainings["random"][1]) <= {-9, 0}
    check_same(trainings, "random")


def test_killed_while_saving(trainings):
    """In front of the write to disk and of the rename: of a state, and of each result file when all is trained."""
    assert trainings["saving"][1] == [-9] * len(SAVES) + [0] + [-9] * len(RESULTS) + [0]
    check_same(trainings, "saving")


def test_mbt_goes_on_with_its_mixup_and_its_dropped_layers(tmp_path_factory):
    """Killed in front of a save in each of its three trainings; mixup and stochastic depth draw from torch's generator."""
    # A training of four steps saves four times and leaves four result files. Sound at its second step; pictures at their
    # first, sound having made three steps and its results; both at their second, pictures having made four.
    kills = [{"call": "replace", "number": number} for number in (2, 8, 14)]
    trainings = run_plans(MBT_OPTIONS, {"whole": [{}], "killed": [*kills, {}]}, tmp_path_factory)
    assert trainings["whole"][1] == [0] and trainings["killed"][1] == [-9, -9, -9, 0]
    for part in ("audio", "video", "audio+video"):
        check_same(trainings, "killed", part)
    whole, killed = (trainings[name][0] / "comparison.json" for name in ("whole", "killed"))
    assert killed.read_text() == whole.read_text()


def test_perceiver_io_goes_on_with_what_it_draws(tmp_path_factory):
    """LAMB, and pixels drawn from torch's generator; killed in front of its second save and, started again, of its fourth."""
    options = "train perceiver-flow-demo --pairs 12 --held-out-pairs 2 --epochs 2 --batch-size 4 --points 20 --optimizer lamb"
    kills = [{"call": "replace", "number": 2}, {"call": "replace", "number": 3}]
    options = [*options.split(), *"--save-every 1 --threads 1 --backend eager".split()]
    trainings = run_plans(options, {"whole": [{}], "killed": [*kills, {}]}, tmp_path_factory)
    assert trainings["whole"][1] == [0] and trainings["killed"][1] == [-9, -9, 0]
    check_same(trainings, "killed")


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


def test_states_with_the_right_header_and_other_contents(tmp_path, capsys):
    from safetensors.torch import save_file

    arguments = [*OPTIONS, "--output", str(tmp_path)]
    arguments[arguments.index("--epochs") + 1] = "1"
    assert main(arguments) == 0
    path = tmp_path / checkpoint.NAME
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    step_zero = json.dumps({**json.loads(header["state"]), "step": 0})
    for change, kept in (
        ({"state": "[1"}, tensors),
        ({"state": "[1]"}, tensors),
        ({"optimizer": "{}"}, tensors),
        ({"state": step_zero}, {name: t for name, t in tensors.items() if name != "generator/cpu"}),
        ({"state": step_zero}, {**tensors, "model/latents": tensors["model/latents"][:1].clone()}),
        ({"state": step_zero}, {**tensors, "other": tensors["model/latents"].clone()}),
    ):
        save_file(kept, path, {**header, **change})
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert checkpoint.NAME in error and "--restart" in error and error.count("\n") == 1, error


def test_a_full_disk_keeps_the_last_state(tmp_path):
    """The kernel refuses what exceeds a limit of the process, in the middle of a write."""
    command = [sys.executable, "-m", "mmkernels", *OPTIONS, "--output", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before[checkpoint.NAME]) // 2},) * 2)"
    run_main = "import sys; from mmkernels.__main__ import main; sys.exit(main(sys.argv[1:]))"
    arguments = [*OPTIONS, "--output", str(tmp_path / "other")]
    done = subprocess.run(
        [sys.executable, "-c", f"{limited}; {run_main}", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert {path.name for path in (tmp_path / "other").iterdir()} == {".lock"}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_one_training_per_folder(tmp_path):
    with checkpoint.locked(tmp_path):
        with pytest.raises(InputError, match="another training is running"), checkpoint.locked(tmp_path):
            pass

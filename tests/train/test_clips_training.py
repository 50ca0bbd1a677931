"""Perceiver on clips of sound and pictures with many labels: the command, its predictions, bad input."""

import argparse
import csv
import json

import pytest
import torch
from media_files import tone, write_video, write_wav

from mmkernels import models
from mmkernels.__main__ import main
from mmkernels.models import InputError
from mmkernels.train import cli, clips_cli, multimodal, perceiver_cli
from mmkernels.train.data.clips import Video, Waveform
from mmkernels.train.objective import Objective

AUDIO = {"kind": "grid", "shape": [256], "channels": 1, "patch": [16], "positions": {"kind": "fourier", "num_bands": 4}}
VIDEO = {"kind": "grid", "shape": [4, 8, 8], "patch": [2, 4, 4], "positions": {"kind": "fourier", "num_bands": 2}}
TINY = {
    "input": {"kind": "multimodal", "modalities": {"audio": AUDIO, "video": VIDEO}},
    "encoder": {"num_latents": 4, "latent_channels": 16, "num_blocks": 1, "layers_per_block": 1, "self_heads": 2},
    "queries": {"kind": "learned", "count": 1, "channels": 16},
    "output": {"kind": "classes", "num_classes": 527},
}


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Red or blue clips, loud or nearly silent, in a table of labels."""
    folder = tmp_path_factory.mktemp("clips")
    rows = [["audio", "video", "labels", "split"]]
    for number in range(16):
        red, loud = number % 2, number // 2 % 2
        frames = torch.zeros(8, 8, 8, 3, dtype=torch.uint8)
        frames[..., 0 if red else 2] = 255
        write_video(folder / f"{number}.mkv", frames, 25)
        sound = tone(500 + 10 * number, 0.32, 8000, 0.9 if loud else 0.001)
        write_wav(folder / f"{number}.wav", sound[None], 8000)
        labels = ";".join(["red" if red else "blue"] + ["loud"] * loud)
        rows.append([f"{number}.wav", f"{number}.mkv", labels, "train" if number < 12 else "val"])
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def command(data, output, *more):
    options = "--sample-rate 8000 --windows 2 --batch-size 4 --lr 0.02 --optimizer adamw --epochs 12 --threads 1".split()
    start = ["train", "perceiver-clips", "--data", data / "clips.csv", "--config", data / "tiny.json"]
    return [*start, *options, "--output", output, *more]


def test_a_training_on_many_labels_and_its_predictions(data, tmp_path, capsys):
    status, out, _ = run(capsys, *command(data, tmp_path / "run", "--micro-batches", 2))
    assert status == 0 and "12 clips to train on, 4 held out, 3 classes" in out and "held-out map" in out
    history = json.loads((tmp_path / "run" / "task.json").read_text())["history"]
    assert history[-1]["map"] > 0.85 and history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert models.load(tmp_path / "run").config.output["num_classes"] == 3
    inputs = [part for name, end in (("audio", "wav"), ("video", "mkv")) for part in ("--input", f"{name}={data}/15.{end}")]
    status, out, _ = run(capsys, "predict", "--checkpoint", tmp_path / "run", *inputs)
    found = {name: float(p) for _, name, p in (line.split("\t") for line in out.splitlines())}
    assert status == 0 and set(found) == {"blue", "loud", "red"} and found["red"] > found["blue"]
    status, _, error = run(capsys, "predict", "--checkpoint", tmp_path / "run", *inputs[:2])
    assert status == 2 and "--input has audio; this model needs all of audio, video" in error


def test_pictures_are_dropped_in_training_alone(data):
    torch.manual_seed(0)
    inputs = {"audio": torch.rand(200, 5) + 1, "video": torch.rand(200, 2, 3) + 1}
    seen = {}

    def model(inputs):
        seen.update(inputs)
        return torch.zeros(len(inputs["audio"]), 3)

    objective = Objective((3,), multi_label=True, dropped={"video": 0.3})
    objective(model, (inputs, torch.zeros(200, 3)))
    gone = (seen["video"] == 0).flatten(1)
    assert torch.equal(gone.all(1), gone.any(1)) and 40 <= gone.all(1).sum() <= 80
    assert torch.equal(seen["audio"], inputs["audio"]) and torch.equal(
        seen["video"][~gone[:, 0]], inputs["video"][~gone[:, 0]]
    )
    windows = {name: tensor[:, None] for name, tensor in inputs.items()}
    multimodal.clip_logits(model, windows)
    assert torch.equal(seen["video"], inputs["video"])


@pytest.mark.parametrize("system, names", [("perceiver-clips", "audio,video"), ("perceiver-autoencode", "audio,image")])
def test_broken_rows_can_be_left_out(system, names, data, tmp_path, capsys):
    """They are named and counted by all trainings on clips (that of MBT is in its own tests), which then read the others."""
    rows = [("0", "train"), ("1", "train"), ("gone", "train"), ("0", "val")]
    rows = "\n".join(f"{name}.wav,{name}.mkv,{name},{split}" for name, split in rows)
    (data / "broken.csv").write_text(f"{names},label,split\n{rows}")
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    options = parser.parse_args(["train", system, "--data", str(data / "broken.csv"), "--on-error", "skip"])
    readers = dict(zip(names.split(","), (Waveform(256, 8000), Video(frames=4, size=8)), strict=True))
    training, held_out, labels = clips_cli.load(options, readers)
    windows = {"perceiver-clips": 16, "perceiver-autoencode": 1}[system]
    assert (len(training), len(held_out), held_out.windows, labels.names) == (2, 1, windows, ["0", "1"])
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.startswith("left out: line 4: ") and "gone.wav" in first and second.startswith("1 broken row")
    options.on_error = "stop"
    with pytest.raises(InputError, match="has 1 broken row: line 4: .*gone.wav"):
        clips_cli.load(options, readers)


def test_the_last_evaluation_in_words(capsys, monkeypatch):
    epochs = [{"epoch": 0, "accuracy": 0.25}, {"epoch": 1, "accuracy": 0.5}]
    assert perceiver_cli.last(epochs) == "held-out accuracy 50.00% after 2 epochs"
    assert perceiver_cli.last([{"step": 30, "map": 0.125}], "map") == "held-out map 12.50% after 30 steps"
    monkeypatch.setattr(perceiver_cli, "fit", lambda *arguments, start=None: (start, epochs, 3.0))
    arguments = argparse.Namespace(output="runs/x")
    for files, told in (((), "checkpoint and learning-curve.png"), (("a.png",), "checkpoint, learning-curve.png and a.png")):
        assert perceiver_cli.train(arguments, None, None, None, perceiver_cli.last, *files, start=len) == 0
        assert capsys.readouterr().out == f"held-out accuracy 50.00% after 2 epochs\n{told} in runs/x; 3 s\n"


def test_bad_input(data, tmp_path, capsys):
    def fails(message, *more):
        status, _, error = run(capsys, *command(data, tmp_path / "run", *more))
        assert status == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "run").exists(), error

    fails("it must read audio and video", "--config", "perceiver-io-imagenet-fourier")
    fails("it must be 'classes' or 'pooled'", "--config", "perceiver-io-kinetics")
    odd = {**TINY, "input": {**TINY["input"], "modalities": {"audio": AUDIO, "video": {**VIDEO, "shape": [4, 8, 12]}}}}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    fails("has video of shape (4, 8, 12)", "--config", tmp_path / "odd.json")
    (tmp_path / "clips.csv").write_text("audio,labels\na.wav,b")
    fails("has no column 'video'", "--data", tmp_path / "clips.csv")

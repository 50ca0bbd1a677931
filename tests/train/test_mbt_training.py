"""MBT from a table of clips, and from the digits: trainings, predictions, bad input."""

import csv
import hashlib
import json

import pytest
import torch
from media_files import tone, write_video, write_wav
from PIL import Image

from mmkernels import models
from mmkernels.__main__ import main
from mmkernels.train.data import digit_clips, spoken_digits

CONFIG = {
    "modalities": [
        {"name": "rgb", "shape": [2, 16, 16], "patch": [2, 8, 8], "tokeniser": "3d_conv"},
        {"name": "spectrogram", "shape": [16, 16], "patch": [4, 16], "tokeniser": "2d_conv"},
    ],
    "channels": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_channels": 32,
    "fusion_layer": 1,
    "num_bottlenecks": 2,
}
COLORS = {"high": (255, 0, 0), "low": (0, 0, 255)}


def run(capsys, *arguments):
    """(exit status, standard output, standard error)."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, message, *arguments):
    """The command ends with status 2 and one line on standard error that has `message`."""
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert message in error and error.count("\n") == 1 and error.startswith("error: "), error


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of clips: blue with a low tone, red with a high one, as videos and as folders of frames."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rows = []
    for number in range(16):
        name = ("low", "high")[number % 2]
        sound = tone({"low": 300, "high": 1500}[name] + 20 * number, 0.3, 8000, amplitude=0.2 + 0.02 * number)
        write_wav(folder / f"{number}.wav", sound[None], 8000)
        frames = torch.tensor(COLORS[name], dtype=torch.uint8).expand(6, 16, 20, 3).contiguous()
        if number < 8:
            video = write_video(folder / f"{number}.mkv", frames, 25)
        else:
            video = folder / f"frames{number}"
            video.mkdir()
            for i in range(6):
                Image.fromarray(frames[i].numpy()).save(video / f"{i}.png")
        rows.append([video.name, f"{number}.wav", name, "train" if number < 12 else "val"])
    write_table(folder / "clips.csv", rows)
    return folder


def write_table(path, rows, label="label"):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["rgb", "spectrogram", label, "split"], *rows])
    return path


def command(data, output, table="clips.csv", epochs=12):
    """Arguments of a small training."""
    options = (
        "--batch-size 4 --optimizer adamw --lr 1e-2 --stochastic-depth 0 --mixup 0 --label-smoothing 0.1 --sample-rate 8000 "
        "--stride 1 --windows 2"
    )
    start = ["train", "mbt", "--data", data / table, "--config", data / "config.json", "--threads", 1]
    return [*start, *options.split(), "--epochs", epochs, "--output", output]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    assert main([str(argument) for argument in command(data, output)]) == 0
    return output


# --- A table of clips -------------------------------------------------------------------------------------------------------


def test_training_from_a_table(trained):
    assert {path.name for path in trained.iterdir()} == {
        ".lock",
        "config.json",
        "learning-curve.png",
        "model.safetensors",
        "task.json",
        "training.safetensors",
    }
    history = json.loads((trained / "task.json").read_text())["history"]
    assert history[-1]["accuracy"] == 1.0 and history[-1]["loss"] < history[0]["loss"]
    assert models.load(trained).config.num_classes == 2


@pytest.mark.parametrize("inputs", [["rgb", "spectrogram"], ["spectrogram"], ["rgb"]], ids="+".join)
def test_prediction_with_and_without_a_modality(trained, data, inputs, capsys):
    for number, name in ((1, "high"), (14, "low")):
        paths = {"rgb": data / (f"{number}.mkv" if number < 8 else f"frames{number}"), "spectrogram": data / f"{number}.wav"}
        arguments = [part for modality in inputs for part in ("--input", f"{modality}={paths[modality]}")]
        status, out, _ = run(capsys, "predict", "--checkpoint", trained, *arguments)
        head, found, probability = out.rstrip("\n").split("\t")
        assert status == 0 and head == "label" and found in COLORS and 0.5 <= float(probability) <= 1
        # The sound of this model has learned to read the pictures' answer from the bottleneck: alone it may be wrong.
        assert found == name or inputs == ["spectrogram"]


def test_one_modality_and_many_labels(data, tmp_path, capsys):
    rows = [[f"{n}.mkv", f"{n}.wav", ("low;any", "high;any")[n % 2], "train" if n < 6 else "val"] for n in range(8)]
    table = write_table(data / "many.csv", rows, "labels")
    output = tmp_path / "run"
    status, out, _ = run(capsys, *command(data, output, table.name, epochs=10), "--modalities", "spectrogram")
    assert status == 0 and "held-out map 100.00%" in out and "tokens: 4 of spectrogram" in out
    status, out, _ = run(capsys, "predict", "--checkpoint", output, "--input", f"spectrogram={data / '1.wav'}")
    found = {name: float(p) for _, name, p in (line.split("\t") for line in out.splitlines())}
    assert set(found) == {"any", "high", "low"} and found["any"] > found["low"] and found["high"] > found["low"]
    fails(capsys, "modality 'rgb'; allowed are spectrogram", "predict", "--checkpoint", output, "--input", "rgb=x.mkv")


def test_broken_rows(data, tmp_path, capsys):
    with open(data / "clips.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    write_wav(data / "silent.wav", torch.zeros(1, 4000), 8000)
    broken = [
        ["0.mkv", "gone.wav", "low", "train"],
        ["0.mkv", "silent.wav", "low", "train"],
        ["0.wav", "0.wav", "low", "train"],
    ]
    arguments = command(data, tmp_path / "run", write_table(data / "broken.csv", [*rows, *broken]).name, epochs=1)
    fails(capsys, "has 3 broken rows: line 18: spectrogram: ", *arguments)
    assert not (tmp_path / "run").exists()
    status, out, error = run(capsys, *arguments, "--on-error", "skip")
    assert status == 0 and "12 clips to train on, 4 held out" in out
    lines = [line for line in error.splitlines() if "left out" in line]
    assert ["gone.wav" in lines[0], "silent.wav is silent" in lines[1], "0.wav has no video stream" in lines[2]] == [True] * 3
    assert "3 broken rows" in lines[3]


def test_short_clips_are_said(data, tmp_path, capsys):
    rows = [["0.mkv", "0.wav", "low", "train"], ["1.mkv", "1.wav", "high", "train"], ["2.mkv", "2.wav", "low", "val"]]
    config = {**CONFIG, "modalities": [{**CONFIG["modalities"][0]}, {**CONFIG["modalities"][1], "shape": [60, 16]}]}
    (data / "long.json").write_text(json.dumps(config))
    arguments = command(data, tmp_path / "run", write_table(data / "short.csv", rows).name, epochs=1)
    status, out, _ = run(capsys, *arguments, "--config", data / "long.json")
    assert status == 0 and "2 of the inputs to train on are shorter than the window" in out


def test_bad_arguments(data, trained, tmp_path, capsys):
    def check(message, *change):
        fails(capsys, message, *command(data, tmp_path / "run"), *change)
        assert not (tmp_path / "run").exists()

    check("--modalities has 'sound'; ", "--modalities", "rgb,sound")
    check("allows rgb, spectrogram", "--modalities", "sound")
    check("it must name each modality once", "--modalities", "rgb,rgb")
    check("allowed are a .json file and mbt-base", "--config", "mbt-bas")
    (data / "bad.json").write_text(json.dumps({**CONFIG, "channels": 17}))
    check("bad.json: ", "--config", data / "bad.json")
    (data / "odd.json").write_text(json.dumps({**CONFIG, "width": 17}))
    check("width", "--config", data / "odd.json")
    check("backend is 'gpu'", "--backend", "gpu")
    check("sample_rate is 11025; it must be a multiple of 100", "--sample-rate", "11025")
    check("modality 'wave' has inputs of shape (800, 1)", "--config", wave_config(data), "--modalities", "wave")
    fails(capsys, "--input is 'rgb'; it must be MODALITY=PATH", "predict", "--checkpoint", trained, "--input", "rgb")
    fails(capsys, "give one or the other", "predict", "a.png", "--checkpoint", trained, "--input", "rgb=x")
    fails(capsys, "nothing to classify", "predict", "--checkpoint", trained)
    fails(capsys, "x.mkv cannot be read as video", "predict", "--checkpoint", trained, "--input", "rgb=x.mkv")
    fails(capsys, "has no config.json", "predict", "--checkpoint", tmp_path, "--input", "rgb=x.mkv")
    fails(capsys, "does not describe an image classification", "predict", data / "frames8/0.png", "--checkpoint", trained)


def wave_config(data):
    """A config with a modality that no reader here serves."""
    wave = {"name": "wave", "shape": [800], "patch": [16], "tokeniser": "1d_conv", "channels": 1}
    (data / "wave.json").write_text(json.dumps({**CONFIG, "modalities": [wave]}))
    return data / "wave.json"


def test_a_missing_library_names_the_extra(data, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    fails(capsys, "pip install mmkernels[media]", *command(data, tmp_path / "run"))


# --- Digits -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("digits")
    arguments = ["train", "mbt-digits", "--clips", "200", "--epochs", "3", "--threads", "1", "--output", str(output)]
    assert main(arguments) == 0
    return output


def test_digits_compare_three_models(digits_run, capsys):
    results = json.loads((digits_run / "comparison.json").read_text())
    assert list(results) == ["audio", "video", "audio+video"]
    assert all(0 <= row["accuracy"] <= 1 and row["epoch"] == 3 for row in results.values())
    with Image.open(digits_run / "comparison.png") as image:
        assert image.size[0] > 800
    histories = [json.loads((digits_run / name / "task.json").read_text())["history"] for name in results]
    assert all(history[-1]["loss"] < history[0]["loss"] for history in histories)


def test_digits_model_reads_files(digits_run, tmp_path, capsys):
    digit = torch.nn.functional.pad(digit_clips.load(["rgb"], 0)[1].images[0], (2, 2, 2, 2))
    Image.fromarray((digit * 255).byte().numpy()).save(tmp_path / "digit.png")
    sound = spoken_digits.FOLDER / "ian/4.wav"
    for inputs in (["--input", f"spectrogram={sound}"], ["--input", f"rgb={tmp_path / 'digit.png'}"]):
        status, out, _ = run(capsys, "predict", "--checkpoint", digits_run / "audio+video", *inputs)
        assert status == 0 and out.split("\t")[1] in digit_clips.CLASSES


def test_clips_of_one_modality_are_those_of_both():
    both, _ = digit_clips.load(["rgb", "spectrogram"], 0)
    for name in ("rgb", "spectrogram"):
        single, held_out = digit_clips.load([name], 0)
        assert torch.equal(single[2, 5][0][name], both[2, 5][0][name]) and single.labels == both.labels
        assert torch.equal(held_out[None, 3][0][name], held_out[None, 3][0][name])
        assert not torch.equal(single[2, 5][0][name], single[3, 5][0][name])
        assert single[2, 5][0][name].shape == digit_clips.READERS[name].shape
    assert both.fingerprint() != digit_clips.load(["rgb", "spectrogram"], 1)[0].fingerprint()


def test_nothing_leaks_from_training_to_held_out():
    training, held_out = digit_clips.load(["rgb", "spectrogram"], 0)
    assert len(training) == 1437 and len(held_out) == 360

    def hashes(clips):
        pictures = {hashlib.sha256(image.numpy().tobytes()).digest() for image in clips.images}
        return pictures, {hashlib.sha256(word.numpy().tobytes()).digest() for words in clips.words for word in words}

    for one, other in zip(hashes(training), hashes(held_out), strict=True):
        assert len(one) > 400 or len(other) > 100
        assert not one & other
    with open(spoken_digits.FOLDER / "speakers.csv", newline="") as file:
        speakers = list(csv.DictReader(file))
    assert len({row["speaker"] for row in speakers}) == len(speakers) == 62
    assert {row["split"] for row in speakers} == {"train", "test"}


def test_spoken_digits_are_what_their_table_says():
    files = sorted(spoken_digits.FOLDER.glob("*/*.wav"))
    assert len(files) == 620 and sum(path.stat().st_size for path in files) < 4e6
    for split, speakers in (("train", 46), ("test", 16)):
        words = spoken_digits.load(split)
        assert [len(of_digit) for of_digit in words] == [speakers] * 10
        for word in (word for of_digit in words for word in of_digit):
            assert 0.1 < len(word) / spoken_digits.SAMPLE_RATE < 0.8
            assert 0.05 < word.square().mean().sqrt() < 0.11 and word.abs().max() < 1


def test_the_noise_is_as_loud_as_said(monkeypatch):
    words = [torch.ones(1000) * 0.1]
    generator = torch.Generator().manual_seed(0)
    clips = torch.stack([digit_clips.noisy(words, 1.0, generator) for _ in range(200)])
    noise = clips.var() - 0.1**2 * (1000 / 5120) * (1 - 1000 / 5120)  # less what the word itself varies
    assert 10 * torch.log10(0.01 / noise) == pytest.approx(digit_clips.SNR_DB, abs=0.3)
    empty = torch.zeros(8, 8)
    with monkeypatch.context() as context:
        context.setattr(digit_clips, "HIDDEN", 0.0)
        frames = torch.stack([digit_clips.moving(empty, 1.0, generator) for _ in range(20)])
        assert frames.std() / 2 == pytest.approx(digit_clips.NOISE, rel=0.02) and frames.mean() == pytest.approx(-1, abs=0.02)
    monkeypatch.setattr(digit_clips, "NOISE", 0.0)
    frames = torch.stack([digit_clips.moving(empty, 1.0, generator) for _ in range(200)])
    covered = (frames == 0).float().mean((2, 3))  # gray: half of the way from -1 to 1
    # A bar through the middle covers its width, a slanted one up to the square root of two times as much, one outside less.
    assert 0.6 * digit_clips.HIDDEN < covered.mean() < digit_clips.HIDDEN and covered.max() < 1.5 * digit_clips.HIDDEN

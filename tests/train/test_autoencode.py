"""Autoencoding of clips: what is asked and masked, metrics, trainings on a table, on class folders and on digits."""

import csv
import dataclasses
import json
import wave

import pytest
import torch
from media_files import tone, write_video, write_wav
from PIL import Image

from mmkernels import models
from mmkernels.__main__ import main
from mmkernels.models import InputError
from mmkernels.train import autoencode, autoencode_cli
from mmkernels.train.autoencode import AUDIO, IMAGE, LABEL, Autoencoding, psnr
from mmkernels.train.data import digit_clips, media

FOURIER = {"kind": "fourier", "num_bands": 2}
TINY = {
    "input": {
        "kind": "multimodal",
        "mask_probs": {"label": 1.0},
        "modalities": {
            "audio": {"kind": "grid", "shape": [320], "channels": 1, "patch": [16], "positions": FOURIER},
            "image": {"kind": "grid", "shape": [2, 8, 8], "patch": [1, 4, 4], "positions": FOURIER},
            "label": {"kind": "vector", "channels": 2},
        },
    },
    "encoder": {"num_latents": 8, "latent_channels": 16, "num_blocks": 1, "layers_per_block": 1, "self_heads": 2},
    "queries": {
        "kind": "multimodal",
        "modalities": {
            "audio": {**FOURIER, "shape": [20]},
            "image": {**FOURIER, "shape": [2, 8, 8]},
            "label": {"kind": "learned", "count": 1, "channels": 16},
        },
    },
    "decoder": {"qk_channels": 16, "v_channels": 16},
    "output": {
        "kind": "multimodal",
        "channels": 16,
        "modalities": {
            "audio": {"kind": "samples", "samples": 16},
            "image": {"kind": "array", "channels": 3, "shape": [2, 8, 8]},
            "label": {"kind": "classes", "num_classes": 2},
        },
    },
}
COLORS = {"low": (0, 0, 255), "high": (255, 0, 0)}


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders: videos with the sound beside them, folders of frames; and the same clips as a table."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    rows = []
    for number in range(8):
        name = ("low", "high")[number % 2]
        (folder / "classes" / name).mkdir(parents=True, exist_ok=True)
        frames = torch.tensor(COLORS[name], dtype=torch.uint8).expand(4, 10, 12, 3).contiguous()
        clip = folder / "classes" / name / f"{number}"
        write_wav(clip.with_suffix(".wav"), tone({"low": 200, "high": 900}[name], 0.1, 8000)[None], 8000)
        if number < 4:
            clip = write_video(clip.with_suffix(".mkv"), frames, 25)
        else:
            clip.mkdir()
            for i in range(4):
                Image.fromarray(frames[i].numpy()).save(clip / f"{i}.png")
        rows.append([f"classes/{name}/{clip.name}", f"classes/{name}/{number}.wav", name])
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "audio", "label"], *rows])
    return folder


def command(data, output, **options):
    small = {"--data": data / "clips.csv", "--config": data / "tiny.json", "--epochs": 2, "--batch-size": 3}
    small |= {"--sample-rate": 8000, "--points": 10, "--threads": 1, "--val-fraction": 0.3, "--output": output}
    return ["train", "perceiver-autoencode", *(part for option in {**small, **options}.items() for part in option)]


class Recorder(torch.nn.Module):
    """Answers with the truth of the points that it is asked for, a unit too high; keeps what it was asked."""

    def __init__(self, batch):
        super().__init__()
        self.batch, self.asked = batch, []

    def forward(self, batch, masks, points):
        self.asked.append((masks, points))
        objective = Autoencoding()
        targets = objective.targets(batch)
        found = {name: 1 + target[:, points[name]] for name, target in targets.items()}
        return {IMAGE: found[IMAGE], AUDIO: found[AUDIO].flatten(1), LABEL: torch.zeros(len(batch[LABEL]), 4)}


def batch_of(size=6):
    generator = torch.Generator().manual_seed(0)
    image, audio = (2 * torch.rand(size, *shape, generator=generator) - 1 for shape in ((2, 8, 8, 3), (320,)))
    return {IMAGE: image, AUDIO: audio, LABEL: torch.eye(4)[torch.arange(size) % 4]}


def test_the_loss_is_the_papers_over_random_outputs():
    batch = batch_of()
    model = Recorder(batch)
    for _ in range(30):
        loss = Autoencoding(points=10)(model, batch)
        assert loss.item() == pytest.approx(0.03 + 1.0 + 1e-4 * torch.log(torch.tensor(4.0)).item(), rel=1e-5)
    for name, count in ((IMAGE, 128), (AUDIO, 20)):
        asked = [points[name] for _, points in model.asked]
        assert all(len(set(points.tolist())) == len(points) == 10 for points in asked)
        assert len(set(torch.cat(asked).tolist())) > 0.75 * count and max(map(int, map(torch.max, asked))) < count
    hidden = torch.cat([masks[LABEL] for masks, _ in model.asked]).float()
    assert hidden.mean() == pytest.approx(0.5, abs=0.12)
    everything = Autoencoding(points=512)
    everything(model, batch)
    assert [len(points) for points in model.asked[-1][1].values()] == [128, 20]


def test_the_error_of_sound_can_be_squared():
    batch = batch_of()
    off = Recorder(batch)
    truth = off.forward

    def half(*arguments, **options):  # half of a unit off, as the pixels are one
        found = truth(*arguments, **options)
        return {**found, AUDIO: found[AUDIO] - 0.5}

    objective = Autoencoding(1.0, 1.0, 0.0, points=10, audio_error="squared")
    assert objective(half, batch).item() == pytest.approx(1 + 0.5**2, rel=1e-5)
    assert dataclasses.replace(objective, audio_error="absolute")(half, batch).item() == pytest.approx(1 + 0.5, rel=1e-5)


def test_psnr_is_of_the_range_of_pixels():
    truth = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert psnr(truth + 0.2, truth).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert psnr(truth, truth).tolist() == pytest.approx([120.0] * 2)


def test_evaluation_hides_the_label_and_decodes_all_in_chunks():
    torch.manual_seed(0)
    config = models.perceiver_io.PerceiverIOConfig(**TINY)
    model = models.perceiver_io.PerceiverIO(config).eval()
    batch = {**batch_of(), LABEL: torch.eye(2)[torch.arange(6) % 2]}
    other = {**batch, LABEL: 1 - batch[LABEL]}
    masks = autoencode.hidden_label(batch)
    whole = model.reconstruct(batch, masks=masks)
    seen = []
    parts = model.reconstruct(other, masks=masks, chunk_size=7, progress=lambda starts: seen.append(list(starts)) or starts)
    for name in whole:  # other labels at the input, and the same answer
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-5)
    assert seen[1] == list(range(0, 128, 7)) and len(seen) == 3
    found = Autoencoding().evaluate(model, [batch])
    pixels = batch[IMAGE].flatten(1)
    assert found["mean_image_psnr"] == pytest.approx(psnr(pixels.mean(1, True), pixels).mean().item())
    assert found["audio_psnr"] == pytest.approx(psnr(whole[AUDIO], batch[AUDIO]).mean().item(), rel=1e-4)
    assert found["top5"] == 1.0


@pytest.mark.parametrize("source", ["clips.csv", "classes"])
def test_a_training_and_its_reconstruction(data, tmp_path, capsys, source):
    assert run(*command(data, tmp_path / "run", **{"--data": data / source})) == 0
    out = capsys.readouterr().out
    assert "6 clips to train on, 2 held out, 2 classes" in out and "PSNR of audio" in out and "its own mean" in out
    task = json.loads((tmp_path / "run" / "task.json").read_text())
    assert task["classes"] == ["high", "low"] and len(task["history"]) == 2
    assert (tmp_path / "run" / "reconstruction.png").stat().st_size > 10_000
    clip = [f"--input=image={data / 'classes/low/0.mkv'}", f"--input=audio={data / 'classes/low/0.wav'}"]
    assert run("predict", "--checkpoint", tmp_path / "run", *clip, "--output", tmp_path / "back") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("\t")[1] for line in lines[:2]} == {"low", "high"} and "image.mp4 and audio.wav" in lines[2]
    assert media.read_frames(tmp_path / "back/image.mp4", [0.0], 25, 8).shape == (1, 8, 8, 3)
    with wave.open(str(tmp_path / "back/audio.wav")) as file:
        assert file.getnframes() == 320 and file.getframerate() == 8000
    assert (tmp_path / "back/reconstruction.png").stat().st_size > 10_000
    for arguments, message in (
        (clip[:1], "--input has image; it must have audio=FILE and image=FILE"),
        (["picture.png"], "this model gives back clips"),
        ([clip[0], "--input=audio=gone.wav"], "gone.wav cannot be read as audio"),
        # Before the clip is looked at.
        (["--input=audio=gone.wav", f"--output={data / 'clips.csv'}/x"], f"x, but {data / 'clips.csv'} is not a folder"),
    ):
        assert run("predict", "--checkpoint", tmp_path / "run", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_broken_folders_and_configs(data, tmp_path, capsys):
    def fails(message, **options):
        assert run(*command(data, tmp_path / "run", **options)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()

    (tmp_path / "empty" / "a").mkdir(parents=True)
    fails("has no clips; they must be in a folder for each class", **{"--data": tmp_path / "empty"})
    clip = tmp_path / "silent" / "a" / "clip"
    clip.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(clip / "0.png")
    fails("clip.wav does not exist", **{"--data": tmp_path / "silent"})
    fails("it must be 'multimodal'", **{"--config": "perceiver-io-flow"})
    wide = json.loads(json.dumps(TINY))
    wide["input"]["modalities"]["image"]["shape"] = wide["queries"]["modalities"]["image"]["shape"] = [2, 8, 12]
    wide["output"]["modalities"]["image"]["shape"] = [2, 8, 12]
    (tmp_path / "wide.json").write_text(json.dumps(wide))
    fails("frames of 8 x 12 and 2 classes; allowed are squares", **{"--config": tmp_path / "wide.json"})
    with pytest.raises(InputError, match=r"reads audio of shape \(320,\); these clips have \(64,\)"):
        autoencode.check_shape(models.perceiver_io.PerceiverIOConfig(**TINY), AUDIO, (64,))


def test_digits_as_they_are_given_back():
    clean, _ = digit_clips.load(["rgb", "waveform"], 0, hardest=0.0)
    hard, _ = digit_clips.load(["rgb", "waveform"], 0)
    inputs = clean[0, 1][0]
    assert inputs["rgb"].shape == (8, 24, 24, 3) and inputs["waveform"].shape == (5120,)
    assert (inputs["rgb"] == -1).float().mean() > 0.2  # no noise on the ground
    item = autoencode.Autoencoded(clean, {"rgb": IMAGE, "waveform": AUDIO})[None, 1]
    assert item[IMAGE].shape == (8, 24, 24, 3) and item[AUDIO].shape == (5120,) and item[LABEL].sum() == 1
    assert clean.fingerprint() != hard.fingerprint()


def test_latent_layers_of_the_demo_begin_as_nothing():
    torch.manual_seed(0)
    model = models.load("perceiver-io-autoencoder-demo")
    latents = torch.randn(2, 96, 96)
    layers = [layer for block in model.encoder.blocks for layer in block]
    assert not any(torch.equal(layer(latents), latents) for layer in layers)
    autoencode_cli._still(model)
    assert len(layers) == 2 and all(torch.equal(layer(latents), latents) for layer in layers)


def test_the_demo(tmp_path, capsys):
    options = ["--steps", 2, "--evaluate-every", 1, "--clips", 8, "--held-out", 2, "--batch-size", 4, "--threads", 1]
    assert run("train", "perceiver-autoencode-demo", *options, "--output", tmp_path) == 0
    assert "chance" in capsys.readouterr().out and (tmp_path / "reconstruction.png").stat().st_size > 10_000

"""Perceiver IO on images: MixUp and CutMix, a training on a folder, predictions."""

import json

import pytest
import torch
from PIL import Image

from mmkernels.__main__ import main
from mmkernels.train import checkpoint
from mmkernels.train.classification import MixedLoss, accuracy

TINY = {
    "input": {"kind": "grid", "shape": [8, 8], "positions": {"kind": "fourier", "num_bands": 2}},
    "encoder": {"num_latents": 4, "latent_channels": 16, "num_blocks": 1, "layers_per_block": 1, "self_heads": 2},
    "queries": {"kind": "learned", "count": 1, "channels": 16},
    "output": {"kind": "classes", "num_classes": 9},
}


class Shares(torch.nn.Module):
    """Knows which share of a picture is which class: pictures of class c are c everywhere. Keeps what it saw."""

    def forward(self, images):
        self.seen = images
        return torch.stack([(images - c).abs().lt(0.5).float().mean((1, 2, 3)) for c in range(4)], -1).clamp(1e-4).log()


def batch_of(size=4):
    labels = torch.arange(size) % 4
    return [labels.float()[:, None, None, None].expand(-1, 6, 10, 3).contiguous(), labels]


def test_label_smoothing_is_its_definition():
    images, labels = batch_of()
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    targets = 0.9 * torch.eye(4)[labels] + 0.1 / 4
    wanted = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(MixedLoss(4, 0.1)(lambda _: logits, (images, labels)), wanted)


def test_cutmix_weighs_labels_by_pixels():
    """Where the logits are the logarithms of the shares, the cross-entropy is the entropy of the targets: its least."""
    torch.manual_seed(0)
    model, shares = Shares(), []
    for _ in range(50):
        loss = MixedLoss(4, cutmix=True)(model, batch_of())
        inside = (model.seen != batch_of()[0]).any(-1)
        assert torch.equal(inside[0], inside[3])
        share = inside[0].float().mean().item()
        shares.append(share)
        entropy = -sum(p * torch.tensor(p).log().item() for p in (share, 1 - share) if p > 0)
        assert loss.item() == pytest.approx(entropy, abs=2e-3)
        rows, columns = inside[0].any(1), inside[0].any(0)
        assert inside[0].sum() == rows.sum() * columns.sum()  # a box
    assert min(shares) < 0.05 and max(shares) > 0.5


def test_mixup_weighs_images_and_labels_alike():
    torch.manual_seed(0)
    images, labels = batch_of()
    model, weights = Shares(), []
    for _ in range(200):
        MixedLoss(4, mixup=0.2)(model, (images, labels))
        weights.append(1 - model.seen[0].mean().item() / 3)  # the first image is 0, its partner 3
        torch.testing.assert_close(model.seen, torch.lerp(images.flip(0), images, weights[-1]), rtol=0, atol=1e-5)
    weights = torch.tensor(weights)
    # Beta(0.2, 0.2): variance 1 / (4 (2 * 0.2 + 1))
    assert weights.mean() == pytest.approx(0.5, abs=0.08) and weights.var() == pytest.approx(1 / 5.6, abs=0.03)


def test_both_halve_the_batch():
    torch.manual_seed(1)
    model = Shares()
    MixedLoss(4, mixup=0.2, cutmix=True)(model, batch_of(8))
    assert len(model.seen) == 8 and len(model.seen[0].unique()) == 1
    assert set(model.seen[4:].unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_training_on_a_folder_and_its_prediction(tmp_path, capsys):
    for number, (name, color) in enumerate((name, c) for name, c in (("blue", 0), ("red", 255)) for _ in range(8)):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 9), (color, number, 255 - color)).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    options = ["--config", tmp_path / "tiny.json", "--epochs", 12, "--batch-size", 4, "--lr", 0.02, "--threads", 1]
    command = ["train", "perceiver-io", "--data", tmp_path / "data", *options, "--output", tmp_path / "run"]
    status, out, _ = run(capsys, *command)
    assert status == 0 and "14 images to train on, 2 held out, 2 classes" in out and "lamb at 0.02" in out
    assert "held-out accuracy 100.00%" in out
    found = sorted((tmp_path / "data").rglob("*.png"))
    status, out, _ = run(capsys, "predict", "--checkpoint", tmp_path / "run", found[0], found[-1])
    assert status == 0 and [line.split("\t")[1] for line in out.splitlines()] == ["blue", "red"]
    status, _, error = run(capsys, *command, "--config", "perceiver-io-audioset", "--restart")
    assert status == 2 and "it must read square images" in error and error.count("\n") == 1


def test_multi_hot_targets_are_shares():
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]])
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    found = MixedLoss(4)(lambda _: logits, (torch.zeros(2, 2, 2, 3), labels))
    logs = logits.log_softmax(-1)
    torch.testing.assert_close(found, -(0.5 * (logs[0, 0] + logs[0, 2]) + logs[1, 3]) / 2)
    # Right is what is one of an image's labels.
    answers = torch.tensor([[0.0, 0, 9, 0], [0, 0, 9, 0]])
    found = accuracy(lambda _: answers, [(torch.zeros(2, 2, 2, 3), labels)])
    assert found["accuracy"] == 0.5


def tables(tmp_path):
    """Pictures that are red, blue, or both (violet), in a table of labels."""
    rows = ["image,labels,split"]
    for number in range(24):
        red, blue = ((255, 0), (0, 255), (255, 255))[number % 3]
        Image.new("RGB", (9, 8), (red, number, blue)).save(tmp_path / f"{number}.png")
        labels = ";".join(name for name, value in (("red", red), ("blue", blue)) if value)
        rows.append(f"{number}.png,{labels},{'val' if number >= 18 else 'train'}")
    (tmp_path / "images.csv").write_text("\n".join(rows))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return ["--data", tmp_path / "images.csv", "--config", tmp_path / "tiny.json", "--threads", 1]


def test_pre_training_on_labels_of_a_table_and_fine_tuning(tmp_path, capsys):
    options = tables(tmp_path)
    small = ["--epochs", 10, "--batch-size", 6, "--lr", 0.02, "--output", tmp_path / "run"]
    status, out, _ = run(capsys, "train", "perceiver-io", *options, "--recipe", "perceiver-io-jft", *small)
    assert status == 0 and "18 images to train on, 6 held out, 2 classes" in out
    assert "held-out accuracy 100.00% after 10 epochs" in out
    fine = ["--recipe", "perceiver-io-jft-fine-tune", "--init", tmp_path / "run", "--steps", 4, "--batch-size", 6]
    status, out, _ = run(capsys, "train", "perceiver-io", *options, *fine, "--output", tmp_path / "fine")
    assert status == 0 and "after 4 steps" in out and "lamb at 0.002" in out and f"are those of {tmp_path / 'run'}" in out
    settings = checkpoint.read_state(tmp_path / "fine")["identity"]["settings"]
    assert settings["flat"] == pytest.approx(70 / 131) and settings["weight_decay"] == 0.1


def test_bad_tables_of_images(tmp_path, capsys):
    options = tables(tmp_path)
    (tmp_path / "3.png").write_text("no image")

    def fails(message, *more):
        status, _, error = run(capsys, "train", "perceiver-io", *options, *more, "--output", tmp_path / "run")
        assert status == 2 and message in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()

    fails("has 1 broken row: line 5: ")
    fails("--val-data is for folders", "--val-data", tmp_path)
    (tmp_path / "other.csv").write_text("picture,label\n3.png,a")
    fails("has no column 'image'; it has picture, label", "--data", tmp_path / "other.csv")
    status, out, error = run(
        capsys, "train", "perceiver-io", *options, "--on-error", "skip", "--epochs", 1, "--output", tmp_path / "run"
    )
    assert status == 0 and "17 images to train on" in out and "left out: line 5: " in error
    for text in ("4", "4,11", "a,b"):
        with pytest.raises(SystemExit):
            run(capsys, "train", "perceiver-io", *options, "--randaugment", text)
        assert "such as 4,5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(capsys, "train", "perceiver-io", *options, "--recipe", "perceiver-imagenet-22k")
    assert "perceiver-io-jft" in capsys.readouterr().err

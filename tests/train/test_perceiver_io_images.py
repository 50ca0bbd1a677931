"""Perceiver IO on images: MixUp and CutMix, a training on a folder, predictions."""

import json

import pytest
import torch
from PIL import Image

from mmkernels.__main__ import main
from mmkernels.train.classification import MixedLoss

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

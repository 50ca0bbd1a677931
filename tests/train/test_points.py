"""Clouds of points: files, meshes, the command and its predictions, bad input."""

import json

import numpy
import pytest
import torch

from mmkernels.__main__ import main
from mmkernels.models import InputError
from mmkernels.train.data import points

TINY = {
    "input": {"kind": "points", "num_bands": 4, "max_resolution": [8, 8, 8]},
    "encoder": {"num_latents": 4, "latent_channels": 16, "num_blocks": 1, "layers_per_block": 1, "self_heads": 2},
    "output": {"kind": "pooled", "num_classes": 40},
}
# A square of side 2 at height 1, one half of it as two triangles, the other as a rectangle.
SQUARE = "OFF\n# a comment\n6 3 0\n0 0 1\n1 0 1\n2 0 1\n0 2 1\n1 2 1\n2 2 1\n3 0 1 4\n3 0 4 3\n4 1 2 5 4\n"


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def write_clouds(folder, splits=("train", "test"), each=6):
    """Rods along x, and along z, as every kind of file."""
    generator = torch.Generator().manual_seed(0)
    for axis, name in ((0, "lying"), (2, "standing")):
        for split in splits:
            place = folder / name / split
            place.mkdir(parents=True)
            for number in range(each):
                cloud = 0.1 * torch.randn(50, 3, generator=generator)
                cloud[:, axis] += 4 * torch.rand(50, generator=generator)
                if number % 3 == 0:
                    numpy.save(place / f"{number}.npy", torch.cat([cloud, cloud], 1).numpy())
                elif number % 3 == 1:
                    lines = [",".join(map(str, row)) for row in cloud.tolist()]
                    (place / f"{number}.txt").write_text("\n".join(lines))
                else:
                    rows = [" ".join(map(str, row)) for row in cloud.tolist()]
                    (place / f"{number}.off").write_text("\n".join([f"OFF{len(rows)} 0 0", *rows]))
    return folder


def test_points_are_even_on_the_faces_of_a_mesh(tmp_path):
    (tmp_path / "square.off").write_text(SQUARE)
    found = points.read(tmp_path / "square.off", 40_000, 3)
    assert found.shape == (40_000, 3) and (found[:, 2] == 1).all()
    counts = torch.histogramdd(found[:, :2].double(), [4, 4], range=[0.0, 2.0, 0.0, 2.0]).hist / 40_000
    assert (counts - 1 / 16).abs().max() < 0.006  # four deviations of a share of 2500 in 40 000
    assert torch.equal(found, points.read(tmp_path / "square.off", 40_000, 3))


def test_points_of_a_cloud_are_used_evenly(tmp_path):
    numpy.save(tmp_path / "a.npy", numpy.arange(30, dtype="int32").reshape(10, 3))
    few, many = (points.read(tmp_path / "a.npy", count, 0) for count in (7, 25))
    assert len(few.unique(dim=0)) == 7
    counts = many.unique(dim=0, return_counts=True)[1]
    assert sorted(counts.tolist()) == [2] * 5 + [3] * 5


def test_clouds_fill_a_cube_and_points_are_scaled_a_little():
    cloud = torch.rand(1, 500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 2.0]) + 7
    data = points.Points(cloud, [1], seed=0)
    held = data[None, 0][0]
    assert held.mean(0).abs().max() < 1e-5 and held.abs().max() == 1
    training = data[0, 0][0]
    assert torch.equal(training, data[0, 0][0]) and not torch.equal(training, data[1, 0][0])
    # Undone: what a point was scaled by, up to the common move and scale, which a fit finds.
    design = torch.cat([training, torch.ones(500, 1)], 1)
    back = design @ torch.linalg.lstsq(design, cloud[0]).solution
    assert 0 < (back / cloud[0] - 1).abs().mean() < 0.01


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_a_training_and_its_predictions(tmp_path, capsys, splits):
    data = write_clouds(tmp_path / "data", splits)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    options = [
        "--config",
        tmp_path / "tiny.json",
        "--points",
        32,
        "--epochs",
        12,
        "--batch-size",
        4,
        "--lr",
        0.02,
        "--threads",
        1,
    ]
    status, out, _ = run(
        capsys, "train", "perceiver-points", "--data", data, *options, "--output", tmp_path / "run", "--val-fraction", 0.2
    )
    wanted = "12 clouds to train on, 12 held out" if len(splits) > 1 else "10 clouds to train on, 2 held out"
    assert status == 0 and wanted in out and "lamb at 0.02" in out and "held-out accuracy 100.00% after 12 epochs" in out
    files = [next((data / name).rglob("1.txt")) for name in ("standing", "lying")]
    status, out, _ = run(capsys, "predict", "--checkpoint", tmp_path / "run", *files)
    assert status == 0 and [line.split("\t")[1] for line in out.splitlines()] == ["standing", "lying"]
    status, _, error = run(capsys, "predict", "--checkpoint", tmp_path / "run", "--text", "x")
    assert status == 2 and "classifies clouds of points" in error


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.off", "PLY\n1 0 0", "begins with 'PLY'"),
        ("a.off", SQUARE[:-4], "ends too early"),
        ("a.off", SQUARE.replace("4 1 2 5 4", "4 1 2 5 6"), "a face has point 6 of 6"),
        ("a.off", SQUARE.replace("2 2 1", "2 x 1"), "could not convert"),
        ("a.txt", "1 2\n3 4", r"shape \(2, 2\)"),
        ("a.txt", "1 2 3\n3 4", "columns"),
        ("a.txt", "1 2 nan", "finite points"),
        ("a.npy", "no array", "cannot be read as points"),
        ("a.xyz", "", "it is empty"),
    ],
)
def test_files_that_are_no_clouds(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        points.read(tmp_path / name, 8, 0)
    assert str(tmp_path / name) in str(error.value)


def test_folders_that_cannot_be_used(tmp_path, capsys):
    def fails(message, data, *more):
        status, _, error = run(capsys, "train", "perceiver-points", "--data", data, "--output", tmp_path / "run", *more)
        assert status == 2 and message in error and error.count("\n") == 1 and not (tmp_path / "run").exists(), error

    fails("which is no folder", tmp_path / "gone")
    write_clouds(tmp_path / "one" / "deep")
    fails("a classifier needs at least two", tmp_path / "one")
    fails("no 'test'", write_clouds(tmp_path / "train", ("train",)))
    fails("one must be held out", write_clouds(tmp_path / "few", ("",), 1))
    (tmp_path / "two" / "a").mkdir(parents=True)
    fails("has no clouds to train on", write_clouds(tmp_path / "two", each=3))
    fails("must read points", write_clouds(tmp_path / "whole"), "--config", "perceiver-io-imagenet-fourier")

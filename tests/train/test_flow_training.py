"""Optical flow: the loss, tiles, trainings on rendered pairs and on folders, predictions, bad input."""

import json

import pytest
import torch
from flow_files_of import write_pair
from PIL import Image

from mmkernels.__main__ import main
from mmkernels.models import InputError, perceiver_io
from mmkernels.train import flow
from mmkernels.train.data import flow_files
from mmkernels.train.data.rendered_flow import RenderedFlow, Rendering

TINY = {
    "input": {"kind": "flow", "shape": [12, 16], "projection": 8, "positions": {"kind": "fourier", "num_bands": 2}},
    "encoder": {"num_latents": 4, "latent_channels": 16, "num_blocks": 1, "layers_per_block": 1, "self_heads": 2},
    "queries": {"kind": "input"},
    "decoder": {"qk_channels": 16, "v_channels": 16},
    "output": {"kind": "flow", "shape": [12, 16]},
}


class Shift(torch.nn.Module):
    """Knows the flow by the place in the picture, which its frames hold: x in red, y in green."""

    def __init__(self, tile=(12, 16)):
        super().__init__()
        self.config = perceiver_io.PerceiverIOConfig(**{**TINY, "input": {**TINY["input"], "shape": tile}})
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, frames, points=None):
        self.seen.append(frames)
        return frames[:, 0, ..., :2] / flow.PIXELS


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return tmp_path


def command(tiny, **options):
    small = {"--pairs": 8, "--held-out-pairs": 3, "--epochs": 2, "--batch-size": 4, "--motion": 2, "--threads": 1}
    start = ["train", "perceiver-flow", "--config", tiny / "tiny.json", "--output", tiny / "run"]
    return [*start, *(part for option in {**small, **options}.items() for part in option)]


# --- Loss and tiles ----------------------------------------------------------------------------------------------------------


def test_the_endpoint_error_is_the_mean_over_valid_pixels():
    batch = {"flow": torch.tensor([[[[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]]]), "valid": torch.tensor([[[True, True, False]]])}
    batch["frames"] = torch.zeros(1, 2, 1, 3, 3)

    def still(frames, points=None):
        return torch.zeros(1, 1, 3, 2)

    assert flow.EndpointError()(still, batch) == pytest.approx((5 + 2) / 2)
    found = flow.EndpointError().evaluate(still, [batch, batch])
    assert found == pytest.approx({"epe": 3.5, "zero_epe": 3.5, "outliers": 0.5, "held_out_loss": 3.5})


def test_a_step_asks_for_some_pixels():
    torch.manual_seed(0)
    item = RenderedFlow(1, Rendering(12, 16, translation=2.0), 0)[0, 0]
    batch = {name: tensor[None] for name, tensor in item.items()}
    model = perceiver_io.PerceiverIO(perceiver_io.PerceiverIOConfig(**TINY))
    losses = [flow.EndpointError(64)(model, batch).item() for _ in range(200)]
    assert torch.tensor(losses).mean() == pytest.approx(flow.EndpointError()(model, batch).item(), rel=0.05)
    assert len(set(losses)) > 100


def test_blend_weights():
    weights = flow.edge_weights(5, 7)
    assert weights.max() == 1 and torch.equal(weights, weights.flip(0)) and torch.equal(weights, weights.flip(1))
    assert torch.equal(3 * weights[2], torch.tensor([1.0, 2, 3, 3, 3, 2, 1]))
    assert torch.equal(3 * weights[:, 3], torch.tensor([1.0, 2, 3, 2, 1])) and (weights > 0).all()


def test_tiles_cover_everything_with_the_overlap():
    for length, tile, overlap in ((12, 12, 4), (13, 12, 4), (20, 12, 4), (100, 12, 4), (37, 5, 0)):
        starts = flow.tile_starts(length, tile, overlap)
        assert starts[0] == 0 and starts[-1] == length - tile and starts == sorted(set(starts))
        assert all(later - earlier <= tile - overlap for earlier, later in zip(starts, starts[1:], strict=False))
    with pytest.raises(InputError, match="overlap is 12"):
        flow.tile_starts(20, 12, 12)


@pytest.mark.parametrize("size", [(12, 16), (30, 41), (13, 17), (5, 40), (7, 9)])
def test_tiles_are_put_back_where_they_were_cut(size):
    """Also of frames that are smaller than a tile."""
    y, x = torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij")
    frames = torch.stack([torch.stack([x, y, 0 * x], -1)] * 2)
    model = Shift()
    found = flow.tiled_flow(model, frames, overlap=4, batch_size=3, progress=False)
    torch.testing.assert_close(found, frames[0, ..., :2], rtol=1e-5, atol=1e-5)
    assert all(cut.shape[1:] == (2, 12, 16, 3) and len(cut) <= 3 for cut in model.seen)


def test_tiles_that_cannot_be():
    frames = torch.zeros(2, 5, 40, 3)
    for options, message in (
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"overlap": 12}, "overlap is 12; it must be 0 or more, and below the size of a tile, 12"),
        ({"overlap": -1}, "overlap is -1"),
    ):
        with pytest.raises(InputError, match=message):
            flow.tiled_flow(Shift(), frames, progress=False, **options)
    # The default overlap is more than such a tile has.
    assert flow.tiled_flow(Shift(), frames, progress=False).shape == (5, 40, 2)


def test_a_tile_counts_by_the_distance_to_its_edge():
    """Two tiles that disagree: from one's value to the other's in a line over what they share."""

    class Number(Shift):
        def forward(self, frames, points=None):
            self.seen.append(frames)
            return torch.full((1, *frames.shape[2:4], 2), len(self.seen) / flow.PIXELS)

    found = flow.tiled_flow(Number((9, 8)), torch.zeros(2, 9, 12, 3), overlap=4, progress=False)[4, :, 0]
    shared = torch.tensor([1.0, 2, 3, 4]) / 5
    torch.testing.assert_close(found, torch.cat([torch.ones(4), 1 + shared, 2 * torch.ones(4)]))


# --- Trainings ---------------------------------------------------------------------------------------------------------------


def test_a_training_on_rendered_pairs_and_its_prediction(tiny, capsys):
    assert run(*command(tiny)) == 0
    out = capsys.readouterr().out
    assert "no motion" in out and "endpoint error" in out
    folder = tiny / "run"
    assert (folder / "flow.png").stat().st_size > 10_000 and (folder / "learning-curve.png").stat().st_size > 10_000
    history = json.loads((folder / "task.json").read_text())["history"]
    assert [row["epoch"] for row in history] == [1, 2] and history[0]["zero_epe"] == history[1]["zero_epe"] > 0.5
    for name, size in (("a", (40, 30)), ("b", (40, 30)), ("c", (41, 30))):
        Image.effect_noise(size, 80).convert("RGB").save(tiny / f"{name}.png")
    output = ["--output", tiny / "found.flo"]
    assert run("predict", "--checkpoint", folder, tiny / "a.png", tiny / "b.png", *output) == 0
    assert "pixels in the mean" in capsys.readouterr().out
    found, valid = flow_files.read(tiny / "found.flo")
    assert found.shape == (30, 40, 2) and valid.all()
    with Image.open(tiny / "found.png") as image:
        assert image.size == (40, 30)
    (folder / "task.json").rename(tiny / "task.json")  # as converted weights stand in a folder
    assert run("predict", "--checkpoint", folder, tiny / "a.png", tiny / "b.png", "--output", tiny / "again.flo") == 0
    assert (tiny / "again.flo").read_bytes() == (tiny / "found.flo").read_bytes()
    capsys.readouterr()
    for arguments, message in (
        ([tiny / "a.png"], "takes two images"),
        ([tiny / "a.png", tiny / "c.png"], "30 x 41 pixels"),
        ([tiny / "a.png", tiny / "gone.png"], "gone.png cannot be read as an image"),
        ([tiny / "a.png", tiny / "b.png", "--output", "x.png"], "must end in .flo"),
        # Before the pictures are looked at.
        ([tiny / "gone.png", tiny / "b.png", "--output", tiny / "no/x.flo"], f"no/x.flo, but {tiny / 'no'} is not a folder"),
    ):
        assert run("predict", "--checkpoint", folder, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("layout", ["sintel", "kitti", "chairs"])
def test_a_training_on_a_folder(tiny, layout, capsys):
    pairs = RenderedFlow(3, Rendering(14, 20, translation=2.0), 0)
    for number in range(3):
        write_pair(tiny / "data", *(pairs[0, number][name] for name in ("frames", "flow")), layout, number)
    assert run(*command(tiny, **{"--data": tiny / "data", "--batch-size": 2, "--val-fraction": 0.3, "--points": 50})) == 0
    assert "2 pairs of 12 x 16 pixels to train on, 1 held out" in capsys.readouterr().out


def test_bad_input(tiny, capsys):
    def fails(message, **options):
        assert run(*command(tiny, **options)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not (tiny / "run").exists()

    fails("gone is not a folder", **{"--data": tiny / "gone"})
    fails("has no optical flow", **{"--data": tiny})
    fails("allowed are a .json file and perceiver-io-flow", **{"--config": "flow"})
    fails("--points is for a model that puts out every pixel", **{"--config": "perceiver-io-flow-conv", "--points": 9})
    write_pair(tiny / "data", torch.zeros(2, 8, 30, 3), torch.zeros(8, 30, 2), "chairs", 0)
    fails("8 x 30 pixels; the model needs 12 x 16", **{"--data": tiny / "data"})


def test_the_demo(tmp_path, capsys):
    options = ["--epochs", 1, "--pairs", 16, "--held-out-pairs", 4, "--threads", 1, "--output", tmp_path]
    assert run("train", "perceiver-flow-demo", *options) == 0
    out = capsys.readouterr().out
    assert "adds the query" in out and "model" in out and (tmp_path / "flow.png").stat().st_size > 10_000

"""Optical flow: what is rendered is exact, files are read as they were written, broken ones are named, folders are found."""

import struct

import pytest
import torch
from flow_files_of import write_pair
from PIL import Image
from torch.nn import functional as F

from mmkernels.models import InputError
from mmkernels.train.data import flow_files, flow_pairs, rendered_flow
from mmkernels.train.data.rendered_flow import RenderedFlow, Rendering, draw_scene, grid

SMALL = Rendering(20, 28, translation=4.0, rotation=15.0, shapes=(2, 4))


# --- Rendered pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_what_is_seen_at_p_is_seen_again_at_p_plus_flow(seed):
    """In float64, at the pixels and between them: to rounding wherever nothing is in front, and rarely elsewhere."""
    scene = draw_scene(SMALL, torch.Generator().manual_seed(seed), rendered_flow.sample_photos())
    for name, tensor in vars(scene).items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            setattr(scene, name, tensor.double())
    scene.inverses = torch.linalg.inv(scene.matrices)
    places = grid(20, 28, samples=2).double()
    flow, visible = scene.flow(places)
    apart = (scene.colors(places, 0) - scene.colors(places + flow, 1)).abs().amax(-1)
    assert 0.5 < visible.double().mean() < 1 and apart[visible].max() < 1e-9
    assert (apart[~visible] > 1e-3).double().mean() > 0.9


def test_frames_are_those_that_the_flow_warps_into_each_other():
    """The second frame, looked at by bilinear interpolation where the flow points, is the first one but for edges."""
    pairs = RenderedFlow(6, Rendering(48, 64, translation=3.0, shapes=(1, 3)), 0, rendered_flow.sample_photos())
    warped_error, still_error = [], []
    for index in range(6):
        item = pairs[0, index]
        first, second = item["frames"]
        there = grid(48, 64).view(48, 64, 2) + item["flow"]
        look = (2 * there + 1) / torch.tensor([64, 48]) - 1
        warped = F.grid_sample(second.permute(2, 0, 1)[None], look[None], align_corners=False)[0].permute(1, 2, 0)
        warped_error.append((warped - first).abs().mean(-1)[item["visible"]])
        still_error.append((second - first).abs().mean(-1)[item["visible"]])
    assert torch.cat(warped_error).median() < 0.02
    assert torch.cat(warped_error).mean() < 0.4 * torch.cat(still_error).mean()


def test_a_layer_moves_as_its_affine_motion_says():
    still = Rendering(20, 28, translation=0.0, rotation=0.0, scaling=0.0)
    item = RenderedFlow(1, still, 3)[0, 0]
    assert item["flow"].abs().max() < 1e-5 and item["visible"].all()
    assert (item["frames"][0] - item["frames"][1]).abs().max() < 1e-3
    shifted = RenderedFlow(20, Rendering(20, 28, translation=4.0, rotation=0.0, scaling=0.0, shapes=(1, 1)), 3)
    for index in range(20):  # two layers, so two motions
        assert 1 <= len({tuple(v) for v in (shifted[0, index]["flow"].view(-1, 2) * 1000).round().tolist()}) <= 3


def test_rendering_is_a_function_of_seed_epoch_and_index():
    photos = rendered_flow.sample_photos()
    one, other = (RenderedFlow(4, SMALL, 0, photos) for _ in range(2))
    for name in one[2, 1]:
        assert torch.equal(one[2, 1][name], other[2, 1][name])
    assert not torch.equal(one[2, 1]["frames"], one[3, 1]["frames"])
    assert not torch.equal(one[2, 1]["frames"], one[2, 2]["frames"])
    kept = RenderedFlow(4, SMALL, 0, photos, keep=True)
    assert torch.equal(kept[None, 1]["frames"], one[None, 1]["frames"])
    assert torch.equal(kept[5, 1]["frames"], RenderedFlow(4, SMALL, 0, photos, keep=True)[5, 1]["frames"])
    prints = [one.fingerprint(), kept.fingerprint(), RenderedFlow(4, SMALL, 1, photos).fingerprint()]
    assert len(set(prints)) == 3 and one.fingerprint() == other.fingerprint()
    with pytest.raises(InputError, match="height is 0"):
        Rendering(0, 4)


def test_augmentation_mirrors_frames_and_flow_alike():
    """The bright point of the first frame is where the flow says it went, whatever was mirrored."""
    frames, flow = torch.full((2, 9, 11, 3), -0.1), torch.zeros(9, 11, 2)
    frames[0, 2, 3], frames[1, 4, 8], flow[2, 3] = 1.0, 1.0, torch.tensor([5.0, 2.0])
    item = {"frames": frames, "flow": flow, "valid": flow.abs().sum(-1) > 0}
    seen = set()
    for seed in range(40):
        found = flow_pairs.augmented(item, torch.Generator().manual_seed(seed))
        (row, column), (to_row, to_column) = (divmod(int(f.abs().sum(-1).argmax()), 11) for f in found["frames"])
        assert found["valid"][row, column] and found["flow"][row, column].tolist() == [to_column - column, to_row - row]
        seen.add((row, column))
    assert len(seen) == 4


# --- Files -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def known():
    generator = torch.Generator().manual_seed(0)
    return 20 * torch.randn(5, 7, 2, generator=generator), torch.rand(5, 7, generator=generator) > 0.3


def test_flo_files(tmp_path, known):
    flow, valid = known
    flow_files.write_flo(tmp_path / "a.flo", flow, valid)
    content = (tmp_path / "a.flo").read_bytes()
    assert content[:4] == b"PIEH" and struct.unpack("<ii", content[4:12]) == (7, 5) and len(content) == 12 + 5 * 7 * 8
    assert struct.unpack("<f", content[12:16])[0] == (flow[0, 0, 0] if valid[0, 0] else pytest.approx(2e9))
    found, mask = flow_files.read(tmp_path / "a.flo")
    assert torch.equal(mask, valid) and torch.equal(found[valid], flow[valid]) and not found[~valid].any()
    assert flow_files.size(tmp_path / "a.flo") == (5, 7)


def test_kitti_files(tmp_path, known):
    flow, valid = known
    flow_files.write_kitti(tmp_path / "a.png", flow, valid)
    content = (tmp_path / "a.png").read_bytes()
    assert tuple(content[24:26]) == (16, 2)  # bits a channel, RGB
    found, mask = flow_files.read(tmp_path / "a.png")
    assert torch.equal(mask, valid) and not found[~valid].any()
    assert (found - flow)[valid].abs().max() <= 0.5 / 64 + 1e-6
    with pytest.raises(InputError, match="KITTI's files hold -512 to 511.98"):
        flow_files.write_kitti(tmp_path / "b.png", 600 + flow)
    assert not (tmp_path / "b.png").exists()


def test_broken_flow_files_are_named(tmp_path, known):
    flow_files.write_flo(tmp_path / "good.flo", known[0])
    flow_files.write_kitti(tmp_path / "good.png", known[0])
    flo, png = ((tmp_path / f"good.{end}").read_bytes() for end in ("flo", "png"))
    Image.new("RGB", (7, 5)).save(tmp_path / "eight.png")
    Image.new("RGB", (7, 5)).save(tmp_path / "jpeg.png", format="JPEG")
    damaged = bytearray(png)
    damaged[60] ^= 1
    for name, content, message in (
        ("empty.flo", b"", "begins with b''"),
        ("foreign.flo", b"RIFF" + flo[4:], "begins with b'RIFF'"),
        ("header.flo", flo[:9], "is truncated: it has 9 bytes"),
        ("short.flo", flo[:-1], "is truncated: 7 x 5 pixels are 280 bytes of flow, it has 279"),
        ("long.flo", flo + b"0", "is too long"),
        ("negative.flo", flo[:4] + struct.pack("<ii", -7, 5) + flo[12:], "-7 x 5 pixels; both must be positive"),
        ("empty.png", b"", "cannot be read"),
        ("short.png", png[:-20], "cannot be read"),
        ("end.png", png[:-1], "cannot be read"),
        ("damaged.png", bytes(damaged), "cannot be read"),
        ("eight.png", None, "is no PNG of flow: it is 8 bits a channel"),
        ("jpeg.png", None, "is no PNG of flow: it is JPEG"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as error:
            flow_files.read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(InputError, match="gone.flo cannot be read"):
        flow_files.read(tmp_path / "gone.flo")
    with pytest.raises(InputError, match=r"flow has shape \(3, 2\)"):
        flow_files.write_flo(tmp_path / "x.flo", torch.zeros(3, 2))
    flow_files.write_flo(tmp_path / "x.flo", known[0])
    for write in (flow_files.write_flo, flow_files.write_kitti):
        for valid in (known[1][:3, :3], known[1][:1], known[1].T, known[1][..., None], known[1].float()):
            with pytest.raises(InputError, match=r"valid has shape \(.*\) and dtype .*; it must be \(5, 7\), as the flow"):
                write(tmp_path / "x.flo", known[0], valid)
    assert torch.equal(flow_files.read(tmp_path / "x.flo")[0], known[0])


def test_colours_are_middleburys():
    """Right is red, and around the circle through yellow, green (down: between), cyan, blue and magenta; none is white."""
    assert flow_files._wheel().shape == (55, 3)
    directions = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 0.0], [2.0, 0.0]])
    right, still, half, far = flow_files.colors(directions, 1.0).tolist()
    assert right == [255, 0, 0] or (right[0] > 240 and max(right[1:]) < 24)
    assert still == [255, 255, 255] and half[0] > 245 and 110 < half[1] < 140
    assert far[0] in range(180, 192) and max(far[1:]) < 20  # beyond what is shown: darker
    circle = torch.linspace(0, 2 * torch.pi, 56)[:-1]
    hues = flow_files.colors(torch.stack([circle.cos(), circle.sin()], -1), 1.0)
    assert (hues.amin(-1) < 30).all() and (hues.amax(-1) > 225).all() and len({tuple(h) for h in hues.tolist()}) > 50
    assert flow_files.colors(torch.zeros(2, 3, 2)).eq(255).all()


# --- Folders -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sintel", "kitti", "chairs"])
def test_folders(tmp_path, layout):
    item = RenderedFlow(1, SMALL, 0)[0, 0]
    paths = write_pair(tmp_path, item["frames"], item["flow"], layout)
    assert flow_pairs.scan(tmp_path) == [tuple(paths)]
    pairs = flow_pairs.FlowPairs(flow_pairs.scan(tmp_path), (16, 16))
    pairs.check(0)
    middle = pairs[None, 0]
    assert middle["frames"].shape == (2, 16, 16, 3) and (middle["flow"] - item["flow"][2:18, 6:22]).abs().max() < 0.01
    assert (middle["frames"] - item["frames"][:, 2:18, 6:22]).abs().max() < 0.01 and middle["valid"].all()
    assert torch.equal(pairs[3, 0]["flow"], pairs[3, 0]["flow"]) and pairs[3, 0]["flow"].shape == (16, 16, 2)
    parts = [item["flow"][y : y + 16, x : x + 16] for y in range(5) for x in range(13)]

    def are_parts(pairs):
        return [any((pairs[epoch, 0]["flow"] - part).abs().max() < 0.01 for part in parts) for epoch in range(8)]

    assert all(are_parts(pairs))
    mirrored = flow_pairs.FlowPairs(pairs.pairs, (16, 16), augment=True)
    assert not all(are_parts(mirrored)) and mirrored.fingerprint() != pairs.fingerprint()
    with pytest.raises(InputError, match="20 x 28 pixels; the model needs 24 x 24"):
        flow_pairs.FlowPairs(flow_pairs.scan(tmp_path), (24, 24)).check(0)
    Image.new("RGB", (27, 20)).save(paths[1])
    with pytest.raises(InputError, match="20 x 27 pixels, its flow"):
        pairs.check(0)
    paths[1].unlink()
    with pytest.raises(InputError, match="has no frame"):
        flow_pairs.scan(tmp_path)
    with pytest.raises(InputError, match="has no optical flow"):
        flow_pairs.scan(paths[0].parent if layout != "chairs" else make(tmp_path / "none"))
    with pytest.raises(InputError, match="is not a folder"):
        flow_pairs.scan(tmp_path / "gone")


def make(folder):
    folder.mkdir()
    return folder

"""Random crops of image files, and the centre that a model trained on them is shown."""

import numpy
import pytest
import torch
from PIL import Image

from mmkernels.train.data.folder import load
from mmkernels.train.data.images import Images, Preprocessing, random_region

WIDTH, HEIGHT = 250, 160


@pytest.fixture
def ramp(tmp_path):
    """A file whose red says where a pixel is from left to right, and its green from top to bottom."""
    x, y = numpy.meshgrid(numpy.arange(WIDTH), numpy.arange(HEIGHT))
    Image.fromarray(numpy.stack([x, y, 0 * x], -1).astype(numpy.uint8)).save(tmp_path / "ramp.png")
    return tmp_path / "ramp.png"


def box_of(image):
    """(left, upper, right, lower) that a normalised (size, size, 3) of `ramp` shows, to a pixel of the file."""
    red, green = image[..., 0] * 255 + 0.5, image[..., 1] * 255 + 0.5
    half = [(t[-1] - t[0]) / (2 * (len(t) - 1)) for t in (red.mean(0), green.mean(1))]
    means = red.mean(0), green.mean(1)
    return [means[0][0] - half[0], means[1][0] - half[1], means[0][-1] + half[0], means[1][-1] + half[1]]


def test_crops_show_what_was_drawn(ramp):
    preprocessing = Preprocessing("RGB", 32, [0.0] * 3, [1.0] * 3, centre=0.75)
    images = Images([ramp] * 40, [0] * 40, preprocessing, crop=0.1, seed=3)
    shares, shapes, places = [], [], []
    for index in range(40):
        left, upper, right, lower = (float(edge) for edge in box_of(images[0, index][0]))
        assert -1.5 <= left < right <= WIDTH + 1.5 and -1.5 <= upper < lower <= HEIGHT + 1.5
        shares.append((right - left) * (lower - upper) / (WIDTH * HEIGHT))
        shapes.append((right - left) / (lower - upper))
        places.append(left)
    assert min(shares) > 0.09 and max(shares) - min(shares) > 0.5
    # All of the image, 250:160, is what ten draws that do not fit leave.
    assert all(0.72 < shape < 1.37 or share > 0.97 for shape, share in zip(shapes, shares, strict=True))
    assert max(places) - min(places) > 60
    assert torch.equal(images[0, 5][0], images[0, 5][0]) and not torch.equal(images[0, 5][0], images[1, 5][0])
    centre = [(WIDTH - 120) / 2, (HEIGHT - 120) / 2, (WIDTH + 120) / 2, (HEIGHT + 120) / 2]
    assert [float(edge) for edge in box_of(images[None, 0][0])] == pytest.approx(centre, abs=1.5)


def test_regions_that_never_fit():
    assert random_region(1000, 10, 0.9, torch.Generator().manual_seed(0)) == (0, 0, 1000, 10)


def test_what_cannot_be_cropped():
    preprocessing = Preprocessing("RGB", 8, [0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="crop is 0.5; images of a tensor"):
        Images(torch.zeros(2, 3, 8, 8), [0, 1], preprocessing, crop=0.5)
    with pytest.raises(ValueError, match="centre is 1.5; it must be a number above 0 and at most 1"):
        Preprocessing("RGB", 8, [0.0] * 3, [1.0] * 3, centre=1.5)


def test_a_folder_with_and_without_crops(ramp):
    for name in ("a", "b"):
        (ramp.parent / "classes" / name).mkdir(parents=True)
        for i in range(3):
            (ramp.parent / "classes" / name / f"{i}.png").write_bytes(ramp.read_bytes())
    plain, _, whole, _ = load(ramp.parent / "classes", 16, 0, held_out=0.4)
    cropped, _, centred, _ = load(ramp.parent / "classes", 16, 0, held_out=0.4, crop=0.08)
    assert (plain.shift, whole.centre, cropped.shift, cropped.crop, centred.centre) == (0.1, None, 0.0, 0.08, 0.875)
    assert plain.fingerprint() != cropped.fingerprint()

"""RandAugment: what its operations do, that strength 0 does nothing, and that a seed repeats it."""

import pytest
import torch
from PIL import Image

from mmkernels.train.data.images import Images, Preprocessing
from mmkernels.train.data.randaugment import _OPERATIONS, apply, randaugment


def picture(channels=3, side=40):
    pixels = torch.rand(channels, side, side, generator=torch.Generator().manual_seed(0))
    return (pixels * 255).round() / 255


def of_pillow(mode="RGB"):
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    pixels = torch.stack([3 * x, 3 * y, x + y], -1).byte() + 60
    pixels[9, 9] = 20  # for what sharpness sees
    return Image.fromarray(pixels.numpy()).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("operation", _OPERATIONS)
def test_strength_is_what_an_operation_does(operation, mode):
    image = of_pillow(mode)
    still = apply(image, operation, 0.0, 1).tobytes() == image.tobytes()
    assert still == (operation not in ("autocontrast", "equalize"))
    changed = [apply(image, operation, 1.0, sign).tobytes() for sign in (1, -1)]
    gray = operation == "color" and mode == "L"
    assert (changed[0] == image.tobytes()) == (operation == "identity" or gray)
    two = operation in ("rotate", "contrast", "brightness", "sharpness") or operation[:2] in ("sh", "tr")
    assert (changed[0] != changed[1]) == (two or (operation == "color" and not gray))


def test_the_strongest_are_autoaugments():
    image = Image.new("L", (100, 100), 0)
    image.paste(255, (50, 0, 100, 100))
    pixels = torch.tensor(list(apply(image, "translate_x", 1.0, 1).tobytes())).view(100, 100)
    assert pixels[50].tolist() == [0] * 5 + [255] * 50 + [128] * 45
    assert torch.tensor(list(apply(image, "solarize", 0.5, 1).tobytes())).unique().tolist() == [0]  # 255 and above 128
    assert len(set(apply(Image.linear_gradient("L"), "posterize", 1.0, 1).tobytes())) == 2**4
    assert apply(Image.new("L", (1, 1), 100), "brightness", 1.0, 1).getpixel((0, 0)) == 190


def test_a_generator_repeats_it():
    def drawn(seed, channels=3):
        return randaugment(picture(channels), 4, 5, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))
    assert drawn(0).shape == (3, 40, 40) and drawn(0, 1).shape == (1, 40, 40)
    assert 0 <= drawn(0).min() and drawn(0).max() <= 1 and drawn(0).dtype == torch.float32
    torch.testing.assert_close(randaugment(picture(), 0, 5, torch.Generator()), picture(), rtol=0, atol=1e-6)


def test_only_images_to_train_on_get_it():
    images = torch.stack([picture()] * 3)
    preprocessing = Preprocessing("RGB", 40, [0.0] * 3, [1.0] * 3)
    plain, augmented = (Images(images, [0, 1, 2], preprocessing, augment=augment) for augment in ((0, 0), (4, 5)))
    assert torch.equal(plain[None, 1][0], augmented[None, 1][0])
    seen = [augmented[epoch, 0][0] for epoch in range(4)]
    assert torch.equal(seen[1], augmented[1, 0][0]) and not torch.equal(seen[0], seen[1])
    assert plain.fingerprint() != augmented.fingerprint()

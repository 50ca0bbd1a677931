"""RandAugment (Cubuk et al. 2020): some of 14 operations, drawn for every image, all of one strength; they are Pillow's."""

import torch

from ...models.registry import require

STRONGEST = 10  # of magnitudes, at which an operation is what AutoAugment has as its strongest
_GRAY = 128  # where an image is moved away
_OPERATIONS = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)


def randaugment(image: torch.Tensor, count: int, magnitude: float, generator: torch.Generator) -> torch.Tensor:
    """(channels, height, width) in [0, 1] -> the same of 8 bits after `count` operations, whatever may come twice.

    Args:
        image: float32, of one channel or three.
        count: N.
        magnitude: M, from 0 (nothing happens but autocontrast and equalize) to 10.
        generator: what is drawn comes from it.
    """
    library = require("PIL.Image", "train")
    numpy = require("numpy", "train")
    pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    picture = library.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    numbers = torch.randint(len(_OPERATIONS), (count,), generator=generator).tolist()
    signs = torch.randint(2, (count,), generator=generator).tolist()
    for number, sign in zip(numbers, signs, strict=True):
        picture = apply(picture, _OPERATIONS[number], magnitude / STRONGEST, 1 if sign else -1)
    pixels = torch.from_numpy(numpy.array(picture)).reshape(*image.shape[1:], -1)
    return pixels.permute(2, 0, 1).float() / 255


def apply(picture, operation: str, strength: float, sign: int):
    """A picture of Pillow after one operation of a strength from 0 to 1; `sign` is the direction of those that have two."""
    operations, enhance = require("PIL.ImageOps", "train"), require("PIL.ImageEnhance", "train")
    if operation in ("autocontrast", "equalize"):
        return getattr(operations, operation)(picture)
    if operation == "solarize":
        return operations.solarize(picture, round(256 * (1 - strength)))
    if operation == "posterize":
        return operations.posterize(picture, 8 - round(4 * strength))
    if operation in ("color", "contrast", "brightness", "sharpness"):
        return getattr(enhance, operation.capitalize())(picture).enhance(1 + 0.9 * sign * strength)
    fill = _GRAY if picture.mode == "L" else (_GRAY,) * 3
    if operation == "rotate":
        return picture.rotate(30 * sign * strength, fillcolor=fill)
    if operation == "identity":
        return picture
    kind, axis = operation.split("_")
    across = axis == "x"
    amount = 0.3 * sign * strength if kind == "shear" else 0.45 * sign * strength * picture.size[not across]
    shear, shift = (amount, 0) if kind == "shear" else (0, amount)
    matrix = (1, shear, shift, 0, 1, 0) if across else (1, 0, 0, shear, 1, shift)
    return picture.transform(picture.size, require("PIL.Image", "train").Transform.AFFINE, matrix, fillcolor=fill)

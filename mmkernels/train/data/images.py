"""Images as a model reads them: mode, size, normalisation, random crops, or small random shifts and scalings."""

import dataclasses
import functools
import math
from pathlib import Path

import torch
from torch.nn import functional as F

from ...models.registry import InputError, require
from . import derive_seed
from .randaugment import randaugment

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input; stored with a checkpoint, so that `predict` does the same."""

    mode: str  # PIL's: "L" one channel, "RGB" three
    size: int  # the model's input is size x size
    mean: list
    std: list
    native_size: int | None = None  # images are first brought to this resolution, the one the data was recorded at
    dark_background: bool = False  # images with a bright border are inverted
    centre: float | None = None  # side of the square in the middle that is seen, as a share of the shorter side; None: all

    def __post_init__(self):
        channels = {"L": 1, "RGB": 3}.get(self.mode)
        if channels is None:
            raise ValueError(f"mode is {self.mode!r}; allowed are 'L' and 'RGB'")
        for name in ("size", "native_size"):
            value = getattr(self, name)
            if not (value is None and name == "native_size") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it must be a positive integer")
        if self.centre is not None and not (isinstance(self.centre, (int, float)) and 0 < self.centre <= 1):
            raise ValueError(f"centre is {self.centre!r}; it must be a number above 0 and at most 1, or None")
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in (*self.mean, *self.std)):
            raise ValueError(f"mean and std are {self.mean} and {self.std}; they must be lists of finite numbers")
        if 0 in self.std:
            raise ValueError(f"std is {self.std}; it must not be zero")
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"mean and std have {len(self.mean)} and {len(self.std)} entries; mode {self.mode!r} needs {channels}"
            )

    def read(self, path, region=None) -> torch.Tensor:
        """The image file as float32 (channels, s, s) in [0, 1], s the native size; raises InputError naming the file.

        `region(width, height)`: the box (left, upper, right, lower) to be seen, in place of the centre.
        """
        image_library = require("PIL.Image", "train")
        numpy = require("numpy", "train")
        side = self.native_size or self.size
        filters = image_library.Resampling
        # Low-resolution recordings are sums over the area of a pixel.
        resample = filters.BOX if self.native_size else filters.BILINEAR
        try:
            with image_library.open(path) as image:
                image = as_seen(image).convert(self.mode)
                box = (region or self._middle)(*image.size)
                pixels = image.resize((side, side), resample, box, reducing_gap=3.0)
        except Exception as error:  # a damaged file makes its decoder raise anything
            raise InputError(f"{path} cannot be read as an image: {error or type(error).__name__}") from error
        tensor = torch.from_numpy(numpy.array(pixels, dtype=numpy.float32) / 255).reshape(side, side, -1).permute(2, 0, 1)
        if self.dark_background:
            border = torch.cat([tensor[:, 0], tensor[:, -1], tensor[:, :, 0], tensor[:, :, -1]], -1)
            if border.mean() > 0.5:
                tensor = 1 - tensor
        return tensor

    def _middle(self, width, height):
        if self.centre is None:
            return 0, 0, width, height
        side = self.centre * min(width, height)
        left, upper = (width - side) / 2, (height - side) / 2
        return left, upper, left + side, upper + side

    def finish(self, image: torch.Tensor, transform: torch.Tensor | None = None) -> torch.Tensor:
        """(channels, s, s) -> normalised (size, size, channels), sampled through an affine `transform` (2, 3)."""
        if transform is None:
            transform = torch.eye(2, 3)
        grid = F.affine_grid(transform[None], [1, image.shape[0], self.size, self.size], align_corners=False)
        # Outside the image is what its border shows, so that a shift leaves no frame.
        image = F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
        return (image.permute(1, 2, 0) - torch.tensor(self.mean)) / torch.tensor(self.std)


def random_region(width: int, height: int, least: float, generator) -> tuple:
    """A box (left, upper, right, lower) of `least` to all of the area and 3:4 to 4:3 in shape, anywhere (Szegedy et al. 2015);
    after ten that do not fit, all of the image."""
    for area, shape, x, y in torch.rand(10, 4, generator=generator).tolist():
        area, shape = (least + (1 - least) * area) * width * height, 3 / 4 + (4 / 3 - 3 / 4) * shape
        across, down = math.sqrt(area * shape), math.sqrt(area / shape)
        if across <= width and down <= height:
            left, upper = x * (width - across), y * (height - down)
            return left, upper, min(left + across, width), min(upper + down, height)
    return 0, 0, width, height


def as_seen(image):
    """A PIL image as a viewer shows it: turned as its EXIF data says, on white where it is transparent, 8 bits a channel.

    Raises ValueError for pixels whose range is unknown: floating-point numbers, integers beyond 16 bits.
    """
    image = require("PIL.ImageOps", "train").exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; allowed are 8 and 16 bits a channel")
    if image.mode.startswith("I"):  # PIL's own conversion to 8 bits cuts off what is above 255
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise ValueError(f"its pixels run from {low} to {high}; allowed are 8 and 16 bits a channel")
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5, "L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = require("PIL.Image", "train").new("RGBA", image.size, "white")
        return white.alpha_composite(image) or white
    return image


class Images(torch.utils.data.Dataset):
    """(epoch, index) -> (image (size, size, channels), label); epoch None: no augmentation.

    Args:
        images: a tensor (n, channels, s, s), or a list of paths to read.
        labels: class numbers, or targets (n, classes), ones where an image shows a class.
        preprocessing: how an image becomes an input.
        shift: largest shift, as a share of the side.
        scale: largest relative change of size.
        flip: mirror half of the images left to right.
        crop: least share of the area that `random_region` shows of an image file; 0: the whole image.
        augment: (N, M) of `randaugment`.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images,
        labels,
        preprocessing: Preprocessing,
        *,
        shift=0.0,
        scale=0.0,
        flip=False,
        crop=0.0,
        augment=(0, 0),
        seed=0,
    ):
        if crop and isinstance(images, torch.Tensor):
            raise ValueError(f"crop is {crop}; images of a tensor have their size already, and crop must be 0")
        self.images, self.labels, self.preprocessing = images, labels, preprocessing
        self.shift, self.scale, self.flip, self.crop = shift, scale, flip, crop
        self.augment, self.seed = tuple(augment), seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        image, generator, transform, region = self.images[index], None, None, None
        if epoch is not None:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, index))
            transform = self._draw(generator)
            if self.crop:
                region = functools.partial(random_region, least=self.crop, generator=generator)
        if isinstance(image, (str, Path)):
            image = self.preprocessing.read(image, region)
        if epoch is not None and self.augment[0]:
            image = randaugment(image, *self.augment, generator)
        return self.preprocessing.finish(image, transform), self.labels[index]

    def fingerprint(self) -> int:
        """Changes with the images (tensors by value, files by path), the labels, and how they are read and augmented."""
        images = self.images
        images = [str(i) for i in images] if not isinstance(images, torch.Tensor) else images.numpy().tobytes()
        labels = self.labels.tolist() if isinstance(self.labels, torch.Tensor) else self.labels
        parts = [images, labels, self.preprocessing, self.shift, self.scale, self.flip, self.seed]
        return derive_seed(*parts, *([self.augment] if self.augment[0] else []), *([self.crop] if self.crop else []))

    def _draw(self, generator):
        dx, dy, size, mirror = torch.rand(4, generator=generator).tolist()
        zoom = math.exp((2 * size - 1) * self.scale)
        sign = -1.0 if self.flip and mirror < 0.5 else 1.0
        # Coordinates run from -1 to 1: a share of the side is twice that number.
        return torch.tensor([[sign * zoom, 0, 2 * self.shift * (2 * dx - 1)], [0, zoom, 2 * self.shift * (2 * dy - 1)]])

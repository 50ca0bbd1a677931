"""Pairs of frames with optical flow from folders, as the public data sets lay them out.

| layout | first frame | second frame | flow |
|---|---|---|---|
| Sintel | `clean/SCENE/frame_0001.png` (or `final`) | the next one | `flow/SCENE/frame_0001.flo` |
| KITTI 2015 | `image_2/000000_10.png` | `image_2/000000_11.png` | `flow_occ/000000_10.png` (or `flow_noc`) |
| KITTI 2012 | `colored_0/000000_10.png` | `colored_0/000000_11.png` | the same |
| FlyingChairs | `NAME_img1.ppm` | `NAME_img2.ppm` | `NAME_flow.flo` |

Any picture format will do, and so will a mixture of them in one folder.
"""

import re
from pathlib import Path

import torch

from ...models.registry import InputError, require
from . import derive_seed, flow_files
from .images import EXTENSIONS
from .media import read_picture


def scan(folder) -> list:
    """[(first frame, second frame, flow), ...] of all layouts under `folder`, by the names of the flow files.

    Raises InputError where there is no folder, no flow, or a flow without its frames.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it must hold pairs of frames and their optical flow")
    found = []
    for path in sorted(folder.rglob("*")):
        frames = _frames_of(path) if path.is_file() else None
        if frames is None:
            continue
        pictures = [_picture(frame) for frame in frames]
        if missing := [frame for frame, picture in zip(frames, pictures, strict=True) if picture is None]:
            # The last frame of a Sintel scene has no flow, but a flow has both frames.
            raise InputError(f"{path} has no frame {missing[0]} beside it, ending in {', '.join(EXTENSIONS)}")
        found.append((*pictures, path))
    if not found:
        raise InputError(f"{folder} has no optical flow; allowed are the layouts of Sintel, KITTI and FlyingChairs")
    return found


def _frames_of(path):
    """Paths of both frames without their extension, or None for a file that is no flow."""
    parts, name = path.parts, path.stem
    if path.suffix.lower() == ".flo" and name.endswith("_flow"):
        return [path.with_name(name.removesuffix("_flow") + end) for end in ("_img1", "_img2")]
    if path.suffix.lower() == ".flo" and "flow" in parts and (number := re.search(r"\d+$", name)):
        following = f"{int(number[0]) + 1:0{len(number[0])}d}"
        at = len(parts) - 1 - parts[::-1].index("flow")
        for rendering in ("clean", "final"):
            scene = Path(*parts[:at], rendering, *parts[at + 1 : -1])
            if scene.is_dir():
                return [scene / name, scene / (name[: number.start()] + following)]
        return [scene / name] * 2  # that is missing
    if path.suffix.lower() == ".png" and path.parent.name in ("flow_occ", "flow_noc"):
        if path.parent.name == "flow_noc" and (path.parent.with_name("flow_occ") / path.name).is_file():
            return None  # the same pair, without what gets covered
        scene = next((s for s in ("image_2", "colored_0") if (path.parent.with_name(s)).is_dir()), "image_2")
        second = re.sub(r"\d+$", lambda number: f"{int(number[0]) + 1:0{len(number[0])}d}", name)
        return [path.parent.with_name(scene) / frame for frame in (name, second)]
    return None


def _picture(path):
    candidates = (path.with_name(path.name + end) for extension in EXTENSIONS for end in (extension, extension.upper()))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def read_frame(path) -> torch.Tensor:
    """(H, W, 3) in [-1, 1]."""
    numpy = require("numpy", "train")
    return torch.from_numpy(numpy.asarray(read_picture(path), dtype=numpy.float32) / 127.5 - 1)


class FlowPairs(torch.utils.data.Dataset):
    """(epoch, index) -> {"frames": (2, h, w, 3) in [-1, 1], "flow": (h, w, 2), "valid": bool (h, w)}.

    For training a random part of the pair is cut out, else the one in the middle.

    Args:
        pairs: of `scan`.
        size: (h, w), what is cut out; larger than a pair is an error that names it.
        seed: of the places and the augmentation.
        augment: whether pairs to train on are also `augmented`.
    """

    def __init__(self, pairs: list, size, seed=0, augment=False):
        self.pairs, self.size, self.seed, self.augment = pairs, tuple(size), seed, augment

    def __len__(self):
        return len(self.pairs)

    def check(self, index) -> None:
        """Raises InputError naming what of a pair cannot be read or does not fit the others."""
        first, second, path = self.pairs[index]
        height, width = flow_files.size(path)
        for frame in (first, second):
            if (found := read_picture(frame).size[::-1]) != (height, width):
                raise InputError(f"{frame} has {_by(found)} pixels, its flow {path} has {_by((height, width))}")
        if height < self.size[0] or width < self.size[1]:
            raise InputError(f"{path} has {_by((height, width))} pixels; the model needs {_by(self.size)} or more")

    def __getitem__(self, key):
        epoch, index = key
        first, second, path = self.pairs[index]
        flow, valid = flow_files.read(path)
        frames = torch.stack([read_frame(first), read_frame(second)])
        generator = None if epoch is None else torch.Generator().manual_seed(derive_seed(self.seed, epoch, index))
        places = torch.rand(2, generator=generator).tolist() if generator is not None else (0.5, 0.5)
        rows, columns = (
            slice(start := int(place * (n - size + 1) * 0.999999), start + size)
            for place, n, size in zip(places, flow.shape, self.size, strict=False)
        )
        item = {"frames": frames[:, rows, columns], "flow": flow[rows, columns], "valid": valid[rows, columns]}
        return augmented(item, generator) if self.augment and generator is not None else item

    def fingerprint(self) -> int:
        """Changes with the paths, the size, the seed and whether pairs are augmented."""
        return derive_seed([tuple(map(str, pair)) for pair in self.pairs], self.size, self.seed, self.augment)


def augmented(item: dict, generator) -> dict:
    """A pair mirrored in each direction half of the time, and its colours exchanged or inverted; the flow goes with it."""
    left, down, inverted = (torch.rand(3, generator=generator) < 0.5).tolist()
    order = torch.randperm(3, generator=generator)
    axes = [axis for axis, mirrored in ((-2, left), (-3, down)) if mirrored]
    signs = torch.tensor([-1.0 if left else 1.0, -1.0 if down else 1.0])
    result = {name: tensor.flip(axes) for name, tensor in item.items() if tensor.dim() > 2}
    result |= {name: tensor.flip([axis + 1 for axis in axes]) for name, tensor in item.items() if tensor.dim() == 2}
    result["frames"] = result["frames"][..., order] * (-1.0 if inverted else 1.0)
    result["flow"] = result["flow"] * signs
    return result


def _by(size):
    return f"{size[0]} x {size[1]}"

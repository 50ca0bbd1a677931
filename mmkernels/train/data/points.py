"""Clouds of points, as Perceiver reads ModelNet40: meshes in .off files, points in .npy, .txt and .xyz files."""

from pathlib import Path

import torch

from ...models.registry import InputError, require
from . import derive_seed

EXTENSIONS = (".npy", ".off", ".txt", ".xyz")
SPLITS = {"train": False, "test": True, "val": True}  # folder -> held out
JITTER = 0.01  # every point of a cloud to train on is scaled by a factor of 1 - JITTER to 1 + JITTER


class Points(torch.utils.data.Dataset):
    """(epoch, index) -> (points (n, 3), label), in a cube from -1 to 1 about their mean; epoch None: not scaled.

    Args:
        clouds: (clouds, n, 3).
        labels: class numbers.
        seed: of the scaling.
    """

    def __init__(self, clouds, labels: list, seed=0):
        self.clouds, self.labels, self.seed = clouds, labels, seed

    def __len__(self):
        return len(self.clouds)

    def __getitem__(self, key):
        epoch, index = key
        points = self.clouds[index]
        if epoch is not None:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, index))
            points = points * (1 + JITTER * (2 * torch.rand(len(points), 1, generator=generator) - 1))
        return in_cube(points), self.labels[index]

    def fingerprint(self) -> int:
        return derive_seed(self.clouds.numpy().tobytes(), self.labels, self.seed)


def in_cube(points) -> torch.Tensor:
    """(n, 3) moved and scaled: the mean is zero, the largest coordinate 1."""
    points = points - points.mean(0)
    return points / points.abs().max().clamp(min=1e-12)


def load(folder, count: int, seed: int, *, held_out=0.1):
    """(training, held out, classes) of folder/CLASS/train/FILE and CLASS/test/FILE, or of folder/CLASS/FILE.

    Of every file `count` points are drawn once. Without folders `test` (or `val`) a share of every class is held out.

    Raises InputError for a folder without two classes, a class without clouds to train on, and files that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--data is {folder}, which is no folder; it must hold one folder of clouds per class")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise InputError(f"--data {folder} has the class folders {classes}; a classifier needs at least two")
    files = [(path, label) for label, name in enumerate(classes) for path in _files(folder / name)]
    placed = [SPLITS.get(path.parent.name) if path.parent.parent != folder else None for path, _ in files]
    if not any(placed):
        if any(split is not None for split in placed):
            raise InputError(f"--data {folder} has folders 'train' and no 'test': nothing is held out")
        split = require("sklearn.model_selection", "train").train_test_split
        labels = [label for _, label in files]
        share = max(len(classes), round(held_out * len(files)))
        if min(map(labels.count, range(len(classes)))) < 2 or len(files) - share < len(classes):
            raise InputError(f"--data {folder} has {len(files)} clouds; of every class one must be held out and one left")
        _, held = split(range(len(files)), test_size=share, random_state=seed, stratify=labels)
        placed = [number in set(held) for number in range(len(files))]
    for label, name in enumerate(classes):
        if not any(own == label and split is False for (_, own), split in zip(files, placed, strict=True)):
            raise InputError(f"{folder / name} has no clouds to train on; allowed are files ending in {', '.join(EXTENSIONS)}")
    tqdm = require("tqdm", "train").tqdm
    bar = tqdm(files, desc="reading clouds", unit="cloud", leave=False, delay=1.0, dynamic_ncols=True)
    clouds = torch.stack([read(path, count, derive_seed(seed, str(path.relative_to(folder)))) for path, _ in bar])
    parts = []
    for wanted in (False, True):
        rows = [number for number, split in enumerate(placed) if split is wanted]
        parts.append(Points(clouds[rows], [files[number][1] for number in rows], seed))
    return *parts, classes


def _files(folder):
    """The clouds of a class, those of folders that are no split left out."""
    places = [folder, *(folder / name for name in SPLITS)]
    return [
        path
        for place in places
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.suffix.lower() in EXTENSIONS and path.is_file() and not path.name.startswith(".")
    ]


def read(path, count: int, seed: int) -> torch.Tensor:
    """(count, 3) of a file: drawn evenly on the faces of a mesh, or among its points, each as seldom twice as can be.

    The first three columns of .npy (n, 3 or more), .txt and .xyz (numbers between spaces or commas) are coordinates.

    Raises InputError naming the file where it cannot be read.
    """
    path = Path(path)
    generator = torch.Generator().manual_seed(seed)
    try:
        points, faces = _off(path.read_text()) if path.suffix.lower() == ".off" else (_table(path), None)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as points: {error}") from error
    if points.dim() != 2 or points.shape[1] < 3 or not len(points) or not points[:, :3].isfinite().all():
        raise InputError(f"{path} has numbers of shape {tuple(points.shape)}; it must have finite points, rows of 3 or more")
    points = points[:, :3]
    if faces is not None and len(faces):
        corners = points[faces]
        sides = corners[:, 1:] - corners[:, :1]
        areas = torch.linalg.cross(sides[:, 0], sides[:, 1]).norm(dim=-1)
        if areas.sum() > 0:
            chosen = torch.multinomial(areas.double(), count, replacement=True, generator=generator)
            # Evenly in a triangle: what falls into the other half of the parallelogram is turned into this one.
            a, b = torch.rand(2, count, 1, generator=generator)
            outside = a + b > 1
            a, b = torch.where(outside, 1 - a, a), torch.where(outside, 1 - b, b)
            return corners[chosen, 0] + a * sides[chosen, 0] + b * sides[chosen, 1]
    rounds = [torch.randperm(len(points), generator=generator) for _ in range(-(-count // len(points)))]
    return points[torch.cat(rounds)[:count]]


def _table(path):
    numpy = require("numpy", "train")
    if path.suffix.lower() == ".npy":
        return torch.from_numpy(numpy.load(path, allow_pickle=False).astype("float32"))
    lines = path.read_text().replace(",", " ").split("\n")
    if not any(line.strip() for line in lines):
        raise ValueError("it is empty")
    return torch.from_numpy(numpy.loadtxt(lines, dtype="float32", ndmin=2))


def _off(text):
    """(points (n, 3), triangles (m, 3)) of the Object File Format; some of ModelNet's have the counts in the first line."""
    words = (word for line in text.splitlines() for word in line.partition("#")[0].split())
    first = next(words, "")
    if not first.startswith("OFF"):
        raise ValueError(f"it begins with {first[:20]!r} in place of 'OFF'")
    try:
        count = int(first[3:] or next(words))
        faces = int(next(words))
        next(words)  # edges
        points = torch.tensor([[float(next(words)) for _ in range(3)] for _ in range(count)])
        triangles = []
        for _ in range(faces):
            corners = [int(next(words)) for _ in range(int(next(words)))]
            triangles += [(corners[0], b, c) for b, c in zip(corners[1:], corners[2:], strict=False)]
    except (StopIteration, RuntimeError):
        raise ValueError("it ends too early") from None
    triangles = torch.tensor(triangles, dtype=torch.int64).view(-1, 3)
    if len(triangles) and not (0 <= triangles.min() and triangles.max() < count):
        raise ValueError(f"a face has point {int(triangles.max())} of {count}")
    return points, triangles

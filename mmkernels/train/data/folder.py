"""A folder of class folders of images, and tables of images with labels."""

from pathlib import Path

from ...models.registry import InputError, require
from . import manifest
from .images import EXTENSIONS, Images, Preprocessing

_SMALL = {"shift": 0.1, "scale": 0.1}
_CENTRE = 7 / 8  # what a model trained on crops is shown: 224 of 256 pixels
# Mean and deviation of natural images (ImageNet's).
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def scan(folder) -> tuple:
    """(paths, labels, classes) of folder/<class>/**/<image>; classes in the order of their names.

    Raises InputError where there is no folder, fewer than two classes, or a class without images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; it must hold one folder of images per class")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"{folder} has no class folders; it must hold one folder of images per class, at least two")
    if len(classes) < 2:
        raise InputError(f"{folder} has only the class {classes[0]!r}; a classifier needs at least two class folders")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in EXTENSIONS and _is_visible_file(p))
        if not found:
            raise InputError(f"{folder / name} has no images; allowed are files ending in {', '.join(EXTENSIONS)}")
        paths += found
        labels += [label] * len(found)
    return paths, labels, classes


def _is_visible_file(path):
    return path.is_file() and not path.name.startswith(".")  # a Mac puts ._NAME beside every file it copies


def load(folder, size: int, seed: int, *, held_out_folder=None, held_out=0.1, **augmentation):
    """(training, held out, preprocessing, classes); without a `held_out_folder` a share of every class is held out.

    Every image is read once here, so that an unreadable one is named before the training starts. `augmentation`, of the
    training images, is that of `Images`, to which small shifts and scalings are added where there is no `crop`.
    """
    paths, labels, classes = scan(folder)
    if held_out_folder is not None:
        held_paths, held_labels, held_classes = scan(held_out_folder)
        if held_classes != classes:
            differ = sorted(set(held_classes) ^ set(classes))
            raise InputError(f"{held_out_folder} has other classes than {folder}: {', '.join(differ)}")
    else:
        split = require("sklearn.model_selection", "train").train_test_split
        smallest = min(range(len(classes)), key=labels.count)
        if labels.count(smallest) < 2:
            raise InputError(
                f"{Path(folder) / classes[smallest]} has one image; it needs two or more, so that one can be held out"
            )
        share = max(len(classes), round(held_out * len(paths)))
        if len(paths) - share < len(classes):
            raise InputError(
                f"--val-fraction is {held_out}, which holds out {share} of {len(paths)} images; at least {len(classes)}, one "
                "for every class, must be left to train on"
            )
        paths, held_paths, labels, held_labels = split(paths, labels, test_size=share, random_state=seed, stratify=labels)
    preprocessing = _preprocessing(size, augmentation)
    for path in (*paths, *held_paths):
        preprocessing.read(path)
    training = Images(paths, labels, preprocessing, **_with_shifts(augmentation), seed=seed)
    return training, Images(held_paths, held_labels, preprocessing), preprocessing, classes


def load_table(path, size: int, seed: int, *, held_out=0.1, on_error="stop", **augmentation):
    """(training, held out, preprocessing, classes, problems) of a table of images with any number of labels each.

    See `manifest.load_images` and `load`; labels are targets of ones and zeros, of a column `label` as well as of `labels`.
    """
    preprocessing = _preprocessing(size, augmentation)
    training, held, labels, problems = manifest.load_images(
        path, seed, preprocessing.read, held_out=held_out, on_error=on_error
    )
    if len(labels.heads) > 1:
        raise InputError(f"{path} has labels {', '.join(labels.heads)}; images take one column, 'label' or 'labels'")
    training = Images(*training, preprocessing, **_with_shifts(augmentation), seed=seed)
    return training, Images(*held, preprocessing), preprocessing, labels.names, problems


def _preprocessing(size, augmentation):
    return Preprocessing("RGB", size, _MEAN, _STD, centre=_CENTRE if augmentation.get("crop") else None)


def _with_shifts(augmentation):
    return augmentation if augmentation.get("crop") else {**_SMALL, **augmentation}

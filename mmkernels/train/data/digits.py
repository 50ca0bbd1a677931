"""scikit-learn's handwritten digits: 1797 images of 8 x 8, sampled up to the model's resolution."""

import torch

from ...models.registry import require
from .images import Images, Preprocessing

CLASSES = [str(digit) for digit in range(10)]


def load(size: int, seed: int, held_out=0.2):
    """(training, held out, preprocessing); the split is drawn by `seed`, with equal shares of every class."""
    digits = require("sklearn.datasets", "train").load_digits()
    split = require("sklearn.model_selection", "train").train_test_split
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    rows, held_rows = split(range(len(images)), test_size=held_out, random_state=seed, stratify=digits.target)
    std, mean = torch.std_mean(images[rows])
    preprocessing = Preprocessing("L", size, [mean.item()], [std.item()], native_size=8, dark_background=True)
    labels = digits.target.tolist()
    training = Images(images[rows], [labels[r] for r in rows], preprocessing, shift=0.1, scale=0.1, seed=seed)
    return training, Images(images[held_rows], [labels[r] for r in held_rows], preprocessing), preprocessing

"""Clips of digits: scikit-learn's handwritten ones, moving over a dark ground, each with the same digit spoken.

Both are made hard on purpose, so that neither suffices. Of a clip of 0.64 s:

* the digit, sampled up to 16 x 16 pixels, moves along a line through 8 frames of 24 x 24; every frame is blurred (a mean over
  3 x 3 pixels), a gray bar of random place and direction, HIDDEN of the picture wide, lies over it, and noise of deviation
  NOISE (of the digit's full brightness) is added;
* the word begins at a random moment, in white noise at a signal-to-noise ratio of SNR_DB (over the word's own duration).

That is what held-out clips are like, and each of them always has the same image, speaker, movement and noise. For training
they are drawn anew by (seed, epoch, index), and so is the difficulty: from nearly clean to that. Writers are not named in the
data, so images are split at random; speakers are split by voice.
"""

import math

import torch
from torch.nn import functional as F

from ...models.registry import require
from . import derive_seed, spoken_digits
from .clips import Spectrogram, Video, Waveform

CLASSES = [str(digit) for digit in range(10)]
FRAMES, SIZE, DIGIT = 8, 24, 16
NOISE, HIDDEN, SNR_DB = 0.25, 0.3, 5.0
EASIEST_DB = 40.0
SPECTROGRAM = Spectrogram(
    seconds=0.64,
    sample_rate=spoken_digits.SAMPLE_RATE,
    mels=32,
    mean=-0.7,
    std=1.4,
    repeat=False,
    floor=0.01,  # digital silence is not far from what a quiet room gives
    frequency_mask_bins=8,
    time_masks=1,
    time_mask_frames=12,
)
# How a file is read that such a model is to classify.
READERS = {
    "rgb": Video(frames=FRAMES, stride=2, fps=25.0, size=SIZE, flip=False),
    "spectrogram": SPECTROGRAM,
    "waveform": Waveform(round(SPECTROGRAM.seconds * SPECTROGRAM.sample_rate), SPECTROGRAM.sample_rate),
}


class DigitClips(torch.utils.data.Dataset):
    """(epoch, index) -> ({"rgb": (8, 24, 24, 3), "spectrogram": (64, 32, 3), "waveform": (5120,)}, targets (10,)); epoch None:
    a window axis in front of every input, and no SpecAugment.

    Args:
        images: (n, 8, 8) in [0, 1].
        labels: digits.
        words: for every digit its waveforms.
        modalities: which of the three are given.
        seed: of all that is drawn.
        hardest: the greatest difficulty, that of held-out clips.
    """

    def __init__(self, images, labels, words, modalities, seed, hardest=1.0):
        self.images, self.labels, self.words = images, labels, words
        self.modalities, self.seed, self.hardest = tuple(modalities), seed, hardest

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        label, inputs = self.labels[index], {}
        for name in self.modalities:
            # A generator for each: the models of one modality get the very inputs of the model of both.
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, index, name))
            difficulty = self.hardest * (1.0 if epoch is None else torch.rand((), generator=generator).item())
            if name == "rgb":
                frames = moving(self.images[index], difficulty, generator)
                inputs[name] = frames[..., None].expand(-1, -1, -1, 3).contiguous()
            else:
                word = noisy(self.words[label], difficulty, generator)
                finish = SPECTROGRAM.finish if name == "spectrogram" else lambda samples, _: samples
                inputs[name] = finish(word, None if epoch is None else generator)
            if epoch is None:
                inputs[name] = inputs[name][None]
        return inputs, F.one_hot(torch.tensor(label), len(CLASSES)).float()

    def fingerprint(self) -> int:
        """Changes with images, labels, words and seed."""
        words = [[word.numpy().tobytes() for word in of_digit] for of_digit in self.words]
        return derive_seed(self.images.numpy().tobytes(), self.labels, words, self.modalities, self.seed, self.hardest)


def load(modalities, seed: int, *, held_out=0.2, clips=None, hardest=1.0):
    """(training, held out): `DigitClips`; the images are split by `seed` with equal shares of every digit.

    `clips` cuts both down, to so many to train on.
    """
    digits = require("sklearn.datasets", "train").load_digits()
    split = require("sklearn.model_selection", "train").train_test_split
    images, labels = torch.from_numpy(digits.images).float() / 16, digits.target.tolist()
    rows, held_rows = split(range(len(images)), test_size=held_out, random_state=seed, stratify=labels)
    if clips:
        rows, held_rows = rows[:clips], held_rows[: max(round(clips * held_out), 1)]
    return tuple(
        DigitClips(images[part], [labels[row] for row in part], spoken_digits.load(name), modalities, (seed, name), hardest)
        for part, name in ((rows, "train"), (held_rows, "test"))
    )


def moving(image, difficulty: float, generator) -> torch.Tensor:
    """(8, 8) in [0, 1] -> (8, 24, 24) in about [-1, 1]; `difficulty` 0 to 1: as a share of NOISE and HIDDEN."""
    x0, y0, x1, y1 = (2 * torch.rand(4, generator=generator) - 1).tolist()
    steps = torch.linspace(0, 1, FRAMES)
    reach = SIZE / DIGIT - 1  # how far the digit can go from the middle, in halves of its side
    transform = torch.zeros(FRAMES, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = SIZE / DIGIT
    transform[:, 0, 2] = -reach * torch.lerp(torch.tensor(x0), torch.tensor(x1), steps)
    transform[:, 1, 2] = -reach * torch.lerp(torch.tensor(y0), torch.tensor(y1), steps)
    grid = F.affine_grid(transform, [FRAMES, 1, SIZE, SIZE], align_corners=False)
    frames = F.grid_sample(image.expand(FRAMES, 1, -1, -1), grid, align_corners=False)[:, 0]
    frames = F.avg_pool2d(frames, 3, 1, 1)
    # A bar: all pixels whose distance from a line through the picture is below half of its width.
    angle, place = torch.rand(2, FRAMES, 1, 1, generator=generator)
    angle, place = math.pi * angle, (place - 0.5) * SIZE
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    distance = (axis * angle.cos() + axis[:, None] * angle.sin() - place).abs()
    frames = torch.where(distance < difficulty * HIDDEN * SIZE / 2, 0.5, frames)
    return 2 * (frames + difficulty * NOISE * torch.randn(frames.shape, generator=generator)) - 1


def noisy(words: list, difficulty: float, generator) -> torch.Tensor:
    """One of the waveforms at a random moment of a window of white noise; `difficulty` 0 to 1: from EASIEST_DB to SNR_DB."""
    which, moment = torch.rand(2, generator=generator).tolist()
    word = words[int(which * len(words))]
    samples = int(SPECTROGRAM.seconds * SPECTROGRAM.sample_rate)
    word = word[:samples]
    start = int(moment * (samples - len(word) + 1))
    decibels = EASIEST_DB + difficulty * (SNR_DB - EASIEST_DB)
    noise = torch.randn(samples, generator=generator) * word.square().mean().sqrt() * 10 ** (-decibels / 20)
    noise[start : start + len(word)] += word
    return noise

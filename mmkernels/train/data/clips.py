"""Clips of several modalities: how each becomes an input of a model, the windows read from it, and its augmentation.

A modality is read by an object with `seconds` (of its window), `shape` (of an input), `length(path)` and
`read(path, start, generator)`; READERS names the known ones. All modalities of a clip are read at the same share of their
length, so that they show the same moment.
"""

import dataclasses
import functools
import math

import torch
from torch.nn import functional as F

from ...models.registry import InputError, require
from . import derive_seed
from .media import check_frames, read_audio, read_frames, video_seconds


@dataclasses.dataclass(frozen=True)
class Spectrogram:
    """Log-mel spectrogram as MBT reads it: 100 bins a second, normalised, tiled to `channels`.

    log(max(mel @ |STFT|, floor)), Hann windows of 25 ms, triangles on the HTK mel scale from 0 Hz to half the sample rate.
    """

    seconds: float = 8.0
    sample_rate: int = 16000
    mels: int = 128
    mean: float = 1.102
    std: float = 2.762
    floor: float = 1e-6  # under the logarithm
    channels: int = 3
    repeat: bool = True  # sound that is shorter than the window; else there is silence around it
    # SpecAugment: bands of zeros, each of a width drawn up to the number given
    frequency_masks: int = 1
    frequency_mask_bins: int = 48
    time_masks: int = 4
    time_mask_frames: int = 48

    def __post_init__(self):
        if self.sample_rate % 100 or self.sample_rate < 1000:
            raise InputError(f"sample_rate is {self.sample_rate}; it must be a multiple of 100 of 1000 or more")
        if round(self.seconds * 100) < 2:
            raise InputError(f"seconds is {self.seconds}; it must be 0.02 or more")

    @property
    def shape(self) -> tuple:
        return round(self.seconds * 100), self.mels, self.channels

    def length(self, path) -> float:
        """Seconds of sound in a file. Raises InputError for a file that is unreadable or silent."""
        samples = read_audio(path, self.sample_rate)
        if samples.abs().max() < 1e-4:  # 80 dB below full scale
            raise InputError(f"{path} is silent: its largest sample is {samples.abs().max():.1g} of full scale")
        return len(samples) / self.sample_rate

    def read(self, path, start=0.0, generator=None) -> torch.Tensor:
        """float32 `shape` of the window that begins at `start` seconds; shorter sound is repeated, or padded."""
        wanted = self.shape[0] * self.sample_rate // 100
        samples = _window(read_audio(path, self.sample_rate), round(start * self.sample_rate), wanted, self.repeat)
        return self.finish(samples, generator)

    def finish(self, samples, generator=None) -> torch.Tensor:
        """(samples,) of one window -> `shape`; SpecAugment where there is a `generator`."""
        spectrogram = (log_mel(samples, self.sample_rate, self.mels, self.floor)[: self.shape[0]] - self.mean) / self.std
        if generator is not None:
            _mask(spectrogram, 0, self.time_masks, self.time_mask_frames, generator)
            _mask(spectrogram, 1, self.frequency_masks, self.frequency_mask_bins, generator)
        return spectrogram[:, :, None].expand(-1, -1, self.channels).contiguous()


@dataclasses.dataclass(frozen=True)
class Waveform:
    """Sound as it is: `samples` of it at `sample_rate`, in [-1, 1]; sound that is shorter is repeated."""

    samples: int = 30720
    sample_rate: int = 48000

    @property
    def shape(self) -> tuple:
        return (self.samples,)

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate

    def length(self, path) -> float:
        """Seconds of sound in a file. Raises InputError for a file that is unreadable."""
        return len(read_audio(path, self.sample_rate)) / self.sample_rate

    def read(self, path, start=0.0, generator=None) -> torch.Tensor:
        """float32 (samples,) of the window that begins at `start` seconds."""
        return _window(read_audio(path, self.sample_rate), round(start * self.sample_rate), self.samples)


def _window(samples, first, wanted, repeat=True):
    """`wanted` samples from `first` on; sound that is shorter is repeated, or gets silence around it."""
    first = min(first, len(samples) - 1)
    if len(samples) < wanted and not repeat:
        missing = wanted - len(samples)
        return F.pad(samples, (missing // 2, missing - missing // 2))
    if len(samples) - first < wanted:
        return samples[torch.arange(first, first + wanted) % len(samples)]
    return samples[first : first + wanted]


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames in [-1, 1]: `frames` of them, every `stride`-th at `fps`, a square of `size` pixels.

    Held-out clips show the middle of the picture. For training the picture is scaled by a factor of `scale`, cropped at a
    random place, mirrored half of the time (`flip`), its colours shifted with the probability `color_jitter` and dropped
    with `color_drop`; all frames of a clip alike.
    """

    frames: int = 32
    stride: int = 2
    fps: float = 25.0
    size: int = 224
    scale: tuple = (0.9, 1.33)
    flip: bool = True
    color_jitter: float = 0.8
    color_drop: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(self.scale))  # JSON has lists only

    @property
    def shape(self) -> tuple:
        return self.frames, self.size, self.size, 3

    @property
    def read_side(self) -> int:
        """Pixels of the shorter side as read: a crop of 224 is from 256, as in the recipe."""
        return round(self.size * 8 / 7)

    @property
    def seconds(self) -> float:
        return self.frames * self.stride / self.fps

    def length(self, path) -> float:
        """Seconds of a video file or a folder of frames. Raises InputError for a video file that is truncated, and where one
        of the frames, or the first or last of a video file, cannot be read."""
        return check_frames(path, self.fps, self.read_side)

    def read(self, path, start=0.0, generator=None) -> torch.Tensor:
        """float32 `shape` of the window that begins at `start` seconds; a shorter video is repeated."""
        times = [start + i * self.stride / self.fps for i in range(self.frames)]
        if times[-1] > 0 and (length := video_seconds(path, self.fps)) <= times[-1]:
            times = [time % length for time in times]
        order = sorted(range(len(times)), key=times.__getitem__)
        read = read_frames(path, [times[i] for i in order], self.fps, self.read_side)
        frames = torch.empty_like(read)
        frames[order] = read
        return self.finish(frames, generator)

    def finish(self, frames, generator=None) -> torch.Tensor:
        """uint8 (frames, height, width, 3) -> `shape`; augmented where there is a `generator`."""
        pixels = frames.permute(0, 3, 1, 2).float() / 255
        height, width = pixels.shape[2:]
        draws = torch.rand(10, generator=generator).tolist() if generator is not None else None
        low, high = self.scale
        zoom = low + (high - low) * draws[0] if draws else 1.0
        side = max(min(round(self.size / zoom), height, width), 1)
        top = int((height - side) * draws[1] + 0.5) if draws else (height - side) // 2
        left = int((width - side) * draws[2] + 0.5) if draws else (width - side) // 2
        pixels = pixels[:, :, top : top + side, left : left + side]
        if side != self.size:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        if draws:
            if self.flip and draws[3] < 0.5:
                pixels = pixels.flip(-1)
            if draws[4] < self.color_jitter:
                pixels = jitter_colors(pixels, draws[5:9])
            if draws[9] < self.color_drop:
                pixels = _gray(pixels).expand_as(pixels)
        return (2 * pixels - 1).permute(0, 2, 3, 1).contiguous()


READERS = {"video": Video, "spectrogram": Spectrogram, "waveform": Waveform}


def log_mel(samples, sample_rate: int, mels: int, floor=1e-6) -> torch.Tensor:
    """(samples,) in [-1, 1] -> (1 + samples // hop, mels), hop = sample_rate / 100; row i is centred on sample i * hop."""
    window = sample_rate // 40
    bank = _mel_bank(sample_rate, mels)
    fft = 2 * (bank.shape[1] - 1)
    # Zeros around it, so that a window of any length can be transformed.
    spectrum = torch.stft(
        samples, fft, sample_rate // 100, window, torch.hann_window(window), pad_mode="constant", return_complex=True
    )
    return (bank @ spectrum.abs()).clamp_min(floor).log().T


@functools.cache
def _mel_bank(sample_rate, mels):
    """(mels, 1 + fft / 2) triangles, by Kaldi's routine; fft is long enough that none of them is empty."""
    kaldi = require("kaldi_native_fbank", "media")
    # The lowest triangle is the narrowest: two steps of the mel scale wide.
    step = 700 * math.expm1(math.log1p(sample_rate / 2 / 700) / (mels + 1))
    fft = 2 ** math.ceil(math.log2(max(sample_rate / 40, sample_rate / (2 * step))))
    options = kaldi.FbankOptions()
    options.frame_opts.samp_freq = sample_rate
    options.frame_opts.frame_length_ms = 1000 * fft / sample_rate
    options.mel_opts.num_bins = mels
    options.mel_opts.low_freq, options.mel_opts.high_freq = 0, sample_rate / 2
    return torch.from_numpy(kaldi.MelBanks(options.mel_opts, options.frame_opts).get_matrix().copy())


def jitter_colors(pixels, draws) -> torch.Tensor:
    """(n, 3, height, width) in [0, 1] with other brightness, contrast, saturation and hue, by four `draws` from [0, 1)."""
    brightness, contrast, saturation, hue = (2 * draw - 1 for draw in draws)
    pixels = (pixels + brightness * 32 / 255).clamp(0, 1)
    mean = _gray(pixels).mean((1, 2, 3), keepdim=True)
    pixels = (mean + (1 + 0.4 * contrast) * (pixels - mean)).clamp(0, 1)
    gray = _gray(pixels)
    color = (1 + 0.4 * saturation) * (pixels - gray)
    # Hue: a turn about the gray axis (Rodrigues' formula), by up to a fifth of a circle.
    angle = 0.2 * hue * 2 * math.pi
    red, green, blue = color.unbind(1)
    turned = torch.stack([blue - green, red - blue, green - red], 1) / math.sqrt(3)
    along = color.mean(1, keepdim=True)
    color = along + math.cos(angle) * (color - along) + math.sin(angle) * turned
    return (gray + color).clamp(0, 1)


def _gray(pixels):
    weights = torch.tensor([0.2989, 0.587, 0.114])  # ITU-R BT.601
    return (pixels * weights[:, None, None]).sum(1, keepdim=True)


def _mask(spectrogram, axis, count, largest, generator):
    size = spectrogram.shape[axis]
    for width, place in torch.rand(count, 2, generator=generator).tolist():
        width = int(width * (min(largest, size) + 1))
        spectrogram.narrow(axis, int(place * (size - width + 1)), width).zero_()


class Clips(torch.utils.data.Dataset):
    """(epoch, index) -> ({modality: tensor}, targets float32 (classes,)).

    Epoch None: no augmentation, and `windows` windows, evenly spaced over the clip, stacked in front of every input.

    Args:
        paths: a dict {modality: path} per clip.
        lengths: a dict {modality: seconds} per clip.
        targets: float32 (clips, classes).
        readers: {modality: reader}.
        windows: read of every held-out clip.
        seed: of the augmentation.
    """

    def __init__(self, paths: list, lengths: list, targets, readers: dict, *, windows=1, seed=0):
        self.paths, self.lengths, self.targets = paths, lengths, targets
        self.readers, self.windows, self.seed = readers, windows, seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key
        if epoch is None:
            shares = [(i + 0.5) / self.windows if self.windows == 1 else i / (self.windows - 1) for i in range(self.windows)]
            views = [self._read(index, share, None) for share in shares]
            return {name: torch.stack([view[name] for view in views]) for name in self.readers}, self.targets[index]
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, index))
        return self._read(index, torch.rand((), generator=generator).item(), generator), self.targets[index]

    def fingerprint(self) -> int:
        """Changes with the paths, the targets, and how clips are read and augmented."""
        paths = [{name: str(path) for name, path in clip.items()} for clip in self.paths]
        return derive_seed(paths, self.targets.tolist(), self.readers, self.windows, self.seed)

    def _read(self, index, share, generator):
        inputs = {}
        for name, reader in self.readers.items():
            start = share * max(self.lengths[index][name] - reader.seconds, 0.0)
            inputs[name] = reader.read(self.paths[index][name], start, generator)
        return inputs

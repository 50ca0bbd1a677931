"""Spectrograms, frames and clips as a model gets them."""

import math

import pytest
import torch
from media_files import numbered, tone, write_video, write_wav
from PIL import Image

from mmkernels.models import InputError
from mmkernels.train.data.clips import Clips, Spectrogram, Video, Waveform, jitter_colors, log_mel

PLAIN = {"mean": 0.0, "std": 1.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- Sound ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "mels"), [(16000, 128), (8000, 32), (44100, 64)])
def test_log_mel_is_its_definition(rate, mels):
    """A Fourier sum and HTK's triangles in float64."""
    samples = 0.1 * torch.randn(rate // 5, generator=generator())
    found = log_mel(samples, rate, mels)
    assert found.shape == (21, mels)
    window, hop = rate // 40, rate // 100
    fft = 2 ** math.ceil(math.log2(window)) * (2 if (rate, mels) == (16000, 128) else 1)

    def mel(hertz):
        return 1127 * torch.log1p(torch.as_tensor(hertz, dtype=torch.float64) / 700)

    edges = torch.linspace(0, mel(rate / 2).item(), mels + 2, dtype=torch.float64)
    bins = mel(torch.arange(fft // 2 + 1) * rate / fft)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp_min(0)
    assert (triangles.sum(1) > 0).all()
    hann = 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(window, dtype=torch.float64) / window)
    padded = torch.nn.functional.pad(samples.double(), (fft, fft))
    for row in (0, 7, 20):
        start = fft + row * hop - fft // 2 + (fft - window) // 2
        piece = padded[start : start + window] * hann
        expected = (triangles @ torch.fft.rfft(piece, fft).abs()).clamp_min(1e-6).log()
        assert (found[row] - expected).abs().max() < 2e-3, row


def test_spectrogram_of_the_recipe(tmp_path):
    reader = Spectrogram()
    path = write_wav(tmp_path / "a.wav", tone(1000, 9, 16000)[None], 16000)
    assert reader.length(path) == 9.0 and reader.seconds == 8.0
    read = reader.read(path, start=0.5)
    assert read.shape == reader.shape == (800, 128, 3) and read.dtype == torch.float32
    assert torch.equal(read[..., 0], read[..., 1]) and torch.equal(read[..., 0], read[..., 2])
    raw = Spectrogram(**PLAIN).read(path, start=0.5)
    assert torch.allclose(read, (raw - 1.102) / 2.762)
    peaks = raw[5:-5, :, 0].argmax(-1)
    assert (peaks == round(129 * math.log1p(1000 / 700) / math.log1p(8000 / 700)) - 1).all()


def test_windows_and_short_sound(tmp_path):
    reader = Spectrogram(seconds=0.5, sample_rate=8000, mels=16, **PLAIN)
    samples = torch.cat([tone(500, 0.5, 8000), tone(2000, 0.5, 8000)])
    path = write_wav(tmp_path / "a.wav", samples[None], 8000)
    low, high = (reader.read(path, start)[10:-10, :, 0].argmax(-1) for start in (0.0, 0.5))
    assert low.unique().numel() == high.unique().numel() == 1 and low[0] < high[0]
    short = write_wav(tmp_path / "short.wav", samples[None, :1600], 8000)
    exact = write_wav(tmp_path / "exact.wav", samples[:1600].repeat(3)[None, :4000], 8000)
    assert torch.equal(reader.read(short), reader.read(exact))
    padded = Spectrogram(seconds=0.5, sample_rate=8000, mels=16, repeat=False, **PLAIN)
    around = torch.nn.functional.pad(samples[:1600], (1200, 1200))
    assert torch.equal(padded.read(short), padded.read(write_wav(tmp_path / "around.wav", around[None], 8000)))


def test_silence_is_an_error(tmp_path):
    path = write_wav(tmp_path / "quiet.wav", torch.zeros(1, 8000), 8000)
    with pytest.raises(InputError, match="quiet.wav is silent"):
        Spectrogram(sample_rate=8000).length(path)


def test_spec_augment():
    reader = Spectrogram(
        seconds=2.0, sample_rate=8000, mels=64, time_masks=2, time_mask_frames=30, frequency_mask_bins=20, **PLAIN
    )
    samples = 0.1 * torch.randn(16000, generator=generator())
    rows, columns = [], []
    for seed in range(50):
        masked = reader.finish(samples, generator(seed))[..., 0] == 0
        whole_rows, whole_columns = masked.all(1), masked.all(0)
        assert torch.equal(masked, whole_rows[:, None] | whole_columns)
        rows.append(int(whole_rows.sum()))
        columns.append(int(whole_columns.sum()))
        assert torch.equal(masked, reader.finish(samples, generator(seed))[..., 0] == 0)
    assert max(rows) <= 60 and max(rows) > 30 and 10 < max(columns) <= 20 and min(columns) <= 3
    assert not (reader.finish(samples) == 0).any()


def test_bad_readers():
    with pytest.raises(ValueError, match="sample_rate is 11025; it must be a multiple of 100"):
        Spectrogram(sample_rate=11025)
    with pytest.raises(ValueError, match="seconds is 0.001"):
        Spectrogram(seconds=0.001)


# --- Pictures ---------------------------------------------------------------------------------------------------------------


def test_held_out_frames_are_the_middle():
    frames = torch.randint(0, 256, (2, 16, 24, 3), generator=generator(), dtype=torch.uint8)
    finished = Video(frames=2, size=14).finish(frames)
    assert torch.allclose(finished, frames[:, 1:15, 5:19].float() / 127.5 - 1, atol=1e-6)


def test_frames_stride_and_repetition(tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered(20, 16, 16), 25)
    reader = Video(frames=4, stride=3, size=14)
    assert reader.seconds == pytest.approx(0.48) and reader.length(path) == pytest.approx(0.8, abs=0.01)

    def shown(start):
        red = (reader.read(path, start)[:, 7, 7, 0] + 1) * 127.5
        return (red / 10).round().int().tolist()

    assert shown(0.0) == [0, 3, 6, 9] and shown(0.2) == [5, 8, 11, 14]
    assert shown(0.6) == [15, 18, 1, 4]  # 21 and 24 of 20 frames: from the beginning again
    slow = write_video(tmp_path / "slow.mkv", numbered(10, 16, 16), 12)
    assert (reader.read(slow, 0.0)[:, 7, 7, 0] + 1).mul(12.75).round().tolist() == [0, 1, 3, 4]


def test_augmented_frames():
    frames = torch.randint(0, 256, (2, 32, 40, 3), generator=generator(), dtype=torch.uint8)
    reader = Video(frames=2, size=28)
    results = [reader.finish(frames, generator(seed)) for seed in range(20)]
    assert all(r.shape == reader.shape and r.min() >= -1 and r.max() <= 1 for r in results)
    assert torch.equal(results[3], reader.finish(frames, generator(3))) and not torch.equal(results[3], results[4])
    gray = Video(frames=2, size=28, color_drop=1.0).finish(frames, generator())
    assert torch.equal(gray[..., 0], gray[..., 1]) and torch.equal(gray[..., 0], gray[..., 2])
    # Only mirrored, half of the time: the picture as large as the crop, and no change of colour.
    crop = frames[:, :28, :28]
    still = Video(frames=2, size=28, scale=(1.0, 1.0), color_jitter=0.0, color_drop=0.0)
    plain = crop.float() / 127.5 - 1
    mirrored = [bool(torch.allclose(still.finish(crop, generator(seed)), plain.flip(2), atol=1e-6)) for seed in range(40)]
    same = [bool(torch.allclose(still.finish(crop, generator(seed)), plain, atol=1e-6)) for seed in range(40)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True)) and 10 < sum(mirrored) < 30


def test_color_jitter():
    pixels = 0.3 + 0.4 * torch.rand(2, 3, 8, 8, generator=generator())
    assert torch.allclose(jitter_colors(pixels, [0.5] * 4), pixels, atol=1e-6)
    gray = pixels[:, :1].expand(-1, 3, -1, -1)
    assert torch.allclose(jitter_colors(gray, [0.5, 0.5, 0.9, 0.9]), gray, atol=1e-4)
    assert torch.allclose(jitter_colors(pixels, [1.0, 0.5, 0.5, 0.5]), pixels + 32 / 255, atol=1e-6)
    # A third of a circle takes red to green: five thirds of the largest turn.
    red = torch.tensor([0.7, 0.3, 0.3]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    turned = jitter_colors(red, [0.5, 0.5, 0.5, 0.5 + 0.5 * (1 / 3) / 0.2])
    shift = turned[0, :, 0, 0] - turned[0, :, 0, 0].min()
    assert shift[1] > 0.3 and shift[0] < 1e-4 and shift[2] < 1e-4


# --- Clips ------------------------------------------------------------------------------------------------------------------


def test_modalities_show_the_same_moment(tmp_path):
    """Sound whose pitch and frames whose red rise with time, in windows of different lengths."""
    seconds = torch.arange(16000) / 8000
    sweep = 0.5 * torch.sin(2 * torch.pi * (300 * seconds + 600 * seconds**2))
    sound = write_wav(tmp_path / "a.wav", sweep[None], 8000)
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(50):
        Image.fromarray(numbered(26, 8, 8)[number // 2].numpy()).save(folder / f"{number:02}.png")
    readers = {
        "rgb": Video(frames=2, stride=1, size=7),
        "spectrogram": Spectrogram(seconds=0.2, sample_rate=8000, mels=32, time_masks=0, frequency_masks=0, **PLAIN),
    }
    paths = {"rgb": folder, "spectrogram": sound}
    lengths = {name: reader.length(paths[name]) for name, reader in readers.items()}
    clips = Clips([paths], [lengths], torch.tensor([[0.0, 1.0]]), readers, windows=3)
    inputs, target = clips[None, 0]
    assert inputs["rgb"].shape == (3, 2, 7, 7, 3) and inputs["spectrogram"].shape == (3, 20, 32, 3)
    assert target.tolist() == [0.0, 1.0]
    red = (inputs["rgb"][:, 0, 3, 3, 0] + 1) * 127.5 / 10
    assert red.round().tolist() == [0, 12, 24]  # the first frame of 2, the middle, 2 frames before the end
    peaks = inputs["spectrogram"][:, 10, :, 0].argmax(-1).tolist()
    assert peaks == sorted(set(peaks))
    moments = []
    for epoch in range(30):
        augmented, _ = clips[epoch, 0]
        assert augmented["rgb"].shape == (2, 7, 7, 3)
        assert torch.equal(augmented["rgb"], clips[epoch, 0][0]["rgb"])
        moments.append(augmented["spectrogram"][10, :, 0].argmax().item())
    assert len(set(moments)) > 5
    assert clips.fingerprint() != Clips([paths], [lengths], torch.tensor([[1.0, 0.0]]), readers, windows=3).fingerprint()


def test_a_waveform_is_the_window_of_the_sound(tmp_path):
    sound = tone(440, 0.1, 8000)
    path = write_wav(tmp_path / "a.wav", sound[None], 8000)
    reader = Waveform(samples=200, sample_rate=8000)
    assert reader.length(path) == 0.1 and reader.seconds == 0.025 and reader.shape == (200,)
    torch.testing.assert_close(reader.read(path, 0.05), sound[400:600], rtol=0, atol=1e-4)
    longer = Waveform(samples=1000, sample_rate=8000).read(path)
    assert torch.equal(longer[:200], longer[800:])  # shorter sound is repeated
    with pytest.raises(InputError, match="gone.wav cannot be read"):
        reader.length(tmp_path / "gone.wav")

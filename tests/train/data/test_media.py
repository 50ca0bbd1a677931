"""Sound and frames from files."""

import math
import struct
import wave

import pytest
import torch
from media_files import numbered, tone, write_video, write_wav
from PIL import Image

from mmkernels.models import InputError
from mmkernels.train.data import media
from mmkernels.train.data.media import read_audio, read_frames, video_seconds


def fails(message, function, *arguments):
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert message in str(error.value), str(error.value)


def test_wav_is_read_to_the_bit(tmp_path):
    samples = (torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 65535 - 32768).floor() / 32768
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes((samples * 32768).short().numpy().tobytes())
    assert torch.equal(read_audio(tmp_path / "a.wav", 8000), samples)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_resampling_and_mixing(tmp_path, rate):
    """A tone in the left channel alone: half of it, at the new rate, without delay."""
    left = tone(440, 0.5, rate)
    read = read_audio(write_wav(tmp_path / "a.wav", torch.stack([left, 0 * left]), rate), 16000)
    assert abs(len(read) - 8000) <= 2
    middle = slice(500, 7500)  # at the ends the filter sees silence
    assert (read[middle] - tone(440, 0.5, 16000)[middle] / 2).abs().max() < 2e-3


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_frames_of_a_video(tmp_path, name):
    path = write_video(tmp_path / name, numbered(20, 32, 48), 25)
    assert video_seconds(path, 25) == pytest.approx(0.8, abs=0.01)
    tolerance = 0 if name == "a.mkv" else 4
    for numbers in ([0, 1, 2, 3], [7], [3, 3, 11, 19], list(range(20))):
        frames = read_frames(path, [n / 25 for n in numbers], 25, 32)
        assert frames.shape == (len(numbers), 32, 48, 3) and frames.dtype == torch.uint8
        error = (frames[:, 8:24, 4:20].float() - numbered(20, 32, 48)[numbers][:, 8:24, 4:20].float()).abs().amax((1, 2, 3))
        assert (error <= tolerance).all(), error
    # Between two frames the nearer one is shown, past the end the last.
    shown = read_frames(path, [0.05, 5.0], 25, 32)[:, 16, 40, 0].tolist()
    assert shown == pytest.approx([10, 190], abs=tolerance)
    assert read_frames(path, [0.0], 25, 16).shape == (1, 16, 24, 3)


def test_frames_of_a_folder_and_of_a_picture(tmp_path):
    frames = numbered(4)
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number:03}.png")
    assert video_seconds(tmp_path, 10) == 0.4
    read = read_frames(tmp_path, [0.0, 0.1, 0.1, 0.3, 0.9], 10, 12)
    assert torch.equal(read, frames[[0, 1, 1, 3, 3]])
    assert torch.equal(read_frames(tmp_path / "002.png", [0.0, 1.0], 10, 12), frames[[2, 2]])
    Image.new("RGB", (16, 16)).save(tmp_path / "004.png")
    fails("another shape", read_frames, tmp_path, [0.0, 0.4], 10, 12)


def test_what_cannot_be_read(tmp_path):
    text = tmp_path / "text.wav"
    text.write_text("not a sound" * 100)
    fails("text.wav cannot be read as audio", read_audio, text, 8000)
    fails("text.wav cannot be read as video", read_frames, text, [0.0], 25, 8)
    fails("gone.wav cannot be read as audio", read_audio, tmp_path / "gone.wav", 8000)
    fails("cannot be read as audio", read_audio, tmp_path, 8000)
    fails("has no audio stream", read_audio, write_video(tmp_path / "mute.mkv", numbered(2), 25), 8000)
    wav = write_wav(tmp_path / "a.wav", tone(440, 0.1, 8000)[None], 8000)
    fails("has no video stream", read_frames, wav, [0.0], 25, 8)
    fails("without samples", read_audio, write_wav(tmp_path / "none.wav", torch.zeros(1, 0), 8000), 8000)
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 44, b"WAVE", b"fmt ", 16, 3, 1, 8000, 32000, 4, 32, b"data", 8)
    (tmp_path / "nan.wav").write_bytes(header + struct.pack("<2f", 0.5, math.nan))
    fails("not finite", read_audio, tmp_path / "nan.wav", 8000)
    (tmp_path / "empty").mkdir()
    fails("has no frames", read_frames, tmp_path / "empty", [0.0], 25, 8)
    (tmp_path / "a.png").write_text("no picture")
    fails("a.png cannot be read as an image", read_frames, tmp_path / "a.png", [0.0], 25, 8)
    whole = (tmp_path / "mute.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[:200])
    fails("cut.mkv", read_frames, tmp_path / "cut.mkv", [0.0], 25, 8)


@pytest.mark.parametrize("size", [(12, 16), (11, 15)])
def test_what_is_written_is_read_again(tmp_path, size):
    """Sound to half a step of 16 bits, video as MPEG-4 has it; odd sizes are made even."""
    samples = tone(300, 0.05, 8000)
    media.write_wav(tmp_path / "a.wav", samples, 8000)
    assert (read_audio(tmp_path / "a.wav", 8000) - samples).abs().max() < 1.1 / 32768
    frames = numbered(8, *size)
    media.write_video(tmp_path / "a.mp4", frames, 12.5)
    assert video_seconds(tmp_path / "a.mp4", 25) == pytest.approx(0.64)
    found = read_frames(tmp_path / "a.mp4", [i / 12.5 for i in range(8)], 25, size[0] + size[0] % 2)
    assert found.shape == (8, *(n + n % 2 for n in size), 3)
    assert (found[:, : size[0], : size[1]].float() - frames.float()).abs().mean() < 12

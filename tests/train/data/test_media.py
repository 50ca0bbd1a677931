"""Sound and frames from files."""

import fractions
import math
import struct
import wave

import pytest
import torch
from media_files import numbered, tone, write_video, write_wav
from PIL import Image

from mmkernels.models import InputError
from mmkernels.train.data import media
from mmkernels.train.data.media import check_frames, read_audio, read_frames, video_seconds


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


def test_frames_of_a_folder_are_in_natural_order(tmp_path):
    names = ["frame1", "frame02", "frame10", "frame10b", "frame11", "later3"]
    for pixels, name in zip(numbered(6), names, strict=True):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    assert torch.equal(read_frames(tmp_path, [i / 10 for i in range(6)], 10, 12), numbered(6))


# (file, codec, with sound, options of the container)
VIDEOS = [
    ("a.mp4", "mpeg4", True, {"movflags": "faststart"}),
    ("b.mp4", "libx264", False, {"movflags": "faststart"}),
    ("a.mkv", "mpeg4", False, {}),
    ("b.mkv", "libx264", True, {}),
    ("a.webm", "libvpx", False, {}),
    ("a.avi", "mpeg4", True, {}),
]


def encode(path, codec, sound, options, times=range(40)):
    """40 frames of noise, 10 ticks of `times` a second, key frames among them, and as much sound, at 48 kHz."""
    import av

    frames = torch.randint(0, 256, (len(times), 32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt, video.codec_context.gop_size = 48, 32, "yuv420p", 8
        voice = container.add_stream("mp3" if path.suffix == ".avi" else "aac", rate=48000) if sound else None
        for number, (pixels, time) in enumerate(zip(frames, times, strict=True)):
            frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            frame.pts, frame.time_base = time, fractions.Fraction(1, 10)
            container.mux(video.encode(frame))
            if voice:
                tones = av.AudioFrame.from_ndarray(tone(440, 0.1, 48000)[None].numpy(), format="fltp", layout="mono")
                tones.sample_rate, tones.pts = 48000, 4800 * number
                container.mux(voice.encode(tones))
        for stream in (video, voice) if voice else (video,):
            container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("video", VIDEOS, ids=lambda video: video[0])
def test_truncated_videos(tmp_path, video):
    """The check before training finds them; what it lets pass has lost a frame at most, and all of that can be read."""
    whole = encode(tmp_path / video[0], *video[1:])
    assert check_frames(whole, 10, 16) == pytest.approx(4.0, abs=0.11)
    content, cut = whole.read_bytes(), tmp_path / f"cut{whole.suffix}"
    for share in (0.4, 0.6, 0.8, 0.9):
        cut.write_bytes(content[: int(len(content) * share)])
        for function, arguments in ((check_frames, ()), (read_frames, ([3.8],))):
            with pytest.raises(
                InputError, match=f"{cut} is truncated: its header says [34].[019][0-9] seconds, [0-3].[0-9]+ can"
            ):
                function(cut, *arguments, 10, 16)
    cut.write_bytes(content[:-40])
    try:
        seconds = check_frames(cut, 10, 16)
    except InputError as error:
        assert "is truncated" in str(error)
    else:
        assert seconds > 3.85
        assert len(read_frames(cut, [i / 10 for i in range(39)], 10, 16)) == 39


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_whole_videos_with_gaps_between_their_frames(tmp_path, name):
    times = [0, 1, 2, 5, 6, 7, 20, 21, 30, 31]
    path = encode(tmp_path / name, "mpeg4", False, {}, times)
    assert check_frames(path, 10, 16) == pytest.approx(3.2, abs=0.11)
    assert torch.equal(*read_frames(path, [3.1, 9.0], 10, 16))


def test_videos_that_do_not_say_how_long_they_are(tmp_path):
    """As a browser records them."""
    path = encode(tmp_path / "a.webm", "libvpx", False, {"live": "1"})
    assert check_frames(path, 10, 16) == video_seconds(path, 10) == pytest.approx(4.0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert check_frames(path, 10, 16) == video_seconds(path, 10) < 3.0


def test_a_video_whose_end_cannot_be_decoded(tmp_path):
    """Of full length, as a download in parts leaves it: zeros where the second half has not come."""
    path = encode(tmp_path / "a.mp4", "libx264", False, {"movflags": "faststart"})
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    fails(f"{path} ", check_frames, path, 10, 16)


@pytest.mark.parametrize("where", [(), (b"LIST", 5, b"notes\0")])
def test_truncated_wavs(tmp_path, where):
    def sound(size, there=2000):
        more = struct.pack("<4sI", *where[:2]) + where[2] if where else b""
        header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 36 + len(more), b"WAVE", b"fmt ", 16, 1, 2, 8000, 32000, 4, 16)
        path = tmp_path / "a.wav"
        path.write_bytes(header + more + struct.pack("<4sI", b"data", size) + bytes(range(200)) * (4 * there // 200))
        return path

    for there in (2000, 50):
        said = f"a.wav is truncated: its header says 8000 samples, it has {there}"
        fails(said, read_audio, sound(4 * 8000, there), 8000)
    # Written to a pipe, where nobody knew how much would come.
    for size in (4 * 2000, 0, 0xFFFFFFFF, 0x7FFFF000):
        assert len(read_audio(sound(size), 8000)) == 2000


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

"""Sound and pictures from files and to them: FFmpeg's decoders through PyAV, and folders of frames through Pillow."""

import contextlib
import fractions
import os
import re
import struct
import wave
from pathlib import Path

import torch

from ...models.registry import InputError, require
from .images import EXTENSIONS, as_seen


@contextlib.contextmanager
def _opened(path, kind):
    """(container, first stream of `kind`); what FFmpeg says on the way becomes an InputError that names the file."""
    av = require("av", "media")
    try:
        # From an open file: FFmpeg would take a name for a URL, a device or a pattern.
        with open(path, "rb") as file, av.open(file, metadata_errors="ignore") as container:
            streams = getattr(container.streams, kind)
            if not streams:
                raise InputError(f"{path} has no {kind} stream")
            yield container, streams[0]
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as {kind}: {error}") from error


def read_audio(path, sample_rate: int) -> torch.Tensor:
    """The sound of a file (WAV, FLAC, MP3, Ogg, the track of a video...) as float32 (samples,), mono, at `sample_rate`.

    Channels are averaged; other rates are resampled by FFmpeg. Raises InputError for a file that is no sound, holds none, is a
    WAV that ends before its header says, or holds numbers that are not finite.
    """
    av, numpy = require("av", "media"), require("numpy", "train")
    with _opened(path, "audio") as (container, stream):
        if container.format.name == "wav":
            _check_wav(path)
        resampler = av.AudioResampler(format="fltp", rate=sample_rate)
        frames = [resampled for frame in container.decode(stream) for resampled in resampler.resample(frame)]
        frames += resampler.resample(None)  # what the filter holds back
        samples = [frame.to_ndarray().mean(0) for frame in frames]
    if not sum(map(len, samples)):
        raise InputError(f"{path} has an audio stream without samples")
    samples = torch.from_numpy(numpy.concatenate(samples))
    if not samples.isfinite().all():
        raise InputError(f"{path} has samples that are not finite")
    return samples


def _check_wav(path):
    """Raises InputError where less sound is there than the header says: FFmpeg would take it for the whole."""
    with open(path, "rb") as file:
        if file.read(12)[:4] != b"RIFF":  # RF64 holds its size elsewhere
            return
        sample = 1
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", header)
            if name == b"fmt ":
                sample = max(int.from_bytes(file.read(size)[12:14], "little"), 1)
            elif name == b"data":
                there = os.fstat(file.fileno()).st_size - file.tell()
                # Who writes to a pipe does not know the size: some say 0, others about the largest number, signed or not.
                if there < size < 0x7FFF0000:
                    said = f"its header says {size // sample} samples, it has {there // sample}"
                    raise InputError(f"{path} is truncated: {said}")
                return
            else:
                file.seek(size, os.SEEK_CUR)
            file.seek(size % 2, os.SEEK_CUR)


def video_seconds(path, fps: float) -> float:
    """How long a video lasts, by its header; a folder of frames is played at `fps`, a picture lasts one frame."""
    if (frames := _pictures(path)) is not None:
        return len(frames) / fps
    with _opened(path, "video") as (container, stream):
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return container.duration / 1e6
    return _measured(path, fps)[1]


def _measured(path, fps) -> tuple:
    """(the time of the last frame, how long the video lasts) in seconds, by the packets that are there; none is decoded.

    Raises InputError for a file that ends before its header says.
    """
    with _opened(path, "video") as (container, stream):
        start = float((stream.start_time or 0) * stream.time_base)
        times, end, last_end, cut = [], start, 0.0, False  # the last end is that of all streams
        for packet in container.demux():
            time = packet.dts if packet.pts is None else packet.pts
            cut |= packet.is_corrupt  # by the end of the file
            if time is None or packet.is_corrupt or packet.is_discard:
                continue
            packet_end = float((time + (packet.duration or 0)) * packet.time_base)
            last_end = max(last_end, packet_end)
            if packet.stream.index == stream.index:
                times.append(float(time * packet.time_base))
                end = max(end, packet_end)
        times.sort()
        frame = 1 / float(stream.average_rate or fps)
        kind, there = container.format.name.split(",")[0], end - start
        if kind == "avi":  # where its index is gone, the duration is of what is found; the header has the frames
            said = float(max(stream.frames, stream.duration or 0) * stream.time_base)
        elif stream.duration:
            said = float(stream.duration * stream.time_base)
        else:
            said, there = (container.duration or 0) / 1e6, last_end
        # Only MP4 says of the last frame how long it is shown; of other formats the header tells whether something is missing.
        if (kind == "mov" or _is_shortened(path)) and said - there > (0 if cut else 1.5 * frame):
            raise InputError(f"{path} is truncated: its header says {said:.2f} seconds, {there:.2f} can be read")
        if not times:
            raise InputError(f"{path} has a video stream without frames, or without their times")
        return times[-1] - start, (end if end > times[-1] else times[-1] + frame) - start


def _is_shortened(path) -> bool:
    """Whether an AVI or Matroska (WebM) file has fewer bytes than its header says."""
    with open(path, "rb") as file:
        head, size = file.read(4096), os.fstat(file.fileno()).st_size
    if head[:4] == b"RIFF":
        return size < 8 + int.from_bytes(head[4:8], "little")
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return False
    length, begins = _ebml_number(head, 4)
    length, begins = _ebml_number(head, begins + length + 4)  # all else is in one element behind the header
    return length is not None and size < begins + length


def _ebml_number(data, begins) -> tuple:
    """(a number of as many bytes as the leading zeros of the first one tell, None where all its bits are set; its end)."""
    end = begins + 9 - int.from_bytes(data[begins : begins + 1], "big").bit_length()
    bits = 7 * (end - begins)
    number = int.from_bytes(data[begins:end], "big") % (1 << bits)
    return None if number == (1 << bits) - 1 else number, end


def read_frames(path, times: list, fps: float, short_side: int) -> torch.Tensor:
    """The frames nearest to `times` (seconds, ascending) as uint8 (len(times), height, width, 3), RGB.

    `path` is a video file, a folder of pictures in the natural order of their names (2.png before 10.png), shown at `fps`, or
    a single picture. Frames are scaled to the shorter side `short_side`; times past the end show the last frame. Raises
    InputError naming the file, also for a video file that ends before its header says and before one of `times`.
    """
    if (pictures := _pictures(path)) is not None:
        numbers = [min(round(time * fps), len(pictures) - 1) for time in times]
        # Each picture once, however often it is shown.
        read = {number: _read_picture(pictures[number], short_side) for number in sorted(set(numbers))}
        first = next(iter(read.values()))
        for number, frame in read.items():
            _check_shape(pictures[number], frame.shape, pictures[numbers[0]], first.shape)
        return torch.stack([read[number] for number in numbers])
    try:
        return _video_frames(path, times, fps, short_side)
    except InputError:
        _measured(path, fps)  # of a truncated file it says that, not what the decoder stumbled over
        raise


def _video_frames(path, times, fps, short_side):
    shown = []
    with _opened(path, "video") as (container, stream):
        start = (stream.start_time or 0) * stream.time_base
        stream.thread_type = "AUTO"
        if times[0] > 0:
            container.seek(int((times[0] + start) / stream.time_base), stream=stream)  # to the key frame in front of it
        half = 0.5 / float(stream.average_rate or fps)  # times in files are rounded
        frame = None
        for following in container.decode(stream):
            begins = 0.0 if following.time is None else following.time - float(start) - half
            if frame is not None and (count := sum(time < begins for time in times) - len(shown)) > 0:
                shown += [_scaled(frame, short_side)] * count
            frame = following
            if len(shown) == len(times):
                break
        if frame is None:
            raise InputError(f"{path} has a video stream without frames")
        if missing := len(times) - len(shown):
            found = None if frame.time is None else frame.time - float(start)
            if found is not None and times[-1] > found + half and found + 3 * half < (last := _measured(path, fps)[0]):
                raise InputError(f"{path} is damaged: it has frames up to {last:.2f} seconds, up to {found:.2f} can be read")
            shown += [_scaled(frame, short_side)] * missing
    return torch.stack(shown)


def check_frames(path, fps: float, short_side: int) -> float:
    """How long a video lasts, by what is there. Raises InputError where `read_frames` would.

    Every picture of a folder is decoded; of a video file the first and the last frame, and its packets are counted.
    """
    if (pictures := _pictures(path)) is None:
        last, seconds = _measured(path, fps)
        for time in (0.0, last):
            read_frames(path, [time], fps, short_side)
        return seconds
    first = None
    for picture in pictures:
        size = _scaled_size(read_picture(picture).size, short_side)
        first = first or size
        _check_shape(picture, size, pictures[0], first)
    return len(pictures) / fps


def _check_shape(path, shape, other, expected):
    if shape != expected:
        raise InputError(f"{path} has another shape than {other}: a video has one")


def _scaled_size(size, short_side) -> tuple:
    scale = short_side / min(size)
    return tuple(max(round(side * scale), 1) for side in size)


def _scaled(frame, short_side):
    width, height = _scaled_size((frame.width, frame.height), short_side)
    return torch.from_numpy(frame.reformat(width, height, format="rgb24", interpolation="BILINEAR").to_ndarray())


def _pictures(path):
    """The frames of a folder, [path] for a picture, None for anything else."""
    path = Path(path)
    if path.is_dir():
        frames = sorted((p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file()), key=_natural)
        if not frames:
            raise InputError(f"{path} has no frames; allowed are files ending in {', '.join(EXTENSIONS)}")
        return frames
    return [path] if path.suffix.lower() in EXTENSIONS and path.suffix.lower() != ".gif" else None


def _natural(path):
    """The key of names in natural order, by which 2.png is before 10.png."""
    parts = re.split(r"(\d+)", path.name)  # every second one is a number
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def read_picture(path):
    """A picture of Pillow, as a viewer shows it, in RGB; raises InputError naming a file that is none."""
    image_library = require("PIL.Image", "train")
    try:
        with image_library.open(path) as image:
            return as_seen(image).convert("RGB")
    except Exception as error:  # a damaged file makes its decoder raise anything
        raise InputError(f"{path} cannot be read as an image: {error or type(error).__name__}") from error


def _read_picture(path, short_side):
    image_library, numpy = require("PIL.Image", "train"), require("numpy", "train")
    image = read_picture(path)
    pixels = image.resize(_scaled_size(image.size, short_side), image_library.Resampling.BILINEAR, reducing_gap=3.0)
    return torch.from_numpy(numpy.array(pixels))


def write_wav(path, samples, sample_rate: int) -> None:
    """Samples (n,) in [-1, 1] as 16-bit mono."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((samples * 32767).round().short().numpy().tobytes())


def write_video(path, frames, fps: float) -> None:
    """uint8 (n, height, width, 3) as MPEG-4; an odd row or column at the end is doubled, as the format wants even sizes."""
    av = require("av", "media")
    height, width = frames.shape[1:3]
    frames = torch.nn.functional.pad(frames.permute(0, 3, 1, 2).float(), (0, width % 2, 0, height % 2), mode="replicate")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fractions.Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 8_000_000
        for pixels in frames.byte().permute(0, 2, 3, 1).contiguous():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")))
        container.mux(stream.encode(None))

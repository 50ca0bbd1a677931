"""Files of optical flow: Middlebury's .flo, KITTI's 16-bit PNG, and the colours that flow is shown in."""

import fractions
import math
import struct
from pathlib import Path

import torch

from ...models.registry import InputError, require, write_atomically

MAGIC = struct.pack("<f", 202021.25)  # reads PIEH
UNKNOWN = 1e9  # .flo: what is larger is not known


def read(path) -> tuple:
    """(flow float32 (H, W, 2) in pixels, x first; valid bool (H, W)) of a .flo or, by any other name, a KITTI PNG.

    Flow that is not known is zero. Raises InputError naming the file and what is wrong with it.
    """
    flow, valid = _read_flo(path) if Path(path).suffix.lower() == ".flo" else _read_kitti(path)
    return flow.where(valid[..., None], 0.0), valid


def size(path) -> tuple:
    """(height, width) of a file that `read` would take, as far as its header and its length tell."""
    return _flo_header(path)[:2] if Path(path).suffix.lower() == ".flo" else _read_kitti(path)[1].shape


def write_flo(path, flow, valid=None) -> None:
    """Writes flow (H, W, 2) as .flo; where `valid` (H, W) is false it is marked as unknown."""
    flow, valid = _checked(flow, valid)
    flow = flow.where(valid[..., None], torch.tensor(2 * UNKNOWN))
    height, width = flow.shape[:2]
    numbers = flow.numpy().astype("<f4").tobytes()
    write_atomically(Path(path), MAGIC + struct.pack("<ii", width, height) + numbers)


def write_kitti(path, flow, valid=None) -> None:
    """Writes flow (H, W, 2) as KITTI's PNG: red and green are 64 flow + 32768, blue is one where it is valid.

    Raises InputError for valid flow that 16 bits cannot hold: below -512 or above 511.98 pixels.
    """
    av, numpy = require("av", "media"), require("numpy", "train")
    flow, valid = _checked(flow, valid)
    codes = (flow * 64 + 32768).round().where(valid[..., None], 0.0)
    if not ((codes >= 0) & (codes <= 65535)).all():
        raise InputError(f"{path}: the flow has values up to {flow[valid].abs().max():.5g}; KITTI's files hold -512 to 511.98")
    pixels = torch.cat([codes, valid[..., None].to(codes.dtype)], -1).numpy().astype(numpy.uint16)
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt = *pixels.shape[:2], "rgb48be"
    encoder.time_base = fractions.Fraction(1)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb48be")
    frame.pts = 0
    packets = [*encoder.encode(frame), *encoder.encode(None)]
    write_atomically(Path(path), b"".join(map(bytes, packets)))


def _checked(flow, valid):
    """Both on the CPU, `flow` in float32; `valid` is true everywhere where it is None."""
    if flow.dim() != 3 or flow.shape[-1] != 2:
        raise InputError(f"flow has shape {tuple(flow.shape)}; it must be (height, width, 2)")
    if valid is None:
        valid = torch.ones(flow.shape[:2], dtype=torch.bool)
    if valid.shape != flow.shape[:2] or valid.dtype != torch.bool:
        found = f"shape {tuple(valid.shape)} and dtype {valid.dtype}"
        raise InputError(f"valid has {found}; it must be {tuple(flow.shape[:2])}, as the flow, and torch.bool")
    return flow.detach().float().cpu(), valid.cpu()


def _flo_header(path):
    """(height, width, the bytes behind)."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read as optical flow: {error.strerror}") from error
    if content[:4] != MAGIC:
        raise InputError(f"{path} is no .flo file: it begins with {content[:4]!r}, not {MAGIC!r}")
    if len(content) < 12:
        raise InputError(f"{path} is truncated: it has {len(content)} bytes, its header 12")
    width, height = struct.unpack("<ii", content[4:12])
    if width < 1 or height < 1:
        raise InputError(f"{path} says that it is {width} x {height} pixels; both must be positive")
    if (found := len(content) - 12) != (wanted := 8 * width * height):
        what = "is truncated" if found < wanted else "is too long"
        raise InputError(f"{path} {what}: {width} x {height} pixels are {wanted} bytes of flow, it has {found}")
    return height, width, content[12:]


def _read_flo(path):
    numpy = require("numpy", "train")
    height, width, content = _flo_header(path)
    flow = torch.from_numpy(numpy.frombuffer(content, "<f4").astype(numpy.float32)).view(height, width, 2)
    valid = (flow.abs() <= UNKNOWN).all(-1)  # false for what is no number
    return flow, valid


def _read_kitti(path):
    """Pillow reads 16-bit colours as 8 bits: it checks the file, FFmpeg reads it."""
    av, numpy, image_library = require("av", "media"), require("numpy", "train"), require("PIL.Image", "train")
    try:
        with image_library.open(path) as image:
            kind = image.format
            image.verify()  # the check sums, to the last chunk
        content = Path(path).read_bytes()
    except Exception as error:  # a damaged file makes its decoder raise anything
        raise InputError(f"{path} cannot be read as a PNG of flow: {error or type(error).__name__}") from error
    # Bit depth and colour type are at a fixed place, in the first chunk.
    if kind != "PNG" or tuple(content[24:26]) != (16, 2):
        found = kind if kind != "PNG" else f"{content[24]} bits a channel, colour type {content[25]}"
        raise InputError(f"{path} is no PNG of flow: it is {found}; KITTI's have 16 bits for each of red, green and blue")
    try:
        decoder = av.CodecContext.create("png", "r")
        frames = [*decoder.decode(av.Packet(content)), *decoder.decode(None)]
        pixels = frames[0].to_ndarray(format="rgb48be").astype(numpy.int32)
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a PNG of flow: {error}") from error
    codes = torch.from_numpy(pixels)
    return (codes[..., :2].float() - 32768) / 64, codes[..., 2] > 0


# --- Colours -----------------------------------------------------------------------------------------------------------------

# Baker et al. 2011: hues around the circle, a step for each number, more of them where the eye tells more apart.
_RUNS = (("red", 15), ("yellow", 6), ("green", 4), ("cyan", 11), ("blue", 13), ("magenta", 6))
_CORNERS = {
    "red": (1, 0, 0),
    "yellow": (1, 1, 0),
    "green": (0, 1, 0),
    "cyan": (0, 1, 1),
    "blue": (0, 0, 1),
    "magenta": (1, 0, 1),
}


def _wheel():
    """(55, 3) in [0, 1]."""
    corners = torch.tensor([_CORNERS[name] for name, _ in _RUNS], dtype=torch.float32)
    parts = []
    for i, (_, count) in enumerate(_RUNS):
        parts.append(torch.lerp(corners[i], corners[(i + 1) % len(corners)], (torch.arange(count) / count)[:, None]))
    return torch.cat(parts)


def colors(flow, largest=None) -> torch.Tensor:
    """uint8 (..., 3) of flow (..., 2): the direction is the hue, the length the saturation; no motion is white.

    `largest`: the length, in pixels, of full saturation, and darker beyond; default the largest there is.
    """
    flow = flow.float()
    length = flow.norm(dim=-1)
    if largest is None:
        largest = float(length.max()) if length.numel() else 1.0
    length = (length / max(largest, 1e-6))[..., None]
    wheel = _wheel()
    place = (torch.atan2(-flow[..., 1], -flow[..., 0]) / math.pi + 1) / 2 * (len(wheel) - 1)
    low = place.floor().long().clamp(0, len(wheel) - 1)
    hue = torch.lerp(wheel[low], wheel[(low + 1) % len(wheel)], (place - low)[..., None])
    shown = torch.where(length <= 1, 1 - length * (1 - hue), 0.75 * hue)
    return (255 * shown).floor().to(torch.uint8)

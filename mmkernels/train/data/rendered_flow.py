"""Pairs of frames with the exact optical flow between them, rendered: textured shapes in affine motion, after AutoFlow.

A scene is a background and some polygons and ellipses in front of it, each with a texture and a motion of its own. It is a
function of (place, time), so that the flow has no error: what is seen at p in the first frame is seen at p + flow(p) in the
second, unless a shape in front covers it there or it has left the picture (Sun et al. 2021, section 3).
"""

import dataclasses
import functools
import math

import torch
from torch.nn import functional as F

from ...models.registry import InputError, require
from . import derive_seed
from .flow_pairs import augmented

SIDES = 8  # of a polygon, at most


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Sizes in pixels; what is drawn for each shape is uniform between the numbers given."""

    height: int = 368
    width: int = 496
    shapes: tuple = (2, 6)  # fewest and most in front of the background
    radius: tuple = (0.12, 0.35)  # of a shape, as a share of the shorter side
    translation: float = 20.0  # largest, along each axis
    rotation: float = 10.0  # largest, degrees
    scaling: float = 0.1  # largest relative change of size
    samples: int = 2  # a pixel is the mean of samples x samples points
    photos: float = 0.5  # share of the textures that are from photographs, where there are any

    def __post_init__(self):
        object.__setattr__(self, "shapes", tuple(self.shapes))
        object.__setattr__(self, "radius", tuple(self.radius))
        for name in ("height", "width", "samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.shapes[0] <= self.shapes[1]:
            raise InputError(f"shapes is {self.shapes}; it must be the fewest and the most, not below 0")


class Scene:
    """Layers from back to front, the first of which is everywhere.

    Args (L layers; places are (x, y) in pixels, the centre of the top left one is (0, 0)):
        textures: (L, 3, T, T); `extent` pixels are a side of them, mirrored beyond.
        centers: (L, 2), about which shapes turn and grow.
        normals, distances: (L, SIDES, 2) and (L, SIDES); a polygon is where normals . (p - center) <= distances.
        axes: (L, 2, 2); an ellipse is where |axes (p - center)| <= 1.
        round: (L,) bool, ellipses.
        matrices, shifts: (L, 2, 2) and (L, 2) of the motion: p -> center + shift + matrix (p - center).
    """

    def __init__(self, textures, extent, centers, normals, distances, axes, round, matrices, shifts):
        self.textures, self.extent, self.centers = textures, extent, centers
        self.normals, self.distances, self.axes, self.round = normals, distances, axes, round
        self.matrices, self.shifts = matrices, shifts
        self.inverses = torch.linalg.inv(matrices)

    def sources(self, points, time: int):
        """(P, 2) -> (L, P, 2): where in the first frame each layer has what it shows there."""
        relative = points - self.centers[:, None]
        if time == 1:
            relative = (relative - self.shifts[:, None]) @ self.inverses.mT
        return relative

    def covers(self, relative):
        """(L, P, 2), relative to the centers -> bool (L, P)."""
        covered = [torch.ones(relative.shape[1], dtype=torch.bool)]
        for place, round, axes, normals, distances in zip(
            relative[1:], self.round[1:], self.axes[1:], self.normals[1:], self.distances[1:], strict=True
        ):
            if round:
                covered.append((place @ axes.T).square().sum(-1) <= 1)
            else:
                covered.append((place @ normals.T - distances).amax(-1) <= 0)
        return torch.stack(covered)

    def colors(self, points, time: int):
        """(P, 2) -> (P, 3), what the frame 0 or 1 shows at these places."""
        relative = self.sources(points, time)
        front = _front(self.covers(relative))
        seen = points.new_empty(len(points), 3)
        for layer, texture in enumerate(self.textures):
            mine = (front == layer).nonzero().flatten()
            grid = (relative[layer, mine] * (2 / self.extent))[None, None]
            seen[mine] = F.grid_sample(texture[None], grid, padding_mode="reflection", align_corners=False)[0, :, 0].T
        return seen

    def flow(self, points):
        """(P, 2) -> (flow (P, 2) in pixels, bool (P,): not covered in the second frame)."""
        relative = self.sources(points, 0)
        front = _front(self.covers(relative))
        own = relative[front, torch.arange(len(points))]
        moved = (self.matrices[front] @ own[..., None])[..., 0] + self.shifts[front]
        flow = moved - own
        covered = self.covers(self.sources(points + flow, 1))
        above = torch.arange(len(self.centers))[:, None] > front
        return flow, ~(covered & above).any(0)


def _front(covered):
    """bool (L, P) -> (P,), the layer in front."""
    return (covered * torch.arange(len(covered), dtype=torch.uint8)[:, None]).amax(0).long()


def draw_scene(rendering: Rendering, generator, photos=()) -> Scene:
    """A scene of `generator`; `photos`: uint8 (h, w, 3) to cut textures from."""

    def uniform(*shape, low=-1.0, high=1.0):
        return low + (high - low) * torch.rand(shape, generator=generator)

    size = torch.tensor([rendering.width, rendering.height])
    least, most = rendering.shapes
    layers = 1 + int(torch.randint(least, most + 1, (), generator=generator))
    centers = uniform(layers, 2, low=0.0) * size
    centers[0] = (size - 1) / 2
    low, high = (share * float(size.min()) for share in rendering.radius)
    radius = uniform(layers, 1, low=low, high=high)
    # Normals all around, so that every polygon is closed; sides that a polygon does not have are far away.
    count = torch.randint(3, SIDES + 1, (layers, 1), generator=generator)
    side = torch.arange(SIDES).expand(layers, -1)
    angles = 2 * math.pi * (side + 0.6 * uniform(layers, SIDES, low=0.0)) / count + uniform(layers, 1) * math.pi
    distances = (radius * uniform(layers, SIDES, low=0.6, high=1.0)).masked_fill(side >= count, math.inf)
    stretched = torch.diag_embed(1 / (radius * uniform(layers, 2, low=0.5)))
    turn = uniform(layers) * (rendering.rotation * math.pi / 180)
    grow = 1 + rendering.scaling * uniform(layers)
    return Scene(
        torch.stack([_texture(rendering, generator, photos) for _ in range(layers)]),
        _extent(rendering),
        centers,
        torch.stack([angles.cos(), angles.sin()], -1),
        distances,
        stretched @ _rotation(uniform(layers) * math.pi),
        uniform(layers) < 0,
        grow[:, None, None] * _rotation(turn),
        rendering.translation * uniform(layers, 2),
    )


def _rotation(angle):
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def _extent(rendering):
    return max(rendering.height, rendering.width) * 3 // 2


def _texture(rendering, generator, photos):
    """(3, T, T) in [-1, 1]: a piece of a photograph, or coloured noise whose spectrum falls with the frequency."""
    side = _extent(rendering)
    draws = torch.rand(6, generator=generator).tolist()
    if len(photos) and draws[0] < rendering.photos:
        photo = photos[int(draws[1] * len(photos))]
        height, width = photo.shape[:2]
        cut = round(min(height, width) * (0.3 + 0.7 * draws[2]))
        top, left = int(draws[3] * (height - cut + 1)), int(draws[4] * (width - cut + 1))
        piece = photo[top : top + cut, left : left + cut].permute(2, 0, 1)[None].float()
        piece = F.interpolate(piece, (side, side), mode="bilinear", antialias=True)[0] / 127.5 - 1
        return piece.flip(-1) if draws[5] < 0.5 else piece
    noise = torch.fft.rfft2(torch.randn(3, side, side, generator=generator))
    frequency = torch.fft.fftfreq(side)[:, None].square() + torch.fft.rfftfreq(side).square()
    frequency[0, 0] = math.inf
    noise = torch.fft.irfft2(noise * frequency ** (-0.4 - 0.5 * draws[1]), s=(side, side))
    noise = noise / noise.std((1, 2), keepdim=True)
    mean, contrast = 2 * torch.rand(3, generator=generator) - 1, 0.2 + 0.5 * draws[2]
    # The channels of most surfaces vary together.
    noise = draws[3] * noise[:1] + (1 - draws[3]) * noise
    return (0.6 * mean[:, None, None] + contrast * noise).clamp(-1, 1)


@functools.cache
def sample_photos() -> tuple:
    """The two photographs that come with scikit-learn, uint8 (427, 640, 3): a temple, a flower."""
    images = require("sklearn.datasets", "train").load_sample_images().images
    return tuple(torch.from_numpy(image.copy()) for image in images)


class RenderedFlow(torch.utils.data.Dataset):
    """(epoch, index) -> {"frames": (2, H, W, 3) in [-1, 1], "flow": (H, W, 2) in pixels, x first, "valid": bool (H, W)}.

    The flow is known everywhere in the first frame, so that all of `valid` is true; "visible" says where what is seen there
    is neither covered nor outside in the second frame.

    Args:
        size: number of pairs.
        rendering: how they look.
        seed: of all that is drawn.
        photos: uint8 (h, w, 3) images to cut textures from.
        keep: render a pair once, and augment it anew in every epoch (see `augmented`); else an epoch has new pairs.
    """

    def __init__(self, size: int, rendering: Rendering, seed, photos=(), *, keep=False):
        self.size, self.rendering, self.seed, self.photos = size, rendering, seed, tuple(photos)
        self.kept = {} if keep else None

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        epoch, index = key
        if self.kept is None:
            return self._rendered(epoch, index)
        if index not in self.kept:
            self.kept[index] = self._rendered(None, index)
        if epoch is None:
            return self.kept[index]
        return augmented(self.kept[index], torch.Generator().manual_seed(derive_seed(self.seed, epoch, index)))

    def _rendered(self, epoch, index):
        rendering = self.rendering
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, index))
        scene = draw_scene(rendering, generator, self.photos)
        places = grid(rendering.height, rendering.width)
        flow, visible = scene.flow(places)
        there = places + flow
        inside = ((there >= 0) & (there <= torch.tensor([rendering.width - 1, rendering.height - 1]))).all(-1)
        shape = (rendering.height, rendering.width)
        return {
            "frames": render(scene, rendering),
            "flow": flow.view(*shape, 2),
            "valid": torch.ones(shape, dtype=torch.bool),
            "visible": (visible & inside).view(shape),
        }

    def fingerprint(self) -> int:
        """Changes with size, seed and looks."""
        photos = [photo.numpy().tobytes() for photo in self.photos]
        return derive_seed(self.size, self.rendering, self.seed, photos, self.kept is not None)


def grid(height: int, width: int, samples=1):
    """(height * width * samples**2, 2): places (x, y), evenly spaced in every pixel; those of a pixel stand together."""
    steps = (torch.arange(samples) + 0.5) / samples - 0.5
    y, x, dy, dx = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), steps, steps, indexing="ij")
    return torch.stack([x + dx, y + dy], -1).view(-1, 2)


def render(scene: Scene, rendering: Rendering) -> torch.Tensor:
    """(2, H, W, 3)."""
    height, width, samples = rendering.height, rendering.width, rendering.samples
    points = grid(height, width, samples)
    frames = [scene.colors(points, time).view(height, width, samples**2, 3).mean(2) for time in (0, 1)]
    return torch.stack(frames)

"""Positions on a grid: Fourier features (Perceiver, Jaegle et al. 2021, section 3.2) and learned ones."""

import math

import torch
from torch import nn

from ..ops._shared.arguments import check_integer
from .backend import Linear


class FourierPositions(nn.Module):
    """Positions on a d-dimensional grid as raw coordinates and Fourier features; one (M, Cp) buffer shared by the batch.

    Coordinates are linspace(-1, 1, n_i) per axis, end points included, in row-major order. With K bands and resolutions mu,

        enc(p) = [p_1..p_d, sin(pi f_1k p_1)..sin(pi f_dk p_d), cos(pi f_1k p_1)..cos(pi f_dk p_d)],
        f_ik = linspace(1, mu_i / 2, K)[k],

    all sines before all cosines: Cp = d (2 K + 1). Computed in float64 from coordinates rounded to float32 and then rounded
    to `dtype`. The buffer is no part of the state dict, because the arguments determine it.

    Args:
        index_shape: the grid, e.g. (224, 224); M is its product.
        num_bands: K, 0 or more.
        max_resolution: mu, one per axis; default `index_shape`.

    Raises ValueError for an empty or non-positive shape, negative bands, or resolutions of another length.
    """

    released_rounding = False

    def __init__(self, index_shape, num_bands, max_resolution=None, *, device=None, dtype=None):
        super().__init__()
        check_grid(index_shape, num_bands, max_resolution)
        max_resolution = index_shape if max_resolution is None else max_resolution
        self.index_shape, self.num_bands, self.max_resolution = tuple(index_shape), num_bands, tuple(max_resolution)
        self.channels = position_channels(index_shape, num_bands)
        shape = (math.prod(self.index_shape), self.channels)
        self.register_buffer("features", torch.empty(shape, device=device, dtype=dtype), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Fills the buffer; call it after `to_empty()` where the module was made on the meta device."""
        if self.features.is_meta:
            return
        fill_grid_(self.features, self.index_shape, self.num_bands, self.max_resolution, self.released_rounding)

    def forward(self):
        """(M, Cp), row-major over the grid."""
        return self.features

    def extra_repr(self):
        return f"{self.index_shape}, num_bands={self.num_bands}, max_resolution={self.max_resolution}"


@torch.no_grad()
def reset_linear_(weight, bias=None):
    """Truncated normal of variance 1 / fan_in for a weight (out, in, ...), zero for a bias."""
    # Cutting a normal at two deviations leaves 0.8796 of its deviation.
    std = 1 / math.sqrt(math.prod(weight.shape[1:])) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if bias is not None:
        nn.init.zeros_(bias)


@torch.no_grad()
def reset_table_(table):
    """Truncated normal of deviation 0.02, cut at two: latents, learned positions and queries."""
    nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)


class ReleasedFourierPositions(FourierPositions):
    """With coordinates as DeepMind's code computes them in float32 on a CPU, whose compiler fuses a product and a sum.

    Some are a few units in the last place beside the rounded ones; numbers of that code are compared so.
    """

    released_rounding = True


class LearnedPositions(nn.Module):
    """A learned vector for every position, `table` (M, c), through a linear layer `projection` if there is one.

    Args:
        count: M.
        channels: c.
        projection: channels of the linear layer, default none.
    """

    def __init__(self, count, channels, projection=None, *, device=None, dtype=None):
        super().__init__()
        check_integer("count", count)
        check_integer("channels", channels)
        self.table = nn.Parameter(torch.empty(count, channels, device=device, dtype=dtype))
        self.channels, self.projection = channels, None
        if projection is not None:
            check_integer("projection", projection)
            self.projection = Linear(channels, projection, device=device, dtype=dtype)
            self.channels = projection
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """The table truncated normal of deviation 0.02, the linear layer's weight of variance 1 / fan_in."""
        reset_table_(self.table)
        if self.projection is not None:
            reset_linear_(self.projection.weight, self.projection.bias)

    def forward(self):
        """(M, c)."""
        return self.table if self.projection is None else self.projection(self.table)


@torch.no_grad()
def fill_grid_(features, shape, num_bands, max_resolution, released_rounding=False):
    """Writes the Fourier features of all points of a grid into `features` (M, Cp), axis by axis: nothing else is M long.

    Coordinates are linspace(-1, 1, n_i) in float32, features in float64 until they are written.
    """
    axes, grid = len(shape), features.view(*shape, features.shape[-1])
    for i, (n, mu) in enumerate(zip(shape, max_resolution, strict=True)):
        coordinates = (_released_axis if released_rounding else _axis)(n).double().to(features.device)
        own = fourier_features(coordinates[:, None], num_bands, [mu])
        own = own.view(*[n if j == i else 1 for j in range(axes)], -1)
        at = axes + i * num_bands, axes + (axes + i) * num_bands
        grid[..., i : i + 1] = own[..., :1]
        grid[..., at[0] : at[0] + num_bands] = own[..., 1 : 1 + num_bands]
        grid[..., at[1] : at[1] + num_bands] = own[..., 1 + num_bands :]


def _axis(n):
    return torch.linspace(-1, 1, n, dtype=torch.float64).float()


def _released_axis(n):
    """-(1 - s) + s with s = i / (n - 1) by the reciprocal, where the second s is not rounded on the way."""
    if n == 1:
        return torch.tensor([-1.0])
    s = torch.arange(n - 1, dtype=torch.float64) * torch.tensor(1 / (n - 1), dtype=torch.float32).double()
    return torch.cat([(s - (1 - s.float()).double()).float(), torch.ones(1)])


def index_coordinates(indices, shape):
    """Coordinates (O, d) in float64 of some points of a grid, given by flat row-major numbers (O,): -1 + 2 i / n per axis.

    The released decoders place sub-sampled outputs so: the right end is never reached, other than on a whole grid.
    """
    axes = []
    for n in reversed(shape):
        axes.append(-1 + 2 * (indices % n).double() / n)
        indices = indices // n
    return torch.stack(axes[::-1], -1)


def fourier_features(coordinates, num_bands, max_resolution):
    """Coordinates (..., d) in [-1, 1] -> (..., Cp), as in `FourierPositions` and in their dtype."""
    bands = [
        torch.linspace(1, mu / 2, num_bands, dtype=torch.float64, device=coordinates.device).to(coordinates)
        for mu in max_resolution
    ]
    angles = math.pi * coordinates[..., None] * torch.stack(bands)
    return torch.cat([coordinates, angles.sin().flatten(-2), angles.cos().flatten(-2)], -1)


def position_channels(index_shape, num_bands) -> int:
    """Cp = d (2 K + 1)."""
    return len(index_shape) * (2 * num_bands + 1)


def check_grid(index_shape, num_bands, max_resolution, name="index_shape") -> None:
    """Raises ValueError for arguments that `FourierPositions` cannot take; `name` is what the user calls the first."""
    if not _all(index_shape, int, 1):
        raise ValueError(f"{name} is {index_shape!r}; it must be a tuple of one or more positive integers")
    if not _all([num_bands], int, 0):
        raise ValueError(f"num_bands is {num_bands!r}; it must be an integer of 0 or more")
    if max_resolution is not None and not (_all(max_resolution, (int, float), 0) and len(max_resolution) == len(index_shape)):
        raise ValueError(f"max_resolution is {max_resolution!r}; it must have one number per axis of {name} {index_shape}")


def _all(values, kind, least):
    """True for a list or tuple, not empty, of finite numbers of that kind from `least` on."""
    return (
        isinstance(values, (list, tuple))
        and len(values) > 0
        and all(isinstance(v, kind) and not isinstance(v, bool) and least <= v < math.inf for v in values)
    )

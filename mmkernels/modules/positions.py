"""Fourier features of the positions on a grid (Perceiver, Jaegle et al. 2021, section 3.2)."""

import math

import torch
from torch import nn


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
        axes = [torch.linspace(-1, 1, n, dtype=torch.float64).float().double() for n in self.index_shape]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # (M, d)
        bands = [torch.linspace(1, mu / 2, self.num_bands, dtype=torch.float64) for mu in self.max_resolution]
        angles = math.pi * coordinates[:, :, None] * torch.stack(bands)
        self.features.copy_(torch.cat([coordinates, angles.sin().flatten(1), angles.cos().flatten(1)], -1))

    def forward(self):
        """(M, Cp), row-major over the grid."""
        return self.features

    def extra_repr(self):
        return f"{self.index_shape}, num_bands={self.num_bands}, max_resolution={self.max_resolution}"


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

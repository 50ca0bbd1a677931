"""The queries of a Perceiver IO decoder, one for every output element.

A module of queries has `channels`, E; called as queries(latents, tokens=, position=, points=) it returns (queries, position):
(B, O, Eq), or (1, O, Eq) where all examples share them, and (O, Ep) with Eq + Ep = E or None. `tokens` and `position` are what
the encoder read, `points` are flat row-major numbers of the outputs that are wanted, int64 (O,), or None for all.
"""

import math

import torch
from torch import nn

from ..ops._shared.arguments import check_integer, check_numbers
from .kinds import build
from .positions import (
    check_grid,
    fill_grid_,
    fourier_features,
    index_coordinates,
    position_channels,
    reset_table_,
)
from .preprocessors import join


class LearnedQueries(nn.Module):
    """A learned vector for every output: `table` (O, E).

    Args:
        count: O.
        channels: E.
        per_token: as many queries as the input has tokens, the first ones: shorter texts have fewer outputs.
    """

    def __init__(self, count, channels, *, per_token=False, device=None, dtype=None):
        super().__init__()
        check_integer("count", count)
        check_integer("channels", channels)
        self.count, self.channels, self.per_token = count, channels, per_token
        self.table = nn.Parameter(torch.empty(count, channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        """The table truncated normal of deviation 0.02."""
        reset_table_(self.table)

    def forward(self, latents, *, tokens=None, position=None, points=None):
        """(1, O, E), None."""
        table = self.table
        if points is not None:
            check_points(points, self.count, table.device)
            table = table[points]
        elif self.per_token:
            table = table[: tokens.shape[1]]
        return table[None], None


class FourierQueries(nn.Module):
    """The Fourier features of the output's coordinates on a grid, made when they are wanted; nothing is kept.

    All of a grid are at linspace(-1, 1, n), some `points` of it at -1 + 2 i / n, as in the released decoders.

    Args:
        shape: the grid, O is its product.
        num_bands, max_resolution, released_rounding: see `FourierPositions` and `ReleasedFourierPositions`.
    """

    def __init__(self, shape, num_bands, max_resolution=None, *, released_rounding=False, device=None, dtype=None):
        super().__init__()
        check_grid(shape, num_bands, max_resolution, "shape")
        self.shape, self.num_bands, self.released_rounding = tuple(shape), num_bands, released_rounding
        self.max_resolution = self.shape if max_resolution is None else tuple(max_resolution)
        self.count, self.channels = math.prod(self.shape), position_channels(self.shape, num_bands)

    def reset_parameters(self):
        """There are none."""

    def forward(self, latents, *, tokens=None, position=None, points=None):
        """(1, O, E), None."""
        if points is None:
            features = latents.new_empty(self.count, self.channels)
            fill_grid_(features, self.shape, self.num_bands, self.max_resolution, self.released_rounding)
        else:
            check_points(points, self.count, latents.device)
            coordinates = index_coordinates(points, self.shape)
            features = fourier_features(coordinates, self.num_bands, self.max_resolution).to(latents.dtype)
        return features[None], None


class InputQueries(nn.Module):
    """The queries are what the encoder read, positions and all: an output for every element of the input (optical flow).

    Args:
        channels: E, those of the input.
        count: the first so many elements only, e.g. those of the first of two frames; default all.
    """

    def __init__(self, channels, count=None, *, device=None, dtype=None):
        super().__init__()
        check_integer("channels", channels)
        if count is not None:
            check_integer("count", count)
        self.channels, self.count = channels, count

    def reset_parameters(self):
        """There are none."""

    def forward(self, latents, *, tokens=None, position=None, points=None):
        """(B, O, Eq), (O, Ep)."""
        if points is not None:
            check_points(points, tokens.shape[1] if self.count is None else self.count, tokens.device)
            return tokens[:, points], None if position is None else position[points]
        return tokens[:, : self.count], None if position is None else position[: self.count]


class MultimodalQueries(nn.Module):
    """The queries of several modalities behind each other, in alphabetical order, padded with learned vectors to as many
    channels: the largest number of a modality, and `padding` more.

    Args:
        modalities: {name: {"kind": .., ..}}, see `QUERIES`.
        padding: channels that the widest modality is padded by.
    """

    def __init__(self, modalities, *, padding=2, device=None, dtype=None):
        super().__init__()
        check_integer("padding", padding, 0)
        if not isinstance(modalities, dict) or not modalities:
            raise ValueError(f"modalities is {modalities!r}; it must be a dict of one or more")
        factory = {"device": device, "dtype": dtype}
        kinds = {name: kind for name, kind in QUERIES.items() if name in ("fourier", "learned")}
        self.modalities = nn.ModuleDict(
            {name: build(f"modalities[{name!r}]", kinds, modalities[name], **factory) for name in sorted(modalities)}
        )
        self.channels = max(part.channels for part in self.modalities.values()) + padding
        self.padding = nn.ParameterDict(
            {name: torch.empty(1, self.channels - part.channels, **factory) for name, part in self.modalities.items()}
        )
        self.reset_parameters()

    def reset_parameters(self):
        """Padding vectors truncated normal of deviation 0.02; each modality its own way."""
        for part in self.modalities.values():
            part.reset_parameters()
        for table in self.padding.values():
            reset_table_(table)

    def chosen(self, points):
        """{name: how many outputs} of `points` {name: int64 (O_m,) or None}: no entry takes all, an empty tensor none."""
        if points is not None and (not isinstance(points, dict) or not set(points) <= set(self.modalities)):
            raise ValueError(f"points is {points!r}; it must be a dict with some of {sorted(self.modalities)}")
        points = points or {}
        return {name: part.count if points.get(name) is None else len(points[name]) for name, part in self.modalities.items()}

    def forward(self, latents, *, tokens=None, position=None, points=None):
        """(1, sum of O_m, E), None; `points` is {name: int64 (O_m,) or None}."""
        parts = []
        for name, count in self.chosen(points).items():
            if count:
                own = None if points is None else points.get(name)
                queries, _ = self.modalities[name](latents, points=own)
                parts.append((queries, None, self.padding[name], None, None))
        if not parts:
            raise ValueError("points has no output of any modality")
        return join(parts), None


def check_points(points, count, device):
    """Raises unless `points` are numbers (O,) of outputs in [0, count) on `device`."""
    check_numbers("points", points, count, device)
    if points.dim() != 1:
        raise ValueError(f"points has shape {tuple(points.shape)}; it must have one dimension")


QUERIES = {
    "fourier": FourierQueries,
    "input": InputQueries,
    "learned": LearnedQueries,
    "multimodal": MultimodalQueries,
}

"""Fourier features against the formula, written once more point by point."""

import math

import numpy as np
import pytest
import torch

from mmkernels.modules import FourierPositions


def expected(shape, bands, resolution):
    rows = []
    for index in np.ndindex(*shape):
        p = [float(np.float32(-1 + 2 * i / (n - 1))) if n > 1 else -1.0 for i, n in zip(index, shape, strict=True)]
        waves = []
        for x, mu in zip(p, resolution, strict=True):
            waves += [math.pi * f * x for f in np.linspace(1, mu / 2, bands)]
        rows.append(p + [math.sin(w) for w in waves] + [math.cos(w) for w in waves])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    "shape, bands, resolution",
    [((1,), 1, (7,)), ((11,), 5, (11,)), ((4, 7), 3, (9, 20)), ((2, 3, 5), 4, (2, 3, 5)), ((3, 3), 0, (3, 3))],
)
def test_against_the_formula(shape, bands, resolution):
    positions = FourierPositions(shape, bands, resolution, dtype=torch.float64)
    assert positions().shape == (math.prod(shape), len(shape) * (2 * bands + 1))
    torch.testing.assert_close(positions(), expected(shape, bands, resolution), rtol=0, atol=1e-12)
    single = FourierPositions(shape, bands, resolution)
    assert single().dtype == torch.float32
    assert torch.equal(single(), positions().float())  # computed in float64, rounded once


def test_default_resolution_is_the_shape():
    assert torch.equal(FourierPositions((4, 6), 3)(), FourierPositions((4, 6), 3, (4, 6))())


def test_a_buffer_outside_the_state_dict():
    positions = FourierPositions((4, 6), 3)
    assert not positions.state_dict() and not list(positions.parameters())
    assert positions() is positions.features  # no copy
    assert positions.to(torch.bfloat16)().dtype == torch.bfloat16
    assert "num_bands=3" in repr(positions)


def test_meta_device_and_reset():
    positions = FourierPositions((4, 6), 3, device="meta").to_empty(device="cpu")
    positions.reset_parameters()
    assert torch.equal(positions(), FourierPositions((4, 6), 3)())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((), 3), "index_shape"),
        (((4, 0), 3), "index_shape"),
        (((4,), -1), "num_bands"),
        (((4, 4), 3, (4,)), "max_resolution"),
        ((4, 3), "index_shape is 4"),
        (((4.0,), 3), "index_shape"),
        (((4,), 1.5), "num_bands is 1.5"),
        (((4,), 1, (float("nan"),)), "max_resolution"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FourierPositions(*arguments)

"""Fourier features of positions, and where patches are."""

from __future__ import annotations

import math

import pytest
import torch

from fmrizoo.errors import DataError
from fmrizoo.layers.coordinates import FEATURES, fourier_features, grid_centres, world_centres
from fmrizoo.types import Grid


def test_features_are_the_coordinates_their_sines_and_cosines() -> None:
    u = torch.tensor([[0.1, 0.2, 0.3, 1.7]], dtype=torch.float64)
    found = fourier_features(u)[0]
    assert FEATURES == 84 and found.shape == (84,) and found.dtype == torch.float32
    wanted = [*u[0].tolist()]
    for wave in (math.sin, math.cos):
        wanted += [wave(2**k * v) for v in u[0].tolist() for k in range(10)]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=0)


def test_centres_on_the_grid() -> None:
    index = torch.tensor([[[0, 0, 0, 0], [3, 1, 0, 9]]])
    found = grid_centres(index, Grid(4, 2, 1, 5))
    wanted = [[0.125, 0.25, 0.5, 0.1], [0.875, 0.75, 0.5, 1.9]]
    torch.testing.assert_close(found[0], torch.tensor(wanted))


def test_centres_in_the_world() -> None:
    index = torch.tensor([[[0, 1, 2, 3]]])
    tr = torch.tensor([0.5, 2.0])
    found = world_centres(index, (6, 6, 6, 2), (2.0, 3.0, 1.0), tr, (192.0, 192.0, 96.0, 60.0))
    wanted = [[6 / 192, 27 / 192, 15 / 96, 7 * t / 60] for t in (0.5, 2.0)]
    torch.testing.assert_close(found[:, 0], torch.tensor(wanted))
    with pytest.raises(DataError, match="tr"):
        world_centres(index, (6, 6, 6, 2), (2.0, 3.0, 1.0), None, (1.0, 1.0, 1.0, 1.0))

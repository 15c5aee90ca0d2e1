"""Parcels, connectivity and whitening by their defining properties."""

from __future__ import annotations

import numpy as np
import pytest

from fmrizoo.errors import DataError
from fmrizoo.evaluate.features import connectivity, fit_whitening, parcels


def test_parcels_are_cubes_that_average() -> None:
    mask = np.ones((4, 4, 4), dtype=bool)
    weights = parcels(mask, at_most=8)
    assert weights.shape == (8, 64)
    np.testing.assert_allclose(weights.sum(1), 1.0)
    np.testing.assert_array_equal((weights > 0).sum(0), 1)
    cube = np.argwhere(weights[0].reshape(4, 4, 4) > 0)
    np.testing.assert_array_equal(np.ptp(cube, axis=0), [1, 1, 1])


@pytest.mark.parametrize("shape", [(40, 20, 1), (6, 10, 10), (23, 27, 21)])
def test_parcels_stay_few_and_drop_slivers(shape: tuple[int, int, int]) -> None:
    axes = np.meshgrid(*(np.linspace(-1, 1, s) if s > 1 else [0] for s in shape), indexing="ij")
    mask = sum(a**2 for a in axes) < 1
    weights = parcels(mask)
    assert 3 <= len(weights) <= 100
    size = (weights > 0).sum(1)
    assert size.min() * 4 >= size.max()


def test_parcels_of_an_empty_mask_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        parcels(np.zeros((2, 2, 2), dtype=bool))


def test_connectivity_equals_numpy() -> None:
    series = np.random.default_rng(0).normal(size=(3, 5, 12))
    found = connectivity(series)
    upper = np.triu_indices(5, 1)
    for b in range(3):
        np.testing.assert_allclose(found[b], np.arctanh(np.corrcoef(series[b])[upper]), rtol=1e-10)


def test_connectivity_of_still_and_equal_parcels_is_finite() -> None:
    series = np.random.default_rng(0).normal(size=(1, 4, 9))
    series[0, 0] = 7.0
    series[0, 2] = series[0, 1]
    found = connectivity(series)[0]
    np.testing.assert_array_equal(found[:3], 0.0)
    assert found[3] == pytest.approx(np.arctanh(0.999))


def test_whitened_frames_are_white() -> None:
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 30)) + 4
    white = fit_whitening(frames)
    z = white(frames)
    assert z.shape == (200, 6)  # rank 6: what is left after that is rounding
    np.testing.assert_allclose(np.cov(z.T), np.eye(6), atol=1e-8)
    assert white.explained == pytest.approx(1.0)
    np.testing.assert_allclose(white(frames[:5].mean(0)[None])[0], z[:5].mean(0), atol=1e-10)


def test_whitening_keeps_at_most_the_wanted_number_and_refuses_stillness() -> None:
    rng = np.random.default_rng(0)
    assert fit_whitening(rng.normal(size=(50, 40)), at_most=7).components.shape == (40, 7)
    assert fit_whitening(rng.normal(size=(5, 40))).components.shape == (40, 4)
    with pytest.raises(DataError, match="two frames"):
        fit_whitening(np.zeros((1, 4)))

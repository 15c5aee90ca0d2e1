"""Parcel means against sums over voxels."""

from __future__ import annotations

import pytest
import torch

from fmrizoo.errors import DataError
from fmrizoo.layers.parcels import parcel_weights, pool_parcels
from fmrizoo.types import Features, Grid

REDUCTION, GRID = (2, 3, 2, 1), Grid(3, 2, 2, 4)


def atlas() -> torch.Tensor:
    torch.manual_seed(0)
    labels = torch.randint(-1, 4, (6, 5, 3)) * 10  # smaller than the grid's 6×6×4 voxels
    labels[:2, :3, :2] = 70
    return labels


def features(dropped: bool = True) -> Features:
    torch.manual_seed(1)
    index = torch.cartesian_prod(*(torch.arange(s) for s in GRID))
    order = torch.randperm(len(index))
    values, valid = torch.randn(2, GRID.size, 5), torch.ones(2, GRID.size, dtype=torch.bool)
    if dropped:
        valid[1] = torch.rand(GRID.size) > 0.4
        values[~valid] = torch.nan  # what is not valid has no say, whatever it holds
    index = index[order].expand(2, -1, -1)
    return Features(values, index, valid, GRID, torch.ones(2, GRID.size))


def test_weights_count_the_voxels_of_each_parcel_in_each_cell() -> None:
    labels = atlas()
    weights, values = parcel_weights(labels, REDUCTION, GRID)
    assert values == (10, 20, 30, 70) and weights.shape == (4, 12)
    expected = torch.zeros(4, 3, 2, 2)
    for x, y, z in labels.nonzero().tolist():
        if labels[x, y, z] > 0:
            row = values.index(int(labels[x, y, z]))
            expected[row, x // 2, y // 3, z // 2] += 1
    assert torch.equal(weights.view(4, 3, 2, 2), expected) and weights.dtype == torch.float32


def test_a_parcel_is_the_mean_over_its_voxels_and_frames() -> None:
    labels, given = atlas(), features()
    weights, values = parcel_weights(labels, REDUCTION, GRID)
    found = pool_parcels(given, weights)
    tokens = [{tuple(cell.tolist()): n for n, cell in enumerate(index)} for index in given.index]
    for clip in range(2):
        for row, value in enumerate(values):
            rows = []
            for x, y, z in (labels == value).nonzero().tolist():
                for t in range(GRID.t):
                    n = tokens[clip][x // 2, y // 3, z // 2, t]
                    if given.valid[clip, n]:
                        rows.append(given.values[clip, n])
            torch.testing.assert_close(found[clip, row], torch.stack(rows).mean(0))


def test_a_parcel_that_the_brain_does_not_reach_is_nan() -> None:
    given = features(dropped=False)
    weights, values = parcel_weights(atlas(), REDUCTION, GRID)
    corner = (given.index[..., :3] == 0).all(-1)
    given.valid[0] &= ~corner[0]
    found = pool_parcels(given, weights)
    assert found[0, values.index(70)].isnan().all()
    assert found[1].isfinite().all() and found[0, :3].isfinite().all()
    assert pool_parcels(given, weights.double()).dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(6, 6, 4), "must be whole numbers"),
        (torch.ones(6, 6, 4, 1, dtype=torch.int64), "must be whole numbers"),
        (
            torch.ones(7, 6, 4, dtype=torch.int64),
            r"\(7, 6, 4\) voxels is larger .*\(6, 6, 4\)",
        ),
        (torch.zeros(6, 6, 4, dtype=torch.int64), "holds no parcel"),
    ],
)
def test_an_atlas_that_does_not_fit_is_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parcel_weights(labels, REDUCTION, GRID)


def test_weights_of_another_grid_are_refused() -> None:
    with pytest.raises(DataError, match="weights for 8 cells do not fit features of 12"):
        pool_parcels(features(), torch.ones(2, 8))

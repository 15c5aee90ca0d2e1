"""Reconstruction archives, the fillers without a model, and pictures of any grid."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from fmrizoo.errors import DataError
from fmrizoo.report import pictures
from fmrizoo.report.reconstruction import Picture, fill_errors, read_picture


def picture(grid: tuple[int, int, int], frames: int = 6, hide: Any = slice(2, 4)) -> Picture:
    x, y, z = np.meshgrid(*(np.arange(s) for s in grid), indexing="ij")
    truth = (x + 10 * y + 100 * z)[..., None] + np.arange(frames) * 2.0
    masked = np.zeros(truth.shape, bool)
    masked[..., hide] = True
    brain = np.ones(grid, bool)
    brain[0, 0] = False
    return Picture(truth, truth + 1.0, masked, brain, (3.0, 3.0, 6.0), 2.0)


def test_fillers_by_hand() -> None:
    p = picture((3, 4, 2))
    errors = fill_errors(p)
    assert errors["the model"] == pytest.approx(1.0)
    # Frames 2 and 3 of 0, 2, 4, …, 10 lie on the line between their neighbours.
    assert errors["interpolation in time"] == pytest.approx(0.0, abs=1e-12)
    # A voxel's mean over frames 0, 1, 4, 5 is 5 above its first value; hidden are 4 and 6.
    assert errors["each voxel's own mean"] == pytest.approx(1.0)
    shown = p.truth[p.brain][:, [0, 1, 4, 5]].mean()
    expected = np.abs(p.truth[p.brain][:, 2:4] - shown).mean()
    assert errors["mean of what was shown"] == pytest.approx(expected)


def test_voxels_never_shown_fall_back_to_the_mean_of_what_was_shown() -> None:
    p = picture((3, 4, 2), hide=slice(0, 0))
    p.masked[1, 1, 1] = True
    errors = fill_errors(p)
    shown = p.truth[p.brain[..., None] & ~p.masked].mean()
    expected = np.abs(p.truth[1, 1, 1] - shown).mean()
    for name in ("interpolation in time", "each voxel's own mean", "mean of what was shown"):
        assert errors[name] == pytest.approx(expected)


@pytest.mark.parametrize(
    "grid",
    [
        (40, 20, 1),
        pytest.param((6, 10, 10), marks=pytest.mark.slow),
        (1, 8, 9),
        (7, 1, 9),
        (2, 2, 2),
    ],
)
def test_any_grid_makes_a_picture(grid: tuple[int, int, int]) -> None:
    p = picture(grid)
    for image in (pictures.slices(p), pictures.courses(p)):
        kind, encoded = image.uri.split(";base64,")
        content = base64.b64decode(encoded)
        assert image.width > 500
        assert image.alt
        if kind == "data:image/png":
            pixels = imread(io.BytesIO(content))
            assert pixels.shape[1] > 1000
            assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20
        else:
            assert b"<svg" in content


def test_views_show_hidden_voxels_and_the_slice_that_there_is() -> None:
    for grid in ((40, 20, 1), (1, 8, 9), (6, 10, 10)):
        p = picture(grid)
        for view in pictures.views_of(p):
            assert view.cut(p.hidden).any()
    assert {v.axis for v in pictures.views_of(picture((1, 8, 9)))} == {0}
    assert {v.frame for v in pictures.views_of(picture((40, 20, 1)))} == {2, 3}
    assert len({v.slice for v in pictures.views_of(picture((6, 10, 10)))}) == 4


def test_slices_are_not_mirrored() -> None:
    # Rows from the bottom up are y, columns from left to right are x.
    view = pictures.View(2, 0, 0)
    volume = np.arange(6.0).reshape(2, 3, 1)
    np.testing.assert_array_equal(view.cut(volume), volume[:, :, 0].T)
    p = picture((6, 10, 10))
    assert pictures.sides(p, "RAS") == "Right in the picture is the subject's right, up is front."
    assert pictures.sides(p, "LPS") == "Right in the picture is the subject's left, up is back."
    assert "up is top" in pictures.sides(picture((1, 8, 9)), "RAS")


def test_time_courses_are_of_ranked_voxels() -> None:
    p = picture((5, 5, 4))
    rng = np.random.default_rng(0)
    p = Picture(
        p.truth, p.truth + rng.normal(size=p.truth.shape), *(p.masked, p.brain), (1, 1, 1), 2
    )
    error = np.where(p.hidden, np.abs(p.predicted - p.truth), 0).sum(-1)
    values = [error[voxel] for _, voxel in pictures._ranked(p)]
    assert values == sorted(values)
    inside = np.sort(error[p.brain])
    assert inside[0] < values[0] < values[1] < values[2] < inside[-1]


def archive(tmp_path: Path, **changes: Any) -> Path:
    p = picture((3, 4, 2))
    arrays: dict[str, Any] = {
        "truth": p.truth,
        "predicted": p.predicted,
        "masked": p.masked,
        "mask": p.brain,
        "voxel_size": np.array(p.voxel_size),
        "tr": np.array(2.0),
    }
    arrays |= changes
    path = tmp_path / "reconstruction.npz"
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_archive_round_trip(tmp_path: Path) -> None:
    found = read_picture(archive(tmp_path))
    np.testing.assert_array_equal(found.truth, picture((3, 4, 2)).truth)
    assert (found.voxel_size, found.tr) == ((3.0, 3.0, 6.0), 2.0)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mask": None}, "lacks the arrays"),
        ({"mask": np.ones((3, 4, 1), bool)}, "must be"),
        ({"truth": np.full((3, 4, 2, 6), np.nan)}, "NaN"),
        ({"masked": np.zeros((3, 4, 2, 6), bool)}, "no brain voxel was hidden"),
        ({"voxel_size": np.array([3.0, 0.0, 3.0])}, "positive"),
    ],
)
def test_bad_archives_are_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=word):
        read_picture(archive(tmp_path, **changes))


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable"):
        read_picture(archive(tmp_path, truth=np.array([{}], dtype=object)))

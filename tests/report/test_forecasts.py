"""Forecast archives, errors by horizon, the sentence on them, and their place on the page."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from fmrizoo.errors import DataError
from fmrizoo.report import forecasts, pictures
from fmrizoo.report.ahead import MEAN, MODEL, PERSISTENCE, Ahead, errors_ahead, read_ahead, verdict
from fmrizoo.report.html import write_report
from fmrizoo.report.reconstruction import Picture, fill_errors, read_picture

GRID = (4, 5, 3)


def ahead(
    grid: tuple[int, int, int] = GRID, frames: int = 6, off: Any = 0.0, rise: float = 1.0
) -> Ahead:
    """Every voxel rises by ``rise`` a frame; the forecast is ``off`` by so much."""
    rng = np.random.default_rng(0)
    line = rng.normal(size=grid)[..., None] + rise * np.arange(4 + frames)
    brain = np.ones(grid, bool)
    brain[0, 0] = grid[0] * grid[1] == 1
    context, truth = line[..., :4], line[..., 4:]
    return Ahead(context, truth, truth + off, brain, (3.0, 3.0, 6.0), 2.5, "sub-1_run-1")


def test_errors_by_hand() -> None:
    errors = errors_ahead(ahead(off=0.25))
    np.testing.assert_allclose(errors[MODEL], 0.25)
    np.testing.assert_allclose(errors[PERSISTENCE], [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(errors[MEAN], [2.5, 3.5, 4.5, 5.5, 6.5, 7.5])


def test_voxels_outside_the_brain_do_not_count() -> None:
    one = ahead()
    one.predicted[~one.brain] += 1000.0
    assert errors_ahead(one)[MODEL].max() == 0.0


@pytest.mark.parametrize(
    ("off", "said"),
    [
        (0.5, "the model is nearer to what came than persistence from 2.5 s to 15 s ahead."),
        (9.0, "persistence is nearer to what came than the model from 2.5 s to 15 s ahead."),
        (2.5, "persistence from 7.5 s ahead on, and not before."),
        ([0.5, 1.5, 2.5, 9, 9, 9], "persistence up to 7.5 s ahead, and not after."),
        ([0.5, 9, 2.5, 9, 9, 0], "persistence at 3 of 6 horizons, in no clear order."),
    ],
)
def test_the_sentence_says_who_is_nearer_from_where_on(off: Any, said: str) -> None:
    assert verdict(ahead(off=np.asarray(off))).endswith(said)


def test_the_sentence_says_when_no_forecast_would_be_better() -> None:
    flat = ahead(off=3.0, rise=0.0)
    flat.context[..., -1] += 1.0  # persistence repeats a frame that stands out
    said = "; over all of it, staying at each voxel's mean over the clip is nearer than both."
    assert verdict(flat).endswith(said)
    single = ahead(frames=1, off=0.1)
    assert verdict(single) == (
        "On this clip the model is nearer to what came than persistence 2.5 s ahead."
    )


@pytest.mark.parametrize(
    ("grid", "frames"),
    [
        ((40, 20, 1), 1),
        pytest.param((6, 10, 10), 3, marks=pytest.mark.slow),
        ((1, 8, 9), 2),
        pytest.param((7, 1, 9), 25, marks=pytest.mark.slow),
        ((2, 2, 2), 5),
    ],
)
def test_any_grid_makes_pictures(grid: tuple[int, int, int], frames: int) -> None:
    one = ahead(grid, frames, off=0.3)
    for image in (forecasts.frames(one), forecasts.horizon(one)):
        kind, encoded = image.uri.split(";base64,")
        content = base64.b64decode(encoded)
        assert image.width > 500 and image.alt
        if kind == "data:image/png":
            pixels = imread(io.BytesIO(content))
            assert pixels.shape[1] > 1000
            assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20
        else:
            assert b"<svg" in content


# --- archives ------------------------------------------------------------------------------------


def save(path: Path, one: Ahead, **changes: Any) -> Path:
    arrays = {
        "context": one.context.astype(np.float32),
        "truth": one.truth.astype(np.float32),
        "predicted": one.predicted.astype(np.float32),
        "mask": one.brain,
        "voxel_size": np.array(one.voxel_size),
        "tr": np.array(one.tr),
        "run": np.array(one.run),
    } | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_archive_round_trip(tmp_path: Path) -> None:
    found = read_ahead(save(tmp_path / "forecast.npz", ahead()))
    np.testing.assert_allclose(found.truth, ahead().truth, rtol=1e-6)
    assert (found.voxel_size, found.tr, found.run) == ((3.0, 3.0, 6.0), 2.5, "sub-1_run-1")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"context": None}, "lacks the arrays"),
        ({"mask": np.ones((4, 5, 1), bool)}, "must be"),
        ({"mask": np.zeros(GRID, bool)}, "of one brain"),
        ({"predicted": np.zeros((*GRID, 5))}, "must be"),
        ({"truth": np.zeros((*GRID, 0)), "predicted": np.zeros((*GRID, 0))}, "must be"),
        ({"context": np.full((*GRID, 4), np.nan)}, "NaN"),
        ({"voxel_size": np.array([3.0, 0.0, 3.0])}, "positive"),
        ({"run": np.array([{}], dtype=object)}, "not a readable"),
    ],
)
def test_bad_archives_are_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=word):
        read_ahead(save(tmp_path / "forecast.npz", ahead(), **changes))


# --- one step ahead ------------------------------------------------------------------------------


def stepped(step: int = 2, frames: int = 6) -> Picture:
    truth = np.broadcast_to(np.arange(frames) ** 2.0, (3, 4, 2, frames)).copy()
    masked = np.ones(truth.shape, bool)
    masked[..., :step] = False
    brain = np.ones((3, 4, 2), bool)
    return Picture(truth, truth + 1.0, masked, brain, (3.0, 3.0, 6.0), 2.0, step)


def test_guesses_from_before_each_step_by_hand() -> None:
    """Frames 0 1 | 4 9 | 16 25: the last ones before are 1 and 9, the means so far 0.5 and 3.5."""
    errors = fill_errors(stepped())
    assert errors["the model"] == pytest.approx(1.0)
    assert errors["persistence"] == pytest.approx((3 + 8 + 7 + 16) / 4)
    assert errors["each voxel's mean so far"] == pytest.approx((3.5 + 8.5 + 12.5 + 21.5) / 4)
    assert set(errors) == {"the model", "persistence", "each voxel's mean so far"}


def test_a_first_step_that_was_predicted_is_not_scored(tmp_path: Path) -> None:
    """A token model predicts other places' first frames too; nothing came before them."""
    p = stepped()
    path = tmp_path / "reconstruction.npz"
    np.savez(
        path,
        truth=p.truth,
        predicted=p.predicted,
        masked=np.ones_like(p.masked),
        mask=p.brain,
        voxel_size=np.array(p.voxel_size),
        tr=np.array(2.0),
        step=np.array(2),
        unit=np.array("token"),
    )
    found = read_picture(path)
    assert (found.step, found.unit) == (2, "token")
    assert not found.masked[..., :2].any() and found.masked[..., 2:].all()


@pytest.mark.parametrize("step", [1, 2])
def test_steps_make_pictures_without_a_column_of_what_was_shown(step: int) -> None:
    rng = np.random.default_rng(0)
    p = stepped(step)
    p.truth[:] = rng.normal(size=p.truth.shape)
    image = pictures.slices(p)
    assert "predicted" in image.alt and "shown" not in image.alt
    assert "Recorded and predicted time courses" in pictures.courses(p).alt


# --- on the page ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["time", "token"])
def test_a_forecaster_has_its_sections(tree: Path, tmp_path: Path, unit: str) -> None:
    run = shutil.copytree(tree / "pretrain", tmp_path / "runs" / "ar")
    with np.load(run / "reconstruction.npz") as archive:
        arrays = dict(archive)
    arrays["masked"][:] = True
    extra = {"step": np.array(2), "unit": np.array(unit)}
    np.savez(run / "reconstruction.npz", **arrays, **extra)
    seen = json.loads((run / "model" / "config.json").read_text())["seen_runs"][0]
    save(run / "forecast.npz", ahead((40, 20, 1), off=0.5))
    summary = write_report([tmp_path / "runs"], tmp_path / "r.html")
    text = " ".join((tmp_path / "r.html").read_text().split())
    assert "<h2>Forecast</h2>" in text
    assert "a run that it was not trained on, and was rolled 15 s forward" in text
    assert "persistence from 2.5 s to 15 s ahead." in text
    assert "What the pretrained model expects one step ahead" in text
    assert "were hidden from the model" not in text
    assert ("at other places" in text) == (unit == "token")
    assert "predicts the next step" in summary.lines[2]
    save(run / "forecast.npz", ahead((40, 20, 1)), run=np.array(seen))
    write_report([tmp_path / "runs"], tmp_path / "r.html")
    text = " ".join((tmp_path / "r.html").read_text().split())
    assert "a run that it was trained on, and" in text


def test_a_broken_forecast_is_left_out_and_named(tree: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tree / "pretrain", tmp_path / "runs" / "ar")
    (run / "forecast.npz").write_bytes(b"no archive")
    summary = write_report([tmp_path / "runs"], tmp_path / "r.html")
    assert any("ar/forecast.npz was left out" in p for p in summary.problems)
    assert "<h2>Forecast</h2>" not in (tmp_path / "r.html").read_text()


def test_other_runs_have_no_forecast_section(tree: Path, tmp_path: Path) -> None:
    write_report([tree / "pretrain"], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<h2>Forecast</h2>" not in text and "What the pretrained model fills in" in text

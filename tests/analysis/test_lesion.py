"""Lesions: only what a model looks at can hurt it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from local_backbone import opened, save_atlas

from fmrizoo.analysis.lesion import (
    LESIONS,
    goodness,
    lesion_each,
    lesion_run,
    lesioned,
    write_lesions,
)
from fmrizoo.analysis.tested import TestedRun, interval, thinned
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.evaluate.predictions import Prediction
from fmrizoo.pipeline import finetune
from fmrizoo.types import Grid, Voxels
from fmrizoo.zoo import load_recipe

LOOKED_AT = 3


@pytest.fixture
def one_region(sample_store: Path, tmp_path: Path) -> tuple[TestedRun, Path]:
    """A probe that looks at one of four quarters of the slice at the clip's end, and an atlas."""
    run = opened(load_recipe("finetune/haxby_slice", [f"data.store={sample_store}"]))
    run = replace(run, table=thinned(run.table, 24))
    info = run.table.runs[0]
    labels = np.zeros(info.grid, int)
    for k, (x, y) in enumerate(((0, 0), (0, 10), (20, 0), (20, 10)), start=1):
        labels[x : x + 20, y : y + 10] = k
    weight = run.model.head.project.weight  # type: ignore[union-attr]
    with torch.no_grad():
        inside = torch.from_numpy(labels == LOOKED_AT).flatten()
        weight[:, inside] = torch.randn(
            len(weight), int(inside.sum()), generator=torch.Generator().manual_seed(0)
        )
    return run, save_atlas(tmp_path / "four.nii.gz", labels, info.affine)


def test_only_the_region_that_is_looked_at_counts(
    one_region: tuple[TestedRun, Path], tmp_path: Path
) -> None:
    run, atlas = one_region
    found = lesion_each(run, atlas=atlas, batch_size=5)
    assert [row.label for row in found.rows] == [1, 2, 3, 4] and len(found.units) == 24
    for row in found.rows:
        if row.label == LOOKED_AT:
            assert row.moved > 0.1 and row.change != 0
            assert row.low is not None and row.high is not None
            assert row.low < row.change < row.high
        else:
            assert (row.change, row.low, row.high, row.moved) == (0, 0, 0, 0)
            assert row.metric == found.intact
    write_lesions(tmp_path / "out", found)
    with (tmp_path / "out/lesions.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [float(r["change"]) for r in rows] == [r.change for r in found.rows]
    with (tmp_path / "out/lesion_units.tsv").open() as stream:
        units = list(csv.DictReader(stream, delimiter="\t"))
    assert len(units) == 4 * 24
    own = [float(u["change"]) for u in units if u["label"] == str(LOOKED_AT)]
    assert np.mean(own) == pytest.approx(found.rows[LOOKED_AT - 1].change)
    image = nibabel.load(tmp_path / "out/lesion_effect.nii.gz")
    effect = np.asarray(image.dataobj)  # type: ignore[attr-defined]
    np.testing.assert_allclose(image.affine, run.table.runs[0].affine, atol=1e-5)  # type: ignore[attr-defined]
    assert set(np.flatnonzero(effect)) == set(np.flatnonzero(found.labels.numpy() == LOOKED_AT))
    assert json.loads((tmp_path / "out/lesion.json").read_text())["units"] == 24


def test_a_model_of_means_does_not_miss_what_changes(one_region: tuple[TestedRun, Path]) -> None:
    """The probe reads means over time, which two of the lesions keep."""
    run, atlas = one_region
    for how in ("mean", "surrogate"):
        (row,) = lesion_each(run, atlas=atlas, lesion=how, regions=[LOOKED_AT]).rows
        assert row.moved < 1e-4
    (row,) = lesion_each(run, atlas=atlas, regions=[LOOKED_AT]).rows
    assert row.moved > 0.1


def clip(seed: int = 0, frames: int = 12) -> Voxels:
    rng = torch.Generator().manual_seed(seed)
    index = torch.cat([torch.arange(0, 9), torch.arange(3, 10)])
    values = torch.randn(frames, 16, generator=rng) + 5
    return Voxels(values, index, (9, 7), torch.tensor([-1.0, -2.0]), Grid(2, 3, 2, frames))


@pytest.mark.parametrize("how", LESIONS)
def test_a_lesion_leaves_the_rest_alone(how: str) -> None:
    voxels, inside = clip(), torch.arange(16) % 3 == 0
    found = lesioned(voxels, inside, how)
    assert torch.equal(found.values[:, ~inside], voxels.values[:, ~inside])
    assert bool((found.values[:, inside] != voxels.values[:, inside]).any(0).all())
    assert torch.equal(lesioned(voxels, inside, how).values, found.values), "nothing is by chance"


def test_what_the_lesions_put_in_place() -> None:
    voxels, inside = clip(), torch.ones(16, dtype=torch.bool)
    background = lesioned(voxels, inside, "background").values
    assert bool((background[:, :9] == -1).all()) and bool((background[:, 9:] == -2).all())
    mean = lesioned(voxels, inside, "mean").values
    torch.testing.assert_close(mean, voxels.values.mean(0, keepdim=True).expand(12, -1))
    for frames in (12, 13):
        voxels = clip(frames=frames)
        surrogate = lesioned(voxels, inside, "surrogate").values
        spectra = [torch.fft.rfft(v.double(), dim=0) for v in (voxels.values, surrogate)]
        torch.testing.assert_close(spectra[0].abs(), spectra[1].abs(), rtol=1e-4, atol=1e-4)
        for part in (slice(0, 9), slice(9, 16)):
            together = [np.corrcoef(v[:, part].T) for v in (voxels.values, surrogate)]
            np.testing.assert_allclose(*together, atol=1e-5)
        phases = [(spectra[1] / spectra[0])[1, k].angle() for k in (0, 8, 9, 15)]
        assert phases[0] == pytest.approx(float(phases[1]), abs=1e-4)
        assert abs(float(phases[1] - phases[2])) > 1e-3, "clips have phases of their own"
    again = lesioned(voxels, inside, "surrogate", seed=1).values
    assert not torch.allclose(again, surrogate)
    with pytest.raises(RecipeError, match="lesion='men' is not known"):
        lesioned(voxels, inside, "men")


def test_goodness_of_every_kind() -> None:
    def one(target: float, *scores: float) -> Prediction:
        return Prediction("u", "s", "r", target, scores)

    assert goodness(one(0, 0.0, 0.0), "classification") == pytest.approx(np.log(0.5))
    assert goodness(one(1, 900.0, 1000.0), "classification") == pytest.approx(0)
    assert goodness(one(1, *np.log([0.2, 0.7, 0.1])), "ordinal") == pytest.approx(np.log(0.7))
    assert goodness(one(30.0, 27.5), "regression") == -2.5


def test_intervals_draw_subjects_where_there_are_enough() -> None:
    rng = np.random.default_rng(0)
    each = rng.normal(size=20)
    values, names = np.repeat(each, 10), [f"{k}" for k in np.repeat(np.arange(20), 10)]
    low, high = interval(values, names) or (0, 0)
    width = 2 * 1.96 * each.std() / np.sqrt(20)
    assert high - low == pytest.approx(width, rel=0.15)
    narrow = interval(values, ["one"] * 200) or (0, 0)
    assert narrow[1] - narrow[0] == pytest.approx(width / np.sqrt(10), rel=0.15)
    assert interval(values[:1], ["a"]) is None


def test_a_trained_run_from_its_folder(sample_store: Path, tmp_path: Path, tiny: list[str]) -> None:
    run = tmp_path / "run"
    finetune(load_recipe("finetune/haxby_slice", [f"data.store={sample_store}", *tiny]), run)
    found = lesion_run(run, atlas="cubes:6", clips=8, lesion="surrogate")
    assert len(found.units) == 8 and 1 < len(found.rows) <= 6
    assert all(row.moved > 0 for row in found.rows)
    size = lesion_run(run, atlas="cubes:6", clips=8, lesion="surrogate", batch_size=3)
    np.testing.assert_allclose(size.changes, found.changes, atol=1e-5)
    with pytest.raises(DataError, match=r"no region \[77\]"):
        lesion_run(run, atlas="cubes:6", regions=[77])
    with pytest.raises(RecipeError, match="lesion='x'"):
        lesion_run(run, atlas="cubes", lesion="x")
    with pytest.raises(DataError, match="at least one clip"):
        lesion_run(run, atlas="cubes", clips=0)

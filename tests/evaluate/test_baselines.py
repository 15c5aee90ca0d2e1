"""Baselines on real events and on made-up traits: they learn, and they do not look at the test."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from fmrizoo.config import DataConfig, PrepareConfig, SplitConfig, TaskConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.prepare import prepare
from fmrizoo.data.splits import Split, make_split
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError
from fmrizoo.evaluate import baselines
from fmrizoo.evaluate.baselines import BaselineResult, run_baselines, write_baselines
from fmrizoo.evaluate.clip_features import read_clips
from fmrizoo.evaluate.frames import FrameReader, Frames
from fmrizoo.evaluate.linear import Fitted
from fmrizoo.evaluate.predictions import evaluate, read_predictions
from fmrizoo.evaluate.results import find_results

DATA = DataConfig(clip_frames=9)
TASK = TaskConfig()
NAMES = ["Voxels + logistic", "PCA whitening + logistic", "ROI means + logistic"]


def split_of(store: Store, fold: int = 0, **settings: Any) -> Split:
    config = SplitConfig(**({"by": "run", "folds": 3, "fold": fold, "validation": 0.3} | settings))
    return make_split(store, store.runs, config)


@pytest.fixture(scope="module")
def found(haxby: Store) -> list[BaselineResult]:
    return run_baselines(haxby, split_of(haxby), DATA, TASK, seed=3)


def test_every_baseline_is_there_with_its_units(found: list[BaselineResult], haxby: Store) -> None:
    assert [b.result.name for b in found] == [
        "Chance",
        *NAMES,
        "Connectivity + logistic",
        "Tangent connectivity + logistic",
        "Confounds only + logistic",
    ]
    assert found[-1].result.n_test == 0
    assert "share age, sex, site and motion" in (found[-1].result.note or "")
    for b in found[:-1]:
        assert (b.result.n_test, b.result.fold, b.result.seed) == (24, 0, 3)
        assert b.result.task.classes == tuple(
            sorted({c["trial_type"] for c in haxby.runs[0].events})
        )
        assert b.result.chance == pytest.approx(1 / 8)
        assert b.result.split_sha == split_of(haxby).sha


def test_linear_baselines_decode_the_objects(found: list[BaselineResult]) -> None:
    # Four training runs, 24 test events: chance 0.125, its standard error 0.07.
    reached = {b.result.name: b.result.metrics["accuracy"] or 0.0 for b in found}
    assert min(reached[name] for name in NAMES) > 0.3, reached


def test_results_are_those_of_the_predictions(found: list[BaselineResult], haxby: Store) -> None:
    test_runs = set(split_of(haxby).test)
    for b in found[1:-1]:
        assert evaluate(b.predictions, "classification").values == b.result.metrics
        assert {p.run for p in b.predictions} == test_runs
        assert b.result.parameters is not None
        assert b.result.validation is not None


def test_written_baselines_read_back(found: list[BaselineResult], tmp_path: Path) -> None:
    paths = write_baselines(tmp_path, found)
    assert paths[1].name == "voxels-logistic"
    by_folder = {p.parent: r for p, r in find_results([tmp_path])}
    assert by_folder == {p.resolve(): b.result for p, b in zip(paths, found, strict=True)}
    rows, classes = read_predictions(paths[1] / "predictions.tsv")
    assert (tuple(rows), classes) == (found[1].predictions, found[1].result.task.classes)


def recorded(
    haxby: Store, monkeypatch: pytest.MonkeyPatch, noise: float
) -> tuple[list[BaselineResult], list[Fitted], list[str]]:
    """Run the baselines with ``noise`` added to the test runs; results, models and all reads."""
    split, models, reads = split_of(haxby, 1), [], []
    fit, read = baselines.fit, FrameReader.read

    def fit_and_keep(*args: Any, **kwargs: Any) -> Fitted:
        models.append(fit(*args, **kwargs))
        reads.append("fit")
        return models[-1]

    def read_and_note(self: FrameReader, run: str, *args: Any, **kwargs: Any) -> Frames:
        values = read(self, run, *args, **kwargs)
        reads.append(run)
        return values + np.float32(noise) * (run in split.test)

    with monkeypatch.context() as patch:
        patch.setattr(baselines, "fit", fit_and_keep)
        patch.setattr(FrameReader, "read", read_and_note)
        return run_baselines(haxby, split, DATA, TASK), models, reads


def test_changing_the_test_runs_changes_nothing_that_was_fitted(
    haxby: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, models, reads = recorded(haxby, monkeypatch, 0.0)
    noisy, models_noisy, _ = recorded(haxby, monkeypatch, 50.0)
    for a, b in zip(models, models_noisy, strict=True):
        for name in ("mean", "scale", "weights", "bias"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert (a.c, a.tried) == (b.c, b.tried)
    assert [a.result.validation for a in clean] == [b.result.validation for b in noisy]
    # The check can fail: the test results do change.
    assert clean[1].predictions != noisy[1].predictions
    last_fit = len(reads) - 1 - reads[::-1].index("fit")
    test_runs = set(split_of(haxby, 1).test)
    assert not test_runs & set(reads[:last_fit])
    after = [r for r in reads[last_fit + 1 :]]
    assert set(after) == test_runs
    assert len(after) == 24  # each test clip is read once


def test_permuted_labels_fall_to_chance(haxby: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hits: dict[str, list[float]] = {}
    for fold in range(3):
        rng, split = np.random.default_rng(fold), split_of(haxby, fold)

        def shuffled(store: Store, runs: list[str], *rest: Any, rng: Any = rng) -> ClipTable:
            table = read_clips(store, runs, *rest)
            labels = np.array([str(label) for (label,) in table.labels or ()])
            for run in range(len(table.runs)):
                own = table.run == run
                labels[own] = rng.permutation(labels[own])
            return dataclasses.replace(table, labels=tuple((str(name),) for name in labels))

        with monkeypatch.context() as patch:
            patch.setattr(baselines, "read_clips", shuffled)
            for b in run_baselines(haxby, split, DATA, TASK)[1:-1]:
                hits.setdefault(b.result.name, []).append(b.result.metrics["accuracy"] or 0.0)
    # 72 test events: chance 0.125, standard error 0.039.
    for name, values in hits.items():
        assert np.mean(values) < 0.25, name


def test_short_clips_have_no_connectivity_and_say_so(haxby: Store) -> None:
    found = run_baselines(haxby, split_of(haxby), DataConfig(clip_frames=4), TASK)
    rows = {b.result.name: b.result for b in found}
    for name in ("Connectivity + logistic", "Tangent connectivity + logistic"):
        assert rows[name].n_test == 0
        assert set(rows[name].metrics.values()) == {None}
        assert "4 frames" in (rows[name].note or "")


def test_without_validation_the_strength_is_the_default(
    haxby: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_baselines(haxby, split_of(haxby, validation=0.0), DATA, TASK)
    assert all(b.result.validation is None for b in found)


def test_group_is_in_the_connectivity_of_whole_runs(traits: Store) -> None:
    task = TaskConfig(target="group", source="participants", level="subject")
    split = split_of(traits, by="subject", folds=2, validation=0.2)
    found = {b.result.name: b for b in run_baselines(traits, split, DATA, task)}
    best = found["Connectivity + logistic"]
    assert best.result.metrics["accuracy"] == 1.0
    assert best.result.n_test == len({p.subject for p in best.predictions}) == 10
    assert {p.n_clips for p in best.predictions} == {1}
    # Clips of 9 frames of 48: five per subject, averaged to one prediction.
    assert {p.n_clips for p in found["Voxels + logistic"].predictions} == {5}


def test_age_is_in_the_voxel_means(traits: Store) -> None:
    task = TaskConfig(target="age", source="participants", level="subject", kind="regression")
    data = DataConfig(clip_frames=9, normalization="none")
    split = split_of(traits, by="subject", folds=4, validation=0.2)
    found = {b.result.name: b.result for b in run_baselines(traits, split, data, task)}
    assert set(found) == {
        "Chance",
        "Voxels + ridge",
        "PCA whitening + ridge",
        "ROI means + ridge",
        "Connectivity + ridge",
        "Tangent connectivity + ridge",
        "Confounds only + ridge",
    }
    ages, voxels = found["Chance"].metrics, found["Voxels + ridge"].metrics
    assert ages["pearson_r"] is None
    assert ages["mae"] is not None
    assert voxels["mae"] is not None
    assert voxels["mae"] < 0.6 * ages["mae"]
    assert (voxels["r2"] or 0) > 0.6


def several(**settings: Any) -> TaskConfig:
    targets = {"group": "classification", "age": "regression", "decade": "ordinal"}
    return TaskConfig(targets=targets, source="participants", level="subject", **settings)


@pytest.fixture
def gappy(traits: Store, tmp_path: Path) -> Store:
    """The same subjects; two without a group, one without an age, and the decade of their age."""
    folder = tmp_path / "gappy"
    shutil.copytree(traits.path, folder)
    lines = (folder / "participants.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    rows = [[who, age, group, age[0]] for who, age, group in rows]
    rows[3][2] = rows[4][2] = "n/a"
    rows[5][1] = "n/a"
    text = "\n".join("\t".join(row) for row in [[*lines[0].split("\t"), "decade"], *rows])
    (folder / "participants.tsv").chmod(0o644)
    (folder / "participants.tsv").write_text(text + "\n")
    return Store(folder)


def test_several_targets_are_fitted_one_by_one(gappy: Store, tmp_path: Path) -> None:
    data = DataConfig(clip_frames=9, normalization="none")
    split = split_of(gappy, by="subject", folds=2, validation=0.2)
    task = several(class_weights="balanced", levels=list("234567"))
    found = run_baselines(gappy, split, data, task)
    names = ["Chance", "Voxels", "PCA whitening", "ROI means", "Connectivity"]
    names += ["Tangent connectivity", "Confounds only"]
    assert [b.result.name.split(" + ")[0] for b in found] == names * 3
    table = {(b.result.task.target, b.result.name.split(" + ")[0]): b for b in found}
    for target, kind, model in (
        ("group", "classification", "logistic"),
        ("age", "regression", "ridge"),
    ):
        # Each equals the run with that target alone.
        alone = TaskConfig(target=target, kind=kind, source="participants", level="subject")
        for b in run_baselines(gappy, split, data, alone):
            both = table[target, b.result.name.split(" + ")[0]]
            assert both.predictions == b.predictions
            assert both.result.metrics == b.result.metrics
            assert both.result.name == "Chance" or both.result.name.endswith(model)
    missing = {"group": {"sub-03", "sub-04"}, "age": {"sub-05"}, "decade": set()}
    tested = {f"sub-{run.split('_')[0].removeprefix('sub-')}" for run in split.test}
    for target, gone in missing.items():
        rows = table[target, "Voxels"].predictions
        assert {p.unit for p in rows} == tested - gone
    folders = {p.relative_to(tmp_path).as_posix() for p in write_baselines(tmp_path, found)}
    assert {"age/voxels-ridge", "group/voxels-logistic", "decade/voxels-ridge"} <= folders
    assert len(folders) == 21


def test_decade_is_in_the_voxel_means(gappy: Store, tmp_path: Path) -> None:
    task = TaskConfig(target="decade", kind="ordinal", source="participants", level="subject")
    data = DataConfig(clip_frames=9, normalization="none")
    split = split_of(gappy, by="subject", folds=4, validation=0.2)
    found = {b.result.name: b for b in run_baselines(gappy, split, data, task)}
    chance, voxels = found["Chance"].result, found["Voxels + ridge"].result
    assert chance.metrics["quadratic_kappa"] == 0.0
    assert voxels.task.kind == "ordinal" and voxels.task.classes == tuple("234567")
    kappa, mae = voxels.metrics["quadratic_kappa"], voxels.metrics["mae"]
    assert kappa is not None and kappa > 0.6
    assert mae is not None and mae < 0.6 * (chance.metrics["mae"] or 0)
    # One weight per voxel and one offset, whatever the number of levels.
    assert voxels.parameters is not None and voxels.parameters.trainable == 4 * 4 * 4 + 1
    path = write_baselines(tmp_path, [found["Voxels + ridge"]])[0]
    assert (
        tuple(read_predictions(path / "predictions.tsv")[0]) == found["Voxels + ridge"].predictions
    )


def test_voxelwise_scores_of_traits_are_refused_as_empty(traits: Store) -> None:
    task = TaskConfig(target="group", source="participants", level="subject")
    data = DataConfig(clip_frames=9, normalization="voxel")
    split = split_of(traits, by="subject", folds=2)
    found = {b.result.name: b.result for b in run_baselines(traits, split, data, task)}
    for name in NAMES:
        assert found[name].n_test == 0
        assert "normalization=voxel" in (found[name].note or "")
    assert found["Connectivity + logistic"].n_test == 10


def test_a_class_without_training_runs_is_named(
    haxby: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = split_of(haxby)

    def renamed(store: Store, runs: list[str], *rest: Any) -> ClipTable:
        table = read_clips(store, runs, *rest)
        if set(runs) != set(split.test):
            return table
        return dataclasses.replace(table, labels=(("newcomer",),) * len(table))

    monkeypatch.setattr(baselines, "read_clips", renamed)
    monkeypatch.setattr(FrameReader, "read", lambda *_: pytest.fail("a voxel was read"))
    with pytest.raises(DataError, match="of the test part has trial_type 'newcomer', which no"):
        run_baselines(haxby, split, DATA, TASK)


def test_frames_are_the_stores_own(haxby: Store) -> None:
    names = [r.name for r in haxby.runs]
    reader = FrameReader(haxby, names[:2], "voxel")
    dense = haxby.open(names[4]).read(0, haxby.runs[4].n_frames)[reader.mask].astype(np.float64)
    expected = (dense - dense.mean(1, keepdims=True)) / dense.std(1, keepdims=True)
    # The store keeps mean and s.d. from before int8 coding, hence not exactly those of `dense`.
    np.testing.assert_allclose(reader.read(names[4], 3, 5, 2), expected[:, 3:13:2].T, atol=0.03)
    assert reader.sample(names[:2], 50).shape[0] <= 52
    assert reader.sample(names[:2], 10**6).shape[0] == sum(haxby[n].n_frames for n in names[:2])


def test_runs_with_other_brains_meet_on_the_voxels_that_training_runs_share(
    tmp_path: Path,
) -> None:
    lines = ["path\tsubject\tmask\ttr"]
    affine = np.diag([3.0, 3, 3, 1])
    # Voxel value = its own number: brains of sub-a 0–4, sub-b 1–5, sub-c 3–7 along x.
    for subject, low in (("a", 0), ("b", 1), ("c", 3)):
        bold = np.arange(8.0)[:, None, None, None] * 10 + np.arange(6.0) + np.zeros((8, 1, 1, 6))
        mask = np.zeros((8, 1, 1), np.uint8)
        mask[low : low + 5] = 1
        for name, array in (("bold", bold.astype(np.float32)), ("mask", mask)):
            image = nibabel.Nifti1Image(array, affine)
            image.header.set_xyzt_units("mm", "sec")
            nibabel.save(image, tmp_path / f"{subject}_{name}.nii")
        lines.append(f"{subject}_bold.nii\t{subject}\t{subject}_mask.nii\t1.0")
    (tmp_path / "files.tsv").write_text("\n".join(lines) + "\n")
    prepare(tmp_path / "files.tsv", tmp_path / "store", PrepareConfig(space="native"))
    store = Store(tmp_path / "store")
    a, b, c = (r.name for r in store.runs)
    reader = FrameReader(store, [a, b], "none")
    assert np.flatnonzero(reader.mask).tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(reader.read(b, 2, 1)[0], [12, 22, 32, 42], atol=0.1)
    np.testing.assert_allclose(reader.read(c, 2, 1)[0], [0, 0, 32, 42], atol=0.1)
    assert np.flatnonzero(FrameReader(store, [a, c], "none").mask).tolist() == [3, 4]
    with pytest.raises(DataError, match="no training run"):
        FrameReader(store, [], "none")

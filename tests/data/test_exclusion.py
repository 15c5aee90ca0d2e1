"""Runs that a recipe leaves out: everywhere, by name and reason, and no other run moves."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fmrizoo import pipeline
from fmrizoo.config import DataConfig, QcConfig, SplitConfig, StoreConfig
from fmrizoo.data import exclusion
from fmrizoo.data.dataset import ClipDataset
from fmrizoo.data.exclusion import chosen
from fmrizoo.data.mixture import open_store
from fmrizoo.data.qc import assess
from fmrizoo.data.splits import Split, make_split
from fmrizoo.data.store import Store, read_index, write_index
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.evaluate.embed import embed
from fmrizoo.pipeline.inputs import open_data
from fmrizoo.trainer.folder import recipe_hash
from fmrizoo.zoo import load_recipe

RUNS = [(s, r) for s in ("01", "02", "03", "04", "05", "06") for r in "12"]
BAD = {"sub-02_task-rest_run-1": 0.9, "sub-05_task-rest_run-1": 0.6, "sub-05_task-rest_run-2": 2.0}


@pytest.fixture(autouse=True)
def _say_anew() -> Iterator[None]:
    exclusion._say.cache_clear()
    exclusion._say_unjudged.cache_clear()
    yield


@pytest.fixture
def path(tree: Any, made: Callable[..., Store]) -> Path:
    """Six subjects with two runs each; three runs with much motion."""
    for subject, run in RUNS:
        tree.add(subject, run)
    folder = made(tree.root).path
    for entry in (entries := read_index(folder)):
        entry["qc"]["fd_mean"] = BAD.get(entry["name"], 0.1)
    write_index(folder, entries, "test")
    return folder


def config(path: Path, **values: Any) -> DataConfig:
    qc = {"min_tsnr": 0.0, "max_spikes": 0.0, "max_dropout": 0.0, "min_inside": 0.0}
    limits = QcConfig(**{**qc, **values.pop("qc", {})})
    return DataConfig(store=str(path), clip_frames=4, qc=limits, **values)


def left_out(data: DataConfig) -> dict[str, str]:
    return chosen(open_store(data), data).left_out


def test_flagged_runs_are_those_that_qc_flags(path: Path) -> None:
    assert left_out(config(path)) == {}
    for limits in ({}, {"max_fd": 0.7}, {"max_fd": 0.05, "min_minutes": 99.0}):
        data = config(path, qc=limits, exclude="flagged")
        flagged = {row.run.name for row in assess(Store(path), data.qc) if row.flags}
        if len(flagged) == len(RUNS):
            with pytest.raises(DataError, match=r"leave none of the 12 runs .*data\.qc\.max_fd"):
                left_out(data)
            continue
        found = left_out(data)
        assert set(found) == flagged == {n for n, fd in BAD.items() if fd > data.qc.max_fd}
        assert all(
            "data.qc.max_fd" in why and f"{BAD[n]:.3g} mm" in why for n, why in found.items()
        )
    with pytest.raises(RecipeError, match=r"data.exclude='flaged'.*Did you mean 'flagged'"):
        DataConfig(exclude="flaged")


def test_names_reach_runs_and_subjects(path: Path) -> None:
    found = left_out(config(path, leave_out=["sub-03", "sub-05_task-rest_run-2"]))
    three = [f"sub-03_task-rest_run-{r}" for r in "12"]
    assert list(found) == [*three, "sub-05_task-rest_run-2"]
    both = left_out(config(path, leave_out=["sub-05"], exclude="flagged"))
    assert "leave_out; mean framewise" in both["sub-05_task-rest_run-1"]
    # Named, but not selected: nothing to say. `sub-0` is nobody, though names begin with it.
    assert left_out(config(path, leave_out=["sub-03"], select={"subject": "01"})) == {}
    for name, near in (("sub-0", "sub-0"), ("sub-33", "'sub-03'"), ("sub-05_task-rest_run-3", "")):
        with pytest.raises(DataError, match=f"data.leave_out names '{name}'.*Did you mean.*{near}"):
            left_out(config(path, leave_out=[name]))


def test_it_is_said_once_with_every_name(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        left_out(config(path, exclude="flagged", leave_out=["sub-01"]))
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "5 of 12 runs are left out" in said
    assert all(name in said for name in [*BAD, "sub-01_task-rest_run-1", "sub-01_task-rest_run-2"])


def test_runs_that_cannot_be_judged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = read_index(path)
    entries[0]["qc"]["fd_mean"] = None
    write_index(path, entries, "test")
    with caplog.at_level(logging.INFO):
        assert set(left_out(config(path, exclude="flagged"))) == set(BAD)
    assert "not judged: 1 by data.qc.max_fd" in caplog.text
    entries[0]["qc"] = {}
    write_index(path, entries, "test")
    with pytest.raises(DataError, match=r"sub-01_task-rest_run-1 of .* was prepared without"):
        left_out(config(path, exclude="flagged"))
    assert len(left_out(config(path, leave_out=["sub-01"]))) == 2


@pytest.mark.parametrize("fold", range(3))
def test_no_other_run_changes_its_part(fold: int, path: Path, tmp_path: Path) -> None:
    store, settings = Store(path), SplitConfig(folds=3, fold=fold, validation=0.25)
    everything = make_split(store, store.runs, settings)
    found = chosen(store, config(path, exclude="flagged"))
    split = make_split(store, found.runs, settings, found.left_out)
    for part, names in everything.parts().items():
        assert split.parts()[part] == [n for n in names if n not in BAD]
    assert split.left_out == found.left_out and split.sha != everything.sha
    split.save(tmp_path / "split.json")
    assert Split.load(tmp_path / "split.json") == split
    # A split made before is narrowed in the same way; without anything to leave out it stays.
    everything.save(tmp_path / "all.json")
    fixed = SplitConfig(file=str(tmp_path / "all.json"))
    assert make_split(store, found.runs, fixed, found.left_out).parts() == split.parts()
    assert make_split(store, found.runs, fixed) == everything
    edited = (tmp_path / "split.json").read_text().replace("0.6 mm", "0.7 mm")
    (tmp_path / "split.json").write_text(edited)
    with pytest.raises(DataError, match="was changed"):
        Split.load(tmp_path / "split.json")


def test_units_are_counted_after_leaving_out(path: Path) -> None:
    store = Store(path)
    out = {run.name: "x" for run in store.runs if run.subject == "05"}
    settings = SplitConfig(folds=3, validation=0.0)
    subjects = sorted({n[:6] for n in make_split(store, store.runs, settings, out).train})
    for count in range(1, len(subjects) + 1):
        cut = SplitConfig(folds=3, validation=0.0, train_units=count)
        assert len({n[:6] for n in make_split(store, store.runs, cut, out).train}) == count
    whole = make_split(store, store.runs, settings)
    for part in ("train", "test"):
        gone = dict.fromkeys(whole.parts()[part], "y")
        with pytest.raises(DataError, match=f"in the {part} part of fold 0: .*: y"):
            make_split(store, store.runs, settings, gone)


def test_everything_that_chooses_clips(path: Path, tmp_path: Path) -> None:
    changes = [f"data.store={path}", "data.clip_frames=4", "data.exclude=flagged",
               "data.qc={min_tsnr: 0, max_spikes: 0, max_dropout: 0, min_inside: 0}",
               "data.leave_out=[sub-06]", "split.folds=2", "split.validation=0.34",
               "data.select={}", "backbone.img_size=[5,6,4,4]", "backbone.patch_size=[5,3,2,2]",
               "backbone.window_size=[2,2,2,2]", "backbone.embed_dim=8",
               "backbone.num_heads=[1,2]", "train.steps=1", "train.batch_size=2"]  # fmt: skip
    recipe = load_recipe("pretrain/haxby_slice", changes)
    gone = {*BAD, "sub-06_task-rest_run-1", "sub-06_task-rest_run-2"}
    data = open_data(recipe)
    assert not gone & {r.name for r in data.runs} and set(data.split.left_out) == gone
    assert len(data.runs) == len(RUNS) - len(gone)
    clips = ClipDataset.of(recipe.data)
    assert {r.name for r in clips.table.runs} == {r.name for r in data.runs}
    named = ClipDataset.of(recipe.data, runs=["sub-01_task-rest_run-1", "sub-02_task-rest_run-1"])
    assert [r.name for r in named.table.runs] == ["sub-01_task-rest_run-1"]
    pipeline.pretrain(recipe, tmp_path / "run")
    split = Split.load(tmp_path / "run" / "split.json")
    assert set(split.left_out) == gone
    stored = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert stored.data.exclude == "flagged" and stored.data.leave_out == ["sub-06"]
    again = embed(tmp_path / "run", tmp_path / "e.npz", level="run")
    assert {r.run for r in again.rows} == {r.name for r in data.runs}
    # The names are of this store's runs: another one has no sub-06, or another.
    moved = shutil.copytree(path, tmp_path / "moved")
    other = embed(tmp_path / "run", tmp_path / "f.npz", store=str(moved), level="run")
    assert {r.run for r in other.rows} == {r.name for r in Store(path).runs} - set(BAD)


def test_several_stores(path: Path, tree: Any, made: Callable[..., Store], tmp_path: Path) -> None:
    shutil.rmtree(tree.root)
    for subject, run in RUNS:
        tree.add(subject, run)
    second = made(tree.root, name="second").path
    stores = {"a": StoreConfig(str(path)), "b": StoreConfig(str(second))}
    limits = config(path).qc
    data = DataConfig(stores=stores, clip_frames=4, exclude="flagged", qc=limits,
                      leave_out=["sub-b:03"])  # fmt: skip
    expected = [n.replace("sub-", "sub-a:") for n in BAD]
    found = chosen(open_store(data), data)
    assert sorted(found.left_out) == sorted(
        [*expected, "sub-b:03_task-rest_run-1", "sub-b:03_task-rest_run-2"]
    )
    assert len(found.used) == 2 * len(RUNS) - 5
    data.leave_out = ["sub-03"]
    with pytest.raises(DataError, match=r"Did you mean 'sub-[ab]:03'"):
        chosen(open_store(data), data)


def test_old_folders_stay_the_same_run() -> None:
    plain = recipe_hash(load_recipe("pretrain/haxby_slice"))
    assert recipe_hash(load_recipe("pretrain/haxby_slice", ["data.qc.max_fd=0.3"])) == plain
    flagged = recipe_hash(load_recipe("pretrain/haxby_slice", ["data.exclude=flagged"]))
    assert flagged != plain
    stricter = ["data.exclude=flagged", "data.qc.max_fd=0.3"]
    assert recipe_hash(load_recipe("pretrain/haxby_slice", stricter)) not in (flagged, plain)
    assert recipe_hash(load_recipe("pretrain/haxby_slice", ["data.leave_out=[sub-01]"])) != plain

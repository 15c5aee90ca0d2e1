"""Splits: folds partition the units, nothing overlaps, files are checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmrizoo.config import SplitConfig
from fmrizoo.data.splits import Split, make_split, unit_of
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError
from fmrizoo.types import RunKey


def folds(store: Store, runs: list[Any], **settings: Any) -> list[Split]:
    n = settings.get("folds", 5)
    return [make_split(store, runs, SplitConfig(**settings, fold=f)) for f in range(n)]


@pytest.mark.parametrize("n_folds", [2, 3, 4, 9])
def test_every_run_is_tested_once(n_folds: int, sample_store: Store) -> None:
    runs = sample_store.select({"acquisition": "1slice"})
    splits = folds(sample_store, runs, by="run", folds=n_folds, validation=0.2)
    assert sorted(n for s in splits for n in s.test) == sorted(r.name for r in runs)
    for split in splits:
        parts = split.parts().values()
        assert sum(map(len, parts)) == 9 == len(set().union(*map(set, parts)))
        assert split.validation and split.train
        assert abs(len(split.test) - 9 / n_folds) < 1


def test_subjects_are_never_divided(tree: Any, made: Callable[..., Store]) -> None:
    for subject, run in [(s, r) for s in ("01", "02", "03", "04", "05") for r in "123"]:
        tree.add(subject, run)
    store = made(tree.root)
    for split in folds(store, list(store.runs), folds=5, validation=0.25):
        subjects = [{store[n].subject for n in part} for part in split.parts().values()]
        assert [len(s) for s in subjects] == [3, 1, 1]
        assert len(set().union(*subjects)) == 5
    assert make_split(store, store.runs, SplitConfig(validation=0.0)).validation == []


def test_two_reductions_of_one_recording_stay_together(sample_store: Store) -> None:
    for split in folds(sample_store, list(sample_store.runs), by="run", folds=3):
        recordings = [{n.rsplit("run-")[1] for n in part} for part in split.parts().values()]
        assert sum(map(len, recordings)) == 9 == len(set().union(*recordings))
    a = RunKey("1", task="x", acquisition="a", run="1", extra=(("echo", "2"),))
    assert unit_of(a, "run") == unit_of(RunKey("1", task="x", run="1"), "run")
    assert unit_of(a, "run") != unit_of(
        RunKey("1", task="x", run="1", extra=(("dir", "LR"),)), "run"
    )
    assert unit_of(RunKey("1", "a"), "session") != unit_of(RunKey("1", "b"), "session")


def test_the_seed_decides(sample_store: Store) -> None:
    runs = sample_store.select({"acquisition": "25mm"})
    one, again, other = (
        make_split(sample_store, r, SplitConfig(by="run", folds=3, seed=s))
        for r, s in ((runs, 0), (runs[::-1], 0), (runs, 1))
    )
    assert one == again and one.sha == again.sha
    assert one.test != other.test and one.sha != other.sha


def test_files(sample_store: Store, tmp_path: Path) -> None:
    runs = sample_store.select({"acquisition": "25mm"})
    split = make_split(sample_store, runs, SplitConfig(by="run", folds=3))
    path = tmp_path / "splits" / "fold-0.json"
    split.save(path)
    assert Split.load(path) == split
    assert [p.name for p in path.parent.iterdir()] == ["fold-0.json"]
    used = make_split(sample_store, runs, SplitConfig(folds=2, file=str(path)))
    assert used.test == split.test and used.sha == split.sha

    body = json.loads(path.read_text())
    body["test"].append(body["train"].pop())
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match="changed after it was written"):
        Split.load(path)
    body["test"].append(body["train"][0])
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"fold-0\.json: run .* is in the train and the test part"):
        Split.load(path)
    for content in ("", "[]", "{}", '{"schema": "fmrizoo.split/1"}'):
        path.write_text(content)
        with pytest.raises(DataError, match="is not a split file"):
            Split.load(path)
    with pytest.raises(DataError, match="no split file"):
        Split.load(tmp_path / "none.json")


def test_a_split_of_another_store_is_refused(
    sample_store: Store, tree: Any, made: Callable[..., Store]
) -> None:
    tree.add()
    runs = sample_store.select({"acquisition": "25mm"})
    split = make_split(sample_store, runs, SplitConfig(by="run", folds=3))
    with pytest.raises(DataError, match="9 runs of the split are not in"):
        split.check(made(tree.root))


def test_a_divided_unit_is_refused(sample_store: Store) -> None:
    names = [r.name for r in sample_store.runs]
    split = Split(names[:1], [], names[9:10], SplitConfig(by="run"))  # run 1, both acquisitions
    with pytest.raises(DataError, match="is divided between the train and the test part"):
        split.check(sample_store)


def test_too_few_units(sample_store: Store) -> None:
    with pytest.raises(DataError, match=r"18 chosen runs are 1 subject\(s\)"):
        make_split(sample_store, sample_store.runs, SplitConfig(folds=2))
    runs = sample_store.select({"acquisition": "25mm"})[:2]
    with pytest.raises(DataError, match="nothing is left to train on"):
        make_split(sample_store, runs, SplitConfig(by="run", folds=2))

"""Files of an evaluated run: one target in the run folder, several in folders of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fmrizoo.config import DataConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError
from fmrizoo.evaluate.predictions import Prediction, read_predictions
from fmrizoo.evaluate.results import Parameters, find_results
from fmrizoo.evaluate.rows import (
    RunFacts,
    read_run_results,
    target_folders,
    write_run_results,
)
from fmrizoo.types import TaskSpec

SEX = TaskSpec("classification", ("F", "M"), name="sex", weights=(2.0, 2 / 3))
AGE = TaskSpec("regression", mean=30.0, std=5.0, name="age")
GRADE = TaskSpec("ordinal", ("1", "2", "3"), name="grade")
FACTS = RunFacts(
    name="LoRA",
    fold=2,
    seed=7,
    level="subject",
    split_sha="abc",
    seconds=3.5,
    init="pretrained",
    head="lora",
    train_encoder="lora",
    parameters=Parameters(10, 90, 80, 90, 0),
)


@pytest.fixture
def train(haxby: Store) -> ClipTable:
    """Five subjects; the first one's clips are many."""
    table = ClipTable.windows(haxby, haxby.runs[:1], DataConfig(clip_frames=9))
    rows = [("a", 20.0, "1")] * 6
    rows += [("b", 30.0, "1"), ("c", 40.0, "2"), ("d", None, "3"), ("e", 50.0, "3")]
    labels = [("F" if unit == "a" else "M", age, grade) for unit, age, grade in rows]
    return replace(
        table,
        run=np.zeros(len(rows), np.int32),
        start=np.arange(len(rows), dtype=np.int32),
        labels=tuple(labels),
        units=tuple(unit for unit, *_ in rows),
        targets=("sex", "age", "grade"),
    )


def only(table: ClipTable, k: int) -> ClipTable:
    return replace(
        table, labels=tuple((row[k],) for row in table.labels or ()), targets=(table.targets[k],)
    )


def unit(name: str, target: float, *scores: float) -> Prediction:
    return Prediction(name, name, f"run-{name}", target, scores)


TEST = {
    "sex": [unit("x", 1, 0.0, 2.0), unit("y", 0, 0.0, 1.0)],
    "age": [unit("x", 31.4, 30.0), unit("y", 41.0, 45.0)],
    "grade": [unit("x", 2, -9.0, -9.0, 0.0), unit("y", 0, -9.0, 0.0, -9.0)],
}


def test_a_single_target_stays_in_the_run_folder(train: ClipTable, tmp_path: Path) -> None:
    found = write_run_results(
        tmp_path, FACTS, (SEX,), only(train, 0), TEST, {"sex": TEST["sex"][:1]}
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions.tsv", "results.json"]
    result = found["sex"]
    assert read_run_results(tmp_path, ["sex"]) == found
    assert (result.kind, result.name, result.fold, result.seed) == ("finetune", "LoRA", 2, 7)
    assert (result.head, result.train_encoder, result.init) == ("lora", "lora", "pretrained")
    assert (result.n_test, result.metrics["accuracy"]) == (2, 0.5)
    assert result.validation is not None and result.validation["accuracy"] == 1.0
    # Four of five training subjects are M (six of ten clips are F): drawing gets 0.5 as well.
    assert result.chance == pytest.approx(0.5)
    assert read_predictions(tmp_path / "predictions.tsv") == (TEST["sex"], ("F", "M"))


def test_several_targets_have_folders_of_their_own(train: ClipTable, tmp_path: Path) -> None:
    found = write_run_results(tmp_path, FACTS, (SEX, AGE, GRADE), train, TEST)
    assert list(found) == ["sex", "age", "grade"]
    places = {
        p.parent.relative_to(tmp_path.resolve()).as_posix() for p, _ in find_results([tmp_path])
    }
    assert places == {"targets/sex", "targets/age", "targets/grade"}
    assert read_run_results(tmp_path, list(found)) == found
    assert found["grade"].metrics["mae"] == pytest.approx(0.5)
    assert (found["grade"].task.classes, found["grade"].chance) == (("1", "2", "3"), 0.0)
    # R² of always the training units' mean 35 (four of five have an age).
    truth = np.array([31.4, 41.0])
    expected = 1 - ((truth - 35) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    assert found["age"].chance == pytest.approx(expected)
    assert found["age"].validation is None


def test_a_target_without_test_labels_says_so(train: ClipTable, tmp_path: Path) -> None:
    found = write_run_results(tmp_path, FACTS, (SEX, AGE, GRADE), train, {**TEST, "age": []})
    assert (found["age"].n_test, found["age"].chance) == (0, None)
    assert found["age"].note == "no test unit has a label 'age'"
    assert set(found["age"].metrics.values()) == {None}
    assert read_run_results(tmp_path, list(found)) == found


def test_results_are_all_there_or_not_at_all(train: ClipTable, tmp_path: Path) -> None:
    found = write_run_results(tmp_path, FACTS, (SEX, AGE, GRADE), train, TEST)
    (tmp_path / "targets" / "age" / "results.json").unlink()
    assert read_run_results(tmp_path, list(found)) is None


def test_names_of_target_folders(tmp_path: Path) -> None:
    assert target_folders(tmp_path, ["a/b"]) == {"a/b": tmp_path}
    found = target_folders(tmp_path, ["PANSS total/7", "../x", "Größe_2"])
    assert [p.relative_to(tmp_path).as_posix() for p in found.values()] == [
        "targets/PANSS-total-7",
        "targets/x",
        "targets/Größe_2",
    ]
    assert target_folders(tmp_path, ["a", "b"], below="")["b"] == tmp_path / "b"
    with pytest.raises(DataError, match="need folder names that differ"):
        target_folders(tmp_path, ["a b", "A/b"])

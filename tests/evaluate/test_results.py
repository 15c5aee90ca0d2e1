"""results.json, averaging over seeds and folds, and the paired difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmrizoo.errors import DataError
from fmrizoo.evaluate.predictions import Prediction
from fmrizoo.evaluate.results import (
    Parameters,
    Result,
    TaskInfo,
    find_results,
    read_result,
    write_result,
)
from fmrizoo.evaluate.statistics import UNITWISE, Paired, paired
from fmrizoo.evaluate.summary import rows, summarize

TASK = TaskInfo("trial_type", "classification", ("face", "house"), "event")


def result(accuracy: float | None = 0.5, **changes: Any) -> Result:
    values: dict[str, Any] = {
        "kind": "finetune",
        "name": "swin4d",
        "fold": 0,
        "seed": 0,
        "task": TASK,
        "n_test": 8,
        "chance": 0.5,
        "metrics": {"accuracy": accuracy, "balanced_accuracy": accuracy, "auroc": None},
        "seconds": 1.5,
        "split_sha": "abc",
    }
    return Result(**(values | changes))


def test_round_trip(tmp_path: Path) -> None:
    full = result(
        validation={"accuracy": 0.25},
        init="pretrained",
        head="linear",
        train_encoder="last_block",
        parameters=Parameters(10, 20, 96, 25, 8),
        note="ein Wort ≥ 1",
    )
    for i, r in enumerate((full, result())):
        path = write_result(tmp_path / str(i), r)
        assert read_result(path) == r == read_result(path.parent)
    values = json.loads((tmp_path / "0" / "results.json").read_text())
    assert values["schema"] == "fmrizoo.result/1"
    assert values["parameters"] == {
        "trainable": 10,
        "frozen": 20,
        "optimizer_bytes": 96,
        "encoder": 25,
        "encoder_trained": 8,
    }


def test_files_of_before_there_were_more_heads_are_read(tmp_path: Path) -> None:
    path = write_result(tmp_path, result(train_encoder="all", parameters=Parameters(10, 20)))
    values = json.loads(path.read_text())
    del values["head"]
    values["parameters"] = {"trainable": 10, "frozen": 20}
    path.write_text(json.dumps(values))
    assert read_result(path) == result(train_encoder="all", parameters=Parameters(10, 20))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schema": "other/2"}, "other/2"),
        ({"kind": "guess"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"metrics": {"f1": 0.5}}, "f1"),
        ({"metrics": {"accuracy": "high"}}, "not a number"),
        ({"metrics": {"accuracy": float("nan")}}, "nan"),
        ({"fold": "one"}, "fold"),
        ({"n_test": 0}, "no unit"),
        ({"task": {"target": "x"}}, "kind"),
        ({"train_encoder": ""}, "train_encoder must be a word"),
        ({"head": 3}, "head must be a word"),
        ({"metrics": {"quadratic_kappa": 0.5}}, "quadratic_kappa"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    path = write_result(tmp_path, result())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=word):
        read_result(path)


def test_missing_field_and_broken_json_are_refused(tmp_path: Path) -> None:
    path = write_result(tmp_path, result())
    values = json.loads(path.read_text())
    del values["chance"]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="chance"):
        read_result(path)
    path.write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_result(path)


def test_find_results_searches_below_once(tmp_path: Path) -> None:
    for name in ("b", "a/deep", ".hidden"):
        write_result(tmp_path / name, result())
    found = find_results([tmp_path, tmp_path / "a"])
    assert [p.parent.relative_to(tmp_path).as_posix() for p, _ in found] == ["a/deep", "b"]


def test_mean_and_std_are_over_seeds_not_over_results() -> None:
    # Folds differ by much more than seeds; the s.d. must not see them.
    cells = {(0, 0): 0.2, (0, 1): 0.8, (1, 0): 0.3, (1, 1): 0.9, (2, 0): 0.1, (2, 1): 0.7}
    row = summarize([result(v, seed=s, fold=f) for (s, f), v in cells.items()])
    assert row.primary is not None
    assert row.primary.per_seed == pytest.approx({0: 0.5, 1: 0.6, 2: 0.4})
    assert row.primary.mean == pytest.approx(0.5)
    assert row.primary.std == pytest.approx(np.std([0.5, 0.6, 0.4], ddof=1))
    assert (row.primary.over, row.n_seeds, row.n_folds, row.n_units) == ("seeds", 3, 2, 16)
    assert row.complete
    assert row.spreads["auroc"] is None


def test_folds_weigh_by_units_and_one_seed_spreads_over_folds() -> None:
    row = summarize([result(1.0, fold=0, n_test=30), result(0.0, fold=1, n_test=10)])
    assert row.primary is not None
    assert row.primary.mean == pytest.approx(0.75)
    assert row.primary.over == "folds"
    single = summarize([result(1.0)])
    assert single.primary is not None
    assert (single.primary.std, single.primary.over) == (None, None)


def test_incomplete_and_duplicate_designs_are_seen() -> None:
    assert not summarize([result(fold=0), result(fold=1), result(seed=1)]).complete
    with pytest.raises(DataError, match="two results"):
        summarize([result(), result()])
    with pytest.raises(DataError, match="different names"):
        summarize([result(), result(name="other")])


def test_rows_are_sorted_best_first_and_unscored_last() -> None:
    none = {"accuracy": None, "balanced_accuracy": None, "auroc": None}
    found = rows(
        [
            result(0.3, name="low"),
            result(name="fc", kind="baseline", n_test=0, metrics=none, note="clip too short"),
            result(0.9, name="high"),
        ]
    )
    assert [r.name for r in found] == ["high", "low", "fc"]
    assert found[-1].notes == ("clip too short",)
    assert found[-1].primary is None


def table(correct: list[int], runs: int = 1) -> list[Prediction]:
    return [
        Prediction(f"u{i}", "001", f"run-{i % runs}", 1.0, (0.0, 1.0) if c else (1.0, 0.0))
        for i, c in enumerate(correct)
    ]


def difference(
    first: list[list[Prediction]], second: list[list[Prediction]], kind: str
) -> Paired | None:
    return paired(first, second, kind, UNITWISE[kind])


def test_difference_is_paired_and_sees_a_real_gap() -> None:
    a, b = table([1] * 30 + [0] * 10), table([0] * 30 + [0] * 10)
    d = difference([a], [b], "classification")
    assert d is not None
    assert d.mean == pytest.approx(0.75)
    assert (d.clear, d.n_units, d.group) == (True, 40, "unit")
    same = difference([a], [a], "classification")
    assert same is not None
    assert (same.mean, same.low, same.high, same.clear) == (0.0, 0.0, 0.0, False)


def test_difference_draws_whole_runs_when_there_are_enough() -> None:
    # All units of a run agree: 40 units are only 5 independent observations.
    wins = [1 if i % 5 < 3 else 0 for i in range(40)]
    a, b = table(wins, runs=5), table([1 - w for w in wins], runs=5)
    by_run = difference([a], [b], "classification")
    by_unit = difference([table(wins)], [table([1 - w for w in wins])], "classification")
    assert by_run is not None
    assert by_unit is not None
    assert (by_run.group, by_run.n_groups) == ("run", 5)
    assert by_run.high - by_run.low > 2 * (by_unit.high - by_unit.low)
    assert not by_run.clear


def test_difference_needs_shared_units_and_averages_seeds() -> None:
    a = table([1, 1, 0, 0])
    assert difference([a], [[replace(p, unit="x" + p.unit) for p in a]], "classification") is None
    d = difference([table([1, 1, 1, 1]), table([0, 0, 0, 0])], [a], "classification")
    assert d is not None
    assert d.mean == pytest.approx(0.0)


def test_difference_of_levels_is_in_levels() -> None:
    def graded(levels: list[int]) -> list[Prediction]:
        each = np.log(0.98 * np.eye(4)[levels] + 0.005)
        return [
            Prediction(f"u{i}", "001", "r", 3.0, tuple(row)) for i, row in enumerate(each.tolist())
        ]

    d = difference([graded([3, 3, 1])], [graded([1, 3, 0])], "ordinal")
    assert d is not None
    assert d.mean == pytest.approx((0 + 0 + 2) / 3 - (2 + 0 + 3) / 3)


def test_rows_keep_targets_apart() -> None:
    grade = TaskInfo("grade", "ordinal", ("1", "2", "3"), "subject")
    values = {"quadratic_kappa": 0.4, "mae": 0.5, "accuracy": 0.6, "spearman_r": None}
    found = rows(
        [
            result(0.9),
            result(task=grade, metrics=values, name="low"),
            result(task=grade, metrics={**values, "quadratic_kappa": 0.7}, name="high"),
        ]
    )
    assert [(r.task.target, r.name) for r in found] == [
        ("grade", "high"),
        ("grade", "low"),
        ("trial_type", "swin4d"),
    ]
    assert found[0].primary is not None and found[0].primary.mean == 0.7

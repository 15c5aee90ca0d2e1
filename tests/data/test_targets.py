"""Classes, scalers and weights: from the training units, one vote each, computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.clips import ClipTable, Labels
from fmrizoo.data.store import Store
from fmrizoo.data.targets import check_labels, fit_tasks
from fmrizoo.errors import DataError, RecipeError


@pytest.fixture
def blank(sample_store: Store) -> ClipTable:
    runs = sample_store.select({"acquisition": "1slice"})
    return ClipTable.windows(sample_store, runs[:2], DataConfig(clip_frames=20))


def clips(table: ClipTable, task: TaskConfig, units: dict[str, tuple[int, Labels]]) -> ClipTable:
    """A table with ``units``: name → (number of clips, labels)."""
    names = [unit for unit, (n, _) in units.items() for _ in range(n)]
    return replace(
        table,
        run=np.zeros(len(names), np.int32),
        start=np.arange(len(names), dtype=np.int32),
        labels=tuple(units[name][1] for name in names),
        units=tuple(names),
        targets=tuple(task.wanted()),
    )


def people(targets: dict[str, str], **settings: Any) -> TaskConfig:
    return TaskConfig(targets=targets, source="participants", level="subject", **settings)


def test_a_unit_has_one_vote_however_many_clips(blank: ClipTable) -> None:
    task = people({"sex": "classification", "age": "regression"}, class_weights="balanced")
    table = clips(
        blank,
        task,
        {
            "a": (9, ("F", 10.0)),
            "b": (1, ("M", 20.0)),
            "c": (1, ("M", 60.0)),
            "d": (5, ("M", None)),
        },
    )
    sex, age = fit_tasks(table, task)
    assert (sex.name, sex.classes, age.name) == ("sex", ("F", "M"), "age")
    # n / (k · n_c) with n = 4, k = 2.
    assert sex.weights == pytest.approx((4 / 2, 4 / 6))
    assert np.average(sex.weights, weights=[1, 3]) == pytest.approx(1.0)
    assert (age.mean, age.std) == (30.0, pytest.approx(np.sqrt((400 + 100 + 900) / 3)))
    assert age.weights == () and sex.smoothing == 0.0


def test_smoothing_is_for_classes_only(blank: ClipTable) -> None:
    task = people(
        {"sex": "classification", "grade": "ordinal", "age": "regression"}, label_smoothing=0.2
    )
    table = clips(blank, task, {"a": (1, ("F", "1", 1.0)), "b": (1, ("M", "2", 2.0))})
    assert [t.smoothing for t in fit_tasks(table, task)] == [0.2, 0.0, 0.0]
    assert all(t.weights == () for t in fit_tasks(table, task))


@pytest.mark.parametrize(
    ("levels", "labels", "classes", "weights"),
    [
        # Numbers sort as numbers, not as text.
        ([], ["10", "9", "10", "-1.5"], ("-1.5", "9", "10"), (4 / 3, 4 / 3, 4 / 6)),
        # A level that nobody in the training part has keeps its place; k counts the others.
        (["low", "mid", "high"], ["high", "low", "low"], ("low", "mid", "high"), (0.75, 1.0, 1.5)),
    ],
)
def test_levels_keep_their_order(
    blank: ClipTable,
    levels: list[str],
    labels: Sequence[str],
    classes: tuple[str, ...],
    weights: tuple[float, ...],
) -> None:
    task = people({"grade": "ordinal"}, levels=levels, class_weights="balanced")
    units = {f"u{i}": (1, (label,)) for i, label in enumerate(labels)}
    (found,) = fit_tasks(clips(blank, task, units), task)
    assert (found.kind, found.classes) == ("ordinal", classes)
    assert found.weights == pytest.approx(weights)


@pytest.mark.parametrize(
    ("kind", "settings", "labels", "said"),
    [
        ("classification", {}, ["a", "a"], r"'x' needs at least two classes.*found \['a'\]"),
        ("ordinal", {"levels": ["a", "b"]}, ["a", "a"], r"'x' needs at least two.*found \['a'\]"),
        ("regression", {}, [0.1] * 3, "'x' has mean 0.1.* and s.d. 0.0"),  # np.std: 1.4e-17
    ],
)
def test_a_target_that_does_not_vary_is_named(
    blank: ClipTable, kind: str, settings: Any, labels: Sequence[Any], said: str
) -> None:
    task = people({"x": kind}, **settings)
    units = {f"u{i}": (1, (label,)) for i, label in enumerate(labels)}
    with pytest.raises(RecipeError, match=said):
        fit_tasks(clips(blank, task, units), task)


def test_a_target_without_labels_is_named(blank: ClipTable) -> None:
    task = people({"sex": "classification", "age": "regression"})
    table = clips(blank, task, {"a": (1, ("F", None)), "b": (2, ("M", None))})
    with pytest.raises(DataError, match="no training unit has a label 'age'"):
        fit_tasks(table, task)
    with pytest.raises(DataError, match=r"labelled with \('sex', 'age'\), the task wants \('age',"):
        fit_tasks(table, people({"age": "regression"}))


def test_another_part_must_hold_known_classes(blank: ClipTable) -> None:
    task = people({"sex": "classification", "age": "regression"})
    train = clips(blank, task, {"a": (1, ("F", 1.0)), "b": (1, ("M", 2.0))})
    tasks = fit_tasks(train, task)
    check_labels(train, tasks, "validation")
    check_labels(clips(blank, task, {"c": (1, (None, 9.0)), "d": (1, ("F", None))}), tasks, "test")
    stranger = clips(blank, task, {"c": (1, ("F", 9.0)), "sub-07": (3, ("X", 1.0))})
    with pytest.raises(
        DataError, match=r"sub-07 of the test part has sex 'X', which no training unit.*F, M"
    ):
        check_labels(stranger, tasks, "test")
    graded = people({"grade": "ordinal"})
    levels = fit_tasks(clips(blank, graded, {"a": (1, ("1",)), "b": (1, ("3",))}), graded)
    with pytest.raises(DataError, match=r"grade '2', which .*or name all task\.levels"):
        check_labels(clips(blank, graded, {"c": (1, ("2",))}), levels, "test")
    with pytest.raises(DataError, match="no unit of the validation part has a label 'age'"):
        check_labels(clips(blank, task, {"c": (2, ("F", None))}), tasks, "validation")
    with pytest.raises(DataError, match="labelled with sex, age, the tasks are sex"):
        check_labels(train, tasks[:1], "test")

"""What is fitted on labels: classes, scalers and weights, from the training units alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fmrizoo.config import TaskConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.labels import Column, columns_of
from fmrizoo.errors import DataError
from fmrizoo.types import Label, TaskSpec


def fit_tasks(table: ClipTable, task: TaskConfig) -> tuple[TaskSpec, ...]:
    """One :class:`TaskSpec` per target, from the labelled clips of the training part.

    Every unit (event, run or subject) has one vote, however many clips it was cut into.

    - Classes: in alphabetical order; levels as ``task.levels`` says, else in numerical order.
    - Scaler: mean and population s.d.
    - ``class_weights=balanced``: ``n / (k · n_c)`` for a class with ``n_c`` of the ``n`` units, k
      the number of classes that occur: 1 on average. A level that no training unit has gets 1.

    Raises:
        DataError: a target without any label, or clips of one unit that disagree.
        RecipeError: a target with one class only, or that does not vary.
    """
    if (names := tuple(task.wanted())) != table.targets:
        raise DataError(f"the clips are labelled with {table.targets}, the task wants {names}")
    units = table.unit_labels()
    found = []
    for k, column in enumerate(columns_of(task)):
        labels = [own[k] for own in units.values() if own[k] is not None]
        if not labels:
            raise DataError(
                f"no training unit has a label {column.name!r} in {task.source}: choose another "
                "target or another split"
            )
        found.append(_fit(column, labels, task))
    return tuple(found)


def _fit(column: Column, labels: Sequence[Label | None], task: TaskConfig) -> TaskSpec:
    if column.kind == "regression":
        values = np.array(labels, dtype=np.float64)
        # The s.d. of equal values may come out as 1e-17.
        mean, std = float(values.mean()), float(values.std()) if np.ptp(values) > 0 else 0.0
        return TaskSpec("regression", mean=mean, std=std, name=column.name)
    counts = Counter(str(label) for label in labels)
    seen = tuple(sorted(counts))
    if column.kind == "ordinal":
        seen = tuple(sorted(counts, key=column.order))
    TaskSpec(column.kind, seen, name=column.name)  # refuses a single class, whatever task.levels
    classes = column.levels or seen
    weights: tuple[float, ...] = ()
    if task.class_weights == "balanced":
        total, k = len(labels), len(counts)
        weights = tuple(total / (k * counts[c]) if c in counts else 1.0 for c in classes)
    smoothing = task.label_smoothing if column.kind == "classification" else 0.0
    return TaskSpec(column.kind, classes, name=column.name, weights=weights, smoothing=smoothing)


def check_labels(table: ClipTable, tasks: Sequence[TaskSpec], part: str) -> None:
    """Refuse a part of the split that cannot be scored, before any training.

    Args:
        table: Labelled clips of the part.
        tasks: From :func:`fit_tasks` of the training part.
        part: ``validation`` or ``test``, for the message.

    Raises:
        DataError: a class that no training unit has, or a target without any label.
    """
    check_targets(table, tasks)
    units = table.unit_labels()
    for k, task in enumerate(tasks):
        if all(labels[k] is None for labels in units.values()):
            raise DataError(
                f"no unit of the {part} part has a label {task.name!r}: use another split.seed or "
                "split.by, or leave the target out"
            )
        for unit, labels in units.items():
            label = labels[k]
            if label is None or task.kind == "regression" or str(label) in task.classes:
                continue
            way = " or name all task.levels" if task.kind == "ordinal" else ""
            raise DataError(
                f"{unit} of the {part} part has {task.name} {str(label)!r}, which no training unit "
                f"has (known: {', '.join(task.classes)}): use fewer folds, another split.by{way}"
            )


def check_targets(table: ClipTable, tasks: Sequence[TaskSpec]) -> None:
    """The clips must have exactly the targets of ``tasks``, in their order.

    Raises:
        DataError: others.
    """
    if (names := tuple(task.name for task in tasks)) != table.targets:
        have = ", ".join(table.targets) or "nothing"
        raise DataError(f"the clips are labelled with {have}, the tasks are {', '.join(names)}")


def label_targets(
    labels: Sequence[Label | None], tasks: Sequence[TaskSpec]
) -> tuple[int | float, ...]:
    """A clip's labels as class indices (int) or values (float); NaN where one is missing.

    Raises:
        DataError: a class that the training units lack.
    """
    values = [task.target_of(label) for task, label in zip(tasks, labels, strict=True)]
    return tuple(
        value if task.kind == "regression" or math.isnan(value) else int(value)
        for task, value in zip(tasks, values, strict=True)
    )

"""How sure the number of a row is, from the predictions beside its results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.predictions import Prediction, read_predictions
from fmrizoo.evaluate.results import Result, TaskInfo
from fmrizoo.evaluate.rows import PREDICTIONS
from fmrizoo.evaluate.statistics import Interval, interval, permutation_p
from fmrizoo.evaluate.summary import Row

Key = tuple[str, str, TaskInfo]
Tables = dict[Key, list[Sequence[Prediction]]]


@dataclass(frozen=True)
class Certainty:
    """Of a row's primary metric.

    Attributes:
        interval: Over test units.
        p: Against chance, by permuted labels; None where no label can move.
    """

    interval: Interval
    p: float | None


def certainty(row: Row, tables: Sequence[Sequence[Prediction]]) -> Certainty | None:
    """None without predictions, as for chance."""
    kept = [table for table in tables if table]
    if not kept or row.primary is None:
        return None
    metric = metrics.PRIMARY[row.task.kind]
    return Certainty(
        interval(kept, row.task.kind, metric), permutation_p(kept, row.task.kind, metric)
    )


def key(result: Result | Row) -> Key:
    """What a row stands for."""
    return result.kind, result.name, result.task


def read_tables(found: Iterable[tuple[Path, Result]]) -> Tables:
    """The predictions beside each ``results.json``; a row without them is not in the answer.

    Raises:
        DataError: a table that does not belong to its result, or that cannot be read.
    """
    tables: Tables = {}
    for path, result in found:
        file = path.parent / PREDICTIONS
        if not result.n_test or not file.is_file():
            continue
        rows, classes = read_predictions(file)
        if classes != result.task.classes or len(rows) != result.n_test:
            raise DataError(f"{file} is not of {path}: their classes or numbers of units differ")
        tables.setdefault(key(result), []).append(rows)
    return tables

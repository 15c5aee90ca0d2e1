"""The numbers of a report as CSV, to be read by a spreadsheet or pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fmrizoo.evaluate.summary import Row, Spread
from fmrizoo.report.words import TaskReport

_NESTED = ("per_seed",)  # of a spread: no single cell


def results_csv(tasks: Sequence[TaskReport]) -> str:
    """One line for each row and metric of every task, unrounded; empty cells: not defined.

    Columns: task, level, kind, row, metric, every number of the row's :class:`Spread`, seeds,
    folds, test units, trained and frozen parameters, expected chance of the primary metric.
    """
    spread = [f.name for f in fields(Spread) if f.name not in _NESTED]
    head = ["task", "level", "kind", "row", "metric", *spread, "seeds", "folds", "test_units"]
    head += ["trained_parameters", "frozen_parameters", "chance_of_primary_metric"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for report in tasks:
        for row in report.rows:
            for metric, found in row.spreads.items():
                cells = [_plain(getattr(found, name)) if found else "" for name in spread]
                writer.writerow([*_of_row(row, metric), *cells, *_sizes(row)])
    return out.getvalue()


def _of_row(row: Row, metric: str) -> list[str]:
    return [row.task.target, row.task.level, row.kind, row.name, metric]


def _sizes(row: Row) -> list[Any]:
    p = row.parameters
    counts = [p.trainable, p.frozen] if p else ["", ""]
    return [row.n_seeds, row.n_folds, row.n_units, *counts, _plain(row.chance)]


def _plain(value: Any) -> Any:
    return "" if value is None else value

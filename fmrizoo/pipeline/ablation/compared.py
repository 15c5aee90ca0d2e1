"""Cells compared in pairs: with the first cell, and with their backbone without pretraining."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fmrizoo.evaluate.statistics import Paired, corrected_t, holm, paired
from fmrizoo.pipeline.ablation.results import Ablation, Column, Line

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """One pair in one column.

    Attributes:
        first, second: Names of the lines.
        column: Of the table.
        gap: First minus second, on the units that both predicted.
        adjusted: ``gap.p`` after Holm's correction over all pairs of the column.
        resampled: p of the corrected t-test over folds (Nadeau & Bengio 2003), which speaks about
            other trainings, where ``gap.p`` speaks about other people; None without repeated folds.
        better: Whether the first is better: ``yes``, ``no, worse`` or ``not clear``.
    """

    first: str
    second: str
    column: Column
    gap: Paired
    adjusted: float
    resampled: float | None = None

    @property
    def better(self) -> str:
        if not self.gap.clear or self.adjusted > ALPHA:
            return "not clear"
        more = self.gap.mean > 0
        return "yes" if more != self.column.lower_is_better else "no, worse"

    def as_row(self) -> dict[str, Any]:
        """Plain values, for files."""
        own = {"first": self.first, "second": self.second, "column": self.column.name}
        return {
            **own,
            "metric": self.column.metric,
            **asdict(self.gap),
            "p_holm": self.adjusted,
            "p_resampled": self.resampled,
            "better": self.better,
        }


def compare(found: Ablation) -> list[Comparison]:
    """All pairs of every column that have predictions of the same units.

    The first cell is the reference of the others; every cell is compared with the controls of its
    backbone, which say what its pretraining is worth.
    """
    comparisons = []
    for column in found.columns:
        gaps = [
            (one, two, gap)
            for one, two in _pairs(found)
            if (gap := _gap(one, two, column)) is not None
        ]
        adjusted = holm([gap.p for *_, gap in gaps])
        comparisons += [
            Comparison(one.name, two.name, column, gap, p, _resampled(one, two, column))
            for (one, two, gap), p in zip(gaps, adjusted, strict=True)
        ]
    return comparisons


def _gap(one: Line, two: Line, column: Column) -> Paired | None:
    if column.name not in one.tables or column.name not in two.tables:
        return None
    first, second = one.tables[column.name], two.tables[column.name]
    return paired(first, second, column.kind, column.metric)


def _resampled(one: Line, two: Line, column: Column) -> float | None:
    """p of the corrected t-test over all folds of at least two repetitions, seeds averaged."""
    first, second = (_by_fold(line, column) for line in (one, two))
    folds = first.keys() & second.keys()
    if len(folds) <= len({fold for fold, _ in folds}):  # each fold was drawn once
        return None
    gaps = [first[where][0] - second[where][0] for where in sorted(folds)]
    tested = sum(first[where][1] for where in folds) / len(folds)
    return corrected_t(gaps, one.rows[column.name].n_units - tested, tested).p


def _by_fold(line: Line, column: Column) -> dict[tuple[int, str], tuple[float, int]]:
    """(fold, split) → (mean of the metric over seeds, test units)."""
    found: dict[tuple[int, str], list[tuple[float, int]]] = {}
    for result in line.rows[column.name].results:
        value = result.metrics[column.metric]
        if value is not None:
            found.setdefault((result.fold, result.split_sha), []).append((value, result.n_test))
    return {where: (sum(v for v, _ in own) / len(own), own[0][1]) for where, own in found.items()}


def _pairs(found: Ablation) -> Iterator[tuple[Line, Line]]:
    cells, controls = found.of("cell"), found.of("control")
    for cell in cells[1:]:
        yield cell, cells[0]
    for cell in cells:
        for control in controls:
            if control.backbone == cell.backbone:
                yield cell, control

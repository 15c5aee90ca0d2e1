"""From single results to table rows: mean ± s.d. over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.results import Parameters, Result, TaskInfo


@dataclass(frozen=True)
class Spread:
    """A metric over repetitions.

    Attributes:
        mean: Over seeds of the mean over folds.
        std: Sample s.d. (ddof 1) over what ``over`` names; None with a single repetition.
        over: ``seeds``, or ``folds`` where there is one seed only, or None.
        per_seed: Seed → mean over its folds, weighted by test units.
        missing: Results in which the metric was undefined (left out of the means).
    """

    mean: float
    std: float | None
    over: str | None
    per_seed: dict[int, float]
    missing: int = 0


@dataclass(frozen=True)
class Row:
    """All results of one name on one task.

    Attributes:
        spreads: Metric → spread, None where no result defines the metric.
        n_units: Distinct test units behind the row (summed over folds, not over seeds).
        complete: False if some seed lacks a fold that another has (their means then differ by
            more than the seed).
        chance: Mean over folds of the primary metric expected by guessing.
        results: The results themselves.
    """

    kind: str
    name: str
    task: TaskInfo
    spreads: dict[str, Spread | None]
    n_units: int
    n_seeds: int
    n_folds: int
    complete: bool
    chance: float | None
    init: str | None
    train_encoder: str | None
    parameters: Parameters | None
    notes: tuple[str, ...]
    results: tuple[Result, ...]
    head: str | None = None

    @property
    def primary(self) -> Spread | None:
        """The spread of the metric that ranks rows."""
        return self.spreads[metrics.PRIMARY[self.task.kind]]


def summarize(results: Sequence[Result]) -> Row:
    """Results of one name on one task → one row.

    Raises:
        DataError: nothing to summarize, names or tasks that differ, or the same fold and seed
            twice (two run folders would be averaged as if they were repetitions).
    """
    if not results:
        raise DataError("no result to summarize")
    first = results[0]
    if len({(r.kind, r.name, r.task) for r in results}) > 1:
        raise DataError(
            f"results of different names or tasks cannot be averaged: {first.name!r}, …"
        )
    cells = [(r.seed, r.fold, r.split_sha) for r in results]
    if len(set(cells)) < len(cells):
        twice = next(c for c in cells if cells.count(c) > 1)
        raise DataError(
            f"{first.name!r} has two results for seed {twice[0]}, fold {twice[1]} of the same "
            "split: give one of them another name or leave its folder out"
        )
    scored = [r for r in results if r.n_test]
    seeds = sorted({r.seed for r in scored})
    folds = [sorted((r.fold, r.split_sha) for r in scored if r.seed == s) for s in seeds]
    chances = [r.chance for r in scored if r.chance is not None]
    return Row(
        kind=first.kind,
        name=first.name,
        task=first.task,
        spreads={m: spread(scored, m) for m in metrics.names(first.task.kind)},
        n_units=max((_units([r for r in scored if r.seed == s]) for s in seeds), default=0),
        n_seeds=len(seeds),
        n_folds=max(map(len, folds), default=0),
        complete=len({tuple(fold for fold, _ in f) for f in folds}) <= 1,
        chance=float(np.mean(chances)) if chances else None,
        init=first.init,
        train_encoder=first.train_encoder,
        parameters=first.parameters,
        notes=tuple(dict.fromkeys(r.note for r in results if r.note)),
        results=tuple(results),
        head=first.head,
    )


def _units(results: Sequence[Result]) -> int:
    """Test units of one seed's results: a fold that was drawn again tests the same people."""
    by_fold: dict[int, int] = {}
    for r in results:
        by_fold[r.fold] = max(r.n_test, by_fold.get(r.fold, 0))
    return sum(by_fold.values())


def spread(results: Sequence[Result], metric: str) -> Spread | None:
    """Mean and s.d. of one metric; folds are averaged within a seed first."""
    known = [(r, v) for r in results if (v := r.metrics.get(metric)) is not None]
    if not known:
        return None
    per_seed = {}
    for seed in sorted({r.seed for r, _ in known}):
        own = [(v, r.n_test) for r, v in known if r.seed == seed]
        per_seed[seed] = float(np.average([v for v, _ in own], weights=[n for _, n in own]))
    repeated = list(per_seed.values())
    over: str | None = "seeds"
    if len(repeated) == 1:
        repeated = [v for _, v in known]
        over = "folds" if len(repeated) > 1 else None
    std = float(np.std(repeated, ddof=1)) if len(repeated) > 1 else None
    mean = float(np.mean(list(per_seed.values())))
    return Spread(mean, std, over, per_seed, len(results) - len(known))


def rows(results: Iterable[Result]) -> list[Row]:
    """One row per (kind, name, task), the best first within each task; unscored rows last."""
    groups: dict[tuple[str, str, TaskInfo], list[Result]] = {}
    for r in results:
        groups.setdefault((r.kind, r.name, r.task), []).append(r)
    return sorted((summarize(g) for g in groups.values()), key=_order)


def _order(row: Row) -> tuple[str, str, bool, float, str]:
    best = row.primary
    sign = 1.0 if metrics.PRIMARY[row.task.kind] in metrics.LOWER_IS_BETTER else -1.0
    value = sign * best.mean if best else 0.0
    return (row.task.target, row.task.level, best is None, value, row.name)

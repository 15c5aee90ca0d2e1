"""Metrics of many resampled or relabelled copies of one prediction table at once.

The metrics are those of :mod:`fmrizoo.evaluate.metrics`. A bootstrap draw is a weight for each unit
(how often it was drawn), a permutation another target for each; the scores stay as they are, so
whatever depends on them alone (their order, the predicted class) is worked out once.

Shapes: ``n`` units, ``d`` draws; targets and weights are ``(d, n)`` or ``(1, n)``. A draw in which
a metric is undefined is NaN here and nowhere else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.predictions import Prediction

Array = NDArray[np.float64]
Resampled = Callable[[Array, Array], Array]
Tables = Sequence[Sequence[Prediction]]
CELLS = 4_000_000  # draws × units worked on at a time: 32 MB an array
TIE = 1e-12  # below this two values are equal


def resampled(kind: str, metric: str, scores: Array) -> Resampled:
    """A function of targets and weights → ``(d,)`` values of ``metric``.

    Args:
        kind: Of the task.
        metric: One of ``metrics.names(kind)``.
        scores: ``(n, k)``, as in :class:`~fmrizoo.evaluate.predictions.Prediction`.

    Raises:
        DataError: a metric that the kind does not have.
    """
    if metric not in metrics.names(kind):
        raise DataError(f"{kind} has no metric {metric!r}, only {', '.join(metrics.names(kind))}")
    if kind == "regression":
        predicted = scores[:, 0]
        return {"mae": _mae, "r2": _r2, "pearson_r": _pearson}[metric](predicted)
    if kind == "ordinal":
        levels = scores.shape[1]
        median = metrics.median_level(scores).astype(np.float64)
        expected = metrics.softmax(scores) @ np.arange(levels)
        if metric == "spearman_r":
            return _spearman(expected, levels)
        return {"quadratic_kappa": _kappa, "mae": _mae, "accuracy": _accuracy}[metric](median)
    if metric == "auroc":
        return _auroc(scores)
    predicted = scores.argmax(1).astype(np.float64)
    if metric == "balanced_accuracy":
        return _balanced(predicted, scores.shape[1])
    return _accuracy(predicted)


def _mean(values: Array, w: Array) -> Array:
    """Weighted mean over units, NaN without weight."""
    return _ratio((w * values).sum(-1), (w * np.ones_like(values)).sum(-1))


def _ratio(above: Array, below: Array) -> Array:
    """NaN where the divisor is 0."""
    above, below = np.broadcast_arrays(above, below)
    out = np.full(above.shape, np.nan)
    return cast(Array, np.divide(above, below, out=out, where=below > 0))


def _accuracy(predicted: Array) -> Resampled:
    return lambda y, w: _mean((y == predicted).astype(np.float64), w)


def _mae(predicted: Array) -> Resampled:
    return lambda y, w: _mean(np.abs(y - predicted), w)


def _balanced(predicted: Array, classes: int) -> Resampled:
    def of(y: Array, w: Array) -> Array:
        recalls = []
        for c in range(classes):
            own = w * (y == c)
            recalls.append(_ratio((own * (predicted == c)).sum(-1), own.sum(-1)))
        found = np.stack(recalls)
        return _ratio(np.nansum(found, axis=0), np.isfinite(found).sum(0).astype(np.float64))

    return of


class _Order:
    """Units sorted by a score, with equal scores together."""

    def __init__(self, score: Array) -> None:
        values, self._place = np.unique(score, return_inverse=True)
        self._order = np.argsort(self._place, kind="stable")
        self._starts = np.searchsorted(self._place[self._order], np.arange(len(values)))

    def below(self, w: Array) -> Array:
        """``(d, n)``: weight of the units with a lower score, and half of that of equal ones."""
        tied = np.add.reduceat(w[:, self._order], self._starts, axis=1)
        return (np.cumsum(tied, axis=1) - tied / 2)[:, self._place]


def _auroc(scores: Array) -> Resampled:
    k = scores.shape[1]
    p = metrics.softmax(scores)
    columns = [scores[:, 1] - scores[:, 0]] if k == 2 else list(p.T)
    wanted = [1] if k == 2 else list(range(k))
    orders = [_Order(column) for column in columns]

    def of(y: Array, w: Array) -> Array:
        found = []
        for c, order in zip(wanted, orders, strict=True):
            # Share of (one, other) pairs in which the one of class c has the higher score.
            one, other = w * (y == c), w * (y != c)
            pairs = one.sum(-1) * other.sum(-1)
            found.append(_ratio((one * order.below(other)).sum(-1), pairs))
        # NaN where a class is absent, as for three classes of which one did not occur.
        return cast(Array, np.mean(found, axis=0))

    return of


def _r2(predicted: Array) -> Resampled:
    def of(y: Array, w: Array) -> Array:
        about = y - _mean(y, w)[:, None]
        total = _mean(about**2, w)
        left = _mean((y - predicted) ** 2, w)
        left, total = np.broadcast_arrays(left, total)
        known = total > 1e-24 * np.maximum(np.abs(y).max() ** 2, 1e-300)
        return 1 - _ratio(left, np.where(known, total, 0.0))

    return of


def _pearson(predicted: Array) -> Resampled:
    return lambda y, w: _correlation(np.broadcast_to(predicted, (1, predicted.size)), y, w)


def _correlation(a: Array, b: Array, w: Array) -> Array:
    """Weighted Pearson's r along units; NaN where one of them does not vary."""
    spread = []
    for x in (a, b):
        about = x - _mean(x, w)[:, None]
        size = np.abs(x).max(-1)
        variance = _mean(about**2, w)
        # Below this the values differ by rounding only, as in `metrics`.
        spread.append((about, np.where(variance > (1e-12 * size) ** 2, variance, 0.0)))
    (first, va), (second, vb) = spread
    return _ratio(_mean(first * second, w), np.sqrt(va * vb))


def _spearman(expected: Array, levels: int) -> Resampled:
    order = _Order(expected)
    # Rounding only, as in `metrics`: a constant answer has no correlation.
    answered = np.ptp(expected) > np.abs(expected).max() * 1e-12

    def of(y: Array, w: Array) -> Array:
        y, w = np.broadcast_arrays(y, w)
        if not answered:
            return np.full(len(y), np.nan)
        rank = np.zeros(y.shape)
        seen = np.zeros((len(y), 1))
        for c in range(levels):
            own = (w * (y == c)).sum(-1, keepdims=True)
            rank += (y == c) * (seen + own / 2)
            seen = seen + own
        return _correlation(order.below(w), rank, w)

    return of


def _kappa(predicted: Array) -> Resampled:
    def of(y: Array, w: Array) -> Array:
        p = np.broadcast_to(predicted, (1, predicted.size))
        observed = _mean((y - p) ** 2, w)
        mean_y, mean_p = _mean(y, w), _mean(p, w)
        # Σ w over all pairs of a prediction and a target, which is what guessing would cost.
        expected = _mean(y**2, w) + _mean(p**2, w) - 2 * mean_y * mean_p
        varied = _mean((y - mean_y[:, None]) ** 2, w) > 1e-12
        observed, expected, varied = np.broadcast_arrays(observed, expected, varied)
        return np.where(varied, 1 - _ratio(observed, expected), np.nan)

    return of


# --- several tables -----------------------------------------------------------------------------


def widening(tables: Tables) -> float:
    """By how much the spread of a mean over test units exceeds that of independent units: 1 or √2.

    Where several folds are pooled, each unit's label helped to train the models that the units of
    the other folds are tested by, and theirs its own. Without any effect, one influence is as large
    as the other (a kernel is symmetric), so two units of different folds are right together more
    often than apart. Summed over all pairs this adds up to the variance of independent units once
    more where scores follow margins (2/π of it where only their sign counts); simulations with
    ridge regression on 2 to 10 folds, once and five times, gave 1.3 to 1.8 times the variance, and
    10–15 % of p-values at most 0.05 if they are taken as independent (docs/evaluation.md).
    """
    kept = [frozenset(p.unit for p in table) for table in tables if table]
    several = any(not one & two for one, two in itertools.combinations(set(kept), 2))
    return math.sqrt(2) if several else 1.0


def distinct(tables: Tables) -> dict[str, Prediction]:
    """One prediction of each unit, by its name.

    Raises:
        DataError: a unit with two targets.
    """
    found: dict[str, Prediction] = {}
    for p in itertools.chain.from_iterable(tables):
        if found.setdefault(p.unit, p).target != p.target:
            raise DataError(f"unit {p.unit!r} has target {found[p.unit].target}, then {p.target}")
    return found


def _arrays(table: Sequence[Prediction]) -> tuple[Array, Array]:
    return (
        np.array([[p.target for p in table]], dtype=np.float64),
        np.array([p.scores for p in table], dtype=np.float64),
    )


def together(
    tables: Tables,
    kind: str,
    metric: str,
    weights: Sequence[Array],
    targets: Sequence[Array] | None = None,
) -> Array:
    """``(d,)``: mean over tables, by weight; without those whose metric is undefined in a draw.

    Args:
        tables: None of them empty.
        kind, metric: As for :func:`resampled`.
        weights: ``(d, n)`` or ``(1, n)`` of each table's units.
        targets: Likewise; None: their own.
    """
    above: Array | float = 0.0
    below: Array | float = 0.0
    for i, (table, w) in enumerate(zip(tables, weights, strict=True)):
        y, scores = _arrays(table)
        found = resampled(kind, metric, scores)(y if targets is None else targets[i], w)
        size = np.where(np.isfinite(found), w.sum(-1), 0.0)
        above = above + size * np.where(np.isfinite(found), found, 0.0)
        below = below + size
    total, n = np.broadcast_arrays(above, below)
    out = np.full(total.shape, np.nan)
    return cast(Array, np.divide(total, n, out=out, where=n > 0))


def plain(tables: Tables, kind: str, metric: str) -> float | None:
    """The value as it is; None where no table supports the metric."""
    kept = [table for table in tables if table]
    (value,) = together(kept, kind, metric, [np.ones((1, len(table))) for table in kept])
    return float(value) if np.isfinite(value) else None

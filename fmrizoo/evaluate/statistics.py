"""How sure a number is: intervals, paired comparisons, chance, and many comparisons at once.

A *table* is the predictions of one fold and seed. The value of several tables is the mean of the
metric within each, weighted by units: what :func:`fmrizoo.evaluate.summary.spread` gives as mean.
Units of one person share noise, so whole groups are drawn: subjects where there are at least five,
else runs where there are five, else single units. See docs/evaluation.md for what each number says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.permutation import permutation_p as permutation_p
from fmrizoo.evaluate.predictions import Prediction, answered
from fmrizoo.evaluate.resampled import CELLS, TIE, Tables, distinct, plain, together, widening

Array = NDArray[np.float64]
MIN_GROUPS = 5  # of subjects (or runs) to be drawn whole
LEVEL = (0.025, 0.975)
# Where a difference of means over units is tested; the other metrics have no value of one unit.
UNITWISE = {"classification": "accuracy", "regression": "mae", "ordinal": "mae"}


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile bootstrap interval.

    Attributes:
        value: None where no table supports the metric.
        low, high: None where fewer than half of the draws support it.
        n_units, n_groups: Distinct units, and the groups that were drawn.
        group: What was drawn: ``subject``, ``run`` or ``unit``.
    """

    value: float | None
    low: float | None
    high: float | None
    n_units: int
    n_groups: int
    group: str


@dataclass(frozen=True)
class Paired:
    """First row minus second on the units that both predicted.

    Attributes:
        mean: Difference of the metric.
        low, high: 95 % percentile bootstrap interval, groups drawn for both rows together.
        p: Two-sided; see :func:`paired`.
        n_units, n_groups, group: As in :class:`Interval`.
    """

    mean: float
    low: float
    high: float
    p: float
    n_units: int
    n_groups: int
    group: str

    @property
    def clear(self) -> bool:
        """The interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class CorrectedT:
    """Corrected resampled t-test: mean difference, t, degrees of freedom, two-sided p."""

    mean: float
    t: float
    df: int
    p: float


# --- intervals ------------------------------------------------------------------------------------


def interval(
    tables: Tables, kind: str, metric: str, *, draws: int = 2000, seed: int = 0
) -> Interval:
    """A metric over test units with its bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    It speaks about other people (runs, events) of the same kind for these trained models; what
    other seeds or training sets would do is in the standard deviation over seeds.

    Raises:
        DataError: no prediction, or a metric that the kind does not have.
    """
    units = distinct(tables)
    if not units:
        raise DataError("there is no prediction to draw an interval from")
    group, names = _grouping(units)
    value = plain(tables, kind, metric)
    found = Interval(value, None, None, len(units), len(set(names.values())), group)
    if value is None:
        return found
    draw = _draws(names, draws, seed)
    values = np.concatenate([_values(tables, kind, metric, names, w) for w in draw(tables)])
    known = values[np.isfinite(values)]
    if len(known) * 2 < draws:
        return found
    low, high = np.quantile(known, LEVEL)
    return Interval(value, float(low), float(high), found.n_units, found.n_groups, group)


def _grouping(units: dict[str, Prediction]) -> tuple[str, dict[str, int]]:
    """What is drawn whole, and the number of each unit's group."""
    labels = {
        "subject": [p.subject for p in units.values()],
        "run": [p.run for p in units.values()],
        "unit": list(units),
    }
    group = next((g for g, own in labels.items() if len(set(own)) >= MIN_GROUPS), "unit")
    _, index = np.unique(labels[group], return_inverse=True)
    return group, dict(zip(units, index.tolist(), strict=True))


def _draws(
    names: dict[str, int], draws: int, seed: int
) -> Callable[[Tables], Iterator[NDArray[np.int64]]]:
    """Bootstrap counts ``(chunk, groups)``, in chunks that fit the largest table into memory."""
    groups = max(names.values()) + 1

    def of(tables: Tables) -> Iterator[NDArray[np.int64]]:
        rng = np.random.default_rng(seed)
        step = max(1, CELLS // max(groups, *map(len, tables)))
        for start in range(0, draws, step):
            size = min(step, draws - start)
            yield rng.multinomial(groups, np.full(groups, 1 / groups), size=size)

    return of


def _values(
    tables: Tables, kind: str, metric: str, names: dict[str, int], counts: NDArray[np.int64]
) -> Array:
    """``(d,)`` values with groups drawn as often as ``counts (d, groups)`` says."""
    weights = [
        counts[:, [names[p.unit] for p in table]].astype(np.float64) for table in tables if table
    ]
    return together([t for t in tables if t], kind, metric, weights)


# --- two rows -------------------------------------------------------------------------------------


def paired(
    first_tables: Tables,
    second_tables: Tables,
    kind: str,
    metric: str,
    *,
    draws: int = 4000,
    seed: int = 0,
) -> Paired | None:
    """Compare two rows on the test units that both predicted.

    Accuracy and mean absolute error are means over units: p is of a sign-flip permutation over
    groups (all 2^groups sign patterns where they are at most ``draws``; else ``draws`` random ones,
    (b + 1) / (m + 1)). Other metrics have no value of one unit: p is 2 · min(share of bootstrap
    differences ≤ 0, ≥ 0), each (b + 1) / (m + 1). Tables of several seeds are averaged.

    Units of different folds are not independent: over several folds, spreads are √2 wider; see
    :func:`fmrizoo.evaluate.resampled.widening`.

    Returns:
        None where the rows share fewer than two units, or do not both have the metric.
    """
    shared = distinct(first_tables).keys() & distinct(second_tables).keys()
    if len(shared) < 2:
        return None
    first = [own for t in first_tables if (own := [p for p in t if p.unit in shared])]
    second = [own for t in second_tables if (own := [p for p in t if p.unit in shared])]
    group, names = _grouping(distinct(first))
    groups, wide = len(set(names.values())), widening(first)
    if metric in ("accuracy", "mae") and metric in metrics.names(kind):
        a, b = _unit_scores(first, kind, metric), _unit_scores(second, kind, metric)
        delta = np.array([a[u] - b[u] for u in names])
        index = np.array(list(names.values()))
        total = np.bincount(index, weights=delta)
        size = np.bincount(index).astype(np.float64)
        draw = _draws(names, draws, seed)
        means = np.concatenate([(c @ total) / (c @ size) for c in draw(first)])
        mean = float(delta.mean())
        low, high = mean + wide * (np.quantile(means, LEVEL) - mean)
        p = sign_flip(total, draws=draws, seed=seed, wide=wide)
        return Paired(mean, float(low), float(high), p, len(delta), groups, group)
    one, two = plain(first, kind, metric), plain(second, kind, metric)
    if one is None or two is None:
        return None
    draw = _draws(names, draws, seed)
    both = [*first, *second]
    gaps = np.concatenate(
        [
            _values(first, kind, metric, names, c) - _values(second, kind, metric, names, c)
            for c in draw(both)
        ]
    )
    gaps = gaps[np.isfinite(gaps)]
    if len(gaps) * 2 < draws:
        return None
    mean = one - two
    gaps = mean + wide * (gaps - mean)
    low, high = np.quantile(gaps, LEVEL)
    least = min(int((gaps <= TIE).sum()), int((gaps >= -TIE).sum()))
    p = min(1.0, 2 * (least + 1) / (len(gaps) + 1))
    return Paired(mean, float(low), float(high), p, len(shared), groups, group)


def _unit_scores(tables: Tables, kind: str, metric: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for p in itertools.chain.from_iterable(tables):
        if kind == "regression":
            value = abs(p.scores[0] - p.target)
        elif metric == "accuracy":
            value = float(answered(p, kind) == int(p.target))
        else:
            value = float(abs(answered(p, kind) - int(p.target)))
        found.setdefault(p.unit, []).append(value)
    return {unit: float(np.mean(v)) for unit, v in found.items()}


def sign_flip(totals: ArrayLike, *, draws: int = 4000, seed: int = 0, wide: float = 1.0) -> float:
    """Two-sided p that ``totals (groups,)`` have no sign: |Σ| against that with flipped signs.

    Compared are Student's t of the sums, those of flipped signs times ``wide`` (with 1 that is the
    same as comparing the sums). Exact where there are at most ``draws`` patterns of signs, and the
    pattern as it is counts.
    """
    x = np.asarray(totals, dtype=np.float64)
    size = float(np.abs(x).sum())
    if size == 0:
        return 1.0
    # t² ∝ Σ² / (n·Σx² − Σ²): with t_flipped·wide ≥ t seen, the sum beyond which a pattern counts.
    seen, most = float(x.sum()) ** 2, x.size * float(x @ x)
    least = math.sqrt(seen * most / (wide**2 * max(most - seen, 0.0) + seen))
    slack = TIE * max(1.0, size)
    if 2**x.size <= draws:
        bits = np.arange(2**x.size)[:, None] >> np.arange(x.size) & 1
        return float((np.abs((1 - 2 * bits) @ x) >= least - slack).mean())
    rng, above = np.random.default_rng(seed), 0
    step = max(1, CELLS // x.size)
    for start in range(0, draws, step):
        signs = 1 - 2 * rng.integers(0, 2, (min(step, draws - start), x.size), dtype=np.int8)
        above += int((np.abs(signs @ x) >= least - slack).sum())
    return (above + 1) / (draws + 1)


def corrected_t(differences: Sequence[float], n_train: float, n_test: float) -> CorrectedT:
    """Corrected resampled t-test of repeated k-fold (Nadeau & Bengio 2003, Mach. Learn. 52:239).

    t = mean / √((1/J + n_test/n_train) · s²) with J − 1 degrees of freedom: the training sets
    overlap, so the J differences are not independent, and the plain t-test finds too much.

    Args:
        differences: First minus second, one for each of the J folds of all repetitions.
        n_train, n_test: Units that a fold trains on and tests on (means over folds).

    Raises:
        DataError: fewer than two differences, or a part without units.
    """
    from scipy.stats import t as student

    x = np.asarray(differences, dtype=np.float64)
    if x.size < 2 or not np.all(np.isfinite(x)):
        raise DataError(f"the corrected t-test needs two or more finite differences, got {x}")
    if n_train <= 0 or n_test <= 0:
        raise DataError(f"n_train={n_train} and n_test={n_test} must both be above 0")
    mean, variance = float(x.mean()), float(x.var(ddof=1))
    scale = float(np.sqrt((1 / x.size + n_test / n_train) * variance))
    if scale <= TIE * max(1.0, abs(mean)):  # all differences are equal
        if mean == 0:
            return CorrectedT(0.0, 0.0, x.size - 1, 1.0)
        return CorrectedT(mean, float(np.copysign(np.inf, mean)), x.size - 1, 0.0)
    t = mean / scale
    return CorrectedT(mean, t, x.size - 1, float(2 * student.sf(abs(t), x.size - 1)))


# --- families of tests, one scale -----------------------------------------------------------------


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of one family, corrected by Holm's step-down method (1979, Scand. J. Stat. 6:65).

    Raises:
        DataError: a value outside 0 … 1.
    """
    if any(not 0 <= p <= 1 for p in ps):
        raise DataError(f"p-values must lie in 0 … 1, got {list(ps)}")
    found, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
        found[i] = least
    return found


def unified_error(kind: str, target: ArrayLike, scores: ArrayLike) -> float | None:
    """One scale for all tasks: 0 is perfect; lower is better.

    - classification: (1 − AUROC) · 2, so that guessing is 1;
    - regression: root mean square error / (largest − smallest target of these units);
    - ordinal: root mean square error of the median level / (levels − 1): errors in levels over the
      whole scale, not only the levels that occur.

    Returns:
        None where AUROC is undefined or the target does not vary.

    Raises:
        DataError: see :func:`fmrizoo.evaluate.metrics.score`.
    """
    found = metrics.score(kind, target, scores)
    y, s = np.asarray(target, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if kind == "classification":
        auroc = found["auroc"]
        return None if auroc is None else (1 - auroc) * 2
    if kind == "ordinal":
        predicted, span = metrics.median_level(s).astype(np.float64), float(s.shape[1] - 1)
    else:
        predicted, span = s.reshape(-1), float(np.ptp(y))
    return float(np.sqrt(np.mean((y - predicted) ** 2))) / span if span > 0 else None

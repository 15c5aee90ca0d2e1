"""Propensity-matched cohorts: two classes of subjects that are alike in given covariates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import MatchConfig
from fmrizoo.data.people import People, numbers
from fmrizoo.errors import DataError

log = logging.getLogger(__name__)

Array = NDArray[np.float64]
WEAK = 1e4  # inverse penalty: enough for separable classes to have finite weights


@dataclass(frozen=True)
class Matching:
    """Who was matched with whom, who was left out, and what that did.

    Attributes:
        target, on, caliper: The settings.
        classes: Of the target; the first of each pair is of the first.
        width: The caliper in units of the logit.
        pairs: Subjects.
        left_out: Subjects without a partner.
        before, after: Covariate (``site=A`` for a class) → standardised mean difference, the first
            class minus the second over √(mean of both variances).
    """

    target: str
    on: tuple[str, ...]
    caliper: float
    classes: tuple[str, str]
    width: float
    pairs: tuple[tuple[str, str], ...]
    left_out: tuple[str, ...]
    before: dict[str, float]
    after: dict[str, float]

    @property
    def kept(self) -> frozenset[str]:
        """All matched subjects."""
        return frozenset(subject for pair in self.pairs for subject in pair)

    def as_dict(self) -> dict[str, Any]:
        """For split.json; lists for tuples."""
        body = asdict(self)
        for name in ("on", "classes", "left_out"):
            body[name] = list(body[name])
        body["pairs"] = [list(pair) for pair in self.pairs]
        return body

    def said(self) -> str:
        """One line for the log."""
        worst = {which: max(map(abs, d.values())) for which, d in self._both().items()}
        out = ", ".join(f"sub-{s}" for s in self.left_out[:5]) or "nobody"
        more = f" and {len(self.left_out) - 5} more" if len(self.left_out) > 5 else ""
        return (
            f"split.match: {len(self.pairs)} pairs of {self.target} alike in {', '.join(self.on)}; "
            f"left out: {out}{more}; largest standardised mean difference {worst['before']:.2f} "
            f"before, {worst['after']:.2f} after"
        )

    def _both(self) -> dict[str, dict[str, float]]:
        return {"before": self.before, "after": self.after}


def match(people: People, subjects: Sequence[str], config: MatchConfig, least: int) -> Matching:
    """Pairs of subjects, one of each class, with nearly the same propensity.

    The propensity is a logistic regression of the class on the covariates. Nearest neighbours 1 : 1
    without replacement on its logit, subjects of the smaller class that are furthest from the
    other class first, within ``caliper`` s.d. (√ of the classes' mean variance) of the logit
    (Austin 2011, Pharm. Stat. 10:150). The same subjects in any order give the same pairs.

    Args:
        people: Columns by subject.
        subjects: Whom to match.
        config: With a target.
        least: Fewest pairs that are of use (one in every fold).

    Raises:
        DataError: a missing column or gaps, a target with other than two classes, covariates that
            do not vary, or fewer pairs than ``least``.
    """
    names = sorted(set(subjects))
    key = "split.match.target"
    target = people.column(config.target, names, key)
    classes = sorted(set(target.values()))
    if len(classes) != 2:
        raise DataError(
            f"{key}={config.target}: matching needs two classes, the {len(names)} subjects have "
            f"{len(classes)}: {', '.join(classes[:6])}"
        )
    x, titles = _covariates(people, names, config.on)
    y = np.array([target[s] == classes[0] for s in names])
    logit = _logit(x, y)
    width = config.caliper * float(np.sqrt((logit[y].var() + logit[~y].var()) / 2))
    pairs = _nearest(logit, y, width)
    if len(pairs) < least:
        raise DataError(
            f"split.match leaves {len(pairs)} pairs of {len(names)} subjects ({classes[0]}: "
            f"{int(y.sum())}, {classes[1]}: {int((~y).sum())}), but {least} folds need at least "
            f"{least}: raise split.match.caliper={config.caliper:g}, match on less than "
            f"{', '.join(config.on)}, or lower split.folds"
        )
    rows = np.array(sorted(i for pair in pairs for i in pair))
    kept = {names[i] for i in rows}
    found = Matching(
        target=config.target,
        on=tuple(config.on),
        caliper=config.caliper,
        classes=(classes[0], classes[1]),
        width=width,
        pairs=tuple((names[i], names[j]) for i, j in pairs),
        left_out=tuple(s for s in names if s not in kept),
        before=dict(zip(titles, _imbalance(x, y), strict=True)),
        after=dict(zip(titles, _imbalance(x[rows], y[rows]), strict=True)),
    )
    log.warning("%s", found.said())
    return found


def _covariates(people: People, names: Sequence[str], on: Sequence[str]) -> tuple[Array, list[str]]:
    """``(n, f)`` numbers as they are and classes as 0 and 1, and their titles."""
    columns, titles = [], []
    for name in on:
        cells = list(people.column(name, names, "split.match.on").values())
        if (values := numbers(cells)) is not None:
            columns.append(values)
            titles.append(name)
            continue
        # All classes: their imbalance is reported; the penalty copes with the redundant one.
        for label in sorted(set(cells)):
            columns.append(np.array([cell == label for cell in cells], dtype=np.float64))
            titles.append(f"{name}={label}")
    x = np.stack(columns, axis=1)
    if not np.any(np.ptp(x, axis=0) > 0):
        raise DataError(f"split.match.on={list(on)}: no covariate varies, so all are alike already")
    return x, titles


def _logit(x: Array, y: NDArray[np.bool_]) -> Array:
    from sklearn.linear_model import LogisticRegression

    spread = x.std(0)
    z = (x - x.mean(0)) / np.where(spread > 0, spread, 1.0)
    model = LogisticRegression(C=WEAK, max_iter=10_000).fit(z, y)
    return np.asarray(model.decision_function(z), dtype=np.float64)


def _nearest(logit: Array, y: NDArray[np.bool_], width: float) -> list[tuple[int, int]]:
    """Index pairs (one of ``y``, one not)."""
    ones, others = np.flatnonzero(y), np.flatnonzero(~y)
    swap = len(ones) > len(others)
    few, many = (others, ones) if swap else (ones, others)
    free, pairs = list(many), []
    # Those far from the other class have the fewest partners: they choose first.
    for i in few[np.argsort(-np.abs(logit[few] - np.median(logit[many])), kind="stable")]:
        if not free:
            break
        gaps = np.abs(logit[free] - logit[i])
        best = int(np.argmin(gaps))
        if gaps[best] <= width:
            partner = int(free.pop(best))
            pairs.append((partner, int(i)) if swap else (int(i), partner))
    return sorted(pairs)


def _imbalance(x: Array, y: NDArray[np.bool_]) -> list[float]:
    one, two = x[y], x[~y]
    gap = one.mean(0) - two.mean(0)
    scale = np.sqrt((one.var(0) + two.var(0)) / 2)
    # Constant within both classes: a difference is then in s.d. of all subjects.
    scale = np.where(scale > 0, scale, x.std(0))
    out = np.zeros_like(gap)
    return [float(v) for v in np.divide(gap, scale, out=out, where=scale > 0)]

"""Models ranked over several tasks: the sum of their z-normalised scores.

Source report, Table 1: a score is z-normalised over the models within its task, signs are turned so
that more is better, and the sums over all tasks and over subsets of them are ranked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fmrizoo.errors import DataError

Scores = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Standing:
    """Where one model stands in one subset of the tasks.

    Attributes:
        total: Sum of its z-scores; None if it lacks a task of the subset.
        rank: 1 = best; equal totals share the better rank. None where ``total`` is.
        missing: Tasks of the subset that it has no score of.
    """

    total: float | None
    rank: int | None
    missing: tuple[str, ...] = ()


def z_scores(scores: Scores, lower_is_better: Iterable[str] = ()) -> dict[str, dict[str, float]]:
    """Model → task → z, more is better; tasks without a score of a model are left out there.

    Mean and s.d. (of the models at hand, ddof 0) are over the models that have the task; where all
    are equal every z is 0.

    Args:
        scores: Model → task → score, None or absent = missing.
        lower_is_better: Tasks whose sign is turned.

    Raises:
        DataError: a score that is NaN or infinite.
    """
    turned = set(lower_is_better)
    found: dict[str, dict[str, float]] = {model: {} for model in scores}
    for task in dict.fromkeys(task for own in scores.values() for task in own):
        known = {m: v for m, own in scores.items() if (v := own.get(task)) is not None}
        if odd := [m for m, v in known.items() if not math.isfinite(v)]:
            raise DataError(f"the score of {odd[0]!r} in {task} is {known[odd[0]]}")
        values = np.array(list(known.values()))
        spread = values.std()
        # A spread by rounding alone is none.
        flat = not spread > 1e-12 * max(1.0, float(np.abs(values).max(initial=0)))
        for model, value in known.items():
            z = 0.0 if flat else float((value - values.mean()) / spread)
            found[model][task] = -z if task in turned else z
    return found


def standings(
    z: Mapping[str, Mapping[str, float]], subsets: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Standing]]:
    """Subset → model → :class:`Standing`.

    A model that lacks a task of a subset is not ranked there: the sum of fewer z-scores is no
    smaller number of the same kind. It keeps its place in the others.

    Raises:
        DataError: a subset that is empty or names a task that no model has.
    """
    known = {task for own in z.values() for task in own}
    found: dict[str, dict[str, Standing]] = {}
    for subset, tasks in subsets.items():
        if not tasks or (strange := [t for t in tasks if t not in known]):
            what = f"names {strange[0]!r}, which no model has a score of" if tasks else "is empty"
            raise DataError(f"subset {subset!r} of the tasks {what}")
        gaps = {model: tuple(t for t in tasks if t not in own) for model, own in z.items()}
        totals = {m: sum(z[m][t] for t in tasks) for m, gap in gaps.items() if not gap}
        found[subset] = {}
        for model, gap in gaps.items():
            total = totals.get(model)
            # Sums of the same numbers in another order differ in the last bits.
            rank = None
            if total is not None:
                rank = 1 + sum(other > total + 1e-9 for other in totals.values())
            found[subset][model] = Standing(total, rank, gap)
    return found

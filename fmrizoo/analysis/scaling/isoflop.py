"""IsoFLOP parabolas: a picture of the best size per compute budget, not an estimate.

The loss at one compute budget is no parabola in log N, and it is lopsided unless alpha = beta: the
lowest point of a fitted parabola is off even without noise, by an amount that grows with the width
of the sweep and with its distance from the minimum ("Problems with Chinchilla Approach 2", arXiv
2603.22339). The law is fitted to all points instead (``fit.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fmrizoo.analysis.scaling.law import Array
from fmrizoo.analysis.scaling.points import Points

PF_DAY = 1e15 * 86400.0  # floating-point operations
_SAME = 0.05  # decades: runs this close to the first of a group share its budget
_LEAST = 4  # sizes of a budget; a parabola through 3 has nothing to say about its fit
BIAS = (
    "lowest points of parabolas are biased even without noise (the loss at one budget is no "
    "parabola in log N): look at them, do not extrapolate them"
)


@dataclass(frozen=True)
class IsoFlop:
    """A parabola of loss against log10 N at one compute budget.

    Attributes:
        flops: Geometric mean of the runs' compute.
        n, loss: Its points, by size ``(runs,)``.
        coefficients: Of log10(N)², log10(N), 1.
        best_n: Lowest point; None where it lies outside the sizes tried or is no minimum.
    """

    flops: float
    n: Array
    loss: Array
    coefficients: tuple[float, float, float]
    best_n: float | None

    @property
    def pf_days(self) -> float:
        return pf_days(self.flops)


def pf_days(flops: float) -> float:
    """Days of a machine that does 1e15 operations per second."""
    return flops / PF_DAY


def compute_of(points: Points) -> tuple[Array, str] | None:
    """Compute of every training, and where it comes from; None without N and D.

    The column ``flops`` if there is one, else 6·N·D. That holds for a transformer whose every
    parameter sees every token; in a hierarchical encoder late stages hold most parameters and see
    a fraction of the tokens, so 6·N·D is several times too high (measured: 3.8 times for a
    two-stage Swin).
    """
    if points.flops is not None:
        return points.flops, "the column flops"
    if points.n is None or points.d is None:
        return None
    return 6.0 * points.n * points.d, (
        "6·N·D, several times too high for hierarchical encoders and meaningless unless d counts "
        "tokens; give the column flops"
    )


def isoflop(points: Points) -> list[IsoFlop]:
    """A parabola per compute budget with at least 4 sizes; seeds of a size count as points."""
    known = compute_of(points)
    if known is None or points.n is None:
        return []
    flops, _ = known
    order = np.argsort(flops, kind="stable")
    groups: list[list[int]] = []
    for i in order:
        if groups and np.log10(flops[i] / flops[groups[-1][0]]) <= _SAME:
            groups[-1].append(int(i))
        else:
            groups.append([int(i)])
    found = []
    for group in groups:
        if len(np.unique(points.n[group])) >= _LEAST:
            found.append(_parabola(points.n[group], points.loss[group], flops[group]))
    return found


def _parabola(n: Array, loss: Array, flops: Array) -> IsoFlop:
    by_size = np.argsort(n, kind="stable")
    n, loss = n[by_size], loss[by_size]
    x = np.log10(n)
    square, line, constant = (float(c) for c in np.polyfit(x, loss, 2))
    best = None
    if square > 0 and x[0] <= -line / (2 * square) <= x[-1]:
        best = float(10 ** (-line / (2 * square)))
    budget = float(np.exp(np.log(flops).mean()))
    return IsoFlop(budget, n, loss, (square, line, constant), best)

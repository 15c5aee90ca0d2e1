"""Parametric bootstrap intervals, and leave-one-out ranges for laws of one axis.

Drawing the points with replacement (pairs bootstrap) leaves designs with few points or without
their ends, and its intervals are too narrow. Here every replicate keeps the design: losses are the
fitted law's times log-normal noise of the measured size, fitted anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from fmrizoo.analysis.scaling.fit import Fit, search
from fmrizoo.analysis.scaling.law import NAMES, Array
from fmrizoo.analysis.scaling.points import Points
from fmrizoo.errors import DataError

DRAWS = 400
LEVEL = 0.9
_MISFIT = 1.5  # residual s.d. over noise above which the law itself is doubted


@dataclass(frozen=True)
class Noise:
    """Relative s.d. of a loss over seeds.

    Attributes:
        sd: One value per point ``(points,)``.
        origin: ``given``, ``column noise``, ``repeated points`` or ``residuals``.
        free: Degrees of freedom behind it; None: taken as exact.
    """

    sd: Array
    origin: str
    free: int | None = None

    @property
    def typical(self) -> float:
        """Root mean square over the points."""
        return float(np.sqrt((self.sd**2).mean()))

    def says(self) -> str:
        size = f"{100 * self.typical:.3g} %"
        if self.origin == "residuals":
            return (
                f"{size}, the residuals' s.d. with {self.free} degrees of freedom: seeds were not "
                "repeated, so misfit of the law counts as noise"
            )
        if self.origin == "repeated points":
            return f"{size}, measured on repeated points with {self.free} degrees of freedom"
        return f"{size}, {self.origin}"


@dataclass(frozen=True)
class Interval:
    """Central interval of an estimate."""

    low: float
    high: float


@dataclass(frozen=True)
class Intervals:
    """Bootstrap intervals of all estimates.

    Attributes:
        level: Share of replicates inside.
        of: Name of the estimate → interval.
        prediction: Of the law's loss at the target; None without a target.
        noise: What was added to the replicates.
        draws: Replicates.
        failed: Replicates whose fit did not converge (they count).
    """

    level: float
    of: dict[str, Interval]
    prediction: Interval | None
    noise: Noise
    draws: int
    failed: int


@dataclass(frozen=True)
class LeaveOneOut:
    """Smallest and largest exponent of fits that leave one setting out."""

    low: float
    high: float
    fits: int


def measure_noise(fit: Fit, given: float | None = None) -> Noise:
    """Seed noise from the best source there is.

    In this order: ``given``; the points' own column; s.d. of log losses of repeated settings,
    pooled; the residuals of the fit.

    Args:
        fit: The fitted law.
        given: Relative s.d., 0.002 for 0.2 %.

    Raises:
        DataError: ``given`` is not positive, or nothing is left to estimate noise from.
    """
    points = fit.points
    count = len(points)
    if given is not None:
        if not (np.isfinite(given) and 0 < given < 1):
            raise DataError(f"noise is a relative s.d. between 0 and 1, got {given:g}")
        return Noise(np.full(count, given), "given")
    if points.noise is not None:
        return Noise(points.noise, "column noise")
    settings = points.settings()
    different = int(settings.max()) + 1
    if different < count:
        logs = np.log(points.loss)
        means = np.bincount(settings, logs) / np.bincount(settings)
        free = count - different
        sd = float(np.sqrt(((logs - means[settings]) ** 2).sum() / free))
        if sd > 0:
            return Noise(np.full(count, sd), "repeated points", free)
    free = count - len(NAMES[fit.form])
    if free < 1:
        raise DataError(f"{count} points leave nothing to estimate noise from; give it")
    return Noise(np.full(count, fit.residual_sd), "residuals", free)


def misfit(fit: Fit, noise: Noise) -> float | None:
    """Residual s.d. over seed noise where it says that the law does not hold, else None."""
    if noise.origin == "residuals" or noise.typical == 0:
        return None
    ratio = fit.residual_sd / noise.typical
    return ratio if ratio > _MISFIT else None


def intervals(
    fit: Fit,
    noise: Noise,
    *,
    target: tuple[float | None, float | None] | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Intervals:
    """Percentile intervals of a parametric bootstrap.

    Where the noise itself is an estimate with few degrees of freedom, its size is drawn too
    (scaled inverse chi-square): with 6 points and 3 constants, intervals at the point estimate of
    the noise would be too narrow.

    Args:
        fit: The fitted law.
        noise: Of :func:`measure_noise`.
        target: ``(N, D)`` at which the loss is predicted.
        draws: Replicates.
        level: Share inside.
        seed: Of the random numbers; equal seeds give equal intervals.
        progress: Called with (replicates done, all).
    """
    random = np.random.default_rng(seed)
    names = NAMES[fit.form]
    center = np.log(fit.points.loss) - fit.residuals
    values = np.empty((draws, len(names)))
    predictions = np.empty(draws)
    failed = 0
    for k in range(draws):
        sd = noise.sd * _inflation(random, noise.free)
        losses = np.exp(center + sd * random.standard_normal(len(center)))
        again = search(fit.points.with_loss(losses), fit.form, [fit.theta])
        failed += not again.converged
        values[k] = [again.law.constants()[name] for name in names]
        if target is not None:
            predictions[k] = float(again.law.loss(*target))
        if progress is not None:
            progress(k + 1, draws)
    tails = [(1 - level) / 2, (1 + level) / 2]

    def between(column: Array) -> Interval:
        # Of (draws + 1) parts: with few draws the default rule would cut too much off.
        low, high = np.quantile(column, tails, method="weibull")
        return Interval(float(low), float(high))

    of = {name: between(values[:, i]) for i, name in enumerate(names)}
    prediction = between(predictions) if target is not None else None
    return Intervals(level, of, prediction, noise, draws, failed)


def _inflation(random: Generator, free: int | None) -> float:
    """True s.d. over its estimate, drawn; 1 where it is exact."""
    return 1.0 if free is None else float(np.sqrt(free / random.chisquare(free)))


def leave_one_out(fit: Fit) -> LeaveOneOut:
    """Range of the exponent over fits that leave out one setting with all its seeds.

    Raises:
        ValueError: the law has two axes.
    """
    if fit.form not in ("n", "d"):
        raise ValueError(f"leave-one-out ranges are for laws of one axis, not {fit.form!r}")
    settings = fit.points.settings()
    found = []
    for one in np.unique(settings):
        rest: Points = fit.points.keep(settings != one)
        law = search(rest, fit.form).law
        found.append(law.constants()["alpha" if fit.form == "n" else "beta"])
    return LeaveOneOut(min(found), max(found), len(found))

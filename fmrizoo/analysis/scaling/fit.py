"""Fit of a law: VarPro starts, then log-residual Huber by L-BFGS-B with its own gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from fmrizoo.analysis.scaling.design import (
    LETTER,
    choose_form,
    decades,
    fitted_axes,
    refuse_underdetermined,
)
from fmrizoo.analysis.scaling.law import NAMES, Array, Form, Law
from fmrizoo.analysis.scaling.points import Points
from fmrizoo.analysis.scaling.residuals import DELTA, Problem
from fmrizoo.analysis.scaling.varpro import starts

STATIONARY = 1e-3  # of the largest gradient that the residuals could add up to
AGREE = 1e-4  # relative difference of the objective within which two ends are the same minimum
_NUDGES = (0.5, 0.05)  # further starts: the floor at these shares of the smallest loss


@dataclass(frozen=True)
class End:
    """Where one search ended."""

    theta: Array
    value: float
    slope: float  # largest component of the projected gradient, as a share of what it could be


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law: The estimates.
        points: What it was fitted to.
        residuals: log(loss) − log(predicted), ``(points,)``.
        objective: Mean Huber loss in units of δ².
        converged: The gradient vanishes at the best end.
        agreeing, tried: How many of the starts ended at the same minimum.
        theta: The estimates as the search sees them: start of further fits to similar points.
        at_bound: Names of the estimates that ended at the edge of what is searched.
    """

    law: Law
    points: Points
    residuals: Array
    objective: float
    converged: bool
    agreeing: int
    tried: int
    theta: Array
    at_bound: tuple[str, ...] = ()

    @property
    def form(self) -> Form:
        return self.law.form

    @property
    def decades(self) -> dict[str, float]:
        """``N``, ``D`` → width of the fitted axes in factors of ten."""
        found = {}
        for name in fitted_axes(self.form):
            axis = self.points.axis(name)
            assert axis is not None
            found[LETTER[name]] = decades(axis)
        return found

    @property
    def residual_sd(self) -> float:
        """s.d. of the log residuals, corrected for the fitted constants."""
        free = len(self.residuals) - len(NAMES[self.form])
        return float(np.sqrt((self.residuals**2).sum() / free)) if free > 0 else float("nan")

    def extrapolation(self, n: float | None = None, d: float | None = None) -> dict[str, float]:
        """``N``, ``D`` → target over the largest point of each fitted axis; 1 or less: inside.

        Raises:
            ValueError: a fitted axis has no target.
        """
        given = {"n": n, "d": d}
        found = {}
        for name in fitted_axes(self.form):
            axis, target = self.points.axis(name), given[name]
            assert axis is not None
            if target is None:
                raise ValueError(f"the law has a term in {LETTER[name]}: give {name}")
            found[LETTER[name]] = float(target / axis.max())
        return found

    def says(self) -> str:
        """Whether the search converged, in words."""
        gradient = "gradient vanishes" if self.converged else "NOT CONVERGED: gradient remains"
        return f"{self.agreeing} of {self.tried} starts end at the best minimum; {gradient}"


def descend(problem: Problem, theta: Array) -> End:
    """L-BFGS-B from ``theta`` to a minimum of :meth:`Problem.huber`."""
    bounds = problem.bounds()
    low, high = np.array(bounds).T
    at = np.clip(theta, low, high)
    for _ in range(3):  # a restart forgets curvature gathered far away
        done = minimize(
            problem.huber,
            at,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 3000, "maxfun": 6000, "ftol": 1e-14, "gtol": 1e-7, "maxcor": 20},
        )
        at = np.asarray(done.x, dtype=np.float64)
        slope = _slope(problem, at, low, high)
        if slope <= STATIONARY:
            break
    return End(at, float(done.fun), slope)


def _slope(problem: Problem, theta: Array, low: Array, high: Array) -> float:
    """Largest gradient component that the bounds leave, over the sum of its parts' sizes.

    Free of units: 1 when all residuals pull one parameter in one direction, 0 at a minimum.
    """
    _, gradient = problem.huber(theta)
    predicted, jacobian = problem.log_loss(theta)
    pull = np.clip((predicted - problem.y) / DELTA, -1, 1)
    most = (np.abs(jacobian) * np.abs(pull)[:, None]).mean(0) / DELTA
    free = ~(((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0)))
    share = np.abs(gradient) / np.maximum(most, 1e-300)
    # A perfect fit has no residuals to balance: what is left is rounding.
    return float((share * (free & (most > 1e-6))).max(initial=0.0))


def search(points: Points, form: Form, warm: Sequence[Array] = ()) -> Fit:
    """Fit without asking whether the points are enough (bootstrap and leave-one-out need that).

    Args:
        points: With the axes of ``form``.
        form: The law.
        warm: Starts to use instead of a search for them.
    """
    problem = Problem(points, form)
    begins = list(warm)
    if not begins:
        begins = starts(problem)
        for share in _NUDGES:
            other = begins[0].copy()
            other[0] = problem.y.min() + np.log(share)
            begins.append(other)
    ends = sorted((descend(problem, theta) for theta in begins), key=lambda end: end.value)
    best = ends[0]
    agreeing = sum(end.value - best.value <= AGREE * max(best.value, 1e-6) for end in ends)
    low, high = np.array(problem.bounds()).T
    edge = (best.theta - low < 1e-6) | (high - best.theta < 1e-6)
    predicted, _ = problem.log_loss(best.theta)
    return Fit(
        law=problem.law(best.theta),
        points=points,
        residuals=problem.y - predicted,
        objective=best.value,
        converged=best.slope <= STATIONARY,
        agreeing=agreeing,
        tried=len(ends),
        theta=best.theta,
        at_bound=tuple(n for n, e in zip(NAMES[form], edge, strict=True) if e),
    )


def fit_law(points: Points, form: Form | None = None) -> Fit:
    """Estimates of a scaling law.

    Args:
        points: Losses of runs whose schedules ended at their own D.
        form: ``nd``, ``repeated``, ``n`` or ``d``; default: by the columns that vary.

    Raises:
        DataError: the points do not determine the law.
    """
    chosen = choose_form(points) if form is None else form
    refuse_underdetermined(points, chosen)
    return search(points, chosen)


def pure_power(points: Points, form: Form) -> float:
    """Exponent k of ``L = (x/x0)^-k``, no floor, by a straight line in logarithms.

    What is often printed as a scaling law. With a floor in the data it is far smaller than the
    law's exponent; it is here to be compared with, not to be used.

    Raises:
        ValueError: ``form`` has two axes.
    """
    if form not in ("n", "d"):
        raise ValueError(f"a pure power law has one axis, not {form!r}")
    axis = points.axis(form)
    if axis is None:
        raise ValueError(f"the points have no {form}")
    return float(-np.polyfit(np.log(axis), np.log(points.loss), 1)[0])

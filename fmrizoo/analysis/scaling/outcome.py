"""Everything a fit says, as values for JSON and as lines of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmrizoo.analysis.scaling.bootstrap import (
    DRAWS,
    Intervals,
    LeaveOneOut,
    intervals,
    leave_one_out,
    measure_noise,
    misfit,
)
from fmrizoo.analysis.scaling.design import LETTER, fitted_axes
from fmrizoo.analysis.scaling.fit import Fit, fit_law, pure_power
from fmrizoo.analysis.scaling.isoflop import BIAS, IsoFlop, compute_of, isoflop
from fmrizoo.analysis.scaling.law import FORMULAS, Form
from fmrizoo.analysis.scaling.points import Points
from fmrizoo.errors import DataError

SCHEMA = "fmrizoo.scaling/1"
FAR = 10.0  # extrapolation factor above which the prediction is called far
COARSE = 0.005  # noise above which an exponent means little (planted laws on a 5 × 5 grid)


@dataclass(frozen=True)
class Target:
    """Where the loss is predicted."""

    n: float | None
    d: float | None

    @property
    def pair(self) -> tuple[float | None, float | None]:
        return self.n, self.d


@dataclass(frozen=True)
class Outcome:
    """A fit with its intervals and all that belongs beside them.

    Attributes:
        fit, intervals: The estimates.
        target, predicted, factors: Where the law was asked, what it says, target over the largest
            point per axis; None without a target.
        left_out: Range of the exponent, laws of one axis only.
        power: Exponent of a pure power law on the same points, laws of one axis only.
        parabolas: Per compute budget.
        assumed: Sentences a reader must know.
        unit: What D counts.
    """

    fit: Fit
    intervals: Intervals
    target: Target | None
    predicted: float | None
    factors: dict[str, float] | None
    left_out: LeaveOneOut | None
    power: float | None
    parabolas: list[IsoFlop]
    assumed: tuple[str, ...]
    unit: str


def analyse(
    points: Points,
    form: Form | None = None,
    *,
    target: Target | None = None,
    noise: float | None = None,
    unit: str = "samples",
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Fit, intervals, prediction and what was assumed.

    Args:
        points: The runs.
        form: The law; default: by the columns that vary.
        target: Predict the loss there (new data: unique samples only).
        noise: Relative s.d. over seeds; default: measured (``bootstrap.measure_noise``).
        unit: What D counts, for the reader.
        draws, seed, progress: Of the bootstrap.

    Raises:
        DataError: points that do not determine the law, or a target without a fitted axis.
    """
    fit = fit_law(points, form)
    asked = None
    if target is not None:
        for name in fitted_axes(fit.form):
            if getattr(target, name) is None:
                raise DataError(f"the law has a term in {LETTER[name]}: the target needs it too")
        asked = target.pair
    size = measure_noise(fit, noise)
    found = intervals(fit, size, target=asked, draws=draws, seed=seed, progress=progress)
    one_axis = fit.form in ("n", "d")
    outcome = Outcome(
        fit=fit,
        intervals=found,
        target=target,
        predicted=None if asked is None else float(fit.law.loss(*asked)),
        factors=None if asked is None else fit.extrapolation(*asked),
        left_out=leave_one_out(fit) if one_axis else None,
        power=pure_power(points, fit.form) if one_axis else None,
        parabolas=isoflop(points),
        assumed=(),
        unit=unit,
    )
    return Outcome(**{**vars(outcome), "assumed": tuple(_assumed(outcome))})


def _assumed(outcome: Outcome) -> list[str]:
    fit, found = outcome.fit, outcome.intervals
    points = fit.points
    said = ["every loss is of a schedule that ended at its own D, with its own best learning rate"]
    said.append(f"noise of a loss: {found.noise.says()}")
    if fit.form == "n":
        said.append("D is the same at all points; E holds what this D leaves")
    if fit.form == "d":
        said.append("N is the same at all points; E holds what this N leaves")
    again = points.unique is not None and points.d is not None and points.unique < points.d
    if fit.form == "nd" and np.any(again):
        said.append("repeated samples count as new ones (--law repeated does not assume that)")
    if fit.form == "repeated" and outcome.target is not None:
        said.append("all samples of the target are different ones")
    if fit.form == "nd" and points.unique is None:
        said.append("no sample was seen twice, or it does not matter (no column unique)")
    ratio = misfit(fit, found.noise)
    if ratio is not None:
        said.append(
            f"WARNING: residuals are {ratio:.1f} times the noise: the law does not describe these "
            "points, and intervals that rest on it are too narrow"
        )
    if found.noise.typical > COARSE:
        said.append(
            f"WARNING: with {100 * found.noise.typical:.2g} % noise an exponent means little; "
            "average seeds until it is below 0.5 %"
        )
    said += [
        f"WARNING: {name} ended at the edge of what is searched: the points do not determine it"
        for name in fit.at_bound
    ]
    if found.failed:
        said.append(f"WARNING: {found.failed} of {found.draws} bootstrap fits did not converge")
    if not fit.converged:
        said.append("WARNING: the fit did not converge; do not use these numbers")
    if outcome.power is not None:
        said.append(
            f"without a floor the same points give an exponent of {outcome.power:.3g}: too small "
            "wherever there is a floor"
        )
    if outcome.parabolas:
        compute = compute_of(points)
        said.append(f"compute of the parabolas: {compute[1] if compute else 'unknown'}")
        said.append(f"parabolas: {BIAS}")
    return said


def extrapolation_lines(outcome: Outcome) -> list[str]:
    """How far the points reach, and how far beyond them the target lies."""
    fit = outcome.fit
    reach = []
    for name in fitted_axes(fit.form):
        axis = fit.points.axis(name)
        assert axis is not None
        unit = "parameters" if name == "n" else outcome.unit
        reach.append(f"{LETTER[name]} {axis.min():.3g} to {axis.max():.3g} {unit}")
    wide = ", ".join(f"{k} {v:.2f}" for k, v in fit.decades.items())
    lines = [f"{len(fit.points)} points: {'; '.join(reach)} (decades: {wide})"]
    if outcome.target is None or outcome.factors is None or outcome.intervals.prediction is None:
        return [*lines, "extrapolation factor: 1 (no --target: nothing is predicted)"]
    factors = ", ".join(f"{k} × {v:.3g}" for k, v in outcome.factors.items())
    far = max(outcome.factors.values())
    note = "inside the points" if far <= 1 else "beyond the points"
    if far > FAR:
        note += "; FAR: the law was never tested there"
    edges = outcome.intervals.prediction
    level = f"{100 * outcome.intervals.level:.0f} %"
    lines.append(f"extrapolation factor: {factors} ({note})")
    lines.append(
        f"loss at the target: {outcome.predicted:.4g} ({level} {edges.low:.4g} to "
        f"{edges.high:.4g}, of the law, without the noise of one run)"
    )
    return lines


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Values of ``scaling.json``."""
    fit, found = outcome.fit, outcome.intervals
    constants = fit.law.constants()
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "source": fit.points.source,
        "law": fit.form,
        "formula": FORMULAS[fit.form],
        "unit_d": outcome.unit,
        "estimates": {
            name: {"value": value, "low": found.of[name].low, "high": found.of[name].high}
            for name, value in constants.items()
        },
        "level": found.level,
        "bootstrap": {"draws": found.draws, "not_converged": found.failed},
        "noise": {
            "relative_sd": found.noise.typical,
            "origin": found.noise.origin,
            "degrees_of_freedom": found.noise.free,
        },
        "points": len(fit.points),
        "decades": fit.decades,
        "converged": fit.converged,
        "starts": {"tried": fit.tried, "agreeing": fit.agreeing},
        "residual_sd": fit.residual_sd if math.isfinite(fit.residual_sd) else None,
        "residuals": fit.residuals.tolist(),
        "assumed": list(outcome.assumed),
    }
    if outcome.target is not None and found.prediction is not None:
        values["target"] = {
            "n": outcome.target.n,
            "d": outcome.target.d,
            "loss": outcome.predicted,
            "low": found.prediction.low,
            "high": found.prediction.high,
            "extrapolation": outcome.factors,
        }
    if outcome.left_out is not None:
        values["leave_one_out"] = vars(outcome.left_out)
    if outcome.power is not None:
        values["pure_power_exponent"] = outcome.power
    values["isoflop"] = [
        {"flops": p.flops, "pf_days": p.pf_days, "best_n": p.best_n, "coefficients": p.coefficients}
        for p in outcome.parabolas
    ]
    return values

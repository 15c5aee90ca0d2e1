"""Which law a set of points can carry, and the refusal of those it cannot."""

from __future__ import annotations

import numpy as np

from fmrizoo.analysis.scaling.law import NAMES, Array, Form
from fmrizoo.analysis.scaling.points import Points
from fmrizoo.errors import DataError

MIN_POINTS = 6
MIN_DECADES = 1.5
MIN_VALUES = 3  # of an axis: its term alone has two unknowns beside the shared floor
MIN_SPREAD = 0.1  # decades by which log D must scatter around a line in log N
MIN_REPEATS = 1.0  # largest R: fewer passes hardly differ from new data
LETTER = {"n": "N", "d": "D"}


def decades(values: Array) -> float:
    """log10 of largest over smallest."""
    return float(np.log10(values.max() / values.min()))


def fitted_axes(form: Form) -> tuple[str, ...]:
    """``n``, ``d`` or both."""
    return ("n", "d") if form in ("nd", "repeated") else (form,)


def choose_form(points: Points) -> Form:
    """The law of all columns that vary: repeated data, both axes, or the one that is not constant.

    Raises:
        DataError: nothing varies.
    """
    moves = {name: (v := points.axis(name)) is not None and np.ptp(v) > 0 for name in ("n", "d")}
    if moves["n"] and moves["d"]:
        return "repeated" if points.unique is not None and _most_repeats(points) > 0 else "nd"
    if not (moves["n"] or moves["d"]):
        raise DataError(f"{points.source}: neither n nor d varies, so there is no law to fit")
    return "n" if moves["n"] else "d"


def refuse_underdetermined(points: Points, form: Form) -> None:
    """Refuse points from which the constants of ``form`` do not follow.

    Raises:
        DataError: one sentence with what there is and what is needed.
    """
    where = points.source
    for name in fitted_axes(form):
        if points.axis(name) is None:
            raise DataError(f"{where}: a law in {LETTER[name]} needs the column {name}")
    settings = len(np.unique(points.settings()))
    needed = max(MIN_POINTS, len(NAMES[form]) + 1)
    if settings < needed:
        seeds = f" ({len(points)} runs, but seeds of one setting count once)"
        raise DataError(
            f"{where}: {settings} point{'s' * (settings != 1)}"
            f"{seeds if settings < len(points) else ''} cannot determine "
            f"{', '.join(NAMES[form])}; a fit needs at least {needed}"
        )
    if form in ("n", "d"):
        _refuse_other_axis(points, form)
    for name in fitted_axes(form):
        _refuse_axis(points, name, MIN_POINTS if form in ("n", "d") else MIN_VALUES)
    if form in ("nd", "repeated"):
        _refuse_diagonal(points)
    if form == "repeated":
        _refuse_no_repeats(points)


def _refuse_axis(points: Points, name: str, values: int) -> None:
    axis = points.axis(name)
    assert axis is not None
    letter, wide = LETTER[name], decades(axis)
    if wide < MIN_DECADES:
        raise DataError(
            f"{points.source}: {letter} spans {wide:.2f} decades ({axis.min():g} to "
            f"{axis.max():g}); an exponent needs at least {MIN_DECADES}"
        )
    different = len(np.unique(axis))
    if different < values:
        raise DataError(
            f"{points.source}: {letter} takes {different} different values; this law needs at "
            f"least {values}"
        )


def _refuse_other_axis(points: Points, form: Form) -> None:
    """A law of one axis holds at one value of the other."""
    other = "d" if form == "n" else "n"
    axis = points.axis(other)
    if axis is not None and np.ptp(axis) > 0:
        raise DataError(
            f"{points.source}: a law in {LETTER[form]} alone needs points of equal {LETTER[other]}"
            f", got {len(np.unique(axis))} values from {axis.min():g} to {axis.max():g}; fit both "
            "axes (--law nd) or keep one value"
        )


def _refuse_diagonal(points: Points) -> None:
    """N and D that rise together cannot be told apart."""
    assert points.n is not None and points.d is not None
    x, y = np.log10(points.n), np.log10(points.d)
    scatter = float(np.std(y - np.polyval(np.polyfit(x, y, 1), x)))
    if scatter < MIN_SPREAD:
        raise DataError(
            f"{points.source}: D follows N (log10 D scatters by {scatter:.3f} around a line in "
            f"log10 N), so their terms cannot be told apart; add runs with other D at the same N, "
            f"to a scatter of at least {MIN_SPREAD}"
        )


def _most_repeats(points: Points) -> float:
    if points.unique is None or points.d is None:
        return 0.0
    return float((points.d / points.unique).max() - 1.0)


def _refuse_no_repeats(points: Points) -> None:
    if points.unique is None:
        raise DataError(f"{points.source}: the data-constrained law needs the column unique")
    most = _most_repeats(points)
    if most < MIN_REPEATS:
        raise DataError(
            f"{points.source}: data are repeated at most {most:.2g} times (d/unique − 1); R* needs "
            f"runs with at least {MIN_REPEATS:g}, or fit without repeats (--law nd)"
        )

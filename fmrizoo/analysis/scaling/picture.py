"""Figures of a fit: law and points, residuals, loss against compute, parabolas per budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fmrizoo.analysis.scaling.bootstrap import Intervals
from fmrizoo.analysis.scaling.fit import Fit
from fmrizoo.analysis.scaling.isoflop import IsoFlop, pf_days
from fmrizoo.analysis.scaling.law import Array, effective_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = 8  # most entries of a key; the lines between keep their own tone


@dataclass(frozen=True)
class Ink:
    """Colours of the figure, so that it looks like those of the report."""

    point: str
    law: str
    other: str
    muted: str
    rule: str


def draw(
    fit: Fit, found: Intervals, parabolas: list[IsoFlop], *, unit: str, ink: Ink, width: float
) -> Figure:
    """The figure of a fit.

    Loss against compute is a panel where the points have a column ``flops`` (6·N·D would only be
    another name for D).

    Args:
        fit: The law and its points.
        found: Its intervals (floor and noise are shown).
        parabolas: Of compute budgets; none: no such panel.
        unit: What D counts.
        ink: Colours.
        width: Inches.
    """
    from matplotlib.figure import Figure

    compute = fit.points.flops is not None
    lines = 1 + compute + bool(parabolas)
    figure = Figure(figsize=(width, 3.3 * lines), layout="constrained")
    grid = figure.add_gridspec(lines, 2, width_ratios=(1.6, 1.0))
    _law(figure.add_subplot(grid[0, 0]), fit, found, unit, ink)
    _residuals(figure.add_subplot(grid[0, 1]), fit, found, ink)
    if compute:
        _compute(figure.add_subplot(grid[1, :]), fit, ink)
    if parabolas:
        _parabolas(figure.add_subplot(grid[-1, 0]), parabolas, ink)
        _budget(figure.add_subplot(grid[-1, 1]), parabolas, ink)
    for axes in figure.axes:
        axes.grid(axis="y", color=ink.rule, lw=0.6)
        axes.set_axisbelow(True)
    return figure


def describe(fit: Fit) -> str:
    """The figure in words, for readers who do not see it."""
    constants = ", ".join(f"{k} {v:.4g}" for k, v in fit.law.constants().items())
    return f"Loss of {len(fit.points)} points and the fitted law: {constants}"


def _law(axes: Any, fit: Fit, found: Intervals, unit: str, ink: Ink) -> None:
    points, law = fit.points, fit.law
    if fit.form == "d":
        assert points.d is not None
        x, groups = points.d, np.ones(len(points))
        axes.set_xlabel(f"D, {unit}")
    else:
        assert points.n is not None
        x = points.n
        groups = np.ones(len(points)) if fit.form == "n" else _data_axis(fit)
        axes.set_xlabel("N, parameters")
    values = np.unique(groups)
    shades = _shades(ink.law, len(values))
    named = np.unique(np.linspace(0, len(values) - 1, min(len(values), _NAMED)).astype(int))
    for value, shade in zip(values, shades, strict=True):
        rows = groups == value
        # No further than the points of this D: the figure shows what was measured.
        ends = max(x.min(), x[rows].min() / 2), min(x.max(), x[rows].max() * 2)
        line = np.geomspace(*ends, 100)
        at = (None, line) if fit.form == "d" else (line, np.full(100, value))
        axes.plot(line, law.loss(*at), color=shade, lw=1.5, zorder=2)
        axes.plot(
            x[rows], points.loss[rows], ls="", marker="o", ms=4.5, color=shade, mec="white", mew=0.5
        )
    if len(values) > 1:
        letter = "D'" if fit.form == "repeated" else "D"
        _key(axes, values[named], [shades[i] for i in named], letter, unit)
    edges = found.of["E"]
    axes.axhspan(edges.low, edges.high, color=ink.muted, alpha=0.15, lw=0)
    axes.axhline(law.floor, color=ink.muted, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        f"floor E = {law.floor:.3g}",
        (1, law.floor),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        color=ink.muted,
        fontsize=8.5,
    )
    axes.set_xscale("log")
    axes.set_ylabel("loss")
    low = min(edges.low, float(points.loss.min()))
    high = float(points.loss.max())
    room = 0.06 if len(values) == 1 else 0.36  # for the key
    axes.set_ylim(max(0.0, low - 0.08 * (high - low)), high + room * (high - low))
    axes.set_title("Points and law")


def _data_axis(fit: Fit) -> Array:
    points = fit.points
    assert points.d is not None
    if fit.law.r_star is None or points.unique is None:
        return points.d
    # Runs of one (D, U) are one line; rounding only joins what is equal.
    effective = effective_data(points.d, points.unique, fit.law.r_star)
    return np.array([float(f"{v:.6g}") for v in effective])


def _shades(color: str, count: int) -> list[Any]:
    """From a light tone to the full colour."""
    from matplotlib.colors import to_rgb

    full = np.array(to_rgb(color))
    shares = np.linspace(0.35, 1.0, count) if count > 1 else [1.0]
    return [tuple(1 - s * (1 - full)) for s in shares]


def _key(axes: Any, values: Array, shades: list[Any], letter: str, unit: str) -> None:
    """Above the curves, in the room that ``_law`` leaves for it."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=shade, lw=1.8, label=_short(value))
        for value, shade in zip(values, shades, strict=True)
    ]
    axes.legend(
        handles=handles,
        title=f"{letter}, {unit}",
        fontsize=8,
        title_fontsize=8,
        loc="upper center",
        ncols=4,
        handlelength=1.2,
        columnspacing=1.0,
    )


def _short(value: float) -> str:
    """``42.5K``, ``2.35M``; whole numbers below 10000 as they are."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size and not (size == 1e3 and value < 1e4):
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def _residuals(axes: Any, fit: Fit, found: Intervals, ink: Ink) -> None:
    predicted = fit.points.loss * np.exp(-fit.residuals)
    noise = 100 * found.noise.typical
    axes.axhspan(-noise, noise, color=ink.law, alpha=0.12, lw=0)
    axes.axhline(0, color=ink.muted, lw=0.8)
    axes.plot(predicted, 100 * fit.residuals, ls="", marker="o", ms=4.5, color=ink.point, mew=0)
    most = max(float(np.abs(100 * fit.residuals).max()), noise) * 1.25
    axes.set_ylim(-most, most)
    axes.set_xlabel("predicted loss")
    axes.set_ylabel("residual, %")
    axes.set_title("Residuals (band: noise)")


def _compute(axes: Any, fit: Fit, ink: Ink) -> None:
    """Loss against the column ``flops``, one line through the means of the seeds per size."""
    points = fit.points
    assert points.flops is not None
    days = np.array([pf_days(flops) for flops in points.flops])
    sizes = np.ones(len(points)) if points.n is None else points.n
    values = np.unique(sizes)
    named = np.unique(np.linspace(0, len(values) - 1, min(len(values), _NAMED)).astype(int))
    shades = _shades(ink.other, len(values))
    for i, (value, shade) in enumerate(zip(values, shades, strict=True)):
        rows = sizes == value
        label = _short(value) if i in named and len(values) > 1 else None
        axes.plot(days[rows], points.loss[rows], ls="", marker="o", ms=4, color=shade, mew=0)
        axes.plot(*_means(days[rows], points.loss[rows]), color=shade, lw=1.5, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("compute, PF-days")
    axes.set_ylabel("loss")
    axes.set_title("Loss and compute")
    if len(values) > 1:
        axes.legend(title="N, parameters", fontsize=8, title_fontsize=8, loc="upper right", ncols=2)


def _means(x: Array, y: Array) -> tuple[Array, Array]:
    """Different values of ``x``, rising, and the mean ``y`` at each."""
    at, place = np.unique(x, return_inverse=True)
    return at, np.bincount(place, y) / np.bincount(place)


def _parabolas(axes: Any, parabolas: list[IsoFlop], ink: Ink) -> None:
    for one, shade in zip(parabolas, _shades(ink.other, len(parabolas)), strict=True):
        line = np.geomspace(one.n[0], one.n[-1], 60)
        label = f"{one.pf_days:.2g}"
        axes.plot(
            line, np.polyval(one.coefficients, np.log10(line)), color=shade, lw=1.5, label=label
        )
        axes.plot(one.n, one.loss, ls="", marker="o", ms=4, color=shade, mew=0)
        if one.best_n is not None:
            lowest = float(np.polyval(one.coefficients, np.log10(one.best_n)))
            axes.plot([one.best_n], [lowest], marker="*", ms=10, color=shade, mec="white", mew=0.5)
    axes.set_xscale("log")
    axes.set_xlabel("N, parameters")
    axes.set_ylabel("loss")
    axes.set_title("Parabola per compute budget (a picture)")
    axes.legend(title="PF-days", fontsize=8, title_fontsize=8, loc="upper right")


def _budget(axes: Any, parabolas: list[IsoFlop], ink: Ink) -> None:
    inside = [(one.pf_days, one.best_n) for one in parabolas if one.best_n is not None]
    if inside:
        axes.plot(*zip(*inside, strict=True), ls="", marker="*", ms=10, color=ink.other, mew=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.margins(0.2)
    else:
        axes.text(0.5, 0.5, "none inside", ha="center", transform=axes.transAxes, color=ink.muted)
    axes.set_xlabel("compute, PF-days")
    axes.set_ylabel("N at the lowest point")
    axes.set_title("Lowest points (biased)")

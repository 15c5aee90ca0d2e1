"""The coordinate check as a picture: activations above, how far they moved below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmrizoo.analysis.mup_check import KINDS, CoordinateCheck, Verdict
from fmrizoo.report.figures import BLUE, INK, MUTED, RULE, WIDTH, Image, style, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RED = "#B22234"  # of what is out of tolerance; darker than the blue for readers who see no colour
ROWS = {"activation": "mean |h|", "change": "mean |h − h₀|"}
LONGEST = 40  # letters of a module's name
SPAN = 4.0  # at least so many times up and down, so that noise is not blown up to fill the panel


def coordinate_figure(checks: Sequence[CoordinateCheck]) -> Image:
    """One column per check; a line per module, relative to its value at the narrowest width."""
    figure = _draw(checks)
    return svg(figure, "Coordinate check. " + "; ".join(f"{c.name}: {c.says}" for c in checks))


def save_coordinate_figure(path: Path, checks: Sequence[CoordinateCheck]) -> None:
    """The same as a file; its suffix says of which kind (.png, .svg, .pdf)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _draw(checks).savefig(path, dpi=160)


def _draw(checks: Sequence[CoordinateCheck]) -> Figure:
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
        grid = figure.subplots(2, len(checks), sharex="col", sharey="row", squeeze=False)
        for row, kind in enumerate(KINDS):
            low, high = _limits(checks, kind)
            for column, check in enumerate(checks):
                axes = grid[row, column]
                _panel(axes, check, kind)
                axes.set_ylim(low, high)
                if not row:
                    axes.set_title(check.name)
                else:
                    axes.set_xlabel("width")
            grid[row, 0].set_ylabel(f"{ROWS[kind]}, relative")
    return figure


def _panel(axes: Any, check: CoordinateCheck, kind: str) -> None:
    """Lines of the step at which each module is steepest, over the band that passes."""
    widths = np.asarray(check.widths, float)
    band = (widths / widths[0]) ** check.tolerance
    axes.fill_between(widths, 1 / band, band, color=RULE, alpha=0.7, lw=0, zorder=0)
    ordered = sorted(check.verdicts, key=lambda v: abs(getattr(v, kind)))
    for verdict in ordered:
        line = _line(check, verdict, kind)
        if line is not None:
            bad = not abs(getattr(verdict, kind)) <= check.tolerance
            axes.plot(widths, line, color=RED if bad else BLUE, lw=1.1, alpha=0.8, zorder=2 + bad)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(check.widths, [str(w) for w in check.widths])
    axes.minorticks_off()
    axes.set_xlim(widths[0], widths[-1])
    axes.axhline(1, color=MUTED, lw=0.7, zorder=1)
    out = sum(not abs(getattr(v, kind)) <= check.tolerance for v in ordered)
    said = f"{len(ordered) - out} of {len(ordered)} modules within tolerance\n"
    said += f"{_name(ordered[-1])}: slope {getattr(ordered[-1], kind):+.2f}".replace("-", "−")
    axes.annotate(
        said,
        (0.03, 0.97),
        xycoords="axes fraction",
        va="top",
        fontsize=7.8,
        color=RED if out else INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        zorder=5,
    )


def _line(check: CoordinateCheck, verdict: Verdict, kind: str) -> np.ndarray | None:
    """Values relative to the narrowest; None where nothing can be drawn on a log axis."""
    slopes = check.slopes(verdict.module, kind)
    if not slopes:
        return None
    step = max(slopes, key=lambda s: abs(slopes[s]))
    values = np.asarray([getattr(p, kind) for p in check.table[verdict.module][step]])
    if len(values) < len(check.widths) or not (values > 0).all() or not np.isfinite(values).all():
        return None
    relative: np.ndarray = values / values[0]
    return relative


def _limits(checks: Sequence[CoordinateCheck], kind: str) -> tuple[float, float]:
    """One vertical scale for the row; room above the lines for the words."""
    lines = [_line(check, verdict, kind) for check in checks for verdict in check.verdicts]
    values = np.concatenate([line for line in lines if line is not None] or [np.ones(1)])
    low, high = min(1 / SPAN, values.min() / 1.2), max(SPAN, values.max() * 1.2)
    return low, high * (high / low) ** 0.28


def _name(verdict: Verdict) -> str:
    name = verdict.module.removeprefix("backbone.").removeprefix("objective.")
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]

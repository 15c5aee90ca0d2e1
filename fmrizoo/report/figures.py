"""Figures of a report as data URIs, in colours that colour-blind readers can tell apart.

Colours after Okabe & Ito (2008), Color Universal Design.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.summary import Row
from fmrizoo.report.words import CHANCE, LABELS, TaskReport, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
)
_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
_LINES: tuple[Any, ...] = ("-", (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))  # when the colours run out
INK, MUTED, RULE = "#1f2933", "#5f6b7a", "#d5dbe2"
WIDTH = 7.4  # inches; 710 CSS pixels

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.hashsalt": "fmrizoo",
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Image:
    """A figure ready for ``<img>``.

    Attributes:
        uri: ``data:`` URI.
        width: CSS pixels at which its text has the size of the page's.
        alt: What it shows, for readers who do not see it.
    """

    uri: str
    width: int
    alt: str


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, without touching the caller's matplotlib settings."""
    import matplotlib

    settings: Any = _STYLE
    with matplotlib.rc_context(settings):
        yield


def svg(figure: Figure, alt: str) -> Image:
    """For lines and text."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _image(out.getvalue(), "image/svg+xml", figure, alt)


def png(figure: Figure, alt: str, dpi: int = 200) -> Image:
    """For pictures made of voxels (they stay sharp squares in every browser)."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return _image(out.getvalue(), "image/png", figure, alt)


def _image(content: bytes, kind: str, figure: Figure, alt: str) -> Image:
    uri = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return Image(uri, round(figure.get_figwidth() * 96), alt)


def dots(report: TaskReport) -> Image:
    """One line per row: a dot per seed, a bar at the mean, chance as a dashed line."""
    from matplotlib.figure import Figure

    metric = metrics.PRIMARY[report.task.kind]
    shown = [r for r in report.rows if r.primary is not None and r.name != CHANCE]
    shown.sort(key=lambda r: -r.primary.mean if r.primary else 0.0)
    with style():
        figure = Figure(figsize=(WIDTH, 1.0 + 0.34 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        for y, row in enumerate(shown):
            _strip(axes, row, y)
        if report.chance is not None:
            axes.axvline(report.chance, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=0)
            axes.annotate(
                f"chance {number(report.chance)}",
                (report.chance, -0.75),
                color=MUTED,
                fontsize=8.5,
                ha="left",
                va="center",
                xytext=(4, 0),
                textcoords="offset points",
            )
        axes.set_yticks(range(len(shown)), [r.name for r in shown])
        axes.set_ylim(len(shown) - 0.4, -1.1)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{LABELS[metric]} on the test {report.task.level}s")
        if report.task.kind == "classification":
            axes.set_xlim(left=0)
        _key(axes, report)
        names = ", ".join(f"{r.name} {r.primary.mean:.3f}" for r in shown if r.primary)
        return svg(figure, f"{LABELS[metric]} of each row, one dot per seed: {names}")


def _strip(axes: Any, row: Row, y: int) -> None:
    value = row.primary
    if value is None:
        return
    model = row.kind == "finetune"
    color, marker = (BLUE, "o") if model else (VERMILLION, "D")
    seeds = list(value.per_seed.values())
    axes.plot([value.mean] * 2, [y - 0.3, y + 0.3], color=color, lw=2.4, solid_capstyle="butt")
    spread = np.linspace(-0.14, 0.14, len(seeds)) if len(seeds) > 1 else [0.0]
    axes.scatter(
        seeds,
        y + np.asarray(spread),
        s=26 if model else 20,
        marker=marker,
        color=color,
        alpha=0.75,
        edgecolor="white",
        linewidth=0.5,
        zorder=3,
    )


def _key(axes: Any, report: TaskReport) -> None:
    from matplotlib.lines import Line2D

    kinds = [("model, one seed", BLUE, "o", report.models)]
    kinds.append(("baseline, one seed", VERMILLION, "D", report.baselines))
    handles: list[Any] = [
        Line2D([], [], ls="", marker=m, ms=5.5, color=c, label=name)
        for name, c, m, found in kinds
        if found
    ]
    handles.append(Line2D([], [], ls="", marker="|", ms=10, mew=2.4, color=MUTED, label="mean"))
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(handles),
        fontsize=8.5,
        handletextpad=0.2,
        columnspacing=1.2,
        borderaxespad=0.0,
    )


@dataclass(frozen=True)
class Curve:
    """One line of a loss figure: ``(steps, values)`` of one or several runs under one name."""

    name: str
    runs: tuple[tuple[Sequence[float], Sequence[float]], ...]
    dashed: bool = False


def losses(curves: Sequence[Curve], ylabel: str, alt: str) -> Image:
    """Loss against step: runs faint, their moving mean strong, names at the line's end."""
    from matplotlib.figure import Figure

    looks = {
        name: (_COLORS[i % len(_COLORS)], _LINES[i // len(_COLORS) % len(_LINES)])
        for i, name in enumerate(dict.fromkeys(c.name for c in curves))
    }
    with style():
        names = [_label(curve) for curve in curves]
        lines = -(-len(names) // _columns(names))
        height = 2.9 + 0.17 * max(0, lines - 2)  # a long key takes no room from the curves
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            color, ls = looks[curve.name]
            ls = (0, (3, 2)) if curve.dashed else ls
            for steps, values in curve.runs:
                axes.plot(steps, values, color=color, lw=0.7, alpha=0.25)
            at, mean = _mean_curve(curve)
            marker = "o" if len(at) < 15 else None
            axes.plot(
                at, mean, color=color, lw=1.8, ls=ls, label=_label(curve), marker=marker, ms=3
            )
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(ylabel)
        axes.set_xlim(left=0)
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        if len(curves) > 1:
            # Beside the axes: a legend inside would cover a curve sooner or later.
            figure.legend(
                *axes.get_legend_handles_labels(),
                loc="outside upper left",
                ncols=_columns(names),
                fontsize=8.5,
            )
        return svg(figure, alt)


def _label(curve: Curve) -> str:
    return curve.name + (" (validation)" if curve.dashed else "")


def _columns(labels: Sequence[str]) -> int:
    """Columns of a key that fit beside each other."""
    longest = 0.062 * max(map(len, labels)) + 0.6  # inches, with the line before the text
    most = 2 if len(labels) <= 4 else 3
    return max(1, min(most, int(WIDTH / longest)))


def _mean_curve(curve: Curve) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean over runs at the steps that all share, then a moving mean over a fortieth of them."""
    shared = sorted(set.intersection(*(set(steps) for steps, _ in curve.runs)))
    tables = [dict(zip(*run, strict=True)) for run in curve.runs]
    steps = np.array(shared, dtype=np.float64)
    values = np.array([[t[s] for s in shared] for t in tables], dtype=np.float64).mean(0)
    width = max(1, len(steps) // 40)
    if width > 1:
        kernel = np.ones(width)
        values = np.convolve(values, kernel, "same") / np.convolve(
            np.ones(len(steps)), kernel, "same"
        )
    return steps, values

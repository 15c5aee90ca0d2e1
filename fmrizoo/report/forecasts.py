"""Pictures of a forecast: frames beside what came and beside persistence, errors by horizon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.report.ahead import MEAN, MODEL, PERSISTENCE, Ahead, errors_ahead
from fmrizoo.report.analysis import color_of
from fmrizoo.report.families import Family
from fmrizoo.report.figures import (
    BLUE,
    INK,
    MUTED,
    RULE,
    VERMILLION,
    WIDTH,
    Image,
    png,
    style,
    svg,
)
from fmrizoo.report.multiples import WIDE, direct_labels
from fmrizoo.report.pictures import View, across, bare, box_of
from fmrizoo.report.reconstruction import Picture

Array = NDArray[Any]
ROWS = 4  # frames shown
TITLES = ("recorded", "forecast", "persistence")


def frames(ahead: Ahead) -> Image:
    """Rows of frames ahead, the first and the last among them; one slice, one colour scale.

    Drawn is the change from each voxel's mean over the clip: the anatomy, which every guess gets
    right, would hide it.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    picture = as_picture(ahead)
    axis = across(picture)
    others = tuple(a for a in range(3) if a != axis)
    cut = int(ahead.brain.sum(others).argmax())
    count = ahead.truth.shape[-1]
    chosen = np.unique(np.linspace(0, count - 1, min(ROWS, count)).round().astype(int))
    bottom, top, left, right = box_of(picture, axis)
    aspect = ahead.voxel_size[others[1]] / ahead.voxel_size[others[0]]
    tall = min((WIDTH - 0.9) / 4 * (top - bottom) * aspect / (right - left), 2.2)
    mean = ahead.mean[..., None]
    columns = [values - mean for values in (ahead.truth, ahead.predicted, ahead.again)]
    high = max(float(np.percentile(np.abs(columns[0][ahead.brain]), 99)), 1e-9)
    with style():
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
        figure = Figure(figsize=(WIDTH, 0.85 + (tall + 0.08) * len(chosen)), layout=layout)
        grid = figure.subplots(len(chosen), 3, squeeze=False)
        image: Any = None
        for row, frame in zip(grid, chosen.tolist(), strict=True):
            view = View(axis, cut, frame)
            brain = view.cut(ahead.brain)
            for axes, values in zip(row, columns, strict=True):
                image = axes.imshow(
                    np.ma.masked_where(~brain, view.cut(values)),
                    cmap="RdBu_r",
                    vmin=-high,
                    vmax=high,
                    origin="lower",
                    aspect=aspect,
                    interpolation="nearest",
                )
                bare(axes, brain)
                axes.set_xlim(left - 0.5, right - 0.5)
                axes.set_ylim(bottom - 0.5, top - 0.5)
            row[0].set_ylabel(f"+{ahead.seconds[frame]:g} s", fontsize=8.5)
        for axes, title in zip(grid[0], TITLES, strict=True):
            axes.set_title(title, fontsize=9, fontweight="normal", loc="center")
        bar = figure.colorbar(
            image, ax=grid, orientation="horizontal", aspect=40, shrink=0.8, pad=0.02
        )
        bar.set_label("change from the voxel's mean over the clip (normalised BOLD)", fontsize=8.5)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
        return png(figure, f"Frames ahead by column: {', '.join(TITLES)}")


def horizon(ahead: Ahead) -> Image:
    """Mean absolute error against seconds ahead: the model, persistence, the voxel's mean."""
    from matplotlib.figure import Figure

    looks: dict[str, dict[str, Any]] = {
        MODEL: {"color": BLUE, "lw": 2.0, "marker": "o"},
        PERSISTENCE: {"color": VERMILLION, "lw": 1.6, "marker": "D"},
        MEAN: {"color": MUTED, "lw": 1.4, "ls": (0, (4, 2)), "marker": "s"},
    }
    errors = errors_ahead(ahead)
    with style():
        figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for name, look in looks.items():
            size = 4 if len(ahead.seconds) <= 20 else 0
            axes.plot(ahead.seconds, errors[name], label=name, ms=size, **look)
        axes.set_xlim(0, ahead.seconds[-1] + 0.5 * ahead.tr)
        axes.set_ylim(0, 1.08 * max(float(e.max()) for e in errors.values()))
        axes.set_xlabel("seconds ahead")
        axes.set_ylabel("mean absolute error")
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=8.5
        )
        said = ", ".join(f"{name} {float(e.mean()):.3f}" for name, e in errors.items())
        return svg(figure, f"Mean absolute error by seconds ahead; means: {said}")


def together(found: Sequence[Family]) -> list[tuple[Image, str]]:
    """One figure of errors by horizon per clip that several families forecast, with its caption.

    A clip that only one family forecast has its figure in that family's section alone.
    """
    clips: list[list[tuple[Family, Ahead]]] = []
    for family in found:
        run = family.shows(lambda r: r.ahead is not None)
        if run is None or run.ahead is None:
            continue
        for clip in clips:
            if _equal(clip[0][1], run.ahead):
                clip.append((family, run.ahead))
                break
        else:
            clips.append([(family, run.ahead)])
    return [(_together(clip), _said(clip[0][1])) for clip in clips if len(clip) > 1]


def _equal(a: Ahead, b: Ahead) -> bool:
    """The same recording: guesses without a model are then the same too."""
    arrays = ((a.context, b.context), (a.truth, b.truth), (a.brain, b.brain))
    return a.tr == b.tr and all(np.array_equal(one, two) for one, two in arrays)


def _together(clip: Sequence[tuple[Family, Ahead]]) -> Image:
    from matplotlib.figure import Figure

    backbones = [f.backbone for f, _ in clip]
    several = len(set(backbones)) < len(clip)
    first = clip[0][1]
    lines: list[tuple[str, NDArray[np.float64], dict[str, Any]]] = []
    for family, one in clip:
        name = family.label.rsplit("/", 1)[-1] if several else family.backbone
        look: dict[str, Any] = {
            "color": color_of(family.backbone, backbones),
            "lw": 1.9,
            "marker": "o",
        }
        lines.append((name, errors_ahead(one)[MODEL], look))
    rivals = errors_ahead(first)
    lines.append((PERSISTENCE, rivals[PERSISTENCE], {"color": INK, "lw": 1.3, "ls": (0, (4, 3))}))
    look = {"color": MUTED, "lw": 1.3, "ls": (0, (1, 1.5))}
    lines.append(("mean over the clip", rivals[MEAN], look))
    height = max(2.5, 0.17 * len(lines) + 0.6)
    with style():
        figure = Figure(figsize=(WIDE, height + 0.65))
        panel = (0.6 / WIDE, 0.5 / (height + 0.65), (WIDE - 2.5) / WIDE, height / (height + 0.65))
        axes = figure.add_axes(panel)
        size = 4 if len(first.seconds) <= 20 else 0
        for _, values, look in lines:
            axes.plot(first.seconds, values, ms=size, **look)
        axes.set_xlim(0, first.seconds[-1] + 0.3 * first.tr)
        every = [v for _, values, _ in lines for v in values.tolist()]
        axes.set_ylim(0.9 * min(every), 1.04 * max(every))
        axes.set_xlabel("seconds ahead")
        axes.set_ylabel("mean absolute error")
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        ends = [(float(v[-1]), name, str(look["color"])) for name, v, look in lines]
        direct_labels(axes, ends, height)
        said = ", ".join(f"{name} {float(values.mean()):.3f}" for name, values, _ in lines)
        return svg(figure, f"Mean absolute error by seconds ahead; means: {said}")


def _said(one: Ahead) -> str:
    return (
        f"One clip of {one.run}, the same for all: mean absolute error over its brain voxels, "
        "frame by frame; the vertical axis does not begin at 0. Persistence is the clip's last "
        "frame again; “mean over the clip” is each voxel's own."
    )


def as_picture(ahead: Ahead) -> Picture:
    """As the pictures of reconstructions take it: for the slice and its frame."""
    everywhere = np.ones(ahead.truth.shape, bool)
    return Picture(
        ahead.truth, ahead.predicted, everywhere, ahead.brain, ahead.voxel_size, ahead.tr
    )

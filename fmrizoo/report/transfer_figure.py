"""Loss against the learning rate at every width, a star at each optimum."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmrizoo.analysis.mup_transfer import Transfer
from fmrizoo.files import write_atomic
from fmrizoo.report.figures import INK, MUTED, WIDTH, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"sp": "PyTorch's own (sp)", "mup": "muP"}
CEILING = 6.0  # losses above so many times the best are cut off


def save_transfer_figure(path: Path, transfers: Sequence[Transfer]) -> None:
    """One panel per parametrization; the suffix says of which kind (.png, .svg, .pdf)."""
    content = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    about = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}.get(kind)
    with style():
        _draw(transfers).savefig(content, format=kind, dpi=160, metadata=about)
    write_atomic(path, content.getvalue())


def _draw(transfers: Sequence[Transfer]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    panels = figure.subplots(1, len(transfers), sharex=True, sharey=True, squeeze=False)[0]
    for axes, found in zip(panels, transfers, strict=True):
        _panel(axes, found)
        axes.set_title(TITLES[found.name])
        axes.set_xlabel("learning rate")
    low = min(row.loss for found in transfers for row in found.rows)
    shown = [v for found in transfers for w in found.widths for v in found.curve(w).values()]
    high = min(max(v for v in shown if math.isfinite(v)), low * CEILING)
    panels[0].set_ylim(low * 0.9, high * 1.1)
    panels[0].set_ylabel(f"{transfers[0].which} loss")
    panels[-1].legend(title="width", loc="upper right", handlelength=1.4)
    return figure


def _panel(axes: Any, found: Transfer) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0.85, 0.1, len(found.widths)))
    for width, colour in zip(found.widths, colours, strict=True):
        curve = {r: v for r, v in found.curve(width).items() if math.isfinite(v)}
        axes.plot(curve.keys(), curve.values(), "-o", ms=3, lw=1.3, color=colour, label=str(width))
        _seeds(axes, found, width, colour)
        best = found.optimum(width)
        axes.plot(2**best.log2, best.loss, "*", ms=12, color=colour, mec="white", mew=0.8, zorder=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.axvline(2 ** found.optimum(found.widths[0]).log2, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    said = f"drift {found.drift():+.2f} per doubling\nregret {found.regret:.1%}"
    axes.annotate(
        said.replace("-", "−"),
        (0.03, 0.97),
        xycoords="axes fraction",
        va="top",
        fontsize=8.5,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )


def _seeds(axes: Any, found: Transfer, width: int, colour: Any) -> None:
    """Where the seeds lie at every rate."""
    if len(found.seeds) < 2:
        return
    for trial in found.trials:
        if trial.width == width and math.isfinite(trial.loss):
            axes.plot(trial.rate, trial.loss, ".", ms=2.5, color=colour, alpha=0.5, zorder=1)

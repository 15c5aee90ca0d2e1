"""Figures of what models look at: similarity, attribution, lesions, spectra; as PNG files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmrizoo.analysis.tested import many
from fmrizoo.files import write_atomic
from fmrizoo.report.figures import BLUE, INK, MUTED, RULE, VERMILLION, WIDTH, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fmrizoo.analysis.attribution_run import Attribution
    from fmrizoo.analysis.lesion import Lesions
    from fmrizoo.analysis.similarity import Similarity
    from fmrizoo.analysis.spectrum import Spectrum

SLICES = 6  # of a map
MOST_BARS = 25  # regions in a figure


def _write(figure: Figure, path: Path) -> None:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=200, metadata={"Software": None})
    write_atomic(path, out.getvalue())


def similarity(found: Similarity, path: Path) -> None:
    """Heat maps of CKA and RSA, stage against stage."""
    from matplotlib.figure import Figure

    rows, columns = (len(names) for names in found.stages)
    numbers = max(rows, columns) <= 12
    with style():
        figure = Figure(figsize=(WIDTH, 1.0 + 2.6 * rows / columns), layout="constrained")
        for k, (name, table) in enumerate((("linear CKA", found.cka), ("RSA", found.rsa)), start=1):
            axes = figure.add_subplot(1, 2, k)
            values = np.array([[np.nan if v is None else v for v in row] for row in table])
            image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis", origin="lower")
            axes.set_title(name)
            axes.set_xticks(range(columns), [str(i + 1) for i in range(columns)])
            axes.set_yticks(range(rows), [str(i + 1) for i in range(rows)])
            axes.set_xlabel(f"stage of {_short(found.second)}")
            if k == 1:
                axes.set_ylabel(f"stage of {_short(found.first)}")
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.tick_params(length=0)
            for (i, j), value in np.ndenumerate(values):
                if numbers:
                    text = "n/a" if np.isnan(value) else f"{value:.2f}".replace("-", "−")
                    color = INK if np.isnan(value) or value > 0.55 else "white"
                    axes.text(j, i, text, ha="center", va="center", color=color, fontsize=8.5)
            bar = figure.colorbar(image, ax=axes, shrink=0.8)
            bar.outline.set_visible(False)
        figure.suptitle(
            f"{found.clips} clips, features pooled by {found.pool}", fontsize=9, color=MUTED
        )
        _write(figure, path)


def _short(name: str) -> str:
    """The end of a path, as much as an axis has room for."""
    return name if len(name) <= 28 else "…" + name[-27:]


def attribution(found: Attribution, path: Path) -> None:
    """Axial slices of the signed map, and the first parcels where there is an atlas."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    brain = np.isfinite(found.absolute)
    # Slices with as many brain voxels between them: those at the ends show next to nothing.
    filled = np.cumsum(brain.sum((0, 1))) / brain.sum()
    chosen = np.unique(np.searchsorted(filled, (np.arange(SLICES) + 0.5) / SLICES))
    values = np.abs(found.signed[brain])
    limit = float(np.quantile(values, 0.995)) or 1.0
    box = [slice(w.min(), w.max() + 1) for w in np.where(brain.any(2))]
    bars = found.parcels[:MOST_BARS]
    shape = (box[1].stop - box[1].start) / (box[0].stop - box[0].start)
    across = len(chosen)
    tall = min(3.6, 0.86 * WIDTH / across * shape)
    with style():
        below = 0.5 + 0.2 * len(bars) if bars else 0
        figure = Figure(figsize=(WIDTH, tall + 0.9 + below), layout="constrained")
        ratios = [tall + 0.6, below] if bars else [1]
        parts = np.atleast_1d(np.array(figure.subfigures(len(ratios), 1, height_ratios=ratios)))
        panels = np.atleast_1d(parts[0].subplots(1, across))
        for axes, z in zip(panels, chosen, strict=True):
            cut = np.where(brain[..., z], found.signed[..., z], np.nan)[box[0], box[1]]
            image = axes.imshow(cut.T, origin="lower", cmap="PuOr_r", norm=Normalize(-limit, limit))
            axes.set_facecolor("#e8ebee")
            axes.set_title(f"z = {z}" if brain.shape[2] > 1 else "the slice")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        bar = parts[0].colorbar(image, ax=list(panels), shrink=0.8, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("attribution", fontsize=8.5)
        task = f"{found.settings.method}, {found.settings.target}"
        parts[0].suptitle(
            f"{task}: {many(found.clips, 'clip')} of {many(found.subjects, 'subject')}",
            fontsize=9,
            color=MUTED,
        )
        if bars:
            _parcel_bars(parts[1].subplots(), bars)
        _write(figure, path)


def _parcel_bars(axes: Any, bars: Any) -> None:
    axes.barh(range(len(bars)), [b.density for b in bars], color=BLUE, height=0.7)
    axes.set_yticks(range(len(bars)), [b.name for b in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.axvline(1, color=MUTED, lw=1, ls=(0, (4, 3)))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("absolute attribution per voxel (1: the brain's mean)")


def lesions(found: Lesions, path: Path) -> None:
    """Change of the score by region, worst first, with its interval."""
    from matplotlib.figure import Figure

    rows = sorted(found.rows, key=lambda r: -abs(r.change))[:MOST_BARS]
    rows.sort(key=lambda r: r.change)
    left_out = len(found.rows) - len(rows)
    with style():
        figure = Figure(figsize=(WIDTH, 1.1 + 0.24 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for y, row in enumerate(rows):
            color = VERMILLION if row.high is not None and row.high < 0 else BLUE
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [y, y], color=color, lw=1.6)
            axes.plot([row.change], [y], "o", color=color, ms=5)
        axes.axvline(0, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(rows)), [r.name for r in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        what = "log-probability of the truth" if found.metric != "mae" else "minus absolute error"
        axes.set_xlabel(f"change by the lesion: {what} of {found.target}")
        title = f"{len(found.units)} units, lesion: {found.lesion}"
        if left_out:
            title += f"; {left_out} regions with smaller changes not shown"
        axes.set_title(title, fontsize=9, color=MUTED, fontweight="normal")
        _write(figure, path)


def spectrum(found: Spectrum, path: Path) -> None:
    """Power of data and embeddings on logarithmic axes, with the band of the fit."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axvspan(*found.band, color=RULE, alpha=0.5, lw=0)
        curves = (
            ("embeddings", found.embedding_power, found.embedding_slope, BLUE, "-"),
            ("data", found.data_power, found.data_slope, VERMILLION, (0, (4, 1.5))),
        )
        for name, power, slope, color, dash in curves:
            label = f"{name}: slope {slope.mean:+.2f}".replace("-", "−")
            axes.plot(found.frequency[1:], power[1:], color=color, ls=dash, lw=1.8, label=label)
        if found.embedding_repeats > 0:
            joined = found.joined_power[1:]
            share = f"the same, with the {100 * found.embedding_repeats:.0f} % that repeat"
            axes.plot(found.frequency[1:], joined, color=BLUE, lw=0.9, alpha=0.55, label=share)
        clip = 1 / (found.clip_slots * found.slot_seconds)
        if found.clip_slots < found.slots and clip < found.frequency[-1]:
            axes.axvline(clip, color=MUTED, lw=1, ls=(0, (1, 2)))
            axes.annotate(
                "one clip", (clip, 0.02), xycoords=("data", "axes fraction"), color=MUTED,
                fontsize=8.5, xytext=(4, 0), textcoords="offset points",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("frequency (Hz); shaded: band of the fit")
        axes.set_ylabel("power of unit variance (1/Hz)")
        figure.legend(loc="outside upper right", ncols=3, fontsize=8.5)
        axes.set_title(
            f"{found.backbone}, {many(found.runs, 'run')} of {found.slots} slots", fontsize=9,
            color=MUTED, fontweight="normal",
        )  # fmt: skip
        _write(figure, path)

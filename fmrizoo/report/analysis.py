"""Figures of what was measured about models: dynamics of embeddings, memory of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmrizoo.analysis.autocorrelation import Artefact, Autocorrelation
from fmrizoo.analysis.memory import MemoryRow
from fmrizoo.report.collect import Evidence
from fmrizoo.report.figures import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RULE,
    SKY,
    VERMILLION,
    WIDTH,
    Image,
    style,
    svg,
)

COLORS = {"swin4d": VERMILLION, "swin_factorized": BLUE, "neuromamba": GREEN}
OTHERS = (PURPLE, ORANGE, SKY)
DASHES: dict[str, Any] = {"none": "-", "block": (0, (1, 1.2)), "window-chunk": (0, (4, 2))}
GREY = "#9aa5b1"
PER_ROW, KEYS_PER_ROW = 2, 3
HEAD, PANEL, FOOT = 0.5, 1.75, 0.5  # inches of a panel: its two lines of text, itself, its axis
DRAWN = 40  # lags


@dataclass(frozen=True)
class MemoryFigure:
    """One figure of measurements under equal conditions, and what they were."""

    image: Image
    conditions: str


def color_of(backbone: str, among: Sequence[str]) -> str:
    others = sorted({name for name in among if name not in COLORS})
    return COLORS.get(backbone) or OTHERS[others.index(backbone) % len(OTHERS)]


def count(parameters: int) -> str:
    """Parameters in millions or billions."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.1f}M" if parameters < 1e7 else f"{parameters / 1e6:.0f}M"


# --- dynamics -------------------------------------------------------------------------------------


def dynamics(evidence: Evidence) -> Image | None:
    """One panel per run: autocorrelation of its data and of its embeddings."""
    from matplotlib.figure import Figure

    found = [(run.label, run.analysis) for run in evidence.runs if run.analysis is not None]
    if not found:
        return None
    names = list(dict.fromkeys(one.backbone for _, one in found))
    lines = -(-len(found) // PER_ROW)
    with style():
        # Inches by hand: two lines of text above every panel, and the key above all.
        key = 0.28 * -(-(len(names) + 2) // KEYS_PER_ROW) + 0.08
        height = key + lines * (HEAD + PANEL + FOOT)
        figure = Figure(figsize=(WIDTH, height))
        for number, (label, one) in enumerate(found):
            line, column = divmod(number, PER_ROW)
            bottom = height - key - line * (HEAD + PANEL + FOOT) - HEAD - PANEL
            left, wide = 0.62 + column * (WIDTH - 0.45) / PER_ROW, (WIDTH - 0.45) / PER_ROW - 0.42
            axes = figure.add_axes((left / WIDTH, bottom / height, wide / WIDTH, PANEL / height))
            _panel(axes, label, one, color_of(one.backbone, names))
            axes.set_ylim(*_limits([one for _, one in found]))
            if column == 0:
                axes.set_ylabel("autocorrelation")
            else:
                axes.tick_params(labelleft=False)
        _dynamics_key(figure, names, height)
        said = "; ".join(f"{label}: {one.says}" for label, one in found)
        return svg(figure, f"Autocorrelation of data and embeddings by lag. {said}")


def _limits(found: Sequence[Autocorrelation]) -> tuple[float, float]:
    """One vertical scale for all panels."""
    values = [v for one in found for v in (*one.data[:DRAWN], *one.embeddings[:DRAWN])]
    return min(-0.05, *values) - 0.03, max(0.5, *values) + 0.04


def _panel(axes: Any, label: str, one: Autocorrelation, color: str) -> None:
    shown = min(len(one.data), DRAWN)
    seconds = one.slot_seconds * np.arange(1, shown + 1)
    axes.axhline(0, color=RULE, lw=0.8, zorder=0)
    if one.window is not None:
        for k in range(one.window, shown + 1, one.window):
            axes.axvline(k * one.slot_seconds, color=MUTED, lw=0.9, ls=(0, (1, 2)), zorder=0)
    small = 3.2 if shown <= 24 else 1.8
    axes.plot(seconds, one.data[:shown], color=GREY, lw=2.2, marker="o", ms=small)
    axes.plot(seconds, one.embeddings[:shown], color=color, lw=1.6, marker="o", ms=small)
    axes.set_xlim(0, seconds[-1] + 0.4 * one.slot_seconds)
    axes.set_xlabel("lag (s)")
    strong = any(a.kind == "peaks" for a in one.artefacts)
    lines = ((_shortened(label, 44), 18, "bold", INK), (_title(one), 5, "normal", MUTED))
    for text, above, weight, ink in lines:
        axes.annotate(
            text,
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, above),
            textcoords="offset points",
            fontsize=9,
            weight=weight,
            color=INK if strong else ink,
        )


def _title(one: Autocorrelation) -> str:
    """The artefact in words that fit above a panel."""
    if not one.artefacts:
        return f"clips of {one.slots} slots: too short to tell"
    if one.window is None:
        most = max(one.artefacts, key=lambda a: a.value)
        return f"no window; at {most.period} slots {_value(most)}"
    (only,) = one.artefacts
    what = {"peaks": "peaks at the window", "dips": "dips at the window"}.get(only.kind, only.kind)
    return f"{what}: {_value(only)}"


def _value(a: Artefact) -> str:
    text = f"{a.value:+.3f}"
    if a.low is not None and a.high is not None:
        text += f" [{a.low:+.3f}, {a.high:+.3f}]"
    return text.replace("-", "−")


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def _dynamics_key(figure: Any, backbones: Sequence[str], height: float) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=GREY, lw=2.2, label="data")]
    handles += [
        Line2D([], [], color=color_of(b, backbones), lw=1.6, label=f"embeddings, {b}")
        for b in backbones
    ]
    dotted = Line2D([], [], color=MUTED, lw=0.9, ls=(0, (1, 2)), label="multiples of the window")
    figure.legend(
        handles=[*handles, dotted],
        loc="upper left",
        bbox_to_anchor=(0.03, 1 - 0.02 / height),
        ncols=KEYS_PER_ROW,
        fontsize=8.5,
    )


# --- memory ---------------------------------------------------------------------------------------


def memory(evidence: Evidence) -> list[MemoryFigure]:
    """A figure of memory against frames for every set of equal conditions."""
    groups: dict[tuple[Any, ...], list[MemoryRow]] = {}
    for row in evidence.memory:
        if row.mb is not None:
            key = (row.device, row.precision, row.voxels, bool(row.objective))
            groups.setdefault(key, []).append(row)
    return [_memory_figure(rows, key) for key, rows in groups.items()]


def _memory_figure(rows: Sequence[MemoryRow], key: tuple[Any, ...]) -> MemoryFigure:
    from matplotlib.figure import Figure

    device, precision, voxels, whole = key
    series: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        series.setdefault((_who(row, rows), row.checkpointing), {})[row.frames] = row.mb or 0.0
    backbones = {_who(row, rows): row.backbone for row in rows}
    with style():
        figure = Figure(figsize=(WIDTH, max(2.9, 0.9 + 0.3 * len(series))), layout="constrained")
        axes = figure.add_subplot()
        ends = []
        for (who, mode), points in series.items():
            color = color_of(backbones[who], list(backbones.values()))
            x = sorted(points)
            y = [points[frames] for frames in x]
            axes.plot(x, y, color=color, lw=1.8, ls=DASHES.get(mode, "-"), marker="o", ms=4)
            ends.append((y[-1], x[-1], _line_label(who, mode, points), color))
        axes.set_xscale("log")
        axes.set_yscale("log")
        frames = sorted({row.frames for row in rows})
        axes.set_xticks(frames, [str(f) for f in frames])
        axes.minorticks_off()
        axes.set_xlim(frames[0] * 0.93, frames[-1] * 1.05)
        _megabytes(axes, [p for points in series.values() for p in points.values()])
        axes.set_xlabel("frames in the clip")
        axes.set_ylabel("MB")
        axes.grid(axis="y", color=RULE, lw=0.6)
        axes.set_axisbelow(True)
        _end_labels(axes, ends)
        alt = "; ".join(label for _, _, label, _ in sorted(ends, reverse=True))
        image = svg(figure, f"Memory of one training step against frames: {alt}")
    what = "with its objective" if whole else "of the encoder alone"
    size = "×".join(map(str, voxels))
    return MemoryFigure(image, f"one clip of {size} voxels, {what}, {precision} on {device}")


def _who(row: MemoryRow, rows: Sequence[MemoryRow]) -> str:
    """The backbone (the recipe's name where several share one) and the model's size."""
    same = [r for r in rows if r.backbone == row.backbone]
    several = len({r.recipe for r in same}) > 1
    name = row.recipe.rsplit("/", 1)[-1].removesuffix(".yaml") if several else row.backbone
    # Tables of positions grow with the clip, so that a model's size moves a little with it.
    largest = max(r.parameters for r in same if r.recipe == row.recipe)
    return f"{name} {count(largest)}"


def slope(points: dict[int, float]) -> float | None:
    """MB per frame by least squares; None with a single length."""
    if len(points) < 2:
        return None
    x, y = np.array(list(points), float), np.array(list(points.values()), float)
    return float(np.polyfit(x, y, 1)[0])


def _line_label(who: str, mode: str, points: dict[int, float]) -> str:
    rate = slope(points)
    measured = f"{max(points.values()):,.0f} MB" if rate is None else f"{rate:.3g} MB a frame"
    return f"{who}, {'all kept' if mode == 'none' else mode}: {measured}"


def _megabytes(axes: Any, values: Sequence[float]) -> None:
    """Plain numbers 1, 2, 5, 10, … that cover ``values``."""
    steps = [m * 10**e for e in range(8) for m in (1, 2, 5)]
    low, high = min(values) / 1.15, max(values) * 1.15
    shown = [s for s in steps if low <= s <= high] or [round(min(values))]
    axes.set_yticks(shown, [f"{s:,}" for s in shown])
    axes.set_ylim(low, high)


def _end_labels(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels to the right of the lines' ends, moved apart where they would touch."""
    figure = axes.figure
    low, high = np.log(axes.get_ylim())
    height = (figure.get_figheight() - 0.8) * 72  # points, without the margins
    gap = 13.0
    places: list[float] = []
    ordered = sorted(ends)
    for value, _, _, _ in ordered:
        at = (np.log(value) - low) / (high - low) * height
        places.append(max(at, places[-1] + gap) if places else at)
    for (value, frames, label, color), place in zip(ordered, places, strict=True):
        at = (np.log(value) - low) / (high - low) * height
        axes.annotate(
            label,
            (frames, value),
            xytext=(9, place - at),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )


# --- what is missing ------------------------------------------------------------------------------


def missing(evidence: Evidence) -> list[str]:
    """What a reader could expect of the analyses and does not find."""
    said = []
    trained = [r for r in evidence.pretrainings if r.model]
    without = [r for r in trained if r.analysis is None]
    if trained and len(without) == len(trained):
        said.append(
            "No run holds an analysis.json, so nothing is said about the dynamics of embeddings "
            "(`fmrizoo analyze autocorrelation RUN`)."
        )
    elif without:
        said.append(
            f"{len(without)} of {len(trained)} pretraining runs hold no analysis.json: "
            f"{', '.join(r.label for r in without)}."
        )
    if trained and not evidence.memory:
        said.append(
            "No memory.json was found, so nothing is said about the memory of a training step "
            "(`fmrizoo analyze memory RECIPE`)."
        )
    for row in evidence.memory:
        if row.mb is None:
            said.append(
                f"Memory of {row.recipe}, {row.checkpointing}, {row.frames} frames was not "
                f"measured: {row.note}."
            )
    return said

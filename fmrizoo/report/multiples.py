"""Small multiples of pretraining runs: one slice of each, and their losses by objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fmrizoo.report import pictures
from fmrizoo.report.analysis import color_of
from fmrizoo.report.collect import Run
from fmrizoo.report.families import Family
from fmrizoo.report.figures import INK, MUTED, RULE, Image, png, style, svg
from fmrizoo.report.pictures import Colors, View
from fmrizoo.report.reconstruction import Picture

WIDE = 9.6  # inches; as wide as the page
LEFT, BETWEEN, GAP = 1.2, 0.35, 0.06  # of names, between two blocks, between panels
HEAD, TALLEST, WIDEST = 0.62, 1.45, 1.5
FILLED = ("recorded", "shown", "filled in", "error")
STEPPED = ("recorded", "predicted", "error")
LINES = 2  # panels of losses beside each other
PANEL, ABOVE, BELOW = 1.9, 0.42, 0.48


@dataclass(frozen=True)
class Drawn:
    """A figure and what its colours mean."""

    image: Image
    caption: str


@dataclass(frozen=True)
class _Cell:
    family: Family
    picture: Picture
    colors: Colors
    view: View


# --- slices ---------------------------------------------------------------------------------------


def slices(groups: Sequence[Sequence[Family]]) -> Drawn | None:
    """A row per backbone, a block per kind of picture (filled in; one step ahead).

    Clips of one group of comparable runs share their colour scales and, if they are one clip,
    slice and frame.
    """
    cells, said = [], []
    for group in groups:
        own = _cells(group)
        if own:
            cells += own
            said.append(_limits(own))
    if not cells:
        return None
    rows = _arranged(cells)
    kinds = sorted({kind for row in rows for kind in row})
    image = _draw(rows, kinds)
    caption = (
        "One slice at one frame of a held-out clip; the same one wherever runs had the same clip. "
        "Grey: hidden from the model. Error: guess − recorded. Colours mean the same within an "
        f"objective: {'; '.join(said)}."
    )
    return Drawn(image, caption)


def _cells(group: Sequence[Family]) -> list[_Cell]:
    shown = [(f, r.picture) for f in group if (r := f.shows(_pictured)) and r.picture]
    if not shown:
        return []
    each = [pictures.colors_of(p) for _, p in shown]
    shared = Colors(
        each[0].signal,
        min(c.low for c in each),
        max(c.high for c in each),
        max(c.error for c in each),
    )
    (first, view) = shown[0][1], pictures.views_of(shown[0][1], 1)[0]
    cells = []
    for family, picture in shown:
        same = np.array_equal(picture.truth, first.truth)
        fits = same and view.cut(picture.hidden).any()
        own = view if fits else pictures.views_of(picture, 1)[0]
        cells.append(_Cell(family, picture, shared, own))
    return cells


def _pictured(run: Run) -> bool:
    return run.picture is not None


def _limits(cells: Sequence[_Cell]) -> str:
    c, family = cells[0].colors, cells[0].family
    data = f" ({family.selection})" if family.selection else ""
    text = f"{family.objective}{data} {c.low:.2g} to {c.high:.2g}, error ±{c.error:.2g}"
    return text.replace("-", "−")


def _arranged(cells: Sequence[_Cell]) -> list[dict[bool, _Cell]]:
    """Rows of equal backbone and grid; a second run of one kind starts another row."""
    rows: list[dict[bool, _Cell]] = []
    for cell in cells:
        kind = cell.picture.step > 0
        fitting = [row for row in rows if kind not in row and _alike(row, cell)]
        if fitting:
            fitting[0][kind] = cell
        else:
            rows.append({kind: cell})
    return rows


def _alike(row: dict[bool, _Cell], cell: _Cell) -> bool:
    other = next(iter(row.values()))
    same = other.picture.brain.shape == cell.picture.brain.shape
    return same and other.family.backbone == cell.family.backbone


def _draw(rows: Sequence[dict[bool, _Cell]], kinds: Sequence[bool]) -> Image:
    from matplotlib.figure import Figure

    titles = {kind: STEPPED if kind else FILLED for kind in kinds}
    count = sum(map(len, titles.values()))
    free = WIDE - LEFT - BETWEEN * (len(kinds) - 1) - 0.05
    wide = min(free / count - GAP, WIDEST)
    talls = [max(_tall(cell, wide) for cell in row.values()) for row in rows]
    height = HEAD + sum(talls) + 0.14 * len(rows)
    width = LEFT + count * (wide + GAP) + BETWEEN * (len(kinds) - 1) + 0.05
    with style():
        figure = Figure(figsize=(width, height))
        top = height - HEAD
        for row, tall in zip(rows, talls, strict=True):
            _row_name(figure, row, (top - tall / 2) / height)
            left = LEFT
            for kind in kinds:
                panels = []
                for column in range(len(titles[kind])):
                    x = left + column * (wide + GAP)
                    box = (x / width, (top - tall) / height, wide / width, tall / height)
                    panels.append(figure.add_axes(box))
                _block(panels, row.get(kind))
                if row is rows[0]:
                    _heads(figure, rows, kind, panels, height)
                left += len(titles[kind]) * (wide + GAP) + BETWEEN
            top -= tall + 0.14
        names = ", ".join(cell.family.label for row in rows for cell in row.values())
        return png(figure, f"One slice each of {names}: recorded, guessed, and the error")


def _tall(cell: _Cell, wide: float) -> float:
    bottom, top, left, right = pictures.box_of(cell.picture, cell.view.axis)
    return min(wide * (top - bottom) * _aspect(cell) / (right - left), TALLEST)


def _aspect(cell: _Cell) -> float:
    across, up = (a for a in range(3) if a != cell.view.axis)
    return cell.picture.voxel_size[up] / cell.picture.voxel_size[across]


def _block(panels: Sequence[Any], cell: _Cell | None) -> None:
    if cell is None:
        for axes in panels:
            axes.set_axis_off()
        panels[0].text(0, 0.5, "no such run", color=MUTED, fontsize=8.5, va="center")
        return
    pictures.draw_row(panels, cell.picture, cell.view, cell.colors, _aspect(cell))
    bottom, top, left, right = pictures.box_of(cell.picture, cell.view.axis)
    for axes in panels:
        axes.set_xlim(left - 0.5, right - 0.5)
        axes.set_ylim(bottom - 0.5, top - 0.5)


def _row_name(figure: Any, row: dict[bool, _Cell], y: float) -> None:
    cell = next(iter(row.values()))
    figure.text(0.004, y, cell.family.backbone, weight="bold", fontsize=9, va="bottom")
    note = cell.family.selection.replace("acquisition ", "")
    where = " / ".join(dict.fromkeys(pictures.name_of(c.view, c.picture) for c in row.values()))
    figure.text(0.004, y, f"{note}\n{where}" if note else where, color=MUTED, fontsize=8, va="top")


def _heads(
    figure: Any,
    rows: Sequence[dict[bool, _Cell]],
    kind: bool,
    panels: Sequence[Any],
    height: float,
) -> None:
    """The objective's name above its block, and the titles of its columns."""
    names = dict.fromkeys(row[kind].family.objective for row in rows if kind in row)
    start = panels[0].get_position().x0
    line = 1 - 0.24 / height
    figure.text(start, line, " / ".join(names), weight="bold", fontsize=10, va="center")
    for axes, title in zip(panels, STEPPED if kind else FILLED, strict=True):
        place = axes.get_position()
        middle = (place.x0 + place.x1) / 2
        figure.text(middle, 1 - 0.48 / height, title, fontsize=8.5, ha="center", va="center")


# --- losses ---------------------------------------------------------------------------------------


def losses(groups: Sequence[Sequence[Family]], named: Sequence[str]) -> Image | None:
    """A panel per group of comparable runs: training thin, validation dots, persistence dashed."""
    from matplotlib.figure import Figure

    drawn = [
        (g, name)
        for g, name in zip(groups, named, strict=True)
        if any(points(r, "loss")[0] for f in g for r in f.runs)
    ]
    if not drawn:
        return None
    drawn.sort(key=lambda part: len(part[0]) == 1)  # what compares stands side by side
    backbones = list(dict.fromkeys(f.backbone for g in groups for f in g))
    lines = -(-len(drawn) // LINES)
    height = lines * (ABOVE + PANEL + BELOW)
    cell = WIDE / LINES
    with style():
        figure = Figure(figsize=(WIDE, height))
        for number, (group, name) in enumerate(drawn):
            line, column = divmod(number, LINES)
            bottom = height - line * (ABOVE + PANEL + BELOW) - ABOVE - PANEL
            box = (column * cell + 0.55, bottom, cell - 0.55 - 1.45, PANEL)
            axes = figure.add_axes((box[0] / WIDE, box[1] / height, box[2] / WIDE, box[3] / height))
            _panel(axes, group, backbones)
            axes.annotate(
                name,
                (0, 1),
                xycoords="axes fraction",
                xytext=(-34, 12),
                textcoords="offset points",
                fontsize=9,
                weight="bold",
            )
        return svg(figure, f"Pretraining loss by step: {'; '.join(name for _, name in drawn)}")


def points(run: Run, key: str, held: bool = False) -> tuple[list[float], list[float]]:
    """Steps and values of one quantity of a training curve."""
    found = []
    for line in run.curve:
        source = line.get("validation") if held else line
        value = source.get(key) if isinstance(source, dict) else None
        if value is not None and line.get("step") is not None:
            found.append((float(line["step"]), float(value)))
    return [s for s, _ in found], [v for _, v in found]


def _panel(axes: Any, group: Sequence[Family], backbones: Sequence[str]) -> None:
    several = len({f.backbone for f in group}) < len(group)
    ends: list[tuple[float, str, str]] = []
    values: list[float] = []
    for family in group:
        color = color_of(family.backbone, backbones)
        for run in family.runs:
            steps, training = points(run, "loss")
            axes.plot(steps, training, color=color, lw=0.9, alpha=0.55)
            values += training
        steps, held = _mean([points(r, "loss", held=True) for r in family.runs])
        axes.plot(steps, held, color=color, ls="", marker="o", ms=5, zorder=4, mec="white")
        values += held
        end = held[-1:] or [v[-1] for r in family.runs if (v := points(r, "loss")[1])][:1]
        name = family.label.rsplit("/", 1)[-1] if several else family.backbone
        ends += [(v, f"{name} {v:#.3g}", color) for v in end]
    again = [v for f in group for r in f.runs for v in points(r, "persistence", held=True)[1][-1:]]
    if again:
        level = float(np.mean(again))
        axes.axhline(level, color=INK, lw=1.1, ls=(0, (4, 3)), zorder=1)
        ends.append((level, f"persistence {level:#.3g}", INK))
        values.append(level)
    if min(values) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
        _log_ticks(axes, values)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimizer step")
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    direct_labels(axes, ends, PANEL)


def _log_ticks(axes: Any, values: Sequence[float]) -> None:
    low, high = min(values) / 1.15, max(values) * 1.1
    steps = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
    axes.set_ylim(low, high)
    axes.set_yticks([s for s in steps if low <= s <= high])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()


def _mean(
    curves: Sequence[tuple[list[float], list[float]]],
) -> tuple[list[float], list[float]]:
    """Mean at the steps that all curves share (curves without a point are left out)."""
    tables = [dict(zip(*curve, strict=True)) for curve in curves if curve[0]]
    if not tables:
        return [], []
    shared = sorted(set.intersection(*map(set, tables)))
    return shared, [float(np.mean([t[s] for t in tables])) for s in shared]


def direct_labels(axes: Any, ends: Sequence[tuple[float, str, str]], inches: float) -> None:
    """Names right of the panel at the height of their lines' ends, moved apart where they touch.

    Args:
        axes: Limits must be final.
        ends: Value, text, colour.
        inches: Height of the panel.
    """
    height, gap = inches * 72, 12.0
    ordered = sorted(ends)
    to_fraction = axes.transAxes.inverted()
    at = [float(to_fraction.transform(axes.transData.transform((0, v)))[1]) for v, _, _ in ordered]
    places: list[float] = []
    for fraction in at:
        place = fraction * height
        places.append(max(place, places[-1] + gap) if places else max(place, 0.0))
    # Labels that left the panel at its top move down together.
    for i in range(len(places) - 1, -1, -1):
        most = height - gap * (len(places) - 1 - i)
        places[i] = min(places[i], most)
    for (_, text, color), place in zip(ordered, places, strict=True):
        axes.annotate(
            text,
            (1, place / height),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )

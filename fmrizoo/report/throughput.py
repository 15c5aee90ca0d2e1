"""Throughput against nodes: picture, page and JSON of ``fmrizoo bench scaling``."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmrizoo import __version__
from fmrizoo.cluster.scaling import Efficiency, Row, Series, baselines_of, limits, rows_of
from fmrizoo.cluster.scaling_table import to_csv
from fmrizoo.files import write_atomic
from fmrizoo.report import figures
from fmrizoo.report.figures import INK, MUTED, RULE, WIDTH, Image, style, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("scaling.csv", "scaling.json", "scaling.html", "scaling.png")
COLORS = (figures.BLUE, figures.VERMILLION, figures.GREEN, figures.PURPLE, figures.ORANGE)
MARKERS = "osD^v"
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.3)))  # of the efficiency, a baseline each
MOST_TICKS = 9


def save_scaling(found: Sequence[Series], folder: Path, baselines: Sequence[int] = ()) -> None:
    """Write :data:`FILES`, each whole or not at all.

    Args:
        found: One series a system.
        folder: Made if absent.
        baselines: Sizes to compare with; empty: the smallest of each series.

    Raises:
        RecipeError: a series has no row of a baseline.
        DataError: the folder cannot be written.
    """
    content = json.dumps(to_json(found, baselines), indent=2, allow_nan=False)
    write_atomic(folder / "scaling.csv", to_csv(found, baselines).encode())
    write_atomic(folder / "scaling.json", content.encode() + b"\n")
    write_atomic(folder / "scaling.html", _page(found, baselines).encode())
    picture = io.BytesIO()
    with style():
        draw(found, baselines).savefig(picture, format="png", dpi=160, metadata={"Software": None})
    write_atomic(folder / "scaling.png", picture.getvalue())


def to_json(found: Sequence[Series], baselines: Sequence[int] = ()) -> dict[str, Any]:
    """Everything that is known, in plain types."""
    series = []
    for one in found:
        bases = baselines_of(one, baselines)
        rows = [
            {
                **asdict(row.point),
                "size": row.size,
                "seconds_per_step": row.point.seconds,
                "oversubscribed": row.point.crowded,
                "speedup": row.speedup,
                "efficiency": {str(b): asdict(e) if e else None for b, e in row.efficiency.items()},
            }
            for row in rows_of(one, bases)
        ]
        about = {"name": one.name, "unit": one.unit, "mode": one.mode, "source": one.source}
        said = {"notes": list(one.notes), "limits": limits(one, bases[0])}
        series.append({**about, "baselines": bases, **said, "rows": rows})
    return {"format": 1, "fmrizoo": __version__, "series": series}


# --- words ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A series as a table of words.

    Attributes:
        title: Name, mode.
        head: Column name and what stands under it.
        rows: Text and note of each cell.
        limits, notes, source: Sentences.
        crowded: A row is marked.
    """

    title: str
    head: tuple[tuple[str, str], ...]
    rows: tuple[tuple[tuple[str, str], ...], ...]
    limits: tuple[str, ...]
    notes: tuple[str, ...]
    source: str
    crowded: bool


def shown(series: Series, baselines: Sequence[int] = ()) -> Shown:
    """The table of a series, for a terminal or a page."""
    bases = baselines_of(series, baselines)
    rows = rows_of(series, bases)
    head = [
        (series.unit, ""),
        ("ranks", "a node"),
        ("batch", ""),
        ("clips/s", "median, range"),
        ("s/step", ""),
        ("stall", ""),
        ("speed-up", f"vs {bases[0]}"),
    ]
    head += [("efficiency", f"vs {base}") for base in bases]
    return Shown(
        f"{series.name}, {series.mode} scaling",
        tuple(head),
        tuple(tuple(_cells(row, bases)) for row in rows),
        tuple(limits(series, bases[0])),
        series.notes,
        series.source,
        any(row.point.crowded for row in rows),
    )


def _cells(row: Row, bases: Sequence[int]) -> list[tuple[str, str]]:
    point = row.point
    rate_range = ""
    if point.low is not None and point.high is not None:
        rate_range = f"{plain(point.low)} … {plain(point.high)}"
    cells = [
        (f"{row.size}{'*' * point.crowded}", ""),
        ("–" if point.per_node is None else f"{point.per_node:g}", ""),
        ("–" if point.batch is None else str(point.batch), ""),
        (plain(point.rate), rate_range),
        ("–" if point.seconds is None else f"{point.seconds:.3g}", ""),
        ("–" if point.stall is None else f"{point.stall:.1%}", ""),
        ("–" if row.speedup is None else f"{row.speedup:.2f}", ""),
    ]
    for base in bases:
        one = row.efficiency[base]
        if one is None:
            cells.append(("–", ""))
        else:
            spread = "" if one.low is None else f"{one.low:.1%} … {one.high:.1%}"
            cells.append((f"{one.value:.1%}", spread))
    return cells


def plain(rate: float) -> str:
    """``4,251.88``, ``0.0512``: as many digits as a throughput is given with."""
    return f"{rate:,.2f}" if rate >= 1 else f"{rate:.3g}"


def headline(series: Series, baselines: Sequence[int] = ()) -> str:
    """The largest fair row in one sentence."""
    bases = baselines_of(series, baselines)
    rows = [row for row in rows_of(series, bases) if not row.point.crowded]
    if len(rows) < 2:
        return f"{series.name}: nothing to compare but rows of more threads than cores"
    last = rows[-1]
    said = " and ".join(
        f"{one.value:.1%}{_spread(one)} of ideal growth from {base}"
        for base, one in last.efficiency.items()
        if one is not None and base != last.size
    )
    rate = f"{plain(last.point.rate)} clips/s on {last.size} {series.unit}"
    return f"{series.name}: {rate}" + (f", {said}" if said else "")


def _spread(one: Efficiency) -> str:
    return "" if one.low is None else f" ({one.low:.1%} … {one.high:.1%})"


def _page(found: Sequence[Series], baselines: Sequence[int]) -> str:
    import jinja2

    env = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = files("fmrizoo.report").joinpath("throughput.html.j2").read_text(encoding="utf-8")
    page = {
        "title": "Scaling of throughput",
        "date": datetime.now(UTC).strftime("%-d %B %Y"),
        "version": __version__,
        "headlines": [headline(one, baselines) for one in found],
        "figure": scaling_figure(found, baselines),
        "series": [shown(one, baselines) for one in found],
    }
    return env.from_string(text).render(page=page)


# --- the figure -----------------------------------------------------------------------------------


def scaling_figure(found: Sequence[Series], baselines: Sequence[int] = ()) -> Image:
    """Throughput with its ideal (log-log), and efficiency, against nodes."""
    said = "; ".join(headline(one, baselines) for one in found)
    with style():
        return svg(draw(found, baselines), f"Throughput and efficiency against size. {said}")


def draw(found: Sequence[Series], baselines: Sequence[int] = ()) -> Figure:
    """The same as a figure of matplotlib (within :func:`fmrizoo.report.figures.style`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.7 + 0.17 * len(found)), layout="constrained")
    left, right = figure.subplots(1, 2)
    alone = len(found) == 1
    for number, one in enumerate(found):
        look = (COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)])
        bases = baselines_of(one, baselines)
        _throughput(left, one, bases, look, alone)
        _efficiencies(right, one, bases, look, alone)
    units = " or ".join(dict.fromkeys(one.unit for one in found))
    sizes = sorted({size for one in found for size in one.sizes})
    for axes in (left, right):
        _sizes_axis(axes, sizes)
        axes.set_xlabel(units)
        axes.set_axisbelow(True)
    _rates_axis(left)
    left.set_ylabel("clips a second")
    left.set_title("Throughput", pad=10)
    left.grid(axis="both", which="major", color=RULE, lw=0.6)
    right.set_ylim(0, max(1.08, right.get_ylim()[1]))
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.axhline(1, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=0)
    right.set_title("Parallel efficiency", pad=10)
    right.grid(axis="y", color=RULE, lw=0.6)
    _key(figure, found, baselines)
    return figure


def _throughput(
    axes: Any, one: Series, bases: Sequence[int], look: tuple[str, str], alone: bool
) -> None:
    color, marker = look
    rates = [point.rate for point in one.points]
    axes.plot(one.sizes, rates, color=color, lw=1.7, zorder=3)
    _points(axes, one, [(p.rate, p.low, p.high) for p in one.points], color, marker)
    by_size = dict(zip(one.sizes, rates, strict=True))
    for base, dashes in zip(bases, DASHES[1:] * len(bases), strict=False):
        ends = [base, one.sizes[-1]]
        axes.plot(ends, [by_size[base] * size / base for size in ends], color=MUTED if alone
                  else color, lw=1, ls=dashes, zorder=1)  # fmt: skip
    if alone:
        for size, rate, after in zip(one.sizes, rates, [*rates[1:], math.inf], strict=True):
            axes.annotate(
                f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}",
                (size, rate),
                xytext=(5, -11 if after > rate else 5),  # beside the line, not on it
                textcoords="offset points",
                fontsize=8,
                color=INK,
            )


def _efficiencies(
    axes: Any, one: Series, bases: Sequence[int], look: tuple[str, str], alone: bool
) -> None:
    color, marker = look
    rows = rows_of(one, bases)
    for base, dashes in zip(bases, DASHES * len(bases), strict=False):
        pairs = [(row, e) for row in rows if (e := row.efficiency[base]) is not None]
        sizes = [row.size for row, _ in pairs]
        axes.plot(sizes, [e.value for _, e in pairs], color=color, lw=1.7, ls=dashes, zorder=3)
        spread = {row.size: (e.value, e.low, e.high) for row, e in pairs}
        some = [spread.get(size) for size in one.sizes]
        _points(axes, one, some, color, marker)
        if alone:
            _percent(axes, pairs, base)


def _percent(axes: Any, pairs: Sequence[tuple[Row, Efficiency]], base: int) -> None:
    for row, one in pairs:
        if row.size == base:
            continue
        axes.annotate(
            f"{one.value:.1%}",
            (row.size, one.value),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
            color=INK,
        )


def _points(
    axes: Any,
    one: Series,
    values: Sequence[tuple[float, float | None, float | None] | None],
    color: str,
    marker: str,
) -> None:
    """Markers with their ranges; hollow where a row measures the cores."""
    for size, point, value in zip(one.sizes, one.points, values, strict=True):
        if value is None:
            continue
        middle, low, high = value
        face = "white" if point.crowded else color
        if low is not None and high is not None:
            axes.plot([size, size], [low, high], color=color, lw=1.1, alpha=0.7, zorder=3)
        axes.plot([size], [middle], marker, ms=5.5, mfc=face, mec=color, mew=1.2, zorder=4)


def _sizes_axis(axes: Any, sizes: Sequence[int]) -> None:
    """Powers of two apart; at most so many numbers as fit."""
    axes.set_xscale("log", base=2)
    step = -(-len(sizes) // MOST_TICKS)
    some = list(sizes[::step])
    axes.set_xticks(some, [f"{size:,}" for size in some])
    axes.minorticks_off()
    span = sizes[-1] / sizes[0]
    axes.set_xlim(sizes[0] / max(1.15, span**0.05), sizes[-1] * max(1.25, span**0.16))


def _rates_axis(axes: Any) -> None:
    """Decades; over less than two of them 1, 2, 5 as well."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    low /= 1.2  # room for the lowest number
    parts = (1,) if high / low > 100 else (1, 2, 5)
    ticks = [m * 10.0**e for e in range(-4, 9) for m in parts if low <= m * 10.0**e <= high]
    axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)


def _key(figure: Any, found: Sequence[Series], baselines: Sequence[int]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    both = len({one.mode for one in found}) > 1
    mixed = len({one.unit for one in found}) > 1
    for number, one in enumerate(found):
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        label = f"{one.name}, {one.mode} scaling" if both or len(found) == 1 else one.name
        label += f" ({one.unit})" if mixed else ""
        handles.append(Line2D([], [], color=color, marker=marker, ms=5.5, lw=1.7, label=label))
    bases = list(dict.fromkeys(b for one in found for b in baselines_of(one, baselines)))
    for base, dashes in zip(bases if baselines else [], DASHES[1:] * len(bases), strict=False):
        label = f"ideal from {base}"
        handles.append(Line2D([], [], color=MUTED, lw=1, ls=dashes, label=label))
    if not baselines:
        label = "ideal from the smallest"
        handles.append(Line2D([], [], color=MUTED, lw=1, ls=DASHES[1], label=label))
    if any(point.crowded for one in found for point in one.points):
        label = "more threads than cores"
        handles.append(
            Line2D([], [], ls="", marker="o", ms=5.5, mfc="white", mec=MUTED, label=label)
        )
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8.5)

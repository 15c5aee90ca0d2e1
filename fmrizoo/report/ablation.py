"""The page of an ablation: the ranked table, quality beside cost, and how it was done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from fmrizoo import __version__
from fmrizoo.files import write_atomic
from fmrizoo.pipeline.ablation.compared import Comparison
from fmrizoo.pipeline.ablation.results import ALL, Ablation, Column, Line
from fmrizoo.report.figures import INK, MUTED, WIDTH, Image, style, svg
from fmrizoo.report.words import LABELS, number, plus_minus, signed
from fmrizoo.sections.axes import CODES, MEANINGS
from fmrizoo.trainer.accounting import count

if TYPE_CHECKING:
    from fmrizoo.pipeline.ablation.run import Found, Planned

KINDS = {"cell": "Cells", "control": "Without pretraining", "baseline": "Baselines"}


@dataclass(frozen=True)
class Shown:
    """One line of the page's table, in words."""

    name: str
    scores: tuple[tuple[str, bool, str], ...]  # text, best of its column, note
    places: tuple[tuple[str, str, bool], ...]  # z-sum, rank, first
    cost: tuple[str, ...]


def write_ablation(result: Found, planned: Planned, path: Path, source: str) -> None:
    """Write the page; nothing in it is loaded from anywhere else.

    Args:
        result: The table and its comparisons.
        planned: What it was made from.
        path: The HTML file.
        source: How the recipe was named.
    """
    import jinja2

    found = result.table
    env = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = files("fmrizoo.report").joinpath("ablation.html.j2").read_text(encoding="utf-8")
    page = {
        "title": f"Ablation {source}",
        "date": datetime.now(UTC).strftime("%-d %B %Y"),
        "version": __version__,
        "headline": _headline(found),
        "columns": [(c.name, LABELS.get(c.metric, c.metric)) for c in found.columns],
        "subsets": list(found.subsets),
        "groups": [
            (title, [_shown(found, line) for line in _ordered(found.of(kind))])
            for kind, title in KINDS.items()
            if found.of(kind)
        ],
        "gaps": [
            f"{line.name}, {column}: {gap}"
            for line in found.lines
            for column, gap in line.gaps.items()
        ],
        "figure": _figure(found),
        "pairs": [_pair(one, len(found.columns) > 1) for one in result.pairs],
        "codes": [
            (axis, MEANINGS[axis], CODES[axis])
            for axis in planned.recipe.ablate.axes
            if axis in CODES
        ],
        "methods": methods(found, planned),
    }
    write_atomic(path, env.from_string(text).render(page=page).encode())


def _ordered(lines: Sequence[Line]) -> list[Line]:
    return sorted(lines, key=lambda one: _rank(one) or len(lines) + 1)


def _rank(line: Line) -> int | None:
    place = line.standing.get(ALL)
    return place.rank if place else None


def _headline(found: Ablation) -> str:
    cells = found.of("cell")
    first = [line for line in cells if _rank(line) == 1]
    if not first:
        return "No cell has all results"
    names = " and ".join(line.name for line in first)
    total = first[0].standing[ALL].total or 0.0
    return f"{names} ranks first of {len(cells)} (sum of z-scores {signed(total)})"


def _shown(found: Ablation, line: Line) -> Shown:
    scores = []
    for column in found.columns:
        row = line.rows.get(column.name)
        spread = row.spreads[column.metric] if row else None
        note = line.gaps.get(column.name, "") or (f"n = {row.n_units}" if row else "no result")
        scores.append((plus_minus(spread), _is_best(found, line, column), note))
    places = []
    for subset in found.subsets:
        place = line.standing.get(subset)
        if place is None or place.total is None:
            places.append(("–" if place else "", "–" if place else "", False))
        else:
            places.append((signed(place.total), str(place.rank), place.rank == 1))
    cost: tuple[str, ...] = ("", "", "", "", "")
    if line.cost:
        c = line.cost
        cost = (
            count(c.parameters),
            f"{c.flops / 1e9:.3g}",
            f"{c.clips:,}" if c.clips else "–",
            number(c.pretraining, 0),
            number(c.finetuning, 1),
        )
    return Shown(line.name, tuple(scores), tuple(places), cost)


def _pair(one: Comparison, several: bool) -> tuple[str, ...]:
    """Names, column, difference, interval, p, Holm's p, p over folds, answer."""
    gap = one.gap
    interval = f"{signed(gap.low)} … {signed(gap.high)}"
    column = one.column.name if several else ""
    folds = "–" if one.resampled is None else p_words(one.resampled)
    values = (signed(gap.mean), interval, p_words(gap.p), p_words(one.adjusted), folds, one.better)
    return (f"{one.first} − {one.second}", column, *values)


def clear_sentences(pairs: Sequence[Comparison]) -> list[str]:
    """The pairs that differ clearly, one sentence each; else one that says so."""
    said = []
    for one in pairs:
        if one.better != "not clear":
            word = "better" if one.better == "yes" else "worse"
            said.append(
                f"{one.column.name}: {one.first} is {word} than {one.second} by "
                f"{abs(one.gap.mean):.3f} (95 % {one.gap.low:+.3f} … {one.gap.high:+.3f}, "
                f"Holm's {p_words(one.adjusted)})"
            )
    if pairs and not said:
        return [f"none of {len(pairs)} paired differences is clear (Holm's p ≤ 0.05)"]
    return said


def p_words(p: float) -> str:
    """``p = 0.012``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _is_best(found: Ablation, line: Line, column: Column) -> bool:
    """Among the lines of its kind."""
    own = line.score(column)
    known = [v for other in found.of(line.kind) if (v := other.score(column)) is not None]
    best = min if column.lower_is_better else max
    return own is not None and own == best(known)


def _figure(found: Ablation) -> Image | None:
    """Sum of z-scores against compute and size, one dot a cell; None with fewer than three."""
    from matplotlib.figure import Figure

    cells = [line for line in found.of("cell") if _rank(line) is not None and line.cost]
    if len(cells) < 3:
        return None
    with style():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, label in ((left, "forward pass, GFLOP per clip"), (right, "pretraining, s")):
            for line in cells:
                assert line.cost is not None
                x = line.cost.flops / 1e9 if axes is left else line.cost.pretraining
                if x is None:
                    continue
                y = line.standing[ALL].total
                axes.plot([x], [y], "o", ms=5, color="#0072b2")
                axes.annotate(
                    line.name, (x, y), (5, 3), textcoords="offset points", fontsize=7, color=INK
                )
            axes.axhline(0, color=MUTED, lw=0.7, zorder=0)
            axes.set_xlabel(label)
            axes.margins(x=0.25, y=0.12)
        left.set_ylabel("sum of z-scores")
        alt = "Sum of z-scores of every cell against its compute and its training time"
        return svg(figure, alt)


def methods(found: Ablation, planned: Planned) -> list[str]:
    """How it was done, in sentences."""
    recipe, config = planned.recipe, planned.recipe.ablate
    design = {
        "grid": "every combination of the axes' values",
        "one_at_a_time": "the reference recipe and single changes of it",
    }[config.design]
    task = next(iter(planned.cells[0].tasks.values()))
    split = task.split
    repeats = f", repeated {config.repeats} times with other folds" if config.repeats > 1 else ""
    said = [
        f"{len(found.of('cell'))} cells: {design}. {planned.pretrainings} pretrainings and "
        f"{planned.finetunings} fine-tunings with {config.seeds} seeds. Numbers are mean ± s.d. "
        "over seeds; folds are averaged within a seed.",
        f"Tests: {split.folds}-fold over {split.by}s (split.seed={split.seed}){repeats}; the test "
        "part of every fold was predicted once, after all training, and its runs were in no "
        "pretraining that is tested on them.",
        "Ranks: within each task scores are z-normalised over the cells (signs turned where less "
        "is better) and summed; a cell that lacks a task is not ranked where that task counts. "
        "Controls and baselines are not part of the normalisation.",
    ]
    if config.match != "none":
        how = {
            "parameters": "widths give the encoders the parameters of the first cell's",
            "flops": "widths give one forward pass the operations of the first cell's",
            "tokens": "steps let every cell see as many tokens as the first",
        }[config.match]
        said.append(
            f"Matched in {config.match}: {how}"
            + ("." if config.match == "tokens" else "; rates go with the width by muP.")
        )
    if recipe.parametrization.name == "mup":
        base = recipe.parametrization.base
        said.append(f"Parametrization: muP with base {base}.")
    return said

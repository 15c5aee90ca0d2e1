"""One self-contained HTML page from run folders: nothing in it is loaded from anywhere else."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from fmrizoo import __version__
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.certainty import Certainty
from fmrizoo.evaluate.statistics import Interval
from fmrizoo.evaluate.summary import Row
from fmrizoo.files import write_atomic
from fmrizoo.report import analysis, figures, forecasts, sections, shown
from fmrizoo.report.analysis import MemoryFigure
from fmrizoo.report.collect import Evidence, collect
from fmrizoo.report.families import families
from fmrizoo.report.figures import Image
from fmrizoo.report.methods import WriteUp, write_up
from fmrizoo.report.radar import radar
from fmrizoo.report.shown import Shown
from fmrizoo.report.sidebyside import SideBySide, side_by_side
from fmrizoo.report.tables import results_csv
from fmrizoo.report.words import (
    CHANCE,
    LABELS,
    Pair,
    TaskReport,
    classes_word,
    number,
    p_word,
    plus_minus,
    signed,
    task_reports,
    trained_words,
)
from fmrizoo.trainer.accounting import count

log = logging.getLogger(__name__)

MOST_OPEN = 2  # pictures shown without a click


@dataclass(frozen=True)
class ReportSummary:
    """Where the page lies and what it says in plain text.

    Attributes:
        path: The HTML file.
        lines: Three lines for a terminal, one more for each further task.
        problems: What could not be read or is missing, one sentence each (also on the page).
    """

    path: Path
    lines: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One number of the table and whether it is the best of its column."""

    text: str
    best: bool
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of the results table."""

    name: str
    tags: tuple[str, ...]
    cells: tuple[Cell, ...]
    seeds: str
    units: str
    trained: str
    share: str
    note: str
    chance: bool
    p: str


@dataclass(frozen=True)
class Page:
    """Everything the template shows."""

    title: str
    date: str
    version: str
    tasks: tuple[dict[str, Any], ...]
    radar: Image | None
    pairs: SideBySide | None
    pictures: tuple[Shown, ...]
    forecasts: tuple[Shown, ...]
    horizons: tuple[tuple[Image, str], ...]
    dynamics: Image | None
    memory: tuple[MemoryFigure, ...]
    curves: tuple[tuple[str, Image], ...]
    data: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    methods: tuple[str, ...]
    paste: WriteUp
    csv: str
    environment: tuple[tuple[str, str], ...]
    citations: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def ordinal(self) -> bool:
        """Some task has levels."""
        return any(task["task"].kind == "ordinal" for task in self.tasks)

    @property
    def folded(self) -> bool:
        """Details are closed at first: there are more than two pictures of a kind."""
        return max(len(self.pictures), len(self.forecasts)) > MOST_OPEN


def write_report(
    folders: Sequence[Path],
    out: Path,
    title: str = "fmrizoo report",
    *,
    citations: Sequence[str] = (),
) -> ReportSummary:
    """Write the report on everything found under ``folders``.

    Args:
        folders: Run folders, or folders that hold them at any depth. Used: ``results.json``,
            ``predictions.tsv``, ``metrics.jsonl``, ``recipe.yaml``, ``reconstruction.npz``,
            ``forecast.npz``, ``env.json``, ``model/config.json``, ``analysis.json``;
            ``memory.json`` of any folder.
        out: The HTML file (written atomically).
        title: Heading.
        citations: Sources and licences of the data, shown as they are.

    Raises:
        DataError: a folder does not exist or there is nothing to report, or ``out`` cannot be
            written. A file that cannot be read is left out, named on the page, and logged.
    """
    evidence = collect(folders)
    tasks = task_reports(evidence)
    found = families(evidence.pretrainings)
    filled = shown.each_first(found, shown.filled_in)
    pairs = side_by_side(found)
    page = Page(
        title=title,
        date=datetime.now(UTC).strftime("%-d %B %Y"),
        version=__version__,
        tasks=tuple(_task(t) for t in tasks),
        radar=radar(tasks, evidence),
        pairs=pairs,
        pictures=filled,
        forecasts=shown.each_first(found, shown.forecast),
        horizons=tuple(forecasts.together(found)),
        dynamics=analysis.dynamics(evidence),
        memory=tuple(analysis.memory(evidence)),
        curves=tuple(sections.curves(evidence, pretraining=not (pairs and pairs.losses))),
        data=tuple(sections.data(evidence)),
        methods=tuple(sections.methods(evidence, tasks)),
        paste=write_up(evidence, tasks),
        csv=results_csv(tasks) if tasks else "",
        environment=tuple(sections.environment(evidence)),
        citations=tuple(citations),
        missing=(
            *sections.missing(evidence, tasks, len(filled)),
            *analysis.missing(evidence),
        ),
    )
    write_atomic(out, render(page).encode())
    return ReportSummary(out, tuple(_lines(tasks, filled, evidence)), page.missing)


def render(page: Page) -> str:
    """The page as HTML; every value is escaped."""
    import jinja2

    env = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = files("fmrizoo.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    return env.from_string(text).render(page=page)


def _task(report: TaskReport) -> dict[str, Any]:
    names = metrics.names(report.task.kind)
    scored = [r for r in report.rows if r.primary is not None and r.name != CHANCE]
    best = {m: _best_value(scored, m) for m in names}
    groups = [("Fine-tuned models", report.models), ("Baselines", report.baselines)]
    lines = [
        (label, [_line(r, best, report.sure.get((r.kind, r.name))) for r in found])
        for label, found in groups
    ]
    return {
        "report": report,
        "task": report.task,
        "classes": classes_word(report.task),
        "metrics": [LABELS[m] + (" ↓" if m in metrics.LOWER_IS_BETTER else "") for m in names],
        "groups": lines,
        "figure": figures.dots(report) if scored else None,
        "chance": number(report.chance) if report.chance is not None else None,
        "spreads": _spread_words(scored),
        "pairs": [_pair(p) for p in report.verdict.pairs],
        "over": _resampled(report),
        "sure": _sure_words(report),
    }


def _pair(pair: Pair) -> dict[str, str]:
    gap = pair.gap
    return {
        "question": pair.question,
        "names": f"{pair.first.name} − {pair.second.name}",
        "gap": signed(gap.mean) if gap else "–",
        "interval": f"{signed(gap.low)} to {signed(gap.high)}" if gap else "–",
        "p": p_word(gap.p) if gap else "–",
        "holm": p_word(pair.p_holm),
        "answer": pair.answer,
    }


def _resampled(report: TaskReport) -> str:
    """What the intervals were drawn over."""
    gap = next((p.gap for p in report.verdict.pairs if p.gap), None)
    if gap is None:
        return ""
    what = {"classification": "share correct", "ordinal": "mean absolute error (in levels)"}.get(
        report.task.kind, "mean absolute error"
    )
    scope = "other people like these, not about other data sets"
    if gap.group != "subject":
        scope = "other test units of this kind, not about other people or data sets"
    drawn = "single units" if gap.group == "unit" else f"whole {gap.group}s ({gap.n_groups})"
    return (
        f"Difference in {what} on the {gap.n_units} test units that both predicted, seeds "
        f"averaged; 95 % interval of a bootstrap that draws {drawn}; p: signs "
        f"flipped over the same, two-sided; both √2 wider where folds are pooled, whose models "
        f"learned from each other's test units. Both speak about {scope}."
    )


def _best_value(scored: Sequence[Row], metric: str) -> float | None:
    values = [s.mean for r in scored if (s := r.spreads[metric])]
    if not values:
        return None
    return min(values) if metric in metrics.LOWER_IS_BETTER else max(values)


def _line(row: Row, best: dict[str, float | None], sure: Certainty | None) -> Line:
    cells = []
    primary = metrics.PRIMARY[row.task.kind]
    for m, top in best.items():
        s = row.spreads[m]
        # Two rows that print the same number are both the best, whatever their hidden digits.
        wins = s is not None and top is not None and number(s.mean) == number(top)
        text = plus_minus(s) if row.name != CHANCE or s is None else number(s.mean)
        note = _interval(sure.interval) if sure and m == primary else ""
        cells.append(Cell(text, wins and row.name != CHANCE, note))
    tags = []
    if row.init:
        tags.append("pretrained" if row.init == "pretrained" else "random start")
    if row.train_encoder:
        tags.append(trained_words(row.head, row.train_encoder))
    # A name that says it already is not explained again.
    tags = [tag for tag in tags if tag.lower() not in row.name.lower()]
    gaps = [
        f"{LABELS[m]} undefined in {s.missing} of {len(row.results)} results"
        for m, s in row.spreads.items()
        if s and s.missing
    ]
    return Line(
        name=row.name,
        tags=tuple(tags),
        cells=tuple(cells),
        seeds=f"{row.n_seeds} × {row.n_folds}" if row.n_units else "–",
        units=str(row.n_units) if row.n_units else "–",
        trained=count(row.parameters.trainable) if row.parameters else "–",
        share=_share(row),
        note="; ".join((*row.notes, *gaps)),
        chance=row.name == CHANCE,
        p=p_word(sure.p) if sure else "–",
    )


def _interval(found: Interval) -> str:
    if found.low is None or found.high is None:
        return ""
    return f"{number(found.low)} to {number(found.high)}"


def _sure_words(report: TaskReport) -> str:
    """What the intervals were drawn over, and what p says."""
    every = [sure.interval for sure in report.sure.values()]
    if not every:
        return "There are no predictions, so neither intervals nor p."
    drawn = {(i.group, i.n_groups) for i in every}
    what = " or ".join(
        f"{n} single units" if group == "unit" else f"whole {group}s ({n})"
        for group, n in sorted(drawn)
    )
    name = LABELS[metrics.PRIMARY[report.task.kind]]
    # A prediction off scale may follow the labels and still be worse than their mean.
    related = (
        ""
        if report.task.kind == "classification"
        else (" It asks whether predictions follow the labels, not whether they beat guessing.")
    )
    return (
        f"Below {name}: its 95 % interval, a bootstrap that draws {what}. p: permuted labels "
        f"score at least as high; one-sided, not corrected for the number of rows.{related}"
    )


def _share(row: Row) -> str:
    """How much of the encoder trained, where that is known and not plain from the row's tag."""
    p = row.parameters
    if not p or not p.encoder or not 0 < p.encoder_trained < p.encoder:
        return ""
    return f"{100 * p.encoder_trained / p.encoder:.1f} % of encoder"


def _spread_words(scored: Sequence[Row]) -> str:
    kinds = {s.over for r in scored if (s := r.primary) and s.over}
    if kinds == {"seeds"}:
        return "± is the sample standard deviation over seeds, folds averaged within each seed."
    if kinds == {"folds"}:
        return "† ± is the sample standard deviation over folds: every row has one seed only."
    if kinds:
        return (
            "± is the sample standard deviation over seeds, folds averaged within each seed; "
            "† with a single seed it is over folds, and then larger: the two do not compare."
        )
    return "Without repetitions there is no ±."


def _lines(tasks: Sequence[TaskReport], filled: Sequence[Shown], evidence: Evidence) -> list[str]:
    lines = [task.verdict.short for task in tasks] or ["no results to compare"]
    if tasks:
        first = tasks[0]
        counted = f"{len(first.models)} models and {len(first.baselines)} baselines"
        if len(tasks) > 1:
            counted = f"{len(tasks)} tasks; of the first, {counted}"
        chance = f"; chance {first.chance:.3f}" if first.chance is not None else ""
        lines.append(f"{counted} on {max(r.n_units for r in first.rows)} test units{chance}")
    else:
        lines.append(f"{len(evidence.pretrainings)} pretraining runs")
    if len(filled) > 1:
        lines.append(f"{len(filled)} pretrained models in pictures, side by side")
    else:
        lines.append(filled[0].says if filled else "no picture of a reconstruction")
    return lines

"""What an ablation has found: one row per cell, control and baseline, from its result files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmrizoo.config import Recipe
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.predictions import Prediction, read_predictions
from fmrizoo.evaluate.ranking import Standing, standings, z_scores
from fmrizoo.evaluate.results import Result, find_results
from fmrizoo.evaluate.rows import PREDICTIONS, read_run_results, target_folders
from fmrizoo.evaluate.summary import Row, summarize
from fmrizoo.files import write_atomic
from fmrizoo.pipeline.ablation.cells import Cell
from fmrizoo.pipeline.ablation.chains import BASELINES, COST, DIVERGED, Chain, Tuning

CSV, JSON, HTML = "ablation.csv", "ablation.json", "ablation.html"
ALL = "all"
SCHEMA = "fmrizoo.ablation/1"


@dataclass(frozen=True)
class Cost:
    """What a cell took.

    Attributes:
        parameters, flops, tokens: Of its encoder; forward pass and patches of one clip.
        clips: Seen in one pretraining.
        pretraining: Mean seconds of one pretraining; None without one, or unknown.
        finetuning: Mean seconds of one fine-tuning and its test, over all tasks.
    """

    parameters: int
    flops: int
    tokens: int
    clips: int
    pretraining: float | None
    finetuning: float | None


@dataclass(frozen=True)
class Column:
    """One target of one task, and the metric that ranks it."""

    name: str
    task: str
    target: str
    metric: str
    lower_is_better: bool
    kind: str


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        name: Of the cell, control or baseline.
        kind: ``cell``, ``control`` or ``baseline``.
        values: Axis → label.
        backbone: Name of its backbone; empty for baselines.
        rows: Column → summary of its results; absent = no result.
        tables: Column → predictions of every fold and seed.
        gaps: Column → why results are missing.
        standing: Subset → standing; of cells only.
        cost: None for baselines.
    """

    name: str
    kind: str
    values: dict[str, str]
    backbone: str
    rows: dict[str, Row]
    tables: dict[str, list[list[Prediction]]]
    gaps: dict[str, str]
    standing: dict[str, Standing]
    cost: Cost | None

    def score(self, column: Column) -> float | None:
        """Mean of the column's metric."""
        row = self.rows.get(column.name)
        spread = row.spreads[column.metric] if row else None
        return None if spread is None else spread.mean


@dataclass(frozen=True)
class Ablation:
    """The table."""

    columns: tuple[Column, ...]
    subsets: dict[str, tuple[str, ...]]
    lines: tuple[Line, ...]

    def of(self, kind: str) -> list[Line]:
        """Lines of one kind, in order."""
        return [line for line in self.lines if line.kind == kind]


def collect(recipe: Recipe, cells: Sequence[Cell], chains: Sequence[Chain], out: Path) -> Ablation:
    """Read all results below ``out``.

    Raises:
        DataError: a file that cannot be read.
    """
    columns = _columns(recipe, cells)
    lines = [_line(cell, columns, chains, out) for cell in cells]
    lines += _baseline_lines(columns, chains, out)
    ranked = [line for line in lines if line.kind == "cell"]
    scores = {line.name: {c.name: line.score(c) for c in columns} for line in ranked}
    turned = [c.name for c in columns if c.lower_is_better]
    subsets = _subsets(recipe, columns, scores)
    places = standings(z_scores(scores, turned), subsets)
    for line in ranked:
        line.standing.update({subset: places[subset][line.name] for subset in subsets})
    return Ablation(tuple(columns), subsets, tuple(lines))


def _columns(recipe: Recipe, cells: Sequence[Cell]) -> list[Column]:
    found = []
    for task, own in cells[0].tasks.items():
        wanted = own.task.wanted()
        for target, kind in wanted.items():
            metric = recipe.ablate.tasks[task].metric or metrics.PRIMARY[kind]
            name = task if len(wanted) == 1 else f"{task}: {target}"
            found.append(
                Column(name, task, target, metric, metric in metrics.LOWER_IS_BETTER, kind)
            )
    return found


def _subsets(
    recipe: Recipe, columns: Sequence[Column], scores: dict[str, dict[str, float | None]]
) -> dict[str, tuple[str, ...]]:
    """Columns by subset; those that no cell has a score of can be summed by nobody."""
    known = [c for c in columns if any(own[c.name] is not None for own in scores.values())]
    found = {ALL: tuple(c.name for c in known)}
    for c in known:
        for subset in recipe.ablate.tasks[c.task].subsets:
            found[subset] = (*found.get(subset, ()), c.name)
    return {name: tasks for name, tasks in found.items() if tasks}


def _line(cell: Cell, columns: Sequence[Column], chains: Sequence[Chain], out: Path) -> Line:
    tunings = [t for chain in chains for t in chain.tunings if t.cell == cell.name]
    rows, tables, gaps = {}, {}, {}
    for column in columns:
        own = [t for t in tunings if t.task == column.task]
        found = [(t, result) for t in own if (result := _result(out, t, column.target))]
        if found:
            rows[column.name] = summarize([result for _, result in found])
            tables[column.name] = [_predictions(out, t, column.target) for t, _ in found]
        if len(found) < len(own):
            gaps[column.name] = _gap(out, own, len(found))
    costs = [_seconds(out / c.name) for c in chains if any(t in tunings for t in c.tunings)]
    known = [seconds for seconds in costs if seconds is not None]
    tuned = [r.seconds for row in rows.values() for r in row.results]
    cost = Cost(
        cell.size.parameters,
        cell.size.flops,
        cell.size.tokens,
        cell.size.clips if cell.pretraining else 0,
        sum(known) / len(known) if known else None,
        sum(tuned) / len(tuned) if tuned else None,
    )
    kind = "control" if cell.control else "cell"
    backbone = next(iter(cell.tasks.values())).backbone.name
    return Line(cell.name, kind, cell.values, backbone, rows, tables, gaps, {}, cost)


def _result(out: Path, tuning: Tuning, target: str) -> Result | None:
    found = read_run_results(out / tuning.folder, list(tuning.recipe.task.wanted()))
    return found[target] if found else None


def _predictions(out: Path, tuning: Tuning, target: str) -> list[Prediction]:
    folders = target_folders(out / tuning.folder, list(tuning.recipe.task.wanted()))
    return read_predictions(folders[target] / PREDICTIONS)[0]


def _gap(out: Path, tunings: Sequence[Tuning], done: int) -> str:
    why = [out / t.folder / DIVERGED for t in tunings]
    diverged = sum(path.is_file() for path in why)
    said = f"{done} of {len(tunings)} results"
    return f"{said}; {diverged} diverged" if diverged else said


def _seconds(folder: Path) -> float | None:
    path = folder / COST
    if not path.is_file():
        return None
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])


def _baseline_lines(columns: Sequence[Column], chains: Sequence[Chain], out: Path) -> list[Line]:
    """Rows of all baselines, by name over tasks and folds."""
    found: dict[str, dict[str, list[tuple[Path, Result]]]] = {}
    tunings = [t for chain in chains for t in chain.tunings if t.cell == BASELINES]
    for tuning in tunings:
        for path, result in find_results([out / tuning.folder]):
            for column in columns:
                if (column.task, column.target) == (tuning.task, result.task.target):
                    own = found.setdefault(result.name, {}).setdefault(column.name, [])
                    own.append((path.parent, result))
    lines = []
    for name, by_column in found.items():
        rows = {column: summarize([r for _, r in own]) for column, own in by_column.items()}
        tables = {
            column: [
                read_predictions(folder / PREDICTIONS)[0]
                for folder, _ in own
                if (folder / PREDICTIONS).is_file()
            ]
            for column, own in by_column.items()
        }
        lines.append(Line(name, "baseline", {}, "", rows, tables, {}, {}, None))
    return lines


# --- files ----------------------------------------------------------------------------------------


def as_rows(found: Ablation) -> list[dict[str, Any]]:
    """One flat mapping per line of the table; None = missing."""
    rows = []
    for line in found.lines:
        row: dict[str, Any] = {"name": line.name, "kind": line.kind}
        row |= {f"axis {axis}": label for axis, label in line.values.items()}
        for column in found.columns:
            own = line.rows.get(column.name)
            spread = own.spreads[column.metric] if own else None
            title = f"{column.name} {column.metric}"
            row[f"{title} mean"] = None if spread is None else spread.mean
            row[f"{title} std"] = None if spread is None else spread.std
            row[f"{title} n"] = own.n_units if own else None
            row[f"{title} gap"] = line.gaps.get(column.name)
        for subset, standing in line.standing.items():
            row[f"z-sum {subset}"] = standing.total
            row[f"rank {subset}"] = standing.rank
        if line.cost:
            cost = line.cost
            row |= {"parameters": cost.parameters, "flops per clip": cost.flops}
            row |= {"tokens per clip": cost.tokens, "pretraining clips": cost.clips}
            row |= {"pretraining s": cost.pretraining, "fine-tuning s": cost.finetuning}
        rows.append(row)
    return rows


def write_tables(found: Ablation, pairs: Sequence[Mapping[str, Any]], out: Path) -> None:
    """``ablation.csv``; and ``ablation.json``, which has the paired comparisons as well."""
    rows = as_rows(found)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(out / CSV, text.getvalue().encode())
    body = {"schema": SCHEMA, "subsets": found.subsets, "rows": rows, "pairs": list(pairs)}
    write_atomic(out / JSON, (json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode())

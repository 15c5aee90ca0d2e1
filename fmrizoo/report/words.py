"""The sentences of a report, made from rows of results: who won, by how much, and how sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.results import Result, TaskInfo
from fmrizoo.evaluate.summary import Difference, Row, Spread, difference, rows
from fmrizoo.report.collect import Evidence, Run

CHANCE = "Chance"
LABELS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "mae": "mean absolute error",
    "r2": "R²",
    "pearson_r": "Pearson r",
}
_UNITS = {"event": "events", "run": "runs", "subject": "subjects"}


@dataclass(frozen=True)
class Verdict:
    """The outcome of one task in words.

    Attributes:
        headline: One sentence.
        details: Further sentences (intervals, what pretraining brought).
        short: One line for a terminal.
    """

    headline: str
    details: tuple[str, ...]
    short: str


@dataclass(frozen=True)
class TaskReport:
    """All rows of one task, best first, and what they say."""

    task: TaskInfo
    models: tuple[Row, ...]
    baselines: tuple[Row, ...]
    verdict: Verdict
    warnings: tuple[str, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Models, then baselines."""
        return (*self.models, *self.baselines)

    @property
    def chance(self) -> float | None:
        """Expected primary metric by guessing, the mean of what the rows state."""
        known = [r.chance for r in self.rows if r.chance is not None]
        return sum(known) / len(known) if known else None


def number(value: float | None, digits: int = 3) -> str:
    """``0.583``; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def plus_minus(s: Spread | None) -> str:
    """``0.583 ± 0.021``; without a spread where there is one repetition."""
    if s is None:
        return "–"
    return number(s.mean) + ("" if s.std is None else f" ± {number(s.std)}")


def units(task: TaskInfo, n: int) -> str:
    """``72 test events``."""
    word = _UNITS[task.level]
    return f"{n} test {word if n != 1 else word[:-1]}"


def task_reports(evidence: Evidence) -> list[TaskReport]:
    """One report per task, in order of the first result."""
    every = rows(evidence.results)
    found = []
    for task in dict.fromkeys(r.task for r in every):
        own = [r for r in every if r.task == task]
        models = tuple(r for r in own if r.kind == "finetune")
        baselines = tuple(r for r in own if r.kind == "baseline")
        verdict = _verdict(task, models, baselines, evidence)
        warnings = tuple(_warnings(own, evidence))
        found.append(TaskReport(task, models, baselines, verdict, warnings))
    return found


def _best(candidates: Sequence[Row]) -> Row | None:
    return next((r for r in candidates if r.primary is not None and r.name != CHANCE), None)


def _compare(first: Row, second: Row, evidence: Evidence) -> Difference | None:
    tables = [
        [r.predictions for r in evidence.runs if _belongs(r.result, row) and r.predictions]
        for row in (first, second)
    ]
    return difference(tables[0], tables[1], first.task.kind)


def _belongs(result: Result | None, row: Row) -> bool:
    return result is not None and (result.kind, result.name, result.task) == (
        row.kind,
        row.name,
        row.task,
    )


def _score(row: Row) -> str:
    value = row.primary
    assert value is not None  # rows without a value are never chosen
    name = LABELS[metrics.PRIMARY[row.task.kind]]
    return f"{name} {plus_minus(value)}"


def _verdict(
    task: TaskInfo, models: tuple[Row, ...], baselines: tuple[Row, ...], evidence: Evidence
) -> Verdict:
    model, baseline = _best(models), _best(baselines)
    if model is None or baseline is None:
        return _one_sided(task, model, baseline)
    gap = _compare(model, baseline, evidence)
    a, b = model.primary, baseline.primary
    assert a is not None
    assert b is not None
    ahead = a.mean > b.mean
    winner, loser = (model, baseline) if ahead else (baseline, model)
    who = "the best model" if ahead else "a baseline"
    sure = gap is not None and gap.clear and (_gain(gap, task) > 0) == ahead
    if a.mean == b.mean:
        headline = f"The best model ({model.name}) and the best baseline ({baseline.name}) tie"
    elif sure:
        headline = f"{who.capitalize()} wins: {winner.name} is ahead of {loser.name}"
    else:
        headline = (
            f"No clear winner: {winner.name} ({'model' if ahead else 'baseline'}) is ahead of "
            f"{loser.name}, but by no more than chance could explain"
        )
    if gap is None and a.mean != b.mean:
        headline = f"{winner.name} ({'model' if ahead else 'baseline'}) is ahead of {loser.name}"
    details = [
        f"Best model, {model.name}: {_score(model)}. Best baseline, {baseline.name}: "
        f"{_score(baseline)}, on {units(task, max(model.n_units, baseline.n_units))}."
    ]
    details.append(_interval(gap, task, model.name, baseline.name))
    details += _pretraining(models, evidence)
    short = f"{task.target}: {headline} ({number(a.mean)} vs {number(b.mean)})"
    return Verdict(headline + ".", tuple(details), short)


def _one_sided(task: TaskInfo, model: Row | None, baseline: Row | None) -> Verdict:
    row = model or baseline
    if row is None:
        text = f"No row for {task.target!r} has a score"
        return Verdict(text + ".", (), text)
    what, lacks = ("model", "baseline") if model else ("baseline", "fine-tuned model")
    headline = f"Only half a comparison: there is no {lacks} beside the best {what}, {row.name}"
    detail = f"{row.name}: {_score(row)} on {units(task, row.n_units)}."
    return Verdict(
        headline + ".", (detail,), f"{task.target}: {row.name} {_score(row)}; no {lacks}"
    )


def _gain(gap: Difference, task: TaskInfo) -> float:
    return -gap.mean if task.kind == "regression" else gap.mean


def _interval(gap: Difference | None, task: TaskInfo, first: str, second: str) -> str:
    if gap is None:
        return "No test unit has predictions of both, so how sure this is cannot be said."
    what = "mean absolute error" if task.kind == "regression" else "share correct"
    drawn = "" if gap.group == "unit" else f", drawing whole {gap.group}s ({gap.n_groups})"
    signed = [f"{v:+.3f}".replace("-", "−") for v in (gap.mean, gap.low, gap.high)]
    zero = "leaves out" if gap.clear else "includes"
    return (
        f"Difference in {what}, {first} minus {second}: {signed[0]}, 95 % interval {signed[1]} to "
        f"{signed[2]} over {gap.n_units} test units{drawn}; it {zero} 0."
    )


def _pretraining(models: Sequence[Row], evidence: Evidence) -> list[str]:
    """What pretraining brought: pairs of rows that differ in nothing but the start."""
    said = []
    for trains, words in (("none", "frozen encoder"), ("all", "whole model fine-tuned")):
        pair = {
            init: [r for r in models if r.train_encoder == trains and r.init == init and r.primary]
            for init in ("pretrained", "random")
        }
        if any(len(found) != 1 for found in pair.values()):
            continue
        first, second = pair["pretrained"][0], pair["random"][0]
        gap = _compare(first, second, evidence)
        text = (
            f"Pretraining, {words}: {_score(first)} against {_score(second)} from random weights."
        )
        if gap is not None:
            text += " " + _interval(gap, first.task, "pretrained", "random")
        said.append(text)
    return said


def _warnings(own: Sequence[Row], evidence: Evidence) -> list[str]:
    said = []
    for row in own:
        if not row.complete:
            said.append(
                f"{row.name}: not every seed covers every fold, so its mean and s.d. mix seeds "
                "with folds."
            )
        if row.n_seeds == 1 and row.kind == "finetune":
            said.append(
                f"{row.name}: one seed only; a mean over at least three seeds is the custom here."
            )
    shas = {row.name: {r.split_sha for r in row.results if r.n_test} for row in own}
    shas = {name: found for name, found in shas.items() if found}
    if len({frozenset(found) for found in shas.values()}) > 1:
        said.append(
            "The rows were not all tested on the same splits (the split files' hashes differ), so "
            "they are not strictly comparable."
        )
    for run in evidence.runs:
        if run.result and run.result.task == own[0].task and (n := len(seen_in_test(run))):
            said.append(
                f"{run.label}: the weights it started from were trained on the BOLD of {n} of its "
                "test runs (without labels). It is no test on unseen recordings."
            )
    return said


def seen_in_test(run: Run) -> set[str]:
    """Test runs of a fine-tuned model that its weights have seen in any training."""
    tested = {name for p in run.predictions for name in p.run.split(";")}
    return tested & set(run.model.get("seen_runs") or ())

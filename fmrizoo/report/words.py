"""The sentences of a report, made from rows of results: who won, by how much, and how sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.certainty import Certainty, certainty
from fmrizoo.evaluate.predictions import Prediction
from fmrizoo.evaluate.results import Result, TaskInfo
from fmrizoo.evaluate.statistics import UNITWISE, Paired, holm, paired
from fmrizoo.evaluate.summary import Row, Spread, rows
from fmrizoo.report.collect import Evidence, Run

CHANCE = "Chance"
LEVEL = 0.05  # of a pair's corrected p
LABELS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "mae": "mean absolute error",
    "r2": "R²",
    "pearson_r": "Pearson r",
    "quadratic_kappa": "quadratic kappa",
    "spearman_r": "Spearman r",
}
TRAINED = {
    ("linear", "none"): "linear probe",
    ("linear", "last_block"): "last two layers",
    ("complex", "none"): "complex readout, frozen",
    ("lora", "lora"): "LoRA",
    ("prompt", "prompt"): "prompts",
    ("prompt", "prompts"): "prompts",
}
_UNITS = {"event": "events", "run": "runs", "subject": "subjects"}


@dataclass(frozen=True)
class Verdict:
    """The outcome of one task in words.

    Attributes:
        headline: One sentence.
        detail: The scores behind it.
        pairs: Paired differences: model against baseline, pretrained against random weights.
        short: One line for a terminal.
    """

    headline: str
    detail: str
    pairs: tuple[Pair, ...]
    short: str


@dataclass(frozen=True)
class Pair:
    """Two rows compared.

    Attributes:
        gap: None where no unit was predicted by both.
        p_holm: Its p, corrected for all pairs of the task by Holm's method.
    """

    question: str
    first: Row
    second: Row
    gap: Paired | None
    p_holm: float | None = None

    @property
    def answer(self) -> str:
        """``yes``, ``no`` or ``not clear``: is the first better on these test units?

        Clear is what the interval and, among all pairs of the task, the corrected p say.
        """
        if self.gap is None:
            return "cannot be said: no paired predictions"
        if not self.gap.clear:
            return "not clear: the interval includes 0"
        if self.p_holm is not None and self.p_holm > LEVEL:
            return f"not clear: p is above {LEVEL:g} for so many pairs"
        share = self.first.task.kind == "classification"  # else an error, where less is better
        better = self.gap.mean > 0 if share else self.gap.mean < 0
        return "yes" if better else "no, it is worse"


@dataclass(frozen=True)
class TaskReport:
    """All rows of one task, best first, and what they say.

    Attributes:
        sure: By kind and name of a row that has predictions.
    """

    task: TaskInfo
    models: tuple[Row, ...]
    baselines: tuple[Row, ...]
    verdict: Verdict
    warnings: tuple[str, ...]
    sure: dict[tuple[str, str], Certainty] = field(default_factory=dict)

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


def grouped(count: int) -> str:
    """``1 234 567`` with narrow no-break spaces."""
    return f"{count:,}".replace(",", "\u202f")


def plus_minus(s: Spread | None) -> str:
    """``0.583 ± 0.021``, with a dagger where ± is over folds; the mean alone for one result."""
    if s is None:
        return "–"
    dagger = "†" if s.over == "folds" else ""
    return number(s.mean) + ("" if s.std is None else f" ± {number(s.std)}{dagger}")


def p_word(p: float | None) -> str:
    """``0.012``, ``< 0.001``; a dash for None."""
    return "< 0.001" if p is not None and p < 0.0005 else number(p)


def signed(value: float) -> str:
    """``+0.120``."""
    return f"{value:+.3f}".replace("-", "−")


def trained_words(head: str | None, train_encoder: str) -> str:
    """What of a row's model trained: ``LoRA``, ``last two layers``, …"""
    if train_encoder == "all":
        return "all weights"
    if head is None:  # results of before there was more than one head
        return "encoder frozen" if train_encoder == "none" else train_encoder
    what = "encoder frozen" if train_encoder == "none" else train_encoder
    return TRAINED.get((head, train_encoder), f"{head} head, {what}")


def classes_word(task: TaskInfo) -> str:
    """What the classes of a task are called."""
    return "levels" if task.kind == "ordinal" else "classes"


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
        sure = {(r.kind, r.name): certainty(r, tables_of(r, evidence)) for r in own}
        known = {name: value for name, value in sure.items() if value is not None}
        found.append(TaskReport(task, models, baselines, verdict, warnings, known))
    return found


def best(candidates: Sequence[Row]) -> Row | None:
    """The first with a score that is not chance; rows come best first."""
    return next((r for r in candidates if r.primary is not None and r.name != CHANCE), None)


def _compare(first: Row, second: Row, evidence: Evidence) -> Paired | None:
    kind = first.task.kind
    return paired(tables_of(first, evidence), tables_of(second, evidence), kind, UNITWISE[kind])


def tables_of(row: Row, evidence: Evidence) -> list[Sequence[Prediction]]:
    """Its predictions, one table for each fold and seed."""
    return [r.predictions for r in evidence.runs if _belongs(r.result, row) and r.predictions]


def _corrected(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """The pairs of one task are one family of tests."""
    known = iter(holm([pair.gap.p for pair in pairs if pair.gap]))
    return tuple(replace(pair, p_holm=next(known)) if pair.gap else pair for pair in pairs)


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
    model, baseline = best(models), best(baselines)
    if model is None or baseline is None:
        return _one_sided(task, model, baseline)
    gap = _compare(model, baseline, evidence)
    first = Pair("the best model against the best baseline", model, baseline, gap)
    pairs = _corrected((first, *_pretraining(models, evidence)))
    pair = pairs[0]
    a, b = model.primary, baseline.primary
    assert a is not None
    assert b is not None
    ahead = a.mean > b.mean
    winner, loser = (model, baseline) if ahead else (baseline, model)
    kind = "model" if ahead else "baseline"
    if a.mean == b.mean:
        headline = f"A tie: the best model ({model.name}) and the best baseline ({baseline.name})"
    elif pair.gap is None:
        headline = f"A {kind} has the best score: {winner.name}, ahead of {loser.name}"
    elif pair.answer == ("yes" if ahead else "no, it is worse"):
        headline = f"A {kind} wins: {winner.name} is ahead of {loser.name}"
    else:
        headline = (
            f"No clear winner: {winner.name} (a {kind}) is ahead of {loser.name}, but on other "
            f"{_UNITS[task.level]} it could be the other way round"
        )
    detail = (
        f"Best model, {model.name}: {_score(model)}. Best baseline, {baseline.name}: "
        f"{_score(baseline)}. Tested on {units(task, max(model.n_units, baseline.n_units))}."
    )
    short = f"{task.target}: {headline} ({number(a.mean)} vs {number(b.mean)})"
    if not ahead:
        short = f"{task.target}: {headline} ({number(b.mean)} vs {number(a.mean)})"
    return Verdict(headline + ".", detail, pairs, short)


def _one_sided(task: TaskInfo, model: Row | None, baseline: Row | None) -> Verdict:
    row = model or baseline
    if row is None:
        text = f"No row for {task.target!r} has a score"
        return Verdict(text + ".", "", (), text)
    what, lacks = ("model", "baseline") if model else ("baseline", "fine-tuned model")
    headline = f"Only half a comparison: there is no {lacks} beside the best {what}, {row.name}"
    detail = f"{row.name}: {_score(row)} on {units(task, row.n_units)}."
    short = f"{task.target}: {row.name} {_score(row)}; no {lacks}"
    return Verdict(headline + ".", detail, (), short)


def _pretraining(models: Sequence[Row], evidence: Evidence) -> list[Pair]:
    """Pairs of rows that differ in nothing but the weights they start from."""
    groups: dict[tuple[str, str | None, str], list[Row]] = {}
    for row in models:
        if row.train_encoder and row.primary:
            key = (_backbone(row, evidence), row.head, row.train_encoder)
            groups.setdefault(key, []).append(row)
    several = len({backbone for backbone, _, _ in groups}) > 1
    found = []
    for (backbone, head, trains), own in sorted(groups.items(), key=_cheapest_first):
        first = [r for r in own if r.init == "pretrained"]
        second = [r for r in own if r.init == "random"]
        if len(first) == len(second) == 1:
            gap = _compare(first[0], second[0], evidence)
            what = trained_words(head, trains) + (f", {backbone}" if several and backbone else "")
            found.append(
                Pair(f"pretrained against random weights: {what}", first[0], second[0], gap)
            )
    return found


def _cheapest_first(group: tuple[tuple[str, str | None, str], list[Row]]) -> tuple[str, int, str]:
    (backbone, head, trains), own = group
    size = min((r.parameters.trainable for r in own if r.parameters), default=0)
    return backbone, size, f"{head}{trains}"


def _backbone(row: Row, evidence: Evidence) -> str:
    """Name of the row's backbone; empty if no recipe says it."""
    mine = (r.recipe.get("backbone") for r in evidence.runs if _belongs(r.result, row))
    return next((str(b["name"]) for b in mine if isinstance(b, dict) and "name" in b), "")


def _warnings(own: Sequence[Row], evidence: Evidence) -> list[str]:
    said = []
    if torn := [row.name for row in own if not row.complete]:
        said.append(
            f"{'; '.join(torn)}: not every seed covers every fold, so mean and s.d. mix seeds "
            "with folds."
        )
    if once := [row.name for row in own if row.n_seeds == 1 and row.kind == "finetune"]:
        names = "; ".join(once) if len(once) < 4 else f"{len(once)} models"
        said.append(f"{names}: one seed only; a mean over at least three seeds is the custom here.")
    for row in own:
        mine = [r for r in evidence.runs if _belongs(r.result, row)]
        leaky = [r for r in mine if seen_in_test(r)]
        if leaky:
            seen = set().union(*map(seen_in_test, leaky))
            said.append(
                f"{row.name}: in {len(leaky)} of {len(mine)} results the weights had been trained "
                f"on the BOLD of test runs ({len(seen)} runs, such as {min(seen)}; without their "
                "labels). That is no test on unseen recordings."
            )
    shas = {row.name: {r.split_sha for r in row.results if r.n_test} for row in own}
    shas = {name: found for name, found in shas.items() if found}
    if len({frozenset(found) for found in shas.values()}) > 1:
        said.append(
            "The rows were not all tested on the same splits (the split files' hashes differ), so "
            "they are not strictly comparable."
        )
    return said


def seen_in_test(run: Run) -> set[str]:
    """Test runs of a fine-tuned model that its weights have seen in any training."""
    tested = {name for p in run.predictions for name in p.run.split(";")}
    return tested & set(run.model.get("seen_runs") or ())

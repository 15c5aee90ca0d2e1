"""Predictions per unit (event, run or subject): from clips to units, and as a TSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.files import write_atomic
from fmrizoo.types import TaskSpec

_FIXED = ["unit", "subject", "run", "target", "predicted", "n_clips"]
_SCORE = "score_"


@dataclass(frozen=True)
class Prediction:
    """What was predicted for one unit.

    Attributes:
        unit: Name of the event, run or subject; unique in a table.
        subject: Subject of the unit.
        run: Run of the unit; several joined by ``;`` where a unit spans runs.
        target: Index of the class or level, or the value (regression).
        scores: One logit per class, one log-probability per level, or the predicted value in the
            target's own unit.
        n_clips: Clips averaged.
    """

    unit: str
    subject: str
    run: str
    target: float
    scores: tuple[float, ...]
    n_clips: int = 1


def aggregate(clips: Iterable[Prediction]) -> list[Prediction]:
    """Clips of the same unit → one prediction, in order of first appearance.

    Scores are averaged, weighted by ``n_clips``: for classification the **logits**, as SwiFT does,
    not the probabilities (a clip without evidence has equal logits and leaves the others' ranking
    alone; averaged probabilities would pull towards 1/k). For levels likewise the
    log-probabilities.

    Raises:
        DataError: clips of one unit that disagree on target, subject or number of scores.
    """
    groups: dict[str, list[Prediction]] = {}
    for clip in clips:
        groups.setdefault(clip.unit, []).append(clip)
    return [_merge(unit, members) for unit, members in groups.items()]


def _merge(unit: str, clips: list[Prediction]) -> Prediction:
    first = clips[0]
    for clip in clips[1:]:
        if (clip.target, clip.subject, len(clip.scores)) != (
            first.target,
            first.subject,
            len(first.scores),
        ):
            raise DataError(
                f"clips of unit {unit!r} disagree: target {first.target} of subject "
                f"{first.subject}, then target {clip.target} of subject {clip.subject}"
            )
    n = np.array([c.n_clips for c in clips], dtype=np.float64)
    mean = n @ np.array([c.scores for c in clips], dtype=np.float64) / n.sum()
    run = ";".join(dict.fromkeys(c.run for c in clips))
    return Prediction(unit, first.subject, run, first.target, tuple(mean.tolist()), int(n.sum()))


def evaluate(predictions: Sequence[Prediction], kind: str) -> metrics.Metrics:
    """Metrics over units.

    Raises:
        DataError: no unit, or a unit that occurs twice (clips not yet aggregated).
    """
    if len({p.unit for p in predictions}) != len(predictions):
        raise DataError("a unit occurs twice among the predictions: aggregate clips to units first")
    scores = np.array([p.scores for p in predictions], dtype=np.float64)
    return metrics.score(kind, [p.target for p in predictions], scores)


def write_predictions(path: Path, predictions: Sequence[Prediction], task: TaskSpec) -> None:
    """One row a unit: names instead of class indices, one ``score_<class>`` column per class.

    Scores are logits (classification), log-probabilities of the levels (ordinal, where
    ``predicted`` is the median level) or absent (regression, where ``predicted`` is the value);
    numbers keep all their digits, so reading gives equal rows.

    Raises:
        DataError: a row with another number of scores than the task has, or no disk space.
    """
    out = io.StringIO()
    table = csv.writer(out, delimiter="\t", lineterminator="\n")
    table.writerow([*_FIXED, *(f"{_SCORE}{c}" for c in task.classes)])
    for p in predictions:
        if len(p.scores) != task.scores:
            raise DataError(f"unit {p.unit!r} has {len(p.scores)} scores, expected {task.scores}")
        if task.kind == "regression":
            answer, scores = [repr(float(p.target)), repr(float(p.scores[0]))], []
        else:
            answer = [task.classes[int(p.target)], task.classes[answered(p, task.kind)]]
            scores = [repr(float(s)) for s in p.scores]
        table.writerow([p.unit, p.subject, p.run, *answer, p.n_clips, *scores])
    write_atomic(path, out.getvalue().encode())


def answered(prediction: Prediction, kind: str) -> int:
    """Index of the predicted class (the largest score) or level (the median)."""
    if kind == "ordinal":
        return int(metrics.median_level(prediction.scores))
    return int(np.argmax(prediction.scores))


def read_predictions(path: Path) -> tuple[list[Prediction], tuple[str, ...]]:
    """Inverse of :func:`write_predictions`: rows and names of classes or levels (none for
    regression).

    Raises:
        DataError: no such file, other columns, or a row that does not parse (line named).
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            lines = list(csv.reader(stream, delimiter="\t"))
    except OSError as error:
        raise DataError(f"predictions {path} cannot be read: {error.strerror}") from error
    header = lines[0] if lines else []
    scored = header[len(_FIXED) :]
    if header[: len(_FIXED)] != _FIXED or not all(c.startswith(_SCORE) for c in scored):
        raise DataError(f"{path} is not a predictions table: its columns are {header}")
    classes = tuple(c.removeprefix(_SCORE) for c in scored)
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(_parse(line, header, classes))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    return rows, classes


def _parse(line: list[str], header: list[str], classes: tuple[str, ...]) -> Prediction:
    if len(line) != len(header):
        raise ValueError(f"{len(line)} columns, expected {len(header)}")
    unit, subject, run, target, predicted, n_clips, *scores = line
    if not classes:
        return Prediction(unit, subject, run, float(target), (float(predicted),), int(n_clips))
    if target not in classes:
        raise ValueError(f"target {target!r} is none of {list(classes)}")
    index, logits = float(classes.index(target)), tuple(float(s) for s in scores)
    return Prediction(unit, subject, run, index, logits, int(n_clips))

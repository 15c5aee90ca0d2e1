"""From predictions to the files of an evaluated run: one result per target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmrizoo.data.clips import ClipTable
from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.metrics import Metrics, Values
from fmrizoo.evaluate.predictions import Prediction, evaluate, write_predictions
from fmrizoo.evaluate.results import FILE, Parameters, Result, TaskInfo, read_result, write_result
from fmrizoo.types import TaskSpec

PREDICTIONS = "predictions.tsv"
TARGETS = "targets"  # folder of a run with several targets; one folder in it for each

Units = Mapping[str, Sequence[Prediction]]


@dataclass(frozen=True)
class RunFacts:
    """What the results of one run share; see :class:`fmrizoo.evaluate.results.Result`."""

    name: str
    fold: int
    seed: int
    level: str
    split_sha: str
    seconds: float
    init: str | None = None
    head: str | None = None
    train_encoder: str | None = None
    parameters: Parameters | None = None
    note: str | None = None


def target_folders(folder: Path, targets: Sequence[str], below: str = TARGETS) -> dict[str, Path]:
    """Where the results of each target lie: ``folder`` for one, ``folder/targets/<name>`` for more.

    Characters that are trouble in a file name become ``-``. ``below`` is another name for
    ``targets``; empty: ``folder/<name>``.

    Raises:
        DataError: two targets would share a folder.
    """
    if len(targets) == 1:
        return {targets[0]: folder}
    names = {target: _plain(target) for target in targets}
    if len({name.lower() for name in names.values()}) < len(targets):
        raise DataError(f"targets {list(targets)} need folder names that differ: rename a column")
    return {target: folder / below / name for target, name in names.items()}


def _plain(name: str) -> str:
    plain = "".join(c if c.isalnum() or c in "_-+" else "-" for c in name)
    return plain.strip("-") or "target"


def write_run_results(
    folder: Path,
    facts: RunFacts,
    tasks: Sequence[TaskSpec],
    train: ClipTable,
    test: Units,
    validation: Units | None = None,
) -> dict[str, Result]:
    """Score a run and write ``predictions.tsv`` and ``results.json`` of each target.

    Args:
        folder: The run's; see :func:`target_folders`.
        facts: What the results share.
        tasks: The targets.
        train: Labelled clips of the training part: chance is what their labels let one guess, one
            vote per unit.
        test, validation: Predictions by target (:func:`fmrizoo.evaluate.inference.predict_units`).

    Returns:
        The results by target, in the order of ``tasks``. A target that no test unit has a label of
        gets an empty one that says so.
    """
    units = train.unit_labels()
    folders = target_folders(folder, [task.name for task in tasks])
    found = {}
    for k, task in enumerate(tasks):
        own = [task.target_of(labels[k]) for labels in units.values()]
        known = [value for value in own if not math.isnan(value)]
        held_out = validation[task.name] if validation else []
        result = _result(facts, task, known, test[task.name], held_out)
        write_predictions(folders[task.name] / PREDICTIONS, test[task.name], task)
        write_result(folders[task.name], result)
        found[task.name] = result
    return found


def read_run_results(folder: Path, targets: Sequence[str]) -> dict[str, Result] | None:
    """What :func:`write_run_results` wrote; None unless every target has its results.

    Raises:
        DataError: a file that cannot be read.
    """
    folders = target_folders(folder, targets)
    if not all((path / FILE).is_file() for path in folders.values()):
        return None
    return {target: read_result(path) for target, path in folders.items()}


def _result(
    facts: RunFacts,
    task: TaskSpec,
    train: Sequence[float],
    test: Sequence[Prediction],
    validation: Sequence[Prediction],
) -> Result:
    scored, chance, note = _no_score(task), None, facts.note
    if test:
        scored = evaluate(test, task.kind)
        guess = metrics.chance(task.kind, train, [p.target for p in test], len(task.classes))
        chance = guess[metrics.PRIMARY[task.kind]]
    else:
        note = "; ".join(filter(None, (note, f"no test unit has a label {task.name!r}")))
    held_out: Values | None = evaluate(validation, task.kind).values if validation else None
    return Result(
        kind="finetune",
        name=facts.name,
        fold=facts.fold,
        seed=facts.seed,
        task=TaskInfo(task.name, task.kind, task.classes, facts.level),
        n_test=scored.n,
        chance=chance,
        metrics=scored.values,
        seconds=facts.seconds,
        split_sha=facts.split_sha,
        validation=held_out,
        init=facts.init,
        head=facts.head,
        train_encoder=facts.train_encoder,
        parameters=facts.parameters,
        note=note,
    )


def _no_score(task: TaskSpec) -> Metrics:
    return Metrics(dict.fromkeys(metrics.names(task.kind)), 0)

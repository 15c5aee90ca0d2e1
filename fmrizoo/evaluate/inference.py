"""A model's predictions of labelled clips: for each target, one row per unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fmrizoo.data.batch import ClipFacts, CompactBatch
from fmrizoo.errors import DataError
from fmrizoo.evaluate.predictions import Prediction, aggregate
from fmrizoo.types import Batch, TaskSpec


@torch.no_grad()
def predict_units(
    predict: Callable[[Batch], Tensor],
    batches: Iterable[CompactBatch],
    tasks: Sequence[TaskSpec],
    device: torch.device | str = "cpu",
) -> dict[str, list[Prediction]]:
    """Run ``predict`` over labelled clips and average the scores of each unit's clips.

    Args:
        predict: ``Batch`` → ``(b, Σ TaskSpec.scores)``, such as
            :meth:`fmrizoo.model.DownstreamModel.predict`; put the model in ``eval()`` first.
        batches: Clips of one part of a split, each once (``Loader(…, tasks=tasks).epoch()``).
        tasks: The targets, in the order of the scores.

    Returns:
        What :func:`unit_predictions` does.

    Raises:
        DataError: see there.
    """
    scores: list[Tensor] = []
    facts: list[ClipFacts] = []
    for compact in batches:
        scores.append(predict(compact.to_batch(device)).float().cpu())
        facts += [sample.facts for sample in compact.samples]
    if not scores:
        raise DataError("there is no clip to predict")
    return unit_predictions(torch.cat(scores), facts, tasks)


def unit_predictions(
    scores: Tensor, facts: Sequence[ClipFacts], tasks: Sequence[TaskSpec]
) -> dict[str, list[Prediction]]:
    """Scores of clips → one prediction per unit, for each target by its name.

    Args:
        scores: ``(n, Σ TaskSpec.scores)`` of all targets side by side.
        facts: Of the ``n`` clips, in the same order (``ClipDataset.facts``).
        tasks: The targets, in the order of the scores.

    A unit without a label of a target is not in that target's list.

    Raises:
        DataError: another number of scores or clips, clips without targets, or clips of one unit
            that disagree.
    """
    width = sum(task.scores for task in tasks)
    if scores.shape != (len(facts), width):
        raise DataError(
            f"scores must be (clips, scores of all targets) = {(len(facts), width)}, got "
            f"{tuple(scores.shape)}"
        )
    if bad := next((fact for fact in facts if len(fact.targets) != len(tasks)), None):
        raise DataError(
            f"a clip of run {bad.run} has {len(bad.targets)} targets to be compared with, not "
            f"{len(tasks)}: give the loader the model's tasks"
        )
    found: dict[str, list[Prediction]] = {}
    parts = torch.split(scores, [task.scores for task in tasks], 1)
    for k, (task, own) in enumerate(zip(tasks, parts, strict=True)):
        # Targets not of a batch: there an age of 31.4 has been rounded to float32.
        rows = [
            Prediction(fact.unit, fact.subject, fact.run, float(fact.targets[k]), tuple(values))
            for fact, values in zip(facts, own.tolist(), strict=True)
            if not math.isnan(fact.targets[k])
        ]
        found[task.name] = aggregate(rows)
    return found

"""Losses and predictions of one target or several, from a head's outputs side by side.

Shape letters: ``b`` samples, ``o`` outputs of all targets, ``k`` classes or levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrizoo.errors import DataError
from fmrizoo.types import TaskSpec

LEAST_STEP = 1e-6  # between the logits of neighbouring levels: keeps log-probabilities finite


def total_loss(tasks: Sequence[TaskSpec], outputs: Tensor, target: Tensor) -> Tensor:
    """Sum over the targets of the mean loss of the samples that have a label.

    A sample's loss is multiplied by the weight of its class; the mean is over the number of
    labelled samples, not over the sum of the weights. Without any label it is 0, with a gradient
    of 0.

    Args:
        tasks: What the columns are.
        outputs: ``(b, o)``, :attr:`TaskSpec.outputs` columns each.
        target: ``(b,)`` or ``(b, tasks)``: class index or value, NaN where missing.

    Raises:
        DataError: not one target column a task.
    """
    columns = target.unsqueeze(1) if target.ndim == 1 else target
    if columns.shape != (len(outputs), len(tasks)):
        raise DataError(
            f"targets must be {(len(outputs), len(tasks))} (samples, targets), "
            f"got {tuple(target.shape)}"
        )
    parts = torch.split(outputs, [task.outputs for task in tasks], 1)
    losses = []
    for task, part, column in zip(tasks, parts, columns.unbind(1), strict=True):
        labelled = ~column.isnan() if column.is_floating_point() else torch.ones_like(column).bool()
        each = sample_loss(task, part[labelled], column[labelled])
        losses.append(each.sum() / max(len(each), 1))
    return torch.stack(losses).sum()


def sample_loss(task: TaskSpec, outputs: Tensor, target: Tensor) -> Tensor:
    """``(b,)`` loss of each sample, weighted by its class.

    Classification: cross-entropy with the labels smoothed. Regression: squared error of the
    scaled value. Ordinal: binary cross-entropy of "above level j?", averaged over the levels but
    the last (Cao et al. 2020, eq. 4, there as a sum), which makes a target weigh alike however
    many levels it has.

    Args:
        task: What is predicted.
        outputs: ``(b, task.outputs)``.
        target: ``(b,)`` class index or value, none missing.
    """
    outputs = widened(outputs)
    if task.kind == "regression":
        scaled = (target.to(outputs.dtype) - task.mean) / task.std
        return (outputs.squeeze(1) - scaled).square()
    index = target.long()
    if task.kind == "classification":
        loss = F.cross_entropy(outputs, index, reduction="none", label_smoothing=task.smoothing)
    else:
        steps = torch.arange(task.outputs, device=outputs.device)
        above = (index.unsqueeze(1) > steps).to(outputs.dtype)
        loss = F.binary_cross_entropy_with_logits(outputs, above, reduction="none").mean(1)
    if not task.weights:
        return loss
    return loss * torch.tensor(task.weights, dtype=loss.dtype, device=loss.device)[index]


def all_scores(tasks: Sequence[TaskSpec], outputs: Tensor) -> Tensor:
    """``(b, Σ TaskSpec.scores)`` fp32 predictions of ``outputs (b, o)``.

    Logits, log-probabilities of the levels, or the value in the target's own unit.
    """
    parts = torch.split(outputs.float(), [task.outputs for task in tasks], 1)
    found = []
    for task, part in zip(tasks, parts, strict=True):
        if task.kind == "ordinal":
            part = level_scores(part)
        elif task.kind == "regression":
            part = part * task.std + task.mean
        found.append(part)
    return torch.cat(found, 1)


def level_scores(logits: Tensor) -> Tensor:
    """Logits of "above level j" ``(b, k − 1)``, not rising → log-probabilities ``(b, k)``.

    With σ(a) = P(y > j − 1) and σ(c) = P(y > j): σ(a) − σ(c) = σ(a) σ(−c) (1 − exp(c − a)), which
    loses no digits however near 0 or 1 both are. Equal neighbours count as ``LEAST_STEP`` apart.
    """
    step = (logits[:, :-1] - logits[:, 1:]).clamp(min=LEAST_STEP)
    between = F.logsigmoid(logits[:, :-1]) + F.logsigmoid(-logits[:, 1:])
    between = between + torch.log(-torch.expm1(-step))
    lowest, highest = F.logsigmoid(-logits[:, :1]), F.logsigmoid(logits[:, -1:])
    return torch.cat([lowest, between, highest], 1)


def widened(values: Tensor) -> Tensor:
    """At least fp32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

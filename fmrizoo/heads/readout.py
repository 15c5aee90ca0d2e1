"""From features to outputs: pooling, norm, dropout, one linear map for all targets.

Shape letters: ``b`` samples, ``d`` features, ``o`` outputs of all targets, ``k`` levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrizoo.errors import DataError
from fmrizoo.heads.base import TaskHead, check_choice, check_share
from fmrizoo.layers.readout import scaled
from fmrizoo.types import POOLING, Backbone, Features, TaskSpec

NORMS = ("none", "layer", "batch")


@dataclass
class ReadoutConfig:
    """What follows the encoder: pooling, norm, dropout, a linear layer."""

    name: str = ""
    pool: str = "mean"  # mean | brain (by brain share) | space, frame (mean over time, space only)
    norm: str = "none"  # of the pooled features: none | layer | batch (no learned scale)
    dropout: float = 0.0  # on the pooled features

    def __post_init__(self) -> None:
        check_choice("pool", self.pool, POOLING)
        check_choice("norm", self.norm, NORMS)
        check_share("dropout", self.dropout)


class TaskLinear(nn.Module):
    """Linear map to the outputs of all targets, ``(b, width)`` → ``(b, o)``.

    Classes and values have a row and a bias for every output. An ordinal target has one row, whose
    score s all its levels share, and ordered cut points: the cumulative link model of McCullagh
    1980 with the logit link, as a network's last layer (Cao et al. 2020, CORAL)::

        logit P(y > level j) = s + bias_0 − Σ_{i=1..j} softplus(bias_i),   j = 0 … k − 2

    These never rise with j (softplus ≥ 0), hence no level has a negative probability; Cao et al.
    reach the order at the optimum only. At the start, with s = 0, all levels are equally likely.

    Args:
        width: Of the input.
        tasks: What is put out.

    Attributes:
        multiplies, multiplier: On the input, see :class:`fmrizoo.layers.readout.ScaledLinear`.
    """

    multiplies: ClassVar[str] = "output"
    multiplier: float = 1.0

    def __init__(self, width: int, tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        rows = [1 if task.kind == "ordinal" else task.outputs for task in tasks]
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(sum(rows), width))
        self.bias = nn.Parameter(torch.empty(sum(task.outputs for task in tasks)))
        nn.init.trunc_normal_(self.weight, std=0.01)
        with torch.no_grad():
            self.bias.copy_(torch.cat([_first_bias(task) for task in tasks]))

    def forward(self, x: Tensor) -> Tensor:
        """``(b, width)`` → ``(b, o)``."""
        x = scaled(x, self.multiplier)
        if all(task.kind != "ordinal" for task in self.tasks):
            return F.linear(x, self.weight, self.bias)
        parts = torch.split(F.linear(x, self.weight), self.rows, 1)
        biases = torch.split(self.bias, [task.outputs for task in self.tasks])
        found = []
        for task, part, bias in zip(self.tasks, parts, biases, strict=True):
            if task.kind == "ordinal":
                # At least fp32: cut points that lie near each other must stay apart.
                bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
                down = torch.cat([bias.new_zeros(1), F.softplus(bias[1:]).cumsum(0)])
                bias = bias[0] - down
            found.append(part + bias)
        return torch.cat(found, 1)

    @torch.no_grad()
    def fold_multiplier(self) -> None:
        """Multiply it into the weight, not the biases: the same outputs with a multiplier of 1."""
        self.weight.mul_(self.multiplier)
        self.multiplier = 1.0

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.weight.shape[1]}, {len(self.bias)}"


def _first_bias(task: TaskSpec) -> Tensor:
    if task.kind != "ordinal":
        return torch.zeros(task.outputs)
    k = len(task.classes)
    logits = torch.tensor([log((k - 1 - j) / (j + 1)) for j in range(k - 1)])
    return torch.cat([logits[:1], torch.log(torch.expm1(logits[:-1] - logits[1:]))])


class ReadoutHead(TaskHead):
    """``TaskLinear(dropout(norm(pool(features))))`` on the last stage."""

    def __init__(
        self, config: ReadoutConfig, *, backbone: Backbone, tasks: Sequence[TaskSpec]
    ) -> None:
        super().__init__(tasks)
        self.config = config
        slots = [c // r for c, r in zip(backbone.clip_grid, backbone.reduction, strict=True)]
        places = {"space": prod(slots[:3]), "frame": slots[3]}.get(config.pool, 1)
        width = backbone.num_features * places
        self.norm: nn.Module = nn.Identity()
        if config.norm == "layer":
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
        elif config.norm == "batch":
            self.norm = nn.BatchNorm1d(width, affine=False)
        self.dropout = nn.Dropout(config.dropout)
        self.project = TaskLinear(width, self.tasks)

    def read(self, stages: Sequence[Features]) -> tuple[Tensor, ...]:
        """``(b, width)`` pooled features.

        Raises:
            DataError: places or frames that the head was not built for.
        """
        pooled = stages[-1].pooled(self.config.pool)
        if pooled.shape[1] != (width := self.project.weight.shape[1]):
            raise DataError(
                f"a head with pool={self.config.pool} built for {width} pooled features got "
                f"{pooled.shape[1]}: clips must have the voxels and frames of the backbone's "
                "clip_grid, or take pool=mean"
            )
        return (pooled,)

    def answer(self, read: Sequence[Tensor]) -> Tensor:
        """``(b, o)``."""
        (pooled,) = read
        normed = self.norm(pooled.to(self.project.weight.dtype))
        outputs: Tensor = self.project(self.dropout(normed))
        return outputs

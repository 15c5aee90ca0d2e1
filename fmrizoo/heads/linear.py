"""A linear layer on pooled features: the linear probe, and plain fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from fmrizoo.errors import RecipeError
from fmrizoo.registry import register_head, suggest
from fmrizoo.types import POOLING, Backbone, Features, Head, TaskSpec

TRAIN_ENCODER = ("none", "all")
NORMS = ("none", "layer", "batch")


@dataclass
class LinearConfig:
    """Linear layer on pooled features; the encoder frozen (probe) or trained."""

    name: str = "linear"
    train_encoder: str = "none"  # none: frozen, a linear probe | all: full fine-tuning
    pool: str = "mean"  # mean | brain (weighted by brain share) | space (mean over time only)
    norm: str = "none"  # of the pooled features: none | layer | batch (no learned scale)
    dropout: float = 0.0  # on the pooled features
    label_smoothing: float = 0.0  # classification only

    def __post_init__(self) -> None:
        choices = {"train_encoder": TRAIN_ENCODER, "pool": POOLING, "norm": NORMS}
        for key, known in choices.items():
            value = getattr(self, key)
            if value not in known:
                raise RecipeError(
                    f"head.{key}={value!r} is not known.{suggest(value, list(known))}"
                )
        for key in ("dropout", "label_smoothing"):
            if not 0 <= (share := getattr(self, key)) < 1:
                raise RecipeError(f"head.{key} is a share in [0, 1), got {share}")


@register_head("linear", LinearConfig)
class LinearHead(Head):
    """``Linear(norm(pool(features)))``."""

    def __init__(self, config: LinearConfig, *, backbone: Backbone, task: TaskSpec) -> None:
        super().__init__()
        self.config = config
        self.task = task
        width = backbone.num_features
        if config.pool == "space":
            cells = zip(backbone.clip_grid[:3], backbone.reduction[:3], strict=True)
            width *= prod(c // r for c, r in cells)
        self.norm: nn.Module = nn.Identity()
        if config.norm == "layer":
            self.norm = nn.LayerNorm(width, elementwise_affine=False)
        elif config.norm == "batch":
            self.norm = nn.BatchNorm1d(width, affine=False)
        self.dropout = nn.Dropout(config.dropout)
        self.project = nn.Linear(width, task.outputs)
        nn.init.trunc_normal_(self.project.weight, std=0.01)
        nn.init.zeros_(self.project.bias)

    def attach(self, backbone: Backbone) -> None:
        """Freeze the whole encoder unless it is to be trained."""
        if not self.encoder_trains():
            backbone.requires_grad_(False)

    def encoder_trains(self) -> bool:
        """Whether gradients reach the encoder."""
        return self.config.train_encoder == "all"

    def forward(self, features: Features) -> Tensor:
        """``(b, task.outputs)``."""
        pooled = features.pooled(self.config.pool).to(self.project.weight.dtype)
        outputs: Tensor = self.project(self.dropout(self.norm(pooled)))
        return outputs

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, or mean squared error of the scaled target."""
        if self.task.kind == "classification":
            return F.cross_entropy(
                outputs.float(), target.long(), label_smoothing=self.config.label_smoothing
            )
        scaled = (target.float() - self.task.mean) / self.task.std
        return F.mse_loss(outputs.float().squeeze(-1), scaled)

"""A backbone with an objective (pretraining) or with a head (downstream): what the trainer runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmrizoo.errors import RecipeError
from fmrizoo.types import Backbone, Batch, Features, Head, Objective, Reconstruction


class PretrainingModel(nn.Module):
    """``loss, logs = model(batch)`` for a backbone and an objective."""

    def __init__(self, backbone: Backbone, objective: Objective) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and detached scalars for the log."""
        loss, logs = self.objective(self.backbone, batch)
        return loss, logs

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """What the model fills in (no gradients)."""
        return self.objective.reconstruct(self.backbone, batch)

    def forecast(self, batch: Batch, frames: int) -> Tensor:
        """``(b, x, y, z, frames)`` expected after the clips (no gradients)."""
        return self.objective.forecast(self.backbone, batch, frames)


class DownstreamModel(nn.Module):
    """``loss, logs = model(batch)`` for a backbone and a head; ``predict`` for the outputs."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        head.attach(backbone)

    def train(self, mode: bool = True) -> DownstreamModel:
        """Frozen means frozen: an encoder that does not train stays in ``eval()``."""
        super().train(mode)
        if not self.head.encoder_trains():
            self.backbone.eval()
        return self

    def encode(self, batch: Batch) -> Features:
        """The head's view of the encoder; no graph is built through a frozen one."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.head.encoder_trains()):
            features: Features = self.backbone.encode(self.backbone.read(batch))
        return features

    def predict(self, batch: Batch) -> Tensor:
        """``(b, outputs)``: logits, or the target in its own unit for regression."""
        outputs: Tensor = self.head(self.encode(batch))
        task = self.head.task
        return outputs * task.std + task.mean if task.kind == "regression" else outputs

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and detached scalars for the log."""
        if batch.target is None:
            raise RecipeError("fine-tuning needs batches with targets")
        loss = self.head.loss(self.head(self.encode(batch)), batch.target)
        return loss, {"loss": loss.detach()}

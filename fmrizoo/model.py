"""A backbone with an objective (pretraining) or with a head (downstream): what the trainer runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmrizoo.errors import RecipeError
from fmrizoo.mup import Parametrization
from fmrizoo.types import Backbone, Batch, Features, Head, Objective, ReadBatch, Reconstruction


class PretrainingModel(nn.Module):
    """``loss, logs = model(batch)`` for a backbone and an objective."""

    parametrization: Parametrization | None = None  # None: PyTorch's own

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

    parametrization: Parametrization | None = None  # None: PyTorch's own

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        head.attach(backbone)

    def train(self, mode: bool = True) -> DownstreamModel:
        """Frozen means frozen: what does not train of the encoder stays in ``eval()``."""
        super().train(mode)
        self.backbone.eval()
        for module in self.head.trained_modules(self.backbone):
            module.train(mode)
        return self

    def lr_scales(self) -> dict[str, float]:
        """Factor on the learning rate by parameter name; 1 where not named."""
        scales = self.head.lr_scales(self.backbone)
        return {f"backbone.{name}": scale for name, scale in scales.items()}

    def encode(self, batch: Batch) -> list[Features]:
        """The stages that the head reads; no graph is built through a frozen encoder."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.head.encoder_trains()):
            return self.backbone.encode_stages(
                self.backbone.read(batch), self.head.stages, prompts=self.head.prompts()
            )

    def read(self, batch: Batch) -> tuple[Tensor, ...]:
        """What the head needs of the encoder, ``(b, …)`` each: may be kept if that is frozen."""
        return self.head.read(self.encode(batch))

    def outputs(self, batch: Batch | ReadBatch) -> Tensor:
        """``(b, o)``: logits and scaled values of all targets side by side."""
        return self.head.answer(batch.read if isinstance(batch, ReadBatch) else self.read(batch))

    def predict(self, batch: Batch | ReadBatch) -> Tensor:
        """``(b, Σ scores)``, see :meth:`fmrizoo.types.Head.scores`."""
        return self.head.scores(self.outputs(batch))

    def forward(self, batch: Batch | ReadBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss and detached scalars for the log."""
        if batch.target is None:
            raise RecipeError("fine-tuning needs batches with targets")
        loss = self.head.loss(self.outputs(batch), batch.target)
        return loss, {"loss": loss.detach()}

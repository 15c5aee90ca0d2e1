"""What every pretraining objective offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fmrizoo.errors import RecipeError
from fmrizoo.types.backbone import Backbone
from fmrizoo.types.batch import Batch


class Objective(nn.Module):
    """Base of every pretraining objective: ``loss, logs = objective(backbone, batch)``.

    Attributes:
        needs: Properties that ``Backbone.supports`` must hold.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def forward(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss with gradient, and detached scalars for the log."""
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(self, backbone: Backbone, batch: Batch) -> Reconstruction:
        """What the model fills in, for pictures and checks."""
        raise NotImplementedError

    @torch.no_grad()
    def forecast(self, backbone: Backbone, batch: Batch, frames: int) -> Tensor:
        """``(b, x, y, z, frames)``: what the model expects after the clips.

        Raises:
            RecipeError: this objective does not train a model to forecast.
        """
        raise RecipeError(
            f"{type(self).__name__} does not learn to forecast: train with objective=autoregressive"
        )


@dataclass
class Reconstruction:
    """What a model filled in, ``(b, x, y, z, t)`` each; ``masked`` True = hidden from the model."""

    truth: Tensor
    predicted: Tensor
    masked: Tensor

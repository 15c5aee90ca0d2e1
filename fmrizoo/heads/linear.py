"""A linear layer on pooled features: the linear probe, last-block and full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fmrizoo.errors import RecipeError
from fmrizoo.heads.base import check_choice, modules_named, parameter_layers
from fmrizoo.heads.readout import ReadoutConfig, ReadoutHead
from fmrizoo.registry import register_head
from fmrizoo.types import Backbone, TaskSpec

TRAIN_ENCODER = ("none", "last_block", "all")
LAST_LAYERS = 2  # what last_block trains


@dataclass
class LinearConfig(ReadoutConfig):
    """Linear layer on pooled features; the encoder frozen, trained, or its last two layers."""

    name: str = "linear"
    train_encoder: str = "none"  # none: a linear probe | last_block: last two layers | all
    layer_decay: float = 1.0  # learning rate: × this per layer away from the head; 1: all alike

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("train_encoder", self.train_encoder, TRAIN_ENCODER)
        if not 0 < self.layer_decay <= 1:
            raise RecipeError(f"head.layer_decay is a factor in (0, 1], got {self.layer_decay}")
        if self.layer_decay < 1 and self.train_encoder == "none":
            raise RecipeError(
                f"head.layer_decay={self.layer_decay} has nothing to act on: the encoder is frozen "
                "(head.train_encoder=none)"
            )


@register_head("linear", LinearConfig)
class LinearHead(ReadoutHead):
    """``Linear(norm(pool(features)))``."""

    variants = tuple({"train_encoder": how} for how in TRAIN_ENCODER)
    config: LinearConfig

    def __init__(
        self, config: LinearConfig, *, backbone: Backbone, tasks: Sequence[TaskSpec]
    ) -> None:
        super().__init__(config, backbone=backbone, tasks=tasks)

    @property
    def trains(self) -> str:
        """``none``, ``last_block`` or ``all``."""
        return self.config.train_encoder

    def attach(self, backbone: Backbone) -> None:
        """Freeze what is not to train; what the encoder itself never trains stays frozen.

        Raises:
            RecipeError: nothing is left to train, since the encoder came frozen.
        """
        if self.config.train_encoder == "none":
            self._freeze(backbone)
            return
        if self.config.train_encoder == "last_block":
            layers = parameter_layers(backbone)
            first = self._first_layer(backbone)
            self._freeze(backbone, [name for name, layer in layers.items() if layer >= first])
        if not any(p.requires_grad for p in backbone.parameters()):
            raise RecipeError(
                f"head.train_encoder={self.config.train_encoder} finds nothing to train: the "
                "encoder is frozen already (Head.release lets it train again)"
            )

    @staticmethod
    def _first_layer(backbone: Backbone) -> int:
        """The first of the last layers; an encoder of a single layer has no more than that."""
        return max(1, len(backbone.layer_names()) - LAST_LAYERS)

    def encoder_trains(self) -> bool:
        """Whether gradients reach the encoder."""
        return self.config.train_encoder != "none"

    def trained_modules(self, backbone: Backbone) -> tuple[nn.Module, ...]:
        """The encoder, or the modules of its last two layers."""
        if self.config.train_encoder == "all":
            return (backbone,)
        if self.config.train_encoder == "none":
            return ()
        layers = backbone.layer_names()[self._first_layer(backbone) :]
        return modules_named(backbone, (name for names in layers for name in names))

    def lr_scales(self, backbone: Backbone) -> Mapping[str, float]:
        """``layer_decay`` to the power of the distance from the head.

        The head has 1, the last of L layers ``decay``, the first ``decay^L`` and what lies before
        it (patch embedding) ``decay^(L + 1)``, as in BEiT (Bao et al. 2022).
        """
        decay = self.config.layer_decay
        if decay == 1:
            return {}
        ends = len(backbone.layer_names())
        layers = parameter_layers(backbone)
        return {
            name: decay ** (ends - layers[name])
            for name, parameter in backbone.named_parameters()
            if parameter.requires_grad
        }

"""Low-rank adapters inside the frozen encoder, and a linear layer on its pooled features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from fmrizoo.errors import RecipeError
from fmrizoo.heads import adapters
from fmrizoo.heads.base import check_count, check_share
from fmrizoo.heads.readout import ReadoutConfig, ReadoutHead
from fmrizoo.layers.lora import lora_layers
from fmrizoo.registry import register_head
from fmrizoo.types import Backbone, TaskSpec

ADAPTER = "default"  # name of the adapter in the encoder, peft's own
FOLDER = "adapter"


@dataclass
class LoraConfig(ReadoutConfig):
    """Low-rank adapters (LoRA) in the frozen encoder's linear layers, and a linear readout."""

    name: str = "lora"
    rank: int = 8  # of the adapters' matrices
    alpha: float = 16.0  # what the adapters add is multiplied by alpha / rank
    lora_dropout: float = 0.0  # on the adapters' inputs
    targets: list[str] = field(
        default_factory=list
    )  # ends of layer names, [attn.qkv]; empty: all that the backbone allows

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rank", self.rank)
        check_share("lora_dropout", self.lora_dropout)
        if not self.alpha > 0:
            raise RecipeError(f"head.alpha must be > 0, got {self.alpha}")


@register_head("lora", LoraConfig)
class LoraHead(ReadoutHead):
    """Trains the adapters and the readout. At the start the features are those of the encoder."""

    config: LoraConfig

    def __init__(
        self, config: LoraConfig, *, backbone: Backbone, tasks: Sequence[TaskSpec]
    ) -> None:
        super().__init__(config, backbone=backbone, tasks=tasks)
        adapters.target_layers(backbone, config.targets)  # an unknown one is refused at once

    @property
    def trains(self) -> str:
        """``lora``."""
        return "lora"

    def attach(self, backbone: Backbone) -> None:
        """Freeze the encoder and put the adapters in.

        Raises:
            RecipeError: the encoder has adapters already.
        """
        if found := adapters.names(backbone):
            raise RecipeError(
                f"the encoder already holds adapters ({', '.join(found)}), by a head or loaded: "
                "merge them (Head.release, adapters.merge_and_unload) or remove them first"
            )
        self._freeze(backbone)
        config = self.config
        adapters.add(
            backbone, config.targets, config.rank, config.alpha, config.lora_dropout, ADAPTER
        )

    def release(self, backbone: Backbone) -> None:
        """Merge the adapters for good: plain layers again, which may train."""
        adapters.merge_and_unload(backbone)
        super().release(backbone)

    def encoder_trains(self) -> bool:
        """True: gradients pass through the encoder."""
        return True

    def trained_modules(self, backbone: Backbone) -> tuple[nn.Module, ...]:
        """The adapters' dropouts; the encoder's own stay off."""
        return tuple(layer.lora_dropout for layer in lora_layers(backbone).values())

    def export(self, backbone: Backbone, folder: Path) -> None:
        """Write ``folder/adapter/``: the adapters and the readout, for fmrizoo and for peft."""
        adapters.save(backbone, folder / FOLDER, ADAPTER, readout=self)

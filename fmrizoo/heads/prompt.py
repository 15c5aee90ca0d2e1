"""Learned tokens beside the clip's own in a frozen encoder, and a linear layer on its features.

Source: Jia et al. 2022, "Visual Prompt Tuning" (VPT-deep): every layer has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrizoo.heads.base import check_count, check_share
from fmrizoo.heads.readout import ReadoutConfig, ReadoutHead
from fmrizoo.registry import register_head
from fmrizoo.types import Backbone, TaskSpec


@dataclass
class PromptConfig(ReadoutConfig):
    """Learned prompt tokens in every layer of the frozen encoder, and a linear readout."""

    name: str = "prompt"
    count: int = 8  # prompts a layer; every window (Swin) or sequence (NeuroMamba) sees them
    prompt_dropout: float = 0.0  # on the prompts

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("count", self.count)
        check_share("prompt_dropout", self.prompt_dropout)


@register_head("prompt", PromptConfig)
class PromptHead(ReadoutHead):
    """Trains the prompts and the readout.

    Prompts start uniform within ±√(6 / (voxels of a patch + width)), the bound of Xavier for the
    patch embedding, as in VPT.
    """

    needs = frozenset({"prompts"})
    config: PromptConfig

    def __init__(
        self, config: PromptConfig, *, backbone: Backbone, tasks: Sequence[TaskSpec]
    ) -> None:
        super().__init__(config, backbone=backbone, tasks=tasks)
        self.tokens = nn.ParameterList()
        self.bounds = [
            sqrt(6 / (prod(backbone.patch_size) + width)) for width in backbone.prompt_widths()
        ]
        for width, bound in zip(backbone.prompt_widths(), self.bounds, strict=True):
            start = torch.empty(config.count, width).uniform_(-bound, bound)
            self.tokens.append(nn.Parameter(start))

    @property
    def trains(self) -> str:
        """``prompts``."""
        return "prompts"

    def encoder_trains(self) -> bool:
        """True: gradients pass through the encoder."""
        return True

    def start_scales(self) -> dict[str, float]:
        """Bounds of the prompts, which depend on the width (:mod:`fmrizoo.mup.dims` asks)."""
        return {f"tokens.{layer}": bound for layer, bound in enumerate(self.bounds)}

    def prompts(self) -> Sequence[Tensor]:
        """``(count, width)`` for every layer."""
        rate = self.config.prompt_dropout
        return [F.dropout(tokens, rate, self.training) for tokens in self.tokens]

"""A small encoder with every part that a head may ask for, and features made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fmrizoo.types import Backbone, Batch, Features, Grid, TaskSpec, Tokens, chosen_stages

CLASSES = TaskSpec("classification", classes=("face", "house", "shoe"))
VALUES = TaskSpec("regression", mean=40.0, std=8.0, name="age")
LEVELS = TaskSpec("ordinal", classes=("low", "mid", "high", "top"), name="severity")
PATCH = (2, 2, 2, 1)
VOXELS = Grid(8, 4, 4, 3)


class Block(nn.Module):
    """``x += fc2(drop(gelu(fc1(x + mean of prompts))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        shown = x if prompt is None else x + prompt.mean(0)
        out: Tensor = x + self.fc2(self.drop(torch.nn.functional.gelu(self.fc1(shown))))
        return out


class Tiny(Backbone):
    """Two stages: two blocks of width 6 on 4×2×2 places, then one of width 8 on 2×2×2."""

    embed_dim, num_features, stage_features = 6, 8, (6, 8)
    patch_size = PATCH
    reduction = (4, 2, 2, 1)
    clip_grid = VOXELS
    any_length = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(8, 6)
        self.blocks = nn.ModuleList(Block(width) for width in (6, 6, 8))
        self.merge = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.spare = nn.Parameter(torch.ones(2), requires_grad=False)  # as swin4d v1's norm

    @classmethod
    def supports(cls, config: Any) -> frozenset[str]:
        return frozenset({"prompts"})

    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        return ("embed",), ("blocks.0",), ("blocks.1", "merge"), ("blocks.2", "norm", "spare")

    def lora_targets(self) -> tuple[str, ...]:
        return "fc1", "fc2"

    def prompt_widths(self) -> tuple[int, ...]:
        return 6, 6, 8

    def tokenize(
        self, bold: Tensor, mask: Tensor | None = None, *, background: Any = None, tr: Any = None
    ) -> Tokens:
        assert mask is not None
        grid = Grid(4, 2, 2, bold.shape[-1])
        patches = bold[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).unfold(3, 2, 2)
        share = mask.float().unfold(1, 2, 2).unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2, -3))
        brain = share.unsqueeze(-1).expand(-1, *grid).flatten(1)
        return Tokens(
            self.embed(patches.flatten(5).flatten(1, 4)), index_of(grid).expand(len(bold), -1, -1),
            brain > 0, grid, brain,
        )  # fmt: skip

    def encode_stages(
        self,
        tokens: Tokens,
        indices: Sequence[int] | None = None,
        *,
        causal: bool = False,
        prompts: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        led = [None] * 3 if prompts is None else list(prompts)
        x, grid = tokens.values, tokens.grid
        x = self.blocks[1](self.blocks[0](x, led[0]), led[1])
        brain = tokens.brain
        first = Features(x, tokens.index, tokens.valid, grid, brain)
        b, half = len(x), Grid(grid.x // 2, *grid[1:])
        x = x.view(b, half.x, 2, -1, 6).transpose(2, 3).reshape(b, half.size, 12)
        x = self.norm(self.blocks[2](self.merge(x), led[2]))
        brain = brain.view(b, half.x, 2, -1).mean(2).flatten(1)
        last = Features(x, index_of(half).expand(b, -1, -1), brain > 0, half, brain)
        return [(first, last)[i] for i in chosen_stages(indices, 2)]


def index_of(grid: Sequence[int]) -> Tensor:
    """``(1, n, 4)`` coordinates of all cells, row-major."""
    return torch.cartesian_prod(*(torch.arange(s) for s in grid)).unsqueeze(0)


def batch_of(clips: int = 3, target: Tensor | None = None, frames: int = 3) -> Batch:
    """Clips whose brains differ in size."""
    drawn = torch.Generator().manual_seed(7)
    mask = torch.zeros(clips, *VOXELS[:3], dtype=torch.bool)
    for clip, brain in enumerate(mask):
        brain[: 7 - clip, 1:, : 4 - clip % 2] = True
    bold = torch.randn(clips, 1, *VOXELS[:3], frames, generator=drawn)
    names = [f"{i:02d}" for i in range(clips)]
    return Batch(bold, mask, torch.ones(clips), names, names, torch.zeros(clips), target)


def clip_of(batch: Batch, clip: int) -> Batch:
    """One clip of a batch alone."""
    rows = slice(clip, clip + 1)
    return replace(
        batch,
        bold=batch.bold[rows], mask=batch.mask[rows], tr=batch.tr[rows], start=batch.start[rows],
        subject=batch.subject[rows], run=batch.run[rows],
        target=None if batch.target is None else batch.target[rows],
    )  # fmt: skip

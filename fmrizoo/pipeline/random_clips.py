"""Random clips of a recipe's size, made once and given again and again: data that cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fmrizoo.analysis.sizes import brain_of
from fmrizoo.config import Recipe
from fmrizoo.trainer.inputs import CompactSamples
from fmrizoo.types import Backbone, Batch, Grid, Voxels

KEPT = 2  # micro-batches made; more would only take memory
BACKGROUND = -2.0


def grid_of(recipe: Recipe, backbone: Backbone) -> Grid:
    """Voxels and frames of the recipe's clips, where no store says them."""
    size = getattr(recipe.backbone, "img_size", None)
    grid = Grid(*size) if size is not None else backbone.clip_grid
    return grid._replace(t=recipe.data.clip_frames)


@dataclass(frozen=True)
class _Made:
    """A batch that is ready, behind the face of the loader's samples."""

    batch: Batch

    def to_batch(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        return self.batch.to(device, dtype)


class RandomClips:
    """An endless stream of micro-batches: normal noise in a ball as large as a brain.

    Args:
        grid: Voxels and frames of a clip.
        micro: Clips of a micro-batch.
        seed: Of this rank.
    """

    def __init__(self, grid: Grid, micro: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.made = [_Made(_batch(grid, micro, generator)) for _ in range(KEPT)]

    def batches(self, start: int = 0) -> Iterator[CompactSamples]:
        """Micro-batches ``start``, ``start + 1``, … (each :data:`KEPT`-th is the same)."""
        number = start
        while True:
            yield self.made[number % KEPT]
            number += 1


def _batch(grid: Grid, micro: int, generator: torch.Generator) -> Batch:
    mask = brain_of(grid[:3])
    index = mask.flatten().nonzero()[:, 0]
    values = torch.randn(grid.t, micro * len(index), generator=generator)
    voxels = Voxels(
        values,
        index.repeat(micro),
        (len(index),) * micro,
        torch.full((micro,), BACKGROUND),
        grid,
    )
    names = [f"random-{number}" for number in range(micro)]
    return Batch.compact(
        voxels,
        mask=mask.expand(micro, *mask.shape),
        tr=torch.ones(micro),
        subject=names,
        run=names,
        start=torch.zeros(micro),
        seed=torch.randint(2**31, (micro,), generator=generator),
    )

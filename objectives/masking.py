"""Which patches are hidden: random, tube and temporal masks on a grid of mask cells.

Source: SimMIM (Xie et al. 2022) for the random mask on cells of one or several patches; tube masks
(the same cells at all times) as in VideoMAE; temporal masks hide all of space in some frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from fmrizoo.errors import RecipeError
from fmrizoo.types import Grid

MASK_TYPES = ("random", "tube", "temporal")


def cell_factors(mask_patch: Sequence[int], patch: Sequence[int]) -> tuple[int, int, int, int]:
    """Patches per mask cell along x, y, z, t.

    Raises:
        RecipeError: the mask patch is no multiple of the model's patch.
    """
    if any(m % p for m, p in zip(mask_patch, patch, strict=True)):
        raise RecipeError(
            f"objective.mask_patch_size {list(mask_patch)} must be a multiple of the backbone's "
            f"patch {list(patch)} along every axis"
        )
    x, y, z, t = (m // p for m, p in zip(mask_patch, patch, strict=True))
    return x, y, z, t


def draw_mask(
    grid: Grid,
    factors: tuple[int, int, int, int],
    ratio: float,
    kind: str,
    seeds: Sequence[int | None],
) -> Tensor:
    """Draw one mask a sample.

    Args:
        grid: Patch grid.
        factors: Patches per mask cell; cells at the end of an axis may be cut by the grid.
        ratio: Share of cells hidden; ``ceil(cells · ratio)`` of them are.
        kind: ``random``, ``tube`` or ``temporal``.
        seeds: One per sample: the same seed gives the same mask; None draws from torch's state.

    Returns:
        ``(b, n)`` bool, True = hidden, tokens row-major in x, y, z, t.
    """
    cells = Grid(*(ceil(g / f) for g, f in zip(grid, factors, strict=True)))
    shape = {
        "random": tuple(cells),
        "tube": (cells.x, cells.y, cells.z, 1),
        "temporal": (1, 1, 1, cells.t),
    }[kind]
    count = shape[0] * shape[1] * shape[2] * shape[3]
    hidden = ceil(count * ratio)
    masks = torch.zeros(len(seeds), count, dtype=torch.bool)
    for mask, seed in zip(masks, seeds, strict=True):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        mask[torch.randperm(count, generator=generator)[:hidden]] = True
    dense = masks.view(-1, *shape).expand(-1, *cells)
    for axis, factor in enumerate(factors, start=1):
        dense = dense.repeat_interleave(factor, dim=axis)
    return dense[:, : grid.x, : grid.y, : grid.z, : grid.t].flatten(1)

"""Patches that hold brain, straight from the in-brain voxels: no dense clip is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmrizoo.errors import DataError
from fmrizoo.types import Grid, Voxels


@dataclass(frozen=True)
class Kept:
    """Patches of several clips, padded at the end to the longest.

    Attributes:
        patches: ``(b, n, p)`` voxels ordered px, py, pz, pt; outside the brain the background.
        inside: ``(b, n, p)`` bool, True = brain.
        index: ``(b, n, 4)`` patch coordinates; those of padding are cells that are not kept, so
            that no cell occurs twice.
        valid: ``(b, n)`` False for padding.
    """

    patches: Tensor
    inside: Tensor
    index: Tensor
    valid: Tensor


def keep_patches(
    voxels: Voxels, patch: Sequence[int], grid: Grid, order: str = "xyzt", drop: bool = True
) -> Kept:
    """Cut clips into patches.

    Args:
        voxels: In-brain voxels; the clips lie in the corner of the grid.
        patch: Voxels and frames of a patch; divides the clips' frames.
        grid: Patches along x, y, z, t, enough for the clips.
        order: Of the patches, slowest axis first.
        drop: Leave out the patches without a brain voxel. Each clip is looked at by itself.

    Raises:
        DataError: a clip without a brain voxel.
    """
    values = torch.split(voxels.values, list(voxels.counts), 1)
    clips = zip(values, voxels.split(voxels.index), voxels.background, strict=True)
    parts = []
    for number, (frames, cells, background) in enumerate(clips):
        if not len(cells):
            raise DataError(f"sample {number} of the batch is a clip without a brain voxel")
        kept, slot, within = _sort(cells, voxels.grid, patch, grid, drop)
        filled, brain = _fill(frames, background, slot, within, len(kept), patch)
        index = _times(kept, grid)
        if order != "xyzt":
            rank = flat_cells(index, grid, order).argsort()
            filled, brain, index = filled[rank], brain[rank], index[rank]
        parts.append((filled, brain, index))
    lengths = [len(index) for _, _, index in parts]
    longest = max(lengths)
    place = torch.arange(longest, device=voxels.values.device)
    return Kept(
        patches=torch.stack([_pad(filled, longest) for filled, _, _ in parts]),
        inside=torch.stack([_pad(brain, longest) for _, brain, _ in parts]),
        index=torch.stack([_with_others(index, grid, longest) for _, _, index in parts]),
        valid=place < torch.tensor(lengths, device=place.device).unsqueeze(1),
    )


def flat_cells(index: Tensor, grid: Grid, order: str = "xyzt") -> Tensor:
    """``(…, 4)`` coordinates → number of the cell when axes are walked in ``order``, slow first."""
    flat = torch.zeros_like(index[..., 0])
    for axis in order:
        number = "xyzt".index(axis)
        flat = flat * grid[number] + index[..., number]
    return flat


def _sort(
    cells: Tensor, clip: Grid, patch: Sequence[int], grid: Grid, drop: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept places ``(k,)`` of the x, y, z grid; each voxel's place among them and in its patch."""
    px, py, pz, _ = patch
    x, y, z = cells // (clip.y * clip.z), cells // clip.z % clip.y, cells % clip.z
    place = ((x // px) * grid.y + y // py) * grid.z + z // pz
    within = ((x % px) * py + y % py) * pz + z % pz
    if not drop:
        return torch.arange(grid.x * grid.y * grid.z, device=cells.device), place, within
    kept, slot = torch.unique(place, return_inverse=True)
    return kept, slot, within


def _fill(
    frames: Tensor,
    background: Tensor,
    slot: Tensor,
    within: Tensor,
    kept: int,
    patch: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """``frames (t, v)`` → ``(k · t', p)`` patches and which of their voxels are brain."""
    px, py, pz, pt = patch
    size, times = px * py * pz, len(frames) // pt
    rows = slot * size + within
    filled = background.to(frames.dtype).expand(kept * size, len(frames)).clone()
    filled.index_copy_(0, rows, frames.t())
    brain = torch.zeros(kept * size, dtype=torch.bool, device=frames.device)
    brain[rows] = True
    return (
        filled.view(kept, size, times, pt).transpose(1, 2).reshape(-1, size * pt),
        brain.view(kept, 1, size, 1).expand(-1, times, -1, pt).reshape(-1, size * pt),
    )


def _times(kept: Tensor, grid: Grid) -> Tensor:
    """``(k,)`` places in space → ``(k · t', 4)`` coordinates, time fastest."""
    space = torch.stack([kept // (grid.y * grid.z), kept // grid.z % grid.y, kept % grid.z], -1)
    times = torch.arange(grid.t, device=kept.device).repeat(len(kept)).unsqueeze(1)
    return torch.cat([space.repeat_interleave(grid.t, 0), times], 1)


def _pad(rows: Tensor, length: int) -> Tensor:
    """``rows (n, …)`` and zeros up to ``length``."""
    if len(rows) == length:
        return rows
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


def _with_others(index: Tensor, grid: Grid, length: int) -> Tensor:
    """``index (n, 4)`` and cells that are not in it, up to ``length``."""
    if len(index) == length:
        return index
    free = torch.ones(grid.size, dtype=torch.bool, device=index.device)
    free[flat_cells(index, grid)] = False
    cells = free.nonzero()[: length - len(index), 0]
    return torch.cat([index, torch.stack(torch.unravel_index(cells, tuple(grid)), -1)])

"""Features averaged within the parcels of an atlas.

Shape letters: ``b`` samples, ``n`` tokens, ``d`` features, ``p`` parcels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fmrizoo.errors import DataError
from fmrizoo.types import Features, Grid


def parcel_weights(
    labels: Tensor, reduction: Sequence[int], grid: Grid
) -> tuple[Tensor, tuple[int, ...]]:
    """Voxels of each parcel in each cell of an output grid.

    Args:
        labels: ``(x, y, z)`` integers on the voxels of the clip, whose first voxel is that of the
            first cell; 0 and below: no parcel.
        reduction: Voxels of a cell along x, y, z (what follows is ignored), as
            ``Backbone.reduction``.
        grid: Cells along x, y, z (and time slots, which are ignored), as ``Features.grid``.

    Returns:
        ``(p, x'·y'·z')`` fp32 counts, cells row-major; the label of each row, rising.

    Raises:
        DataError: labels that are no whole numbers in three dimensions, reach beyond the grid, or
            hold no parcel.
    """
    if labels.ndim != 3 or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"an atlas must be whole numbers (x, y, z), got {labels.dtype} {tuple(labels.shape)}"
        )
    cells, size = tuple(grid)[:3], tuple(reduction)[:3]
    reach = tuple(count * by for count, by in zip(cells, size, strict=True))
    if any(have > most for have, most in zip(labels.shape, reach, strict=True)):
        raise DataError(
            f"an atlas of {tuple(labels.shape)} voxels is larger than the features' {reach}: "
            "resample it to the grid of the clips"
        )
    place = (labels > 0).nonzero()
    values, row = torch.unique(labels[labels > 0], return_inverse=True)
    if not len(values):
        raise DataError("the atlas holds no parcel: all its labels are 0")
    x, y, z = (place // torch.tensor(size, device=place.device)).unbind(1)
    cell = (x * cells[1] + y) * cells[2] + z
    counts = torch.bincount(row * prod(cells) + cell, minlength=len(values) * prod(cells))
    return counts.view(len(values), -1).float(), tuple(int(v) for v in values)


def pool_parcels(features: Features, weights: Tensor) -> Tensor:
    """``(b, p, d)`` fp32: mean over a parcel's voxels, and over time.

    A voxel counts with the features of the token whose cell it lies in, once per time slot; tokens
    that are not valid are left out. A parcel without any valid token (the clip's brain does not
    reach it) is NaN: there is no number for it.

    Args:
        features: Of a backbone.
        weights: ``(p, cells)`` of :func:`parcel_weights` for the features' grid.

    Raises:
        DataError: weights of another grid.
    """
    cells = prod(features.grid[:3])
    if weights.shape[1] != cells:
        raise DataError(
            f"parcel weights for {weights.shape[1]} cells do not fit features of {cells} "
            f"({features.grid}): make them for the features' grid"
        )
    b, _, d = features.values.shape
    x, y, z, _ = features.index.expand(b, -1, -1).unbind(-1)
    cell = (x * features.grid.y + y) * features.grid.z + z
    valid = features.valid.float()
    count = valid.new_zeros(b, cells).scatter_add(1, cell, valid)
    kept = torch.where(features.valid.unsqueeze(2), features.values.float(), 0.0)
    summed = valid.new_zeros(b, cells, d)
    summed = summed.scatter_add(1, cell.unsqueeze(2).expand(-1, -1, d), kept)
    weights = weights.to(valid)
    total = torch.einsum("pc,bc->bp", weights, count)
    return torch.einsum("pc,bcd->bpd", weights, summed) / total.unsqueeze(2)

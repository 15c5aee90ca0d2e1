"""What both objectives share: which voxels are scored, and how errors become one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmrizoo.errors import DataError
from fmrizoo.objectives.decoders import Reduction
from fmrizoo.types import Backbone, Batch, Grid, Tokens


def by_token(backbone: Backbone, tokens: Tokens) -> bool:
    """Whether errors can be taken on raw patches: formed already, and one for each feature."""
    return tokens.patches is not None and backbone.reduction == backbone.patch_size


def scored_patches(
    tokens: Tokens, chosen: Tensor, grid: Grid, reduction: Reduction, brain_only: bool
) -> Tensor:
    """``(b, n, P)`` True = voxel of a chosen token ``(b, n)`` that counts.

    In-brain voxels, or all but those that only pad the clip of ``grid`` voxels.
    """
    if brain_only:
        assert tokens.inside is not None  # beside patches, see Tokens
        return tokens.inside & chosen.unsqueeze(-1)
    return _in_grid(tokens.index, reduction, grid) & chosen.unsqueeze(-1)


def _in_grid(index: Tensor, reduction: Reduction, grid: Grid) -> Tensor:
    """``(b, n, P)`` True = voxel of the patches at ``index (b, n, 4)`` that lies in the clip."""
    device = index.device
    inside = []
    for axis, (size, end) in enumerate(zip(reduction, grid, strict=True)):
        place = index[..., axis, None] * size + torch.arange(size, device=device)
        inside.append(place < end)
    x, y, z, t = inside
    space = (x[..., :, None, None] & y[..., None, :, None] & z[..., None, None, :]).flatten(-3)
    return (space.unsqueeze(-1) & t.unsqueeze(-2)).flatten(-2)


def clip_mean(error: Tensor, scored: Tensor, runs: Sequence[str], what: str) -> Tensor:
    """Mean error of the scored voxels of each clip, then over the clips.

    Args:
        error: ``(b, …)``.
        scored: Bool, of the shape of ``error``.
        runs: Names of the clips' runs, for the message.
        what: What there should be in every clip, for the message.

    Raises:
        DataError: a clip without a scored voxel.
    """
    count = scored.flatten(1).sum(1)
    if bool((count == 0).any()):
        names = [run for run, n in zip(runs, count.tolist(), strict=True) if n == 0]
        raise DataError(f"no {what} to score in clips of {', '.join(names)}")
    return ((error * scored).flatten(1).sum(1) / count).mean()


def background_of(batch: Batch) -> Tensor:
    """``(b,)`` value outside the brain; where it is not known, as ``Backbone.tokenize`` takes it.

    That is the lowest value of the clip's first frame, in the brain if there is one.
    """
    if batch.background is not None:
        return batch.background
    first = batch.bold[:, 0, ..., 0].flatten(1)
    brain = batch.mask.flatten(1)
    inside = first.masked_fill(~brain, torch.inf).amin(1)
    return torch.where(brain.any(1), inside, first.amin(1))

"""Features averaged over blocks of places: few enough to attend to, and to keep for every clip.

Shape letters: ``b`` samples, ``n`` tokens, ``k`` cells, ``t`` time slots, ``d`` features.
"""

from __future__ import annotations

from math import ceil, prod

import torch
from torch import Tensor

from fmrizoo.types import Features


def cell_means(features: Features, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the features in every block of places, time slot by time slot.

    The grid is cut along x, y and z into blocks of equal size, the fewest places that give at most
    ``cells`` blocks along an axis. Valid tokens are weighted by their brain share, so that what
    lies outside the brain does not blur its rim. The shapes depend on the grid alone, not on the
    brain. Sums are formed in fp32, clip by clip.

    Returns:
        ``(b, k, t, d)`` means, 0 where there is no brain; ``(b, k, t)`` bool, True = some brain;
        ``(b, k, 3)`` fp32 centres of the blocks as shares of the grid.
    """
    grid, device = features.grid, features.values.device
    size = [ceil(places / cells) for places in grid[:3]]
    count = [ceil(places / by) for places, by in zip(grid[:3], size, strict=True)]
    b, _, d = features.values.shape
    block = features.index[..., :3] // torch.tensor(size, device=device)
    x, y, z = block.unbind(-1)
    cell = ((x * count[1] + y) * count[2] + z) * grid.t + features.index[..., 3]
    weight = (features.valid * features.brain).float()
    k = prod(count)
    means = features.values.new_zeros(b, k * grid.t, d)
    present = torch.zeros(b, k * grid.t, dtype=torch.bool, device=device)
    for clip, (values, where, share) in enumerate(
        zip(features.values, cell.expand(b, -1), weight, strict=True)
    ):
        total = share.new_zeros(k * grid.t).index_add(0, where, share)
        summed = share.new_zeros(k * grid.t, d)
        summed = summed.index_add(0, where, values.float() * share.unsqueeze(1))
        present[clip] = total > 0
        means[clip] = (summed / total.clamp(min=torch.finfo(total.dtype).tiny).unsqueeze(1)).to(
            means.dtype
        )
    return means.view(b, k, grid.t, d), present.view(b, k, grid.t), _centres(features, size)


def _centres(features: Features, size: list[int]) -> Tensor:
    """``(b, k, 3)`` fp32 middles of blocks of ``size`` places; the last ones may be cut off."""
    axes = []
    for places, by in zip(features.grid[:3], size, strict=True):
        first = torch.arange(0, places, by, device=features.values.device)
        axes.append((first + (first + by).clamp(max=places)).float() / (2 * places))
    return torch.cartesian_prod(*axes).expand(len(features.values), -1, -1)

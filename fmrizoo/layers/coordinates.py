"""Features of continuous patch positions: positions without a table, for any number of frames.

Source: the encoding of Mildenhall et al. 2020 (NeRF), without the factor π, as NeuroMamba uses it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmrizoo.errors import DataError
from fmrizoo.types import Grid

OCTAVES = 10
FEATURES = 4 * (1 + 2 * OCTAVES)  # of a position in four dimensions


def fourier_features(position: Tensor, octaves: int = OCTAVES) -> Tensor:
    """``[u, sin(2^k u), cos(2^k u)]``, ``k = 0 … octaves − 1``, of every coordinate, in fp32.

    ``(…, a)`` → ``(…, a · (1 + 2 · octaves))``: all coordinates, then all sines, then all cosines.
    """
    position = position.float()
    powers = 2.0 ** torch.arange(octaves, dtype=torch.float32, device=position.device)
    angles = (position.unsqueeze(-1) * powers).flatten(-2)
    return torch.cat([position, angles.sin(), angles.cos()], -1)


def grid_centres(index: Tensor, grid: Grid) -> Tensor:
    """``(b, n, 4)`` patch coordinates → patch centres as shares of ``grid`` (patches), fp32.

    Inside the grid they lie in (0, 1); later frames go beyond 1.
    """
    return (index.float() + 0.5) / torch.tensor(grid, dtype=torch.float32, device=index.device)


def world_centres(
    index: Tensor,
    patch: Sequence[int],
    voxel_size: Sequence[float],
    tr: Tensor | None,
    extent: Sequence[float],
) -> Tensor:
    """``(b, n, 4)`` patch coordinates → patch centres in mm and seconds over ``extent``, fp32.

    Args:
        index: Patch coordinates x, y, z, t.
        patch: Voxels and frames of a patch.
        voxel_size: Millimetres along x, y, z.
        tr: ``(b,)`` seconds between frames.
        extent: Millimetres along x, y, z and seconds that count as 1.

    Raises:
        DataError: no ``tr``.
    """
    if tr is None:
        raise DataError("positions in seconds need the clips' tr (seconds between frames)")

    def row(values: Sequence[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=index.device)

    centre = (index.float() + 0.5) * row(patch) * row([*voxel_size, 1.0])
    seconds = tr.to(index.device, torch.float32).view(-1, 1, 1)
    space, time = centre[..., :3], centre[..., 3:]
    return torch.cat([space.expand(len(tr), -1, -1), time * seconds], -1) / row(extent)

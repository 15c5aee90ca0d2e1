"""Learned absolute position tables: space and time added separately."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrizoo.errors import DataError
from fmrizoo.types import Grid


class PositionEmbedding(nn.Module):
    """``pos_embed (1, d, x, y, z, 1)`` + ``time_embed (1, d, 1, 1, 1, t)``, as in SwiFT."""

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.pos_embed = nn.Parameter(torch.zeros(1, width, *grid[:3], 1))
        self.time_embed = nn.Parameter(torch.zeros(1, width, 1, 1, 1, grid.t))

    def forward(self, frames: int) -> Tensor:
        """``(x·y·z·frames, d)`` row-major; fewer frames than the table holds are its first ones.

        Raises:
            DataError: more frames than the table holds.
        """
        if frames > self.grid.t:
            raise DataError(
                f"the clip has {frames} time tokens, the model's time table {self.grid.t}: "
                "use shorter clips, or load the weights with interpolate=True into a longer model"
            )
        table = self.pos_embed + self.time_embed[..., :frames]
        return table.flatten(2).squeeze(0).transpose(0, 1)


def resize_space(table: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Trilinear interpolation of a ``(1, d, x, y, z, 1)`` table."""
    resized = F.interpolate(table.squeeze(-1), size=size, mode="trilinear", align_corners=False)
    return resized.unsqueeze(-1)


def resize_time(table: Tensor, frames: int) -> Tensor:
    """Linear interpolation of a ``(1, d, 1, 1, 1, t)`` table."""
    width = table.shape[1]
    resized = F.interpolate(
        table.reshape(1, width, -1), size=frames, mode="linear", align_corners=False
    )
    return resized.reshape(1, width, 1, 1, 1, frames)

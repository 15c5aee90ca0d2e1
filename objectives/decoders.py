"""From features back to voxels: the linear decoder of SimMIM and the factorised MLP of SwiFT v2."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from fmrizoo.layers.mlp import MLP
from fmrizoo.types import Features, Grid

DECODERS = ("mlp", "linear")


class LinearDecoder(nn.Module):
    """One Linear: each output token predicts all voxels that it stands for."""

    def __init__(self, width: int, reduction: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.reduction = reduction
        rx, ry, rz, rt = reduction
        self.project = nn.Linear(width, rx * ry * rz * rt)

    def forward(self, features: Features) -> Tensor:
        """``(b, X, Y, Z, T)`` voxels of the padded clip."""
        rx, ry, rz, rt = self.reduction
        x = self.project(features.to_grid().movedim(1, -1))
        voxels: Tensor = rearrange(
            x,
            "b x y z t (rx ry rz rt) -> b (x rx) (y ry) (z rz) (t rt)",
            rx=rx,
            ry=ry,
            rz=rz,
            rt=rt,
        )
        return voxels


class MLPDecoder(nn.Module):
    """Time first, then space: MLP → pixel-shuffle in time (+ positions) → MLP → pixel-shuffle.

    Source: the SwiFT v2 poster's MLP decoder.
    """

    def __init__(self, width: int, reduction: tuple[int, int, int, int], frames: int) -> None:
        super().__init__()
        self.reduction = reduction
        rx, ry, rz, rt = reduction
        self.time_mlp = MLP(width, 4 * width)
        self.time_norm = nn.LayerNorm(width)
        self.time_project = nn.Linear(width, width * rt)
        self.time_embed = nn.Parameter(torch.zeros(frames, width))
        self.space_mlp = MLP(width, 4 * width)
        self.space_norm = nn.LayerNorm(width)
        self.space_project = nn.Linear(width, rx * ry * rz)
        nn.init.trunc_normal_(self.time_embed, std=0.02)

    def forward(self, features: Features) -> Tensor:
        """``(b, X, Y, Z, T)`` voxels of the padded clip."""
        rx, ry, rz, rt = self.reduction
        x = features.to_grid().movedim(1, -1)
        x = self.time_project(self.time_norm(self.time_mlp(x)))
        x = rearrange(x, "b x y z t (rt d) -> b x y z (t rt) d", rt=rt)
        x = x + self.time_embed[: x.shape[4]]
        x = self.space_project(self.space_norm(self.space_mlp(x)))
        voxels: Tensor = rearrange(
            x, "b x y z t (rx ry rz) -> b (x rx) (y ry) (z rz) t", rx=rx, ry=ry, rz=rz
        )
        return voxels


def build_decoder(
    name: str, width: int, reduction: tuple[int, int, int, int], clip: Grid
) -> LinearDecoder | MLPDecoder:
    """The decoder called ``name`` for features of ``width`` that stand for ``reduction`` voxels."""
    if name == "linear":
        return LinearDecoder(width, reduction)
    return MLPDecoder(width, reduction, clip.t)

"""From features back to voxels, token by token: the linear decoder of SimMIM and SwiFT v2's MLP.

Shapes: b samples, n tokens, w width, P = rx·ry·rz·rt voxels that a token stands for.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fmrizoo.layers.readout import Readout
from fmrizoo.types import Grid

DECODERS = ("mlp", "linear")
Reduction = tuple[int, int, int, int]


class LinearDecoder(nn.Module):
    """One Linear: each token predicts all voxels that it stands for."""

    def __init__(self, width: int, reduction: Reduction) -> None:
        super().__init__()
        self.project = Readout(width, prod(reduction))

    def forward(self, features: Tensor) -> Tensor:
        """``(…, w)`` → ``(…, P)`` ordered rx, ry, rz, rt."""
        voxels: Tensor = self.project(features)
        return voxels


class MLPDecoder(nn.Module):
    """Time first, then space: embed → pixel-shuffle in time (+ positions) → embed → shuffle.

    Source: the SwiFT v2 poster (linear, temporal and spatial embedding with pixel-shuffles). The
    positions are those of the frames within a token, so that a clip may have any number of tokens.
    Besides the last projection it has (2 + rt) · w² weights.
    """

    def __init__(self, width: int, reduction: Reduction) -> None:
        super().__init__()
        rx, ry, rz, rt = reduction
        self.space = (rx, ry, rz)
        self.frames = rt
        self.time_embed = nn.Linear(width, width)
        self.time_norm = nn.LayerNorm(width)
        self.time_project = nn.Linear(width, rt * width)
        self.frame_embed = nn.Parameter(torch.zeros(rt, width))
        self.space_embed = nn.Linear(width, width)
        self.space_norm = nn.LayerNorm(width)
        self.space_project = Readout(width, rx * ry * rz)
        nn.init.trunc_normal_(self.frame_embed, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        """``(…, w)`` → ``(…, P)`` ordered rx, ry, rz, rt."""
        x = self.time_project(self.time_norm(F.gelu(self.time_embed(features))))
        x = x.view(*x.shape[:-1], self.frames, -1) + self.frame_embed
        x = self.space_project(self.space_norm(F.gelu(self.space_embed(x))))
        voxels: Tensor = x.transpose(-1, -2).flatten(-2)
        return voxels


def build_decoder(name: str, width: int, reduction: Reduction) -> LinearDecoder | MLPDecoder:
    """The decoder called ``name`` for features of ``width`` that stand for ``reduction`` voxels."""
    return (LinearDecoder if name == "linear" else MLPDecoder)(width, reduction)


def cells(index: Tensor, grid: Grid) -> Tensor:
    """``(b, n, 4)`` coordinates → ``(b, n)`` row-major cells of ``grid``."""
    x, y, z, t = index.unbind(-1)
    return ((x * grid.y + y) * grid.z + z) * grid.t + t


def patchify(bold: Tensor, index: Tensor, reduction: Reduction) -> Tensor:
    """Raw voxels of some patches.

    Args:
        bold: ``(b, X, Y, Z, T)``, sizes that ``reduction`` divides.
        index: ``(b, n, 4)`` patch coordinates (``b`` may be 1).
        reduction: Voxels and frames of a patch.

    Returns:
        ``(b, n, P)`` ordered rx, ry, rz, rt.
    """
    rx, ry, rz, rt = reduction
    patches = rearrange(  # a view: only the patches asked for are copied
        bold,
        "b (x rx) (y ry) (z rz) (t rt) -> b x y z t rx ry rz rt",
        rx=rx,
        ry=ry,
        rz=rz,
        rt=rt,
    )
    x, y, z, t = index.expand(bold.shape[0], -1, -1).unbind(-1)
    sample = torch.arange(bold.shape[0], device=bold.device).unsqueeze(1)
    return patches[sample, x, y, z, t].flatten(2)


def unpatchify(
    patches: Tensor, index: Tensor, grid: Grid, reduction: Reduction, valid: Tensor | None = None
) -> Tensor:
    """Inverse of :func:`patchify`; cells without a token are 0.

    Args:
        patches: ``(b, n, P)`` of any dtype.
        index: ``(b, n, 4)`` patch coordinates in ``grid`` (``b`` may be 1).
        grid: Patches along x, y, z, t.
        reduction: Voxels and frames of a patch.
        valid: ``(b, n)`` False: a token that stands for nothing; None: all stand for something.

    Returns:
        ``(b, X, Y, Z, T)``.
    """
    b, _, width = patches.shape
    first = torch.arange(b, device=patches.device).unsqueeze(1) * grid.size
    rows = cells(index, grid) + first
    if valid is None or bool(valid.all()):
        rows, kept = rows.flatten(), patches.flatten(0, 1)
    else:
        chosen = valid.expand(b, -1)
        rows, kept = rows[chosen], patches[chosen]
    full = patches.new_zeros(b * grid.size, width).index_copy(0, rows, kept)
    voxels: Tensor = rearrange(
        full.view(b, *grid, *reduction),
        "b x y z t rx ry rz rt -> b (x rx) (y ry) (z rz) (t rt)",
    )
    return voxels


def flag_voxels(flags: Tensor, index: Tensor, grid: Grid, reduction: Reduction) -> Tensor:
    """``(b, n)`` bool → ``(b, X, Y, Z, T)`` bool: each token's flag at all its voxels."""
    spread = flags.unsqueeze(-1).expand(-1, -1, prod(reduction))
    return unpatchify(spread, index, grid, reduction, flags)

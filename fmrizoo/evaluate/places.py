"""Where in the brain the numbers of a pooled embedding are from, and the way back to images.

Shape letters: ``p`` places, ``d`` features of a place, ``k`` rows of weights, ``x y z`` voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fmrizoo.data.spatial import as_image
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.registry import suggest

if TYPE_CHECKING:
    from fmrizoo.evaluate.embed import ClipEmbedder
    from fmrizoo.types import Grid

SPATIAL = ("space", "parcel")  # pools that keep places in the brain
REDUCTIONS = ("sum", "norm", "none")


@dataclass(frozen=True, eq=False)
class Places:
    """The layout of a flat embedding: ``p`` places side by side, ``d`` numbers each.

    Attributes:
        pool: Of :class:`fmrizoo.evaluate.embed.ClipEmbedder`.
        names: ``p`` names of places; one empty name where the pool keeps none.
        width: ``d``.
        voxel: ``(x, y, z)`` place of each voxel, −1 for none; None without places in the brain.
    """

    pool: str
    names: tuple[str, ...]
    width: int
    voxel: NDArray[np.int64] | None = None

    @property
    def features(self) -> int:
        """``p × d``."""
        return len(self.names) * self.width

    @property
    def feature_names(self) -> list[str]:
        """One name for each number, such as ``parcel-12_f003``; distinct."""
        digits = len(str(self.width - 1))
        own = [f"f{k:0{digits}d}" for k in range(self.width)]
        return [f"{place}_{f}" if place else f for place in self.names for f in own]

    def images(
        self, weights: NDArray[Any], affine: NDArray[np.float64], reduce: str = "sum"
    ) -> list[Any]:
        """Weights of the numbers → brain images: a voxel carries what its place does.

        Args:
            weights: ``(k, p·d)``.
            affine: ``(4, 4)`` voxel → RAS millimetres.
            reduce: What becomes of a place's ``d`` numbers: their ``sum`` (attributions add up),
                their Euclidean ``norm`` (how much of a linear model's weight lies there), or
                ``none``: one volume each.

        Returns:
            ``k`` NIfTI images ``(x, y, z)``, or ``(x, y, z, d)`` with ``none``; float32, 0 where
            there is no place.

        Raises:
            RecipeError: a pool that keeps no place, or an unknown ``reduce``.
            DataError: weights of another width.
        """
        if self.voxel is None:
            raise RecipeError(
                f"pool={self.pool} keeps no place in the brain, so nothing can be put back there: "
                f"take pool={' or pool='.join(SPATIAL)}"
            )
        if reduce not in REDUCTIONS:
            raise RecipeError(f"reduce={reduce!r} is not known.{suggest(reduce, list(REDUCTIONS))}")
        if weights.ndim != 2 or weights.shape[1] != self.features:
            raise DataError(
                f"weights must be (k, {self.features}) as the embedding is, got {weights.shape}"
            )
        by_place = np.asarray(weights, np.float64).reshape(len(weights), len(self.names), -1)
        if reduce == "sum":
            by_place = by_place.sum(-1)
        elif reduce == "norm":
            by_place = np.sqrt((by_place**2).sum(-1))
        return [as_image(self._volume(row.astype(np.float32)), affine) for row in by_place]

    def _volume(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        assert self.voxel is not None
        # A place that does not exist takes the last row, which is 0.
        padded: NDArray[np.float32] = np.concatenate([row, np.zeros_like(row[:1])])
        return padded[self.voxel]


def places_of(embedder: ClipEmbedder, clip: Grid) -> Places:
    """The layout of what ``embedder`` makes of clips of ``clip`` voxels and frames.

    For ``frame`` and ``space`` one made-up clip is run to learn the grid of the stage.
    """
    pool, width = embedder.pool, embedder.backbone.stage_features[embedder.stage]
    if pool == "parcel":
        assert embedder.atlas is not None
        labels = embedder.atlas.labels.numpy()
        voxel = np.where(labels > 0, np.searchsorted(embedder.parcels, labels), -1)
        return Places(pool, tuple(f"parcel-{p}" for p in embedder.parcels), width, voxel)
    if pool not in ("frame", "space"):
        return Places(pool, ("",), width)
    grid = _stage_grid(embedder, clip)
    if pool == "frame":
        return Places(pool, tuple(f"t{t}" for t in range(grid.t)), width)
    size = [c // g for c, g in zip(embedder.backbone.clip_grid, grid, strict=True)]
    names = tuple(f"x{x}y{y}z{z}" for x, y, z in np.ndindex(*grid[:3]))
    return Places(pool, names, width, _cells(clip[:3], size, grid[:3]))


def _cells(voxels: Sequence[int], size: Sequence[int], cells: Sequence[int]) -> NDArray[np.int64]:
    """The cell of each voxel, row-major; cells start at the first voxel."""
    x, y, z = (np.arange(v) // s for v, s in zip(voxels, size[:3], strict=True))
    found = (x[:, None, None] * cells[1] + y[None, :, None]) * cells[2] + z[None, None, :]
    assert found.max() < prod(cells)
    return found.astype(np.int64)


@torch.no_grad()
def _stage_grid(embedder: ClipEmbedder, clip: Grid) -> Grid:
    backbone = embedder.backbone
    kind = next((p.dtype for p in backbone.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    bold = torch.randn(1, 1, *clip, generator=generator).to(embedder.device, kind)
    mask = torch.ones(1, *clip[:3], dtype=torch.bool, device=embedder.device)
    return backbone.encode_stages(backbone.tokenize(bold, mask), (embedder.stage,))[0].grid

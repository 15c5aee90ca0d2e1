"""What goes into an encoder's trunk and what comes out: tokens and features.

Shape letters: ``b`` samples, ``n`` tokens, ``d`` features of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.types.grid import Grid


@dataclass
class Tokens:
    """What a backbone's ``tokenize`` returns and its ``encode`` takes.

    Attributes:
        values: ``(b, n, d)``.
        index: ``(b, n, 4)`` int64 patch coordinates x, y, z, t (``b`` may be broadcast).
        valid: ``(b, n)`` bool, False for padding tokens that stand for nothing.
        grid: The full patch grid that ``index`` points into.
        brain: ``(b, n)`` share of brain voxels in each token's patch, in [0, 1].
        patches: ``(b, n, px·py·pz·pt)`` raw voxels of each token ordered px, py, pz, pt, from
            backbones that form them anyway; voxels outside the brain hold the background.
        inside: ``(b, n, px·py·pz·pt)`` bool, True = brain voxel, beside ``patches``.
    """

    values: Tensor
    index: Tensor
    valid: Tensor
    grid: Grid
    brain: Tensor
    patches: Tensor | None = None
    inside: Tensor | None = None

    def with_values(self, values: Tensor) -> Tokens:
        """The same tokens with other values of the same shape."""
        if values.shape != self.values.shape:
            raise ValueError(f"expected {tuple(self.values.shape)}, got {tuple(values.shape)}")
        return replace(self, values=values)


POOLING = ("mean", "brain", "space", "frame")


@dataclass
class Features:
    """What a backbone's ``encode`` returns: the fields of :class:`Tokens` at the output grid."""

    values: Tensor
    index: Tensor
    valid: Tensor
    grid: Grid
    brain: Tensor

    def to_grid(self) -> Tensor:
        """``(b, d, x, y, z, t)``; cells without a token are 0."""
        b, _, d = self.values.shape
        x, y, z, t = self.index.unbind(-1)
        flat = ((x * self.grid.y + y) * self.grid.z + z) * self.grid.t + t
        out = self.values.new_zeros(b, self.grid.size, d)
        kept = self.values * self.valid.unsqueeze(-1)
        out = out.scatter_add(1, flat.expand(b, -1).unsqueeze(-1).expand(-1, -1, d), kept)
        return out.transpose(1, 2).reshape(b, d, *self.grid)

    def pooled(self, how: str = "mean") -> Tensor:
        """One vector a sample, ``(b, d)``; ``(b, x·y·z·d)`` or ``(b, t·d)`` for the last two.

        Args:
            how: ``mean`` over valid tokens, ``brain`` = weighted by each token's brain share,
                ``space`` = mean over time only, the places kept side by side, or ``frame`` = mean
                over space only, the time slots kept side by side.
        """
        if how not in POOLING:
            raise RecipeError(f"pooling must be one of {', '.join(POOLING)}, got {how!r}")
        if how == "space":
            return self.to_grid().mean(-1).flatten(1)
        if how == "frame":
            return self.by_frame().flatten(1)
        weight = self.valid.to(self.values.dtype)
        if how == "brain":
            weight = weight * self.brain.to(self.values.dtype)
        total = weight.sum(1, keepdim=True)
        if bool((total <= 0).any()):
            raise DataError("a clip without a brain voxel cannot be pooled over the brain")
        return torch.einsum("bnd,bn->bd", self.values, weight / total)

    def by_frame(self) -> Tensor:
        """``(b, t, d)``: mean over the valid tokens of each time slot (0 where there is none)."""
        b, n, d = self.values.shape
        slot = self.index[..., 3].expand(b, -1)
        # At least fp32: thousands of summands one by one would be lost in bf16.
        values = self.values.to(torch.promote_types(self.values.dtype, torch.float32))
        weight = self.valid.to(values.dtype)
        count = weight.new_zeros(b, self.grid.t).scatter_add(1, slot, weight)
        weight = weight / count.clamp(min=1).gather(1, slot)
        summed = values.new_zeros(b, self.grid.t, d).scatter_add(
            1, slot.unsqueeze(-1).expand(b, n, d), values * weight.unsqueeze(-1)
        )
        return summed.to(self.values.dtype)

"""Index layouts for shifted windows in any number of axes.

A Swin block needs its tokens grouped by window, and the next block groups them otherwise. Instead
of rolling, padding and permuting the dense grid twice a block, tokens are kept flat, *in window
order*, and one gather moves them from the order of one block to that of the next.

Shifted windows need no mask here. In a cyclically shifted grid the last window along an axis holds
tokens from both ends of that axis, which must not attend to each other; the reference puts −100 on
their logits. Cutting such a window into its parts gives the same result with fewer pairs and no
mask: a window that wraps along k axes becomes 2**k smaller windows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Consecutive windows of one size.

    Attributes:
        windows: How many.
        tokens: Tokens in each.
        slots: Length of each along the last axis (time), which runs fastest inside a window.
    """

    windows: int
    tokens: int
    slots: int


@dataclass(frozen=True)
class WindowLayout:
    """Order of the tokens of one grid, window by window.

    Attributes:
        grid: Tokens along each axis.
        padded: The grid rounded up to whole windows (padding at the end of each axis), if padded.
        cells: ``(slots,)`` index into the padded grid (row-major) of each slot.
        groups: All windows of one size together.
    """

    grid: tuple[int, ...]
    padded: tuple[int, ...]
    cells: Tensor
    groups: tuple[Group, ...]

    @property
    def is_padded(self) -> bool:
        """Whether some slots stand for no token of the grid."""
        return self.grid != self.padded

    @property
    def pairs(self) -> int:
        """Query–key pairs that attention computes."""
        return sum(group.windows * group.tokens**2 for group in self.groups)

    def raster(self) -> Tensor:
        """``(slots,)`` row-major index into the *unpadded* grid; −1 where the slot is padding."""
        inside = torch.ones_like(self.cells, dtype=torch.bool)
        flat = torch.zeros_like(self.cells)
        places = torch.unravel_index(self.cells, self.padded)
        for place, size in zip(places, self.grid, strict=True):
            inside &= place < size
            flat = flat * size + place
        return torch.where(inside, flat, -1)

    def slots(self) -> Tensor:
        """``(grid tokens,)`` slot of each token of the unpadded grid: the inverse of ``raster``."""
        raster = self.raster()
        kept = raster >= 0
        slots = torch.empty(math.prod(self.grid), dtype=torch.int64)
        slots[raster[kept]] = torch.arange(len(raster))[kept]
        return slots

    def from_layout(self, other: WindowLayout) -> Tensor | None:
        """``(slots,)`` slot in ``other`` of the token in each of our slots; None if they agree."""
        if other.padded != self.padded:
            raise ValueError(f"layouts of {other.padded} and {self.padded} do not mix")
        if torch.equal(other.cells, self.cells):
            return None
        inverse = torch.empty_like(other.cells)
        inverse[other.cells] = torch.arange(len(other.cells))
        return inverse[self.cells]

    def rows(self, batch: int) -> Tensor:
        """``(slots, batch)`` row of each sample's slots when a batch is kept group by group.

        Within a group rows are ``(window, sample, token)``: a group is one block of rows for any
        batch size, and attention over it needs no copy.
        """
        sample = torch.arange(batch)
        parts, start = [], 0
        for windows, tokens, _ in self.groups:
            slot = torch.arange(windows * tokens).unsqueeze(1)
            window, token = slot // tokens, slot % tokens
            parts.append((start + window * tokens) * batch + sample * tokens + token)
            start += windows * tokens
        return torch.cat(parts)


def raster_layout(grid: Sequence[int]) -> WindowLayout:
    """The row-major order of a whole grid, as one window."""
    size = math.prod(grid)
    return WindowLayout(tuple(grid), tuple(grid), torch.arange(size), (Group(1, size, grid[-1]),))


def effective_window(
    grid: Sequence[int], window: Sequence[int], shifted: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window and shift that a grid allows: an axis within one window is taken whole, unshifted."""
    size = tuple(min(g, w) for g, w in zip(grid, window, strict=True))
    shift = tuple(w // 2 if shifted and g > w else 0 for g, w in zip(grid, window, strict=True))
    return size, shift


@lru_cache(maxsize=256)
def window_layout(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], pad: bool = True
) -> WindowLayout:
    """The layout of ``grid`` cut into windows after a cyclic shift by ``shift`` (0 = none).

    Inside a window the last axis runs fastest, and rises. ``pad``: fill the last window of an axis
    up with padding, as Swin does; otherwise it is smaller, as if the padding were masked.
    """
    padded = tuple(math.ceil(g / w) * w for g, w in zip(grid, window, strict=True))
    axes = [_cuts(*axis) for axis in zip(padded, window, shift, strict=True)]
    if not pad:
        axes = [_within(parts, size) for parts, size in zip(axes, grid, strict=True)]
        padded = tuple(grid)
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    for parts in itertools.product(*axes):
        flat = torch.zeros((), dtype=torch.int64)
        for place, length in zip(parts, padded, strict=True):
            flat = flat.unsqueeze(-1) * length + place
        by_size.setdefault((flat.numel(), flat.shape[-1]), []).append(flat.flatten())
    sizes = sorted(by_size, reverse=True)
    return WindowLayout(
        grid=tuple(grid),
        padded=padded,
        cells=torch.cat([cells for size in sizes for cells in by_size[size]]),
        groups=tuple(Group(len(by_size[size]), *size) for size in sizes),
    )


def _cuts(length: int, window: int, shift: int) -> list[Tensor]:
    """Positions along one axis that are windowed together, in the order of the shifted grid."""
    starts = range(shift, length - window + shift + 1, window)
    whole = [torch.arange(start, start + window) for start in starts]
    if not shift:
        return whole
    wrapped = whole.pop()
    return [*whole, wrapped[: window - shift], wrapped[window - shift :] - length]


def _within(parts: list[Tensor], length: int) -> list[Tensor]:
    """``parts`` of an axis without the positions from ``length`` on."""
    kept = [part[part < length] for part in parts]
    return [part for part in kept if len(part)]

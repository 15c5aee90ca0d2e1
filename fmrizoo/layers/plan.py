"""How the tokens of a batch move through the stages of a shifted-window transformer.

A plan is integer bookkeeping only: it depends on the grids, the windows and the batch size, and is
built once for each of those. Rows of a batch are kept group by group (windows of one size), and in
a group as ``(window, sample, token)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from fmrizoo.layers.attention import Windows
from fmrizoo.layers.windows import Group, WindowLayout, raster_layout


@dataclass(frozen=True)
class Order:
    """Consecutive rows of a batch in window order, on one device.

    Attributes:
        groups: Windows, consecutive blocks of rows.
        padding: ``(rows, 1)`` bool, True where a row is padding; None if no row is.
        sample: ``(rows,)`` which sample a row belongs to.
    """

    groups: tuple[Group, ...]
    padding: Tensor | None
    sample: Tensor

    @property
    def windows(self) -> Windows:
        """What attends to what."""
        return Windows(self.groups)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(group.windows * group.tokens for group in self.groups)


class _Permute(torch.autograd.Function):
    """A gather that moves every row to one place: its gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


@dataclass(frozen=True)
class Gather:
    """Rows taken from rows: ``gather(x) == x[index]``, cheaper when ``index`` is a permutation."""

    index: Tensor
    inverse: Tensor | None

    @classmethod
    def of(cls, index: Tensor, sources: int, device: torch.device) -> Gather:
        """From a flat ``index`` into ``sources`` rows."""
        inverse = None
        if len(index) == sources and bool((index.bincount(minlength=sources) == 1).all()):
            inverse = torch.empty_like(index)
            inverse[index] = torch.arange(sources)
            inverse = inverse.to(device)
        return cls(index.to(device), inverse)

    def __call__(self, rows: Tensor) -> Tensor:
        """``(sources, d)`` → ``(len(index), d)``."""
        if self.inverse is None:
            return rows.index_select(0, self.index)
        moved: Tensor = _Permute.apply(rows, self.index, self.inverse)
        return moved


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        enter: Rows of the previous stage (or of the row-major input) that each row of this stage
            is made of, ``merged`` of them for each.
        merged: How many.
        raster: ``(rows,)`` row-major token of each row (0 for padding).
        orders: One list per block: its rows in the pieces that are worked on one after another.
        moves: One per block: gather into that block's order, None = already there.
        leave: From the last block's order to the ``b · n`` row-major tokens.
    """

    enter: Gather
    merged: int
    raster: Tensor
    orders: list[list[Order]]
    moves: list[Gather | None]
    leave: Gather


def gather_rows(index: Tensor, source: WindowLayout, target: WindowLayout, batch: int) -> Tensor:
    """Slots of one sample → rows of a batch.

    Args:
        index: ``(target slots, …)`` source slots of each target slot.
        source, target: Layouts between which rows move.
        batch: Samples.

    Returns:
        ``(target rows, …)`` source row of each target row.
    """
    where, to = source.rows(batch), target.rows(batch)
    result = torch.empty(to.numel(), *index.shape[1:], dtype=torch.int64)
    for sample in range(batch):
        result[to[:, sample]] = where[:, sample][index]
    return result


def neighbours(grid: Sequence[int], factors: Sequence[int]) -> Tensor:
    """``(merged tokens, merged)`` row-major tokens of ``grid`` that merge into each new token.

    ``grid (x, y, z, t)``; neighbours are ordered x slowest, z fastest; time is never merged.
    """
    x, y, z, t = grid
    fx, fy, fz = factors
    index = torch.arange(prod(grid)).view(x // fx, fx, y // fy, fy, z // fz, fz, t)
    return index.permute(0, 2, 4, 6, 1, 3, 5).reshape(-1, fx * fy * fz)


def _orders(
    layout: WindowLayout, batch: int, device: torch.device, max_rows: int | None
) -> list[Order]:
    """The rows of a batch in pieces of whole windows, of at most ``max_rows`` where it can be."""
    rows = layout.rows(batch)
    sample = torch.empty(rows.numel(), dtype=torch.int64)
    sample[rows] = torch.arange(batch).expand_as(rows)
    padding = torch.zeros(rows.numel(), 1, dtype=torch.bool)
    padding[rows] = (layout.raster() < 0).view(-1, 1, 1).expand(-1, batch, 1)
    pieces: list[list[Group]] = [[]]
    room = limit = max_rows or rows.numel()
    for windows, tokens, slots in layout.groups:
        left = windows * batch
        while left:
            if room < tokens and pieces[-1]:
                pieces.append([])
                room = limit
            taken = min(left, max(1, room // tokens))
            pieces[-1].append(Group(taken, tokens, slots))
            left, room = left - taken, room - taken * tokens
    orders, start = [], 0
    for groups in pieces:
        stop = start + sum(group.windows * group.tokens for group in groups)
        empty = padding[start:stop] if bool(padding[start:stop].any()) else None
        orders.append(
            Order(
                tuple(groups),
                None if empty is None else empty.to(device),
                sample[start:stop].to(device),
            )
        )
        start = stop
    return orders


def stage_plan(
    layouts: list[WindowLayout],
    batch: int,
    device: torch.device,
    previous: tuple[WindowLayout, Sequence[int]] | None,
    max_rows: int | None = None,
) -> StagePlan:
    """Plan one stage.

    Args:
        layouts: The layout of each block (all of the same grid).
        batch: Samples.
        device: Where the indices are kept.
        previous: Last layout of the previous stage and the merge factors along x, y, z;
            None: the input is row-major.
        max_rows: Rows that are worked on at a time (whole windows); None: all.
    """
    first, last = layouts[0], layouts[-1]
    dense = raster_layout(first.grid)
    raster = first.raster().clamp(min=0)
    token = torch.empty(len(raster) * batch, dtype=torch.int64)
    token[first.rows(batch)] = raster.unsqueeze(1).expand(-1, batch)
    if previous is None:
        source, chosen = dense, raster.unsqueeze(1)
    else:
        source, factors = previous
        chosen = source.slots()[neighbours(source.grid, factors)][raster]

    def gather(index: Tensor, before: WindowLayout, after: WindowLayout) -> Gather:
        rows = gather_rows(index, before, after, batch).flatten()
        return Gather.of(rows, len(before.cells) * batch, device)

    moves: list[Gather | None] = [None]
    for before, after in pairwise(layouts):
        index = after.from_layout(before)
        moves.append(None if index is None else gather(index, before, after))
    return StagePlan(
        enter=gather(chosen, source, first),
        merged=chosen.shape[1],
        raster=token.to(device),
        orders=[_orders(layout, batch, device, max_rows) for layout in layouts],
        moves=moves,
        leave=gather(last.slots(), last, dense),
    )

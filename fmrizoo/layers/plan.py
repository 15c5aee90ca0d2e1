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

from fmrizoo.layers.windows import WindowLayout, raster_layout


@dataclass(frozen=True)
class Order:
    """A window layout for a batch on one device.

    Attributes:
        groups: ``(windows of the whole batch, tokens in each)``, consecutive blocks of rows.
        padding: ``(rows, 1)`` bool, True where a row is padding; None if no row is.
        sample: ``(rows,)`` which sample a row belongs to.
    """

    groups: tuple[tuple[int, int], ...]
    padding: Tensor | None
    sample: Tensor


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        enter: ``(rows, merged)`` rows of the previous stage (or of the row-major input) that each
            row of this stage is made of.
        raster: ``(rows,)`` row-major token of each row (0 for padding).
        orders: One per block.
        moves: One per block: ``(rows,)`` gather into that block's order, None = already there.
        leave: ``(b · n,)`` gather from the last block's order to row-major tokens.
    """

    enter: Tensor
    raster: Tensor
    orders: list[Order]
    moves: list[Tensor | None]
    leave: Tensor


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


def _order(layout: WindowLayout, batch: int, device: torch.device) -> Order:
    rows = layout.rows(batch)
    sample = torch.empty(rows.numel(), dtype=torch.int64)
    sample[rows] = torch.arange(batch).expand_as(rows)
    padding = None
    if layout.is_padded:
        padding = torch.empty(rows.numel(), 1, dtype=torch.bool)
        padding[rows] = (layout.raster() < 0).view(-1, 1, 1).expand(-1, batch, 1)
        padding = padding.to(device)
    groups = tuple((count * batch, tokens) for count, tokens in layout.groups)
    return Order(groups, padding, sample.to(device))


def stage_plan(
    layouts: list[WindowLayout],
    batch: int,
    device: torch.device,
    previous: tuple[WindowLayout, Sequence[int]] | None,
) -> StagePlan:
    """Plan one stage.

    Args:
        layouts: The layout of each block (all of the same grid).
        batch: Samples.
        device: Where the indices are kept.
        previous: Last layout of the previous stage and the merge factors along x, y, z;
            None: the input is row-major.
    """
    first, last = layouts[0], layouts[-1]
    dense = raster_layout(first.grid)
    raster = first.raster().clamp(min=0)
    token = torch.empty(len(raster) * batch, dtype=torch.int64)
    token[first.rows(batch)] = raster.unsqueeze(1).expand(-1, batch)
    if previous is None:
        enter = gather_rows(raster.unsqueeze(1), dense, first, batch)
    else:
        source, factors = previous
        merged = source.slots()[neighbours(source.grid, factors)]
        enter = gather_rows(merged[raster], source, first, batch)
    moves: list[Tensor | None] = [None]
    for before, after in pairwise(layouts):
        index = after.from_layout(before)
        moves.append(None if index is None else gather_rows(index, before, after, batch).to(device))
    return StagePlan(
        enter=enter.to(device),
        raster=token.to(device),
        orders=[_order(layout, batch, device) for layout in layouts],
        moves=moves,
        leave=gather_rows(last.slots(), last, dense, batch).to(device),
    )

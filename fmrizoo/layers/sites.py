"""Sites × frames: how tokens move when space and time attend in turn.

Tokens are kept as ``(sites, frames, d)``, the sites in the window order of their stage and the
frames of all samples side by side (``b · t``). What attends in time stays within one site, what
attends in space within one frame, so either can be worked on some sites or some frames at a time,
each with nothing but a slice of the tokens. Windows at a border are smaller; none is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor

from fmrizoo.layers.attention import Windows
from fmrizoo.layers.plan import Gather, gather_rows, neighbours
from fmrizoo.layers.rope import rotations
from fmrizoo.layers.windows import Group, WindowLayout, effective_window, window_layout

Space = tuple[int, int, int]


@dataclass(frozen=True)
class Rotary:
    """What the rotary positions of a stage depend on, beside the positions.

    Attributes:
        head_dim: Channels of a head.
        theta: Base of the frequencies.
        wide: Double precision.
        device: Where the tables are kept.
    """

    head_dim: int
    theta: float
    wide: bool
    device: torch.device


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept, for passes that train too
def _in_time(slots: int, rotary: Rotary) -> Tensor:
    positions = torch.arange(slots).unsqueeze(1)
    return rotations(positions, rotary.head_dim, rotary.theta, rotary.wide).to(rotary.device)


def time_lengths(slots: int, window: int, shifted: bool) -> tuple[int, ...]:
    """Lengths of the windows along ``slots`` in time; they are slices, the first one starts at 0.

    A shifted window that would wrap around holds both ends of the clip, which must not meet: it is
    cut in two.
    """
    (size,), (shift,) = effective_window((slots,), (window,), shifted)
    edges = [0, *range(shift or size, slots, size), slots]
    return tuple(b - a for a, b in pairwise(edges))


def time_windows(lengths: tuple[int, ...], sites: int, rotary: Rotary) -> Windows:
    """The windows of rows ``(sites, slots)``."""
    rotation = _in_time(sum(lengths), rotary)
    if len(set(lengths)) == 1:
        group = Group(sites * len(lengths), lengths[0], lengths[0])
        return Windows((group,), rotation=rotation)
    return Windows(tuple(Group(1, n, n) for n in lengths), sites, rotation)


def space_layouts(grid: Space, window: Space, shifts: bool) -> tuple[WindowLayout, WindowLayout]:
    """Layouts of the two Swin blocks of a spatial pair; the sites are kept in the first one's."""
    first, second = (
        window_layout(grid, *effective_window(grid, window, shifted), pad=False)
        for shifted in (False, shifts)
    )
    return first, second


@dataclass(frozen=True)
class SpaceRows:
    """How ``frames`` of all sites, rows ``(sites, frames)``, go through a spatial pair.

    Attributes:
        enter: Into the order of the first block; None = already there.
        windows: Of both blocks.
        move: From the first to the second; None = the same.
        leave: Back.
        frame: Which frame each row is of, in both blocks.
    """

    enter: Gather | None
    windows: tuple[Windows, Windows]
    move: Gather | None
    leave: Gather | None
    frame: tuple[Tensor, Tensor]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def space_rows(grid: Space, window: Space, shifts: bool, frames: int, rotary: Rotary) -> SpaceRows:
    """The plan for so many frames.

    Args:
        grid: Sites along x, y, z.
        window: Sites of a window.
        shifts: Whether the second block's windows are shifted by half.
        frames: At a time.
        rotary: See :class:`Rotary`.
    """
    first, second = layouts = space_layouts(grid, window, shifts)
    sites, device = len(first.cells), rotary.device
    kept = torch.arange(sites * frames).view(sites, frames)
    enter = torch.empty(sites * frames, dtype=torch.int64)
    enter[first.rows(frames)] = kept
    moved = second.from_layout(first)
    where = first.from_layout(second)
    rows = second.rows(frames)
    leave = (rows if where is None else rows[where]).flatten()

    def gather(index: Tensor) -> Gather | None:
        if torch.equal(index, torch.arange(len(index))):
            return None
        return Gather.of(index, len(index), device)

    windows, frame = [], []
    for layout in layouts:
        place = torch.stack(torch.unravel_index(layout.cells, grid), 1)
        rotation = rotations(place, rotary.head_dim, rotary.theta, rotary.wide)
        row = layout.rows(frames)
        spread = rotation.new_empty(row.numel(), rotation.shape[1])
        spread[row] = rotation.unsqueeze(1)
        of = torch.empty(row.numel(), dtype=torch.int64)
        of[row] = torch.arange(frames).expand_as(row)
        groups = tuple(Group(g.windows * frames, g.tokens, g.slots) for g in layout.groups)
        windows.append(Windows(groups, rotation=spread.to(device)))
        frame.append(of.to(device))
    return SpaceRows(
        enter=gather(enter),
        windows=(windows[0], windows[1]),
        move=None if moved is None else gather(gather_rows(moved, first, second, frames).flatten()),
        leave=gather(leave),
        frame=(frame[0], frame[1]),
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def site_gathers(
    grid: Space, window: Space, batch: int, device: torch.device
) -> tuple[Gather, Gather]:
    """Between row-major ``(b, x·y·z)`` and kept ``(sites, b)``: into our order, and back."""
    layout, _ = space_layouts(grid, window, False)
    sites = len(layout.cells)
    into = (torch.arange(batch) * sites + layout.cells.unsqueeze(1)).flatten()
    back = (layout.slots() * batch + torch.arange(batch).unsqueeze(1)).flatten()
    total = sites * batch
    return Gather.of(into, total, device), Gather.of(back, total, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def merge_gather(
    grid: Space, window: Space, factors: Space, next_window: Space, device: torch.device
) -> Gather:
    """Sites → sites, such that those that merge lie side by side, in the next stage's order."""
    before, _ = space_layouts(grid, window, False)
    x, y, z = (g // f for g, f in zip(grid, factors, strict=True))
    after, _ = space_layouts((x, y, z), next_window, False)
    chosen = before.slots()[neighbours((*grid, 1), factors)][after.cells]
    return Gather.of(chosen.flatten(), len(before.cells), device)


def even_sizes(total: int, step: int) -> list[int]:
    """``total`` in pieces of at most ``step`` (≥ 1), as equal as can be."""
    count = ceil(total / max(step, 1))
    return [total // count + (piece < total % count) for piece in range(count)]

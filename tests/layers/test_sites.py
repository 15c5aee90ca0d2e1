"""Sites × frames: the gathers around the pairs, and windows in time."""

from __future__ import annotations

import itertools

import pytest
import torch

from fmrizoo.layers.plan import neighbours
from fmrizoo.layers.sites import (
    Rotary,
    even_sizes,
    merge_gather,
    site_gathers,
    space_layouts,
    space_rows,
    time_lengths,
    time_windows,
)

ROTARY = Rotary(6, 1e4, False, torch.device("cpu"))
GRIDS = [((4, 4, 4), (2, 2, 2)), ((5, 3, 4), (2, 2, 3)), ((4, 1, 2), (4, 4, 4))]


def test_windows_in_time_are_slices_of_the_clip() -> None:
    assert time_lengths(20, 10, False) == (10, 10)
    assert time_lengths(20, 10, True) == (5, 10, 5)
    assert time_lengths(13, 10, False) == (10, 3)
    assert time_lengths(13, 10, True) == (5, 8)
    assert time_lengths(8, 10, True) == time_lengths(8, 10, False) == (8,)
    assert time_lengths(7, 3, True) == (1, 3, 3)
    assert time_lengths(3, 1, True) == (1, 1, 1)
    for slots, window, odd in itertools.product(range(1, 15), range(1, 6), (False, True)):
        lengths = time_lengths(slots, window, odd)
        assert sum(lengths) == slots and 1 <= min(lengths) <= max(lengths) <= window


def test_equal_windows_in_time_are_one_group() -> None:
    whole = time_windows((4, 4), 7, ROTARY)
    assert (whole.groups, whole.outer) == (((14, 4, 4),), 1)
    cut = time_windows((2, 4, 2), 7, ROTARY)
    assert (cut.groups, cut.outer) == (((1, 2, 2), (1, 4, 4), (1, 2, 2)), 7)
    assert whole.rotation is not None and torch.equal(whole.rotation, cut.rotation)


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("frames", [1, 3])
def test_every_row_keeps_its_site_and_frame_through_a_pair(
    grid: tuple[int, int, int], window: tuple[int, int, int], frames: int
) -> None:
    plan = space_rows(grid, window, True, frames, ROTARY)
    layouts = space_layouts(grid, window, True)
    site = layouts[0].cells.unsqueeze(1).expand(-1, frames)
    rows = torch.stack([site, torch.arange(frames).expand_as(site)], -1).flatten(0, 1)
    found = rows if plan.enter is None else plan.enter(rows)
    for number, layout in enumerate(layouts):
        if number and plan.move is not None:
            found = plan.move(found)
        assert torch.equal(found[:, 1], plan.frame[number])
        start = 0
        for (windows, tokens, _), here in zip(
            layout.groups, plan.windows[number].groups, strict=True
        ):
            assert here[:2] == (windows * frames, tokens)
            block = found[start : start + windows * frames * tokens].view(-1, tokens, 2)
            assert bool((block[..., 1] == block[:, :1, 1]).all()), "a window is of one frame"
            start += windows * frames * tokens
    back = found if plan.leave is None else plan.leave(found)
    assert torch.equal(back, rows)


@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_tokens_come_in_and_go_out_again(
    grid: tuple[int, int, int], window: tuple[int, int, int]
) -> None:
    enter, leave = site_gathers(grid, window, 3, ROTARY.device)
    layout, _ = space_layouts(grid, window, False)
    rows = torch.cartesian_prod(torch.arange(3), torch.arange(len(layout.cells)))
    kept = enter(rows).view(-1, 3, 2)
    assert torch.equal(kept[:, 1, 1], layout.cells) and torch.equal(kept[0, :, 0], torch.arange(3))
    assert torch.equal(leave(kept.flatten(0, 1)), rows)


def test_sites_that_merge_lie_side_by_side_in_the_next_order() -> None:
    grid, window, following = (4, 4, 2), (2, 4, 1), (1, 2, 1)
    gather = merge_gather(grid, window, (2, 2, 2), following, ROTARY.device)
    before, _ = space_layouts(grid, window, False)
    after, _ = space_layouts((2, 2, 1), following, False)
    found = gather(before.cells.unsqueeze(1)).view(-1, 8)
    assert torch.equal(found, neighbours((*grid, 1), (2, 2, 2))[after.cells])


def test_pieces_are_as_equal_as_can_be() -> None:
    assert even_sizes(20, 3) == [3, 3, 3, 3, 3, 3, 2]
    assert even_sizes(7, 0) == [1] * 7
    assert even_sizes(5, 9) == [5]

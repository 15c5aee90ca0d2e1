"""Window layouts against the roll, pad and mask of the published algorithm."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fmrizoo.layers.plan import Gather, neighbours, stage_plan
from fmrizoo.layers.windows import (
    Group,
    WindowLayout,
    effective_window,
    raster_layout,
    window_layout,
)

SHAPES = [
    ((8, 8), (4, 4), (2, 2)),
    ((7, 5), (4, 2), (2, 1)),
    ((6, 9), (3, 9), (1, 0)),
    ((5, 4, 7), (2, 4, 3), (1, 0, 1)),
]


@pytest.mark.parametrize(("grid", "window", "shift"), SHAPES)
def test_windows_hold_the_pairs_that_the_masked_algorithm_allows(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> None:
    padded = tuple(math.ceil(g / w) * w for g, w in zip(grid, window, strict=True))
    cells = torch.arange(math.prod(padded)).view(padded)
    rolled = torch.roll(cells, [-s for s in shift], dims=list(range(len(grid))))
    regions = torch.zeros(padded)
    cuts = [
        (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),)
        for w, s in zip(window, shift, strict=True)
    ]
    for number, parts in enumerate(itertools.product(*cuts)):
        regions[parts] = number
    expected = set()
    for corner in itertools.product(*(range(0, p, w) for p, w in zip(padded, window, strict=True))):
        box = tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))
        members, region = rolled[box].flatten().tolist(), regions[box].flatten().tolist()
        for (a, ra), (b, rb) in itertools.product(zip(members, region, strict=True), repeat=2):
            if ra == rb:
                expected.add((a, b))
    layout = window_layout(grid, window, shift)
    found, start = set(), 0
    for count, tokens, _ in layout.groups:
        for chunk in layout.cells[start : start + count * tokens].view(count, tokens).tolist():
            found |= set(itertools.product(chunk, repeat=2))
        start += count * tokens
    assert found == expected
    assert layout.pairs == len(expected)


@pytest.mark.parametrize(("grid", "window", "shift"), SHAPES)
def test_slots_and_raster_are_inverse(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> None:
    layout = window_layout(grid, window, shift)
    raster, slots = layout.raster(), layout.slots()
    assert torch.equal(raster[slots], torch.arange(math.prod(grid)))
    assert (raster < 0).sum() == math.prod(layout.padded) - math.prod(grid)
    assert layout.is_padded == (layout.padded != grid)


def test_moving_between_layouts_keeps_every_token_of_every_sample() -> None:
    grid, batch = (6, 5), 3
    layouts = [window_layout(grid, (4, 4), (0, 0)), window_layout(grid, (4, 4), (2, 2))]
    plan = stage_plan(layouts, batch, torch.device("cpu"), None)
    rows = torch.randn(batch * 30, 7)
    assert plan.moves[1] is not None
    back = plan.leave(plan.moves[1](plan.enter(rows)))
    assert torch.equal(back, rows)
    first = plan.enter(rows)
    tokens = rows.view(batch, 30, 7)
    assert torch.equal(first, tokens[plan.orders[0][0].sample, plan.raster])


def test_permutations_have_the_gradient_of_a_gather() -> None:
    index = torch.randperm(12)
    rows = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    gather = Gather.of(index, 12, torch.device("cpu"))
    assert gather.inverse is not None
    torch.autograd.gradcheck(gather, rows)
    assert torch.equal(gather(rows), rows[index])
    assert Gather.of(torch.tensor([0, 0, 1]), 3, torch.device("cpu")).inverse is None


def test_neighbours_come_in_the_references_order() -> None:
    grid = (4, 2, 2, 3)
    tokens = torch.arange(math.prod(grid)).view(grid)
    corners = itertools.product(range(2), range(2), range(2))
    expected = torch.stack([tokens[i::2, j::2, k::2] for i, j, k in corners], -1)
    assert torch.equal(neighbours(grid, (2, 2, 2)), expected.reshape(-1, 8))
    assert neighbours(grid, (1, 2, 2)).shape == (4 * 3, 4)


def test_layouts_of_different_grids_do_not_mix() -> None:
    with pytest.raises(ValueError, match="do not mix"):
        window_layout((8,), (4,), (0,)).from_layout(window_layout((9,), (4,), (0,)))
    assert raster_layout((2, 3)).groups == ((1, 6, 3),)


def test_an_axis_within_one_window_is_taken_whole_and_unshifted() -> None:
    assert effective_window((3, 4, 9), (4, 4, 4), True) == ((3, 4, 4), (0, 0, 2))
    assert effective_window((3, 4, 9), (4, 4, 4), False) == ((3, 4, 4), (0, 0, 0))


def test_without_padding_border_windows_are_smaller_and_hold_the_same_tokens() -> None:
    for grid, window, shift in SHAPES:
        padded, cut = (window_layout(grid, window, shift, pad) for pad in (True, False))
        assert cut.padded == grid and not cut.is_padded

        def members(layout: WindowLayout) -> set[tuple[int, ...]]:
            raster, found, start = layout.raster(), set(), 0
            for windows, tokens, slots in layout.groups:
                for one in raster[start : start + windows * tokens].view(windows, tokens):
                    assert tokens % slots == 0
                    found.add(tuple(v for v in one.tolist() if v >= 0))
                start += windows * tokens
            return found - {()}

        assert members(cut) == members(padded)


def test_groups_tell_the_extent_of_the_last_axis_which_rises() -> None:
    layout = window_layout((6, 7), (4, 4), (2, 2), pad=False)
    start = 0
    for windows, tokens, slots in layout.groups:
        times = layout.cells[start : start + windows * tokens].view(windows, -1, slots) % 7
        assert bool((times.diff(dim=-1) == 1).all())
        start += windows * tokens
    assert {Group(1, 8, 4), Group(1, 8, 2)} < set(layout.groups), "equal counts, other shapes"

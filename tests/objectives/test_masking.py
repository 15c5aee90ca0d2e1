"""How many cells are hidden, which, and that a seed decides it alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmrizoo.errors import RecipeError
from fmrizoo.objectives.masking import MASK_TYPES, cell_factors, draw_mask
from fmrizoo.types import Grid

ONE = (1, 1, 1, 1)
GRID = Grid(4, 3, 2, 6)


def drawn(
    kind: str = "random",
    ratio: float = 0.6,
    grid: Grid = GRID,
    factors: tuple[int, int, int, int] = ONE,
    seeds: tuple[int | None, ...] = (1, 2, 3),
) -> Tensor:
    """``(b, x, y, z, t)``."""
    return draw_mask(grid, factors, ratio, kind, seeds).view(-1, *grid)


# Cells: random 4·3·2·6 = 144, tube 4·3·2 = 24, temporal 6.
@pytest.mark.parametrize(
    ("kind", "ratio", "hidden"),
    [
        ("random", 0.6, 87),  # 86.4
        ("random", 0.5, 72),
        ("random", 0.001, 1),
        ("random", 1.0, 144),
        ("tube", 0.6, 15 * 6),  # 14.4 places
        ("tube", 0.25, 6 * 6),
        ("temporal", 0.6, 4 * 24),  # 3.6 frames
        ("temporal", 0.5, 3 * 24),
    ],
)
def test_share_is_rounded_up_to_whole_cells(kind: str, ratio: float, hidden: int) -> None:
    assert drawn(kind, ratio).flatten(1).sum(1).tolist() == [hidden] * 3


def test_tube_hides_the_same_places_at_all_times() -> None:
    mask = drawn("tube")
    assert torch.equal(mask, mask[..., :1].expand_as(mask))
    assert 0 < mask[0, ..., 0].sum() < 24


def test_temporal_hides_whole_frames() -> None:
    mask = drawn("temporal")
    frames = mask[:, 0, 0, 0]
    assert torch.equal(mask, frames[:, None, None, None].expand_as(mask))
    assert not torch.equal(frames[0], frames[1]) or not torch.equal(frames[1], frames[2])


def test_random_is_neither_tube_nor_temporal() -> None:
    mask = drawn("random")
    assert not torch.equal(mask, mask[..., :1].expand_as(mask))
    assert not torch.equal(mask, mask[:, :1, :1, :1].expand_as(mask))


def test_every_cell_is_hidden_equally_often() -> None:
    """Over 2000 seeds, 0.5 ± 0.06 each (5 s.d. of a fair draw)."""
    grid = Grid(2, 2, 2, 2)
    often = draw_mask(grid, ONE, 0.5, "random", range(2000)).double().mean(0)
    assert ((often - 0.5).abs() < 0.06).all()


def test_cells_larger_than_patches_hide_whole_cells_and_are_cut_at_the_end() -> None:
    # 5×4×1×3 patches in cells of 2×2×1×2: 3·2·1·2 = 12 cells, the last along x and t are cut.
    grid, factors = Grid(5, 4, 1, 3), (2, 2, 1, 2)
    mask = drawn("random", 0.5, grid, factors)
    for sample in mask:
        hidden = 0
        for x in (0, 2, 4):
            for y in (0, 2):
                for t in (0, 2):
                    cell = sample[x : x + 2, y : y + 2, :, t : t + 2]
                    assert cell.all() or not cell.any()
                    hidden += bool(cell.all())
        assert hidden == 6


@pytest.mark.parametrize("kind", MASK_TYPES)
def test_a_seed_gives_one_mask_whoever_is_beside_it(kind: str) -> None:
    together = drawn(kind, seeds=(7, 8, 9))
    torch.manual_seed(123)
    assert torch.equal(drawn(kind, seeds=(9, 7)), together[[2, 0]])
    many = drawn(kind, seeds=tuple(range(10)))
    assert len({tuple(m.flatten().tolist()) for m in many}) > 3


def test_seeded_draws_leave_torch_s_state_alone_and_unseeded_ones_follow_it() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(seeds=(1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    first = drawn(seeds=(None,))
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    assert torch.equal(drawn(seeds=(None,)), first)


def test_mask_patch_is_counted_in_patches_and_must_be_a_multiple() -> None:
    assert cell_factors([12, 6, 6, 4], (6, 6, 6, 2)) == (2, 1, 1, 2)
    with pytest.raises(RecipeError, match=r"\[6, 9, 6, 2\] must be a multiple.*\[6, 6, 6, 2\]"):
        cell_factors([6, 9, 6, 2], (6, 6, 6, 2))

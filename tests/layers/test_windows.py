"""Window layouts against the roll, pad and mask of the published algorithm."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fmrizoo.layers.attention import attend_windows
from fmrizoo.layers.plan import Gather, neighbours, stage_plan
from fmrizoo.layers.windows import effective_window, raster_layout, window_layout

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
    for count, tokens in layout.groups:
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
    assert raster_layout((2, 3)).groups == ((1, 6),)


def test_an_axis_within_one_window_is_taken_whole_and_unshifted() -> None:
    assert effective_window((3, 4, 9), (4, 4, 4), True) == ((3, 4, 4), (0, 0, 2))
    assert effective_window((3, 4, 9), (4, 4, 4), False) == ((3, 4, 4), (0, 0, 0))


def explicit(qkv: torch.Tensor, groups: list[tuple[int, int]], heads: int) -> torch.Tensor:
    """Attention window by window, head by head, from the definition."""
    width = qkv.shape[1] // 3
    size = width // heads
    out, start = [], 0
    for count, tokens in groups:
        for _ in range(count):
            rows = qkv[start : start + tokens].view(tokens, 3, heads, size)
            q, k, v = rows.permute(1, 2, 0, 3)
            weights = torch.softmax(q @ k.transpose(1, 2) * size**-0.5, -1)
            out.append((weights @ v).transpose(0, 1).reshape(tokens, width))
            start += tokens
    return torch.cat(out)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_attention_and_its_gradient_equal_the_definition(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmrizoo.layers import attention

    monkeypatch.setattr(attention, "CACHE_BYTES", 4096)  # several slices, the last one smaller
    torch.manual_seed(0)
    groups, heads, width = [(5, 12), (3, 4)], 2, 10
    rows = sum(c * n for c, n in groups)
    exact = torch.randn(rows, 3 * width, dtype=torch.float64, requires_grad=True)
    ours = exact.detach().to(dtype).requires_grad_()
    weight = torch.randn(rows, width, dtype=torch.float64)
    expected = explicit(exact, groups, heads)
    (expected * weight).sum().backward()
    found = attend_windows(ours, groups, heads, (width // heads) ** -0.5)
    (found * weight.to(dtype)).sum().backward()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    assert exact.grad is not None and ours.grad is not None
    scale = float(exact.grad.abs().max())
    assert (ours.grad.double() - exact.grad).abs().max() <= tolerance * max(scale, 1.0)


def test_attention_dropout_takes_the_fused_path_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(64, 24)
    plain = attend_windows(qkv, [(4, 16)], 2, 0.5)
    dropped = torch.stack([attend_windows(qkv, [(4, 16)], 2, 0.5, 0.3) for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), plain, atol=0.15, rtol=0)

"""Rotary positions: their properties, and the in-place rotation against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from fmrizoo.layers.rope import rotate_queries_and_keys, rotations


def products(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``q·k`` of one query and one key put at every pair of positions, in fp64."""
    torch.manual_seed(0)
    q, k = torch.randn(2, head_dim, dtype=torch.float64)
    rows = torch.cat([q, k, k]).expand(len(positions), -1).clone()
    turned = rotate_queries_and_keys(rows, rotations(positions, head_dim, 1e4, wide=True), 1)
    return turned[:, :head_dim] @ turned[:, head_dim : 2 * head_dim].T


@pytest.mark.parametrize("axes", [1, 3])
def test_products_depend_on_the_difference_of_positions_only(axes: int) -> None:
    """fp64, to 1e-12, for shifts along each axis alone, also far out."""
    cells = torch.tensor(list(itertools.product(range(3), repeat=axes)))
    here = products(cells, 12)
    for axis, step in itertools.product(range(axes), (1, 5, 1000)):
        shift = torch.zeros(axes, dtype=torch.int64)
        shift[axis] = step
        torch.testing.assert_close(products(cells + shift, 12), here, atol=1e-11, rtol=0)
    assert (here[0, 1:] - here[0, 0]).abs().min() > 1e-4, "another place, another product"


def test_equal_coordinate_sums_stay_apart() -> None:
    corners = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = products(corners, 12)[0, 1:]
    assert all(abs(float(a - b)) > 1e-3 for a, b in itertools.combinations(found, 2))


def test_rotation_and_gradient_equal_the_definition() -> None:
    torch.manual_seed(0)
    positions, heads, head_dim, theta = torch.tensor([[0, 3], [2, 1], [5, 5]]), 2, 8, 100.0
    source = torch.randn(6, 3 * heads * head_dim, dtype=torch.float64, requires_grad=True)
    expected = source.clone()
    for row, part, head, axis, pair in itertools.product(
        range(6), range(2), range(heads), range(2), range(2)
    ):
        angle = positions[row % 3, axis].double() * theta ** (-pair / 2)
        at = part * heads * head_dim + head * head_dim + 2 * (2 * axis + pair)
        a, b = source[row, at], source[row, at + 1]
        expected[row, at] = a * angle.cos() - b * angle.sin()
        expected[row, at + 1] = a * angle.sin() + b * angle.cos()
    twin = source.detach().requires_grad_()
    table = rotations(positions, head_dim, theta, wide=True)
    found = rotate_queries_and_keys(twin * 1.0, table, heads)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    torch.testing.assert_close(twin.grad, source.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_is_rounded_once(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    positions = torch.arange(50).unsqueeze(1)
    exact = torch.randn(100, 36, dtype=torch.float64).to(dtype).double()
    rounded = exact.to(dtype)
    exact = rotate_queries_and_keys(exact, rotations(positions, 6, 1e4, wide=True), 2)
    found = rotate_queries_and_keys(rounded, rotations(positions, 6, 1e4), 2)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance / 2)


def test_channels_that_do_not_split_are_refused() -> None:
    with pytest.raises(ValueError, match="do not split into pairs over 3 axes"):
        rotations(torch.zeros(1, 3, dtype=torch.int64), 8, 1e4)

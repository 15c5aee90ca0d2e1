"""Pieces: what is overwritten, kept or made again depends on who wants a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fmrizoo.layers.pieces import by_piece, wants_gradient

MODES = ["none", "block", "window-chunk"]


def test_a_gradient_is_wanted_by_the_input_or_by_what_is_used() -> None:
    x, layer = torch.randn(4, 3), nn.Linear(3, 3)
    assert wants_gradient(x, [layer])
    layer.requires_grad_(False)
    assert not wants_gradient(x, [layer, None, torch.ones(1)])
    assert wants_gradient(x, [layer, torch.ones(1, requires_grad=True)])
    assert wants_gradient(x.clone().requires_grad_(), [layer])
    layer.bias.requires_grad_()
    assert wants_gradient(x, [layer])
    with torch.no_grad():
        assert not wants_gradient(x.clone().requires_grad_(), [layer])


@pytest.mark.parametrize("mode", MODES)
def test_what_is_frozen_runs_once_and_in_place(mode: str) -> None:
    layer, calls = nn.Linear(3, 3).requires_grad_(False), []

    def job(part: Tensor, number: int) -> Tensor:
        calls.append(number)
        out: Tensor = layer(part)
        return out

    x = torch.randn(10, 3)
    expected = layer(x)
    done = by_piece(job, x, [4, 4, 2], [layer], checkpointing=mode)
    assert done is x and torch.equal(done, expected) and not done.requires_grad
    trained = nn.Linear(3, 1)
    trained(done).sum().backward()
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("wants", ["input", "module", "tensor"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_trains_overwrites_nothing_and_is_made_again(
    mode: str, wants: str, in_place: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).requires_grad_(wants == "module")
    beside = torch.randn(3, requires_grad=wants == "tensor")
    x = torch.randn(10, 3, requires_grad=wants == "input")
    before, calls = x.detach().clone(), []

    def job(part: Tensor, number: int) -> Tensor:
        calls.append(number)
        out: Tensor = torch.tanh(layer(part)) * beside
        return out

    leaf = {"input": x, "module": layer.weight, "tensor": beside}[wants]
    (wanted,) = torch.autograd.grad((torch.tanh(layer(x)) * beside).square().sum(), leaf)
    done = by_piece(job, x, [4, 4, 2], [layer, beside], checkpointing=mode, in_place=in_place)
    assert torch.equal(x, before)
    (found,) = torch.autograd.grad(done.square().sum(), leaf)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert len(calls) == (3 if mode == "none" else 6)


def test_pieces_lie_along_any_axis() -> None:
    x = torch.randn(2, 7, 3)
    done = by_piece(
        lambda part, number: part * number, x.clone().requires_grad_(), [3, 3, 1], [], dim=1
    )
    factor = torch.tensor([0, 0, 0, 1, 1, 1, 2]).view(1, 7, 1)
    assert torch.equal(done, x * factor)

"""Decoders against their definition, and patches against voxels copied one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fmrizoo.objectives.decoders import (
    DECODERS,
    LinearDecoder,
    MLPDecoder,
    build_decoder,
    flag_voxels,
    patchify,
    unpatchify,
)
from fmrizoo.types import Grid

WIDTH = 6
GRID = Grid(2, 1, 3, 4)
REDUCTIONS = [(3, 2, 1, 1), (2, 2, 2, 2), (1, 1, 1, 3)]


def features(tokens: int = 5) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64)


def everywhere(grid: Grid = GRID) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(s) for s in grid)).unsqueeze(0)


def block(voxels: Tensor, cell: list[int], reduction: tuple[int, ...]) -> Tensor:
    """The voxels of one patch, ``(b, rx, ry, rz, rt)``."""
    places = [slice(c * r, (c + 1) * r) for c, r in zip(cell, reduction, strict=True)]
    return voxels[:, places[0], places[1], places[2], places[3]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_decoder_is_one_linear_layer_a_token(reduction: tuple[int, int, int, int]) -> None:
    decoder = LinearDecoder(WIDTH, reduction).double()
    given = features()
    expected = given @ decoder.project.weight.T + decoder.project.bias
    torch.testing.assert_close(decoder(given), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mlp_decoder_widens_time_first_then_space(reduction: tuple[int, int, int, int]) -> None:
    decoder = MLPDecoder(WIDTH, reduction).double()
    given = features()

    def layer(part: torch.nn.Module, x: Tensor) -> Tensor:
        return x @ part.weight.T + part.bias

    x = F.layer_norm(F.gelu(layer(decoder.time_embed, given)), (WIDTH,))
    x = layer(decoder.time_project, x)
    frames = []
    for j in range(reduction[3]):
        frame = x[..., j * WIDTH : (j + 1) * WIDTH] + decoder.frame_embed[j]
        frame = F.layer_norm(F.gelu(layer(decoder.space_embed, frame)), (WIDTH,))
        frames.append(layer(decoder.space_project, frame))
    # Time is the last of rx, ry, rz, rt.
    expected = torch.stack(frames, -1).flatten(-2)
    torch.testing.assert_close(decoder(given), expected)


@pytest.mark.parametrize("rt", [1, 2, 4])
def test_mlp_decoder_has_two_and_rt_squares_of_the_width_besides_its_last_projection(
    rt: int,
) -> None:
    width = 32
    count = sum(p.numel() for p in MLPDecoder(width, (4, 4, 4, rt)).parameters())
    biases_and_norms = (1 + rt + 1) * width + 4 * width + rt * width
    assert count == (2 + rt) * width**2 + biases_and_norms + (width + 1) * 64


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_decoders_learn_and_take_any_number_of_tokens(
    name: str, reduction: tuple[int, int, int, int]
) -> None:
    decoder = build_decoder(name, WIDTH, reduction).double()
    size = torch.Size(reduction).numel()
    for tokens in (1, 7):
        assert decoder(features(tokens)).shape == (2, tokens, size)
    decoder(features()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_of_any_size_build_without_memory(name: str) -> None:
    with torch.device("meta"):
        decoder = build_decoder(name, 11520, (48, 48, 48, 2))
    assert all(p.is_meta for p in decoder.parameters())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_patches_are_the_voxels_of_their_cells(reduction: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    sizes = [g * r for g, r in zip(GRID, reduction, strict=True)]
    voxels, index = torch.randn(2, *sizes), everywhere()[:, torch.randperm(GRID.size)[:5]]
    patches = patchify(voxels, index, reduction)
    for number, cell in enumerate(index[0].tolist()):
        expected = block(voxels, cell, reduction).flatten(1)
        assert torch.equal(patches[:, number], expected)
    each = torch.stack([everywhere()[0, :5], everywhere()[0, -5:]])  # other cells in each sample
    found = patchify(voxels, each, reduction)
    for sample in range(2):
        alone = patchify(voxels[sample : sample + 1], each[sample : sample + 1], reduction)
        assert torch.equal(found[sample], alone[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_unpatchify_is_the_inverse_and_leaves_other_cells_at_0(
    reduction: tuple[int, int, int, int],
) -> None:
    torch.manual_seed(0)
    sizes = [g * r for g, r in zip(GRID, reduction, strict=True)]
    voxels, order = torch.randn(2, *sizes), torch.randperm(GRID.size)
    index = everywhere()[:, order]
    patches = patchify(voxels, index, reduction)
    assert torch.equal(unpatchify(patches, index, GRID, reduction), voxels)
    valid = torch.zeros(2, GRID.size, dtype=torch.bool)
    valid[0, :3] = valid[1, 7:9] = True
    some = unpatchify(patches, index, GRID, reduction, valid)
    flags = flag_voxels(valid, index, GRID, reduction)
    assert torch.equal(some, torch.where(flags, voxels, 0.0))
    assert flags.flatten(1).sum(1).tolist() == [3 * patches.shape[2], 2 * patches.shape[2]]
    for sample in range(2):
        for number in valid[sample].nonzero()[:, 0].tolist():
            assert block(flags[sample : sample + 1], index[0, number].tolist(), reduction).all()


def test_a_padding_token_does_not_write_to_the_cell_its_index_names() -> None:
    index = torch.tensor([[[0, 0, 0, 0], [0, 0, 0, 0]]])
    patches, valid = torch.tensor([[[1.0], [7.0]]]), torch.tensor([[True, False]])
    found = unpatchify(patches, index, Grid(1, 1, 1, 2), (1, 1, 1, 1), valid)
    assert found.flatten().tolist() == [1.0, 0.0]


def test_gradients_reach_the_patches_that_were_placed() -> None:
    patches = torch.randn(1, 2, 1, requires_grad=True)
    index = torch.tensor([[[0, 0, 0, 1], [0, 0, 0, 0]]])
    voxels = unpatchify(patches, index, Grid(1, 1, 1, 2), (1, 1, 1, 1))
    (voxels * torch.tensor([3.0, 5.0])).sum().backward()
    assert patches.grad is not None and patches.grad.flatten().tolist() == [5.0, 3.0]

"""Decoders against their definition, written out cell by cell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fmrizoo.objectives.decoders import DECODERS, LinearDecoder, MLPDecoder, build_decoder
from fmrizoo.types import Features, Grid

WIDTH = 6
GRID = Grid(2, 1, 3, 4)
REDUCTIONS = [(3, 2, 1, 1), (2, 2, 2, 2), (1, 1, 1, 3)]


def features(batch: int = 2, grid: Grid = GRID, seed: int = 0) -> Features:
    torch.manual_seed(seed)
    index = torch.cartesian_prod(*(torch.arange(s) for s in grid)).expand(batch, -1, -1)
    ones = torch.ones(batch, grid.size)
    values = torch.randn(batch, grid.size, WIDTH, dtype=torch.float64)
    return Features(values, index, ones.bool(), grid, ones)


def assemble(blocks: Tensor, reduction: tuple[int, ...]) -> Tensor:
    """``(b, x, y, z, t, rx, ry, rz, rt)`` → voxels, one block at a time."""
    b, *cells = blocks.shape[:5]
    out = torch.full(
        (b, *(c * r for c, r in zip(cells, reduction, strict=True))), torch.nan, dtype=blocks.dtype
    )
    rx, ry, rz, rt = reduction
    for x, y, z, t in torch.cartesian_prod(*(torch.arange(c) for c in cells)).tolist():
        out[
            :,
            x * rx : (x + 1) * rx,
            y * ry : (y + 1) * ry,
            z * rz : (z + 1) * rz,
            t * rt : (t + 1) * rt,
        ] = blocks[:, x, y, z, t]
    return out


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_linear_decoder_is_one_linear_layer_a_token(reduction: tuple[int, int, int, int]) -> None:
    decoder = LinearDecoder(WIDTH, reduction).double()
    given = features()
    blocks = given.values @ decoder.project.weight.T + decoder.project.bias
    expected = assemble(blocks.view(2, *GRID, *reduction), reduction)
    torch.testing.assert_close(decoder(given), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mlp_decoder_widens_time_first_then_space(reduction: tuple[int, int, int, int]) -> None:
    rx, ry, rz, rt = reduction
    decoder = MLPDecoder(WIDTH, reduction, frames=GRID.t * rt).double()
    given = features()

    def mlp(part: torch.nn.Module, x: Tensor) -> Tensor:
        return part.linear2(F.gelu(part.linear1(x)))

    x = given.values.view(2, *GRID, WIDTH)
    x = decoder.time_project(F.layer_norm(mlp(decoder.time_mlp, x), (WIDTH,)))
    frames = [
        x[..., t, j * WIDTH : (j + 1) * WIDTH] + decoder.time_embed[t * rt + j]
        for t in range(GRID.t)
        for j in range(rt)
    ]
    x = torch.stack(frames, 4)
    x = decoder.space_project(F.layer_norm(mlp(decoder.space_mlp, x), (WIDTH,)))
    blocks = x.view(2, *GRID[:3], GRID.t * rt, rx, ry, rz, 1)
    torch.testing.assert_close(decoder(given), assemble(blocks, (rx, ry, rz, 1)))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_decoders_fill_the_clip_and_learn(name: str, reduction: tuple[int, int, int, int]) -> None:
    clip = Grid(*(g * r for g, r in zip(GRID, reduction, strict=True)))
    decoder = build_decoder(name, WIDTH, reduction, clip).double()
    voxels = decoder(features())
    assert voxels.shape == (2, *clip)
    voxels.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_mlp_decoder_takes_clips_shorter_than_it_was_built_for() -> None:
    decoder = MLPDecoder(WIDTH, (2, 2, 2, 2), frames=8).double()
    assert decoder(features(grid=GRID._replace(t=3))).shape == (2, 4, 2, 6, 6)

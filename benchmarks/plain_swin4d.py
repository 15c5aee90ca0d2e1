"""The obvious way to write the 4-D Swin encoder, from the published description, for comparison.

Dense grids are padded, rolled and permuted around every block, attention is an explicit softmax,
and the shift mask (−100) is rebuilt at every call. Same parameters and names as
``fmrizoo.backbones.swin4d``, so the weights load and the outputs must agree.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrizoo.backbones.swin4d import Swin4DConfig, stage_grids


def partition(x: Tensor, w: tuple[int, ...]) -> Tensor:
    b, gx, gy, gz, gt, c = x.shape
    x = x.view(b, gx // w[0], w[0], gy // w[1], w[1], gz // w[2], w[2], gt // w[3], w[3], c)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8, 9).reshape(-1, w[0] * w[1] * w[2] * w[3], c)


def reverse(windows: Tensor, w: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    b, gx, gy, gz, gt = shape
    x = windows.view(b, gx // w[0], gy // w[1], gz // w[2], gt // w[3], w[0], w[1], w[2], w[3], -1)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8, 9).reshape(b, gx, gy, gz, gt, -1)


def shift_mask(grid: tuple[int, ...], w: tuple[int, ...], s: tuple[int, ...]) -> Tensor:
    regions = torch.zeros(1, *grid, 1)
    cuts = [(slice(-wi), slice(-wi, -si), slice(-si, None)) for wi, si in zip(w, s, strict=True)]
    for number, slices in enumerate(itertools.product(*cuts)):
        regions[(slice(None), *slices, slice(None))] = number
    ids = partition(regions, w).squeeze(-1)
    difference = ids.unsqueeze(1) - ids.unsqueeze(2)
    return difference.masked_fill(difference != 0, -100.0)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        bw, n, c = x.shape
        qkv = self.qkv(x).reshape(bw, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            windows = mask.shape[0]
            attn = attn.view(bw // windows, windows, self.heads, n, n)
            attn = (attn + mask.to(attn.dtype)[None, :, None]).view(-1, self.heads, n, n)
        attn = attn.softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(bw, n, c))


class PlainMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, window: tuple[int, ...], shifted: bool) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = PlainMLP(width)

    def forward(self, x: Tensor) -> Tensor:
        b, *grid, _ = x.shape
        w = tuple(min(g, i) for g, i in zip(grid, self.window, strict=True))
        s = tuple(
            i // 2 if self.shifted and g > i else 0 for g, i in zip(grid, self.window, strict=True)
        )
        h = self.norm1(x)
        pads = [(-g) % i for g, i in zip(grid, w, strict=True)]
        h = F.pad(h, (0, 0, 0, pads[3], 0, pads[2], 0, pads[1], 0, pads[0]))
        padded = h.shape[1:5]
        mask = None
        if any(s):
            h = torch.roll(h, shifts=tuple(-i for i in s), dims=(1, 2, 3, 4))
            mask = shift_mask(tuple(padded), w, s)
        h = reverse(self.attn(partition(h, w), mask), w, (b, *padded))
        if any(s):
            h = torch.roll(h, shifts=s, dims=(1, 2, 3, 4))
        x = x + h[:, : grid[0], : grid[1], : grid[2], : grid[3]].contiguous()
        return x + self.mlp(self.norm2(x))


class Merging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * width)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = itertools.product(range(2), range(2), range(2))
        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in corners], -1)
        return self.reduction(self.norm(x))


class Positions(nn.Module):
    def __init__(self, grid: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, width, *grid[:3], 1))
        self.time_embed = nn.Parameter(torch.zeros(1, width, 1, 1, 1, grid[3]))


class PatchEmbed(nn.Module):
    def __init__(self, patch: list[int], width: int) -> None:
        super().__init__()
        self.patch = patch
        self.fc = nn.Linear(patch[0] * patch[1] * patch[2] * patch[3], width)

    def forward(self, bold: Tensor) -> Tensor:
        b, c, x, y, z, t = bold.shape
        px, py, pz, pt = self.patch
        bold = bold.view(b, c, x // px, px, y // py, py, z // pz, pz, t // pt, pt)
        return self.fc(bold.permute(0, 2, 4, 6, 8, 3, 5, 7, 9, 1).flatten(5))


class Stage(nn.Module):
    def __init__(self, blocks: list[Block], width: int, merges: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = Merging(width) if merges else None


class PlainSwin4D(nn.Module):
    """``bold (b, 1, x, y, z, t)`` → ``(b, F, x', y', z', t)``."""

    def __init__(self, config: Swin4DConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config.patch_size, config.embed_dim)
        grids = stage_grids(config)
        self.layers = nn.ModuleList()
        self.pos_embeds = nn.ModuleList()
        last = len(grids) - 1
        for stage, grid in enumerate(grids):
            width = config.embed_dim * 2**stage
            full = config.last_layer_full_msa and stage == last
            window = (*grid[:3], config.window_size[3]) if full else tuple(config.window_size)
            blocks = [
                Block(width, config.num_heads[stage], window, not full and i % 2 == 1)
                for i in range(config.depths[stage])
            ]
            self.layers.append(Stage(blocks, width, stage != last))
            self.pos_embeds.append(Positions(grid, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, bold: Tensor) -> Tensor:
        x = self.patch_embed(bold)
        for table, stage in zip(self.pos_embeds, self.layers, strict=True):
            place = table.pos_embed + table.time_embed[..., : x.shape[4]]
            x = x + place.permute(0, 2, 3, 4, 5, 1)
            for block in stage.blocks:
                x = block(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return x.permute(0, 5, 1, 2, 3, 4)

"""The original 4-D Swin transformer for fMRI (SwiFT): joint space-time shifted-window attention.

Source: Kim et al. 2023, "SwiFT: Swin 4D fMRI Transformer" (v1); its v2 form adds temporal patches,
a norm after the patch embedding and an applied final norm.
What differs from the reference code: nothing in the numbers. Tokens stay flat in window order
(one gather a block instead of roll + pad + permute), wrapped windows are cut, not
masked, attention is fused. Axes with a single patch are not merged, so a one-slice clip works.

Shapes: b samples, n tokens, d width; a block works on rows ``(all tokens of the batch, d)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import cast

import torch
from torch import Tensor, nn

from fmrizoo.layers.pieces import by_piece, piece_rows, works_by_pieces
from fmrizoo.layers.plan import Order, StagePlan, stage_plan
from fmrizoo.layers.positions import PositionEmbedding
from fmrizoo.layers.swin import (
    PatchMerging,
    SwinBlock,
    SwinEncoder,
    check_config,
    check_sizes,
    merge_factors,
    path_rates,
    stage_grids,
)
from fmrizoo.layers.windows import WindowLayout, effective_window, window_layout
from fmrizoo.registry import register_backbone
from fmrizoo.types import Features, Grid, Tokens

__all__ = ["Swin4D", "Swin4DConfig", "stage_grids"]


@dataclass
class Swin4DConfig:
    """Original 4-D Swin (SwiFT): joint space-time shifted-window attention."""

    name: str = "swin4d"
    img_size: list[int] = field(default_factory=lambda: [96, 96, 96, 20])  # voxels x y z, frames
    patch_size: list[int] = field(default_factory=lambda: [6, 6, 6, 1])  # voxels x y z, frames
    in_chans: int = 1  # channels of the clip
    embed_dim: int = 36  # width of stage 1; grows by c_mult at every merge
    depths: list[int] = field(default_factory=lambda: [2, 2, 6, 2])  # blocks per stage
    num_heads: list[int] = field(default_factory=lambda: [3, 6, 12, 24])  # per stage
    window_size: list[int] = field(default_factory=lambda: [4, 4, 4, 4])  # patches x y z, frames
    first_window_size: list[int] | None = None  # of stage 1; None: window_size
    last_layer_full_msa: bool = True  # the last stage attends over all of space
    c_mult: int = 2  # growth of the width at a merge
    mlp_ratio: float = 4.0  # hidden width of the MLP / width
    qkv_bias: bool = True  # bias of the qkv projection
    drop_rate: float = 0.0  # dropout after projections, in the MLP and on the embedded patches
    attn_drop_rate: float = 0.0  # dropout on attention weights
    drop_path_rate: float = 0.0  # stochastic depth, rising linearly over the blocks
    patch_norm: bool = False  # v2: LayerNorm after the patch embedding
    final_norm: bool = False  # v2: apply the last LayerNorm (v1 carries but never applies it)

    def __post_init__(self) -> None:
        check_sizes("window_size", self.window_size)
        if self.first_window_size is not None:
            check_sizes("first_window_size", self.first_window_size)
        check_config(self)


@dataclass(frozen=True)
class Pass:
    """What all blocks of one pass through the encoder share.

    Attributes:
        batch: Samples.
        causal: Keep queries from later keys.
        checkpointing: See :func:`fmrizoo.layers.pieces.by_piece`.
    """

    batch: int
    causal: bool
    checkpointing: str


class SwinStage(nn.Module):
    """Blocks of one resolution, then (but for the last stage) the merge."""

    def __init__(
        self, config: Swin4DConfig, stage: int, grids: list[Grid], drop_paths: list[float]
    ) -> None:
        super().__init__()
        width = config.embed_dim * config.c_mult**stage
        self.grid = grids[stage]
        self.window, self.shifts = _stage_window(config, stage, self.grid)
        heads = config.num_heads[stage]
        self.blocks = nn.ModuleList(SwinBlock(width, heads, config, p) for p in drop_paths)
        self.factors = merge_factors(grids, stage)
        self.downsample: PatchMerging | None = None
        if self.factors is not None:
            self.downsample = PatchMerging(width, prod(self.factors), config.c_mult)

    def layouts(self, frames: int) -> list[WindowLayout]:
        """The layout of every block for a clip of ``frames`` time tokens."""
        grid = (*self.grid[:3], frames)
        result = []
        for index in range(len(self.blocks)):
            size, shift = effective_window(grid, self.window, self.shifts and index % 2 == 1)
            result.append(window_layout(grid, size, shift))
        return result

    def forward(
        self,
        x: Tensor,
        plan: StagePlan,
        positions: Tensor,
        prompts: Sequence[Tensor | None],
        run: Pass,
    ) -> Tensor:
        """Rows in the first block's order → rows in the last block's order.

        Args:
            x: ``(rows, d)`` merged tokens.
            plan: This stage's plan.
            positions: ``(n, d)`` row-major position table.
            prompts: ``(p, d)`` of every block, or None.
            run: What all blocks share.
        """
        x = x + positions.to(x.dtype).index_select(0, plan.raster)
        blocks = cast(list[SwinBlock], list(self.blocks))
        steps = zip(blocks, prompts, plan.orders, plan.moves, strict=True)
        for block, prompt, pieces, move in steps:
            if move is not None:
                x = move(x)
            x = _by_windows(block, x, pieces, prompt, run)
        return x


def _by_windows(
    block: SwinBlock, x: Tensor, pieces: list[Order], prompt: Tensor | None, run: Pass
) -> Tensor:
    """Run a block on some windows after others."""
    drawn, seen = block.draw_paths(run.batch, x), block.see(prompt)

    def job(part: Tensor, number: int) -> Tensor:
        order = pieces[number]
        done: Tensor = block(
            part,
            order.windows,
            causal=run.causal,
            padding=order.padding,
            paths=None if drawn is None else drawn[:, order.sample],
            seen=seen,
        )
        return done

    rows = [order.rows for order in pieces]
    return by_piece(job, x, rows, (block, seen), checkpointing=run.checkpointing)


def _stage_window(config: Swin4DConfig, stage: int, grid: Grid) -> tuple[tuple[int, ...], bool]:
    """Window of a stage, and whether its odd blocks shift."""
    if config.last_layer_full_msa and stage == len(config.depths) - 1:
        # "Full" in space only: time is still cut into windows, and nothing is shifted.
        return (*grid[:3], config.window_size[3]), False
    first = config.first_window_size if stage == 0 else None
    return tuple(first or config.window_size), True


@register_backbone("swin4d", Swin4DConfig)
class Swin4D(SwinEncoder):
    """4-D Swin encoder. Clips may be shorter than ``img_size[3]``, never longer."""

    def __init__(self, config: Swin4DConfig) -> None:
        super().__init__(config, config.patch_norm)
        self.config = config
        self.pos_embeds = nn.ModuleList(
            PositionEmbedding(g, w) for g, w in zip(self.grids, self.widths, strict=True)
        )
        self.layers = nn.ModuleList(
            SwinStage(config, stage, self.grids, rates)
            for stage, rates in enumerate(path_rates(config))
        )
        self.norm = nn.LayerNorm(self.num_features)
        if not config.final_norm:
            # v1 stores these weights without ever using them; kept so that its files load whole.
            self.norm.requires_grad_(False)
        self._plans: dict[tuple[int, int, torch.device, bool], list[StagePlan]] = {}
        self.init_weights()

    def _stages(self) -> list[SwinStage]:
        return cast(list[SwinStage], list(self.layers))

    def init_weights(self) -> None:
        """Position tables: truncated normal, s.d. 0.02. All else: PyTorch's defaults, as SwiFT."""
        for table in self.pos_embeds.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def _table_names(self, stage: int) -> tuple[str, ...]:
        return (f"pos_embeds.{stage}",)

    def _block_names(self, stage: int) -> list[tuple[str, ...]]:
        return [(f"layers.{stage}.blocks.{block}",) for block in range(self.depths[stage])]

    def _run(
        self,
        tokens: Tokens,
        keep: set[int],
        causal: bool,
        prompts: Sequence[Sequence[Tensor | None]],
    ) -> dict[int, Features]:
        batch, frames = tokens.values.shape[0], tokens.grid.t
        x = tokens.values.flatten(0, 1)
        run = Pass(batch, causal, self.checkpointing)
        plans = self._plan(frames, batch, x.device, works_by_pieces(x, self.checkpointing))
        kept: dict[int, Features] = {}
        for number in range(max(keep, default=-1) + 1):
            stage, plan = self._stages()[number], plans[number]
            x = plan.enter(x).view(-1, plan.merged * x.shape[1])
            if number:
                previous = self._stages()[number - 1]
                assert previous.downsample is not None
                x = previous.downsample(x)
            x = stage(x, plan, self.pos_embeds[number](frames), prompts[number], run)
            if number in keep:
                values = plan.leave(x).view(batch, -1, x.shape[1])
                if number == len(self.layers) - 1 and self.config.final_norm:
                    values = self.norm(values)
                kept[number] = self._features(values, number, tokens)
        return kept

    @torch.inference_mode(False)
    def _plan(self, frames: int, batch: int, device: torch.device, pieces: bool) -> list[StagePlan]:
        key = (frames, batch, device, pieces)
        if key not in self._plans:
            plans: list[StagePlan] = []
            previous = None
            for stage in self._stages():
                layouts = stage.layouts(frames)
                rows = piece_rows(self.widths[len(plans)], self.config.mlp_ratio, device)
                plans.append(stage_plan(layouts, batch, device, previous, rows if pieces else None))
                if stage.factors is not None:
                    previous = (layouts[-1], stage.factors)
            if len(self._plans) >= 8:  # evaluation meets a few odd batch sizes; keep no more
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plans
        return self._plans[key]

    def flops(self, grid: Grid, mask: Tensor | None = None) -> dict[str, int]:
        """FLOPs (2 per multiply-add) of the forward pass of one clip, matrix products only.

        ``grid`` voxels and frames of the clip; padding is counted as it is computed. Every patch is
        a token, so the ``mask`` changes nothing.
        """
        frames = grid.t // self.patch_size[3]
        patches = self.grids[0]._replace(t=frames).size
        parts = {"patch_embed": 2 * patches * prod(self.patch_embed.fc.weight.shape)}
        for number, stage in enumerate(self._stages()):
            width = self.widths[number]
            hidden = int(width * self.config.mlp_ratio)
            rows = pairs = 0
            for layout in stage.layouts(frames):
                rows += len(layout.cells)
                pairs += layout.pairs
            parts[f"stage{number + 1}.linear"] = 2 * rows * (4 * width**2 + 2 * width * hidden)
            parts[f"stage{number + 1}.attention"] = 4 * pairs * width
            if stage.downsample is not None:
                out = self._stages()[number + 1].layouts(frames)[0]
                weight = prod(stage.downsample.reduction.weight.shape)
                parts[f"stage{number + 1}.merge"] = 2 * len(out.cells) * weight
        return parts

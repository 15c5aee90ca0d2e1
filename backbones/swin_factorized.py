"""The revised SwiFT v2 (d-SwiFT): 4-D attention factorized into 1-D time and 3-D space.

Source: the revised SwiFT v2, figure 4: a factorized block is a pair of temporal Swin blocks (plain,
then shifted windows) followed by a pair of spatial ones; absolute position tables are replaced with
rotary positions, one axis in time, three in space. So a clip may be of any length, longer than the
model was trained on too.

What factorizing buys: context of 10 frames instead of 4 at about the FLOPs of a 4-frame window.
Memory grows with the frames either way; since a pair is closed within a site (time) or a frame
(space), recomputing a pair piece by piece keeps one tensor a pair and nothing else.

Shapes: s sites, b samples, t time slots, d width; tokens are ``(s, b·t, d)``, see
:mod:`fmrizoo.layers.sites`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fmrizoo.errors import RecipeError
from fmrizoo.layers.pieces import by_piece, piece_rows, works_by_pieces
from fmrizoo.layers.sites import (
    Rotary,
    Space,
    even_sizes,
    merge_gather,
    site_gathers,
    space_layouts,
    space_rows,
    time_lengths,
    time_windows,
)
from fmrizoo.layers.swin import (
    PatchMerging,
    SwinBlock,
    SwinEncoder,
    check_config,
    check_sizes,
    merge_factors,
    path_rates,
)
from fmrizoo.registry import register_backbone
from fmrizoo.types import Features, Grid, Tokens

ORDERS = ("temporal", "spatial")
RESIDUALS = ("plain", "weighted", "layerscale")


@dataclass
class SwinFactorizedConfig:
    """Revised SwiFT v2: shifted windows in time, then in space, with rotary positions."""

    name: str = "swin_factorized"
    img_size: list[int] = field(default_factory=lambda: [96, 96, 96, 20])  # voxels x y z, frames
    patch_size: list[int] = field(default_factory=lambda: [6, 6, 6, 1])  # voxels x y z, frames
    in_chans: int = 1  # channels of the clip
    embed_dim: int = 36  # width of stage 1; grows by c_mult at every merge
    depths: list[int] = field(default_factory=lambda: [4, 4, 8, 4])  # Swin blocks, multiples of 4
    num_heads: list[int] = field(default_factory=lambda: [3, 6, 12, 24])  # per stage
    temporal_window: int = 10  # time slots
    window_size: list[int] = field(default_factory=lambda: [4, 4, 4])  # patches x y z
    last_layer_full_msa: bool = True  # the last stage attends over all of space
    order: str = "temporal"  # temporal | spatial: which pair of a block comes first
    residual: str = "plain"  # plain | weighted | layerscale: LN(temporal + weight · spatial)
    residual_weight: float = 0.9  # the weight, fixed (weighted) or learned from here (layerscale)
    rope_theta: float = 10000.0  # base of the rotary frequencies
    c_mult: int = 2  # growth of the width at a merge
    mlp_ratio: float = 4.0  # hidden width of the MLP / width
    qkv_bias: bool = True  # bias of the qkv projection
    drop_rate: float = 0.0  # dropout after projections, in the MLP and on the embedded patches
    attn_drop_rate: float = 0.0  # dropout on attention weights
    drop_path_rate: float = 0.0  # stochastic depth, rising linearly over the Swin blocks

    def __post_init__(self) -> None:
        check_sizes("window_size", self.window_size, "x, y, z")
        check_config(self)
        for key in ("temporal_window", "rope_theta"):
            if getattr(self, key) <= 0:
                raise RecipeError(f"backbone.{key} must be > 0, got {getattr(self, key)}")
        for key, known in (("order", ORDERS), ("residual", RESIDUALS)):
            if getattr(self, key) not in known:
                raise RecipeError(
                    f"backbone.{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}"
                )
        if any(depth % 4 for depth in self.depths):
            raise RecipeError(
                "backbone.depths must be multiples of 4 (a factorized block is two temporal and "
                f"two spatial Swin blocks), got {list(self.depths)}"
            )
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * self.c_mult**stage
            if width // heads % 6:
                fit = [h for h in range(1, width + 1) if width % (6 * h) == 0]
                close = min(fit, key=lambda h: abs(h - heads), default=None)
                hint = f"take {close} heads" if close else "take an embed_dim that 6 divides"
                raise RecipeError(
                    f"backbone.num_heads[{stage}]={heads} leaves {width // heads} channels to a "
                    f"head of stage {stage + 1}, but rotary positions along three axes need a "
                    f"multiple of 6: {hint}"
                )


@dataclass(frozen=True)
class Pass:
    """What all blocks of one pass through the encoder share.

    Attributes:
        batch: Samples.
        slots: Time slots of each.
        causal: Keep queries from later keys.
        checkpointing: See :func:`fmrizoo.layers.pieces.by_piece`.
        pieces: Work on some sites or frames at a time.
    """

    batch: int
    slots: int
    causal: bool
    checkpointing: str
    pieces: bool


class FactorizedBlock(nn.Module):
    """A temporal and a spatial pair of Swin blocks, and how their results are joined.

    ``plain``: one after the other. Otherwise ``LN(h_temporal + λ · h_spatial)`` of the results of
    both pairs, the second of which has run on the result of the first.
    """

    def __init__(
        self, config: SwinFactorizedConfig, width: int, heads: int, rates: list[float]
    ) -> None:
        super().__init__()
        self.order = ORDERS if config.order == "temporal" else ORDERS[::-1]
        first, second = rates[:2], rates[2:]
        by_name = dict(zip(self.order, (first, second), strict=True))
        self.temporal, self.spatial = (
            nn.ModuleList(SwinBlock(width, heads, config, rate) for rate in by_name[name])
            for name in ORDERS
        )
        self.norm: nn.LayerNorm | None = None
        self.weight: nn.Parameter | float = config.residual_weight
        if config.residual != "plain":
            self.norm = nn.LayerNorm(width)
        if config.residual == "layerscale":
            self.weight = nn.Parameter(torch.full((width,), config.residual_weight))

    def pairs(self) -> list[tuple[str, list[SwinBlock]]]:
        """Name and Swin blocks of both pairs, in the order they run."""
        return [(name, cast(list[SwinBlock], list(getattr(self, name)))) for name in self.order]

    def join(self, before: Tensor, after: Tensor) -> Tensor:
        """The block's result, from that of its first and of its second pair."""
        if self.norm is None:
            return after
        temporal, spatial = (before, after) if self.order == ORDERS else (after, before)
        joined: Tensor = self.norm(temporal + self.weight * spatial)
        return joined


class Pair(NamedTuple):
    """Two Swin blocks that run on the same pieces.

    Attributes:
        blocks: Both.
        seen: What their prompts show every window, see :meth:`SwinBlock.see`.
        drawn: Their paths, see :meth:`SwinBlock.draw_paths`.
        ends: The factorized block that joins their result with their input; None: the result is
            all.
    """

    blocks: list[SwinBlock]
    seen: list[Tensor | None]
    drawn: list[Tensor | None]
    ends: FactorizedBlock | None

    def join(self, before: Tensor, after: Tensor) -> Tensor:
        """What follows the second block."""
        return after if self.ends is None else self.ends.join(before, after)

    @property
    def used(self) -> list[nn.Module | Tensor | None]:
        """All that a piece meets."""
        return [*self.blocks, *self.seen, self.ends]


class FactorizedStage(nn.Module):
    """Factorized blocks of one resolution, then (but for the last stage) the merge."""

    def __init__(
        self, config: SwinFactorizedConfig, stage: int, grids: list[Grid], rates: list[float]
    ) -> None:
        super().__init__()
        self.width, heads = config.embed_dim * config.c_mult**stage, config.num_heads[stage]
        self.head_dim, self.theta = self.width // heads, config.rope_theta
        self.mlp_ratio, self.temporal_window = config.mlp_ratio, config.temporal_window
        x, y, z, _ = grids[stage]
        wx, wy, wz = config.window_size
        full = config.last_layer_full_msa and stage + 1 == len(grids)
        self.space: Space = (x, y, z)
        # "Full" in space only: time is still cut into windows, every other one of them shifted.
        self.window: Space = self.space if full else (wx, wy, wz)
        self.blocks = nn.ModuleList(
            FactorizedBlock(config, self.width, heads, rates[start : start + 4])
            for start in range(0, len(rates), 4)
        )
        self.factors = merge_factors(grids, stage)
        self.downsample: PatchMerging | None = None
        if self.factors is not None:
            self.downsample = PatchMerging(self.width, prod(self.factors), config.c_mult)

    def forward(self, x: Tensor, prompts: Sequence[Tensor | None], run: Pass) -> Tensor:
        """``(s, b·t, d)`` → same shape. Overwrites ``x`` where no gradient is wanted.

        ``prompts``: ``(p, d)`` of every Swin block in the order they run, or None.
        """
        rotary = Rotary(self.head_dim, self.theta, x.dtype == torch.float64, x.device)
        rows = piece_rows(self.width, self.mlp_ratio, x.device) if run.pieces else x[..., 0].numel()
        given = iter(prompts)
        for block in cast(list[FactorizedBlock], list(self.blocks)):
            for number, (name, blocks) in enumerate(block.pairs()):
                pair = Pair(
                    blocks,
                    [one.see(next(given)) for one in blocks],
                    [one.draw_paths(run.batch, x) for one in blocks],
                    block if number else None,
                )
                through = self._in_time if name == "temporal" else self._in_space
                x = through(x, pair, run, rotary, rows)
        return x

    def _in_time(self, x: Tensor, pair: Pair, run: Pass, rotary: Rotary, rows: int) -> Tensor:
        """A temporal pair, some sites at a time."""
        clips = x.reshape(-1, run.slots, x.shape[2])
        sizes = even_sizes(len(clips), rows // run.slots)
        starts = [0, *accumulate(sizes)]
        lengths = [time_lengths(run.slots, self.temporal_window, odd) for odd in (False, True)]

        def job(part: Tensor, number: int) -> Tensor:
            found = part.flatten(0, 1)
            for block, length, seen, paths in zip(
                pair.blocks, lengths, pair.seen, pair.drawn, strict=True
            ):
                if paths is not None:
                    clip = torch.arange(starts[number], starts[number + 1], device=x.device)
                    paths = paths[:, clip % run.batch].repeat_interleave(run.slots, 1)
                windows = time_windows(length, len(part), rotary)
                found = block(found, windows, causal=run.causal, paths=paths, seen=seen)
            return pair.join(part, found.view_as(part))

        done = by_piece(job, clips, sizes, pair.used, checkpointing=run.checkpointing)
        return done.view_as(x)

    def _in_space(self, x: Tensor, pair: Pair, run: Pass, rotary: Rotary, rows: int) -> Tensor:
        """A spatial pair, some frames at a time."""
        sizes = even_sizes(x.shape[1], rows // x.shape[0])
        starts = [0, *accumulate(sizes)]

        def job(part: Tensor, number: int) -> Tensor:
            plan = space_rows(self.space, self.window, True, part.shape[1], rotary)
            found = part.flatten(0, 1)
            found = found if plan.enter is None else plan.enter(found)
            for odd, (block, seen, paths) in enumerate(
                zip(pair.blocks, pair.seen, pair.drawn, strict=True)
            ):
                if odd and plan.move is not None:
                    found = plan.move(found)
                if paths is not None:
                    paths = paths[:, (starts[number] + plan.frame[odd]) // run.slots]
                found = block(found, plan.windows[odd], paths=paths, seen=seen)
            found = found if plan.leave is None else plan.leave(found)
            return pair.join(part, found.view_as(part))

        return by_piece(job, x, sizes, pair.used, dim=1, checkpointing=run.checkpointing)

    def merge(self, x: Tensor, next_window: Space, run: Pass) -> Tensor:
        """``(s, b·t, d)`` → ``(s', b·t, d')`` in the next stage's order."""
        assert self.factors is not None and self.downsample is not None
        downsample, merged = self.downsample, prod(self.factors)
        gather = merge_gather(self.space, self.window, self.factors, next_window, x.device)
        frames, width = x.shape[1:]
        groups = gather(x.flatten(1)).view(-1, merged, frames, width)
        rows = piece_rows(self.width, self.mlp_ratio, x.device) if run.pieces else x[..., 0].numel()

        def job(part: Tensor, number: int) -> Tensor:
            beside = part.transpose(1, 2).flatten(2)
            joined: Tensor = downsample(beside)
            return joined

        sizes = even_sizes(len(groups), rows // (frames * merged))
        mode = run.checkpointing
        return by_piece(job, groups, sizes, (downsample,), checkpointing=mode, in_place=False)

    def rows_and_pairs(self, slots: int) -> tuple[int, int]:
        """Rows of one Swin block, and query–key pairs of one factorized block, for one clip."""
        sites = prod(self.space)
        lengths = [time_lengths(slots, self.temporal_window, odd) for odd in (False, True)]
        in_time = sites * sum(n * n for both in lengths for n in both)
        layouts = space_layouts(self.space, self.window, True)
        return sites * slots, in_time + slots * sum(layout.pairs for layout in layouts)


@register_backbone("swin_factorized", SwinFactorizedConfig)
class SwinFactorized(SwinEncoder):
    """Factorized 4-D Swin encoder. Clips may be of any length that a patch divides."""

    any_length = True

    def __init__(self, config: SwinFactorizedConfig) -> None:
        super().__init__(config, patch_norm=True)
        self.config = config
        self.layers = nn.ModuleList(
            FactorizedStage(config, stage, self.grids, rates)
            for stage, rates in enumerate(path_rates(config))
        )
        self.norm = nn.LayerNorm(self.num_features)

    def _stages(self) -> list[FactorizedStage]:
        return cast(list[FactorizedStage], list(self.layers))

    def _block_names(self, stage: int) -> list[tuple[str, ...]]:
        names: list[tuple[str, ...]] = []
        for number, block in enumerate(self._stages()[stage].blocks):
            at = f"layers.{stage}.blocks.{number}"
            pairs = cast(FactorizedBlock, block).order
            names += [(f"{at}.{pair}.{odd}",) for pair in pairs for odd in (0, 1)]
            joins = tuple(
                f"{at}.{part}"
                for part in ("norm", "weight")
                if isinstance(getattr(block, part), nn.Module | nn.Parameter)
            )
            names[-1] = (*names[-1], *joins)
        return names

    def _run(
        self,
        tokens: Tokens,
        keep: set[int],
        causal: bool,
        prompts: Sequence[Sequence[Tensor | None]],
    ) -> dict[int, Features]:
        (batch, _, width), slots = tokens.values.shape, tokens.grid.t
        pieces = works_by_pieces(tokens.values, self.checkpointing)
        run = Pass(batch, slots, causal, self.checkpointing, pieces)
        stages, device = self._stages(), tokens.values.device
        enter, _ = site_gathers(stages[0].space, stages[0].window, batch, device)
        x = enter(tokens.values.reshape(-1, slots * width)).view(-1, batch * slots, width)
        kept: dict[int, Features] = {}
        for number, stage in enumerate(stages[: max(keep, default=-1) + 1]):
            if number:
                x = stages[number - 1].merge(x, stage.window, run)
            x = stage(x, prompts[number], run)
            if number in keep:
                _, leave = site_gathers(stage.space, stage.window, batch, device)
                values = leave(x.view(-1, slots * stage.width)).view(batch, -1, stage.width)
                if number == len(stages) - 1:
                    values = self.norm(values)
                kept[number] = self._features(values, number, tokens)
        return kept

    def flops(self, grid: Grid, mask: Tensor | None = None) -> dict[str, int]:
        """FLOPs (2 per multiply-add) of the forward pass of one clip, matrix products only.

        ``grid`` voxels and frames of the clip; padding is counted as it is computed. Every patch is
        a token, so the ``mask`` changes nothing.
        """
        slots = grid.t // self.patch_size[3]
        patches = self.grids[0]._replace(t=slots).size
        parts = {"patch_embed": 2 * patches * prod(self.patch_embed.fc.weight.shape)}
        for number, stage in enumerate(self._stages()):
            width, hidden = stage.width, int(stage.width * stage.mlp_ratio)
            rows, pairs = stage.rows_and_pairs(slots)
            linear = 4 * rows * 2 * (4 * width**2 + 2 * width * hidden)
            parts[f"stage{number + 1}.linear"] = len(stage.blocks) * linear
            parts[f"stage{number + 1}.attention"] = len(stage.blocks) * 4 * pairs * width
            if stage.downsample is not None:
                out = self.grids[number + 1]._replace(t=slots).size
                weight = prod(stage.downsample.reduction.weight.shape)
                parts[f"stage{number + 1}.merge"] = 2 * out * weight
        return parts

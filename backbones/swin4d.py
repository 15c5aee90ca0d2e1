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
from functools import lru_cache
from math import ceil, prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.layers.attention import attend_windows
from fmrizoo.layers.mlp import MLP
from fmrizoo.layers.patches import PatchEmbed, pad_to, patch_share
from fmrizoo.layers.plan import Order, StagePlan, neighbours, stage_plan
from fmrizoo.layers.positions import PositionEmbedding
from fmrizoo.layers.windows import WindowLayout, effective_window, window_layout
from fmrizoo.registry import register_backbone
from fmrizoo.types import Backbone, Features, Grid, Tokens, check_checkpointing

# Of the widest activation (in the MLP) of the windows that a CPU works on at a time in fp32.
PIECE_BYTES = 1 << 23


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
        for key in ("img_size", "patch_size", "window_size", "first_window_size"):
            value = getattr(self, key)
            if value is None:
                continue
            if len(value) != 4 or any(v < 1 for v in value):
                raise RecipeError(
                    f"backbone.{key} needs four positive numbers (x, y, z, t), got {list(value)}"
                )
        for key in ("in_chans", "embed_dim", "c_mult", "mlp_ratio"):
            if getattr(self, key) <= 0:
                raise RecipeError(f"backbone.{key} must be > 0, got {getattr(self, key)}")
        for key in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, key) < 1:
                raise RecipeError(f"backbone.{key} must be in [0, 1), got {getattr(self, key)}")
        if any(depth < 1 for depth in self.depths):
            raise RecipeError(f"backbone.depths must all be ≥ 1, got {list(self.depths)}")
        if not self.depths or len(self.depths) != len(self.num_heads):
            raise RecipeError(
                f"backbone.depths {list(self.depths)} and num_heads {list(self.num_heads)} "
                "need one number per stage each"
            )
        for stage, heads in enumerate(self.num_heads):
            width = self.embed_dim * self.c_mult**stage
            if heads < 1 or width % heads:
                raise RecipeError(
                    f"backbone.num_heads[{stage}]={heads} does not divide the width {width} of "
                    f"stage {stage + 1}"
                )
        if self.img_size[3] % self.patch_size[3]:
            raise RecipeError(
                f"a clip of {self.img_size[3]} frames does not divide into patches of "
                f"{self.patch_size[3]} frames: change data.clip_frames or backbone.patch_size"
            )


def stage_grids(config: Swin4DConfig) -> list[Grid]:
    """Patch grid of every stage. An axis halves at a merge unless it is down to one patch.

    The first grid is the clip's, padded at the end of x, y, z so that every merge comes out even.
    """
    merges = len(config.depths) - 1
    patches = [ceil(s / p) for s, p in zip(config.img_size, config.patch_size, strict=True)]
    for axis in range(3):
        step = 1 << min(merges, (patches[axis] - 1).bit_length())
        patches[axis] = ceil(patches[axis] / step) * step
    grids = [Grid(*patches)]
    for _ in range(merges):
        last = grids[-1]
        grids.append(Grid(max(last.x // 2, 1), max(last.y // 2, 1), max(last.z // 2, 1), last.t))
    return grids


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, on tokens in window order."""

    def __init__(self, width: int, heads: int, config: Swin4DConfig) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.attn_drop = config.attn_drop_rate
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, order: Order) -> Tensor:
        """``(rows, d)`` → same shape."""
        qkv = self.qkv(x)
        dropout = self.attn_drop if self.training else 0.0
        mixed = attend_windows(qkv, order.groups, self.heads, self.scale, dropout)
        projected: Tensor = self.drop(self.proj(mixed))
        return projected


class SwinBlock(nn.Module):
    """Pre-norm block: ``x += Attn(LN(x))``, ``x += MLP(LN(x))`` with stochastic depth."""

    def __init__(self, width: int, heads: int, config: Swin4DConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, config)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio), config.drop_rate)
        self.drop_path = drop_path

    def forward(self, x: Tensor, order: Order) -> Tensor:
        """``(rows, d)`` → same shape."""
        h = self.norm1(x)
        if order.padding is not None:
            # The reference pads after the norm: padded tokens are zeros that take part unmasked.
            h = h.masked_fill(order.padding, 0.0)
        x = x + self._drop(self.attn(h, order), order)
        return x + self._drop(self.mlp(self.norm2(x)), order)

    def _drop(self, x: Tensor, order: Order) -> Tensor:
        if not self.drop_path or not self.training:
            return x
        from timm.layers.drop import drop_path  # pulls in torchvision: only where it is needed

        ones = x.new_ones(int(order.sample[-1]) + 1, 1)
        kept: Tensor = drop_path(ones, self.drop_path, True)
        return x * kept[order.sample]


class PatchMerging(nn.Module):
    """Concatenate spatial neighbours, normalise, project: ``d · merged → c_mult · d``."""

    def __init__(self, width: int, merged: int, c_mult: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(merged * width)
        self.reduction = nn.Linear(merged * width, c_mult * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, merged · d)`` → ``(rows, c_mult · d)``."""
        merged: Tensor = self.reduction(self.norm(x))
        return merged


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
        self.factors: tuple[int, int, int] | None = None
        self.downsample: PatchMerging | None = None
        if stage + 1 < len(grids):
            fx, fy, fz, _ = (a // b for a, b in zip(self.grid, grids[stage + 1], strict=True))
            self.factors = (fx, fy, fz)
            self.downsample = PatchMerging(width, fx * fy * fz, config.c_mult)

    def layouts(self, frames: int) -> list[WindowLayout]:
        """The layout of every block for a clip of ``frames`` time tokens."""
        grid = (*self.grid[:3], frames)
        result = []
        for index in range(len(self.blocks)):
            size, shift = effective_window(grid, self.window, self.shifts and index % 2 == 1)
            result.append(window_layout(grid, size, shift))
        return result

    def forward(self, x: Tensor, plan: StagePlan, positions: Tensor, recompute: bool) -> Tensor:
        """Rows in the first block's order → rows in the last block's order.

        Args:
            x: ``(rows, d)`` merged tokens.
            plan: This stage's plan.
            positions: ``(n, d)`` row-major position table.
            recompute: Keep no activations inside the blocks; recompute them in the backward pass.
        """
        x = x + positions.to(x.dtype).index_select(0, plan.raster)
        for block, pieces, move in zip(self.blocks, plan.orders, plan.moves, strict=True):
            if move is not None:
                x = move(x)
            x = _by_piece(block, x, pieces, recompute)
        return x


def _by_piece(block: nn.Module, x: Tensor, pieces: list[Order], recompute: bool) -> Tensor:
    """Run a block on some windows after others: what it makes on the way stays in the cache."""
    if torch.is_grad_enabled():
        parts = torch.split(x, [order.rows for order in pieces])
        if recompute:
            done = [
                checkpoint(block, part, order, use_reentrant=False)
                for part, order in zip(parts, pieces, strict=True)
            ]
        else:
            done = [block(part, order) for part, order in zip(parts, pieces, strict=True)]
        return done[0] if len(done) == 1 else torch.cat(done)
    start = 0
    for order in pieces:
        part = x[start : start + order.rows]
        part.copy_(block(part, order))
        start += order.rows
    return x


def _stage_window(config: Swin4DConfig, stage: int, grid: Grid) -> tuple[tuple[int, ...], bool]:
    """Window of a stage, and whether its odd blocks shift."""
    if config.last_layer_full_msa and stage == len(config.depths) - 1:
        # "Full" in space only: time is still cut into windows, and nothing is shifted.
        return (*grid[:3], config.window_size[3]), False
    first = config.first_window_size if stage == 0 else None
    return tuple(first or config.window_size), True


@register_backbone("swin4d", Swin4DConfig)
class Swin4D(Backbone):
    """4-D Swin encoder: ``(b, c, x, y, z, t)`` → features ``(b, F, x', y', z', t')``.

    ``F = embed_dim · c_mult ** (stages − 1)``. Clips smaller than the padded grid are padded with
    their background at the end of x, y, z. Clips may be shorter than ``img_size[3]``, never longer.
    """

    def __init__(self, config: Swin4DConfig) -> None:
        super().__init__()
        self.config = config
        self.grids = stage_grids(config)
        px, py, pz, pt = config.patch_size
        self.patch_size = (px, py, pz, pt)
        self.embed_dim = config.embed_dim
        stages = len(config.depths)
        widths = [config.embed_dim * config.c_mult**s for s in range(stages)]
        self.num_features = widths[-1]
        rx, ry, rz, _ = (a // b for a, b in zip(self.grids[0], self.grids[-1], strict=True))
        self.reduction = (px * rx, py * ry, pz * rz, pt)
        self.clip_grid = Grid(*(g * p for g, p in zip(self.grids[0], self.patch_size, strict=True)))
        self.patch_embed = PatchEmbed(
            self.patch_size, config.in_chans, config.embed_dim, config.patch_norm
        )
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.pos_embeds = nn.ModuleList(
            PositionEmbedding(g, w) for g, w in zip(self.grids, widths, strict=True)
        )
        total, done = sum(config.depths), 0
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            rates = [config.drop_path_rate * (done + i) / max(total - 1, 1) for i in range(depth)]
            self.layers.append(SwinStage(config, stage, self.grids, rates))
            done += depth
        self.norm = nn.LayerNorm(self.num_features)
        if not config.final_norm:
            # v1 stores these weights without ever using them; kept so that its files load whole.
            self.norm.requires_grad_(False)
        self.checkpointing = "none"
        self._plans: dict[tuple[int, int, torch.device, bool], list[StagePlan]] = {}
        self.init_weights()

    def _stages(self) -> list[SwinStage]:
        return cast(list[SwinStage], list(self.layers))

    def init_weights(self) -> None:
        """Position tables: truncated normal, s.d. 0.02. All else: PyTorch's defaults, as SwiFT."""
        for table in self.pos_embeds.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def set_checkpointing(self, mode: str) -> None:
        """``none``, or ``block``: recompute blocks in the backward pass, some windows at a time."""
        self.checkpointing = check_checkpointing(mode)

    def tokenize(
        self,
        bold: Tensor,
        mask: Tensor | None = None,
        *,
        background: Tensor | None = None,
        tr: Tensor | None = None,
    ) -> Tokens:
        """Patch embedding of ``bold (b, c, x, y, z, t)``; every patch is a token.

        Raises:
            DataError: wrong channels, a clip larger than the grid, or frames that no patch divides.
        """
        if bold.ndim != 6 or bold.shape[1] != self.config.in_chans:
            raise DataError(
                f"bold must be (b, {self.config.in_chans}, x, y, z, t), got {tuple(bold.shape)}"
            )
        batch, frames = bold.shape[0], bold.shape[-1]
        if frames % self.patch_size[3]:
            raise DataError(
                f"{frames} frames do not divide into patches of {self.patch_size[3]} frames"
            )
        bold, mask = pad_to(bold, mask, self.clip_grid._replace(t=frames))
        grid = self.grids[0]._replace(t=frames // self.patch_size[3])
        values = self.pos_drop(self.patch_embed(bold))
        valid = torch.ones(batch, grid.size, dtype=torch.bool, device=bold.device)
        brain = torch.ones(batch, grid.size, device=bold.device)
        if mask is not None:
            share = patch_share(mask, self.patch_size).unsqueeze(-1)
            brain = share.expand(-1, -1, -1, -1, grid.t).flatten(1)
        return Tokens(values, _index(grid, batch, bold.device), valid, grid, brain)

    def encode(self, tokens: Tokens, *, causal: bool = False) -> Features:
        """Run all stages.

        Raises:
            RecipeError: ``causal`` is asked for; this backbone looks both ways in time.
        """
        if causal:
            raise RecipeError("swin4d looks both ways in time: it cannot encode causally")
        last = len(self.layers) - 1
        return self._run(tokens, {last})[last]

    def forward_intermediates(
        self, bold: Tensor, mask: Tensor | None = None, indices: Sequence[int] | None = None
    ) -> list[Features]:
        """Features at the end of the stages in ``indices`` (all by default), before each merge."""
        stages = len(self.layers)
        wanted = list(range(stages)) if indices is None else list(indices)
        if bad := [i for i in wanted if not -stages <= i < stages]:
            raise RecipeError(f"stages {bad} do not exist: the backbone has {stages}")
        wanted = [i % stages for i in wanted]
        kept = self._run(self.tokenize(bold, mask), set(wanted))
        return [kept[i] for i in wanted]

    def _run(self, tokens: Tokens, keep: set[int]) -> dict[int, Features]:
        batch, frames = tokens.values.shape[0], tokens.grid.t
        x, brain = tokens.values.flatten(0, 1), tokens.brain
        # On a CPU fp32 products are several times faster on pieces that fit the cache, bf16 ones
        # are not; recomputing by pieces keeps the activations of one piece only.
        cached = x.device.type == "cpu" and x.dtype == torch.float32
        pieces = cached or self.checkpointing == "block"
        plans = self._plan(frames, batch, x.device, pieces)
        kept: dict[int, Features] = {}
        for number, (stage, table, plan) in enumerate(
            zip(self._stages(), self.pos_embeds, plans, strict=True)
        ):
            x = plan.enter(x).view(-1, plan.merged * x.shape[1])
            if number:
                previous = self._stages()[number - 1]
                assert previous.downsample is not None and previous.factors is not None
                x = previous.downsample(x)
                brain = _merge_brain(brain, previous.grid, frames, previous.factors)
            x = stage(x, plan, table(frames), self.checkpointing == "block")
            if number in keep:
                values = plan.leave(x).view(batch, -1, x.shape[1])
                if number == len(self.layers) - 1 and self.config.final_norm:
                    values = self.norm(values)
                grid = stage.grid._replace(t=frames)
                valid = torch.ones(values.shape[:2], dtype=torch.bool, device=x.device)
                kept[number] = Features(values, _index(grid, batch, x.device), valid, grid, brain)
        return kept

    def _plan(self, frames: int, batch: int, device: torch.device, pieces: bool) -> list[StagePlan]:
        key = (frames, batch, device, pieces)
        if key not in self._plans:
            plans: list[StagePlan] = []
            previous = None
            for stage in self._stages():
                layouts = stage.layouts(frames)
                width = self.config.embed_dim * self.config.c_mult ** len(plans)
                rows = max(1, int(PIECE_BYTES / (4 * width * self.config.mlp_ratio)))
                plans.append(stage_plan(layouts, batch, device, previous, rows if pieces else None))
                if stage.factors is not None:
                    previous = (layouts[-1], stage.factors)
            if len(self._plans) >= 8:  # evaluation meets a few odd batch sizes; keep no more
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plans
        return self._plans[key]

    def lora_targets(self) -> tuple[str, ...]:
        """Suffixes of the Linear modules that low-rank adapters may wrap."""
        return ("attn.qkv", "attn.proj", "mlp.linear1", "mlp.linear2")

    def flops(self, grid: Grid, mask: Tensor | None = None) -> dict[str, int]:
        """FLOPs (2 per multiply-add) of the forward pass of one clip, matrix products only.

        ``grid`` voxels and frames of the clip; padding is counted as it is computed.
        """
        frames = grid.t // self.patch_size[3]
        patches = self.grids[0]._replace(t=frames).size
        parts = {"patch_embed": 2 * patches * prod(self.patch_embed.fc.weight.shape)}
        for number, stage in enumerate(self._stages()):
            width = self.config.embed_dim * self.config.c_mult**number
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


@lru_cache(maxsize=64)
def _coordinates(grid: Grid, device: torch.device) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(s, device=device) for s in grid)).view(1, -1, 4)


def _index(grid: Grid, batch: int, device: torch.device) -> Tensor:
    """``(b, n, 4)`` row-major coordinates of all cells of ``grid``."""
    return _coordinates(grid, device).expand(batch, -1, -1)


def _merge_brain(brain: Tensor, grid: Grid, frames: int, factors: tuple[int, int, int]) -> Tensor:
    """``(b, n)`` brain shares averaged over the tokens that merge."""
    index = neighbours((*grid[:3], frames), factors).to(brain.device)
    return brain[:, index].mean(-1)

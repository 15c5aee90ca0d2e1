"""What shifted-window encoders share: checks, grids, the block, the merge, tokens in and out.

Shapes: b samples, n tokens, d width; a block works on rows ``(tokens, d)`` in window order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from math import ceil
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.layers.attention import Windows, attend_windows
from fmrizoo.layers.lora import LoraLinear, scale_output
from fmrizoo.layers.mlp import MLP
from fmrizoo.layers.patches import Brain, PatchEmbed, background_value, pad_to, patch_share
from fmrizoo.layers.plan import neighbours
from fmrizoo.layers.prompts import check_prompts
from fmrizoo.layers.rope import rotate_queries_and_keys
from fmrizoo.types import Backbone, Features, Grid, Tokens, check_checkpointing, chosen_stages


class SwinConfig(Protocol):
    """The settings that every shifted-window encoder has."""

    img_size: list[int]
    patch_size: list[int]
    in_chans: int
    embed_dim: int
    depths: list[int]
    num_heads: list[int]
    last_layer_full_msa: bool
    c_mult: int
    mlp_ratio: float
    qkv_bias: bool
    drop_rate: float
    attn_drop_rate: float
    drop_path_rate: float


def check_sizes(key: str, sizes: Sequence[int], axes: str = "x, y, z, t") -> None:
    """Raise :class:`RecipeError` unless ``sizes`` are positive, one for each of ``axes``."""
    count = {"x, y, z, t": "four", "x, y, z": "three"}[axes]
    if len(sizes) != len(axes.split(", ")) or any(size < 1 for size in sizes):
        raise RecipeError(
            f"backbone.{key} needs {count} positive numbers ({axes}), got {list(sizes)}"
        )


def check_config(config: SwinConfig) -> None:
    """Raise :class:`RecipeError` for settings that no shifted-window encoder can have."""
    check_sizes("img_size", config.img_size)
    check_sizes("patch_size", config.patch_size)
    for key in ("in_chans", "embed_dim", "c_mult", "mlp_ratio"):
        if getattr(config, key) <= 0:
            raise RecipeError(f"backbone.{key} must be > 0, got {getattr(config, key)}")
    for key in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        if not 0 <= getattr(config, key) < 1:
            raise RecipeError(f"backbone.{key} must be in [0, 1), got {getattr(config, key)}")
    if any(depth < 1 for depth in config.depths):
        raise RecipeError(f"backbone.depths must all be ≥ 1, got {list(config.depths)}")
    if not config.depths or len(config.depths) != len(config.num_heads):
        raise RecipeError(
            f"backbone.depths {list(config.depths)} and num_heads {list(config.num_heads)} "
            "need one number per stage each"
        )
    for stage, heads in enumerate(config.num_heads):
        width = config.embed_dim * config.c_mult**stage
        if heads < 1 or width % heads:
            raise RecipeError(
                f"backbone.num_heads[{stage}]={heads} does not divide the width {width} of "
                f"stage {stage + 1}"
            )
    if config.img_size[3] % config.patch_size[3]:
        raise RecipeError(
            f"a clip of {config.img_size[3]} frames does not divide into patches of "
            f"{config.patch_size[3]} frames: change data.clip_frames or backbone.patch_size"
        )


def stage_grids(config: SwinConfig) -> list[Grid]:
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


def merge_factors(grids: Sequence[Grid], stage: int) -> tuple[int, int, int] | None:
    """How many tokens along x, y, z the merge after ``stage`` joins; None after the last."""
    if stage + 1 == len(grids):
        return None
    x, y, z, _ = (a // b for a, b in zip(grids[stage], grids[stage + 1], strict=True))
    return x, y, z


def path_rates(config: SwinConfig) -> list[list[float]]:
    """Rate of stochastic depth of every block of every stage: rising linearly from 0."""
    total, done, rates = sum(config.depths), 0, []
    for depth in config.depths:
        rates.append([config.drop_path_rate * (done + i) / max(total - 1, 1) for i in range(depth)])
        done += depth
    return rates


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, on tokens in window order.

    Attributes:
        heads, head_dim: How many, of how many channels.
        multiplies, multiplier: On the logits, see :class:`fmrizoo.layers.readout.ScaledLinear`.
    """

    multiplies: ClassVar[str] = "attention"
    multiplier: float = 1.0

    def __init__(self, width: int, heads: int, config: SwinConfig) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.scale = self.head_dim**-0.5
        self.attn_drop = config.attn_drop_rate
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(config.drop_rate)

    def keys_and_values(self, prompts: Tensor) -> Tensor:
        """``(p, d)`` normed prompts → ``(p, 2 · d)``, at least fp32.

        Wide so that the gradients of all windows are summed in it.
        """
        seen: Tensor = self.qkv(prompts)[:, prompts.shape[1] :]
        return seen.to(torch.promote_types(seen.dtype, torch.float32))

    @torch.no_grad()
    def fold_multiplier(self) -> None:
        """Multiply it into all that makes the queries: the same logits with a multiplier of 1.

        Queries are the first third of the outputs of ``qkv``: of its weight and bias, and of every
        adapter's B. Rotary positions are linear, and prompts have no query.
        """
        for part in self._queries():
            part.mul_(self.multiplier)
        self.multiplier = 1.0

    @torch.no_grad()
    def init_zero_queries(self) -> None:
        """Start with queries, and so with logits, of zero."""
        for part in self._queries():
            part.zero_()

    def _queries(self) -> list[Tensor]:
        """Views of the rows that make queries: the first third of every map's outputs.

        Raises:
            RecipeError: adapters are merged into them.
        """
        base, parts = cast(nn.Linear | LoraLinear, self.qkv), list[Tensor]()
        if isinstance(base, LoraLinear):
            if base.merged:
                raise RecipeError("the adapters are merged into the weights: unmerge them first")
            parts += [cast(Tensor, layer.weight) for layer in base.lora_B.values()]
            base = base.base_layer
        parts += [base.weight] if base.bias is None else [base.weight, base.bias]
        return [part[: len(part) // 3] for part in parts]

    def forward(
        self, x: Tensor, windows: Windows, causal: bool = False, seen: Tensor | None = None
    ) -> Tensor:
        """``(rows, d)`` → same shape; ``seen``: from :meth:`keys_and_values`."""
        qkv = self.qkv(x)
        if windows.rotation is not None:
            qkv = rotate_queries_and_keys(qkv, windows.rotation, self.heads)
        dropout = self.attn_drop if self.training else 0.0
        scale = self.scale * self.multiplier
        mixed = attend_windows(qkv, windows, self.heads, scale, dropout, causal, seen)
        projected: Tensor = self.drop(self.proj(mixed))
        return projected


class SwinBlock(nn.Module):
    """Pre-norm block: ``x += Attn(LN(x))``, ``x += MLP(LN(x))`` with stochastic depth.

    Attributes:
        multiplies, multiplier: On what both halves add, see
            :class:`fmrizoo.layers.readout.ScaledLinear`.
    """

    multiplies: ClassVar[str] = "branch"
    multiplier: float = 1.0

    def __init__(self, width: int, heads: int, config: SwinConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, config)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * config.mlp_ratio), config.drop_rate)
        self.drop_path = drop_path

    def draw_paths(self, batch: int, like: Tensor) -> Tensor | None:
        """``(2, b, 1)`` factors on what both halves add to each sample; None where nothing drops.

        Drawn once a pass: however its rows are split up, a sample goes one way.
        """
        if not self.drop_path or not self.training:
            return None
        drawn = like.new_empty(2, batch, 1).bernoulli_(1 - self.drop_path)
        return drawn.div_(1 - self.drop_path)

    def see(self, prompts: Tensor | None) -> Tensor | None:
        """Keys and values that every window sees, of ``prompts (p, d)``: once a pass."""
        if prompts is None:
            return None
        return self.attn.keys_and_values(self.norm1(prompts.to(self.norm1.weight.dtype)))

    def forward(
        self,
        x: Tensor,
        windows: Windows,
        *,
        causal: bool = False,
        padding: Tensor | None = None,
        paths: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """``(rows, d)`` → same shape.

        Args:
            x: Tokens in window order.
            windows: How.
            causal: See :func:`fmrizoo.layers.attention.attend_windows`.
            padding: ``(rows, 1)`` True where a row stands for no token.
            paths: ``(2, rows, 1)`` factors of :meth:`draw_paths`, row by row.
            seen: ``(p, 2 · d)`` from :meth:`see`.
        """
        h = self.norm1(x)
        if padding is not None:
            # The reference pads after the norm: padded tokens are zeros that take part unmasked.
            h = h.masked_fill(padding, 0.0)
        attended = self.attn(h, windows, causal, seen)
        x = self._add(x, attended, None if paths is None else paths[0])
        mixed: Tensor = self.mlp(self.norm2(x))
        return self._add(x, mixed, None if paths is None else paths[1])

    def _add(self, x: Tensor, branch: Tensor, path: Tensor | None) -> Tensor:
        # In the sum itself: a factor of 1 changes no bit, another needs no tensor of its own.
        return torch.add(x, branch if path is None else branch * path, alpha=self.multiplier)

    def fold_multiplier(self) -> None:
        """Put ``multiplier`` into the last Linear of both halves; the block computes the same."""
        for last in (self.attn.proj, self.mlp.linear2):
            scale_output(last, self.multiplier)
        self.multiplier = 1.0


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


class SwinEncoder(Backbone):
    """Tokens in and features out of a shifted-window encoder: ``(b, c, x, y, z, t)`` → features.

    ``num_features = embed_dim · c_mult ** (stages − 1)``. Clips smaller than the padded grid are
    padded with their background at the end of x, y, z. Time is never merged.
    """

    def __init__(self, config: SwinConfig, patch_norm: bool) -> None:
        super().__init__()
        self.grids = stage_grids(config)
        px, py, pz, pt = config.patch_size
        self.patch_size = (px, py, pz, pt)
        self.embed_dim = config.embed_dim
        self.widths = [config.embed_dim * config.c_mult**s for s in range(len(config.depths))]
        self.stage_features = tuple(self.widths)
        self.num_features = self.widths[-1]
        self.depths = list(config.depths)
        rx, ry, rz, _ = (a // b for a, b in zip(self.grids[0], self.grids[-1], strict=True))
        self.reduction = (px * rx, py * ry, pz * rz, pt)
        self.clip_grid = Grid(*(g * p for g, p in zip(self.grids[0], self.patch_size, strict=True)))
        self.channels = config.in_chans
        self.patch_embed = PatchEmbed(self.patch_size, self.channels, self.embed_dim, patch_norm)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.checkpointing = "none"

    @classmethod
    def supports(cls, config: SwinConfig) -> frozenset[str]:
        """``causal``: attention can be kept from looking ahead in time. ``prompts``."""
        return frozenset({"causal", "prompts"})

    def set_checkpointing(self, mode: str) -> None:
        """``none``; ``block``: recompute whole blocks; ``window-chunk``: some windows at a time."""
        self.checkpointing = check_checkpointing(mode)

    def lora_targets(self) -> tuple[str, ...]:
        """Suffixes of the Linear modules that low-rank adapters may wrap."""
        return ("attn.qkv", "attn.proj", "mlp.linear1", "mlp.linear2")

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
        if bold.ndim != 6 or bold.shape[1] != self.channels:
            raise DataError(f"bold must be (b, {self.channels}, x, y, z, t), got {bold.shape}")
        batch, frames = bold.shape[0], bold.shape[-1]
        if not frames or frames % self.patch_size[3]:
            raise DataError(
                f"{frames} frames do not divide into patches of {self.patch_size[3]} frames"
            )
        if background is None:
            background = background_value(bold, mask)
        bold, mask = pad_to(bold, mask, self.clip_grid._replace(t=frames), background)
        grid = self.grids[0]._replace(t=frames // self.patch_size[3])
        within = None if mask is None else Brain(mask, background)
        values = self.pos_drop(self.patch_embed(bold, within))
        valid = torch.ones(batch, grid.size, dtype=torch.bool, device=bold.device)
        brain = torch.ones(batch, grid.size, device=bold.device)
        if mask is not None:
            share = patch_share(mask, self.patch_size).unsqueeze(-1)
            brain = share.expand(-1, -1, -1, -1, grid.t).flatten(1)
        return Tokens(values, row_major(grid, batch, bold.device), valid, grid, brain)

    def encode_stages(
        self,
        tokens: Tokens,
        indices: Sequence[int] | None = None,
        *,
        causal: bool = False,
        prompts: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        """Features at the end of stages, before the merge.

        Args:
            tokens: From :meth:`tokenize`.
            indices: Stages (None: all; negative counts from the end).
            causal: No feature depends on a later time slot.
            prompts: ``(p, width)`` for every Swin block: in each of its windows ``p`` more keys and
                values, which its own norm and projection make of them. They have no position, no
                query, and every query sees them.

        Raises:
            RecipeError: a stage that does not exist, or prompts that do not fit.
        """
        wanted = chosen_stages(indices, len(self.grids))
        given = check_prompts(prompts, self.prompt_widths())
        kept = self._run(tokens, set(wanted), causal, self._by_stage(given))
        return [kept[i] for i in wanted]

    def prompt_widths(self) -> tuple[int, ...]:
        """Width of every Swin block, in the order they run."""
        both = zip(self.widths, self.depths, strict=True)
        return tuple(width for width, depth in both for _ in range(depth))

    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        """Patch embedding, then one layer for each Swin block.

        A merge belongs to the block before it, the last norm to the last block, a position table to
        the block after it.
        """
        layers: list[tuple[str, ...]] = [("patch_embed", "pos_drop", *self._table_names(0))]
        for stage in range(len(self.depths)):
            blocks = self._block_names(stage)
            if stage:
                blocks[0] = (*self._table_names(stage), *blocks[0])
            after = "norm" if stage + 1 == len(self.depths) else f"layers.{stage}.downsample"
            blocks[-1] = (*blocks[-1], after)
            layers += blocks
        return tuple(layers)

    def _table_names(self, stage: int) -> tuple[str, ...]:
        """Position tables at the start of ``stage``."""
        return ()

    def _block_names(self, stage: int) -> list[tuple[str, ...]]:
        """The Swin blocks of ``stage`` in the order they run, each with what belongs to it."""
        raise NotImplementedError

    def _by_stage(self, prompts: Sequence[Tensor] | None) -> list[Sequence[Tensor | None]]:
        """Prompts of every block of every stage; None for those without."""
        layers: Iterator[Tensor | None] = repeat(None) if prompts is None else iter(prompts)
        return [[next(layers) for _ in range(depth)] for depth in self.depths]

    def _run(
        self,
        tokens: Tokens,
        keep: set[int],
        causal: bool,
        prompts: Sequence[Sequence[Tensor | None]],
    ) -> dict[int, Features]:
        """Features at the end of the stages in ``keep``; what follows them does not run."""
        raise NotImplementedError

    def _features(self, values: Tensor, stage: int, tokens: Tokens) -> Features:
        """The fields beside row-major ``values (b, n, d)`` at the end of ``stage``."""
        grid = self.grids[stage]._replace(t=tokens.grid.t)
        brain = tokens.brain
        for before in range(stage):
            factors = merge_factors(self.grids, before)
            assert factors is not None
            index = neighbours((*self.grids[before][:3], grid.t), factors).to(brain.device)
            brain = brain[:, index].mean(-1)
        valid = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return Features(values, row_major(grid, values.shape[0], values.device), valid, grid, brain)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _coordinates(grid: Grid, device: torch.device) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(s, device=device) for s in grid)).view(1, -1, 4)


def row_major(grid: Grid, batch: int, device: torch.device) -> Tensor:
    """``(b, n, 4)`` row-major coordinates of all cells of ``grid``."""
    return _coordinates(grid, device).expand(batch, -1, -1)

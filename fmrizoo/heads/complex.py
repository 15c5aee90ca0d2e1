"""Attentive readout of several stages of a frozen encoder, with an optional mixer over frames.

Learned queries look at the features of all chosen stages, frame by frame (pooling by attention: Lee
et al. 2019, "Set Transformer"; as a probe with an MLP after it: Bardes et al. 2024, "V-JEPA").
Positions enter what is compared (queries, keys), not what is taken (values).

Shape letters: ``b`` samples, ``k`` cells, ``t`` time slots, ``q`` queries of all targets, ``d``
features of a stage, ``w`` width of the readout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.heads.base import TaskHead, check_choice, check_count, check_share
from fmrizoo.heads.cells import cell_means
from fmrizoo.heads.readout import TaskLinear
from fmrizoo.layers.coordinates import fourier_features
from fmrizoo.layers.mlp import MLP
from fmrizoo.registry import register_head
from fmrizoo.types import Backbone, Features, TaskSpec, chosen_stages

TEMPORAL = ("none", "attention")
OCTAVES = 6  # finest period of a cell's position: a fifth of the grid
MLP_RATIO = 2


@dataclass
class ComplexConfig:
    """Attentive readout of several stages of the frozen encoder; optional mixer over frames."""

    name: str = "complex"
    stages: list[int] = field(default_factory=lambda: [-2, -1])  # negative: from the end
    cells: int = 4  # a stage is averaged to at most so many cells along each of x, y, z
    dim: int = 128  # width of the readout
    queries: int = 1  # learned queries per target
    num_heads: int = 4  # of attention
    temporal: str = "none"  # before the mean over frames: none | attention between them
    depth: int = 1  # layers of the temporal mixer
    dropout: float = 0.0  # on attention weights, in MLPs, on the pooled queries

    def __post_init__(self) -> None:
        check_choice("temporal", self.temporal, TEMPORAL)
        check_share("dropout", self.dropout)
        for key in ("cells", "dim", "queries", "num_heads", "depth"):
            check_count(key, getattr(self, key))
        if self.dim % self.num_heads or self.dim % 2:
            raise RecipeError(
                f"head.dim={self.dim} must be even and a multiple of head.num_heads="
                f"{self.num_heads}"
            )
        if not self.stages or len(set(self.stages)) < len(self.stages):
            raise RecipeError(f"head.stages needs different stages, got {list(self.stages)}")


class Attention(nn.Module):
    """Multi-head attention with a mask over the keys."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, present: Tensor) -> Tensor:
        """``(n, q, w)`` queries over ``(n, k, w)``, of which ``present (n, k)`` → ``(n, q, w)``."""

        def split(x: Tensor) -> Tensor:
            return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            split(self.query(queries)),
            split(self.key(keys)),
            split(self.value(values)),
            attn_mask=present[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class FrameMixer(nn.Module):
    """Pre-norm transformer layer over frames; adds nothing at the start."""

    def __init__(self, config: ComplexConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.num_heads, config.dropout)
        self.mlp = MLP(config.dim, MLP_RATIO * config.dim, config.dropout)
        for last in (self.attention.out, self.mlp.linear2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, times: Tensor, present: Tensor) -> Tensor:
        """``(n, t, w)`` → same shape; ``times (t, w)``, ``present (n, t)``."""
        h = self.norm1(x)
        placed = h + times
        x = x + self.attention(placed, placed, h, present)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


@register_head("complex", ComplexConfig)
class ComplexHead(TaskHead):
    """Queries over the cells of every frame → mixer over frames → mean → a linear map a target."""

    def __init__(
        self, config: ComplexConfig, *, backbone: Backbone, tasks: Sequence[TaskSpec]
    ) -> None:
        super().__init__(tasks)
        self.config = config
        self.stages = tuple(config.stages)
        count = len(backbone.stage_features)
        chosen = chosen_stages(self.stages, count)
        if len(set(chosen)) < len(chosen):
            raise RecipeError(
                f"head.stages={list(self.stages)} names a stage twice: the backbone has {count}"
            )
        widths = [backbone.stage_features[stage] for stage in chosen]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.inputs = nn.ModuleList(nn.Linear(width, config.dim) for width in widths)
        self.kind = nn.Parameter(torch.empty(len(widths), config.dim))
        self.place = nn.Linear(3 * (1 + 2 * OCTAVES), config.dim, bias=False)
        self.queries = nn.Parameter(torch.empty(len(self.tasks) * config.queries, config.dim))
        self.look = Attention(config.dim, config.num_heads, config.dropout)
        self.norm = nn.LayerNorm(config.dim)
        self.mlp = MLP(config.dim, MLP_RATIO * config.dim, config.dropout)
        layers = config.depth if config.temporal == "attention" else 0
        self.mixer = nn.ModuleList(FrameMixer(config) for _ in range(layers))
        self.last_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.project = nn.ModuleList(
            TaskLinear(config.queries * config.dim, [task]) for task in self.tasks
        )
        for learned in (self.kind, self.queries):
            nn.init.trunc_normal_(learned, std=0.02)

    @property
    def trains(self) -> str:
        """``none``."""
        return "none"

    def read(self, stages: Sequence[Features]) -> tuple[Tensor, ...]:
        """:func:`~fmrizoo.heads.cells.cell_means` of each stage, one after the other.

        Raises:
            DataError: a clip without a brain voxel.
            RecipeError: stages whose frames do not go together.
        """
        if len({stage.grid.t for stage in stages}) > 1:
            raise RecipeError(
                f"head.stages={list(self.stages)} have {[s.grid.t for s in stages]} time slots: "
                "the complex head reads them frame by frame"
            )
        found = [cell_means(stage, self.config.cells) for stage in stages]
        some = torch.stack([present.flatten(1).any(1) for _, present, _ in found]).any(0)
        if not bool(some.all()):
            raise DataError("a clip without a brain voxel has no features to read")
        return tuple(part for stage in found for part in stage)

    def answer(self, read: Sequence[Tensor]) -> Tensor:
        """``(b, o)``, for clips of any number of frames."""
        values, keys, present = self._look_at(read)
        b, t, _, width = values.shape
        frames = present.any(2)
        # Where a frame has no cell at all anything may be looked at: the frame is left out below.
        usable = present | ~frames.unsqueeze(2)
        queries = self.queries.expand(b * t, -1, -1)
        x = queries + self.look(
            queries, keys.flatten(0, 1), values.flatten(0, 1), usable.flatten(0, 1)
        )
        x = x + self.mlp(self.norm(x))
        x = x.view(b, t, -1, width).transpose(1, 2)
        if self.mixer:
            times = _time_table(t, width, x)
            rows = frames.repeat_interleave(x.shape[1], 0)
            flat = x.flatten(0, 1)
            for layer in self.mixer:
                flat = layer(flat, times, rows)
            x = flat.view_as(x)
        weight = frames.to(x.dtype) / frames.sum(1, keepdim=True)
        pooled = self.dropout(self.last_norm(torch.einsum("bqtw,bt->bqw", x, weight)))
        parts = pooled.unflatten(1, (len(self.tasks), -1)).flatten(2).unbind(1)
        return torch.cat([p(part) for p, part in zip(self.project, parts, strict=True)], 1)

    def _look_at(self, read: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Values and keys ``(b, t, k, w)`` of all stages' cells, and which are there."""
        dtype = self.queries.dtype
        found = []
        for number, (norm, enter) in enumerate(zip(self.norms, self.inputs, strict=True)):
            means, present, centres = read[3 * number : 3 * number + 3]
            value = enter(norm(means.to(dtype))) + self.kind[number]
            where = self.place(fourier_features(centres, OCTAVES).to(dtype))
            key = value + where.unsqueeze(2)
            found.append((value, key, present))
        stages = list(zip(*found, strict=True))
        return _side_by_side(stages[0]), _side_by_side(stages[1]), _side_by_side(stages[2])


def _side_by_side(stages: Sequence[Tensor]) -> Tensor:
    """``(b, k, t, …)`` of every stage → ``(b, t, all k, …)``."""
    return torch.cat(list(stages), 1).transpose(1, 2)


def _time_table(frames: int, width: int, like: Tensor) -> Tensor:
    """``(frames, width)`` sines and cosines of the slot number (Vaswani et al. 2017, §3.5)."""
    slot = torch.arange(frames, dtype=torch.float32, device=like.device).unsqueeze(1)
    rate = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=like.device) / width)
    return torch.cat([(slot * rate).sin(), (slot * rate).cos()], 1).to(like.dtype)

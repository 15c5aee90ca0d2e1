"""An encoder in which every voxel and frame is a token of its own and sees nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch import Tensor, nn

from fmrizoo.analysis.tested import TestedRun
from fmrizoo.config import Recipe
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.store import Store
from fmrizoo.data.targets import fit_tasks
from fmrizoo.heads.linear import LinearConfig, LinearHead
from fmrizoo.model import DownstreamModel
from fmrizoo.types import Backbone, Features, Grid, TaskSpec, Tokens


class Local(Backbone):
    embed_dim = num_features = 1
    stage_features = (1,)
    patch_size = reduction = (1, 1, 1, 1)

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.clip_grid = grid
        self.scale = nn.Parameter(torch.ones(1))

    def layer_names(self) -> tuple[tuple[str, ...], ...]:
        return (("scale",),)

    def tokenize(
        self,
        bold: Tensor,
        mask: Tensor | None = None,
        *,
        background: Tensor | None = None,
        tr: Tensor | None = None,
    ) -> Tokens:
        assert mask is not None
        grid = Grid(*bold.shape[2:])
        cells = torch.cartesian_prod(*(torch.arange(n) for n in grid))
        brain = mask.unsqueeze(-1).expand(-1, *grid).flatten(1)
        values = self.scale * bold.flatten(1).unsqueeze(-1)
        return Tokens(values, cells[None], torch.ones_like(brain), grid, brain.float())

    def encode_stages(
        self,
        tokens: Tokens,
        indices: Sequence[int] | None = None,
        *,
        causal: bool = False,
        prompts: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        t = tokens
        return [Features(t.values, t.index, t.valid, t.grid, t.brain)]


def probe(table: ClipTable, tasks: Sequence[TaskSpec]) -> DownstreamModel:
    """A linear probe of the mean over a clip's frames of every voxel, with weights 0."""
    backbone = Local(table.grid)
    head = LinearHead(LinearConfig(pool="space"), backbone=backbone, tasks=tasks)
    nn.init.zeros_(head.project.weight)
    return DownstreamModel(backbone, head).eval()


def opened(recipe: Recipe, runs: Sequence[str] | None = None) -> TestedRun:
    """Labelled clips of a recipe's store and a probe without weights, as if it had been trained."""
    store = Store(recipe.data.store)
    chosen = [r for r in store.select(recipe.data.select) if runs is None or r.name in runs]
    table = ClipTable.labelled(store, chosen, recipe.data, recipe.task)
    tasks = fit_tasks(table, recipe.task)
    return TestedRun(Path("run"), recipe, probe(table, tasks), table, torch.device("cpu"))


def save_atlas(path: Path, labels: np.ndarray, affine: object) -> Path:
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.int16), np.array(affine)), path)
    return path

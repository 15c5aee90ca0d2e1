"""A tiny encoder with dropout and a head that reads several things of it, on the shipped sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainer_tiny import ALONE, train_config

from fmrizoo.config import DataConfig, Recipe, TaskConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.store import Store
from fmrizoo.data.targets import fit_tasks
from fmrizoo.model import DownstreamModel
from fmrizoo.trainer.cache import FeatureCache
from fmrizoo.trainer.device import World
from fmrizoo.trainer.inputs import TrainerInputs
from fmrizoo.types import Backbone, Features, Grid, Head, TaskSpec, Tokens, chosen_stages

FRAMES, WIDTH, SLABS = 8, 6, 6


@dataclass
class Config:
    name: str = "stub"
    numbers: list[int] = field(default_factory=lambda: [1, 2])


class Encoder(Backbone):
    """One token per slab of the box along x; dropout after both of its stages."""

    embed_dim = num_features = WIDTH
    stage_features = (WIDTH, WIDTH)

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.embed = nn.Linear(FRAMES, WIDTH)
        self.stages = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.calls = 0  # clips encoded

    def set_checkpointing(self, mode: str) -> None:
        assert mode == "none"

    def tokenize(
        self,
        bold: Tensor,
        mask: Tensor | None = None,
        *,
        background: Tensor | None = None,
        tr: Tensor | None = None,
    ) -> Tokens:
        values = self.embed(bold[:, 0].mean((2, 3)))
        b, n, _ = values.shape
        index = torch.zeros(1, n, 4, dtype=torch.int64)
        index[0, :, 0] = torch.arange(n)
        brain = torch.ones(b, n)
        return Tokens(values, index, brain > 0, Grid(n, 1, 1, 1), brain)

    def encode_stages(
        self,
        tokens: Tokens,
        indices: Sequence[int] | None = None,
        *,
        causal: bool = False,
        prompts: Sequence[Tensor] | None = None,
    ) -> list[Features]:
        assert not self.training
        x, found = tokens.values, []
        for stage in self.stages:
            x = self.dropout(torch.tanh(stage(x)))
            found.append(Features(x, tokens.index, tokens.valid, tokens.grid, tokens.brain))
        self.calls += len(x)
        return [found[i] for i in chosen_stages(indices, 2)]


class Reader(Head):
    """Reads the mean of one stage, all tokens of the other and their mask; dropout in between."""

    stages = (0, -1)
    trains = "none"

    def __init__(self, tasks: tuple[TaskSpec, ...], dropout: float, frozen: bool = True) -> None:
        super().__init__()
        self.tasks, self.frozen = tasks, frozen
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(2 * WIDTH, sum(task.outputs for task in tasks))

    def attach(self, backbone: Backbone) -> None:
        backbone.requires_grad_(not self.frozen)

    def encoder_trains(self) -> bool:
        return not self.frozen

    def lr_scales(self, backbone: Backbone) -> Mapping[str, float]:
        return {}

    def read(self, stages: Sequence[Features]) -> tuple[Tensor, ...]:
        first, last = stages
        return first.pooled(), last.values, last.valid

    def answer(self, read: Sequence[Tensor]) -> Tensor:
        pooled, tokens, valid = read
        assert valid.dtype == torch.bool
        tokens = torch.where(valid.unsqueeze(-1), tokens, 0).amax(1)
        outputs: Tensor = self.project(self.dropout(torch.cat([pooled, tokens], 1)))
        return outputs

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs.float(), target)

    def scores(self, outputs: Tensor) -> Tensor:
        return outputs.float()


@dataclass
class Job:
    """A model, two tables of clips and what training on them needs."""

    recipe: Recipe
    tables: dict[str, ClipTable]
    tasks: tuple[TaskSpec, ...]
    world: World = ALONE

    def model(self, *, frozen: bool = True) -> DownstreamModel:
        torch.manual_seed(3)
        return DownstreamModel(Encoder(), Reader(self.tasks, dropout=0.4, frozen=frozen))

    def loader(self, world: World, micro: int) -> Loader:
        seed = self.recipe.train.seed
        return Loader(
            self.tables["train"],
            self.recipe.data,
            micro,
            rank=world.rank,
            world=world.size,
            seed=seed,
            tasks=self.tasks,
        )

    def inputs(self, out: Path, *, cached: bool, **changes: Any) -> TrainerInputs:
        recipe = replace(
            self.recipe, train=train_config(cache_features=cached, validate_every=2, **changes)
        )
        model = self.model()
        cache = FeatureCache(model, recipe, out, self.tables, self.tasks) if cached else None

        def validate(trained: nn.Module, device: torch.device) -> dict[str, float]:
            assert isinstance(trained, DownstreamModel)
            table, dtype = self.tables["validation"], next(trained.parameters()).dtype
            whole = Loader(table, self.recipe.data, 5, tasks=self.tasks)
            batches = cache.epoch("validation", 5) if cache else whole.epoch()
            total, units = 0.0, []
            for compact in batches:
                loss, _ = trained(compact.to_batch(device, dtype))
                total += float(loss) * len(compact)
                units += compact.units
            assert units == [table.unit(clip) for clip in range(len(table))]
            return {"loss": total / len(table)}

        return TrainerInputs(model, recipe, out, self.loader, self.world, validate, features=cache)


def job(store: Store | Path, world: World = ALONE) -> Job:
    """Nine runs of the sample's whole brain: seven to train on, two to validate."""
    store = store if isinstance(store, Store) else Store(store)
    data, task = DataConfig(clip_frames=FRAMES, normalization="voxel"), TaskConfig()
    runs = store.select({"acquisition": "25mm"})
    parts = {"train": runs[:7], "validation": runs[7:]}
    tables = {n: ClipTable.labelled(store, some, data, task) for n, some in parts.items()}
    recipe = Recipe(backbone=Config(), head=Config("reader"), data=data, task=task)
    return Job(recipe, tables, fit_tasks(tables["train"], task), world)

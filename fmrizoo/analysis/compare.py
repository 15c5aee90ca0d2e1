"""``fmrizoo analyze similarity``: the stages of one or two trained models on the same clips."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from fmrizoo.analysis.similarity import LEAST, Array, Similarity, cka, rsa
from fmrizoo.analysis.tested import thinned, write_json
from fmrizoo.config import Recipe
from fmrizoo.data.batch import CompactBatch
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.exclusion import chosen
from fmrizoo.data.loader import Loader
from fmrizoo.data.mixture import open_store
from fmrizoo.data.splits import Split
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.model import DownstreamModel, PretrainingModel
from fmrizoo.registry import suggest
from fmrizoo.types import POOLING, Batch
from fmrizoo.zoo import load, load_recipe, model_folder

log = logging.getLogger(__name__)

SCHEMA = "fmrizoo.similarity/1"


def compare_runs(
    first: Path,
    second: Path | None = None,
    *,
    pool: str = "mean",
    part: str = "test",
    store: Path | None = None,
    clips: int = 256,
    minibatch: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> Similarity:
    """CKA and RSA of all stages of two models, or of one model with itself.

    Where ``second`` is the pretrained model that ``first`` was fine-tuned from, the diagonal says
    what fine-tuning changed, and the pretraining loss of both encoders on the same clips says what
    was forgotten. It is taken wherever ``second`` has an objective, ``first`` a head and a backbone
    of the same kind.

    Args:
        first, second: Run or model folders; None: the first alone.
        pool: How the tokens of a stage become one vector a clip (``Features.pooled``).
        part: Of the first run's split.
        store: Another store than the first model's, of which all runs are used.
        clips: At most so many windows, spread evenly.
        minibatch: Clips of one minibatch of CKA; None: all at once.
        batch_size: Clips encoded at a time.
        device: ``auto``, ``cpu``, ``cuda`` or ``xpu``.

    Raises:
        CheckpointError: no model, or data preprocessed in another way than one of them expects.
        RecipeError: an unknown part or pooling.
        DataError: unusable data or fewer clips than CKA needs.
    """
    from fmrizoo.trainer.device import World, resolve_device
    from fmrizoo.trainer.export import check_contract, read_info

    if pool not in POOLING:
        raise RecipeError(f"pool={pool!r} is not known.{suggest(pool, list(POOLING))}")
    where = resolve_device(device, World())
    recipe = load_recipe(read_info(model_folder(first)).recipe)
    table = thinned(_windows(first, recipe, part, store), clips)
    if len(table) < LEAST:
        raise DataError(f"similarity needs at least {LEAST} clips, got {len(table)}")
    models = []
    for source in (first, second) if second is not None else (first,):
        folder = model_folder(source)
        contract = table.contract(recipe.data.normalization)
        check_contract(read_info(folder).contract, contract, folder, table.store.path)
        models.append(cast(PretrainingModel | DownstreamModel, load(folder)).to(where))
    found = [_features(m, _batches(table, recipe, batch_size), pool, where) for m in models]
    losses = None
    if second is not None:
        losses = _pretraining_losses(models[0], models[1], table, recipe, batch_size, where)
    names = [str(source) for source in (first, second or first)]
    stages = tuple(tuple(f"stage {k}" for k in range(1, len(f) + 1)) for f in found)
    return Similarity(
        first=names[0],
        second=names[1],
        stages=(stages[0], stages[-1]),
        clips=len(table),
        pool=pool,
        cka=_rows(cka(found[0], found[-1], minibatch)),
        rsa=_rows(rsa(found[0], found[-1])),
        pretraining_loss=losses,
    )


def _windows(run: Path, recipe: Recipe, part: str, store: Path | None) -> ClipTable:
    config = recipe.data
    if store is not None:
        config = replace(config, store=str(store), stores={}, leave_out=[])
    opened = open_store(config)
    runs = chosen(opened, config).used
    path = run / "split.json"
    if store is None:
        if not path.is_file():
            raise DataError(f"{run} has no split.json: say with --store which clips to take")
        split = Split.load(path)
        split.check(opened)
        parts = split.parts()
        if part not in parts:
            raise RecipeError(f"part={part!r} is not known.{suggest(part, list(parts))}")
        runs = [opened[name] for name in parts[part]]
        if not runs:
            raise DataError(f"the {part} part of the split of {run} holds no run: try another")
    return ClipTable.windows(opened, runs, config)


def _batches(table: ClipTable, recipe: Recipe, size: int) -> Iterator[CompactBatch]:
    yield from Loader(table, recipe.data, size, seed=recipe.train.seed).epoch()


@torch.no_grad()
def _features(
    model: PretrainingModel | DownstreamModel,
    batches: Iterator[CompactBatch],
    pool: str,
    device: torch.device,
) -> list[Array]:
    """``(n, d)`` of every stage."""
    prompts = model.head.prompts() if isinstance(model, DownstreamModel) else None
    parts: list[list[Array]] = []
    for compact in batches:
        batch: Batch = compact.to_batch(device)
        stages = model.backbone.encode_stages(model.backbone.read(batch), None, prompts=prompts)
        parts.append([s.pooled(pool).double().cpu().numpy() for s in stages])
    return [np.concatenate(stage) for stage in zip(*parts, strict=True)]


@torch.no_grad()
def _pretraining_losses(
    tuned: nn.Module,
    pretrained: nn.Module,
    table: ClipTable,
    recipe: Recipe,
    size: int,
    device: torch.device,
) -> tuple[float, float] | None:
    """Mean loss of the pretraining objective with its own encoder and with the fine-tuned one.

    The same masks in both (a clip's seed is its own). Prompts are not part of it.
    """
    if not isinstance(tuned, DownstreamModel) or not isinstance(pretrained, PretrainingModel):
        return None
    if type(tuned.backbone) is not type(pretrained.backbone):
        return None
    if tuned.head.prompts() is not None:
        log.warning("the pretraining loss is of the encoder without its prompts")
    total, count = np.zeros(2), 0
    for compact in _batches(table, recipe, size):
        batch = compact.to_batch(device)
        for k, backbone in enumerate((pretrained.backbone, tuned.backbone)):
            loss, _ = pretrained.objective(backbone, batch)
            total[k] += float(loss) * len(batch)
        count += len(batch)
    before, after = (total / count).tolist()
    return before, after


def _rows(values: Array) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(v if np.isfinite(v) else None for v in row) for row in values.tolist())


def write_similarity(folder: Path, found: Similarity) -> None:
    """Write ``similarity.json``."""
    write_json(folder / "similarity.json", {"schema": SCHEMA, **asdict(found)})

"""Fine-tuning: a head on an encoder, chosen by validation alone, tested once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from fmrizoo.config import Recipe
from fmrizoo.data.batch import ClipFacts
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.targets import check_labels, fit_tasks
from fmrizoo.errors import RecipeError
from fmrizoo.model import DownstreamModel
from fmrizoo.pipeline.evaluation import evaluate, first_result
from fmrizoo.pipeline.inputs import (
    JobData,
    OnStep,
    check_monitor,
    eval_batch,
    fit_grid,
    loader,
    open_data,
    run_training,
    save_identity,
    save_split,
    start_encoder,
    whole,
    with_parametrization,
)
from fmrizoo.types import TaskSpec
from fmrizoo.zoo import build_downstream, build_encoder, load

if TYPE_CHECKING:
    from fmrizoo.evaluate.results import Result
    from fmrizoo.trainer.cache import FeatureCache


@dataclass(frozen=True)
class _Labelled:
    """The labelled clips of a job and what is fitted on those of the training part."""

    train: ClipTable
    validation: ClipTable | None
    tasks: tuple[TaskSpec, ...]


def finetune(
    recipe: Recipe,
    out: Path,
    *,
    name: str | None = None,
    on_step: OnStep | None = None,
    on_interrupt: Callable[[], None] | None = None,
) -> Result | None:
    """Train a head (and what it lets of the encoder train), then evaluate once on the test part.

    Args:
        recipe: With a head; ``init_from`` names a pretrained model; None: random weights.
        out: Run folder.
        name: Row name in tables; equal names are averaged over folds and seeds.
        on_step: Called after every optimizer step.
        on_interrupt: Called on every rank if a signal stopped the training.

    Returns:
        The test result (of the first target; all are in the run folder); None on other ranks than
        0, or when a signal stopped the training.

    Raises:
        RecipeError: no head, or a model that does not fit the data.
        DataError: unusable data or labels, or a test part that the encoder has seen in pretraining.
        CheckpointError: ``init_from`` is no model, or expects data preprocessed in another way.
    """
    from fmrizoo.trainer.cache import FeatureCache
    from fmrizoo.trainer.construction import construction
    from fmrizoo.trainer.device import discover, seed_everything
    from fmrizoo.trainer.inputs import TrainerInputs

    if recipe.head is None:
        raise RecipeError("a fine-tuning recipe needs a head, such as head=linear")
    recipe = with_parametrization(recipe)
    data, world = open_data(recipe), discover()
    check_monitor(recipe, data)
    clips = _labelled(recipe, data)
    seed_everything(recipe.train.seed)
    with construction(world):
        backbone = build_encoder(recipe)
        fit_grid(backbone, clips.train)
        seen = start_encoder(backbone, recipe, data, clips.train, ("validation", "test"))
        model = build_downstream(backbone, recipe, clips.tasks)
    features = None
    if recipe.train.cache_features:
        tables = {"train": clips.train, "validation": clips.validation}
        kept = {part: table for part, table in tables.items() if table is not None}
        features = FeatureCache(model, recipe, out, kept, clips.tasks)
    save_split(data.split, out, recipe, world)
    save_identity(data, out, world)
    result = run_training(
        TrainerInputs(
            model=model,
            recipe=recipe,
            out=out,
            loader_for=lambda world, micro: loader(clips.train, recipe, micro, clips.tasks, world),
            world=world,
            validate=partial(_validate, clips, recipe, features) if clips.validation else None,
            on_step=on_step,
            contract=clips.train.contract(recipe.data.normalization),
            tasks=clips.tasks,
            seen_runs=seen,
            features=features,
        )
    )
    if result.interrupted and on_interrupt:
        on_interrupt()
    if not world.main or result.model is None:
        return None
    tested = first_result(out, clips.tasks) if result.already_finished else None
    if tested and name in (None, tested.name):
        return tested
    trained = cast(DownstreamModel, load(out))
    trained.head.export(trained.backbone, out)
    return evaluate(out, recipe, name=name, seconds=result.seconds)


def _labelled(recipe: Recipe, data: JobData) -> _Labelled:
    """Read all labels (no voxel) and refuse what could not be scored, before anything is done."""
    train = ClipTable.labelled(data.store, data.part("train"), recipe.data, recipe.task)
    tasks = fit_tasks(train, recipe.task)
    for part in ("validation", "test"):
        if (table := data.labelled(part, recipe)) is not None:
            check_labels(table, tasks, part)
    return _Labelled(train, data.labelled("validation", recipe), tasks)


def _validate(
    clips: _Labelled,
    recipe: Recipe,
    features: FeatureCache | None,
    model: nn.Module,
    device: torch.device,
) -> dict[str, float]:
    """Loss over all validation clips at once, and the metrics of their units.

    With several targets a metric is named ``<target>.<metric>``.
    """
    from fmrizoo.evaluate.inference import unit_predictions
    from fmrizoo.evaluate.predictions import evaluate as score
    from fmrizoo.trainer.watchdog import alive

    assert clips.validation is not None and isinstance(model, DownstreamModel)
    dtype = next(model.parameters()).dtype
    held_out = whole(clips.validation, recipe, clips.tasks)
    outputs, targets = [], []
    facts: list[ClipFacts] = []
    batches = features.epoch("validation", eval_batch(recipe)) if features else held_out.epoch()
    for compact in batches:
        alive()
        batch = compact.to_batch(device, dtype)
        outputs.append(model.outputs(batch).float())
        targets.append(cast(torch.Tensor, batch.target))
        facts += [sample.facts for sample in compact.samples]
    together = torch.cat(outputs)
    # torch.cat promotes: a batch in which a class label is missing is not integer as others are.
    loss = model.head.loss(together, torch.cat(targets))
    found = {"loss": float(loss)}
    units = unit_predictions(model.head.scores(together).cpu(), facts, clips.tasks)
    for task in clips.tasks:
        if units[task.name]:
            values = score(units[task.name], task.kind).values
            prefix = f"{task.name}." if len(clips.tasks) > 1 else ""
            found |= {f"{prefix}{metric}": v for metric, v in values.items() if v is not None}
    return found

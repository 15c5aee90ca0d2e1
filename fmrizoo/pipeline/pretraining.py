"""Pretraining: a backbone with an objective on the training runs of a split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from fmrizoo.config import Recipe
from fmrizoo.data.clips import ClipTable
from fmrizoo.errors import RecipeError
from fmrizoo.files import write_arrays
from fmrizoo.forecast import learns_to_forecast, write_example
from fmrizoo.model import PretrainingModel
from fmrizoo.pipeline.inputs import (
    OnStep,
    check_monitor,
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
from fmrizoo.zoo import build_model, load

if TYPE_CHECKING:
    from fmrizoo.trainer.inputs import TrainResult

RECONSTRUCTION = "reconstruction.npz"


def pretrain(recipe: Recipe, out: Path, *, on_step: OnStep | None = None) -> TrainResult:
    """Train a backbone with an objective on the training runs of the recipe's split.

    Validation runs give the validation loss, test runs are never opened. Writes the run folder
    ``out`` (recipe, split, metrics, checkpoints, exported model, one reconstructed clip, and a
    forecast of one if the objective teaches it).

    Raises:
        RecipeError: no objective, or a model that does not fit the data.
        DataError, CorruptStoreError: unusable data.
    """
    from fmrizoo.trainer.construction import construction
    from fmrizoo.trainer.device import discover, seed_everything
    from fmrizoo.trainer.inputs import TrainerInputs

    if recipe.objective is None:
        raise RecipeError("a pretraining recipe needs an objective, such as objective=simmim")
    if recipe.train.cache_features:
        raise RecipeError("train.cache_features=true is for frozen encoders: pretraining has none")
    recipe = with_parametrization(recipe)
    data, world = open_data(recipe), discover()
    check_monitor(recipe, data)
    table = ClipTable.windows(data.store, data.part("train"), recipe.data)
    held_out = data.windows("validation", recipe)
    seed_everything(recipe.train.seed)
    with construction(world):
        model = cast(PretrainingModel, build_model(recipe))
        fit_grid(model.backbone, table)
        seen = start_encoder(model.backbone, recipe, data, table, ("test",))
    save_split(data.split, out, recipe, world)
    save_identity(data, out, world)
    result = run_training(
        TrainerInputs(
            model=model,
            recipe=recipe,
            out=out,
            loader_for=lambda world, micro: loader(table, recipe, micro, world=world),
            world=world,
            validate=mean_logs(held_out, recipe) if held_out else None,
            on_step=on_step,
            contract=table.contract(recipe.data.normalization),
            seen_runs=seen,
        )
    )
    if world.main and result.model is not None:
        _reconstruct(out, held_out or table, recipe)
        write_example(out, held_out or table, recipe)
    return result


def mean_logs(
    table: ClipTable, recipe: Recipe
) -> Callable[[torch.nn.Module, torch.device], dict[str, float]]:
    """Means of the model's logs over all clips of ``table``, with the same masks every time."""

    def validate(model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        from fmrizoo.trainer.watchdog import alive

        dtype = next(model.parameters()).dtype
        totals: defaultdict[str, float] = defaultdict(float)
        for compact in whole(table, recipe).epoch():
            alive()
            _, logs = model(compact.to_batch(device, dtype))
            for name, value in logs.items():
                totals[name] += float(value) * len(compact)
        return {name: value / len(table) for name, value in totals.items()}

    return validate


def _reconstruct(out: Path, table: ClipTable, recipe: Recipe) -> None:
    """One clip as the exported model fills it in, for the report."""
    path = out / RECONSTRUCTION
    if path.is_file():
        return
    model = cast(PretrainingModel, load(out))
    compact = next(iter(whole(table, recipe).epoch()))
    batch = compact.to_batch("cpu")
    filled = model.reconstruct(batch)
    contract = table.contract(recipe.data.normalization)
    write_arrays(
        path,
        truth=filled.truth[0].numpy(),
        predicted=filled.predicted[0].numpy(),
        masked=filled.masked[0].numpy(),
        mask=batch.mask[0].numpy(),
        voxel_size=np.array(contract.voxel_size),
        tr=np.array(float(batch.tr[0])),
        # Frames of a step, of a model that predicts each step from those before it; else 0.
        step=np.array(model.backbone.patch_size[3] if learns_to_forecast(recipe) else 0),
        unit=np.array(model.backbone.causal_unit),
    )

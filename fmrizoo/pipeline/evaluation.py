"""Scoring on the test part, of fine-tuned runs and of baselines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmrizoo.config import Recipe
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.splits import Split
from fmrizoo.errors import CheckpointError
from fmrizoo.model import DownstreamModel
from fmrizoo.pipeline.inputs import SPLIT, check_contract, open_data, whole
from fmrizoo.types import TaskSpec
from fmrizoo.zoo import load, load_recipe, model_folder

if TYPE_CHECKING:
    from fmrizoo.evaluate.baselines import BaselineResult
    from fmrizoo.evaluate.results import Parameters, Result


def evaluate(
    run: Path, recipe: Recipe | None = None, *, name: str | None = None, seconds: float = 0.0
) -> Result:
    """Score a fine-tuned run on the test part of its split: predictions.tsv and results.json.

    With several targets both are written for each, in ``targets/<name>/``.

    Args:
        run: Run folder of :func:`fmrizoo.pipeline.finetune`.
        recipe: Its recipe; read from the folder if None.
        name: Row name in tables.
        seconds: Training time to note beside the testing time.

    Returns:
        The result of the first target.

    Raises:
        CheckpointError: no fine-tuned model there, or it does not fit the data.
    """
    from fmrizoo.evaluate.inference import predict_units
    from fmrizoo.evaluate.rows import RunFacts, write_run_results
    from fmrizoo.trainer.device import World, resolve_device
    from fmrizoo.trainer.export import read_info

    started = time.perf_counter()
    recipe = recipe or load_recipe(run / "recipe.yaml")
    model = load(run)
    if not isinstance(model, DownstreamModel):
        raise CheckpointError(f"{run} holds a pretrained model without a head: fine-tune it first")
    data = replace(open_data(recipe), split=Split.load(run / SPLIT))
    data.split.check(data.store)
    train = ClipTable.labelled(data.store, data.part("train"), recipe.data, recipe.task)
    folder = model_folder(run)
    check_contract(read_info(folder).contract, train, recipe, folder)
    tasks, trains = model.head.tasks, model.head.trains
    parameters = _parameters(model, recipe)
    device = resolve_device(recipe.train.device, World())
    model.to(device)
    parts: dict[str, Any] = {}
    for part in ("validation", "test"):
        table = data.labelled(part, recipe)
        if table is not None:
            batches = whole(table, recipe, tasks).epoch()
            parts[part] = predict_units(model.predict, batches, tasks, device)
    init = "pretrained" if recipe.init_from else "random"
    facts = RunFacts(
        name=name or _row_name(recipe, init, trains),
        fold=recipe.split.fold,
        seed=recipe.train.seed,
        level=recipe.task.level,
        split_sha=data.split.sha,
        seconds=seconds + time.perf_counter() - started,
        init=init,
        head=recipe.head.name,
        train_encoder=trains,
        parameters=parameters,
    )
    found = write_run_results(run, facts, tasks, train, parts["test"], parts.get("validation"))
    return found[tasks[0].name]


def first_result(run: Path, tasks: Sequence[TaskSpec]) -> Result | None:
    """The first target's result of a run that has been tested on all of them."""
    from fmrizoo.evaluate.rows import read_run_results

    found = read_run_results(run, [task.name for task in tasks])
    return found[tasks[0].name] if found else None


def _parameters(model: DownstreamModel, recipe: Recipe) -> Parameters:
    from fmrizoo.evaluate.results import Parameters
    from fmrizoo.trainer.accounting import account

    found = account(model, recipe.train)
    return Parameters(
        found.trained,
        found.frozen,
        found.optimizer_bytes,
        found.encoder,
        found.encoder_trained,
    )


# What a row is called where `--name` does not say so, by `Head.trains`.
_TRAINED = {"all": "fine-tuned", "none": "frozen", "last_block": "last two layers", "lora": "LoRA"}


def _row_name(recipe: Recipe, init: str, trains: str) -> str:
    backbone, head = recipe.backbone.name, recipe.head.name
    if init == "random" and trains == "all":
        return f"{backbone} from scratch"
    # LoRA and prompts say by themselves which head it is.
    which = f", {head} head" if head != "linear" and trains in ("all", "none", "last_block") else ""
    return f"{backbone} {init}, {_TRAINED.get(trains, trains)}{which}"


def baselines(recipe: Recipe, out: Path) -> list[BaselineResult]:
    """Chance and linear baselines on the recipe's data, task and split, below ``out``.

    Raises:
        DataError: unusable data.
    """
    from fmrizoo.evaluate.baselines import run_baselines, write_baselines

    data = open_data(recipe)
    found = run_baselines(
        data.store,
        data.split,
        recipe.data,
        recipe.task,
        seed=recipe.train.seed,
        inner=recipe.split.inner,
    )
    write_baselines(out, found)
    data.split.save(out / SPLIT)
    return found

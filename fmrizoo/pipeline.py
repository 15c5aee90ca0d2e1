"""The main jobs, whole: pretrain, fine-tune, evaluate, baselines. What the command line calls.

Each job writes one run folder (see the README's table of files) and can be called again: a
finished run is left alone, an interrupted one goes on.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from fmrizoo.config import Recipe
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.splits import Split, make_split, unit_of
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import CheckpointError, DataError, RecipeError
from fmrizoo.files import write_arrays
from fmrizoo.forecast import learns_to_forecast, write_example
from fmrizoo.model import DownstreamModel, PretrainingModel
from fmrizoo.registry import BACKBONES, HEADS
from fmrizoo.types import Backbone, Grid, RunKey, TaskSpec
from fmrizoo.zoo import build_model, load, load_encoder, model_folder

if TYPE_CHECKING:
    from fmrizoo.evaluate.baselines import BaselineResult
    from fmrizoo.evaluate.results import Result
    from fmrizoo.trainer.device import World
    from fmrizoo.trainer.inputs import StepEvent, TrainResult

log = logging.getLogger(__name__)

SPLIT = "split.json"
RECONSTRUCTION = "reconstruction.npz"
OnStep = Callable[["StepEvent"], None]


@dataclass(frozen=True)
class _Data:
    """The store, the chosen runs and their split."""

    store: Store
    runs: list[RunInfo]
    split: Split

    def part(self, name: str) -> list[RunInfo]:
        """Runs of ``train``, ``validation`` or ``test``."""
        return [self.store[run] for run in self.split.parts()[name]]


def _open(recipe: Recipe) -> _Data:
    if not recipe.data.store:
        raise RecipeError("data.store is empty: add data.store=FOLDER (made by `fmrizoo prepare`)")
    store = Store(recipe.data.store)
    runs = store.select(recipe.data.select)
    return _Data(store, runs, make_split(store, runs, recipe.split))


def _fit_grid(backbone: Backbone, table: ClipTable) -> None:
    """Say how the store's grid sits in the backbone's; refuse one that does not fit."""
    have, room = table.grid, backbone.clip_grid
    if backbone.any_length:
        room = room._replace(t=max(room.t, have.t))
    if any(h > r for h, r in zip(have, room, strict=True)):
        raise RecipeError(
            f"the store's clips are {have} but the backbone is built for {room}: "
            f"set backbone.img_size={list(have)}"
        )
    if have[:3] != room[:3]:
        padded = Grid(*room[:3], have.t)
        log.info("clips of %s are padded with background to %s", have, padded)


def _loader_for(table: ClipTable, recipe: Recipe, classes: Sequence[str]) -> Callable[..., Loader]:
    targets = {name: i for i, name in enumerate(classes)} or None

    def make(world: World, micro: int) -> Loader:
        return Loader(
            table,
            recipe.data,
            micro,
            rank=world.rank,
            world=world.size,
            seed=recipe.train.seed,
            targets=targets,
        )

    return make


def _whole(table: ClipTable, recipe: Recipe, classes: Sequence[str] = ()) -> Loader:
    """Every clip once, in order, on one rank."""
    targets = {name: i for i, name in enumerate(classes)} or None
    return Loader(table, recipe.data, _eval_batch(recipe), seed=recipe.train.seed, targets=targets)


def _eval_batch(recipe: Recipe) -> int:
    train = recipe.train
    return train.max_micro_batch or max(1, train.batch_size // train.accumulate)


def _train(inputs: Any) -> TrainResult:
    from fmrizoo.trainer.loop import train

    return train(inputs)


def _save_split(split: Split, out: Path, recipe: Recipe, world: World) -> None:
    """Write the split before training; a run that was started with another one is refused."""
    from fmrizoo.trainer.device import resolve_device
    from fmrizoo.trainer.engine import micro_batch

    # What the trainer would refuse at once is refused before anything is written.
    micro_batch(recipe.train, world)
    resolve_device(recipe.train.device, world)
    path = out / SPLIT
    if path.is_file() and (out / "recipe.yaml").is_file():
        if Split.load(path).sha != split.sha:
            raise RecipeError(f"{path} is another split than the recipe now makes")
    elif world.main:
        split.save(path)


# --- pretraining ----------------------------------------------------------------------------------


def pretrain(recipe: Recipe, out: Path, *, on_step: OnStep | None = None) -> TrainResult:
    """Train a backbone with an objective on the training runs of the recipe's split.

    Validation runs give the validation loss, test runs are never opened. Writes the run folder
    ``out`` (recipe, split, metrics, checkpoints, exported model, one reconstructed clip, and a
    forecast of one if the objective teaches it).

    Raises:
        RecipeError: no objective, or a model that does not fit the data.
        DataError, CorruptStoreError: unusable data.
    """
    from fmrizoo.trainer.device import discover, seed_everything
    from fmrizoo.trainer.inputs import TrainerInputs

    if recipe.objective is None:
        raise RecipeError("a pretraining recipe needs an objective, such as objective=simmim")
    data, world = _open(recipe), discover()
    table = ClipTable.windows(data.store, data.part("train"), recipe.data)
    held_out = None
    if data.split.validation:
        held_out = ClipTable.windows(data.store, data.part("validation"), recipe.data)
    seed_everything(recipe.train.seed)
    model = cast(PretrainingModel, build_model(recipe))
    _fit_grid(model.backbone, table)
    seen = data.split.train
    if recipe.init_from:
        source = encoder_folder(recipe)
        contract, earlier = load_encoder(model.backbone, source)
        _check_contract(contract, table, recipe, source)
        seen = sorted({*seen, *earlier})
        _check_leak(earlier, data, ("test",))
    _save_split(data.split, out, recipe, world)
    result = _train(
        TrainerInputs(
            model=model,
            recipe=recipe,
            out=out,
            loader_for=_loader_for(table, recipe, ()),
            world=world,
            validate=_mean_loss(held_out, recipe) if held_out else None,
            on_step=on_step,
            contract=table.contract(recipe.data.normalization),
            seen_runs=seen,
        )
    )
    if world.main and result.model is not None:
        _reconstruct(out, held_out or table, recipe)
        write_example(out, held_out or table, recipe)
    return result


def _mean_loss(
    table: ClipTable, recipe: Recipe, classes: Sequence[str] = ()
) -> Callable[[torch.nn.Module, torch.device], dict[str, float]]:
    """Means of the model's logs over all clips of ``table``, with the same masks every time."""

    def validate(model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        dtype = next(model.parameters()).dtype
        totals: defaultdict[str, float] = defaultdict(float)
        for compact in _whole(table, recipe, classes).epoch():
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
    compact = next(iter(_whole(table, recipe).epoch()))
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


# --- fine-tuning ----------------------------------------------------------------------------------


def encoder_folder(recipe: Recipe) -> Path:
    """``init_from`` with ``{fold}`` filled in, or its ``seed-<s>/fold-<k>`` if there is one."""
    path = Path(str(recipe.init_from).replace("{fold}", str(recipe.split.fold)))
    for part in (f"seed-{recipe.train.seed}", f"fold-{recipe.split.fold}"):
        path = path / part if (path / part).is_dir() else path
    return model_folder(path)


def finetune(
    recipe: Recipe, out: Path, *, name: str | None = None, on_step: OnStep | None = None
) -> Result | None:
    """Train a head (and what it lets of the encoder train), then evaluate once on the test part.

    Args:
        recipe: With a head; ``init_from`` names a pretrained model; None: random weights.
        out: Run folder.
        name: Row name in tables; equal names are averaged over folds and seeds.
        on_step: Called after every optimizer step.

    Returns:
        The test result; None on other ranks than 0, or when a signal stopped the training.

    Raises:
        RecipeError: no head, or a model that does not fit the data.
        DataError: unusable data, or a test part that the encoder has seen in pretraining.
        CheckpointError: ``init_from`` is no model, or expects data preprocessed in another way.
    """
    from fmrizoo.evaluate.clip_features import task_spec
    from fmrizoo.evaluate.results import FILE, read_result
    from fmrizoo.trainer.device import discover, seed_everything
    from fmrizoo.trainer.inputs import TrainerInputs

    if recipe.head is None:
        raise RecipeError("a fine-tuning recipe needs a head, such as head=linear")
    data, world = _open(recipe), discover()
    table = ClipTable.labelled(data.store, data.part("train"), recipe.data, recipe.task)
    spec = task_spec(recipe.task.kind, table.labels or ())
    held_out = None
    if data.split.validation:
        held_out = ClipTable.labelled(data.store, data.part("validation"), recipe.data, recipe.task)
    seed_everything(recipe.train.seed)
    backbone = cast(Backbone, BACKBONES.build(recipe.backbone))
    _fit_grid(backbone, table)
    seen = data.split.train
    if recipe.init_from:
        source = encoder_folder(recipe)
        contract, earlier = load_encoder(backbone, source)
        _check_contract(contract, table, recipe, source)
        _check_leak(earlier, data, ("validation", "test"))
        seen = sorted({*seen, *earlier})
    model = DownstreamModel(backbone, HEADS.build(recipe.head, backbone=backbone, task=spec))
    _save_split(data.split, out, recipe, world)
    result = _train(
        TrainerInputs(
            model=model,
            recipe=recipe,
            out=out,
            loader_for=_loader_for(table, recipe, spec.classes),
            world=world,
            validate=_mean_loss(held_out, recipe, spec.classes) if held_out else None,
            on_step=on_step,
            contract=table.contract(recipe.data.normalization),
            task=spec,
            seen_runs=seen,
        )
    )
    if not world.main or result.model is None:
        return None
    if result.already_finished and (out / FILE).is_file():
        tested = read_result(out / FILE)
        if name in (None, tested.name):
            return tested
    return evaluate(out, recipe, name=name, seconds=result.seconds)


def _check_contract(contract: Any, table: ClipTable, recipe: Recipe, source: Path) -> None:
    """The encoder's preprocessing contract must be the data's."""
    from fmrizoo.trainer.export import check_contract

    check_contract(contract, table.contract(recipe.data.normalization), source, table.store.path)


def _check_leak(seen: Sequence[str], data: _Data, parts: Sequence[str]) -> None:
    """Refuse an encoder that was trained on units of ``parts``, even without their labels."""
    by = data.split.config.by
    known = {unit_of(RunKey.parse(name), by) for name in seen}
    for part in parts:
        for run in data.part(part):
            if unit_of(run.key, by) in known:
                raise DataError(
                    f"the encoder has seen {run.name} in pretraining, which is in the {part} part "
                    "of this split: pretrain with the same split settings (split.seed, split.folds,"
                    " split.fold), or start from another encoder"
                )


# --- evaluation -----------------------------------------------------------------------------------


def evaluate(
    run: Path, recipe: Recipe | None = None, *, name: str | None = None, seconds: float = 0.0
) -> Result:
    """Score a fine-tuned run on the test part of its split: predictions.tsv and results.json.

    Args:
        run: Run folder of :func:`finetune`.
        recipe: Its recipe; read from the folder if None.
        name: Row name in tables.
        seconds: Training time to note beside the testing time.

    Raises:
        CheckpointError: no fine-tuned model there, or it does not fit the data.
    """
    from fmrizoo.evaluate.inference import predict_units
    from fmrizoo.evaluate.metrics import chance
    from fmrizoo.evaluate.predictions import evaluate as score
    from fmrizoo.evaluate.predictions import write_predictions
    from fmrizoo.evaluate.results import Parameters, TaskInfo, write_result
    from fmrizoo.evaluate.results import Result as Row
    from fmrizoo.trainer.export import read_info
    from fmrizoo.zoo import load_recipe

    started = time.perf_counter()
    recipe = recipe or load_recipe(run / "recipe.yaml")
    model = load(run)
    if not isinstance(model, DownstreamModel):
        raise CheckpointError(f"{run} holds a pretrained model without a head: fine-tune it first")
    data = replace(_open(recipe), split=Split.load(run / SPLIT))
    data.split.check(data.store)
    train = ClipTable.labelled(data.store, data.part("train"), recipe.data, recipe.task)
    folder = model_folder(run)
    _check_contract(read_info(folder).contract, train, recipe, folder)
    spec = model.head.task
    parts: dict[str, Any] = {}
    for part in ("validation", "test"):
        if data.split.parts()[part]:
            table = ClipTable.labelled(data.store, data.part(part), recipe.data, recipe.task)
            batches = _whole(table, recipe, spec.classes).epoch()
            parts[part] = predict_units(model.predict, batches)
    write_predictions(run / "predictions.tsv", parts["test"], spec)
    guess = chance(
        spec.kind,
        _targets(train, spec),
        [p.target for p in parts["test"]],
        len(spec.classes),
    )
    frozen = not model.head.encoder_trains()
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model.backbone, model.head)]
    init = "pretrained" if recipe.init_from else "random"
    row = Row(
        kind="finetune",
        name=name or _row_name(recipe, init, frozen),
        fold=recipe.split.fold,
        seed=recipe.train.seed,
        task=TaskInfo(recipe.task.target, spec.kind, spec.classes, recipe.task.level),
        n_test=len(parts["test"]),
        chance=next(iter(guess.values.values())),
        metrics=score(parts["test"], spec.kind).values,
        seconds=seconds + time.perf_counter() - started,
        split_sha=data.split.sha,
        validation=score(parts["validation"], spec.kind).values if "validation" in parts else None,
        init=init,
        train_encoder="none" if frozen else "all",
        parameters=Parameters(sizes[1] + (0 if frozen else sizes[0]), sizes[0] if frozen else 0),
    )
    write_result(run, row)
    return row


def _targets(table: ClipTable, spec: TaskSpec) -> list[float]:
    labels = table.labels or ()
    if spec.kind == "regression":
        return [float(label) for label in labels]
    return [float(spec.classes.index(str(label))) for label in labels]


def _row_name(recipe: Recipe, init: str, frozen: bool) -> str:
    if init == "random" and not frozen:
        return f"{recipe.backbone.name} from scratch"
    return f"{recipe.backbone.name} {init}, {'frozen' if frozen else 'fine-tuned'}"


def baselines(recipe: Recipe, out: Path) -> list[BaselineResult]:
    """Chance and linear baselines on the recipe's data, task and split, below ``out``.

    Raises:
        DataError: unusable data.
    """
    from fmrizoo.evaluate.baselines import run_baselines, write_baselines

    data = _open(recipe)
    found = run_baselines(data.store, data.split, recipe.data, recipe.task, seed=recipe.train.seed)
    write_baselines(out, found)
    data.split.save(out / SPLIT)
    return found

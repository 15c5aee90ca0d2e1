"""What all jobs need before they start: data, split, encoder, and the checks between them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmrizoo.config import ParametrizationConfig, Recipe
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.exclusion import Selection, chosen
from fmrizoo.data.loader import Loader
from fmrizoo.data.mixture import open_store
from fmrizoo.data.splits import Split, make_split, units_of
from fmrizoo.data.staging import stage_share, staged
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.files import canonical, write_atomic
from fmrizoo.types import Backbone, Grid, RunKey, TaskSpec
from fmrizoo.zoo import load_encoder, load_recipe, model_folder

if TYPE_CHECKING:
    from fmrizoo.trainer.device import World
    from fmrizoo.trainer.inputs import StepEvent, TrainResult

log = logging.getLogger(__name__)

SPLIT = "split.json"
STORED = "store.json"
OnStep = Callable[["StepEvent"], None]


@dataclass(frozen=True)
class JobData:
    """The store, the chosen runs and their split."""

    store: Store
    runs: list[RunInfo]
    split: Split

    def part(self, name: str) -> list[RunInfo]:
        """Runs of ``train``, ``validation`` or ``test``."""
        return [self.store[run] for run in self.split.parts()[name]]

    def windows(self, part: str, recipe: Recipe) -> ClipTable | None:
        """All windows of a part; None where it has no run."""
        runs = self.part(part)
        return ClipTable.windows(self.store, runs, recipe.data) if runs else None

    def labelled(self, part: str, recipe: Recipe) -> ClipTable | None:
        """The labelled clips of a part; None where it has no run."""
        runs = self.part(part)
        return ClipTable.labelled(self.store, runs, recipe.data, recipe.task) if runs else None


def open_data(recipe: Recipe) -> JobData:
    """Open the recipe's store (or stores) and draw (or read) its split.

    Raises:
        RecipeError: no store is named.
        DataError, CorruptStoreError: unusable data.
    """
    store = open_store(recipe.data)
    found = chosen(store, recipe.data)
    if recipe.data.stage and recipe.data.divide == 1:  # else when it is known who draws what
        store = staged(store, found.used, Path(recipe.data.stage), keep=recipe.data.stage_keep)
        found = Selection(store.select(recipe.data.select), found.left_out)
    return JobData(store, found.used, make_split(store, found.runs, recipe.split, found.left_out))


def fit_grid(backbone: Backbone, table: ClipTable) -> None:
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


def loader(
    table: ClipTable,
    recipe: Recipe,
    micro: int,
    tasks: Sequence[TaskSpec] = (),
    world: World | None = None,
) -> Loader:
    """Micro-batches of this rank (``world`` None: everything on one rank)."""
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    found = Loader(
        table,
        recipe.data,
        micro,
        rank=rank,
        world=ranks,
        seed=recipe.train.seed,
        tasks=tuple(tasks),
        lanes=recipe.train.batch_size,
    )
    if world and recipe.data.divide > 1:
        own = found.own_runs()
        subjects = {run.subject for run in own}
        log.info(
            "data.divide=%d: rank %d draws from %d of %d runs (%d subjects)",
            recipe.data.divide, rank, len(own), len(table.runs), len(subjects),
        )  # fmt: skip
        if recipe.data.stage:
            stage_share(table.store, own, Path(recipe.data.stage), keep=recipe.data.stage_keep)
    if world and recipe.data.stores:
        for share in found.order.shares:
            log.info(
                "%s: %d clips, %d of the %d of an epoch (%.1f %%)",
                share.data_set,
                share.clips,
                share.draws,
                len(found.order),
                100 * share.draws / len(found.order),
            )
    return found


def whole(table: ClipTable, recipe: Recipe, tasks: Sequence[TaskSpec] = ()) -> Loader:
    """Every clip once, in order, on one rank."""
    return loader(table, recipe, eval_batch(recipe), tasks)


def eval_batch(recipe: Recipe) -> int:
    """Clips at a time where nothing is trained."""
    train = recipe.train
    return train.max_micro_batch or max(1, train.batch_size // train.accumulate)


def run_training(inputs: Any) -> TrainResult:
    """Import the trainer only when something trains."""
    from fmrizoo.trainer.loop import train

    return train(inputs)


def save_split(split: Split, out: Path, recipe: Recipe, world: World) -> None:
    """Write the split before training; a run that was started with another one is refused."""
    from fmrizoo.trainer.device import resolve_device
    from fmrizoo.trainer.zero import micro_batch

    # What the trainer would refuse at once is refused before anything is written.
    micro_batch(recipe.train, world)
    resolve_device(recipe.train.device, world)
    path = out / SPLIT
    if path.is_file() and (out / "recipe.yaml").is_file():
        if Split.load(path).sha != split.sha:
            raise RecipeError(f"{path} is another split than the recipe now makes")
    elif world.main:
        split.save(path)


def save_identity(data: JobData, out: Path, world: World) -> None:
    """Write which recordings a run is of; one whose store has changed since is refused.

    ``store.json`` holds the uuid of each run of the split, which changes whenever it is prepared
    again: with other voxels under the same names a resumed training would be of two data sets.

    Raises:
        DataError: a run was prepared again since, or the file is damaged.
    """
    path = out / STORED
    now = {name: data.store[name].uuid for part in data.split.parts().values() for name in part}
    if not (path.is_file() and (out / "recipe.yaml").is_file()):
        if world.main:
            write_atomic(path, canonical({"runs": now}) + b"\n")
        return
    try:
        then = dict(json.loads(path.read_bytes())["runs"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): delete it if the store is as it was"
        ) from None
    if changed := sorted(name for name, uuid in now.items() if then.get(name, uuid) != uuid):
        more = f" and {len(changed) - 1} more runs" if len(changed) > 1 else ""
        raise DataError(
            f"{data.store.path}: {changed[0]}{more} were prepared again since the training in "
            f"{out} began: give it the store as it was, or choose another output folder"
        )


def check_monitor(recipe: Recipe, data: JobData) -> None:
    """Choosing weights by validation needs validation runs."""
    for key in ("patience", "keep_best"):
        value = getattr(recipe.train, key)
        if value and not data.split.validation:
            raise RecipeError(
                f"train.{key}={value} needs validation runs, but split.validation="
                f"{recipe.split.validation:g} holds none out"
            )


def encoder_folder(recipe: Recipe) -> Path:
    """``init_from`` with ``{fold}`` filled in, or its ``seed-<s>/fold-<k>`` if there is one."""
    path = Path(str(recipe.init_from).replace("{fold}", str(recipe.split.fold)))
    for part in (f"seed-{recipe.train.seed}", f"fold-{recipe.split.fold}"):
        path = path / part if (path / part).is_dir() else path
    return model_folder(path)


def with_parametrization(recipe: Recipe) -> Recipe:
    """The recipe with the parametrization of the encoder that it starts from.

    Raises:
        RecipeError: it asks for another one itself.
        CheckpointError: ``init_from`` is no model.
    """
    from fmrizoo.trainer.export import read_info

    if not recipe.init_from:
        return recipe
    source = encoder_folder(recipe)
    stored = load_recipe(read_info(source).recipe).parametrization
    if stored == recipe.parametrization:
        return recipe
    if recipe.parametrization != ParametrizationConfig():
        raise RecipeError(
            f"the encoder in {source} was trained with parametrization.name={stored.name} "
            f"(base {stored.base}), the recipe has {recipe.parametrization.name} (base "
            f"{recipe.parametrization.base}): leave the section out, it is taken from the encoder, "
            "or make the encoder plain weights with `fmrizoo mup fold`"
        )
    log.info("parametrization.name=%s, base %s: as the encoder's", stored.name, stored.base)
    return replace(recipe, parametrization=stored)


def start_encoder(
    backbone: Backbone, recipe: Recipe, data: JobData, table: ClipTable, unseen: Sequence[str]
) -> list[str]:
    """Load the weights of ``init_from`` into ``backbone``, if the recipe has it.

    Args:
        backbone: With fresh weights.
        recipe: With ``init_from`` or without.
        data: The job's.
        table: Clips whose preprocessing contract must be that of the weights.
        unseen: Parts of the split whose runs the weights must never have seen.

    Returns:
        Names of all runs that the weights will have seen after this job's training.

    Raises:
        CheckpointError: no model there, or one of other data.
        DataError: it has seen what it must not.
    """
    if not recipe.init_from:
        return list(data.split.train)
    source = encoder_folder(recipe)
    contract, earlier = load_encoder(backbone, source)
    check_contract(contract, table, recipe, source)
    _check_leak(earlier, data, unseen)
    return sorted({*data.split.train, *earlier})


def check_contract(contract: Any, table: ClipTable, recipe: Recipe, source: Path) -> None:
    """The model's preprocessing contract must be the data's."""
    from fmrizoo.trainer.export import check_contract

    check_contract(contract, table.contract(recipe.data.normalization), source, table.store.path)


def _check_leak(seen: Sequence[str], data: JobData, parts: Sequence[str]) -> None:
    """Refuse an encoder that was trained on units of ``parts``, even without their labels."""
    keys = [RunKey.parse(name) for name in seen]
    # A subject that is not in this store has no family or site here: it is a unit of its own.
    met = {key.subject for key in keys}
    used = {name for names in data.split.parts().values() for name in names}
    here = [run.key for run in data.store.runs if run.name in used or run.subject in met]
    unit = units_of(data.store, here, data.split.config)
    known = {unit(key) for key in keys}
    # Where only one side says its data set, equal labels may or may not be one person.
    unnamed = {unit(key.bare): key for key in keys if not key.data_set}
    named = {unit(key.bare): key for key in keys if key.data_set}
    for part in parts:
        for run in data.part(part):
            if unit(run.key) in known:
                raise DataError(
                    f"the encoder has seen {run.name} in pretraining, which is in the {part} part "
                    "of this split: pretrain with the same split settings (split.seed, split.folds,"
                    " split.fold), or start from another encoder"
                )
            other = (unnamed if run.key.data_set else named).get(unit(run.key.bare))
            if other is not None:
                which = other.data_set or run.key.data_set
                raise DataError(
                    f"the encoder has seen {other} in pretraining, and {run.name} of the {part} "
                    "part may be the same person: name the data set on both sides, with "
                    f"data.stores={{{which}: {{path: …}}}} in place of data.store where it is "
                    f"{which}, with another name where it is not"
                )

"""The trainings of an ablation, in chains: a pretraining and every fine-tuning that starts from it.

A chain is what one process (or one job of an array) does. All of it is resumable: a fine-tuning
with results is done, a pretraining is repeated only if a missing fine-tuning needs it and its model
is gone.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fmrizoo.config import Recipe, SplitConfig
from fmrizoo.errors import DivergedError, RecipeError
from fmrizoo.files import write_json
from fmrizoo.pipeline.ablation.cells import Cell
from fmrizoo.pipeline.evaluation import baselines
from fmrizoo.pipeline.finetuning import finetune
from fmrizoo.pipeline.pretraining import pretrain

log = logging.getLogger(__name__)

COST, DIVERGED = "cost.json", "diverged.json"
# What is removed when a training is over, unless models are kept. Pretrained models stay: a task
# that is added later starts from them.
_LARGE = ("checkpoints", "best", "features")
BASELINES = "baselines"


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning, or all baselines of a task, on one fold.

    Attributes:
        cell: Name of its cell; ``baselines``.
        task: Name of the task.
        folder: Below the ablation's.
        recipe: Without ``init_from``.
    """

    cell: str
    task: str
    folder: str
    recipe: Recipe


@dataclass(frozen=True)
class Chain:
    """One pretraining (None: random weights, or baselines) and what starts from it.

    Attributes:
        name: Its folder below the ablation's.
    """

    name: str
    pretraining: Recipe | None
    tunings: tuple[Tuning, ...]


def chains_of(recipe: Recipe, cells: Sequence[Cell]) -> list[Chain]:
    """Everything that is trained, baselines first, cells that share a pretraining in one chain.

    Raises:
        RecipeError: test runs would be pretrained on, or tasks need different splits of one store.
    """
    found = [*_baselines(recipe, cells)] if recipe.ablate.baselines else []
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_key(cell), []).append(cell)
    for members in groups.values():
        found += _group(recipe, members)
    return found


def _key(cell: Cell) -> str:
    """Equal for cells whose pretraining is the same."""
    from fmrizoo.trainer.folder import recipe_hash

    return cell.name if cell.pretraining is None else recipe_hash(cell.pretraining)


def _group(recipe: Recipe, cells: Sequence[Cell]) -> Iterator[Chain]:
    """The chains of cells that share a pretraining: one per seed, or per seed and fold."""
    first, config = cells[0], recipe.ablate
    for number in range(config.seeds):
        jobs = [
            (repeat, fold, tuning)
            for cell in cells
            for task in cell.tasks
            for repeat, fold, tuning in _tunings(recipe, cell, task, number)
        ]
        if first.pretraining is None or not per_fold(first, config.pretrain):
            seed = f"seed-{recipe.train.seed + number}"
            yield _chain(first, f"{first.slug}/{seed}", number, None, [t for *_, t in jobs])
            continue
        split = shared_split(first)
        for place in sorted({job[:2] for job in jobs}):
            own = [tuning for *where, tuning in jobs if tuple(where) == place]
            repeat, fold = place
            where = replace(split, seed=split.seed + repeat, fold=fold)
            folder = f"{first.slug}/{_place(recipe, number, repeat, fold)}"
            yield _chain(first, folder, number, where, own)


def _chain(
    cell: Cell, folder: str, number: int, split: SplitConfig | None, tunings: Sequence[Tuning]
) -> Chain:
    pretraining = cell.pretraining
    if pretraining is not None:
        train = replace(pretraining.train, seed=pretraining.train.seed + number)
        own = pretraining.split
        where = replace(split, train_units=own.train_units) if split else own
        pretraining = replace(pretraining, train=train, split=where)
    return Chain(f"pretraining/{folder}", pretraining, tuple(tunings))


def _place(recipe: Recipe, number: int, repeat: int, fold: int) -> str:
    parts = [f"seed-{recipe.train.seed + number}"]
    parts += [f"repeat-{repeat}"] * (recipe.ablate.repeats > 1)
    return "/".join([*parts, f"fold-{fold}"])


def _tunings(
    recipe: Recipe, cell: Cell, task: str, number: int
) -> Iterator[tuple[int, int, Tuning]]:
    """(repeat, fold, fine-tuning) of one cell, task and seed."""
    own = cell.tasks[task]
    train = replace(own.train, seed=own.train.seed + number)
    for repeat in range(recipe.ablate.repeats):
        for fold in range(own.split.folds):
            split = replace(own.split, seed=own.split.seed + repeat, fold=fold)
            folder = f"cells/{cell.slug}/{task}/{_place(recipe, number, repeat, fold)}"
            tuned = replace(own, train=train, split=split)
            yield repeat, fold, Tuning(cell.name, task, folder, tuned)


def _baselines(recipe: Recipe, cells: Sequence[Cell]) -> Iterator[Chain]:
    """Linear models on the clips of the first cell; no seed changes them."""
    for task in cells[0].tasks:
        for repeat, fold, tuning in _tunings(recipe, cells[0], task, 0):
            parts = [f"repeat-{repeat}"] * (recipe.ablate.repeats > 1) + [f"fold-{fold}"]
            folder = "/".join([BASELINES, task, *parts])
            job = replace(tuning, cell=BASELINES, folder=folder)
            yield Chain(folder, None, (job,))


# --- test runs are never pretrained on ------------------------------------------------------------


def _stores(recipe: Recipe) -> set[Path]:
    paths = [recipe.data.store, *(one.path for one in recipe.data.stores.values())]
    return {Path(path).resolve() for path in paths if path}


def per_fold(cell: Cell, how: str) -> bool:
    """Whether a cell is pretrained anew for every fold of its tasks.

    Raises:
        RecipeError: it is asked not to be, and test runs would be pretrained on.
    """
    assert cell.pretraining is not None
    ours = _stores(cell.pretraining)
    shared = [task for task, own in cell.tasks.items() if ours & _stores(own)]
    if how == "once" and shared:
        raise RecipeError(
            f"ablate.pretrain=once, but task {shared[0]} is tested on a store that is pretrained "
            "on: take ablate.pretrain=fold (test runs are left out), or another store for the task "
            f"(ablate.tasks.{shared[0]}.overrides=[data.store=…])"
        )
    return how == "fold" or bool(shared)


def shared_split(cell: Cell) -> SplitConfig:
    """The split of the tasks, which the pretraining takes over.

    Raises:
        RecipeError: they have different ones.
    """
    splits = {task: replace(own.split, fold=0) for task, own in cell.tasks.items()}
    (name, first), *others = splits.items()
    for task, split in others:
        if split != first:
            raise RecipeError(
                f"tasks {name} and {task} have different splits of the data that is pretrained on: "
                "one pretraining per fold cannot leave out both test parts; give them the same "
                "split section, or a store of their own"
            )
    return first


# --- doing it -------------------------------------------------------------------------------------


def is_done(out: Path, tuning: Tuning) -> bool:
    """Whether a fine-tuning has its results (or diverged), under this recipe.

    Raises:
        RecipeError: it was started under another one.
    """
    from fmrizoo.evaluate.rows import read_run_results
    from fmrizoo.trainer.folder import RunFolder

    folder = out / tuning.folder
    if (folder / DIVERGED).is_file():
        return True
    if tuning.cell == BASELINES:
        return any(folder.rglob("results.json")) and (folder / "done").is_file()
    targets = list(tuning.recipe.task.wanted())
    if read_run_results(folder, targets) is None:
        return False
    kept = RunFolder(folder)
    started = replace(tuning.recipe, init_from=_started_from(folder))
    kept.check_recipe(started)
    return True


def _started_from(folder: Path) -> str | None:
    from fmrizoo.zoo import load_recipe

    return load_recipe(folder / "recipe.yaml").init_from


def run_chain(chain: Chain, out: Path, keep_models: bool = False) -> bool | None:
    """Do what is left of a chain; None if a signal cut it short.

    A training that diverges leaves a gap in the table and ``diverged.json``; everything else that
    goes wrong is an error.
    """
    left = [tuning for tuning in chain.tunings if not is_done(out, tuning)]
    if not left:
        return True
    source: Path | None = None
    if chain.pretraining is not None:
        source = out / chain.name
        try:
            begun = pretrain(chain.pretraining, source)
        except DivergedError as error:
            for tuning in left:
                _note_diverged(out / tuning.folder, f"its pretraining diverged: {error}")
            return True
        if begun.interrupted:
            return None
        if not (source / COST).is_file():
            _note_cost(source, begun.seconds, begun.step)
        _clear(source, keep_models)
    for tuning in left:
        if not _run_tuning(tuning, out, source, keep_models):
            return None
    return True


def _run_tuning(tuning: Tuning, out: Path, source: Path | None, keep_models: bool) -> bool:
    """One fine-tuning or baseline; False if a signal cut it short."""
    from fmrizoo.trainer.device import discover

    folder = out / tuning.folder
    if tuning.cell == BASELINES:
        if discover().main:
            baselines(tuning.recipe, folder)
            (folder / "done").touch()
        return True
    recipe = replace(tuning.recipe, init_from=None if source is None else str(source))
    try:
        result = finetune(recipe, folder, name=tuning.cell)
    except DivergedError as error:
        _note_diverged(folder, str(error))
        return True
    if _stopped(result is None):
        return False
    if not keep_models:
        _clear(folder, keep_models, "model")
    return True


def _stopped(here: bool) -> bool:
    """Whether rank 0 was stopped; other ranks have no results of their own."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return here
    said = [here]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def _note_diverged(folder: Path, why: str) -> None:
    from fmrizoo.trainer.device import discover

    log.warning("%s: %s", folder, why)
    if discover().main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DIVERGED, {"why": why})


def _note_cost(folder: Path, seconds: float, steps: int) -> None:
    from fmrizoo.trainer.device import discover

    if discover().main:
        write_json(folder / COST, {"seconds": round(seconds, 3), "steps": steps})


def _clear(folder: Path, keep: bool, *more: str) -> None:
    from fmrizoo.trainer.device import discover

    if keep or not discover().main:
        return
    for name in (*_LARGE, *more):
        try:
            shutil.rmtree(folder / name)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("%s could not be removed (%s): delete it", folder / name, error.strerror)

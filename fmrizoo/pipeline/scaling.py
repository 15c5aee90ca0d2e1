"""The points of a scaling law, trained: widths × clips seen × training units × seeds.

Every point is a training of its own, whose schedule ends at its own number of clips, at the
learning rate of the base width (muP transfers it). Axes of a point: :class:`Planned`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from fmrizoo.config import Recipe
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.order import sample_seed
from fmrizoo.errors import RecipeError
from fmrizoo.files import write_atomic
from fmrizoo.model import PretrainingModel
from fmrizoo.mup.widths import at_width, widths_of
from fmrizoo.pipeline.inputs import fit_grid, open_data
from fmrizoo.pipeline.sweep import Job, Outcome, prepared
from fmrizoo.types import Grid
from fmrizoo.zoo import build_model, load_recipe

POINTS = "points.csv"
UNITS = ("clips", "tokens")
COLUMNS = ("n", "d", "loss", "unique", "seed", "flops", "width", "units", "seconds")
_BACKWARD = 3  # forward and backward over forward: the backward pass has twice the products


@dataclass(frozen=True)
class Planned:
    """One training of a scaling sweep, and where its point lies.

    Attributes:
        job: What is trained. Its name starts with the variant's, if there is one.
        variant: Name of the variant; empty: the recipe has none.
        width: ``backbone.embed_dim``.
        units: ``split.train_units``; 0: all.
        seed: ``train.seed``.
        n: Parameters that train, of encoder and objective.
        clips: Clips seen: steps × batch.
        unique: Different clips among them, see :func:`unique_clips`.
        tokens: Patches of one clip on the encoder's grid, background included.
        flops: Of the whole training, see :func:`training_flops`.
    """

    job: Job
    variant: str
    width: int
    units: int
    seed: int
    n: int
    clips: int
    unique: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class _Model:
    """What is counted of a model that was never allocated."""

    n: int
    tokens: int
    flops: int  # forward pass of the encoder, one clip


def plan(
    recipe: str | Path, overrides: Sequence[str] = ()
) -> tuple[dict[str, Recipe], list[Planned]]:
    """Everything that a sweep trains, checked: every model built on the meta device, data opened.

    Args:
        recipe: Shipped name or file, with muP and its section ``sweep``.
        overrides: ``key=value`` strings; those of a variant come after them and win.

    Returns:
        The recipe of each variant by name (one without a name if there are none), and the
        trainings, most work first: processes that share them end at about the same time.

    Raises:
        RecipeError: no muP, samples that are no whole steps, a variant that cannot be composed, or
            a model that does not fit the data.
        DataError: unusable data, or more units than the split has.
    """
    whole = load_recipe(recipe, overrides)
    variants = {"": whole}
    if whole.sweep.variants:
        variants = {
            name: _variant(recipe, overrides, name, extra)
            for name, extra in whole.sweep.variants.items()
        }
    planned = [one for name, own in variants.items() for one in _plan_variant(name, own)]
    return variants, sorted(planned, key=lambda one: -one.flops)


def _variant(
    recipe: str | Path, overrides: Sequence[str], name: str, extra: Sequence[str]
) -> Recipe:
    try:
        return load_recipe(recipe, [*overrides, *extra])
    except RecipeError as error:
        raise RecipeError(f"sweep.variants.{name}: {error}") from None


def _plan_variant(name: str, recipe: Recipe) -> list[Planned]:
    sweep = recipe.sweep
    if recipe.parametrization.name != "mup":
        raise RecipeError(
            f"a scaling sweep trains every width at one learning rate, which needs muP, but "
            f"parametrization.name={recipe.parametrization.name}: set parametrization.name=mup and "
            "parametrization.base={embed_dim: …} (`fmrizoo mup transfer` finds the rate and shows "
            "that it transfers)"
        )
    steps = {clips: _steps(clips, recipe) for clips in _samples(recipe)}
    widths = {width: at_width(recipe, width, "mup") for width in widths_of(recipe)}
    found = []
    for units in sweep.units:
        drawn = replace(recipe, split=replace(recipe.split, train_units=units))
        table = _table(drawn)
        seeds = range(recipe.train.seed, recipe.train.seed + sweep.seeds)
        unique = {seed: unique_clips(table, drawn, steps.keys(), seed) for seed in seeds}
        for width, scaled in widths.items():
            sized = _measure(scaled, table)
            for clips, count in steps.items():
                for seed in seeds:
                    train = replace(scaled.train, steps=count, seed=seed)
                    own = prepared(replace(scaled, split=drawn.split, train=train))
                    parts = [f"width-{width}", f"clips-{clips}", f"units-{units or 'all'}"]
                    path = [*([name] if name else []), *parts, f"seed-{seed}"]
                    point = Planned(
                        job=Job("/".join(path), own),
                        variant=name,
                        width=width,
                        units=units,
                        seed=seed,
                        n=sized.n,
                        clips=clips,
                        unique=unique[seed][clips],
                        tokens=sized.tokens,
                        flops=training_flops(sized.flops, clips),
                    )
                    found.append(point)
    return found


def _samples(recipe: Recipe) -> list[int]:
    if not recipe.sweep.samples:
        raise RecipeError(
            "sweep.samples is empty: list how many clips the trainings see, such as "
            f"sweep.samples=[{','.join(str(recipe.train.batch_size * k) for k in (8, 32, 128))}]"
        )
    return sorted(recipe.sweep.samples)


def _steps(clips: int, recipe: Recipe) -> int:
    batch = recipe.train.batch_size
    if clips % batch:  # also fewer clips than one step takes
        raise RecipeError(
            f"sweep.samples: {clips} clips are no whole number of steps of train.batch_size={batch}"
            f": take {max(1, round(clips / batch)) * batch}"
        )
    return clips // batch


def _table(recipe: Recipe) -> ClipTable:
    """Training clips; refuses a sweep whose loss could not be taken in the end."""
    data = open_data(recipe)
    if recipe.sweep.loss == "validation" and not data.split.validation:
        raise RecipeError(
            f"sweep.loss=validation needs validation runs, but split.validation="
            f"{recipe.split.validation:g} holds none out: hold some out, or take sweep.loss=train"
        )
    return ClipTable.windows(data.store, data.part("train"), recipe.data)


def unique_clips(
    table: ClipTable, recipe: Recipe, counts: Iterable[int], seed: int
) -> dict[int, int]:
    """How many different clips are among the first ``counts`` of a training, by count.

    A clip is a run and a first frame; clips that overlap in time count as different, augmented
    voxels do not. Where each of the table's windows comes once an epoch, this is the smaller of
    the count and the table. Where starts are random or shifted, or subjects or stores are drawn in
    other shares (``data.windows``, ``augment.time_shift``, ``balance``, weights), it is counted
    from the draw itself: the very positions that a training with this seed reads, index alone.

    Args:
        table: Training clips.
        recipe: ``data`` and ``train.batch_size``.
        counts: Clips seen, whole batches.
        seed: ``train.seed``.
    """
    data, counts = recipe.data, sorted(counts)
    weighted = any(store.weight is not None for store in data.stores.values())
    moved = data.windows == "random" or data.augment.time_shift
    if not (moved or weighted or data.balance != "none"):
        return {count: min(count, len(table)) for count in counts}
    loader = Loader(table, data, 1, seed=seed, lanes=recipe.train.batch_size)

    def place(position: int) -> int:
        clip = loader.clip_at(position)
        start = loader.dataset.start_of(clip, sample_seed(seed, position))
        return (int(table.run[clip]) << 32) | start

    seen, found, done = np.empty(0, np.int64), {}, 0
    for count in counts:
        new = np.fromiter(map(place, range(done, count)), np.int64, count - done)
        seen, done = np.union1d(seen, new), count
        found[count] = len(seen)
    return found


def _measure(recipe: Recipe, table: ClipTable) -> _Model:
    with torch.device("meta"):
        model = cast(PretrainingModel, build_model(recipe))
    backbone = model.backbone
    fit_grid(backbone, table)
    padded = backbone.clip_grid._replace(t=table.grid.t).padded(backbone.patch_size)
    return _Model(
        n=sum(p.numel() for p in model.parameters() if p.requires_grad),
        tokens=padded.divided(backbone.patch_size).size,
        flops=sum(backbone.flops(Grid(*table.grid)).values()),
    )


def training_flops(forward: float, clips: int) -> float:
    """Floating-point operations of a training: 3 × the encoder's forward pass × clips seen.

    The forward pass is analytic, stage by stage (``Backbone.flops``); the backward pass has twice
    its matrix products. Left out: the objective's decoder, everything but matrix products, the
    optimizer, validation, and what checkpointing computes again. Patches without brain count, also
    where the encoder leaves them out.
    """
    return _BACKWARD * float(forward) * clips


# --- after the trainings --------------------------------------------------------------------------


def write_points(
    path: Path,
    planned: Sequence[Planned],
    outcomes: Mapping[str, Outcome],
    *,
    unit: str,
    loss: str,
    about: str,
) -> list[str]:
    """``points.csv`` as ``fmrizoo scaling fit`` reads it; diverged trainings are comments.

    Args:
        path: File to write, whole or not at all.
        planned: Trainings of one variant.
        outcomes: Of all of them, by name.
        unit: What ``d`` and ``unique`` count: ``clips`` or ``tokens``.
        loss: ``sweep.loss``.
        about: What was trained, for the first line.

    Returns:
        Names of those that diverged, with the reason.

    Raises:
        RecipeError: no such unit, or no such loss.
        DataError: the file cannot be written.
    """
    check_unit(unit)
    rows, diverged = [], []
    several = len({one.units for one in planned}) > 1
    for one in sorted(planned, key=lambda p: (p.n, p.clips, p.units, p.seed)):
        outcome, name = outcomes[one.job.name], one.job.name
        if outcome.diverged:
            diverged.append(f"{name}: {' '.join(outcome.diverged.split())}")
            continue
        size = one.tokens if unit == "tokens" else 1
        # Small D on different units are one setting (N, D, U): their repeats need other words.
        seed = f"units-{one.units or 'all'}/{one.seed}" if several else str(one.seed)
        numbers = (one.n, one.clips * size, repr(outcome.loss(loss)), one.unique * size, seed)
        rows.append((*numbers, f"{one.flops:.10g}", one.width, one.units, outcome.seconds))
    content = io.StringIO()
    lines = [f"fmrizoo scaling sweep {about}", *_meaning(unit, loss)]
    lines += [f"diverged, left out: {one}" for one in diverged]
    content.writelines(f"# {line}\n" for line in lines)
    csv.writer(content, lineterminator="\n").writerows([COLUMNS, *rows])
    write_atomic(path, content.getvalue().encode())
    return diverged


def _meaning(unit: str, loss: str) -> list[str]:
    held = "on all validation clips, at the end" if loss == "validation" else "last tenth of steps"
    per = "" if unit == "clips" else " × patches of a clip, background included"
    return [
        "n: parameters that train, encoder and objective",
        f"d: clips seen{per}; unique: different ones among them (overlapping clips differ)",
        f"loss: {loss} ({held}); every schedule ends at its own d",
        "flops: 3 × analytic forward pass of the encoder × clips seen, without the objective's "
        "decoder",
    ]


def check_unit(unit: str) -> None:
    """Raises:
    RecipeError: neither ``clips`` nor ``tokens``.
    """
    if unit not in UNITS:
        raise RecipeError(f"--unit takes {' or '.join(UNITS)}, got {unit!r}")


def points_path(out: Path, variant: str) -> Path:
    """Where the points of a variant are."""
    return out / variant / POINTS

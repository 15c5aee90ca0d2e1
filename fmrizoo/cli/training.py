"""Commands that train and test: pretrain, finetune, evaluate, baselines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmrizoo.cli.shell import (
    INTERRUPTED,
    EveryFold,
    Out,
    Overrides,
    Profiled,
    RecipeName,
    RecipeNames,
    Seeds,
    Stage,
    app,
    err,
    out,
    progress,
)

if TYPE_CHECKING:
    from fmrizoo.config import Recipe
    from fmrizoo.evaluate.certainty import Tables
    from fmrizoo.evaluate.results import Result
    from fmrizoo.trainer.inputs import StepEvent


@dataclass(frozen=True)
class _Job:
    """One run of a command that was asked for several folds or seeds."""

    recipe: Recipe
    folder: Path
    label: str


def _jobs(
    recipe: str, overrides: list[str] | None, folder: Path, every_fold: bool, seeds: int
) -> list[_Job]:
    """One run, or one for each recipe, seed and fold, in folders of their own below ``folder``."""
    from fmrizoo.errors import RecipeError
    from fmrizoo.zoo import list_recipes, load_recipe

    given = overrides or []
    if set("*?[") & set(recipe):
        names = list_recipes(recipe)
        if not names:
            raise RecipeError(f"no shipped recipe matches {recipe!r}: see `fmrizoo list recipes`")
        below = [(name, folder / name.rsplit("/", 1)[-1]) for name in names]
        return [
            replace(job, label=f"{name} {job.label}".strip())
            for name, place in below
            for job in _jobs(name, overrides, place, every_fold, seeds)
        ]
    first = load_recipe(recipe, given)
    planned = []
    for seed in range(first.train.seed, first.train.seed + seeds):
        for fold in range(first.split.folds) if every_fold else [first.split.fold]:
            parts = [f"seed-{seed}"] * (seeds > 1) + [f"fold-{fold}"] * every_fold
            composed = load_recipe(recipe, [*given, f"split.fold={fold}", f"train.seed={seed}"])
            planned.append(_Job(composed, folder.joinpath(*parts), " ".join(parts)))
    return planned


def _with_flags(overrides: list[str] | None, stage: str | None, profile: bool) -> list[str]:
    flags = [f"data.stage={stage}"] * bool(stage) + ["train.profile=true"] * profile
    return [*(overrides or []), *flags]


def _show_profile(folder: Path, profile: bool) -> None:
    """Where the time of a step went, after a run that was asked for it."""
    from fmrizoo import screens
    from fmrizoo.trainer.profile import TRACE, read_breakdown

    if not profile or not _is_main():
        return
    found = read_breakdown(folder)
    if found is None:
        err.print(f"{folder}: no profile, as no step was left to take", soft_wrap=True)
    else:
        out.print(screens.profile(found))
        out.print(f"trace: {folder / TRACE}", soft_wrap=True, style="dim")


def _told_once(jobs: list[_Job]) -> Iterator[_Job]:
    """The jobs one by one; what the first says about itself holds for the others."""
    for number, job in enumerate(jobs):
        if number == 1:
            logging.getLogger("fmrizoo").setLevel("WARNING")
        yield job


@app.command()
def pretrain(
    recipe: RecipeNames,
    overrides: Overrides = None,
    *,
    folder: Out,
    every_fold: EveryFold = False,
    seeds: Seeds = 1,
    stage: Stage = None,
    profile: Profiled = False,
) -> None:
    """Train a backbone with an objective; the same command resumes."""
    from fmrizoo.pipeline import pretrain as run

    given = _with_flags(overrides, stage, profile)
    for job in _told_once(_jobs(recipe, given, folder, every_fold, seeds)):
        with progress(f"pretrain {job.label}") as update:
            result = run(job.recipe, job.folder, on_step=_step_note(update))
        _show_profile(job.folder, profile)
        _stop_if_interrupted(result.interrupted, job.folder)
        shown = {"loss": result.metrics.get("loss"), "validation": result.validation}
        text = ", ".join(f"{k} {_short(v)}" for k, v in shown.items() if v)
        note = " (was finished before)" if result.already_finished else ""
        if _is_main():
            out.print(f"{job.folder}: step {result.step}, {text}{note}", soft_wrap=True)


def _step_note(update: Callable[[int, int, str], None]) -> Callable[[StepEvent], None]:
    def on_step(event: StepEvent) -> None:
        speed = f"{event.clips_per_second:.0f} clips/s"
        loss = "left out" if event.skipped else f"loss {event.loss:.4f}"
        note = f"{loss} · {speed} · waits {event.stall:.0%} for data"
        update(event.step, event.steps, note)

    return on_step


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k} {_short(v)}" for k, v in value.items())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _stop_if_interrupted(interrupted: bool, target: Path) -> None:
    if interrupted:
        err.print(
            f"interrupted: a checkpoint is in {target}; run the same command to go on",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED)


@app.command()
def finetune(
    recipe: RecipeNames,
    overrides: Overrides = None,
    *,
    folder: Out,
    every_fold: EveryFold = False,
    seeds: Seeds = 1,
    stage: Stage = None,
    profile: Profiled = False,
    name: Annotated[
        str | None, typer.Option(help="Row name in tables.", show_default=False)
    ] = None,
) -> None:
    """Train a head on a pretrained (or random) encoder, then test once."""
    from fmrizoo.pipeline import finetune as run

    results: list[tuple[Path, Result]] = []
    stopped: list[bool] = []
    given = _with_flags(overrides, stage, profile)
    for job in _told_once(_jobs(recipe, given, folder, every_fold, seeds)):
        with progress(f"finetune {job.label}") as update:
            result = run(
                job.recipe,
                job.folder,
                name=name,
                on_step=_step_note(update),
                on_interrupt=lambda: stopped.append(True),
            )
        _show_profile(job.folder, profile)
        # Every rank stops here: those without a result must not begin the next job.
        _stop_if_interrupted(bool(stopped), job.folder)
        if result is not None:
            results += _of(job.folder)
    _show_found(results)


def _is_main() -> bool:
    from fmrizoo.trainer.device import discover

    return discover().main


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Fine-tuned run folders.")],
    name: Annotated[
        str | None, typer.Option(help="Row name in tables.", show_default=False)
    ] = None,
) -> None:
    """Score fine-tuned runs on the test part of their split (again)."""
    from fmrizoo.pipeline import evaluate as run

    rows: list[tuple[Path, Result]] = []
    for folder in runs:
        known = _of(folder)
        run(folder, name=name or (known[0][1].name if known else None))
        rows += _of(folder)
    _show_found(rows)


def _of(folder: Path) -> list[tuple[Path, Result]]:
    """The results of a run with their files, one per target."""
    from fmrizoo.evaluate.results import find_results

    return find_results([folder])


@app.command()
def baselines(
    recipe: RecipeName, overrides: Overrides = None, *, folder: Out, every_fold: EveryFold = False
) -> None:
    """Chance, confounds, voxels, PCA whitening, ROI means, connectivity: a recipe's baselines."""
    from fmrizoo.evaluate.certainty import key
    from fmrizoo.pipeline import baselines as run

    results: list[Result] = []
    tables: Tables = {}
    with progress("baselines") as update:
        asked = _jobs(recipe, overrides, folder, every_fold, seeds=1)
        for number, job in enumerate(asked, start=1):
            for found in run(job.recipe, job.folder):
                results.append(found.result)
                tables.setdefault(key(found.result), []).append(found.predictions)
            update(number, len(asked), "")
    _show(results, tables)


def _show_found(found: list[tuple[Path, Result]]) -> None:
    """:func:`_show` with the predictions beside the results."""
    from fmrizoo.evaluate.certainty import read_tables

    if found and _is_main():
        _show([result for _, result in found], read_tables(found))


def _show(results: list[Result], tables: Tables) -> None:
    """Mean ± s.d. over folds and seeds with its 95 % interval, one line a row name and target."""
    from fmrizoo import screens

    if results:
        out.print(screens.results(results, tables))

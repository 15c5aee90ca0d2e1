"""``fmrizoo scaling sweep``: train the points of a scaling law, then fit it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fmrizoo.cli.scaling import save_law, scaling, show_law
from fmrizoo.cli.shell import (
    INTERRUPTED,
    Jobs,
    KeepModels,
    Out,
    Overrides,
    Part,
    RecipeName,
    err,
    numbered_part,
    out,
    progress,
)

if TYPE_CHECKING:
    from fmrizoo.analysis.scaling.outcome import Outcome as Fitted


@scaling.command()
def sweep(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    folder: Out,
    jobs: Jobs = 1,
    part: Part = None,
    keep_models: KeepModels = False,
    unit: Annotated[str, typer.Option(help="What D counts: clips or tokens.")] = "clips",
    only_points: Annotated[
        bool, typer.Option("--only-points", help="Write points.csv and fit nothing.")
    ] = False,
    draws: Annotated[int, typer.Option(min=50, help="Bootstrap replicates.")] = 400,
) -> None:
    """Train models of several sizes on several amounts of data, and fit the law of their losses.

    What is trained: the recipe's section sweep. Writes points.csv, scaling.json and scaling.svg
    (one folder per variant). The same command goes on where it stopped.
    """
    from fmrizoo.pipeline.scaling import check_unit, plan, points_path, write_points
    from fmrizoo.pipeline.sweep import part_of, read_outcome, run_jobs

    check_unit(unit)
    share = numbered_part(part)
    given = overrides or []
    variants, planned = plan(recipe, given)
    every = [one.job for one in planned]
    chosen = every if share is None else part_of(every, share)
    with progress("scaling sweep") as update:
        swept = run_jobs(chosen, folder, workers=jobs, keep_models=keep_models, on_done=update)
    if swept.interrupted:
        err.print(
            f"interrupted: {len(swept.outcomes)} of {len(chosen)} trainings are done, the others "
            "keep their checkpoints; run the same command to go on",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED)
    if not _is_main():
        return
    outcomes = {
        job.name: found
        for job in every
        if (found := read_outcome(folder / job.name, job.recipe)) is not None
    }
    if left := [job.name for job in every if job.name not in outcomes]:
        _say(
            f"part {part}: its {len(chosen)} trainings are done; {len(left)} of all {len(every)} "
            f"are left, such as {left[0]}"
        )
        return
    paths = {}
    for name, own in variants.items():
        paths[name] = points_path(folder, name)
        mine = [one for one in planned if one.variant == name]
        about = " ".join([recipe, *given, *([f"(variant {name})"] if name else [])])
        diverged = write_points(
            paths[name], mine, outcomes, unit=unit, loss=own.sweep.loss, about=about
        )
        _told(paths[name], len(mine), diverged)
    if share is not None and not only_points:
        _say("nothing is left to train: run the command without --part to fit")
    elif not only_points:
        _fit(paths, unit, draws)


def _is_main() -> bool:
    from fmrizoo.trainer.device import discover

    return discover().main


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False)


def _told(path: Path, trained: int, diverged: Sequence[str]) -> None:
    """Where the points are, and which trainings are none."""
    said = f"wrote {path}: {trained - len(diverged)} points"
    if diverged:
        said += f"; {len(diverged)} of {trained} trainings diverged and are left out:"
    _say(said)
    for one in diverged:
        _say(f"  {one}")


def _fit(paths: Mapping[str, Path], unit: str, draws: int) -> None:
    """One law per variant, with its files; then all side by side.

    Raises:
        DataError: no points carry a law.
    """
    from fmrizoo.analysis.scaling.outcome import analyse
    from fmrizoo.analysis.scaling.points import read_points
    from fmrizoo.errors import DataError

    found: dict[str, Fitted | str] = {}
    for name, path in paths.items():
        try:
            with progress(f"bootstrap {name}".strip()) as update:
                fitted = analyse(
                    read_points(path),
                    unit=unit,
                    draws=draws,
                    progress=lambda done, total, u=update: u(done, total, ""),  # type: ignore[misc]
                )
        except DataError as error:
            found[name] = str(error)
            for old in ("scaling.json", "scaling.svg"):  # of fewer or other points
                (path.parent / old).unlink(missing_ok=True)
            continue
        found[name] = fitted
        if name:
            _say(f"\n{name}")
        show_law(fitted)
        save_law(fitted, path.parent)
    if len(found) > 1:
        _side_by_side(found)
    refused = [one for one in found.values() if isinstance(one, str)]
    if len(refused) == len(found):
        why = refused[0] if len(found) == 1 else f"none of the {len(found)} variants has a law"
        raise DataError(f"{why}; the points are kept, and `fmrizoo scaling fit` takes them too")


def _side_by_side(found: Mapping[str, Fitted | str]) -> None:
    from fmrizoo.analysis.scaling.compare import rows, sentences

    names, lines = rows(found)
    table = Table("", "points", *names)
    for line in lines:
        table.add_row(*line)
    _say("")
    out.print(table)
    for one in sentences(found):
        _say(one)

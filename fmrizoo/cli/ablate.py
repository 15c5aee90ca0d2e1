"""``fmrizoo ablate``: architectures and settings compared in one command."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from fmrizoo.cli.shell import (
    INTERRUPTED,
    Jobs,
    KeepModels,
    Out,
    Overrides,
    Part,
    RecipeName,
    app,
    err,
    numbered_part,
    out,
    progress,
)

if TYPE_CHECKING:
    from fmrizoo.pipeline.ablation.run import Planned


@app.command()
def ablate(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    folder: Out,
    jobs: Jobs = 1,
    part: Part = None,
    keep_models: KeepModels = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and list everything, train nothing.")
    ] = False,
) -> None:
    """Pretrain and test every cell of a recipe's section ablate; one table, ranked.

    Writes ablation.csv, ablation.json and ablation.html. The same command goes on where it stopped.
    """
    from fmrizoo import screens
    from fmrizoo.pipeline.ablation import ablate as run
    from fmrizoo.pipeline.ablation import plan
    from fmrizoo.pipeline.ablation.results import HTML
    from fmrizoo.pipeline.ablation.run import missing
    from fmrizoo.pipeline.pool import part_of
    from fmrizoo.report.ablation import clear_sentences, write_ablation

    share = numbered_part(part)
    planned = plan(recipe, overrides or [])
    if dry_run:
        out.print(screens.cells(planned.cells))
        _say(_trainings(planned))
        return
    # What hundreds of trainings say about themselves is in their folders.
    logging.getLogger("fmrizoo").setLevel("WARNING")
    with progress("ablate") as update:
        found = run(
            planned, folder, workers=jobs, part=share, keep_models=keep_models, on_done=update
        )
    if not _is_main():
        return
    if found is None:
        left = missing(planned, folder)
        own = planned if share is None else replace(planned, chains=part_of(planned.chains, share))
        if left and not missing(own, folder):
            _say(f"part {part} is done; {len(left)} of all results are left")
            return
        err.print(
            f"interrupted: {len(left)} results are left; run the same command to go on",
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED)
    write_ablation(found, planned, folder / HTML, recipe)
    out.print(screens.ablation(found.table))
    for line in clear_sentences(found.pairs):
        _say(line)
    _say(f"wrote {folder / HTML}, and the same table as ablation.csv and ablation.json")


def _trainings(planned: Planned) -> str:
    config = planned.recipe.ablate
    said = f"{planned.pretrainings} pretrainings and {planned.finetunings} fine-tunings: "
    said += f"{config.seeds} seeds, {config.repeats} × k-fold, {len(config.tasks)} tasks"
    return f"{said}; in {len(planned.chains)} chains (--part K/N shares them out)"


def _is_main() -> bool:
    from fmrizoo.trainer.device import discover

    return discover().main


def _say(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False)

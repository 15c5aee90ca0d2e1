"""``fmrizoo mup transfer``: learning rates over widths as table, file and picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fmrizoo.cli.mup import mup
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
    from pathlib import Path

    from fmrizoo.pipeline.transfer import Result


@mup.command()
def transfer(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    folder: Out,
    jobs: Jobs = 1,
    part: Part = None,
    only: Annotated[
        str | None, typer.Option(help="sp or mup instead of both.", show_default=False)
    ] = None,
    keep_models: KeepModels = False,
) -> None:
    """Does the best learning rate stay where it is at every width? SP beside muP.

    Trains the recipe at sweep.widths with sweep.rates and sweep.seeds → transfer.json,
    transfer.csv, transfer.svg, transfer.png. The same command goes on where it stopped.
    """
    from fmrizoo.mup.widths import names_of
    from fmrizoo.pipeline.transfer import transfer as run
    from fmrizoo.zoo import load_recipe

    composed = load_recipe(recipe, overrides or [])
    with progress("transfer") as update:
        result = run(
            composed,
            folder,
            names_of(only),
            workers=jobs,
            part=numbered_part(part),
            keep_models=keep_models,
            on_done=update,
        )
    said = f"{result.trained} models, {result.seconds / 60:.1f} minutes of training"
    if result.interrupted:
        err.print(f"interrupted after {said}; run the same command to go on", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    if not result.transfers:
        out.print(f"part {part}: {said}; the same command without --part has the result")
        return
    _show(result, said)
    _write(result, folder)


def _show(result: Result, said: str) -> None:
    from fmrizoo import screens

    for found in result.transfers:
        out.print(screens.transfer_table(found))
        out.print(found.says + ".", soft_wrap=True, highlight=False)
        out.print()
    out.print(said + ".", highlight=False)


def _write(result: Result, folder: Path) -> None:
    from fmrizoo.analysis.mup_transfer import write_transfers
    from fmrizoo.report.transfer_figure import save_transfer_figure

    write_transfers(folder, result.transfers)
    for kind in ("svg", "png"):
        save_transfer_figure(folder / f"transfer.{kind}", result.transfers)
    out.print(f"{folder}: transfer.json, .csv, .svg, .png", soft_wrap=True, highlight=False)

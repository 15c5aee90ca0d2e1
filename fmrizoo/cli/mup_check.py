"""``fmrizoo mup check``: the coordinate check of a recipe as table, file and picture."""

from __future__ import annotations

from typing import Annotated

import typer

from fmrizoo.cli.mup import mup
from fmrizoo.cli.shell import Out, Overrides, RecipeName, out, progress

SHOWN = 5  # modules of a check that are printed


@mup.command()
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    folder: Out,
    widths: Annotated[
        str | None, typer.Option(help="Widths of the first stage.", show_default="four from 32 up")
    ] = None,
    lr: Annotated[float, typer.Option(help="AdamW's rate: large.")] = 2**-9,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Initialisations to average.")] = 2,
) -> None:
    """Do activations and their changes stay alike over widths? SP beside muP; exit code 1 if not.

    Trains small models of the recipe's backbone and objective for a few steps on a made-up batch →
    mup_check.json, mup_check.png.
    """
    from fmrizoo.analysis.mup_check import write_checks
    from fmrizoo.analysis.mup_recipe import check_recipe
    from fmrizoo.report.mup_figure import save_coordinate_figure

    sizes = None if widths is None else _numbers(widths)
    checks = []
    for name in ("sp", "mup"):
        with progress(f"{name}") as update:
            found = check_recipe(
                recipe,
                overrides or [],
                sizes,
                parametrization=name,
                lr=lr,
                steps=steps,
                seeds=seeds,
                on_model=lambda done, total, width, u=update: u(done, total, f"width {width}"),  # type: ignore[misc]
            )
        checks.append(found)
        out.print(f"{found.name}: {found.says}", soft_wrap=True, highlight=False)
    path = write_checks(folder, checks)
    save_coordinate_figure(folder / "mup_check.png", checks)
    mup = checks[-1]
    worst = sorted(mup.verdicts, key=lambda v: -abs(v.worst))[:SHOWN]
    for verdict in worst:
        said = f"  {verdict.activation:+.2f} {verdict.change:+.2f}  {verdict.module}"
        out.print(said + ("" if verdict.ok else "  out of tolerance"), highlight=False)
    out.print(f"{path} and mup_check.png", soft_wrap=True, highlight=False)
    if not mup.passed:
        raise typer.Exit(1)


def _numbers(text: str) -> list[int]:
    from fmrizoo.errors import RecipeError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"--widths takes whole numbers with commas between, got {text!r}"
        ) from None

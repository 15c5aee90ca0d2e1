"""Commands about the maximal update parametrization: explain, fold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmrizoo.cli.shell import Out, Overrides, RecipeName, app, out

if TYPE_CHECKING:
    from fmrizoo.config import Recipe
    from fmrizoo.types import TaskSpec

mup = typer.Typer(help="The same learning rate at every width (muP).", no_args_is_help=True)
app.add_typer(mup, name="mup")


@mup.callback()
def _mup() -> None:
    """The same learning rate at every width (muP)."""


@mup.command()
def explain(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    every: Annotated[
        bool, typer.Option("--every", help="One row a parameter, alike or not.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, one row a parameter.")
    ] = False,
) -> None:
    """How every parameter of a model starts and learns, and why: its role, and the factors."""
    from dataclasses import asdict

    from fmrizoo import screens
    from fmrizoo.mup.explain import collapse
    from fmrizoo.mup.explain import explain as run
    from fmrizoo.zoo import load_recipe

    composed = load_recipe(recipe, overrides or [])
    made, rows = run(composed, _tasks(composed))
    if as_json:
        out.print_json(json.dumps({**made.to_dict(), "table": [asdict(row) for row in rows]}))
    else:
        shown = rows if every else collapse(rows)
        out.print(screens.mup_table(made, shown, len(rows), composed.train, out.width))


@mup.command()
def fold(
    model: Annotated[Path, typer.Argument(help="Run folder or model folder, trained with muP.")],
    *,
    folder: Out,
) -> None:
    """Multipliers into the weights → a model folder of the same function without muP.

    For codes that know no multipliers. Fine-tuning a folded model loses the transferred learning
    rates: inside fmrizoo, start from the model itself.
    """
    from fmrizoo.pipeline.folding import fold_model

    done = fold_model(model, folder)
    out.print(f"{done}: folded, parametrization.name=sp", soft_wrap=True, highlight=False)


def _tasks(recipe: Recipe) -> list[TaskSpec]:
    """The recipe's targets, of two classes where the data would say how many there are."""
    from fmrizoo.types import TaskSpec

    found = []
    for name, kind in recipe.task.wanted().items():
        classes = () if kind == "regression" else ("a", "b")
        found.append(TaskSpec(kind, classes=classes, name=name))
    return found

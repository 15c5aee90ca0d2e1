"""Commands about what there is: list, recipe."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from fmrizoo.cli.shell import Overrides, RecipeName, app, out


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="backbones, objectives, heads or recipes.")],
    pattern: Annotated[str, typer.Argument(help="Shell pattern.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="heads: what each trains of this backbone (or of a recipe's).", show_default=False
        ),
    ] = None,
) -> None:
    """What is in the zoo; for backbones also their sizes and what a clip costs."""
    from fmrizoo import screens, zoo
    from fmrizoo.errors import RecipeError
    from fmrizoo.registry import BACKBONES, HEADS, OBJECTIVES, suggest

    if backbone is not None:
        if kind != "heads":
            raise RecipeError(f"--backbone goes with `list heads`, not `list {kind}`")
        _list_heads(backbone, pattern, as_json)
        return

    tables = {"backbones": BACKBONES, "objectives": OBJECTIVES, "heads": HEADS}
    if kind == "recipes":
        names = zoo.list_recipes(pattern)
        rows: list[dict[str, Any]] = [{"name": n, "about": zoo.recipe_summary(n)} for n in names]
    elif kind in tables:
        entries = [tables[kind][name] for name in tables[kind].list(pattern)]
        rows = [{"name": e.name, "about": e.summary} for e in entries]
    else:
        raise RecipeError(f"unknown kind {kind!r}.{suggest(kind, [*tables, 'recipes'])}")
    if kind == "backbones":
        rows = [row | {"sizes": _sizes(row["name"])} for row in rows]
    if as_json:
        out.print_json(json.dumps(rows))
    elif kind == "backbones":
        out.print(screens.backbones(rows))
    else:
        table = Table("name", "")
        for row in rows:
            table.add_row(row["name"], row["about"])
        out.print(table)


def _list_heads(backbone: str, pattern: str, as_json: bool) -> None:
    from dataclasses import asdict

    from fmrizoo import screens
    from fmrizoo.analysis.heads import backbone_section, heads_of

    title, section = backbone_section(backbone)
    rows = heads_of(section, pattern)
    if as_json:
        out.print_json(json.dumps([asdict(row) for row in rows]))
    else:
        out.print(screens.heads(title, rows))


def _sizes(backbone: str) -> list[dict[str, Any]] | None:
    """Its default and preset sizes; None where a package is missing to build it."""
    from dataclasses import asdict

    from fmrizoo.analysis.sizes import sizes_of
    from fmrizoo.errors import MissingExtraError

    try:
        return [asdict(size) for size in sizes_of(backbone)]
    except MissingExtraError:
        return None


@app.command()
def recipe(
    name: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a recipe, fully resolved."""
    from fmrizoo.config import to_dict, to_yaml
    from fmrizoo.zoo import load_recipe

    composed = load_recipe(name, overrides or [])
    if as_json:
        out.print_json(json.dumps(to_dict(composed)))
    else:
        out.print(to_yaml(composed), highlight=False, soft_wrap=True)

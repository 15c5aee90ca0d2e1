"""``fmrizoo bench``: what a machine makes of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fmrizoo.cli.shell import Out, Overrides, app, out, progress

if TYPE_CHECKING:
    from fmrizoo.cluster.scaling import Series

bench = typer.Typer(help="What a machine makes of a recipe.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.callback()
def _bench() -> None:
    """What a machine makes of a recipe."""


Recipe = Annotated[
    str | None,
    typer.Argument(help="Recipe to run here; none with --logs or --table.", show_default=False),
]
Logs = Annotated[
    list[str] | None,
    typer.Option(help="Glob of run folders, one series; may be repeated.", show_default=False),
]
Tables = Annotated[
    list[Path] | None,
    typer.Option(
        help="CSV: nodes, samples_per_second, …; or aurora. May be repeated.", show_default=False
    ),
]
PerNode = Annotated[
    int | None, typer.Option(help="Of --logs that do not say it.", show_default=False)
]


@bench.command("scaling")
def scaling_of_throughput(
    recipe: Recipe = None,
    overrides: Overrides = None,
    *,
    folder: Out,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks to start here.")] = "1,2,4",
    steps: Annotated[int, typer.Option(help="Measured steps of a start.")] = 10,
    warmup: Annotated[int, typer.Option(help="First steps of a run that do not count.")] = 3,
    rounds: Annotated[int, typer.Option(help="Starts of each size, alternating.")] = 3,
    mode: Annotated[
        str, typer.Option(help="strong: one batch, divided. weak: one batch per rank.")
    ] = "strong",
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Random clips in memory, not data.store.")
    ] = False,
    logs: Logs = None,
    table: Tables = None,
    baseline: Annotated[
        str,
        typer.Option(help="Sizes to compare with: 1,64.", show_default="the smallest"),
    ] = "",
    by: Annotated[
        str | None, typer.Option(help="nodes or ranks.", show_default="what differs")
    ] = None,
    ranks_per_node: PerNode = None,
    name: Annotated[
        str, typer.Option(help="Of the recipe's series.", show_default="what it is")
    ] = "",
) -> None:
    """Throughput and parallel efficiency against nodes or ranks, from runs, logs or tables.

    Not to be mixed up with `fmrizoo scaling`, which is about laws of the loss.
    """
    from fmrizoo.cluster.scaling import UNITS, baselines_of
    from fmrizoo.errors import RecipeError
    from fmrizoo.report.throughput import FILES, save_scaling, shown

    if recipe is None and not logs and not table:
        raise RecipeError("nothing to measure: give a recipe, --logs or --table")
    if by is not None and by not in UNITS:
        raise RecipeError(f"--by is nodes or ranks, got {by!r}")
    bases = numbers(baseline, "--baseline") if baseline else []
    found = _read(logs or [], table or [], mode, warmup, by, ranks_per_node)
    for one in found:
        baselines_of(one, bases)  # refused before anything runs
    if recipe is not None:
        asked = numbers(ranks, "--ranks")
        if missing := [base for base in bases if base not in asked]:
            raise RecipeError(
                f"--baseline {missing[0]} is not among --ranks {ranks}: add it to them"
            )
        found = [*_measured(recipe, overrides, folder, asked, steps, warmup, rounds, mode,
                            synthetic, name), *found]  # fmt: skip
    save_scaling(found, folder, bases)
    for one in found:
        words = shown(one, bases)
        out.print(words.title, style="bold", highlight=False)
        out.print(_table(words.head, words.rows))
        said = [*words.limits, *words.notes, words.source]
        for line in filter(None, said):
            out.print(line, soft_wrap=True, highlight=False)
        out.print()
    out.print(f"wrote {', '.join(FILES)} to {folder}", soft_wrap=True, highlight=False)


def _read(
    logs: Sequence[str],
    tables: Sequence[Path],
    mode: str,
    warmup: int,
    by: str | None,
    ranks_per_node: int | None,
) -> list[Series]:
    from fmrizoo.cluster.scaling_table import read_table

    found = [one for path in tables for one in read_table(path, mode, by)]
    if logs:
        from fmrizoo.cluster.scaling_logs import read_logs

        found += [
            read_logs(pattern, mode=mode, warmup=warmup, ranks_per_node=ranks_per_node, by=by)
            for pattern in logs
        ]
    return found


def _measured(
    recipe: str,
    overrides: list[str] | None,
    folder: Path,
    ranks: Sequence[int],
    steps: int,
    warmup: int,
    rounds: int,
    mode: str,
    synthetic: bool,
    name: str,
) -> list[Series]:
    from fmrizoo.pipeline.throughput import Bench, bench_scaling
    from fmrizoo.zoo import load_recipe

    wanted = Bench(
        load_recipe(recipe, overrides or []), tuple(ranks), steps, warmup, rounds, mode, synthetic
    )
    with progress("bench scaling") as update:
        return [bench_scaling(wanted, folder, name=name, on_start=update)]


def _table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[tuple[str, str]]]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for title, note in head:
        table.add_column(f"{title}\n{note}" if note else title, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*(f"{text}\n{note}" if note else text for text, note in cells))
    return table


def numbers(text: str, option: str) -> list[int]:
    """``1,2,4`` as whole numbers.

    Raises:
        RecipeError: it is not that.
    """
    from fmrizoo.errors import RecipeError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) >= 1 for word in words):
        raise RecipeError(f"{option} takes whole numbers ≥ 1 with commas, got {text!r}")
    return [int(word) for word in words]

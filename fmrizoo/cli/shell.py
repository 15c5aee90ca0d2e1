"""The program itself: how it prints, reports errors and ends, and options that commands share."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fmrizoo import __version__
from fmrizoo.errors import INTERRUPTED as INTERRUPTED
from fmrizoo.errors import FmrizooError

# Read when torch is first imported: threads that wait for work sleep. Spinning, they slow work on
# two threads down many times as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

app = typer.Typer(
    help="Foundation models for functional MRI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Markup and emoji codes off: paths, run names and reasons are printed as they are.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe values: dotted key=value.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
RecipeName = Annotated[str, typer.Argument(help="Shipped recipe name or YAML file.")]
RecipeNames = Annotated[
    str, typer.Argument(help="Recipe name or YAML file; or a pattern: every shipped recipe of it.")
]
EveryFold = Annotated[
    bool, typer.Option("--every-fold", help="One run per fold of the split, below --out.")
]
Stage = Annotated[
    str | None,
    typer.Option(
        help="Folder on each node, such as /dev/shm: runs are copied there and read there.",
        show_default=False,
    ),
]
Profiled = Annotated[
    bool, typer.Option("--profile", help="Time the phases of a step: a table and a trace file.")
]
Seeds = Annotated[int, typer.Option(min=1, help="Runs with as many consecutive seeds.")]

Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Models trained side by side.")]
Part = Annotated[
    str | None,
    typer.Option(help="K/N: only every N-th training from the K-th on.", show_default=False),
]
KeepModels = Annotated[bool, typer.Option("--keep-models", help="Keep checkpoints and models.")]


def numbered_part(text: str | None) -> tuple[int, int] | None:
    """``2/8`` → (2, 8).

    Raises:
        RecipeError: no two whole numbers, or no such part.
    """
    from fmrizoo.errors import RecipeError

    if text is None:
        return None
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise RecipeError(f"--part takes K/N with 1 ≤ K ≤ N, such as 2/8, got {text!r}")
    return int(number), int(parts)


def main() -> None:
    """Entry point: errors made for users are one message and exit code 1."""
    try:
        app()
    except FmrizooError as error:
        err.print("error:", style="bold red", end=" ")
        err.print(str(error), highlight=False, soft_wrap=True)
        _end(error.exit_code, error.together)
    except SystemExit as done:
        if not isinstance(done.code, int):
            raise
        _end(done.code)


def _end(code: int, together: bool = True) -> NoReturn:
    if os.environ.get("FMRIZOO_EXIT_FILE"):
        from fmrizoo.trainer.ranks import leave_code

        leave_code(code)
    device = sys.modules.get("fmrizoo.trainer.device")
    if device is not None:
        device.end_rank(code, together=together)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"fmrizoo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
) -> None:
    handler = RichHandler(console=err, show_path=False, show_time=False, markup=False)
    logging.basicConfig(level="WARNING", format="%(message)s", handlers=[handler])
    logging.getLogger("fmrizoo").setLevel("WARNING" if quiet else "INFO")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar that ``update(done, total, note)`` drives; nothing where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None, note="")

        def update(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update

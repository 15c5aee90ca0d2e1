"""``fmrizoo doctor``: is this machine ready."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fmrizoo.cli.shell import app, out

# Here and not in fmrizoo.screens, which imports torch: that may be what is broken.
_STYLES = {"ok": "green", "warning": "yellow", "broken": "bold red"}


@app.command()
def doctor(
    store: Annotated[
        Path | None, typer.Option(help="Look at this store too.", show_default=False)
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where runs are to be written.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check packages, device, disks and limits; a fix for each fault; exit code 1 if broken."""
    from fmrizoo.cluster.doctor import STATES, examine, worst

    lines = examine(store, folder)
    if as_json:
        out.print_json(json.dumps([asdict(line) for line in lines]))
    else:
        table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("check", no_wrap=True)
        table.add_column("found", overflow="fold")
        for line in lines:
            table.add_row(line.state, line.check, line.found, style=_STYLES[line.state])
            if line.fix:
                table.add_row("", "", f"→ {line.fix}")
        out.print(table)
        counts = {state: sum(line.state == state for line in lines) for state in STATES}
        out.print(", ".join(f"{count} {state}" for state, count in counts.items()), style="dim")
    if worst(lines) == "broken":
        raise typer.Exit(1)

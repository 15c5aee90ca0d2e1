"""Commands that look after a store: verify, repair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fmrizoo.cli.shell import app, out, progress

StorePath = Annotated[Path, typer.Argument(help="Folder that `fmrizoo prepare` wrote.")]
Threads = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Threads that read.")]


@app.command()
def verify(
    store: StorePath,
    jobs: Threads = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare every checksum of a store; exit code 1 if anything is wrong."""
    from fmrizoo.data.verify import verify as run

    with progress("verify") as update:
        result = run(store, jobs, update)
    if as_json:
        out.print_json(json.dumps(result.to_dict()))
    elif result.findings:
        out.print(_table([(f.file, f.run, f.kind, f.message) for f in result.findings]))
    else:
        speed = result.bytes / max(result.seconds, 1e-9) / 1e9
        out.print(
            f"{store}: all well, {result.files} files, {result.runs} runs, {result.frames} frames, "
            f"{result.bytes / 1e9:.3f} GB at {speed:.2f} GB/s",
            soft_wrap=True,
        )
    if result.findings:
        raise typer.Exit(1)


def _table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    table = Table("file", "run", "what", "found", title=f"{len(rows)} wrong")
    for row in rows:
        table.add_row(*row)
    return table


@app.command()
def repair(
    store: StorePath,
    source: Annotated[str, typer.Argument(help="What the store was prepared from.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and write nothing.")
    ] = False,
    mask: Annotated[
        Path | None,
        typer.Option(help="The mask file, if prepare.mask was a file.", show_default=False),
    ] = None,
    jobs: Threads = 4,
) -> None:
    """Prepare just the damaged subjects again, as recorded; good ones are not touched."""
    from fmrizoo.data.repair import repair as run

    with progress("repair") as update:
        report = run(store, source, dry_run=dry_run, mask=mask, jobs=jobs, on_progress=update)
    if not report.findings:
        out.print(f"{store}: all well, nothing to repair", soft_wrap=True)
        return
    done = {
        "prepare again" if dry_run else "restored, values as recorded": report.restored,
        "prepared again, checksums differ from the recorded ones": report.renewed,
        "renew" if dry_run else "renewed": report.others,
        "remove" if dry_run else "removed": report.removed,
        "cannot be repaired": report.refused,
    }
    for what, which in done.items():
        for item in which:
            out.print(f"{what}: {item}", soft_wrap=True)
    if report.refused:
        raise typer.Exit(1)
    if report.after is not None:
        out.print(f"{store}: all well now, {report.after.frames} frames verified", soft_wrap=True)

"""Commands about data and files: download, prepare, qc, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fmrizoo.cli.shell import INTERRUPTED, Out, Overrides, app, err, out, progress


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="development_fmri, adhd or abide_pcp.")],
    folder: Annotated[Path, typer.Argument(help="Folder to fill; the same again goes on.")],
    subjects: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many.", show_default=False)
    ] = None,
) -> None:
    """An open data set through nilearn, with phenotypes as participants.tsv."""
    from fmrizoo.data.download import download as run

    done = run(name, folder, subjects=subjects)
    out.print(f"{done.table}: {done.subjects} subjects. Next:", soft_wrap=True)
    out.print(
        f"fmrizoo prepare {done.table} STORE prepare.space={done.space} prepare.mask=compute",
        soft_wrap=True,
    )


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="BIDS, fMRIPrep or HCP folder, TSV of files, or sample:haxby2001.")
    ],
    store: Annotated[Path, typer.Argument(help="Folder of the store to write or add to.")],
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose prepare section is used.", show_default=False)
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Publish the good runs even if others are unusable.")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Subjects prepared at a time.")
    ] = 1,
    layout: Annotated[
        str, typer.Option("--from", help="bids, hcp, swift or hdf5; auto looks what is there.")
    ] = "auto",
) -> None:
    """NIfTI runs → one checksummed HDF5 file per subject."""
    from fmrizoo.data.interrupt import Interrupted
    from fmrizoo.data.prepare import ProgressEvent
    from fmrizoo.data.prepare import prepare as run
    from fmrizoo.zoo import load_recipe

    # Without a recipe the overrides alone make one: prepare.codec=gzip, …
    composed = load_recipe(recipe if recipe else {}, overrides or [])
    try:
        with progress("prepare") as update:

            def note(event: ProgressEvent) -> None:
                update(event.done, event.total, f"{event.run} {event.state}")

            report = run(
                source,
                store,
                composed.prepare,
                skip_bad=skip_bad,
                jobs=jobs,
                layout=layout,
                on_progress=note,
            )
    except Interrupted:
        err.print("interrupted: finished subjects are kept, the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    out.print(
        f"{store}: {len(report.prepared)} runs prepared, {len(report.kept)} kept, "
        f"{len(report.skipped)} skipped"
        + (f", {len(report.flagged)} flagged" if report.flagged else ""),
        soft_wrap=True,
    )
    if report.skipped:
        table = Table("run", "file", "reason", title="skipped")
        for row in report.skipped:
            table.add_row(row.run, row.file, row.reason)
        out.print(table)


@app.command()
def qc(
    store: Annotated[Path, typer.Argument(help="Prepared store.")],
    folder: Out,
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe whose prepare.qc limits apply.", show_default=False)
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Runs shown with a picture, the worst first.")
    ] = 200,
) -> None:
    """Quality of every run: qc.tsv and a page of pictures, the worst first."""
    from fmrizoo.data.qc import write_table
    from fmrizoo.data.store import Store
    from fmrizoo.report.qc import write_page
    from fmrizoo.zoo import load_recipe

    composed = load_recipe(recipe if recipe else {}, overrides or [])
    opened = Store(store)
    with progress("qc") as update:
        rows = write_table(opened, folder / "qc.tsv", composed.prepare.qc, on_progress=update)
    write_page(opened, rows, folder / "qc.html", composed.prepare.qc, pictures=pictures)
    bad = [row for row in rows if row.flags]
    out.print(f"{folder / 'qc.html'}: {len(bad)} of {len(rows)} runs flagged", soft_wrap=True)
    for row in bad:
        out.print(f"  {row.run.name}: {'; '.join(row.flags)}", soft_wrap=True)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Store, run folder, model folder or split file.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare every checksum.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a store, run folder, checkpoint or model holds."""
    from fmrizoo.inspection import describe

    found = describe(path, verify=verify)
    if as_json:
        out.print_json(json.dumps(found))
        return
    out.print(_outline(found))
    if found.get("faults"):
        raise typer.Exit(1)


def _outline(values: dict[str, Any]) -> Table:
    """Keys beside their values; nested mappings as tables of their own, lists on one line."""
    table = Table.grid(padding=(0, 2))
    for key, value in values.items():
        shown: Any = Text(_plain(value))
        if isinstance(value, dict) and value:
            shown = _outline(value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            shown = Group(*(Text(_plain(item)) for item in value))
        table.add_row(Text(key.replace("_", " "), style="bold"), shown)
    return table


def _plain(value: Any) -> str:
    """A value as a person would write it; long lists are cut short and counted."""
    if value is None or value in ([], {}):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        rest = f" … {len(value)} in all" if len(value) > 8 else ""
        return ", ".join(_plain(v) for v in value[:8]) + rest
    return str(value)

"""``fmrizoo synth``: a cohort whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fmrizoo.cli.shell import INTERRUPTED, app, err, out, progress


@app.command()
def synth(
    folder: Annotated[Path, typer.Argument(help="Folder to fill; the same again goes on.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, such as subjects=60 traits.sex.effect=0.8."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the same keys.", show_default=False)
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Write a store, without NIfTI files in between.")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Subjects made at a time; with --store.")
    ] = 1,
) -> None:
    """Realistic synthetic BOLD with planted traits and task effects of known size."""
    from fmrizoo.data.interrupt import Interrupted
    from fmrizoo.data.synthetic.config import load_synth_config, prepare_arguments
    from fmrizoo.data.synthetic.write import synthesise

    composed = load_synth_config(config, overrides or [])
    try:
        with progress("synth") as update:
            done = synthesise(folder, composed, store=store, jobs=jobs, on_progress=update)
    except Interrupted:
        err.print("interrupted: finished runs are kept, the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    out.print(
        f"{folder}: {composed.subjects} subjects, {done.runs} runs ({done.kept} kept) of "
        f"{composed.frames} frames, {done.size / 1e6:.1f} MB",
        soft_wrap=True,
    )
    table = Table("planted", "effect", "where", "ceiling")
    for name, effect in done.planted["traits"].items():
        sign = "d" if effect["kind"] == "classification" else "r"
        measure = "AUROC" if effect["kind"] == "classification" else "r"
        places = "–".join(map(str, effect["networks"]))
        table.add_row(
            name,
            f"{sign} = {effect['effect']:g}",
            f"{effect['where']} {places}",
            f"{measure} {effect['ceiling']:.3f}",
        )
    for name, effect in done.planted["conditions"].items():
        table.add_row(
            name,
            f"{effect['percent']:g} %",
            f"network {effect['network']}",
            f"contrast-to-noise {effect['contrast_to_noise']:.2f}",
        )
    if table.row_count:
        out.print(table)
    out.print("Truth: synth.json, truth.tsv, networks.nii.gz. Next:", soft_wrap=True)
    if store:
        out.print(f"fmrizoo qc {folder} --out QC", soft_wrap=True)
    else:
        out.print(
            " ".join([f"fmrizoo prepare {folder} STORE", *prepare_arguments(composed)]),
            soft_wrap=True,
        )

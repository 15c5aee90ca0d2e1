"""Commands that use trained models: embed, export, forecast, report, analyze."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fmrizoo.cli.shell import Out, app, out, progress


@app.command()
def embed(
    model: Annotated[Path, typer.Argument(help="Run folder or model folder.")],
    *,
    file: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="NumPy archive (.npz) to write.", show_default="none"),
    ] = None,
    bids: Annotated[
        Path | None,
        typer.Option(help="Folder to write BIDS derivatives to.", show_default="none"),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="bids: desc of the model, letters and digits.", show_default="made"),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="bids: DOI or URL of the data; repeatable.", show_default="not said"),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Prepared store.", show_default="the model's own")
    ] = None,
    pool: Annotated[str, typer.Option(help="mean, brain, frame, space or parcel.")] = "mean",
    parcels: Annotated[
        Path | None,
        typer.Option(help="parcel: NIfTI of labels on the store's voxels.", show_default=False),
    ] = None,
    level: Annotated[str, typer.Option(help="One row per clip, run or subject.")] = "clip",
    stage: Annotated[int, typer.Option(help="Of the encoder; negative: from the end.")] = -1,
    part: Annotated[
        str | None,
        typer.Option(
            help="train, validation or test runs of the model's split.", show_default="all runs"
        ),
    ] = None,
    clip_stride: Annotated[
        float | None,
        typer.Option(help="Starts of clips, as a share.", show_default="as in training"),
    ] = None,
) -> None:
    """Features of every clip, run or subject of a store → NumPy archive, BIDS derivatives."""
    from fmrizoo.evaluate.embed import embed as run

    found = run(
        model,
        file,
        bids=bids,
        label=label,
        sources=source or (),
        store=store,
        pool=pool,
        stage=stage,
        level=level,
        atlas=parcels,
        part=part,
        clip_stride=clip_stride,
    )
    shape = " × ".join(map(str, found.values.shape[1:]))
    clips = sum(row.n_clips for row in found.rows)
    rows = f"{len(found.rows)} {level}{'' if len(found.rows) == 1 else 's'} × {shape}"
    more = "" if level == "clip" else f", means over {clips} clips"
    where = " and ".join(str(path) for path in (file, bids) if path is not None)
    out.print(f"{where}: {rows} features{more}", soft_wrap=True, highlight=False)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    folder: Annotated[Path, typer.Argument(help="Model folder to write.")],
    *,
    step: Annotated[
        int | None, typer.Option(help="Of which checkpoint.", show_default="the newest")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The best validation's weights.")] = False,
) -> None:
    """The weights of a checkpoint → safetensors and config; for runs that are not finished."""
    from fmrizoo.trainer.consolidate import consolidate
    from fmrizoo.trainer.export import read_info

    info = read_info(consolidate(source, folder, step=step, best=best))
    out.print(f"{folder}: step {info.step}, {info.parameters:,} parameters", soft_wrap=True)


@app.command()
def forecast(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder of a pretraining that forecasts.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Data settings: data.store=…, …", show_default=False),
    ] = None,
    *,
    frames: Annotated[int, typer.Option(help="How far to go.", show_default=False)],
    file: Annotated[
        Path, typer.Option("--out", "-o", help="NIfTI file to write.", show_default=False)
    ],
    run: Annotated[
        str | None,
        typer.Option(help="Run of the store to go on from.", show_default="the first held out"),
    ] = None,
    start: Annotated[int, typer.Option(help="First frame of the clip to go on from.")] = 0,
) -> None:
    """Roll a model forward after a clip → NIfTI in the unit of the data."""
    from fmrizoo.forecast import write_forecast

    done = write_forecast(
        run_folder, file, frames=frames, run=run, start=start, overrides=overrides or []
    )
    said = f"{done.path}: {done.frames} frames ({done.frames * done.seconds:g} s) of {done.run}"
    said += f" from frame {done.first}"
    if done.error is not None and done.persistence is not None:
        said += (
            f"; mean absolute error over the {done.recorded} that were recorded "
            f"{done.error:.4g}, of repeating the frame before them {done.persistence:.4g}"
        )
    out.print(said, soft_wrap=True, highlight=False)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, searched recursively.")],
    *,
    page: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "fmrizoo report",
) -> None:
    """One self-contained HTML page: curves, reconstructions, results with their baselines."""
    from fmrizoo.report.html import write_report

    summary = write_report(folders, page, title=title)
    out.print(f"report: {page.resolve()}", soft_wrap=True)
    for line in summary.lines:
        out.print(f"  {line}", soft_wrap=True, highlight=False)


analyze = typer.Typer(help="What models do to data and what they cost.", no_args_is_help=True)
app.add_typer(analyze, name="analyze")


@analyze.command()
def autocorrelation(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    clips: Annotated[
        int, typer.Option(min=1, help="At most so many clips of the held-out runs.")
    ] = 32,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest stretch for models that take any length.",
            show_default="the shortest run",
        ),
    ] = None,
) -> None:
    """Autocorrelation over time of data and embeddings → analysis.json in each run folder."""
    from fmrizoo.analysis.dynamics import analyze_run

    for run in runs:
        found = analyze_run(run, clips=clips, frames=frames)
        out.print(f"{run}: {found.says}", soft_wrap=True, highlight=False)


@analyze.command()
def memory(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipes (names or files), and key=value for all of them.")
    ],
    folder: Out,
    frames: Annotated[str, typer.Option(help="Lengths of the clip.")] = "20,40,80",
    checkpointing: Annotated[
        str, typer.Option(help="none, block, window-chunk.")
    ] = "none,window-chunk",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Peak activation memory of one training step against the clip's length → memory.json."""
    from fmrizoo import screens
    from fmrizoo.analysis.memory import MemoryRow, measure_memory, write_memory

    names = [r for r in recipes if "=" not in r]
    given = [r for r in recipes if "=" in r]
    modes = [word.strip() for word in checkpointing.split(",")]
    with progress("memory") as update:

        def note(done: int, total: int, row: MemoryRow) -> None:
            update(done, total, f"{row.backbone} {row.checkpointing} {row.frames} frames")

        rows = measure_memory(names, _numbers(frames), modes, given, device=device, on_row=note)
    write_memory(folder, rows)
    out.print(screens.memory(rows))


def _numbers(text: str) -> list[int]:
    from fmrizoo.errors import RecipeError

    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise RecipeError(f"--frames takes positive numbers with commas between, got {text!r}")
    return found

"""Commands that look into trained models: analyze similarity, attribution, lesion, spectrum."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fmrizoo.cli.models import analyze
from fmrizoo.cli.shell import Out, out, progress

Run = Annotated[Path, typer.Argument(help="Folder of a finished run.")]
Tested = Annotated[Path, typer.Argument(help="Folder of a fine-tuned run.")]
Part = Annotated[str, typer.Option(help="train, validation or test part of the run's split.")]
Target = Annotated[str | None, typer.Option(help="Name of the target.", show_default="the first")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or xpu.")]
ATLAS = "NIfTI of labels on the store's voxels, or cubes[:N]."


@analyze.command()
def similarity(
    run: Annotated[Path, typer.Argument(help="Run or model folder.")],
    other: Annotated[
        Path | None, typer.Argument(help="Another one to compare with.", show_default=False)
    ] = None,
    *,
    folder: Out,
    forgetting: Annotated[
        bool, typer.Option("--forgetting", help="With the encoder that RUN was fine-tuned from.")
    ] = False,
    pool: Annotated[str, typer.Option(help="mean, brain, space or frame.")] = "mean",
    part: Part = "test",
    store: Annotated[
        Path | None, typer.Option(help="Prepared store.", show_default="the model's own")
    ] = None,
    clips: Annotated[int, typer.Option(min=4, help="At most so many clips.")] = 256,
    minibatch: Annotated[
        int | None, typer.Option(min=4, help="Clips of a minibatch of CKA.", show_default="all")
    ] = None,
    device: Device = "auto",
) -> None:
    """CKA and RSA between the stages of one model or two → similarity.json, similarity.png."""
    from fmrizoo.analysis.compare import compare_runs, write_similarity
    from fmrizoo.report import understanding as figures

    if forgetting:
        other = _origin(run, other)
    found = compare_runs(
        run, other, pool=pool, part=part, store=store, clips=clips, minibatch=minibatch,
        device=device,
    )  # fmt: skip
    write_similarity(folder, found)
    figures.similarity(found, folder / "similarity.png")
    if other is not None:
        text = " ".join("n/a" if v is None else f"{v:.3f}" for v in found.per_stage)
        out.print(f"CKA stage by stage: {text}", highlight=False)
    if found.pretraining_loss is not None:
        before, after = found.pretraining_loss
        out.print(
            f"pretraining loss: {before:.4f} with {other}, {after:.4f} with the encoder of {run}",
            soft_wrap=True,
            highlight=False,
        )
    _written(folder)


def _origin(run: Path, other: Path | None) -> Path:
    """The model that a run was fine-tuned from."""
    from fmrizoo.errors import RecipeError
    from fmrizoo.pipeline.inputs import encoder_folder
    from fmrizoo.zoo import load_recipe

    if other is not None:
        raise RecipeError("--forgetting finds the other model by itself: give one run")
    recipe = load_recipe(run / "recipe.yaml")
    if not recipe.init_from:
        raise RecipeError(f"{run} started from random weights (no init_from): nothing to forget")
    return encoder_folder(recipe)


def _written(folder: Path) -> None:
    out.print(f"written: {folder.resolve()}", soft_wrap=True, highlight=False)


@analyze.command()
def attribution(
    run: Tested,
    *,
    folder: Out,
    method: Annotated[str, typer.Option(help="ig or occlusion.")] = "ig",
    target: Target = None,
    label: Annotated[
        str | None, typer.Option("--class", help="Class to explain.", show_default="each its own")
    ] = None,
    atlas: Annotated[Path | None, typer.Option(help=ATLAS, show_default=False)] = None,
    baseline: Annotated[str, typer.Option(help="background or mean (over time).")] = "background",
    steps: Annotated[int, typer.Option(min=2, help="Of the integral.")] = 32,
    cube: Annotated[
        int | None,
        typer.Option(min=1, help="Side of occluded cubes.", show_default="the patch"),
    ] = None,
    part: Part = "test",
    clips: Annotated[int, typer.Option(min=1, help="At most so many clips.")] = 64,
    sanity: Annotated[
        int, typer.Option(min=0, help="Clips of the randomisation check; 0: without.")
    ] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Clips in memory at a time.")] = 8,
    device: Device = "auto",
) -> None:
    """Which voxels make a score: maps (NIfTI), parcels.tsv, attribution.json, attribution.png."""
    from fmrizoo.analysis.attribution_run import Settings, attribute_run, write_attribution
    from fmrizoo.report import understanding as figures

    settings = Settings(method, baseline, steps, cube, target, label, batch)
    with progress("attribution") as update:
        found = attribute_run(
            run, settings, atlas=atlas, part=part, clips=clips, sanity_clips=sanity,
            device=device, on_clip=update,
        )  # fmt: skip
    write_attribution(folder, found)
    figures.attribution(found, folder / "attribution.png")
    out.print(found.says, soft_wrap=True, highlight=False)
    if found.sanity:
        each = ", ".join(f"{s.down_to} {_r(s.signed)} ({_r(s.absolute)})" for s in found.sanity)
        out.print(
            f"rank correlation, signed (absolute), with a model randomised down to: {each}",
            soft_wrap=True,
            highlight=False,
        )
    _written(folder)


def _r(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}".replace("-", "−")


@analyze.command()
def lesion(
    run: Tested,
    *,
    folder: Out,
    atlas: Annotated[Path, typer.Option(help=ATLAS, show_default=False)],
    how: Annotated[
        str, typer.Option("--lesion", help="background, mean or surrogate.")
    ] = "background",
    target: Target = None,
    region: Annotated[
        list[int] | None, typer.Option(help="Label to lesion; may be repeated.", show_default="all")
    ] = None,
    part: Part = "test",
    clips: Annotated[
        int | None, typer.Option(min=1, help="At most so many clips.", show_default="all")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Clips at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Of surrogates.")] = 0,
    device: Device = "auto",
) -> None:
    """What a model loses without a region: lesions.tsv, lesion_effect.nii.gz, lesion.png."""
    from fmrizoo.analysis.lesion import lesion_run, write_lesions
    from fmrizoo.report import understanding as figures

    with progress("lesion") as update:
        found = lesion_run(
            run, atlas=atlas, lesion=how, target=target, regions=region or (), part=part,
            clips=clips, batch_size=batch, seed=seed, device=device, on_region=update,
        )  # fmt: skip
    write_lesions(folder, found)
    figures.lesions(found, folder / "lesion.png")
    worst = min(found.rows, key=lambda row: row.change)
    below = sum(row.high is not None and row.high < 0 for row in found.rows)
    out.print(
        f"{len(found.rows)} regions, {len(found.units)} units: worst without {worst.name} "
        f"({worst.change:+.3g}); {below} with an interval below 0",
        soft_wrap=True,
        highlight=False,
    )
    _written(folder)


@analyze.command()
def spectrum(
    run: Run,
    *,
    folder: Out,
    runs: Annotated[int, typer.Option(min=1, help="At most so many held-out runs.")] = 32,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest stretch for models that take any length.",
            show_default="the shortest run",
        ),
    ] = None,
    band: Annotated[
        str | None, typer.Option(help="LOW,HIGH in Hz of the slope.", show_default="0.01,0.1")
    ] = None,
) -> None:
    """Spectral slope and Hurst exponent of data and embeddings → spectrum.json, spectrum.png."""
    from fmrizoo.analysis.spectrum import spectrum_run, write_spectrum
    from fmrizoo.report import understanding as figures

    found = spectrum_run(run, runs=runs, frames=frames, band=_band(band))
    write_spectrum(folder, found)
    figures.spectrum(found, folder / "spectrum.png")
    out.print(found.says, soft_wrap=True, highlight=False)
    _written(folder)


def _band(text: str | None) -> tuple[float, float] | None:
    from fmrizoo.errors import RecipeError

    if text is None:
        return None
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < low < high:
        raise RecipeError(f"--band takes LOW,HIGH in Hz, such as 0.01,0.1, got {text!r}")
    return low, high

"""Sections that show what pretraining runs fill in and expect, with their sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fmrizoo.report import forecasts, pictures
from fmrizoo.report.ahead import errors_ahead, verdict
from fmrizoo.report.collect import Run
from fmrizoo.report.families import Family
from fmrizoo.report.figures import Image
from fmrizoo.report.reconstruction import Picture, fill_errors
from fmrizoo.report.words import number

MODEL = "the model"


@dataclass(frozen=True)
class Shown:
    """One section.

    Attributes:
        title, label: Heading, and the run that it is about.
        intro: Paragraphs above the figures.
        figures: With their captions.
        table: Heading of the error table.
        errors: Guess, its error, whether it is the smallest.
        says: The sentence that a terminal shows.
        others: Runs of the same recipe that are not shown, in words; empty if there are none.
    """

    title: str
    label: str
    intro: tuple[str, ...]
    figures: tuple[tuple[Image, str], ...]
    table: str
    errors: tuple[tuple[str, str, bool], ...]
    says: str
    others: str = ""


def each_first(found: Sequence[Family], make: Callable[[Run], Shown | None]) -> tuple[Shown, ...]:
    """One section for each family, of its first run that has one; it names the other runs."""
    parts = []
    for family in found:
        for run in family.runs:
            if part := make(run):
                parts.append(replace(part, others=_others(family, run)))
                break
    return tuple(parts)


def _others(family: Family, run: Run) -> str:
    names = [n for n, r in zip(family.parts, family.runs, strict=True) if r is not run]
    if not names:
        return ""
    counted = "One other run" if len(names) == 1 else f"{len(names)} other runs"
    verb = "is" if len(names) == 1 else "are"
    return f"{counted} of this recipe ({', '.join(names)}) {verb} not shown here."


def filled_in(run: Run) -> Shown | None:
    """The clip of ``reconstruction.npz``: hidden patches filled in, or steps predicted."""
    picture = run.picture
    if picture is None:
        return None
    errors = fill_errors(picture)
    rivals = {name: e for name, e in errors.items() if name != MODEL}
    rival = min(rivals, key=lambda name: rivals[name])
    ratio = errors[MODEL] / rivals[rival] if rivals[rival] > 0 else float("inf")
    better = "better" if errors[MODEL] < rivals[rival] else "worse"
    compared = f"the best guess without a model ({rival}): {ratio:.2f} times its error."
    sides = _sides(picture, run)
    picked = "Three voxels, at the 10th, 50th and 90th percentile of the error: not picked by eye."
    if picture.step:
        says = f"On this clip the model predicts the next step {better} than {compared}"
        return Shown(
            title="What the pretrained model expects one step ahead",
            label=run.label,
            intro=(_step_words(picture), says),
            figures=(
                (
                    pictures.slices(picture),
                    "Recorded and predicted share one colour scale. " + sides,
                ),
                (pictures.courses(picture), picked),
            ),
            table="Mean absolute error one step ahead, brain voxels of this clip",
            errors=_table(errors),
            says=says,
        )
    share = 100 * picture.hidden.sum() / (picture.brain.sum() * picture.truth.shape[-1])
    says = f"On this clip the model fills in {better} than {compared}"
    return Shown(
        title="What the pretrained model fills in",
        label=run.label,
        intro=(
            f"{share:.0f} % of the clip's brain voxels were hidden from the model (grey); it "
            f"predicted them from the rest. {says}",
        ),
        figures=(
            (
                pictures.slices(picture),
                "“Filled in” keeps the shown voxels as recorded and puts the model's prediction "
                "where it saw nothing. All panels but the last share one colour scale; the error "
                f"is drawn where voxels were hidden. {sides}",
            ),
            (pictures.courses(picture), f"{picked} Grey frames were hidden."),
        ),
        table="Mean absolute error on the hidden brain voxels of this clip",
        errors=_table(errors),
        says=says,
    )


def forecast(run: Run) -> Shown | None:
    """The clip of ``forecast.npz``: what came after it, and what the model expected."""
    ahead = run.ahead
    if ahead is None:
        return None
    says = verdict(ahead)
    means = {name: float(e.mean()) for name, e in errors_ahead(ahead).items()}
    clip = f"{ahead.context.shape[-1]} frames ({ahead.context.shape[-1] * ahead.tr:g} s)"
    seen = ahead.run in (run.model.get("seen_runs") or ())
    return Shown(
        title="Forecast",
        label=run.label,
        intro=(
            f"The model saw {clip} of {ahead.run}, a run that it was {'' if seen else 'not '}"
            f"trained on, and was rolled {ahead.seconds[-1]:g} s forward on its own predictions.",
            says,
        ),
        figures=(
            (
                forecasts.frames(ahead),
                "One slice, one colour scale. “Persistence” is the clip's last frame, again: what "
                "a model has to beat to know anything about what comes. "
                + _sides(forecasts.as_picture(ahead), run),
            ),
            (
                forecasts.horizon(ahead),
                "Mean absolute error over the brain voxels, frame by frame. The dashed line is a "
                "forecast of no change from each voxel's mean over the clip.",
            ),
        ),
        table="Mean absolute error over all frames of this forecast",
        errors=_table(means),
        says=says,
    )


def _step_words(picture: Picture) -> str:
    if picture.unit == "token":
        return (
            "Each patch as the model predicted it from the recorded patches before it in its "
            "sequence. These may hold the same moment at other places, which persistence and a "
            "voxel's own mean do not see."
        )
    if picture.step == 1:
        return "Each frame as the model predicted it from the recorded frames before it."
    return f"Each {picture.step} frames as predicted from the recorded frames before them."


def _table(errors: dict[str, float]) -> tuple[tuple[str, str, bool], ...]:
    # Two rows that print the same number are both the best, whatever their hidden digits.
    best = number(min(errors.values()))
    return tuple((name, number(e), number(e) == best) for name, e in errors.items())


def _sides(picture: Picture, run: Run) -> str:
    orientation = str(run.contract.get("orientation", ""))
    return pictures.sides(picture, orientation) if orientation else ""

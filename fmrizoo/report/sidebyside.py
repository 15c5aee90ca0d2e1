"""The section that puts pretraining runs beside each other: losses, what to beat, and words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from fmrizoo.report import multiples
from fmrizoo.report.collect import Run
from fmrizoo.report.families import Family, comparable
from fmrizoo.report.figures import Image
from fmrizoo.report.reconstruction import fill_errors
from fmrizoo.report.words import grouped, number

MODEL = "the model"
SHORT = 1000  # steps below which a run is called short


@dataclass(frozen=True)
class Beat:
    """What a model has to beat without having learned anything, in the unit of ``own``.

    Attributes:
        own, rival: The model's error and the other's.
        name: The other's.
        clip: Both are of the pictured clip alone, not of all held-out clips.
    """

    own: float
    rival: float
    name: str
    clip: bool

    @property
    def ratio(self) -> float | None:
        """Below 1 the model is nearer."""
        return self.own / self.rival if self.rival > 0 else None


@dataclass(frozen=True)
class PairRow:
    """One line of the table, as text."""

    backbone: str
    note: str
    parameters: str
    loss: str
    best: bool
    beat: str
    of: str
    ratio: str
    speed: str
    normalization: str


@dataclass(frozen=True)
class SideBySide:
    """Everything of the section."""

    words: tuple[str, ...]
    groups: tuple[tuple[str, tuple[PairRow, ...]], ...]
    slices: Image | None
    slices_caption: str
    losses: Image | None
    notes: tuple[str, ...]


def side_by_side(found: Sequence[Family]) -> SideBySide | None:
    """The section, or None with fewer than two recipes to put beside each other."""
    if len(found) < 2:
        return None
    groups = comparable(found)
    named = _named(groups)
    drawn = multiples.slices(groups)
    return SideBySide(
        words=tuple(_words(groups, named)),
        groups=tuple((name, _rows(g)) for name, g in zip(named, groups, strict=True)),
        slices=drawn.image if drawn else None,
        slices_caption=drawn.caption if drawn else "",
        losses=multiples.losses(groups, named),
        notes=(*_rivals(groups), *_gaps(found)),
    )


def held_out(run: Run, key: str = "loss") -> float | None:
    """A number of the last validation."""
    for line in reversed(run.curve):
        held = line.get("validation")
        if isinstance(held, dict) and held.get(key) is not None:
            return float(held[key])
    return None


def _loss(family: Family) -> float | None:
    values = family.known(held_out)
    return fmean(values) if values else None


def beat_of(family: Family) -> Beat | None:
    """Persistence where validation measured it; else the best filler on the pictured clip."""
    both = [(held_out(r), held_out(r, "persistence")) for r in family.runs]
    pairs = [(own, rival) for own, rival in both if own is not None and rival is not None]
    if pairs:
        own, rival = (fmean(v) for v in zip(*pairs, strict=True))
        return Beat(own, rival, "persistence", clip=False)
    run = family.shows(lambda r: r.picture is not None)
    if run is None or run.picture is None:
        return None
    errors = fill_errors(run.picture)
    own = errors.pop(MODEL)
    name = min(errors, key=lambda n: errors[n])
    return Beat(own, errors[name], name, clip=True)


def _named(groups: Sequence[Sequence[Family]]) -> list[str]:
    """Headings of groups: the objective, and the data; equal ones get their first run's label."""
    names = []
    for group in groups:
        data = [group[0].selection, f"{group[0].normalization} normalisation"]
        names.append(f"{group[0].objective} ({'; '.join(d for d in data if d)})")
    return [
        f"{name}, as {group[0].label}" if names.count(name) > 1 else name
        for name, group in zip(names, groups, strict=True)
    ]


def _rows(group: Sequence[Family]) -> tuple[PairRow, ...]:
    losses = {f.label: _loss(f) for f in group}
    known = [v for v in losses.values() if v is not None]
    best = _digits(min(known)) if len(known) > 1 else None
    rows = []
    for family in group:
        size, beat = family.first.model.get("parameters"), beat_of(family)
        speeds = [v for r in family.runs for v in _speeds(r)]
        loss = losses[family.label]
        rows.append(
            PairRow(
                backbone=family.backbone,
                note=_note(family),
                parameters=grouped(size) if size else "–",
                loss=_digits(loss),
                best=best is not None and _digits(loss) == best,
                beat=_digits(beat.rival) if beat else "–",
                of=_against(beat),
                ratio=number(beat.ratio, 2) if beat else "–",
                speed=f"{median(speeds):.0f}" if speeds else "–",
                normalization=family.normalization,
            )
        )
    return tuple(rows)


def _digits(value: float | None) -> str:
    """Three decimals, one more for small losses."""
    return number(value, 3 if value is None or value >= 0.1 else 4)


def _against(beat: Beat | None) -> str:
    if beat is None:
        return "not known"
    if beat.clip:
        return f"{beat.name} on the pictured clip, where the model has {_digits(beat.own)}"
    return f"{beat.name} on the held-out clips"


def _note(family: Family) -> str:
    said = [family.label]
    if len(family.runs) > 1:
        counted = len(family.known(held_out))
        said.append(f"mean of {counted} of {len(family.runs)}: {', '.join(family.parts)}")
    if _patchwise(family):
        said.append("predicts patch after patch")
    return "; ".join(said)


def _speeds(run: Run) -> list[float]:
    values = [line.get("clips_per_second") for line in run.curve]
    return [float(v) for v in values if isinstance(v, (int, float))]


def _patchwise(family: Family) -> bool:
    run = family.shows(lambda r: r.picture is not None)
    picture = run.picture if run else None
    return picture is not None and picture.step > 0 and picture.unit == "token"


# --- words ----------------------------------------------------------------------------------------


def _words(groups: Sequence[Sequence[Family]], named: Sequence[str]) -> list[str]:
    said = [line for g, name in zip(groups, named, strict=True) if (line := _lowest(g, name))]
    mixed = [f for g in groups for f in g if _patchwise(f) and not all(map(_patchwise, g))]
    if mixed:
        names = " and ".join(dict.fromkeys(f.backbone for f in mixed))
        said.append(
            f"{names} predicts patch after patch, and may have seen other places at the moment "
            "that it predicts; the others predict a whole frame from earlier ones. Its task is "
            "the easier one."
        )
    said.append(_caution([f for g in groups for f in g]))
    return said


def _lowest(group: Sequence[Family], name: str) -> str | None:
    scored = [(loss, f) for f in group if (loss := _loss(f)) is not None]
    if len(scored) < 2:
        return None
    scored.sort(key=lambda pair: pair[0])
    several = len({f.backbone for _, f in scored}) < len(scored)
    who = [f"{f.label if several else f.backbone} ({_digits(v)})" for v, f in scored]
    tie = _digits(scored[0][0]) == _digits(scored[1][0])
    lead = "share" if tie else "has"
    first = f"{who[0]} and {who[1]}" if tie else who[0]
    rest = who[2:] if tie else who[1:]
    line = f"{name}: {first} {lead} the lowest held-out loss"
    return line + (f", before {' and '.join(rest)}." if rest else ".")


def _caution(found: Sequence[Family]) -> str:
    """Why the order above is no ranking."""
    runs = [r for f in found for r in f.runs]
    steps = [int(r.curve[-1].get("step") or 0) for r in runs if r.curve]
    names = {n for r in runs for n in r.model.get("seen_runs") or ()}
    subjects = {m.group(1) for n in names if (m := re.match(r"sub-([^_]+)", n))}
    on = {0: "", 1: " on one subject"}.get(len(subjects), f" on {len(subjects)} subjects")
    if steps and max(steps) < SHORT:
        span = f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else f"{max(steps)}"
        why = f"These are short runs ({span} steps){on}: they rank nothing. "
        return why + "Longer training, another seed or other people may turn the order round."
    return f"This is an order of these runs{on}, not of backbones: another seed may turn it round."


def _rivals(groups: Sequence[Sequence[Family]]) -> list[str]:
    """Where the column of what to beat needs a word more."""
    said = []
    for group in groups:
        clips = [b for f in group if (b := beat_of(f)) and b.clip]
        if len({_digits(b.rival) for b in clips}) > 1:
            said.append(
                f"{group[0].objective}: what was hidden from the pictured clip differs from run to "
                "run, and with it the best filler: fillers do badly where a voxel was never shown."
            )
        behind: dict[str, list[str]] = {}
        for family in group:
            run, beat = family.shows(lambda r: r.picture is not None), beat_of(family)
            if run is None or run.picture is None or beat is None or beat.clip:
                continue
            errors = fill_errors(run.picture)
            best = min(errors, key=lambda n: errors[n])
            if best not in (MODEL, beat.name):
                behind.setdefault(best, []).append(family.backbone)
        for name, who in behind.items():
            said.append(
                f"{group[0].objective}: persistence is not the strongest guess. On the pictured "
                f"clip {name} is nearer (mean absolute error) than {' and '.join(who)}."
            )
    return said


def _gaps(found: Sequence[Family]) -> list[str]:
    """Rows that lack something, by name."""
    said = []
    lacks: tuple[tuple[str, Any], ...] = (
        ("no validation loss", lambda r: held_out(r) is not None),
        ("no reconstruction.npz, so no picture", lambda r: r.picture is not None),
    )
    for what, has in lacks:
        if names := [f.label for f in found if f.shows(has) is None]:
            said.append(f"{what[0].upper()}{what[1:]}: {', '.join(names)}.")
    return said

"""``fmrizoo analyze attribution``: a fine-tuned run's attributions as maps, tables and numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.analysis.attribution import (
    Attributed,
    cascade,
    explain,
    randomised,
    target_value,
    voxels_of,
)
from fmrizoo.analysis.tested import (
    Array,
    Regions,
    TestedRun,
    brain_of,
    many,
    one_lattice,
    open_tested,
    thinned,
    write_json,
    write_map,
    write_table,
)
from fmrizoo.data.batch import CompactBatch
from fmrizoo.data.clips import ClipTable
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.model import DownstreamModel
from fmrizoo.registry import suggest

log = logging.getLogger(__name__)

SCHEMA = "fmrizoo.attribution/1"
Volumes = dict[str, Array]  # subject → (x, y, z), NaN outside the subject's brain
TOLERATED = 0.05  # error of integrated gradients, as a share of the difference
OnClip = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """How attributions are made; see :func:`fmrizoo.analysis.attribution.explain`.

    Attributes:
        target: Name of the target; None: the first.
        label: Class that is explained; None: each clip's own.
    """

    method: str = "ig"
    baseline: str = "background"
    steps: int = 32
    cube: int | None = None
    target: str | None = None
    label: str | None = None
    at_once: int = 8


@dataclass(frozen=True)
class Sanity:
    """Rank correlation over voxels of the map with that of a model randomised down to a layer."""

    down_to: str
    absolute: float | None
    signed: float | None


@dataclass(frozen=True)
class ParcelRow:
    """What one parcel holds of the group's map.

    Attributes:
        voxels: Brain voxels.
        mean: Of the signed attributions of its voxels.
        share: Of the whole brain's absolute attribution.
        density: ``share`` divided by the parcel's share of the brain's voxels; 1: as all.
        rank: By ``density``, 1 = most.
    """

    label: int
    name: str
    voxels: int
    mean: float
    share: float
    density: float
    rank: int


@dataclass(frozen=True, eq=False)
class Attribution:
    """Attributions of a run's clips.

    Attributes:
        settings: How they were made; ``target`` filled in.
        clips, subjects: How many.
        signed, absolute: ``(x, y, z)`` sum over a clip's frames, averaged over clips of a subject,
            then over subjects; NaN outside every brain.
        per_subject: The same for each subject: signed and absolute.
        affine: Voxel → RAS mm.
        difference: Mean over clips of score minus baseline's score.
        size: Mean over clips of |difference|.
        error: Mean over clips of |sum of attributions − difference|.
        worst: Largest |error| of a clip.
        sanity: Empty where it was not asked for.
        parcels: Empty without an atlas.
    """

    settings: Settings
    clips: int
    subjects: int
    signed: Array
    absolute: Array
    per_subject: dict[str, tuple[Array, Array]]
    affine: Any
    difference: float
    size: float
    error: float
    worst: float
    sanity: tuple[Sanity, ...] = ()
    parcels: tuple[ParcelRow, ...] = ()
    regions: str = ""

    @property
    def relative_error(self) -> float | None:
        """``error`` as a share of ``size``; None: scores and baselines are equal."""
        return self.error / self.size if self.size > 0 else None

    @property
    def says(self) -> str:
        """Completeness in plain words."""
        share = self.relative_error
        text = (
            f"{many(self.clips, 'clip')} of {many(self.subjects, 'subject')}: score − baseline "
            f"{self.difference:+.4g} on average, sum of attributions off by {self.error:.2g}"
        )
        text += f" ({100 * share:.2g} %)" if share is not None else ""
        if self.settings.method == "occlusion":
            return text + "; occlusion need not add up"
        return text


class _Sums:
    """Means over clips of each subject, on the voxels that are brain in them."""

    def __init__(self, grid: Sequence[int]) -> None:
        self._grid = tuple(grid)
        self._sums: dict[str, Array] = {}
        self.ends: list[tuple[float, float]] = []  # difference and error of each clip

    def add(self, subject: str, index: NDArray[np.int64], found: Attributed) -> None:
        values = found.values.double().cpu().numpy()
        new = np.zeros((3, int(np.prod(self._grid))))
        sums = self._sums.setdefault(subject, new)
        sums[:, index] += [values.sum(0), np.abs(values).sum(0), np.ones(len(index))]
        self.ends.append((found.difference, found.error))

    def subjects(self) -> dict[str, tuple[Array, Array]]:
        found = {}
        for subject, (signed, absolute, count) in self._sums.items():
            n = np.where(count > 0, count, np.nan)
            found[subject] = (
                (signed / n).reshape(self._grid),
                (absolute / n).reshape(self._grid),
            )
        return found

    def group(self) -> tuple[Array, Array]:
        signed, absolute = (np.stack(maps) for maps in zip(*self.subjects().values(), strict=True))
        return _nanmean(signed), _nanmean(absolute)


def _nanmean(maps: Array) -> Array:
    """Mean over the first axis of what is known; NaN where nothing is."""
    count = np.isfinite(maps).sum(0)
    total = np.nan_to_num(maps).sum(0)
    nothing = np.full(total.shape, np.nan)
    mean: Array = np.divide(total, count, out=nothing, where=count > 0)
    return mean


def attribute_run(
    run: Path,
    settings: Settings,
    *,
    atlas: str | Path | None = None,
    part: str = "test",
    clips: int = 64,
    sanity_clips: int = 4,
    device: str = "auto",
    on_clip: OnClip | None = None,
) -> Attribution:
    """Attributions of a fine-tuned run's score on clips of a part of its split.

    Args:
        run: Run folder.
        settings: Method, baseline, target.
        atlas: NIfTI of labels or ``cubes[:N]``, for the parcel table; None: no table.
        part: ``train``, ``validation`` or ``test``.
        clips: At most so many, spread evenly.
        sanity_clips: Clips of the parameter-randomisation check; 0: it is left out.
        device: ``auto``, ``cpu``, ``cuda`` or ``xpu``.
        on_clip: ``(done, total, note)``.

    Raises:
        CheckpointError, RecipeError, DataError: see
            :func:`fmrizoo.analysis.tested.open_tested` and :func:`attribute`.
    """
    opened = open_tested(run, part=part, device=device)
    return attribute(
        opened, settings, atlas=atlas, clips=clips, sanity_clips=sanity_clips, on_clip=on_clip
    )


def attribute(
    opened: TestedRun,
    settings: Settings,
    *,
    atlas: str | Path | None = None,
    clips: int = 64,
    sanity_clips: int = 4,
    on_clip: OnClip | None = None,
) -> Attribution:
    """:func:`attribute_run` of a model and clips in memory.

    Raises:
        RecipeError: an unknown method, baseline, target or class.
        DataError: no labelled clip, runs whose voxels lie in different places, or an atlas that
            cannot be used.
    """
    number = opened.target(settings.target)
    settings = replace(settings, target=opened.tasks[number].name)
    opened = replace(opened, table=thinned(_with_label(opened.table, number), clips))
    affine = one_lattice(opened.table)
    brain = brain_of(opened.table)
    regions = Regions.of(atlas, opened.table.runs, brain) if atlas is not None else None
    sums = _explain_all(opened, opened.model, settings, number, on_clip)
    checks: tuple[Sanity, ...] = ()
    if sanity_clips:
        few = replace(opened, table=thinned(opened.table, sanity_clips))
        checks = _randomise(few, settings, number, on_clip)
    signed, absolute = sums.group()
    ends = np.array(sums.ends)
    found = Attribution(
        settings=settings,
        clips=len(ends),
        subjects=len(sums.subjects()),
        signed=signed,
        absolute=absolute,
        per_subject=sums.subjects(),
        affine=affine,
        difference=float(ends[:, 0].mean()),
        error=float(np.abs(ends[:, 1]).mean()),
        worst=float(np.abs(ends[:, 1]).max()),
        sanity=checks,
        parcels=parcel_rows(signed, absolute, regions) if regions else (),
        regions=regions.source if regions else "",
        size=float(np.abs(ends[:, 0]).mean()),
    )
    share = found.relative_error
    if settings.method == "ig" and share is not None and share > TOLERATED:
        log.warning(
            "attributions miss %.0f %% of the difference of scores: take more steps than %d",
            100 * share,
            settings.steps,
        )
    return found


def _with_label(table: ClipTable, target: int) -> ClipTable:
    """The clips that have a label of the target."""
    labels = table.labels or ()
    kept = np.array([k for k, row in enumerate(labels) if row[target] is not None], np.int64)
    if not len(kept):
        raise DataError("no clip of this part has a label of the target")
    return replace(
        table,
        run=table.run[kept],
        start=table.start[kept],
        labels=tuple(labels[k] for k in kept),
        units=table.units and tuple(table.units[k] for k in kept),
    )


def _explain_all(
    opened: TestedRun,
    model: DownstreamModel,
    settings: Settings,
    target: int,
    on_clip: OnClip | None,
    note: str = "",
) -> _Sums:
    task = opened.tasks[target]
    if settings.label is not None and settings.label not in task.classes:
        raise RecipeError(
            f"class {settings.label!r} is not of target {task.name!r}."
            f"{suggest(settings.label, list(task.classes))}"
        )
    if settings.label is not None and task.kind != "classification":
        raise RecipeError(f"target {task.name!r} is {task.kind}: its value is explained, no class")
    side = (settings.cube,) * 3 if settings.cube else None
    sums = _Sums(opened.table.grid[:3])
    for done, compact in enumerate(opened.batches(), start=1):
        batch = compact.to_batch(opened.device)
        label = _label(compact, target, settings.label, task.classes, task.kind)
        found = explain(
            model,
            batch,
            target_value(opened.tasks, target, label),
            method=settings.method,
            baseline=settings.baseline,
            steps=settings.steps,
            side=side,
            at_once=settings.at_once,
        )
        index = voxels_of(batch).index.cpu().numpy()
        sums.add(compact.subject[0], index, found)
        if on_clip is not None:
            on_clip(done, len(opened.table), note)
    return sums


def _label(
    compact: CompactBatch, target: int, given: str | None, classes: Sequence[str], kind: str
) -> int | None:
    if kind != "classification":
        return None
    return classes.index(given) if given is not None else int(compact.samples[0].targets[target])


def _randomise(
    opened: TestedRun, settings: Settings, target: int, on_clip: OnClip | None
) -> tuple[Sanity, ...]:
    """Maps of models that are randomised further and further down, compared with the real one."""
    signed, absolute = _explain_all(opened, opened.model, settings, target, on_clip).group()
    gone: list[str] = []
    found = []
    for name, parameters in cascade(opened.model):
        gone += parameters
        other = randomised(opened.model, gone)
        note = f"randomised down to {name}"
        s, a = _explain_all(opened, other, settings, target, on_clip, note).group()
        found.append(Sanity(name, rank_correlation(a, absolute), rank_correlation(s, signed)))
    return tuple(found)


def rank_correlation(a: Array, b: Array) -> float | None:
    """Spearman's over the voxels known in both; None where one of them is constant."""
    from scipy.stats import spearmanr

    both = np.isfinite(a) & np.isfinite(b)
    x, y = a[both], b[both]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


def parcel_rows(signed: Array, absolute: Array, regions: Regions) -> tuple[ParcelRow, ...]:
    """Summary of maps ``(x, y, z)`` by parcel, in order of rank."""
    brain = np.isfinite(absolute)
    total, size = float(absolute[brain].sum()), int(brain.sum())
    labels = regions.labels.numpy()
    found = []
    for label, name in regions.names.items():
        inside = brain & (labels == label)
        n = int(inside.sum())
        if n == 0:
            continue
        share = float(absolute[inside].sum()) / total if total > 0 else 0.0
        found.append((label, name, n, float(signed[inside].mean()), share, share * size / n))
    found.sort(key=lambda row: -row[-1])
    return tuple(ParcelRow(*row, rank) for rank, row in enumerate(found, start=1))


def write_attribution(folder: Path, found: Attribution) -> None:
    """Write maps, ``parcels.tsv`` (with an atlas) and ``attribution.json`` into ``folder``."""
    about = f"fmrizoo {found.settings.method} {found.settings.target}"
    maps = {"": (found.signed, found.absolute)}
    maps |= {f"subjects/sub-{s}_": both for s, both in found.per_subject.items()}
    for prefix, (signed, absolute) in maps.items():
        for kind, volume in (("signed", signed), ("absolute", absolute)):
            path = folder / f"{prefix}attribution_{kind}.nii.gz"
            write_map(path, np.nan_to_num(volume), found.affine, f"{about} {kind}")
    if found.parcels:
        names = list(asdict(found.parcels[0]))
        rows = [list(asdict(row).values()) for row in found.parcels]
        write_table(folder / "parcels.tsv", names, rows)
    body = {
        "schema": SCHEMA,
        "settings": asdict(found.settings),
        "clips": found.clips,
        "subjects": found.subjects,
        "completeness": {
            "difference": found.difference,
            "size": found.size,
            "error": found.error,
            "worst": found.worst,
            "relative_error": found.relative_error,
        },
        "randomisation": [asdict(s) for s in found.sanity],
        "atlas": found.regions,
    }
    write_json(folder / "attribution.json", body)

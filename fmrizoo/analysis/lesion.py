"""In-silico lesions: what does a fine-tuned model lose when it cannot see a region?

A region's voxels are replaced in every clip, the brain mask stays: a model that leaves out patches
without brain sees the same patches. Three ways:

- ``background``: the value outside the brain, as if the region were not there.
- ``mean``: each voxel's mean over the clip. The level stays, what changes over time goes.
- ``surrogate``: the same random phases for all voxels of the region. Power spectra, and how the
  region's voxels go together, stay; when things happen, and how the region goes together with
  others, does not.

The effect on a unit is the change of how well the model does on it (:func:`goodness`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fmrizoo.analysis.tested import (
    Array,
    Regions,
    TestedRun,
    brain_of,
    interval,
    one_lattice,
    open_tested,
    write_json,
    write_map,
    write_table,
)
from fmrizoo.data.batch import ClipFacts
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.inference import unit_predictions
from fmrizoo.evaluate.predictions import Prediction
from fmrizoo.evaluate.predictions import evaluate as score
from fmrizoo.registry import suggest
from fmrizoo.types import Voxels

SCHEMA = "fmrizoo.lesion/1"
OnRegion = Callable[[int, int, str], None]
LESIONS = ("background", "mean", "surrogate")


def lesioned(voxels: Voxels, inside: Tensor, how: str, seed: int = 0, first: int = 0) -> Voxels:
    """``voxels`` with those ``inside (v,)`` replaced.

    Args:
        voxels: Compact clips.
        inside: bool, True = lesioned.
        how: See the module.
        seed: Of the surrogate's phases.
        first: Number of the first clip: each clip has phases of its own.

    Raises:
        RecipeError: an unknown lesion.
    """
    if how not in LESIONS:
        raise RecipeError(f"lesion={how!r} is not known.{suggest(how, list(LESIONS))}")
    counts = torch.tensor(voxels.counts, device=inside.device)
    if how == "background":
        other = voxels.background.to(voxels.values.dtype).repeat_interleave(counts)[None]
    elif how == "mean":
        other = voxels.values.mean(0, keepdim=True)
    else:
        parts = torch.split(voxels.values, list(voxels.counts), 1)
        each = [_surrogate(part, [seed, first + number]) for number, part in enumerate(parts)]
        other = torch.cat(each, 1)
    values = torch.where(inside[None], other, voxels.values)
    return Voxels(values, voxels.index, voxels.counts, voxels.background, voxels.grid)


def _surrogate(values: Tensor, seed: Sequence[int]) -> Tensor:
    """``(t, v)`` with one random phase added at each frequency, alike in all voxels."""
    frames = len(values)
    phase = np.random.default_rng(list(seed)).uniform(0, 2 * np.pi, frames // 2 + 1)
    phase[0] = 0  # the mean stays
    if frames % 2 == 0:
        phase[-1] = 0  # has no phase
    turn = torch.polar(torch.ones(len(phase)), torch.from_numpy(phase).float()).to(values.device)
    changed = torch.fft.rfft(values.float(), dim=0) * turn[:, None]
    found: Tensor = torch.fft.irfft(changed, frames, dim=0)
    return found.to(values.dtype)


def goodness(prediction: Prediction, kind: str) -> float:
    """How well one unit is predicted: more is better, whatever the kind of target.

    Log-probability of the true class or level; minus the absolute error of a value.
    """
    scores = np.array(prediction.scores, np.float64)
    if kind == "regression":
        return -abs(float(scores[0]) - prediction.target)
    top = scores.max()
    return float(scores[int(prediction.target)] - top - np.log(np.exp(scores - top).sum()))


@dataclass(frozen=True)
class LesionRow:
    """The effect of one region's lesion.

    Attributes:
        label, name: Of the region.
        voxels: Brain voxels in it.
        change: Mean over units of the change of :func:`goodness`; negative: worse.
        low, high: 95 % bootstrap interval over subjects (units, with few subjects); None: one unit.
        moved: Mean over units of the largest change of a score, of either sign; 0: the model does
            not look there.
        metric: The task's main metric with the lesion; None where it is not defined.
    """

    label: int
    name: str
    voxels: int
    change: float
    low: float | None
    high: float | None
    moved: float
    metric: float | None


@dataclass(frozen=True, eq=False)
class Lesions:
    """Effects of all regions.

    Attributes:
        target, lesion, atlas: What was done.
        metric: Name of the main metric.
        intact: Its value without a lesion.
        units: Names of the units.
        subjects: Of each unit.
        goodness: ``(units,)`` without a lesion.
        changes: ``(regions, units)`` change of it.
        rows: One per region, in the atlas's order.
        labels: ``(x, y, z)`` the regions.
        affine: Voxel → RAS mm.
    """

    target: str
    lesion: str
    atlas: str
    metric: str
    intact: float | None
    units: tuple[str, ...]
    subjects: tuple[str, ...]
    goodness: Array
    changes: Array
    rows: tuple[LesionRow, ...]
    labels: Tensor
    affine: Any

    def effect_map(self) -> Array:
        """``(x, y, z)`` change of each region; 0 elsewhere."""
        found = np.zeros(tuple(self.labels.shape))
        for row in self.rows:
            found[self.labels.numpy() == row.label] = row.change
        return found


def lesion_run(
    run: Path,
    *,
    atlas: str | Path,
    lesion: str = "background",
    target: str | None = None,
    regions: Sequence[int] = (),
    part: str = "test",
    clips: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
    on_region: OnRegion | None = None,
) -> Lesions:
    """:func:`lesion_each` on clips of a part of a fine-tuned run's split.

    Args:
        run: Run folder of a fine-tuned model.
        part: ``train``, ``validation`` or ``test``.
        clips: At most so many, spread evenly; None: all.
        device: ``auto``, ``cpu``, ``cuda`` or ``xpu``.
        atlas, lesion, target, regions, batch_size, seed, on_region: See there.

    Raises:
        CheckpointError, RecipeError, DataError: see :func:`fmrizoo.analysis.tested.open_tested` and
            :func:`lesion_each`.
    """
    opened = open_tested(run, part=part, clips=clips, device=device)
    return lesion_each(
        opened, atlas=atlas, lesion=lesion, target=target, regions=regions, batch_size=batch_size,
        seed=seed, on_region=on_region,
    )  # fmt: skip


def lesion_each(
    opened: TestedRun,
    *,
    atlas: str | Path,
    lesion: str = "background",
    target: str | None = None,
    regions: Sequence[int] = (),
    batch_size: int = 8,
    seed: int = 0,
    on_region: OnRegion | None = None,
) -> Lesions:
    """Lesion each region of an atlas in turn and predict all units anew.

    Args:
        opened: Model and clips.
        atlas: NIfTI of labels on the store's voxels, or ``cubes[:N]``.
        lesion: ``background``, ``mean`` or ``surrogate``.
        target: Name of the target; None: the first.
        regions: Labels to lesion; none: all.
        batch_size: Clips at a time.
        seed: Of surrogates.
        on_region: ``(done, total, name)``.

    Raises:
        RecipeError: an unknown lesion or target.
        DataError: an atlas that cannot be used (see :class:`Regions`), an unknown label, or no
            labelled unit.
    """
    if lesion not in LESIONS:
        raise RecipeError(f"lesion={lesion!r} is not known.{suggest(lesion, list(LESIONS))}")
    task = opened.tasks[opened.target(target)]
    affine, brain = one_lattice(opened.table), brain_of(opened.table)
    found = Regions.of(atlas, opened.table.runs, brain)
    if unknown := [label for label in regions if label not in found.names]:
        raise DataError(f"{found.source} has no region {unknown} within the brain of these runs")
    names = {k: name for k, name in found.names.items() if not regions or k in regions}
    intact = _predict(opened, task.name, found.labels, None, lesion, batch_size, seed)
    base = np.array([goodness(p, task.kind) for p in intact])
    rows, changes = [], []
    for done, (label, name) in enumerate(names.items(), start=1):
        other = _predict(opened, task.name, found.labels, label, lesion, batch_size, seed)
        change = np.array([goodness(p, task.kind) for p in other]) - base
        ends = interval(change, [p.subject for p in intact])
        rows.append(
            LesionRow(
                label=label,
                name=name,
                voxels=int((brain & (found.labels.numpy() == label)).sum()),
                change=float(change.mean()),
                low=ends and ends[0],
                high=ends and ends[1],
                moved=float(np.mean([_moved(a, b) for a, b in zip(intact, other, strict=True)])),
                metric=_metric(other, task.kind),
            )
        )
        changes.append(change)
        if on_region is not None:
            on_region(done, len(names), name)
    return Lesions(
        target=task.name,
        lesion=lesion,
        atlas=found.source,
        metric=metrics.PRIMARY[task.kind],
        intact=_metric(intact, task.kind),
        units=tuple(p.unit for p in intact),
        subjects=tuple(p.subject for p in intact),
        goodness=base,
        changes=np.stack(changes),
        rows=tuple(rows),
        labels=found.labels,
        affine=affine,
    )


def _metric(predictions: Sequence[Prediction], kind: str) -> float | None:
    value = score(predictions, kind).values[metrics.PRIMARY[kind]]
    return None if value is None or not math.isfinite(value) else float(value)


def _moved(a: Prediction, b: Prediction) -> float:
    """Largest change of a score; what all classes share is no change."""
    change = np.array(b.scores) - np.array(a.scores)
    if len(change) > 1:
        change = change - change.mean()
    return float(np.abs(change).max())


@torch.no_grad()
def _predict(
    opened: TestedRun,
    target: str,
    labels: Tensor,
    label: int | None,
    how: str,
    batch_size: int,
    seed: int,
) -> list[Prediction]:
    """Units of the run, with one region lesioned (None: intact)."""
    cells = labels.flatten().to(opened.device)
    scores: list[Tensor] = []
    facts: list[ClipFacts] = []
    for compact in opened.batches(batch_size):
        batch = compact.to_batch(opened.device)
        voxels = batch.voxels
        if voxels is None:
            raise DataError("lesions need compact clips, as the loader gives them")
        if label is not None:
            inside = cells[voxels.index] == label
            # Each clip keeps its phases whichever region is lesioned.
            voxels = lesioned(voxels, inside, how, seed, first=len(facts))
        scores.append(opened.model.predict(replace(batch, bold=cast(Tensor, voxels))).float().cpu())
        facts += [sample.facts for sample in compact.samples]
    found = unit_predictions(torch.cat(scores), facts, opened.tasks)[target]
    if not found:
        raise DataError(f"no unit of this part has a label of {target!r}")
    return found


def write_lesions(folder: Path, found: Lesions) -> None:
    """Write ``lesions.tsv``, ``lesion_units.tsv``, ``lesion_effect.nii.gz`` and ``lesion.json``."""
    header = list(asdict(found.rows[0]))
    write_table(folder / "lesions.tsv", header, [list(asdict(r).values()) for r in found.rows])
    units = [
        [unit, subject, row.label, base, change]
        for row, changes in zip(found.rows, found.changes.tolist(), strict=True)
        for unit, subject, base, change in zip(
            found.units, found.subjects, found.goodness.tolist(), changes, strict=True
        )
    ]
    columns = ["unit", "subject", "label", "intact", "change"]
    write_table(folder / "lesion_units.tsv", columns, units)
    about = f"fmrizoo lesion {found.lesion} {found.target}: change"
    write_map(folder / "lesion_effect.nii.gz", found.effect_map(), found.affine, about)
    body = {
        "schema": SCHEMA,
        "target": found.target,
        "lesion": found.lesion,
        "atlas": found.atlas,
        "metric": found.metric,
        "intact": found.intact,
        "units": len(found.units),
        "subjects": len(set(found.subjects)),
        "regions": [asdict(row) for row in found.rows],
    }
    write_json(folder / "lesion.json", body)

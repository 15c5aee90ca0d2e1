"""What analyses of a fine-tuned run share: the run, its clips, regions of the brain, and maps."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmrizoo.config import Recipe
from fmrizoo.data.batch import CompactBatch
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.mixture import open_store
from fmrizoo.data.spatial import same_lattice
from fmrizoo.data.splits import Split
from fmrizoo.data.store import RunInfo
from fmrizoo.errors import CheckpointError, DataError, RecipeError
from fmrizoo.evaluate.atlas import Atlas
from fmrizoo.evaluate.features import MAX_PARCELS, parcels
from fmrizoo.files import write_atomic
from fmrizoo.model import DownstreamModel
from fmrizoo.registry import suggest
from fmrizoo.types import TaskSpec
from fmrizoo.zoo import load, load_recipe, model_folder

Array = NDArray[np.float64]

DRAWS = 2000  # of a bootstrap
FEW = 5  # below so many subjects single units are drawn
CUBES = "cubes"


@dataclass(frozen=True)
class TestedRun:
    """A fine-tuned run and the labelled clips of one part of its split.

    Attributes:
        folder: Of the run.
        recipe: What it was trained by.
        model: In ``eval()``, on ``device``.
        table: Labelled clips.
        device: Where the model is.
    """

    folder: Path
    recipe: Recipe
    model: DownstreamModel
    table: ClipTable
    device: torch.device

    __test__ = False  # not a test, whatever its name begins with

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """The targets of the head, in the order of its outputs."""
        return self.model.head.tasks

    def batches(self, size: int = 1) -> Iterator[CompactBatch]:
        """Every clip of the table once, in order."""
        yield from Loader(self.table, self.recipe.data, size, tasks=self.tasks).epoch()

    def target(self, name: str | None) -> int:
        """Number of the target called ``name``; None: the first."""
        names = [task.name for task in self.tasks]
        if name is None:
            return 0
        if name not in names:
            raise RecipeError(f"target {name!r} is not of this run.{suggest(name, names)}")
        return names.index(name)


def open_tested(
    run: Path, *, part: str = "test", clips: int | None = None, device: str = "auto"
) -> TestedRun:
    """Load a fine-tuned run and find the labelled clips of a part of its own split.

    Args:
        run: Run folder.
        part: ``train``, ``validation`` or ``test``.
        clips: At most so many, spread evenly over the part; None: all.
        device: ``auto``, ``cpu``, ``cuda`` or ``xpu``.

    Raises:
        CheckpointError: no fine-tuned model, or data preprocessed in another way than it expects.
        RecipeError: an unknown part or device.
        DataError: unusable data, or a part without runs.
    """
    from fmrizoo.trainer.device import World, resolve_device
    from fmrizoo.trainer.export import check_contract, read_info

    if clips is not None and clips < 1:
        raise DataError(f"at least one clip is needed, got {clips}")
    folder = model_folder(run)
    model = load(run)
    if not isinstance(model, DownstreamModel):
        raise CheckpointError(f"{run} holds a pretrained model without a head: fine-tune it first")
    recipe = load_recipe(run / "recipe.yaml")
    store, split = open_store(recipe.data), Split.load(run / "split.json")
    split.check(store)
    parts = split.parts()
    if part not in parts:
        raise RecipeError(f"part={part!r} is not known.{suggest(part, list(parts))}")
    if not parts[part]:
        raise DataError(f"the {part} part of the split of {run} holds no run")
    table = ClipTable.labelled(store, [store[n] for n in parts[part]], recipe.data, recipe.task)
    contract = table.contract(recipe.data.normalization)
    check_contract(read_info(folder).contract, contract, folder, store.path)
    where = resolve_device(device, World())
    return TestedRun(run, recipe, model.to(where), thinned(table, clips), where)


def thinned(table: ClipTable, clips: int | None) -> ClipTable:
    """At most ``clips`` clips, evenly over the table (which is in order of runs)."""
    if clips is None or len(table) <= clips:
        return table
    kept = np.linspace(0, len(table) - 1, clips).round().astype(np.int64)
    return replace(
        table,
        run=table.run[kept],
        start=table.start[kept],
        labels=table.labels and tuple(table.labels[k] for k in kept),
        units=table.units and tuple(table.units[k] for k in kept),
    )


@dataclass(frozen=True, eq=False)
class Regions:
    """Parcels of the brain with names.

    Attributes:
        labels: ``(x, y, z)`` int64; 0 and below: none.
        names: Name of each label above 0.
        source: Where they are from, for the record.
    """

    labels: Tensor
    names: dict[int, str]
    source: str

    @classmethod
    def of(cls, source: str | Path, runs: Sequence[RunInfo], mask: NDArray[np.bool_]) -> Regions:
        """From a NIfTI file of labels, or cubes of voxels.

        Names are read from a BIDS table beside the file (``X_dseg.tsv`` or ``X.tsv`` of
        ``X_dseg.nii.gz`` or ``X.nii.gz``, columns ``index`` and ``name``); without it a parcel is
        called by its number.

        Args:
            source: NIfTI file; ``cubes`` or ``cubes:N``: the brain cut into at most N cubes.
            runs: On whose voxels the labels must lie.
            mask: ``(x, y, z)`` brain.

        Raises:
            DataError: labels that cannot be used or lie elsewhere, or none within the brain.
        """
        word, _, most = str(source).partition(":")
        if word == CUBES:
            if most and (not most.isdigit() or int(most) < 1):
                raise DataError(f"{CUBES}:N takes a positive number, got {str(source)!r}")
            return cls._cubes(mask, int(most or MAX_PARCELS))
        path = Path(source)
        atlas = Atlas.of(path)
        atlas.check(runs)
        inside = np.unique(atlas.labels.numpy()[mask])
        present = [int(label) for label in inside if label > 0]
        if not present:
            raise DataError(f"{atlas.name} has no parcel within the brain of these runs")
        named = _names(path)
        return cls(atlas.labels, {k: named.get(k, str(k)) for k in present}, str(path))

    @classmethod
    def _cubes(cls, mask: NDArray[np.bool_], most: int) -> Regions:
        weights = parcels(mask, most)
        labels = np.zeros(mask.shape, np.int64)
        owner = weights.argmax(0) + 1
        labels[mask] = np.where(weights.any(0), owner, 0)
        where = [
            np.argwhere(labels == k + 1).mean(0).round().astype(int) for k in range(len(weights))
        ]
        names = {k: "cube " + " ".join(map(str, w)) for k, w in enumerate(where, start=1)}
        return cls(torch.from_numpy(labels), names, CUBES)


def _names(atlas: Path) -> dict[int, str]:
    stem = atlas.name.removesuffix(".gz").removesuffix(".nii")
    path = atlas.with_name(f"{stem}.tsv")
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return {int(r["index"]): r["name"] for r in csv.DictReader(stream, delimiter="\t")}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"names of parcels {path}: columns index and name needed ({error})"
        ) from None


def brain_of(table: ClipTable) -> NDArray[np.bool_]:
    """``(x, y, z)``: voxels that are brain in any run of the table."""
    found = np.zeros(table.runs[0].grid, bool)
    for number in np.unique(table.run):
        found.reshape(-1)[table.store.open(table.runs[number]).index] = True
    return found


def one_lattice(table: ClipTable) -> Any:
    """The affine that all runs of the table share.

    Raises:
        DataError: they do not, so that no map can be averaged over them.
    """
    first = table.runs[0]
    affine = np.array(first.affine, np.float64)
    for run in table.runs:
        if not same_lattice(affine, np.array(run.affine, np.float64), first.grid):
            raise DataError(
                f"the voxels of runs {first.name} and {run.name} lie in different places, so no "
                "map can be averaged over them: prepare the store in a common space, or fine-tune "
                "with one subject selected"
            )
    return affine


def interval(values: Array, groups: Sequence[str], seed: int = 0) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean of ``values (n, )``.

    Subjects are drawn with all their units where there are at least ``FEW`` of them, else units.
    None with fewer than two things to draw.
    """
    names = np.unique(groups, return_inverse=True)[1]
    if names.max(initial=-1) + 1 < FEW:
        names = np.arange(len(values))
    if len(values) < 2:
        return None
    size, total = np.bincount(names), np.bincount(names, values)
    drawn = np.random.default_rng(seed).integers(len(size), size=(DRAWS, len(size)))
    means = total[drawn].sum(1) / size[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def many(count: int, what: str) -> str:
    """``1 clip``, ``2 clips``."""
    return f"{count} {what}" + "s" * (count != 1)


def write_map(path: Path, volume: NDArray[Any], affine: Any, about: str) -> None:
    """Write ``volume (x, y, z)`` as float32 NIfTI with ``affine (4, 4)`` (voxel → RAS mm)."""
    import nibabel

    nifti: Any = nibabel.Nifti1Image
    image = nifti(volume.astype(np.float32), np.array(affine, np.float64))
    image.header["descrip"] = about.encode("ascii", "replace")[:79]
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        import gzip

        content = gzip.compress(content, mtime=0)
    write_atomic(path, content)


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a TSV file; numbers keep all their digits, None is ``n/a`` as in BIDS."""
    out = io.StringIO()
    table = csv.writer(out, delimiter="\t", lineterminator="\n")
    table.writerow(header)
    table.writerows([["n/a" if v is None else v for v in row] for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, out.getvalue().encode())


def write_json(path: Path, body: Any) -> None:
    """Write JSON without NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())

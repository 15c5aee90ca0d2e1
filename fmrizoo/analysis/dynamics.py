"""``analysis.json``: the autocorrelation of a trained run's embeddings on runs it has not seen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from fmrizoo.analysis.autocorrelation import (
    Artefact,
    Autocorrelation,
    measure,
    temporal_window,
)
from fmrizoo.config import Recipe
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.mixture import open_store
from fmrizoo.data.splits import Split
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import DataError, FmrizooError
from fmrizoo.files import write_atomic
from fmrizoo.model import DownstreamModel, PretrainingModel
from fmrizoo.types import Backbone, Batch
from fmrizoo.zoo import load, load_recipe, model_folder

SCHEMA = "fmrizoo.analysis/1"
FILE = "analysis.json"


def analyze_run(run: Path, *, clips: int = 32, frames: int | None = None) -> Autocorrelation:
    """Measure a trained run's embeddings on its held-out runs and write ``analysis.json`` there.

    Validation runs are used, or test runs where the split has no validation part; no label is
    read. Models that take any length see one long stretch of each run, others clips of the length
    that they were built for.

    Args:
        run: Folder of a finished run.
        clips: At most so many, spread evenly over the runs.
        frames: Length of a stretch for models that take any; None: the shortest run's length.

    Raises:
        CheckpointError: no model there, or data preprocessed in another way than the model expects.
        DataError: unusable data, or clips too short for an autocorrelation.
    """
    recipe, backbone, batches = held_out(run, clips=clips, frames=frames)
    found = measure(
        backbone,
        batches,
        name=recipe.backbone.name,
        window=temporal_window(recipe.backbone),
    )
    write_analysis(run, found)
    return found


def held_out(
    run: Path, *, clips: int | None = 32, frames: int | None = None, runs: int | None = None
) -> tuple[Recipe, Backbone, Iterator[Batch]]:
    """A trained run's recipe, backbone and clips of runs it has not seen, one a batch.

    See :func:`analyze_run` for which clips; ``clips`` None: all, one after the other in time.
    ``runs``: at most so many, spread evenly.

    Raises:
        CheckpointError: no model there, or data preprocessed in another way than the model expects.
        DataError: unusable data.
    """
    from fmrizoo.trainer.export import check_contract, read_info

    for least in (clips, runs):
        if least is not None and least < 1:
            raise DataError(f"at least one clip is needed, got {least}")
    folder = model_folder(run)
    recipe = load_recipe(run / "recipe.yaml")
    model = cast(PretrainingModel | DownstreamModel, load(run))
    backbone = model.backbone
    table = _table(run, recipe, backbone, frames)
    found_contract = table.contract(recipe.data.normalization)
    check_contract(read_info(folder).contract, found_contract, folder, table.store.path)
    if runs is not None:
        table = _some_runs(table, runs)
    return recipe, backbone, _batches(_spread(table, clips) if clips else table, recipe)


def _some_runs(table: ClipTable, runs: int) -> ClipTable:
    """All clips of at most ``runs`` runs, evenly over the table."""
    numbers = np.unique(table.run)
    if len(numbers) <= runs:
        return table
    kept = np.isin(table.run, numbers[np.linspace(0, len(numbers) - 1, runs).round().astype(int)])
    return replace(table, run=table.run[kept], start=table.start[kept])


def _held_out(run: Path, store: Store) -> list[RunInfo]:
    split = Split.load(run / "split.json")
    split.check(store)
    names = split.validation or split.test
    if not names:
        raise DataError(f"the split of {run} holds no run out of the training")
    return [store[name] for name in names]


def _table(run: Path, recipe: Recipe, backbone: Backbone, frames: int | None) -> ClipTable:
    """Clips that do not overlap, as long as the model takes them."""
    runs = _held_out(run, store := open_store(recipe.data))
    shortest = min(r.n_frames for r in runs)
    if backbone.any_length:
        length = (min(frames or shortest, shortest) - 1) // recipe.data.frame_stride + 1
        length -= length % backbone.patch_size[3]
    else:
        length = backbone.clip_grid.t
    if length < 1:
        raise DataError(
            f"{min(frames or shortest, shortest)} frames are less than one patch of "
            f"{backbone.patch_size[3]} every {recipe.data.frame_stride} frames"
        )
    return ClipTable.windows(store, runs, replace(recipe.data, clip_frames=length, clip_stride=1.0))


def _spread(table: ClipTable, clips: int) -> ClipTable:
    """At most ``clips`` clips, evenly over the table (which is in order of runs)."""
    if len(table) <= clips:
        return table
    chosen = np.linspace(0, len(table) - 1, clips).round().astype(np.int64)
    return replace(table, run=table.run[chosen], start=table.start[chosen])


def _batches(table: ClipTable, recipe: Recipe) -> Iterator[Batch]:
    for compact in Loader(table, recipe.data, 1).epoch():
        yield compact.to_batch()


def write_analysis(folder: Path, found: Autocorrelation) -> Path:
    """Write ``folder/analysis.json`` atomically and return its path."""
    path = folder / FILE
    body = {"schema": SCHEMA, "autocorrelation": asdict(found)}
    write_atomic(path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())
    return path


def read_analysis(path: Path) -> Autocorrelation:
    """Read and check one file.

    Raises:
        DataError: not JSON, another schema, or missing, unknown or wrongly typed fields.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            raise DataError(f"{path} is not an analysis of fmrizoo (schema {SCHEMA})")
        return _from_dict(body["autocorrelation"])
    except FmrizooError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a readable analysis: {error}") from None


def _from_dict(values: dict[str, Any]) -> Autocorrelation:
    if missing := {f.name for f in fields(Autocorrelation)} ^ set(values):
        raise ValueError(f"fields {sorted(missing)} are missing or unknown")
    curves = {name: _numbers(values[name]) for name in ("data", "embeddings")}
    if len(curves["data"]) != len(curves["embeddings"]) or not curves["data"]:
        raise ValueError("data and embeddings need one value per lag each")
    window = values["window"]
    return Autocorrelation(
        backbone=str(values["backbone"]),
        window=None if window is None else int(window),
        slots=int(values["slots"]),
        slot_seconds=float(values["slot_seconds"]),
        artefacts=tuple(
            Artefact(
                int(a["period"]),
                float(a["value"]),
                *(None if a[k] is None else float(a[k]) for k in ("low", "high")),
            )
            for a in values["artefacts"]
        ),
        clips=int(values["clips"]),
        runs=int(values["runs"]),
        drawn=str(values["drawn"]),
        **curves,
    )


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)

"""Forecasts of a trained model: as a NIfTI file in the unit of the data, as arrays for the report.

A forecast goes on where a clip of a run ends: ``data.clip_frames`` frames, ``data.frame_stride``
apart, from a first frame on. Its own frames are as far apart.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from fmrizoo import __version__
from fmrizoo.config import DataConfig, Recipe
from fmrizoo.data.batch import CompactBatch, CompactSample, RunDecode
from fmrizoo.data.clips import ClipTable, clip_span
from fmrizoo.data.mixture import open_store
from fmrizoo.data.normalize import loaded_contract, to_source
from fmrizoo.data.spatial import as_image
from fmrizoo.data.splits import Split
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import CheckpointError, DataError, RecipeError
from fmrizoo.files import write_arrays, write_atomic
from fmrizoo.model import PretrainingModel
from fmrizoo.registry import OBJECTIVES
from fmrizoo.types import Batch, Objective
from fmrizoo.zoo import load, load_recipe, model_folder

if TYPE_CHECKING:
    from fmrizoo.trainer.export import ModelInfo

log = logging.getLogger(__name__)

EXAMPLE = "forecast.npz"
_SUFFIXES = (".nii.gz", ".nii")
_NAMED = 8  # runs that a message names


@dataclass(frozen=True)
class Forecast:
    """A forecast that was written.

    Attributes:
        path: The NIfTI file.
        run: The run that it goes on from.
        first: Its first frame, counted in frames of that run.
        frames: Its length.
        seconds: Between two of its frames.
        recorded: How many of its frames were recorded too.
        error, persistence: Mean absolute error over these in the brain, in the unit of the data: of
            the forecast, and of repeating the last frame before it; None if there are none.
    """

    path: Path
    run: str
    first: int
    frames: int
    seconds: float
    recorded: int
    error: float | None
    persistence: float | None


def learns_to_forecast(recipe: Recipe) -> bool:
    """Whether the recipe's objective makes models that can be rolled forward."""
    factory = OBJECTIVES[recipe.objective.name].factory
    return bool(factory.forecast is not Objective.forecast)


def write_forecast(
    folder: Path,
    out: Path,
    *,
    frames: int,
    run: str | None = None,
    start: int = 0,
    overrides: Sequence[str] = (),
) -> Forecast:
    """Roll the model of a pretraining run forward; write ``out`` and a JSON file beside it.

    Args:
        folder: Run folder of a pretraining with an objective that teaches forecasting.
        out: ``.nii`` or ``.nii.gz``; written atomically, over an older one.
        frames: How far.
        run: Whose frames to go on from; None: the first run of the split's test part, or of its
            validation part.
        start: First frame of the clip that the forecast goes on from.
        overrides: ``data.…=…`` in place of what the model was trained with.

    Raises:
        RecipeError: a number of frames or an override that makes no sense, or a model that has not
            learned to forecast.
        CheckpointError: no pretraining run, or data preprocessed in another way.
        DataError: unknown run, a start too near the run's end, or ``out`` cannot be written.
    """
    from fmrizoo.trainer.export import check_contract, read_info

    sidecar = _sidecar_path(out)
    if frames < 1:
        raise RecipeError(f"--frames must be at least 1, got {frames}")
    source = model_folder(folder)
    info = read_info(source)
    recipe = _recipe(info.recipe, overrides, folder)
    store = open_store(recipe.data)
    chosen = store[run] if run else _held_out(folder, store)
    mode = recipe.data.normalization
    check_contract(info.contract, loaded_contract(chosen.contract, mode), source, store.path)
    context = _clip(store, chosen, recipe.data, start)
    model = cast(PretrainingModel, load(folder))
    ahead = model.forecast(context, frames)[0].numpy()
    reader = store.open(chosen)
    inside = to_source(reader, mode, ahead[reader.mask].T)
    volume = np.zeros((*chosen.grid, frames), np.float32)
    volume[reader.mask] = inside.T
    written = _compared(store, chosen, recipe.data, start, out, inside)
    write_atomic(out, _nifti(volume, chosen, written.seconds, out))
    write_atomic(sidecar, _described(written, chosen, recipe, info, start))
    return written


def write_example(out: Path, table: ClipTable, recipe: Recipe) -> None:
    """``forecast.npz`` of a finished pretraining, for the report; nothing if it is there already.

    Normalised ``context``, ``truth`` and ``predicted`` ``(x, y, z, frames)`` of the first run of
    ``table`` that goes on for a clip's length after its first clip (or of the one that goes on
    longest), with ``mask``, ``voxel_size``, ``tr`` and ``run``.
    """
    path = out / EXAMPLE
    if path.is_file() or not learns_to_forecast(recipe):
        return
    known = {info.name: min(_ahead(info, recipe.data, 0), table.clip_frames) for info in table.runs}
    chosen = max(table.runs, key=lambda info: known[info.name])
    frames = known[chosen.name]
    if frames < 1:
        log.info("no run goes on after its first clip: no forecast is drawn")
        return
    context = _clip(table.store, chosen, recipe.data, 0)
    after = _clip(table.store, chosen, recipe.data, _after(recipe.data, 0), frames)
    model = cast(PretrainingModel, load(out))
    write_arrays(
        path,
        context=context.bold[0, 0].numpy(),
        truth=after.bold[0, 0].numpy(),
        predicted=model.forecast(context, frames)[0].numpy(),
        mask=context.mask[0].numpy(),
        voxel_size=np.array(table.contract(recipe.data.normalization).voxel_size),
        tr=np.array(float(context.tr[0])),
        run=np.array(chosen.name),
    )


def _sidecar_path(out: Path) -> Path:
    for suffix in _SUFFIXES:
        if out.name.endswith(suffix) and out.name != suffix:
            return out.with_name(out.name.removesuffix(suffix) + ".json")
    raise RecipeError(f"a forecast is written as .nii.gz or .nii, got {out.name!r}")


def _recipe(values: dict[str, Any], overrides: Sequence[str], folder: Path) -> Recipe:
    """The model's recipe with other data settings; of a model that can be rolled forward."""
    if other := [item for item in overrides if not item.startswith("data.")]:
        raise RecipeError(f"a forecast takes data.* settings only, got {' '.join(other)}")
    recipe = load_recipe(values, overrides)
    if recipe.objective is None:
        raise CheckpointError(
            f"{folder} is no pretraining run (its model has no objective): give the folder of a "
            "pretraining with objective=autoregressive"
        )
    if not learns_to_forecast(recipe):
        raise RecipeError(
            f"the model in {folder} was trained with objective={recipe.objective.name}, which does "
            "not teach it to forecast: give a run with objective=autoregressive"
        )
    return recipe


def _held_out(folder: Path, store: Store) -> RunInfo:
    """The first run that the model was not trained on."""
    names = ", ".join(info.name for info in store.runs[:_NAMED])
    more = " …" if len(store.runs) > _NAMED else ""
    choices = f"choose one with --run: {names}{more}"
    path = folder / "split.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no split.json to pick a held-out run from: {choices}")
    split = Split.load(path)
    split.check(store)
    held_out = split.test or split.validation
    if not held_out:
        raise DataError(f"the split of {folder} holds no run out of the training: {choices}")
    return store[held_out[0]]


def _after(config: DataConfig, start: int) -> int:
    """The run's frame that follows a clip."""
    return start + config.clip_frames * config.frame_stride


def _ahead(info: RunInfo, config: DataConfig, start: int) -> int:
    """Recorded frames after a clip, ``data.frame_stride`` apart."""
    return max(0, -(-(info.n_frames - _after(config, start)) // config.frame_stride))


def _clip(
    store: Store, info: RunInfo, config: DataConfig, start: int, frames: int | None = None
) -> Batch:
    """Frames of a run as a model sees them; ``frames`` None: a clip's length.

    Raises:
        DataError: the run ends before.
    """
    last = info.n_frames - clip_span(config)
    if last < 0:
        raise DataError(
            f"run {info.name} has {info.n_frames} frames, a clip spans {clip_span(config)}: it is "
            "too short to forecast from"
        )
    if frames is None and not 0 <= start <= last:
        raise DataError(
            f"run {info.name} has {info.n_frames} frames: a clip of {config.clip_frames} frames "
            f"(every {config.frame_stride}) can start at frames 0 to {last}, not at {start}"
        )
    reader = store.open(info)
    sample = CompactSample(
        rows=reader.read_compact(start, frames or config.clip_frames, config.frame_stride),
        decode=RunDecode(store.path, reader, config.normalization),
        subject=info.subject,
        run=info.name,
        start=start,
        tr=info.tr * config.frame_stride,
        unit=info.name,
        seed=0,
    )
    return CompactBatch([sample]).to_batch()


def _compared(
    store: Store,
    info: RunInfo,
    config: DataConfig,
    start: int,
    out: Path,
    inside: NDArray[np.float32],
) -> Forecast:
    """The forecast ``(frames, n_vox)`` beside what was recorded, as far as it was."""
    reader, stride = store.open(info), config.frame_stride
    recorded = min(_ahead(info, config, start), len(inside))
    error = persistence = None
    if recorded:
        first = _after(config, start) - stride
        frames = reader.read(first, recorded + 1, stride)[reader.mask].T
        error = float(np.abs(inside[:recorded] - frames[1:]).mean())
        persistence = float(np.abs(frames[:1] - frames[1:]).mean())
    return Forecast(
        path=out,
        run=info.name,
        first=_after(config, start),
        frames=len(inside),
        seconds=info.tr * stride,
        recorded=recorded,
        error=error,
        persistence=persistence,
    )


def _nifti(volume: NDArray[np.float32], info: RunInfo, seconds: float, out: Path) -> bytes:
    """Bytes of the image: the run's place in space, seconds and millimetres in the header."""
    image = as_image(volume, np.array(info.affine))
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms((*image.header.get_zooms()[:3], seconds))
    # 1: the scanner's own, 4: MNI, 2: aligned to something else.
    space = info.contract.space
    code = 1 if space == "native" else 4 if space.startswith("MNI") else 2
    image.set_sform(np.array(info.affine), code)
    image.set_qform(np.array(info.affine), code)
    image.header["descrip"] = b"fmrizoo forecast"
    content = bytes(image.to_bytes())
    return gzip.compress(content, mtime=0) if out.name.endswith(".gz") else content


def _described(
    written: Forecast, run: RunInfo, recipe: Recipe, info: ModelInfo, start: int
) -> bytes:
    """The sidecar: BIDS keys, and from what the forecast was made."""
    values: dict[str, Any] = {
        "Description": "BOLD as forecast by an autoregressive model; not recorded",
        "RepetitionTime": written.seconds,
        "Sources": [written.run],
        "GeneratedBy": [{"Name": "fmrizoo", "Version": __version__}],
        "Model": {
            "Backbone": recipe.backbone.name,
            "Objective": recipe.objective.name,
            "Parameters": info.parameters,
            "Step": info.step,
            "SHA256": info.sha256,
        },
        "SeenInTraining": written.run in info.seen_runs,
        "ContextStartFrame": start,
        "ContextFrames": recipe.data.clip_frames,
        "FrameStride": recipe.data.frame_stride,
        "FirstFrame": written.first,
        "Frames": written.frames,
        "Normalization": recipe.data.normalization,
        "RecordedFrames": written.recorded,
        "MeanAbsoluteError": written.error,
        "MeanAbsoluteErrorOfPersistence": written.persistence,
    }
    if run.key.task:
        values["TaskName"] = run.key.task
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

"""``forecast.npz`` of a pretraining run: what a model expected, and how near it came."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.errors import DataError

FILE = "forecast.npz"
_ARRAYS = ("context", "truth", "predicted", "mask", "voxel_size", "tr", "run")
MODEL, PERSISTENCE, MEAN = "the model", "persistence", "each voxel's mean over the clip"


@dataclass(frozen=True)
class Ahead:
    """What came after a clip, and what a model expected.

    Attributes:
        context: ``(x, y, z, k)`` normalised BOLD of the clip.
        truth, predicted: ``(x, y, z, n)`` after it.
        brain: ``(x, y, z)``.
        voxel_size: Millimetres along x, y, z.
        tr: Seconds between frames.
        run: Name.
    """

    context: NDArray[np.float64]
    truth: NDArray[np.float64]
    predicted: NDArray[np.float64]
    brain: NDArray[np.bool_]
    voxel_size: tuple[float, float, float]
    tr: float
    run: str

    @property
    def seconds(self) -> NDArray[np.float64]:
        """``(n,)`` from the clip's last frame to each frame after it."""
        return self.tr * np.arange(1, self.truth.shape[-1] + 1)

    @property
    def again(self) -> NDArray[np.float64]:
        """Persistence: the clip's last frame, ``(x, y, z, n)``."""
        return np.broadcast_to(self.context[..., -1:], self.truth.shape)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Each voxel's mean over the clip, ``(x, y, z)``."""
        return np.asarray(self.context.mean(-1))


def read_ahead(path: Path) -> Ahead:
    """Read and check one file.

    Raises:
        DataError: not a NumPy archive, an array missing, shapes that do not fit, NaN, no brain.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := [n for n in _ARRAYS if n not in archive]:
                raise DataError(f"{path} lacks the arrays {missing}")
            values: dict[str, NDArray[Any]] = {n: archive[n] for n in _ARRAYS}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a readable NumPy archive: {error}") from None
    context, truth, predicted = (
        values[n].astype(np.float64) for n in ("context", "truth", "predicted")
    )
    brain = values["mask"].astype(bool)
    fits = context.ndim == 4 and truth.shape == predicted.shape and brain.any()
    if not fits or {context.shape[:3], brain.shape} != {truth.shape[:3]} or not truth.shape[-1]:
        shapes = {n: values[n].shape for n in ("context", "truth", "predicted", "mask")}
        raise DataError(f"{path}: arrays must be (x, y, z, t) of one brain, got {shapes}")
    if values["voxel_size"].shape != (3,) or not np.all(values["voxel_size"] > 0):
        raise DataError(f"{path}: voxel_size must be three positive numbers")
    if not all(np.isfinite(v).all() for v in (context, truth, predicted)):
        raise DataError(f"{path}: an array holds NaN or infinity")
    x, y, z = (float(v) for v in values["voxel_size"])
    tr, run = float(values["tr"]), str(values["run"])
    return Ahead(context, truth, predicted, brain, (x, y, z), tr, run)


def errors_ahead(ahead: Ahead) -> dict[str, NDArray[np.float64]]:
    """Mean absolute error over brain voxels at every horizon, ``(n,)``: model and two rivals."""
    guesses = {
        MODEL: ahead.predicted,
        PERSISTENCE: ahead.again,
        MEAN: np.broadcast_to(ahead.mean[..., None], ahead.truth.shape),
    }
    return {
        name: np.abs(values - ahead.truth)[ahead.brain].mean(0) for name, values in guesses.items()
    }


def verdict(ahead: Ahead) -> str:
    """Who is nearer to the recording, the model or persistence, and from which horizon on.

    And whether no forecast at all, each voxel's mean over the clip, would have been nearer still.
    """
    errors = errors_ahead(ahead)
    said = f"On this clip {_who(ahead, errors[MODEL] < errors[PERSISTENCE])}"
    overall = {name: float(e.mean()) for name, e in errors.items()}
    if overall[MEAN] < 0.99 * min(overall[MODEL], overall[PERSISTENCE]):  # less is a tie
        said += "; over all of it, staying at each voxel's mean over the clip is nearer than both"
    return said + "."


def _who(ahead: Ahead, wins: NDArray[np.bool_]) -> str:
    nearer = "the model is nearer to what came than persistence"
    other = "persistence is nearer to what came than the model"
    seconds = [f"{s:g} s" for s in ahead.seconds]
    span = f"from {seconds[0]} to {seconds[-1]} ahead" if len(wins) > 1 else f"{seconds[0]} ahead"
    changes = np.flatnonzero(wins[1:] != wins[:-1]) + 1
    if not len(changes):
        return f"{nearer if wins[0] else other} {span}"
    if len(changes) > 1:
        return f"{nearer} at {int(wins.sum())} of {len(wins)} horizons, in no clear order"
    last, first = seconds[int(changes[0]) - 1], seconds[int(changes[0])]
    if wins[-1]:
        return f"{nearer} from {first} ahead on, and not before"
    return f"{nearer} up to {last} ahead, and not after"

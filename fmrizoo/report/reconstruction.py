"""``reconstruction.npz`` of a pretraining run, and how good its filled-in voxels are."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.errors import DataError

FILE = "reconstruction.npz"
_ARRAYS = ("truth", "predicted", "masked", "mask", "voxel_size", "tr")


@dataclass(frozen=True)
class Picture:
    """One clip as recorded and as the model filled it in.

    Attributes:
        truth, predicted: ``(x, y, z, t)`` normalised BOLD.
        masked: ``(x, y, z, t)`` True = hidden from the model.
        brain: ``(x, y, z)``.
        voxel_size: Millimetres along x, y, z.
        tr: Seconds between frames.
        step: Frames of a step, if each step was predicted from those before it; 0: from all that
            was shown.
        unit: What such a step is: ``time`` (a slot of all the clip) or ``token`` (of one patch).
    """

    truth: NDArray[np.float64]
    predicted: NDArray[np.float64]
    masked: NDArray[np.bool_]
    brain: NDArray[np.bool_]
    voxel_size: tuple[float, float, float]
    tr: float
    step: int = 0
    unit: str = "time"

    @property
    def hidden(self) -> NDArray[np.bool_]:
        """``(x, y, z, t)`` brain voxels that the model did not see."""
        return self.masked & self.brain[..., None]

    @property
    def filled(self) -> NDArray[np.float64]:
        """What was shown, with the hidden voxels filled in."""
        return np.where(self.masked, self.predicted, self.truth)


def read_picture(path: Path) -> Picture:
    """Read and check one file.

    Raises:
        DataError: not a NumPy archive, an array missing, shapes that do not fit, NaN, or a clip
            in which no brain voxel was hidden.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if missing := [n for n in _ARRAYS if n not in archive]:
                raise DataError(f"{path} lacks the arrays {missing}")
            values: dict[str, NDArray[Any]] = {n: archive[n] for n in _ARRAYS}
            step = int(archive["step"]) if "step" in archive else 0
            unit = str(archive["unit"]) if "unit" in archive else "time"
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a readable NumPy archive: {error}") from None
    truth, predicted = (values[n].astype(np.float64) for n in ("truth", "predicted"))
    shapes = {n: values[n].shape for n in ("truth", "predicted", "masked")}
    if truth.ndim != 4 or len(set(shapes.values())) > 1 or values["mask"].shape != truth.shape[:3]:
        raise DataError(f"{path}: arrays must be (x, y, z, t) and mask (x, y, z), got {shapes}")
    if values["voxel_size"].shape != (3,) or not np.all(values["voxel_size"] > 0):
        raise DataError(f"{path}: voxel_size must be three positive numbers")
    if not (np.all(np.isfinite(truth)) and np.all(np.isfinite(predicted))):
        raise DataError(f"{path}: truth or predicted holds NaN or infinity")
    x, y, z = (float(v) for v in values["voxel_size"])
    masked, brain = values["masked"].astype(bool), values["mask"].astype(bool)
    # Nothing comes before the first step: it has no guess without a model to compare with.
    masked[..., :step] = False
    size, tr = (x, y, z), float(values["tr"])
    picture = Picture(truth, predicted, masked, brain, size, tr, step, unit)
    if not picture.hidden.any():
        raise DataError(f"{path}: no brain voxel was hidden, so nothing was filled in")
    return picture


def fill_errors(picture: Picture) -> dict[str, float]:
    """Mean absolute error on hidden brain voxels: the model's, and of fillers without a model.

    Where each step was predicted from those before it:

    - *persistence*: the last frame before the step, again.
    - *each voxel's mean so far*: over the frames before the step.

    Otherwise:

    - *mean of what was shown*: one number, the mean of all visible brain voxels of the clip.
    - *each voxel's own mean*: a voxel's mean over the frames in which it was shown; for voxels
      never shown, the first filler. It is strong wherever voxels differ more than frames do.
    - *interpolation in time*: linear between the frames in which the voxel was shown (its nearest
      shown value beyond them); for voxels never shown, the first filler.
    """
    if picture.step:
        return _errors(picture, {"the model": picture.predicted, **_before(picture)})
    shown = ~picture.masked & picture.brain[..., None]
    everywhere = float(picture.truth[shown].mean()) if shown.any() else 0.0
    count = shown.sum(-1)
    total = np.where(shown, picture.truth, 0.0).sum(-1)
    own = np.divide(total, count, out=np.full(count.shape, everywhere), where=count > 0)
    fillers = {
        "the model": picture.predicted,
        "interpolation in time": _interpolated(picture, shown, everywhere),
        "each voxel's own mean": np.broadcast_to(own[..., None], picture.truth.shape),
        "mean of what was shown": np.full(picture.truth.shape, everywhere),
    }
    return _errors(picture, fillers)


def _errors(picture: Picture, fillers: dict[str, NDArray[Any]]) -> dict[str, float]:
    hidden = picture.hidden
    return {
        name: float(np.abs(values[hidden] - picture.truth[hidden]).mean())
        for name, values in fillers.items()
    }


def _before(picture: Picture) -> dict[str, NDArray[np.float64]]:
    """Guesses from the frames before each step."""
    again, mean = picture.truth.copy(), picture.truth.copy()
    for first in range(picture.step, picture.truth.shape[-1], picture.step):
        here = slice(first, first + picture.step)
        again[..., here] = picture.truth[..., first - 1, None]
        mean[..., here] = picture.truth[..., :first].mean(-1, keepdims=True)
    return {"persistence": again, "each voxel's mean so far": mean}


def _interpolated(
    picture: Picture, shown: NDArray[np.bool_], otherwise: float
) -> NDArray[np.float64]:
    out = np.full(picture.truth.shape, otherwise)
    frames = np.arange(picture.truth.shape[-1])
    for x, y, z in np.argwhere(shown.any(-1)):
        known = np.flatnonzero(shown[x, y, z])
        out[x, y, z] = np.interp(frames, known, picture.truth[x, y, z, known])
    return out

"""Opening one run's files and refusing, in one sentence each, what cannot be used."""

from __future__ import annotations

import logging
import math
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import PrepareConfig
from fmrizoo.data.bids import RunFile
from fmrizoo.data.codec import Array
from fmrizoo.data.spatial import Affine, as_image, check_affine, resample, same_lattice
from fmrizoo.data.store import read_table, records
from fmrizoo.errors import DataError

log = logging.getLogger(__name__)

_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}
_PLAUSIBLE_TR = (0.05, 30.0)  # seconds
_CONSTANT_REFUSED, _CONSTANT_SAID = 0.5, 0.01  # shares of the brain voxels
_TR_TOLERANCE = 1e-3  # seconds: headers hold float32, sidecars are rounded by hand


# What nibabel, gzip and numpy raise on damaged files.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    OverflowError,
    MemoryError,
    KeyError,
    TypeError,
    IndexError,
)
_MAX_RATIO = 1100  # deflate cannot pack better


@dataclass
class LoadedRun:
    """One run in its own voxels: ``bold (x, y, z, t)`` float32 and brain ``mask (x, y, z)``."""

    bold: NDArray[np.float32]
    mask: NDArray[np.bool_]
    affine: Affine
    tr: float


def open_image(path: Path) -> Any:
    """A NIfTI image, its data not yet read.

    Raises:
        DataError: missing or not a NIfTI file.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image = nib.load(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (ImageFileError, HeaderDataError, *_UNREADABLE) as error:
        raise DataError(f"{path} is not a NIfTI file: {_short(error)}") from None
    if not isinstance(image, nib.Nifti1Image):
        raise DataError(f"{path} is a {type(image).__name__}, not a NIfTI file: convert it first")
    return image


def read_values(image: Any, path: Path) -> NDArray[np.float32]:
    """All values as float32.

    Raises:
        DataError: the file is cut off or its compressed data damaged.
    """
    _check_promise(image, path)
    try:
        return np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    except _UNREADABLE as error:
        raise DataError(f"{path} is cut off or damaged: {_short(error)}") from None


def _check_promise(image: Any, path: Path) -> None:
    """Refuse a header that promises more than the file can hold before memory is asked for."""
    needed = math.prod(int(n) for n in image.shape) * image.get_data_dtype().itemsize
    size = path.stat().st_size
    if needed > size * (_MAX_RATIO if path.suffix == ".gz" else 1):
        raise DataError(
            f"{path} is cut off or damaged: its header {image.shape} needs {needed} bytes, the "
            f"file has {size}"
        )


def load_run(run: RunFile, config: PrepareConfig) -> LoadedRun:
    """Read a run with its mask and check both.

    Raises:
        DataError: see the module's sentence for each kind of bad input.
    """
    path = run.path
    image = open_image(path)
    if len(image.shape) == 5 and image.shape[3] == 1:
        raise DataError(f"{path} has shape {image.shape}, a vector image: a BOLD run is 4D")
    if len(image.shape) != 4:
        raise DataError(
            f"{path} is {len(image.shape)}D {image.shape}: a BOLD run is 4D (x, y, z, t)"
        )
    left = image.shape[3] - config.dummy_scans
    if left < 2:
        raise DataError(
            f"{path} has {image.shape[3]} volume(s) and prepare.dummy_scans={config.dummy_scans} "
            f"leaves {max(left, 0)}: a run needs at least 2"
        )
    check_affine(image, path)
    tr = repetition_time(image, run, config)
    # Looked for before the large read, so that a missing mask is said at once.
    made = config.mask in ("compute", "template")
    mask = None if made else _given_mask(image, run, config)
    bold = read_values(image, path)[..., config.dummy_scans :]
    if mask is None:
        _check_signal(bold, np.ones(bold.shape[:3], bool), path)
        make = _template_mask if config.mask == "template" else _computed_mask
        mask = make(bold, image, path)
    _check_signal(bold, mask, path)
    return LoadedRun(bold, mask, np.asarray(image.affine, np.float64), tr)


def _check_signal(bold: NDArray[np.float32], mask: NDArray[np.bool_], path: Path) -> None:
    """Refuse non-finite and constant data; non-finite values outside the brain become 0."""
    finite = np.isfinite(bold)
    if not finite.all():
        bad = ~finite & mask[..., None]
        if bad.any():
            volumes = np.flatnonzero(bad.any((0, 1, 2)))
            raise DataError(
                f"{path} has {int(bad.sum())} NaN or infinite values inside the brain, first in "
                f"volume {volumes[0]}: repair the file or leave the run out"
            )
        log.warning(
            "%s: %d NaN or infinite values outside the brain set to 0", path, (~finite).sum()
        )
        bold[~finite] = 0
    inside = bold[mask]
    if not inside.any():
        raise DataError(f"{path} is zero everywhere in the brain: nothing was recorded or kept")
    if float(inside.max()) == float(inside.min()):
        raise DataError(f"{path} has the one value {inside.flat[0]:g} everywhere in the brain")
    constant = int((inside.max(1) == inside.min(1)).sum())
    share = constant / len(inside)
    if share > _CONSTANT_REFUSED:
        raise DataError(
            f"{path}: {constant} of the {len(inside)} brain voxels never change, so the mask does "
            f"not fit the data: set prepare.mask to the run's own mask"
        )
    if share > _CONSTANT_SAID:
        log.warning("%s: %d of %d brain voxels never change", path, constant, len(inside))


def repetition_time(image: Any, run: RunFile, config: PrepareConfig) -> float:
    """Seconds between volumes, from ``prepare.tr``, else the sidecar, else the header.

    Raises:
        DataError: none is usable, or header and sidecar disagree and ``on_tr_conflict`` is stop.
    """
    header = _header_tr(image)
    low, high = _PLAUSIBLE_TR
    if config.tr is not None:
        if not low <= config.tr <= high:
            raise DataError(f"prepare.tr={config.tr:g} s is not a repetition time ({low}–{high} s)")
        return config.tr
    if run.tr is not None:
        if not low <= run.tr <= high:
            raise DataError(
                f"{run.path}: the sidecar's RepetitionTime {run.tr:g} s is not plausible"
            )
        if header is not None and abs(header - run.tr) > _TR_TOLERANCE:
            _conflict(run, header, config)
        return run.tr
    if header is None:
        raise DataError(f"{run.path} has no sidecar and no TR in its header: set prepare.tr")
    if not low <= header <= high:
        raise DataError(
            f"{run.path}: the header gives a TR of {header:g} s, which is not plausible, and there "
            f"is no sidecar: set prepare.tr"
        )
    return header


def _conflict(run: RunFile, header: float, config: PrepareConfig) -> None:
    said = f"{run.path}: TR is {header:g} s in the header but {run.tr:g} s in the sidecar"
    if config.on_tr_conflict == "stop":
        raise DataError(f"{said}: repair one, or set prepare.on_tr_conflict=sidecar or prepare.tr")
    log.warning("%s; the sidecar is followed", said)


def _header_tr(image: Any) -> float | None:
    value = float(image.header.get_zooms()[3])
    unit = image.header.get_xyzt_units()[1]
    if unit not in _SECONDS:  # hz, ppm, rads: the fourth axis is not time
        return None
    seconds = round(value * _SECONDS[unit], 6)
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def _given_mask(image: Any, run: RunFile, config: PrepareConfig) -> NDArray[np.bool_]:
    path = run.mask if config.mask == "auto" else Path(config.mask)
    if path is None:
        raise DataError(
            f"{run.path} has no brain mask (no *_desc-brain_mask.nii.gz has its entities): "
            f"set prepare.mask=compute (or template, in MNI space), or prepare.mask to a file"
        )
    mask = open_image(path)
    values: Array = read_values(mask, path)
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.shape != image.shape[:3]:
        raise DataError(
            f"mask {path} has grid {values.shape}, {run.path} has {image.shape[:3]}:"
            " give the run's own"
        )
    check_affine(mask, path)
    if not same_lattice(np.asarray(mask.affine), np.asarray(image.affine), image.shape):
        raise DataError(
            f"mask {path} has the grid of {run.path} but lies elsewhere (affines differ): "
            f"resample it to the run"
        )
    if not np.isfinite(values).all():
        raise DataError(f"mask {path} holds NaN or infinite values")
    brain = values > 0.5
    if not brain.any():
        raise DataError(f"mask {path} has no brain voxel")
    return brain


def _template_mask(bold: NDArray[np.float32], image: Any, path: Path) -> NDArray[np.bool_]:
    """nilearn's MNI152 brain where the run recorded something, in the run's voxels."""
    from nilearn.datasets import load_mni152_brain_mask

    template = load_mni152_brain_mask(resolution=2)
    brain = resample(
        np.asarray(template.dataobj) > 0,
        np.asarray(template.affine, np.float64),
        np.asarray(image.affine, np.float64),
        tuple(image.shape[:3]),
        nearest=True,
    )
    if not brain.any():
        raise DataError(
            f"{path}: nothing of the MNI152 brain lies in the image, so it is not in that space: "
            "set prepare.space, or prepare.mask to a file"
        )
    # A field of view may end within the template; NaN stays, to be refused.
    varies = ~(bold.max(3) == bold.min(3))
    if not (brain & varies).any():
        raise DataError(f"{path} never changes inside the MNI152 brain: nothing was recorded there")
    if share := 1 - (brain & varies).sum() / brain.sum():
        log.info("%s: %.1f %% of the template's brain have no signal", path, 100 * share)
    found: NDArray[np.bool_] = brain & varies
    return found


def _computed_mask(bold: NDArray[np.float32], image: Any, path: Path) -> NDArray[np.bool_]:
    from nilearn.exceptions import MaskWarning
    from nilearn.masking import compute_epi_mask

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", MaskWarning)
            found = compute_epi_mask(as_image(bold.mean(3), image.affine))
    except (MaskWarning, ValueError, IndexError) as error:
        raise DataError(
            f"{path}: no brain mask could be computed ({_short(error)}): set prepare.mask to a file"
        ) from None
    brain = np.asarray(found.dataobj) > 0
    if not brain.any():
        raise DataError(f"{path}: the computed mask has no brain voxel: set prepare.mask to a file")
    return brain


def read_events(path: Path | None, dropped: float) -> list[dict[str, str | float]]:
    """Rows of an events file with ``onset`` and ``duration`` in seconds; other columns as text.

    Args:
        path: events.tsv, or None for no events.
        dropped: Seconds of dummy scans to subtract from every onset.

    Raises:
        DataError: no ``onset`` column, or an onset or duration that is no number.
    """
    if path is None:
        return []
    table = read_table(path)
    if "onset" not in table.columns:
        raise DataError(f"{path} has no column 'onset'; it has {list(table.columns)}")
    rows: list[dict[str, str | float]] = []
    for line, record in enumerate(records(table), start=2):
        row: dict[str, str | float] = {k: v for k, v in record.items() if v}
        try:
            onset, duration = float(record["onset"]), float(record.get("duration") or 0)
            if not math.isfinite(onset + duration):
                raise ValueError("not finite")
        except ValueError:
            raise DataError(f"{path} line {line}: onset or duration is not a number") from None
        rows.append({**row, "onset": onset - dropped, "duration": duration})
    return rows


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__

"""One run from NIfTI to encoded frames: load, check, place, clean, measure, encode."""

from __future__ import annotations

import logging
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from fmrizoo.config import PrepareConfig
from fmrizoo.data import qc
from fmrizoo.data.bids import RunFile
from fmrizoo.data.codec import Encoded, encode
from fmrizoo.data.confounds import load_confounds, regress
from fmrizoo.data.legacy import UNKNOWN, digest, load_legacy
from fmrizoo.data.nifti import LoadedRun, load_run, read_events
from fmrizoo.data.spatial import place, voxel_size
from fmrizoo.data.synthetic.source import make, synthetic_fingerprint
from fmrizoo.data.temporal import SAME, resample_time
from fmrizoo.errors import DataError
from fmrizoo.files import sha256_of
from fmrizoo.types import Contract

log = logging.getLogger(__name__)

_FORMAT = 1  # raise when the same settings would give other bytes: runs are then prepared again
_NO_VALUES = ("select", "on_tr_conflict", "qc", "desc")  # settings that change no stored value
_LOST = 0.01  # share of the brain outside the stored grid above which we say so


def settings_of(config: PrepareConfig, layout: str = "nifti") -> dict[str, Any]:
    """The settings that change a run's stored bytes (``select`` only chooses runs)."""
    settings = {k: v for k, v in asdict(config).items() if k not in _NO_VALUES}
    settings.pop("allow_shorter_tr")
    if config.target_tr is None:  # stores of versions without it stay the same
        for unused in ("target_tr", "time_interpolation"):
            settings.pop(unused)
    if config.space == "native":
        for unused in ("grid", "voxel_size", "center"):
            settings.pop(unused)
    if Path(config.mask).is_file():
        settings["mask"] = "file"  # its bytes are in the fingerprint
    for key, value in settings.items():
        if isinstance(value, (list, tuple)):
            settings[key] = [float(v) for v in value]
    if layout != "nifti":
        settings["layout"] = layout
    return {**settings, "format": _FORMAT}


def fingerprint(run: RunFile, config: PrepareConfig) -> dict[str, Any]:
    """What a run is made from: equal fingerprints give equal stored values.

    Raises:
        DataError: a file is missing.
    """
    if run.layout == "synth":
        return synthetic_fingerprint(run, settings_of(config, run.layout))
    if run.layout != "nifti":
        settings = settings_of(config, run.layout)
        return {"sha256": {"bold": digest(run)}, "tr": run.tr, "settings": settings}
    mask = _mask_file(run, config)
    confounds = run.confounds if config.confounds else None
    parts = {"bold": run.path, "mask": mask, "events": run.events, "confounds": confounds}
    sums = {}
    for part, path in parts.items():
        if path is not None and not path.is_file():
            raise DataError(f"{part} file {path} does not exist")
        sums[part] = None if path is None else sha256_of(path)
    return {"sha256": sums, "tr": run.tr, "settings": settings_of(config)}


def _mask_file(run: RunFile, config: PrepareConfig) -> Path | None:
    """The file that the mask is read from; None for those that are made."""
    made = {"auto": run.mask, "compute": None, "template": None}
    return made.get(config.mask, Path(config.mask))


def process(
    run: RunFile, config: PrepareConfig
) -> tuple[dict[str, Any], Encoded, NDArray[np.bool_]]:
    """Metadata, encoded frames and stored-space mask of one run.

    Raises:
        DataError: the run cannot be used (one sentence, file named).
    """
    if run.layout == "synth":
        return _synthetic(run, config)
    known = run.layout == "nifti"
    if known:
        loaded = load_run(run, config)
        mask, affine = place(loaded.mask, loaded.affine, config, nearest=True)
    else:
        loaded = load_legacy(run, config)
        mask, affine = loaded.mask, loaded.affine
    if not mask.any():
        raise DataError(
            f"{run.path}: no brain voxel lies in the stored grid (prepare.grid, voxel_size, center)"
        )
    inside = _share_inside(run.path, loaded, mask, affine)
    bold = _in_brain(loaded, mask, config if known else None)
    if config.confounds:
        n_all = len(bold) + config.dummy_scans
        confounds, kept = load_confounds(run.path, config.confounds, n_all)
        with threadpool_limits(1):  # sums in one order, whatever else the machine does
            bold = regress(bold, confounds[config.dummy_scans :], kept[config.dummy_scans :])
    bold, tr = _in_time(bold, loaded.tr, run.path, config)
    if not np.isfinite(bold).all():
        raise DataError(f"{run.path}: placing it in the stored grid gave non-finite values")
    measures = {
        **qc.motion_measures(run, config.dummy_scans, loaded.bold.shape[3]),
        "inside": inside if known else None,
        "cover": qc.template_cover(mask, config) if known else None,
        "source_axes": qc.axis_codes(loaded.affine) if known else None,
        "source_tr": loaded.tr,
    }
    contract = _contract(config if known else None, mask, affine, tr)
    events = read_events(run.events, config.dummy_scans * loaded.tr)
    encoded, meta = _encoded(run, config, bold, contract, affine, events, measures)
    return meta, encoded, mask


def _synthetic(
    run: RunFile, config: PrepareConfig
) -> tuple[dict[str, Any], Encoded, NDArray[np.bool_]]:
    """:func:`process` of a run that is made now, in the stored grid."""
    made, body = make(run)
    tr = run.tr or 0.0
    measures = {
        **qc.displacement_measures(made.confounds["framewise_displacement"]),
        "inside": 1.0,
        "cover": qc.template_cover(body.mask, config),
        "source_axes": qc.axis_codes(body.affine),
        "source_tr": tr,
    }
    contract = _contract(config, body.mask, body.affine, tr)
    encoded, meta = _encoded(run, config, made.bold, contract, body.affine, made.events, measures)
    return meta, encoded, body.mask


def _encoded(
    run: RunFile,
    config: PrepareConfig,
    bold: NDArray[np.float32],
    contract: Contract,
    affine: NDArray[np.float64],
    events: list[dict[str, Any]],
    measures: qc.Measures,
) -> tuple[Encoded, dict[str, Any]]:
    """The frames as they are stored, and the metadata that goes with them."""
    encoded = encode(bold, config.codec, config.max_error)
    key = asdict(run.key)
    grid = list(contract.grid)
    meta = {
        "name": str(run.key),
        "uuid": uuid.uuid4().hex,
        "key": {**key, "extra": [list(pair) for pair in run.key.extra]},
        "tr": contract.tr,
        "grid": grid,
        "affine": affine.tolist(),
        "contract": {**contract.to_dict(), "grid": grid},
        "events": events,
        "statistics": statistics(bold),
        "source": run.path.name,
        "qc": {**qc.signal_measures(bold), **measures},
    }
    return encoded, meta


def _contract(
    config: PrepareConfig | None, mask: NDArray[np.bool_], affine: NDArray[np.float64], tr: float
) -> Contract:
    """``config`` is None where nothing is known about the space."""
    from fmrizoo import __version__

    return Contract(
        space=config.space if config else UNKNOWN,
        orientation=config.orientation if config else UNKNOWN,
        grid=(mask.shape[0], mask.shape[1], mask.shape[2]),
        voxel_size=voxel_size(affine) if config else (0.0, 0.0, 0.0),
        tr=tr,
        code_version=__version__,
    )


def _in_time(
    bold: NDArray[np.float32], tr: float, path: Path, config: PrepareConfig
) -> tuple[NDArray[np.float32], float]:
    """The frames at ``prepare.target_tr``, and the TR they have then."""
    target = config.target_tr
    if target is None or abs(target - tr) <= SAME:
        return bold, tr
    if target < tr and not config.allow_shorter_tr:
        raise DataError(
            f"{path} has a TR of {tr:g} s, longer than prepare.target_tr={target:g} s: frames "
            f"between those recorded would be made up. Take the longest TR of all runs, or set "
            f"prepare.allow_shorter_tr=true"
        )
    return resample_time(bold, tr, target, config.time_interpolation, path), target


def statistics(bold: NDArray[np.float32]) -> dict[str, float]:
    """mean, std (population), min, max, median, iqr over brain voxels × frames."""
    low, median, high = np.percentile(bold, [25, 50, 75])
    return {
        "mean": float(bold.mean(dtype=np.float64)),
        "std": float(bold.std(dtype=np.float64)),
        "min": float(bold.min()),
        "max": float(bold.max()),
        "median": float(median),
        "iqr": float(high - low),
    }


def _in_brain(
    loaded: LoadedRun, mask: NDArray[np.bool_], config: PrepareConfig | None
) -> NDArray[np.float32]:
    """``(frames, n_vox)`` in the stored grid, a frame block at a time to bound the memory.

    ``config`` is None where frames stay where they are.
    """
    n_frames = loaded.bold.shape[3]
    out = np.empty((n_frames, int(mask.sum())), np.float32)
    for start in range(0, n_frames, 32):
        part = loaded.bold[..., start : start + 32]
        if config is not None:
            part, _ = place(part, loaded.affine, config)
        out[start : start + 32] = part[mask].T
    return out


def _share_inside(
    path: Path, loaded: LoadedRun, mask: NDArray[np.bool_], affine: NDArray[np.float64]
) -> float:
    """Share of the run's brain volume that the stored grid holds."""
    volume = abs(np.linalg.det(loaded.affine[:3, :3])) * loaded.mask.sum()
    kept = abs(np.linalg.det(affine[:3, :3])) * mask.sum()
    if kept < (1 - _LOST) * volume:
        log.warning(
            "%s: %.1f %% of the brain lies outside the stored grid", path, 100 * (1 - kept / volume)
        )
    return float(min(1.0, kept / volume))  # resampling a mask can add a voxel

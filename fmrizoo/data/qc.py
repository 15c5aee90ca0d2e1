"""How good a run is: measures taken while it is prepared, limits, and a table of a whole store.

Bad runs are flagged with a reason, never dropped. All measures but motion, ``inside`` and
``source_axes`` are of the values stored (after confounds are regressed out) and can be taken from a
store as well.

================= ==================================================================================
``tsnr``          median over brain voxels of mean / s.d. over time, no detrending
``fd_mean, _max`` framewise displacement, mm (Power et al. 2012): fMRIPrep's column, or from HCP's
                  Movement_Regressors.txt with a head of 50 mm radius
``dvars, _max``   root mean square of the change from frame to frame, % of the median mean signal:
                  mean and maximum over frames
``spikes``        share of frames whose global signal, without its line, lies more than 5 robust
                  s.d. (1.4826 · MAD) from its median
``dropout``       share of brain voxels with a mean below a fifth of the brain's median mean
``inside``        share of the run's own brain volume inside the stored grid
``cover``         share of nilearn's MNI brain mask inside the run's mask (MNI spaces only)
================= ==================================================================================

A measure that does not apply is None: ``tsnr``, ``dvars`` and ``dropout`` of data without a mean
signal (already demeaned), motion without estimates.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import PrepareConfig, QcConfig
from fmrizoo.data.bids import RunFile
from fmrizoo.data.hcp import read_motion
from fmrizoo.data.spatial import Affine, nibabel_orientations, place
from fmrizoo.data.store import RunInfo, Store, read_table
from fmrizoo.errors import DataError
from fmrizoo.files import write_atomic

_DARK = 0.2  # of the brain's median mean: below it a voxel has lost its signal
_LEAP = 5.0  # robust standard deviations
_HEAD = 50.0  # mm, radius on which rotations become millimetres

Measures = dict[str, Any]  # numbers, None where one does not apply, and source_axes


class Limit(NamedTuple):
    """One quality check: ``QcConfig.setting`` bounds ``measure`` from ``below`` or above."""

    setting: str
    measure: str
    below: bool
    words: str
    scale: float  # for people
    unit: str


LIMITS = (
    Limit("min_tsnr", "tsnr", True, "tSNR", 1, ""),
    Limit("max_fd", "fd_mean", False, "mean framewise displacement", 1, " mm"),
    Limit("max_dvars", "dvars", False, "mean DVARS", 1, " %"),
    Limit("max_spikes", "spikes", False, "frames with a leap of the global signal", 100, " %"),
    Limit("max_dropout", "dropout", False, "dark brain voxels", 100, " %"),
    Limit("min_inside", "inside", True, "brain inside the stored grid", 100, " %"),
    Limit("min_cover", "cover", True, "template covered", 100, " %"),
    Limit("max_quantisation", "quantisation_error", False, "quantisation error", 100, " % of s.d."),
    Limit("min_minutes", "minutes", True, "minutes", 1, ""),
)

COLUMNS = (
    "tsnr", "fd_mean", "fd_max", "dvars", "dvars_max", "spikes", "dropout", "inside", "cover",
    "quantisation_error", "frames", "tr", "minutes", "source_axes",
    "source_tr",
)  # fmt: skip


# --- measures -------------------------------------------------------------------------------------


def signal_measures(bold: NDArray[np.float32]) -> Measures:
    """``tsnr``, ``dvars``, ``dvars_max``, ``spikes``, ``dropout`` of ``bold (frames, n_vox)``."""
    mean = bold.mean(0, dtype=np.float64)
    level = float(np.median(mean))
    std = _std(bold, mean)
    varies = std > 0
    change = np.array([_rms(b - a) for a, b in itertools.pairwise(bold)])
    with_mean = level > 0 and bool(varies.any())
    return {
        "tsnr": float(np.median(mean[varies] / std[varies])) if with_mean else None,
        "dvars": 100 * float(change.mean()) / level if with_mean else None,
        "dvars_max": 100 * float(change.max()) / level if with_mean else None,
        "spikes": _spikes(bold.mean(1, dtype=np.float64)),
        "dropout": float((mean < _DARK * level).mean()) if with_mean else None,
    }


def _std(bold: NDArray[np.float32], mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over time, frame by frame: no second array of the run's size."""
    squared = np.zeros_like(mean)
    for row in bold:
        squared += (row - mean) ** 2
    found: NDArray[np.float64] = np.sqrt(squared / len(bold))
    return found


def _rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def _spikes(signal: NDArray[np.float64]) -> float:
    time = np.arange(len(signal)) - (len(signal) - 1) / 2
    rest = signal - signal.mean() - time * (time @ signal) / (time @ time)
    rest -= np.median(rest)
    spread = 1.4826 * np.median(np.abs(rest))
    # Rounding of a flat signal is no spike.
    least = 1e-6 * max(1.0, float(np.abs(signal).max()))
    return float((np.abs(rest) > max(_LEAP * spread, least)).mean())


def motion_measures(run: RunFile, dummy_scans: int, n_frames: int) -> Measures:
    """``fd_mean`` and ``fd_max`` in mm; None without estimates of the run's motion.

    Raises:
        DataError: estimates that cannot be read or are of another length than the run.
    """
    fd, path = None, run.motion or run.confounds
    if run.motion is not None:
        fd = power_displacement(*read_motion(run.motion))
    elif run.confounds is not None:
        fd = _displacement_column(run.confounds)
    if fd is None:
        return {"fd_mean": None, "fd_max": None}
    if len(fd) != n_frames + dummy_scans:
        raise DataError(
            f"{path} has {len(fd)} rows for the {n_frames + dummy_scans} volumes of {run.path}"
        )
    return displacement_measures(fd[dummy_scans:])


def displacement_measures(fd: NDArray[np.float64]) -> Measures:
    """``fd_mean`` and ``fd_max`` of framewise displacement ``(frames,)`` in mm."""
    fd = fd[np.isfinite(fd)]  # the first volume has no predecessor
    if not len(fd):
        return {"fd_mean": None, "fd_max": None}
    return {"fd_mean": float(fd.mean()), "fd_max": float(fd.max())}


def _displacement_column(path: Path) -> NDArray[np.float64] | None:
    table = read_table(path)
    if "framewise_displacement" not in table.columns:
        return None
    try:
        return np.asarray(table["framewise_displacement"], dtype=np.float64)
    except ValueError:
        raise DataError(
            f"{path}: framewise_displacement holds something else than numbers"
        ) from None


def power_displacement(
    shifts: NDArray[np.float64], radians: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Framewise displacement ``(t,)`` in mm of Power et al. (2012); NaN for the first volume.

    Args:
        shifts: Translations ``(t, 3)``, mm.
        radians: Rotations ``(t, 3)``.
    """
    moved = np.abs(np.diff(shifts, axis=0)).sum(1) + _HEAD * np.abs(np.diff(radians, axis=0)).sum(1)
    return np.concatenate([[np.nan], moved])


def template_cover(mask: NDArray[np.bool_], config: PrepareConfig) -> float | None:
    """Share of the MNI brain (where the stored grid holds it) in ``mask``; None in other spaces."""
    if not config.space.startswith("MNI152"):
        return None
    template = _template(
        tuple(config.grid), tuple(config.voxel_size), tuple(config.center), config.orientation
    )
    size = int(template.sum())
    return float((mask & template).sum() / size) if size else None


@lru_cache(maxsize=2)
def _template(
    grid: tuple[int, ...], voxels: tuple[float, ...], center: tuple[float, ...], orientation: str
) -> NDArray[np.bool_]:
    from nilearn.datasets import load_mni152_brain_mask

    image = load_mni152_brain_mask(resolution=2)
    config = PrepareConfig(
        grid=list(grid), voxel_size=list(voxels), center=list(center), orientation=orientation
    )
    brain = np.asarray(image.dataobj) > 0
    placed, _ = place(brain, np.asarray(image.affine, np.float64), config, nearest=True)
    return np.asarray(placed, bool)


def axis_codes(affine: Affine) -> str:
    """Where the three axes point, such as ``LAS``."""
    return "".join(nibabel_orientations().aff2axcodes(affine))


# --- judgement ------------------------------------------------------------------------------------


def measures_of(entry: Mapping[str, Any]) -> Measures:
    """All measures of an index entry (or the fields of a :class:`RunInfo`), by column."""
    frames, tr = int(entry["n_frames"]), float(entry["tr"])
    return {
        **dict.fromkeys(COLUMNS),
        **entry["qc"],
        "quantisation_error": entry["quantisation_error"],
        "frames": frames,
        "tr": tr,
        "minutes": frames * tr / 60,
    }


def flags(measures: Measures, limits: QcConfig, section: str = "prepare.qc") -> list[str]:
    """One phrase for every limit that the run lies beyond, with both numbers and the setting.

    Args:
        section: Where ``limits`` are set, for the phrase.
    """
    found = []
    for limit in LIMITS:
        bound, value = getattr(limits, limit.setting), measures.get(limit.measure)
        if not bound or value is None or (value >= bound if limit.below else value <= bound):
            continue
        side = "below" if limit.below else "above"
        found.append(
            f"{limit.words} {limit.scale * value:.3g}{limit.unit} is {side} "
            f"{limit.scale * bound:.3g} ({section}.{limit.setting})"
        )
    return found


def unjudged(measures: Measures, limits: QcConfig) -> list[str]:
    """Settings of the limits that are set but say nothing: the run has no such measure."""
    return [
        limit.setting
        for limit in LIMITS
        if getattr(limits, limit.setting) and measures.get(limit.measure) is None
    ]


def _severity(measures: Measures, limits: QcConfig) -> float:
    """How far the run lies beyond its worst limit: 1 within all, 2 at twice (or half) of one."""
    worst = 1.0
    for limit in LIMITS:
        bound, value = getattr(limits, limit.setting), measures.get(limit.measure)
        if not bound or value is None:
            continue
        ratio = (bound / value if value > 0 else math.inf) if limit.below else value / bound
        worst = max(worst, ratio)
    return worst


# --- a whole store --------------------------------------------------------------------------------


@dataclass(frozen=True)
class QcRow:
    """One run of the table.

    Attributes:
        measures: By the names of ``COLUMNS``.
        flags: Why it is flagged; empty if it is not.
        from_store: The run was prepared without measures, so they were taken from the stored
            values; motion, ``inside`` and ``source_axes`` are unknown.
        severity: Of the measure furthest beyond its limit; 1 within all limits.
    """

    run: RunInfo
    measures: Measures
    flags: tuple[str, ...]
    from_store: bool
    severity: float


def assess(
    store: Store,
    limits: QcConfig,
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> list[QcRow]:
    """Every run of the store, the worst first: most flags, furthest beyond a limit, lowest tSNR.

    Args:
        on_progress: Called with (done, total, run).

    Raises:
        CorruptStoreError: a run that has to be measured is damaged.
    """
    rows = []
    for done, run in enumerate(store.runs, start=1):
        known = run.qc or signal_measures(_stored_values(store, run))
        measures = measures_of(
            {
                "qc": known,
                "n_frames": run.n_frames,
                "tr": run.tr,
                "quantisation_error": run.quantisation_error,
            }
        )
        rows.append(
            QcRow(
                run,
                measures,
                tuple(flags(measures, limits)),
                not run.qc,
                _severity(measures, limits),
            )
        )
        if on_progress is not None:
            on_progress(done, len(store.runs), run.name)
    return sorted(rows, key=_order)


def _order(row: QcRow) -> tuple[int, float, float, str]:
    tsnr = row.measures["tsnr"]
    noise = math.inf if tsnr is None else float(tsnr)
    return -len(row.flags), -row.severity, noise, row.run.name


def _stored_values(store: Store, run: RunInfo) -> NDArray[np.float32]:
    reader = store.open(run)
    stored = reader.read_compact(0, reader.n_frames)[:, : reader.n_vox].astype(np.float32)
    stored *= reader.decoder.scale
    stored += reader.decoder.offset
    return stored


def write_table(
    store: Store,
    path: Path,
    limits: QcConfig,
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> list[QcRow]:
    """:func:`assess`, written as a TSV (``n/a`` where a measure does not apply)."""
    rows = assess(store, limits, on_progress=on_progress)
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(["run", "subject", "flags", *COLUMNS, "measured"])
    for row in rows:
        table.writerow(
            [
                row.run.name,
                row.run.subject,
                "; ".join(row.flags) or "n/a",
                *(_cell(row.measures[column]) for column in COLUMNS),
                "from the store" if row.from_store else "while preparing",
            ]
        )
    write_atomic(path, text.getvalue().encode())
    return rows


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.6g}" if isinstance(value, float) else str(value)

"""Regressing fMRIPrep's confounds out of a run; the columns are chosen by nilearn's strategies."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmrizoo.errors import DataError
from fmrizoo.registry import suggest

log = logging.getLogger(__name__)

STRATEGIES = ("simple", "scrubbing", "compcor", "ica_aroma")


def check_strategy(strategy: str) -> None:
    """Raise :class:`DataError` for a strategy that nilearn does not have."""
    if strategy not in STRATEGIES:
        raise DataError(f"prepare.confounds={strategy!r}.{suggest(strategy, list(STRATEGIES))}")


def load_confounds(
    bold: Path, strategy: str, n_frames: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Confounds ``(frames, k)`` and which frames are kept ``(frames,)``, by nilearn's strategy.

    Raises:
        DataError: no confounds beside ``bold``, or of another length.
    """
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nilearn's advice on data without sidecars
            table, sample = load_confounds_strategy(str(bold), denoise_strategy=strategy)
    except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(
            f"{bold}: confounds for strategy {strategy!r} cannot be loaded "
            f"({str(error).strip().splitlines()[0]}); set prepare.confounds=null to leave them in"
        ) from None
    values = np.nan_to_num(np.asarray(table, dtype=np.float64))  # first row of derivatives is n/a
    if len(values) != n_frames:
        raise DataError(f"{bold}: {len(values)} rows of confounds for {n_frames} volumes")
    kept = np.ones(n_frames, bool)
    if sample is not None:
        kept[:] = False
        kept[np.asarray(sample, dtype=int)] = True
    return values, kept


def regress(
    bold: NDArray[np.float32], confounds: NDArray[np.float64], kept: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Residuals of ``bold (frames, n_vox)`` with each voxel's mean put back.

    The fit uses the kept frames. Scrubbed frames are interpolated linearly between their kept
    neighbours: dropping them would make the repetition time uneven.

    Raises:
        DataError: fewer kept frames than confounds allow.
    """
    k = confounds.shape[1]
    if int(kept.sum()) < k + 2:
        raise DataError(
            f"{int(kept.sum())} usable volumes are too few to regress out {k} confounds: choose a "
            f"smaller prepare.confounds strategy"
        )
    design = confounds - confounds[kept].mean(0)
    spread = design[kept].std(0)
    design = design[:, spread > 0] / spread[spread > 0]
    mean = bold[kept].mean(0, dtype=np.float64)
    beta = np.linalg.lstsq(design[kept], bold[kept] - mean, rcond=None)[0]
    clean: NDArray[np.float32] = (bold - design @ beta).astype(np.float32)
    if not kept.all():
        log.warning("%d of %d volumes scrubbed and interpolated", (~kept).sum(), len(kept))
        _interpolate(clean, kept)
    return clean


def _interpolate(bold: NDArray[np.float32], kept: NDArray[np.bool_]) -> None:
    good = np.flatnonzero(kept)
    for t in np.flatnonzero(~kept):
        after = int(np.searchsorted(good, t))
        left, right = good[max(after - 1, 0)], good[min(after, len(good) - 1)]
        share = 0.0 if right == left else (t - left) / (right - left)
        bold[t] = (1 - share) * bold[left] + share * bold[right]

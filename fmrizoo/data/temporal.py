"""Another repetition time: a spline through the frames, low-passed first where frames get fewer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline
from scipy.signal import cheby1, sosfiltfilt

from fmrizoo.errors import DataError

INTERPOLATIONS = {"linear": 1, "cubic": 3}  # degree of the spline
SAME = 1e-3  # seconds: repetition times closer than this are one
_BLOCK = 4096  # voxels at a time: the filter works in float64


def resample_time(
    bold: NDArray[np.float32], tr: float, target: float, interpolation: str, path: Path
) -> NDArray[np.float32]:
    """``bold (frames, n_vox)`` at times 0, target, 2·target … up to the last frame.

    A longer TR halves what can be told apart: first the filter of ``scipy.signal.decimate``
    (Chebyshev I of order 8, ripple 0.05 dB, at 0.8 of the new Nyquist frequency, forward and
    backward) around each voxel's mean, so that nothing folds into slower frequencies.

    Args:
        tr, target: Seconds.
        interpolation: ``linear`` or ``cubic`` (not-a-knot spline).
        path: The run, for messages.

    Raises:
        DataError: too few frames for the filter or the spline, or fewer than 2 left.
    """
    n = len(bold)
    count = int(np.floor((n - 1) * tr / target + 1e-9)) + 1
    sections = cheby1(8, 0.05, 0.8 * tr / target, output="sos") if target > tr else None
    needed = INTERPOLATIONS[interpolation] + 1
    if sections is not None:
        needed = max(needed, 3 * (2 * len(sections) + 1) + 1)  # the filter's edge, both sides
    if n < needed or count < 2:
        raise DataError(
            f"{path}: {n} frames of {tr:g} s are too few to be resampled to prepare.target_tr="
            f"{target:g} s (at least {needed} are needed, and 2 must be left)"
        )
    out = np.empty((count, bold.shape[1]), np.float32)
    old, new = np.arange(n) * tr, np.arange(count) * target
    new[-1] = min(new[-1], old[-1])  # rounding must not look past the last frame
    for start in range(0, bold.shape[1], _BLOCK):
        part = bold[:, start : start + _BLOCK].astype(np.float64)
        if sections is not None:
            mean = part.mean(0)
            part = mean + sosfiltfilt(sections, part - mean, axis=0)
        spline = make_interp_spline(old, part, k=INTERPOLATIONS[interpolation])
        out[:, start : start + _BLOCK] = spline(new)
    return out

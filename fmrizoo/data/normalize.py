"""Normalisation at load: one multiply-add per stored number, ``x = a * stored + b``.

With ``v`` the source's value of a brain voxel and statistics over one run:

================= =============================== ==========================
mode              x                               outside the brain
================= =============================== ==========================
``znorm_minback`` (v − mean) / std                smallest x of the run's brain
``znorm_zeroback`` (v − mean) / std               0
``minmax``        (v − min) / (max − min)         0
``robust``        (v − median) / iqr              0
``voxel``         (v − voxel mean) / voxel std    0 (also where a voxel never changes)
``none``          v                               0
================= =============================== ==========================

mean … iqr are over brain voxels × frames. ``znorm_minback`` is what SwiFT was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import NORMALIZATIONS
from fmrizoo.data.reader import RunReader
from fmrizoo.errors import DataError
from fmrizoo.registry import suggest
from fmrizoo.types import Contract

_WORDS = {
    "znorm_minback": ("run, brain voxels × frames", "run minimum"),
    "znorm_zeroback": ("run, brain voxels × frames", "0"),
    "minmax": ("run, brain voxels × frames", "0"),
    "robust": ("run, brain voxels × frames", "0"),
    "voxel": ("run, each voxel over frames", "0"),
    "none": ("none", "0"),
}


@dataclass(frozen=True)
class VoxelAffine:
    """``x = a * stored + b`` per brain voxel (``(n_vox,)`` float32) and the value elsewhere."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    background: float


def describe(mode: str) -> tuple[str, str]:
    """Words for the contract: over what the statistics are taken, what the background is.

    Raises:
        DataError: unknown mode.
    """
    if mode not in _WORDS:
        raise DataError(f"unknown normalization {mode!r}.{suggest(mode, list(NORMALIZATIONS))}")
    return _WORDS[mode]


def loaded_contract(stored: Contract, mode: str) -> Contract:
    """The contract of clips read from a store whose contract is ``stored``."""
    statistics, background = describe(mode)
    return replace(stored, normalization=mode, statistics=statistics, background=background)


def voxel_affine(reader: RunReader, mode: str) -> VoxelAffine:
    """The multiply-add that decodes and normalises ``reader``'s stored numbers at once.

    Raises:
        DataError: unknown mode, or a run whose spread in that mode is zero.
    """
    shift, spread, background = _shift_and_spread(reader, mode)
    coded, varying = reader.decoder, spread > 0
    inverse = np.divide(1.0, spread, out=np.zeros(reader.n_vox), where=varying)
    # In float64: BOLD means are large against the differences that matter.
    a = coded.scale.astype(np.float64) * inverse
    b = (coded.offset.astype(np.float64) - shift) * inverse
    return VoxelAffine(a.astype(np.float32), b.astype(np.float32), background)


def to_source(
    reader: RunReader, mode: str, values: NDArray[np.floating[Any]]
) -> NDArray[np.float32]:
    """Normalised brain voxels back in the source's unit, as :meth:`RunReader.read` gives them.

    Args:
        reader: The run whose statistics normalised them.
        mode: How.
        values: ``(…, n_vox)``.

    Raises:
        DataError: as :func:`voxel_affine`.
    """
    shift, spread, _ = _shift_and_spread(reader, mode)
    return np.asarray(values * spread + shift, np.float32)


def _shift_and_spread(
    reader: RunReader, mode: str
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]], float]:
    """``x = (v - shift) / spread`` per brain voxel (0 where the spread is 0), and the background.

    Raises:
        DataError: unknown mode, or a run without spread.
    """
    describe(mode)
    if mode == "voxel":
        return reader.decoder.mean, reader.decoder.std, 0.0
    shift, spread, background = _global(reader.statistics, mode)
    if not spread > 0:
        raise DataError(
            f"{reader.path}, run {reader.name}: normalization {mode!r} would divide by "
            f"{spread:g}; choose another data.normalization"
        )
    return np.full(reader.n_vox, shift), np.full(reader.n_vox, spread), background


def _global(s: dict[str, float], mode: str) -> tuple[float, float, float]:
    """(shift, spread, background) of a mode with one shift and spread for the whole run."""
    if mode == "znorm_minback":
        background = (s["min"] - s["mean"]) / s["std"] if s["std"] > 0 else 0.0
        return s["mean"], s["std"], background
    if mode == "znorm_zeroback":
        return s["mean"], s["std"], 0.0
    if mode == "minmax":
        return s["min"], s["max"] - s["min"], 0.0
    if mode == "robust":
        return s["median"], s["iqr"], 0.0
    return 0.0, 1.0, 0.0

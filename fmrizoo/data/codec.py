"""Numbers ↔ bytes of one run: quantisation, mask runs, per-frame CRC-32. No files here.

Four kinds of stored numbers, all read back as ``value = offset + scale * stored``:

``int8``, ``int16``
    Only in-brain voxels, one offset and scale per voxel. A row (frame) is padded with zeros to a
    multiple of 64 bytes, or of a page once it is long enough for that to cost nothing.
``float16``, ``float32``
    Values of one global z-score (one offset and scale per run); the file keeps them dense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.errors import DataError

try:  # same polynomial and results as zlib's, several times faster; a wheel on every Linux
    from isal.isal_zlib import crc32 as crc32
except ImportError:
    from zlib import crc32 as crc32

PAGE = 4096
_LEVELS = {"int8": 127, "int16": 32767}
_CHAIN = {"int8": ("int8", "int16"), "gzip": ("float16", "float32")}
DTYPES = {k: np.dtype(k).newbyteorder("<") for k in ("int8", "int16", "float16", "float32")}

Array = NDArray[Any]


def mask_to_runs(mask: Array) -> NDArray[np.int32]:
    """Brain voxels as ``(r, 2)`` pairs (first voxel, length) in the C order of the grid."""
    flat = np.flatnonzero(np.ascontiguousarray(mask))
    breaks = np.flatnonzero(np.diff(flat) != 1) + 1
    first, last = np.r_[0, breaks], np.r_[breaks, flat.size]
    return np.stack([flat[first], last - first], axis=1).astype(np.int32)


def runs_to_index(runs: Array) -> NDArray[np.int64]:
    """Flat indices ``(n_vox,)`` of the brain voxels; inverse of :func:`mask_to_runs`."""
    start, length = runs[:, 0].astype(np.int64), runs[:, 1].astype(np.int64)
    within = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    return np.repeat(start, length) + within


def row_width(n_vox: int, itemsize: int) -> int:
    """Items in a stored row: padded to whole pages once a row is ≥ 16 pages (≤ 6 % waste)."""
    size = n_vox * itemsize
    step = PAGE if size >= 16 * PAGE else 64
    return -(-size // step) * step // itemsize


def frame_seed(uid: str, run: str, frame: int) -> int:
    """Start value of a frame's CRC-32: makes swapped, zeroed and foreign frames fail too."""
    return crc32(f"{uid}:{run}:{frame}".encode())


def frame_crc(row: Array, seed: int) -> int:
    """CRC-32 of one contiguous frame."""
    return crc32(row, seed)


@dataclass(frozen=True)
class Encoded:
    """One run as it will be stored.

    Attributes:
        kind: ``int8``, ``int16``, ``float16`` or ``float32``.
        rows: ``(frames, row)``: padded for the integer kinds, ``(frames, n_vox)`` for the others.
        arrays: The small per-voxel arrays that decode and describe the rows (see :func:`decode`).
        error: Rms over voxels of (rms quantisation error / temporal s.d.).
    """

    kind: str
    rows: Array
    arrays: dict[str, Array]
    error: float


@dataclass(frozen=True)
class Decoder:
    """``value = offset + scale * stored``; ``mean``/``std`` over time. All ``(n_vox,)`` float32."""

    offset: NDArray[np.float32]
    scale: NDArray[np.float32]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]


def decode(kind: str, arrays: dict[str, Array], n_vox: int) -> Decoder:
    """The per-voxel numbers back from what :func:`encode` put into ``arrays``."""
    if kind in _LEVELS:
        offset, scale = arrays["offset"], arrays["scale"].astype(np.float32)
        return Decoder(offset, scale, offset, scale * arrays["spread"].astype(np.float32))
    offset, scale = (np.broadcast_to(arrays[k], (n_vox,)) for k in ("offset", "scale"))
    return Decoder(offset, scale, arrays["mean"], arrays["std"])


def encode(bold: NDArray[np.float32], codec: str, max_error: float) -> Encoded:
    """Encode in-brain ``bold (frames, n_vox)``, in the wider kind where the narrow is too coarse.

    Args:
        bold: Finite values in the unit of the source.
        codec: ``int8`` or ``gzip``.
        max_error: Largest allowed rms error over temporal s.d.

    Raises:
        DataError: even the wide kind exceeds ``max_error``.
    """
    mean = bold.mean(0, dtype=np.float64).astype(np.float32)
    centred = bold - mean
    std = np.sqrt(np.einsum("tv,tv->v", centred, centred, dtype=np.float64) / len(bold))
    encoded = None
    for kind in _CHAIN[codec]:
        if kind in _LEVELS:
            encoded = _integer(centred, mean, std, kind)
        else:
            encoded = _floating(bold, mean, std, kind)
        if encoded.error <= max_error:
            return encoded
    assert encoded is not None
    raise DataError(
        f"storing as {encoded.kind} has an rms error of {encoded.error:.2g} temporal s.d., above "
        f"prepare.max_error={max_error:g}: raise it (0.02 is the default)"
    )


def _integer(centred: Array, mean: Array, std: Array, kind: str) -> Encoded:
    levels = _LEVELS[kind]
    scale = (np.abs(centred).max(0) / levels).astype(np.float32)
    # A peak below float32's normal range cannot be divided by; such a voxel is constant.
    scale[~(scale > np.finfo(np.float32).tiny)] = 1.0
    if kind == "int8":
        scale = _narrow(scale)
    wide = scale.astype(np.float32)
    width = row_width(centred.shape[1], DTYPES[kind].itemsize)
    rows = np.zeros((len(centred), width), DTYPES[kind])
    squared = np.zeros(centred.shape[1])
    for t, frame in enumerate(centred):
        q = np.clip(np.rint(frame / wide), -levels, levels)
        rows[t, : frame.size] = q
        squared += (q * wide - frame) ** 2
    spread = (std / wide).astype(np.float16)
    arrays = {"offset": mean, "scale": scale, "spread": spread}
    return Encoded(kind, rows, arrays, _relative(squared / len(rows), std))


def _narrow(scale: Array) -> Array:
    """Scales as float16 where that keeps three digits (else float32).

    Frames are quantised with the rounded scale: at most 0.06 of a step is lost at the peak, and a
    short run is 1.5 % smaller. (For int16 the same rounding would be 16 steps.)
    """
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    close = np.abs(half.astype(np.float32) - scale) <= 1e-3 * scale
    return half if close.all() else scale


def _floating(bold: Array, mean: Array, std: Array, kind: str) -> Encoded:
    offset = np.float32(bold.mean(dtype=np.float64))
    scale = np.float32(bold.std(dtype=np.float64)) or np.float32(1)
    rows = ((bold - offset) / scale).astype(DTYPES[kind])
    squared = np.zeros(bold.shape[1])
    for frame, row in zip(bold, rows, strict=True):
        squared += (offset + scale * row.astype(np.float32) - frame) ** 2
    arrays = {
        "offset": np.full(1, offset, np.float32),
        "scale": np.full(1, scale, np.float32),
        "mean": mean,
        "std": std.astype(np.float32),
    }
    return Encoded(kind, rows, arrays, _relative(squared / len(rows), std))


def _relative(mean_squared_error: Array, std: Array) -> float:
    varying = std > 0
    if not varying.any():
        return 0.0
    return float(np.sqrt(np.mean(mean_squared_error[varying] / std[varying] ** 2)))

"""Writing one subject's HDF5 file: runs as groups, ``complete`` last, then published by rename.

Layout of ``sub-XX.h5`` (readable with plain h5py):

======================= ======================== ==================================================
object                  shape, dtype             content
======================= ======================== ==================================================
``/<run>/bold``         (frames, row) int8/16    in-brain voxels in C order, contiguous, unfiltered
(codec ``gzip``)        (frames, x, y, z) float  global z-scores, one gzip chunk a frame
``/<run>/mask_runs``    (r, 2) int32             brain voxels as (first, length) in the flat grid
``/<run>/offset``       (n_vox,) or (1,) float32 ``value = offset + scale * bold``
``/<run>/scale``        (n_vox,) or (1,) float   float16 where that is fine enough
``/<run>/spread``       (n_vox,) float16         temporal s.d. / scale (integer kinds)
``/<run>/mean``, std    (n_vox,) float32         temporal mean, s.d. (codec ``gzip``)
``/<run>/crc32``        (frames,) uint32         of each frame, seeded with uuid, run and frame
``/<run>/meta``         (bytes,) uint8           JSON: key, TR, affine, events, statistics, contract
``/<run>`` @meta_crc32  uint32                   of meta and all small arrays
``/`` @complete         uint8                    1, written last
======================= ======================== ==================================================

No variable-length strings: HDF5 checksums all its metadata except the heap where those live.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from fmrizoo.data.codec import (
    DTYPES,
    PAGE,
    Array,
    Encoded,
    crc32,
    frame_crc,
    frame_seed,
    mask_to_runs,
)
from fmrizoo.data.files import PART, publish
from fmrizoo.errors import DataError

FORMAT = "fmrizoo.bold/1"
SMALL = ("mask_runs", "offset", "scale", "spread", "mean", "std", "crc32")
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def meta_checksum(meta: bytes, arrays: dict[str, Array]) -> int:
    """CRC-32 over the metadata and, in a fixed order, the small arrays that are present."""
    crc = crc32(meta)
    for name in SMALL:
        if name in arrays:
            crc = crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).reshape(-1), crc)
    return crc


def write_error(path: Path, error: OSError) -> DataError:
    """The sentence for a failed write, with the disk-full cases told apart."""
    text = str(error)
    full = error.errno in _FULL or any(f"errno = {code}" in text.lower() for code in _FULL)
    if full:
        return DataError(
            f"{path.parent} is full (or over quota, or over the file size limit): free some "
            f"space and run the same command again; finished subjects are kept"
        )
    return DataError(f"cannot write {path}: {error.strerror or text}")


class SubjectWriter:
    """Context manager that builds ``path`` beside itself and publishes it on a clean exit."""

    def __init__(self, path: Path, subject: str) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}{PART}")
        self.entries: list[dict[str, Any]] = []  # the index entries of the runs written
        self._subject = subject
        self._file: h5py.File | None = None

    def __enter__(self) -> SubjectWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary.unlink(missing_ok=True)
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
        access.set_alignment(4 * PAGE, PAGE)
        name = str(self.temporary).encode()
        try:
            handle = h5py.h5f.create(name, h5py.h5f.ACC_TRUNC, fapl=access)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._file = h5py.File(handle)
        self._file.attrs["schema"] = np.bytes_(FORMAT)
        self._file.attrs["subject"] = np.bytes_(self._subject)
        return self

    def add(self, meta: dict[str, Any], encoded: Encoded, mask: Array) -> None:
        """Write one run. ``meta`` needs ``name``, ``uuid`` and what ``RunInfo`` reads.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        name, rows = meta["name"], encoded.rows
        arrays = {"mask_runs": mask_to_runs(mask), **encoded.arrays}
        dense = encoded.kind.startswith("float")
        outside = float(rows.min()) if dense else 0.0
        meta = {
            **meta,
            "kind": encoded.kind,
            "n_frames": len(rows),
            "n_vox": int(arrays["mask_runs"][:, 1].sum()),
            "row": int(rows.shape[1]),
            "quantisation_error": encoded.error,
        }
        try:
            group = self._open().create_group(name)
            frames = _dense(rows, mask, outside) if dense else rows
            arrays["crc32"] = np.array(
                [
                    frame_crc(np.ascontiguousarray(f), frame_seed(meta["uuid"], name, t))
                    for t, f in enumerate(frames)
                ],
                np.uint32,
            )
            _write_bold(group, frames, encoded.kind, dense)
            self._write_small(group, meta, arrays)
        except (OSError, RuntimeError) as error:
            raise write_error(self.path, OSError(str(error))) from error

    def _write_small(
        self, group: h5py.Group, meta: dict[str, Any], arrays: dict[str, Array]
    ) -> None:
        text = json.dumps(meta, sort_keys=True, allow_nan=False).encode()
        for key, value in arrays.items():
            group.create_dataset(key, data=value)
        group.create_dataset("meta", data=np.frombuffer(text, np.uint8))
        checksum = meta_checksum(text, arrays)
        group.attrs["meta_crc32"] = np.uint32(checksum)
        self.entries.append({**meta, "meta_crc32": checksum})

    def copy(self, source: Path, entry: dict[str, Any]) -> None:
        """Take over a run that an earlier file already holds, byte for byte."""
        try:
            with h5py.File(source, "r", locking=False) as old:
                old.copy(entry["name"], self._open())
        except (OSError, RuntimeError) as error:
            raise write_error(self.path, OSError(str(error))) from error
        self.entries.append({k: v for k, v in entry.items() if k != "file"})

    def _open(self) -> h5py.File:
        if self._file is None:
            raise RuntimeError("SubjectWriter is used outside its with-block")
        return self._file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        file, self._file = self._open(), None
        try:
            if error is None:
                file.attrs["complete"] = np.uint8(1)
            file.close()
            if error is None:
                publish(self.temporary, self.path, read_only=True)
        except (OSError, RuntimeError) as failure:
            if error is None:
                raise write_error(self.path, OSError(str(failure))) from failure
        finally:
            self.temporary.unlink(missing_ok=True)


def _dense(rows: Array, mask: Array, outside: float) -> Array:
    """``(frames, x, y, z)`` with the brain's smallest value outside (costs no bytes)."""
    out = np.full((len(rows), *mask.shape), outside, rows.dtype)
    out[:, mask] = rows
    return out


def _write_bold(group: h5py.Group, frames: Array, kind: str, dense: bool) -> None:
    if dense:
        bold = group.create_dataset(
            "bold",
            data=frames,
            chunks=(1, *frames.shape[1:]),
            compression="gzip",
            compression_opts=1,
        )
        bold.attrs["long_name"] = np.bytes_("BOLD = offset + scale * bold, inside mask_runs")
    else:
        bold = group.create_dataset("bold", data=frames, dtype=DTYPES[kind])
        bold.attrs["long_name"] = np.bytes_("BOLD = offset + scale * bold[:, :n_vox]")

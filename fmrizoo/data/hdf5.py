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
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from fmrizoo.data.codec import (
    PAGE,
    Array,
    Encoded,
    crc32,
    frame_crc,
    frame_seed,
    mask_to_runs,
)
from fmrizoo.errors import DataError
from fmrizoo.files import PART, publish

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
    if error.errno in _FULL:
        return DataError(
            f"{path.parent} is full (or over quota, or over the file size limit): free some "
            f"space and run the same command again; finished subjects are kept"
        )
    return DataError(f"cannot write {path}: {error.strerror or error}")


class Sink:
    """The file that HDF5 writes into, through Python, so that HDF5 never meets a failed write.

    HDF5 crashes the process when the disk fills up while it closes a file. Here the first error
    is kept, whatever follows is dropped, and the writer raises it instead of publishing.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._at = 0
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As in ``io``; only from the start and the end."""
        self._at = offset + (os.fstat(self._descriptor).st_size if whence == os.SEEK_END else 0)
        return self._at

    def tell(self) -> int:
        """Position."""
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        """Fill ``buffer``; what was never written reads as zeros."""
        got = os.preadv(self._descriptor, [buffer], self._at)
        buffer[got:] = bytes(len(buffer) - got)
        self._at += len(buffer)
        return len(buffer)

    def write(self, data: memoryview) -> int:
        """Write all of ``data``, or keep the error and say it was written."""
        done = 0
        try:
            while self.error is None and done < len(data):
                done += os.pwrite(self._descriptor, data[done:], self._at + done)
        except OSError as error:
            self.error = error
        self._at += len(data)
        return len(data)

    def truncate(self, size: int) -> int:
        """Set the length."""
        try:
            if self.error is None:
                os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.error = error
        return size

    def flush(self) -> None:
        """Nothing is held back here; the file is synced before it is published."""

    def close(self) -> None:
        """Release the descriptor."""
        os.close(self._descriptor)


class SubjectWriter:
    """Context manager that builds ``path`` beside itself and publishes it on a clean exit."""

    def __init__(self, path: Path, subject: str) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}{PART}")
        self.entries: list[dict[str, Any]] = []  # the index entries of the runs written
        self._subject = subject
        self._file: h5py.File | None = None
        self._sink: Sink | None = None

    def __enter__(self) -> SubjectWriter:
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
        access.set_alignment(4 * PAGE, PAGE)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = Sink(self.temporary)
        except OSError as error:
            raise write_error(self.path, error) from error
        access.set_fileobj_driver(h5py.h5fd.fileobj_driver, self._sink)
        name = str(self.temporary).encode()
        self._file = h5py.File(h5py.h5f.create(name, h5py.h5f.ACC_TRUNC, fapl=access))
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
        group = self._open().create_group(name)
        bold = _create_bold(group, rows, mask, dense)
        crc = []
        for t, row in enumerate(rows):
            frame = _dense(row, mask, outside) if dense else row
            crc.append(frame_crc(frame, frame_seed(meta["uuid"], name, t)))
            bold[t] = frame
        arrays["crc32"] = np.array(crc, np.uint32)
        self._write_small(group, meta, arrays)
        self._check()

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
        with h5py.File(source, "r", locking=False) as old:
            old.copy(entry["name"], self._open())
        self._check()
        self.entries.append({k: v for k, v in entry.items() if k != "file"})

    def _check(self) -> None:
        """Raise the first write error since the file was opened."""
        if self._sink is not None and self._sink.error is not None:
            raise write_error(self.path, self._sink.error)

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
                self._check()
                publish(self.temporary, self.path, read_only=True)
        except OSError as failure:
            raise write_error(self.path, failure) from failure
        finally:
            if self._sink is not None:
                self._sink.close()
            self.temporary.unlink(missing_ok=True)


def _dense(row: Array, mask: Array, outside: float) -> Array:
    """``(x, y, z)`` with the brain's smallest value outside (costs no bytes)."""
    out = np.full(mask.shape, outside, row.dtype)
    out[mask] = row
    return out


def _create_bold(group: h5py.Group, rows: Array, mask: Array, dense: bool) -> h5py.Dataset:
    if dense:
        bold = group.create_dataset(
            "bold",
            (len(rows), *mask.shape),
            rows.dtype,
            chunks=(1, *mask.shape),
            compression="gzip",
            compression_opts=1,
        )
        bold.attrs["long_name"] = np.bytes_("BOLD = offset + scale * bold, inside mask_runs")
        return bold
    bold = group.create_dataset("bold", rows.shape, rows.dtype)
    bold.attrs["long_name"] = np.bytes_("BOLD = offset + scale * bold[:, :n_vox]")
    return bold

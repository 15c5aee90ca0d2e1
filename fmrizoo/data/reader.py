"""Reading one run: every byte that leaves here has passed its checksum."""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fmrizoo.data.codec import (
    DTYPES,
    Array,
    Decoder,
    decode,
    frame_crc,
    frame_seed,
    runs_to_index,
)
from fmrizoo.data.hdf5 import SMALL, meta_checksum
from fmrizoo.data.inflate import inflate
from fmrizoo.errors import CorruptStoreError, DataError

# What h5py, json and numpy raise on damaged bytes.
_DAMAGE = (
    OSError,
    KeyError,
    ValueError,
    RuntimeError,
    TypeError,
    IndexError,
    MemoryError,
    AttributeError,
    OverflowError,
)
_BLOCK = 8 << 20  # bytes that bad_frames reads at a time


class RunReader:
    """One run of a subject's file. Safe to share between threads; closes when nobody holds it.

    Args:
        path: The subject's file.
        name: The run's group in it.
        uuid, meta_crc32: What the index says they are (None: take the file's word).

    Attributes:
        n_frames, n_vox, grid: Frames, brain voxels, box.
        dtype: Of the stored numbers.
        row: Items in a row of :meth:`read_compact` (``n_vox`` and padding).
        meta: Everything that was stored about the run.
        meta_crc32: Checksum of the metadata and small arrays, as stored (and compared).
        decoder: Per-voxel offset, scale, mean, s.d.

    Raises:
        CorruptStoreError: missing, unfinished, damaged, or another file than the index describes.
    """

    def __init__(
        self, path: Path, name: str, uuid: str | None = None, meta_crc32: int | None = None
    ) -> None:
        self.path, self.name = path, name
        try:
            # Not blocking: a pipe under this name would be waited for without end.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise CorruptStoreError(f"{path} is missing: run prepare again") from None
        except (OSError, ValueError) as error:
            raise self._corrupt(f"cannot be opened ({error})") from error
        # Not an eager close in the store's cache: another thread may still be reading, and the
        # number of a closed descriptor may come back as another subject's file.
        weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise self._corrupt("is not a file")
        try:
            with h5py.File(path, "r", locking=False) as file:
                self._load(file, meta_crc32)
        except CorruptStoreError:
            raise
        except _DAMAGE as error:
            raise self._corrupt(f"cannot be opened ({error})") from error
        if uuid is not None and self.meta["uuid"] != uuid:
            raise self._corrupt("was written after the index: run prepare again")

    def _load(self, file: h5py.File, expected: int | None) -> None:
        if int(file.attrs.get("complete", 0)) != 1:
            raise self._corrupt("was not written to its end")
        group = file[self.name]
        text = bytes(group["meta"][()])
        arrays: dict[str, Array] = {k: group[k][()] for k in SMALL if k in group}
        checksum = meta_checksum(text, arrays)
        stored = int(group.attrs["meta_crc32"])
        if checksum != stored:
            raise self._corrupt("has damaged metadata (checksum differs)")
        if expected is not None and stored != expected:
            raise self._corrupt("was written after the index: run prepare again")
        self.meta_crc32 = stored
        self.meta: dict[str, Any] = json.loads(text)
        self.n_frames, self.n_vox = int(self.meta["n_frames"]), int(self.meta["n_vox"])
        x, y, z = self.meta["grid"]
        self.grid: tuple[int, int, int] = (x, y, z)
        self.kind: str = self.meta["kind"]
        self.dtype = DTYPES[self.kind]
        self.row = int(self.meta["row"])
        self._crc: list[int] = arrays["crc32"].tolist()
        self.mask_runs: NDArray[np.int32] = arrays["mask_runs"]
        self.decoder: Decoder = decode(self.kind, arrays, self.n_vox)
        self._dense = self.kind.startswith("float")
        bold = group["bold"]
        shape = (self.n_frames, *(self.grid if self._dense else (self.row,)))
        if bold.shape != shape or bold.dtype != self.dtype:
            raise self._corrupt(f"holds {bold.dtype} {bold.shape}, not {self.dtype} {shape}")
        self._place(bold)

    def _place(self, bold: h5py.Dataset) -> None:
        """Where the frames lie in the file, so that reading needs no HDF5 (nor its global lock)."""
        if self._dense:
            places: dict[int, tuple[int, int]] = {}

            def note(chunk: Any) -> None:
                if chunk.filter_mask == 0:
                    places[chunk.chunk_offset[0]] = (chunk.byte_offset, chunk.size)

            bold.id.chunk_iter(note)
            self._chunks = [places[t] for t in range(self.n_frames)]
        else:
            self._offset = bold.id.get_offset()
            if self._offset is None:
                raise self._corrupt("has frames that are not contiguous")

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """Flat positions ``(n_vox,)`` of the brain voxels in C order of the grid."""
        return runs_to_index(self.mask_runs)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Brain mask ``(x, y, z)``."""
        mask = np.zeros(self.grid, bool)
        mask.reshape(-1)[self.index] = True
        return mask

    @property
    def statistics(self) -> dict[str, float]:
        """mean, std, min, max, median, iqr of the run over brain voxels × frames."""
        return dict(self.meta["statistics"])

    @cached_property
    def _seeds(self) -> list[int]:
        uid = self.meta["uuid"]
        return [frame_seed(uid, self.name, t) for t in range(self.n_frames)]

    def read_compact(self, start: int, n: int, stride: int = 1, out: Array | None = None) -> Array:
        """Stored numbers of ``n`` frames, ``(n, row)``; brain voxels first, then padding.

        Args:
            start, stride: First frame, and frames from one to the next.
            out: Filled and returned if given: C-contiguous, of the right shape and dtype.

        Raises:
            DataError: frames outside the run.
            CorruptStoreError: a frame that fails its checksum (file, run and frame named).
        """
        if n < 1 or stride < 1 or start < 0 or start + (n - 1) * stride >= self.n_frames:
            raise DataError(
                f"run {self.name} has {self.n_frames} frames: cannot read {n} from frame {start} "
                f"at stride {stride}"
            )
        if out is None:
            out = np.empty((n, self.row), self.dtype)
        elif out.shape != (n, self.row) or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous {self.dtype} {(n, self.row)}")
        frames = range(start, start + n * stride, stride)
        if self._dense:
            for k, t in enumerate(frames):
                self._read_chunk(t, out[k])
            return out
        row_bytes = self.row * self.dtype.itemsize
        if stride == 1:
            self._fill(out, self._offset + start * row_bytes, start)
        else:
            for k, t in enumerate(frames):
                self._fill(out[k], self._offset + t * row_bytes, t)
        for k, t in enumerate(frames):
            if frame_crc(out[k], self._seeds[t]) != self._crc[t]:
                raise self._corrupt(f"frame {t} fails its checksum")
        return out

    def read(self, start: int, n: int, stride: int = 1) -> NDArray[np.float32]:
        """``n`` frames in the source's unit, ``(x, y, z, n)`` float32, 0 outside the brain."""
        stored = self.read_compact(start, n, stride)[:, : self.n_vox]
        out = np.zeros((n, *self.grid), np.float32)
        values = stored.astype(np.float32)
        values *= self.decoder.scale
        values += self.decoder.offset
        out.reshape(n, -1)[:, self.index] = values
        return out.transpose(1, 2, 3, 0)

    def bad_frames(self) -> Iterator[tuple[int, CorruptStoreError]]:
        """Every frame that fails its checksum or is cut off; reads each stored byte once."""
        size = 1 if self._dense else max(1, _BLOCK // (self.row * self.dtype.itemsize))
        for start in range(0, self.n_frames, size):
            n = min(size, self.n_frames - start)
            try:
                self.read_compact(start, n)
            except CorruptStoreError:
                yield from self._bad_among(range(start, start + n))

    def _bad_among(self, frames: range) -> Iterator[tuple[int, CorruptStoreError]]:
        for t in frames:
            try:
                self.read_compact(t, 1)
            except CorruptStoreError as error:
                yield t, error

    def _read_chunk(self, frame: int, out: Array) -> None:
        place, size = self._chunks[frame]
        packed = np.empty(size, np.uint8)
        self._fill(packed, place, frame)
        try:
            plain = inflate(packed.data, math.prod(self.grid) * self.dtype.itemsize)
        except ValueError as error:
            raise self._corrupt(f"frame {frame} cannot be decompressed ({error})") from None
        if frame_crc(np.frombuffer(plain, np.uint8), self._seeds[frame]) != self._crc[frame]:
            raise self._corrupt(f"frame {frame} fails its checksum")
        # Clipping spares a copy; the index cannot point outside, it passed a checksum.
        np.take(np.frombuffer(plain, self.dtype), self.index, out=out, mode="clip")

    def _fill(self, out: Array, place: int, frame: int) -> None:
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._descriptor, [view[done:]], place + done)
            except OSError as error:
                raise self._corrupt(f"frame {frame} cannot be read ({error.strerror})") from error
            if got == 0:
                raise self._corrupt(f"frame {frame} is cut off (the file ends before it)")
            done += got

    def _corrupt(self, what: str) -> CorruptStoreError:
        return CorruptStoreError(f"{self.path}, run {self.name}: {what}")

"""Other ways to keep 4-D fMRI on disk: how each is written, and how a window is read from it.

Every layout holds the same windows as dense float16 z-scores ``(frames, x, y, z)`` (``nii.gz``: the
scanner's int16 ``(x, y, z, frames)``). A reader is a map-style data set over ``windows``, a list of
(run, first frame); it opens its files once per process and keeps them open, the best that its
format allows.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import torch
from torch.utils.data import Dataset

from recordings import GRID, WINDOW

Windows = list[tuple[int, int]]


def z_scores(bold: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``(frames, x, y, z)`` float16 z-scores of ``bold (frames, n_vox)``, minimum outside."""
    z = (bold - bold.mean()) / bold.std()
    out = np.full((len(bold), *GRID), z.min(), np.float16)
    out[:, mask] = z
    return out


class Layout(Dataset[torch.Tensor]):
    """Windows of one layout below ``folder``.

    Class attributes:
        name: In the table.
        workers: Numbers of ``DataLoader`` workers to run it with; None: no DataLoader at all.
        needs: A package beyond fmrizoo's own.
    """

    name = ""
    workers: tuple[int | None, ...] = (None,)
    needs = ""

    def __init__(self, folder: Path, windows: Windows) -> None:
        self.folder, self.windows = folder, windows
        self._open: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> torch.Tensor:
        run, start = self.windows[i]
        key = (os.getpid(), run)  # handles do not survive a fork
        if key not in self._open:
            self._open[key] = self.open(run)
        return self.read(self._open[key], start)

    @classmethod
    def write(
        cls,
        folder: Path,
        scores: list[np.ndarray],
        recordings: list[np.ndarray],
        mask: np.ndarray,
        windows: Windows,
    ) -> None:
        """Write all runs.

        Args:
            scores: :func:`z_scores` of each run.
            recordings: ``(frames, n_vox)`` of each run in the scanner's unit.
            mask: The brain.
            windows: What will be read, for layouts that must know.
        """
        folder.mkdir(parents=True)
        for run, frames in enumerate(scores):
            cls.write_run(folder, run, frames)

    @classmethod
    def write_run(cls, folder: Path, run: int, frames: np.ndarray) -> None:
        """Write one run of ``frames (t, x, y, z)``."""
        raise NotImplementedError(cls.__name__)

    def stream(self) -> Iterator[torch.Tensor]:
        """All windows, read directly."""
        return (self[i] for i in range(len(self)))

    def open(self, run: int) -> Any:
        """What :meth:`read` needs of a run."""
        raise NotImplementedError(type(self).__name__)

    def read(self, source: Any, start: int) -> torch.Tensor:
        """``WINDOW`` frames from ``start``."""
        raise NotImplementedError(type(self).__name__)


class Pt(Layout):
    """SwiFT's way: one ``frame_N.pt (x, y, z, 1)`` per volume, concatenated on the last axis."""

    name, workers = "per-frame .pt", (0, 2)

    @classmethod
    def write_run(cls, folder: Path, run: int, frames: np.ndarray) -> None:
        (folder / str(run)).mkdir()
        for t, frame in enumerate(frames):
            # A copy: of a view, torch.save would write the whole run.
            tensor = torch.from_numpy(frame.copy()).unsqueeze(-1)
            torch.save(tensor, folder / str(run) / f"frame_{t}.pt")

    def open(self, run: int) -> Path:
        return self.folder / str(run)

    def read(self, source: Path, start: int) -> torch.Tensor:
        frames = range(start, start + WINDOW)
        return torch.cat([torch.load(source / f"frame_{t}.pt") for t in frames], dim=-1)


class Gzip(Layout):
    """h5py, gzip 4, a chunk is a frame: the best chunk for windows."""

    name, workers = "HDF5 gzip-4, 1 frame a chunk", (0, 2)
    chunks: Any = (1, *GRID)

    @classmethod
    def write_run(cls, folder: Path, run: int, frames: np.ndarray) -> None:
        with h5py.File(folder / f"{run}.h5", "w") as file:
            file.create_dataset("bold", data=frames, compression="gzip", chunks=cls.chunks)

    def open(self, run: int) -> h5py.Dataset:
        # No chunk cache: with many subjects it never hits, with two it would hide the work.
        return h5py.File(self.folder / f"{run}.h5", "r", rdcc_nbytes=0)["bold"]

    def read(self, source: h5py.Dataset, start: int) -> torch.Tensor:
        return torch.from_numpy(source[start : start + WINDOW])


class GzipAuto(Gzip):
    """h5py with ``compression="gzip"`` alone, which chooses chunks of its own."""

    name, chunks = "HDF5 gzip-4, automatic chunks", True


class Memmap(Layout):
    """Raw float16, mapped into memory; a window is copied out."""

    name = "dense fp16 memmap"

    @classmethod
    def write_run(cls, folder: Path, run: int, frames: np.ndarray) -> None:
        frames.tofile(folder / f"{run}.bin")

    def open(self, run: int) -> np.ndarray:
        flat = np.memmap(self.folder / f"{run}.bin", np.float16, "r")
        return flat.reshape(-1, *GRID)

    def read(self, source: np.ndarray, start: int) -> torch.Tensor:
        return torch.from_numpy(np.array(source[start : start + WINDOW]))


class Zarr(Layout):
    """zarr v3: its default codec (zstd), a chunk is a frame, one shard a run."""

    name, needs, compressors = "zarr v3 zstd, sharded", "zarr", "auto"

    @classmethod
    def write_run(cls, folder: Path, run: int, frames: np.ndarray) -> None:
        import zarr

        array = zarr.create_array(
            store=folder / f"{run}.zarr",
            shape=frames.shape,
            dtype=frames.dtype,
            chunks=(1, *GRID),
            shards=frames.shape,
            compressors=cls.compressors,
        )
        array[:] = frames

    def open(self, run: int) -> Any:
        import zarr

        return zarr.open_array(self.folder / f"{run}.zarr", mode="r")

    def read(self, source: Any, start: int) -> torch.Tensor:
        return torch.from_numpy(source[start : start + WINDOW])


class ZarrPlain(Zarr):
    """zarr v3 without a compressor."""

    name, compressors = "zarr v3 uncompressed, sharded", None


class Nifti(Layout):
    """``.nii.gz`` through nibabel: everything before the window is inflated, too."""

    name = "nii.gz int16, nibabel"

    @classmethod
    def write(
        cls,
        folder: Path,
        scores: list[np.ndarray],
        recordings: list[np.ndarray],
        mask: np.ndarray,
        windows: Windows,
    ) -> None:
        folder.mkdir(parents=True)
        for run, bold in enumerate(recordings):
            frames = np.zeros((*GRID, len(bold)), np.int16)
            frames[mask] = bold.T
            image = nibabel.Nifti1Image(frames, np.diag([2, 2, 2, 1]))
            nibabel.save(image, folder / f"{run}.nii.gz")

    def open(self, run: int) -> Any:
        return nibabel.load(self.folder / f"{run}.nii.gz").dataobj

    def read(self, source: Any, start: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(source[..., start : start + WINDOW]))


class WebDataset(Layout):
    """A tar of windows that were cut beforehand, streamed in the tar's order.

    Random starts are not possible: each start would have to be stored as a sample of its own, or
    whole runs be read to throw most of them away.
    """

    name, needs = "webdataset, pre-cut windows", "webdataset"

    @classmethod
    def write(
        cls,
        folder: Path,
        scores: list[np.ndarray],
        recordings: list[np.ndarray],
        mask: np.ndarray,
        windows: Windows,
    ) -> None:
        import webdataset

        folder.mkdir(parents=True)
        with webdataset.TarWriter(str(folder / "windows.tar")) as tar:
            for number, (run, start) in enumerate(windows):
                window = scores[run][start : start + WINDOW]
                tar.write({"__key__": f"{number:06d}", "npy": window})

    def stream(self) -> Iterator[torch.Tensor]:
        import webdataset

        shards = webdataset.WebDataset(str(self.folder / "windows.tar"), shardshuffle=False)
        samples = itertools.islice(shards.decode(), len(self))
        return (torch.from_numpy(sample["npy"]) for sample in samples)


ALL = (Pt, Gzip, GzipAuto, Memmap, Zarr, ZarrPlain, Nifti, WebDataset)

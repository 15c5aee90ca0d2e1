"""Normalised frames of a store as plain matrices ``(frames, voxels)``, without a dense volume.

All runs are brought to the brain voxels that the *training* runs share, so that a feature means
the same voxel everywhere and test runs have no say in which voxels count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from fmrizoo.data.normalize import VoxelAffine, voxel_affine
from fmrizoo.data.reader import RunReader
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError

Frames = NDArray[np.float32]


@dataclass(frozen=True)
class _Columns:
    """Where the shared voxels are among one run's own."""

    run: str
    reader: RunReader
    affine: VoxelAffine
    place: NDArray[np.int64]
    inside: NDArray[np.bool_]


class FrameReader:
    """Reads frames of any run on the voxels that the training runs share.

    Args:
        store: A prepared store.
        train_runs: Names of the runs whose masks define the voxels.
        normalization: Mode of :mod:`fmrizoo.data.normalize`.

    Attributes:
        mask: ``(x, y, z)`` the shared voxels; columns of every matrix are in its C order.

    Raises:
        DataError: training runs with different grids or without a shared brain voxel.
    """

    def __init__(self, store: Store, train_runs: Sequence[str], normalization: str) -> None:
        if not train_runs:
            raise DataError("the split has no training run: baselines have nothing to learn from")
        self._store, self._mode = store, normalization
        self._last: _Columns | None = None
        self.grid = store[train_runs[0]].grid
        indices = [self._open(name).index for name in train_runs]
        self._index: NDArray[np.int64] = reduce(np.intersect1d, indices)
        if not self._index.size:
            raise DataError(
                f"the {len(train_runs)} training runs share no brain voxel: baselines need runs in "
                "one space (prepare with a common space, or select one subject)"
            )
        self.mask = np.zeros(self.grid, bool)
        self.mask.reshape(-1)[self._index] = True

    def _open(self, run: str) -> RunReader:
        reader = self._store.open(run)
        if reader.grid != self.grid:
            raise DataError(
                f"run {run} has grid {reader.grid}, the training runs have {self.grid}: "
                "pick one kind with data.select"
            )
        return reader

    def _column(self, run: str) -> _Columns:
        # Clips come run by run, so remembering the last one is enough.
        if self._last is None or self._last.run != run:
            reader = self._open(run)
            place = np.searchsorted(reader.index, self._index)
            place[place == reader.n_vox] = 0
            inside = reader.index[place] == self._index
            self._last = _Columns(run, reader, voxel_affine(reader, self._mode), place, inside)
        return self._last

    def read(self, run: str, start: int, n: int, stride: int = 1) -> Frames:
        """``n`` frames from ``start`` on, ``(n, v)``; background where the run has no brain."""
        c = self._column(run)
        stored = c.reader.read_compact(start, n, stride)
        values = stored[:, c.place] * c.affine.a[c.place] + c.affine.b[c.place]
        return np.where(c.inside, values, np.float32(c.affine.background))

    def sample(self, runs: Sequence[str], at_most: int) -> Frames:
        """All frames of ``runs``, or ``at_most`` of them at even distances, ``(n, v)``."""
        total = sum(self._store[name].n_frames for name in runs)
        step = -(-total // at_most)
        parts = [self.read(r, 0, -(-self._store[r].n_frames // step), step) for r in runs]
        return np.concatenate(parts)

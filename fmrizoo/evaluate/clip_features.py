"""From labelled clips of a store to the baselines' feature matrices."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.batch import ClipFacts
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import ClipDataset
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError
from fmrizoo.evaluate.features import (
    MAX_TANGENT,
    MIN_FRAMES,
    MIN_PARCELS,
    Tangent,
    Whitening,
    connectivity,
    fit_whitening,
    parcels,
)
from fmrizoo.evaluate.frames import FrameReader
from fmrizoo.evaluate.linear import Part
from fmrizoo.types import TaskSpec

log = logging.getLogger(__name__)

Array = NDArray[np.float64]
# Voxels × frames that whitening is fitted on at most (0.8 GB in float32).
MAX_CELLS = 200_000_000


def read_clips(store: Store, runs: Sequence[str], data: DataConfig, task: TaskConfig) -> ClipTable:
    """The labelled clips of ``runs`` (names); no voxel is read."""
    return ClipTable.labelled(store, [store[name] for name in runs], data, task)


@dataclass(frozen=True)
class LabelledClips:
    """Clips with targets, and per feature name the matrix and the clips that its rows stand for.

    Attributes:
        targets: ``(n, targets)``, NaN = missing.
    """

    clips: tuple[ClipFacts, ...]
    targets: Array
    features: dict[str, Array]
    rows: dict[str, NDArray[np.int64]]

    def target(self, k: int) -> LabelledClips:
        """Only the clips that have the ``k``-th target, and only that target."""
        known = np.isfinite(self.targets[:, k])
        place = np.cumsum(known) - 1
        kept = {name: known[rows] for name, rows in self.rows.items()}
        return LabelledClips(
            tuple(c for c, keep in zip(self.clips, known, strict=True) if keep),
            self.targets[known][:, k : k + 1],
            {name: x[kept[name]] for name, x in self.features.items()},
            {name: place[rows[kept[name]]] for name, rows in self.rows.items()},
        )

    def with_feature(self, name: str, x: Array, rows: NDArray[np.int64]) -> LabelledClips:
        """The same with one feature more."""
        return LabelledClips(
            self.clips, self.targets, {**self.features, name: x}, {**self.rows, name: rows}
        )

    def part(self, name: str) -> Part:
        """Features and the (only) target for fitting."""
        return Part(self.features[name], self.targets[self.rows[name], 0])

    def unit_targets(self) -> Array:
        """The (only) target, once per unit."""
        units = {c.unit: y for c, y in zip(self.clips, self.targets[:, 0], strict=True)}
        return np.array(list(units.values()))


@dataclass(frozen=True)
class Maker:
    """Turns clips into features; everything in it was fitted without labels on training runs.

    Attributes:
        absent: Feature name → why it does not apply.
    """

    frames: FrameReader
    data: DataConfig
    weights: Array
    whitening: Whitening | None
    whole_run: bool
    store: Store
    train: tuple[str, ...]
    absent: dict[str, str] = field(default_factory=dict)
    tangent: Tangent = field(default_factory=Tangent)

    @classmethod
    def fit(
        cls, store: Store, train: Sequence[str], data: DataConfig, task: TaskConfig, *, seed: int
    ) -> Maker:
        """Parcels and principal components from the training runs."""
        frames = FrameReader(store, train, data.normalization)
        weights = parcels(frames.mask)
        traits = task.source == "participants"
        absent, whitening = {}, None
        if traits and data.normalization == "voxel":
            why = "data.normalization=voxel sets every voxel's mean over a run to 0"
            absent = dict.fromkeys(("voxels", "components", "parcels"), why)
        else:
            sample = frames.sample(train, max(2, MAX_CELLS // int(frames.mask.sum())))
            whitening = fit_whitening(sample, seed)
        if not traits and data.clip_frames < MIN_FRAMES:
            absent["connectivity"] = (
                f"clips of {data.clip_frames} frames are too short for correlations "
                f"(at least {MIN_FRAMES})"
            )
        elif len(weights) < MIN_PARCELS:
            absent["connectivity"] = f"the brain makes only {len(weights)} parcels"
        if "connectivity" in absent:
            absent["tangent"] = absent["connectivity"]
        return cls(frames, data, weights, whitening, traits, store, tuple(train), absent)

    def make(
        self, table: ClipTable, tasks: Sequence[TaskSpec], *, learn: bool = False
    ) -> LabelledClips:
        """Read the clips and compute every feature that applies.

        Args:
            table: One part of the split.
            tasks: From the training part.
            learn: This is the training part: fit the tangent space on its series.

        Raises:
            DataError: a class that the training runs lack.
        """
        facts = ClipDataset(table, self.data, tasks).facts
        clips = [facts(i) for i in range(len(table))]
        targets = np.array([c.targets for c in clips], dtype=np.float64)
        every = np.arange(len(clips))
        means, series = [], []
        wanted = "connectivity" not in self.absent
        for c in clips:
            x = self.frames.read(c.run, c.start, self.data.clip_frames, self.data.frame_stride)
            means.append(x.mean(0))
            if wanted and not self.whole_run:
                series.append(self.weights @ x.T)
        features, rows = {}, {}
        if self.whitening is not None:
            mean = np.stack(means).astype(np.float64)
            features["voxels"] = mean
            features["components"] = self.whitening(mean)
            features["parcels"] = mean @ self.weights.T
            rows = dict.fromkeys(features, every)
        if wanted:
            first = first_of_runs(clips)
            if self.whole_run:
                series = [self._run_series(clips[i].run) for i in first.tolist()]
            own = first if self.whole_run else every
            features["connectivity"] = np.concatenate([connectivity(x[None]) for x in series])
            rows["connectivity"] = own
            tangent = self._tangent(series, learn)
            if tangent is not None:
                features["tangent"], rows["tangent"] = tangent, own
        return LabelledClips(tuple(clips), targets, features, rows)

    def _tangent(self, series: Sequence[Array], learn: bool) -> Array | None:
        """None where it does not apply, with the reason in ``absent``."""
        if "tangent" in self.absent:
            return None
        try:
            if learn and self.whole_run:  # all of them, also without a label: as for whitening
                step = -(-len(self.train) // MAX_TANGENT)
                self.tangent.fit([self._run_series(run) for run in self.train[::step]])
            elif learn:
                self.tangent.fit(series)
            return self.tangent(series)
        except ValueError as error:
            if not learn:
                raise DataError(f"a clip's covariance has no tangent: {error}") from None
            self.absent["tangent"] = f"the training covariances have no geometric mean: {error}"
            return None

    def _run_series(self, run: str) -> Array:
        """``(p, t)`` of a whole run."""
        n = self.store[run].n_frames
        blocks = [
            self.weights @ self.frames.read(run, start, min(64, n - start)).T
            for start in range(0, n, 64)
        ]
        return np.concatenate(blocks, axis=1)


def first_of_runs(clips: Sequence[ClipFacts]) -> NDArray[np.int64]:
    """Index of the first clip of each run."""
    first = np.unique([c.run for c in clips], return_index=True)[1]
    return np.sort(first).astype(np.int64)

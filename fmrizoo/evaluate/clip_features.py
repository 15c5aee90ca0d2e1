"""From labelled clips of a store to the baselines' feature matrices."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError
from fmrizoo.evaluate.features import (
    MIN_FRAMES,
    MIN_PARCELS,
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


@dataclass(frozen=True)
class Clip:
    """One labelled clip: where it starts, which unit it belongs to, and that unit's label."""

    run: str
    subject: str
    start: int
    unit: str
    label: str | float


def read_clips(store: Store, runs: Sequence[str], data: DataConfig, task: TaskConfig) -> list[Clip]:
    """The labelled clips of ``runs`` (names), in the order of the data room's table."""
    table = ClipTable.labelled(store, [store[name] for name in runs], data, task)
    owners = [table.runs[i] for i in table.run]
    rows = zip(owners, table.start.tolist(), table.labels or (), strict=True)
    return [
        Clip(run.name, run.subject, start, table.unit(i), label)
        for i, (run, start, label) in enumerate(rows)
    ]


def task_spec(kind: str, labels: Sequence[str | float]) -> TaskSpec:
    """Classes (sorted) or mean and s.d., from the training clips' labels only."""
    if kind == "classification":
        return TaskSpec(kind, tuple(sorted({str(label) for label in labels})))
    values = np.array(labels, dtype=np.float64)
    return TaskSpec(kind, mean=float(values.mean()), std=float(values.std()))


@dataclass(frozen=True)
class LabelledClips:
    """Clips with targets, and per feature name the matrix and the clips that its rows stand for."""

    clips: tuple[Clip, ...]
    targets: Array
    features: dict[str, Array]
    rows: dict[str, NDArray[np.int64]]

    def part(self, name: str) -> Part:
        """Features and targets for fitting."""
        return Part(self.features[name], self.targets[self.rows[name]])

    def unit_targets(self) -> Array:
        """One target per unit."""
        units = {c.unit: y for c, y in zip(self.clips, self.targets, strict=True)}
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
    absent: dict[str, str] = field(default_factory=dict)

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
        return cls(frames, data, weights, whitening, traits, store, absent)

    def make(self, clips: Sequence[Clip], spec: TaskSpec) -> LabelledClips:
        """Read the clips and compute every feature that applies.

        Raises:
            DataError: no clip, or a class that the training runs lack.
        """
        if not clips:
            raise DataError("a part of the split has no labelled clip")
        targets = np.array([_target(c, spec) for c in clips])
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
            first = _first_of_runs(clips)
            rows["connectivity"] = first if self.whole_run else every
            features["connectivity"] = (
                np.concatenate([self._run_connectivity(clips[i].run) for i in first.tolist()])
                if self.whole_run
                else connectivity(np.stack(series))
            )
        return LabelledClips(tuple(clips), targets, features, rows)

    def _run_connectivity(self, run: str) -> Array:
        n = self.store[run].n_frames
        blocks = [
            self.weights @ self.frames.read(run, start, min(64, n - start)).T
            for start in range(0, n, 64)
        ]
        return connectivity(np.concatenate(blocks, axis=1)[None])


def _first_of_runs(clips: Sequence[Clip]) -> NDArray[np.int64]:
    """Index of the first clip of each run."""
    first = np.unique([c.run for c in clips], return_index=True)[1]
    return np.sort(first).astype(np.int64)


def _target(clip: Clip, spec: TaskSpec) -> float:
    if spec.kind == "regression":
        return float(clip.label)
    if str(clip.label) not in spec.classes:
        raise DataError(
            f"{clip.unit} has class {clip.label!r}, which no training run holds: "
            f"{list(spec.classes)}; use fewer folds or another split.by"
        )
    return float(spec.classes.index(str(clip.label)))

"""Which clips exist: a table of (run, first frame[, label]), made from the index alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.normalize import loaded_contract
from fmrizoo.data.store import RunInfo, Store, common_contract
from fmrizoo.errors import DataError
from fmrizoo.registry import suggest
from fmrizoo.types import Contract, Grid

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

Label = str | float


@dataclass(frozen=True, eq=False)
class ClipTable:
    """Clips of several runs of one store.

    Attributes:
        store: Where the runs are.
        runs: The runs that ``run`` points into.
        run, start: ``(n,)`` run number and first frame of each clip.
        clip_frames, frame_stride: Frames in a clip, and run frames from one to the next.
        labels: ``n`` class names or values; None without a task.
        units: ``n`` names of what predictions are averaged over; None: the run's name.
    """

    store: Store
    runs: tuple[RunInfo, ...]
    run: NDArray[np.int32]
    start: NDArray[np.int32]
    clip_frames: int
    frame_stride: int
    labels: tuple[Label, ...] | None = None
    units: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise DataError(f"no clip can be cut from the {len(self.runs)} runs chosen")
        first = self.runs[0]
        for run in self.runs:
            if run.grid != first.grid:
                raise DataError(
                    f"runs {first.name} (grid {first.grid}) and {run.name} (grid {run.grid}) cannot"
                    f" share a batch: pick one kind with data.select"
                )

    def __len__(self) -> int:
        return len(self.run)

    @property
    def grid(self) -> Grid:
        """Voxels and frames of a clip."""
        return Grid(*self.runs[0].grid, self.clip_frames)

    def contract(self, normalization: str) -> Contract:
        """What a model that is trained on these clips expects of its input.

        Raises:
            DataError: runs that were preprocessed differently.
        """
        return loaded_contract(common_contract(self.runs), normalization)

    def unit(self, clip: int) -> str:
        """Name of the event, run or subject that the clip counts for."""
        return self.units[clip] if self.units else self.runs[self.run[clip]].name

    def classes(self) -> tuple[str, ...]:
        """Distinct labels in sorted order (classification)."""
        return tuple(sorted({str(label) for label in self.labels or ()}))

    @classmethod
    def windows(cls, store: Store, runs: Sequence[RunInfo], config: DataConfig) -> ClipTable:
        """Every window of every run: for pretraining.

        Starts are ``clip_stride`` × the clip's span apart (at least one frame); overlap moves
        the starts and never changes a clip's length.

        Raises:
            DataError: no runs, a run shorter than one clip, or runs of different grids.
        """
        runs = _chosen(runs)
        starts = [_starts(run, config) for run in runs]
        number = [np.full(len(s), i) for i, s in enumerate(starts)]
        return cls(
            store,
            runs,
            np.concatenate(number).astype(np.int32),
            np.concatenate(starts).astype(np.int32),
            config.clip_frames,
            config.frame_stride,
        )

    @classmethod
    def labelled(
        cls, store: Store, runs: Sequence[RunInfo], config: DataConfig, task: TaskConfig
    ) -> ClipTable:
        """The clips that carry a label: one per event, or all windows of each labelled subject.

        An event's clip starts at the frame nearest to ``onset + task.lag``. Units by
        ``task.level``: ``event`` → ``<run>#event-03``; ``run`` → the run, or ``<run>#<label>``
        where labels change within it; ``subject`` → ``sub-XX``, or ``sub-XX#<label>``.

        Raises:
            DataError: no runs or labels, a missing column, a label that is no number
                (regression), an event whose clip would leave its run.
        """
        runs = _chosen(runs)
        rows = list(
            _event_clips(runs, config, task)
            if task.source == "events"
            else _subject_clips(store, runs, config, task)
        )
        if not rows:
            raise DataError(
                f"no clip has a label {task.target!r} from {task.source} in {len(runs)} runs"
            )
        return cls(
            store,
            runs,
            np.array([r.run for r in rows], np.int32),
            np.array([r.start for r in rows], np.int32),
            config.clip_frames,
            config.frame_stride,
            tuple(r.label for r in rows),
            tuple(r.unit for r in rows),
        )


@dataclass(frozen=True)
class _Row:
    run: int
    start: int
    label: Label
    unit: str


def _chosen(runs: Sequence[RunInfo]) -> tuple[RunInfo, ...]:
    if not runs:
        raise DataError("no runs were chosen, so there are no clips")
    return tuple(runs)


def clip_span(config: DataConfig) -> int:
    """Run frames from a clip's first to its last, both included."""
    return (config.clip_frames - 1) * config.frame_stride + 1


def _starts(run: RunInfo, config: DataConfig) -> NDArray[np.int64]:
    last = run.n_frames - clip_span(config)
    if last < 0:
        raise DataError(
            f"run {run.name} has {run.n_frames} frames, a clip spans {clip_span(config)} "
            f"(data.clip_frames={config.clip_frames}, data.frame_stride={config.frame_stride}): "
            f"shorten the clip or leave the run out"
        )
    step = max(1, round(config.clip_stride * config.clip_frames * config.frame_stride))
    return np.arange(0, last + 1, step)


def _event_clips(runs: Sequence[RunInfo], config: DataConfig, task: TaskConfig) -> Iterator[_Row]:
    rows, early, late, unlabelled = [], [], [], 0
    for i, run in enumerate(runs):
        columns = sorted({c for event in run.events for c in event})
        if not run.events:
            raise DataError(f"run {run.name} has no events, but task.source=events")
        if task.target not in columns:
            raise DataError(
                f"events of run {run.name} have no column task.target={task.target!r}."
                f"{suggest(task.target, columns)}"
            )
        for k, event in enumerate(run.events, start=1):
            if task.target not in event:
                unlabelled += 1
                continue
            # Half a frame rounds up; round() would go to the even frame.
            start = math.floor((event["onset"] + task.lag) / run.tr + 0.5)
            label = _label(event[task.target], task, f"event {k} of run {run.name}")
            unit = _event_unit(run, k, label, task)
            if start < 0:
                early.append(unit)
            elif start + clip_span(config) > run.n_frames:
                late.append(unit)
            rows.append(_Row(i, start, label, unit))
    if unlabelled:
        log.warning("%d events have no %s and are left out", unlabelled, task.target)
    if early or late:
        raise DataError(_outside(early, late, len(rows), config, task))
    return iter(rows)


def _outside(
    early: list[str], late: list[str], total: int, config: DataConfig, task: TaskConfig
) -> str:
    said = []
    if late:
        said.append(f"{len(late)} run past the end of their run (first: {late[0]})")
    if early:
        said.append(f"{len(early)} start before their run (first: {early[0]})")
    return (
        f"of {total} event clips, {' and '.join(said)}: change data.clip_frames="
        f"{config.clip_frames}, data.frame_stride={config.frame_stride} or task.lag={task.lag:g}"
    )


def _event_unit(run: RunInfo, number: int, label: Label, task: TaskConfig) -> str:
    if task.level == "event":
        return f"{run.name}#event-{number:02d}"
    return f"{run.name if task.level == 'run' else f'sub-{run.subject}'}#{label}"


def _subject_clips(
    store: Store, runs: Sequence[RunInfo], config: DataConfig, task: TaskConfig
) -> Iterator[_Row]:
    values = _participant_values(store, task)
    without = sorted({run.subject for run in runs if run.subject not in values})
    if without:
        log.warning(
            "%d subjects have no %s in participants.tsv and are left out: %s",
            len(without),
            task.target,
            ", ".join(without),
        )
    for i, run in enumerate(runs):
        if run.subject not in values:
            continue
        label = _label(values[run.subject], task, f"sub-{run.subject} in participants.tsv")
        unit = run.name if task.level == "run" else f"sub-{run.subject}"
        for start in _starts(run, config):
            yield _Row(i, int(start), label, unit)


def _participant_values(store: Store, task: TaskConfig) -> dict[str, str]:
    table: pandas.DataFrame | None = store.participants
    if table is None:
        raise DataError(f"{store.path} has no participants.tsv, but task.source=participants")
    columns = list(table.columns)
    for needed in ("participant_id", task.target):
        if needed not in columns:
            raise DataError(
                f"participants.tsv of {store.path} has no column {needed!r}."
                f"{suggest(needed, columns)}"
            )
    known = table[["participant_id", task.target]].dropna()
    pairs = known.itertuples(index=False, name=None)
    return {str(who).removeprefix("sub-"): str(value) for who, value in pairs}


def _label(value: str | float, task: TaskConfig, where: str) -> Label:
    if task.kind == "classification":
        return str(value)
    try:
        number = float(value)
    except ValueError:
        raise DataError(
            f"{where}: {task.target}={value!r} is not a number, but task.kind=regression"
        ) from None
    if not math.isfinite(number):
        raise DataError(f"{where}: {task.target} is {number}")
    return number

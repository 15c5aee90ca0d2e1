"""Which clips exist: a table of (run, first frame[, labels]), made from the index alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.labels import Column, columns_of
from fmrizoo.data.normalize import loaded_contract
from fmrizoo.data.store import RunInfo, Store, common_contract, records
from fmrizoo.errors import DataError
from fmrizoo.registry import suggest
from fmrizoo.types import Contract, Grid, Label

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

Labels = tuple[Label | None, ...]


@dataclass(frozen=True, eq=False)
class ClipTable:
    """Clips of several runs of one store.

    Attributes:
        store: Where the runs are.
        runs: The runs that ``run`` points into.
        run, start: ``(n,)`` run number and first frame of each clip.
        clip_frames, frame_stride: Frames in a clip, and run frames from one to the next.
        labels: For each clip one class name, level, value or None (missing) per target; None
            without a task.
        units: ``n`` names of what predictions are averaged over; None: the run's name.
        targets: Names of the targets, in the order of ``labels``.
        anchored: Clips belong where they are (events) and may not be moved within their run.
    """

    store: Store
    runs: tuple[RunInfo, ...]
    run: NDArray[np.int32]
    start: NDArray[np.int32]
    clip_frames: int
    frame_stride: int
    labels: tuple[Labels, ...] | None = None
    units: tuple[str, ...] | None = None
    targets: tuple[str, ...] = ()
    anchored: bool = False

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

    def classes(self, target: int = 0) -> tuple[str, ...]:
        """Distinct labels of one target in alphabetical order (classification)."""
        labels = (row[target] for row in self.labels or ())
        return tuple(sorted({str(label) for label in labels if label is not None}))

    def unit_labels(self) -> dict[str, Labels]:
        """The labels of each unit, in order of first appearance.

        Raises:
            DataError: clips of one unit with different labels.
        """
        found: dict[str, Labels] = {}
        for clip, labels in enumerate(self.labels or ()):
            unit = self.unit(clip)
            if found.setdefault(unit, labels) != labels:
                raise DataError(
                    f"clips of unit {unit!r} disagree on {', '.join(self.targets)}: "
                    f"{list(found[unit])}, then {list(labels)}"
                )
        return found

    @classmethod
    def windows(cls, store: Store, runs: Sequence[RunInfo], config: DataConfig) -> ClipTable:
        """Every window of every run: for pretraining.

        Starts are ``clip_stride`` × ``clip_frames`` × ``frame_stride`` frames apart (rounded, at
        least one), from frame 0 to the last that leaves room for a whole clip. Overlap moves the
        starts and never changes a clip's length or its inner stride.

        Raises:
            DataError: no runs, runs shorter than one clip (all named), or runs of different grids.
        """
        runs = _chosen(runs)
        _check_lengths(runs, config)
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

        With several targets a clip needs only one of them. An event's clip starts at the frame
        nearest to ``onset + task.lag``. Units by ``task.level``: ``event`` →
        ``<run>#event-03``; ``run`` → the run, or ``<run>#<label>`` where labels change within it;
        ``subject`` → ``sub-XX``, or ``sub-XX#<label>``.

        Raises:
            DataError: no runs or labels, a missing column, a label that is no number
                (regression) or no level (ordinal), several rows of participants.tsv for a subject,
                an event whose clip would leave its run.
        """
        runs, columns = _chosen(runs), columns_of(task)
        rows = list(
            _event_clips(store, runs, columns, config, task)
            if task.source == "events"
            else _subject_clips(store, runs, columns, config, task)
        )
        if not rows:
            raise DataError(
                f"no clip has a label {_either(columns)} from {task.source} in {len(runs)} runs"
            )
        _say_partial(store, rows, columns)
        return cls(
            store,
            runs,
            np.array([r.run for r in rows], np.int32),
            np.array([r.start for r in rows], np.int32),
            config.clip_frames,
            config.frame_stride,
            tuple(r.labels for r in rows),
            tuple(r.unit for r in rows),
            tuple(column.name for column in columns),
            task.source == "events",
        )


@dataclass(frozen=True)
class _Row:
    run: int
    start: int
    labels: Labels
    unit: str


def _chosen(runs: Sequence[RunInfo]) -> tuple[RunInfo, ...]:
    if not runs:
        raise DataError("no runs were chosen, so there are no clips")
    return tuple(runs)


def clip_span(config: DataConfig) -> int:
    """Run frames from a clip's first to its last, both included."""
    return (config.clip_frames - 1) * config.frame_stride + 1


def clip_room(run: RunInfo, clip_frames: int, frame_stride: int) -> int:
    """How many different first frames a clip can have in ``run``."""
    return max(0, run.n_frames - (clip_frames - 1) * frame_stride)


def _check_lengths(runs: Sequence[RunInfo], config: DataConfig) -> None:
    """No run may be too short for a clip; every one that is gets named."""
    short = [run for run in runs if run.n_frames < clip_span(config)]
    if not short:
        return
    shown = ", ".join(f"{run.name} ({run.n_frames})" for run in short[1:])
    others = f"; so are {shown}" if shown else ""
    raise DataError(
        f"run {short[0].name} has {short[0].n_frames} frames, a clip spans {clip_span(config)} "
        f"(data.clip_frames={config.clip_frames}, data.frame_stride={config.frame_stride}){others}:"
        f" shorten the clip or leave {'these runs' if shown else 'the run'} out"
    )


def _starts(run: RunInfo, config: DataConfig) -> NDArray[np.int64]:
    step = max(1, round(config.clip_stride * config.clip_frames * config.frame_stride))
    return np.arange(0, run.n_frames - clip_span(config) + 1, step)


def _either(columns: Sequence[Column]) -> str:
    return " or ".join(repr(column.name) for column in columns)


@cache
def _warn_once(store: Path, message: str) -> None:
    """A job lists the clips of a part several times; once is enough to say what is missing."""
    log.warning("%s: %s", store, message)


def _say_partial(store: Store, rows: Sequence[_Row], columns: Sequence[Column]) -> None:
    """Of several targets, say how many labels are missing."""
    for k, column in enumerate(columns if len(columns) > 1 else ()):
        if missing := sum(row.labels[k] is None for row in rows):
            _warn_once(store.path, f"{missing} of {len(rows)} clips have no {column.name}")


def _event_clips(
    store: Store,
    runs: Sequence[RunInfo],
    columns: Sequence[Column],
    config: DataConfig,
    task: TaskConfig,
) -> Iterator[_Row]:
    rows, early, late, unlabelled = [], [], [], 0
    _check_columns(runs, columns)
    for i, run in enumerate(runs):
        for k, event in enumerate(run.events, start=1):
            where = f"event {k} of run {run.name}"
            labels = tuple(column.label(event, where) for column in columns)
            if all(label is None for label in labels):
                unlabelled += 1
                continue
            # Half a frame rounds up; round() would go to the even frame.
            start = math.floor((event["onset"] + task.lag) / run.tr + 0.5)
            unit = _event_unit(run, k, labels, task)
            if start < 0:
                early.append(unit)
            elif start + clip_span(config) > run.n_frames:
                late.append(unit)
            rows.append(_Row(i, start, labels, unit))
    if unlabelled:
        said = f"{unlabelled} events have no {_either(columns)} and are left out"
        _warn_once(store.path, said)
    if early or late:
        raise DataError(_outside(early, late, len(rows), config, task))
    return iter(rows)


def _check_columns(runs: Sequence[RunInfo], columns: Sequence[Column]) -> None:
    """Every run has events; every column is known (an empty one of a single run is missing)."""
    # Of several stores each: one that lacks a label must not be left out in silence.
    for data_set in sorted({run.key.data_set for run in runs}):
        own = [run for run in runs if run.key.data_set == data_set]
        known: set[str] = set()
        for run in own:
            if not run.events:
                raise DataError(f"run {run.name} has no events, but task.source=events")
            known.update(*run.events)
        where = f" of data.stores.{data_set}" if data_set else ""
        for column in columns:
            if column.name not in known:
                raise DataError(
                    f"events of {_counted(own)}{where} have no column {column.name!r} (or nothing "
                    f"in it).{suggest(column.name, sorted(known))}"
                )


def _counted(runs: Sequence[RunInfo]) -> str:
    return f"run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"


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


def _event_unit(run: RunInfo, number: int, labels: Labels, task: TaskConfig) -> str:
    if task.level == "event":
        return f"{run.name}#event-{number:02d}"
    # One target only (TaskConfig): with several, a unit could lack some of its events' labels.
    return f"{run.name if task.level == 'run' else f'sub-{run.subject}'}#{labels[0]}"


def _subject_clips(
    store: Store,
    runs: Sequence[RunInfo],
    columns: Sequence[Column],
    config: DataConfig,
    task: TaskConfig,
) -> Iterator[_Row]:
    people = _participants(store, {run.subject for run in runs}, columns)
    empty = (None,) * len(columns)
    if without := sorted({r.subject for r in runs if people.get(r.subject, empty) == empty}):
        said = f"{len(without)} subjects have no {_either(columns)} in participants.tsv and are "
        _warn_once(store.path, f"{said}left out: {', '.join(without)}")
    _check_lengths([run for run in runs if run.subject not in without], config)
    for i, run in enumerate(runs):
        if run.subject in without:
            continue
        unit = run.name if task.level == "run" else f"sub-{run.subject}"
        for start in _starts(run, config):
            yield _Row(i, int(start), people[run.subject], unit)


def _participants(store: Store, subjects: set[str], columns: Sequence[Column]) -> dict[str, Labels]:
    """Labels of those ``subjects`` that participants.tsv has a row of."""
    table: pandas.DataFrame | None = store.participants
    if table is None:
        raise DataError(f"{store.path} has no participants.tsv, but task.source=participants")
    for needed in ("participant_id", *(column.name for column in columns)):
        if needed not in table.columns:
            raise DataError(
                f"participants.tsv of {store.path} has no column {needed!r}."
                f"{suggest(needed, list(table.columns))}"
            )
    found: dict[str, Labels] = {}
    for row in records(table):
        subject = row["participant_id"].strip().removeprefix("sub-")
        where = f"sub-{subject} in participants.tsv of {store.path}"
        if subject in found:
            raise DataError(f"{where} has several rows: keep one row per subject")
        if subject in subjects:
            found[subject] = tuple(column.label(row, where) for column in columns)
    return found

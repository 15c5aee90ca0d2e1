"""Compact clips one by one: what the loader reads, and a plain data set for a ``DataLoader``.

config = DataConfig(store="stores/ukb", clip_frames=20, select={"task": "rest"})
clips = ClipDataset.of(config)
for batch in DataLoader(clips, batch_size=8, shuffle=True, collate_fn=collate_dense):
    batch.bold, batch.mask  # (8, 1, x, y, z, 20) normalised, (8, x, y, z)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch.utils.data import Dataset

from fmrizoo.config import DataConfig, TaskConfig
from fmrizoo.data.batch import ClipFacts, CompactSample, RunDecode
from fmrizoo.data.batch import collate as collate
from fmrizoo.data.clips import ClipTable, clip_room
from fmrizoo.data.codec import Array
from fmrizoo.data.exclusion import chosen, reasons
from fmrizoo.data.mixture import open_store
from fmrizoo.data.order import sample_seed, uniform
from fmrizoo.data.reader import RunReader
from fmrizoo.data.store import RunInfo
from fmrizoo.data.targets import check_targets, fit_tasks, label_targets
from fmrizoo.types import Batch, TaskSpec

_EPOCH_SALT = 0x65706F6368  # evaluation seeds differ from training seeds
_START = 1  # of what a sample's seed decides: its random start


def evaluation_seed(seed: int, clip: int) -> int:
    """The seed of a clip where clips come in the table's order."""
    return sample_seed(seed ^ _EPOCH_SALT, clip)


class ClipDataset(Dataset[CompactSample]):
    """Map-style data set of compact clips, for any number of worker processes, forked or spawned.

    With :func:`collate` a batch stays compact until it is on the device (``batch.to_batch(device)``
    moves a seventh of the bytes); with :func:`collate_dense` the workers make it dense. Clips are
    those of validation: fixed windows, never augmented.

    Args:
        table: Which clips.
        config: Normalisation, and how training clips are moved (``windows``).
        tasks: What the labels become targets of (:func:`fmrizoo.data.targets.fit_tasks`); empty:
            clips have no targets, whatever their labels.

    Raises:
        DataError: a label that no task knows, or clips labelled with other targets.
    """

    def __init__(
        self,
        table: ClipTable,
        config: DataConfig,
        tasks: Sequence[TaskSpec] = (),
        seed: int = 0,
    ) -> None:
        self.table, self.tasks, self.seed = table, tuple(tasks), seed
        self.normalization = config.normalization
        self._random, self._shift = config.windows == "random", config.augment.time_shift
        self._decodes: WeakKeyDictionary[RunReader, RunDecode] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._targets: dict[str, tuple[int | float, ...]] = {}
        if self.tasks:
            check_targets(table, self.tasks)
            self._targets = {
                unit: label_targets(labels, self.tasks)
                for unit, labels in table.unit_labels().items()
            }

    @classmethod
    def of(
        cls,
        config: DataConfig,
        task: TaskConfig | None = None,
        *,
        runs: Sequence[str] | None = None,
        tasks: Sequence[TaskSpec] | None = None,
        seed: int = 0,
    ) -> ClipDataset:
        """The clips of ``config.store`` (or ``config.stores``).

        Args:
            config: As the section ``data`` of a recipe.
            task: As its section ``task``: labelled clips alone, with targets; None: all windows.
            runs: Names of the runs, such as ``Split.load(file).train``; None: all selected.
                Either way without those that ``config`` leaves out (``exclude``, ``leave_out``).
            tasks: What was fitted on training labels (``tasks`` of the training data set); None:
                fitted on these.
            seed: Of the samples' seeds.

        Raises:
            RecipeError: no store is named.
            DataError, CorruptStoreError: unusable data.
        """
        store = open_store(config)
        if runs is None:
            used = chosen(store, config).used
        else:
            named = [store[name] for name in runs]
            left_out = reasons(store, named, config)
            used = [run for run in named if run.name not in left_out]
        if task is None:
            return cls(ClipTable.windows(store, used, config), config, seed=seed)
        table = ClipTable.labelled(store, used, config, task)
        return cls(table, config, fit_tasks(table, task) if tasks is None else tasks, seed)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, clip: int) -> CompactSample:
        """The clip with its own seed, read into fresh memory."""
        return self.read(clip, evaluation_seed(self.seed, clip), np.empty)

    def start_of(self, clip: int, seed: int) -> int:
        """First frame of the training clip with this seed: the table's, a random one, or one near
        the table's (a shift that would leave the run ends at its edge).
        """
        table = self.table
        start = int(table.start[clip])
        if not self._random and not self._shift:
            return start
        run = table.runs[table.run[clip]]
        room = clip_room(run, table.clip_frames, table.frame_stride)
        if self._random:
            return uniform(seed, room, _START)
        start += uniform(seed, 2 * self._shift + 1, _START) - self._shift
        return min(max(start, 0), room - 1)

    def read(
        self,
        clip: int,
        seed: int,
        allocate: Callable[[tuple[int, int], np.dtype[Any]], Array],
        start: int | None = None,
    ) -> CompactSample:
        """Read one clip into memory from ``allocate(shape, dtype)``.

        Args:
            clip: Which row of the table.
            seed: The sample's.
            allocate: Gives the memory.
            start: First frame, where it is not the table's.

        Raises:
            CorruptStoreError: its bytes are not those that were written.
        """
        table = self.table
        info = table.runs[table.run[clip]]
        reader = table.store.open(info)
        about = self._about(clip)
        if start is not None:
            about["start"] = start
        rows = allocate((table.clip_frames, reader.row), reader.dtype)
        reader.read_compact(about["start"], table.clip_frames, table.frame_stride, rows)
        return CompactSample(rows=rows, decode=self._decode(info, reader), seed=seed, **about)

    def facts(self, clip: int) -> ClipFacts:
        """All but the voxels of a clip; reads nothing from disk."""
        return ClipFacts(**self._about(clip))

    def _about(self, clip: int) -> dict[str, Any]:
        table = self.table
        info, unit = table.runs[table.run[clip]], table.unit(clip)
        return {
            "subject": info.subject,
            "run": info.name,
            "start": int(table.start[clip]),
            "tr": info.tr * table.frame_stride,
            "unit": unit,
            "labels": table.labels[clip] if table.labels is not None else (),
            "targets": self._targets.get(unit, ()),
        }

    def _decode(self, info: RunInfo, reader: RunReader) -> RunDecode:
        """The run's decoder, made once and dropped with its reader."""
        with self._lock:
            found = self._decodes.get(reader)
            if found is None:
                home = self.table.store.home(info)
                found = RunDecode(home, reader, self.normalization)
                self._decodes[reader] = found
            return found

    def __getstate__(self) -> dict[str, Any]:
        # Neither open runs nor locks go to a worker process; it opens its own.
        state = self.__dict__.copy()
        del state["_decodes"], state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._decodes = WeakKeyDictionary()
        self._lock = threading.Lock()


def collate_dense(samples: Sequence[CompactSample]) -> Batch:
    """For ``DataLoader(…, collate_fn=collate_dense)``: a dense float32 batch on the CPU."""
    batch = collate(samples).to_batch()
    return replace(batch, bold=batch.bold)

"""Micro-batches of compact clips: reader threads, reused buffers, an order that can be resumed.

Reading and checksums release the GIL, so a few threads feed a device without worker processes
(whose copies cost more than the reading). :class:`ClipDataset` is there for those who need a
plain ``torch.utils.data.DataLoader``.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch.utils.data import Dataset

from fmrizoo.config import DataConfig
from fmrizoo.data.batch import ClipFacts, CompactBatch, CompactSample, RunDecode
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.codec import Array
from fmrizoo.data.order import permuted, sample_seed
from fmrizoo.data.reader import RunReader
from fmrizoo.data.targets import check_targets, label_targets
from fmrizoo.errors import DataError
from fmrizoo.types import TaskSpec

_AHEAD = 2  # micro-batches being read while one is used
_EPOCH_SALT = 0x65706F6368  # evaluation seeds differ from training seeds


class ClipDataset(Dataset[CompactSample]):
    """Map-style data set of compact clips; with ``collate`` for a ``DataLoader``.

    Args:
        table: Which clips.
        config: Normalisation.
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
        self._decodes: WeakKeyDictionary[RunReader, RunDecode] = WeakKeyDictionary()
        self._lock = threading.Lock()
        self._targets: dict[str, tuple[int | float, ...]] = {}
        if self.tasks:
            check_targets(table, self.tasks)
            self._targets = {
                unit: label_targets(labels, self.tasks)
                for unit, labels in table.unit_labels().items()
            }

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, clip: int) -> CompactSample:
        """The clip with its own seed, read into fresh memory."""
        return self.read(clip, sample_seed(self.seed ^ _EPOCH_SALT, clip), np.empty)

    def read(
        self, clip: int, seed: int, allocate: Callable[[tuple[int, int], np.dtype[Any]], Array]
    ) -> CompactSample:
        """Read one clip into memory from ``allocate(shape, dtype)``.

        Raises:
            CorruptStoreError: its bytes are not those that were written.
        """
        table = self.table
        info = table.runs[table.run[clip]]
        reader = table.store.open(info)
        start = int(table.start[clip])
        rows = allocate((table.clip_frames, reader.row), reader.dtype)
        reader.read_compact(start, table.clip_frames, table.frame_stride, rows)
        return CompactSample(rows=rows, decode=self._decode(reader), seed=seed, **self._about(clip))

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

    def _decode(self, reader: RunReader) -> RunDecode:
        """The run's decoder, made once and dropped with its reader."""
        with self._lock:
            found = self._decodes.get(reader)
            if found is None:
                found = RunDecode(self.table.store.path, reader, self.normalization)
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


class _Buffers:
    """Memory for rows that is handed out again once nobody looks at it.

    Fresh pages cost as much as reading into them. A buffer comes back when its sample is
    collected, and only if no other array or tensor still refers to it.
    """

    def __init__(self, keep: int) -> None:
        self._free: dict[tuple[tuple[int, int], str], list[Array]] = {}
        self._lock = threading.Lock()
        self._keep = keep

    def take(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
        with self._lock:
            free = self._free.get((shape, dtype.str))
            if free:
                return free.pop()
        return np.empty(shape, dtype)

    def lend(self, sample: CompactSample) -> None:
        """Take ``sample.rows`` back when ``sample`` goes."""
        finalizer = weakref.finalize(sample, self._return, [sample.rows])
        finalizer.atexit = False

    def _return(self, held: list[Array]) -> None:
        rows = held.pop()
        # Two references are ours: `rows` and getrefcount's argument. Any other is a view, a
        # tensor, or the array itself in somebody's hands.
        if sys.getrefcount(rows) > 2:
            return
        with self._lock:
            free = self._free.setdefault((rows.shape, rows.dtype.str), [])
            if len(free) < self._keep:
                free.append(rows)


class Loader:
    """Micro-batches of one rank, read ahead by threads.

    Args:
        table: Which clips.
        config: Normalisation and number of threads.
        micro_batch: Clips per micro-batch of one rank.
        rank, world: This rank, and how many there are.
        seed: Of the order and of the samples' own seeds.
        shuffle: False: the table's order, again and again.
        tasks: See :class:`ClipDataset`.

    Raises:
        DataError: see :class:`ClipDataset`; ranks or sizes that make no sense.
    """

    def __init__(
        self,
        table: ClipTable,
        config: DataConfig,
        micro_batch: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        tasks: Sequence[TaskSpec] = (),
    ) -> None:
        if micro_batch < 1 or not 0 <= rank < world:
            raise DataError(f"cannot load micro_batch={micro_batch} as rank {rank} of {world}")
        self.dataset = ClipDataset(table, config, tasks, seed)
        self.table, self.micro_batch = table, micro_batch
        self._rank, self._world, self._seed, self._shuffle = rank, world, seed, shuffle
        self._threads = config.threads
        self._buffers = _Buffers(keep=(_AHEAD + 2) * micro_batch)

    def __len__(self) -> int:
        """Clips in one epoch, over all ranks."""
        return len(self.table)

    def batches(self, start: int = 0) -> Iterator[CompactBatch]:
        """Micro-batches ``start``, ``start + 1``, … without end.

        Global micro-batch m holds the positions m·world·micro … (m+1)·world·micro − 1 of the
        endless sequence of epochs, this rank its contiguous part of them. Every clip comes
        exactly once an epoch, and what comes depends on neither threads nor world size (at a
        constant world·micro).

        Raises:
            CorruptStoreError: as soon as a clip of the next batch turns out to be damaged.
        """
        return self._read(self.plan(start))

    def plan(self, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """The clips that :meth:`batches` reads, as (clip, seed) pairs, without reading them."""
        for m in itertools.count(start):
            first = (m * self._world + self._rank) * self.micro_batch
            positions = range(first, first + self.micro_batch)
            yield [(self.clip_at(p), sample_seed(self._seed, p)) for p in positions]

    def epoch(self) -> Iterator[CompactBatch]:
        """This rank's clips once, in the table's order; the last batch may be smaller.

        Ranks take contiguous blocks of the table.
        """
        return self._read(self.epoch_plan())

    def epoch_plan(self) -> Iterator[list[tuple[int, int]]]:
        """The clips that :meth:`epoch` reads, as (clip, seed) pairs, without reading them."""
        n = len(self.table)
        first, last = (n * r // self._world for r in (self._rank, self._rank + 1))
        clips, salted = range(first, last), self._seed ^ _EPOCH_SALT
        for s in range(0, len(clips), self.micro_batch):
            yield [(c, sample_seed(salted, c)) for c in clips[s : s + self.micro_batch]]

    def clip_at(self, position: int) -> int:
        """The clip at a global position of the endless sequence."""
        n = len(self.table)
        epoch, within = divmod(position, n)
        return permuted(within, n, self._seed, epoch) if self._shuffle else within

    def _read(self, plan: Iterator[list[tuple[int, int]]]) -> Iterator[CompactBatch]:
        """Read the planned (clip, seed) lists, ``_AHEAD`` micro-batches in advance."""
        plan = iter(plan)
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="fmrizoo-reader")
        waiting: deque[list[Future[CompactSample]]] = deque()
        try:
            while True:
                for clips in itertools.islice(plan, _AHEAD + 1 - len(waiting)):
                    waiting.append([pool.submit(self._one, *c) for c in clips])
                if not waiting:
                    return
                yield CompactBatch([future.result() for future in waiting.popleft()])
        finally:
            # Reached on exhaustion, on an error, and when the consumer drops the iterator.
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, clip: int, seed: int) -> CompactSample:
        sample = self.dataset.read(clip, seed, self._buffers.take)
        self._buffers.lend(sample)
        return sample

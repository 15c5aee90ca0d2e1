"""Micro-batches of compact clips: reader threads, reused buffers, an order that can be resumed.

Reading and checksums release the GIL, so a few threads feed a device without worker processes
(whose copies cost more than the reading). :mod:`fmrizoo.data.dataset` is there for those who need
a plain ``torch.utils.data.DataLoader``.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any

import numpy as np

from fmrizoo.config import DataConfig
from fmrizoo.data.augment import Augmentation
from fmrizoo.data.batch import CompactBatch, CompactSample
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.codec import Array
from fmrizoo.data.dataset import ClipDataset as ClipDataset
from fmrizoo.data.dataset import evaluation_seed
from fmrizoo.data.divide import DividedOrder
from fmrizoo.data.draw import Order
from fmrizoo.data.order import sample_seed
from fmrizoo.data.store import RunInfo
from fmrizoo.errors import DataError, FmrizooError
from fmrizoo.types import TaskSpec

_AHEAD = 2  # micro-batches being read while one is used
_LOOK = 1.0  # seconds of waiting for a clip between two looks at the reader threads


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
        config: Normalisation, threads, and what training draws: see :mod:`fmrizoo.data.draw`.
        micro_batch: Clips per micro-batch of one rank.
        rank, world: This rank, and how many there are.
        seed: Of the order and of the samples' own seeds.
        shuffle: False: the table's order, again and again.
        tasks: See :class:`ClipDataset`.
        lanes: Places of a training batch over all ranks, for ``clips_per_visit`` and ``divide``;
            None: ``world · micro_batch``. Constant, it keeps the order for any world size.

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
        lanes: int | None = None,
    ) -> None:
        if micro_batch < 1 or not 0 <= rank < world:
            raise DataError(f"cannot load micro_batch={micro_batch} as rank {rank} of {world}")
        self.dataset = ClipDataset(table, config, tasks, seed)
        self.table, self.micro_batch = table, micro_batch
        self._rank, self._world, self._seed, self._shuffle = rank, world, seed, shuffle
        self._random = config.windows == "random"
        self._config, self._lanes = config, lanes or world * micro_batch
        self._augment: Augmentation | None = None
        if config.augment.on_device:
            self._augment = Augmentation(config.augment, table.runs[0].contract.voxel_size)
        self._threads = config.threads
        # The trainer keeps the samples of a step until it is judged.
        held = max(1, self._lanes // (world * micro_batch))
        self._buffers = _Buffers(keep=(_AHEAD + 1 + held) * micro_batch)

    @cached_property
    def order(self) -> Order | DividedOrder:
        """Which clip comes when in training.

        Raises:
            DataError: see :class:`fmrizoo.data.draw.Order` and
                :class:`fmrizoo.data.divide.DividedOrder`.
        """
        kind = DividedOrder if self._divided else Order
        order = kind(self.table, self._config, self._seed, self._lanes)
        if self._config.clips_per_visit > 1:
            # All visits that this rank's lanes may be in, so that none is opened twice.
            own = -(-order.lanes // self._world)
            self.table.store.reserve(own * (order.mixed_visits + 2))
        return order

    def __len__(self) -> int:
        """Training clips in one epoch, over all ranks."""
        return len(self.order) if self._shuffle else len(self.table)

    def batches(self, start: int = 0) -> Iterator[CompactBatch]:
        """Micro-batches ``start``, ``start + 1``, … without end.

        Global micro-batch m holds the positions m·world·micro … (m+1)·world·micro − 1 of the
        endless sequence of epochs, this rank its contiguous part of them. Every clip comes
        exactly once an epoch (subjects or stores that are balanced or weighted:
        :mod:`fmrizoo.data.draw`), and what comes depends on neither threads nor world size (at a
        constant world·micro).

        With ``data.divide`` a rank takes neighbouring places of the batch of ``lanes`` clips, a
        micro-batch at a time: which clips make up a batch depends on nothing but its size.

        Raises:
            DataError: random windows for clips that belong to events.
            CorruptStoreError: as soon as a clip of the next batch turns out to be damaged.
        """
        if self._random and self.table.anchored:
            raise DataError("data.windows=random would move clips off their events")
        return self._read(self.plan(start), training=True)

    def plan(self, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """The clips that :meth:`batches` reads, as (clip, seed) pairs, without reading them."""
        for m in itertools.count(start):
            first = (m * self._world + self._rank) * self.micro_batch
            if self._divided:
                step, turn = divmod(m, self._turns)
                first = step * self._lanes + self._places[turn * self.micro_batch]
            positions = range(first, first + self.micro_batch)
            yield [(self.clip_at(p), sample_seed(self._seed, p)) for p in positions]

    def own_runs(self) -> list[RunInfo]:
        """The runs that this rank draws from in training: all, or those of its portions.

        With ``data.divide`` a clip now and then, of those left over, is of another run.

        Raises:
            DataError: see :attr:`order`.
        """
        if not self._divided:
            return list(self.table.runs)
        order = self.order
        assert isinstance(order, DividedOrder)
        numbers = {int(self.table.run[s.first]) for s in order.stretches(self._places)}
        return [self.table.runs[number] for number in sorted(numbers)]

    @property
    def _divided(self) -> bool:
        return self._shuffle and self._config.divide > 1

    @property
    def _turns(self) -> int:
        """Micro-batches that a rank reads for one batch."""
        turns, rest = divmod(self._lanes, self._world * self.micro_batch)
        if rest or not turns:
            raise DataError(
                f"data.divide={self._config.divide} needs whole batches: {self._world} ranks with "
                f"{self.micro_batch} clips at a time do not fill {self._lanes} places"
            )
        return turns

    @property
    def _places(self) -> range:
        """This rank's places of a batch with ``data.divide``: neighbours, whatever the turns."""
        size = self._turns * self.micro_batch
        return range(self._rank * size, (self._rank + 1) * size)

    def epoch(self) -> Iterator[CompactBatch]:
        """This rank's clips once, in the table's order; the last batch may be smaller.

        Ranks take contiguous blocks of the table.
        """
        return self._read(self.epoch_plan())

    def epoch_plan(self) -> Iterator[list[tuple[int, int]]]:
        """The clips that :meth:`epoch` reads, as (clip, seed) pairs, without reading them."""
        n = len(self.table)
        first, last = (n * r // self._world for r in (self._rank, self._rank + 1))
        clips = range(first, last)
        for s in range(0, len(clips), self.micro_batch):
            yield [(c, evaluation_seed(self._seed, c)) for c in clips[s : s + self.micro_batch]]

    def clip_at(self, position: int) -> int:
        """The clip at a global position of the endless sequence."""
        return self.order.clip(position) if self._shuffle else position % len(self.table)

    def _read(
        self, plan: Iterator[list[tuple[int, int]]], training: bool = False
    ) -> Iterator[CompactBatch]:
        """Read the planned (clip, seed) lists, ``_AHEAD`` micro-batches in advance."""
        plan = iter(plan)
        readers: list[threading.Thread] = []
        pool = ThreadPoolExecutor(
            self._threads,
            thread_name_prefix="fmrizoo-reader",
            initializer=lambda: readers.append(threading.current_thread()),
        )
        waiting: deque[list[tuple[int, Future[CompactSample]]]] = deque()
        try:
            while True:
                for clips in itertools.islice(plan, _AHEAD + 1 - len(waiting)):
                    waiting.append([(c[0], pool.submit(self._one, *c, training)) for c in clips])
                if not waiting:
                    return
                samples = [self._read_one(*one, readers) for one in waiting.popleft()]
                yield CompactBatch(samples, self._augment if training else None)
        finally:
            # Reached on exhaustion, on an error, and when the consumer drops the iterator.
            pool.shutdown(wait=True, cancel_futures=True)

    def _read_one(
        self, clip: int, future: Future[CompactSample], readers: Sequence[threading.Thread]
    ) -> CompactSample:
        """What a reader thread made of ``clip``.

        Raises:
            FmrizooError: what the reader raised.
            DataError: it failed in another way, or a reader ended without an answer.
        """
        while not future.done() and not wait((future,), timeout=_LOOK).done:
            if any(not reader.is_alive() for reader in readers):
                raise DataError(
                    f"a reader thread ended without a word; {self._named(clip)} was waited for: "
                    f"run the same command again, with data.threads=1 if it happens again"
                )
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, FmrizooError):
            raise error
        # Also SystemExit, which would end the run in silence if it came out here.
        said = f"{type(error).__name__}: {error}"
        raise DataError(f"reading {self._named(clip)} failed with {said}") from error

    def _named(self, clip: int) -> str:
        run = self.table.runs[self.table.run[clip]]
        file = self.table.store.home(run) / run.file
        return f"{file}, run {run.name}, clip from frame {int(self.table.start[clip])}"

    def _one(self, clip: int, seed: int, training: bool) -> CompactSample:
        start = self.dataset.start_of(clip, seed) if training else None
        sample = self.dataset.read(clip, seed, self._buffers.take, start)
        self._buffers.lend(sample)
        return sample

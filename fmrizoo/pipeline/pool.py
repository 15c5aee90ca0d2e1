"""Jobs shared out among processes: one after the other here, or side by side in workers.

Workers are spawned, stop when a signal reaches the process that started them (their checkpoints are
saved first), and do not outlive it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol, TypeVar

from fmrizoo.errors import RecipeError, TrainingError

GRACE = 60  # seconds for the last checkpoint of a worker whose parent is gone


class Named(Protocol):
    """Anything with a name of its own among the jobs of one call."""

    @property
    def name(self) -> str:
        """Shown in progress, and usually the job's folder."""


J = TypeVar("J", bound=Named)
R = TypeVar("R")


def part_of(jobs: Sequence[J], part: tuple[int, int]) -> list[J]:
    """Every n-th job from the k-th on, for ``part`` = (k, n) with 1 ≤ k ≤ n.

    Raises:
        RecipeError: no such part.
    """
    number, parts = part
    if not 1 <= number <= parts:
        raise RecipeError(f"part {number}/{parts} is none of 1/{parts} to {parts}/{parts}")
    return list(jobs[number - 1 :: parts])


def work_through(
    jobs: Sequence[J], work: Callable[[J], R | None], workers: int = 1
) -> Iterator[tuple[str, R | None]]:
    """Do all jobs; yields (name, result) as they end. A result of None: a signal cut it short.

    Args:
        jobs: What is to be done.
        work: Does one job; travels to the workers, so it must be importable (or a partial of it).
        workers: Processes; each takes one job after the other. More than one only where no launcher
            has started several ranks.

    Raises:
        RecipeError: several workers below a launcher.
        TrainingError: a worker died.
    """
    # One process here costs no start, and is what a launcher's ranks need.
    if workers == 1 or len(jobs) <= 1:
        yield from _one_by_one(jobs, work)
    else:
        yield from _side_by_side(jobs, work, workers)


def _one_by_one(jobs: Sequence[J], work: Callable[[J], R | None]) -> Iterator[tuple[str, R | None]]:
    for job in jobs:
        result = work(job)
        yield job.name, result
        if result is None:
            return


def _side_by_side(
    jobs: Sequence[J], work: Callable[[J], R | None], workers: int
) -> Iterator[tuple[str, R | None]]:
    from fmrizoo.trainer.device import discover

    if discover().size > 1:
        raise RecipeError(
            f"--jobs {workers} cannot be combined with a launcher's {discover().size} ranks: train "
            "one job at a time on all of them, or start without the launcher"
        )
    # Spawned, not forked: threads of PyTorch and HDF5 do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with (
        _threads_for(workers),
        ProcessPoolExecutor(
            min(workers, len(jobs)),
            mp_context=context,
            initializer=stop_without,
            initargs=(os.getpid(),),
        ) as pool,
        _forwarding() as stopped,
    ):
        futures: dict[Future[R | None], str] = {}
        for job in jobs:
            futures[pool.submit(_in_worker, work, job)] = job.name
        try:
            for future in as_completed(futures):
                if stopped():
                    pool.shutdown(wait=False, cancel_futures=True)
                if future.cancelled():
                    continue
                yield futures[future], future.result()
        except BrokenProcessPool:
            if not stopped():
                raise TrainingError(
                    f"a worker process died (out of memory?): run the same command again to "
                    f"go on, with fewer than --jobs {workers} if it happens again"
                ) from None
            yield "", None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            _tell_workers()
            raise
        if stopped():
            yield "", None


@dataclass
class _Worker:
    """State of a worker process."""

    parent: int = 0
    stopped: bool = False


_worker = _Worker()


def stop_without(parent: int) -> None:
    """In a worker: stop as if told to when the process that started it is gone.

    A worker that goes on alone would train into folders that the next call trains into as well.
    """
    _worker.parent = parent

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # saves a checkpoint
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_worker(work: Callable[[J], R | None], job: J) -> R | None:
    # A stopped worker has jobs in its queue that nobody can take back.
    if _worker.stopped:
        return None
    result = work(job)
    _worker.stopped = result is None
    if os.getppid() != _worker.parent:
        os._exit(1)
    return result


@contextmanager
def _threads_for(workers: int) -> Iterator[None]:
    """Share the cores out: read by a child's PyTorch when it is imported."""
    key, before = "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")
    if before is None:
        os.environ[key] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]


@contextmanager
def _forwarding() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT reach the workers, which save their checkpoints; was there one?"""
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        _tell_workers()

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(seen)
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def _tell_workers() -> None:
    for child in multiprocessing.active_children():
        child.terminate()

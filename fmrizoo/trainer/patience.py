"""Waiting for a disk together: slow is not hung, hung is not slow.

Writing tens of gigabytes may take longer than ``train.hang_minutes``. While ranks wait for files,
each gives signs of life as long as any rank's files still grow or are still being checksummed; a
disk that stands still gives none, and then the watchdog ends the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from fmrizoo.trainer.ranks import Ranks
from fmrizoo.trainer.watchdog import WRITTEN, alive

T = TypeVar("T")
_SHORTEST, _LONGEST = 0.01, 0.5  # seconds between two looks


class Hashed:
    """Bytes that were checksummed so far; called with each piece's size."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, count: int) -> None:
        self.bytes += count


def bytes_in(folder: Path) -> int:
    """Of all files in ``folder`` itself; 0 where there is none (any more)."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    total += entry.stat().st_size
                except FileNotFoundError:
                    continue  # renamed meanwhile
    except FileNotFoundError:
        return 0
    return total


def wait_together(ranks: Ranks, mine: Future[Any] | None, progress: Callable[[], int]) -> None:
    """Return on all ranks when every rank's ``mine`` is done, well or not; all ranks call this.

    Args:
        ranks: Of the run.
        mine: What this rank waits for; None: only for the others.
        progress: A number that changes while this rank's work goes on.
    """
    seen, pause = -1.0, _SHORTEST
    while True:
        working = mine is not None and not mine.done()
        left, made = ranks.reduced([float(working), float(progress())])
        if not left:
            return
        if made != seen:
            seen = made
            alive("" if working else WRITTEN)
        if mine is not None and working:
            wait([mine], timeout=pause)
        else:
            time.sleep(pause)
        pause = min(2 * pause, _LONGEST)


def answer_of(ranks: Ranks, collective: Callable[[], T], progress: Callable[[], int]) -> T:
    """Answer of a ``collective`` that some ranks come to much later than others.

    It runs in a thread of its own while this one looks at ``progress``: unlike in
    :func:`wait_together` the others have no time to answer until they come.
    """
    if ranks.world.size == 1:
        return collective()

    def here() -> None:
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)  # a thread begins on the node's first one

    with ThreadPoolExecutor(1, "waiting", initializer=here) as pool:
        answer = pool.submit(collective)
        seen, pause = -1, _SHORTEST
        while not answer.done():
            if (made := progress()) != seen:
                seen = made
                alive(WRITTEN)
            wait([answer], timeout=pause)
            pause = min(2 * pause, _LONGEST)
        return answer.result()

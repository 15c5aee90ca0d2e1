"""A rank of ``benchmarks/faults.py`` that harms itself: ``python fault_rank.py WORKER ARGUMENTS…``.

``ARGUMENTS`` are those of ``python -m fmrizoo``; ``FAULT_AT`` names a file for the fault's time.
"""

from __future__ import annotations

import itertools
import logging
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

AT = int(os.environ.get("FAULT_STEP", "7"))  # steps before the fault


def in_stream(do: Callable[[], None]) -> None:
    """``do`` before the first micro-batch of step ``AT + 1``."""
    from fmrizoo.data.loader import Loader

    batches = Loader.batches

    def wrapped(self: Loader, start: int = 0) -> Iterator[Any]:
        for number, batch in enumerate(batches(self, start), start=start):
            if number == AT:
                do()
            yield batch

    Loader.batches = wrapped  # type: ignore[method-assign]


def in_reader(do: Callable[[], None]) -> None:
    from fmrizoo.data.dataset import ClipDataset

    read, count = ClipDataset.read, itertools.count(1)

    def wrapped(self: ClipDataset, *args: Any, **kwargs: Any) -> Any:
        if next(count) == 2 * AT + 1:  # two clips a rank and step
            do()
        return read(self, *args, **kwargs)

    ClipDataset.read = wrapped  # type: ignore[method-assign]


def worker_sleep() -> None:
    in_stream(lambda: (injected(), time.sleep(10_000))[0])


def worker_nan() -> None:
    from fmrizoo.model import PretrainingModel

    forward, bad = PretrainingModel.forward, [False]
    in_stream(lambda: bad.__setitem__(0, True))

    def wrapped(self: PretrainingModel, batch: Any) -> Any:
        loss, logs = forward(self, batch)
        if bad[0] and self.training:
            bad[0] = False
            injected()
            loss = loss * float("nan")
        return loss, logs

    PretrainingModel.forward = wrapped  # type: ignore[method-assign]


def worker_reader() -> None:
    def fail() -> None:
        injected()
        raise ValueError("negative dimensions are not allowed")

    in_reader(fail)


def worker_silent() -> None:
    from concurrent.futures import thread

    logging.getLogger("concurrent.futures").disabled = True  # it would log how the thread ended
    run, count = thread._WorkItem.run, itertools.count(1)

    def wrapped(self: Any) -> None:
        if next(count) == 2 * AT + 1:
            injected()
            raise SystemExit
        run(self)

    thread._WorkItem.run = wrapped


def worker_clock() -> None:
    now, seen = time.time(), itertools.count()
    time.time = lambda: now - 86_400 * next(seen)


def worker_save() -> None:
    """Killed by the thread that writes a checkpoint, with half of the shard written."""
    from fmrizoo.trainer import saving

    write = saving.write_shard

    def wrapped(path: Path, snapshot: Any) -> None:
        write(path, snapshot)
        if path.parent.name.startswith(f"step-{AT - 1:06d}"):
            os.truncate(path, path.stat().st_size // 2)
            time.sleep(0.5)  # training goes on meanwhile
            injected()
            os.kill(os.getpid(), signal.SIGKILL)

    saving.write_shard = wrapped


def worker_full() -> None:
    """No file of this rank may be larger than 4 KiB any more, as on a full disk."""

    def fill() -> None:
        injected()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    in_stream(fill)


WORKERS: dict[str, Callable[[], None]] = {
    "sleep": worker_sleep,
    "nan": worker_nan,
    "reader": worker_reader,
    "silent": worker_silent,
    "clock": worker_clock,
    "save": worker_save,
    "full": worker_full,
}


def injected() -> None:
    """Note when it happened, on the clock that all processes of a machine share."""
    Path(os.environ["FAULT_AT"]).write_text(repr(time.monotonic()))


def be_rank(worker: str, arguments: list[str]) -> None:
    """``python -m fmrizoo`` with a fault in it."""
    WORKERS[worker]()
    sys.argv = ["fmrizoo", *arguments]
    runpy.run_module("fmrizoo", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    be_rank(sys.argv[1], sys.argv[2:])

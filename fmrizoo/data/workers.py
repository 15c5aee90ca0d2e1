"""Subjects in several processes. A process that dies is an error that names its subject.

Not a pool of the standard library: when one of its processes dies, it cannot say over what.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from fmrizoo.data.interrupt import shield
from fmrizoo.data.subject import STAGING, Note, SubjectResult, SubjectTask, prepare_subject
from fmrizoo.errors import DataError, FmrizooError

WORKERS_LOCK = "workers"  # held shared by every worker, so that a later call sees orphans
_PATIENCE = 10.0  # seconds for workers to end


@dataclass
class _Worker:
    """A process, our end of its pipe, and the position of the task it has."""

    process: SpawnProcess
    pipe: Connection
    task: int


def prepare_side_by_side(
    tasks: Sequence[SubjectTask], jobs: int, note: Note
) -> list[SubjectResult]:
    """:func:`prepare_subject` for every task, ``jobs`` at a time.

    Returns:
        Results in the order of ``tasks``.

    Raises:
        DataError: a process died (its subject is named), or what ``prepare_subject`` raises. The
            others are stopped first; what they had finished stays in staging.
    """
    left = deque(range(len(tasks)))
    results: dict[int, SubjectResult] = {}
    workers: list[_Worker] = []
    with _one_thread_each():
        try:
            for _ in range(min(jobs, len(tasks))):
                with shield():  # a process that nobody knows of could not be stopped
                    workers.append(_start(tasks[left[0]].out))
                _give(workers[-1], tasks, left)
            while len(results) < len(tasks):
                _listen(workers, tasks, left, results, note)
        finally:
            with shield():
                _stop(workers)
    return [results[i] for i in range(len(tasks))]


def wait_for_orphans(out: Path) -> None:
    """Until no worker of a killed ``prepare`` runs any more (they notice within moments).

    Raises:
        DataError: one still does after some seconds.
    """
    lock = os.open(out / STAGING / WORKERS_LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    deadline = time.monotonic() + _PATIENCE
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"processes of a killed prepare still write {out}: end them first"
                    ) from None
                time.sleep(0.05)
            except OSError:  # a file system without locks; the caller has said so
                return
    finally:
        os.close(lock)


# --- the parent's side ----------------------------------------------------------------------------


def _start(out: Path) -> _Worker:
    # Spawned, not forked: threads of HDF5 and of BLAS do not survive a fork.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    level = logging.getLogger("fmrizoo").getEffectiveLevel()
    process = context.Process(target=_work, args=(theirs, out, level), daemon=True)
    process.start()
    theirs.close()  # so that the pipe ends when the process does
    return _Worker(process, ours, -1)


def _give(worker: _Worker, tasks: Sequence[SubjectTask], left: deque[int]) -> None:
    """The next task, or word that there is none."""
    worker.task = left.popleft() if left else -1
    # A process that is gone is found out, with its subject, when we listen.
    with suppress(BrokenPipeError, ConnectionResetError):
        worker.pipe.send(tasks[worker.task] if worker.task >= 0 else None)


def _listen(
    workers: list[_Worker],
    tasks: Sequence[SubjectTask],
    left: deque[int],
    results: dict[int, SubjectResult],
    note: Note,
) -> None:
    """Take one message from every worker that has one."""
    busy = {worker.pipe: worker for worker in workers if worker.task >= 0}
    for pipe in wait(list(busy)):
        worker = busy[pipe]  # type: ignore[index]  # wait() returns what it was given
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise _died(worker, tasks[worker.task].subject, len(workers)) from None
        if kind == "note":
            note(*content)
        elif kind == "log":
            logging.getLogger(content.name).handle(content)
        elif kind == "error":
            raise content
        else:
            results[worker.task] = content
            _give(worker, tasks, left)


def _died(worker: _Worker, subject: str, jobs: int) -> DataError:
    worker.process.join(_PATIENCE)
    code = worker.process.exitcode
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = f"killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += ", as when the memory is full"
    return DataError(
        f"the process that prepared sub-{subject} died ({how}): run the same command again, "
        f"finished subjects are kept; with fewer than --jobs {jobs} if it happens again"
    )


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        if worker.task >= 0:
            worker.process.terminate()
        worker.pipe.close()  # an idle one ends by itself
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes share the cores; read by a child's libraries when they are loaded."""
    keys = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    missing = [key for key in keys if key not in os.environ]
    os.environ.update(dict.fromkeys(missing, "1"))
    try:
        yield
    finally:
        for key in missing:
            del os.environ[key]


# --- the worker's side ----------------------------------------------------------------------------


class _Forward(logging.Handler):
    """Sends what is logged to the parent, which shows it as its own."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._pipe.send(("log", record))


def _work(pipe: Connection, out: Path, level: int) -> None:
    """Take tasks until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of us; the parent decides
    # SIGTERM ends us at once, which is harmless: files get their name when they are whole.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    lock = os.open(out / STAGING / WORKERS_LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_SH)
    logger = logging.getLogger("fmrizoo")
    logger.setLevel(level)
    logger.addHandler(_Forward(pipe))
    logger.propagate = False
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (task := pipe.recv()) is not None:
            pipe.send(_answer(task, pipe))


def _answer(task: SubjectTask, pipe: Connection) -> tuple[str, Any]:
    try:
        return "done", prepare_subject(task, lambda run, state: pipe.send(("note", (run, state))))
    except FmrizooError as error:
        return "error", error
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        error.add_note(f"while preparing sub-{task.subject}")
        return "error", error


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""A rank that hangs ends, and says where it hung: ``train.hang_minutes``.

The training loop says what it is doing (:class:`Pulse`); a thread looks whether it still says
something. Where it does not, the stacks of all threads go to ``faults/hung-rank-00003.txt`` and the
process ends with exit code 75, so that a job script goes on from the last checkpoint. When one rank
hangs the others soon wait for it in a collective and end too: the file of the culprit is the one
that does not say so.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fmrizoo.errors import INTERRUPTED, FmrizooError, HungRankError, LostRankError
from fmrizoo.files import sha256_of
from fmrizoo.trainer.device import World
from fmrizoo.trainer.profile import COLLECTIVES
from fmrizoo.trainer.ranks import leave_code, lost

STARTING = "starting"
WAITING = "waiting for data"
COMPUTING = "computing"
SHARING = "sharing the losses with the other ranks"
OPTIMIZER = "in the optimizer"
VALIDATING = "validating"
SAVING = "saving a checkpoint"
REPORTING = "writing metrics and progress"
EXPORTING = "exporting the model"
FEATURES = "computing features"
WRITTEN = "waiting for other ranks to write their files"

# Whoever is in a collective of these waits for other ranks.
_TALKING = ("/torch/distributed/", "/deepspeed/comm/")
_LOOK = 5.0  # seconds between two looks at the signs of life
_GRACE = 3.0  # seconds between the file and the end: for the others to see the file


class Pulse:
    """What this rank is doing, and that it still does something."""

    def __init__(self) -> None:
        self.phase, self.beats = STARTING, 0

    def enter(self, phase: str) -> None:
        """A sign of life: ``phase`` begins."""
        self.phase = phase
        self.beats += 1

    def beat(self) -> None:
        """A sign of life."""
        self.beats += 1


_PULSES: list[Pulse] = []  # of the training that runs in this process, if any


def alive(phase: str = "") -> None:
    """A sign of life from work that the loop cannot see into, such as a batch of a validation.

    Args:
        phase: What is being done from now on, if that has changed.
    """
    for pulse in _PULSES:
        pulse.enter(phase or pulse.phase)


def file_of(out: Path, rank: int) -> Path:
    """Where a rank that hung says so."""
    return out / "faults" / f"hung-rank-{rank:05d}.txt"


class Watchdog:
    """Context in which this rank must give signs of life.

    Args:
        pulse: The signs.
        minutes: Without any for so long the process ends; 0: never.
        out: Run folder.
        world: This process among the ranks.
        end: Ends the process with this code.
    """

    def __init__(
        self,
        pulse: Pulse,
        minutes: float,
        out: Path,
        world: World,
        end: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self._pulse, self._limit = pulse, 60.0 * minutes
        self._out, self._world, self._end = out, world, end
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        _PULSES.append(self._pulse)
        if self._limit:
            self._thread = threading.Thread(
                target=self._watch, name="fmrizoo-watchdog", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        _PULSES.remove(self._pulse)
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        # Monotonic: a clock that is set must neither end a run nor keep it alive. Time is counted
        # in looks: a process that was suspended meanwhile has not hung.
        beats, looked, idle = self._pulse.beats, time.monotonic(), 0.0
        try:
            self._wind()
            while not self._over.wait(min(self._limit / 4, _LOOK)):
                now = time.monotonic()
                idle += min(now - looked, self._limit / 2, 2 * _LOOK)
                looked = now
                self._wind()
                if self._pulse.beats != beats:
                    beats, idle = self._pulse.beats, 0.0
                elif idle >= self._limit:
                    self._fire(idle)
                    return
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _wind(self) -> None:
        """Wind the timer up again, which needs no lock of the interpreter to end the process.

        Whoever holds that lock and hangs keeps this thread from running (code 1, stacks on stderr).
        """
        faulthandler.dump_traceback_later(2 * self._limit, exit=True, file=2)

    def _fire(self, seconds: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        rank, place = self._world.rank, _collective()
        path = file_of(self._out, rank)
        verdict = (
            f"it waits for other ranks (in {place}): the one that hangs is another"
            if place
            else "it does not wait for other ranks: this is the one that hangs"
        )
        if self._pulse.phase == WRITTEN:
            verdict = "the one that hangs is another"
        if self._world.size == 1:
            verdict = "there is no other rank that it could wait for"
        head = (
            f"rank {rank} of {self._world.size} gave no sign of life for {seconds:.0f} s "
            f"(train.hang_minutes={self._limit / 60:g}) while {self._pulse.phase}; {verdict}"
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{head}.\nProcess {os.getpid()}, sign of life {self._pulse.beats}.\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            head += f" (and {path} cannot be written: {error.strerror})"
        told = f"error: {head}. Its stacks are in {path}; run the same command again to go on\n"
        os.write(2, told.encode())
        leave_code(INTERRUPTED)
        if self._world.size > 1:
            time.sleep(_GRACE)
        self._end(INTERRUPTED)


def _collective() -> str:
    """The collective that some thread of this process is in; empty if none is."""
    for frame in sys._current_frames().values():
        found = ""
        looked: FrameType | None = frame
        while looked is not None:
            code = looked.f_code
            talks = any(part in code.co_filename for part in _TALKING)
            if talks and code.co_name in COLLECTIVES:
                found = code.co_name  # the outermost is what was called
            looked = looked.f_back
        if found:
            return found
    return ""


@contextlib.contextmanager
def losing_ranks(out: Path, world: World) -> Iterator[None]:
    """Turn what a collective raises when a rank is gone into one sentence.

    Raises:
        HungRankError: a rank hung and has said so.
        LostRankError: a rank is gone for another reason.
    """
    before = _hung(out, world)
    try:
        yield
    except FmrizooError:
        raise
    except RuntimeError as error:
        if world.size == 1 or not lost(error):
            raise
        hung = sorted(set(_hung(out, world).items()) - set(before.items()))
        if hung:
            raise HungRankError(
                f"rank {hung[0][0]} hung and has ended itself: {file_of(out, hung[0][0])} says "
                f"where; run the same command again to go on from the last checkpoint"
            ) from error
        raise LostRankError(
            f"another rank is gone ({_first_line(error)}): look at its messages, and for an "
            f"out-of-memory kill or a dead node; run the same command again to go on from the last "
            f"checkpoint in {out / 'checkpoints'}"
        ) from error


def _hung(out: Path, world: World) -> dict[int, str]:
    """Checksums of the ranks' files: those of an earlier start are still there."""
    if world.size == 1:
        return {}
    found = {}
    for path in sorted((out / "faults").glob("hung-rank-*.txt")):
        if (number := path.stem.rpartition("-")[2]).isdigit():
            found[int(number)] = sha256_of(path)
    return found


def _first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    # gloo: "[file:line] Read error [address]: Connection reset by peer. This is typically …"
    return text.partition("] ")[2].partition(". ")[0] or text[:120] or type(error).__name__

"""What all ranks do together to write a checkpoint, load one, or keep the best weights.

A checkpoint is copied out of the training's way (weights, optimizer, random numbers: at the end of
a step) and written by a thread of each rank while training goes on; rank 0's thread publishes it
when all ranks have written theirs. A failed write stops the run at the next step.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmrizoo.errors import CheckpointError
from fmrizoo.mup.stored import write_parametrization
from fmrizoo.trainer import checkpoint
from fmrizoo.trainer.best import drop_weights, read_weights, write_weights
from fmrizoo.trainer.checkpoint import ModelInfo, RunState
from fmrizoo.trainer.device import rng_state, seed_everything, set_rng_state
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.files import writing
from fmrizoo.trainer.folder import RunFolder
from fmrizoo.trainer.patience import Hashed, bytes_in, wait_together
from fmrizoo.trainer.ranks import Ranks
from fmrizoo.trainer.sharded import Sharded, Snapshot, shard_name, write_shard
from fmrizoo.trainer.watchdog import alive

log = logging.getLogger(__name__)

_LOOK_EVERY = 0.05  # seconds between two looks at what other ranks have written
_GRACE = 30.0  # seconds that a run which fails waits for a checkpoint on its way


@dataclass
class _Pending:
    """A checkpoint on its way to the disk.

    Attributes:
        own: This rank's files.
        sealed: The publication; on rank 0 only.
        given_up: Set where another rank's files will never come.
    """

    state: RunState
    partial: Path
    own: Future[None]
    given_up: threading.Event
    sealed: Future[None] | None = None

    @property
    def failed(self) -> bool:
        futures = [f for f in (self.own, self.sealed) if f is not None]
        return any(f.done() and f.exception() is not None for f in futures)


class Saver:
    """An engine's state in a run folder; every method but ``close`` is called on every rank.

    Args:
        keep: Checkpoints kept.
        at_once: Write while training waits, not beside it.
    """

    def __init__(
        self, engine: Engine, folder: RunFolder, ranks: Ranks, keep: int, *, at_once: bool = False
    ) -> None:
        self._engine, self._folder, self._ranks, self._keep = engine, folder, ranks, keep
        self._at_once = at_once
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._hashed = Hashed()
        self._best = 0  # step of the best weights that count now

    # -- writing ----------------------------------------------------------------------------

    @property
    def failed(self) -> bool:
        """Whether a write of this rank went wrong; :meth:`flush` then raises on all ranks."""
        return self._pending is not None and self._pending.failed

    def save(self, state: RunState, info: ModelInfo) -> None:
        """Begin a checkpoint of now; waits for the one before it.

        Args:
            state: Where the run stands.
            info: What a model made of the checkpoint would say of itself.

        Raises:
            CheckpointError: it, or the one before, cannot be written; older ones are untouched.
        """
        self.flush()
        what, checkpoints = f"the checkpoint of step {state.step}", self._folder.checkpoints

        def begin() -> Path:
            try:
                with writing(what, checkpoints):
                    made = checkpoint.begin(checkpoints, state, info)
                    write_parametrization(made, self._engine.model)
                    return made
            except CheckpointError:
                self._remove(state)
                raise

        partial = self._ranks.on_main(begin)
        snapshot, updates = self._engine.snapshot(), self._engine.updates
        rng = rng_state(self._ranks.device)
        own = self._pool.submit(self._write, partial, what, snapshot, rng, updates)
        self._pending = _Pending(state, partial, own, threading.Event())
        if self._ranks.world.main:
            self._pending.sealed = self._pool.submit(self._publish, self._pending, what)
        if self._at_once:
            self.flush()

    def _write(
        self, partial: Path, what: str, snapshot: Snapshot, rng: dict[str, Any], updates: int
    ) -> None:
        rank = self._ranks.world.rank
        files = [partial / shard_name(rank), partial / _rng_name(rank)]
        with writing(what, self._folder.checkpoints):
            write_shard(files[0], snapshot)
            torch.save(rng, files[1])
            checkpoint.note_written(partial, rank, files, snapshot.places, updates, self._hashed)

    def _publish(self, pending: _Pending, what: str) -> None:
        # By files and not by messages: the ranks' collectives belong to the training meanwhile.
        if pending.own.exception() is not None:
            return
        while not checkpoint.all_written(pending.partial, self._ranks.world.size):
            if pending.given_up.wait(_LOOK_EVERY):
                return
        with writing(what, self._folder.checkpoints):
            checkpoint.seal(self._folder.checkpoints, pending.state.step, self._keep)

    def flush(self) -> None:
        """Wait until the checkpoint on its way, if any, is published.

        That gives signs of life while files grow (:mod:`fmrizoo.trainer.patience`).

        Raises:
            CheckpointError: it could not be written (on all ranks).
        """
        pending = self._pending
        if pending is None:
            return
        # Where a rank is gone it stays what is on its way: `close` lets go of it.
        try:
            self._wait(pending.own, pending.partial)
            self._ranks.each(pending.own.result)
            self._wait(pending.sealed, pending.partial)
            self._ranks.on_main(lambda: pending.sealed.result() if pending.sealed else None)
        except CheckpointError:
            self._pending = None
            self._abandon(pending)
            raise
        self._pending = None
        if pending.state.best_sha256:
            self._ranks.on_main(self._drop_best)

    def _wait(self, mine: Future[None] | None, folder: Path) -> None:
        wait_together(self._ranks, mine, lambda: self._hashed.bytes + bytes_in(folder))

    def write_beside(self, write: Callable[[Callable[[int], object]], None], folder: Path) -> None:
        """``write`` on rank 0, while all ranks wait as in :meth:`flush`.

        Args:
            write: Writes files into ``folder``; is given what to tell of checksummed bytes.
            folder: That it writes to.

        Raises:
            FmrizooError: what ``write`` raised (on all ranks).
        """
        future = self._pool.submit(write, self._hashed) if self._ranks.world.main else None
        self._wait(future, folder)
        self._ranks.on_main(lambda: future.result() if future else None)

    def _abandon(self, pending: _Pending) -> None:
        pending.given_up.set()
        if pending.sealed is not None:
            wait([pending.sealed])
            self._remove(pending.state)

    def _remove(self, state: RunState) -> None:
        """Remove what is there of a checkpoint: it takes the room that the next one needs."""
        partial = checkpoint.partial_folder(self._folder.checkpoints, state.step)
        shutil.rmtree(partial, ignore_errors=True)

    def close(self) -> None:
        """Let go; after an error, publish what is on its way if the other ranks still write."""
        pending, self._pending = self._pending, None
        if pending is not None and pending.sealed is not None:
            wait([pending.sealed], timeout=_GRACE)
            pending.given_up.set()
        self._pool.shutdown(wait=True)
        if pending is not None and pending.failed:
            log.error("the checkpoint of step %d could not be written", pending.state.step)

    # -- loading ----------------------------------------------------------------------------

    def newest(self) -> tuple[Path, RunState] | None:
        """As :func:`fmrizoo.trainer.checkpoint.newest_valid`; ranks share the checksums' work."""
        world, checkpoints = self._ranks.world, self._folder.checkpoints
        if world.size == 1:
            return checkpoint.newest_valid(checkpoints, faults_of=_faults)
        checked: dict[Path, list[str]] = {}
        for folder in self._ranks.everywhere(checkpoint.found(checkpoints)):
            mine = _faults(folder, (world.rank, world.size))
            told = [fault for part in self._ranks.gathered(mine) for fault in part]
            checked[folder] = list(dict.fromkeys(told))
            if not told:
                break

        def faults_of(folder: Path) -> list[str]:
            # One older than these is asked for where the best weights of a newer one are damaged.
            return checked[folder] if folder in checked else checkpoint.faults(folder)

        return self._ranks.on_main(
            lambda: checkpoint.newest_valid(checkpoints, faults_of=faults_of)
        )

    def load(self, folder: Path, state: RunState, seed: int) -> None:
        """Weights, optimizer and random numbers of a checkpoint of any number of ranks.

        Where their number has changed nobody has written this rank's random numbers: they start
        from ``seed`` and the step.
        """
        self._best = state.best_step
        if state.best_sha256:
            self._ranks.on_main(self._drop_best)  # a start that was killed had no time for it
        with Sharded(folder) as stored:
            self._engine.restore(stored, alive)
        world = self._ranks.world
        if state.world_size == world.size:
            rng = torch.load(folder / _rng_name(world.rank), weights_only=True)
            set_rng_state(rng, self._ranks.device)
        else:
            seed_everything(seed + 7919 * state.step, world.rank)
        if state.best_sha256:
            # A run that ended in the middle may have left more.
            self._ranks.on_main(self._drop_best)

    # -- the best weights -------------------------------------------------------------------

    def keep_best(self, step: int) -> str:
        """Write what training may change, as it is after ``step``; returns the file's SHA-256."""
        run = self._folder.path
        kept = self._gathered(self._engine.learned())

        def write() -> str:
            checksum = write_weights(run, step, kept)
            self._drop_best()
            return checksum

        self._best = step
        return self._ranks.on_main(write)

    def _drop_best(self) -> None:
        """Remove all best weights but the last and those of checkpoints, one on its way too."""
        needed = {self._best} | checkpoint.best_steps(self._folder.checkpoints)
        if self._pending is not None:
            needed.add(self._pending.state.best_step)
        drop_weights(self._folder.path, needed)

    def weights(self, best: tuple[int, str] | None = None) -> dict[str, Tensor]:
        """All weights, on rank 0 (the others get none).

        Args:
            best: Step and SHA-256 of what :meth:`keep_best` wrote: these values for all that
                training may change. None: everything as it now is.
        """
        kept: dict[str, Tensor] = {}
        names: set[str] | None = None
        if best is not None:
            # Not the answer of on_main: the other ranks have no use for the tensors.
            self._ranks.on_main(lambda: kept.update(read_weights(self._folder.path, *best)))
            names = set(self._engine.model.state_dict()) - self._engine.learned()
        return kept | self._gathered(names)

    def _gathered(self, names: set[str] | None) -> dict[str, Tensor]:
        """Whole weights on rank 0; each tensor is a sign of life."""
        kept = {}
        for name, value in self._engine.weights(names):
            alive()
            if self._ranks.world.main:
                kept[name] = value
        return kept


def _faults(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """As :func:`fmrizoo.trainer.checkpoint.faults`; what is read is a sign of life."""
    return checkpoint.faults(folder, share, lambda _: alive())


def _rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.pt"

"""What all ranks do together to write a checkpoint, load one, or keep the best weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fmrizoo.errors import CheckpointError
from fmrizoo.mup.stored import write_parametrization
from fmrizoo.trainer import checkpoint
from fmrizoo.trainer.best import drop_weights, read_weights, write_weights
from fmrizoo.trainer.checkpoint import RunState
from fmrizoo.trainer.device import rng_state, set_rng_state
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.files import writing
from fmrizoo.trainer.folder import RunFolder
from fmrizoo.trainer.ranks import Ranks


class Saver:
    """An engine's state in a run folder; every method is called on every rank.

    Args:
        keep: Checkpoints kept.
    """

    def __init__(self, engine: Engine, folder: RunFolder, ranks: Ranks, keep: int) -> None:
        self._engine, self._folder, self._ranks, self._keep = engine, folder, ranks, keep

    def save(self, state: RunState) -> None:
        """Publish a checkpoint.

        Raises:
            CheckpointError: it cannot be written; the ones before are untouched.
        """
        partial = checkpoint.partial_folder(self._folder.checkpoints, state.step)
        try:
            with writing(f"the checkpoint of step {state.step}", self._folder.checkpoints):
                self._write(partial, state)
        except CheckpointError:
            # What is there of it only takes the room that the next attempt needs.
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _write(self, partial: Path, state: RunState) -> None:
        world = self._ranks.world
        if world.main:
            partial.mkdir(parents=True)
        dist.barrier()
        self._engine.save(partial)
        torch.save(rng_state(self._ranks.device), partial / _rng_name(world.rank))
        dist.barrier()
        if world.main:
            write_parametrization(partial, self._engine.model)
            checkpoint.seal(self._folder.checkpoints, state, self._keep)
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Weights, optimizer and random numbers of a checkpoint."""
        self._engine.load(folder)
        rng = torch.load(folder / _rng_name(self._ranks.world.rank), weights_only=True)
        set_rng_state(rng, self._ranks.device)

    def keep_best(self, step: int) -> str:
        """Write what training may change, as it is after ``step``; returns the file's SHA-256."""
        run, main = self._folder.path, self._ranks.world.main
        kept = {n: value for n, value in self._engine.weights(self._engine.learned()) if main}

        def write() -> str:
            checksum = write_weights(run, step, kept)
            drop_weights(run, {step} | checkpoint.best_steps(self._folder.checkpoints))
            return checksum

        return self._ranks.on_main(write)

    def weights(self, best: tuple[int, str] | None = None) -> dict[str, Tensor]:
        """All weights, on rank 0 (the others get none).

        Args:
            best: Step and SHA-256 of what :meth:`keep_best` wrote: these values for all that
                training may change. None: everything as it now is.
        """
        main, kept, names = self._ranks.world.main, {}, None
        if best is not None:
            # Not the answer of on_main: the other ranks have no use for the tensors.
            self._ranks.on_main(lambda: kept.update(read_weights(self._folder.path, *best)))
            names = set(self._engine.model.state_dict()) - self._engine.learned()
        kept |= {name: value for name, value in self._engine.weights(names) if main}
        return kept


def _rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.pt"

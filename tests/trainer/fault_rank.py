"""One rank of a tiny run in a process of its own, to which something happens.

python fault_rank.py RANK SIZE PORT FAULT OUT...: one run after another. Faults are ``none``,
``sleep`` (the data stream never answers), ``die`` (kill -9), ``lock`` (a call that holds the
interpreter's lock never returns), ``raise`` (the data stream fails), each on the last rank after
five steps.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from trainer_tiny import TinyStream, inputs

import fmrizoo.trainer.loop as loop
import fmrizoo.trainer.watchdog as watchdog
from fmrizoo.errors import CorruptStoreError, FmrizooError
from fmrizoo.trainer.device import World, end_rank
from fmrizoo.trainer.ranks import leave_code
from fmrizoo.trainer.watchdog import Watchdog, alive

FOREVER = 10_000
LIMIT = 4.0  # seconds without a sign of life, once the fault has happened
NOW: list[Path] = []  # a file that says so


class FaultyStream(TinyStream):
    """Ten micro-batches, five steps; then the fault."""

    def __init__(self, world: World, micro: int, fault: str = "none") -> None:
        super().__init__(world, micro)
        self.fault = fault

    def batches(self, start: int = 0) -> Iterator[Any]:
        if self.fault == "none" or self.world.rank < self.world.size - 1:
            yield from super().batches(start)
        yield from islice(super().batches(start), 10 - start)
        if self.fault == "sleep":
            NOW[0].touch()
            time.sleep(FOREVER)
        elif self.fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault == "lock":
            NOW[0].touch()
            for _ in range(20):  # until the watchdog has seen its new limit
                alive()
                time.sleep(0.1)
            ctypes.PyDLL(None).sleep(FOREVER)
        raise CorruptStoreError("sub-01.h5, run sub-01: frame 3 fails its checksum")


class Impatient(Watchdog):
    """Patient until the fault has happened: a busy machine takes long to start."""

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._wait, daemon=True).start()
        return super().__enter__()

    def _wait(self) -> None:
        while not NOW[0].exists():
            time.sleep(0.1)
        self._limit = LIMIT


def main() -> None:
    """As the command line does it."""
    rank, size, port, fault, *outs = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE=size)
    world = World(int(rank), int(size), int(rank), "test")
    if fault in ("sleep", "lock"):
        NOW.append(Path(outs[0] + ".now"))
        loop.Watchdog = Impatient  # type: ignore[misc]
        watchdog._LOOK = 0.5
    try:
        for out in outs:
            given = inputs(Path(out), dropout=0.3, world=world, save_every=2)
            loop.train(replace(given, loader_for=partial(FaultyStream, fault=fault)))
    except FmrizooError as error:
        sys.stderr.write(f"error: {error}\n")
        leave_code(error.exit_code)
        end_rank(error.exit_code, together=error.together)
        sys.exit(error.exit_code)
    leave_code(0)
    end_rank(0)


if __name__ == "__main__":
    main()

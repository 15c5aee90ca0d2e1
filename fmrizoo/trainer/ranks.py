"""What the ranks of a run tell each other. With one rank every call returns at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from fmrizoo.errors import FmrizooError
from fmrizoo.trainer.device import World, discover

T = TypeVar("T")

# What gloo says of a peer that is no longer there, in plain RuntimeErrors; other backends, and the
# store that the ranks met in, raise a DistError.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out")


def lost(error: BaseException) -> bool:
    """Whether a collective raised ``error`` because it cannot reach another rank (any more)."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return "gloo" in text.lower() and any(words in text for words in _GONE)


def leave_code(code: int) -> None:
    """Write the exit code to ``FMRIZOO_EXIT_FILE`` if that is set (rank 0 only).

    Launchers differ in what they make of their ranks' exit codes; a job script needs the real one.
    """
    path = os.environ.get("FMRIZOO_EXIT_FILE")
    if path and discover().main:
        Path(path).write_text(f"{code}\n", encoding="utf-8")


class Ranks:
    """The ranks of ``world``, after :func:`fmrizoo.trainer.device.init_distributed`."""

    def __init__(self, world: World, device: torch.device) -> None:
        self.world, self.device = world, device

    def everywhere(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.world.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, do: Callable[[], T]) -> T:
        """Result of ``do`` on rank 0, on every rank; its error is raised on every rank too."""
        answer: T | FmrizooError | None = None
        if self.world.main:
            try:
                answer = do()
            except FmrizooError as error:
                answer = error
        answer = self.everywhere(answer)
        if isinstance(answer, FmrizooError):
            raise answer
        return cast(T, answer)

    def each(self, do: Callable[[], T]) -> T:
        """``do`` on every rank; if it fails on one of them, the first error is raised on all.

        Without this the others would wait for the one that failed.
        """
        answer: T | None = None
        failed: FmrizooError | None = None
        try:
            answer = do()
        except FmrizooError as error:
            failed = error
        for told in self.gathered(failed):
            if told is not None:
                raise told
        return cast(T, answer)

    def gathered(self, value: T) -> list[T]:
        """``value`` of all ranks, in rank order."""
        if self.world.size == 1:
            return [value]
        everyone: list[T] = [value] * self.world.size
        dist.all_gather_object(everyone, value)
        return everyone

    def nodes(self) -> int:
        """Machines that the ranks run on, by their host names."""
        return len(set(self.gathered(socket.gethostname())))

    def reduced(self, values: list[float]) -> list[float]:
        """Sum over ranks, in float64."""
        if self.world.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return cast(list[float], tensor.tolist())

"""SIGTERM, SIGINT and SIGUSR1 become a request that the loop answers at the end of a step."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)

# SIGUSR1 is what batch systems are asked to warn with (`sbatch --signal=USR1@300`).
_CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Context in which the first signal sets :attr:`requested`; a second one acts as usual.

    Outside the main thread, where Python allows no handlers, it only carries the flag.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in _CAUGHT}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # A second Ctrl-C must be able to end a step that hangs.
        self._restore()
        log.warning(
            "%s: saving a checkpoint at the end of this step; once more ends at once",
            signal.Signals(number).name,
        )

    def _restore(self) -> None:
        for caught, handler in self._before.items():
            signal.signal(caught, handler)
        self._before = {}

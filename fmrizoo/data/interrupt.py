"""Ctrl-C and SIGTERM as one exception that never strikes while a file is being written.

HDF5 calls back into Python for every write; an exception raised there would be lost in its C code.
So the handler raises at once outside :func:`shield`, and at the shield's end inside it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: nothing is broken, and the same call goes on where this one stopped."""


@dataclass
class _State:
    """Of the one main thread that signals are delivered to."""

    listening: bool = False
    shields: int = 0
    pending: bool = False


_STATE = _State()


def _handle(number: int, frame: FrameType | None) -> None:
    if _STATE.shields:
        _STATE.pending = True
    else:
        raise Interrupted(signal.Signals(number).name)


@contextmanager
def listening() -> Iterator[None]:
    """SIGINT and SIGTERM raise :class:`Interrupted` inside this block.

    Only the main thread gets signals: in another one, or inside another such block, nothing
    changes.
    """
    if threading.current_thread() is not threading.main_thread() or _STATE.listening:
        yield
        return
    before = {s: signal.signal(s, _handle) for s in (signal.SIGINT, signal.SIGTERM)}
    _STATE.listening, _STATE.pending = True, False
    try:
        yield
    finally:
        _STATE.listening = False
        for caught, handler in before.items():
            signal.signal(caught, handler)


@contextmanager
def shield() -> Iterator[None]:
    """What runs here is not interrupted; a signal that came meanwhile is raised at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _STATE.shields += 1
    try:
        yield
    finally:
        _STATE.shields -= 1
    if _STATE.pending and not _STATE.shields:
        _STATE.pending = False
        raise Interrupted("signal")

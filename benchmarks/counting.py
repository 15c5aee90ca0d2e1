"""What reading costs a process: CPU time, read calls and bytes, opened files. Linux only."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cpu_seconds() -> float:
    """User and system time of this process and of its living workers."""
    workers = [w.pid for w in multiprocessing.active_children() if w.pid]
    # The clock of another process, as clock_getcpuclockid(3) makes it.
    return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in workers)


def read_calls() -> tuple[int, ...]:
    """System calls that read, and bytes that they gave, of this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    found = dict(line.split(": ") for line in lines)
    return int(found["syscr"]), int(found["rchar"])


@contextmanager
def opens(files: Iterable[Path]) -> Iterator[Callable[[], int]]:
    """Counts how often any of ``files`` is opened, by inotify."""
    is_open, closed, is_folder = 0x20, 0x18, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    names: dict[int, set[bytes]] = {}
    for path in files:
        # Closing is watched too: the kernel would join two opens in a row into one event.
        watch = libc.inotify_add_watch(descriptor, bytes(path.parent), is_open | closed)
        if watch < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", str(path.parent))
        names.setdefault(watch, set()).add(path.name.encode())
    total = 0

    def count() -> int:
        nonlocal total
        while True:
            try:
                data = os.read(descriptor, 1 << 20)
            except BlockingIOError:
                return total
            at = 0
            while at < len(data):
                watch, mask, _, length = struct.unpack_from("iIII", data, at)
                name = data[at + 16 : at + 16 + length].rstrip(b"\0")
                known = name in names.get(watch, ())
                total += bool(mask & is_open) and not mask & is_folder and known
                at += 16 + length

    try:
        yield count
    finally:
        os.close(descriptor)

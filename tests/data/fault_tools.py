"""Planting faults in a store and judging what reading it then gives.

Run as a script it is the worker: faults come in as JSON, one verdict a line goes out. Workers are
processes of their own, so that a crash of libhdf5 or an endless read is counted, not suffered.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import selectors
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fmrizoo.data.store import Store
from fmrizoo.errors import CorruptStoreError, DataError

VERDICTS = ("raised", "harmless", "silent", "vague", "crash", "hang")
PATIENCE = 60.0  # seconds without a verdict after which a worker counts as hanging


@dataclass(frozen=True)
class Fault:
    """One fault: ``kind`` picks the function of ``KINDS``, ``file`` and ``at`` say where."""

    kind: str
    file: str
    at: tuple[int, ...] = ()
    other: str = ""


def digest(path: Path) -> str:
    """SHA-256 over all that reading a store can give: the index, arrays and every frame."""
    found = hashlib.sha256()
    store = Store(path)
    for run in store.runs:
        reader = store.open(run)
        found.update(repr(run).encode())
        found.update(repr((reader.kind, reader.grid, reader.statistics)).encode())
        parts = (*vars(reader.decoder).values(), reader.index)
        for array in (*parts, reader.read_compact(0, reader.n_frames)):
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def places(path: Path) -> dict[str, list[tuple[int, int]]]:
    """(offset, bytes) of every stored frame, by subject file."""
    store, found = Store(path), {}
    for run in store.runs:
        reader = store.open(run)
        row = reader.row * reader.dtype.itemsize
        rows = (
            [(reader._offset + t * row, row) for t in range(reader.n_frames)]
            if (not reader._dense)
            else list(reader._chunks)
        )
        found.setdefault(run.file, []).extend(rows)
    return found


# --- the faults -----------------------------------------------------------------------------------


def _write(file: Path, at: int, data: bytes) -> None:
    with open(file, "r+b", buffering=0) as handle:
        os.pwrite(handle.fileno(), data, at)


def _read(file: Path, at: int, size: int) -> bytes:
    with open(file, "rb") as handle:
        return os.pread(handle.fileno(), size, at)


def flip(file: Path, fault: Fault) -> None:
    """One bit: ``at`` is byte, bit."""
    byte, bit = fault.at
    _write(file, byte, bytes([_read(file, byte, 1)[0] ^ (1 << bit)]))


def truncate(file: Path, fault: Fault) -> None:
    """Cut to ``at`` bytes."""
    os.truncate(file, fault.at[0])


def zero(file: Path, fault: Fault) -> None:
    """Zeros over ``at``: offset, bytes."""
    _write(file, fault.at[0], bytes(fault.at[1]))


def zero_tail(file: Path, fault: Fault) -> None:
    """Zeros from ``at`` on, the length kept: a block device that lost its last writes."""
    _write(file, fault.at[0], bytes(file.stat().st_size - fault.at[0]))


def swap(file: Path, fault: Fault) -> None:
    """Two stretches exchanged: ``at`` is offset, offset, bytes."""
    one, two, size = fault.at
    first, second = _read(file, one, size), _read(file, two, size)
    _write(file, one, second)
    _write(file, two, first)


def append(file: Path, fault: Fault) -> None:
    """Bytes after the end."""
    with open(file, "ab") as handle:
        handle.write(bytes(fault.at))


def replace(file: Path, fault: Fault) -> None:
    """Another file under this name (``other`` is its path)."""
    shutil.copy(fault.other, file)


def remove(file: Path, fault: Fault) -> None:
    """No such file."""
    file.unlink()


def folder(file: Path, fault: Fault) -> None:
    """A folder under this name."""
    file.unlink()
    file.mkdir()


def pipe(file: Path, fault: Fault) -> None:
    """A named pipe under this name: opening it may wait for ever."""
    file.unlink()
    os.mkfifo(file)


def dangling(file: Path, fault: Fault) -> None:
    """A link to nothing."""
    file.unlink()
    file.symlink_to("nowhere")


KINDS: dict[str, Callable[[Path, Fault], None]] = {
    f.__name__: f
    for f in (
        flip, truncate, zero, zero_tail, swap, append, replace, remove, folder, pipe, dangling,
    )
}  # fmt: skip


def judge(path: Path, good: str, names: Iterable[str]) -> tuple[str, str]:
    """Verdict on reading the store as it is now, and what was said."""
    try:
        same = digest(path) == good
    except (CorruptStoreError, DataError) as error:
        said = str(error)
        clear = str(path) in said and any(name in said for name in names)
        return ("raised" if clear and "\n" not in said else "vague"), said
    except BaseException as error:  # whatever else comes out of the reader is a defect
        return "crash", f"{type(error).__name__}: {error}"
    return ("harmless" if same else "silent"), ""


def _worker(path: Path, good: str) -> None:
    pristine = path.with_name(path.name + ".good")
    names = [p.name for p in pristine.iterdir()]
    for line in sys.stdin:
        fault = Fault(**json.loads(line))
        target = path / fault.file
        KINDS[fault.kind](target, fault)
        sys.stdout.write(json.dumps(judge(path, good, names)) + "\n")
        sys.stdout.flush()
        if target.is_dir():
            target.rmdir()
        elif target.is_symlink() or target.is_fifo():
            target.unlink()
        shutil.copyfile(pristine / fault.file, target)


# --- running many ---------------------------------------------------------------------------------


class Bench:
    """Plants faults in a copy of ``store`` and counts verdicts."""

    def __init__(self, store: Path, work: Path) -> None:
        self.path = work / "store"
        self.good = work / "store.good"
        for copy in (self.path, self.good):
            shutil.copytree(store, copy)
            for file in copy.iterdir():
                file.chmod(0o644)
        self.digest = digest(self.good)
        self.counts: dict[str, Counter[str]] = {}
        self.bad: list[tuple[Fault, str, str]] = []
        self._errors = work / "stderr"

    def run(self, title: str, faults: Sequence[Fault]) -> Counter[str]:
        """:meth:`run_all` of one kind; its counts."""
        self.run_all({title: faults})
        return self.counts[title]

    def run_all(self, every: Mapping[str, Sequence[Fault]]) -> None:
        """Judge every fault; a worker that dies or hangs is replaced and the fault counted."""
        left = [(title, fault) for title, faults in every.items() for fault in faults]
        while left:
            done = self._batch([fault for _, fault in left])
            for (title, fault), (verdict, said) in zip(left, done, strict=False):
                self.counts.setdefault(title, Counter())[verdict] += 1
                if verdict not in ("raised", "harmless"):
                    self.bad.append((fault, verdict, said))
            left = left[len(done) :]

    def _batch(self, faults: Sequence[Fault]) -> list[tuple[str, str]]:
        """Verdicts until the worker stops; the last one may be its death."""
        shutil.rmtree(self.path)
        shutil.copytree(self.good, self.path)
        command = [sys.executable, "-W", "ignore", __file__, str(self.path), self.digest]
        with open(self._errors, "wb") as errors:
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )
        assert worker.stdin is not None and worker.stdout is not None
        lines = "".join(json.dumps(asdict(f)) + "\n" for f in faults).encode()
        feeder = threading.Thread(target=_feed, args=(worker, lines), daemon=True)
        feeder.start()
        done: list[tuple[str, str]] = []
        selector = selectors.DefaultSelector()
        selector.register(worker.stdout, selectors.EVENT_READ)
        buffer = b""
        while len(done) < len(faults):
            if not selector.select(PATIENCE):
                done.append(("hang", f"no verdict within {PATIENCE:g} s"))
                break
            got = os.read(worker.stdout.fileno(), 1 << 16)
            if not got:
                said = self._errors.read_text(errors="replace")[-300:]
                done.append(("crash", f"worker ended with {worker.wait()}: {said}"))
                break
            *whole, buffer = (buffer + got).split(b"\n")
            done += [(verdict, said) for verdict, said in map(json.loads, whole)]
        worker.kill()
        worker.wait()
        feeder.join()
        selector.close()
        worker.stdout.close()
        return done


def _feed(worker: subprocess.Popen[bytes], lines: bytes) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(lines)
        worker.stdin.close()
    except BrokenPipeError:
        pass  # the worker died; the bench counts it


def table(counts: dict[str, Counter[str]]) -> str:
    """Counts per fault, as text."""
    rows = [["fault", *VERDICTS, "all"]]
    rows += [[k, *(str(c[v]) for v in VERDICTS), str(c.total())] for k, c in counts.items()]
    total = sum(counts.values(), Counter())
    rows.append(["all", *(str(total[v]) for v in VERDICTS), str(total.total())])
    first = max(len(r[0]) for r in rows)
    return "\n".join(r[0].ljust(first) + "".join(c.rjust(10) for c in r[1:]) for r in rows)


# --- choosing places ------------------------------------------------------------------------------


def flips(path: Path, n: int, seed: int) -> list[Fault]:
    """``n`` single-bit flips: half over whole files by size, half outside the frames (headers,
    HDF5 metadata, small arrays, padding), a tenth of them in the index."""
    draw = random.Random(seed)
    found = []
    frames = places(path)
    outside = {name: _outside(path / name, taken) for name, taken in frames.items()}
    everything = [(p.name, p.stat().st_size) for p in sorted(path.iterdir()) if p.name in frames]
    for k in range(n):
        if k % 10 == 0:
            name = "index.json"
            byte = draw.randrange((path / name).stat().st_size)
        elif k % 2:
            name, size = draw.choices(everything, [s for _, s in everything])[0]
            byte = draw.randrange(size)
        else:
            name = draw.choice(sorted(outside))
            byte = int(draw.choice(outside[name]))
        found.append(Fault("flip", name, (byte, draw.randrange(8))))
    return found


def _outside(file: Path, frames: list[tuple[int, int]]) -> np.ndarray:
    """Bytes of a subject file that belong to no frame."""
    free = np.ones(file.stat().st_size, bool)
    for at, size in frames:
        free[at : at + size] = False
    return np.flatnonzero(free)


def whole(path: Path, n: int, seed: int, foreign: Path) -> dict[str, list[Fault]]:
    """Faults other than flips, by title: ``n`` of each kind that has a place or a length."""
    draw = random.Random(seed)
    frames = places(path)
    name = sorted(frames)[0]
    size = (path / name).stat().st_size
    index = (path / "index.json").stat().st_size
    some = draw.choices(frames[name], k=n)
    pairs = [draw.sample(frames[name], 2) for _ in range(n)]
    other = sorted(p for p in foreign.glob("sub-*.h5"))[0]
    names = [name, "index.json"]
    cuts = [0, 1, 8, 511, size - 1, *(draw.randrange(size) for _ in range(n))]
    return {
        "truncated file": [Fault("truncate", name, (cut,)) for cut in cuts],
        "truncated index": [
            Fault("truncate", "index.json", (cut,))
            for cut in [0, 1, index - 2, *(draw.randrange(index - 2) for _ in range(n))]
        ],
        "zeroed frame": [Fault("zero", name, place) for place in some],
        "swapped frames": [
            Fault("swap", name, (a, b, min(m, k))) for (a, m), (b, k) in pairs
        ],
        "zeroed block": [
            Fault("zero", name, (at, min(512, size - at)))
            for at in (512 * draw.randrange(-(-size // 512)) for _ in range(n))
        ],
        "zeroed tail": [Fault("zero_tail", name, (draw.randrange(size),)) for _ in range(n)],
        "appended bytes": [Fault("append", k, (1, 2, 3)) for k in names],
        "other file of this name": [Fault("replace", name, other=str(other))],
        "other index": [Fault("replace", "index.json", other=str(foreign / "index.json"))],
        "no file": [Fault(k, f) for k in ("remove", "folder", "pipe", "dangling") for f in names],
    }  # fmt: skip


def read_until(path: Path, good: set[str], seconds: float) -> Counter[str]:
    """Read the store again and again while others write to it; every result must be in ``good``."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end or not counts:
        try:
            counts["harmless" if digest(path) in good else "silent"] += 1
        except (CorruptStoreError, DataError):
            counts["raised"] += 1
    return counts


if __name__ == "__main__":
    if sys.argv[1] == "watch":
        seen = read_until(Path(sys.argv[2]), set(sys.argv[4:]), float(sys.argv[3]))
        sys.stdout.write(json.dumps(seen))
    else:
        _worker(Path(sys.argv[1]), sys.argv[2])

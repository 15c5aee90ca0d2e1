"""What a clip costs when a run that is opened gives one clip or several: ``data.clips_per_visit``.

    python benchmarks/visits.py [--subjects 64] [--clips 256] [--folder DIR]

A synthetic store of many subjects (MNI152 brain mask, four clips each), of which none is open by
chance, as with the tens of thousands of a large store: without visits one run is kept open.
Per clip of 20 frames: system calls that read and bytes that they gave (``/proc/self/io``), runs
opened, and CPU time of the process, beside one clip a visit.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fmrizoo.config import DataConfig
from fmrizoo.data import store as store_module
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.store import Store

from recordings import WINDOW, brain, synthetic, write_store

FRAMES = 50  # four clips of 20 frames at half overlap


def write(folder: Path, subjects: int) -> None:
    """The same recording under many names: only its cost matters here."""
    mask, tissue = brain()
    write_store(folder, itertools.repeat(synthetic(tissue, FRAMES, 0), subjects), mask)


def io() -> tuple[int, int]:
    """System calls that read, and bytes read, of this process so far."""
    lines = Path("/proc/self/io").read_text().split("\n")
    found = dict(line.split(": ") for line in lines if line)
    return int(found["syscr"]), int(found["rchar"])


def measure(folder: Path, visit: int, clips: int) -> dict[str, float]:
    """Costs per clip, of reading ``clips`` clips in batches of 8."""
    opened = 0
    real = store_module.RunReader

    def counted(*args: Any) -> Any:
        nonlocal opened
        opened += 1
        return real(*args)

    store_module.RunReader = counted  # type: ignore[assignment, misc]
    store = Store(folder, cache=1)
    config = DataConfig(clip_frames=WINDOW, clip_stride=0.5, clips_per_visit=visit, threads=2)
    table = ClipTable.windows(store, store.runs, config)
    stream = Loader(table, config, 8, seed=1).batches()
    before, cpu = io(), time.process_time()
    for _ in itertools.islice(stream, clips // 8):
        pass
    stream.close()
    spent, after = time.process_time() - cpu, io()
    store_module.RunReader = real  # type: ignore[misc]
    return {
        "read calls": (after[0] - before[0]) / clips,
        "MB": (after[1] - before[1]) / clips / 1e6,
        "opens": opened / clips,
        "CPU ms": 1e3 * spent / clips,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", type=int, default=64)
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write(folder, args.subjects)
        found: dict[int, list[dict[str, float]]] = {1: [], 2: [], 4: []}
        for _ in range(args.rounds):  # in turn, so that a busy moment meets all of them
            for visit, rows in found.items():
                rows.append(measure(folder, visit, args.clips))
        medians = {
            visit: {key: float(np.median([r[key] for r in rows])) for key in rows[0]}
            for visit, rows in found.items()
        }
        for visit, row in medians.items():
            parts = [f"{k} {v:.2f} ({v / medians[1][k]:.2f}×)" for k, v in row.items()]
            print(f"{visit} clips a visit: {', '.join(parts)}")


if __name__ == "__main__":
    main()

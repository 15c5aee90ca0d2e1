"""What a 20-frame window costs: our store beside per-frame .pt files and gzip HDF5.

    python benchmarks/store.py [--quick] [--folder DIR]

Synthetic BOLD inside nilearn's MNI152 2 mm brain mask in a 96×96×96 grid. The same windows are
read by every contender, in turn, in one process; the number is process CPU time (user + system)
per window, median over rounds. ``.pt`` and gzip are read through ``DataLoader(num_workers=0)``,
the obvious way; ours ends where its samples go to the device (compact), after they are normalised
there (what NeuroMamba takes), and after they are made dense on the CPU, which the others already
are.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fmrizoo.config import DataConfig, PrepareConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.codec import encode
from fmrizoo.data.hdf5 import SubjectWriter
from fmrizoo.data.loader import Loader
from fmrizoo.data.process import statistics as run_statistics
from fmrizoo.data.spatial import place, target_affine
from fmrizoo.data.store import Store, write_index
from fmrizoo.types import Contract

WINDOW = 20
GRID = (96, 96, 96)


def brain() -> tuple[np.ndarray, np.ndarray]:
    """Nilearn's MNI152 brain mask on the stored grid, and a tissue-like mean image."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    config = PrepareConfig()
    mask_image = load_mni152_brain_mask(resolution=2)
    template = load_mni152_template(resolution=2)
    mask, _ = place(np.asarray(mask_image.dataobj) > 0, mask_image.affine, config, nearest=True)
    tissue, _ = place(template.get_fdata(dtype=np.float32), template.affine, config)
    return mask, tissue[mask]


def synthetic(tissue: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """``(frames, n_vox)`` like EPI: tSNR about 50, drift, lag-1 correlation 0.4, whole numbers."""
    rng = np.random.default_rng(seed)
    mean = 3000 + 9000 * tissue / tissue.max()
    noise = rng.standard_normal((frames, tissue.size), dtype=np.float32)
    for t in range(1, frames):
        noise[t] = 0.4 * noise[t - 1] + 0.92 * noise[t]
    drift = np.linspace(-1, 1, frames, dtype=np.float32)[:, None]
    out = mean + mean / 50 * (noise + drift * rng.standard_normal(tissue.size, dtype=np.float32))
    return np.rint(out).astype(np.float32)


def write_ours(folder: Path, runs: list[np.ndarray], mask: np.ndarray) -> Path:
    """A store with the codec int8."""
    contract = Contract("MNI152NLin2009cAsym", "RAS", GRID, (2.0, 2.0, 2.0), 0.8)
    entries = []
    for number, bold in enumerate(runs):
        subject = f"{number:02d}"
        name = f"sub-{subject}_task-rest"
        meta = {
            "name": name,
            "uuid": f"{number:032x}",
            "key": {"subject": subject, "session": "", "task": "rest", "acquisition": ""}
            | {"run": "", "extra": []},
            "tr": contract.tr,
            "grid": list(GRID),
            "affine": target_affine(PrepareConfig()).tolist(),
            "contract": contract.to_dict(),
            "events": [],
            "statistics": run_statistics(bold),
            "fingerprint": {},
        }
        file = f"sub-{subject}.h5"
        with SubjectWriter(folder / file, subject) as writer:
            writer.add(meta, encode(bold, "int8", 0.02), mask)
        entries.append({**writer.entries[0], "file": file})
    write_index(folder, entries, "benchmark")
    return folder


def z_frames(bold: np.ndarray, mask: np.ndarray) -> Iterator[np.ndarray]:
    """Dense float16 frames of global z-scores, background at the minimum."""
    z = (bold - bold.mean()) / bold.std()
    low = z.min()
    for row in z:
        frame = np.full(GRID, low, np.float16)
        frame[mask] = row
        yield frame


class PtWindows(Dataset):
    """SwiFT's way: one ``frame_N.pt`` of shape (x, y, z, 1) per volume, concatenated in time."""

    def __init__(self, folder: Path, windows: list[tuple[int, int]]) -> None:
        self.folder, self.windows = folder, windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> torch.Tensor:
        run, start = self.windows[i]
        frames = range(start, start + WINDOW)
        parts = [torch.load(self.folder / f"{run}" / f"frame_{t}.pt") for t in frames]
        return torch.cat(parts, dim=-1)


class GzipWindows(Dataset):
    """h5py with gzip, chunk = one frame (the best chunk for windows)."""

    def __init__(self, folder: Path, windows: list[tuple[int, int]], n_runs: int) -> None:
        # No chunk cache: with many subjects it never hits, with two it would hide the work.
        self.files = [h5py.File(folder / f"{r}.h5", "r", rdcc_nbytes=0) for r in range(n_runs)]
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> torch.Tensor:
        run, start = self.windows[i]
        return torch.from_numpy(self.files[run]["bold"][start : start + WINDOW])


def write_others(folder: Path, runs: list[np.ndarray], mask: np.ndarray) -> None:
    """Per-frame .pt files and gzip HDF5 files of the same numbers."""
    for number, bold in enumerate(runs):
        (folder / str(number)).mkdir(parents=True)
        with h5py.File(folder / f"{number}.h5", "w") as file:
            data = file.create_dataset(
                "bold",
                (len(bold), *GRID),
                "f2",
                chunks=(1, *GRID),
                compression="gzip",
                compression_opts=4,
            )
            for t, frame in enumerate(z_frames(bold, mask)):
                data[t] = frame
                torch.save(
                    torch.from_numpy(frame).unsqueeze(-1), folder / str(number) / f"frame_{t}.pt"
                )


@dataclass
class Contender:
    """A name, and a function that reads all windows once and says how many."""

    name: str
    read: Callable[[], int]
    bytes_on_disk: int


def size(paths: Iterator[Path]) -> int:
    """Bytes of files."""
    return sum(p.stat().st_size for p in paths)


def contenders(folder: Path, n_runs: int, windows: list[tuple[int, int]]) -> list[Contender]:
    """The four ways, over the same windows."""
    store = Store(folder / "ours")
    runs = np.array([w[0] for w in windows], np.int32)
    starts = np.array([w[1] for w in windows], np.int32)
    table = ClipTable(store, store.runs, runs, starts, WINDOW, 1)
    loader = Loader(table, DataConfig(threads=1), 1, shuffle=False)

    def compact() -> int:
        return sum(len(batch) for batch in loader.epoch())

    def normalised() -> int:
        return sum(len(b.to_batch("cpu", torch.bfloat16)) for b in loader.epoch())

    def dense() -> int:
        return sum(len(b.to_batch("cpu", torch.bfloat16).bold) for b in loader.epoch())

    def through(dataset: Dataset[Any]) -> Callable[[], int]:
        return lambda: sum(len(b) for b in DataLoader(dataset, batch_size=1, num_workers=0))

    other = folder / "other"
    ours = size((folder / "ours").glob("sub-*.h5"))
    return [
        Contender("fmrizoo int8, compact + checksum", compact, ours),
        Contender("fmrizoo int8, normalised, compact", normalised, ours),
        Contender("fmrizoo int8, made dense on the CPU", dense, ours),
        Contender(
            "per-frame .pt, DataLoader",
            through(PtWindows(other, windows)),
            size(other.rglob("*.pt")),
        ),
        Contender(
            "h5py gzip-4 chunk=1, DataLoader",
            through(GzipWindows(other, windows, n_runs)),
            size(other.glob("*.h5")),
        ),
    ]


def measure(ways: list[Contender], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds per window; the ways take turns in every round."""
    seen: dict[str, list[float]] = {w.name: [] for w in ways}
    for number, way in itertools.product(range(rounds + 1), ways):
        before = time.process_time()
        count = way.read()
        spent = (time.process_time() - before) / count * 1000
        if number:  # the first round opens files and fills the page cache
            seen[way.name].append(spent)
    return {name: statistics.median(values) for name, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run, few rounds")
    parser.add_argument("--folder", type=Path, default=None, help="where the data go (temporary)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    n_runs, frames, n_windows, rounds = (1, 60, 6, 3) if args.quick else (2, 120, 16, 7)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        mask, tissue = brain()
        runs = [synthetic(tissue, frames, seed) for seed in range(n_runs)]
        (folder / "ours").mkdir()
        write_ours(folder / "ours", runs, mask)
        write_others(folder / "other", runs, mask)
        rng = np.random.default_rng(0)
        windows = [
            (int(rng.integers(n_runs)), int(rng.integers(frames - WINDOW + 1)))
            for _ in range(n_windows)
        ]
        ways = contenders(folder, n_runs, windows)
        error = max(r.quantisation_error for r in Store(folder / "ours").runs)
        report(ways, measure(ways, rounds), raw=n_runs * frames * 2 * int(np.prod(GRID)))
        print(
            f"\n{n_runs} run(s) of {frames} frames, {mask.sum()} brain voxels "
            f"({mask.mean():.1%} of the grid), {n_windows} windows, median of {rounds} rounds; "
            f"int8 rms error {error:.4f} temporal s.d."
        )


def report(ways: list[Contender], cpu: dict[str, float], raw: int) -> None:
    """The ratio table."""
    ours = cpu[ways[0].name]
    print(f"{'':38s}{'CPU ms/window':>14s}{'× ours':>9s}{'bytes/raw fp16':>16s}")
    for way in ways:
        ratio = cpu[way.name] / ours
        print(f"{way.name:38s}{cpu[way.name]:14.2f}{ratio:9.1f}{way.bytes_on_disk / raw:16.4f}")


if __name__ == "__main__":
    main()

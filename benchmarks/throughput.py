"""Does the loader keep up, and what does the engine cost? Full-size clips through the real trainer.

    python benchmarks/throughput.py [stall] [overhead] [--quick] [--folder DIR]

``stall``: every pretraining recipe at its shipped size and three of fine-tuning, a few steps each,
on synthetic 96×96×96 runs. A row is judged by the share of the step that the trainer waited for
clips (``stall`` of metrics.jsonl) and, apart from it, by what the reader threads took of the
process's CPU time: where all cores compute, clips can be ready in time and still cost speed.

``overhead``: :class:`fmrizoo.trainer.engine.Engine` against the same step written out by hand
(``bare_loop.py``), turn by turn in one process, for each ZeRO stage at one rank.

Targets are printed beside what was measured; nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from fmrizoo.data.store import Store
from fmrizoo.data.synthetic.config import load_synth_config
from fmrizoo.data.synthetic.write import synthesise

from engine_overhead import SETTINGS, Overhead, overhead
from steps import CACHED, Step, evict, run

PRETRAINING = [
    f"pretrain/{backbone}_{objective}"
    for backbone in ("swin4d", "swin_factorized", "neuromamba")
    for objective in ("simmim", "ar")
]
FINETUNING = ["finetune/scratch", "finetune/last_block", "finetune/lora"]
LIMIT = 0.02  # of the step
MOST = 1.10  # engine / bare loop


def make_store(folder: Path, subjects: int) -> Store:
    """Runs of 100 frames at full size, with traits to fine-tune on."""
    wanted = [f"subjects={subjects}", "frames=100"]
    synthesise(folder, load_synth_config(None, wanted), store=True)
    return Store(folder)


# --- the loader ----------------------------------------------------------------------------------


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def stall_row(name: str, clips: int, steps: list[Step]) -> tuple[float, float]:
    """Print one row; returns the shares of waiting and of the readers' CPU time."""
    wall = statistics.median(s.wall for s in steps)
    whole, cpu = sum(s.wall for s in steps), sum(s.cpu for s in steps)
    stall = sum(s.stall * s.wall for s in steps) / whole
    waited = sum(s.waited for s in steps) / whole
    readers = sum(s.readers for s in steps) / cpu
    moved = sum(s.moved for s in steps) / whole
    met = max(stall, waited, readers) < LIMIT
    print(
        f"{name:38s}{clips:6d}{wall:9.3f}{stall:9.2%}{waited:9.2%}"
        f"{max(s.stall for s in steps):9.2%}{readers:9.2%}{moved:9.2%}  {verdict(met)}",
        flush=True,
    )
    return max(stall, waited), readers


def stalls(store: Store, steps: int, batch: int, names: list[str]) -> None:
    """The table of the loader."""
    print(
        f"\nLoader: target < {LIMIT:.0%} of a step in each of stall, waited and readers\n"
        f"{'recipe':38s}{'clips':>6s}{'step s':>9s}{'stall':>9s}{'waited':>9s}{'worst':>9s}"
        f"{'readers':>9s}{'moving':>9s}"
    )
    seconds: dict[str, float] = {}
    for name in names:
        found = run(name, store, steps, batch)
        stall_row(name, batch, found)
        seconds[name] = statistics.median(s.wall for s in found)
    if CACHED not in names:
        stall_row(f"{CACHED} (cached features)", 4, run(CACHED, store, 10 * steps, 4))
    quickest = min(seconds, key=lambda n: seconds[n])
    evict(store.path)
    stall_row(f"{quickest}, cold", batch, run(quickest, store, steps, batch))
    stall_row(f"{quickest}, 1 reader", batch, run(quickest, store, steps, batch, threads=1))
    # Two readers, each slower than a step by three times: clips come too late in every step.
    delay = 3 * seconds[quickest] / batch
    found = run(quickest, store, min(steps, 2), batch, delay=delay)
    shares = stall_row(f"{quickest}, slow disk", batch, found)
    print(
        f"The last row is a control: every clip takes {delay:.2f} s more to read. Its stall must"
        f" be seen: {'seen' if shares[0] > 0.1 else 'NOT SEEN, so the rows above say nothing'}."
    )


# --- the engine ----------------------------------------------------------------------------------


def span(values: list[float]) -> str:
    return f"{statistics.median(values):7.3f} ({min(values):.3f}–{max(values):.3f})"


def overhead_row(name: str, found: Overhead) -> bool:
    """Print one row; returns whether it meets the target in CPU time."""
    met = statistics.median(found.cpu_ratios) <= MOST
    print(
        f"{name:34s}{found.bare_cpu:9.2f}{found.engine_cpu:9.2f}{span(found.cpu_ratios):>24s}"
        f"{span(found.wall_ratios):>24s}{found.difference:10.1e}  {verdict(met)}",
        flush=True,
    )
    return met


def overheads(store: Store, rounds: int, settings: list[tuple[str, str, int]]) -> None:
    """The table of the engine, and where each side's time goes."""
    print(
        f"\nEngine over bare loop, one clip a step: target ≤ {MOST:.2f} (CPU time)\n"
        f"{'recipe, precision, ZeRO':34s}{'bare s':>9s}{'ours s':>9s}{'CPU ratio':>24s}"
        f"{'wall ratio':>24s}{'Δ loss':>10s}"
    )
    rows: list[tuple[str, Overhead]] = []
    for recipe, precision, stage in settings:
        found = overhead(recipe, store, precision, stage, rounds)
        name = f"{recipe.removeprefix('pretrain/')} {precision} {stage}"
        if found.runs != stage:
            name += f" (runs {found.runs})"
        overhead_row(name, found)
        rows.append((name, found))
    phases = list(rows[0][1].phases["bare"])
    print("\nCPU milliseconds of a step, bare / ours")
    print(f"{'':34s}" + "".join(f"{p:>16s}" for p in phases) + f"{'bare AdamW':>12s}")
    for name, found in rows:
        parts = (f"{found.phases['bare'][p]:.0f} / {found.phases['ours'][p]:.0f}" for p in phases)
        print(f"{name:34s}" + "".join(f"{p:>16s}" for p in parts) + f"{found.adamw:>12s}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="*", help="stall, overhead; both if nothing is named")
    parser.add_argument("--quick", action="store_true", help="one quick recipe, few steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="that compute")
    parser.add_argument("--steps", type=int, default=3, help="measured, of each recipe")
    parser.add_argument("--rounds", type=int, default=5, help="of bare loop and engine in turn")
    parser.add_argument("--batch", type=int, default=1, help="clips of a step")
    parser.add_argument("--recipes", nargs="*", default=[], help="only these, of stall")
    parser.add_argument("--folder", type=Path, default=None, help="where the data go (temporary)")
    args = parser.parse_args()
    if unknown := set(args.what) - {"stall", "overhead"}:
        parser.error(f"unknown part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    wanted = args.what or ["stall", "overhead"]
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    began = time.monotonic()
    try:
        store = make_store(folder / "store", 2 if args.quick else 4)
        print(
            f"{len(store.runs)} runs of 100 frames, {store.runs[0].n_vox} voxels, "
            f"{args.threads} threads compute, torch {torch.__version__}"
        )
        parts: dict[str, Callable[[], None]] = {
            "stall": lambda: stalls(store, args.steps, args.batch, recipes(args)),
            "overhead": lambda: overheads(
                store, args.rounds, SETTINGS[-1:] if args.quick else SETTINGS
            ),
        }
        for part in wanted:
            parts[part]()
    finally:
        shutil.rmtree(folder)
    print(f"\n{time.monotonic() - began:.0f} s in all")


def recipes(args: argparse.Namespace) -> list[str]:
    """Which recipes the loader is measured with."""
    if args.recipes:
        return list(args.recipes)
    return ["pretrain/neuromamba_simmim"] if args.quick else [*PRETRAINING, *FINETUNING]


if __name__ == "__main__":
    main()

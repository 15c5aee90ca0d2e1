"""What each way to fine-tune costs against training the whole encoder: time of a step and memory.

    python benchmarks/heads.py [--recipe pretrain/sizes/swin4d_51M] [--precision fp32 bf16]
        [--rounds 3] [--steps 2] [--threads 1] [--checkpointing none] [--frames 20]

One clip a step through the trainer's own engine (DeepSpeed, AdamW). Every head runs in a process of
its own, turn by turn; a ratio is the median over turns of full fine-tuning / this head. Time is the
process's CPU time of a step, after one that warms up. Memory is the growth of the resident size at
its highest during a step over what the process held before it built the model: weights, gradients,
optimizer and activations. Nothing is asserted: read the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

FULL = "all weights"
# Name → head section, and whether the frozen encoder's features are kept.
HEADS: dict[str, tuple[dict[str, Any], bool]] = {
    FULL: ({"name": "linear", "train_encoder": "all"}, False),
    "last two layers": ({"name": "linear", "train_encoder": "last_block"}, False),
    "lora, rank 8": ({"name": "lora", "rank": 8, "alpha": 16}, False),
    "lora, rank 8, attention only": (
        {"name": "lora", "rank": 8, "alpha": 16, "targets": ["attn.qkv", "attn.proj"]},
        False,
    ),
    "prompt, 8 tokens": ({"name": "prompt", "count": 8}, False),
    "linear, encoder run every step": ({"name": "linear"}, False),
    "linear, features cached": ({"name": "linear"}, True),
    "complex, encoder run every step": ({"name": "complex"}, False),
    "complex, features cached": ({"name": "complex"}, True),
}


def measure(words: dict[str, Any]) -> dict[str, Any]:
    """One head in this process: CPU seconds of each step, and MB at the highest."""
    import torch

    from fmrizoo.analysis.memory import CLEAR
    from fmrizoo.analysis.memory_step import clip_of, high_water
    from fmrizoo.config import compose, to_dict
    from fmrizoo.model import DownstreamModel
    from fmrizoo.trainer.accounting import account
    from fmrizoo.trainer.device import World, init_distributed
    from fmrizoo.trainer.engine import Engine, set_checkpointing
    from fmrizoo.types import Batch, Grid, ReadBatch, TaskSpec
    from fmrizoo.zoo import build_model, load_recipe

    logging.getLogger("DeepSpeed").setLevel("WARNING")
    torch.set_num_threads(words["threads"])
    base = to_dict(load_recipe(words["recipe"]))
    section, cached = HEADS[words["head"]]
    parts = {"backbone": base["backbone"], "head": section}
    train = {"batch_size": 1, "precision": words["precision"], "zero_stage": 1}
    recipe = compose({**parts, "train": train})
    grid = Grid(*recipe.backbone.img_size)._replace(t=words["frames"])
    init_distributed(World(), torch.device("cpu"))
    import_engine()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[words["precision"]]
    batch: Batch | ReadBatch = clip_of(grid, "cpu", dtype)
    batch.target = torch.zeros(1, dtype=torch.int64)
    CLEAR.write_text("5")
    before = high_water()
    torch.manual_seed(0)
    model = cast(
        DownstreamModel, build_model(recipe, TaskSpec("classification", classes=("a", "b")))
    )
    counted = account(model, recipe.train)
    set_checkpointing(model, words["checkpointing"])
    engine = Engine(model, recipe.train, World(), torch.device("cpu"))
    model.train()
    if cached:
        with torch.no_grad():
            batch = ReadBatch(model.read(cast(Batch, batch)), batch.subject, batch.target)
    seconds = []
    for number in range(words["steps"] + 1):
        if number == 1:
            CLEAR.write_text("5")
        start = time.process_time()
        engine.accumulate(batch)
        engine.step(1.0)
        seconds.append(time.process_time() - start)
    found = {"seconds": seconds[1:], "mb": high_water() - before, "trained": counted.trained}
    return found | {"encoder": counted.encoder, "state": counted.optimizer_bytes}


def import_engine() -> None:
    """What DeepSpeed imports with its first engine (200 MB) is no memory of any head."""
    import torch

    from fmrizoo.config import TrainConfig
    from fmrizoo.trainer.device import World
    from fmrizoo.trainer.engine import Engine

    train = TrainConfig(batch_size=1, zero_stage=1)
    Engine(torch.nn.Linear(2, 2), train, World(), torch.device("cpu")).close()


def run(head: str, args: argparse.Namespace, precision: str) -> dict[str, Any]:
    words = {
        "head": head,
        "recipe": args.recipe,
        "precision": precision,
        "steps": args.steps,
        "threads": args.threads,
        "checkpointing": args.checkpointing,
        "frames": args.frames,
    }
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    # Large blocks go back to the system at once: else the peak depends on what was freed before.
    env |= {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "--one", json.dumps(words)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{head}: {done.stderr[-2000:]}")
    return cast(dict[str, Any], json.loads(done.stdout.splitlines()[-1]))


def table(args: argparse.Namespace, precision: str) -> None:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in HEADS}
    for turn in range(args.rounds):
        for name in HEADS:
            found[name].append(run(name, args, precision))
            print(f"  round {turn + 1}: {name}", file=sys.stderr, flush=True)
    encoder = found[FULL][0]["encoder"]
    print(
        f"\n## {args.recipe}, {encoder / 1e6:.1f} M, one clip of {args.frames} frames, {precision},"
        f" {args.threads} thread(s), checkpointing {args.checkpointing}; {args.rounds} rounds"
    )
    head = ("", "trained", "optimizer", "step (CPU)", "full / this", "memory", "this / full")
    rows = [head]
    for name, runs in found.items():
        steps = [median(r["seconds"]) for r in runs]
        full = [median(r["seconds"]) for r in found[FULL]]
        times = median(a / b for a, b in zip(full, steps, strict=True))
        memory = median(r["mb"] / f["mb"] for r, f in zip(runs, found[FULL], strict=True))
        rows.append(
            (
                name,
                f"{runs[0]['trained']:,}",
                f"{runs[0]['state'] / 2**20:.1f} MB",
                f"{median(steps) * 1e3:,.1f} ms",
                f"{times:,.2f}×" if times < 100 else f"{times:,.0f}×",
                f"{median(r['mb'] for r in runs):,.0f} MB",
                f"{memory:.2f}×",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(v.rjust(w) for v, w in others)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="pretrain/sizes/swin4d_51M")
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--checkpointing", default="none")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
        return
    for precision in args.precision:
        table(args, precision)


if __name__ == "__main__":
    main()

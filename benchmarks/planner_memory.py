"""The planner's memory against what training takes: predicted, measured, error, a row per pair.

    python benchmarks/planner_memory.py [NAME …] [--steps 3] [--json FILE]

Every pair of a recipe and a ZeRO stage trains two steps in fresh processes (1 or 2 gloo ranks).
Measured is by how much the peak resident size (VmHWM) of rank 0 in the second step lies above what
it is after a model of one layer has trained through the same engine: the interpreter, PyTorch and
DeepSpeed (half a GB) are no prediction of ours. The resident size is taken, not PyTorch's profiler,
because it also holds what no profiler sees: gloo's and oneDNN's buffers. Blocks are written when
they are asked for (MALLOC_PERTURB_), as a device would count them, and those above 64 KiB go back
to the system when freed (MALLOC_MMAP_THRESHOLD_). Needs Linux and glibc. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fmrizoo.analysis.memory_step import high_water
from fmrizoo.cluster.memory import rank_memory
from fmrizoo.cluster.trace import made_up_clips
from fmrizoo.config import TrainConfig
from fmrizoo.trainer.device import World, end_rank, init_distributed
from fmrizoo.trainer.engine import Engine, set_checkpointing
from fmrizoo.zoo import build_model, load_recipe

SWIN = [
    "backbone.img_size=[48,48,48,8]", "data.clip_frames=8", "backbone.patch_size=[6,6,6,1]",
    "backbone.depths=[2,6]", "backbone.num_heads=[4,8]", "backbone.embed_dim=256",
]  # fmt: skip
FACTORIZED = [word.replace("[2,6]", "[4,4]").replace("256", "192") for word in SWIN]
MAMBA = ["backbone.img_size=[48,48,48,8]", "data.clip_frames=8", "backbone.embed_dim=512"]
RECIPES = {
    "swin4d simmim": ["pretrain/swin4d_simmim", *SWIN, "objective.mask_patch_size=[6,6,6,1]"],
    "swin4d ar": ["pretrain/swin4d_ar", *SWIN],
    "factorized simmim": [
        "pretrain/swin_factorized_simmim", *FACTORIZED, "objective.mask_patch_size=[6,6,6,1]",
    ],
    "factorized ar": ["pretrain/swin_factorized_ar", *FACTORIZED],
    "neuromamba ar": ["pretrain/neuromamba_ar", *MAMBA],
    "neuromamba simmim": ["pretrain/neuromamba_simmim", *MAMBA],
}  # fmt: skip
# recipe, precision, stage, checkpointing, ranks, clips a rank. One rank
# runs the plainest stage (trainer/zero.py), so others have two. The workspace constant of memory.py
# makes the first row right and was seen on those marked "fitted"; the others are tests of it.
PAIRS: list[tuple[str, str, int, str, int, int, str]] = [
    ("swin4d simmim", "fp32", 0, "none", 1, 2, "fitted"),
    ("swin4d simmim", "bf16", 1, "none", 1, 2, "fitted"),
    ("swin4d simmim", "bf16", 2, "none", 2, 2, "fitted"),
    ("swin4d simmim", "fp32", 3, "none", 2, 2, "fitted"),
    ("swin4d simmim", "fp32", 1, "block", 2, 2, "fitted"),
    ("swin4d simmim", "bf16", 3, "none", 2, 2, ""),
    ("swin4d ar", "bf16", 1, "block", 2, 2, ""),
    ("swin4d ar", "fp32", 2, "none", 2, 2, ""),
    ("factorized simmim", "fp32", 1, "none", 2, 2, ""),
    ("factorized simmim", "bf16", 2, "block", 2, 2, ""),
    ("factorized ar", "bf16", 3, "none", 2, 2, ""),
    ("factorized ar", "fp32", 0, "none", 2, 2, ""),
    ("neuromamba ar", "bf16", 1, "none", 1, 2, ""),
    ("neuromamba ar", "fp32", 2, "none", 2, 2, ""),
    ("neuromamba simmim", "fp32", 0, "block", 1, 2, ""),
    ("neuromamba simmim", "bf16", 3, "none", 2, 2, ""),
    ("swin4d ar", "fp32", 1, "block", 2, 2, ""),
    ("neuromamba simmim", "fp32", 1, "none", 2, 2, ""),
    ("factorized ar", "bf16", 1, "block", 2, 2, ""),
]


def words(pair: tuple[str, str, int, str, int, int, str]) -> list[str]:
    recipe, precision, stage, mode, ranks, clips, _ = pair
    return [
        *RECIPES[recipe], f"train.precision={precision}", f"train.zero_stage={stage}",
        f"train.checkpointing={mode}", f"train.batch_size={ranks * clips}",
        "train.max_micro_batch=0", "train.accumulate=1",
    ]  # fmt: skip


def worker(recipe_words: list[str], rank: int, ranks: int, steps: int) -> None:
    """Train and print rank 0's growth in bytes."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    world = World(rank, ranks, rank, "none")
    init_distributed(world, device)
    recipe = load_recipe(recipe_words[0], recipe_words[1:])
    _warm_up(recipe.train, world)
    base = resident()
    torch.manual_seed(0)
    model = build_model(recipe).train()
    set_checkpointing(model, recipe.train.checkpointing)
    engine = Engine(model, recipe.train, world, device)
    clips = recipe.train.batch_size // ranks
    batch = made_up_clips(recipe, model.backbone, clips, engine.dtype)  # type: ignore[arg-type]
    for number in range(steps):
        if number == 1:
            _settle()
        engine.accumulate(batch)
        engine.step(1.0)
    if rank == 0:
        print(json.dumps({"bytes": (high_water() - base) * 2**20}), flush=True)
    end_rank(0)


class _OneLayer(torch.nn.Module):
    """Trains through an engine, for what is loaded and set up on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)
        self.norm = torch.nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.norm(self.layer(x)).float().square().mean(), {}


def _warm_up(train: TrainConfig, world: World) -> None:
    engine = Engine(_OneLayer(), train, world, torch.device("cpu"))
    for _ in range(2):
        engine.accumulate(torch.randn(64, 64, dtype=engine.dtype))  # type: ignore[arg-type]
        engine.step(1.0)
    engine.close()
    _settle()


def _settle() -> None:
    """What was let go of goes back to the system, and the peak starts anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident() -> float:
    """This process's resident size in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def measure(pair: tuple[str, str, int, str, int, int, str], steps: int) -> float:
    ranks = pair[4]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "MALLOC_PERTURB_": "85",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps([words(pair), rank, ranks, steps])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    ends = [one.communicate(timeout=600) for one in started]
    if any(one.returncode for one in started):
        raise SystemExit("\n".join(end[1][-2000:] for end in ends))
    return float(json.loads(ends[0][0].splitlines()[-1])["bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these recipes")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--measured", type=Path, default=None, help="compare with an older --json")
    parser.add_argument("--worker", default="")
    given = parser.parse_args()
    if given.worker:
        worker(*json.loads(given.worker))
        return
    old = json.loads(given.measured.read_text()) if given.measured else {}
    found: dict[str, Any] = {}
    print(f"{'recipe':18} prec stage ckpt   ranks {'predicted':>10} {'measured':>9} {'error':>7}")
    for pair in PAIRS:
        if given.names and pair[0] not in given.names:
            continue
        key = " ".join(map(str, pair[:6]))
        measured = old[key] if key in old else measure(pair, given.steps)
        found[key] = measured
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")
        recipe = load_recipe(words(pair)[0], words(pair)[1:])
        memory = rank_memory(recipe, ranks=pair[4])
        error = memory.total / measured - 1
        print(
            f"{pair[0]:18} {pair[1]} {pair[2]:5} {pair[3]:6} {pair[4]:5} "
            f"{memory.total / 2**20:7.0f} MB {measured / 2**20:6.0f} MB {error:+7.1%} {pair[6]}",
            flush=True,
        )


if __name__ == "__main__":
    main()

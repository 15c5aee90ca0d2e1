"""swin4d against the obvious way to write it (``plain_swin4d.py``): time and memory, side by side.

    python benchmarks/swin4d.py [--threads 2] [--rounds 5] [--quick]

Both sides run in one process, turn by turn (A B A B …), with the same weights, clip, allocator and
threads; a row's ratio is the median over turns of plain / ours. Memory is the growth of the peak
resident size over one pass, each side in a process of its own, again with the same allocator
settings. Nothing is asserted: read the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn

from fmrizoo.backbones.swin4d import Swin4D, Swin4DConfig

from plain_swin4d import PlainSwin4D

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("plain", "fmrizoo")


def model_of(side: str, config: Swin4DConfig, dtype: torch.dtype, checkpointing: str) -> nn.Module:
    torch.manual_seed(0)
    ours = Swin4D(config)
    if side == "fmrizoo":
        ours.set_checkpointing(checkpointing)
        return ours.eval().to(dtype)
    plain = PlainSwin4D(config)
    plain.load_state_dict(ours.state_dict())
    return plain.eval().to(dtype)


def run(model: nn.Module, bold: Tensor, backward: bool) -> Tensor:
    with torch.set_grad_enabled(backward):
        out = model(bold)
        values: Tensor = out if isinstance(out, Tensor) else out.values
        if backward:
            model.zero_grad()
            values.float().square().mean().backward()
    return values


def timed(job: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - wall, time.process_time() - cpu


def clip_of(config: Swin4DConfig, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 1, *config.img_size).to(dtype)


def compare(config: Swin4DConfig, precision: str, backward: bool, rounds: int) -> None:
    dtype = DTYPES[precision]
    models = [model_of(side, config, dtype, "none") for side in SIDES]
    bold = clip_of(config, dtype)
    rows = []
    for turn in range(rounds + 1):
        pair = [timed(lambda m=m: run(m, bold, backward)) for m in models]
        if turn:  # the first turn fills caches and plans
            rows.append(pair)
    what = f"{'forward + backward' if backward else 'forward'}, {precision}"
    plain, ours = (median(pair[side][0] for pair in rows) * 1e3 for side in (0, 1))
    wall = median(pair[0][0] / pair[1][0] for pair in rows)
    cpu = median(pair[0][1] / pair[1][1] for pair in rows)
    print(f"{what:28}{plain:10.0f}{ours:10.0f}{wall:10.2f}×{cpu:9.2f}×", flush=True)


def peak_growth(side: str, precision: str, backward: bool, checkpointing: str) -> None:
    """Child process: print the growth of the peak resident size over one pass, in MB."""
    config = Swin4DConfig(**eval_size())
    model = model_of(side, config, DTYPES[precision], checkpointing)
    bold = clip_of(config, DTYPES[precision])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are not activations
    small = bold[..., : config.patch_size[3] * 4].contiguous()
    run(model, small, backward)  # kernels and their workspaces
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    run(model, bold, backward)
    print(high_water() - before)


def high_water() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (v for v in lines if v.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def eval_size() -> dict[str, list[int]]:
    frames = int(os.environ.get("BENCH_FRAMES", "20"))
    side = int(os.environ.get("BENCH_SIDE", "96"))
    return {"img_size": [side, side, side, frames]}


def memory_row(precision: str, backward: bool, checkpointing: str = "none") -> None:
    found = {}
    for side in SIDES:
        # Blocks above 64 KiB go back to the system when freed, so the peak is what is in use.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        words = [side, precision, "fb" if backward else "f", checkpointing]
        done = subprocess.run(
            [sys.executable, __file__, "--child", *words],
            capture_output=True,
            text=True,
            check=True,
            env=env,
        )
        found[side] = float(done.stdout)
    what = f"{'forward + backward' if backward else 'forward'}, {precision}"
    what += ", recompute" if checkpointing != "none" else ""
    share = found["fmrizoo"] / found["plain"]
    print(f"{what:30}{found['plain']:9.0f}{found['fmrizoo']:10.0f}{share:10.2f}×", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="48³ voxels, 8 frames, 1 round")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        os.environ.update(BENCH_SIDE="48", BENCH_FRAMES="8")
        args.rounds = 1
    if args.child:
        side, precision, mode, checkpointing = args.child
        return peak_growth(side, precision, mode == "fb", checkpointing)
    config = Swin4DConfig(**eval_size())
    a, b = (
        run(model_of(s, config, torch.float32, "none"), clip_of(config, torch.float32), False)
        for s in SIDES
    )
    grid = model_of("fmrizoo", config, torch.float32, "none")(clip_of(config, torch.float32))
    difference = float((a - grid.to_grid().detach()).abs().max())
    print(
        f"clip {config.img_size}, embed_dim {config.embed_dim}, {args.threads} threads, "
        f"torch {torch.__version__}; largest difference of the outputs {difference:.1e}\n"
    )
    del a, b, grid
    print(f"{'wall ms':28}{'plain':>10}{'fmrizoo':>10}{'plain/ours':>11}{'CPU':>10}")
    for backward in (False, True):
        for precision in DTYPES:
            compare(config, precision, backward, args.rounds)
    print(f"\n{'peak activation memory, MB':30}{'plain':>9}{'fmrizoo':>10}{'ours/plain':>11}")
    for precision in DTYPES:
        memory_row(precision, False)
        memory_row(precision, True)
    memory_row("fp32", True, "window-chunk")


if __name__ == "__main__":
    main()

"""The engine on several ranks against PyTorch's DistributedDataParallel, as a table.

    python benchmarks/engine_ranks.py [--ranks 2] [--rounds 3]

Every rank computes with one thread, on a clip of the size of the source (96×96×96×20). In bf16 the
other side sums gradients over ranks in bf16: half the bytes, and less exact than the engine's fp32.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fmrizoo.data.store import Store
from fmrizoo.trainer.device import World, end_rank

from engine_overhead import SWIN, overhead
from throughput import make_store, span

SETTINGS = [
    ("fp32", 0),
    ("fp32", 1),
    ("fp32", 2),
    ("fp32", 3),
    ("bf16", 1),
    ("bf16", 2),
    ("bf16", 3),
]


def worker(store: Store, rank: int, ranks: int, rounds: int) -> None:
    torch.set_num_threads(1)
    world = World(rank, ranks, rank, "none")
    for precision, stage in SETTINGS:
        found = overhead(SWIN, store, precision, stage, rounds, world)
        if rank == 0:
            print(
                f"{f'swin4d_simmim {precision} {stage}':26s}{found.bare_cpu:9.2f}"
                f"{found.engine_cpu:9.2f}{span(found.cpu_ratios):>24s}"
                f"{span(found.wall_ratios):>24s}{found.difference:10.1e}",
                flush=True,
            )
    end_rank(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="of both sides in turn")
    parser.add_argument("--store", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        worker(Store(args.store), args.rank, args.ranks, args.rounds)
        return
    folder = Path(tempfile.mkdtemp())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    try:
        make_store(folder / "store", 2)
        print(
            f"Engine over DistributedDataParallel: {args.ranks} ranks, one clip and thread each\n"
            f"{'recipe, precision, ZeRO':26s}{'DDP s':>9s}{'ours s':>9s}{'CPU ratio':>24s}"
            f"{'wall ratio':>24s}{'Δ loss':>10s}",
            flush=True,
        )
        command = [sys.executable, __file__, "--store", str(folder / "store")]
        command += ["--ranks", str(args.ranks), "--rounds", str(args.rounds)]
        started = [
            subprocess.Popen([*command, "--rank", str(rank)], env=env) for rank in range(args.ranks)
        ]
        if any(one.wait() for one in started):
            raise SystemExit("a rank failed")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

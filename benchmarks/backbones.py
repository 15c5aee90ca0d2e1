"""The three backbones beside what a user would reach for instead: time, memory, FLOPs.

    python benchmarks/backbones.py [SECTION …] [--rounds 3] [--threads 2] [--quick]

Sections: ``mixer step crossover background memory speed`` (all by default). Contenders run turn by
turn (A B A B …) in one process with the same allocator; a ratio is the median over turns. Peak
memory is the growth of the resident size over one pass, each contender in a process of its own.
``mixer`` and ``step`` compare with the PyTorch path of Hugging Face transformers' Mamba2Mixer:
``pip install "fmrizoo[bench]"``. Nothing is asserted: read the tables.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmrizoo
from fmrizoo.backbones.mamba2 import Mamba2
from fmrizoo.backbones.neuromamba import PlacedTokens
from fmrizoo.types import Backbone, Grid

from plain_swin4d import PlainSwin4D

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLIP = Grid(96, 96, 96, 20)
V1 = {"img_size": list(CLIP), "patch_size": [6, 6, 6, 1]}
FACTORIZED = {"embed_dim": 36, "depths": [4, 4, 8, 4], "num_heads": [3, 6, 12, 24]}
SMALL = {"embed_dim": 128}  # NeuroMamba-Small, 1.4M parameters


# --- measuring ------------------------------------------------------------------------------------


def timed(job: Callable[[], object]) -> tuple[float, float]:
    """Wall and process CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turn(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every job in every round; the first round only warms up."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            _, cpu = timed(job)
            if turn:
                found[name].append(cpu)
    return found


def ratio(found: dict[str, list[float]], slow: str, fast: str) -> float:
    return median(a / b for a, b in zip(found[slow], found[fast], strict=True))


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(str(r[i])) for r in [head, *rows]) for i in range(len(head))]
    print(f"\n## {title}")
    for row in [head, *rows]:
        cells = [
            str(v).ljust(w) if i == 0 else str(v).rjust(w)
            for i, (v, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells), flush=True)


def ms(values: list[float]) -> str:
    return f"{median(values) * 1e3:.0f} ms"


def step_of(
    model: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, backward: bool
) -> Callable[[], object]:
    """One forward pass, or forward and backward, on ``x``."""

    def job() -> None:
        with torch.set_grad_enabled(backward):
            out = model(x)
            if backward:
                for p in parameters:
                    p.grad = None
                out.float().square().mean().backward()

    return job


# --- contenders -----------------------------------------------------------------------------------


def hf_mixer(width: int, state: int, chunk: int = 64) -> nn.Module:
    """transformers' Mamba2Mixer: its PyTorch path, as mamba-ssm is not installed."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=width,
        num_heads=2 * width // 64,
        head_dim=64,
        state_size=state,
        n_groups=1,
        chunk_size=chunk,
        expand=2,
        num_hidden_layers=1,
    )
    return Mamba2Mixer(config, 0)


class TransformerBlock(nn.Module):
    """Pre-norm causal block with 12 d² parameters, about those of two mixers; fused attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    """Residual [RMSNorm → mixer] layers and a regression onto the next token, as NeuroMamba's."""

    def __init__(self, mixers: list[nn.Module], width: int, residual: bool) -> None:
        super().__init__()
        self.mixers, self.residual = nn.ModuleList(mixers), residual
        self.norms = nn.ModuleList(nn.RMSNorm(width, 1e-5) for _ in mixers)
        self.out = nn.Linear(width, 432)

    def forward(self, x: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x)) if self.residual else mixer(x)
        return self.out(x)


class NeuroMamba(nn.Module):
    """Ours: the encoder of the zoo on ready-made tokens, and the same regression."""

    def __init__(self, depth: int, width: int, checkpointing: str) -> None:
        super().__init__()
        self.encoder = fmrizoo.create_backbone("neuromamba", embed_dim=width, depth=depth)
        self.encoder.set_checkpointing(checkpointing)
        self.out = nn.Linear(width, 432)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        grid = Grid(1, 1, 1, n)
        index = torch.zeros(b, n, 4, dtype=torch.int64)
        index[..., 3] = torch.arange(n)
        valid, where = torch.ones(b, n, dtype=torch.bool), x.new_zeros(b, n, 84)
        tokens = PlacedTokens(x, index, valid, grid, valid.float(), where=where)
        return self.out(self.encoder.encode(tokens).values)


def stack(side: str, depth: int = 12, width: int = 128) -> nn.Module:
    torch.manual_seed(0)
    if side.startswith("transformer"):
        return Stack([TransformerBlock(width) for _ in range(depth // 2)], width, residual=False)
    if side.startswith("HF"):
        return Stack([hf_mixer(width, width // 4) for _ in range(depth)], width, residual=True)
    return NeuroMamba(depth, width, "none" if side.endswith("kept") else "window-chunk")


@lru_cache
def mni_mask() -> Tensor:
    """Nilearn's MNI152 2 mm brain mask in the recipes' 96³ grid."""
    from nilearn.datasets import load_mni152_brain_mask

    from fmrizoo.config import PrepareConfig
    from fmrizoo.data.spatial import place

    image = load_mni152_brain_mask(resolution=2)
    mask, _ = place(np.asarray(image.dataobj) > 0, image.affine, PrepareConfig(), nearest=True)
    return torch.from_numpy(np.ascontiguousarray(mask)).bool()


def kept_tokens(mask: Tensor, patch: Sequence[int], frames: int) -> int:
    pooled = F.max_pool3d(mask[None, None].float(), tuple(patch[:3]))
    return int(pooled.sum()) * (frames // patch[3])


# --- sections -------------------------------------------------------------------------------------

MIXERS = ("HF fp32", "HF bf16", "fmrizoo fp32", "fmrizoo bf16")


def dtype_of(side: str) -> torch.dtype:
    return torch.bfloat16 if "bf16" in side else torch.float32


def mixer(rounds: int, quick: bool) -> None:
    """One Mamba2 mixer, d 256, state 64, on one thread."""
    torch.set_num_threads(1)
    length = 4096 if quick else 16384
    rows = []
    for backward in (False, True):
        jobs = {}
        for side in MIXERS:
            torch.manual_seed(0)
            model: nn.Module = (
                hf_mixer(256, 64) if side.startswith("HF") else Mamba2(256, d_state=64)
            )
            model = model.to(dtype_of(side))
            x = torch.randn(1, length, 256, dtype=dtype_of(side))
            jobs[side] = step_of(model, list(model.parameters()), x, backward)
        found = in_turn(jobs, rounds)
        what = "forward + backward" if backward else "forward"
        rows.append([what, *(ms(found[s]) for s in MIXERS), *ratios(found)])
    head = ["CPU ms", *MIXERS, "bf16 : bf16", "HF fp32 : bf16", "fp32 : fp32"]
    table(f"Mamba2 mixer, d 256, {length} tokens, one thread", head, rows)


def ratios(found: dict[str, list[float]]) -> list[str]:
    pairs = [("HF bf16", "fmrizoo bf16"), ("HF fp32", "fmrizoo bf16"), ("HF fp32", "fmrizoo fp32")]
    return [f"{ratio(found, a, b):.1f}×" for a, b in pairs]


STEPS = (
    "HF fp32",
    "HF bf16",
    "transformer bf16",
    "fmrizoo bf16",
    "fmrizoo bf16 kept",
    "fmrizoo fp32",
)


def step(rounds: int, quick: bool) -> None:
    """A training step of NeuroMamba-Small on the brain tokens of a clip of 20 frames."""
    torch.set_num_threads(1)
    tokens = kept_tokens(mni_mask(), (6, 6, 6, 2), 20)
    tokens = tokens // 8 if quick else tokens
    jobs = {}
    for side in STEPS:
        model = stack(side).to(dtype_of(side))
        x = torch.randn(1, tokens, 128, dtype=dtype_of(side))
        jobs[side] = step_of(model, list(model.parameters()), x, True)
    found = in_turn(jobs, rounds)
    memory = {side: child(["stack", side, str(tokens)]) for side in STEPS}
    rows = [
        [
            side,
            f"{median(found[side]):.2f} s",
            *(f"{ratio(found, side, f):.2f}×" for f in ("fmrizoo bf16", "fmrizoo bf16 kept")),
            f"{memory[side]:.0f} MB",
            f"{memory[side] / memory['fmrizoo bf16']:.1f}×",
        ]
        for side in STEPS
    ]
    head = [
        "step (12 mixers, d 128)",
        "CPU",
        "time / ours",
        "time / ours kept",
        "peak",
        "peak / ours",
    ]
    table(f"NeuroMamba-Small, {tokens} brain tokens, forward + backward, one thread", head, rows)
    print("ours recomputes slice by slice; 'kept' keeps its activations")


def crossover(rounds: int, quick: bool) -> None:
    """Two mixers against one transformer block of as many parameters, by sequence length."""
    torch.set_num_threads(1)
    rows = []
    for length in (1024, 2048, 4096, 8192, 16384)[: 3 if quick else None]:
        row = [str(length)]
        for backward in (False, True):
            jobs = {}
            for side in ("transformer bf16", "fmrizoo bf16 kept"):
                model = stack(side, depth=2, width=256).bfloat16()
                x = torch.randn(1, length, 256, dtype=torch.bfloat16)
                jobs[side] = step_of(model, list(model.parameters()), x, backward)
            found = in_turn(jobs, rounds)
            row += [ms(found[s]) for s in jobs]
            row.append(f"{ratio(found, 'transformer bf16', 'fmrizoo bf16 kept'):.2f}×")
        rows.append(row)
    head = [
        "tokens",
        *(f"{s} {w}" for w in ("fwd", "f+b") for s in ("transformer", "mamba", "ratio")),
    ]
    table(
        "bf16 transformer block and two Mamba2 mixers (12 d² parameters each, d 256), one thread",
        head,
        rows,
    )
    print("a ratio below 1: the transformer is faster at this length")


def background(rounds: int, quick: bool) -> None:
    """What dropping background tokens saves: a training step with and without."""
    torch.set_num_threads(1)
    frames = 4 if quick else 20
    mask = mni_mask()[None]
    bold = torch.randn(1, 1, *CLIP[:3], frames)
    jobs, flops, counts = {}, {}, {}
    for drop in (False, True):
        model = neuromamba(drop_background=drop).bfloat16()
        name = "brain tokens" if drop else "all tokens"
        counts[name] = model.tokenize(bold.bfloat16(), mask).values.shape[1]
        flops[name] = sum(model.flops(Grid(*CLIP[:3], frames), mask[0]).values())
        jobs[name] = encode_step(model, bold.bfloat16(), mask, True)
    found = in_turn(jobs, rounds)
    rows = [
        [name, str(counts[name]), f"{median(found[name]):.2f} s", f"{flops[name] / 1e9:.1f}"]
        for name in jobs
    ]
    table(
        "NeuroMamba-Small, bf16, step with and without the background",
        ["", "tokens", "CPU", "GFLOP forward"],
        rows,
    )
    saved = 1 - flops["brain tokens"] / flops["all tokens"]
    print(
        f"{ratio(found, 'all tokens', 'brain tokens'):.2f}× faster; {saved:.1%} of the FLOPs saved"
    )


def neuromamba(**config: object) -> Backbone:
    torch.manual_seed(0)
    return fmrizoo.create_backbone("neuromamba", **SMALL, **config)


def encode_step(
    model: Backbone, bold: Tensor, mask: Tensor, backward: bool
) -> Callable[[], object]:
    parameters = list(model.parameters())
    return step_of(
        lambda b: model.encode(model.tokenize(b, mask)).values, parameters, bold, backward
    )


def memory(rounds: int, quick: bool) -> None:
    """Peak growth of forward + backward in fp32 against the number of frames."""
    del rounds
    lengths = (20, 40) if quick else (20, 40, 80, 160, 320)
    rows = []
    for side in (
        "plain 4-D",
        *(
            f"{b} {m}"
            for b in ("swin4d", "swin_factorized")
            for m in ("none", "block", "window-chunk")
        ),
    ):
        row, slope = [side], []
        for frames in lengths:
            if frames > MEASURED.get(side, 320):
                row.append("–")
                continue
            mb = child(["swin", side, str(frames)])
            row.append(f"{mb:.0f}")
            slope.append(mb / frames)
        rows.append([*row, f"{slope[-1]:.1f}"])
    perframe = {row[0]: float(row[-1]) for row in rows}
    for row in rows:
        row.append(f"{perframe['plain 4-D'] / perframe[row[0]]:.1f}×")
    head = ["peak MB, fp32, f+b", *(f"T={n}" for n in lengths), "MB/frame", "frames per GB / plain"]
    table("Memory against the number of frames (96³ voxels, embed 36)", head, rows)


# Longest clips that fit this machine without recomputation.
MEASURED = {"plain 4-D": 80, "swin4d none": 320, "swin_factorized none": 160}


def swin(side: str, frames: int) -> nn.Module:
    torch.manual_seed(0)
    name, _, mode = side.partition(" ")
    size = {**V1, "img_size": [*CLIP[:3], frames]}
    if name == "plain":
        from fmrizoo.backbones.swin4d import Swin4DConfig

        return PlainSwin4D(Swin4DConfig(**size))
    config = FACTORIZED if name == "swin_factorized" else {}
    model = fmrizoo.create_backbone(name, **size, **config)
    model.set_checkpointing(mode)
    return model


SPEED = {
    "swin4d": V1,
    "swin_factorized": {**V1, **FACTORIZED},
    "neuromamba": SMALL,
}


def speed(rounds: int, quick: bool) -> None:
    """Voxels a second, GFLOP/s and the share of this machine's matrix-product peak."""
    peak = {name: matmul_peak(dtype) for name, dtype in DTYPES.items()}
    mask = mni_mask()[None]
    grid = CLIP._replace(t=4) if quick else CLIP
    rows = []
    for precision, dtype in DTYPES.items():
        for backward in (False, True):
            models = {}
            for name, config in SPEED.items():
                torch.manual_seed(0)
                models[name] = fmrizoo.create_backbone(name, **config).to(dtype)
            bold = torch.randn(1, 1, *grid).to(dtype)
            jobs = {n: encode_step(m, bold, mask, backward) for n, m in models.items()}
            walls: dict[str, list[float]] = {n: [] for n in jobs}
            for turn in range(rounds + 1):
                for name, job in jobs.items():
                    seconds, _ = timed(job)
                    if turn:
                        walls[name].append(seconds)
            for name, model in models.items():
                seconds = median(walls[name])
                flops = sum(model.flops(grid, mask[0]).values()) * (3 if backward else 1)
                rate = flops / seconds / 1e9
                rows.append(
                    [
                        f"{name} {precision} {'f+b' if backward else 'forward'}",
                        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
                        f"{seconds * 1e3:.0f} ms",
                        f"{grid.size / seconds / 1e6:.0f}",
                        f"{rate:.0f}",
                        f"{rate / peak[precision]:.0%}",
                    ]
                )
    head = ["one clip of " + str(grid), "parameters", "wall", "Mvoxel/s", "GFLOP/s", "of peak"]
    threads = torch.get_num_threads()
    found = ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in peak.items())
    table(f"All three backbones, {threads} threads; peak of torch.mm here: {found}", head, rows)
    print("backward is counted as twice the forward; voxels: all of the clip, brain or not")


def matmul_peak(dtype: torch.dtype, size: int = 3072) -> float:
    a = torch.randn(size, size).to(dtype)
    a @ a
    return max(2 * size**3 / timed(lambda: a @ a)[0] / 1e9 for _ in range(5))


# --- children: peak memory ------------------------------------------------------------------------


def child(words: list[str]) -> float:
    # Blocks above 64 KiB go back to the system when freed, so the peak is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", *words],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout)


def peak_growth(words: list[str]) -> None:
    """Print the growth of the peak resident size over forward + backward, in MB."""
    kind, side, size = words
    if kind == "stack":
        model = stack(side).to(dtype_of(side))
        large = torch.randn(1, int(size), 128, dtype=dtype_of(side))
        small = large[:, :512].contiguous()
        run = model
    else:
        model = swin(side, int(size))
        large = torch.randn(1, 1, *CLIP[:3], int(size))
        small = large[..., :8].contiguous()

        def run(x: Tensor) -> Tensor:
            out = model(x)
            return out if isinstance(out, Tensor) else out.values

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are not activations
    run(small).float().square().mean().backward()
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    run(large).float().square().mean().backward()
    print(high_water() - before)


def high_water() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (v for v in lines if v.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


SECTIONS = {f.__name__: f for f in (mixer, step, crossover, background, memory, speed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="for the section speed")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return peak_growth(args.child)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown sections {sorted(unknown)}: choose from {', '.join(SECTIONS)}")
    print(f"torch {torch.__version__}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}")
    for name in args.sections or SECTIONS:
        torch.set_num_threads(args.threads)
        SECTIONS[name](args.rounds, args.quick)


if __name__ == "__main__":
    main()

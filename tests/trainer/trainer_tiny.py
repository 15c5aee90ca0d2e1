"""A tiny model, a synthetic stream of clips, a plain PyTorch reference loop, and rank launching."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmrizoo.config import Recipe, TrainConfig
from fmrizoo.trainer.device import World, end_rank
from fmrizoo.trainer.engine import param_groups
from fmrizoo.trainer.loop import StepEvent, TrainerInputs, train
from fmrizoo.trainer.schedule import factor
from fmrizoo.types import Batch, Features, Grid, Tokens

WIDTH = 6
GRID = (2, 2, 2, 4)
ALONE = World()


class TinyBackbone(nn.Module):
    """Dataclasses in and out, a table added outside any submodule's forward, as real backbones."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(GRID[3], WIDTH)
        self.positions = nn.Parameter(torch.randn(1, 8, WIDTH) * 0.1)
        self.hidden = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.checkpointing = "none"

    def set_checkpointing(self, mode: str) -> None:
        self.checkpointing = mode

    def tokenize(self, bold: Tensor) -> Tokens:
        b = bold.shape[0]
        values = self.embed(bold.flatten(1, 4)) + self.positions
        valid = torch.ones(b, 8, dtype=torch.bool)
        index = torch.zeros(1, 8, 4, dtype=torch.int64)
        return Tokens(values, index, valid, Grid(2, 2, 2, 1), valid.float())

    def encode(self, tokens: Tokens) -> Features:
        x = tokens.values
        x = x + self.out(self.dropout(torch.nn.functional.gelu(self.hidden(x))))
        return Features(self.norm(x), tokens.index, tokens.valid, tokens.grid, tokens.brain)


class TinyObjective(nn.Module):
    """Hides every other voxel behind a learned token and predicts its time course."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(WIDTH) * 0.1)
        self.decode = nn.Linear(WIDTH, GRID[3])

    def forward(self, backbone: TinyBackbone, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = backbone.tokenize(batch.bold)
        hidden = (torch.arange(8) % 2 == 0).view(1, 8, 1)
        tokens = tokens.with_values(torch.where(hidden, self.mask_token, tokens.values))
        predicted = self.decode(backbone.encode(tokens).values)
        error = (predicted - batch.bold.flatten(1, 4)).square()
        return error.mean(), {"hidden_error": error.detach()[:, ::2].mean()}


class TinyModel(nn.Module):
    """``loss, logs = model(batch)``; ``frozen`` keeps the encoder from training."""

    def __init__(self, dropout: float = 0.0, frozen: bool = False) -> None:
        super().__init__()
        self.backbone = TinyBackbone(dropout)
        self.objective = TinyObjective()
        self.register_buffer("counts", torch.arange(3))
        self.scales: dict[str, float] = {}
        if frozen:
            self.backbone.requires_grad_(False)

    def lr_scales(self) -> dict[str, float]:
        return self.scales

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = self.objective(self.backbone, batch)
        return loss, logs


def tiny(dropout: float = 0.0, frozen: bool = False) -> TinyModel:
    """The same weights every time."""
    torch.manual_seed(7)
    return TinyModel(dropout, frozen)


def scaled(dropout: float = 0.0) -> TinyModel:
    """Five groups: the encoder's layers learn more slowly, one part of it not at all."""
    model = tiny(dropout)
    model.scales = {
        "backbone.positions": 0.125,
        "backbone.hidden.weight": 0.25,
        "backbone.hidden.bias": 0.25,
        "backbone.norm.weight": 0.5,
    }
    model.backbone.embed.requires_grad_(False)
    return model


def clips(first: int, n: int, poison: frozenset[int] = frozenset()) -> Batch:
    """Clips ``first .. first + n - 1`` of an endless list; ``poison`` ones are NaN."""
    bold = torch.stack(
        [
            torch.randn(1, *GRID, generator=torch.Generator().manual_seed(i))
            for i in range(first, first + n)
        ]
    )
    # A time course that the neighbours tell, so that there is something to learn.
    bold = bold * 0.3 + bold.mean((2, 3, 4), keepdim=True)
    for i in range(n):
        if first + i in poison:
            bold[i] = float("nan")
    names = [f"sub-{i:03d}" for i in range(first, first + n)]
    mask = torch.ones(n, *GRID[:3], dtype=torch.bool)
    return Batch(bold, mask, torch.full((n,), 2.0), names, names, torch.zeros(n))


class Slope(nn.Module):
    """A loss whose gradient at every weight is the batch's first voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.weight * batch.bold.flatten()[0]).sum(), {}


@dataclass
class Slopes:
    """Gradients 1, 2⁻⁹, 2⁻⁹, …: a bf16 sum stays at 1, an fp32 sum does not."""

    world: World
    micro: int

    def batches(self, start: int = 0) -> Iterator[Samples]:
        for m in count(start):
            first = m == 0 and self.world.rank == 0
            batch = clips(0, self.micro)
            yield Samples(replace(batch, bold=torch.full_like(batch.bold, 1.0 if first else 2**-9)))


@dataclass
class Samples:
    batch: Batch

    def to_batch(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        return self.batch.to(device, dtype)


@dataclass
class TinyStream:
    """Micro-batch m of rank r holds clips ``m·world·micro + r·micro …``."""

    world: World
    micro: int
    poison: frozenset[int] = frozenset()
    closed: bool = False

    def batches(self, start: int = 0) -> Iterator[Samples]:
        try:
            m = start
            while True:
                first = (m * self.world.size + self.world.rank) * self.micro
                yield Samples(clips(first, self.micro, self.poison))
                m += 1
        finally:
            self.closed = True


def train_config(**changes: Any) -> TrainConfig:
    base = TrainConfig(
        steps=6,
        batch_size=8,
        accumulate=2,
        lr=0.02,
        warmup=0.34,
        weight_decay=0.1,
        clip_norm=0.5,
        zero_stage=1,
        device="cpu",
    )
    return replace(base, **changes)


def inputs(
    out: Path, *, dropout: float = 0.0, world: World = ALONE, **changes: Any
) -> TrainerInputs:
    """Inputs of a run of :func:`tiny`; ``changes`` go to the train section."""
    return TrainerInputs(
        model=tiny(dropout),
        recipe=Recipe(train=train_config(**changes)),
        out=out,
        loader_for=TinyStream,
        world=world,
    )


class Killed(Exception):
    """Ends a run without a word."""


def killed(given: TrainerInputs, model: nn.Module, step: int) -> None:
    """The run of ``given``, ended after ``step`` by an error in its display."""

    def end(event: StepEvent) -> None:
        if event.step == step:
            raise Killed

    with suppress(Killed):
        train(replace(given, model=model, on_step=end))


@dataclass
class Reference:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def reference(
    train: TrainConfig,
    *,
    ranks: int = 1,
    frozen: bool = False,
    make: Callable[[], nn.Module] | None = None,
    given: Callable[[int, int], Batch] = clips,
    without: frozenset[int] = frozenset(),
) -> Reference:
    """What the trainer must compute, written out in plain PyTorch with fp32 master weights.

    Steps of ``without`` (from 0) pass, but their clips are never looked at.
    """
    make = make or partial(tiny, frozen=frozen)
    master = make()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[train.precision]
    optimizer = torch.optim.AdamW(
        param_groups(master, train), betas=tuple(train.betas), eps=train.eps
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    parts, micro = ranks * train.accumulate, train.batch_size // ranks // train.accumulate
    losses, norms = [], []
    for step in range(train.steps):
        if step in without:
            continue
        total = 0.0
        for part in range(parts):
            worker = make()
            worker.load_state_dict(master.state_dict())
            worker.to(dtype)
            loss, _ = worker(given((step * parts + part) * micro, micro).to("cpu", dtype))
            (loss / train.accumulate).backward()
            total += float(loss.detach()) / parts
            for p, q in zip(master.parameters(), worker.parameters(), strict=True):
                if q.grad is not None:
                    share = q.grad.float() / ranks
                    p.grad = share if p.grad is None else p.grad + share
        grads = [p.grad for p in master.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
        if train.clip_norm and norm > train.clip_norm:
            for g in grads:
                g.mul_(train.clip_norm / (norm + 1e-6))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step, train.steps, train.warmup, train.min_lr_ratio)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        norms.append(float(norm))
    return Reference(losses, norms, {k: v.detach() for k, v in master.state_dict().items()})


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out: Path) -> list[dict[str, Any]]:
    """Metrics rows without what a clock decides."""
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "clips_per_second", "stall")}
        for row in rows(out)
    ]


def _child(rank: int, work: Callable[..., Any], size: int, port: int, out: str, args: Any) -> None:
    # As in the parent: whatever warns fails. Filters are not inherited.
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        answer: Any = work(World(rank, size, rank, "test"), *args)
    except BaseException:
        Path(out, f"error-{rank}.txt").write_text(traceback.format_exc())
        raise
    torch.save(answer, Path(out, f"answer-{rank}.pt"))
    end_rank(0)


def on_ranks(out: Path, work: Callable[..., Any], *args: Any, size: int = 2) -> list[Any]:
    """``work(world, *args)`` in ``size`` processes; their answers in rank order."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked from a process that has imported everything and done nothing: seconds less a launch.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["trainer_tiny", "deepspeed"])
    torch.multiprocessing.start_processes(
        _child, (work, size, port, str(out), args), nprocs=size, start_method="forkserver"
    )
    return [torch.load(out / f"answer-{r}.pt", weights_only=False) for r in range(size)]

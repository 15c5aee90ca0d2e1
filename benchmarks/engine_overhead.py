"""The engine against a bare loop: same weights, clip, masks and AdamW, turn by turn.

On several ranks the bare loop has PyTorch's DistributedDataParallel around the model.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fmrizoo.data.store import Store
from fmrizoo.pipeline.inputs import loader
from fmrizoo.trainer.device import World, init_distributed
from fmrizoo.trainer.engine import Engine, set_checkpointing
from fmrizoo.trainer.profile import PhaseClock
from fmrizoo.trainer.zero import DTYPES
from fmrizoo.types import Batch

from bare_loop import BareLoop, quickest
from steps import job

SWIN, MAMBA = "pretrain/swin4d_simmim", "pretrain/neuromamba_simmim"
# Stage 0 exists in fp32 only; one rank runs the plainest stage (fmrizoo/trainer/zero.py).
SETTINGS = [
    (SWIN, "fp32", 0),
    (SWIN, "bf16", 1),
    (SWIN, "fp32", 1),
    (SWIN, "bf16", 2),
    (SWIN, "bf16", 3),
    (MAMBA, "bf16", 1),
    (MAMBA, "bf16", 3),
    (MAMBA, "fp32", 0),
]
ALONE = World()
PHASES = ("forward", "backward", "optimizer", "other")


@dataclass(frozen=True)
class Overhead:
    """One setting.

    Attributes:
        cpu_ratios, wall_ratios: Engine / bare loop, of every round.
        bare_cpu, engine_cpu: Median CPU seconds of a step.
        phases: Median CPU milliseconds by side (``bare``, ``ours``) and phase.
        difference: Largest relative difference of the two losses.
        adamw: Which of PyTorch's AdamWs the bare loop has.
        runs: The ZeRO stage that one rank runs (:mod:`fmrizoo.trainer.zero`).
    """

    cpu_ratios: list[float]
    wall_ratios: list[float]
    bare_cpu: float
    engine_cpu: float
    phases: dict[str, dict[str, float]]
    difference: float
    adamw: str
    runs: int


@dataclass
class _Side:
    """One contender: ``step(k)`` takes step k and returns its loss."""

    step: Callable[[int], float]
    clock: PhaseClock

    def turn(self, number: int) -> tuple[float, float, float]:
        """CPU seconds, wall seconds and loss of one step."""
        # The same masks and dropout on both sides.
        torch.manual_seed(number)
        gc.collect()
        dist.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        with self.clock.step():
            loss = self.step(number)
        return time.process_time() - cpu, time.perf_counter() - wall, loss


def overhead(
    name: str, store: Store, precision: str, stage: int, rounds: int, world: World = ALONE
) -> Overhead:
    """Both sides on one clip of ``store`` a rank; the first round is not counted."""
    batch_size = f"train.batch_size={world.size}"
    overrides = [batch_size, f"train.precision={precision}", f"train.zero_stage={stage}"]
    recipe, model, table, tasks = job(name, store, overrides)
    train, device = recipe.train, torch.device("cpu")
    init_distributed(world, device)
    source = loader(table, recipe, 1, tasks)
    batch = next(source.epoch()).to_batch(device, DTYPES[precision])
    set_checkpointing(model, train.checkpointing)
    model.train()
    adamw = quickest([p.shape for p in model.parameters() if p.requires_grad])
    clocks = {side: PhaseClock(time.process_time) for side in ("bare", "ours")}
    wrap: Callable[[nn.Module], nn.Module] = (
        partial(DistributedDataParallel, gradient_as_bucket_view=True)
        if world.size > 1
        else lambda model: model
    )
    bare = BareLoop(copy.deepcopy(model), train, adamw, clocks["bare"].phase, wrap)
    engine = Engine(model, train, world, device)
    engine.timed(clocks["ours"].around)
    sides = {
        "bare": _Side(lambda k: float(bare.step(batch, _rate(k))), clocks["bare"]),
        "ours": _Side(lambda k: _engine_step(engine, batch, k), clocks["ours"]),
    }
    try:
        return _measure(sides, rounds, adamw, engine.stage)
    finally:
        engine.close()


def _rate(number: int) -> float:
    """A warm-up, so that the two sides' weights must both follow the rate."""
    return min(1.0, (number + 1) / 4)


def _engine_step(engine: Engine, batch: Batch, number: int) -> float:
    loss, _ = engine.accumulate(batch)
    engine.step(_rate(number))
    return float(loss)


def _measure(sides: dict[str, Any], rounds: int, adamw: str, runs: int) -> Overhead:
    seen: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        # Who goes first changes, so that neither always finds the other's caches.
        for side in list(sides) if number % 2 else list(sides)[::-1]:
            seen[side].append(sides[side].turn(number))
    pairs = list(zip(seen["bare"], seen["ours"], strict=True))
    phases = {
        side: {
            phase: 1e3 * statistics.median(step[phase] for step in made.clock.steps[1:])
            for phase in PHASES
        }
        for side, made in sides.items()
    }
    return Overhead(
        cpu_ratios=[ours[0] / bare[0] for bare, ours in pairs[1:]],
        wall_ratios=[ours[1] / bare[1] for bare, ours in pairs[1:]],
        bare_cpu=statistics.median(bare[0] for bare, _ in pairs[1:]),
        engine_cpu=statistics.median(ours[0] for _, ours in pairs[1:]),
        phases=phases,
        difference=max(abs(ours[2] / bare[2] - 1) for bare, ours in pairs),
        adamw=adamw,
        runs=runs,
    )

"""Memory of one rank while it trains: states by ZeRO stage, gradients on their way, activations.

What DeepSpeed allocates is written here as arithmetic, read from its sources (0.19) for exactly the
configuration that :func:`fmrizoo.trainer.zero.deepspeed_config` gives it; activations are traced
(:mod:`fmrizoo.cluster.trace`). Nothing is a fudge factor but ``WORKSPACE``, which was measured.
Equations, errors against measured peaks: docs/planner.md, benchmarks/planner_memory.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fmrizoo.cluster.trace import Trace, trace_step
from fmrizoo.config import Recipe, TrainConfig
from fmrizoo.errors import RecipeError
from fmrizoo.sections.train import OFFLOAD
from fmrizoo.trainer.device import World
from fmrizoo.trainer.zero import (
    accumulation,
    deepspeed_config,
    micro_batch,
    optimizer_kind,
    zero_stage,
)

LIVE = 1_000_000_000  # whole parameters that stage 3 keeps at a time (stage3_max_live_parameters)
FLAT = 500_000_000  # elements that DeepSpeed's plain all-reduce lays side by side
# Bytes beside all tensors: oneDNN's, gloo's and the allocator's. Measured (fitted rows of the
# benchmark); on another device, and for a whole process, it is what the YAML says.
WORKSPACE = 20e6


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the worst moment of a step.

    Attributes:
        stage, offload: What they hold for.
        weights: Parameters and buffers that compute.
        master: fp32 copy that the optimizer changes.
        moments: AdamW's two.
        gradients: As they are kept between backward pass and step.
        buckets: Flat buffers for communication, and their copies in fp32.
        activations: At the worst moment, with what is being recomputed there.
        batch: The clips of a micro-step.
        temporary: Of the optimizer's step, where that is the worst moment.
        base: Beside all tensors.
        worst: ``backward``, ``reduce`` or ``step``.
        host: Bytes in the node's memory for this rank (offload).
    """

    stage: int
    offload: str
    weights: float
    master: float
    moments: float
    gradients: float
    buckets: float
    activations: float
    batch: float
    temporary: float
    base: float
    worst: str
    host: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        parts = (self.weights, self.master, self.moments, self.gradients, self.buckets)
        rest = (self.activations, self.batch, self.temporary, self.base)
        return sum(parts) + sum(rest)


def rank_memory(
    recipe: Recipe,
    ranks: int,
    *,
    trace: Trace | None = None,
    stage: int | None = None,
    offload: str | None = None,
    base: float = WORKSPACE,
    fused: bool = True,
) -> RankMemory:
    """Memory of one of ``ranks``.

    Args:
        recipe: For pretraining; ``train`` says precision, stage, batch and checkpointing.
        ranks: Of the job.
        trace: Of this micro-batch, if it was made before.
        stage: Instead of ``train.zero_stage``.
        offload: Instead of ``train.offload``.
        base: Bytes beside all tensors.
        fused: AdamW runs in one pass, as the engine asks for on a CPU.

    Raises:
        RecipeError: a batch that cannot be divided, or an offload that does not exist or needs
            another stage.
    """
    offload = offload or recipe.train.offload
    if offload not in OFFLOAD:
        raise RecipeError(f"train.offload is one of {', '.join(OFFLOAD)}, got {offload!r}")
    train = replace(
        recipe.train,
        zero_stage=recipe.train.zero_stage if stage is None else stage,
        offload=offload,
    )
    if ranks < 1:
        raise RecipeError(f"a job has at least 1 rank, got {ranks}")
    world = World(0, ranks, 0, "plan")
    clips = micro_batch(train, world)
    trace = trace or trace_step(recipe, clips)
    moments = _moments(train, trace, world, fused)
    worst = max(moments, key=lambda one: one.total)
    return replace(worst, base=base)


def _moments(train: TrainConfig, trace: Trace, world: World, fused: bool) -> Iterator[RankMemory]:
    """The backward pass, the reduction of gradients and the optimizer's step."""
    stage, n = zero_stage(train, world.size), world.size
    sizes: dict[str, Any] = _states(train, trace, world)
    start = RankMemory(stage=stage, offload=train.offload, base=0.0, worst="", **sizes)
    zero = deepspeed_config(train, world, trace.trained)["zero_optimization"]
    share, whole = trace.trained / n, float(trace.trained)
    word = 2.0 if train.precision == "bf16" else 4.0
    bucket = float(min(zero["reduce_bucket_size"], whole))
    kind = optimizer_kind(train, n)
    # Backward: the gradients that are there at each moment, and what waits in buckets.
    done, worst, kept, parts = 0.0, 0.0, 0.0, 0.0
    for moment in trace.moments:
        one = float(moment.gradient)
        if kind == "bf16":  # a gradient lives until it is added to the fp32 sums, through a copy
            held, buffers = word * one, 4.0 * one
        elif kind == "plain":
            held, buffers = word * (done + one), 0.0
        elif kind == "flat" and stage == 1:  # fp32 sums of all, and the bucket from the start
            held, buffers = 4.0 * done + word * one, 4.0 * bucket
        elif kind == "flat":  # sums of earlier micro-steps were there before, see _states
            sums = 0.0 if start.gradients else 4.0 * done / n
            held, buffers = word * one + sums, word * bucket
        else:  # stage 3: the bucket is there from the start
            held, buffers = word * one, 0.0
        if moment.peak + held + buffers > worst:
            worst = moment.peak + held + buffers
            kept, parts = held, buffers
        done += one
    yield replace(
        start,
        activations=worst - kept - parts,
        gradients=start.gradients + kept,
        buckets=start.buckets + parts,
        worst="backward",
    )
    summed: dict[str, Any] = _reduction(kind, stage, word, whole, share, bucket, n, start)
    yield replace(start, worst="reduce", **summed)
    # Step: AdamW's root and its quotient, both as large as the largest thing it steps at once. The
    # fused one, which the engine takes on a CPU, has neither.
    largest = float(trace.largest) if kind == "plain" else share
    on_device = train.offload == "none"
    step: dict[str, Any] = {"temporary": 8.0 * largest if on_device and not fused else 0.0}
    if kind == "plain":
        step["gradients"] = word * whole
    elif kind == "flat":
        step["gradients"] = max(start.gradients, 4.0 * share if on_device else 0.0)
        step["gradients"] += 4.0 * share if on_device else 0.0  # laid side by side once more
        step["buckets"] = 4.0 * bucket if stage == 1 else 0.0
    elif kind == "parts":  # gradients are laid side by side once more
        step["weights"] = start.weights - word * min(whole, LIVE)
        step["gradients"] = start.gradients + (4.0 * share if on_device else 0.0)
    yield replace(start, worst="step", **step)


def _states(train: TrainConfig, trace: Trace, world: World) -> dict[str, float]:
    """Bytes that are there all the time."""
    n = world.size
    kind, stage = optimizer_kind(train, n), zero_stage(train, n)
    word = 2.0 if train.precision == "bf16" else 4.0
    whole, share = float(trace.trained), trace.trained / world.size
    weights = word * trace.parameters
    if stage == 3:  # its part, and the whole parameters that are alive while it computes
        weights = word * trace.parameters / n + word * min(trace.parameters, LIVE)
    bucket = min(
        deepspeed_config(train, world, trace.trained)["zero_optimization"]["reduce_bucket_size"],
        whole,
    )
    # In fp32 too: DeepSpeed copies the weights that it steps.
    master = 0.0 if kind == "plain" else 4.0 * share
    moments = 8.0 * (whole if kind == "plain" else share)
    gradients = {"plain": 0.0, "bf16": 4.0 * whole, "flat": 0.0, "parts": 4.0 * share}[kind]
    if kind == "flat" and stage == 2 and accumulation(train, world) > 1:
        gradients = 4.0 * share  # sums of earlier micro-steps; else they come with the buckets
    host = 0.0
    if train.offload != "none":
        host = master + moments + (4.0 * share)
        master = moments = 0.0
        gradients = 0.0 if kind in ("flat", "parts") else gradients
    if train.offload == "parameters" and stage == 3:
        host += word * trace.parameters / n
        weights -= word * trace.parameters / n
    return {
        "weights": weights + trace.buffers,
        "master": master,
        "moments": moments,
        "gradients": gradients,
        "buckets": 4.0 * bucket if kind == "parts" else 0.0,
        "activations": 0.0,
        "batch": float(trace.batch),
        "temporary": 0.0,
        "host": host,
    }


def _reduction(
    kind: str, stage: int, word: float, whole: float, share: float, bucket: float, n: int,
    start: RankMemory,
) -> dict[str, float]:  # fmt: skip
    """What the moment holds at which the last gradients are summed over the ranks."""
    if kind == "plain":
        return {"gradients": word * whole, "buckets": word * min(whole, FLAT) if n > 1 else 0.0}
    if kind == "bf16":
        return {"buckets": 4.0 * min(whole, FLAT) if n > 1 else 0.0}
    if kind == "flat" and stage == 1:  # whole gradients, and this rank's part of their sums
        return {"gradients": 4.0 * (whole + share), "buckets": 4.0 * bucket}
    if kind == "flat":
        widened = 4.0 * bucket if word < 4.0 else 0.0
        kept = max(start.gradients, 4.0 * share)
        return {"gradients": kept, "buckets": word * bucket + widened}
    return {"buckets": start.buckets + 4.0 * share}

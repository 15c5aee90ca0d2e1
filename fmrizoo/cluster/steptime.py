"""Seconds of one optimizer step: compute from FLOPs, collectives from bytes, latency and links.

An alpha-beta model in two levels. A collective of V bytes first runs among the r ranks of a node,
then among the N nodes, each of which sends what its ranks hold together:

    inside   all-reduce  2 (r-1) a + 2 V (r-1)/r / B
    across   ring        2 (N-1) A + 2 V (N-1)/N / (e W)
             tree        log2(N) A + V log2(N) / (e W)

Reduce-scatter and all-gather cost half of it. What runs when: :func:`collectives`. Nothing overlaps
compute but reading. Which constants were declared, fitted or assumed: the machine's YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2

import numpy as np

from fmrizoo.cluster.machines import Machine
from fmrizoo.cluster.memory import LIVE
from fmrizoo.errors import DataError


@dataclass(frozen=True)
class Collective:
    """One kind of collective in a step.

    Attributes:
        name: ``all-reduce``, ``reduce-scatter`` or ``all-gather``.
        bytes: Of the whole buffer.
        times: In one optimizer step.
    """

    name: str
    bytes: float
    times: int


def collectives(stage: int, trained: float, word: float, accumulate: int) -> list[Collective]:
    """What DeepSpeed sends in a step, gradients in fp32 as fmrizoo asks it to.

    Stage 0 sums gradients once a step. Stage 1 also gathers the weights that each rank has changed.
    Stage 2 sums gradients after every micro-step, a part on each rank. Stage 3 gathers the weights
    in every forward pass, and again in the backward pass if not all of them may stay.
    """
    gradients, weights = 4.0 * trained, word * trained
    if stage == 0:
        return [Collective("all-reduce", gradients, 1)]
    if stage == 1:
        return [Collective("all-reduce", gradients, 1), Collective("all-gather", weights, 1)]
    if stage == 2:
        summed = Collective("reduce-scatter", gradients, accumulate)
        return [summed, Collective("all-gather", weights, 1)]
    passes = 1 if trained <= LIVE else 2
    return [
        Collective("reduce-scatter", gradients, accumulate),
        Collective("all-gather", weights, passes * accumulate),
    ]


def seconds(one: Collective, machine: Machine, nodes: int, ranks_per_node: int) -> float:
    """Of all its runs in a step."""
    inside = latency = across = 0.0
    if ranks_per_node > 1:
        r = ranks_per_node
        inside = 2 * one.bytes * (r - 1) / r / machine.intra_bandwidth
        latency = 2 * (r - 1) * machine.intra_latency
    if nodes > 1:
        ring = machine.inter_algorithm == "ring"
        hops = 2 * (nodes - 1) if ring else log2(nodes)
        volume = one.bytes * (2 * (nodes - 1) / nodes if ring else log2(nodes))
        across = volume / (machine.inter_efficiency * machine.inter_bandwidth)
        latency += hops * machine.inter_latency
    half = 1.0 if one.name == "all-reduce" else 0.5
    return one.times * half * (inside + latency + across)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute: Forward, backward and recomputation.
        optimizer: AdamW, where it runs on the host (offload); 0 otherwise.
        communication: Collectives.
        reading: What the file system needs for the step's clips; the loader does it meanwhile.
    """

    compute: float
    optimizer: float
    communication: float
    reading: float

    @property
    def total(self) -> float:
        """The longer of computing and reading."""
        return max(self.working, self.reading)

    @property
    def working(self) -> float:
        """Without reading."""
        return self.compute + self.optimizer + self.communication


@dataclass(frozen=True)
class Run:
    """What a scaling table was measured with.

    Attributes:
        parameters, flops: Of the model; FLOPs of one clip, forward and backward.
        clips: Of a rank and micro-step, on as few nodes as the table begins with.
        batch: Clips of the job that all rows share; a rank takes fewer clips where this is less
            than ``clips`` a rank. 0: every rank always takes ``clips``.
        word: Bytes of a gradient and of a weight on the wire.
    """

    parameters: float
    flops: float
    clips: int
    batch: int = 0
    word: float = 2.0

    def local(self, machine: Machine, nodes: int) -> float:
        """Clips of a rank and micro-step on ``nodes``."""
        most = self.batch / (machine.ranks_per_node * nodes) if self.batch else float(self.clips)
        return min(float(self.clips), most)


def throughput(run: Run, machine: Machine, nodes: int) -> float:
    """Clips a second of ZeRO-1 in bf16 with one synchronisation per micro-step."""
    clips, r = run.local(machine, nodes), machine.ranks_per_node
    compute = clips * run.flops / machine.rate("bf16")
    return clips * r * nodes / (compute + _synchronisation(run, machine, nodes))


def _synchronisation(run: Run, machine: Machine, nodes: int) -> float:
    size = run.word * run.parameters
    parts = (Collective("all-reduce", size, 1), Collective("all-gather", size, 1))
    return sum(seconds(part, machine, nodes, machine.ranks_per_node) for part in parts)


def fit(run: Run, machine: Machine, rows: Sequence[tuple[int, float]]) -> Machine:
    """``machine`` with the two constants that make ``rows`` (nodes, clips/s) come out best.

    They are the share of peak FLOP/s and the share of the links between nodes. The time of a
    micro-step is linear in the inverse of both, so this is least squares of relative errors.

    Raises:
        DataError: fewer than two numbers of nodes, or rows that no positive share explains.
    """
    if len({nodes for nodes, _ in rows}) < 2:
        raise DataError("a fit of two constants needs rows of at least two numbers of nodes")
    unit = replace(machine, inter_efficiency=1.0)
    design, wanted = [], []
    for nodes, rate in rows:
        clips, r = run.local(machine, nodes), machine.ranks_per_node
        measured = clips * r * nodes / rate
        single = replace(unit, inter_bandwidth=float("inf"))
        fixed = _synchronisation(run, single, nodes)
        across = _synchronisation(run, unit, nodes) - fixed
        compute = clips * run.flops / machine.peak_flops["bf16"]
        design.append([compute / measured, across / measured])
        wanted.append(1 - fixed / measured)
    (slow, narrow), *_ = np.linalg.lstsq(np.array(design), np.array(wanted), rcond=None)
    if slow <= 0 or narrow <= 0:
        raise DataError("these rows ask for a negative time of computing or of sending")
    shares = {**machine.efficiency, "bf16": 1 / float(slow)}
    return replace(machine, efficiency=shares, inter_efficiency=1 / float(narrow))

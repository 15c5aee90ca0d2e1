"""What a pretraining job needs of a cluster: memory, time, node-hours, storage; and three answers.

``plan_training`` puts memory.py, steptime.py and storage.py together. It answers whether a recipe
fits, which ZeRO stage is the smallest that does, and at how many nodes reading takes over from
computing in each layout of the data. docs/planner.md has the equations and how far they were wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any

from fmrizoo.cluster.machines import Machine, load_machine
from fmrizoo.cluster.memory import RankMemory, rank_memory
from fmrizoo.cluster.steptime import StepTime, collectives, seconds
from fmrizoo.cluster.storage import Cost, DataSet, costs
from fmrizoo.cluster.trace import Trace, trace_step
from fmrizoo.config import Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.trainer.device import World
from fmrizoo.trainer.zero import accumulation, micro_batch, zero_stage

HEADROOM = 0.1  # of a device's memory that a plan leaves free: the model's own error
OURS = "fmrizoo int8"
SOURCES = "HDF5 gzip, own chunks"  # the layout the source trained from


@dataclass(frozen=True)
class Wall:
    """Nodes from which on reading from one layout takes longer than computing.

    Attributes:
        layout: Its name.
        nodes: How many; by bandwidth or by opens, whichever comes first.
        limit: ``bandwidth`` or ``opens``.
    """

    layout: str
    nodes: float
    limit: str


@dataclass(frozen=True)
class NodePlan:
    """One number of nodes.

    Attributes:
        nodes, ranks: Of the job.
        clips: Of a rank and micro-step.
        accumulate: Micro-steps of a step.
        memory: Of a rank at the recipe's stage.
        stages: The same for stages 0–3.
        fits: The recipe as it stands, with headroom.
        smallest: Smallest stage that fits; None: none does.
        step: Seconds of a step, read from our store.
        throughput: Clips a second.
        epoch_hours, node_hours: One pass over the data; the whole recipe.
        staging_seconds: Reading our store once into the nodes' memory, divided between them.
        walls: By layout.
    """

    nodes: int
    ranks: int
    clips: int
    accumulate: int
    memory: RankMemory
    stages: tuple[RankMemory, ...]
    fits: bool
    smallest: int | None
    step: StepTime
    throughput: float
    epoch_hours: float
    node_hours: float
    staging_seconds: float
    walls: tuple[Wall, ...]


@dataclass(frozen=True)
class TrainingPlan:
    """What :func:`plan_training` found.

    Attributes:
        recipe: Its name.
        machine: The cluster.
        parameters: Of the model.
        clip_flops: Of one clip, forward and backward, with recomputation.
        checkpoint_bytes, kept_bytes: Of one checkpoint; of all that exist at a time.
        data_bytes: Of the data set, by layout.
        rows: By number of nodes.
    """

    recipe: str
    machine: Machine
    parameters: int
    clip_flops: float
    checkpoint_bytes: float
    kept_bytes: float
    data_bytes: dict[str, float]
    rows: tuple[NodePlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = asdict(self)
        for row, values in zip(self.rows, found["rows"], strict=True):
            values["memory"]["total"] = row.memory.total
            values["step"]["total"] = row.step.total
            for stage, held in zip(values["stages"], row.stages, strict=True):
                stage["total"] = held.total
        return found

    def sentences(self) -> list[str]:
        """The three answers, for the last number of nodes where they depend on it."""
        found = [self._fit(row) for row in self.rows]
        last = self.rows[-1]
        for wall in last.walls:
            if wall.layout in (OURS, SOURCES):
                found.append(
                    f"From {wall.layout} reading takes over from computing at about "
                    f"{wall.nodes:,.0f} nodes (by {wall.limit})."
                )
        found.append(self._staging(last))
        return found

    def _staging(self, row: NodePlan) -> str:
        share = self.data_bytes[OURS] / row.nodes
        where = f"the memory of {_count(row.nodes, 'node')} (data.stage, data.divide)"
        if share > self.machine.host_memory:
            return (
                f"The store does not fit into {where}: {share / 1e9:,.0f} GB a node, and a node "
                f"has {self.machine.host_memory / 1e9:,.0f}."
            )
        return (
            f"Staged into {where} the store is read once, in {row.staging_seconds:,.0f} s; then "
            "there is no such wall."
        )

    def _fit(self, row: NodePlan) -> str:
        room, has = row.memory.total / 1e9, self.machine.device_memory / 1e9
        verdict = "fits" if row.fits else "does not fit"
        which = (
            f"the smallest stage that fits is {row.smallest}"
            if row.smallest is not None
            else "no stage fits: lower train.max_micro_batch, or recompute with train.checkpointing"
        )
        return (
            f"{self.recipe} on {_count(row.nodes, 'node')} ({_count(row.ranks, 'rank')}): stage "
            f"{row.memory.stage} {verdict}, {room:.1f} of {has:.0f} GB a rank with {HEADROOM:.0%} "
            f"kept free; {which}."
        )


def plan_training(
    recipe: Recipe,
    cluster: str | Path | Machine,
    nodes: int | Sequence[int],
    *,
    data: DataSet | None = None,
    name: str = "the recipe",
) -> TrainingPlan:
    """Plan the pretraining of a composed recipe.

    Args:
        recipe: With backbone and objective.
        cluster: A shipped description's name, a YAML file, or a :class:`Machine`.
        nodes: One or several numbers of nodes.
        data: What is read; by default 50,000 subjects of 490 frames.
        name: Of the recipe, for the sentences.

    Raises:
        RecipeError: an unknown cluster, no node, a batch that cannot be divided, or a recipe that
            cannot be traced.
    """
    machine = cluster if isinstance(cluster, Machine) else load_machine(cluster)
    counts = [nodes] if isinstance(nodes, int) else list(nodes)
    if not counts or min(counts) < 1:
        raise RecipeError(f"--nodes needs numbers ≥ 1, got {counts}")
    frames = recipe.data.clip_frames
    data = data or DataSet(50_000, max(490, frames), clip_frames=frames)
    data = replace(data, clip_frames=frames, clips_per_visit=recipe.data.clips_per_visit)
    worlds = [World(0, n * machine.ranks_per_node, 0, "plan") for n in counts]
    every = lcm(*(world.size for world in worlds))
    sizes = [_micro(recipe, world, n, every) for world, n in zip(worlds, counts, strict=True)]
    traces = {size: trace_step(recipe, size) for size in sorted(set(sizes))}
    layouts = costs(data)
    rows = tuple(
        _row(recipe, machine, n, traces[size], size, data, layouts)
        for n, size in zip(counts, sizes, strict=True)
    )
    first, clips = traces[sizes[0]], sizes[0]
    words = 2 + 12 if recipe.train.precision == "bf16" else 4 + 8
    saved = float(words * first.trained)
    return TrainingPlan(
        recipe=name,
        machine=machine,
        parameters=first.parameters,
        clip_flops=first.flops / clips,
        checkpoint_bytes=saved,
        kept_bytes=saved * (recipe.train.keep + 1),  # a new one is whole before an old one goes
        data_bytes={cost.layout: data.subjects * cost.subject_bytes for cost in layouts},
        rows=rows,
    )


def _micro(recipe: Recipe, world: World, nodes: int, every: int) -> int:
    try:
        return micro_batch(recipe.train, world)
    except RecipeError as error:
        all_of_them = "" if every == world.size else f"; all --nodes together need {every}"
        raise RecipeError(f"on {_count(nodes, 'node')}: {error}{all_of_them}") from None


def _row(
    recipe: Recipe,
    machine: Machine,
    nodes: int,
    trace: Trace,
    clips: int,
    data: DataSet,
    layouts: Sequence[Cost],
) -> NodePlan:
    train, ranks = recipe.train, nodes * machine.ranks_per_node
    steps = accumulation(train, World(0, ranks, 0, "plan"))
    room = machine.device_memory * (1 - HEADROOM)

    def memory(stage: int) -> RankMemory:
        return rank_memory(
            recipe,
            ranks,
            trace=trace,
            stage=stage,
            offload=_offload(stage, train.offload),
            base=machine.device_base,
            fused=machine.device == "cpu",
        )

    stages = tuple(memory(stage) for stage in range(4))
    mine = stages[train.zero_stage]
    fitting = [held.stage for held in stages if held.total <= room]
    word = 2.0 if train.precision == "bf16" else 4.0
    sent = collectives(zero_stage(train, ranks), float(trace.trained), word, steps)
    ours = next(cost for cost in layouts if cost.layout == OURS)
    step = StepTime(
        compute=steps * trace.flops / machine.rate(train.precision),
        optimizer=mine.host / machine.host_bandwidth,
        communication=sum(seconds(one, machine, nodes, machine.ranks_per_node) for one in sent),
        reading=_reading(ours, machine, train.batch_size),
    )
    rate = train.batch_size / step.total
    clips_of_data = data.subjects * (data.frames // data.clip_frames)
    return NodePlan(
        nodes=nodes,
        ranks=ranks,
        clips=clips,
        accumulate=steps,
        memory=mine,
        stages=stages,
        fits=mine.total <= room,
        smallest=fitting[0] if fitting else None,
        step=step,
        throughput=rate,
        epoch_hours=clips_of_data / rate / 3600,
        node_hours=nodes * train.steps * step.total / 3600,
        staging_seconds=data.subjects * ours.subject_bytes / machine.storage_bandwidth,
        walls=tuple(
            _wall(cost, machine, train.batch_size / step.working / nodes) for cost in layouts
        ),
    )


def _offload(stage: int, asked: str) -> str:
    """As much of what was ``asked`` as a ZeRO stage can move to the host."""
    if stage == 0:
        return "none"
    return "optimizer" if stage < 3 and asked == "parameters" else asked


def _reading(cost: Cost, machine: Machine, clips: float) -> float:
    """Seconds that the file system needs for so many clips."""
    by_bytes = clips * cost.clip_bytes / machine.storage_bandwidth
    return max(by_bytes, clips * cost.clip_opens / machine.storage_opens)


def _wall(cost: Cost, machine: Machine, node_rate: float) -> Wall:
    """Nodes that together ask for all there is, each training ``node_rate`` clips/s."""
    by_bytes = machine.storage_bandwidth / (node_rate * cost.clip_bytes)
    by_opens = machine.storage_opens / (node_rate * cost.clip_opens)
    limit = "bandwidth" if by_bytes <= by_opens else "opens"
    return Wall(cost.layout, min(by_bytes, by_opens), limit)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

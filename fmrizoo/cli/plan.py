"""``fmrizoo plan``: what a job will need, before it is started."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fmrizoo.cli.shell import Overrides, RecipeName, app, out

if TYPE_CHECKING:
    from fmrizoo.cluster.capacity import NodePlan, TrainingPlan

plan = typer.Typer(help="What a job will need on a cluster.", no_args_is_help=True)
app.add_typer(plan, name="plan")


@plan.callback()
def _plan() -> None:
    """What a job will need on a cluster."""


@plan.command()
def data(
    subjects: Annotated[int, typer.Option(help="How many.")] = 50_000,
    frames: Annotated[int, typer.Option(help="Of one subject.")] = 490,
    grid: Annotated[str, typer.Option(help="Voxels x,y,z.")] = "96,96,96",
    brain: Annotated[float, typer.Option(help="Share of the voxels that are brain.")] = 0.287,
    clip_frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 20,
    clips_per_visit: Annotated[int, typer.Option(help="data.clips_per_visit.")] = 4,
    rate: Annotated[float, typer.Option(help="Clips a second that a node trains on.")] = 27.44,
    nodes: Annotated[str, typer.Option(help="Numbers of nodes.")] = "1,128,1024",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bytes, files, bandwidth, opens and staging memory of a data set in each layout.

    By arithmetic; the model and what was measured for it: fmrizoo/cluster/storage.py.
    """
    from fmrizoo.cluster.storage import DataSet, table
    from fmrizoo.errors import RecipeError

    sides = _numbers(grid, "--grid")
    if len(sides) != 3:
        raise RecipeError(f"--grid takes three whole numbers x,y,z, got {grid!r}")
    wanted = DataSet(
        subjects, frames, (sides[0], sides[1], sides[2]), brain, clip_frames, clips_per_visit, rate
    )
    found = table(wanted, _numbers(nodes, "--nodes"))
    if as_json:
        rows = [{**asdict(cost), "nodes": [asdict(d) for d in demands]} for cost, demands in found]
        out.print_json(json.dumps({"data": asdict(wanted), "layouts": rows}))
        return
    stored = Table("layout", box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for name in ("TB", "files", "MB a subject", "MB a clip", "reads", "opens"):
        stored.add_column(name, justify="right", no_wrap=True)
    asked = Table("nodes", box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for name in ("layout", "GB/s", "opens/s", "GB a node, all", "divided"):
        asked.add_column(name, justify="left" if name == "layout" else "right", no_wrap=True)
    for cost, _ in found:
        stored.add_row(
            cost.layout,
            f"{subjects * cost.subject_bytes / 1e12:.1f}",
            f"{cost.files:,}",
            f"{cost.subject_bytes / 1e6:.0f}",
            f"{cost.clip_bytes / 1e6:.2f}",
            f"{cost.clip_calls:g}",
            f"{cost.clip_opens:g}",
        )
    for number in range(len(found[0][1])):
        for cost, demands in found:
            one = demands[number]
            asked.add_row(
                str(one.nodes) if cost is found[0][0] else "",
                cost.layout,
                f"{one.bandwidth / 1e9:,.{0 if one.bandwidth > 1e11 else 2}f}",
                f"{one.opens:,.0f}",
                f"{one.staged / 1e9:,.0f}",
                f"{one.divided / 1e9:,.1f}",
            )
    out.print(stored)
    out.print()
    out.print(asked)
    out.print(
        f"{rate:g} clips a second and node, of {clip_frames} frames at random starts, nothing "
        f"cached; fmrizoo reads {clips_per_visit} clips a visit. data.stage copies everything to "
        "each node, with data.divide=N one N-th of the subjects.",
        soft_wrap=True,
        style="dim",
    )


@plan.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    cluster: Annotated[
        str, typer.Option(help="aurora, frontier, perlmutter, laptop, or a YAML file.")
    ] = "laptop",
    nodes: Annotated[str, typer.Option(help="Numbers of nodes.")] = "1",
    subjects: Annotated[int, typer.Option(help="Of the data set.")] = 50_000,
    frames: Annotated[int, typer.Option(help="Of one subject.")] = 490,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory, step time, node-hours and storage of a pretraining, and where it hits a wall.

    By a model, not by measurement: its equations, constants and errors are in docs/planner.md.
    """
    from fmrizoo.cluster.capacity import plan_training
    from fmrizoo.cluster.storage import DataSet
    from fmrizoo.zoo import load_recipe

    composed = load_recipe(recipe, overrides or [])
    data_set = DataSet(subjects, frames, clip_frames=composed.data.clip_frames)
    found = plan_training(composed, cluster, _numbers(nodes, "--nodes"), data=data_set, name=recipe)
    if as_json:
        out.print_json(json.dumps(found.to_dict()))
        return
    _print_plan(found)


def _print_plan(found: TrainingPlan) -> None:
    from fmrizoo.cluster.capacity import OURS, SOURCES

    out.print(
        f"{found.parameters / 1e6:,.1f} M parameters, {found.clip_flops / 1e12:,.2f} TFLOP a clip; "
        f"{found.machine.name}: {found.machine.ranks_per_node} ranks a node"
    )
    for row in found.rows:
        out.print(f"\n{row.ranks} ranks, {row.nodes} × {found.machine.ranks_per_node}:")
        out.print(_memory_table(row))
    out.print()
    out.print(_time_table(found))
    out.print("clips: micro-steps of a step × clips of a rank in each", style="dim")
    stored = found.data_bytes
    out.print(
        f"\nA checkpoint takes {found.checkpoint_bytes / 1e9:,.1f} GB, all that are kept "
        f"{found.kept_bytes / 1e9:,.1f} GB. The data take "
        + ", ".join(f"{stored[name] / 1e12:,.1f} TB as {name}" for name in (OURS, SOURCES))
        + " (all layouts: fmrizoo plan data).",
        soft_wrap=True,
    )
    for sentence in found.sentences():
        out.print(sentence, soft_wrap=True)


def _memory_table(row: NodePlan) -> Table:
    """GB of a rank, a line per stage; the batch counts among the activations."""
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("GB a rank", no_wrap=True)
    for name in ("weights", "master", "moments", "grads", "buckets", "activ.", "step", "base"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    moved = any(held.host for held in row.stages)
    if moved:
        table.add_column("host", justify="right", no_wrap=True)
    for number, held in enumerate(row.stages):
        if held.stage != number:  # bf16 has no stage 0
            continue
        values = (
            held.weights, held.master, held.moments, held.gradients, held.buckets,
            held.activations + held.batch, held.temporary, held.base, held.total,
            *((held.host,) if moved else ()),
        )  # fmt: skip
        mine = " ←" if held.stage == row.memory.stage else ""
        table.add_row(f"stage {number}{mine}", *(f"{value / 1e9:.1f}" for value in values))
    return table


def _time_table(found: TrainingPlan) -> Table:
    table = Table("nodes", box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for name in ("clips", "compute s", "send s", "read s", "step s", "clips/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("epoch h", "node-hours"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        step = row.step
        table.add_row(
            str(row.nodes),
            f"{row.accumulate} × {row.clips}",
            f"{step.compute + step.optimizer:.3g}",
            f"{step.communication:.3g}",
            f"{step.reading:.3g}",
            f"{step.total:.3g}",
            f"{row.throughput:,.1f}",
            f"{row.epoch_hours:,.2f}",
            f"{row.node_hours:,.0f}",
        )
    return table


def _numbers(text: str, option: str) -> list[int]:
    from fmrizoo.errors import RecipeError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise RecipeError(f"{option} takes whole numbers with commas, got {text!r}") from None

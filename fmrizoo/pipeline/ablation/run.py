"""An ablation from the recipe to the table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fmrizoo.config import Recipe
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.targets import check_labels, fit_tasks
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.pipeline.ablation.cells import Cell, cells_of
from fmrizoo.pipeline.ablation.chains import Chain, chains_of, is_done, run_chain
from fmrizoo.pipeline.ablation.compared import Comparison, compare
from fmrizoo.pipeline.ablation.results import Ablation, collect, write_tables
from fmrizoo.pipeline.inputs import open_data
from fmrizoo.pipeline.pool import part_of, work_through

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A checked ablation that has not begun."""

    recipe: Recipe
    cells: list[Cell]
    chains: list[Chain]

    @property
    def pretrainings(self) -> int:
        """Models that are pretrained."""
        return sum(chain.pretraining is not None for chain in self.chains)

    @property
    def finetunings(self) -> int:
        """Models that are fine-tuned and tested."""
        every = [t for chain in self.chains for t in chain.tunings]
        return sum(t.cell != "baselines" for t in every)


@dataclass(frozen=True)
class Found:
    """What an ablation has found."""

    table: Ablation
    pairs: list[Comparison]


def plan(source: str | Path, overrides: Sequence[str] = ()) -> Planned:
    """All cells, composed and compared with each other; no voxel is read, nothing is trained.

    Raises:
        RecipeError, DataError: what :func:`~fmrizoo.pipeline.ablation.cells.cells_of` refuses, data
            or labels that cannot be used, or a cell that would be tested on other units than the
            first.
    """
    recipe, cells = cells_of(source, overrides)
    chains = chains_of(recipe, cells)
    reference: dict[str, set[str]] = {}
    for cell in cells:
        if cell.pretraining is not None:
            try:
                open_data(cell.pretraining)
            except DataError as error:
                raise DataError(f"ablation cell {cell.name!r}: {error}") from None
        for task, own in cell.tasks.items():
            units = _tested(cell.name, task, own)
            _compare(cell.name, task, units, reference.setdefault(task, units))
    return Planned(recipe, cells, chains)


def _tested(cell: str, task: str, recipe: Recipe) -> set[str]:
    """Names of the units that a cell is tested on over all folds; labels are checked."""
    found: set[str] = set()
    try:
        for fold in range(recipe.split.folds):
            one = replace(recipe, split=replace(recipe.split, fold=fold))
            data = open_data(one)
            train = ClipTable.labelled(data.store, data.part("train"), one.data, one.task)
            tasks = fit_tasks(train, one.task)
            for part in ("validation", "test"):
                if (table := data.labelled(part, one)) is not None:
                    check_labels(table, tasks, part)
                    if part == "test":
                        found |= set(table.unit_labels())
    except DataError as error:
        raise DataError(f"ablation cell {cell!r}, task {task}: {error}") from None
    return found


def _compare(cell: str, task: str, units: set[str], reference: set[str]) -> None:
    if units == reference:
        return
    other = sorted(units ^ reference)
    raise RecipeError(
        f"cells cannot be compared: {cell!r} would be tested on {len(units)} units of task {task}, "
        f"the first cell on {len(reference)} (they differ in {other[0]}"
        f"{f' and {len(other) - 1} more' if len(other) > 1 else ''}): leave the value out, or "
        "choose runs that are long enough for both (data.select)"
    )


def ablate(
    planned: Planned,
    out: Path,
    *,
    workers: int = 1,
    part: tuple[int, int] | None = None,
    keep_models: bool = False,
    on_done: Callable[[int, int, str], None] | None = None,
) -> Found | None:
    """Train and test what is left, then write ``ablation.csv`` and ``ablation.json``.

    Args:
        planned: See :func:`plan`.
        out: Folder of the ablation; the same call goes on where it stopped.
        workers: Processes, each with a chain at a time.
        part: (k, n): every n-th chain from the k-th on, for a job array; the table comes from the
            part that ends last, or from a call without it.
        keep_models: Keep checkpoints and fine-tuned models.
        on_done: Called with (done, total, name) after every chain.

    Returns:
        The table and its paired comparisons; None as long as chains are left (after a signal, or
        of other parts).

    Raises:
        FmrizooError: whatever ends a training but divergence, which is a gap in the table.
    """
    chains = planned.chains if part is None else part_of(planned.chains, part)
    work = partial(run_chain, out=out, keep_models=keep_models)
    for done, (name, ended) in enumerate(work_through(chains, work, workers), start=1):
        if ended is None:
            return None
        if on_done:
            on_done(done, len(chains), name)
    if missing(planned, out):
        return None
    found = collect(planned.recipe, planned.cells, planned.chains, out)
    pairs = compare(found)
    write_tables(found, [one.as_row() for one in pairs], out)
    return Found(found, pairs)


def missing(planned: Planned, out: Path) -> list[str]:
    """Folders of fine-tunings and baselines that are not done."""
    return [t.folder for c in planned.chains for t in c.tunings if not is_done(out, t)]

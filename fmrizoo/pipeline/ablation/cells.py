"""From a recipe with the section ``ablate`` to its cells: one pretraining each, and its tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fmrizoo.config import Recipe, compose, to_dict
from fmrizoo.errors import RecipeError
from fmrizoo.pipeline.ablation.matched import Size, matched, measure
from fmrizoo.pipeline.sweep import prepared
from fmrizoo.sections.axes import AblateConfig, AblateTaskConfig, Value, values_of
from fmrizoo.zoo import load_recipe

# What a model expects of its input; fine-tuning takes it from the pretraining.
CARRIED = ("clip_frames", "frame_stride", "clip_stride", "normalization", "store", "stores")


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        name: Unique among the cells.
        values: Axis → label of the value it has there; of a control those of its architecture.
        pretraining: None: a control, which starts from random weights.
        tasks: Task → fine-tuning recipe, without ``init_from``.
        size: Of its encoder.
        control: ``frozen random`` or ``from scratch``; empty otherwise.
    """

    name: str
    values: dict[str, str]
    pretraining: Recipe | None
    tasks: dict[str, Recipe]
    size: Size
    control: str = ""

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        kept = "".join(c if c.isalnum() or c in "-_.=" else " " for c in self.name)
        return "-".join(kept.split())


def cells_of(source: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Cell]]:
    """The composed recipe and all cells, the reference (the recipe as it is) first.

    Args:
        source: Shipped name or file of a pretraining recipe with the section ``ablate``.
        overrides: ``key=value`` strings for every cell; an axis wins over them.

    Raises:
        RecipeError: nothing to vary or to test on, an axis that does not exist, a value that makes
            no model, cells that cannot be matched, or two cells of one name. The cell is named.
    """
    whole = load_recipe(source, overrides)
    config = whole.ablate
    _check(whole, config)
    size = list(getattr(whole.backbone, "img_size", [])) or None
    axes = {name: values_of(name, given, size) for name, given in config.axes.items()}
    found: list[Cell] = []
    for chosen in _designed(config, axes):
        name = _name(config, chosen)
        try:
            found.append(_cell(source, overrides, config, name, chosen, found))
        except RecipeError as error:
            raise RecipeError(f"ablation cell {name!r}: {error}") from None
    slugs = [cell.slug for cell in found]
    if twice := sorted({s for s in slugs if slugs.count(s) > 1}):
        raise RecipeError(f"two cells would share the folder {twice[0]}: rename an axis's value")
    return whole, [*found, *_controls(config, found)]


def _check(recipe: Recipe, config: AblateConfig) -> None:
    if recipe.objective is None:
        raise RecipeError(
            "an ablation varies pretrainings: the recipe needs an objective, and its fine-tunings "
            "are named in ablate.tasks"
        )
    if not config.tasks:
        raise RecipeError(
            "ablate.tasks is empty: name what the cells are tested on, such as "
            "ablate.tasks.sex.recipe=finetune/linear"
        )
    if not config.axes:
        raise RecipeError("ablate.axes is empty: say what varies, such as ablate.axes.MR=[0.2,0.4]")
    for name, task in config.tasks.items():
        if not task.recipe:
            raise RecipeError(f"ablate.tasks.{name} needs a fine-tuning recipe")


def _designed(config: AblateConfig, axes: dict[str, list[Value]]) -> Iterator[dict[str, Value]]:
    """The values of every cell by axis; an axis that is left out has the recipe's own."""
    if config.design == "grid":
        for combination in itertools.product(*axes.values()):
            yield dict(zip(axes, combination, strict=True))
        return
    yield {}
    for axis, values in axes.items():
        for value in values:
            yield {axis: value}


def _name(config: AblateConfig, chosen: dict[str, Value]) -> str:
    if not chosen:
        return "reference"
    if config.design == "grid":
        return ", ".join(v.label for v in chosen.values())
    ((axis, value),) = chosen.items()
    return f"{axis} {value.label}"


def _cell(
    source: str | Path,
    overrides: Sequence[str],
    config: AblateConfig,
    name: str,
    chosen: dict[str, Value],
    earlier: Sequence[Cell],
) -> Cell:
    recipes = [value.recipe for value in chosen.values() if value.recipe]
    if len(recipes) > 1:
        raise RecipeError(f"two of its axes name a recipe: {', '.join(recipes)}")
    own = [item for value in chosen.values() for item in value.overrides]
    composed = load_recipe(recipes[0] if recipes else source, [*overrides, *own])
    if earlier:
        composed = matched(composed, config.match, earlier[0].size)
    composed = replace(prepared(composed), ablate=AblateConfig())
    extra = [item for value in chosen.values() for item in value.finetune]
    tasks = {task: finetuning(composed, task, given, extra) for task, given in config.tasks.items()}
    values = {axis: value.label for axis, value in chosen.items()}
    return Cell(name, values, composed, tasks, measure(composed))


def finetuning(
    pretraining: Recipe, name: str, task: AblateTaskConfig, extra: Sequence[str] = ()
) -> Recipe:
    """The fine-tuning of a task with the encoder of a pretraining, and the input that it expects.

    Overrides of the task win over the cell's; ``extra`` wins over both. ``recipe=NAME`` in
    ``extra`` takes the place of the task's recipe.

    Raises:
        RecipeError: a recipe that is no fine-tuning, or one that this encoder cannot have.
    """
    other = [item.partition("=")[2] for item in extra if item.startswith("recipe=")]
    extra = [item for item in extra if not item.startswith("recipe=")]
    source = load_recipe(other[-1] if other else task.recipe)
    if source.head is None:
        raise RecipeError(f"ablate.tasks.{name}: {task.recipe} is no fine-tuning (it has no head)")
    parts, theirs = to_dict(source), to_dict(pretraining)
    for section in ("backbone", "parametrization"):
        parts[section] = theirs[section]
    parts["data"] |= {key: theirs["data"][key] for key in CARRIED}
    parts.pop("init_from", None)
    parts.pop("ablate", None)
    try:
        return load_recipe(compose(parts, [*task.overrides, *extra]))
    except RecipeError as error:
        raise RecipeError(f"task {name}: {error}") from None


def _controls(config: AblateConfig, cells: Sequence[Cell]) -> list[Cell]:
    """Trainings without pretraining, of the first cell of every backbone."""
    first: dict[str, Cell] = {}
    for cell in cells:
        assert cell.pretraining is not None
        first.setdefault(cell.pretraining.backbone.name, cell)
    found = []
    for (backbone, cell), control in itertools.product(first.items(), config.controls):
        assert cell.pretraining is not None
        changes = {
            "frozen random": config.frozen_random,
            "from scratch": config.from_scratch,
        }[control]
        tasks = {
            task: finetuning(cell.pretraining, task, given, changes)
            for task, given in config.tasks.items()
        }
        name = f"{backbone} {control}"
        found.append(Cell(name, cell.values, None, tasks, cell.size, control))
    return found

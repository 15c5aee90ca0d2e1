"""The front door: recipes by name, and models from them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fmrizoo.config import Recipe, compose
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.model import DownstreamModel, PretrainingModel
from fmrizoo.mup import check_base, install
from fmrizoo.mup.stored import check_encoder, check_parametrization
from fmrizoo.registry import BACKBONES, HEADS, OBJECTIVES, suggest
from fmrizoo.types import Backbone, Contract, TaskSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

RecipeLike = str | Path | dict[str, Any] | Recipe

# Importing these fills the registries.
for _package in ("backbones", "objectives", "heads"):
    importlib.import_module(f"fmrizoo.{_package}")


def list_backbones(pattern: str = "*", *, installed: bool = False) -> list[str]:
    """Names of the registered backbones that match a shell pattern."""
    return BACKBONES.list(pattern, installed=installed)


def list_objectives(pattern: str = "*", *, installed: bool = False) -> list[str]:
    """Names of the registered objectives that match a shell pattern."""
    return OBJECTIVES.list(pattern, installed=installed)


def list_heads(pattern: str = "*", *, installed: bool = False) -> list[str]:
    """Names of the registered heads that match a shell pattern."""
    return HEADS.list(pattern, installed=installed)


def _shipped() -> dict[str, Path]:
    root = Path(str(files("fmrizoo.recipes")))
    found = {p.relative_to(root).with_suffix("").as_posix(): p for p in root.rglob("*.yaml")}
    return {name: path for name, path in found.items() if not name.startswith("_")}


def list_recipes(pattern: str = "*") -> list[str]:
    """Names of the shipped recipes that match a shell pattern, such as ``pretrain/*``."""
    return sorted(name for name in _shipped() if fnmatch(name, pattern))


def recipe_summary(name: str) -> str:
    """First comment line of a shipped recipe."""
    first = recipe_path(name).read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ")


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe given by path, shipped name, or its last part if that is unique.

    Raises:
        RecipeError: no such file or name, with the nearest one.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise RecipeError(f"no recipe file {path}")
        return path
    shipped = _shipped()
    if str(name) in shipped:
        return shipped[str(name)]
    short = [full for full in shipped if full.rsplit("/", 1)[-1] == str(name)]
    if len(short) == 1:
        return shipped[short[0]]
    if short:
        raise RecipeError(f"recipe {str(name)!r} is ambiguous: {', '.join(sorted(short))}")
    hint = suggest(str(name), list(shipped), "`fmrizoo list recipes` prints all names.")
    raise RecipeError(f"unknown recipe {str(name)!r}.{hint}")


def load_recipe(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """Compose and check a recipe.

    Args:
        recipe: Shipped name (``pretrain/swin4d_simmim`` or ``swin4d_simmim``), YAML file, dict, or
            a :class:`Recipe` (then without overrides).
        overrides: ``key=value`` strings with dotted keys; they win.

    Raises:
        RecipeError: an unknown name or key, a wrong type, or values that contradict each other.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError("a composed Recipe takes no overrides: change the object instead")
        composed = recipe
    else:
        composed = compose(recipe if isinstance(recipe, dict) else recipe_path(recipe), overrides)
    if composed.backbone is not None:
        _check_pair(composed)
        _check_clip(composed)
        _check_head(composed)
        check_base(composed)
    return composed


def _check_pair(recipe: Recipe) -> None:
    """An objective may ask only for what the backbone, as configured, declares."""
    if recipe.objective is None:
        return
    needs = OBJECTIVES[recipe.objective.name].factory.needs
    if missing := needs - BACKBONES[recipe.backbone.name].factory.supports(recipe.backbone):
        raise RecipeError(
            f"objective {recipe.objective.name!r} needs a backbone that is "
            f"{', '.join(sorted(missing))}; {recipe.backbone.name!r} as configured is not"
        )


def _check_head(recipe: Recipe) -> None:
    """A head may ask only for what the backbone declares, and for targets of its kinds."""
    if recipe.head is None:
        return
    _check_needs(recipe)
    for name, kind in recipe.task.wanted().items():
        _check_kind(recipe.head.name, kind, name)
    frames, size = recipe.data.clip_frames, getattr(recipe.backbone, "img_size", None)
    if getattr(recipe.head, "pool", "") == "frame" and size is not None and frames != size[3]:
        raise RecipeError(
            f"head.pool=frame is built for backbone.img_size[3]={size[3]} frames, but "
            f"data.clip_frames={frames}: make them equal"
        )


def _check_needs(recipe: Recipe) -> None:
    head, config = recipe.head.name, recipe.backbone
    if missing := HEADS[head].factory.needs - BACKBONES[config.name].factory.supports(config):
        raise RecipeError(
            f"head {head!r} needs a backbone that takes {', '.join(sorted(missing))}; "
            f"{config.name!r} as configured does not"
        )


def _check_kind(head: str, kind: str, target: str) -> None:
    known = HEADS[head].factory.kinds
    if kind not in known:
        raise RecipeError(
            f"head {head!r} cannot learn {target!r}, a target of kind {kind}: it does "
            f"{', '.join(sorted(known))}"
        )


def _check_clip(recipe: Recipe) -> None:
    """The clip that the data section cuts must be one that the backbone can take."""
    size = getattr(recipe.backbone, "img_size", None)
    if size is None:
        return
    any_length = BACKBONES[recipe.backbone.name].factory.any_length
    frames, patch = recipe.data.clip_frames, recipe.backbone.patch_size[3]
    if frames > size[3] and not any_length:
        raise RecipeError(
            f"data.clip_frames={frames} is longer than backbone.img_size[3]={size[3]}: "
            "shorten the clips or build the backbone for longer ones"
        )
    if frames % patch:
        raise RecipeError(
            f"data.clip_frames={frames} does not divide into patches of {patch} frames "
            f"(backbone.patch_size={list(recipe.backbone.patch_size)})"
        )


def create_backbone(name: str, **config: Any) -> Backbone:
    """A backbone with fresh weights: ``create_backbone("swin4d", embed_dim=24)``.

    Raises:
        RecipeError: unknown name or option, or options that contradict.
    """
    built: Backbone = BACKBONES.build(compose({"backbone": {"name": name, **config}}).backbone)
    return built


def build(
    recipe: RecipeLike | None = None,
    overrides: Sequence[str] = (),
    *,
    backbone: str | dict[str, Any] | None = None,
    objective: str | dict[str, Any] | None = None,
    head: str | dict[str, Any] | None = None,
    task: TaskSpec | Sequence[TaskSpec] | None = None,
) -> PretrainingModel | DownstreamModel | Backbone:
    """Build a model with fresh weights.

    Args:
        recipe: Shipped name, file, dict or :class:`Recipe`; or give the parts by keyword.
        overrides: ``key=value`` strings.
        backbone, objective, head: Name, or dict with a ``name``; instead of ``recipe``.
        task: What the head predicts, one target or several; needed with a head.

    Returns:
        Backbone + objective, backbone + head, or the bare backbone if the recipe has neither.

    Raises:
        RecipeError: nothing to build, both ways used at once, or a combination that cannot work.

    >>> build(backbone="swin4d", objective="simmim")
    """
    parts = {"backbone": backbone, "objective": objective, "head": head}
    given = {key: value for key, value in parts.items() if value is not None}
    if (recipe is None) == (not given):
        raise RecipeError("give a recipe, or backbone=, objective=, head= as keywords (not both)")
    chosen = compose(given, overrides) if recipe is None else load_recipe(recipe, overrides)
    return build_model(chosen, task)


def build_model(
    recipe: Recipe, task: TaskSpec | Sequence[TaskSpec] | None = None
) -> PretrainingModel | DownstreamModel | Backbone:
    """The model of a composed recipe (see :func:`build`)."""
    if recipe.backbone is None:
        raise RecipeError(f"the recipe names no backbone. Available: {', '.join(BACKBONES.list())}")
    if recipe.objective is not None:
        _check_pair(recipe)
        encoder: Backbone = BACKBONES.build(recipe.backbone)
        model = PretrainingModel(encoder, OBJECTIVES.build(recipe.objective, backbone=encoder))
        install(recipe, model)
        return model
    encoder = build_encoder(recipe)
    if recipe.head is not None:
        if not task:
            raise RecipeError(
                "a head needs to know its task: build(..., task=TaskSpec('classification', "
                "classes=('a', 'b')))"
            )
        return build_downstream(encoder, recipe, task)
    return encoder


def build_encoder(recipe: Recipe) -> Backbone:
    """The recipe's backbone alone, fresh; with muP its start is scaled already."""
    encoder: Backbone = BACKBONES.build(recipe.backbone)
    install(replace(recipe, objective=None, head=None), encoder)
    return encoder


def build_downstream(
    encoder: Backbone, recipe: Recipe, task: TaskSpec | Sequence[TaskSpec]
) -> DownstreamModel:
    """The recipe's head on ``encoder``, which it makes its own (freezes, wraps).

    ``encoder``: from :func:`build_encoder`, or trained: with muP only the head, and what it puts
    into the encoder, is scaled.
    """
    tasks = (task,) if isinstance(task, TaskSpec) else tuple(task)
    _check_needs(recipe)
    for one in tasks:
        _check_kind(recipe.head.name, one.kind, one.name)
    model = DownstreamModel(encoder, HEADS.build(recipe.head, backbone=encoder, tasks=tasks))
    install(recipe, model, fresh=("head.",))
    return model


def model_folder(path: str | Path) -> Path:
    """The exported model in a run folder, or the folder itself if it is one.

    Raises:
        CheckpointError: neither.
    """
    path = Path(path)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{path} holds no exported model (no config.json here or in model/)")


def load(path: str | Path) -> nn.Module:
    """The trained model of a run folder or model folder, in ``eval()`` mode on the CPU.

    Returns:
        :class:`PretrainingModel` or :class:`DownstreamModel`, with every weight matched by name.

    Raises:
        CheckpointError: no model there, damaged files, or weights that do not fit their recipe.
    """
    from fmrizoo.trainer.export import open_model

    folder = model_folder(path)
    weights, info = open_model(folder)
    model: nn.Module = build_model(load_recipe(info.recipe), info.tasks)
    check_parametrization(folder, model)
    load_strictly(model, weights, str(folder))
    return model.eval()


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load weights by name; anything missing, unexpected or of another shape is an error.

    Raises:
        CheckpointError: names what does not fit.

    What is on the meta device is checked and stays without values.
    """
    own = model.state_dict()
    given = getattr(weights, "shapes", None)  # of a file: known before anything is read
    if given is None:
        given = {name: tuple(value.shape) for name, value in weights.items()}
    missing = sorted(own.keys() - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    shapes = [
        f"{name} {given[name]} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if tuple(own[name].shape) != given[name]
    ]
    faults = {"missing": missing, "unexpected": unexpected, "other shape": shapes}
    if any(faults.values()):
        said = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in faults.items()
            if names
        )
        raise CheckpointError(f"the weights in {where} do not fit the model: {said}")
    model.load_state_dict({}, strict=False)  # modules that refuse to be loaded say so
    with torch.no_grad():
        # One at a time: of a file that is as large as the model, no more is in memory.
        for name, value in own.items():
            if not value.is_meta:
                value.copy_(weights[name])


def load_encoder(backbone: Backbone, path: str | Path) -> tuple[Contract | None, tuple[str, ...]]:
    """Load the encoder of a trained model into ``backbone``.

    Returns:
        The preprocessing contract the weights expect, and the names of all runs they have seen.

    Raises:
        CheckpointError: no model there, or an encoder of another architecture or parametrization.
    """
    from fmrizoo.trainer.export import open_model

    folder = model_folder(path)
    weights, info = open_model(folder)
    if info.recipe.get("head"):
        # The head may have put something of its own into the encoder: merge it, or take it out.
        model = load(folder)
        assert isinstance(model, DownstreamModel)
        model.head.release(model.backbone)
        encoder: Mapping[str, Tensor] = model.backbone.state_dict()
    else:
        encoder = weights.within("backbone.")
    if not encoder:
        raise CheckpointError(f"{folder} holds no encoder (no weight is named backbone.*)")
    check_encoder(folder, backbone)
    load_strictly(backbone, encoder, str(folder))
    return info.contract, info.seen_runs

"""How large the backbones are and what a clip costs, without computing anything with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import cast

import torch
from torch import Tensor, nn

from fmrizoo.model import PretrainingModel
from fmrizoo.types import Backbone, Grid
from fmrizoo.zoo import build_model, create_backbone, list_recipes, load_recipe

PRESETS = "pretrain/sizes"
# Diameter of a ball, in sides of the grid. At 0.81 it meets 36 % of the 6³ patches of 96³ voxels,
# as many as the brain of MNI152 at 2 mm does (1481 of 4096).
BRAIN = 0.81


@dataclass(frozen=True)
class Size:
    """One configuration of a backbone.

    Attributes:
        name: The preset's size as the source writes it, or ``default``.
        recipe: Shipped recipe of the preset; empty for the default configuration.
        parameters: Of the encoder.
        whole: Of the recipe's model, with what its objective adds; 0 for the default.
        clip: Voxels and frames that tokens and work are counted for.
        tokens: Patches of the clip.
        gflop: 10⁹ floating point operations of one forward pass.
        brain_tokens, brain_gflop: The same for a clip with a brain (see ``BRAIN``); less only
            for backbones that leave patches without brain out.
    """

    name: str
    recipe: str
    parameters: int
    whole: int
    clip: Grid
    tokens: int
    gflop: float
    brain_tokens: int
    brain_gflop: float


def brain_of(grid: Sequence[int]) -> Tensor:
    """``(x, y, z)`` bool: a ball that meets as many patches as a brain does (``BRAIN``)."""
    axes = [(torch.arange(s) + 0.5) / s * 2 - 1 for s in grid]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return x**2 + y**2 + z**2 <= BRAIN**2


def sizes_of(backbone: str) -> list[Size]:
    """The default configuration of a registered backbone, then its presets from small to large.

    Weights are never allocated, so this is quick for models of any size.

    Raises:
        RecipeError: no such backbone.
        MissingExtraError: it needs a package that is not installed.
    """
    with torch.device("meta"):
        default = create_backbone(backbone)
    found = []
    for recipe in list_recipes(f"{PRESETS}/{backbone}_*"):
        composed = load_recipe(recipe)
        if composed.backbone.name == backbone:
            with torch.device("meta"):
                model = cast(PretrainingModel, build_model(composed))
            name = recipe.removeprefix(f"{PRESETS}/{backbone}_")
            found.append(_size(name, recipe, model.backbone, _parameters(model)))
    return [_size("default", "", default, 0), *sorted(found, key=lambda s: s.parameters)]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _size(name: str, recipe: str, backbone: Backbone, whole: int) -> Size:
    clip = backbone.clip_grid
    patches = Grid(*(ceil(s / p) for s, p in zip(clip, backbone.patch_size, strict=True)))
    mask = brain_of(clip[:3])
    flops = sum(backbone.flops(clip).values())
    inside = sum(backbone.flops(clip, mask).values())
    kept = patches.size
    if inside < flops:
        kept = _patches_with(mask, backbone.patch_size[:3]) * patches.t
    return Size(
        name=name,
        recipe=recipe,
        parameters=_parameters(backbone),
        whole=whole,
        clip=clip,
        tokens=patches.size,
        gflop=flops / 1e9,
        brain_tokens=kept,
        brain_gflop=inside / 1e9,
    )


def _patches_with(mask: Tensor, patch: Sequence[int]) -> int:
    """Patches along x, y, z that hold a voxel of ``mask``."""
    places = mask.nonzero() // torch.tensor(list(patch))
    return len(torch.unique(places, dim=0))

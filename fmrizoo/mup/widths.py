"""A recipe at other widths: what a sweep over widths trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fmrizoo.config import ParametrizationConfig, Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.mup.base import base_backbone, check_base

FACTORS = (1, 2, 4, 8)


def base_keys(recipe: Recipe) -> dict[str, Any]:
    """``parametrization.base`` of a recipe with all its widths; its own widths if it has none.

    Raises:
        RecipeError: no backbone with a width, or a base that does not fit.
    """
    backbone, found = recipe.backbone, dict[str, Any]()
    if recipe.parametrization.name == "mup":
        backbone, found = base_backbone(recipe), dict(recipe.parametrization.base)
    if backbone is None or not hasattr(backbone, "embed_dim"):
        raise RecipeError("a sweep over widths needs a backbone with an embed_dim")
    found["embed_dim"] = backbone.embed_dim
    if hasattr(backbone, "num_heads"):
        found["num_heads"] = list(backbone.num_heads)
    return found


def widths_of(recipe: Recipe) -> list[int]:
    """``sweep.widths`` from narrow to wide, or 1, 2, 4 and 8 times the base width.

    Raises:
        RecipeError: a width that is no multiple of the base width.
    """
    base: int = base_keys(recipe)["embed_dim"]
    found = sorted(recipe.sweep.widths) or [base * factor for factor in FACTORS]
    if odd := [width for width in found if width % base]:
        raise RecipeError(
            f"sweep.widths: {odd[0]} is no multiple of the base width {base} (parametrization.base,"
            " or the recipe's own backbone.embed_dim)"
        )
    return found


def at_width(recipe: Recipe, width: int, name: str = "mup") -> Recipe:
    """The recipe with a backbone of ``width``, and heads that grow in number with it.

    A recipe that is wider than its base and has as many heads keeps their number at every width.

    Args:
        recipe: See :func:`base_keys`.
        width: Of the first stage; a multiple of the base width.
        name: ``mup`` from that base, or ``sp``.

    Raises:
        RecipeError: see :func:`fmrizoo.mup.base.check_base`.
    """
    base = base_keys(recipe)
    changes: dict[str, Any] = {"embed_dim": width}
    if "num_heads" in base:
        factor = 1 if _grow_in_size(recipe, base) else width // base["embed_dim"]
        changes["num_heads"] = [heads * factor for heads in base["num_heads"]]
    backbone = replace(recipe.backbone, **changes)
    scaled = replace(
        recipe,
        backbone=backbone,
        parametrization=replace(recipe.parametrization, name="mup", base=base),
    )
    check_base(scaled)  # what would differ between widths besides them, also under sp
    if name == "sp":
        return replace(scaled, parametrization=ParametrizationConfig())
    return scaled


def _grow_in_size(recipe: Recipe, base: dict[str, Any]) -> bool:
    """The recipe is wider than its base and has the same number of heads."""
    wider = bool(recipe.backbone.embed_dim != base["embed_dim"])
    return wider and list(recipe.backbone.num_heads) == base["num_heads"]


def names_of(only: str | None) -> Sequence[str]:
    """Parametrizations to compare: both, or ``only`` one of them.

    Raises:
        RecipeError: no such parametrization.
    """
    if only is None:
        return ("sp", "mup")
    if only not in ("sp", "mup"):
        raise RecipeError(f"--only takes sp or mup, got {only!r}")
    return (only,)

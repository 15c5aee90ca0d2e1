"""The backbone section at base width, its base depth, and what may not differ from the target's."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any

from fmrizoo.config import Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.mup.depth import Depth

# Settings that follow the width unless they are given: (property, key to give).
FOLLOWING = (("states", "d_state"),)


def check_base(recipe: Recipe) -> None:
    """Refuse a recipe whose base does not fit its backbone; nothing without muP.

    Raises:
        RecipeError: names the key and what it should be.
    """
    if recipe.parametrization.name != "sp" and recipe.backbone is not None:
        base_backbone(recipe)
        base_backbone(recipe, times=2)
        base_depth(recipe)


def base_backbone(recipe: Recipe, times: int = 1) -> Any:
    """The recipe's backbone section at ``times`` the base width, with its own depth.

    Raises:
        RecipeError: not muP, no ``embed_dim`` in the base, a width that is no multiple of it, a key
            that the backbone lacks, or heads (or states) whose size would change with the width.
    """
    config, target = recipe.parametrization, recipe.backbone
    if config.name != "mup":
        raise RecipeError(
            f"the recipe has parametrization.name={config.name}: add parametrization.name=mup and "
            "parametrization.base={embed_dim: …}"
        )
    if target is None or not is_dataclass(target) or not hasattr(target, "embed_dim"):
        raise RecipeError("muP needs a backbone with an embed_dim")
    given = dict(config.base)
    if unknown := [key for key in given if not hasattr(target, key)]:
        name = getattr(target, "name", type(target).__name__)
        raise RecipeError(f"parametrization.base.{unknown[0]}: {name} has no such setting")
    width, base_width = target.embed_dim, given["embed_dim"]
    if width % base_width:
        raise RecipeError(
            f"backbone.embed_dim={width} is no multiple of parametrization.base.embed_dim="
            f"{base_width}: muP scales all widths by one whole number"
        )
    if hasattr(target, "num_heads"):
        _check_heads(given, target, width // base_width)
    changes: dict[str, Any] = {"embed_dim": base_width * times}
    if "num_heads" in given:
        changes["num_heads"] = [heads * times for heads in given["num_heads"]]
    elif hasattr(target, "num_heads"):  # only where the widths are equal
        changes["num_heads"] = [heads * times for heads in target.num_heads]
    try:
        made: Any = replace(target, **changes)  # type: ignore[type-var]
    except RecipeError as error:
        raise RecipeError(f"the backbone cannot be built at base width: {error}") from None
    for value, key in FOLLOWING:
        if getattr(made, value, None) != getattr(target, value, None):
            raise RecipeError(
                f"backbone.{key} follows embed_dim unless it is given ({getattr(made, value)} at "
                f"width {made.embed_dim}, {getattr(target, value)} here): muP keeps it fixed, set "
                f"backbone.{key}={getattr(target, value)}"
            )
    return made


def _check_heads(given: dict[str, Any], target: Any, m: int) -> None:
    wanted = [heads // m for heads in target.num_heads]
    heads = given.get("num_heads", target.num_heads)
    if any(h % m for h in target.num_heads):
        raise RecipeError(
            f"backbone.num_heads={list(target.num_heads)} at {m} times the base width must be "
            f"multiples of {m}: heads grow in number, head_dim is fixed"
        )
    if list(heads) != wanted:
        raise RecipeError(
            f"head_dim would change with the width: {m} times the base width needs {m} times its "
            f"heads, so set parametrization.base.num_heads={wanted}, not {list(heads)}"
        )


def base_depth(recipe: Recipe) -> Depth | None:
    """Base depth and depth of the recipe's backbone; None without transfer over depth.

    Raises:
        RecipeError: a base depth of another kind than the backbone's, with another number of
            stages, or one that the backbone cannot have.
    """
    config, target = recipe.parametrization, recipe.backbone
    if config.depth == "none":
        return None
    key = "depths" if "depths" in config.base else "depth"
    if not hasattr(target, key):
        raise RecipeError(
            f"parametrization.base.{key}: {getattr(target, 'name', type(target).__name__)} has no "
            "such setting"
        )
    base, own = config.base[key], getattr(target, key)
    if key == "depth":
        return Depth((base,), (own,))
    if len(base) != len(own):
        raise RecipeError(
            f"parametrization.base.depths={list(base)} needs one number for each of the "
            f"{len(own)} stages of backbone.depths={list(own)}"
        )
    try:
        replace(target, depths=list(base))
    except RecipeError as error:
        raise RecipeError(f"the backbone cannot be built at base depth: {error}") from None
    return Depth(tuple(base), tuple(own))

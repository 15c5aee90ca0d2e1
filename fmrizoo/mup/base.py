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
        RecipeError: not muP, no ``embed_dim`` in the base, a narrower width than it, a key that the
            backbone lacks, heads of a wider model that the base does not say, or states whose
            number would change with the width.
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
    if width < base_width:
        raise RecipeError(
            f"backbone.embed_dim={width} is below parametrization.base.embed_dim={base_width}: the "
            "base is the width that the recipe was tuned at, the smallest one"
        )
    changes: dict[str, Any] = {"embed_dim": base_width * times}
    if hasattr(target, "num_heads"):
        _check_heads(given, target)
        heads = given.get("num_heads", target.num_heads)
        changes["num_heads"] = [count * times for count in heads]
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


def _check_heads(given: dict[str, Any], target: Any) -> None:
    """A wider model may have more heads or larger ones: which of both, only the base can say."""
    width, base_width, heads = target.embed_dim, given["embed_dim"], list(target.num_heads)
    if "num_heads" in given or width == base_width:
        return
    ways = [f"{heads} (the same number of heads, which grow in size)"]
    if all(count * base_width % width == 0 for count in heads):
        fewer = [count * base_width // width for count in heads]
        ways.insert(0, f"{fewer} (heads of constant size, which grow in number)")
    raise RecipeError(
        f"backbone.num_heads={heads} at {width / base_width:g} times the base width: say which "
        f"heads the base has, parametrization.base.num_heads={' or '.join(ways)}"
    )


def resized_heads(recipe: Recipe, base: Any) -> Any | None:
    """The recipe's backbone section at the widths and heads of ``base``, all else its own.

    None where no head differs in size from the base's: there is nothing to correct.
    """
    target = recipe.backbone
    if not hasattr(target, "num_heads"):
        return None
    both = zip(target.num_heads, base.num_heads, strict=True)
    if all(target.embed_dim * old == base.embed_dim * new for new, old in both):
        return None
    made: Any = replace(target, embed_dim=base.embed_dim, num_heads=list(base.num_heads))
    return made


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

"""Cells of different architectures made equal in parameters, compute or tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from math import gcd

import torch

from fmrizoo.config import Recipe, to_dict
from fmrizoo.errors import RecipeError
from fmrizoo.mup.widths import base_keys
from fmrizoo.types import Grid
from fmrizoo.zoo import create_backbone, load_recipe

TOLERANCE = 0.15  # a cell farther off than this share is refused
_WIDEST = 8  # times the recipe's own width


@dataclass(frozen=True)
class Size:
    """What an encoder costs.

    Attributes:
        parameters: Of the encoder.
        flops: Of its forward pass over one clip.
        tokens: Patches of one clip, background included.
        clips: Seen in pretraining: steps × batch.
    """

    parameters: int
    flops: int
    tokens: int
    clips: int

    @property
    def seen(self) -> int:
        """Tokens seen in pretraining."""
        return self.tokens * self.clips


def measure(recipe: Recipe) -> Size:
    """Sizes of the recipe's encoder, which is not allocated."""
    backbone = json.dumps(to_dict(recipe)["backbone"])
    clips = recipe.train.steps * recipe.train.batch_size
    return Size(*_encoder(backbone, recipe.data.clip_frames), clips)


@lru_cache(1024)
def _encoder(config: str, frames: int) -> tuple[int, int, int]:
    """Parameters, operations and tokens; most cells have one of a few encoders."""
    with torch.device("meta"):
        backbone = create_backbone(**json.loads(config))
    grid = Grid(*backbone.clip_grid[:3], frames)
    patches = grid.padded(backbone.patch_size).divided(backbone.patch_size)
    parameters = sum(p.numel() for p in backbone.parameters())
    return parameters, sum(backbone.flops(grid).values()), patches.size


def matched(recipe: Recipe, what: str, wanted: Size) -> Recipe:
    """The recipe with the width (``parameters``, ``flops``) or steps (``tokens``) that match.

    Widths go with muP, at whose base the recipe's rate was chosen: a recipe without it takes its
    own width as base. Heads keep their size and grow in number.

    Raises:
        RecipeError: no width within :data:`TOLERANCE` of ``wanted``.
    """
    if what == "none":
        return recipe
    own = measure(recipe)
    if what == "tokens":
        per_step = own.tokens * recipe.train.batch_size
        steps = max(1, round(wanted.seen / per_step))
        return replace(recipe, train=replace(recipe.train, steps=steps))

    def off(size: Size) -> float:
        return abs(float(getattr(size, what)) / float(getattr(wanted, what)) - 1)

    if off(own) < 0.01:
        return recipe
    best, least = recipe, off(own)
    for candidate in _widths(recipe):
        size = measure(candidate)
        if off(size) < least:
            best, least = candidate, off(size)
        if getattr(size, what) > 2 * getattr(wanted, what):
            break
    if least > TOLERANCE:
        raise RecipeError(
            f"no width of {recipe.backbone.name} comes within {TOLERANCE:.0%} of the first cell's "
            f"{getattr(wanted, what):,} {what}; the nearest, backbone.embed_dim="
            f"{best.backbone.embed_dim}, has {getattr(measure(best), what):,}: change depths, or "
            "take ablate.match=none"
        )
    return best


def _widths(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe at every width that its heads allow, from the base's (the narrowest) on."""
    backbone, base = recipe.backbone, base_keys(recipe)
    heads = list(getattr(backbone, "num_heads", []))
    # Heads keep their size; NeuroMamba's inner width holds whole heads, its states four widths.
    unit = backbone.embed_dim // reduce(gcd, heads) if heads else _mamba_unit(backbone)
    for k in range(-(-base["embed_dim"] // unit), _WIDEST * backbone.embed_dim // unit + 1):
        changes: dict[str, object] = {"embed_dim": unit * k}
        if heads:
            changes["num_heads"] = [h * unit * k // backbone.embed_dim for h in heads]
        if hasattr(backbone, "d_state"):  # muP keeps the states of a head at every width
            changes["d_state"] = backbone.d_state or backbone.embed_dim // 4
        scaled = replace(backbone, **changes)
        parametrization = replace(recipe.parametrization, name="mup", base=base)
        yield load_recipe(replace(recipe, backbone=scaled, parametrization=parametrization))


def _mamba_unit(backbone: object) -> int:
    head_dim, expand = getattr(backbone, "head_dim", 1), getattr(backbone, "expand", 1)
    inner = head_dim // gcd(head_dim, expand)
    return int(inner * 4 // gcd(inner, 4))

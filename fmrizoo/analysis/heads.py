"""What every way to fine-tune trains of a given encoder, and what its optimizer needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fmrizoo.config import Recipe, TrainConfig, compose
from fmrizoo.errors import RecipeError
from fmrizoo.model import DownstreamModel
from fmrizoo.registry import BACKBONES, HEADS, suggest
from fmrizoo.trainer.accounting import Accounting, account
from fmrizoo.types import TaskSpec
from fmrizoo.zoo import build_model, list_recipes, load_recipe

TWO_CLASSES = TaskSpec("classification", classes=("a", "b"))


@dataclass(frozen=True)
class HeadRow:
    """One head in one of its variants, on one encoder, for a target with two classes.

    Attributes:
        head: Registered name.
        settings: What the variant sets, ``train_encoder=last_block``.
        trains: What of the encoder trains (``Head.trains``).
        fp32, bf16: Parameters, and bytes of the optimizer on one rank, in either precision.
        refused: Why the encoder cannot have this head, if so (the rest is None).
    """

    head: str
    settings: str
    trains: str | None = None
    fp32: Accounting | None = None
    bf16: Accounting | None = None
    refused: str | None = None


def backbone_section(name: str) -> tuple[str, Any]:
    """A title and the config of a backbone given by its name or by that of a recipe.

    Raises:
        RecipeError: neither, with the nearest name.
    """
    if name in BACKBONES.list():
        return f"{name} (default configuration)", compose({"backbone": {"name": name}}).backbone
    try:
        recipe = load_recipe(name)
    except RecipeError:
        known = [*BACKBONES.list(), *list_recipes()]
        hint = suggest(name, known, "`fmrizoo list backbones` and `list recipes` print all names.")
        raise RecipeError(f"{name!r} is neither a backbone nor a recipe.{hint}") from None
    if recipe.backbone is None:
        raise RecipeError(f"recipe {name!r} names no backbone")
    return f"{recipe.backbone.name} of {name}", recipe.backbone


def heads_of(backbone: Any, pattern: str = "*") -> list[HeadRow]:
    """Every registered head that matches, in each variant, on an encoder of this config.

    Weights are never allocated, so this is quick for encoders of any size.
    """
    return [
        _row(Recipe(backbone=backbone), name, dict(settings))
        for name in HEADS.list(pattern)
        for settings in HEADS[name].factory.variants
    ]


def _row(recipe: Recipe, head: str, settings: dict[str, Any]) -> HeadRow:
    said = ", ".join(f"{key}={value}" for key, value in settings.items())
    recipe.head = compose({"head": {"name": head, **settings}}).head
    try:
        with torch.device("meta"):
            model = build_model(recipe, TWO_CLASSES)
    except RecipeError as error:
        return HeadRow(head, said, refused=str(error))
    assert isinstance(model, DownstreamModel)
    fp32, bf16 = (account(model, TrainConfig(precision=p)) for p in ("fp32", "bf16"))
    return HeadRow(head, said, model.head.trains, fp32, bf16)

"""A trained muP model as a plain one: its multipliers become part of its weights.

For codes that know no multipliers. The function stays the same, the training does not: the rates
that were transferred belong to the multipliers, and steps on folded weights have other sizes.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import TypeVar

from torch import nn

from fmrizoo.config import ParametrizationConfig, Recipe
from fmrizoo.errors import RecipeError

Model = TypeVar("Model", bound=nn.Module)


def fold(model: Model) -> Model:
    """A copy of ``model`` that computes the same without multipliers.

    Every module that ``multiplies`` something has a method ``fold_multiplier()`` for its own.
    Outputs differ by rounding only. The recipe to go with it: :func:`folded_recipe`.

    Raises:
        RecipeError: the model is not muP.
    """
    if getattr(model, "parametrization", None) is None:
        raise RecipeError(
            "the model was not trained with parametrization.name=mup: it has nothing to fold"
        )
    made = deepcopy(model)
    for module in made.modules():
        if getattr(module, "multiplies", None) is not None and module.multiplier != 1.0:
            module.fold_multiplier()  # type: ignore[operator]
        if getattr(module, "parametrization", None) is not None:
            module.parametrization = None  # type: ignore[assignment]
    return made


def folded_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a folded model: PyTorch's own parametrization, all else as it was."""
    return replace(recipe, parametrization=ParametrizationConfig())

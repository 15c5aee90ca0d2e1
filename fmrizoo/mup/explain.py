"""The rule table as rows to read: one for every parameter, or for all that are alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from fmrizoo.config import Recipe
from fmrizoo.mup.base import base_backbone
from fmrizoo.mup.parametrization import Parametrization, make, skeleton
from fmrizoo.types import TaskSpec


@dataclass(frozen=True)
class Row:
    """One parameter, or several alike.

    Attributes:
        name: With ``*`` for the numbers in which the names of alike parameters differ.
        count: How many parameters.
        role: See :mod:`fmrizoo.mup.rules`.
        shape: In this model.
        m: How many times its input is as wide as at base width (1: it has a fixed one).
        init_mean, init_std: It starts with; 0 for a readout that starts at zero.
        lr, wd, eps: Factors on the learning rate, on the weight decay (0: it has none) and on ε.
    """

    name: str
    count: int
    role: str
    shape: tuple[int, ...]
    m: float
    init_mean: float
    init_std: float
    lr: float
    wd: float
    eps: float


def explain(recipe: Recipe, tasks: Sequence[TaskSpec] = ()) -> tuple[Parametrization, list[Row]]:
    """Parametrization and a row for every parameter of the recipe's model, in its order.

    The spread at base width is measured, on a model of base width (seed 0; the caller's random
    numbers are left alone): nothing of this model's size is allocated.

    Raises:
        RecipeError: not muP, or a base that does not fit.
    """
    made, dims = make(recipe, tasks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = dict(skeleton(recipe, base_backbone(recipe), tasks).named_parameters())
    rows = []
    for name, rule in made.table.items():
        found, start = dims[name], base[name].detach().double()
        zero = rule.role == "output" and recipe.parametrization.readout_zero_init
        rows.append(
            Row(
                name=name,
                count=1,
                role=rule.role,
                shape=found.shape,
                m=found.dims[1].ratio if rule.role in ("hidden", "output") else 1.0,
                init_mean=float(start.mean()) if float(start.std(correction=0)) == 0 else 0.0,
                init_std=0.0 if zero else float(start.std(correction=0)) * rule.init_scale,
                lr=rule.lr_scale,
                wd=rule.wd_scale if rule.decay else 0.0,
                eps=rule.eps_scale,
            )
        )
    return made, rows


def collapse(rows: Sequence[Row]) -> list[Row]:
    """Parameters of one pattern, shape and rule as one row, with the mean of their spreads."""
    order = {(_pattern(row), _alike(row)): place for place, row in reversed(list(enumerate(rows)))}
    ranked = sorted(rows, key=lambda row: order[_pattern(row), _alike(row)])
    found = []
    for _, group in groupby(ranked, key=lambda row: (_pattern(row), _alike(row))):
        alike = list(group)
        first = alike[0]
        found.append(
            Row(
                name=_common([row.name for row in alike]),
                count=len(alike),
                role=first.role,
                shape=first.shape,
                m=first.m,
                init_mean=first.init_mean,
                init_std=sum(row.init_std for row in alike) / len(alike),
                lr=first.lr,
                wd=first.wd,
                eps=first.eps,
            )
        )
    return found


def _pattern(row: Row) -> str:
    return re.sub(r"\d+", "*", row.name)


def _alike(row: Row) -> tuple[object, ...]:
    return (row.role, row.shape, row.m, row.init_mean, row.lr, row.wd, row.eps, row.init_std == 0)


def _common(names: Sequence[str]) -> str:
    """``names``, of equal patterns, with ``*`` where they differ."""
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(
        same[0] if len(set(same)) == 1 else re.sub(r"\d+", "*", same[0]) for same in parts
    )

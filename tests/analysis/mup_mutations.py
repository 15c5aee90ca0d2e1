"""Ways to get muP wrong: broken rules and multipliers, and which layer of checks must see each.

``table``: the rules differ from what the shapes alone say. ``step``: a first step has not the size
of its rate. ``coordinates``: a slope is out of tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fmrizoo.analysis.mup_check import (
    CoordinateCheck,
    coordinate_check,
)
from fmrizoo.analysis.mup_recipe import (
    adamw,
    build_at,
    loss_on,
    made_up_batch,
    small,
    widths_of,
    zoo_taps,
)
from fmrizoo.analysis.mup_step import FirstStep, first_step, snapshot
from fmrizoo.mup import Rule
from fmrizoo.types import Grid
from fmrizoo.zoo import load_recipe

Table = Mapping[str, Rule]
LR = 2**-9
ALL, RATES, START = ("table", "step", "coordinates"), ("table", "step"), ("table", "coordinates")


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: What was done wrong.
        caught: Layers that must see it.
        rule: The wrong rule of a parameter in place of the right one; m = width / base.
        multiplier: Factor on the multiplier of modules that ``multiplies`` this.
        only: Backbones it is for; empty: all.
    """

    name: str
    caught: tuple[str, ...]
    rule: Callable[[str, Rule, float], Rule] = lambda name, rule, m: rule
    multiplier: tuple[str, Callable[[float], float]] | None = None
    only: tuple[str, ...] = ()


def rate(role: str, power: float, part: str = "") -> Callable[[str, Rule, float], Rule]:
    """The rates of a role (of names that hold ``part``) × m ** power."""

    def wrong(name: str, rule: Rule, m: float) -> Rule:
        hit = rule.role == role and part in name
        return replace(rule, lr_scale=rule.lr_scale * m**power) if hit else rule

    return wrong


def start(role: str, power: float) -> Callable[[str, Rule, float], Rule]:
    """The starts of a role × m ** power."""

    def wrong(name: str, rule: Rule, m: float) -> Rule:
        hit = rule.role == role and ".mixer.conv1d" not in name
        return replace(rule, init_scale=rule.init_scale * m**power) if hit else rule

    return wrong


SWIN = ("swin4d", "swin_factorized")
MUTATIONS = (
    Mutation("hidden rates as they are (or set by a scheduler)", ALL, rate("hidden", 1)),
    Mutation("hidden rates / m twice", RATES, rate("hidden", -1)),
    Mutation("hidden rates / sqrt(m)", ALL, rate("hidden", 0.5)),
    Mutation("the merge forgotten", ALL, rate("hidden", 1, "downsample"), only=SWIN),
    Mutation("one projection forgotten", ALL, rate("hidden", 1, "out_proj"), only=("neuromamba",)),
    Mutation("the last stage forgotten", ALL, rate("hidden", 1, "layers.1."), only=SWIN),
    Mutation("the last block forgotten", ALL, rate("hidden", 1, "blocks.1."), only=("neuromamba",)),
    Mutation("one s.d. at every width", START, start("hidden", 0.5)),
    Mutation("inputs start larger", START, start("input", 0.5)),
    Mutation("readout rate / m", ALL, rate("output", -1)),
    Mutation("input rates / m", ALL, rate("input", -1)),
    Mutation("embedding rates / m", ALL, rate("input", -1, "embed")),
    Mutation("vector rates / m", RATES, rate("vector", -1)),
    Mutation("conv1d rate / m", RATES, rate("input", -1, "conv1d"), only=("neuromamba",)),
    Mutation("A_log rate / m", ALL, rate("vector", -1, "A_log"), only=("neuromamba",)),
    Mutation("no readout multiplier", ("coordinates",), multiplier=("output", lambda m: m)),
    Mutation("readout / m twice", ("coordinates",), multiplier=("output", lambda m: 1 / m)),
    Mutation(
        "logits grow",
        ("coordinates",),
        multiplier=("attention", lambda m: m**0.5),
        only=SWIN,
    ),
)


def for_backbone(name: str) -> list[Mutation]:
    """Mutations that this backbone can have."""
    return [m for m in MUTATIONS if not m.only or name in m.only]


class Bench:
    """One recipe, made small, on which mutations are tried."""

    def __init__(self, name: str, factors: Sequence[int] = (1, 2, 8)) -> None:
        self.recipe = small(load_recipe(name))
        self.base = widths_of(self.recipe)[0]
        self.widths = [self.base * factor for factor in factors]
        self.batch = made_up_batch(Grid(*self.recipe.backbone.img_size))

    def model(
        self, width: int, seed: int, mutation: Mutation | None, zero: bool = True
    ) -> tuple[nn.Module, Table, Table]:
        """A model with the mistake in it; its right and its wrong table."""
        self.recipe.parametrization.readout_zero_init = zero
        model = build_at(self.recipe, width, seed, self.base, "mup")
        assert model.parametrization is not None
        right, m = dict(model.parametrization.table), width / self.base
        if mutation is None:
            return model, right, right
        wrong = {name: mutation.rule(name, rule, m) for name, rule in right.items()}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(wrong[name].init_scale / right[name].init_scale)
        if mutation.multiplier is not None:
            kind, factor = mutation.multiplier
            hit = [x for x in model.modules() if getattr(x, "multiplies", None) == kind]
            assert hit
            for module in hit:
                module.multiplier = module.multiplier * factor(m)  # type: ignore[assignment, operator]
        return model, right, wrong

    def off_the_shapes(self, mutation: Mutation | None) -> list[str]:
        """Parameters whose rule differs from what muP says of their shapes (see the paper)."""
        low, _, _ = self.model(self.base, 0, None)
        high, _, wrong = self.model(4 * self.base, 0, mutation)
        sizes = dict(low.named_parameters())
        found = []
        for name, p in high.named_parameters():
            grown = [a != b for a, b in zip(sizes[name].shape, p.shape, strict=True)]
            # A matrix that grows in both axes; position tables grow in one, whatever their order.
            m = 4.0 if sum(grown) == 2 else 1.0
            said = (wrong[name].lr_scale, wrong[name].init_scale)
            if said != (1 / m, m**-0.5):
                found.append(name)
        return found

    def first_step(self, mutation: Mutation | None) -> FirstStep:
        """Of the model with the mistake, against the right rates."""
        model, right, wrong = self.model(4 * self.base, 0, mutation, zero=False)
        before = snapshot(model)
        optimizer = adamw(model, {name: wrong[name].lr_scale for name in before}, LR)
        loss_on(model, self.batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates = {name: LR * right[name].lr_scale for name in before}
        return first_step(before, snapshot(model), rates)

    def coordinates(self, mutation: Mutation | None, steps: int = 3) -> CoordinateCheck:
        """The coordinate check of models with the mistake."""

        def make(width: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
            model, _, wrong = self.model(width, seed, mutation)
            names = [n for n, p in model.named_parameters() if p.requires_grad]
            return model, adamw(model, {n: wrong[n].lr_scale for n in names}, LR)

        return coordinate_check(
            make,
            lambda model: loss_on(model, self.batch),
            self.widths,
            steps=steps,
            seeds=2,
            taps=zoo_taps,
        )

"""The first-step check: did every parameter move by its own rate, through whatever trains it?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fmrizoo.errors import RecipeError

STEP_TOLERANCE = 0.01  # of the first step's size, relative


@dataclass(frozen=True)
class StepRow:
    """A parameter's first step: ``ratio`` = median \\|Δp\\| / ``rate``, where it moved at all."""

    name: str
    rate: float
    ratio: float


@dataclass(frozen=True)
class FirstStep:
    """What a first step has done.

    Attributes:
        rows: Parameters that moved.
        still: Those that did not: without gradient, or forgotten.
        tolerance: On ``ratio − 1``.
    """

    rows: tuple[StepRow, ...]
    still: tuple[str, ...]
    tolerance: float = STEP_TOLERANCE

    @property
    def off(self) -> tuple[StepRow, ...]:
        """Steps of another size than the rate says."""
        return tuple(r for r in self.rows if not abs(r.ratio - 1) <= self.tolerance)

    @property
    def passed(self) -> bool:
        """Every parameter moved, as far as it should."""
        return not self.off and not self.still

    @property
    def says(self) -> str:
        """The result in one sentence."""
        said = f"{len(self.rows) - len(self.off)} of {len(self.rows) + len(self.still)} parameters "
        said += f"took a first step of their rate ± {self.tolerance:.0%}"
        if self.off:
            worst = max(self.off, key=lambda r: abs(math.log(r.ratio)))
            said += f", worst {worst.name} {worst.ratio:.3g} times as far"
        return said + (f"; still: {', '.join(self.still)}" if self.still else "")


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all trained parameters by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def first_step(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    rates: Mapping[str, float],
    tolerance: float = STEP_TOLERANCE,
) -> FirstStep:
    """Did AdamW's first step (weight decay 0) move each parameter by its own rate?

    It moves every entry by the rate, whatever its gradient. So this sees what the coordinates do
    not: rates of vectors, a scheduler that sets all groups to one rate, groups mixed up, an epsilon
    that gradients fall below. Entries that did not move had no gradient and are left out.

    Args:
        before, after: Parameters by name.
        rates: Rate of that step × the parameter's own factor.
        tolerance: On the median over the entries.

    Raises:
        RecipeError: the three do not hold the same parameters.
    """
    if not before.keys() == after.keys() == rates.keys():
        odd = sorted((before.keys() ^ after.keys()) | (before.keys() ^ rates.keys()))
        raise RecipeError(
            f"parameters before, after and with a rate differ in {len(odd)}: {', '.join(odd[:3])}"
        )
    rows, still = [], []
    for name, start in before.items():
        moved = (after[name].double() - start.double()).abs().flatten()
        moved = moved[moved != 0]
        if len(moved):
            rows.append(StepRow(name, rates[name], moved.median().item() / rates[name]))
        else:
            still.append(name)
    return FirstStep(tuple(rows), tuple(still), tolerance)

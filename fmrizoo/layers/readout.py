"""Linear maps whose input has a factor: where a parametrization puts its multipliers.

The factor is a plain float on the module, not a parameter's attribute: it survives deepcopy,
``load_state_dict(assign=True)``, ``to_empty``, pickling, export and compilation. It is no part of
the weights either: who builds the model again sets it again (:func:`fmrizoo.mup.apply`).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """``x · multiplier``; ``x`` itself, without a product, if that is 1."""
    return x if multiplier == 1.0 else x * multiplier


class ScaledLinear(nn.Linear):
    """``W (multiplier · x) + b``: a Linear by name, shape and initialisation.

    Attributes:
        multiplies: Which multiplier it takes: ``input`` or ``output``. Other modules that take one
            have the same two attributes and a method ``fold_multiplier()``.
        multiplier: 1 unless a parametrization sets it.
    """

    multiplies: ClassVar[str] = "input"
    multiplier: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """``(…, in)`` → ``(…, out)``."""
        return F.linear(scaled(x, self.multiplier), self.weight, self.bias)

    @torch.no_grad()
    def fold_multiplier(self) -> None:
        """Multiply it into the weight: the same outputs with a multiplier of 1."""
        self.weight.mul_(self.multiplier)
        self.multiplier = 1.0

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{super().extra_repr()}, multiplier={self.multiplier:g}"


class Readout(ScaledLinear):
    """From features to outputs whose number does not depend on the width."""

    multiplies: ClassVar[str] = "output"

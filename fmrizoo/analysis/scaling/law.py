"""The laws: loss as a floor and one falling power per axis.

``L(N, D) = E + A·N^-alpha + B·D^-beta`` (Hoffmann et al. 2022, approach 3), either term alone, and
the data-constrained form (Muennighoff et al., NeurIPS 2023), where D is replaced by the effective
data ``D' = U + U·R*·(1 − exp(−R/R*))`` of U unique samples seen ``R + 1`` times. Their paper also
discounts parameters in excess of the data; this one does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Form = Literal["nd", "repeated", "n", "d"]
FORMS: tuple[Form, ...] = get_args(Form)
# Names of the estimates, in the order of the fitted vector.
NAMES: dict[Form, tuple[str, ...]] = {
    "nd": ("E", "A", "alpha", "B", "beta"),
    "repeated": ("E", "A", "alpha", "B", "beta", "R*"),
    "n": ("E", "A", "alpha"),
    "d": ("E", "B", "beta"),
}
FORMULAS: dict[Form, str] = {
    "nd": "L(N, D) = E + A·N^-alpha + B·D^-beta",
    "repeated": "L(N, D, U) = E + A·N^-alpha + B·D'^-beta, D' = U + U·R*·(1 − exp(−R/R*))",
    "n": "L(N) = E + A·N^-alpha",
    "d": "L(D) = E + B·D^-beta",
}


def effective_data(d: ArrayLike, unique: ArrayLike, r_star: float) -> Array:
    """D' of ``d`` samples seen of which ``unique`` are different, in the unit of ``d``.

    Equal to ``d`` without repeats, to nearly ``d`` while repeats R = d/unique − 1 are far below
    ``r_star``, and never more than ``unique · (1 + r_star)``.
    """
    u = np.asarray(unique, dtype=np.float64)
    repeats = np.asarray(d, dtype=np.float64) / u - 1.0
    found: Array = u - u * r_star * np.expm1(-repeats / r_star)
    return found


@dataclass(frozen=True)
class Law:
    """A law with its constants; the terms of axes that were not fitted are None.

    Attributes:
        floor: E, the loss that neither axis removes.
        a, alpha: Of the term in parameters.
        b, beta: Of the term in data.
        r_star: R* of the data-constrained form: repeats after which new passes are worth little.
    """

    floor: float
    a: float | None = None
    alpha: float | None = None
    b: float | None = None
    beta: float | None = None
    r_star: float | None = None

    @property
    def form(self) -> Form:
        if self.a is None:
            return "d"
        if self.b is None:
            return "n"
        return "nd" if self.r_star is None else "repeated"

    def loss(
        self,
        n: ArrayLike | None = None,
        d: ArrayLike | None = None,
        unique: ArrayLike | None = None,
    ) -> Array:
        """Predicted loss.

        Args:
            n: Parameters; needed where the law has a term in N.
            d: Samples seen; needed where it has a term in D.
            unique: Different samples among them; default: all of them.

        Raises:
            ValueError: an axis of the law is missing.
        """
        found: Array = np.asarray(self.floor, dtype=np.float64)
        if self.a is not None and self.alpha is not None:
            if n is None:
                raise ValueError("the law has a term in N: give n")
            found = found + self.a * np.asarray(n, dtype=np.float64) ** -self.alpha
        if self.b is not None and self.beta is not None:
            if d is None:
                raise ValueError("the law has a term in D: give d")
            seen: Array = np.asarray(d, dtype=np.float64)
            if self.r_star is not None and unique is not None:
                seen = effective_data(seen, unique, self.r_star)
            found = found + self.b * seen**-self.beta
        return found

    def constants(self) -> dict[str, float]:
        """Name → value, as in ``NAMES``."""
        every = {
            "E": self.floor,
            "A": self.a,
            "alpha": self.alpha,
            "B": self.b,
            "beta": self.beta,
            "R*": self.r_star,
        }
        return {name: value for name, value in every.items() if value is not None}

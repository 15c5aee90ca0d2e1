"""The quantity that is minimised: Huber loss of log residuals, with its analytic gradient.

Parameters of the search are ``(log E, log A', alpha, log B', beta, log R*)`` (those the form has).
A' and B' are the terms' sizes at the geometric mean of their axis: raw A and alpha move together
along a narrow valley in which optimisers stop early.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fmrizoo.analysis.scaling.law import Array, Form, Law, effective_data
from fmrizoo.analysis.scaling.points import Points

DELTA = 1e-3  # Huber: log residuals beyond 0.1 % count linearly (Hoffmann et al. 2022)
_DEEPEST = 14.0  # a term may fall to e^-14 of the smallest loss; below, it is absent
EXPONENTS = (0.005, 3.0)
R_STARS = (1e-2, 1e4)


@dataclass(frozen=True)
class Problem:
    """Points and form, ready for the search.

    Attributes:
        points: With the axes that ``form`` needs.
        form: The law.
        y: Log losses ``(points,)``.
        n_ref, d_ref: Geometric means of the axes.
    """

    points: Points
    form: Form
    y: Array = field(init=False)
    n_ref: float = field(init=False)
    d_ref: float = field(init=False)
    _x: Array | None = field(init=False)  # log(N / n_ref)
    _z: Array | None = field(init=False)  # log(D / d_ref)

    def __post_init__(self) -> None:
        n = self.points.n if self.form != "d" else None
        d = self.points.d if self.form != "n" else None

        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("y", np.log(self.points.loss))
        put("n_ref", 1.0 if n is None else float(np.exp(np.log(n).mean())))
        put("d_ref", 1.0 if d is None else float(np.exp(np.log(d).mean())))
        put("_x", None if n is None else np.log(n / self.n_ref))
        put("_z", None if d is None else np.log(d / self.d_ref))

    def log_data(self, log_r: float) -> tuple[Array, Array]:
        """log(D'/d_ref) and its derivative by log R*."""
        d, unique = self.points.d, self.points.unique
        assert d is not None and unique is not None
        r_star = np.exp(log_r)
        effective = effective_data(d, unique, r_star)
        t = (d / unique - 1.0) / r_star
        slope = unique * r_star * (-np.expm1(-t) - t * np.exp(-t)) / effective
        return np.log(effective / self.d_ref), slope

    def log_loss(self, theta: Array) -> tuple[Array, Array]:
        """Predicted log losses ``(points,)`` and their derivatives ``(points, parameters)``."""
        rows = [np.full(len(self.y), theta[0])]
        k = 1
        if self._x is not None:
            rows.append(theta[k] - theta[k + 1] * self._x)
            k += 2
        z, slope = self._z, None
        if z is not None:
            if self.form == "repeated":
                z, slope = self.log_data(float(theta[k + 2]))
            rows.append(theta[k] - theta[k + 1] * z)
        terms = np.stack(rows)
        top = terms.max(0)
        shares = np.exp(terms - top)
        total = shares.sum(0)
        shares = shares / total
        columns = [shares[0]]
        if self._x is not None:
            columns += [shares[1], -shares[1] * self._x]
        if z is not None:
            columns += [shares[-1], -shares[-1] * z]
            if slope is not None:
                columns.append(-shares[-1] * theta[k + 1] * slope)
        return top + np.log(total), np.stack(columns, 1)

    def huber(self, theta: Array) -> tuple[float, Array]:
        """Mean Huber loss of residuals in units of δ, and its gradient.

        In units of δ the value is of order 1: with raw log residuals it is 1e-6 and an optimiser's
        default tolerances end the search early (Besiroglu et al. 2024).
        """
        predicted, jacobian = self.log_loss(theta)
        r = (predicted - self.y) / DELTA
        small = np.abs(r) <= 1
        value = np.where(small, r**2 / 2, np.abs(r) - 0.5).mean()
        gradient: Array = jacobian.T @ np.clip(r, -1, 1) / (DELTA * len(r))
        return float(value), gradient

    def bounds(self) -> list[tuple[float, float]]:
        low, high = float(self.y.min()), float(self.y.max())
        found = [(low - _DEEPEST, low)]
        for axis in (self._x, self._z):
            if axis is not None:
                found += [(low - _DEEPEST, high + 1.0), EXPONENTS]
        if self.form == "repeated":
            found.append((float(np.log(R_STARS[0])), float(np.log(R_STARS[1]))))
        return found

    def law(self, theta: Array) -> Law:
        """The law in the units of the points."""
        values = [float(v) for v in theta]
        floor = float(np.exp(values[0]))
        a = alpha = b = beta = r_star = None
        k = 1
        if self._x is not None:
            alpha = values[k + 1]
            a = float(np.exp(values[k] + alpha * np.log(self.n_ref)))
            k += 2
        if self._z is not None:
            beta = values[k + 1]
            b = float(np.exp(values[k] + beta * np.log(self.d_ref)))
        if self.form == "repeated":
            r_star = float(np.exp(values[-1]))
        return Law(floor, a, alpha, b, beta, r_star)

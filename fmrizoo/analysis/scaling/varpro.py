"""Starts of the search by variable projection.

Given the exponents (and R*), E, A and B follow from a linear least-squares problem with
non-negative unknowns, solved exactly (Lawson & Hanson). What is left is a search over one to three
exponents: a coarse grid, then Nelder–Mead from its best local minima.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.optimize import minimize, nnls

from fmrizoo.analysis.scaling.law import Array
from fmrizoo.analysis.scaling.residuals import EXPONENTS, R_STARS, Problem

_GRID = {1: 48, 2: 18, 3: 11}  # values per exponent
_SHALLOW = 5.0  # a term that came out as 0 starts at e^-5 of the smallest loss, where it can grow


def project(problem: Problem, shape: Array) -> tuple[float, Array]:
    """Best E, A', B' ≥ 0 for given exponents.

    Args:
        problem: Points and form.
        shape: ``log`` of (alpha, beta, R*), those the form has.

    Returns:
        Norm of the relative residuals, and the parameters of the search ``theta``.
    """
    points, form = problem.points, problem.form
    columns = [np.ones(len(points))]
    exponents = [float(v) for v in np.exp(shape[: 1 if form in ("n", "d") else 2])]
    if form != "d" and points.n is not None:
        columns.append((points.n / problem.n_ref) ** -exponents[0])
    if form != "n" and points.d is not None:
        if form == "repeated":
            z, _ = problem.log_data(float(shape[2]))
            columns.append(np.exp(-exponents[-1] * z))
        else:
            columns.append((points.d / problem.d_ref) ** -exponents[-1])
    matrix = np.stack(columns, 1) / points.loss[:, None]
    sizes, norm = nnls(matrix, np.ones(len(points)))
    least = points.loss.min() * np.exp(-_SHALLOW)
    logs = np.log(np.maximum(sizes, least))
    theta = [logs[0]]
    for size, exponent in zip(logs[1:], exponents, strict=True):
        theta += [size, exponent]
    if form == "repeated":
        theta.append(shape[2])
    return float(norm), np.array(theta, dtype=np.float64)


def starts(problem: Problem, most: int = 4) -> list[Array]:
    """Parameters to start the search from, best first; at least one."""
    powers = 1 if problem.form in ("n", "d") else 2
    size = powers + (problem.form == "repeated")
    axis = np.linspace(np.log(0.02), np.log(2.0), _GRID[size])
    axes = [axis] * powers
    if problem.form == "repeated":
        axes.append(np.linspace(np.log(0.3), np.log(300.0), _GRID[size]))
    cost = np.array([project(problem, np.array(node))[0] for node in product(*axes)])
    cost = cost.reshape([len(a) for a in axes])
    low, high = np.log(EXPONENTS[0]), np.log(EXPONENTS[1])
    box = [(float(low), float(high))] * powers
    box += [(float(np.log(R_STARS[0])), float(np.log(R_STARS[1])))] * (size - powers)
    found: list[tuple[float, Array]] = []

    def miss(shape: Array) -> float:
        return project(problem, shape)[0]

    for node in _minima(cost)[:most]:
        best = minimize(
            miss,
            np.array([float(a[i]) for a, i in zip(axes, node, strict=True)]),
            method="Nelder-Mead",
            bounds=box,
            options={"xatol": 1e-4, "fatol": 1e-10, "maxfev": 200 * size},
        )
        found.append(project(problem, np.asarray(best.x)))
    found.sort(key=lambda one: one[0])
    return [theta for _, theta in found]


def _minima(cost: Array) -> list[tuple[int, ...]]:
    """Places of a grid that are no higher than their neighbours, lowest first."""
    around = np.pad(cost, 1, constant_values=np.inf)
    lowest = np.ones(cost.shape, dtype=bool)
    for shift in product((-1, 0, 1), repeat=cost.ndim):
        inside = tuple(slice(1 + s, 1 + s + n) for s, n in zip(shift, cost.shape, strict=True))
        lowest &= cost <= around[inside]
    places = [tuple(int(i) for i in place) for place in np.argwhere(lowest)]
    return sorted(places, key=lambda place: float(cost[place]))

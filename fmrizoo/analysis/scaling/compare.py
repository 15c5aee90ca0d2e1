"""Laws of several sets of points side by side: do their exponents differ?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from fmrizoo.analysis.scaling.bootstrap import misfit
from fmrizoo.analysis.scaling.law import NAMES
from fmrizoo.analysis.scaling.outcome import Outcome

EXPONENTS = ("alpha", "beta")
Found = Mapping[str, Outcome | str]


def rows(found: Found) -> tuple[list[str], list[list[str]]]:
    """A table of estimates with their intervals.

    Args:
        found: Name → fitted law, or why there is none.

    Returns:
        Names of the estimates that any law has, and one row each: name, points, then
        ``value (low to high)`` per estimate, empty where this law lacks it.
    """
    laws = [one for one in found.values() if isinstance(one, Outcome)]
    order = NAMES["repeated"]
    names = [n for n in order if any(n in NAMES[law.fit.form] for law in laws)]
    return names, [_row(name, one, names) for name, one in found.items()]


def _row(name: str, one: Outcome | str, names: Sequence[str]) -> list[str]:
    if isinstance(one, str):
        return [name, "no law", *("" for _ in names)]
    constants, edges = one.fit.law.constants(), one.intervals.of
    cells = [
        f"{constants[n]:.3g} ({edges[n].low:.3g} to {edges[n].high:.3g})" if n in constants else ""
        for n in names
    ]
    mark = " (law does not hold)" if doubts(one) else ""
    return [name, f"{len(one.fit.points)}{mark}", *cells]


def doubts(one: Outcome) -> list[str]:
    """Why the estimates of a fit must not be used; empty where they may be."""
    said = []
    ratio = misfit(one.fit, one.intervals.noise)
    if ratio is not None:
        said.append(f"residuals are {ratio:.1f} times the noise")
    if one.fit.at_bound:
        said.append(f"{', '.join(one.fit.at_bound)} ended at the edge of what is searched")
    if not one.fit.converged:
        said.append("the fit did not converge")
    return said


def sentences(found: Found) -> list[str]:
    """For every two sound laws and exponent, whether the intervals overlap; before, why not.

    A fit that does not describe its points has intervals too, and they mean nothing: it is named
    with the reason and compared with none.
    """
    said, laws = [], {}
    for name, law in found.items():
        if isinstance(law, str):
            said.append(f"{name}: no law: {law}")
        elif reasons := doubts(law):
            said.append(f"{name}: no law that holds: {'; '.join(reasons)}")
        else:
            laws[name] = law
    for first, second in combinations(laws, 2):
        for exponent in EXPONENTS:
            one, two = (laws[name].intervals.of.get(exponent) for name in (first, second))
            if one is None or two is None:
                continue
            level = f"{100 * laws[first].intervals.level:.0f} %"
            if one.low <= two.high and two.low <= one.high:
                how = "overlap: these points show no difference"
            else:
                how = "do not overlap: the exponents differ"
            said.append(
                f"{exponent} of {first} ({one.low:.3g} to {one.high:.3g}) and of {second} "
                f"({two.low:.3g} to {two.high:.3g}): {level} intervals {how}"
            )
    return said

"""Laws of several sets of points side by side: do their exponents differ?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

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
    return [name, str(len(one.fit.points)), *cells]


def sentences(found: Found) -> list[str]:
    """For every two sets and exponent, whether the intervals overlap; and every refusal."""
    said = [f"{name}: no law: {one}" for name, one in found.items() if isinstance(one, str)]
    laws = {name: one for name, one in found.items() if isinstance(one, Outcome)}
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

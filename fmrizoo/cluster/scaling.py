"""How throughput grows with nodes: speed-up, parallel efficiency, and what takes the rest.

Throughput T(n) on n nodes (or ranks) is compared with ideal growth from a baseline b:
efficiency(n) = T(n) / (T(b) · n / b). It is the same for strong scaling (one global batch, divided)
and weak scaling (one batch per rank), for both count clips per second.

Not to be mixed up with scaling laws of the loss (:mod:`fmrizoo.analysis.scaling`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fmrizoo.errors import DataError, RecipeError

MODES = ("strong", "weak")
UNITS = ("nodes", "ranks")
STALLS = 0.05  # share of a step spent waiting for data from which on it is worth a sentence
GOOD = 0.9  # efficiency that needs no explanation
WIDE = 0.25  # range of an efficiency that is too wide for one


@dataclass(frozen=True)
class Point:
    """Throughput at one size.

    Attributes:
        nodes: How many.
        rate: Clips a second over all ranks: the median over rounds.
        ranks: Over all nodes; None: not known.
        rounds: Clips a second of each round; round k of all points of a series ran side by side.
        low, high: Lowest and highest of the rounds, or as a table gives them; None: not known.
        batch: Clips of an optimizer step over all ranks; None: not known.
        stall: Share of the time spent waiting for data (mean over ranks and steps), if known.
        threads, cores: Of a rank that computes on a CPU, and of its node; None: not known, or not a
            CPU.
    """

    nodes: int
    rate: float
    ranks: int | None = None
    rounds: tuple[float, ...] = ()
    low: float | None = None
    high: float | None = None
    batch: int | None = None
    stall: float | None = None
    threads: int | None = None
    cores: int | None = None

    def __post_init__(self) -> None:
        if self.nodes < 1 or (self.ranks is not None and self.ranks < 1):
            raise DataError(f"nodes and ranks are numbers ≥ 1, got {self.nodes} and {self.ranks}")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise DataError(f"clips a second must be a number > 0, got {self.rate}")
        if (self.low is None) != (self.high is None):
            raise DataError(f"give both ends of a range or none, got {self.low} and {self.high}")
        if self.low is not None and self.high is not None:
            inside = 0 < self.low <= self.rate <= self.high
            if not (inside and math.isfinite(self.high)):
                raise DataError(
                    f"the range {self.low:g} … {self.high:g} does not hold {self.rate:g} clips/s"
                )

    @property
    def per_node(self) -> float | None:
        """Ranks a node."""
        return None if self.ranks is None else self.ranks / self.nodes

    @property
    def seconds(self) -> float | None:
        """Seconds a step."""
        return None if self.batch is None else self.batch / self.rate

    @property
    def crowded(self) -> bool:
        """More computing threads than cores: the row measures the cores, not the program."""
        if self.threads is None or self.cores is None or self.per_node is None:
            return False
        return self.per_node * self.threads > self.cores


@dataclass(frozen=True)
class Series:
    """Points of one system under equal conditions, smallest first.

    Attributes:
        name: Of the system or recipe, for tables and the figure's key.
        unit: What the sizes count: ``nodes`` or ``ranks``.
        mode: ``strong`` or ``weak``.
        points: Sorted by size.
        source: Where the numbers are from, in words.
        notes: What a reader must know, one sentence each.
    """

    name: str
    unit: str
    mode: str
    points: tuple[Point, ...]
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RecipeError(f"--mode is strong or weak, got {self.mode!r}")
        if self.unit not in UNITS:
            raise RecipeError(f"sizes count nodes or ranks, got {self.unit!r}")
        if not self.points:
            raise DataError(f"{self.name}: no row")
        sizes = [self.size(point) for point in self.points]
        if twice := sorted({s for s in sizes if sizes.count(s) > 1}):
            raise DataError(f"{self.name}: two rows of {twice[0]} {self.unit}; one is needed")
        if sizes != sorted(sizes):
            raise DataError(f"{self.name}: rows are not in the order of their {self.unit}")

    def size(self, point: Point) -> int:
        """Nodes or ranks of a point."""
        size = point.nodes if self.unit == "nodes" else point.ranks
        if size is None:
            raise DataError(f"{self.name}: the row of {point.nodes} nodes says no number of ranks")
        return size

    @property
    def sizes(self) -> list[int]:
        """Of all points."""
        return [self.size(point) for point in self.points]


def series_of(
    name: str,
    points: Sequence[Point],
    *,
    mode: str = "strong",
    by: str | None = None,
    source: str = "",
    notes: Sequence[str] = (),
) -> Series:
    """A series in order; sizes count nodes where these differ, else ranks.

    Args:
        by: ``nodes`` or ``ranks``, to decide it.

    Raises:
        DataError: no row, a size twice, or nodes of different numbers of ranks counted as nodes.
    """
    varies = len({p.nodes for p in points}) > 1 or any(p.ranks is None for p in points)
    unit = by or ("nodes" if varies or len(points) == 1 else "ranks")
    if unit == "nodes":
        known = {p.per_node: p for p in points if p.per_node is not None}
        if len(known) > 1:
            (a, one), (b, other) = list(known.items())[:2]
            raise DataError(
                f"{name}: {one.nodes} nodes have {a:g} ranks each and {other.nodes} nodes {b:g}, "
                "so that a node is not the same there: count --by ranks"
            )
    unsorted = [(p.nodes if unit == "nodes" else p.ranks or 0, i) for i, p in enumerate(points)]
    ordered = tuple(points[i] for _, i in sorted(unsorted))
    return Series(name, unit, mode, ordered, source, tuple(notes))


def named(series: Series, name: str) -> Series:
    """The same under another name."""
    return replace(series, name=name)


@dataclass(frozen=True)
class Efficiency:
    """Throughput beside ideal growth from a baseline.

    Attributes:
        ideal: Clips a second that perfect growth would give.
        value: Share of it that was reached.
        low, high: Range of ``value`` over rounds; None: not known.
    """

    ideal: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        size: Nodes or ranks.
        point: What was measured.
        speedup: Throughput over that of the first baseline; None below it.
        efficiency: Of each baseline; None for sizes below it.
    """

    size: int
    point: Point
    speedup: float | None
    efficiency: dict[int, Efficiency | None]


def baselines_of(series: Series, asked: Sequence[int] = ()) -> list[int]:
    """The sizes to compare with: those asked for, else the smallest.

    Raises:
        RecipeError: a size that has no row.
    """
    for size in asked:
        if size not in series.sizes:
            there = ", ".join(map(str, series.sizes))
            raise RecipeError(
                f"{series.name} has no row of {size} {series.unit} to be the baseline; there are "
                f"{there}: give one of them with --baseline"
            )
    return list(dict.fromkeys(asked)) or series.sizes[:1]


def rows_of(series: Series, baselines: Sequence[int] = ()) -> list[Row]:
    """The table of a series; ``baselines`` as in :func:`baselines_of`."""
    sizes = baselines_of(series, baselines)
    by_size = dict(zip(series.sizes, series.points, strict=True))
    rows = []
    for size, point in by_size.items():
        found = {
            base: _efficiency(by_size[base], point, size / base) if size >= base else None
            for base in sizes
        }
        first = found[sizes[0]]
        speedup = None if first is None else point.rate / by_size[sizes[0]].rate
        rows.append(Row(size, point, speedup, found))
    return rows


def _efficiency(base: Point, point: Point, times: float) -> Efficiency:
    """``times``: how many times larger ``point`` is than ``base``.

    Rounds that ran side by side are compared one by one, so that a machine that is slow for a while
    does not widen the range. The ratio of the medians lies within the range of these ratios: where
    every T(n) is at most c · T(b), so is their median. Without rounds the range is the widest that
    both ranges allow.
    """
    ideal = base.rate * times
    value = point.rate / ideal
    if point is base:
        return Efficiency(ideal, 1.0)
    if len(point.rounds) == len(base.rounds) > 1:
        pairs = zip(point.rounds, base.rounds, strict=True)
        ratios = [of / (from_ * times) for of, from_ in pairs]
        return Efficiency(ideal, value, min(ratios), max(ratios))
    ends = (point.low, point.high, base.low, base.high)
    low, high, base_low, base_high = ends
    if low is None or high is None or base_low is None or base_high is None:
        return Efficiency(ideal, value)
    return Efficiency(ideal, value, low / (base_high * times), high / (base_low * times))


# --- what limits ----------------------------------------------------------------------------------


def limits(series: Series, baseline: int | None = None) -> list[str]:
    """What keeps throughput from growing, as far as the numbers tell; one sentence each."""
    base = baselines_of(series, [] if baseline is None else [baseline])[0]
    rows = [row for row in rows_of(series, [base]) if row.size >= base]
    said = [*_cores(series, rows), *_steps(series, rows)]
    fair = [row for row in rows if not row.point.crowded]
    if len(fair) < 2 or fair[0].size != base:
        return [*said, "No two rows can be compared fairly, so nothing is said about limits."]
    return [*said, *_why(series, fair[0], fair[-1])]


def _cores(series: Series, rows: Sequence[Row]) -> Iterator[str]:
    crowded = [row for row in rows if row.point.crowded]
    if not crowded:
        return
    each = " and ".join(f"{row.point.per_node:g}" for row in crowded)
    point = crowded[-1].point
    threads = f"{point.threads} thread{'s' * (point.threads != 1)} each"
    yield (
        f"Rows marked * are not scaling: {each} ranks a node of {threads} share {point.cores} "
        "cores, so that they measure how the machine divides its cores."
    )


def _steps(series: Series, rows: Sequence[Row]) -> Iterator[str]:
    """Between which sizes the most is lost, per doubling."""
    fair = [row for row in rows if not row.point.crowded]
    kept = {}
    for a, b in pairwise(fair):
        gain = b.point.rate / a.point.rate
        kept[a.size, b.size] = (gain / (b.size / a.size)) ** (1 / math.log2(b.size / a.size))
    if len(kept) < 2:
        return
    (a_size, b_size), worst = min(kept.items(), key=lambda item: item[1])
    others = [v for pair, v in kept.items() if pair != (a_size, b_size)]
    yield (
        f"Most is lost from {a_size} to {b_size} {series.unit}: a doubling keeps {worst:.0%} there "
        f"and {min(others):.0%} or more elsewhere."
    )


def _why(series: Series, base: Row, last: Row) -> Iterator[str]:
    """The largest fair row: is it good; is it the loader."""
    (found,) = last.efficiency.values()
    assert found is not None
    head = f"At {last.size} {series.unit} the efficiency is {found.value:.0%}"
    if found.low is not None and found.high is not None and found.high - found.low > WIDE:
        yield (
            f"{head}, but {found.low:.0%} … {found.high:.0%} over the rounds: too uncertain to say "
            "what limits. Measure again on a quieter machine, or with more rounds."
        )
        return
    if (found.high or found.value) >= GOOD:
        yield f"{head}: nothing limits that these numbers could show."
        return
    stall, before = last.point.stall, base.point.stall
    if stall is None or before is None:
        yield f"{head}; waiting for data was not recorded, so that its share is not known."
        return
    without = found.value * (1 - before) / (1 - stall) if stall < 1 else math.inf
    if stall >= STALLS and without >= GOOD:
        yield (
            f"{head}; the loader limits: steps wait {stall:.0%} of their time for data, and without"
            f" that it would be {without:.0%}."
        )
        return
    wait = f"steps wait {stall:.1%} of their time for data"
    wait += f", without that it would be {without:.0%}" if stall >= STALLS else ""
    shares = _shares(base.point, last.point) if series.mode == "strong" else ""
    yield (
        f"{head}, and the loader is not the reason ({wait}): what is left is collectives, work "
        f"that every rank repeats{shares}, or the machine; `--profile` of a run tells them apart."
    )


def _shares(base: Point, last: Point) -> str:
    """How the batch of a rank shrinks."""
    if None in (base.batch, base.ranks, last.batch, last.ranks):
        return ""
    assert base.batch and base.ranks and last.batch and last.ranks
    return f", smaller batches ({base.batch / base.ranks:g} → {last.batch / last.ranks:g} a rank)"

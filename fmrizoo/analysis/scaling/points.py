"""Points of a scaling law, and the CSV file they are read from.

Columns (any order, further ones are ignored, lines that start with # are comments):
``n`` parameters, ``d`` samples or tokens seen in training, ``loss`` at the end of a schedule that
ended at this ``d``; optional ``unique`` (different samples among ``d``), ``seed`` (any word),
``noise`` (relative s.d. of this loss over seeds) and ``flops`` (of the whole training).
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmrizoo.analysis.scaling.law import Array, Form
from fmrizoo.errors import DataError

_POSITIVE = ("n", "d", "loss", "unique", "noise", "flops")


@dataclass(frozen=True)
class Points:
    """Losses of trained models; every array is ``(points,)``.

    Attributes:
        loss: Final loss.
        n: Parameters; None for a law in D alone.
        d: Samples or tokens seen; None for a law in N alone.
        unique: Different samples among ``d``.
        seed: Words that tell repeats of one setting apart.
        noise: Relative s.d. of each loss over seeds.
        flops: Floating-point operations of each training.
        source: Where they come from, for messages.
    """

    loss: Array
    n: Array | None = None
    d: Array | None = None
    unique: Array | None = None
    seed: tuple[str, ...] | None = None
    noise: Array | None = None
    flops: Array | None = None
    source: str = "the points"

    def __len__(self) -> int:
        return len(self.loss)

    def axis(self, name: str) -> Array | None:
        """``n``, ``d`` or ``unique``."""
        return {"n": self.n, "d": self.d, "unique": self.unique}[name]

    def settings(self) -> NDArray[np.intp]:
        """Number of each point's setting (N, D, U): seeds of one setting share it."""
        columns = [c for c in (self.n, self.d, self.unique) if c is not None]
        return np.unique(np.stack(columns, 1), axis=0, return_inverse=True)[1].reshape(-1)

    def keep(self, rows: NDArray[np.bool_]) -> Points:
        """The points where ``rows`` is true."""

        def cut(column: Array | None) -> Array | None:
            return None if column is None else column[rows]

        seed = self.seed
        if seed is not None:
            seed = tuple(s for s, kept in zip(seed, rows, strict=True) if kept)
        return Points(
            self.loss[rows],
            cut(self.n),
            cut(self.d),
            cut(self.unique),
            seed,
            cut(self.noise),
            cut(self.flops),
            self.source,
        )

    def with_loss(self, loss: Array) -> Points:
        return replace(self, loss=loss)


def read_points(path: Path, law: Form | None = None) -> Points:
    """Points of a CSV file.

    Args:
        path: File with a header line.
        law: ``n`` or ``d``: the other axis' column may be missing.

    Raises:
        DataError: no such file, a column is missing, or a line that cannot be used, named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from (
            error
        )
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        raise DataError(f"{path} is empty: it needs a line with the columns n, d, loss")
    header, *rows = csv.reader(line for _, line in lines)
    names = [name.strip().lower() for name in header]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            raise DataError(f"{path} has the column {name} twice")
    needed = [name for name in ("n", "d", "loss") if law not in ("n", "d") or name in (law, "loss")]
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            f"{path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"it has {', '.join(names)} (a law of one axis: --law n or --law d)"
        )
    if not rows:
        raise DataError(f"{path} holds no point below its header")
    numbers = [number for number, _ in lines[1:]]
    table = {name: _column(path, names, rows, numbers, name) for name in _POSITIVE if name in names}
    seed = None
    if "seed" in names:
        seed = tuple(row[names.index("seed")].strip() for row in rows)
    points = Points(seed=seed, source=str(path), **table)
    _check_lines(points, numbers)
    return points


def _column(
    path: Path, names: list[str], rows: list[list[str]], lines: list[int], name: str
) -> Array:
    place = names.index(name)
    found = []
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(row)} values for {len(names)} columns "
                f"({', '.join(names)})"
            )
        word = row[place].strip()
        try:
            value = float(word)
        except ValueError:
            raise DataError(f"{path}, line {line}: {name} is {word!r}, not a number") from None
        if not (math.isfinite(value) and value > 0):
            raise DataError(
                f"{path}, line {line}: {name} is {word}; a law of powers needs positive, finite "
                "numbers (leave out runs that diverged)"
            )
        found.append(value)
    return np.array(found)


def _check_lines(points: Points, lines: list[int]) -> None:
    """Refuse more unique samples than samples, and a run listed twice."""
    if points.unique is not None and points.d is not None:
        for line, d, unique in zip(lines, points.d, points.unique, strict=True):
            if unique > d:
                raise DataError(
                    f"{points.source}, line {line}: unique is {unique:g}, more than the d = {d:g} "
                    "samples seen"
                )
    if points.seed is not None:
        seen: dict[tuple[int, str], int] = {}
        for line, setting, seed in zip(lines, points.settings().tolist(), points.seed, strict=True):
            first = seen.setdefault((setting, seed), line)
            if first != line:
                raise DataError(
                    f"{points.source}, line {line}: the same setting and seed {seed!r} as in line "
                    f"{first}; list every run once"
                )

"""One cell of events.tsv or participants.tsv → a label, or missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fmrizoo.config import TaskConfig
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.types import Label

MISSING = frozenset({"", "n/a", "N/A"})  # as BIDS writes it


@dataclass(frozen=True)
class Column:
    """A target's column.

    Attributes:
        name: Of the column.
        kind: Of the target (``fmrizoo.types.KINDS``).
        key: The setting that says so, for messages.
        levels: Names of an ordinal target's levels from low to high; empty: labels are numbers.
    """

    name: str
    kind: str
    key: str = "task.kind"
    levels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = {_number(level, level) for level in self.levels}
        if len(known) < len(self.levels):
            raise RecipeError(f"task.levels={list(self.levels)} names a level twice")

    def label(self, row: Mapping[str, Any], where: str) -> Label | None:
        """The label in ``row``: text (a class, a level) or a number; None where it is missing.

        Raises:
            DataError: no number where one is needed, NaN or infinity, an unknown level.
        """
        text = str(row.get(self.name, "")).strip()
        if text in MISSING:
            return None
        said = f"{where}: {self.name}={text!r}"
        # Never a name that somebody gave: it is what software writes where a value is missing.
        if text.lower() == "nan":
            raise DataError(f"{said} is not a label: write n/a where it is missing")
        if self.kind == "classification":
            return text
        if self.levels:
            return self._level(text, said)
        number = _number(text, math.nan)
        if not isinstance(number, float) or not math.isfinite(number):
            hint = "" if self.kind == "regression" else ": give task.levels=[LOW,…,HIGH]"
            raise DataError(f"{said} is not a number, but {self.key}={self.kind}{hint}")
        return number if self.kind == "regression" else f"{number:.15g}"

    def _level(self, text: str, said: str) -> str:
        """The level called ``text``, or that is the same number (1.0 and 1)."""
        if text in self.levels:
            return text
        number = _number(text, math.nan)
        for level in self.levels:
            if _number(level, level) == number:
                return level
        raise DataError(f"{said} is none of task.levels={list(self.levels)}")

    def order(self, label: str) -> float:
        """Sorts the labels of an ordinal target from low to high."""
        return float(self.levels.index(label) if self.levels else label)


def columns_of(task: TaskConfig) -> tuple[Column, ...]:
    """The columns of a task's targets, in the order of :meth:`TaskConfig.wanted`."""
    return tuple(
        Column(
            name,
            kind,
            f"task.targets.{name}" if name in task.targets else "task.kind",
            tuple(task.levels) if kind == "ordinal" else (),
        )
        for name, kind in task.wanted().items()
    )


def _number(text: str, otherwise: Any) -> Any:
    try:
        return float(text)
    except ValueError:
        return otherwise

"""What is known of a person and a recording without its signal: age, sex, site, motion.

A model that does no better than these has perhaps learned no more of the brain than they give away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmrizoo.data.people import People, numbers
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError

Array = NDArray[np.float64]
# Column names in small letters; those of one set are the same thing.
COLUMNS = ({"age"}, {"sex", "gender"}, {"site", "site_id", "scanner"})
MOTION = "motion"
EVENTS = (
    "events of one run share age, sex, site and motion; nothing is known that differs between them"
)


@dataclass(frozen=True)
class _Number:
    name: str
    mean: float
    std: float

    def __call__(self, cells: Sequence[str]) -> Array:
        known = numbers([cell or "0" for cell in cells])
        if known is None:
            bad = next(cell for cell in cells if cell and numbers([cell]) is None)
            raise DataError(
                f"{self.name}={bad!r} of a unit is not a number, as it is in all training units: "
                "correct participants.tsv"
            )
        # A missing value is the training mean: it says nothing.
        values = np.where([bool(cell) for cell in cells], known, self.mean)
        return ((values - self.mean) / self.std)[:, None]


@dataclass(frozen=True)
class _Classes:
    name: str
    labels: tuple[str, ...]

    def __call__(self, cells: Sequence[str]) -> Array:
        # Missing, or a class that no training unit has: no 1 anywhere.
        return np.array([[float(cell == label) for label in self.labels] for cell in cells])


@dataclass(frozen=True)
class Confounds:
    """Turns runs into ``(n, f)`` numbers; scales and classes are those of the training runs.

    Attributes:
        names: What is used, such as ``age, sex, motion``.
    """

    parts: tuple[_Number | _Classes, ...]
    store: Store
    people: People | None

    @classmethod
    def fit(cls, store: Store, train: Sequence[str], target: str) -> Confounds | str:
        """From the training runs (names, one for each row); the reason where nothing is known.

        The target's own column is left out, and every other name of it (gender for sex).
        """
        people = People.of(store)
        found: list[_Number | _Classes] = []
        for name in _columns(people, target):
            cells = _cells(store, people, name, train)
            part = _fitted(name, cells)
            if part is not None:
                found.append(part)
        if not found:
            return (
                f"participants.tsv has none of age, sex and site that varies (beside {target}), "
                "and the store has no motion estimates"
            )
        return cls(tuple(found), store, people)

    @property
    def names(self) -> str:
        """What is used, in words."""
        return ", ".join(part.name for part in self.parts)

    def __call__(self, runs: Sequence[str]) -> Array:
        """``(n, f)`` for the runs of ``n`` rows.

        Raises:
            DataError: text in a column that is numeric in training.
        """
        return np.concatenate(
            [part(_cells(self.store, self.people, part.name, runs)) for part in self.parts], axis=1
        )


def _columns(people: People | None, target: str) -> list[str]:
    found = []
    for same in COLUMNS:
        if target.lower() in same or people is None:
            continue
        found += [name for name in people.columns if name.lower() in same][:1]
    return [*found, *([MOTION] if target.lower() not in (MOTION, "fd", "fd_mean") else [])]


def _cells(store: Store, people: People | None, name: str, runs: Sequence[str]) -> list[str]:
    if name == MOTION:
        motion = [store[run].qc.get("fd_mean") for run in runs]
        return ["" if value is None else repr(float(value)) for value in motion]
    rows: Mapping[str, Mapping[str, str]] = people.rows if people else {}
    return [rows.get(store[run].subject, {}).get(name, "") for run in runs]


def _fitted(name: str, cells: Sequence[str]) -> _Number | _Classes | None:
    """None where the training runs do not differ."""
    known = [cell for cell in cells if cell]
    if len(set(known)) < 2:
        return None
    # Sites called 1, 2 and 3 are no amounts.
    classes = name.lower() in COLUMNS[1] | COLUMNS[2]
    values = None if classes else numbers(known)
    if values is None:
        return _Classes(name, tuple(sorted(set(known))))
    return _Number(name, float(values.mean()), float(values.std()))

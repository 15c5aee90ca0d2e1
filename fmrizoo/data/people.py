"""Columns of participants.tsv for splits, matched cohorts and baselines of confounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmrizoo.data.labels import MISSING
from fmrizoo.data.store import PARTICIPANTS, Store, records
from fmrizoo.errors import DataError
from fmrizoo.registry import suggest

Array = NDArray[np.float64]


@dataclass(frozen=True)
class People:
    """What a store knows of its subjects.

    Attributes:
        where: The file, for messages.
        columns: Names in the order of the file, without ``participant_id``.
        rows: Subject → cells by column; text, ``""`` where missing.
    """

    where: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, store: Store) -> People | None:
        """From the store's participants.tsv; None if there is none.

        Raises:
            DataError: no ``participant_id``, or two rows of one subject.
        """
        table = store.participants
        if table is None:
            return None
        where = f"{PARTICIPANTS} of {store.path}"
        if "participant_id" not in table.columns:
            raise DataError(f"{where} has no column 'participant_id'")
        rows: dict[str, dict[str, str]] = {}
        for row in records(table):
            subject = row["participant_id"].strip().removeprefix("sub-")
            if subject in rows:
                raise DataError(f"sub-{subject} in {where} has several rows: keep one row each")
            rows[subject] = {name: _cell(text) for name, text in row.items()}
        columns = tuple(c for c in table.columns if c != "participant_id")
        return cls(where, columns, rows)

    def column(self, name: str, subjects: Iterable[str], key: str) -> dict[str, str]:
        """Cells of ``subjects``, none of them missing.

        Args:
            name: Of the column.
            subjects: Labels as in run names.
            key: The setting that asks for it, for messages.

        Raises:
            DataError: no such column, or a subject without a value.
        """
        if name not in self.columns:
            raise DataError(
                f"{key}: {self.where} has no column {name!r}.{suggest(name, list(self.columns))}"
            )
        wanted = sorted(set(subjects))
        found = {s: self.rows.get(s, {}).get(name, "") for s in wanted}
        if gaps := [s for s, cell in found.items() if not cell]:
            raise DataError(
                f"{key}: {len(gaps)} of {len(wanted)} subjects have no {name} in {self.where} "
                f"(first: sub-{gaps[0]}): fill the column, or leave them out with data.select"
            )
        return found


def people_for(store: Store, key: str) -> People:
    """:meth:`People.of`, where there has to be one.

    Raises:
        DataError: no participants.tsv, though the setting ``key`` needs it.
    """
    people = People.of(store)
    if people is None:
        raise DataError(f"{key} needs columns of {PARTICIPANTS}, but {store.path} has no such file")
    return people


def _cell(text: str) -> str:
    text = text.strip()
    return "" if text in MISSING or text.lower() == "nan" else text


def numbers(cells: Sequence[str]) -> Array | None:
    """``(n,)`` values of a numeric column; None where a cell is no finite number."""
    try:
        values = np.array([float(cell) for cell in cells], dtype=np.float64)
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def binned(cells: Sequence[str], bins: int) -> list[str]:
    """Classes as they are; numbers with more than ``bins`` values as their quantile bin."""
    values = numbers(cells)
    if values is None or len(np.unique(values)) <= bins:
        return list(cells)
    edges = np.quantile(values, np.arange(1, bins) / bins)
    return [f"q{i}" for i in np.searchsorted(edges, values, side="left")]

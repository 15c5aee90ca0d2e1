"""Several stores read as one: ``data.stores={ukb: {path: …, weight: 2}, abcd: {path: …}}``.

A run keeps its name but its subject carries the data set's: ``sub-ukb:001_task-rest_run-1``. So
subject 001 of two stores are two people, in splits, in leak checks and in what a model says it has
seen. Weights are the business of :mod:`fmrizoo.data.draw`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmrizoo.config import DataConfig
from fmrizoo.data.reader import RunReader
from fmrizoo.data.store import PARTICIPANTS, Fault, RunInfo, Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.types import RunKey

if TYPE_CHECKING:
    import pandas


def open_store(config: DataConfig) -> Store:
    """What a recipe reads: ``data.store``, or all of ``data.stores`` as one.

    Raises:
        RecipeError: neither is given.
        DataError, CorruptStoreError: no store there, or stores that do not go together.
    """
    if config.stores:
        return Mixture({name: Path(one.path) for name, one in config.stores.items()})
    if not config.store:
        raise RecipeError("data.store is empty: add data.store=FOLDER (made by `fmrizoo prepare`)")
    return Store(config.store)


class Mixture(Store):
    """Several prepared stores as one.

    Args:
        paths: Folder of each data set.
        cache: Runs kept open at a time, over all stores.

    Attributes:
        parts: The stores by name.
        path: For messages only: all folders.

    Raises:
        DataError: a folder or a recording that is in two of the stores.
    """

    def __init__(self, paths: Mapping[str, Path], cache: int = 32) -> None:
        self._paths = {name: Path(path) for name, path in paths.items()}
        self.parts = {name: Store(path, cache) for name, path in self._paths.items()}
        self.path = Path(" + ".join(str(path) for path in self._paths.values()))
        self._own: dict[str, tuple[Store, RunInfo]] = {}
        self._capacity = cache
        found: list[RunInfo] = []
        for name, store in self.parts.items():
            for run in store.runs:
                key = run.key.within(name)
                found.append(replace(run, key=key, name=str(key)))
                self._own[str(key)] = (store, run)
        self.runs = tuple(found)
        self._by_name = {run.name: run for run in found}
        self._check_twins()

    def __reduce__(self) -> tuple[type[Mixture], tuple[dict[str, Path], int]]:  # type: ignore[override]
        return Mixture, (self._paths, self._capacity)

    def _check_twins(self) -> None:
        """One recording under two names could be in training and test."""
        seen: dict[str, RunInfo] = {}
        for run in self.runs:
            other = seen.setdefault(run.uuid, run)
            if other is not run:
                raise DataError(
                    f"data.stores: {other.name} and {run.name} are the same recording: name every "
                    "store once, and leave copies out"
                )

    @property
    def participants(self) -> pandas.DataFrame | None:
        """The subjects of all stores and the columns that all of them have.

        Raises:
            DataError: only some of the stores have a participants.tsv.
        """
        import pandas

        tables = {name: store.participants for name, store in self.parts.items()}
        known = {name: table for name, table in tables.items() if table is not None}
        if not known:
            return None
        if lacking := sorted(tables.keys() - known.keys()):
            raise DataError(
                f"{self._paths[lacking[0]]} (data.stores.{lacking[0]}) has no {PARTICIPANTS}, but "
                f"{', '.join(known)} have one: add it, or leave the store out"
            )
        for name, table in known.items():
            if "participant_id" in table.columns:
                bare = table["participant_id"].fillna("").str.strip().str.removeprefix("sub-")
                known[name] = table.assign(
                    participant_id=[RunKey(label).within(name).subject for label in bare]
                )
        first, *others = known.values()
        shared = [c for c in first.columns if all(c in table.columns for table in others)]
        return pandas.concat([table[shared] for table in known.values()], ignore_index=True)

    def select(self, entities: Mapping[str, str] | None = None) -> list[RunInfo]:
        """Runs of every store whose BIDS entities match.

        Raises:
            DataError: an unknown entity, a store of which nothing matches, or stores that were
                preprocessed differently.
        """
        chosen = super().select(entities)
        kinds: dict[str, RunInfo] = {}
        for run in chosen:
            kinds.setdefault(run.key.data_set, run)
        if empty := [name for name in self.parts if name not in kinds]:
            raise DataError(
                f"no run of {self._paths[empty[0]]} (data.stores.{empty[0]}) matches select="
                f"{dict(entities or {})}: leave the store out, or select otherwise"
            )
        name, first = next(iter(kinds.items()))
        for other, run in kinds.items():
            if differences := first.contract.differences(run.contract):
                raise DataError(
                    f"data.stores: {name} and {other} were preprocessed differently "
                    f"({'; '.join(differences)}): prepare both with the same settings"
                )
        return chosen

    def open(self, run: RunInfo | str) -> RunReader:
        """See :meth:`Store.open`."""
        store, own = self._own[self[run if isinstance(run, str) else run.name].name]
        return store.open(own)

    def home(self, run: RunInfo) -> Path:
        """The folder of the store that holds ``run``."""
        return self._own[run.name][0].path

    def stored(self, run: RunInfo) -> str:
        """File of ``run`` below :meth:`home`."""
        return self._own[run.name][1].file

    def reserve(self, readers: int) -> None:
        """Keep at least so many runs of each store open at a time."""
        for store in self.parts.values():
            store.reserve(readers)

    def close(self) -> None:
        """See :meth:`Store.close`."""
        for store in self.parts.values():
            store.close()

    def summary(self) -> dict[str, Any]:
        """Of no use here: stores are described one by one.

        Raises:
            DataError: always.
        """
        raise DataError(f"{self.path} are several stores: look at each of them")

    def verify(self) -> list[Fault]:
        """See :meth:`Store.verify`: the faults of all stores."""
        return [fault for store in self.parts.values() for fault in store.verify()]

"""One NIfTI file as a store of its own, for a moment: prepared as a model expects its data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fmrizoo.config import PrepareConfig, typed_section
from fmrizoo.data.bids import RunFile, parse_name
from fmrizoo.data.hdf5 import SubjectWriter
from fmrizoo.data.legacy import UNKNOWN
from fmrizoo.data.process import process
from fmrizoo.data.store import Store, write_index
from fmrizoo.errors import DataError
from fmrizoo.types import Contract, RunKey


def config_for(
    contract: Contract, own: PrepareConfig, changes: Mapping[str, Any] | None = None
) -> PrepareConfig:
    """How a run is prepared so that it meets a model's contract.

    Args:
        contract: The model's: space, orientation, and in a template's space grid and voxel size.
        own: The ``prepare`` section of the model's recipe: everything that the contract does not
            say (mask, confounds, dropped volumes, the middle of the grid).
        changes: Settings that win, such as ``{"mask": "compute"}``.

    Raises:
        DataError: a contract of data whose space nobody knew, or of a grid whose middle is not
            known because the recipe's section is of another grid.
        RecipeError: an unknown setting, or a value of the wrong type.
    """
    if contract.space == UNKNOWN:
        raise DataError(
            "the model was trained on data whose space is not known (prepared by other software), "
            "so no NIfTI file can be prepared as it expects: give runs of a store"
        )
    given = dict(changes or {})
    wanted: dict[str, Any] = {"space": contract.space, "orientation": contract.orientation}
    if contract.space != "native":
        wanted |= {"grid": list(contract.grid), "voxel_size": list(contract.voxel_size)}
        other = [key for key, value in wanted.items() if getattr(own, key) != value]
        if other and "center" not in given:
            raise DataError(
                f"the prepare section of the model's recipe is not that of its data (its "
                f"{', '.join(other)} differ from the contract), so the middle of the grid is not "
                "known: give prepare={'center': [x, y, z]} in RAS millimetres, or runs of a store"
            )
    section = {**asdict(own), **wanted, "select": {}, **given}
    config: PrepareConfig = typed_section(PrepareConfig, section)
    return config


def check_space(path: Path, contract: Contract, stated: str | None) -> None:
    """Refuse a file that by its name lies in another space than the model expects.

    Args:
        path: The file.
        contract: The model's.
        stated: The space that the user says files without a ``space`` entity are in.

    Raises:
        DataError: another space, or none where one is needed.
    """
    found = parse_name(path)[0].get("space") or stated or "native"
    if found != contract.space:
        raise DataError(
            f"{path} is in space {found} by its name, the model expects {contract.space}: give the "
            "file in that space; if only its name leaves the space out, say so with "
            f"prepare={{'space': '{contract.space}'}}"
        )


@contextmanager
def single_store(run: RunFile, config: PrepareConfig) -> Iterator[Store]:
    """A store that holds this run alone and is gone afterwards.

    The stored values are those that ``prepare`` writes.

    Raises:
        DataError: the run cannot be used, or the disk for temporary files is full.
    """
    from fmrizoo import __version__

    if not run.key.subject:  # a file that is not named as BIDS asks
        run = replace(run, key=RunKey("input"))
    meta, encoded, mask = process(run, config)
    with TemporaryDirectory(prefix="fmrizoo-", ignore_cleanup_errors=True) as folder:
        name = f"sub-{run.key.subject}.h5"
        with SubjectWriter(Path(folder) / name, run.key.subject) as writer:
            writer.add({**meta, "fingerprint": {}}, encoded, mask)
        write_index(Path(folder), [{**e, "file": name} for e in writer.entries], __version__)
        store = Store(folder)
        try:
            yield store
        finally:
            store.close()

"""Which runs train, validate and test: drawn once from a seed, kept in a file, checked at use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmrizoo.config import SplitConfig
from fmrizoo.data.exclusion import without
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.files import canonical, write_atomic
from fmrizoo.types import RunKey

SCHEMA = "fmrizoo.split/1"


@dataclass(frozen=True)
class Split:
    """Run names by part.

    Attributes:
        train, validation, test: Run names, sorted; disjoint, and so are their units.
        config: The settings that made the split.
        left_out: Runs that are in no part though they were selected, and why
            (:mod:`fmrizoo.data.exclusion`).
        sha: SHA-256 of parts, settings and left-out runs, quoted by every result made with it.
    """

    train: list[str]
    validation: list[str]
    test: list[str]
    config: SplitConfig
    left_out: Mapping[str, str] = field(default_factory=dict)
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for part, names in self.parts().items():
            for name in names:
                if name in seen:
                    raise DataError(f"run {name} is in the {seen[name]} and the {part} part")
                seen[name] = part
        object.__setattr__(self, "sha", hashlib.sha256(canonical(self._body())).hexdigest())

    def parts(self) -> dict[str, list[str]]:
        """The three lists by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def _body(self) -> dict[str, Any]:
        settings = {k: v for k, v in asdict(self.config).items() if k != "file"}
        if not self.config.train_units:
            del settings["train_units"]  # as in files from before there was such a setting
        left_out = {"left_out": dict(self.left_out)} if self.left_out else {}
        return {"schema": SCHEMA, "config": settings, **self.parts(), **left_out}

    def save(self, path: Path) -> None:
        """Write the split as JSON, whole or not at all.

        Raises:
            DataError: the folder cannot be written.
        """
        body = {**self._body(), "sha": self.sha}
        write_atomic(path, json.dumps(body, indent=1).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Split:
        """Read a split file.

        Raises:
            DataError: missing, not a split, edited by hand (its checksum differs), or overlapping.
        """
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body.get("schema") != SCHEMA:
                raise DataError(f"{path} is not a split file (schema {body.get('schema')!r})")
            parts = ([str(n) for n in body[p]] for p in ("train", "validation", "test"))
            train, validation, test = parts
            left_out = {str(run): str(why) for run, why in body.get("left_out", {}).items()}
            split = cls(train, validation, test, SplitConfig(**body["config"]), left_out)
            written = body["sha"]
        except FileNotFoundError:
            raise DataError(f"no split file {path}") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            OverflowError,
            RecipeError,
        ) as error:
            raise DataError(f"{path} is not a split file: {error}") from None
        if written != split.sha:
            raise DataError(f"{path} was changed after it was written (its checksum differs)")
        return split

    def check(self, store: Store) -> None:
        """Make sure that the split can be used with ``store``.

        Raises:
            DataError: a run that the store lacks, or a unit divided between two parts.
        """
        names = {run.name for run in store.runs}
        parts = self.parts()
        if missing := sorted(n for part in parts.values() for n in part if n not in names):
            raise DataError(
                f"{len(missing)} runs of the split are not in {store.path} (first: {missing[0]}): "
                f"it was made for another store"
            )
        where: dict[str, str] = {}
        for part, listed in parts.items():
            for name in listed:
                unit = unit_of(store[name].key, self.config.by)
                if where.setdefault(unit, part) != part:
                    raise DataError(
                        f"{self.config.by} {unit} is divided between the {where[unit]} and the "
                        f"{part} part"
                    )


def unit_of(key: RunKey, by: str) -> str:
    """The subject, session or recording that a run belongs to.

    ``run`` ignores the acquisition label and how a file was made: two reductions of one recording
    (or two echoes) must never be divided between training and test.
    """
    if by == "subject":
        return str(RunKey(key.subject))
    if by == "session":
        return str(RunKey(key.subject, key.session))
    direction = tuple(pair for pair in key.extra if pair[0] == "dir")
    return str(RunKey(key.subject, key.session, key.task, run=key.run, extra=direction))


def make_split(
    store: Store,
    runs: Sequence[RunInfo],
    config: SplitConfig,
    left_out: Mapping[str, str] | None = None,
) -> Split:
    """Fold ``config.fold`` of a seeded k-fold over units, with validation from the other units.

    Over the folds every unit is in the test part exactly once. With ``config.train_units`` the
    training part is cut to the first of its units in the drawn order, so that a smaller one is part
    of every larger one; validation and test stay as they are. With ``config.file`` that split
    is read instead and checked against the store.

    Several stores (``data.stores``) are split one by one, each as it would be on its own: a model
    pretrained on all of them can be tested on the test part of any.

    Runs that are left out take part in the drawing and are then removed: every other run is in the
    part that it would be in without. ``config.train_units`` counts units with a run that is used.

    Args:
        left_out: Why a run is in no part, by name.

    Raises:
        DataError: fewer units than folds, or none left to train on, validate or test.
    """
    left_out = left_out or {}
    if config.file is not None:
        split = Split.load(Path(config.file))
        split.check(store)
        return _narrowed(split, left_out)
    sets: dict[str, list[RunInfo]] = {}
    for run in runs:
        sets.setdefault(run.key.data_set, []).append(run)
    drawn = [_draw(own, config, name, left_out) for name, own in sorted(sets.items())]
    train, validation, test = (
        sorted(n for part in parts for n in part) for parts in zip(*drawn, strict=True)
    )
    split = Split(train, validation, test, config, dict(left_out))
    split.check(store)
    return split


def _narrowed(split: Split, left_out: Mapping[str, str]) -> Split:
    """A split that was read, without the runs that this job leaves out."""
    inside = {n: why for n, why in left_out.items() if any(n in p for p in split.parts().values())}
    if not inside:
        return split
    parts = {part: without(names, inside) for part, names in split.parts().items()}
    for part, names in split.parts().items():
        if names and not parts[part]:
            raise DataError(_emptied(part, "of the split file", names, inside))
    return Split(**parts, config=split.config, left_out={**split.left_out, **inside})


def _emptied(part: str, where: str, names: Sequence[str], left_out: Mapping[str, str]) -> str:
    return (
        f"data.exclude and data.leave_out leave none of the {len(names)} runs in the {part} part "
        f"{where}: the first, {names[0]}, is left out: {left_out[names[0]]}"
    )


def _draw(
    runs: Sequence[RunInfo], config: SplitConfig, data_set: str, left_out: Mapping[str, str]
) -> tuple[list[str], ...]:
    """Names of the training, validation and test runs of one store."""
    where = f" of {data_set}" if data_set else ""
    units: dict[str, list[str]] = {}
    for run in runs:
        units.setdefault(unit_of(run.key, config.by), []).append(run.name)
    if len(units) < config.folds:
        raise DataError(
            f"split.folds={config.folds} needs at least as many units, but the {len(runs)} chosen "
            f"runs{where} are {len(units)} {config.by}(s): lower split.folds or change split.by"
        )
    order = np.random.default_rng(config.seed).permutation(len(units))
    names = [sorted(units)[i] for i in order]
    bounds = [len(names) * f // config.folds for f in range(config.folds + 1)]
    low, high = bounds[config.fold], bounds[config.fold + 1]
    test = names[low:high]
    rest = names[high:] + names[:low]  # so that validation units, too, change with the fold
    held_out = max(1, round(config.validation * len(rest))) if config.validation > 0 else 0
    if held_out >= len(rest):
        raise DataError(
            f"{len(names)} {config.by}(s){where} in {config.folds} folds leave {len(rest)} beside "
            f"the test part and {held_out} of them for validation: nothing is left to train on; "
            f"lower split.validation"
        )
    kept = {unit: without(listed, left_out) for unit, listed in units.items()}
    for part, drawn in (
        ("train", rest[held_out:]),
        ("validation", rest[:held_out]),
        ("test", test),
    ):
        if drawn and not any(kept[unit] for unit in drawn):
            own = [name for unit in drawn for name in units[unit]]
            raise DataError(_emptied(part, f"of fold {config.fold}{where}", own, left_out))
    train_names = [unit for unit in rest[held_out:] if kept[unit]]
    if config.train_units > len(train_names):
        raise DataError(
            f"split.train_units={config.train_units}, but the training part of fold {config.fold}"
            f"{where} has {len(train_names)} {config.by}(s)"
        )
    parts = (train_names[: config.train_units or None], rest[:held_out], test)
    return tuple([n for u in part for n in kept[u]] for part in parts)

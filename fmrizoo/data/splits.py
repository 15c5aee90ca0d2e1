"""Which runs train, validate and test: drawn once from a seed, kept in a file, checked at use."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fmrizoo.config import MatchConfig, SplitConfig
from fmrizoo.data.exclusion import without
from fmrizoo.data.matching import match
from fmrizoo.data.people import People, people_for
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.data.strata import stratified
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.files import canonical, write_atomic
from fmrizoo.types import RunKey

log = logging.getLogger(__name__)

SCHEMA = "fmrizoo.split/1"
# Not of the parts: where they were read from, and how a baseline's penalty is chosen.
_NOT_PARTS = ("file", "inner")
# Settings that are absent in files from before there were such; so is the hash of their bodies.
_LATER = ("train_units", "column", "stratify", "bins", "match")


@dataclass(frozen=True)
class Split:
    """Run names by part.

    Attributes:
        train, validation, test: Run names, sorted; disjoint, and so are their units.
        config: The settings that made the split.
        matching: Data set (empty: the only one) → pairs, who was left out and the imbalance before
            and after (:class:`fmrizoo.data.matching.Matching`); empty without ``split.match``.
        left_out: Runs that are in no part though they were selected, and why
            (:mod:`fmrizoo.data.exclusion`).
        sha: SHA-256 of parts, settings and left-out runs, quoted by every result made with it.
    """

    train: list[str]
    validation: list[str]
    test: list[str]
    config: SplitConfig
    matching: dict[str, Any] = field(default_factory=dict)
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
        usual = asdict(SplitConfig())
        settings = {
            k: v
            for k, v in asdict(self.config).items()
            if k not in _NOT_PARTS and not (k in _LATER and v == usual[k])
        }
        found: dict[str, Any] = {"schema": SCHEMA, "config": settings, **self.parts()}
        if self.left_out:
            found["left_out"] = dict(self.left_out)
        if self.matching:
            found["matching"] = self.matching
        return found

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
            settings = dict(body["config"])
            if "match" in settings:
                settings["match"] = MatchConfig(**settings["match"])
            matching = dict(body.get("matching", {}))
            left_out = {str(run): str(why) for run, why in body.get("left_out", {}).items()}
            config = SplitConfig(**settings)
            split = cls(train, validation, test, config, matching, left_out)
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
        keys = [store[name].key for listed in parts.values() for name in listed]
        unit_of_key = units_of(store, keys, self.config)
        where: dict[str, str] = {}
        for part, listed in parts.items():
            for name in listed:
                unit = unit_of_key(store[name].key)
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


def units_of(store: Store, keys: Sequence[RunKey], config: SplitConfig) -> Callable[[RunKey], str]:
    """:func:`unit_of` for ``config``, which for families and sites has to know the subjects.

    Subjects with the same value in any of the columns are one unit. With ``site,family`` two sites
    that share a family are one unit too: neither can be divided between the parts.

    Args:
        store: With participants.tsv (families and sites only).
        keys: Of all runs that will be asked for; others are units of their own subject.
        config: Whose ``by`` and ``column`` count.

    Raises:
        DataError: no participants.tsv, no such column, or a subject without a value.
    """
    if config.by not in ("family", "site"):
        return lambda key: unit_of(key, config.by)
    key = f"split.by={config.by}"
    people = people_for(store, key)
    subjects = sorted({k.subject for k in keys})
    columns = [name.strip() for name in (config.column or config.by).split(",")]
    unit = {s: s for s in subjects}
    for name in columns:
        first: dict[str, str] = {}
        for subject, value in people.column(name, subjects, key).items():
            # Labels of different data sets are no names of the same thing.
            value = f"{RunKey(subject).data_set}:{value}"
            kept, gone = unit[first.setdefault(value, subject)], unit[subject]
            if kept != gone:
                unit = {s: kept if u == gone else u for s, u in unit.items()}
    if len(columns) == 1:  # the column's value is the better name
        for subject, value in people.column(columns[0], subjects, key).items():
            data_set = RunKey(subject).data_set
            unit[subject] = f"{data_set}:{value}" if data_set else value
    return lambda key: unit.get(key.subject, str(RunKey(key.subject)))


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

    With ``config.stratify`` the folds are those of scikit-learn's ``StratifiedGroupKFold``, and the
    other units are ordered so that any stretch of them has about the same share of every class.
    With ``config.match`` subjects without a partner are in no part.

    Several stores (``data.stores``) are split one by one, each as it would be on its own: a model
    pretrained on all of them can be tested on the test part of any.

    Runs that are left out take part in the drawing and are then removed: every other run is in the
    part that it would be in without (but for matching, which looks at who is left).
    ``config.train_units`` counts units with a run that is used.

    Args:
        left_out: Why a run is in no part, by name.

    Raises:
        DataError: fewer units than folds, none left to train on, validate or test, a column of
            participants.tsv that is missing or has gaps, or matching that leaves too few.
    """
    left_out = left_out or {}
    if config.file is not None:
        split = Split.load(Path(config.file))
        split.check(store)
        return _narrowed(split, left_out)
    sets: dict[str, list[RunInfo]] = {}
    for run in runs:
        sets.setdefault(run.key.data_set, []).append(run)
    asked = config.stratify or config.match.target
    people = people_for(store, "split.stratify and split.match") if asked else None
    matching: dict[str, Any] = {}
    if people is not None and config.match.target:
        for name, own in sorted(sets.items()):
            used = [r.subject for r in own if r.name not in left_out]
            found = match(people, used, config.match, config.folds)
            matching[name] = found.as_dict()
            sets[name] = [r for r in own if r.subject in found.kept]
    unit = units_of(store, [r.key for own in sets.values() for r in own], config)
    drawn = [_draw(own, config, name, unit, people, left_out) for name, own in sorted(sets.items())]
    train, validation, test = (
        sorted(n for part in parts for n in part) for parts in zip(*drawn, strict=True)
    )
    split = Split(train, validation, test, config, matching, dict(left_out))
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
    return Split(
        **parts, config=split.config, matching=split.matching, left_out={**split.left_out, **inside}
    )


def _emptied(part: str, where: str, names: Sequence[str], left_out: Mapping[str, str]) -> str:
    return (
        f"data.exclude and data.leave_out leave none of the {len(names)} runs in the {part} part "
        f"{where}: the first, {names[0]}, is left out: {left_out[names[0]]}"
    )


def _draw(
    runs: Sequence[RunInfo],
    config: SplitConfig,
    data_set: str,
    unit_of_key: Callable[[RunKey], str],
    people: People | None,
    left_out: Mapping[str, str],
) -> tuple[list[str], ...]:
    """Names of the training, validation and test runs of one store."""
    where = f" of {data_set}" if data_set else ""
    units: dict[str, list[str]] = {}
    subjects: dict[str, set[str]] = {}
    for run in runs:
        unit = unit_of_key(run.key)
        units.setdefault(unit, []).append(run.name)
        subjects.setdefault(unit, set()).add(run.subject)
    if len(units) < config.folds:
        raise DataError(
            f"split.folds={config.folds} needs at least as many units, but the {len(runs)} chosen "
            f"runs{where} are {len(units)} {config.by}(s): lower split.folds or change split.by"
        )
    order = np.random.default_rng(config.seed).permutation(len(units))
    names = [sorted(units)[i] for i in order]
    if people is not None and config.stratify:
        test, rest = stratified(names, subjects, people, config)
    else:
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

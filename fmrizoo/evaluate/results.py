"""``results.json``: one evaluated run (a fine-tuned model or a baseline on one fold and seed)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.metrics import Values
from fmrizoo.files import write_atomic
from fmrizoo.types import KINDS

SCHEMA = "fmrizoo.result/1"
FILE = "results.json"


@dataclass(frozen=True)
class TaskInfo:
    """What was predicted: column, kind, names of classes or levels in index order, and the level
    of a unit."""

    target: str
    kind: str
    classes: tuple[str, ...]
    level: str


@dataclass(frozen=True)
class Parameters:
    """What trained, and what that took.

    Attributes:
        trainable, frozen: Parameters of the whole model.
        optimizer_bytes: Of the optimizer's state on one rank; 0 = not known.
        encoder, encoder_trained: The encoder's own parameters, and those of them that trained;
            0 = not known.
    """

    trainable: int
    frozen: int
    optimizer_bytes: int = 0
    encoder: int = 0
    encoder_trained: int = 0


@dataclass(frozen=True)
class Result:
    """One row before averaging. See the fields' notes; ``None`` = does not apply.

    Attributes:
        kind: ``finetune`` or ``baseline``.
        name: Row name in tables; equal names are averaged over folds and seeds.
        fold, seed: Which split part was tested; which seed was used.
        task: What was predicted.
        n_test: Test units scored; 0 = not applicable, with the reason in ``note``.
        chance: The primary metric that guessing from the training labels is expected to reach.
        metrics: Test metrics; ``None`` where the data do not support one.
        validation: The same on the validation units.
        init: ``pretrained`` or ``random`` (fine-tuning).
        head: Name of the head (fine-tuning).
        train_encoder: What of the encoder trained, in the head's word for it (``Head.trains``):
            ``none``, ``last_block``, ``all``, ``lora``, ``prompt``, …
        parameters: Sizes of the model.
        seconds: Wall-clock time of fitting and testing.
        split_sha: Hash of the split file; rows with different hashes are not comparable.
        note: What a reader has to know about this row.
    """

    kind: str
    name: str
    fold: int
    seed: int
    task: TaskInfo
    n_test: int
    chance: float | None
    metrics: Values
    seconds: float
    split_sha: str
    validation: Values | None = None
    init: str | None = None
    train_encoder: str | None = None
    parameters: Parameters | None = None
    note: str | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        _choice("kind", self.kind, ("finetune", "baseline"))
        _choice("init", self.init, ("pretrained", "random", None))
        for key in ("head", "train_encoder"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value):
                raise DataError(f"result field {key} must be a word or null, got {value!r}")
        _choice("task.kind", self.task.kind, KINDS)
        _choice("task.level", self.task.level, ("event", "run", "subject"))
        if not self.name:
            raise DataError("a result needs a name")
        if self.n_test < 0 or (self.n_test == 0 and not self.note):
            raise DataError(f"result {self.name!r} tested no unit and gives no reason in its note")
        known = metrics.names(self.task.kind)
        for part in (self.metrics, self.validation or {}):
            for name, value in part.items():
                if name not in known:
                    raise DataError(
                        f"result {self.name!r}: unknown metric {name!r}, not in {known}"
                    )
                if value is not None and not math.isfinite(value):
                    raise DataError(
                        f"result {self.name!r}: {name} is {value}; null means undefined"
                    )


def _choice(key: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise DataError(f"result field {key} must be one of {list(known)}, got {value!r}")


def write_result(folder: Path, result: Result) -> Path:
    """Write ``folder/results.json`` atomically and return its path."""
    path = folder / FILE
    text = json.dumps({"schema": SCHEMA, **asdict(result)}, indent=2, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())
    return path


def read_result(path: Path) -> Result:
    """Read and check one file (or the ``results.json`` of a folder).

    Raises:
        DataError: not JSON, another schema, a missing, unknown or wrongly typed field.
    """
    path = path / FILE if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"result {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"result {path} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else type(values).__name__
        raise DataError(f"{path} is not a {SCHEMA} file: its schema is {found!r}")
    del values["schema"]
    try:
        return _from_dict(values)
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {error}") from None


def _from_dict(values: dict[str, Any]) -> Result:
    if unknown := sorted(set(values) - {f.name for f in fields(Result)}):
        raise ValueError(f"unknown fields {unknown}")
    types: dict[str, type | tuple[type, ...]] = {
        "name": str,
        "fold": int,
        "seed": int,
        "n_test": int,
        "metrics": dict,
        "seconds": (int, float),
        "split_sha": str,
    }
    for key, wanted in types.items():
        if key in values and (not isinstance(values[key], wanted) or values[key] is True):
            raise ValueError(f"{key} has the wrong type: {values[key]!r}")
    for part in ("metrics", "validation"):
        for name, value in (values.get(part) or {}).items():
            if value is not None and not isinstance(value, (int, float)):
                raise ValueError(f"{part}.{name} is not a number: {value!r}")
    task = dict(values.pop("task"))
    task["classes"] = tuple(task.get("classes", ()))
    parameters = values.pop("parameters", None)
    return Result(
        task=TaskInfo(**task),
        parameters=None if parameters is None else Parameters(**parameters),
        **values,
    )


def find_results(folders: Iterable[Path]) -> list[tuple[Path, Result]]:
    """Every ``results.json`` under ``folders`` (hidden folders left out), sorted by path."""
    found: dict[Path, Result] = {}
    for folder in folders:
        for root, subfolders, files in os.walk(folder):
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            if FILE in files:
                path = Path(root).resolve() / FILE
                found.setdefault(path, read_result(path))
    return sorted(found.items(), key=lambda item: item[0])

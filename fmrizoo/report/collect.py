"""What run folders hold: training curves, reconstructions, results, predictions, environments."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fmrizoo.analysis.autocorrelation import Autocorrelation
from fmrizoo.analysis.dynamics import FILE as ANALYSIS
from fmrizoo.analysis.dynamics import read_analysis
from fmrizoo.analysis.memory import FILE as MEMORY
from fmrizoo.analysis.memory import MemoryRow, read_memory
from fmrizoo.errors import DataError, FmrizooError
from fmrizoo.evaluate.predictions import Prediction, read_predictions
from fmrizoo.evaluate.results import FILE as RESULTS
from fmrizoo.evaluate.results import Result, read_result
from fmrizoo.evaluate.rows import TARGETS
from fmrizoo.report.ahead import FILE as FORECAST
from fmrizoo.report.ahead import Ahead, read_ahead
from fmrizoo.report.reconstruction import FILE as RECONSTRUCTION
from fmrizoo.report.reconstruction import Picture, read_picture

log = logging.getLogger(__name__)

T = TypeVar("T")
PREDICTIONS, METRICS, RECIPE, ENVIRONMENT = (
    "predictions.tsv",
    "metrics.jsonl",
    "recipe.yaml",
    "env.json",
)
MODEL = "model/config.json"


@dataclass(frozen=True)
class Run:
    """One folder that a training run or an evaluation wrote.

    Attributes:
        label: Path relative to the folder that was searched.
        recipe: Resolved recipe, empty if there is none.
        curve: Lines of metrics.jsonl.
        model: ``model/config.json``: contract, seen runs, number of parameters.
        environment: ``env.json``.
        owner: Of a folder that holds one target's results of a run with several: the run's folder,
            which recipe, model and environment are from.
    """

    folder: Path
    label: str
    recipe: dict[str, Any] = field(default_factory=dict)
    curve: tuple[dict[str, Any], ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    picture: Picture | None = None
    ahead: Ahead | None = None
    result: Result | None = None
    predictions: tuple[Prediction, ...] = ()
    analysis: Autocorrelation | None = None
    owner: Path | None = None

    @property
    def pretraining(self) -> bool:
        """The recipe has an objective."""
        return bool(self.recipe.get("objective"))

    @property
    def contract(self) -> dict[str, Any]:
        """The preprocessing contract of the model's data, empty if not recorded."""
        return self.model.get("contract") or {}


@dataclass(frozen=True)
class Evidence:
    """Everything found, and one sentence per file that could not be used."""

    runs: tuple[Run, ...]
    problems: tuple[str, ...]
    memory: tuple[MemoryRow, ...] = ()

    @property
    def results(self) -> list[Result]:
        """All results, in folder order."""
        return [r.result for r in self.runs if r.result]

    def name(self, run: Run) -> str:
        """The row that a run belongs to, by its result or those of its targets; else its label."""
        mine = (r for r in self.runs if run.folder in (r.folder, r.owner))
        return next((r.result.name for r in mine if r.result), run.label)

    @property
    def pretrainings(self) -> list[Run]:
        """Pretraining runs."""
        return [r for r in self.runs if r.pretraining]


def collect(folders: Sequence[Path]) -> Evidence:
    """Search ``folders`` and everything below them (hidden folders and links left out).

    Raises:
        DataError: a folder does not exist, or nothing in any of them can be reported.
    """
    runs: dict[Path, Run] = {}
    problems: list[str] = []
    memory: dict[Path, tuple[MemoryRow, ...]] = {}
    for top in folders:
        if not top.is_dir():
            raise DataError(f"{top} is not a folder: give run folders or a folder that holds them")
        for root, below, files in os.walk(top):
            below[:] = sorted(b for b in below if not b.startswith(".") and b != "checkpoints")
            here = Path(root).resolve()
            label = here.relative_to(top.resolve()).as_posix()
            label = top.name if label == "." else label
            if MEMORY in files and here not in memory:
                memory[here] = _attempt(here, label, problems, MEMORY, read_memory, ())
            if here in runs or not {RESULTS, METRICS} & set(files):
                continue
            runs[here] = _read(here, label, problems, runs)
    if not runs and not memory:
        where = ", ".join(map(str, folders))
        raise DataError(
            f"no {METRICS}, no {RESULTS} and no {MEMORY} under {where}: nothing to report"
        )
    for problem in problems:
        log.warning("report: %s", problem)
    ordered = sorted(runs.values(), key=lambda r: r.folder)
    measured = tuple(row for folder in sorted(memory) for row in memory[folder])
    return Evidence(tuple(ordered), tuple(problems), measured)


def _attempt(
    folder: Path,
    label: str,
    problems: list[str],
    name: str,
    read: Callable[[Path], T],
    otherwise: T,
) -> T:
    """``read(folder / name)``; a file that is absent or cannot be read gives ``otherwise``."""
    path = folder / name
    if not path.is_file():
        return otherwise
    try:
        return read(path)
    except (FmrizooError, OSError, ValueError, yaml.YAMLError) as error:
        text = str(error).replace(f"{folder}/", "").splitlines()[0]
        problems.append(f"{label}/{name} was left out: {text}")
        return otherwise


def _read(folder: Path, label: str, problems: list[str], known: dict[Path, Run]) -> Run:
    def attempt(name: str, read: Callable[[Path], T], otherwise: T) -> T:
        return _attempt(folder, label, problems, name, read, otherwise)

    run = Run(
        folder,
        label,
        curve=attempt(METRICS, lambda p: _lines(p, label, problems), ()),
        picture=attempt(RECONSTRUCTION, read_picture, None),
        ahead=attempt(FORECAST, read_ahead, None),
        result=attempt(RESULTS, read_result, None),
        predictions=attempt(PREDICTIONS, lambda p: tuple(read_predictions(p)[0]), ()),
        analysis=attempt(ANALYSIS, read_analysis, None),
        owner=_owner(folder),
    )
    run = _with_settings(run, problems, known)
    if run.result and run.result.n_test and run.result.name != "Chance" and not run.predictions:
        problems.append(
            f"{label} has no {PREDICTIONS}: it is left out of paired comparisons and of the check "
            "that test runs were not used in pretraining"
        )
    return run


def _owner(folder: Path) -> Path | None:
    """The run of which ``folder`` holds one target's results."""
    run = folder.parent.parent
    return run if folder.parent.name == TARGETS and (run / RECIPE).is_file() else None


def _with_settings(run: Run, problems: list[str], known: dict[Path, Run]) -> Run:
    """``run`` with its recipe, model and environment, which its owner may have been asked for."""
    where = run.owner or run.folder
    if (other := known.get(where)) is not None:
        found = other
    else:
        found = replace(
            run,
            recipe=_attempt(where, run.label, problems, RECIPE, _yaml, {}),
            model=_attempt(where, run.label, problems, MODEL, _json, {}),
            environment=_attempt(where, run.label, problems, ENVIRONMENT, _json, {}),
        )
    return replace(run, recipe=found.recipe, model=found.model, environment=found.environment)


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"a mapping was expected, found {type(values).__name__}")
    return values


def _json(path: Path) -> dict[str, Any]:
    return _mapping(json.loads(path.read_text(encoding="utf-8")))


def _yaml(path: Path) -> dict[str, Any]:
    return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")))


def _lines(path: Path, label: str, problems: list[str]) -> tuple[dict[str, Any], ...]:
    """Lines of a JSONL file; a torn last line (a killed run) is left out and said."""
    text = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(text, start=1):
        try:
            found.append(_mapping(json.loads(line)))
        except ValueError:
            if number < len(text):
                raise DataError(f"line {number} is not a JSON object") from None
            problems.append(f"{label}/{path.name}: the last line is torn and was left out")
    return tuple(found)

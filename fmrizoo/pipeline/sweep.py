"""Many pretrainings for one question: planned as jobs, run by several processes, kept in a folder.

Every job has a run folder of its own below the sweep's and ``outcome.json`` in it once it is over.
The same call again goes on where it stopped: jobs with an outcome are read, half-done ones resume.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

from fmrizoo.config import Recipe
from fmrizoo.errors import DivergedError, RecipeError
from fmrizoo.files import write_json
from fmrizoo.pipeline.pool import part_of as part_of
from fmrizoo.pipeline.pool import work_through
from fmrizoo.pipeline.pretraining import pretrain
from fmrizoo.sections import SweepConfig

log = logging.getLogger(__name__)

FILE = "outcome.json"
SCHEMA = "fmrizoo.outcome/1"
LAST = 10  # the mean training loss is over the last 1/LAST of the steps
# What is removed when a job is over, unless models are kept.
_LARGE = ("checkpoints", "best", "model", "features")


@dataclass(frozen=True)
class Job:
    """One training of a sweep.

    Attributes:
        name: Folder below the sweep's.
        recipe: Of a pretraining; see :func:`prepared`.
    """

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        train: Mean training loss over the last tenth of its steps; infinite if it diverged.
        validation: Loss on the validation runs at the end; None without any, infinite if diverged.
        steps: Optimizer steps taken.
        seconds: Training time, over all starts.
        diverged: Why it ended early; empty if it did not.
    """

    train: float
    validation: float | None
    steps: int
    seconds: float
    diverged: str = ""

    def loss(self, which: str) -> float:
        """``train`` or ``validation``.

        Raises:
            RecipeError: there is no validation loss.
        """
        if which == "train":
            return self.train
        if self.validation is None:
            raise RecipeError(
                "sweep.loss=validation needs validation runs: set split.validation, or take "
                "sweep.loss=train"
            )
        return self.validation


@dataclass(frozen=True)
class Swept:
    """Outcomes by job name, as far as there are any; ``interrupted`` by a signal."""

    outcomes: dict[str, Outcome]
    interrupted: bool = False


def prepared(recipe: Recipe) -> Recipe:
    """The recipe as a job of a sweep trains it: every step logged, validated at the end only.

    The section ``sweep`` is emptied, so that a longer list of widths changes no finished job.

    Raises:
        RecipeError: a setting under which a schedule would not end at its own last step.
    """
    if recipe.objective is None:
        raise RecipeError("a sweep pretrains: the recipe needs an objective")
    train = recipe.train
    for key in ("patience", "keep_best"):
        if getattr(train, key):
            raise RecipeError(
                f"train.{key}={getattr(train, key)} ends or picks a training before its last step, "
                "and a sweep compares last steps: leave it out"
            )
    return replace(recipe, train=replace(train, log_every=1, validate_every=0), sweep=SweepConfig())


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 1,
    keep_models: bool = False,
    on_done: Callable[[int, int, str], None] | None = None,
) -> Swept:
    """Run what is not done yet.

    Args:
        jobs: With names of their own.
        out: Folder of the sweep.
        workers: Processes; each takes one job after the other. More than one only where no launcher
            has started several ranks.
        keep_models: Keep each job's checkpoints and model, not just its numbers.
        on_done: Called with (done, total, name) after every job.

    Raises:
        RecipeError: two jobs of one name, or a folder that was started under another recipe.
        TrainingError: a worker died.
        FmrizooError: whatever ends a training but divergence, which is an outcome.
    """
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise RecipeError("two jobs of the sweep have one name")
    done = {
        job.name: found
        for job in jobs
        if (found := read_outcome(out / job.name, job.recipe)) is not None
    }
    left = [job for job in jobs if job.name not in done]
    if on_done and done:
        on_done(len(done), len(jobs), "done before")
    work = partial(run_job, out=out, keep_models=keep_models)
    interrupted = False
    for name, outcome in work_through(left, work, workers):
        if outcome is None:
            interrupted = True
            continue
        done[name] = outcome
        if on_done:
            on_done(len(done), len(jobs), name)
    return Swept({name: done[name] for name in names if name in done}, interrupted)


def read_outcome(folder: Path, recipe: Recipe) -> Outcome | None:
    """What a job that is over has left; None if it is not over.

    Raises:
        RecipeError: the folder was started under another recipe, or its file cannot be read.
    """
    from fmrizoo.trainer.folder import RunFolder

    path = folder / FILE
    if not path.is_file():
        return None
    RunFolder(folder).check_recipe(recipe)
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        numbers = {
            key: inf if values["diverged"] and values[key] is None else values[key]
            for key in ("train", "validation")
        }
        return Outcome(**{**values, **numbers})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{path} cannot be read ({error}): delete {folder} to train it again"
        ) from None


# --- one job --------------------------------------------------------------------------------------


def run_job(job: Job, out: Path, keep_models: bool = False) -> Outcome | None:
    """Train one job to its end and write its outcome; None if a signal cut it short."""
    import torch.distributed as dist

    from fmrizoo.trainer.device import discover
    from fmrizoo.trainer.folder import RunFolder, read_metrics

    folder = out / job.name
    began = time.monotonic()
    try:
        result = pretrain(job.recipe, folder)
    except DivergedError as error:
        log.info("%s diverged: %s", job.name, error)
        seconds = time.monotonic() - began
        rows = read_metrics(RunFolder(folder).metrics)
        why = str(error).split(". ")[0]  # its advice is about files that are removed here
        outcome = Outcome(inf, inf, len(rows), round(seconds, 3), why)
    else:
        if result.interrupted:
            return None
        rows = read_metrics(RunFolder(folder).metrics)
        outcome = Outcome(
            train=_last_mean([float(row["loss"]) for row in rows if not row.get("skipped")]),
            validation=None if result.validation is None else result.validation["loss"],
            steps=result.step,
            seconds=round(result.seconds, 3),
        )
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()  # no rank reads the folder any more
    if discover().main:
        write_json(folder / FILE, {"schema": SCHEMA, **_plain(outcome)})
        for name in () if keep_models else _LARGE:
            _remove(folder / name)
    return outcome


def _remove(folder: Path) -> None:
    """The outcome is written by now: what cannot be removed costs room, and is said."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s could not be removed (%s): delete it by hand", folder, error.strerror)


def _last_mean(losses: Sequence[float]) -> float:
    last = losses[-max(1, len(losses) // LAST) :]
    return sum(last) / len(last)


def _plain(outcome: Outcome) -> dict[str, Any]:
    """JSON knows no infinity."""
    values = asdict(outcome)
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()}

"""A few steps of a shipped recipe through the real trainer, timed from outside of it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fmrizoo.config import Recipe
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.store import Store
from fmrizoo.data.targets import fit_tasks
from fmrizoo.pipeline.inputs import fit_grid, loader
from fmrizoo.trainer.cache import FeatureCache
from fmrizoo.trainer.device import World, seed_everything
from fmrizoo.trainer.inputs import CompactSamples, StepEvent, TrainerInputs
from fmrizoo.trainer.loop import train
from fmrizoo.types import Batch, ReadBatch, TaskSpec
from fmrizoo.zoo import build_downstream, build_encoder, build_model, load_recipe

CACHED = "finetune/linear"  # a head that trains on features of a frozen encoder
WARM = 1  # steps that are not counted: they open files, allocate, and read ahead


@dataclass(frozen=True)
class Step:
    """What one optimizer step took, in seconds.

    Attributes:
        wall: From the end of the step before.
        cpu: Of the process.
        stall: Share that the trainer says it waited (as in metrics.jsonl).
        waited: In ``next(batches)``, by a clock outside of the trainer.
        readers: CPU time of the reader threads.
        moved: Until batches were on the device, normalised; the trainer does this in the step.
    """

    wall: float
    cpu: float
    stall: float
    waited: float
    readers: float
    moved: float


class _EnoughError(Exception):
    """Enough steps: a recipe's own number is left as it is."""


class Watch:
    """Clocks around a stream and around steps; :meth:`after` is the trainer's ``on_step``."""

    def __init__(self, steps: int) -> None:
        self.steps: list[Step] = []
        self._wanted = steps
        self._waited = self._moved = 0.0
        self._mark = self._now()

    def stream(self, source: Any) -> Watched:
        return Watched(source, self)

    def wait(self, seconds: float) -> None:
        self._waited += seconds

    def move(self, seconds: float) -> None:
        self._moved += seconds

    def after(self, event: StepEvent) -> None:
        """Note the step that has just ended; the last one that is wanted ends the run."""
        now = self._now()
        wall, cpu, readers = (b - a for a, b in zip(self._mark, now, strict=True))
        self.steps.append(Step(wall, cpu, event.stall, self._waited, readers, self._moved))
        self._waited = self._moved = 0.0
        self._mark = self._now()
        if len(self.steps) == self._wanted:
            raise _EnoughError

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Clock, CPU time of the process, and of its reader threads."""
        readers = [t for t in threading.enumerate() if t.name.startswith("fmrizoo-reader")]
        clocks = [time.pthread_getcpuclockid(t.ident) for t in readers if t.ident is not None]
        spent = sum(time.clock_gettime(clock) for clock in clocks)
        return time.perf_counter(), time.process_time(), spent


@dataclass(frozen=True)
class Watched:
    """A stream that tells a :class:`Watch` what its reader waited for."""

    source: Any
    watch: Watch

    def batches(self, start: int = 0) -> Iterator[CompactSamples]:
        stream = self.source.batches(start)
        try:
            while True:
                began = time.perf_counter()
                samples = next(stream)
                self.watch.wait(time.perf_counter() - began)
                yield _Moved(samples, self.watch)
        finally:
            if callable(close := getattr(stream, "close", None)):
                close()


@dataclass(frozen=True)
class _Moved:
    samples: CompactSamples
    watch: Watch

    def to_batch(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Batch | ReadBatch:
        began = time.perf_counter()
        try:
            return self.samples.to_batch(device, dtype=dtype)
        finally:
            self.watch.move(time.perf_counter() - began)


class _WatchedCache(FeatureCache):
    """The cache of features with clocks around its training stream."""

    watch: Watch

    def stream(self, part: str, loader: Any) -> Any:
        return self.watch.stream(super().stream(part, loader))


def job(
    name: str, store: Store, overrides: Sequence[str] = ()
) -> tuple[Recipe, nn.Module, ClipTable, tuple[TaskSpec, ...]]:
    """A shipped recipe, its model with random weights, and clips of all runs of ``store``."""
    recipe = load_recipe(name, [f"data.store={store.path}", *overrides])
    seed_everything(recipe.train.seed)
    if recipe.objective is not None:
        table = ClipTable.windows(store, store.runs, recipe.data)
        model = build_model(recipe)
        fit_grid(cast(Any, model).backbone, table)
        return recipe, model, table, ()
    table = ClipTable.labelled(store, store.runs, recipe.data, recipe.task)
    tasks = fit_tasks(table, recipe.task)
    backbone = build_encoder(recipe)
    fit_grid(backbone, table)
    return recipe, build_downstream(backbone, recipe, tasks), table, tasks


def run(
    name: str,
    store: Store,
    steps: int,
    batch: int,
    *,
    threads: int | None = None,
    delay: float = 0.0,
) -> list[Step]:
    """The first steps of a recipe, without the warm-up.

    Args:
        batch: Clips of a step, taken at once.
        threads: Reader threads; None: as the recipe says.
        delay: Seconds that every clip takes longer to read.
    """
    # Nothing is validated: all clips train.
    alone = ["train.patience=0", "train.keep_best=false", "train.validate_every=0"]
    if name == CACHED:
        alone.append("data.clip_stride=2.5")  # two clips a run: the encoder runs over all of them
    recipe, model, table, tasks = job(name, store, [f"train.batch_size={batch}", *alone])
    if threads:
        recipe = replace(recipe, data=replace(recipe.data, threads=threads))
    watch = Watch(steps + WARM)

    def loader_for(world: World, micro: int) -> Any:
        found = loader(table, recipe, micro, tasks, world)
        if delay:
            _slow(found, delay)
        return found if recipe.train.cache_features else watch.stream(found)

    out = Path(tempfile.mkdtemp(dir=store.path.parent))
    features = None
    if recipe.train.cache_features:
        features = _WatchedCache(cast(Any, model), recipe, out, {"train": table}, tasks)
        features.watch = watch
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        train(
            TrainerInputs(
                model=model,
                recipe=recipe,
                out=out,
                loader_for=loader_for,
                world=World(),
                on_step=watch.after,
                tasks=tasks,
                features=features,
            )
        )
    except _EnoughError:
        pass
    finally:
        shutil.rmtree(out)
    return watch.steps[WARM:]


def _slow(loader: Loader, delay: float) -> None:
    """Make every clip of ``loader`` take ``delay`` seconds longer."""
    real = loader.dataset.read

    def read(*args: Any) -> Any:
        time.sleep(delay)
        return real(*args)

    cast(Any, loader.dataset).read = read


def evict(folder: Path) -> None:
    """Have the kernel drop what it keeps of the files below ``folder``, so that they are read."""
    for path in folder.rglob("*.h5"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

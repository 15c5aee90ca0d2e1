"""The training loop: one function, one folder, resumable at any moment.

``train`` may be stopped by SIGTERM, SIGINT or a crash and called again with the same inputs: it
goes on from the newest whole checkpoint and takes the same steps that an uninterrupted run takes.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fmrizoo.config import to_dict
from fmrizoo.errors import CheckpointError, FmrizooError, TrainingError
from fmrizoo.trainer import checkpoint
from fmrizoo.trainer.checkpoint import RunState
from fmrizoo.trainer.device import (
    init_distributed,
    resolve_device,
    rng_state,
    seed_everything,
    set_rng_state,
)
from fmrizoo.trainer.engine import Engine, accumulation, micro_batch, set_checkpointing
from fmrizoo.trainer.export import ModelInfo, save_model
from fmrizoo.trainer.files import writing
from fmrizoo.trainer.folder import MetricsFile, RunFolder, describe, read_metrics, recipe_hash
from fmrizoo.trainer.inputs import BatchStream as BatchStream
from fmrizoo.trainer.inputs import CompactSamples
from fmrizoo.trainer.inputs import StepEvent as StepEvent
from fmrizoo.trainer.inputs import TrainerInputs as TrainerInputs
from fmrizoo.trainer.inputs import TrainResult as TrainResult
from fmrizoo.trainer.schedule import factor
from fmrizoo.trainer.signals import StopRequest

log = logging.getLogger(__name__)
T = TypeVar("T")


def train(inputs: TrainerInputs) -> TrainResult:
    """Run, or go on with, the training that ``inputs`` describe.

    Raises:
        RecipeError: a batch size that cannot be divided, an unsupported setting, or a folder that
            was started under another recipe.
        CheckpointError: no usable checkpoint among those of the folder, or one written by another
            number of ranks.
        TrainingError: a loss or gradient that is not finite (step and subjects named), or a device
            or launcher that cannot work.
    """
    with StopRequest() as stop:
        run = _Run(inputs, stop)
        if run.on_main(run.nothing_left):
            log.info("%s is already finished; nothing to do", inputs.out)
            return run.result(finished=True)
        run.start()
        try:
            interrupted = run.steps()
            if not interrupted:
                run.export()
        finally:
            run.close()
        return run.result(interrupted=interrupted)


class _Run:
    """State of one call of :func:`train`."""

    def __init__(self, inputs: TrainerInputs, stop: StopRequest) -> None:
        self.inputs, self.stop = inputs, stop
        self.cfg, self.world = inputs.recipe.train, inputs.world
        self.micro = micro_batch(self.cfg, self.world)
        self.accumulate = accumulation(self.cfg, self.world)
        self.device = resolve_device(self.cfg.device, self.world)
        self.folder = RunFolder(inputs.out)
        self.hash = recipe_hash(inputs.recipe)
        self.step = 0
        self.resumed_from: int | None = None
        self.saved_at: int | None = None
        self.before = 0.0  # seconds of earlier starts
        self.best: dict[str, float] | None = None
        self.engine: Engine | None = None
        self.metrics: MetricsFile | None = None
        init_distributed(self.world, self.device)

    # -- talking to the other ranks ---------------------------------------------------------

    def everywhere(self, value: Any) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.world.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, do: Callable[[], T]) -> T:
        """Result of ``do`` on rank 0, on every rank; its error is raised on every rank too."""
        answer: T | FmrizooError | None = None
        if self.world.main:
            try:
                answer = do()
            except FmrizooError as error:
                answer = error
        answer = self.everywhere(answer)
        if isinstance(answer, FmrizooError):
            raise answer
        return cast(T, answer)

    def reduced(self, values: list[float]) -> list[float]:
        """Sum over ranks, in float64."""
        if self.world.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return cast(list[float], tensor.tolist())

    # -- start ------------------------------------------------------------------------------

    def nothing_left(self) -> bool:
        """Check the folder's recipe; True when the run was finished before."""
        self.folder.check_recipe(self.inputs.recipe)
        return self.folder.finished(self.cfg.steps)

    def start(self) -> None:
        """Engine, checkpoint, folder: everything before the first step."""
        model = self.inputs.model
        set_checkpointing(model, self.cfg.checkpointing)
        self.engine = Engine(model, self.cfg, self.world, self.device)
        self._resume()
        if self.world.main:
            facts = describe(self.world, str(self.device))
            self.folder.write_start(
                self.inputs.recipe, {**facts, "resumed_from": self.resumed_from}
            )
            checkpoint.clear_partial(self.folder.checkpoints)
            self.metrics = MetricsFile(self.folder.metrics, self.step)
        log.info(
            "training on %d × %s, %s, ZeRO %d, %d clips per rank and micro-step, from step %d",
            self.world.size,
            self.device,
            self.cfg.precision,
            self.engine.stage,
            self.micro,
            self.step,
        )
        self.began = time.monotonic()

    def _resume(self) -> None:
        """Load the newest whole checkpoint, or seed a fresh start."""
        assert self.engine is not None
        found = self.on_main(lambda: checkpoint.newest_valid(self.folder.checkpoints))
        if found is None:
            seed_everything(self.cfg.seed, self.world.rank)
            return
        folder, state = found
        self._check(folder, state)
        self.engine.load(folder)
        rng = torch.load(folder / _rng_name(self.world.rank), weights_only=True)
        set_rng_state(rng, self.device)
        self.step = self.resumed_from = self.saved_at = state.step
        self.before, self.best = state.seconds, state.best
        log.info("resuming from %s", folder)

    def _check(self, folder: Path, state: RunState) -> None:
        if state.world_size != self.world.size:
            raise CheckpointError(
                f"{folder} was written by {state.world_size} ranks and this run has "
                f"{self.world.size}: start it with {state.world_size} ranks to resume, or with "
                f"init_from in a new folder to start from its weights"
            )
        if state.recipe_hash != self.hash:
            raise CheckpointError(
                f"{folder} was written under another recipe than {self.folder.recipe} says; "
                f"choose another output folder"
            )

    # -- steps ------------------------------------------------------------------------------

    def steps(self) -> bool:
        """Take the remaining steps; True when a signal cut them short."""
        if self.step == self.cfg.steps:
            return False
        stream = self.inputs.loader_for(self.world, self.micro)
        batches = stream.batches(start=self.step * self.accumulate)
        self.inputs.model.train()
        try:
            while self.step < self.cfg.steps:
                if self._one(batches):
                    self.save()
                    return True
        finally:
            # Generators hold reader threads; other iterators have nothing to close.
            if callable(close := getattr(batches, "close", None)):
                close()
        return False

    def _one(self, batches: Iterator[CompactSamples]) -> bool:
        """One optimizer step; True when any rank was asked to stop."""
        assert self.engine is not None
        began = time.monotonic()
        sums: dict[str, Tensor] = {}
        subjects: list[str] = []
        for _ in range(self.accumulate):
            batch = next(batches).to_batch(self.device, dtype=self.engine.dtype)
            subjects += batch.subject
            loss, logs = self.engine.accumulate(batch)
            for name, value in {**logs, "loss": loss}.items():
                sums[name] = torch.as_tensor(value).detach().double() + sums.get(name, 0.0)
        bad, stop, means = self._together(sums)
        if bad:
            self._not_finite("loss", subjects)
        rate = factor(self.step, self.cfg.steps, self.cfg.warmup, self.cfg.min_lr_ratio)
        try:
            norm = self.engine.step(rate)
        except TrainingError:
            self._not_finite("gradient", subjects)
        self.step += 1
        speed = self.cfg.batch_size / max(time.monotonic() - began, 1e-9)
        mean = means.pop("loss")
        self._after(StepEvent(self.step, self.cfg.steps, mean, self.engine.lr, norm, speed, means))
        return stop and self.step < self.cfg.steps

    def _together(self, sums: dict[str, Tensor]) -> tuple[bool, bool, dict[str, float]]:
        """Has any rank a loss that is not finite; is any asked to stop; means over all ranks."""
        # One copy from the device and one collective a step, which the display needs anyway.
        values = cast(list[float], torch.stack(list(sums.values())).tolist())
        finite = all(math.isfinite(v) for n, v in zip(sums, values, strict=True) if n == "loss")
        bad, stop, *totals = self.reduced([float(not finite), float(self.stop.requested), *values])
        count = self.accumulate * self.world.size
        means = {name: total / count for name, total in zip(sums, totals, strict=True)}
        return bad > 0, stop > 0, means

    def _not_finite(self, what: str, subjects: list[str]) -> None:
        """Stop before the step is saved anywhere, naming the clips' subjects of all ranks."""
        everyone: list[list[str] | None] = [subjects]
        if self.world.size > 1:
            everyone = [None] * self.world.size
            dist.all_gather_object(everyone, subjects)
        names = sorted({name for part in everyone for name in part or ()})
        raise TrainingError(
            f"the {what} of step {self.step + 1} is not finite; the step's clips are of "
            f"{', '.join(names)}. Look at their data, or lower train.lr "
            f"({self.cfg.lr:g}) or train.clip_norm ({self.cfg.clip_norm:g}). Checkpoints in "
            f"{self.folder.checkpoints} are from before."
        )

    def _after(self, event: StepEvent) -> None:
        """Validation, metrics, checkpoint and display of one step."""
        last = event.step == self.cfg.steps
        validation = None
        if self.inputs.validate and (last or _due(event.step, self.cfg.validate_every)):
            validation = self._validate()
        if self.world.main and (last or validation or _due(event.step, self.cfg.log_every)):
            self._write(event, validation)
        if last or _due(event.step, self.cfg.save_every):
            self.save()
        if self.world.main and self.inputs.on_step:
            values = {**event.__dict__, "validation": validation}
            self.inputs.on_step(StepEvent(**values))

    def _write(self, event: StepEvent, validation: dict[str, float] | None) -> None:
        assert self.metrics is not None
        row: dict[str, Any] = {
            "step": event.step,
            "loss": event.loss,
            **event.logs,
            "lr": event.lr,
            "grad_norm": event.grad_norm,
            "clips": event.step * self.cfg.batch_size,
            "seconds": round(self._seconds(), 3),
            "clips_per_second": round(event.clips_per_second, 3),
        }
        if validation is not None:
            row["validation"] = validation
        self.metrics.write(row)

    def _validate(self) -> dict[str, float]:
        """Metrics of ``inputs.validate``; training's random numbers go on as if it had not been."""
        assert self.inputs.validate is not None
        model, state = self.inputs.model, rng_state(self.device)
        model.eval()
        try:
            with torch.no_grad():
                values = self.inputs.validate(model, self.device)
        finally:
            model.train()
            set_rng_state(state, self.device)
        values = self.everywhere(_finite(values))
        if self.best is None or values.get("loss", -math.inf) < self.best.get("loss", math.inf):
            self.best = values
        return cast(dict[str, float], values)

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    # -- end --------------------------------------------------------------------------------

    def save(self) -> None:
        """Publish a checkpoint of the current step (all ranks)."""
        if self.saved_at == self.step:
            return
        assert self.engine is not None
        partial = checkpoint.partial_folder(self.folder.checkpoints, self.step)
        try:
            with writing(f"the checkpoint of step {self.step}", self.folder.checkpoints):
                self._write_checkpoint(partial)
        except CheckpointError:
            # What is there of it only takes the room that the next attempt needs.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.saved_at = self.step

    def _write_checkpoint(self, partial: Path) -> None:
        assert self.engine is not None
        if self.world.main:
            partial.mkdir(parents=True)
            cast(MetricsFile, self.metrics).sync()
        dist.barrier()
        self.engine.save(partial)
        torch.save(rng_state(self.device), partial / _rng_name(self.world.rank))
        dist.barrier()
        if self.world.main:
            micro = self.step * self.accumulate
            state = RunState(
                self.step, micro, self.world.size, self._seconds(), self.hash, self.best
            )
            checkpoint.seal(self.folder.checkpoints, state, self.cfg.keep)
        dist.barrier()

    def export(self) -> None:
        """Write ``model/`` (all ranks gather, rank 0 writes)."""
        assert self.engine is not None
        kept = {name: value for name, value in self.engine.weights() if self.world.main}
        if self.world.main:
            info = ModelInfo(
                recipe=to_dict(self.inputs.recipe),
                contract=self.inputs.contract,
                tasks=self.inputs.tasks,
                seen_runs=tuple(self.inputs.seen_runs),
                step=self.step,
                parameters=self.engine.parameters,
            )
            save_model(self.folder.model, kept, info)
        dist.barrier()

    def close(self) -> None:
        """Release the engine and the metrics file."""
        if self.metrics is not None:
            self.metrics.close()
        if self.engine is not None:
            self.engine.close()

    def result(self, *, interrupted: bool = False, finished: bool = False) -> TrainResult:
        """Read from the folder, so that a finished run reports what it reported then."""
        rows = read_metrics(self.folder.metrics)
        best = self.best
        if finished:
            newest = checkpoint.newest_valid(self.folder.checkpoints)
            if newest is not None:
                best, self.before = newest[1].best, newest[1].seconds
            self.step = self.cfg.steps
        validations = [row["validation"] for row in rows if row.get("validation")]
        return TrainResult(
            metrics=rows[-1] if rows else {},
            validation=validations[-1] if validations else None,
            best_validation=best,
            step=self.step,
            resumed_from=self.resumed_from,
            seconds=self.before if finished else self._seconds(),
            checkpoints=tuple(checkpoint.found(self.folder.checkpoints)),
            model=None if interrupted else self.folder.model,
            interrupted=interrupted,
            already_finished=finished,
        )


def _finite(values: dict[str, float]) -> dict[str, float]:
    """Metrics that exist: one that is undefined for these data (None, NaN) is left out."""
    kept = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
    if missing := sorted(set(values) - set(kept)):
        log.info("validation metrics without a value: %s", ", ".join(missing))
    return kept


def _rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.pt"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

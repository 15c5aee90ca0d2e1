"""The training loop: one function, one folder, resumable at any moment.

``train`` may be stopped by SIGTERM, SIGINT or a crash and called again with the same inputs: it
goes on from the newest whole checkpoint and takes the same steps that an uninterrupted run takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import cast

from fmrizoo.config import to_dict
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.mup.stored import check_parametrization, write_parametrization
from fmrizoo.trainer import checkpoint
from fmrizoo.trainer.accounting import Accounting, account
from fmrizoo.trainer.checkpoint import RunState
from fmrizoo.trainer.construction import share
from fmrizoo.trainer.device import (
    init_distributed,
    resolve_device,
    seed_everything,
)
from fmrizoo.trainer.engine import Engine, set_checkpointing
from fmrizoo.trainer.export import ModelInfo, read_info, save_model
from fmrizoo.trainer.faults import NotFinite
from fmrizoo.trainer.files import writing
from fmrizoo.trainer.folder import MetricsFile, RunFolder, describe, read_metrics, recipe_hash
from fmrizoo.trainer.inputs import BatchStream as BatchStream
from fmrizoo.trainer.inputs import CompactSamples
from fmrizoo.trainer.inputs import StepEvent as StepEvent
from fmrizoo.trainer.inputs import TrainerInputs as TrainerInputs
from fmrizoo.trainer.inputs import TrainResult as TrainResult
from fmrizoo.trainer.profile import Profile, Waited
from fmrizoo.trainer.ranks import Ranks
from fmrizoo.trainer.saving import Saver
from fmrizoo.trainer.signals import StopRequest
from fmrizoo.trainer.stepping import Stepper
from fmrizoo.trainer.validation import Watch, check_monitor, run_validation
from fmrizoo.trainer.watchdog import (
    EXPORTING,
    FEATURES,
    REPORTING,
    SAVING,
    STARTING,
    VALIDATING,
    Pulse,
    Watchdog,
    losing_ranks,
)
from fmrizoo.trainer.zero import DTYPES, accumulation, micro_batch

log = logging.getLogger(__name__)


def train(inputs: TrainerInputs) -> TrainResult:
    """Run, or go on with, the training that ``inputs`` describe.

    Raises:
        RecipeError: a batch size that cannot be divided, an unsupported setting, or a folder that
            was started under another recipe.
        CheckpointError: no usable checkpoint among those of the folder, one of another model, or
            one that cannot be written.
        DivergedError: a loss or gradient that is not finite (step and subjects named).
        LostRankError: another rank is gone; its subclass HungRankError: because it hung.
        TrainingError: a device or launcher that cannot work.
    """
    with StopRequest() as stop, losing_ranks(inputs.out, inputs.world):
        run = _Run(inputs, stop)
        with Watchdog(run.pulse, run.cfg.hang_minutes, inputs.out, inputs.world):
            return _train(run)


def _train(run: _Run) -> TrainResult:
    """:func:`train`, watched."""
    if run.ranks.on_main(run.nothing_left):
        log.info("%s is already finished; nothing to do", run.inputs.out)
        run.drop_features()
        return run.result(finished=True)
    if not run.features():
        return run.result(interrupted=True)
    run.start()
    try:
        interrupted = run.steps()
        run.published()
        if not interrupted and not run.inputs.measured_only:
            run.export()
            run.drop_features()
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
        # Seconds of earlier starts and of making features; when this start, or training, began.
        self.before, self.began = 0.0, time.monotonic()
        self.watch = Watch(self.cfg)
        self.accounting: Accounting | None = None
        self.engine: Engine | None = None
        self.not_finite: NotFinite | None = None
        self.pulse = Pulse()
        self.saver: Saver | None = None
        self.profile: Profile | None = None
        self.metrics: MetricsFile | None = None
        check_monitor(self.cfg, inputs.validate is not None)
        _check_features(inputs)
        # Collectives must not give up on a rank before it has said that it hangs.
        patience = max(30.0, 1.5 * self.cfg.hang_minutes)
        init_distributed(self.world, self.device, timeout_minutes=patience)
        self.ranks = Ranks(self.world, self.device)

    # -- start ------------------------------------------------------------------------------

    def nothing_left(self) -> bool:
        """Check the folder's recipe; True when the run was finished before."""
        self.folder.check_recipe(self.inputs.recipe)
        return self.folder.finished(self.cfg.steps)

    def features(self) -> bool:
        """Make the features that the run is to read, if any; False when a signal cut it short."""
        cache = self.inputs.features
        if cache is None:
            return True
        # Before DeepSpeed changes the encoder's weights (dtype) or takes them apart (ZeRO 3).
        dtype = DTYPES[self.cfg.precision]
        share(self.inputs.model, self.world, self.device)
        self.pulse.enter(FEATURES)
        made = cache.build(self.device, dtype, self.ranks, self._asked)
        self.pulse.enter(STARTING)
        # What is saved at every step is paid for here.
        self.before, self.began = self._seconds(), time.monotonic()
        return made

    def _asked(self) -> bool:
        """Whether this rank was asked to stop; asking is a sign of life."""
        self.pulse.beat()
        return self.stop.requested

    def start(self) -> None:
        """Engine, checkpoint, folder: everything before the first step."""
        model = self.inputs.model
        set_checkpointing(model, self.cfg.checkpointing)
        self.accounting = account(model, self.cfg, self.world.size)
        self.engine = Engine(model, self.cfg, self.world, self.device)
        out = self.folder.path
        self.not_finite = NotFinite(self.cfg, out, self.engine, self.ranks, model)
        self.saver = Saver(
            self.engine, self.folder, self.ranks, self.cfg.keep, at_once=not self.cfg.async_save
        )
        self._resume()
        nodes = self.ranks.nodes()
        if self.world.main:
            facts = describe(self.world, str(self.device), nodes)
            facts |= {"resumed_from": self.resumed_from, "accounting": self.accounting.to_dict()}
            self.folder.write_start(self.inputs.recipe, facts)
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
        log.info("%s", self.accounting.sentence())
        if getattr(model, "parametrization", None) is not None:
            log.info("muP, %s", self.engine.groups)
        self.began = time.monotonic()

    def _resume(self) -> None:
        """Load the newest whole checkpoint, or seed a fresh start."""
        assert self.saver is not None
        found = self.saver.newest()
        if found is None:
            seed_everything(self.cfg.seed, self.world.rank)
            return
        folder, state = found
        self._check(folder, state)
        check_parametrization(folder, self.inputs.model)
        self.saver.load(folder, state, self.cfg.seed)
        self.step = self.resumed_from = self.saved_at = state.step
        self.before += state.seconds
        self.watch.recall(state)
        cast(NotFinite, self.not_finite).skipped = state.skipped
        log.info("resuming from %s", folder)
        if state.world_size != self.world.size:
            log.warning(
                "%d ranks go on with what %d wrote: same clips and weights; dropout draws other "
                "numbers",
                self.world.size,
                state.world_size,
            )

    def _check(self, folder: Path, state: RunState) -> None:
        if state.recipe_hash != self.hash:
            raise CheckpointError(
                f"{folder} was written under another recipe than {self.folder.recipe} says; "
                f"choose another output folder"
            )

    def over(self) -> bool:
        """All steps are taken, or the validations have not got better for long enough."""
        return self.step == self.cfg.steps or self.watch.over

    @property
    def stopped_early(self) -> bool:
        """Ended by the validations, before all steps."""
        return self.watch.over and self.step < self.cfg.steps

    # -- steps ------------------------------------------------------------------------------

    def steps(self) -> bool:
        """Take the remaining steps; True when a signal cut them short."""
        if self.over():
            return False
        stream = self.inputs.loader_for(self.world, self.micro)
        if self.inputs.features is not None:
            stream = self.inputs.features.stream("train", stream)
        source = stream.batches(start=self.step * self.accumulate)
        self.profile = self._profile()
        batches = Waited(self.profile.stream(source) if self.profile else source)
        assert self.engine is not None and self.not_finite is not None
        assert self.saver is not None
        stepper = Stepper(
            self.cfg,
            self.engine,
            self.ranks,
            self.not_finite,
            self.pulse,
            self._asked,
            self.saver,
            self.accumulate,
        )
        self.inputs.model.train()
        try:
            while not self.over():
                if self._one(stepper, batches):
                    self.save()
                    return True
        finally:
            batches.close()
            if self.profile:
                self.profile.finish()
        return False

    def _profile(self) -> Profile | None:
        if not self.cfg.profile:
            return None
        left, main = self.cfg.steps - self.step, self.world.main
        made = Profile(self.folder.path, self.device, first=self.step + 1, left=left, main=main)
        cast(Engine, self.engine).timed(made.clock.around)
        made.start()
        return made

    def _one(self, stepper: Stepper, batches: Waited[CompactSamples]) -> bool:
        """One optimizer step and what follows it; True when any rank was asked to stop."""
        with self.profile.step() if self.profile else nullcontext():
            stop, event = stepper.take(batches, self.step)
        self.step += 1
        self._after(event)
        return stop and not self.over()

    def _after(self, event: StepEvent) -> None:
        """Validation, metrics, checkpoint and display of one step."""
        validation = None
        if self.inputs.validate and (self.over() or _due(event.step, self.cfg.validate_every)):
            self.pulse.enter(VALIDATING)
            with cast(Engine, self.engine).averaged():
                validation = self._validated(event.step)
        self.pulse.enter(REPORTING)
        last = self.over()
        told = last or validation or event.skipped or _due(event.step, self.cfg.log_every)
        if self.world.main and told:
            self._write(event, validation)
        if last or _due(event.step, self.cfg.save_every):
            self.save()
        self.pulse.enter(REPORTING)
        if self.world.main and self.inputs.on_step:
            values = {**event.__dict__, "validation": validation}
            self.inputs.on_step(StepEvent(**values))

    def _validated(self, step: int) -> dict[str, float]:
        """Metrics of the weights as they are; keeps them if they are the best."""
        assert self.inputs.validate is not None
        with cast(Engine, self.engine).whole():
            answer = run_validation(self.inputs.validate, self.inputs.model, self.device)
        validation = cast(dict[str, float], self.ranks.everywhere(answer))
        if self.watch.take(step, validation) and self.cfg.keep_best:
            self.watch.sha256 = cast(Saver, self.saver).keep_best(step)
        return validation

    def _write(self, event: StepEvent, validation: dict[str, float] | None) -> None:
        assert self.metrics is not None
        row = event.row(event.step * self.cfg.batch_size, self._seconds())
        if validation is not None:
            row["validation"] = validation
        if self.stopped_early:
            row["stopped_early"] = True
        self.metrics.write(row)

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    # -- end --------------------------------------------------------------------------------

    def save(self) -> None:
        """Publish a checkpoint of the current step (all ranks)."""
        if self.saved_at == self.step or self.inputs.measured_only:
            return
        assert self.saver is not None and self.not_finite is not None
        self.pulse.enter(SAVING)
        if self.metrics is not None:
            self.metrics.sync()
        state = RunState(
            step=self.step,
            micro_step=self.step * self.accumulate,
            world_size=self.world.size,
            seconds=self._seconds(),
            recipe_hash=self.hash,
            best=self.watch.best,
            best_step=self.watch.step,
            best_sha256=self.watch.sha256,
            waited=self.watch.waited,
            skipped=self.not_finite.skipped,
        )
        self.saver.save(state, self._info(self.step))
        self.saved_at = self.step

    def published(self) -> None:
        """Wait for the checkpoint on its way, if any (all ranks)."""
        self.pulse.enter(SAVING)
        cast(Saver, self.saver).flush()

    def _info(self, step: int) -> ModelInfo:
        """What a model with the weights of ``step`` says of itself."""
        return ModelInfo(
            recipe=to_dict(self.inputs.recipe),
            contract=self.inputs.contract,
            tasks=self.inputs.tasks,
            seen_runs=tuple(self.inputs.seen_runs),
            step=step,
            steps_taken=self.step,
            stopped_early=self.stopped_early,
            parameters=cast(Engine, self.engine).parameters,
        )

    def export(self) -> None:
        """Write ``model/`` (all ranks gather, rank 0 writes), with the best weights if kept."""
        assert self.engine is not None and self.saver is not None
        self.pulse.enter(EXPORTING)
        if self.stopped_early:
            log.info(
                "stopped after step %d of %d: %d validations no better than that of step %d",
                self.step,
                self.cfg.steps,
                self.watch.waited,
                self.watch.step,
            )
        best = (self.watch.step, self.watch.sha256) if self.cfg.keep_best else None
        with self.engine.averaged():
            kept = self.saver.weights(best)
        info = self._info(self.watch.step if self.cfg.keep_best else self.step)

        def write(told: Callable[[int], object]) -> None:
            with writing("parametrization.json", self.folder.model):
                self.folder.model.mkdir(parents=True, exist_ok=True)
                write_parametrization(self.folder.model, self.inputs.model)
            save_model(self.folder.model, kept, info, told)

        self.saver.write_beside(write, self.folder.model)

    def drop_features(self) -> None:
        """Remove the features of a finished run: they are large, and can be made again."""
        if self.inputs.features is not None and self.world.main:
            self.inputs.features.remove()

    def close(self) -> None:
        """Release the engine and the metrics file."""
        if self.metrics is not None:
            self.metrics.close()
        if self.saver is not None:
            self.saver.close()
        if self.engine is not None:
            self.engine.close()

    def result(self, *, interrupted: bool = False, finished: bool = False) -> TrainResult:
        """Read from the folder, so that a finished run reports what it reported then."""
        rows = read_metrics(self.folder.metrics)
        stopped = self.stopped_early
        if finished:
            found = checkpoint.newest_valid(self.folder.checkpoints, resume=False)
            if found is not None:
                self.before = found[1].seconds
                self.watch.recall(found[1])
            info = read_info(self.folder.model)
            self.step, stopped = info.steps_taken, info.stopped_early
        validations = [row["validation"] for row in rows if row.get("validation")]
        return TrainResult(
            metrics=rows[-1] if rows else {},
            validation=validations[-1] if validations else None,
            best_validation=self.watch.best,
            best_step=self.watch.step,
            step=self.step,
            resumed_from=self.resumed_from,
            seconds=self.before if finished else self._seconds(),
            checkpoints=tuple(checkpoint.found(self.folder.checkpoints)),
            model=None if interrupted or self.inputs.measured_only else self.folder.model,
            interrupted=interrupted,
            already_finished=finished,
            stopped_early=stopped,
            accounting=self.accounting,
        )


def _check_features(inputs: TrainerInputs) -> None:
    """Refuse a recipe whose features nobody can make."""
    if inputs.recipe.train.cache_features and inputs.features is None:
        raise RecipeError(
            "train.cache_features=true is for heads on a frozen encoder, and this run has none"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

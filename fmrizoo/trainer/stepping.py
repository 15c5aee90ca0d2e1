"""One optimizer step on all ranks: micro-batches, the numbers that ranks share, and the verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from fmrizoo.config import TrainConfig
from fmrizoo.errors import TrainingError
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.faults import NotFinite, Seen
from fmrizoo.trainer.inputs import CompactSamples, StepEvent
from fmrizoo.trainer.profile import Waited
from fmrizoo.trainer.ranks import Ranks
from fmrizoo.trainer.saving import Saver
from fmrizoo.trainer.schedule import factor
from fmrizoo.trainer.watchdog import COMPUTING, OPTIMIZER, SHARING, WAITING, Pulse


class Stepper:
    """Takes steps; the loop counts them.

    Args:
        train: The recipe's section.
        engine, ranks: Of the run.
        not_finite: Judges losses and gradients that are no numbers.
        pulse: Told what is being done.
        asked: Whether this rank was asked to stop.
        saver: Asked whether what it writes beside the steps goes well.
        accumulate: Micro-batches per step and rank.
    """

    def __init__(
        self,
        train: TrainConfig,
        engine: Engine,
        ranks: Ranks,
        not_finite: NotFinite,
        pulse: Pulse,
        asked: Callable[[], bool],
        saver: Saver,
        accumulate: int,
    ) -> None:
        self._train, self._engine, self._ranks = train, engine, ranks
        self._not_finite, self._pulse, self._asked = not_finite, pulse, asked
        self._saver, self._accumulate = saver, accumulate

    def take(self, batches: Waited[CompactSamples], step: int) -> tuple[bool, StepEvent]:
        """The step after ``step``: is any rank asked to stop, and what happened.

        Raises:
            DivergedError: a loss or gradient is not finite, and the step may not be left out.
            CheckpointError: the checkpoint on its way cannot be written.
        """
        began = time.monotonic()
        self._not_finite.before_step()
        sums: dict[str, Tensor] = {}
        # The samples are kept until the step is judged: they are small, batches are not.
        seen: list[Seen] = []
        for _ in range(self._accumulate):
            self._pulse.enter(WAITING)
            samples = next(batches)
            self._pulse.enter(COMPUTING)
            batch = samples.to_batch(self._engine.device, dtype=self._engine.dtype)
            loss, logs = self._engine.accumulate(batch)
            seen.append(Seen(samples, batch.subject, loss))
            for name, value in {**logs, "loss": loss}.items():
                sums[name] = torch.as_tensor(value).detach().double() + sums.get(name, 0.0)
        self._pulse.enter(SHARING)
        bad, stop, waited, means = self._together(sums, batches.taken())
        train = self._train
        rate = factor(step, train.steps, train.warmup, train.min_lr_ratio)
        norm = self._stepped(bad, step, rate, seen)
        seconds = max(time.monotonic() - began, 1e-9)
        return stop, StepEvent(
            step=step + 1,
            steps=train.steps,
            loss=math.nan if norm is None else means["loss"],
            lr=train.lr * rate,
            grad_norm=math.nan if norm is None else norm,
            clips_per_second=train.batch_size / seconds,
            logs={} if norm is None else {k: v for k, v in means.items() if k != "loss"},
            stall=min(1.0, waited / seconds),
            skipped=norm is None,
        )

    def _stepped(self, bad: bool, step: int, rate: float, seen: list[Seen]) -> float | None:
        """The gradient's norm after the optimizer's step; None where that was left out."""
        if bad:
            self._not_finite.answer("loss", step + 1, seen)
            return None
        self._pulse.enter(OPTIMIZER)
        try:
            return self._engine.step(rate)
        except TrainingError:
            self._not_finite.answer("gradient", step + 1, seen)
            return None

    def _together(
        self, sums: dict[str, Tensor], waited: float
    ) -> tuple[bool, bool, float, dict[str, float]]:
        """Has any rank a loss that is not finite; is any asked to stop; means over all ranks."""
        # One copy from the device and one collective a step, which the display needs anyway.
        values = cast(list[float], torch.stack(list(sums.values())).tolist())
        finite = all(math.isfinite(v) for n, v in zip(sums, values, strict=True) if n == "loss")
        unsaved = float(self._saver.failed)
        bad, stop, lost, waits, *totals = self._ranks.reduced(
            [float(not finite), float(self._asked()), unsaved, waited, *values]
        )
        if lost:
            self._saver.flush()
        count = self._accumulate * self._ranks.world.size
        means = {name: total / count for name, total in zip(sums, totals, strict=True)}
        return bad > 0, stop > 0, waits / self._ranks.world.size, means

"""Validations: run without a trace in training, compared with the best one before.

Only the validation part of the data is ever looked at here: the trainer knows no other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from fmrizoo.config import TrainConfig
from fmrizoo.errors import RecipeError, TrainingError
from fmrizoo.trainer.device import rng_state, set_rng_state

if TYPE_CHECKING:
    from fmrizoo.trainer.checkpoint import RunState

log = logging.getLogger(__name__)

Validate = Callable[[nn.Module, torch.device], dict[str, float]]

_LOWER = ("loss", "mae")


def lower_is_better(metric: str) -> bool:
    """True for ``loss``, ``mae`` and ``<target>.loss``, ``<target>.mae``; False for the rest."""
    return metric.rpartition(".")[2] in _LOWER


def check_monitor(train: TrainConfig, validates: bool) -> None:
    """Refuse settings that need validations in a run without any.

    Raises:
        RecipeError: names the setting.
    """
    for key in ("patience", "keep_best"):
        if (value := getattr(train, key)) and not validates:
            raise RecipeError(
                f"train.{key}={value} needs validation clips and this run has none: set "
                f"split.validation above 0, or leave train.{key} out"
            )


def run_validation(validate: Validate, model: nn.Module, device: torch.device) -> dict[str, float]:
    """Metrics of ``validate``; training's random numbers go on as if it had not been.

    A metric that is undefined for these data (None, NaN) is left out.
    """
    state = rng_state(device)
    model.eval()
    try:
        with torch.no_grad():
            values = validate(model, device)
    finally:
        model.train()
        set_rng_state(state, device)
    kept = {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}
    if missing := sorted(set(values) - set(kept)):
        log.info("validation metrics without a value: %s", ", ".join(missing))
    return kept


class Watch:
    """Compares each validation with the best one before it.

    Attributes:
        best: Metrics of the best validation; None before the first.
        step: Its step.
        sha256: Checksum of its weights file; empty if none is kept.
        waited: Validations since then, all of them no better.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self.best: dict[str, float] | None = None
        self.step = 0
        self.sha256 = ""
        self.waited = 0

    @property
    def over(self) -> bool:
        """``patience`` validations in a row were no better."""
        return 0 < self._train.patience <= self.waited

    def recall(self, state: RunState) -> None:
        """Go on from what a checkpoint says."""
        self.best, self.step = state.best, state.best_step
        self.sha256, self.waited = state.best_sha256, state.waited

    def take(self, step: int, values: dict[str, float]) -> bool:
        """Note the validation after ``step``; True if it is the best so far.

        An equal one is not better. A metric that has no value (any more) is never better.

        Raises:
            TrainingError: the first validation lacks the monitored metric.
        """
        if self._better(step, values):
            self.best, self.step, self.waited = values, step, 0
            return True
        self.waited += 1
        return False

    def _better(self, step: int, values: dict[str, float]) -> bool:
        metric = self._train.monitor
        value, best = values.get(metric), (self.best or {}).get(metric)
        if value is not None and best is not None:
            return value < best if lower_is_better(metric) else value > best
        if value is not None:
            return True
        if self.best is None and self._asked:
            raise TrainingError(
                f"the first validation (step {step}) has no value of train.monitor={metric!r}; it "
                f"has {', '.join(sorted(values)) or 'no metric with a value'}: monitor one of these"
            )
        if best is not None:
            log.warning("the validation of step %d has no value of %s: not better", step, metric)
        # Where nothing hangs on it and no validation has the default metric, the last one counts.
        return best is None

    @property
    def _asked(self) -> bool:
        """Whether the run depends on the metric, or the recipe names it."""
        train = self._train
        return bool(train.patience or train.keep_best or train.monitor != TrainConfig.monitor)

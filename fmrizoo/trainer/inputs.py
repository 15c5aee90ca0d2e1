"""What goes into a training run, what is told on the way, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from fmrizoo.config import Recipe
from fmrizoo.trainer.accounting import Accounting
from fmrizoo.trainer.device import World
from fmrizoo.types import Batch, Contract, ReadBatch, TaskSpec

if TYPE_CHECKING:
    from fmrizoo.trainer.cache import FeatureCache


class CompactSamples(Protocol):
    """What a stream yields: samples that become a batch on the device."""

    def to_batch(self, device: torch.device, dtype: torch.dtype = ...) -> Batch | ReadBatch:
        """Normalised clips, or what is known of them, on ``device``."""
        ...


class BatchStream(Protocol):
    """An endless, numbered sequence of micro-batches of one rank."""

    def batches(self, start: int = 0) -> Iterator[CompactSamples]:
        """Micro-batches ``start``, ``start + 1``, …; the same ones whenever it is asked again."""
        ...


@dataclass(frozen=True)
class StepEvent:
    """What a progress display is told after every step (on rank 0).

    Attributes:
        step: Steps done, of ``steps``.
        loss: Mean over ranks and accumulation.
        lr: Rate at this step of the parameters that have no factor of their own.
        grad_norm: Global norm before clipping.
        clips_per_second: Over all ranks, this step.
        logs: The model's own scalars, averaged likewise.
        validation: Metrics, after steps that validate.
        stall: Share of the step that was spent waiting for data (mean over ranks).
        skipped: Left out, as something was not finite: loss and norm are NaN.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float
    clips_per_second: float
    logs: dict[str, float]
    validation: dict[str, float] | None = None
    stall: float = 0.0
    skipped: bool = False

    def row(self, clips: int, seconds: float) -> dict[str, Any]:
        """For ``metrics.jsonl``: the step, and clips and seconds of the run so far."""
        row: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            **self.logs,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "clips": clips,
            "seconds": round(seconds, 3),
            "clips_per_second": round(self.clips_per_second, 3),
            "stall": round(self.stall, 4),
        }
        return {**row, "skipped": True} if self.skipped else row


@dataclass
class TrainerInputs:
    """Everything a run needs.

    Attributes:
        model: ``model(batch) -> (loss, logs)``. Training changes it in place (at ZeRO 3 it is
            useless afterwards): read the result from ``out/model``.
        recipe: Its ``train`` section drives the loop; all of it is stored.
        out: Run folder; the same folder resumes.
        loader_for: ``(world, clips per micro-batch) -> stream`` of this rank.
        world: This process among the ranks.
        validate: ``(model, device) -> metrics``; called in ``eval()`` without gradients on every
            rank (ZeRO 3 needs all of them), which may use any method of the model; rank 0's
            answer counts. Cast clips to the dtype of the
            model's parameters. ``train.monitor`` says which metric decides what is the best.
        on_step: Called on rank 0 after every step.
        contract, tasks, seen_runs: Stored with the exported model.
        features: Made before the first step, removed after the export; its streams then stand in
            for those of ``loader_for``, which must be :class:`fmrizoo.data.loader.Loader`.
        measured_only: Steps are taken for their times: metrics are written, nothing is saved or
            exported, and the same call begins anew.
    """

    model: nn.Module
    recipe: Recipe
    out: Path
    loader_for: Callable[[World, int], BatchStream]
    world: World
    validate: Callable[[nn.Module, torch.device], dict[str, float]] | None = None
    on_step: Callable[[StepEvent], None] | None = None
    contract: Contract | None = None
    tasks: tuple[TaskSpec, ...] = ()
    seen_runs: Sequence[str] = ()
    features: FeatureCache | None = None
    measured_only: bool = False


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        metrics: Last row of metrics.jsonl.
        validation: Last validation, if any.
        best_validation: The best by ``train.monitor`` (the last, where none has that metric).
        best_step: Its step; 0 without validations.
        step: Optimizer steps done in all.
        resumed_from: Step of the checkpoint that this call started from; None: from scratch.
        seconds: Training time over all starts.
        checkpoints: Whole checkpoints, newest first.
        model: Folder of the exported weights; None when interrupted, or only measured.
        interrupted: A signal stopped the run before its end.
        already_finished: Nothing was left to do.
        stopped_early: The validations no longer got better (``train.patience``).
        accounting: What trained; None where nothing was left to do.
    """

    metrics: dict[str, Any]
    validation: dict[str, float] | None
    best_validation: dict[str, float] | None
    step: int
    resumed_from: int | None
    seconds: float
    checkpoints: tuple[Path, ...]
    model: Path | None
    interrupted: bool = False
    already_finished: bool = False
    best_step: int = 0
    stopped_early: bool = False
    accounting: Accounting | None = None

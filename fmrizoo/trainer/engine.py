"""A model, its optimizer and DeepSpeed: accumulate, step, snapshot, restore, export.

What is decided here because DeepSpeed's own defaults would change the result silently (its config
is made in :mod:`fmrizoo.trainer.zero`):

- The optimizer is PyTorch's own AdamW: a config-built one would be compiled at first use.
- No scheduler in the config: several of them give every group one rate. The loop sets
  ``rate of the group × factor``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fmrizoo.config import TrainConfig
from fmrizoo.errors import RecipeError, TrainingError
from fmrizoo.trainer.compiling import (
    check_gathered,
    compiled,
    hide_gathering,
    set_compile,
)
from fmrizoo.trainer.construction import partition, share
from fmrizoo.trainer.device import World, load_deepspeed
from fmrizoo.trainer.fragments import WEIGHT, Fragment, Fragments
from fmrizoo.trainer.groups import groups_sentence as groups_sentence
from fmrizoo.trainer.groups import param_groups as param_groups
from fmrizoo.trainer.sharded import Sharded, Snapshot, take
from fmrizoo.trainer.zero import DTYPES, deepspeed_config, optimizer_kind, zero_stage
from fmrizoo.types import Batch, ReadBatch

log = logging.getLogger(__name__)


def set_checkpointing(model: nn.Module, mode: str) -> None:
    """Tell the backbone (or a model without one) to recompute activations in the backward pass.

    Raises:
        RecipeError: it cannot, and ``mode`` is not ``none``.
    """
    backbone = getattr(model, "backbone", model)
    if callable(switch := getattr(backbone, "set_checkpointing", None)):
        switch(mode)
    elif mode != "none":
        raise RecipeError(
            f"train.checkpointing={mode} but {type(backbone).__name__} cannot recompute "
            f"activations; use train.checkpointing=none"
        )


class Engine:
    """DeepSpeed around ``model``, which it changes in place (dtype, and at stage 3 partitioning).

    Args:
        model: ``model(batch) -> (loss, logs)``.
        train: The recipe's ``train`` section.
        world: After :func:`fmrizoo.trainer.device.init_distributed`.
        device: Where this rank computes.

    Attributes:
        dtype: Of the weights while training, and so of the clips.
        stage: ZeRO stage in effect.
        parameters: Number of parameters, frozen ones included.
        groups: What the optimizer's groups are, in one sentence.
        fragments: What of the training's state this rank holds.
        lr: Base rate (factor 1 of :func:`param_groups`) of the last step; 0 before the first.
    """

    def __init__(
        self, model: nn.Module, train: TrainConfig, world: World, device: torch.device
    ) -> None:
        self._deepspeed = load_deepspeed(device)
        self.model = model
        self.device = device
        self.dtype = DTYPES[train.precision]
        self.stage = zero_stage(train, world.size)
        self._kind = optimizer_kind(train, world.size)
        gathered = train.compile != "none" and self._kind == "parts"
        if gathered:
            check_gathered(model)
        if self.stage != train.zero_stage:
            more = self.stage > train.zero_stage
            why = "stage 0 would step wrongly" if more else "one rank has nobody to share with"
            log.info("zero_stage=%d runs as stage %d: %s", train.zero_stage, self.stage, why)
        self._main = world.main
        self._exact = self._high_precision_copy(world)
        # Before parameters are taken apart: then they have no shape.
        self.parameters = sum(p.numel() for p in model.parameters())
        groups = param_groups(model, train)
        self._base, self._rates = train.lr, [float(g["lr"]) for g in groups]
        self.groups = groups_sentence(groups, train)
        self.lr = 0.0
        total = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = deepspeed_config(train, world, total)
        if self.stage == 3:
            partition(model, world, device, self.dtype, self._deepspeed.zero, config)
        else:
            share(model, world, device, self.dtype)
        first, second = train.betas
        # One pass over memory instead of some ten: the loop that PyTorch takes on a CPU by itself
        # is four times slower. Elsewhere its own choice (foreach) stands.
        fused = True if device.type == "cpu" else None
        optimizer = torch.optim.AdamW(groups, betas=(first, second), eps=train.eps, fused=fused)
        self._compile = train.compile
        set_compile(model, train.compile, device)
        self._engine, *_ = self._deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        if gathered:
            hide_gathering(self._engine.optimizer)
        if world.size == 1 and self._kind in ("plain", "bf16"):
            # DeepSpeed would copy all gradients into a bucket, reduce that over one rank, and copy
            # them back: a sixth of a step of 51M parameters. (At the other stages the reduction
            # also brings gradients to where the optimizer looks for them.)
            self._engine.enable_backward_allreduce = False
        self.fragments = Fragments(model, self._engine, self.stage, world.rank)
        self._ema = train.ema
        if train.ema:
            self.fragments.start_means()

    def _high_precision_copy(self, world: World) -> dict[str, Tensor]:
        """fp32 values of what is not trained (bf16 rounds them in place), for the export."""
        if self.dtype == torch.float32 or not world.main:
            return {}
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        buffers = {name for name, _ in self.model.named_buffers(remove_duplicate=False)}
        # Parameters are not copied: in bf16 the model gets new tensors and lets go of these.
        return {
            name: value.detach().cpu().clone() if name in buffers else value.detach().cpu()
            for name, value in self.model.state_dict().items()
            if name not in trained and value.is_floating_point()
        }

    def accumulate(self, batch: Batch | ReadBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward and backward of one micro-batch; returns the unscaled loss and the logs.

        After the last micro-batch of a step the gradients are the mean over micro-batches and
        ranks (left to :meth:`step` at ZeRO 1–3).
        """
        self._advance()
        with compiled(self._compile):
            loss, logs = self._engine(batch)
            self._engine.backward(loss)
        self._pending = True
        return loss.detach(), logs

    _pending = False

    def _advance(self) -> None:
        # DeepSpeed counts micro-batches in its step(): between two of them it only counts.
        if self._pending:
            self._engine.step()
            self._pending = False

    def step(self, factor: float) -> float:
        """Optimizer step at ``rate × factor`` of each group; returns the norm before clipping.

        Raises:
            TrainingError: a gradient is not finite. Weights and optimizer are as before, and the
                gradients are dropped.
        """
        for group, rate in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.lr = self._base * factor
        norm = self._own_norm() if self.stage == 0 else None
        if norm is not None and not math.isfinite(norm):
            self.skip()
        else:
            self._advance()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        # DeepSpeed writes -1 or inf where the norm was not finite, and skips such a step silently.
        if not 0 <= norm < float("inf"):
            if self.stage > 0 and self._engine.was_step_applied():
                raise RuntimeError(f"DeepSpeed stepped with a gradient of norm {norm}")
            self._drop_sums()
            raise TrainingError("the gradient is not finite")
        if self._ema:
            # Short at first, so that the random start is soon forgotten.
            updates = self.updates
            self.fragments.average(min(self._ema, (1 + updates) / (10 + updates)))
        return norm

    def skip(self) -> None:
        """In place of :meth:`step`: drop the gradients; weights and optimizer stay as they are.

        DeepSpeed cleans up after a step whose norm is not finite (sums of micro-batches, buckets,
        offloaded gradients), so it is told that this is one. At stage 0 it would take the step.
        """
        optimizer = self._engine.optimizer
        name, stand_in = _STAND_INS[self._kind]
        # On the instance: the class's own method shows again afterwards.
        before = vars(optimizer).get(name)
        setattr(optimizer, name, partial(stand_in, self.device))
        try:
            self._advance()
        finally:
            delattr(optimizer, name)
            if before is not None:
                setattr(optimizer, name, before)
        if self.stage > 0 and self._engine.was_step_applied():
            raise RuntimeError("DeepSpeed took a step that it was told to skip")
        self._drop_sums()

    def _drop_sums(self) -> None:
        """After a step that was not taken: DeepSpeed keeps its sums where states are offloaded.

        It would add the next step's gradients to them.
        """
        if self._kind == "flat":
            sums = self._engine.optimizer.averaged_gradients
            for group in sums:
                sums[group] = None

    def timed(self, around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put ``around(phase, work)`` in place of forward, backward and step."""
        phases = ((self._engine, "forward"), (self._engine, "backward"), (self, "step"))
        for owner, name in phases:
            phase = "optimizer" if name == "step" else name
            setattr(owner, name, around(phase, getattr(owner, name)))

    def _own_norm(self) -> float:
        """Global gradient norm where DeepSpeed offers none: stage 0, with whole gradients."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])))

    @property
    def updates(self) -> int:
        """Optimizer steps taken; fewer than the run's where some were skipped."""
        return self.fragments.steps

    def snapshot(self) -> Snapshot:
        """A copy of what this rank writes into a checkpoint; all ranks' together are whole."""
        return take(self._kept())

    def _kept(self) -> Iterator[Fragment]:
        """What this rank writes, with the fp32 values of what bf16 merely rounded."""
        for part in self.fragments.written():
            if part.trained or self.dtype == torch.float32:
                yield part
            elif self._main:
                # Rank 0 has these whole, also where ZeRO 3 deals the rounded ones over ranks.
                exact = self._exact.get(part.name)
                if exact is None or part.numel == exact.numel():
                    live = part.tensors[WEIGHT].cpu().view(part.shape)
                    exact = self._unrounded(part.name, live)
                yield replace(part, numel=exact.numel(), tensors={WEIGHT: exact.reshape(-1)})

    def restore(self, stored: Sharded, told: Callable[[], object] | None = None) -> None:
        """Inverse of :meth:`snapshot`, on a freshly made engine of any world size and stage.

        Args:
            stored: What snapshots were written to.
            told: Called before each tensor.

        Raises:
            CheckpointError: the checkpoint belongs to another model, or a file is unreadable.
        """
        stored.check_model(self._shapes())
        if stored.steps:
            self.fragments.begin(stored.steps)

        def parts() -> Iterator[Fragment]:
            for part in self.fragments.here():
                if told is not None:
                    told()
                yield part

        stored.restore(parts())
        self.fragments.refresh()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parameters and buffers, parts of ZeRO 3 as they are when whole."""
        shared = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        shapes = {
            name: tuple(getattr(p, "ds_shape", p.shape))
            for name, p in self.model.named_parameters()
        }
        buffers = self.model.state_dict()
        return shapes | {n: tuple(v.shape) for n, v in buffers.items() if n not in shared}

    def averaged(self) -> AbstractContextManager[None]:
        """While this lasts the model has the running means of its weights, if it keeps them."""
        return self.fragments.averaged()

    def whole(self) -> AbstractContextManager[Any]:
        """While this lasts every parameter is whole on every rank (ZeRO 3 takes them apart).

        DeepSpeed brings a partitioned parameter together when the ``forward`` of the module that
        holds it is called, or that of the whole model. Validation calls other methods as well.
        """
        if self.stage < 3:
            return nullcontext()
        gathered = self._deepspeed.zero.GatheredParameters(list(self.model.parameters()))
        return cast(AbstractContextManager[Any], gathered)

    def learned(self) -> set[str]:
        """Names of what training may change: trained parameters, and all buffers."""
        frozen = {
            name
            for name, p in self.model.named_parameters(remove_duplicate=False)
            if not p.requires_grad
        }
        return set(self.model.state_dict()) - frozen

    def weights(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """fp32 (or integer) value of every parameter and buffer, one after the other.

        Every rank must iterate: at stage 3 and in bf16 the values are gathered one at a time.
        Tensors of rank 0 are on the CPU and complete.

        Args:
            names: Only these (the same on every rank); None: all.
        """
        gathered = self._deepspeed.zero.GatheredParameters
        whole = self._deepspeed.utils.safe_get_full_fp32_param
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        for name in self.model.state_dict():
            if names is not None and name not in names:
                continue
            if name in parameters and parameters[name].requires_grad and self.stage > 0:
                yield name, whole(parameters[name]).detach().cpu()
            elif name in parameters and self.stage == 3:
                with gathered([parameters[name]]):
                    value = parameters[name].detach().cpu().clone()
                yield name, self._unrounded(name, value)
            else:
                value = parameters[name] if name in parameters else buffers[name]
                yield name, self._unrounded(name, value.detach().cpu().clone())

    def _unrounded(self, name: str, value: Tensor) -> Tensor:
        """The fp32 original of a value that bf16 merely rounded; others widened to fp32."""
        exact = self._exact.get(name)
        if exact is not None and torch.equal(exact.to(value.dtype), value):
            return exact
        return value.float() if value.is_floating_point() else value

    def close(self) -> None:
        """Let go of gradients, optimizer state and hooks."""
        self._engine.destroy()


def _no_step(device: torch.device, closure: None = None) -> None:
    """Stands in for the optimizer's ``step``."""


def _infinite_norm(device: torch.device) -> Tensor:
    """Stands in for the global norm of ZeRO 1 and 2."""
    return torch.tensor(float("inf"), device=device)


def _infinite_gradients(device: torch.device) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Stands in for the gradients that the norm is of, where DeepSpeed keeps fp32 sums of all."""
    return [_infinite_norm(device)], {}


def _infinite_norms(device: torch.device) -> list[Tensor]:
    """Stands in for the norms by group of ZeRO 3."""
    return [_infinite_norm(device)]


# By kind: the method of DeepSpeed's optimizer that decides, and what replaces it for one call.
_STAND_INS: dict[str, tuple[str, Callable[..., Any]]] = {
    "plain": ("step", _no_step),
    "bf16": ("get_grads_for_norm", _infinite_gradients),
    "flat": ("scaled_global_norm", _infinite_norm),
    "parts": ("_get_norm_groups", _infinite_norms),
}

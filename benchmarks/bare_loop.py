"""The training step that the engine stands for, written out in plain PyTorch: one rank, one batch.

As fast as it is written by somebody who knows PyTorch: gradients and fp32 master weights keep their
memory, casts are foreach copies, and AdamW is the quickest of PyTorch's three (:func:`quickest`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fmrizoo.config import TrainConfig
from fmrizoo.trainer.engine import param_groups
from fmrizoo.trainer.zero import DTYPES
from fmrizoo.types import Batch

KINDS: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
}


def quickest(sizes: list[torch.Size], repeats: int = 3) -> str:
    """Which of PyTorch's AdamWs takes the least CPU time for parameters of these ``sizes``."""
    spent = {}
    for kind, choice in KINDS.items():
        made = [nn.Parameter(torch.zeros(size)) for size in sizes]
        for parameter in made:
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(made, **choice)
        optimizer.step()
        began = time.process_time()
        for _ in range(repeats):
            optimizer.step()
        spent[kind] = time.process_time() - began
    return min(spent, key=lambda kind: spent[kind])


class BareLoop:
    """``model`` with AdamW and clipping; bf16 weights have fp32 masters.

    Args:
        model: ``model(batch) -> (loss, logs)``; changed in place (dtype).
        train: The recipe's ``train`` section.
        kind: Of AdamW.
        around: ``around(phase)`` is a context that times a phase.
        wrap: Around the model, for several ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        kind: str,
        around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        self.dtype, self._clip, self._around = DTYPES[train.precision], train.clip_norm, around
        groups = param_groups(model, train)
        self._weights: list[nn.Parameter] = [p for g in groups for p in g["params"]]
        self._masters = self._weights
        if self.dtype != torch.float32:
            for group in groups:
                # DeepSpeed's masters begin as the rounded weights: so do these, to compare losses.
                rounded = [p.detach().to(self.dtype).float() for p in group["params"]]
                group["params"] = [nn.Parameter(value) for value in rounded]
            self._masters = [p for g in groups for p in g["params"]]
            for master in self._masters:
                master.grad = torch.zeros_like(master)
            model.to(self.dtype)
        self.model = wrap(model)
        self._rates = [float(group["lr"]) for group in groups]
        first, second = train.betas
        self._optimizer = torch.optim.AdamW(
            groups, betas=(first, second), eps=train.eps, **KINDS[kind]
        )

    def step(self, batch: Batch, factor: float) -> Tensor:
        """Forward, backward, clip, AdamW at ``rate × factor``; returns the loss."""
        with self._around("forward"):
            loss, _ = self.model(batch)
        with self._around("backward"):
            loss.backward()
        with self._around("optimizer"):
            self._update(factor)
        return loss.detach()

    @torch.no_grad()
    def _update(self, factor: float) -> None:
        apart = self._masters is not self._weights
        if apart:
            # A parameter that took no part has no gradient: zero, as in the engine.
            used = [p.grad is not None for p in self._weights]
            sums = [m.grad for m, u in zip(self._masters, used, strict=True) if u]
            torch._foreach_copy_(sums, [p.grad for p in self._weights if p.grad is not None])
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._masters, self._clip, foreach=True)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()
        if apart:
            torch._foreach_copy_(self._weights, self._masters)
        for parameter in self._weights:
            parameter.grad = None

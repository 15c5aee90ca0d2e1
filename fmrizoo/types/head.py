"""What every head offers.

Shape letters: ``b`` samples, ``o`` outputs of all targets together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from fmrizoo.types.backbone import Backbone
from fmrizoo.types.features import Features
from fmrizoo.types.task import KINDS, TaskSpec


class Head(nn.Module):
    """Base of every head. It owns what it adds after the encoder and what of the encoder trains.

    Built as ``factory(config, backbone=backbone, tasks=tasks)``. ``forward`` goes in two steps so
    that a frozen encoder has to run only once per clip: ``read`` (no parameters, no dropout) and
    ``answer``.

    Attributes:
        needs: Properties that ``Backbone.supports`` must hold.
        kinds: Kinds of targets that it can learn.
        variants: Settings that differ in what trains: one row each in tables of heads.
        tasks: Its targets; the outputs of all lie side by side, in this order.
        stages: Stages of the encoder that it reads (negative: from the end).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[frozenset[str]] = frozenset(KINDS)
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    tasks: tuple[TaskSpec, ...]
    stages: tuple[int, ...] = (-1,)

    @property
    def trains(self) -> str:
        """What of the encoder trains, in one word for tables: ``none``, ``all``, ``lora``, …"""
        raise NotImplementedError

    def attach(self, backbone: Backbone) -> None:
        """Make the encoder ready (called once, before the optimizer).

        Sets ``requires_grad`` of its parameters and puts into it what has to sit inside of it.

        Raises:
            RecipeError: the encoder has not what this head needs.
        """
        raise NotImplementedError

    def release(self, backbone: Backbone) -> None:
        """Turn an encoder after :meth:`attach` into a plain one with what was learned merged in.

        What cannot be merged (prompts) is left out.
        """

    def encoder_trains(self) -> bool:
        """False: nothing that trains lies before the features, which may be computed once."""
        raise NotImplementedError

    def trained_modules(self, backbone: Backbone) -> tuple[nn.Module, ...]:
        """Parts of the encoder that follow ``train()``; all others stay in ``eval()``."""
        return ()

    def prompts(self) -> Sequence[Tensor] | None:
        """Learned tokens for ``Backbone.encode_stages``."""
        return None

    def lr_scales(self, backbone: Backbone) -> Mapping[str, float]:
        """Factor on the learning rate of the encoder's parameters by name; 1 where not named."""
        return {}

    def read(self, stages: Sequence[Features]) -> tuple[Tensor, ...]:
        """What is needed of the features of ``stages``, ``(b, …)`` each."""
        raise NotImplementedError

    def answer(self, read: Sequence[Tensor]) -> Tensor:
        """What :meth:`read` returned → ``(b, o)`` outputs (logits, scaled values)."""
        raise NotImplementedError

    def forward(self, stages: Sequence[Features]) -> Tensor:
        """``(b, o)`` outputs."""
        return self.answer(self.read(stages))

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Scalar training loss; ``target (b,)`` or ``(b, tasks)`` as ``TaskSpec.target_of``.

        NaN targets are missing and count for nothing.
        """
        raise NotImplementedError

    def scores(self, outputs: Tensor) -> Tensor:
        """``(b, Σ TaskSpec.scores)`` fp32: logits, log-probabilities of levels, or values in the
        target's own unit."""
        raise NotImplementedError

    def export(self, backbone: Backbone, folder: Path) -> None:
        """Write what can be used apart from the encoder (adapters) below a run's ``folder``."""

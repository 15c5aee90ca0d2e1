"""What trains, what is frozen, and what the optimizer needs, without allocating anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from torch import nn

from fmrizoo.config import TrainConfig
from fmrizoo.trainer.zero import zero_stage

MB = 2**20  # bytes, as the other tables of memory count them
_NAMES = ("head", "objective")


@dataclass(frozen=True)
class Accounting:
    """Parameters of a model by what becomes of them, and bytes of training on one rank.

    Attributes:
        encoder: Parameters of the encoder itself, trained or not.
        encoder_trained: Those of them that train.
        added_trained: Parameters that train and are none of the encoder's own: of the head or the
            objective, prompts and low-rank adapters included wherever they sit.
        frozen: Parameters that do not train, of either kind.
        added: What adds them: ``head`` or ``objective``; ``model`` where there is no encoder.
        optimizer_bytes: AdamW's two fp32 moments of each trained parameter, and in bf16 its fp32
            master weight; from ZeRO stage 1 on divided over the ranks.
        gradient_bytes: fp32 sums of the gradients; from ZeRO stage 2 on divided over the ranks.
    """

    encoder: int
    encoder_trained: int
    added_trained: int
    frozen: int
    added: str
    optimizer_bytes: int
    gradient_bytes: int

    @property
    def trained(self) -> int:
        """All parameters that train."""
        return self.encoder_trained + self.added_trained

    @property
    def encoder_share(self) -> float:
        """Percent of the encoder's parameters that train."""
        return 100 * self.encoder_trained / self.encoder if self.encoder else 0.0

    def sentence(self) -> str:
        """For the log."""
        if not self.encoder:
            parts = f"trains {count(self.trained)} parameters"
        else:
            parts = (
                f"trains {count(self.encoder_trained)} of {count(self.encoder)} encoder parameters "
                f"({self.encoder_share:.1f} %) and {count(self.added_trained)} of the {self.added}"
            )
        return f"{parts}; optimizer {megabytes(self.optimizer_bytes)} on each rank"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the percentage included."""
        return {**asdict(self), "encoder_share": round(self.encoder_share, 3)}


def account(model: nn.Module, train: TrainConfig, world_size: int = 1) -> Accounting:
    """Count what ``model`` trains under ``train``.

    Args:
        model: A backbone (``model.backbone``) with a head or an objective, or any module; also on
            the meta device. Not partitioned by ZeRO 3 yet.
        train: Its ``precision`` and ``zero_stage`` decide the bytes.
        world_size: Ranks that share them.
    """
    backbone = getattr(model, "backbone", None)
    own = set(_own(backbone)) if isinstance(backbone, nn.Module) else set()
    encoder = encoder_trained = added_trained = frozen = 0
    for parameter in model.parameters():
        size = parameter.numel()
        mine, trains = id(parameter) in own, parameter.requires_grad
        encoder += size * mine
        encoder_trained += size * (mine and trains)
        added_trained += size * (trains and not mine)
        frozen += size * (not trains)
    stage, trained = zero_stage(train, world_size), encoder_trained + added_trained
    words = 3 if train.precision == "bf16" else 2
    return Accounting(
        encoder=encoder,
        encoder_trained=encoder_trained,
        added_trained=added_trained,
        frozen=frozen,
        added=next((name for name in _NAMES if hasattr(model, name)), "model"),
        optimizer_bytes=4 * words * (ceil(trained / world_size) if stage >= 1 else trained),
        gradient_bytes=4 * (ceil(trained / world_size) if stage >= 2 else trained),
    )


def _own(backbone: nn.Module) -> Iterator[int]:
    """Identities of the encoder's own parameters: not of adapters wrapped around its layers."""
    # A wrapper keeps what it wraps as `base_layer` (PEFT's name); all else in it is the wrapper's.
    wrappers = [n for n, m in backbone.named_modules() if hasattr(m, "base_layer")]
    for name, parameter in backbone.named_parameters():
        inside = [w for w in wrappers if name.startswith(f"{w}.")]
        if all(name.startswith(f"{w}.base_layer.") for w in inside):
            yield id(parameter)


def count(number: int) -> str:
    """``14.2 M``, ``1.5 k``, ``312``."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        # 999_960 is 1.0 M, not 1000.0 k.
        if number >= size * 0.99995:
            return f"{number / size:.1f} {unit}"
    return str(number)


def megabytes(size: int) -> str:
    """``108 MB``, ``1.3 MB``, ``0.011 MB`` (2²⁰ bytes)."""
    value = size / MB
    return f"{value:.0f} MB" if value >= 10 else f"{value:.2g} MB"

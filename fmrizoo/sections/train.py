"""The sections ``train`` and ``sweep``: optimisation, and which models a sweep trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fmrizoo.sections.checks import one_of, require

CHECKPOINTING = ("none", "block", "window-chunk")
OFFLOAD = ("none", "optimizer", "parameters")
COMPILE = ("none", "blocks", "model")


@dataclass
class TrainConfig:
    """Optimisation; every value is for the whole job, whatever its world size."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 8  # clips per optimizer step over all ranks
    accumulate: int = 1  # gradient accumulation: batch_size = ranks × accumulate × micro-batch
    max_micro_batch: int = 0  # clips a rank takes at a time; accumulates as it must; 0: no limit
    lr: float = 1e-4  # peak learning rate
    warmup: float = 0.01  # share of the steps with linearly rising rate
    min_lr_ratio: float = 0.01  # the cosine ends at lr × this
    weight_decay: float = 0.01  # AdamW, on matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW
    eps: float = 1e-8  # AdamW
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off
    ema: float = 0.0  # per-step decay of running means of the weights, used and exported; 0: none
    precision: str = "fp32"  # fp32 | bf16 (bf16 weights, fp32 master weights and gradient sums)
    zero_stage: int = 1  # DeepSpeed ZeRO 0–3 (one rank runs the plainest that is the same)
    offload: str = "none"  # none | optimizer | parameters: what lies in the host's memory instead
    compile: str = "none"  # torch.compile: none | blocks (each by itself) | model (as a whole)
    checkpointing: str = "none"  # activations: none | block | window-chunk: recomputed backward
    seed: int = 0  # initialisation, order, masks, dropout
    log_every: int = 1  # steps between two lines of metrics.jsonl
    save_every: int = 0  # steps between two checkpoints; 0: at the end only
    validate_every: int = 0  # steps between two validations; 0: at the end only
    monitor: str = "loss"  # validation metric that says which weights are the best
    patience: int = 0  # validations without a better one before training stops; 0: never
    keep_best: bool = False  # export the weights of the best validation, not the last ones
    cache_features: bool = False  # frozen encoder: run it once per clip, then train the head alone
    keep: int = 2  # checkpoints kept
    async_save: bool = True  # write checkpoints while training goes on (needs memory for a copy)
    device: str = "auto"  # auto | cpu | cuda | xpu
    not_finite: str = "stop"  # stop | skip: after a loss or gradient that is NaN or infinite
    max_skips: int = 10  # with skip: steps of a run that may be left out before it stops
    hang_minutes: float = 20.0  # without a sign of life before a rank ends with code 75; 0: never
    profile: bool = False  # time the phases of every step: profile.json and trace.json.gz

    def __post_init__(self) -> None:
        require(
            self.max_micro_batch >= 0,
            f"train.max_micro_batch must be ≥ 0, got {self.max_micro_batch}",
        )
        require(
            not (self.max_micro_batch and self.accumulate > 1),
            f"train.accumulate={self.accumulate} and train.max_micro_batch="
            f"{self.max_micro_batch} both set the accumulation: give one of them",
        )
        one_of("train.precision", self.precision, ("fp32", "bf16"))
        one_of("train.checkpointing", self.checkpointing, CHECKPOINTING)
        one_of("train.offload", self.offload, OFFLOAD)
        one_of("train.compile", self.compile, COMPILE)
        one_of("train.not_finite", self.not_finite, ("stop", "skip"))
        one_of("train.device", self.device, ("auto", "cpu", "cuda", "xpu"))
        require(self.zero_stage in (0, 1, 2, 3), f"train.zero_stage is 0–3, got {self.zero_stage}")
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        require(
            self.zero_stage >= least,
            f"train.offload={self.offload} needs train.zero_stage"
            f"{'=3' if least == 3 else ' 1, 2 or 3'}, got {self.zero_stage}",
        )
        for key in ("steps", "batch_size", "accumulate", "log_every", "keep"):
            value = getattr(self, key)
            require(value >= 1, f"train.{key} must be ≥ 1, got {value}")
        for key in ("warmup", "min_lr_ratio"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"train.{key} is a share in [0, 1], got {value}")
        not_negative = (
            "weight_decay",
            "clip_norm",
            "save_every",
            "validate_every",
            "patience",
            "max_skips",
            "hang_minutes",
        )
        for key in not_negative:
            value = getattr(self, key)
            require(value >= 0, f"train.{key} must be ≥ 0, got {value}")
        require(0 <= self.ema < 1, f"train.ema is a decay in [0, 1), got {self.ema}")
        for key in ("lr", "eps"):
            value = getattr(self, key)
            require(value > 0, f"train.{key} must be > 0, got {value}")
        for key in ("patience", "keep_best"):
            require(
                not getattr(self, key) or self.validate_every > 0,
                f"train.{key}={getattr(self, key)} needs validations on the way: set "
                "train.validate_every",
            )
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"train.betas needs two numbers in [0, 1), got {list(self.betas)}",
        )


SWEEP_LOSSES = ("validation", "train")


@dataclass
class SweepConfig:
    """Which models `mup transfer` and `scaling sweep` train; everything else is the recipe's."""

    widths: list[int] = field(
        default_factory=list
    )  # backbone.embed_dim; heads grow in number with it. Empty: 1, 2, 4 and 8 times the base
    rates: list[float] = field(
        default_factory=list
    )  # transfer: train.lr; empty: 2^-2 … 2^2 times the recipe's. Goes on while the last is best
    samples: list[int] = field(
        default_factory=list
    )  # scaling: clips seen in training (steps × batch); every schedule ends at its own
    units: list[int] = field(
        default_factory=lambda: [0]
    )  # scaling: training units (split.train_units); 0: all
    variants: dict[str, list[str]] = field(
        default_factory=dict
    )  # scaling: name → overrides, such as of data; one law each
    seeds: int = 1  # trainings of every setting, train.seed and on
    loss: str = "validation"  # validation | train (mean over the last tenth of the steps)

    def __post_init__(self) -> None:
        one_of("sweep.loss", self.loss, SWEEP_LOSSES)
        require(self.seeds >= 1, f"sweep.seeds must be ≥ 1, got {self.seeds}")
        for key, least in (("widths", 1), ("samples", 1), ("units", 0)):
            values = getattr(self, key)
            require(
                all(value >= least for value in values),
                f"sweep.{key} needs numbers ≥ {least}, got {list(values)}",
            )
        for key in ("widths", "rates", "samples", "units"):
            values = getattr(self, key)
            require(
                len(set(values)) == len(values), f"sweep.{key} has a value twice: {list(values)}"
            )
        require(
            all(0 < rate < math.inf for rate in self.rates),
            f"sweep.rates needs positive numbers, got {list(self.rates)}",
        )
        require(bool(self.units), "sweep.units is empty: give 0 for all training units")
        for name in self.variants:
            require(
                bool(name) and all(c.isalnum() or c in "-_." for c in name) and name[0] != ".",
                f"sweep.variants: {name!r} becomes a folder: use letters, digits, - and _",
            )

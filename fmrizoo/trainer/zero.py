"""What DeepSpeed is told: micro-batches, the ZeRO stage that runs, and its config.

What is decided here because DeepSpeed's own defaults would change the result silently:

- ZeRO stage 0 with bf16 takes one optimizer step with empty gradients before training (weights
  decay once, Adam starts at its second step), so that pair runs as stage 1, which is the same
  arithmetic.
- bf16 gradients are summed over micro-batches and ranks in fp32. That takes three settings:
  ``grad_accum_dtype`` (stages 2 and 3), ``immediate_grad_update`` (stage 1, which otherwise adds
  micro-batches up in bf16 all the same) and ``communication_data_type`` (ranks).
- Clipping is always written into the config (its default is 1.0, not off).

And one thing because it costs: stages 1–3 divide states among ranks. One rank has nobody to divide
them with, but DeepSpeed would still copy its gradients through buckets and keep a second copy of
fp32 weights: 30–50 % of a step of 51M parameters (docs/throughput.md). So one rank runs the
plainest stage that is the same arithmetic, unless states are offloaded. A recipe for many ranks
then runs on a laptop at a laptop's cost.
"""

from __future__ import annotations

from typing import Any

import torch

from fmrizoo.config import TrainConfig
from fmrizoo.errors import RecipeError
from fmrizoo.trainer.device import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUCKET = 200_000_000  # numbers that are reduced or gathered at a time
STAGES_ALONE = False  # one rank runs the stage it is told: set by tests of the stages themselves


def accumulation(train: TrainConfig, world: World) -> int:
    """Micro-steps per optimizer step: ``accumulate``, or as few as ``max_micro_batch`` allows."""
    if not train.max_micro_batch:
        return train.accumulate
    per_rank = max(1, train.batch_size // world.size)
    divisors = (n for n in range(1, per_rank + 1) if per_rank % n == 0)
    return next(n for n in divisors if per_rank // n <= train.max_micro_batch)


def micro_batch(train: TrainConfig, world: World) -> int:
    """Clips per rank and micro-step.

    Raises:
        RecipeError: the batch cannot be divided over ranks and accumulation.
    """
    steps = accumulation(train, world)
    parts = world.size * steps
    if train.batch_size % parts:
        near = max(parts, round(train.batch_size / parts) * parts)
        raise RecipeError(
            f"train.batch_size={train.batch_size} cannot be divided over {world.size} ranks × "
            f"{steps} accumulation steps; use a multiple of {parts}, for example {near}"
        )
    return train.batch_size // parts


def zero_stage(train: TrainConfig, ranks: int) -> int:
    """The ZeRO stage that runs on so many ``ranks`` (see the module's notes)."""
    least = 1 if train.precision == "bf16" else 0
    if ranks == 1 and train.offload == "none" and not STAGES_ALONE:
        return least
    return max(train.zero_stage, least)


def optimizer_kind(train: TrainConfig, ranks: int) -> str:
    """Which of DeepSpeed's optimizers runs around AdamW on so many ``ranks``.

    ``plain`` none; ``bf16`` the one with fp32 sums of every gradient (stage 1 in bf16, nothing
    offloaded); ``flat`` the one of stages 1 and 2; ``parts`` that of stage 3.
    """
    stage = zero_stage(train, ranks)
    if stage in (0, 3):
        return "parts" if stage else "plain"
    direct = stage == 1 and train.precision == "bf16" and train.offload == "none"
    return "bf16" if direct else "flat"


def deepspeed_config(train: TrainConfig, world: World, parameters: int) -> dict[str, Any]:
    """DeepSpeed's config dict for a model of so many ``parameters``."""
    stage = zero_stage(train, world.size)
    # No larger than the model (DeepSpeed allocates them whole); it wants an even number.
    bucket = min(parameters + parameters % 2, BUCKET)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        # Small parameters stay whole on every rank; "small" is relative to the model.
        zero["stage3_param_persistence_threshold"] = min(100_000, parameters // 1000)
        zero["stage3_prefetch_bucket_size"] = bucket
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch(train, world),
        "gradient_accumulation_steps": accumulation(train, world),
        "gradient_clipping": float(train.clip_norm),
        "zero_optimization": zero,
        "bf16": {"enabled": train.precision == "bf16", "immediate_grad_update": True},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        # Offloaded states are updated by PyTorch's AdamW: DeepSpeed's own would be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    if stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config

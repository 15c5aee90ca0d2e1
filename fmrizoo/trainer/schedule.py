"""The learning-rate schedule: a factor in [0, 1] that multiplies every group's own rate."""

from __future__ import annotations

import math


def factor(step: int, steps: int, warmup: float, min_ratio: float) -> float:
    """Linear warm-up, then a cosine from 1 to ``min_ratio``.

    A factor, not a rate: groups with different rates keep their ratios through the whole run.

    Args:
        step: Optimizer step about to be taken, counted from 0.
        steps: Optimizer steps of the whole run.
        warmup: Share of ``steps`` with a linearly rising factor; the first step already learns
            (factor 1/n of n warm-up steps), the last warm-up step has factor 1.
        min_ratio: Factor of the last step.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: ``step`` lies outside ``0 .. steps - 1``.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be in 0..{steps - 1}, got {step}")
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    # The peak is the last warm-up step, or step 0 when there is none; the end is the last step.
    peak = max(rising - 1, 0)
    if steps - 1 == peak:
        return 1.0
    progress = (step - peak) / (steps - 1 - peak)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

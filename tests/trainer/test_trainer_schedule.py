"""The learning-rate factor against PyTorch's schedulers and its stated ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmrizoo.trainer.schedule import factor


def test_known_values() -> None:
    got = [factor(s, 11, 0.1, 0.0) for s in range(11)]
    # One warm-up step, then half a cosine over ten intervals.
    assert got[0] == 1.0
    assert got[5] == pytest.approx(0.5)
    assert got[10] == pytest.approx(0.0, abs=1e-12)
    assert [factor(s, 8, 0.5, 0.1) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(7, 8, 0.5, 0.1) == pytest.approx(0.1)


def test_cosine_equals_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=19, eta_min=0.2)
    for step in range(20):
        assert factor(step, 20, 0.0, 0.2) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    low=st.floats(0, 1),
)
def test_rises_once_then_falls_to_the_ratio(steps: int, warmup: float, low: float) -> None:
    values = [factor(s, steps, warmup, low) for s in range(steps)]
    assert all(0 <= v <= 1 + 1e-12 for v in values)
    peak = values.index(max(values))
    assert max(values) == pytest.approx(1.0)
    assert peak == max(round(warmup * steps) - 1, 0) or low == 1.0
    assert values[:peak] == sorted(values[:peak])
    assert values[peak:] == sorted(values[peak:], reverse=True) or low == 1.0
    if peak < steps - 1:
        assert values[-1] == pytest.approx(low)


def test_outside_the_run() -> None:
    for step in (-1, 10):
        with pytest.raises(ValueError, match=r"step must be in 0\.\.9"):
            factor(step, 10, 0.1, 0.1)

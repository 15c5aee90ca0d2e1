"""``Engine.skip`` with running means and offloading; its hold on DeepSpeed's private methods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_faults import InfiniteAt, skipping
from torch import Tensor
from trainer_tiny import ALONE, clips, inputs, reference, rows, train_config

from fmrizoo.errors import TrainingError
from fmrizoo.trainer.device import init_distributed
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.loop import train

WAYS = [(0, "none"), (1, "none"), (2, "none"), (3, "none")]
WAYS += [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
IN_BF16 = [(1, "none"), (1, "optimizer"), (2, "none"), (2, "optimizer"), (3, "parameters")]
BOTH = [(*way, "fp32") for way in WAYS] + [(*way, "bf16") for way in IN_BF16]
PRIVATE = {
    (1, "fp32"): "scaled_global_norm",
    (1, "bf16"): "get_grads_for_norm",
    (2, "fp32"): "scaled_global_norm",
    (3, "fp32"): "_get_norm_groups",
}


@contextmanager
def engine(infinite_at: int, **changes: Any) -> Iterator[Engine]:
    init_distributed(ALONE, torch.device("cpu"))
    made = Engine(InfiniteAt(infinite_at), train_config(**changes), ALONE, torch.device("cpu"))
    yield made
    made.close()


def accumulate(made: Engine, step: int) -> None:
    for k in range(2):
        made.accumulate(clips(8 * step + 4 * k, 4))


def state(made: Engine) -> dict[str, Tensor]:
    """Weights (those computed with, too), moments, means and count."""
    kept = {f"live {name}": value.clone() for name, value in made.weights()}
    for part in made.fragments.here():
        kept |= {f"{kind} {part.name}": value.clone() for kind, value in part.tensors.items()}
    return kept | {"updates": torch.tensor(made.updates)}


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("stage", "offload", "precision"), BOTH)
def test_means_and_offloaded_state_stay(
    stage: int, offload: str, precision: str, what: str
) -> None:
    """Same bits before and after; a bad loss has finite gradients, which are dropped."""
    never = 99
    same: dict[str, Any] = {"zero_stage": stage, "offload": offload, "precision": precision}
    with engine(never if what == "loss" else 2, ema=0.5, **same) as made:
        accumulate(made, 0)
        made.step(1.0)
        before = state(made)
        assert {"weight weight", "mean weight", "exp_avg weight"} <= before.keys()
        accumulate(made, 1)
        if what == "loss":
            made.skip()
        else:
            with pytest.raises(TrainingError, match="gradient is not finite"):
                made.step(1.0)
        after = state(made)
        assert before.keys() == after.keys()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        accumulate(made, 2)
        norm = made.step(1.0)
        assert math.isfinite(norm)
        later = state(made)
        assert [name for name in before if torch.equal(before[name], later[name])] == []
    with engine(never, ema=0.5, **same) as made:
        for step in (0, 2):
            accumulate(made, step)
            never_saw = made.step(1.0)
        assert norm == never_saw, "nothing of the bad step is in the next one"
        there = state(made)
        assert [name for name in later if not torch.equal(later[name], there[name])] == []


@pytest.mark.parametrize(("stage", "offload"), WAYS[1:])
def test_runs_with_means_never_saw_the_bad_steps(tmp_path: Path, stage: int, offload: str) -> None:
    """The exported mean is that of the updates taken, with the decays of their numbers."""
    train(skipping(tmp_path, zero_stage=stage, offload=offload, ema=0.9))
    got = rows(tmp_path)
    assert [row.get("skipped", False) for row in got] == [k in (2, 4) for k in range(6)]
    config = train_config(zero_stage=stage, offload=offload)
    left_out = frozenset({2, 4})
    want = reference(config, without=left_out)
    losses = [row["loss"] for row in got if not row.get("skipped")]
    assert losses == pytest.approx(want.losses, abs=1e-6)
    # The weights after each update are those of a plain loop that leaves the later steps out too.
    taken = [step for step in range(6) if step not in left_out]
    mean: dict[str, Tensor] = {}
    for number in range(len(taken) + 1):
        weights = reference(config, without=frozenset(range(6)) - set(taken[:number])).weights
        decay = min(0.9, (1 + number) / (10 + number)) if number else 0.0
        mean = {
            name: torch.lerp(mean[name].double(), value.double(), 1 - decay) if mean else value
            for name, value in weights.items()
        }
    exported, _ = read_model(tmp_path / "model")
    for name, value in mean.items():
        torch.testing.assert_close(
            exported[name], value.to(exported[name].dtype), atol=2e-6, rtol=0
        )


@pytest.mark.parametrize(("stage", "precision"), PRIVATE)
def test_renamed_method_of_deepspeed_is_noticed(
    stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the stand-in has no effect DeepSpeed takes the step; the run must not go on."""
    name = PRIVATE[stage, precision]
    with engine(99, zero_stage=stage, precision=precision) as made:
        kind = type(made._engine.optimizer)
        assert callable(getattr(kind, name, None)), f"DeepSpeed renamed {kind.__name__}.{name}"

        def elsewhere(self: object, key: str, value: object) -> None:
            object.__setattr__(self, "_unknown" if key == name else key, value)

        def gone(self: object, key: str) -> None:
            object.__delattr__(self, "_unknown" if key == name else key)

        accumulate(made, 0)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "__setattr__", elsewhere, raising=False)
            patch.setattr(kind, "__delattr__", gone, raising=False)
            with pytest.raises(RuntimeError, match="a step that it was told to skip"):
                made.skip()


def test_same_run_as_plain_inputs(tmp_path: Path) -> None:
    """Skipping where nothing is bad changes nothing."""
    train(inputs(tmp_path / "stop"))
    train(inputs(tmp_path / "skip", not_finite="skip"))
    a, _ = read_model(tmp_path / "stop" / "model")
    b, _ = read_model(tmp_path / "skip" / "model")
    assert all(torch.equal(a[name], b[name]) for name in a)

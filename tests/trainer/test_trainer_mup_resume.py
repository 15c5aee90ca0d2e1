"""muP's rates at the first step after a resume, through the real trainer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from test_trainer_mup import NAMES, batch_of, recipe_of
from torch import Tensor

from fmrizoo import pipeline
from fmrizoo.config import Recipe
from fmrizoo.trainer.device import World, init_distributed
from fmrizoo.trainer.engine import Engine, param_groups
from fmrizoo.trainer.inputs import StepEvent
from fmrizoo.trainer.schedule import factor
from fmrizoo.trainer.sharded import INDEX, Sharded, index_of, shard_name, write_shard
from fmrizoo.zoo import build_model

CPU = torch.device("cpu")
STEPS = 4


@dataclass
class Seen:
    """What every optimizer step of a run used and left behind."""

    rates: list[list[float]] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)

    def change(self, step: int) -> dict[str, Tensor]:
        """Of every parameter at ``step`` (counted from 0; the first has none before it)."""
        before, after = self.weights[step - 1], self.weights[step]
        return {name: after[name] - before[name] for name in after}


def rates(engine: Engine) -> list[float]:
    return [float(group["lr"]) for group in engine._engine.optimizer.param_groups]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    found = Seen()
    step: Callable[[Engine, float], float] = Engine.step
    restore = Engine.restore

    def noting(engine: Engine, part: float) -> float:
        norm = step(engine, part)
        found.rates.append(rates(engine))
        found.weights.append({n: v.clone() for n, v in engine.weights()})
        return norm

    def loading(engine: Engine, stored: Sharded, told: Callable[[], object] | None = None) -> None:
        restore(engine, stored, told)
        found.weights.append({n: v.clone() for n, v in engine.weights()})

    monkeypatch.setattr(Engine, "step", noting)
    monkeypatch.setattr(Engine, "restore", loading)
    yield found


def wanted(recipe: Recipe, step: int) -> list[float]:
    """Base rate × factor of the step × factor of the table, of every group."""
    train = recipe.train
    part = factor(step, train.steps, train.warmup, train.min_lr_ratio)
    model = build_model(recipe)
    rules = model.parametrization.groups(model)
    scales = {parameter: rules[name].lr_scale for name, parameter in model.named_parameters()}
    found = []
    for group in param_groups(model, train):
        (scale,) = {scales[p] for p in group["params"]}
        found.append(train.lr * scale * part)
    assert len({round(rate / found[0], 6) for rate in found}) == 2
    return found


PAIRS = [(name, objective, stage) for name in NAMES for objective in ("simmim", "ar")
         for stage in range(4)]  # fmt: skip
FAST = ("neuromamba", "simmim", 1)


@pytest.mark.parametrize(
    ("name", "objective", "stage"),
    [pytest.param(*p, marks=() if p == FAST else pytest.mark.slow) for p in PAIRS],
)
def test_the_step_after_a_resume_is_the_uninterrupted_runs(
    name: str, objective: str, stage: int, sample_store: Path, tmp_path: Path, seen: Seen
) -> None:
    """Rates to 1e-12; the change of every parameter within 1e-6 (of the largest change)."""
    more = [
        f"train.zero_stage={stage}",
        f"train.steps={STEPS}",
        "train.warmup=0.6",
        "train.lr=1e-3",
    ]
    recipe = recipe_of(name, objective, sample_store, *more)
    pipeline.pretrain(recipe, tmp_path / "whole")
    whole = Seen(list(seen.rates), list(seen.weights))
    seen.rates.clear()
    seen.weights.clear()

    def stop(event: StepEvent) -> None:
        if event.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert pipeline.pretrain(recipe, tmp_path / "cut", on_step=stop).interrupted
    taken = len(seen.rates)
    assert taken < STEPS
    del seen.weights[:]
    assert pipeline.pretrain(recipe, tmp_path / "cut").resumed_from == taken
    assert len(seen.rates) == STEPS
    for step in range(STEPS):
        assert seen.rates[step] == pytest.approx(wanted(recipe, step), rel=1e-12)
        assert seen.rates[step] == whole.rates[step]
    resumed = {n: seen.weights[1][n] - seen.weights[0][n] for n in seen.weights[0]}
    expected = whole.change(taken)
    assert resumed.keys() == expected.keys()
    largest = max(float(v.abs().max()) for v in expected.values())
    assert largest > 1e-5
    for key, value in expected.items():
        assert float((resumed[key] - value).abs().max()) <= 1e-6 * max(1.0, largest), key


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_rates_are_stored(stage: int, tmp_path: Path) -> None:
    """A resume has the rates of its recipe, and its step is the uninterrupted run's."""
    more = [f"train.zero_stage={stage}", "train.batch_size=2"]
    recipe = recipe_of("neuromamba", "simmim", "", *more)
    batch = batch_of(recipe)
    init_distributed(World(), CPU)

    def made() -> Engine:
        torch.manual_seed(0)
        return Engine(build_model(recipe).train(), recipe.train, World(), CPU)

    def stepped(engine: Engine) -> dict[str, Tensor]:
        engine.accumulate(batch)
        engine.step(0.5)
        return {n: v.clone() for n, v in engine.weights()}

    first = made()
    stepped(first)
    snapshot = first.snapshot()
    write_shard(tmp_path / shard_name(0), snapshot)
    (tmp_path / INDEX).write_text(json.dumps(index_of({0: snapshot.places}, first.updates)))
    assert {name.split(":")[0] for name in snapshot.tensors} == {"weight", "exp_avg", "exp_avg_sq"}
    expected = stepped(first)
    right = rates(first)
    first.close()
    again = made()
    for group in again._engine.optimizer.param_groups:
        group["lr"] = 123.0  # whatever is there is not used
    with Sharded(tmp_path) as stored:
        again.restore(stored)
    assert again.updates == 1
    result = stepped(again)
    assert rates(again) == right
    again.close()
    assert all(float((result[n] - v).abs().max()) <= 1e-6 for n, v in expected.items())

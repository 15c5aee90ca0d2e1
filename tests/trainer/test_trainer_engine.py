"""The engine against a plain PyTorch loop, on one rank, for every ZeRO stage and precision."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_tiny import Slope, Slopes, TinyStream, inputs, reference, rows, tiny, train_config

from fmrizoo.config import Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.trainer import zero
from fmrizoo.trainer.device import World, init_distributed
from fmrizoo.trainer.engine import Engine, param_groups
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.loop import TrainerInputs, train
from fmrizoo.trainer.zero import (
    accumulation,
    deepspeed_config,
    micro_batch,
    optimizer_kind,
    zero_stage,
)

# Losses of a bf16 forward are bf16 numbers: one unit in the last place at 1.0 is 0.0078.
TOLERANCE = {"fp32": 1e-6, "bf16": 0.008}
# Master weights: AdamW divides by the root of the second moment, which amplifies the rounding of
# near-zero bf16 gradients; lr × steps = 0.12 is how far a weight may travel at most.
WEIGHTS = {"fp32": 1e-5, "bf16": 0.012}


@pytest.mark.parametrize("clip_norm", [0.5, 0.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_equals_plain_loop(tmp_path: Path, stage: int, precision: str, clip_norm: float) -> None:
    changes = {"zero_stage": stage, "precision": precision, "clip_norm": clip_norm}
    train(inputs(tmp_path, **changes))
    want = reference(train_config(**changes))
    got = rows(tmp_path)
    tolerance = TOLERANCE[precision]
    assert [r["loss"] for r in got] == pytest.approx(want.losses, abs=tolerance)
    assert [r["grad_norm"] for r in got] == pytest.approx(want.norms, abs=3 * tolerance)
    weights, _ = read_model(tmp_path / "model")
    for name, value in want.weights.items():
        torch.testing.assert_close(weights[name], value, atol=WEIGHTS[precision], rtol=0)
    if clip_norm:
        assert min(want.norms) < clip_norm < max(want.norms)  # some steps are clipped, some not


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("stage", "offload"),
    [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")],
)
def test_offloading_in_bf16_equals_plain_loop(
    tmp_path: Path, stage: int, offload: str, accumulate: int
) -> None:
    """(In fp32: test_trainer_stages.py.) DeepSpeed takes another optimizer at stage 1 then."""
    changes = {"zero_stage": stage, "precision": "bf16", "accumulate": accumulate}
    train(inputs(tmp_path, **changes, offload=offload))
    want = reference(train_config(**changes))
    got = rows(tmp_path)
    assert [r["loss"] for r in got] == pytest.approx(want.losses, abs=TOLERANCE["bf16"])
    assert [r["grad_norm"] for r in got] == pytest.approx(want.norms, abs=3 * TOLERANCE["bf16"])
    weights, _ = read_model(tmp_path / "model")
    for name, value in want.weights.items():
        torch.testing.assert_close(weights[name], value, atol=WEIGHTS["bf16"], rtol=0)


@pytest.mark.parametrize(
    ("asked", "precision", "offload", "ranks", "runs"),
    [
        (3, "fp32", "none", 1, (0, "plain")),
        (1, "fp32", "none", 1, (0, "plain")),
        (3, "bf16", "none", 1, (1, "bf16")),
        (0, "bf16", "none", 1, (1, "bf16")),
        (1, "bf16", "optimizer", 1, (1, "flat")),
        (3, "fp32", "parameters", 1, (3, "parts")),
        (2, "fp32", "none", 2, (2, "flat")),
        (3, "bf16", "none", 2, (3, "parts")),
    ],
)
def test_one_rank_runs_the_plainest_stage(
    asked: int,
    precision: str,
    offload: str,
    ranks: int,
    runs: tuple[int, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(zero, "STAGES_ALONE", False)
    config = train_config(zero_stage=asked, precision=precision, offload=offload)
    assert (zero_stage(config, ranks), optimizer_kind(config, ranks)) == runs
    if ranks == 1:
        init_distributed(World(), torch.device("cpu"))
        with caplog.at_level("INFO"):
            made = Engine(tiny(), config, World(), torch.device("cpu"))
        said = [r.getMessage() for r in caplog.records if "runs as stage" in r.getMessage()]
        assert made.stage == runs[0] and len(said) == (asked != runs[0])
        assert "nobody to share with" in "".join(said) or asked <= runs[0]
        names = {
            "plain": "FusedAdam|AdamW",
            "bf16": "BF16_Optimizer",
            "flat": "DeepSpeedZeroOptimizer",
            "parts": "DeepSpeedZeroOptimizer_Stage3",
        }
        assert re.fullmatch(names[runs[1]], type(made._engine.optimizer).__name__)
        made.close()


def test_many_stages_on_one_rank_are_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe for many ranks on one: the numbers of its stage."""
    train(inputs(tmp_path / "told", zero_stage=3, precision="fp32"))
    monkeypatch.setattr(zero, "STAGES_ALONE", False)
    train(inputs(tmp_path / "plain", zero_stage=3, precision="fp32"))
    told, plain = (rows(tmp_path / name) for name in ("told", "plain"))
    assert [r["loss"] for r in plain] == pytest.approx([r["loss"] for r in told], abs=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_gradients_are_summed_in_fp32(tmp_path: Path, stage: int) -> None:
    changes = {"zero_stage": stage, "precision": "bf16", "accumulate": 4, "steps": 1}
    given = inputs(tmp_path, **changes, clip_norm=0.0)
    train(replace(given, model=Slope(), loader_for=Slopes))
    # 16 weights with the mean over four micro-batches of 1, 2⁻⁹, 2⁻⁹, 2⁻⁹.
    assert rows(tmp_path)[0]["grad_norm"] == pytest.approx(4 * (1 + 3 * 2**-9) / 4, abs=1e-6)


def test_clipping_matters_here() -> None:
    """Otherwise the two clip_norm cases above would be one."""
    clipped, free = reference(train_config()), reference(train_config(clip_norm=0.0))
    assert abs(clipped.losses[-1] - free.losses[-1]) > 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_encoder(tmp_path: Path, stage: int) -> None:
    changes = {"zero_stage": stage, "weight_decay": 0.5}
    config = train_config(**changes)
    recipe = Recipe(train=config)
    train(TrainerInputs(tiny(frozen=True), recipe, tmp_path, TinyStream, World()))
    want = reference(config, frozen=True)
    assert [r["loss"] for r in rows(tmp_path)] == pytest.approx(want.losses, abs=1e-6)
    weights, info = read_model(tmp_path / "model")
    start = tiny().state_dict()
    for name, value in want.weights.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)
        assert torch.equal(weights[name], start[name]) == (not name.startswith("objective."))
    assert info.parameters == sum(p.numel() for p in tiny().parameters())


def test_groups() -> None:
    model = tiny()
    model.backbone.out.weight._no_weight_decay = True  # type: ignore[assignment]
    model.backbone.embed.weight.requires_grad_(False)
    decaying, plain = param_groups(model, train_config())
    named = {id(p): n for n, p in model.named_parameters()}
    assert {named[id(p)] for p in decaying["params"]} == {
        "backbone.positions",
        "backbone.hidden.weight",
        "objective.decode.weight",
    }
    assert decaying["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    rest = set(named.values()) - {named[id(p)] for p in decaying["params"]}
    assert {named[id(p)] for p in plain["params"]} == rest - {"backbone.embed.weight"}


def test_nothing_to_train() -> None:
    with pytest.raises(RecipeError, match="every parameter of the model is frozen"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), train_config())


def test_batch_arithmetic() -> None:
    config = train_config(batch_size=24, accumulate=3)
    assert micro_batch(config, World(0, 4, 0)) == 2
    with pytest.raises(RecipeError, match=r"over 5 ranks × 3 .* multiple of 15, for example 30"):
        micro_batch(config, World(0, 5, 0))


def test_written_config_leaves_nothing_to_defaults() -> None:
    config = deepspeed_config(train_config(clip_norm=0.0, zero_stage=2), World(), 1001)
    assert config["gradient_clipping"] == 0.0
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["reduce_bucket_size"] == 1002
    assert "scheduler" not in config and "optimizer" not in config
    bf16 = train_config(precision="bf16", zero_stage=0)
    assert deepspeed_config(bf16, World(), 10)["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("batch", "limit", "ranks", "expected"),
    [
        (384, 4, 1, (96, 4)),
        (384, 4, 96, (1, 4)),
        (384, 16, 12, (2, 16)),
        (6, 4, 1, (2, 3)),
        (7, 2, 1, (7, 1)),
        (8, 0, 2, (1, 4)),
    ],
)
def test_accumulation_is_as_short_as_the_micro_batch_allows(
    batch: int, limit: int, ranks: int, expected: tuple[int, int]
) -> None:
    config = train_config(batch_size=batch, max_micro_batch=limit, accumulate=1)
    world = World(0, ranks, 0, "test")
    assert (accumulation(config, world), micro_batch(config, world)) == expected


def test_a_limited_micro_batch_trains_like_the_accumulation_it_stands_for(tmp_path: Path) -> None:
    base = train_config()
    limit = base.batch_size // base.accumulate
    train(inputs(tmp_path / "a"))
    train(inputs(tmp_path / "b", accumulate=1, max_micro_batch=limit))
    losses = [[r["loss"] for r in rows(tmp_path / name)] for name in ("a", "b")]
    assert base.accumulate > 1 and losses[0] == losses[1]


def test_accumulation_is_set_in_one_way_only() -> None:
    with pytest.raises(RecipeError, match="give one of them"):
        train_config(accumulate=2, max_micro_batch=2)

"""The engine against a plain PyTorch loop, on one rank, for every ZeRO stage and precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_tiny import Slope, Slopes, TinyStream, inputs, reference, rows, tiny, train_config

from fmrizoo.config import Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.trainer.device import World
from fmrizoo.trainer.engine import accumulation, deepspeed_config, micro_batch, param_groups
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.loop import TrainerInputs, train

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

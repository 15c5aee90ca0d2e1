"""Parameter groups: rates by parameter, and nothing at all for what is frozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_tiny import ALONE, clips, inputs, reference, rows, scaled, timeless, tiny, train_config

from fmrizoo.errors import RecipeError
from fmrizoo.trainer.device import init_distributed
from fmrizoo.trainer.engine import Engine, param_groups
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.groups import lr_scales
from fmrizoo.trainer.loop import StepEvent, train
from fmrizoo.trainer.schedule import factor

FROZEN = ("backbone.embed.weight", "backbone.embed.bias")
CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


def given(out: Path, **changes: Any) -> Any:
    return replace(inputs(out, **changes), model=scaled(changes.get("dropout", 0.0)))


def test_groups_by_factor_and_decay_in_the_order_of_the_parameters() -> None:
    model = scaled()
    config = train_config(lr=0.5, weight_decay=0.1)
    named = {id(p): n for n, p in model.named_parameters()}
    found = [
        (g["lr"], g["weight_decay"], sorted(named[id(p)] for p in g["params"]))
        for g in param_groups(model, config)
    ]
    assert found == [
        (0.0625, 0.1, ["backbone.positions"]),
        (0.125, 0.1, ["backbone.hidden.weight"]),
        (0.125, 0.0, ["backbone.hidden.bias"]),
        (0.5, 0.1, ["backbone.out.weight", "objective.decode.weight"]),
        (
            0.5,
            0.0,
            [
                "backbone.norm.bias",
                "backbone.out.bias",
                "objective.decode.bias",
                "objective.mask_token",
            ],
        ),
        (0.25, 0.0, ["backbone.norm.weight"]),
    ]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in FROZEN)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_first_step_moves_each_parameter_at_its_rate(
    tmp_path: Path, stage: int, precision: str
) -> None:
    """Adam's first step is lr × sign of the gradient, whatever its size."""
    changes = {"steps": 1, "warmup": 0.0, "weight_decay": 0.0, "clip_norm": 0.0, "eps": 1e-12}
    train(given(tmp_path, zero_stage=stage, precision=precision, lr=0.01, **changes))
    after, _ = read_model(tmp_path / "model")
    model = scaled()
    for name, before in model.state_dict().items():
        if name in FROZEN or name == "counts":
            assert torch.equal(after[name], before)
            continue
        # Master weights start from what bf16 makes of the model.
        start = before if precision == "fp32" else before.bfloat16().float()
        moved = (after[name] - start).abs().double()
        rate = 0.01 * model.scales.get(name, 1.0)
        # Positions of hidden voxels have no gradient. fp32 weights of size 1 resolve 1e-7, which is
        # 1e-4 of the lowest rate.
        assert moved[moved > 0].median().item() == pytest.approx(rate, rel=1e-3), name


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_many_groups_equal_plain_loop(tmp_path: Path, stage: int, precision: str) -> None:
    changes = {"zero_stage": stage, "precision": precision}
    train(given(tmp_path, **changes))
    want = reference(train_config(**changes), make=scaled)
    # As in test_trainer_engine: one bf16 unit in the last place of a loss near 1.
    tolerance = {"fp32": 1e-6, "bf16": 0.008}[precision]
    assert [r["loss"] for r in rows(tmp_path)] == pytest.approx(want.losses, abs=tolerance)
    weights, _ = read_model(tmp_path / "model")
    for name, value in want.weights.items():
        limit = {"fp32": 1e-5, "bf16": 0.012}[precision]
        torch.testing.assert_close(weights[name], value, atol=limit, rtol=0)


def test_reported_rate_is_the_base_rate(tmp_path: Path) -> None:
    told: list[float] = []
    model = tiny()
    model.scales = {n: 0.1 for n, _ in model.named_parameters() if n.startswith("backbone.")}
    assert param_groups(model, train_config())[0]["lr"] == pytest.approx(0.002)
    train(replace(inputs(tmp_path), model=model, on_step=lambda event: told.append(event.lr)))
    config = train_config()
    want = [
        config.lr * factor(s, config.steps, config.warmup, config.min_lr_ratio)
        for s in range(config.steps)
    ]
    assert told == want and [r["lr"] for r in rows(tmp_path)] == want


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_resume_with_many_groups_is_exact(tmp_path: Path, stage: int, precision: str) -> None:
    class Killed(BaseException):
        pass

    def kill(event: StepEvent) -> None:
        if event.step == 3:
            raise Killed

    same = {"zero_stage": stage, "precision": precision, "dropout": 0.3}
    train(given(tmp_path / "whole", **same))
    with pytest.raises(Killed):
        train(replace(given(tmp_path / "cut", save_every=2, **same), on_step=kill))
    done = train(given(tmp_path / "cut", save_every=2, **same))
    assert done.resumed_from == 2
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    a, _ = read_model(tmp_path / "whole" / "model")
    b, _ = read_model(tmp_path / "cut" / "model")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_frozen_parameters_have_no_optimizer_state(stage: int, precision: str) -> None:
    model, config = tiny(frozen=True), train_config(zero_stage=stage, precision=precision)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = torch.device("cpu")
    init_distributed(ALONE, device)
    frozen, before = list(model.backbone.parameters()), tiny().backbone
    engine = Engine(model, config, ALONE, device)
    for first in (0, 4):
        engine.accumulate(clips(first, 4).to(device, engine.dtype))
    engine.step(1.0)
    optimizer = engine._engine.optimizer
    state = getattr(optimizer, "optimizer", optimizer).state
    moments = sum(s["exp_avg"].numel() for s in state.values() if "exp_avg" in s)
    # ZeRO pads each of its flat groups to an even number of elements.
    assert trained <= moments <= trained + 2 * len(param_groups(model, config))
    assert trained + 2 * len(param_groups(model, config)) < engine.parameters
    assert all(p.grad is None for p in frozen)
    exported = dict(engine.weights())
    for name, value in before.state_dict().items():
        assert torch.equal(exported[f"backbone.{name}"], value)
    engine.close()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"weight": 0.0}, "factor of weight is 0: it must be above 0"),
        ({"weight": float("inf")}, "factor of weight is inf"),
        ({"wheight": 0.5}, "factors for wheight, which Scaled has no parameter of"),
    ],
)
def test_impossible_factors_are_named(scales: dict[str, float], message: str) -> None:
    class Scaled(nn.Linear):
        def lr_scales(self) -> dict[str, float]:
            return scales

    with pytest.raises(RecipeError, match=message):
        param_groups(Scaled(2, 2), train_config())


def test_a_model_without_factors() -> None:
    assert lr_scales(nn.Linear(2, 2)) == {}

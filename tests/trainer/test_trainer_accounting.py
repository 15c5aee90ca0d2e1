"""Who trains: parameters and bytes, by hand and against what the optimizer really holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainer_tiny import ALONE, clips, inputs, scaled, tiny, train_config

from fmrizoo.config import TrainConfig
from fmrizoo.trainer.accounting import Accounting, account, count, megabytes
from fmrizoo.trainer.device import init_distributed
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.loop import train

# embed 4·6+6, positions 8·6, hidden 6·12+12, out 12·6+6, norm 6+6; mask token 6, decode 6·4+4
ENCODER, EMBED, OBJECTIVE = 252, 30, 34


def test_pretraining() -> None:
    found = account(tiny(), train_config())
    assert found == Accounting(
        encoder=ENCODER,
        encoder_trained=ENCODER,
        added_trained=OBJECTIVE,
        frozen=0,
        added="objective",
        optimizer_bytes=8 * (ENCODER + OBJECTIVE),
        gradient_bytes=4 * (ENCODER + OBJECTIVE),
    )
    assert found.trained == 286 and found.encoder_share == 100


def test_a_part_that_is_frozen() -> None:
    found = account(scaled(), train_config())
    assert (found.encoder, found.encoder_trained, found.added_trained) == (ENCODER, 222, OBJECTIVE)
    assert found.frozen == EMBED and found.encoder_share == pytest.approx(100 * 222 / 252)
    assert found.sentence() == (
        "trains 222 of 252 encoder parameters (88.1 %) and 34 of the objective; optimizer 0.002 MB "
        "on each rank"
    )


class Wrapper(nn.Module):
    """A low-rank adapter as PEFT names its parts."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"a": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"a": nn.Linear(rank, base.out_features, bias=False)})


def test_adapters_inside_the_encoder_are_added() -> None:
    model = tiny(frozen=True)
    model.backbone.hidden = Wrapper(model.backbone.hidden, 2)  # type: ignore[assignment]
    found = account(model, train_config())
    assert (found.encoder, found.encoder_trained) == (ENCODER, 0)
    assert found.added_trained == OBJECTIVE + 2 * (6 + 12) and found.frozen == ENCODER
    # Another adapter at rest is frozen, and none of the encoder's own.
    model.backbone.hidden.lora_A["b"] = nn.Linear(6, 1, bias=False).requires_grad_(False)
    found = account(model, train_config())
    assert found.encoder == ENCODER and found.frozen == ENCODER + 6


@pytest.mark.parametrize(
    ("precision", "stage", "ranks", "optimizer", "gradients"),
    [
        ("fp32", 0, 4, 8 * 286, 4 * 286),
        ("fp32", 1, 4, 8 * 72, 4 * 286),
        ("fp32", 2, 4, 8 * 72, 4 * 72),
        ("fp32", 3, 4, 8 * 72, 4 * 72),
        ("bf16", 0, 2, 12 * 143, 4 * 286),  # runs as stage 1
        ("bf16", 1, 1, 12 * 286, 4 * 286),
        ("bf16", 2, 2, 12 * 143, 4 * 143),
    ],
)
def test_bytes(precision: str, stage: int, ranks: int, optimizer: int, gradients: int) -> None:
    found = account(tiny(), train_config(precision=precision, zero_stage=stage), ranks)
    assert (found.optimizer_bytes, found.gradient_bytes) == (optimizer, gradients)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizer_holds_as_much(stage: int, precision: str, frozen: bool) -> None:
    """Tensors of more than one element in the optimizer's state and groups, in bytes."""
    config, device = train_config(zero_stage=stage, precision=precision), torch.device("cpu")
    init_distributed(ALONE, device)
    model = tiny(frozen=frozen)
    counted = account(model, config)
    engine = Engine(model, config, ALONE, device)
    for first in (0, 4):
        engine.accumulate(clips(first, 4).to(device, engine.dtype))
    engine.step(1.0)
    optimizer: Any = engine._engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    values = [v for state in inner.state.values() for v in state.values()]
    held = [v for v in values if isinstance(v, torch.Tensor) and v.numel() > 1]
    if precision == "bf16" and stage < 3:
        held += [p for group in inner.param_groups for p in group["params"]]
    if precision == "bf16" and stage == 3:
        held += optimizer.fp32_partitioned_groups_flat
    assert all(tensor.dtype == torch.float32 for tensor in held)
    total = sum(4 * tensor.numel() for tensor in held)
    # DeepSpeed pads each of at most two groups to an even number of elements.
    assert counted.optimizer_bytes <= total <= counted.optimizer_bytes + 2 * 12
    engine.close()


def test_nothing_is_allocated() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100_000, 100_000, bias=False))
    found = account(model, TrainConfig(precision="bf16", zero_stage=1), 8)
    assert found.encoder == 0 and found.added_trained == 10**10 and found.added == "model"
    assert found.sentence() == "trains 10.0 G parameters; optimizer 14305 MB on each rank"


def test_every_run_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    done = train(replace(inputs(tmp_path, steps=1), model=scaled()))
    counted = account(scaled(), train_config())
    assert done.accounting == counted and counted.sentence() in caplog.text
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["accounting"] == counted.to_dict()
    assert env["accounting"]["encoder_share"] == 88.095


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (312, "312"),
        (1537, "1.5 k"),
        (14_212_000, "14.2 M"),
        (999_949, "999.9 k"),
        (999_950, "1.0 M"),
        (10**10, "10.0 G"),
    ],
)
def test_counts(number: int, text: str) -> None:
    assert count(number) == text


def test_megabytes() -> None:
    sizes = (14_200_000 * 8, 2**20 * 1.26, 12_000)
    assert [megabytes(int(s)) for s in sizes] == ["108 MB", "1.3 MB", "0.011 MB"]

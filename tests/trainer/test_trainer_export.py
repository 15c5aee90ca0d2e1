"""Exported models and checkpoint folders: whole, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_tiny import tiny

from fmrizoo.errors import CheckpointError
from fmrizoo.trainer.checkpoint import faults, found, newest_valid
from fmrizoo.trainer.export import ModelInfo, read_info, read_model, save_model
from fmrizoo.trainer.folder import MetricsFile, read_metrics
from fmrizoo.types import Contract, TaskSpec

INFO = ModelInfo(
    recipe={"backbone": {"name": "tiny", "depths": [2, 2]}},
    contract=Contract("native", "RAS", (2, 2, 2), (3.0, 3.0, 3.5), 2.5),
    tasks=(
        TaskSpec("classification", ("face", "house"), weights=(0.5, 1.5), smoothing=0.1),
        TaskSpec("regression", mean=31.5, std=4.0, name="age"),
    ),
    seen_runs=("sub-002_run-01", "sub-001_run-01"),
    step=12,
)


def test_round_trip(tmp_path: Path) -> None:
    model = tiny()
    written = save_model(tmp_path / "model", model, INFO)
    tensors, info = read_model(tmp_path / "model")
    other = tiny()
    nn.init.zeros_(other.objective.mask_token)
    other.load_state_dict(tensors)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value) and tensors[name].dtype == value.dtype
    assert (
        info.recipe == INFO.recipe and info.contract == INFO.contract and info.tasks == INFO.tasks
    )
    assert info.seen_runs == ("sub-001_run-01", "sub-002_run-01") and info.step == 12
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.sha256 == written.sha256 and read_info(tmp_path / "model") == info
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_tied_weights_survive(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    info = save_model(tmp_path, model, ModelInfo(recipe={}))
    tensors, _ = read_model(tmp_path)
    assert torch.equal(tensors["0.weight"], tensors["1.weight"])
    assert info.parameters == 15


def test_flipped_bit_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "a", tiny(), INFO)
    weights = tmp_path / "a" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged or belongs to another config\.json"):
        read_model(tmp_path / "a")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        read_model(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other/1"}, "schema is 'other/1'"),
        ({"surprise": 1}, r"unknown fields \['surprise'\]"),
        ({"tasks": [{"kind": "classification"}]}, "missing or malformed: 'classes'"),
        ({"tasks": [{"kind": "guessing", "classes": [], "weights": []}]}, "task must be"),
        ({"contract": {"space": "native"}}, "contract is incomplete"),
    ],
)
def test_bad_config_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    save_model(tmp_path, tiny(), INFO)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model(tmp_path)
    assert str(path) in str(caught.value)


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder: it holds no config\.json"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_model(tmp_path)


def test_no_checkpoint_is_not_an_error(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "checkpoints") is None
    (tmp_path / "step-12.partial").mkdir()
    (tmp_path / "step-x").mkdir()
    assert found(tmp_path) == []
    (tmp_path / "step-000009").mkdir()
    (tmp_path / "step-1000000").mkdir()
    assert [p.name for p in found(tmp_path)] == ["step-1000000", "step-000009"]
    assert faults(tmp_path / "step-000009") == ["manifest.json is missing"]


def test_metrics_drop_what_will_be_repeated_and_a_torn_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n{"step": 3, "lo')
    metrics = MetricsFile(path, 1)
    metrics.write({"step": 2, "loss": 0.125, "odd": float("nan")})
    metrics.close()
    assert "incomplete last line" in caplog.text
    assert read_metrics(path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.125, "odd": None},
    ]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)

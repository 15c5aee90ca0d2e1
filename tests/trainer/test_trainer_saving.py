"""Checkpoints written beside training, their faults, running means, and models made of them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_tiny import inputs, killed, on_ranks, rows, scaled, timeless, tiny

from fmrizoo.errors import CheckpointError
from fmrizoo.trainer import saving
from fmrizoo.trainer.checkpoint import faults, found
from fmrizoo.trainer.consolidate import consolidate
from fmrizoo.trainer.device import World
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.export import apart, read_model
from fmrizoo.trainer.inputs import StepEvent
from fmrizoo.trainer.loop import train


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Shards are written only after this is set."""
    go, write = threading.Event(), saving.write_shard

    def waiting(path: Path, snapshot: Any) -> None:
        assert go.wait(60)
        write(path, snapshot)

    monkeypatch.setattr(saving, "write_shard", waiting)
    return go


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    """Steps 3 and 4 are taken before that of step 2 is on the disk; what it holds is of step 2."""
    slow_disk.set()
    train(inputs(tmp_path / "whole", dropout=0.3))
    slow_disk.clear()
    there: dict[int, list[str]] = {}

    def look(event: StepEvent) -> None:
        there[event.step] = [p.name for p in found(tmp_path / "run" / "checkpoints")]
        if event.step == 3:
            slow_disk.set()
        if event.step == 5:
            raise KeyboardInterrupt

    given = inputs(tmp_path / "run", dropout=0.3, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(replace(given, on_step=look))
    assert there[2] == there[3] == [] and there[4][-1:] == ["step-000002"]
    done = train(inputs(tmp_path / "run", dropout=0.3, save_every=2))
    assert done.resumed_from == 4 and timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert faults(done.checkpoints[0]) == []


def test_at_once_waits(tmp_path: Path) -> None:
    there = {}

    def look(event: StepEvent) -> None:
        there[event.step] = [p.name for p in found(tmp_path / "checkpoints")]

    given = inputs(tmp_path, save_every=2, async_save=False)
    train(replace(given, on_step=look))
    assert there[2] == ["step-000002"] and there[4][0] == "step-000004"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system refuses files above ``size`` bytes, as a full disk refuses them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [3_000, 6_000], ids=["at the begin", "for the shard"])
def test_no_room_stops_at_the_next_step(tmp_path: Path, room: int) -> None:
    """The JSON files of a tiny run have 5 kB, its shard 7."""
    train(inputs(tmp_path / "whole"))

    def shrink(event: StepEvent) -> None:
        if event.step == 3:
            while not (tmp_path / "run" / "checkpoints" / "latest").exists():
                time.sleep(0.01)  # that of step 2 is on its way
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    given = inputs(tmp_path / "run", save_every=2)
    with (
        largest_file(resource.RLIM_INFINITY),
        pytest.raises(CheckpointError, match=r"cannot write the checkpoint of step 4 .*too large"),
    ):
        train(replace(given, on_step=shrink))
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["latest", "step-000002"]
    assert len(rows(tmp_path / "run")) <= 5
    done = train(inputs(tmp_path / "run", save_every=2))
    assert done.resumed_from == 2 and timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def one_rank_fails(world: World, out: str) -> str:
    if world.rank == 1:

        def full(path: Path, snapshot: Any) -> None:
            raise OSError(28, "No space left on device")

        saving.write_shard = full
    try:
        train(inputs(Path(out), world=world, save_every=2))
    except CheckpointError as error:
        return str(error)
    return "nothing"


def test_a_rank_without_room_stops_all(tmp_path: Path) -> None:
    told = on_ranks(tmp_path / "ranks", one_rank_fails, str(tmp_path / "run"))
    assert told[0] == told[1]
    assert told[0].startswith("cannot write the checkpoint of step 2 ") and "No space" in told[0]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


# --- running means ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_running_means(tmp_path: Path, stage: int) -> None:
    """Exported, validated and kept over a resume; training itself is not touched."""
    kept: dict[str, Tensor] = {}
    every: list[dict[str, Tensor]] = []
    step = Engine.step

    def noting(engine: Engine, part: float) -> float:
        if not every:
            every.append({n: v.clone() for n, v in engine.weights()})
        norm = step(engine, part)
        every.append({n: v.clone() for n, v in engine.weights()})
        return norm

    def validate(model: nn.Module, device: torch.device) -> dict[str, float]:
        bias = model.get_parameter("objective.decode.bias")
        return {"loss": float(bias.detach().float().sum())}

    same = {"zero_stage": stage, "ema": 0.9, "validate_every": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", noting)
        done = train(replace(inputs(tmp_path / "run", **same), model=scaled(), validate=validate))
    train(replace(inputs(tmp_path / "plain", zero_stage=stage), model=scaled()))
    plain = [row["loss"] for row in rows(tmp_path / "plain")]
    assert [row["loss"] for row in rows(tmp_path / "run")] == plain
    for name, value in every[0].items():
        mean = value.double()
        for number, after in enumerate(every[1:], start=1):
            decay = min(0.9, (1 + number) / (10 + number))
            mean = decay * mean + (1 - decay) * after[name].double()
        kept[name] = mean.to(value.dtype)
    exported, _ = read_model(tmp_path / "run" / "model")
    last, _ = read_model(tmp_path / "plain" / "model")
    for name, value in kept.items():
        torch.testing.assert_close(exported[name], value, atol=1e-6, rtol=1e-6)
    assert float((exported["backbone.out.weight"] - last["backbone.out.weight"]).abs().max()) > 1e-3
    bias = float(exported["objective.decode.bias"].sum())
    assert done.validation == {"loss": pytest.approx(bias, abs=1e-6)}

    killed(inputs(tmp_path / "cut", save_every=2, **same), scaled(), 3)
    again = train(replace(inputs(tmp_path / "cut", save_every=2, **same), model=scaled()))
    assert again.resumed_from == 2
    resumed, _ = read_model(tmp_path / "cut" / "model")
    assert all(torch.equal(resumed[name], exported[name]) for name in exported)
    made, _ = read_model(consolidate(tmp_path / "run", tmp_path / "made"))
    assert all(torch.equal(made[name], exported[name]) for name in exported)


# --- models of checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_model_of_a_checkpoint_is_what_the_run_exports(
    tmp_path: Path, stage: int, precision: str
) -> None:
    same = {"zero_stage": stage, "precision": precision, "save_every": 2}
    train(replace(inputs(tmp_path / "run", **same), model=scaled()))
    want, told = read_model(tmp_path / "run" / "model")
    got, info = read_model(consolidate(tmp_path / "run", tmp_path / "made"))
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert all(got[n].dtype == want[n].dtype for n in want)
    assert replace(info, sha256="") == replace(told, sha256="")
    earlier = consolidate(tmp_path / "run", tmp_path / "earlier", step=4)
    assert read_model(earlier)[1].step == 4
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2; there are: 4, 6"):
        consolidate(tmp_path / "run", tmp_path / "gone", step=2)
    with pytest.raises(CheckpointError, match=r"made holds a model already"):
        consolidate(tmp_path / "run", tmp_path / "made")
    with pytest.raises(CheckpointError, match=r"knows of no best weights"):
        consolidate(tmp_path / "run", tmp_path / "best", best=True)
    with pytest.raises(
        CheckpointError, match=r"gone is no whole checkpoint: manifest.json is miss"
    ):
        consolidate(tmp_path / "gone", tmp_path / "x")
    (tmp_path / "run" / "checkpoints" / "step-000006" / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-000006 is no whole checkpoint: shard-00000"):
        consolidate(tmp_path / "run", tmp_path / "torn", step=6)


def test_the_best_weights_of_a_checkpoint(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    given = inputs(tmp_path / "run", validate_every=1, keep_best=True, save_every=1)
    train(replace(given, validate=lambda model, device: {"loss": next(values)}))
    want, told = read_model(tmp_path / "run" / "model")
    best, info = read_model(consolidate(tmp_path / "run", tmp_path / "best", best=True))
    last, _ = read_model(consolidate(tmp_path / "run", tmp_path / "last"))
    assert (info.step, info.steps_taken) == (told.step, told.steps_taken) == (2, 6)
    assert all(torch.equal(best[n], want[n]) for n in want)
    assert any(not torch.equal(last[n], want[n]) for n in want)


def test_no_deepspeed_is_needed(tmp_path: Path) -> None:
    train(inputs(tmp_path / "run"))
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from fmrizoo.cli import main\n"
        f"sys.argv = ['fmrizoo', 'export', {str(tmp_path / 'run')!r}, {str(tmp_path / 'out')!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert "step 6," in done.stdout.replace("\n", " ")
    want, _ = read_model(tmp_path / "run" / "model")
    got, _ = read_model(tmp_path / "out")
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_shared_parameters_are_kept_once(tmp_path: Path) -> None:
    model = tiny()
    model.objective.second = model.objective.decode
    train(replace(inputs(tmp_path / "run"), model=model))
    index = json.loads(
        (tmp_path / "run" / "checkpoints" / "step-000006" / "tensors.json").read_text()
    )
    assert index["tensors"]["objective.decode.weight"]["aliases"] == ["objective.second.weight"]
    assert "objective.second.weight" not in index["tensors"]
    got, _ = read_model(consolidate(tmp_path / "run", tmp_path / "made"))
    want, _ = read_model(tmp_path / "run" / "model")
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def test_only_what_is_shared_is_copied() -> None:
    a, b = torch.zeros(4, 4), torch.ones(3)
    own = apart(
        {"a": a, "tied": a, "view": b[:2], "turned": torch.arange(6.0).view(2, 3).T, "b": b}
    )
    assert own["a"].data_ptr() == a.data_ptr() and own["b"].data_ptr() == b.data_ptr()
    assert len({t.untyped_storage().data_ptr() for t in own.values()}) == 5
    assert all(t.is_contiguous() for t in own.values())
    assert torch.equal(own["view"], b[:2]) and own["turned"].shape == (3, 2)

"""Losses and gradients that are not finite: named, written to a file, and left out if so asked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_tiny import job
from torch import nn
from trainer_tiny import (
    ALONE,
    TinyStream,
    clips,
    inputs,
    on_ranks,
    reference,
    rows,
    timeless,
    tiny,
    train_config,
)

import fmrizoo.trainer.faults as faults
from fmrizoo.errors import CheckpointError, DivergedError, FmrizooError
from fmrizoo.trainer.checkpoint import found, newest_valid
from fmrizoo.trainer.device import World
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.faults import read_dump
from fmrizoo.trainer.loop import TrainerInputs, train
from fmrizoo.trainer.ranks import Ranks
from fmrizoo.types import Batch, ReadBatch

CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
# Steps 3 and 5 (from 1): clips 16–23 and 32–39. With two ranks 21 is in the first micro-batch of
# rank 0's second half, and 38 is rank 1's.
POISON = frozenset({21, 38})
LEFT_OUT = frozenset({2, 4})


def poisoned(given: TrainerInputs, poison: frozenset[int] = POISON) -> TrainerInputs:
    return replace(given, loader_for=partial(TinyStream, poison=poison))


def skipping(out: Path, **changes: Any) -> TrainerInputs:
    return poisoned(inputs(out, not_finite="skip", **changes))


def dumps(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "faults").glob("*"))


def check_against_plain_loop(out: Path, ranks: int, **changes: Any) -> None:
    """Losses, norms and weights are those of a loop that never saw the bad steps."""
    want = reference(train_config(**changes), ranks=ranks, without=LEFT_OUT)
    got = rows(out)
    assert [row.get("skipped", False) for row in got] == [k in LEFT_OUT for k in range(6)]
    taken = [row for row in got if not row.get("skipped")]
    # As in test_trainer_ranks: one unit in the last place of a bf16 loss near 1 is 0.0078.
    close = 1e-6 if changes["precision"] == "fp32" else 0.01
    assert [row["loss"] for row in taken] == pytest.approx(want.losses, abs=close)
    assert [row["grad_norm"] for row in taken] == pytest.approx(want.norms, rel=max(close, 1e-5))
    weights, _ = read_model(out / "model")
    for name, value in want.weights.items():
        difference = (weights[name] - value).abs().max()
        assert difference <= (1e-6 if changes["precision"] == "fp32" else 0.02), name


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_left_out_steps_leave_no_trace(tmp_path: Path, stage: int, precision: str) -> None:
    same = {"zero_stage": stage, "precision": precision}
    train(skipping(tmp_path, **same))
    check_against_plain_loop(tmp_path, 1, **same)
    skipped = [row for row in rows(tmp_path) if row.get("skipped")]
    assert all(row["loss"] is None and row["grad_norm"] is None for row in skipped)
    assert all("hidden_error" not in row for row in skipped)


def skip_on_ranks(world: World, out: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for stage, precision in CASES:
        folder = Path(out, f"{stage}-{precision}")
        train(skipping(folder, world=world, zero_stage=stage, precision=precision))
        bad = inputs(Path(out, f"slope-{stage}-{precision}"), world=world, not_finite="skip",
                     zero_stage=stage, precision=precision)  # fmt: skip
        try:
            train(replace(bad, model=InfiniteAt(2)))
        except FmrizooError as error:
            told[f"slope-{stage}-{precision}"] = str(error)
    try:
        train(poisoned(inputs(Path(out, "stop"), world=world)))
    except DivergedError as error:
        told["stop"] = str(error)
    # No room for the file on the rank that has one to write.
    replaced, faults.replace_content = faults.replace_content, _full
    try:
        train(poisoned(inputs(Path(out, "full"), world=world)))
    except DivergedError as error:
        told["full"] = str(error)
    faults.replace_content = replaced
    return told


def _full(path: Path, content: bytes) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("skip")
    return out, on_ranks(out, skip_on_ranks, str(out))


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_one_rank_of_two(
    two: tuple[Path, list[dict[str, Any]]], stage: int, precision: str
) -> None:
    out = two[0] / f"{stage}-{precision}"
    check_against_plain_loop(out, 2, zero_stage=stage, precision=precision)
    # Micro-batches of 2: 16 17 | 18 19 | 20 21 | 22 23, of rank 0, 1, 0, 1.
    assert dumps(out) == [
        "step-000003-rank-00000.safetensors",
        "step-000005-rank-00001.safetensors",
    ]
    found = read_dump(out / "faults" / "step-000003-rank-00000.safetensors")
    assert found.batch.subject == ["sub-020", "sub-021"] and math.isnan(found.loss)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_infinite_gradient_is_left_out(
    two: tuple[Path, list[dict[str, Any]]], stage: int, precision: str
) -> None:
    """Step 2 has an infinite gradient under a finite loss, on all ranks."""
    out = two[0] / f"slope-{stage}-{precision}"
    assert f"slope-{stage}-{precision}" not in two[1][0]
    assert [row.get("skipped", False) for row in rows(out)] == [k == 1 for k in range(6)]
    weights, _ = read_model(out / "model")
    assert all(value.isfinite().all() for value in weights.values())
    assert read_dump(out / "faults" / "step-000002-rank-00000.safetensors").what == "gradient"


def test_stop_on_two_ranks_names_the_file(two: tuple[Path, list[dict[str, Any]]]) -> None:
    out, told = two
    for rank in told:
        assert "the loss of step 3 is not finite" in rank["stop"]
        assert "(not finite: run sub-021, frame 0)" in rank["stop"]
        assert str(out / "stop" / "faults" / "step-000003-rank-00000.safetensors") in rank["stop"]
        assert "the loss of step 3 is not finite" in rank["full"]
        assert "could not be written to a file" in rank["full"]
        assert "No space left on device" in rank["full"]
    assert dumps(out / "stop") == ["step-000003-rank-00000.safetensors"]
    assert not dumps(out / "full")


class InfiniteAt(nn.Module):
    """A mean square; at its ``n``-th step (of two micro-batches) a root's slope at 0 is added."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.n, self.calls = n, 0

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if torch.is_grad_enabled():
            self.calls += 1
        loss = (self.weight * batch.bold.flatten()[:4].mean()).square().mean()
        if (self.calls + 1) // 2 == self.n and torch.is_grad_enabled():
            loss = loss + (self.weight - self.weight.detach()).square().sum().sqrt()
        return loss, {}


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_nothing_is_changed_by_a_step_left_out(
    tmp_path: Path, stage: int, precision: str, what: str
) -> None:
    """Weights, both moments and Adam's count are the same bits, at every stage."""
    from fmrizoo.trainer.device import init_distributed

    config = train_config(zero_stage=stage, precision=precision)
    init_distributed(ALONE, torch.device("cpu"))
    engine = Engine(InfiniteAt(2), config, ALONE, torch.device("cpu"))

    def state() -> dict[str, torch.Tensor]:
        kept = {name: value.clone() for name, value in engine.weights()}
        inner = getattr(engine._engine.optimizer, "optimizer", engine._engine.optimizer)
        for k, values in enumerate(inner.state.values()):
            kept |= {f"{k}.{n}": torch.as_tensor(v).clone() for n, v in values.items()}
        return kept

    def micro_batches(step: int) -> None:
        for k in range(config.accumulate):
            engine.accumulate(clips(8 * step + 4 * k, 4).to("cpu", engine.dtype))

    micro_batches(0)
    engine.step(1.0)
    before = state()
    assert any(name.endswith("exp_avg_sq") for name in before)
    micro_batches(1)  # the gradients are infinite
    if what == "loss":
        engine.skip()
    else:
        with pytest.raises(FmrizooError, match="gradient is not finite"):
            engine.step(1.0)
    after = state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    micro_batches(2)
    assert math.isfinite(engine.step(1.0))
    assert any(not torch.equal(before[name], value) for name, value in state().items())
    engine.close()


def test_good_gradients_are_dropped_too(tmp_path: Path) -> None:
    """A loss can be infinite under finite gradients, which DeepSpeed alone would step with."""

    class Far(InfiniteAt):
        def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss, logs = super().forward(batch)
            return loss + (math.inf if "sub-009" in batch.subject else 0.0), logs

    for stage in (0, 1, 2, 3):
        given = inputs(tmp_path / f"{stage}", not_finite="skip", zero_stage=stage)
        train(replace(given, model=Far(99)))
        a, _ = read_model(tmp_path / f"{stage}" / "model")
        b, _ = read_model(tmp_path / "0" / "model")
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert [r.get("skipped", False) for r in rows(tmp_path / f"{stage}")].count(True) == 1


def test_too_many_are_too_many(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"1 steps .* left out already \(train.max_skips=1\)"):
        train(skipping(tmp_path, max_skips=1))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_count_survives_a_resume(tmp_path: Path) -> None:
    train(skipping(tmp_path / "whole", dropout=0.3))
    cut = skipping(tmp_path / "cut", dropout=0.3, save_every=4, max_skips=1)
    with pytest.raises(DivergedError):
        train(cut)
    found_there = newest_valid(tmp_path / "cut" / "checkpoints")
    assert found_there is not None and found_there[1].skipped == 1
    with pytest.raises(DivergedError, match="left out already"):
        train(cut)
    done = train(skipping(tmp_path / "cut", dropout=0.3, save_every=4, max_skips=2))
    assert done.resumed_from == 4
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_checkpoints_from_before_there_were_skips(tmp_path: Path) -> None:
    from fmrizoo.trainer.checkpoint import RunState

    train(inputs(tmp_path, steps=1))
    state = json.loads((found(tmp_path / "checkpoints")[0] / "state.json").read_text())
    assert RunState(**{k: v for k, v in state.items() if k != "skipped"}).skipped == 0


def test_stopped_run_may_go_on_without_the_batch(tmp_path: Path) -> None:
    """The policy is no part of what a run is: the same folder goes on with the other one."""
    with pytest.raises(DivergedError, match=r"train\.not_finite=skip"):
        train(poisoned(inputs(tmp_path, save_every=1)))
    assert train(skipping(tmp_path, save_every=1)).step == 6
    check_against_plain_loop(tmp_path, 1, precision="fp32")


def test_dump_can_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        train(poisoned(inputs(tmp_path)))
    found = read_dump(tmp_path / "faults" / "step-000003-rank-00000.safetensors")
    want = clips(20, 4, POISON)
    assert isinstance(found.batch, Batch) and found.clip_loss is not None
    torch.testing.assert_close(found.batch.bold, want.bold, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(found.batch.mask, want.mask) and found.batch.run == want.run
    assert (found.what, found.step, found.rank) == ("loss", 3, 0)
    assert found.clip_loss.isfinite().tolist() == [True, False, True, True]
    good = replace(
        found.batch,
        bold=found.batch.bold[:1],
        **{n: getattr(found.batch, n)[:1] for n in ("mask", "tr", "start", "subject", "run")},
    )
    with torch.no_grad():
        loss, _ = tiny()(good)
    assert loss.isfinite() and tiny()(found.batch)[0].isnan()


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FILES", 1)
    monkeypatch.setattr(faults, "BYTES", 2 * 32 * 4)  # two clips of 2 × 2 × 2 × 4 numbers
    train(skipping(tmp_path))
    assert dumps(tmp_path) == ["step-000003-rank-00000.safetensors"]
    found = read_dump(tmp_path / "faults" / "step-000003-rank-00000.safetensors")
    assert found.batch.subject == ["sub-020", "sub-021"]  # the bad one and one more


def test_dump_of_cached_features(tmp_path: Path, sample_store: Path) -> None:
    work = job(sample_store, ALONE)
    given = work.inputs(tmp_path, cached=True)

    with torch.no_grad():
        parameter = next(p for p in given.model.parameters() if p.requires_grad)
        parameter.fill_(math.inf)
    with pytest.raises(DivergedError, match=r"faults/step-000001-rank-00000\.safetensors"):
        train(given)
    found = read_dump(tmp_path / "faults" / "step-000001-rank-00000.safetensors")
    assert isinstance(found.batch, ReadBatch) and found.batch.target is not None
    assert all(part.isfinite().all() for part in found.batch.read)


def test_damaged_dump_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-000001-rank-00000.safetensors"
    path.write_bytes(b"\0" * 40)
    with pytest.raises(CheckpointError, match="holds no clips of a step"):
        read_dump(path)
    with pytest.raises(CheckpointError, match="holds no clips of a step"):
        read_dump(tmp_path / "absent")


class Normed(nn.Module):
    """Batch statistics take part in every forward pass, also in one that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.norm(batch.bold.flatten(1)[:, :4]).square().mean(), {}


def test_running_statistics_are_put_back(tmp_path: Path) -> None:
    train(replace(skipping(tmp_path / "skip"), model=Normed()))
    weights, _ = read_model(tmp_path / "skip" / "model")
    assert all(value.isfinite().all() for value in weights.values())
    assert int(weights["norm.num_batches_tracked"]) == 2 * (6 - len(LEFT_OUT))


def test_ranks_that_write(tmp_path: Path) -> None:
    """Few of many ranks: the first bad ones, or those with the largest losses."""
    config = train_config(not_finite="stop")
    ranks = Ranks(ALONE, torch.device("cpu"))
    judge = faults.NotFinite(config, tmp_path, None, ranks, tiny())  # type: ignore[arg-type]
    found = [faults._Found([], rank in (3, 5, 6, 8, 9), math.inf) for rank in range(12)]
    found = [replace(one, largest=math.inf if one.bad else float(k)) for k, one in enumerate(found)]
    assert judge._writers("loss", found) == [3, 5, 6, 8]
    fine = [replace(one, bad=False, largest=float(k)) for k, one in enumerate(found)]
    assert judge._writers("gradient", fine) == [11, 10, 9, 8]

"""Two ranks over gloo: the same numbers as one process, the same answers to trouble.

Starting processes costs more than the tiny runs, so each launch does several of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from trainer_tiny import (
    Slope,
    Slopes,
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

from fmrizoo.errors import FmrizooError
from fmrizoo.trainer.device import World
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.loop import StepEvent, train

CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]


def every_stage(world: World, out: str) -> None:
    for stage, precision in CASES:
        folder = Path(out, f"{stage}-{precision}")
        train(inputs(folder, world=world, zero_stage=stage, precision=precision))
    for stage in (1, 2, 3):
        changes = {"zero_stage": stage, "precision": "bf16", "steps": 1, "clip_norm": 0.0}
        given = inputs(Path(out, f"sum-{stage}"), world=world, accumulate=1, **changes)
        train(replace(given, model=Slope(), loader_for=Slopes))


class DyingStream(TinyStream):
    """Ten micro-batches, five steps, then an error from the reader."""

    def batches(self, start: int = 0) -> Iterator[Any]:
        yield from islice(super().batches(start), 10)
        raise ConnectionError("the reader died")


def message(world: World, given: Any) -> str:
    """Of the error that training ends with on this rank."""
    try:
        train(given)
    except FmrizooError as error:
        return f"{type(error).__name__}: {error}"
    return f"rank {world.rank} raised nothing"


def trouble(world: World, out: str) -> dict[str, Any]:
    """Resume after a kill, a NaN on one rank, a signal to one rank, another recipe."""
    root, told = Path(out), {}
    for stage, precision in ((0, "fp32"), (1, "bf16"), (3, "fp32")):
        name, same = f"{stage}-{precision}", {"zero_stage": stage, "precision": precision}
        whole = inputs(root / f"whole-{name}", dropout=0.3, world=world, **same)
        train(whole)
        cut = inputs(root / f"cut-{name}", dropout=0.3, world=world, save_every=2, **same)

        try:
            train(replace(cut, loader_for=DyingStream))
        except ConnectionError:
            dist.barrier()  # rank 0 finishes what both were writing
            kept = (root / f"cut-{name}" / "checkpoints").iterdir()
            told[f"killed-{name}"] = sorted(path.name for path in kept)
        again = inputs(root / f"cut-{name}", dropout=0.3, world=world, save_every=2, **same)
        told[f"resumed-{name}"] = train(again).resumed_from

    # Step 2 holds clips 8–15; micro-batches of 2 alternate between the ranks: 11 is rank 1's.
    bad = replace(
        inputs(root / "nan", world=world),
        loader_for=lambda w, micro: TinyStream(w, micro, frozenset({11})),
    )
    told["nan"] = message(world, bad)

    def ask(event: StepEvent) -> None:  # on_step runs on rank 0 only
        if event.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(replace(inputs(root / "signal", world=world), on_step=ask))
    told["signal"] = (stopped.interrupted, stopped.step)

    def validate(model: torch.nn.Module, device: torch.device) -> dict[str, float]:
        loss, _ = model(clips(1000, 4))
        return {"loss": float(loss.detach())}

    told["plain"] = train(inputs(root / "plain", world=world, zero_stage=3)).metrics["loss"]
    checked = inputs(root / "checked", world=world, zero_stage=3, validate_every=3)
    done = train(replace(checked, validate=validate))
    told["checked"] = (done.metrics["loss"], done.validation, done.best_validation)
    told["recipe"] = message(world, inputs(root / "signal", world=world, lr=0.5))
    (root / "signal" / "checkpoints" / "step-000003" / "state.json").unlink(missing_ok=True)
    told["torn"] = message(world, inputs(root / "signal", world=world))
    return told


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stages")
    on_ranks(out, every_stage, str(out))
    return out


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("trouble")
    return out, on_ranks(out, trouble, str(out))


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_two_ranks_equal_plain_loop(stages: Path, stage: int, precision: str) -> None:
    want = reference(train_config(zero_stage=stage, precision=precision), ranks=2)
    out = stages / f"{stage}-{precision}"
    # bf16: one unit in the last place of a loss near 1 is 0.0078.
    tolerance = 1e-6 if precision == "fp32" else 0.008
    assert [r["loss"] for r in rows(out)] == pytest.approx(want.losses, abs=tolerance)
    assert [r["grad_norm"] for r in rows(out)] == pytest.approx(want.norms, abs=3 * tolerance)
    weights, _ = read_model(out / "model")
    for name, value in want.weights.items():
        limit = 1e-5 if precision == "fp32" else 0.012
        torch.testing.assert_close(weights[name], value, atol=limit, rtol=0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_of_ranks_are_summed_in_fp32(stages: Path, stage: int) -> None:
    (row,) = rows(stages / f"sum-{stage}")
    assert row["grad_norm"] == pytest.approx(4 * (1 + 2**-9) / 2, abs=1e-6)


def test_two_ranks_see_the_clips_of_one(stages: Path) -> None:
    """batch_size is that of the job: one rank with the same recipe learns the same."""
    one = reference(train_config(), ranks=1)
    assert [r["loss"] for r in rows(stages / "1-fp32")] == pytest.approx(one.losses, abs=1e-5)


@pytest.mark.parametrize("case", ["0-fp32", "1-bf16", "3-fp32"])
def test_resume_equals_uninterrupted(
    troubled: tuple[Path, list[dict[str, Any]]], case: str
) -> None:
    out, told = troubled
    kept = ["latest", "step-000002", "step-000004"]
    assert [t[f"killed-{case}"] for t in told] == [kept, kept]
    assert [t[f"resumed-{case}"] for t in told] == [4, 4]
    whole, cut = timeless(out / f"whole-{case}"), timeless(out / f"cut-{case}")
    assert [r["step"] for r in cut] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(whole, cut, strict=True):
        assert b == pytest.approx(a, abs=1e-6)


def test_nan_on_one_rank_stops_both(troubled: tuple[Path, list[dict[str, Any]]]) -> None:
    _, told = troubled
    for rank in told:
        assert "DivergedError: the loss of step 2 is not finite" in rank["nan"]
        assert all(f"sub-{i:03d}" in rank["nan"] for i in range(8, 16))


def test_signal_to_one_rank_stops_both(troubled: tuple[Path, list[dict[str, Any]]]) -> None:
    _, told = troubled
    assert [t["signal"] for t in told] == [(True, 3), (True, 3)]


def test_validation_between_steps_at_stage_3(
    troubled: tuple[Path, list[dict[str, Any]]],
) -> None:
    out, told = troubled
    weights, _ = read_model(out / "checked" / "model")
    model = tiny()
    model.load_state_dict(weights)
    want = float(model(clips(1000, 4))[0].detach())
    for rank in told:
        loss, last, best = rank["checked"]
        assert loss == rank["plain"]
        assert last["loss"] == pytest.approx(want, abs=1e-6) and best["loss"] <= last["loss"]


def test_errors_of_rank_zero_reach_both(troubled: tuple[Path, list[dict[str, Any]]]) -> None:
    _, told = troubled
    for rank in told:
        assert "RecipeError" in rank["recipe"] and "train.lr: 0.02 → 0.5" in rank["recipe"]
        assert "CheckpointError: all 1 checkpoints" in rank["torn"]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from trainer_tiny import inputs
from fmrizoo.trainer.device import discover
from fmrizoo.trainer.loop import train
world = discover()
done = train(inputs(Path(sys.argv[1]), world=world, steps=2))
assert (done.step, world.launcher) == (2, "torchrun or deepspeed"), done
"""


def test_torchrun(tmp_path: Path) -> None:
    """The launcher users call; nothing of DeepSpeed's or ours may reach stdout."""
    script = tmp_path / "work.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node=2", str(script), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    want = reference(train_config(steps=2), ranks=2)
    assert [r["loss"] for r in rows(tmp_path / "out")] == pytest.approx(want.losses, abs=1e-6)

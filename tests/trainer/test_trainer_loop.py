"""One rank: the loop's promises about folders, resuming, signals and bad losses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_tiny import TinyStream, clips, inputs, reference, rows, timeless, tiny, train_config

from fmrizoo.config import Recipe
from fmrizoo.errors import CheckpointError, RecipeError, TrainingError
from fmrizoo.trainer.device import World
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.loop import StepEvent, TrainerInputs, train


def killed_after(out: Path, step: int, **changes: object) -> None:
    """A run that dies right after ``step`` without saving anything more."""

    class Killed(BaseException):
        pass

    def kill(event: StepEvent) -> None:
        if event.step == step:
            raise Killed

    with pytest.raises(Killed):
        train(replace(inputs(out, dropout=0.3, **changes), on_step=kill))


def test_loop_equals_reference(tmp_path: Path) -> None:
    done = train(inputs(tmp_path))
    want = reference(train_config())
    got = rows(tmp_path)
    assert [r["step"] for r in got] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in got] == pytest.approx(want.losses, abs=1e-6)
    assert [r["grad_norm"] for r in got] == pytest.approx(want.norms, abs=1e-6)
    assert got[0]["lr"] == pytest.approx(0.02 / 2)  # two warm-up steps of six
    assert got[-1]["lr"] == pytest.approx(0.02 * 0.01)
    weights, info = read_model(tmp_path / "model")
    assert weights.keys() == want.weights.keys()
    for name, value in want.weights.items():
        torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0)
    assert info.step == 6 and info.parameters == sum(p.numel() for p in tiny().parameters())
    assert done.metrics == got[-1] and done.resumed_from is None and not done.interrupted


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resume_is_exact(tmp_path: Path, stage: int, precision: str) -> None:
    """Killed after step 5, the last checkpoint being of step 4; dropout draws included."""
    same = {"zero_stage": stage, "precision": precision}
    train(inputs(tmp_path / "whole", dropout=0.3, **same))
    killed_after(tmp_path / "cut", 5, save_every=2, **same)
    assert len(rows(tmp_path / "cut")) == 5
    done = train(inputs(tmp_path / "cut", dropout=0.3, save_every=2, **same))
    assert done.resumed_from == 4
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    a, _ = read_model(tmp_path / "whole" / "model")
    b, _ = read_model(tmp_path / "cut" / "model")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_dropout_would_show_in_the_losses(tmp_path: Path) -> None:
    """The exactness above is not vacuous: another dropout stream gives other losses."""
    train(inputs(tmp_path / "a", dropout=0.3, steps=2))
    train(inputs(tmp_path / "b", dropout=0.3, steps=2, seed=1))
    assert rows(tmp_path / "a")[0]["loss"] != rows(tmp_path / "b")[0]["loss"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_torn_checkpoint_falls_back(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(inputs(tmp_path / "whole", dropout=0.3))
    out = tmp_path / "cut"
    killed_after(out, 5, save_every=2)
    newest = out / "checkpoints" / "step-000004"
    victim = max(newest.rglob("*.pt"), key=lambda p: p.stat().st_size)
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "remove":
        victim.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    done = train(inputs(out, dropout=0.3, save_every=2))
    assert done.resumed_from == 2
    assert any(str(newest) in r.getMessage() and r.levelname == "ERROR" for r in caplog.records)
    assert timeless(out) == timeless(tmp_path / "whole")


def test_all_checkpoints_torn(tmp_path: Path) -> None:
    killed_after(tmp_path, 5, save_every=2)
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints .* are damaged"):
        train(inputs(tmp_path, dropout=0.3, save_every=2))


def test_partial_checkpoint_is_cleared_and_old_ones_dropped(tmp_path: Path) -> None:
    killed_after(tmp_path, 3, save_every=2)
    shutil.copytree(
        tmp_path / "checkpoints" / "step-000002", tmp_path / "checkpoints" / "step-000003.partial"
    )
    done = train(inputs(tmp_path, dropout=0.3, save_every=1, keep=3))
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step-000004", "step-000005", "step-000006"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000006\n"
    assert [p.name for p in done.checkpoints] == ["step-000006", "step-000005", "step-000004"]


def test_changed_recipe_is_refused_and_safe_keys_are_not(tmp_path: Path) -> None:
    killed_after(tmp_path, 3, save_every=2)
    with pytest.raises(RecipeError, match=r"train\.lr: 0\.02 → 0\.01"):
        train(inputs(tmp_path, dropout=0.3, save_every=2, lr=0.01))
    with pytest.raises(RecipeError, match=r"train\.steps: 6 → 7"):
        train(inputs(tmp_path, dropout=0.3, save_every=2, steps=7))
    changed = inputs(tmp_path, dropout=0.3, save_every=3, log_every=2, keep=1, device="auto")
    changed.recipe.data.threads = 5
    changed.recipe.data.store = "/elsewhere"
    assert train(changed).resumed_from == 2


def test_finished_run_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = train(inputs(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    caplog.set_level("INFO")
    again = train(inputs(tmp_path))
    assert again.already_finished and again.metrics == first.metrics and again.step == 6
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    assert "already finished" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_saves_and_resumes(tmp_path: Path, number: signal.Signals) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def ask(event: StepEvent) -> None:
        if event.step == 2:
            os.kill(os.getpid(), number)

    train(inputs(tmp_path / "whole", dropout=0.3))
    cut = tmp_path / "cut"
    stopped = train(replace(inputs(cut, dropout=0.3), on_step=ask))
    assert stopped.interrupted and stopped.model is None and not (cut / "model").exists()
    assert stopped.step == 3 and [p.name for p in stopped.checkpoints] == ["step-000003"]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    done = train(inputs(cut, dropout=0.3))
    assert done.resumed_from == 3 and not done.interrupted
    assert timeless(cut) == timeless(tmp_path / "whole")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_nan_clip_stops_with_subjects(tmp_path: Path, stage: int) -> None:
    given = inputs(tmp_path, zero_stage=stage, save_every=1)
    poisoned = frozenset({8 * 3 + 5})
    bad = replace(given, loader_for=lambda world, micro: TinyStream(world, micro, poisoned))
    with pytest.raises(TrainingError, match=r"the loss of step 4 .* sub-024, .*sub-029") as caught:
        train(bad)
    assert "sub-032" not in str(caught.value)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3]
    done = train(inputs(tmp_path, zero_stage=stage, save_every=1))  # the data mended
    assert done.resumed_from == 3 and done.step == 6


class InfiniteSlope(nn.Module):
    """A finite loss whose gradient is not: the square root at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))

    def forward(self, batch: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.weight.square().sum().sqrt() * 1.0, {}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_infinite_gradient_stops(tmp_path: Path, stage: int, precision: str) -> None:
    given = inputs(tmp_path, zero_stage=stage, precision=precision)
    with pytest.raises(TrainingError, match="the gradient of step 1 is not finite"):
        train(replace(given, model=InfiniteSlope()))
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_batch_size_must_divide(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"batch_size=7 .* multiple of 2"):
        train(inputs(tmp_path, batch_size=7))
    assert not tmp_path.joinpath("recipe.yaml").exists()


@pytest.mark.parametrize("stage", [1, 3])
def test_validation_leaves_training_alone(tmp_path: Path, stage: int) -> None:
    """Validating draws random numbers and switches modes; the losses must not notice."""
    seen: list[bool] = []

    def validate(model: nn.Module, device: torch.device) -> dict[str, float]:
        seen.append(model.training)
        assert not torch.is_grad_enabled()
        torch.rand(5)
        loss, _ = model(clips(10_000, 4).to(device, next(model.parameters()).dtype))
        return {"loss": float(loss.detach()), "undefined": float("nan")}

    train(inputs(tmp_path / "plain", dropout=0.3, zero_stage=stage))
    given = inputs(tmp_path / "with", dropout=0.3, validate_every=2, zero_stage=stage)
    done = train(replace(given, validate=validate))
    assert seen == [False, False, False]
    got = timeless(tmp_path / "with")
    validations = [row.pop("validation", None) for row in got]
    assert got == timeless(tmp_path / "plain")
    assert [v is not None for v in validations] == [False, True] * 3
    values = [v["loss"] for v in validations if v]
    assert len(set(values)) == 3 and all(set(v) == {"loss"} for v in validations if v)
    assert done.validation == validations[-1]
    assert done.best_validation == {"loss": min(values)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_may_use_any_method(tmp_path: Path, precision: str) -> None:
    """ZeRO 3 must have put together what no module's forward asks for, at every batch anew."""

    def validate(model: nn.Module, device: torch.device) -> dict[str, float]:
        values = []
        for first in (0, 4):
            batch = clips(10_000 + first, 4).to(device, next(model.parameters()).dtype)
            tokens = model.backbone.tokenize(batch.bold)  # type: ignore[union-attr,operator]
            features = model.backbone.encode(tokens)  # type: ignore[union-attr,operator]
            values.append(float((features.values * model.objective.mask_token).mean()))  # type: ignore[union-attr]
        return {"loss": values[0] + values[1]}

    done = []
    for zero in (1, 3):
        changes = {"validate_every": 2, "precision": precision, "zero_stage": zero}
        train(replace(inputs(tmp_path / f"{zero}", **changes), validate=validate))
        done.append([row["validation"]["loss"] for row in rows(tmp_path / f"{zero}")[1::2]])
    # Mean over 192 numbers of size 1; one bf16 unit in the last place of a weight near 1.
    assert done[1] == pytest.approx(done[0], abs=1e-6 if precision == "fp32" else 0.008)


def test_log_every_thins_the_file_only(tmp_path: Path) -> None:
    train(inputs(tmp_path / "all"))
    train(inputs(tmp_path / "some", log_every=4))
    every = {row["step"]: row for row in timeless(tmp_path / "all")}
    assert timeless(tmp_path / "some") == [every[4], every[6]]


def test_run_folder_says_what_ran(tmp_path: Path) -> None:
    from fmrizoo.config import compose

    given = inputs(tmp_path, steps=1)
    train(given)
    assert compose(tmp_path / "recipe.yaml") == given.recipe
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__.split("+")[0] or env["versions"]["torch"]
    assert env["device"] == "cpu" and env["world_size"] == 1 and env["resumed_from"] is None


def test_checkpointing_reaches_the_backbone(tmp_path: Path) -> None:
    given = inputs(tmp_path, steps=1, checkpointing="block")
    train(given)
    assert given.model.backbone.checkpointing == "block"  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match="Linear cannot recompute"):
        train(replace(inputs(tmp_path / "b", checkpointing="block"), model=nn.Linear(2, 2)))


def test_stream_is_closed_after_training_and_after_an_error(tmp_path: Path) -> None:
    streams: list[TinyStream] = []

    def loader(world: World, micro: int) -> TinyStream:
        streams.append(TinyStream(world, micro))
        return streams[-1]

    train(replace(inputs(tmp_path / "a", steps=1), loader_for=loader))

    def fail(event: StepEvent) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(replace(inputs(tmp_path / "b"), loader_for=loader, on_step=fail))
    assert [s.closed for s in streams] == [True, True]


def test_full_disk_at_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fmrizoo.trainer.loop as loop

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "seal", full)
        with pytest.raises(CheckpointError, match=r"checkpoint of step 6 .*No space left"):
            train(inputs(tmp_path))
    assert not (tmp_path / "model").exists() and not list((tmp_path / "checkpoints").iterdir())
    assert train(inputs(tmp_path)).step == 6


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write recipe\.yaml and env\.json to"):
        train(inputs(tmp_path / "file" / "run"))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_lost_export_is_made_again(tmp_path: Path, stage: int) -> None:
    """A crash between the last checkpoint and the export costs no step."""
    train(inputs(tmp_path, zero_stage=stage))
    first, _ = read_model(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    done = train(inputs(tmp_path, zero_stage=stage))
    assert done.resumed_from == done.step == 6 and not done.already_finished
    again, _ = read_model(tmp_path / "model")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_checkpoint_of_another_model_is_refused(tmp_path: Path, stage: int) -> None:
    """The code changed under the recipe's feet."""
    killed_after(tmp_path, 3, save_every=2, zero_stage=stage)
    other = tiny(0.3)
    other.backbone.hidden = nn.Linear(6, 24)
    other.backbone.out = nn.Linear(24, 6)
    given = inputs(tmp_path, dropout=0.3, save_every=2, zero_stage=stage)
    with pytest.raises(CheckpointError, match="step-000002 does not fit this model"):
        train(replace(given, model=other))


def test_frozen_encoder_is_exported_unrounded(tmp_path: Path) -> None:
    """bf16 training must not hand back a pretrained encoder rounded to bf16."""
    given = TrainerInputs(
        tiny(frozen=True),
        Recipe(train=train_config(precision="bf16")),
        tmp_path,
        TinyStream,
        World(),
    )
    train(given)
    weights, _ = read_model(tmp_path / "model")
    before = tiny().state_dict()
    for name, value in before.items():
        assert weights[name].dtype == value.dtype
        assert torch.equal(weights[name], value) == (not name.startswith("objective."))

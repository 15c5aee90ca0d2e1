"""Early stopping and the weights of the best validation, on one rank."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_tiny import TinyModel, clips, inputs, rows, timeless, tiny

from fmrizoo.config import Recipe, TrainConfig, to_dict
from fmrizoo.errors import CheckpointError, RecipeError, TrainingError
from fmrizoo.trainer.export import read_info, read_model
from fmrizoo.trainer.folder import deciding_keys
from fmrizoo.trainer.loop import StepEvent, TrainerInputs, train
from fmrizoo.trainer.validation import Watch, lower_is_better

Validate = Callable[[nn.Module, torch.device], dict[str, float]]
SLOW = pytest.param(3, "bf16", marks=pytest.mark.slow)  # 2 and 1 in bf16, and 3 in fp32, are fast
STAGES = [(0, "fp32"), (1, "fp32"), (2, "bf16"), (1, "bf16"), (3, "fp32"), SLOW]


class Counting(TinyModel):
    """A buffer that training changes: micro-batches seen."""

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training:
            self.counts += 1
        return super().forward(batch)


def counting(dropout: float = 0.3) -> Counting:
    torch.manual_seed(7)
    model = Counting(dropout)
    model.backbone.embed.requires_grad_(False)
    return model


def script(*values: float, metric: str = "loss") -> Validate:
    """One value a validation, whatever the model."""
    left = iter(values)
    return lambda model, device: {metric: next(left)}


def loss_of(model: nn.Module, device: torch.device) -> dict[str, float]:
    dtype = next(model.parameters()).dtype
    # Clip by clip: a mean of bf16 losses is finer than one bf16 loss.
    losses = [model(clips(10_000 + i, 1).to(device, dtype))[0] for i in range(16)]
    return {"loss": sum(float(loss) for loss in losses) / len(losses)}


class Distance:
    """How far a held-out loss is from a given one: lowest where the model had that loss."""

    def __init__(self, goal: float) -> None:
        self.goal = goal

    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        return {"loss": abs(loss_of(model, device)["loss"] - self.goal)}


def given(out: Path, validate: Validate, **changes: Any) -> TrainerInputs:
    base = {"validate_every": 1, **changes}
    return replace(inputs(out, **base), model=counting(), validate=validate)


def distance(out: Path, step: int, **changes: Any) -> Distance:
    """Best after ``step`` of a run with ``changes``, by the path that a plain run takes."""
    train(given(out, loss_of, **changes))
    values = {row["step"]: row["validation"]["loss"] for row in rows(out)}
    assert list(values.values()).count(values[step]) == 1
    return Distance(values[step])


def same_weights(a: Path, b: Path) -> bool:
    x, y = (read_model(p / "model")[0] for p in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


# --- which validation is better -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("loss", True),
        ("age.loss", True),
        ("mae", True),
        ("age.mae", True),
        ("balanced_accuracy", False),
        ("sex.auc", False),
        ("r2", False),
        ("gloss", False),
    ],
)
def test_direction(metric: str, lower: bool) -> None:
    assert lower_is_better(metric) is lower
    watch = Watch(TrainConfig(monitor=metric, patience=9, validate_every=1))
    taken = [watch.take(i, {metric: v}) for i, v in enumerate((0.5, 0.5, 0.4, 0.6, 0.5), start=1)]
    assert taken == (
        [True, False, True, False, False] if lower else [True, False, False, True, False]
    )
    assert (watch.step, watch.waited) == ((3, 2) if lower else (4, 1))


def test_missing_metric_is_named_at_the_first_validation(tmp_path: Path) -> None:
    def validate(model: nn.Module, device: torch.device) -> dict[str, float]:
        return {"loss": 1.0, "auc": float("nan"), "accuracy": 0.5}

    for name, wanted in (("a", {"patience": 1}), ("b", {"keep_best": True}), ("c", {})):
        with pytest.raises(
            TrainingError,
            match=r"first validation \(step 2\) has no value of train.monitor='auc'; it has "
            r"accuracy, loss",
        ):
            train(given(tmp_path / name, validate, monitor="auc", validate_every=2, **wanted))


def test_metric_that_vanishes_is_not_better(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch(TrainConfig(monitor="auc", patience=2, validate_every=1))
    assert watch.take(1, {"auc": 0.5}) and not watch.take(2, {"loss": 1.0})
    assert "step 2 has no value of auc" in caplog.text and not watch.over
    assert not watch.take(3, {}) and watch.over and watch.best == {"auc": 0.5}


def test_default_metric_that_nobody_gives_and_nothing_needs(tmp_path: Path) -> None:
    done = train(given(tmp_path, script(*range(6), metric="accuracy")))
    assert done.best_validation == {"accuracy": 5.0} and done.best_step == 6


def test_best_validation_is_by_the_monitor(tmp_path: Path) -> None:
    values = script(0.1, 0.7, 0.3, 0.7, 0.2, 0.1, metric="accuracy")
    done = train(given(tmp_path, values, monitor="accuracy"))
    assert done.best_validation == {"accuracy": 0.7} and done.best_step == 2
    assert not (tmp_path / "best").exists() and read_info(tmp_path / "model").step == 6


@pytest.mark.parametrize("key", ["patience", "keep_best"])
def test_needs_validation_clips(tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=rf"train\.{key}=1 needs validation clips"):
        train(inputs(tmp_path, validate_every=1, **{key: 1}))
    assert files(tmp_path) == []


# --- early stopping -------------------------------------------------------------------------------


def test_patience_ends_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train(given(tmp_path / "whole", script(*[1.0] * 6)))
    falls = (0.9, 0.8, 0.8, 0.85)  # equal is not better
    done = train(given(tmp_path / "cut", script(*falls), patience=2))
    assert (done.step, done.stopped_early, done.interrupted) == (4, True, False)
    assert done.best_validation == {"loss": 0.8} and done.best_step == 2
    assert "stopped after step 4 of 6: 2 validations no better than that of step 2" in caplog.text
    got, want = timeless(tmp_path / "cut"), timeless(tmp_path / "whole")[:4]
    assert [row.pop("stopped_early", False) for row in got] == [False, False, False, True]
    # The schedule is that of all steps: the rows are those of the longer run.
    for a, b in zip(got, want, strict=True):
        assert a | {"validation": None} == b | {"validation": None}
    info = read_info(tmp_path / "cut" / "model")
    assert (info.step, info.steps_taken, info.stopped_early) == (4, 4, True)
    assert files(tmp_path / "cut" / "checkpoints") == ["latest", "step-000004"]
    again = train(given(tmp_path / "cut", script(), patience=2))
    assert again.already_finished and again.stopped_early and again.step == 4
    assert again.best_validation == {"loss": 0.8} and again.best_step == 2


def test_patience_that_runs_out_at_the_last_step_stops_nothing(tmp_path: Path) -> None:
    done = train(given(tmp_path, script(*range(6)), patience=5))
    assert not done.stopped_early and done.step == 6 and "stopped_early" not in rows(tmp_path)[-1]
    info = read_info(tmp_path / "model")
    assert (info.steps_taken, info.stopped_early) == (6, False)
    assert train(given(tmp_path, script(), patience=5)).already_finished


STOPPING = {"patience": 3, "save_every": 2, "keep_best": True}
KEEPING = {"save_every": 2, "keep_best": True}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Distance, Path]:
    """A run that is best after step 2, so that patience 3 ends it after step 5."""
    root = tmp_path_factory.mktemp("stopped")
    goal = distance(root / "plain", 2)
    assert train(given(root / "whole", goal, **STOPPING)).step == 5
    return goal, root / "whole"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Distance, Path]:
    """A run that is best after step 3 of 6."""
    root = tmp_path_factory.mktemp("kept")
    goal = distance(root / "plain", 3)
    train(given(root / "whole", goal, **KEEPING))
    return goal, root / "whole"


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])
def test_stopping_survives_a_kill(tmp_path: Path, stopped: tuple[Distance, Path], cut: int) -> None:
    (goal, whole), same = stopped, STOPPING
    kill(given(tmp_path / "cut", goal, **same), cut)
    done = train(given(tmp_path / "cut", goal, **same))
    # The checkpoint of step 5 was published before the kill: nothing is left but the export.
    assert done.resumed_from == {1: None, 2: 2, 3: 2, 4: 4, 5: 5}[cut]
    assert done.stopped_early and done.step == 5
    assert timeless(tmp_path / "cut") == timeless(whole)
    assert same_weights(tmp_path / "cut", whole)


def test_a_signal_in_the_last_step_before_stopping(tmp_path: Path) -> None:
    def ask(event: StepEvent) -> None:
        if event.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping = given(tmp_path, script(0.1, 0.2), patience=1)
    done = train(replace(stopping, on_step=ask))
    assert done.stopped_early and not done.interrupted and done.step == 2


# --- the best weights -----------------------------------------------------------------------------


def kill(job: TrainerInputs, step: int) -> None:
    """Run it, and die right after ``step`` without saving anything more."""

    class Killed(BaseException):
        pass

    def now(event: StepEvent) -> None:
        if event.step == step:
            raise Killed

    with pytest.raises(Killed):
        train(replace(job, on_step=now))


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_exports_the_weights_of_the_best_step(tmp_path: Path, stage: int, precision: str) -> None:
    """Against a run of the same schedule that ends after that step."""
    same = {"zero_stage": stage, "precision": precision}
    ends = given(tmp_path / "ends", script(0.5, 0.4, 0.3, 0.9), patience=1, **same)
    # Its last step is the first that is not better: 4.
    assert train(ends).step == 4
    best = given(tmp_path / "best", script(9, 8, 7, 1, 2, 3), keep_best=True, **same)
    done = train(best)
    assert (done.step, done.best_step, done.stopped_early) == (6, 4, False)
    assert same_weights(tmp_path / "best", tmp_path / "ends")
    weights, info = read_model(tmp_path / "best" / "model")
    assert (info.step, info.steps_taken, info.stopped_early) == (4, 6, False)
    assert info.parameters == sum(p.numel() for p in tiny().parameters())
    # Frozen weights unrounded; buffers of step 4, two micro-batches each.
    assert torch.equal(weights["backbone.embed.weight"], tiny().backbone.embed.weight)
    assert torch.equal(weights["counts"], torch.arange(3) + 8)
    assert files(tmp_path / "best" / "best") == ["step-000004.safetensors"]
    train(given(tmp_path / "last", script(*range(6)), **same))
    assert not same_weights(tmp_path / "best", tmp_path / "last")


def test_only_what_training_may_change_is_written(tmp_path: Path) -> None:
    from safetensors import safe_open

    train(given(tmp_path, script(*range(6)), keep_best=True))
    with safe_open(tmp_path / "best" / "step-000001.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(tiny().state_dict()) - {"backbone.embed.weight", "backbone.embed.bias"}


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("how", ["kill", "signal"])
def test_best_survives_the_end_at_any_step(
    tmp_path: Path, kept: tuple[Distance, Path], cut: int, how: str
) -> None:
    (goal, whole), same = kept, KEEPING
    job = given(tmp_path / "cut", goal, **same)
    if how == "kill":
        kill(job, cut)
    else:

        def ask(event: StepEvent) -> None:
            if event.step == cut:
                os.kill(os.getpid(), signal.SIGTERM)

        train(replace(job, on_step=ask))
    done = train(given(tmp_path / "cut", goal, **same))
    assert done.step == 6 and done.best_step == 3
    assert timeless(tmp_path / "cut") == timeless(whole)
    assert same_weights(tmp_path / "cut", whole)
    assert files(tmp_path / "cut" / "best") == ["step-000003.safetensors"]


@pytest.mark.parametrize(("stage", "precision"), STAGES)
def test_resume_with_best_is_exact_everywhere(tmp_path: Path, stage: int, precision: str) -> None:
    same = {"zero_stage": stage, "precision": precision}
    goal = distance(tmp_path / "plain", 3, **same)
    train(given(tmp_path / "whole", goal, keep_best=True, **same))
    kill(given(tmp_path / "cut", goal, keep_best=True, save_every=2, **same), 5)
    done = train(given(tmp_path / "cut", goal, keep_best=True, save_every=2, **same))
    assert done.resumed_from == 4 and done.best_step == 3
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    # Gathering weights between steps changes nothing of the training either.
    plain = [{**r, "validation": None} for r in timeless(tmp_path / "plain")]
    assert [{**r, "validation": None} for r in timeless(tmp_path / "cut")] == plain
    assert same_weights(tmp_path / "cut", tmp_path / "whole")


def test_files_that_a_kept_checkpoint_counts_on_stay(tmp_path: Path) -> None:
    falling = {"keep_best": True, "save_every": 2, "keep": 2}
    kill(given(tmp_path, script(6, 5, 4, 3, 2, 1), **falling), 5)
    assert files(tmp_path / "checkpoints") == ["latest", "step-000002", "step-000004"]
    assert files(tmp_path / "best") == [f"step-00000{i}.safetensors" for i in (2, 4, 5)]
    train(given(tmp_path, script(2, 1), **falling))
    assert files(tmp_path / "best") == [f"step-00000{i}.safetensors" for i in (4, 6)]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_torn_best_weights(
    tmp_path: Path,
    kept: tuple[Distance, Path],
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An older checkpoint, whose best weights are whole, makes them again; else it is said."""
    (goal, whole), same = kept, KEEPING
    out = tmp_path / "cut"
    kill(given(out, goal, **same), 5)
    harm(out / "best" / "step-000003.safetensors", damage)
    # Of step 2, and of step 4 with the best of step 3.
    done = train(given(out, goal, **same))
    assert done.resumed_from == 2
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1 and "step-000004 is damaged and not used" in errors[0]
    assert "best weights best/step-000003.safetensors" in errors[0]
    assert timeless(out) == timeless(whole) and same_weights(out, whole)
    # Finished: nothing is read any more.
    harm(out / "best" / "step-000003.safetensors", damage)
    assert train(given(out, goal, **same)).already_finished
    shutil.rmtree(out / "model")
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints .* are damaged"):
        train(given(out, goal, **same))


def harm(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[-3] ^= 1
        path.write_bytes(content)


def test_full_disk_at_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fmrizoo.trainer.best as best

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(best, "publish", full)
        with pytest.raises(CheckpointError, match=r"best weights \(of step 1\) .*No space left"):
            train(given(tmp_path, script(*range(6)), keep_best=True))
    assert files(tmp_path / "best") == []
    assert train(given(tmp_path, script(*range(6)), keep_best=True)).step == 6


def test_lost_export_is_made_again_from_the_best(tmp_path: Path) -> None:
    train(given(tmp_path, script(3, 2, 9, 9), keep_best=True, patience=2))
    first, info = read_model(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    done = train(given(tmp_path, script(), keep_best=True, patience=2))
    again, same = read_model(tmp_path / "model")
    assert done.resumed_from == 4 and done.stopped_early and info == same and info.step == 2
    assert all(torch.equal(first[name], again[name]) for name in first)


# --- which keys may change ------------------------------------------------------------------------


def test_validate_every_decides_once_something_hangs_on_it(tmp_path: Path) -> None:
    kill(given(tmp_path / "free", loss_of, save_every=2), 3)
    assert train(given(tmp_path / "free", loss_of, save_every=2, validate_every=3)).step == 6
    kill(given(tmp_path / "bound", loss_of, save_every=2, patience=9), 3)
    with pytest.raises(RecipeError, match=r"\(train\.validate_every: 1 → 3\)"):
        train(given(tmp_path / "bound", loss_of, save_every=2, patience=9, validate_every=3))
    with pytest.raises(RecipeError, match=r"\(train\.patience: 9 → 5\)"):
        train(given(tmp_path / "bound", loss_of, save_every=2, patience=5))
    for key, value in (("keep_best", True), ("monitor", "mae")):
        with pytest.raises(RecipeError, match=rf"train\.{key}: "):
            train(given(tmp_path / "free", loss_of, save_every=2, **{key: value}))


def test_turning_patience_on_names_only_what_changed() -> None:
    plain = Recipe(train=TrainConfig(validate_every=2))
    judged = Recipe(train=TrainConfig(validate_every=2, patience=3))
    a, b = deciding_keys(to_dict(plain), to_dict(judged))
    assert {k for k in a | b if a.get(k) != b.get(k)} == {"train.patience"}
    assert {"train.monitor", "train.keep_best", "train.cache_features"} <= a.keys()

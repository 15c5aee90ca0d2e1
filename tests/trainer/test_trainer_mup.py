"""muP through the real trainer: rates that parameters move at, files, resume, fine-tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fmrizoo import pipeline
from fmrizoo.config import Recipe
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.mup.stored import read_parametrization
from fmrizoo.trainer.device import World, init_distributed
from fmrizoo.trainer.engine import Engine, param_groups
from fmrizoo.trainer.export import read_info
from fmrizoo.types import Batch
from fmrizoo.zoo import build_model, load, load_recipe

WIDE = {
    "swin4d": ["embed_dim=16", "depths=[2,2]", "num_heads=[2,4]"],
    "swin_factorized": ["embed_dim=24", "depths=[4,4]", "num_heads=[4,8]"],
    "neuromamba": ["embed_dim=32", "depth=2", "d_state=8", "head_dim=8"],
}
BASE = {
    "swin4d": "{embed_dim: 8, num_heads: [1, 2]}",
    "swin_factorized": "{embed_dim: 12, num_heads: [2, 4]}",
    "neuromamba": "{embed_dim: 16}",
}
NAMES = sorted(WIDE)


def recipe_of(name: str, objective: str, store: Path | str = "", *more: str) -> Recipe:
    given = [f"backbone.{text}" for text in WIDE[name]]
    given += ["parametrization.name=mup", f"parametrization.base={BASE[name]}"]
    given += ["train.steps=3", "train.batch_size=4", "train.validate_every=0", "train.warmup=0"]
    given += [f"data.store={store}"] * bool(store)
    return load_recipe(f"pretrain/haxby_{name}_{objective}", [*given, *more])


def batch_of(recipe: Recipe) -> Batch:
    torch.manual_seed(0)
    x, y, z, t = recipe.backbone.img_size
    mask = torch.ones(2, x, y, z, dtype=torch.bool)
    bold = torch.randn(2, 1, x, y, z, t)
    return Batch(bold, mask, torch.ones(2), ["a"] * 2, ["r"] * 2, torch.zeros(2),
                 seed=torch.arange(2))  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("objective", ["simmim", "ar"])
@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_moves_every_parameter_at_its_rate(
    name: str, objective: str, stage: int
) -> None:
    """Adam's first step is lr · lr_scale · sign(gradient): the median over each, within 1 %."""
    more = [f"train.zero_stage={stage}", "train.weight_decay=0", "train.eps=1e-20",
            "train.clip_norm=0", "train.batch_size=2", "train.lr=1e-3",
            "parametrization.readout_zero_init=false"]  # fmt: skip
    recipe = recipe_of(name, objective, "", *more)
    torch.manual_seed(0)
    model = build_model(recipe)
    rules = model.parametrization.groups(model)
    assert len({rule.lr_scale for rule in rules.values()}) == 2
    before = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    init_distributed(World(), torch.device("cpu"))
    engine = Engine(model.train(), recipe.train, World(), torch.device("cpu"))
    engine.accumulate(batch_of(recipe))
    engine.step(1.0)
    after = {n: v.double() for n, v in engine.weights() if n in before}
    engine.close()
    moved = 0
    for key, value in after.items():
        change = (value - before[key]).abs()
        change = change[change > 0]
        if not len(change):
            continue
        moved += 1
        # fp32 rounds a step of 1e-3 on a weight near 1 by 1e-4 of it.
        assert change.median().item() / (1e-3 * rules[key].lr_scale) == pytest.approx(
            1, abs=0.01
        ), key
    assert moved > 0.9 * sum(p.requires_grad for p in model.parameters())


def test_groups_are_few_and_follow_the_table() -> None:
    recipe = recipe_of("swin4d", "simmim")
    model = build_model(recipe)
    groups = param_groups(model, recipe.train)
    assert 3 <= len(groups) <= 6
    rules = model.parametrization.groups(model)
    by_id = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            rule = rules[by_id[id(parameter)]]
            assert group["lr"] == recipe.train.lr * rule.lr_scale
            assert group["eps"] == recipe.train.eps * rule.eps_scale
            decay = recipe.train.weight_decay * rule.wd_scale if rule.decays else 0.0
            assert group["weight_decay"] == decay
            # Independent of the width: rate × decay is what it is at base width.
            if decay:
                product = group["lr"] * group["weight_decay"]
                assert product == pytest.approx(recipe.train.lr * recipe.train.weight_decay)


@pytest.mark.parametrize(("mode", "power"), [("independent", 0), ("sqrt", -0.5), ("coupled", -1)])
def test_weights_shrink_by_rate_times_decay_which_follows_the_mode(mode: str, power: float) -> None:
    """A real engine step on a loss without gradient: AdamW's update is 0, its decay is all."""
    lr, decay = 0.01, 0.5
    init_distributed(World(), torch.device("cpu"))
    for times in (1, 2, 4):
        heads = f"backbone.num_heads=[{times},{2 * times}]"
        more = [f"backbone.embed_dim={8 * times}", heads, f"train.lr={lr}", "train.clip_norm=0",
                f"train.weight_decay={decay}", "train.batch_size=2",
                "train.precision=fp32", "parametrization.readout_zero_init=false",
                f"parametrization.weight_decay={mode}"]  # fmt: skip
        recipe = recipe_of("swin4d", "simmim", "", *more)
        torch.manual_seed(0)
        model = build_model(recipe)
        rules = model.parametrization.table
        before = {n: p.detach().clone().double() for n, p in model.named_parameters()}
        wants = {n: p.requires_grad for n, p in model.named_parameters()}
        given = model.forward
        model.forward = lambda batch, given=given: (  # type: ignore[method-assign]
            given(batch)[0] * 0.0,
            given(batch)[1],
        )
        engine = Engine(model.train(), recipe.train, World(), torch.device("cpu"))
        engine.accumulate(batch_of(recipe))
        engine.step(1.0)
        after = {n: v.double() for n, v in engine.weights() if n in before}
        engine.close()
        for name, rule in rules.items():
            shrunk = 0.0
            if wants[name] and rule.decay:
                shrunk = lr * decay * (times**power if rule.role == "hidden" else 1.0)
            expected = before[name] * (1 - shrunk)
            torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-8, msg=name)


@pytest.fixture(scope="module")
def trained(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mup") / "pre"
    pipeline.pretrain(recipe_of("swin4d", "simmim", sample_store, "train.save_every=2"), out)
    return out


def test_the_file_travels_with_every_checkpoint_and_model(trained: Path) -> None:
    stored = read_parametrization(trained / "model")
    assert stored is not None and stored.m == 2
    for folder in (trained / "checkpoints").glob("step-*"):
        assert read_parametrization(folder) == stored
        manifest = json.loads((folder / "manifest.json").read_text())
        assert "parametrization.json" in manifest["files"]
    assert load(trained).parametrization == stored


def test_other_multipliers_are_refused_at_load(trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained / "model", tmp_path / "model")
    (model / "parametrization.json").unlink()
    with pytest.raises(CheckpointError, match="were trained with parametrization"):
        load(model)
    file = shutil.copytree(trained / "model", tmp_path / "other") / "parametrization.json"
    values = json.loads(file.read_text())
    values["multipliers"]["output"] = 3.0
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="multipliers"):
        load(tmp_path / "other")
    file.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load(tmp_path / "other")


def test_fine_tuning_takes_the_parametrization_over(
    trained: Path, sample_store: Path, tmp_path: Path
) -> None:
    given = [f"backbone.{text}" for text in WIDE["swin4d"]]
    given += ["objective=null", "head=lora", "head.rank=2", f"data.store={sample_store}"]
    given += ["train.steps=2", "train.batch_size=4", f"init_from={trained}"]
    recipe = load_recipe("pretrain/haxby_swin4d_simmim", given)
    assert recipe.parametrization.name == "sp"
    assert pipeline.finetune(recipe, tmp_path / "run") is not None
    assert load_recipe(tmp_path / "run/recipe.yaml").parametrization.name == "mup"
    tuned = read_parametrization(tmp_path / "run/model")
    assert tuned is not None and tuned.m == 2
    assert any("lora_A" in name and rule.role == "hidden" for name, rule in tuned.table.items())
    assert read_info(tmp_path / "run/model").step == 2
    again = pipeline.finetune(recipe, tmp_path / "run")
    assert again is not None, "the same command finds the finished run"
    other = load_recipe(
        "pretrain/haxby_swin4d_simmim",
        [
            *given,
            "parametrization.name=mup",
            "parametrization.base={embed_dim: 16, num_heads: [2,4]}",
        ],
    )
    with pytest.raises(RecipeError, match="leave the section out"):
        pipeline.finetune(other, tmp_path / "other")


def test_a_resumed_run_takes_the_same_steps(sample_store: Path, tmp_path: Path) -> None:
    import os
    import signal

    from fmrizoo.trainer.inputs import StepEvent

    recipe = recipe_of("neuromamba", "simmim", sample_store)
    pipeline.pretrain(recipe, tmp_path / "whole")

    def stop(event: StepEvent) -> None:
        if event.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert pipeline.pretrain(recipe, tmp_path / "cut", on_step=stop).interrupted
    assert pipeline.pretrain(recipe, tmp_path / "cut").resumed_from == 2
    losses = [
        [json.loads(x)["loss"] for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("whole", "cut")
    ]
    assert losses[0] == losses[1]

"""Folding: a plain model with the outputs of the muP model, and the files that go with it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mup_tiny import BACKBONES, BASE, HEADS, MOST, OBJECTIVES, TASKS, model, recipe
from test_start import batch
from torch import Tensor, nn
from typer.testing import CliRunner

from fmrizoo import zoo
from fmrizoo.cli import app
from fmrizoo.config import Recipe, to_dict
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.model import DownstreamModel
from fmrizoo.mup.fold import fold, folded_recipe
from fmrizoo.pipeline.folding import fold_model
from fmrizoo.trainer.export import ModelInfo, save_model
from fmrizoo.types import Backbone

MULTIPLIERS = {"output_mult": 2.5, "input_mult": 0.7}


def trained(backbone: str, part: str) -> tuple[Recipe, nn.Module]:
    """Of 3 times the base width, heads of another size; every parameter away from its start."""
    given: dict[str, object] = dict(MULTIPLIERS)
    if "depths" in BACKBONES[backbone]:
        given |= {"attn_mult": 1.7, "base": {"embed_dim": BASE, "num_heads": [1, 4]}}
    made = recipe(backbone, part, 3, **given)
    torch.manual_seed(0)
    built = model(made)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.abs().mean() + 0.01)
    return made, built.eval()


@torch.no_grad()
def outputs(built: nn.Module, double: bool = False) -> list[Tensor]:
    clips = batch(target=isinstance(built, DownstreamModel))
    if double:
        clips = clips.to("cpu", torch.float64)
    torch.manual_seed(1)
    if isinstance(built, Backbone):
        return [stage.values for stage in built.encode_stages(built.read(clips))]
    if isinstance(built, DownstreamModel):
        return [built.outputs(clips), *(f.values for f in built.encode(clips))]
    return [built(clips)[0], built.reconstruct(clips).predicted]  # type: ignore[operator]


def farthest(one: list[Tensor], two: list[Tensor]) -> float:
    """Largest difference ÷ largest value."""
    both = zip(one, two, strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in both)


@pytest.mark.parametrize(("backbone", "part"), MOST)
def test_a_folded_model_has_the_same_outputs(backbone: str, part: str, tmp_path: Path) -> None:
    """≤ 1e-12 of the largest in fp64, ≤ 2e-6 in fp32, where rounding adds up over the blocks."""
    made, built = trained(backbone, part)
    given = built.parametrization
    exact = copy.deepcopy(built).double()
    assert farthest(outputs(exact, True), outputs(fold(exact), True)) <= 1e-12
    folded = fold(built)
    assert built.parametrization is given and folded.parametrization is None
    assert farthest(outputs(built), outputs(folded)) <= 2e-6
    used = [m.multiplier for m in built.modules() if getattr(m, "multiplies", None)]
    assert any(value != 1 for value in used)
    assert {m.multiplier for m in folded.modules() if getattr(m, "multiplies", None)} == {1.0}
    if isinstance(built, Backbone):
        return
    tasks = TASKS if isinstance(built, DownstreamModel) else ()
    save_model(tmp_path / "mup", built, ModelInfo(to_dict(made), tasks=tasks))
    out = fold_model(tmp_path / "mup", tmp_path / "plain")
    assert not (out / "parametrization.json").exists()
    loaded = zoo.load(out)
    assert all(torch.equal(v, folded.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert farthest(outputs(built), outputs(loaded)) <= 2e-6


def test_folding_changes_just_the_weights_that_have_a_multiplier() -> None:
    _, built = trained("swin4d", "lora")
    before, after = built.state_dict(), fold(built).state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    kinds = ("qkv.base_layer.weight", "qkv.base_layer.bias", "qkv.lora_B.default.weight")
    expected = {k for k in before if k.endswith(kinds)}
    expected |= {"backbone.patch_embed.fc.weight", "head.project.weight"}
    assert changed == expected
    third = len(before[min(expected)]) // 3
    for name in expected:
        if ".qkv." in name:
            third = len(before[name]) // 3
            assert torch.equal(before[name][third:], after[name][third:])


def test_merged_adapters_are_refused() -> None:
    _, built = trained("swin4d", "lora")
    for module in built.modules():
        if hasattr(module, "merge"):
            module.merge()
    layer = next(m for m in built.modules() if getattr(m, "multiplies", "") == "attention")
    with pytest.raises(RecipeError, match="unmerge them first"):
        layer.fold_multiplier()  # type: ignore[operator]


def test_a_plain_model_has_nothing_to_fold(tmp_path: Path) -> None:
    made = recipe("swin4d", "simmim_linear", name="sp")
    with pytest.raises(RecipeError, match="has nothing to fold"):
        fold(model(made))
    save_model(tmp_path / "plain", model(made), ModelInfo(to_dict(made)))
    with pytest.raises(RecipeError, match="has nothing to fold"):
        fold_model(tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_model_that_other_recipes_can_start_from(tmp_path: Path) -> None:
    made, built = trained("swin_factorized", "simmim_mlp")
    save_model(tmp_path / "run/model", built, ModelInfo(to_dict(made), seen_runs=("a",)))
    words = ["mup", "fold", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "folded" in done.output, done.output
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, CheckpointError) and "exists" in str(again.exception)
    plain = zoo.build_encoder(recipe("swin_factorized", "none", 3, name="sp"))
    wide = folded_recipe(made)
    encoder = zoo.build_encoder(wide)
    assert plain.parametrization is None and wide.parametrization.name == "sp"
    _, seen = zoo.load_encoder(encoder, tmp_path / "out")
    assert seen == ("a",)
    assert farthest(outputs(built.backbone), outputs(encoder.eval())) <= 2e-6  # type: ignore[arg-type]
    # What cannot be loaded says the way out.
    with pytest.raises(CheckpointError, match=r"trained with parametrization mup .* mup fold"):
        zoo.load_encoder(encoder, tmp_path / "run")
    narrower = recipe("swin_factorized", "none", 3, base={"embed_dim": BASE, "num_heads": [2, 4]})
    with pytest.raises(CheckpointError, match="mup fold"):
        zoo.load_encoder(zoo.build_encoder(narrower), tmp_path / "run")


def test_every_kind_of_head_and_objective_is_folded() -> None:
    parts = {part for part in (*OBJECTIVES, *HEADS)}
    assert {"linear", "complex", "lora", "prompt", "simmim_mlp"} <= parts
    for name in ("swin4d", "swin_factorized", "neuromamba"):
        done = {p.values[1] for p in MOST if p.values[0] == name}
        assert parts == done

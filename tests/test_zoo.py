"""The front door: recipes by name, models by recipe or keywords, trained models back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fmrizoo
from fmrizoo import zoo
from fmrizoo.config import compose, to_dict
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.model import DownstreamModel, PretrainingModel
from fmrizoo.trainer.export import ModelInfo, save_model
from fmrizoo.types import Backbone, Contract, TaskSpec

SMALL: dict[str, Any] = {
    "img_size": [8, 8, 4, 4],
    "patch_size": [2, 2, 2, 2],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
}
SWIN = {"name": "swin4d", **SMALL}
TASK = TaskSpec("classification", classes=("cat", "shoe"))
CONTRACT = Contract("native", "RAS", (8, 8, 4), (2.0, 2.0, 2.0), 2.5, "voxel")
PRETRAINING = {"backbone": SWIN, "objective": "simmim", "data": {"clip_frames": 4}}
FINETUNING = {"backbone": SWIN, "head": "linear", "data": {"clip_frames": 4}}


def exported(folder: Path, recipe: dict[str, Any], task: TaskSpec | None = None) -> nn.Module:
    """A model with fresh weights, written to ``folder``/model as the trainer does."""
    torch.manual_seed(0)
    composed = compose(recipe)
    model = zoo.build_model(composed, task)
    tasks = (task,) if task else ()
    info = ModelInfo(to_dict(composed), CONTRACT, tasks, seen_runs=("sub-01_run-1",))
    save_model(folder / "model", model, info)
    return model


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- recipes by name ----------------------------------------------------------------------------


def test_recipes_are_listed_without_their_bases() -> None:
    names = fmrizoo.list_recipes()
    assert "pretrain/swin4d_simmim" in names and names == sorted(names)
    assert not [n for n in names if n.startswith("_")]
    assert fmrizoo.list_recipes("pretrain/swin*") == [
        n for n in names if n.startswith("pretrain/swin")
    ]


def test_a_recipe_is_found_by_full_name_last_part_and_path() -> None:
    path = zoo.recipe_path("pretrain/swin4d_simmim")
    assert path.is_file()
    by_name = fmrizoo.load_recipe("pretrain/swin4d_simmim")
    assert by_name == fmrizoo.load_recipe("swin4d_simmim")
    assert by_name == fmrizoo.load_recipe(path) == fmrizoo.load_recipe(str(path))
    assert fmrizoo.load_recipe(to_dict(by_name)) == fmrizoo.load_recipe(by_name) == by_name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin4d_simmin", "unknown recipe 'swin4d_simmin'"),
        ("pretrain/swin4d_simmin", r"Did you mean 'pretrain/swin4d_simmim'\?"),
        ("haxby_slice", "ambiguous: finetune/haxby_slice, pretrain/haxby_slice"),
        ("_base/train", "unknown recipe"),
        ("gone.yaml", "no recipe file gone.yaml"),
        ("", "unknown recipe ''"),
    ],
)
def test_names_that_are_no_recipe(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fmrizoo.load_recipe(name)


def test_a_composed_recipe_takes_no_overrides() -> None:
    with pytest.raises(RecipeError, match="takes no overrides"):
        fmrizoo.load_recipe(compose({}), ["train.steps=1"])


@pytest.mark.parametrize(
    ("frames", "message"),
    [(6, r"data.clip_frames=6 is longer than backbone.img_size\[3\]=4"), (3, "does not divide")],
)
def test_clips_that_the_backbone_cannot_take_are_refused_in_the_recipe(
    frames: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        fmrizoo.load_recipe({"backbone": SWIN, "data": {"clip_frames": frames}})


# --- building -----------------------------------------------------------------------------------


def test_build_by_recipe_dict_and_keywords_gives_the_same_model() -> None:
    models = []
    for build in (
        lambda: fmrizoo.build(PRETRAINING),
        lambda: fmrizoo.build(backbone=SWIN, objective="simmim", overrides=["data.clip_frames=4"]),
        lambda: fmrizoo.build(compose(PRETRAINING)),
    ):
        torch.manual_seed(3)
        models.append(build())
    assert all(isinstance(m, PretrainingModel) for m in models)
    assert same_weights(models[0], models[1]) and same_weights(models[0], models[2])


def test_build_gives_what_the_recipe_asks_for() -> None:
    assert isinstance(fmrizoo.build(backbone=SWIN), Backbone)
    assert isinstance(fmrizoo.build(backbone=SWIN, head="linear", task=TASK), DownstreamModel)
    torch.manual_seed(1)
    alone = fmrizoo.create_backbone("swin4d", **SMALL)
    torch.manual_seed(1)
    assert same_weights(alone, fmrizoo.build(backbone=SWIN))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a recipe, or backbone="),
        ({"recipe": PRETRAINING, "head": "linear"}, "not both"),
        ({"objective": "simmim"}, "names no backbone. Available: neuromamba, swin4d"),
        ({"backbone": SWIN, "head": "linear"}, "a head needs to know its task"),
        ({"backbone": "swin5d"}, r"unknown backbone 'swin5d'. Did you mean 'swin4d'\?"),
        ({"backbone": {**SWIN, "embed": 3}}, "unknown key 'backbone.embed'"),
        ({"backbone": {"embed_dim": 3}}, "'backbone.name' is missing"),
        ({"backbone": SWIN, "objective": "simmim", "head": "linear"}, "not both"),
    ],
)
def test_what_cannot_be_built(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fmrizoo.build(**arguments)


def test_an_objective_that_needs_more_is_refused_before_any_data(monkeypatch: Any) -> None:
    from fmrizoo.objectives.simmim import SimMIM

    monkeypatch.setattr(SimMIM, "needs", frozenset({"telepathic", "causal"}))
    with pytest.raises(
        RecipeError, match=r"objective .simmim. needs a backbone that is .*telepathic; .swin4d. as"
    ):
        zoo.load_recipe(PRETRAINING)
    with pytest.raises(RecipeError, match="telepathic"):
        fmrizoo.build(backbone=SWIN, objective="simmim")


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "task"), [(PRETRAINING, None), (FINETUNING, TASK)])
def test_an_exported_model_comes_back_from_run_or_model_folder(
    recipe: dict[str, Any], task: TaskSpec | None, tmp_path: Path
) -> None:
    model = exported(tmp_path, recipe, task)
    for folder in (tmp_path, tmp_path / "model", str(tmp_path)):
        back = fmrizoo.load(folder)
        assert type(back) is type(model) and same_weights(back, model)
        assert not back.training
    if task is not None:
        assert isinstance(back, DownstreamModel) and back.head.tasks == (task,)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(CheckpointError, match="holds no exported model"):
            fmrizoo.load(folder)


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, PRETRAINING)
    path = tmp_path / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        fmrizoo.load(tmp_path)


def test_loading_is_strict_and_names_what_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    weights = dict(model.state_dict())
    before = {k: v.clone() for k, v in weights.items()}
    wrong = {k: v + 1 for k, v in weights.items() if k != "1.bias"}
    wrong |= {"0.weight": torch.zeros(4, 2), "2.a": torch.ones(1), "2.b": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        zoo.load_strictly(model, wrong, "here")
    assert str(caught.value) == (
        "the weights in here do not fit the model: 1 missing (1.bias); 2 unexpected (2.a, 2.b); "
        "1 other shape (0.weight (4, 2) instead of (3, 2))"
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    zoo.load_strictly(model, {k: v + 1 for k, v in before.items()}, "here")
    assert torch.equal(model[0].bias, before["0.bias"] + 1)


def test_long_lists_of_names_are_cut() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(CheckpointError, match=r"8 missing \(0.bias, 0.weight, 1.bias, …\)"):
        zoo.load_strictly(model, {}, "here")


@pytest.mark.parametrize(("recipe", "task"), [(PRETRAINING, None), (FINETUNING, TASK)])
def test_the_encoder_of_any_trained_model_is_taken_over(
    recipe: dict[str, Any], task: TaskSpec | None, tmp_path: Path
) -> None:
    model = exported(tmp_path, recipe, task)
    torch.manual_seed(9)
    backbone = fmrizoo.create_backbone("swin4d", **SMALL)
    assert not same_weights(backbone, model.backbone)
    contract, seen = zoo.load_encoder(backbone, tmp_path)
    assert same_weights(backbone, model.backbone)
    assert contract == CONTRACT and seen == ("sub-01_run-1",)


def test_an_encoder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    exported(tmp_path, PRETRAINING)
    with pytest.raises(CheckpointError, match=r"do not fit the model: .* other shape"):
        zoo.load_encoder(fmrizoo.create_backbone("swin4d", **{**SMALL, "embed_dim": 16}), tmp_path)
    with pytest.raises(CheckpointError, match="unexpected"):
        zoo.load_encoder(
            fmrizoo.create_backbone("swin4d", **SMALL | {"depths": [1], "num_heads": [1]}), tmp_path
        )


def test_a_model_without_an_encoder_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, {"head.weight": torch.ones(1)}, ModelInfo({}))
    with pytest.raises(CheckpointError, match=r"holds no encoder \(no weight is named backbone"):
        zoo.load_encoder(fmrizoo.create_backbone("swin4d", **SMALL), tmp_path)

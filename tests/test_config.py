"""Recipes: defaults, components by name, overrides, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fmrizoo.zoo  # noqa: F401  fills the registries
from fmrizoo.config import Recipe, compose, to_dict, to_yaml
from fmrizoo.errors import RecipeError

SWIN = {"name": "swin4d"}


def write(folder: Path, **files: str) -> Path:
    """YAML files by name; the first one's path."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


def refused(message: str, source: Path | dict[str, Any], *overrides: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        compose(source, list(overrides))
    assert "\n" not in str(caught.value)


def test_files_override_their_defaults_and_overrides_win(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        top="defaults: [one, two]\ntrain: {steps: 3}\n",
        one="defaults: [base]\ntrain: {steps: 1, lr: 0.1, warmup: 0.5}\n",
        two="train: {steps: 2, lr: 0.2}\n",
        base="train: {seed: 9, warmup: 0.7}\ndata: {clip_frames: 8}\n",
    )
    recipe = compose(path, ["train.seed=11"])
    train = recipe.train
    assert (train.steps, train.lr, train.warmup, train.seed) == (3, 0.2, 0.5, 11)
    assert recipe.data.clip_frames == 8


def test_defaults_are_relative_to_their_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, base="train: {steps: 7}\n")
    path = write(tmp_path / "sub", top="defaults: [../base]\n")
    assert compose(path).train.steps == 7


def test_a_loop_of_defaults_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, a="defaults: [b]\n", b="defaults: [c]\n", c="defaults: [a]\n")
    refused(r"defaults loop: a.yaml -> b.yaml -> c.yaml -> a.yaml", path)


def test_a_component_of_another_name_replaces_the_whole_section(tmp_path: Path) -> None:
    from fmrizoo.registry import BACKBONES

    path = write(
        tmp_path,
        top="defaults: [base]\nbackbone: {embed_dim: 24}\n",
        base="backbone: {name: swin4d, embed_dim: 12, patch_norm: true}\n",
    )
    merged = compose(path).backbone
    assert (merged.embed_dim, merged.patch_norm) == (24, True), "the same name: keys are merged"

    from dataclasses import dataclass

    @dataclass
    class OtherConfig:
        """Other."""

        name: str = "other_backbone"
        embed_dim: int = 5

    try:
        BACKBONES.register("other_backbone", OtherConfig)(OtherConfig)
        for given in (["backbone=other_backbone"], ["backbone.name=other_backbone"]):
            assert compose(path, given).backbone == OtherConfig()
        renamed = write(tmp_path, new="defaults: [base]\nbackbone: other_backbone\n")
        assert compose(renamed).backbone == OtherConfig()
    finally:
        BACKBONES._entries.pop("other_backbone", None)


def test_a_component_may_be_given_by_name_alone() -> None:
    recipe = compose({"backbone": "swin4d", "objective": "simmim"})
    assert recipe.backbone.embed_dim == 36 and recipe.objective.mask_ratio == 0.6
    recipe = compose({"backbone": SWIN}, ["head=linear", "head.dropout=0.25"])
    assert (recipe.head.name, recipe.head.dropout) == ("linear", 0.25)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("trian", "train"),
        ("train.step", "steps"),
        ("data.clip_frame", "clip_frames"),
        ("prepare.dummy_scan", "dummy_scans"),
        ("split.flods", "folds"),
        ("task.targt", "target"),
        ("backbone.embed_dims", "embed_dim"),
        ("objective.mask_rato", "mask_ratio"),
    ],
)
def test_unknown_keys_at_any_depth_get_the_nearest_one(key: str, near: str) -> None:
    source = {"backbone": SWIN, "objective": {"name": "simmim"}}
    refused(rf"unknown key '{key}'\. Did you mean '{near}'\?", source, f"{key}=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=many", r"train.steps: Value 'many' .* could not be converted to Integer"),
        ("train.steps=1.5", r"train.steps: Value '1.5'"),
        ("train.seed=yes", r"train.seed: Value 'True'"),
        ("train.betas=[a,b]", r"train.betas\[0\]: Value 'a'"),
        ("train.betas=[0.9,2]", r"train.betas needs two numbers in \[0, 1\)"),
        ("backbone.depths=3", "backbone.depths: "),
        ("backbone.depths=[2,2]", "need one number per stage"),
        ("data.store=", "data.store: "),
        ("data.select=x", "data.select: "),
        ("train=3", "train is a section of keys and values, got 3"),
        ("data=null", "data is a section of keys and values, got None"),
        ("train.steps.x=3", "train.steps: "),
        ("train.steps=0", "train.steps must be ≥ 1, got 0"),
        ("train.lr=0", "train.lr must be > 0"),
        ("train.lr=nan", "train.lr must be > 0"),
        ("train.clip_norm=-1", "train.clip_norm must be ≥ 0"),
        ("train.warmup=2", r"train.warmup is a share in \[0, 1\]"),
        ("train.zero_stage=4", "train.zero_stage is 0–3"),
        ("train.precision=fp16", "train.precision='fp16' is not known"),
        ("train.device=gpu", "train.device='gpu' is not known"),
        ("split.fold=5", r"split.fold must be in 0..4, got 5"),
        ("split.by=run2", r"split.by='run2' is not known. Did you mean 'run'\?"),
        ("task.lag=nan", "task.lag is a number of seconds"),
        ("task.source=participants", "task.level=event needs task.source=events"),
        ("prepare.orientation=RAX", "one of R/L, A/P and S/I each, got 'RAX'"),
        ("prepare.grid=[96,96]", "prepare.grid needs three positive numbers"),
        ("prepare.center=[1]", "prepare.center needs three numbers"),
        ("data.normalization=znorm", "data.normalization='znorm' is not known"),
        ("backbone.name=[a]", r"backbone.name must be a name, got \['a'\]"),
        ("backbone.name=null", "backbone.name must be a name, got None"),
        ("backbone.name=swin5d", r"unknown backbone 'swin5d'. Did you mean 'swin4d'\?"),
        ("backbone=7", "'backbone.name' is missing. Available: neuromamba, swin4d"),
        ("head.pool=mean", "'head.name' is missing. Available: complex, linear, lora, prompt"),
        ("init_from={fold}", "init_from: "),
        ("train.steps=${nope}", "Interpolation key 'nope' not found"),
    ],
)
def test_wrong_values_are_refused_with_key_and_value(override: str, message: str) -> None:
    refused(message, {"backbone": SWIN}, override)


@pytest.mark.parametrize("override", ["steps", "=3", ""])
def test_malformed_overrides(override: str) -> None:
    refused(f"override '{override}' is not of the form key=value", {}, override)


def test_overrides_that_are_no_yaml() -> None:
    refused(r"overrides \['train.betas=\[1'\]", {}, "train.betas=[1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "is not a YAML recipe"),
        ("\x00\x01", "is not a YAML recipe"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "is not a YAML recipe"),
        ("x: !!python/object:os.system y\n", "is not a YAML recipe"),
        ("- train\n- data\n", "is not a YAML mapping of recipe sections"),
        ("3\n", "is not a YAML"),
        ("hello\n", "unknown key 'hello'"),
        ("word " * 40, r"unknown key '(word ){12}…'"),
        ("defaults: base\n", "'defaults' must be a list of recipe files"),
        ("defaults: null\n", "'defaults' must be a list"),
        ("defaults: 3\n", "'defaults' must be a list"),
        ("defaults: {a: b}\n", "'defaults' must be a list"),
        ("defaults: [3]\n", "'defaults' must be a list"),
        ("defaults: [gone]\n", r"no recipe file .*gone.yaml"),
        ("train: 5\n", "train is a section of keys and values, got 5"),
        ("backbone: [1]\n", "'backbone.name' is missing"),
    ],
)
def test_files_that_are_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    refused(message, write(tmp_path, bad=text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    refused("no recipe file .*gone.yaml", tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"data: {store: \xe9}\n")
    refused("latin.yaml is not a YAML recipe", tmp_path / "latin.yaml")


def test_defaults_belong_in_files_only() -> None:
    refused("unknown key 'defaults'", {"defaults": ["x"]})
    refused("unknown key '1'", {1: 2})  # type: ignore[dict-item]


def test_none_leaves_a_component_out_and_can_take_it_away() -> None:
    recipe = compose({"backbone": SWIN, "objective": None, "head": None})
    assert recipe.objective is None and recipe.head is None
    base = {"backbone": SWIN, "objective": "simmim"}
    assert compose(base, ["objective=null"]).objective is None
    swapped = compose(base, ["objective=null", "head=linear"])
    assert swapped.objective is None and swapped.head.name == "linear"


def test_a_mapping_given_as_an_override_replaces_the_recipe_s() -> None:
    base = {"data": {"select": {"acquisition": "1slice"}, "threads": 3}}
    for override, select in (
        ("data.select={}", {}),
        ("data.select={run: 1}", {"run": "1"}),
        ("data.select.run=1", {"acquisition": "1slice", "run": "1"}),
    ):
        data = compose(base, [override]).data
        assert (data.select, data.threads) == (select, 3)
    assert compose(base, ["data={clip_frames: 4}"]).data.threads == 3, "a section is merged"


def test_objective_and_head_exclude_each_other() -> None:
    refused("not both", {"backbone": SWIN, "objective": "simmim", "head": "linear"})


def test_an_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    assert compose({}) == Recipe() == compose(write(tmp_path, empty=""))


def test_resolved_yaml_is_read_back_equal(tmp_path: Path) -> None:
    recipe = compose(
        {
            "backbone": {**SWIN, "first_window_size": [2, 2, 2, 2]},
            "head": "linear",
            "task": {"target": "null: or not"},
            "data": {"store": "/data/a b #c"},
        },
        [
            "train.lr=3e-4",
            "data.select.acquisition=1slice",
            "data.select.run=01",
            "init_from=runs/{fold}",
            "split.file=null",
        ],
    )
    assert recipe.train.lr == 3e-4 and recipe.data.select["run"] == "1"
    text = to_yaml(recipe)
    assert compose(write(tmp_path, back=text)) == recipe
    assert compose(to_dict(recipe)) == recipe
    assert to_yaml(compose(to_dict(recipe))) == text


def test_composing_leaves_the_given_dict_alone() -> None:
    source: dict[str, Any] = {"backbone": "swin4d", "train": {"steps": 2}}
    compose(source, ["train.steps=3", "backbone.embed_dim=24"])
    assert source == {"backbone": "swin4d", "train": {"steps": 2}}

"""Axes, cells and chains: what an ablation will train, before it does."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from fmrizoo.config import AblateConfig, Recipe
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.pipeline.ablation.cells import Cell, cells_of
from fmrizoo.pipeline.ablation.chains import Chain, chains_of
from fmrizoo.pipeline.ablation.matched import TOLERANCE, measure
from fmrizoo.pipeline.ablation.run import plan
from fmrizoo.sections.axes import CODES, MEANINGS, values_of
from fmrizoo.zoo import list_recipes, load_recipe

TASK = "ablate.tasks.objects.recipe=finetune/haxby_slice"
BASE = ("pretrain/haxby_slice", [TASK])


@cache
def shipped(name: str) -> tuple[Recipe, list[Cell]]:
    """A shipped ablation, composed once for all tests."""
    return cells_of(name)


def named(cells: list[Cell], name: str) -> Cell:
    return next(cell for cell in cells if cell.name == name)


# --- axes -----------------------------------------------------------------------------------------


def test_every_code_of_the_source_is_an_axis_of_a_known_key() -> None:
    assert list(CODES) == ["ISM", "MPS", "MR", "MT", "PS", "SBS", "SL", "SWS"] == list(MEANINGS)
    recipe = load_recipe("pretrain/haxby_slice")
    for key in CODES.values():
        section, _, name = key.partition(".")
        assert hasattr(getattr(recipe, section), name), key


def test_values_become_overrides() -> None:
    (size,) = values_of("PS", ["6_6_6_1"])
    assert size.overrides == ("backbone.patch_size=[6, 6, 6, 1]",) and size.label == "6_6_6_1"
    (long,) = values_of("SL", [40], [96, 96, 96, 20])
    assert long.overrides == ("data.clip_frames=40", "backbone.img_size=[96, 96, 96, 40]")
    plain, lora = values_of(
        "head", {"linear": [], "lora": ["finetune.recipe=finetune/lora", "train.lr=1"]}
    )
    assert plain.overrides == plain.finetune == ()
    assert lora.finetune == ("recipe=finetune/lora",) and lora.overrides == ("train.lr=1",)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("SWSS", [2], r"ablate\.axes\.SWSS is no axis\. Did you mean 'SWS'\? Codes: ISM"),
        ("depth", [1], r"ablate\.axes\.depth is no axis"),
        ("MR", [], "is empty"),
        ("MR", 0.5, "needs a list of values"),
        ("MR", [0.2, 0.2], "has a value twice: 0.2, 0.2"),
        ("PS", ["6_6_6"], "'6_6_6' is no size"),
        ("PS", [6661], "6661 is no size: write .* in quotes"),
        ("head", {"lora": "head=lora"}, "needs a list of key=value overrides"),
        ("head", {"lora": ["head=lora"]}, r"write finetune\.head=lora"),
    ],
)
def test_an_axis_that_does_not_exist_is_refused(name: str, given: object, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        values_of(name, given)


# --- cells ----------------------------------------------------------------------------------------


def test_one_at_a_time_starts_with_the_recipe_as_it_is() -> None:
    axes = ["ablate.axes.MR=[0.2,0.9]", "ablate.axes.SWS=[2]"]
    recipe, cells = cells_of(BASE[0], [*BASE[1], *axes, "ablate.controls=[]"])
    assert [cell.name for cell in cells] == ["reference", "MR 0.2", "MR 0.9", "SWS 2"]
    first, low = cells[0].pretraining, cells[1].pretraining
    assert first is not None and low is not None
    assert (first.objective.mask_ratio, low.objective.mask_ratio) == (0.6, 0.2)
    # Jobs do not carry the plan: a longer list of values would else change what is done.
    assert first.ablate == low.ablate == AblateConfig() and recipe.ablate.axes
    # A model is fed in its tests what it was fed in pretraining.
    assert cells[3].tasks["objects"].data.frame_stride == 2
    assert cells[0].tasks["objects"].data.frame_stride == 1
    assert cells[3].tasks["objects"].backbone == first.backbone


def test_a_grid_has_every_combination_and_controls_per_backbone() -> None:
    _, cells = shipped("ablation/architecture")
    own = [cell for cell in cells if not cell.control]
    assert len(own) == 6 and own[0].name == "swin4d, simmim"
    assert own[0].values == {"backbone": "swin4d", "objective": "simmim"}
    assert [c.name for c in cells[6:]] == [
        f"{backbone} {control}"
        for backbone in ("swin4d", "swin_factorized", "neuromamba")
        for control in ("frozen random", "from scratch")
    ]
    scratch = named(cells, "neuromamba from scratch").tasks["objects"]
    assert scratch.head.train_encoder == "all" and scratch.init_from is None
    assert named(cells, "neuromamba frozen random").tasks["objects"].head.train_encoder == "none"


def test_cells_are_matched_in_what_is_asked() -> None:
    _, cells = shipped("ablation/architecture")
    sizes = [cell.size.parameters for cell in cells]
    assert max(sizes) / min(sizes) < 1 + 2 * TOLERANCE
    assert len({cell.pretraining.backbone.embed_dim for cell in cells if cell.pretraining}) > 1
    _, same = cells_of("ablation/architecture", ["ablate.match=none"])
    plain = [cell.size.parameters for cell in same]
    assert max(plain) / min(plain) > 1.5
    _, compute = cells_of("ablation/architecture", ["ablate.match=flops"])
    flops = [cell.size.flops for cell in compute]
    assert max(flops) / min(flops) < 1 + 2 * TOLERANCE


def test_tokens_are_matched_by_steps() -> None:
    axes = ["ablate.axes.PS=[[5,5,1,2]]", "ablate.match=tokens"]
    _, cells = cells_of(BASE[0], [*BASE[1], *axes])
    first, other = cells[0], cells[1]
    assert first.size.tokens == 2 * other.size.tokens
    assert first.size.seen == other.size.seen
    assert first.pretraining and other.pretraining
    assert other.pretraining.train.steps == 2 * first.pretraining.train.steps


def test_what_cannot_be_matched_is_refused() -> None:
    axes = "ablate.axes.size={small: [], large: ['backbone.depths=[40,40]']}"
    with pytest.raises(RecipeError, match="ablation cell 'large': no width of swin4d comes within"):
        cells_of(BASE[0], [*BASE[1], axes, "ablate.match=parameters", "ablate.design=grid"])


@pytest.mark.parametrize(
    "name",
    [
        # Its 27 encoders of 51M take as long as all the others together.
        pytest.param(name, marks=[pytest.mark.slow] if name.endswith("table1") else [])
        for name in list_recipes("ablation/*")
    ],
)
def test_every_shipped_ablation_can_be_composed(name: str) -> None:
    recipe, cells = shipped(name)
    assert len([c for c in cells if not c.control]) >= 2
    assert set(cells[0].tasks) == set(recipe.ablate.tasks)
    for cell in cells:
        assert measure(cell.tasks[next(iter(cell.tasks))]).parameters == cell.size.parameters


@pytest.mark.slow
def test_table_1_has_all_eight_axes() -> None:
    recipe, cells = shipped("ablation/table1")
    assert set(recipe.ablate.axes) == set(CODES)
    values = sum(map(len, recipe.ablate.axes.values()))
    assert len([cell for cell in cells if not cell.control]) == 1 + values
    ratio = {c.name: c.pretraining.objective.mask_ratio for c in cells if c.pretraining}
    assert ratio["reference"] == 0.8 and ratio["MR 0.6"] == 0.6


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([TASK], "ablate.axes is empty"),
        (["ablate.axes.MR=[0.2]"], "ablate.tasks is empty"),
        (["ablate.axes.MR=[0.2]", "ablate.tasks.x.recipe=pretrain/haxby_slice"], "no fine-tuning"),
        (["ablate.axes.MR=[0.2]", "ablate.tasks.x.metric=r2"], "needs a fine-tuning recipe"),
        ([TASK, "ablate.axes.MR=[2]"], "cell 'MR 2': objective.mask_ratio must be in"),
        ([TASK, "ablate.axes.MR=[0.2]", "ablate.design=random"], "ablate.design='random'"),
        ([TASK, "ablate.axes.MR=[0.2]", "ablate.controls=[chance]"], "'chance' is not known"),
        ([TASK, "ablate.axes.data.clip_frame=[4]"], "ablate.axes.data"),
    ],
)
def test_bad_plans_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        cells_of("pretrain/haxby_slice", overrides)


def test_an_ablation_of_a_fine_tuning_is_refused() -> None:
    with pytest.raises(RecipeError, match="the recipe needs an objective"):
        cells_of("finetune/haxby_slice", ["ablate.axes.MR=[0.2]", TASK])


# --- chains ---------------------------------------------------------------------------------------


def chains(*overrides: str, source: str = BASE[0]) -> list[Chain]:
    recipe, cells = cells_of(source, [*BASE[1], *overrides])
    return chains_of(recipe, cells)


def test_cells_that_differ_in_fine_tuning_alone_share_their_pretrainings() -> None:
    recipe, cells = cells_of("ablation/heads", ["data.store=S"])
    found = chains_of(recipe, cells)
    begun = [chain for chain in found if chain.pretraining]
    assert len(begun) == recipe.ablate.seeds * 3
    for chain in begun:
        assert [t.cell for t in chain.tunings] == [c.name for c in cells if not c.control]
        assert chain.pretraining is not None
        # The fold is that of its tests, whose runs the pretraining must not see.
        assert all(t.recipe.split == chain.pretraining.split for t in chain.tunings)
        assert {t.recipe.train.seed for t in chain.tunings} == {chain.pretraining.train.seed}


def test_repeats_draw_other_folds_and_seeds_start_elsewhere() -> None:
    found = chains("ablate.axes.MR=[0.2]", "data.store=S", "ablate.repeats=2", "ablate.seeds=2")
    begun = [chain for chain in found if chain.pretraining]
    places = {
        (c.pretraining.train.seed, c.pretraining.split.seed, c.pretraining.split.fold)
        for c in begun
        if c.pretraining
    }
    assert places == {(s, r, f) for s in (0, 1) for r in (0, 1) for f in (0, 1, 2)}
    assert len({c.name for c in found}) == len(found)
    folders = [t.folder for c in found for t in c.tunings]
    assert len(set(folders)) == len(folders)


def test_one_pretraining_serves_all_folds_of_a_store_of_its_own() -> None:
    other = "ablate.tasks.objects.overrides=[data.store=T]"
    found = chains("ablate.axes.MR=[0.2]", "data.store=S", other)
    begun = [chain for chain in found if chain.pretraining]
    assert len(begun) == 2 * 3  # cells × seeds
    assert all(len(chain.tunings) == 3 for chain in begun)
    assert {t.recipe.data.store for c in begun for t in c.tunings} == {"T"}


def test_pretraining_once_on_the_test_runs_is_refused() -> None:
    with pytest.raises(RecipeError, match="task objects is tested on a store that is pretrained"):
        chains("ablate.axes.MR=[0.2]", "data.store=S", "ablate.pretrain=once")


def test_tasks_with_different_splits_of_one_store_are_refused() -> None:
    second = "ablate.tasks.again={recipe: finetune/haxby_slice, overrides: [split.folds=2]}"
    with pytest.raises(RecipeError, match="tasks objects and again have different splits"):
        chains("ablate.axes.MR=[0.2]", "data.store=S", second)


# --- with data ------------------------------------------------------------------------------------


def test_clips_that_leave_their_run_are_refused_with_their_cell(sample_store: Path) -> None:
    changed = ["backbone.img_size=[40,20,1,30]", f"data.store={sample_store}"]
    with pytest.raises(DataError, match="cell 'SL 30', task objects: of 40 event clips, 10 run"):
        plan(BASE[0], [*BASE[1], "ablate.axes.SL=[30]", *changed])


def test_cells_that_would_be_tested_on_other_units_are_refused(sample_store: Path) -> None:
    some = "finetune.data.select={acquisition: 1slice, run: 1|2|3|4}"
    axes = f"ablate.axes.tests={{all: [], some: ['{some}']}}"
    with pytest.raises(RecipeError, match="cells cannot be compared: 'some' would be tested on 32"):
        plan(BASE[0], [*BASE[1], axes, f"data.store={sample_store}", "ablate.design=grid"])


def test_more_folds_than_runs_are_refused_before_any_training(sample_store: Path) -> None:
    over = "ablate.tasks.objects.overrides=[split.folds=40]"
    with pytest.raises(DataError, match=r"split\.folds=40 needs at least as many units"):
        plan(BASE[0], [*BASE[1], "ablate.axes.MR=[0.2]", f"data.store={sample_store}", over])

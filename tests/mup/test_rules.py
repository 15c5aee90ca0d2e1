"""The rule table: equal to the mup package's where that is right, and complete."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import ClassVar

import mup
import pytest
import torch
from mup_tiny import BASE, CASES, TASKS, model, recipe
from torch import nn

from fmrizoo.errors import RecipeError
from fmrizoo.mup import Parametrization, parametrize
from fmrizoo.mup.dims import Dim, ParameterDims, infer
from fmrizoo.mup.parametrization import make, skeleton
from fmrizoo.mup.rules import KNOWN, rule_table, shape_role

# One growing axis, so the package takes them for outputs; they are internal bottlenecks, whose
# matrices must move as hidden ones do (measured: with the package's rule a LoRA update grows as m).
EXCEPTIONS = r".*\.lora_A\.default\.weight|head\.inputs\.\d+\.weight"


def oracle(backbone: str, part: str, times: int) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter by mup.MuAdamW, both 1 at base width."""
    sizes = {size: recipe(backbone, part, size) for size in (1, 2, times)}
    models = {n: skeleton(made, made.backbone, TASKS) for n, made in sizes.items()}
    target = models[times]
    mup.set_base_shapes(target, models[1], delta=models[2], rescale_params=False, do_assert=False)
    for parameter in target.parameters():
        parameter.requires_grad_(True)
    optimizer = mup.MuAdamW(list(target.parameters()), lr=1.0, weight_decay=1.0)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {name: found[id(p)] for name, p in target.named_parameters()}


@cache
def at_base(backbone: str, part: str) -> tuple[Parametrization, Mapping[str, ParameterDims]]:
    return make(recipe(backbone, part), TASKS)


@pytest.mark.parametrize(("backbone", "part"), CASES)
def test_every_parameter_has_the_rates_of_the_mup_package(backbone: str, part: str) -> None:
    expected = oracle(backbone, part, 4)
    made, _ = make(recipe(backbone, part, 4), TASKS)
    assert made.m == 4
    assert list(made.table) == list(expected)
    ours = {name: (rule.lr_scale, rule.wd_scale) for name, rule in made.table.items()}
    different = {name for name in expected if ours[name] != expected[name]}
    assert different == {n for n in expected if re.fullmatch(EXCEPTIONS, n)}
    for name in different:
        assert made.table[name].role == "hidden"
        assert (ours[name], expected[name]) == ((0.25, 4.0), (1.0, 1.0))


def test_the_table_has_no_pattern_that_nothing_needs() -> None:
    """Every pattern names a parameter of some model here: what is tested is the whole table."""
    names = {n.replace(".base_layer.", ".") for b, p in CASES for n in at_base(b, p)[0].table}
    full = [n if n.startswith(("objective.", "head.")) else f"backbone.{n}" for n in names]
    full = [n.replace("backbone.backbone.", "backbone.") for n in full]
    for pattern, _ in KNOWN:
        regex = re.escape(pattern).replace(r"\*", ".+").replace(r"\#", r"\d+")
        assert any(re.fullmatch(regex, name) for name in full), pattern


def _dims(role: str) -> tuple[Dim, ...]:
    grows, fixed = Dim(2, 4, True), Dim(3, 3, False)
    return {
        "input": (grows, fixed),
        "hidden": (grows, grows),
        "output": (fixed, grows),
        "vector": (grows,),
        "fixed": (fixed,),
    }[role]


@pytest.mark.parametrize("role", ["input", "hidden", "output", "vector", "fixed"])
def test_the_shape_alone_gives_the_usual_role(role: str) -> None:
    assert shape_role(ParameterDims(_dims(role))) == role


def test_the_numbers_of_each_role() -> None:
    grows, fixed = Dim(2, 18, True), Dim(3, 3, False)
    dims = {
        "backbone.embed.weight": ParameterDims((grows, fixed)),
        "backbone.blocks.0.mixer.out_proj.weight": ParameterDims((grows, grows)),
        "head.project.weight": ParameterDims((fixed, grows)),
        "backbone.blocks.0.mixer.D": ParameterDims((grows,), marked=True),
        "head.project.bias": ParameterDims((fixed,)),
    }
    for mode, decay in (("independent", 9.0), ("sqrt", 3.0), ("coupled", 1.0)):
        table = rule_table(dims, m=9, weight_decay=mode)
        hidden = table.pop("backbone.blocks.0.mixer.out_proj.weight")
        assert (hidden.lr_scale, hidden.init_scale, hidden.eps_scale) == (1 / 9, 1 / 3, 1 / 9)
        assert hidden.wd_scale == decay and hidden.decay
        for rule in table.values():
            assert (rule.lr_scale, rule.init_scale, rule.wd_scale) == (1, 1, 1)
            assert rule.eps_scale == (1 if rule.role == "fixed" else 1 / 9)
        assert [rule.decay for rule in table.values()] == [True, True, False, False]


# --- what is refused ----------------------------------------------------------------------------


def test_an_unknown_parameter_is_named() -> None:
    found = ParameterDims((Dim(2, 4, True), Dim(2, 4, True)))
    with pytest.raises(
        RecipeError, match=r"no rule for the parameter backbone.extra.weight \(4, 4\)"
    ):
        rule_table({"backbone.extra.weight": found}, m=2)
    assert rule_table({"backbone.extra.weight": found}, {"backbone.extra.*": "hidden"}, m=2)


def test_a_component_may_say_the_roles_of_its_own_parameters() -> None:
    made = recipe("swin4d", "simmim_linear", 2)
    built = model(made)

    class Objective(type(built.objective)):  # type: ignore[misc]
        mup_roles: ClassVar = {"objective.mask_token": "vector"}

    assert parametrize(made, built).table["objective.mask_token"].role == "input"
    built.objective.__class__ = Objective
    assert parametrize(made, built).table["objective.mask_token"].role == "vector"


@pytest.mark.parametrize(
    ("dims", "overrides", "message"),
    [
        ((Dim(2, 4, True),) * 3, {"backbone.x": "hidden"}, "these grow with the width: 0, 1, 2"),
        (
            (Dim(2, 4, True), Dim(3, 3, False)),
            {"backbone.x": "hidden"},
            "role hidden .* grow .*: 0$",
        ),
        ((Dim(3, 3, False),), {"backbone.x": "vector"}, "role vector .*: none"),
        ((Dim(2, 4, True),), {"backbone.x": "vector", "backbone.*": "input"}, "several roles"),
        ((Dim(2, 4, True),), {"backbone.x": "bias"}, "'bias' for backbone.x is no role"),
    ],
)
def test_a_role_that_cannot_be_is_refused(
    dims: tuple[Dim, ...], overrides: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        rule_table({"backbone.x": ParameterDims(dims)}, overrides, m=2)


def test_models_that_differ_in_more_than_widths_are_refused() -> None:
    def build(width: int, layers: int = 1, out: int = 3) -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, out) for _ in range(layers)))

    with pytest.raises(RecipeError, match="other parameters than this one"):
        infer(lambda: build(2), lambda: build(4), lambda: build(8, layers=2))
    with pytest.raises(RecipeError, match=r"0.weight is 3×2 at base width and 5×8 here"):
        infer(lambda: build(2), lambda: build(4), lambda: build(8, out=5))
    dims = infer(lambda: build(2), lambda: build(4), lambda: build(8))
    assert dims["0.weight"].growing == (1,) and dims["0.weight"].shape == (3, 8)
    assert dims["0.weight"].spread == dims["0.bias"].spread == 0.5


def test_an_inner_width_that_does_not_come_out_even_is_named() -> None:
    made = recipe("swin4d", "none", 3)
    made.backbone.mlp_ratio = 2.3
    with pytest.raises(RecipeError, match=r"linear2.weight takes 27 inputs .* and 82 here, not 3"):
        make(made)


def test_the_table_is_of_this_model_only() -> None:
    one = parametrize(recipe("swin4d", "none", 2), model(recipe("swin4d", "none", 2)))
    with pytest.raises(RecipeError, match=r"another model: blocks.0"):
        one.groups(model(recipe("neuromamba", "none", 2)))


def test_groups_are_few_and_in_the_order_of_the_parameters() -> None:
    for backbone, part in CASES:
        made = recipe(backbone, part, 4)
        built = model(made)
        table = parametrize(made, built)
        found = table.groups(built)
        assert list(found) == [name for name, _ in built.named_parameters()]
        trained = {found[n] for n, p in built.named_parameters() if p.requires_grad}
        assert len(trained) <= 4
        assert table.lr_scales() == {n: s.lr_scale for n, s in found.items()}


def test_all_factors_are_one_at_base_width() -> None:
    for backbone, part in CASES:
        made, dims = at_base(backbone, part)
        assert made.m == 1
        for name, rule in made.table.items():
            scales = (rule.lr_scale, rule.init_scale, rule.wd_scale, rule.eps_scale)
            assert scales == (1, 1, 1, 1) and dims[name].spread == 1


def test_nothing_of_a_wide_model_is_allocated() -> None:
    made = recipe("swin4d", "simmim_mlp", 1)
    made.backbone.embed_dim, made.backbone.num_heads = BASE * 2048, [4096, 8192]
    found, dims = make(made)
    assert found.m == 2048
    assert sum(torch.Size(d.shape).numel() for d in dims.values()) > 10**10


def test_what_is_written_can_be_read() -> None:
    import json

    from fmrizoo.errors import CheckpointError

    made, _ = make(recipe("swin4d", "simmim_mlp", 2, output_mult=4.0))
    values = json.loads(json.dumps(made.to_dict()))
    again = Parametrization.from_dict(values)
    assert again == made and again.sha256 == made.sha256 and not made.differences(again)
    other, _ = make(recipe("swin4d", "simmim_mlp", 4, weight_decay="sqrt"))
    said = "; ".join(made.differences(other))
    assert "m 2.0 ≠ 4.0" in said and "weight_decay independent ≠ sqrt" in said
    assert "rules (backbone.patch_embed.fc.weight, …)" in said
    name = next(iter(values["table"]))
    changed = {
        **values,
        "table": {**values["table"], name: {**values["table"][name], "lr_scale": 3.0}},
    }
    with pytest.raises(CheckpointError, match="does not have the SHA-256"):
        Parametrization.from_dict(changed)
    for wrong, message in (
        ({**values, "schema": 1}, "schema 1"),
        ({k: v for k, v in values.items() if k != "m"}, "missing or malformed: 'm'"),
        ({**values, "table": []}, "missing or malformed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Parametrization.from_dict(wrong)


# --- the base section ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({}, r"needs the width to scale from: set parametrization.base=\{embed_dim: …\}"),
        ({"num_heads": [2, 4]}, "needs the width to scale from"),
        ({"embed_dim": 12, "c_mult": 2}, r"base.c_mult: base and model may differ in widths"),
        ({"embed_dim": 12, "depths": [1, 1]}, r"base.depths needs parametrization.depth=completep"),
        ({"embed_dim": "wide"}, "base.embed_dim needs a whole number ≥ 1, got 'wide'"),
        ({"embed_dim": 0}, "base.embed_dim needs a whole number ≥ 1, got 0"),
        ({"embed_dim": 12, "num_heads": 2}, "base.num_heads needs whole numbers, one a stage"),
        ({"embed_dim": 96, "num_heads": [2, 4]}, "embed_dim=48 is below .*=96"),
        (
            {"embed_dim": 12},
            r"num_heads=\[8, 16\] at 4 times the base width: .*base.num_heads=\[2, 4\] \(heads of "
            r"constant size.*\) or \[8, 16\] \(the same number of heads",
        ),
        ({"embed_dim": 16}, r"at 3 times .*base.num_heads=\[8, 16\] \(the same number of heads"),
        ({"embed_dim": 12, "num_heads": [5, 4]}, r"base width: .*\[0\]=5 does not divide"),
        ({"embed_dim": 12, "num_heads": [2]}, r"base width: .*one number per stage each"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_with_the_recipe(
    base: dict[str, object], message: str
) -> None:
    from mup_tiny import section

    from fmrizoo import zoo

    source = {
        "backbone": section("swin4d", 4),
        "data": {"clip_frames": 4},
        "parametrization": {"name": "mup", "base": base},
    }
    with pytest.raises(RecipeError, match=message) as caught:
        zoo.load_recipe(source)
    assert "\n" not in str(caught.value)


def test_what_follows_the_width_by_itself_must_be_given() -> None:
    made = recipe("neuromamba", "none", 2)
    made.backbone.d_state = None
    with pytest.raises(RecipeError, match=r"d_state follows embed_dim .* set backbone.d_state=6"):
        make(made)
    made = recipe("neuromamba", "none", 2, base={"embed_dim": BASE, "num_heads": [2]})
    with pytest.raises(RecipeError, match=r"base.num_heads: neuromamba has no such setting"):
        make(made)


def test_multipliers_are_muPs() -> None:
    with pytest.raises(RecipeError, match=r"output_mult=2.0 needs parametrization.name=mup"):
        recipe("swin4d", "none", name="sp", output_mult=2.0)
    with pytest.raises(RecipeError, match=r"input_mult must be a number > 0, got 0"):
        recipe("swin4d", "none", input_mult=0.0)
    with pytest.raises(RecipeError, match=r"parametrization.name=sp: add parametrization.name=mup"):
        make(replace(recipe("swin4d", "none", name="sp")))

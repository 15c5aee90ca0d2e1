"""Transfer over depth: which factors where, exactly, and on every way through the models."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
import torch
from mup_tiny import TASKS, model, recipe
from test_start import batch, steps
from torch import nn

from fmrizoo.config import Recipe, TrainConfig, compose
from fmrizoo.errors import RecipeError
from fmrizoo.layers.swin import SwinBlock
from fmrizoo.mup import Parametrization
from fmrizoo.mup.depth import Depth
from fmrizoo.mup.explain import explain
from fmrizoo.mup.parametrization import make
from fmrizoo.trainer.engine import param_groups

BASE: dict[str, dict[str, Any]] = {
    "swin4d": {"depths": [1, 2]},
    "swin_factorized": {"depths": [4, 4]},
    "neuromamba": {"depth": 1},
    "neuromamba_2way": {"depth": 1},
}
OWN: dict[str, Any] = {"swin4d": [2, 1], "swin_factorized": [8, 4]}


def deep(
    backbone: str, part: str = "simmim_linear", times: int = 1, base: Any = None, **more: Any
) -> Recipe:
    """``more``: of the backbone. Ratios: ½ and 2 (swin4d), ½ and 1, ½."""
    made = recipe(backbone, part, times)
    own = {"depths": OWN[backbone]} if backbone in OWN else {}
    given = {**made.parametrization.base, **(BASE[backbone] if base is None else base)}
    values: dict[str, Any] = {
        "backbone": {**vars(made.backbone), **own, **more},
        "data": {"clip_frames": 4},
        "parametrization": {
            "name": "mup", "readout_zero_init": False, "base": given, "depth": "completep",
        },
    }  # fmt: skip
    for key in ("objective", "head"):
        if getattr(made, key) is not None:
            values[key] = vars(getattr(made, key))
    return compose(values)


def build(made: Recipe) -> nn.Module:
    torch.manual_seed(0)
    return model(made)


def branches(built: nn.Module) -> dict[str, float]:
    return {
        n: m.multiplier
        for n, m in built.named_modules()
        if getattr(m, "multiplies", "") == "branch"
    }


def table(built: nn.Module) -> Any:
    return cast(Parametrization, built.parametrization).table


def test_every_block_has_the_factor_of_its_stage() -> None:
    found = branches(build(deep("swin4d")))
    assert found == {
        "backbone.layers.0.blocks.0": 0.5,
        "backbone.layers.0.blocks.1": 0.5,
        "backbone.layers.1.blocks.0": 2.0,
    }
    found = branches(build(deep("swin_factorized", times=2)))
    assert [found[n] for n in sorted(found)] == [0.5] * 8 + [1.0] * 4
    found = branches(build(deep("neuromamba_2way", "linear")))
    assert found == {f"backbone.blocks.{i}.{n}": 0.5 for i in (0, 1) for n in ("mixer", "reverse")}
    bare = build(deep("neuromamba", "none"))
    assert branches(bare) == {"blocks.0.mixer": 0.5, "blocks.1.mixer": 0.5}
    assert set(branches(build(recipe("swin4d", "none", 2))).values()) == {1.0}


def test_rates_stay_and_epsilon_follows_inside_blocks() -> None:
    for backbone, part in (("swin4d", "simmim_mlp"), ("neuromamba", "lora"), ("swin4d", "prompt")):
        made = deep(backbone, part, 4)
        flat = make(recipe(backbone, part, 4), TASKS)[0].table
        for name, rule in make(made, TASKS)[0].table.items():
            if name not in flat:
                continue  # the recipe of another depth has fewer blocks
            prompt = {"head.tokens.0": 0.5, "head.tokens.1": 0.5, "head.tokens.2": 2.0}
            stage = 2.0 if ".layers.1.blocks" in name else 0.5 if ".blocks." in name else 1.0
            assert rule.eps_scale == flat[name].eps_scale * prompt.get(name, stage), name
            assert (rule.lr_scale, rule.wd_scale) == (flat[name].lr_scale, flat[name].wd_scale)


def test_what_acts_on_the_stream_itself_has_the_factor_on_its_rate() -> None:
    rules = make(deep("swin_factorized", times=2), TASKS)[0].table
    for name in ("norm.weight", "norm.bias", "weight"):
        rule = rules[f"backbone.layers.0.blocks.1.{name}"]
        assert (rule.lr_scale, rule.eps_scale) == (0.5, 0.5), "1/m is ε's"
    rule = rules["backbone.layers.0.blocks.1.temporal.0.norm1.weight"]
    assert (rule.lr_scale, rule.eps_scale) == (1, 0.25)


@pytest.mark.parametrize("backbone", ["swin4d", "swin_factorized", "neuromamba"])
def test_at_base_depth_and_width_it_is_the_standard_parametrization(backbone: str) -> None:
    own = {"depths": OWN[backbone]} if backbone in OWN else {"depth": 2}
    with_it = build(deep(backbone, base=own))
    plain_recipe = deep(backbone, base=own)
    plain_recipe.parametrization = type(plain_recipe.parametrization)()
    plain = build(plain_recipe)
    assert steps(plain) == steps(with_it, given=cast(Any, with_it.parametrization))
    left, right = plain.state_dict(), with_it.state_dict()
    assert all(torch.equal(left[k], right[k]) for k in left)


def loss(built: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    built.zero_grad()
    torch.manual_seed(3)
    value = built(batch())[0]
    value.backward()
    return float(value.detach()), {
        n: p.grad for n, p in built.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("backbone", ["swin4d", "swin_factorized", "neuromamba", "neuromamba_2way"])
def test_the_factor_acts_as_smaller_last_weights_on_every_way(backbone: str) -> None:
    """Folded, in all modes of recomputation: loss and gradients of what is not folded (1e-5)."""
    built = build(deep(backbone))
    expected, gradients = loss(built)
    plain, _ = loss(build(recipe(backbone, "simmim_linear")))
    assert expected != plain
    last = ("attn.proj", "linear2", "out_proj", "mixer.norm", "reverse.norm")
    for folded in (False, True):
        if folded:
            for module in built.modules():
                if getattr(module, "multiplies", "") == "branch":
                    cast(SwinBlock, module).fold_multiplier()
            assert set(branches(built).values()) == {1.0}
        for mode in ("none", "block", "window-chunk"):
            cast(Any, built).backbone.set_checkpointing(mode)
            value, found = loss(built)
            assert value == pytest.approx(expected, rel=1e-6)
            for name, gradient in gradients.items():
                if not folded or not any(part in name for part in last):
                    torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_packed_padded_and_one_by_one_mamba_agree() -> None:
    packed, padded = (build(deep("neuromamba", "none", batching=b)) for b in ("packed", "padded"))
    bold = batch().bold.clone()
    bold[0, ..., :4, :, :, :] = 0  # samples of unequal length
    mask = (bold[:, 0] != 0).any(-1)
    one, two = (m(bold, mask).values for m in (packed, padded))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    backbone: Any = packed.eval()
    with torch.no_grad():
        tokens = backbone.tokenize(bold[1:], mask[1:])
        whole = backbone.encode(tokens).values
        values, state = backbone._placed(tokens.values, tokens.where), None
        parts = []
        for place in range(values.shape[1]):
            part, state = backbone.extend(values[:, place : place + 1], state)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_the_factor_folds_into_adapters_too() -> None:
    for backbone in ("swin4d", "neuromamba"):
        built: Any = build(deep(backbone, "lora")).eval()
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.1)
        expected = built.outputs(batch(True))
        for module in built.modules():
            if getattr(module, "multiplies", "") == "branch":
                module.fold_multiplier()
        torch.testing.assert_close(built.outputs(batch(True)), expected, rtol=1e-5, atol=1e-6)


# --- files, pages, refusals ---------------------------------------------------------------------


def test_the_file_keeps_both_depths() -> None:
    made, _ = make(deep("swin4d", times=2))
    again = Parametrization.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made and again.base["depths"] == [1, 2]
    assert again.depth == Depth((1, 2), (2, 1)) and again.depth.ratios == (0.5, 2.0)
    other, _ = make(deep("swin4d", times=2, base={"depths": [2, 2]}))
    said = "; ".join(made.differences(other))
    assert "base {" in said and "depth Depth(base=(1, 2)" in said


def test_explain_counts_the_rows_of_the_deep_model() -> None:
    made, rows = explain(deep("neuromamba", times=2), TASKS)
    eps = {row.name: row.eps for row in rows}
    assert eps["backbone.blocks.1.mixer.in_proj.weight"] == 0.25
    assert eps["backbone.embed.weight"] == 0.5 and made.depth is not None


@pytest.mark.parametrize(
    ("depths", "base", "count"),
    [([2, 2], [1, 1], 6), ([2, 4], [1, 1], 8), ([2, 3, 5, 7], [1, 1, 1, 1], 12)],
)
def test_groups_of_several_ratios(depths: list[int], base: list[int], count: int) -> None:
    """Two a ratio (matrices, vectors), and four outside blocks."""
    if len(depths) == 4:
        built = build(deep4(depths, base))
    else:
        given = {"depths": base, "num_heads": [2, 4]}
        built = build(deep("swin4d", times=2, depths=depths, base=given, num_heads=[4, 8]))
    assert len(param_groups(built, TrainConfig())) == count


def deep4(depths: list[int], base: list[int]) -> Recipe:
    return deep(
        "swin4d",
        times=2,
        base={"depths": base, "num_heads": [2, 4, 8, 16]},
        num_heads=[4, 8, 16, 32],
        img_size=[16, 16, 16, 4],
        depths=depths,
    )


@pytest.mark.parametrize(
    ("backbone", "base", "message"),
    [
        ("swin4d", {}, r"completep needs the depth to scale from"),
        ("swin4d", {"depth": 1}, r"base.depth: swin4d has no such setting"),
        ("neuromamba", {"depths": [1]}, r"neuromamba has no such setting"),
        ("swin4d", {"depths": [1]}, r"base.depths=\[1\] needs one number for each of the 2"),
        ("swin4d", {"depths": 1}, r"base.depths needs whole numbers, one a stage"),
        ("neuromamba", {"depth": [1]}, r"base.depth needs a whole number"),
        ("swin_factorized", {"depths": [2, 4]}, r"cannot be built at base depth: .*multiples of 4"),
    ],
)
def test_a_base_depth_that_does_not_fit_is_refused(
    backbone: str, base: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make(deep(backbone, base=base))


def test_depth_without_muP_or_without_completep_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"completep needs parametrization.name=mup"):
        recipe("swin4d", "none", name="sp", depth="completep")
    with pytest.raises(RecipeError, match=r"base.depths needs parametrization.depth=completep"):
        recipe("swin4d", "none", base={"embed_dim": 12, "depths": [1, 1]})

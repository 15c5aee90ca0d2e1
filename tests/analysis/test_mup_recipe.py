"""The coordinate check of real recipes: muP passes, SP fails, for every backbone and objective."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fmrizoo.analysis.mup_recipe import (
    adamw,
    at_width,
    build_at,
    check_recipe,
    loss_on,
    lr_scales,
    made_up_batch,
    mixer_parts,
    small,
    width_keys,
    widths_of,
    zoo_taps,
)
from fmrizoo.analysis.mup_step import first_step, snapshot
from fmrizoo.backbones.mamba2 import EPS, Mamba2
from fmrizoo.errors import RecipeError
from fmrizoo.types import Grid
from fmrizoo.zoo import load_recipe

NAMES = [
    f"pretrain/{backbone}_{objective}"
    for backbone in ("swin4d", "swin_factorized", "neuromamba")
    for objective in ("simmim", "ar")
]


def narrow(name: str) -> list[int]:
    return list(widths_of(small(load_recipe(name))))[:3]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if "factorized" in n else ()) for n in NAMES],
)
def test_mup_keeps_its_word_and_sp_does_not(name: str) -> None:
    every = widths_of(small(load_recipe(name)))
    widths = [every[0], every[1], every[3]]
    mup = check_recipe(name, (), widths, parametrization="mup", steps=3)
    assert mup.passed and mup.moved > 0.1, mup.says
    sp = check_recipe(name, (), widths[:2], parametrization="sp", steps=3, seeds=1)
    assert not sp.passed and abs(sp.worst.worst) > 0.5, sp.says


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_mup_keeps_its_word_over_sixteen_times_the_width(name: str) -> None:
    widths = [*widths_of(small(load_recipe(name)))]
    widths.append(2 * widths[-1])
    mup = check_recipe(name, (), widths, parametrization="mup")
    assert mup.passed, mup.says
    sp = check_recipe(name, (), widths, parametrization="sp")
    out = [v for v in sp.verdicts if abs(v.change) > sp.tolerance]
    assert len(out) >= 0.5 * len(sp.verdicts), sp.says


@pytest.mark.parametrize("name", NAMES)
def test_the_first_step_of_every_parameter_has_the_size_of_its_rate(name: str) -> None:
    recipe = small(load_recipe(name))
    recipe.parametrization.readout_zero_init = False  # or nothing below it has a gradient
    base, _, width = narrow(name)
    model = build_at(recipe, width, 0, base, "mup")
    scales, before = lr_scales(model), snapshot(model)
    assert {round(1 / s, 6) for s in scales.values()} == {1, 4}
    optimizer = adamw(model, scales, 1e-3)
    loss_on(model, made_up_batch(Grid(*recipe.backbone.img_size))).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    rates = {parameter: 1e-3 * scale for parameter, scale in scales.items()}
    found = first_step(before, snapshot(model), rates)
    assert found.passed, found.says


@pytest.mark.parametrize("name", NAMES)
def test_only_the_width_differs_between_the_models(name: str) -> None:
    recipe = small(load_recipe(name))
    low, high = widths_of(recipe)[0], widths_of(recipe)[-1]
    one, two = (at_width(recipe, width, low, "mup") for width in (low, high))
    for key in ("embed_dim", "num_heads"):
        if hasattr(one.backbone, key):
            setattr(one.backbone, key, getattr(two.backbone, key))
    assert one == two
    wide = width_keys(recipe, high)
    if "num_heads" in wide:
        growth = [recipe.backbone.c_mult**stage for stage in range(len(wide["num_heads"]))]
        each = [high * g / h for g, h in zip(growth, wide["num_heads"], strict=True)]
        assert len(set(each)) == 1


def test_the_recipe_is_left_as_it_was() -> None:
    recipe, again = (load_recipe("pretrain/swin_factorized_simmim") for _ in range(2))
    small(recipe)
    assert recipe == again


def test_a_width_that_heads_do_not_make_up_is_refused() -> None:
    with pytest.raises(RecipeError, match="a width of 40 is no multiple of 6"):
        check_recipe("pretrain/swin_factorized_ar", (), [36, 40], parametrization="mup")


def test_a_recipe_without_an_objective_is_refused() -> None:
    with pytest.raises(RecipeError, match="name both"):
        check_recipe({"backbone": {"name": "swin4d"}})  # type: ignore[arg-type]


def test_the_batch_is_the_same_at_every_call() -> None:
    one, two = (made_up_batch(Grid(8, 8, 8, 4)) for _ in range(2))
    assert torch.equal(one.bold, two.bold) and torch.equal(one.mask, two.mask)
    assert one.bold[:, 0][one.mask].mean().item() == pytest.approx(1, abs=0.2)


def test_the_parts_of_a_mixer_are_those_that_its_output_is_made_of() -> None:
    torch.manual_seed(0)
    mixer, u = Mamba2(32, d_state=8, head_dim=8, ngroups=2), torch.randn(2, 11, 32)
    weight = torch.rand(32) + 0.5
    with torch.no_grad():
        parts = mixer_parts(mixer, u, weight)
        gated = (parts["scan"].flatten(2) * F.silu(parts["z"])).unflatten(-1, (2, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=EPS).flatten(2) * mixer.norm.weight
        built = F.linear(normed, mixer.out_proj.weight)
        normed_u = F.rms_norm(u, u.shape[-1:], eps=EPS) * weight
        assert torch.allclose(built, mixer(normed_u), atol=1e-5)


@pytest.mark.parametrize("name", NAMES[::2])
def test_taps_have_names_of_their_own_and_see_inside_fused_modules(name: str) -> None:
    recipe = small(load_recipe(name))
    names = [tap.name for tap in zoo_taps(build_at(recipe, 144, 0, 72, "sp"))]
    assert len(set(names)) == len(names)
    wanted = ".mixer.scan" if "neuromamba" in name else ".attn.logits"
    assert sum(n.endswith(wanted) for n in names) >= 2

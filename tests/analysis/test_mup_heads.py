"""Heads that grow in size: the source's own sizes, and the check that tells 1/d from d^-½."""

from __future__ import annotations

import math

import pytest
import torch

from fmrizoo.analysis import mup_recipe
from fmrizoo.analysis.mup_check import CoordinateCheck
from fmrizoo.analysis.mup_recipe import check_recipe, heads_grow, small, widths_of
from fmrizoo.config import Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.layers.swin import WindowAttention
from fmrizoo.mup.explain import explain
from fmrizoo.mup.parametrization import make
from fmrizoo.zoo import list_recipes, load_recipe

NAMES = [f"pretrain/{b}_{o}" for b in ("swin4d", "swin_factorized") for o in ("simmim", "ar")]
SIZES = list_recipes("pretrain/sizes/swin*")
BASES = {"swin4d": [6, 12, 24, 48], "swin_factorized": [4, 8, 16, 32]}  # 51M


def muP(heads: list[int], width: int = 96) -> list[str]:
    return [
        "parametrization.name=mup",
        f"parametrization.base={{embed_dim: {width}, num_heads: {heads}}}",
    ]


def growing(name: str) -> list[str]:
    """Twice the base width with the same number of heads."""
    return ["backbone.embed_dim=192", *muP(BASES[name.split("/")[1].rsplit("_", 1)[0]])]


def of_size(name: str) -> Recipe:
    return load_recipe(name, muP(BASES[name.split("/")[-1].rsplit("_", 1)[0]]))


@pytest.mark.parametrize("name", SIZES)
def test_every_shipped_size_goes_with_the_base_of_51M(name: str) -> None:
    recipe = of_size(name)
    made, dims = make(recipe)
    backbone, heads = recipe.backbone, made.base["num_heads"]
    assert made.m == backbone.embed_dim / 96
    assert {d.ratio for found in dims.values() for d in found.dims if d.grows} == {made.m}
    for stage, (old, new) in enumerate(zip(heads, backbone.num_heads, strict=True)):
        factor = math.sqrt((96 / old) / (backbone.embed_dim / new))
        found = {v for n, v in made.attention.items() if n.startswith(f"layers.{stage}.")}
        assert len(found) == (factor != 1)
        assert all(value == pytest.approx(factor, rel=1e-12) for value in found)


def test_there_are_sizes_of_both_kinds() -> None:
    grow = {name: heads_grow(of_size(name)) for name in SIZES}
    assert len(SIZES) == 14
    assert grow["pretrain/sizes/swin4d_13.4B"]
    assert not grow["pretrain/sizes/swin_factorized_13.4B"] and not grow[SIZES[4]]


@pytest.mark.parametrize("name", ["swin4d_806M", pytest.param("swin_factorized_3B")])
def test_a_shipped_size_can_be_explained(name: str) -> None:
    made, rows = explain(of_size(f"pretrain/sizes/{name}"))
    assert len(rows) == len(made.table) and made.attention


def check(name: str, factors: tuple[int, ...], **more: object) -> CoordinateCheck:
    every = widths_of(small(load_recipe(name)), grow=True)
    widths = [every[0] * factor for factor in factors]
    return check_recipe(name, growing(name), widths, steps=3, **more)  # type: ignore[arg-type]


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with d^-½ at every width."""
    build = mup_recipe.build_at

    def wrong(*args: object) -> torch.nn.Module:
        model = build(*args)  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, WindowAttention):
                module.multiplier = 1.0
        return model

    monkeypatch.setattr(mup_recipe, "build_at", wrong)


FAST = "pretrain/swin4d_simmim"
MOST = [pytest.param(n, marks=() if n == FAST else pytest.mark.slow) for n in NAMES]


@pytest.mark.parametrize("name", MOST)
def test_what_growing_heads_learn_stays_alike(name: str) -> None:
    found = check(name, (1, 2, 8))
    assert found.passed and found.transients == {"attn.logits": 2}, found.says
    assert found.slopes("attn.logits", "activation").keys() == {2, 3}


@pytest.mark.parametrize("name", MOST)
def test_the_usual_scale_lets_their_logits_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly(monkeypatch)
    found = check(name, (1, 2, 8))
    assert [v.module for v in found.failed] == ["attn.logits"], found.says
    assert found.worst.worst > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_four_widths(name: str) -> None:
    found = check(name, (1, 2, 4, 8), seeds=4)  # two leave ±0.02 of chance in the logits
    assert found.passed, found.says


def test_the_start_of_the_logits_is_a_known_transient() -> None:
    """Without zero queries: √(base head_dim / head_dim) at the start, ± 0.1 in the slope."""
    recipe = load_recipe(FAST, growing(FAST))
    logits = {}
    for width in (32, 128, 512):
        model = mup_recipe.build_model(
            mup_recipe.at_width(small(recipe), width, 32, "mup", heads_at=32)
        )
        module = next(m for m in model.modules() if isinstance(m, WindowAttention))
        assert module.multiplier == pytest.approx(math.sqrt(32 / width))
        torch.manual_seed(0)
        x = torch.randn(4096, width)
        tap = next(t for t in mup_recipe.zoo_taps(model) if t.name.endswith(".logits"))
        logits[width] = float(tap.read((), module.qkv(x)).abs().mean().detach())  # type: ignore[union-attr]
    for wide in (128, 512):
        slope = math.log(logits[wide] / logits[32]) / math.log(wide / 32)
        assert slope == pytest.approx(-0.5, abs=0.1)


def test_a_recipe_whose_heads_keep_their_size_is_checked_as_before() -> None:
    same = ["backbone.embed_dim=192", "backbone.num_heads=[12,24,48,96]", *muP([6, 12, 24, 48])]
    assert not heads_grow(load_recipe(FAST, same)) and not heads_grow(load_recipe(FAST))
    assert heads_grow(load_recipe(FAST, growing(FAST)))
    assert not heads_grow(load_recipe("pretrain/neuromamba_ar"))


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match="48 is no multiple of 32, the channels of all heads"):
        check_recipe(FAST, growing(FAST), [32, 48])

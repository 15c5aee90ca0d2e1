"""The table of sizes: presets in order, counts and tokens as the models make them."""

from __future__ import annotations

import pytest
import torch

import fmrizoo
from fmrizoo.analysis.sizes import brain_of, sizes_of
from fmrizoo.errors import RecipeError
from fmrizoo.registry import BACKBONES
from fmrizoo.zoo import load_recipe


@pytest.mark.parametrize("name", BACKBONES.list())
def test_the_default_comes_first_then_presets_by_size(name: str) -> None:
    first, *presets = sizes_of(name)
    assert (first.name, first.recipe, first.whole) == ("default", "", 0)
    recipes = fmrizoo.list_recipes(f"pretrain/sizes/{name}_*")
    assert sorted(s.recipe for s in presets) == sorted(recipes)
    assert [s.parameters for s in presets] == sorted(s.parameters for s in presets)
    assert all(s.recipe.endswith(f"{name}_{s.name}") for s in presets)
    for size in presets:
        assert 0 < size.parameters < size.whole
        assert list(size.clip) == load_recipe(size.recipe).backbone.img_size
    for size in (first, *presets):
        assert 0 < size.brain_gflop <= size.gflop and 0 < size.brain_tokens <= size.tokens


@pytest.mark.parametrize("name", BACKBONES.list())
def test_counts_are_those_of_the_model(name: str) -> None:
    size = sizes_of(name)[0]
    backbone = fmrizoo.create_backbone(name)
    assert size.parameters == sum(p.numel() for p in backbone.parameters())
    mask = brain_of(size.clip[:3]).unsqueeze(0)
    frames = 2 * backbone.patch_size[3]
    bold = torch.zeros(1, 1, *size.clip[:3], frames)
    tokens = backbone.tokenize(bold, mask)
    share = size.clip.t // frames
    assert share * int(tokens.valid.sum()) == size.brain_tokens
    assert size.gflop == pytest.approx(sum(backbone.flops(size.clip).values()) / 1e9)
    inside = sum(backbone.flops(size.clip, mask[0]).values())
    assert size.brain_gflop == pytest.approx(inside / 1e9)


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown backbone 'swin5d'"):
        sizes_of("swin5d")

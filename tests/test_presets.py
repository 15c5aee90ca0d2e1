"""Presets: what each size's name counts, that it is that large, and that the recipes agree."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import fmrizoo
from fmrizoo.config import Recipe
from fmrizoo.model import PretrainingModel
from fmrizoo.zoo import load_recipe

PREFIX = "pretrain/sizes/"
# Size → which count the name means, and parameters that the name stands for. The sources name the
# encoder up to 3B, the encoder with its decoder above. Their "3B" is a rounding of a 3.2B encoder,
# which they call 4.1B with its decoder.
ENCODER, WHOLE = "encoder", "whole"
SWINS = {
    "51M": (ENCODER, 51e6),
    "202M": (ENCODER, 202e6),
    "806M": (ENCODER, 806e6),
    "1.2B": (ENCODER, 1.2e9),
    "3B": (ENCODER, 3.2e9),
    "8.8B": (WHOLE, 8.8e9),
    "13.4B": (WHOLE, 13.4e9),
}
NAMED = {f"{name}_{size}": count for name in ("swin4d", "swin_factorized")
         for size, count in SWINS.items()}  # fmt: skip
NAMED |= {
    "swin4d_3B with its decoder": (WHOLE, 4.1e9),
    # The whole model: with the Linear from features back to patches.
    "neuromamba_1.4M": (WHOLE, 1.4e6),
    "neuromamba_3.1M": (WHOLE, 3.1e6),
    "neuromamba_5.4M": (WHOLE, 5.4e6),
    "neuromamba_11.9M": (WHOLE, 11.9e6),
}


@cache
def parameters(preset: str) -> dict[str, int]:
    """Counts of the encoder and of the whole model; nothing is allocated."""
    with torch.device("meta"):
        model = fmrizoo.build(f"{PREFIX}{preset}")
    assert isinstance(model, PretrainingModel)
    assert all(p.is_meta for p in model.parameters())
    encoder = sum(p.numel() for p in model.backbone.parameters())
    return {ENCODER: encoder, WHOLE: encoder + sum(p.numel() for p in model.objective.parameters())}


def recipe(preset: str) -> Recipe:
    return load_recipe(f"{PREFIX}{preset}")


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_preset_is_as_large_as_its_name_says(name: str) -> None:
    which, expected = NAMED[name]
    assert parameters(name.split()[0])[which] == pytest.approx(expected, rel=0.03)


def test_every_preset_is_in_the_table_and_named_after_its_backbone() -> None:
    found = [name.removeprefix(PREFIX) for name in fmrizoo.list_recipes(f"{PREFIX}*")]
    assert sorted(found) == sorted({name.split()[0] for name in NAMED})
    for name in found:
        assert recipe(name).backbone.name == name.rpartition("_")[0]


@pytest.mark.parametrize("size", SWINS)
def test_swins_of_one_size_compare(size: str) -> None:
    """Original and factorized are close in size, and differ in the encoder only."""
    first, second = f"swin4d_{size}", f"swin_factorized_{size}"
    for which in (ENCODER, WHOLE):
        assert parameters(first)[which] == pytest.approx(parameters(second)[which], rel=0.03)
    assert recipe(first).data == recipe(second).data
    assert recipe(first).train == recipe(second).train


@pytest.mark.parametrize("backbone", ["swin4d", "swin_factorized"])
def test_learning_rates_and_memory_follow_the_size(backbone: str) -> None:
    recipes = {size: recipe(f"{backbone}_{size}") for size in SWINS}
    rates = {size: r.train.lr for size, r in recipes.items()}
    assert rates == {s: 1e-4 if s in ("51M", "202M") else 2e-4 for s in SWINS}
    for r in recipes.values():
        assert r.objective.name == "simmim" and r.objective.decoder == "mlp"
        assert r.train.precision == "bf16" and r.train.batch_size == 384
    micro = [r.train.max_micro_batch for r in recipes.values()]
    stages = [r.train.zero_stage for r in recipes.values()]
    assert micro == sorted(micro, reverse=True) and stages == sorted(stages)
    assert recipes["13.4B"].train.checkpointing == "window-chunk"


@pytest.mark.parametrize("size", ["1.4M", "3.1M", "5.4M", "11.9M"])
def test_neuromambas_have_a_quarter_of_their_width_as_states(size: str) -> None:
    found = recipe(f"neuromamba_{size}")
    assert found.backbone.d_state * 4 == found.backbone.embed_dim
    assert found.objective.name == "autoregressive" and found.train.precision == "bf16"


PAIRS = [(b, o) for b in ("swin4d", "swin_factorized", "neuromamba") for o in ("simmim", "ar")]


@pytest.mark.parametrize(("backbone", "objective"), PAIRS)
def test_every_pair_has_a_recipe_for_real_data(backbone: str, objective: str) -> None:
    found = load_recipe(f"pretrain/{backbone}_{objective}")
    assert found.backbone.name == backbone
    assert found.objective.name == {"simmim": "simmim", "ar": "autoregressive"}[objective]
    other = load_recipe(f"pretrain/{backbone}_{'ar' if objective == 'simmim' else 'simmim'}")
    assert found.backbone == other.backbone and found.data == other.data
    assert found.train == other.train, "the objective alone tells the two apart"


@pytest.mark.parametrize(
    ("preset", "pair"),
    [
        ("swin4d_51M", "swin4d_simmim"),
        ("swin_factorized_51M", "swin_factorized_simmim"),
        ("neuromamba_3.1M", "neuromamba_ar"),
    ],
)
def test_the_default_size_is_a_preset(preset: str, pair: str) -> None:
    assert recipe(preset) == load_recipe(f"pretrain/{pair}")

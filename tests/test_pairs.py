"""Every pair of backbone and objective on the shipped recordings, through the real trainer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fmrizoo import zoo
from fmrizoo.pipeline import pretrain
from fmrizoo.registry import BACKBONES, OBJECTIVES

RECIPES = zoo.list_recipes("pretrain/haxby_*_*")


def test_the_recipes_are_all_pairs() -> None:
    sections = [zoo.load_recipe(name) for name in RECIPES]
    pairs = [(r.backbone.name, r.objective.name) for r in sections]
    assert sorted(pairs) == [(b, o) for b in BACKBONES.list() for o in sorted(OBJECTIVES.list())]


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_steps_lower_the_loss_on_the_sample(
    name: str, sample_store: Path, tmp_path: Path
) -> None:
    recipe = zoo.load_recipe(name, [f"data.store={sample_store}", "train.steps=20"])
    result = pretrain(recipe, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert result.step == 20
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    with np.load(tmp_path / "reconstruction.npz") as arrays:
        assert np.isfinite(arrays["predicted"]).all()
        assert (arrays["predicted"] != arrays["truth"])[arrays["masked"]].any()

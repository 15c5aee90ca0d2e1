"""Every head on every backbone, on the shipped sample: trains, saves, loads, evaluates."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fmrizoo
from fmrizoo import pipeline
from fmrizoo.evaluate.predictions import read_predictions
from fmrizoo.model import DownstreamModel
from fmrizoo.registry import BACKBONES, HEADS
from fmrizoo.trainer.export import read_info
from fmrizoo.types import TaskSpec
from fmrizoo.zoo import load_recipe

SMALL = {
    "swin4d": ["embed_dim=8", "depths=[2,2]", "num_heads=[1,2]"],
    "swin_factorized": ["embed_dim=12", "depths=[4,4]", "num_heads=[2,2]"],
    "neuromamba": ["embed_dim=16", "depth=2", "d_state=8", "head_dim=8"],
}
SETTINGS = {"complex": ["dim=16", "num_heads=2", "cells=2"], "lora": ["rank=2"]}
VARIANTS = [
    (head, dict(settings)) for head in HEADS.list() for settings in HEADS[head].factory.variants
]
# The other two backbones train these heads in the fast tests, and the contracts all of them.
MARKS = {("swin_factorized", head): pytest.mark.slow for head in HEADS.list()}
PAIRS = [
    pytest.param(
        name,
        head,
        settings,
        id="-".join([name, head, *map(str, settings.values())]),
        marks=MARKS.get((name, head), ()),
    )
    for name, (head, settings) in itertools.product(BACKBONES.list(), VARIANTS)
]


def overrides(name: str, head: str, settings: dict[str, Any], store: Path) -> list[str]:
    """The demo's pretraining recipe of this backbone, with a head in place of its objective."""
    given = [f"backbone.{text}" for text in SMALL[name]]
    given += [f"head.{text}" for text in SETTINGS.get(head, [])]
    given += ["head.pool=space", "head.norm=batch"] if head != "complex" else []
    given += [f"head.{key}={value}" for key, value in settings.items()]
    return [
        *given, f"head={head}", "objective=null", f"data.store={store}", "train.steps=8",
        "train.batch_size=40", "train.lr=1e-2", "train.warmup=0", "train.validate_every=4",
        "train.min_lr_ratio=1", "data.normalization=voxel",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "head", "settings"), PAIRS)
def test_head_on_the_sample(
    name: str, head: str, settings: dict[str, Any], sample_store: Path, tmp_path: Path
) -> None:
    given = overrides(name, head, settings, sample_store)
    recipe = load_recipe(f"pretrain/haxby_{name}_simmim", given)
    result = pipeline.finetune(recipe, tmp_path / "run")
    assert result is not None and result.n_test == 24
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0] - 0.005  # all 40 training clips in every batch
    assert {"loss", "accuracy"} <= set(rows[-1]["validation"])
    info = read_info(tmp_path / "run/model")
    assert result.parameters is not None
    assert result.parameters.trainable + result.parameters.frozen == info.parameters
    model = fmrizoo.load(tmp_path / "run")
    assert isinstance(model, DownstreamModel) and model.head.trains == result.train_encoder
    assert result.head == head and isinstance(info.tasks[0], TaskSpec)
    counted = json.loads((tmp_path / "run/env.json").read_text())["accounting"]
    assert counted["frozen"] == result.parameters.frozen
    assert counted["optimizer_bytes"] == 8 * result.parameters.trainable
    before = read_predictions(tmp_path / "run/predictions.tsv")
    torch.manual_seed(9)
    assert pipeline.evaluate(tmp_path / "run").metrics == result.metrics
    assert read_predictions(tmp_path / "run/predictions.tsv") == before


# The linear head without an encoder that trains, and with all of it, is what last_block is.
@pytest.mark.parametrize(
    ("number", "variant"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}",
            marks=pytest.mark.slow if case[1][1].get("train_encoder") in ("none", "all") else (),
        )
        for case in enumerate(VARIANTS)
    ],
)
def test_head_in_bf16_with_recomputation(
    number: int, variant: tuple[str, dict[str, Any]], sample_store: Path, tmp_path: Path
) -> None:
    """Through the trainer, each head on another backbone; losses near those of plain fp32."""
    name = BACKBONES.list()[number % len(BACKBONES.list())]
    losses = []
    for precision, mode in (("fp32", "none"), ("bf16", "window-chunk")):
        given = overrides(name, *variant, sample_store)
        given += [f"train.precision={precision}", f"train.checkpointing={mode}", "train.steps=3"]
        recipe = load_recipe(f"pretrain/haxby_{name}_simmim", given)
        assert pipeline.finetune(recipe, tmp_path / precision) is not None
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)

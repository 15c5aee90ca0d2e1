"""Several ranks start from the weights that one process starts from, whatever the job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_tiny import on_ranks

from fmrizoo import pipeline
from fmrizoo.config import Recipe
from fmrizoo.trainer.device import World
from fmrizoo.trainer.engine import Engine
from fmrizoo.zoo import load_recipe

SMALL = ["backbone.embed_dim=8", "backbone.num_heads=[1,2]", "backbone.depths=[1,1]"]
SHORT = ["train.steps=1", "train.batch_size=4", "train.zero_stage=0"]
JOBS = ("fresh", "mup", "scratch", "frozen", "lora", "prompt", "tuned", "lora again")


def recipes(store: str, root: str) -> dict[str, Recipe]:
    """Of every job; ``root`` holds the runs that some of them start from."""

    def made(base: str, *more: str) -> Recipe:
        return load_recipe(base, [f"data.store={store}", *SMALL, *SHORT, *more])

    tune, first = "finetune/haxby_slice", f"init_from={root}/pretrained"
    mup = ["parametrization.name=mup", "parametrization.base={embed_dim: 4, num_heads: [1, 2]}"]
    jobs = [
        made("pretrain/haxby_slice"),
        made("pretrain/haxby_slice", *mup),
        made(tune, "head.train_encoder=all"),
        made(tune, first),
        made("finetune/haxby_slice_lora", first),
        made("finetune/haxby_slice_prompt", first),
        made(tune, f"init_from={root}/adapted"),
        made("finetune/haxby_slice_lora", f"init_from={root}/adapted"),
    ]
    return dict(zip(JOBS, jobs, strict=True))


class Started(Exception):
    """The engine is made."""


def started(recipe: Recipe, out: Path) -> dict[str, Tensor]:
    """Weights and buffers of this rank before the first step."""
    found: dict[str, Tensor] = {}
    make = Engine.__init__

    def noting(engine: Engine, *args: Any) -> None:
        make(engine, *args)
        found.update({n: v.detach().clone() for n, v in engine.model.state_dict().items()})
        engine.close()
        raise Started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", noting)
        run = pipeline.pretrain if recipe.objective is not None else pipeline.finetune
        with pytest.raises(Started):
            run(recipe, out)
    return found


def on_each(world: World, store: str, root: str) -> dict[str, dict[str, Tensor]]:
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.rank),
    }
    return {
        name: started(recipe, Path(root, f"two-{name}"))
        for name, recipe in recipes(store, root).items()
    }


@pytest.fixture(scope="module")
def weights(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of one process, of rank 0 and of rank 1: job → weights."""
    root = tmp_path_factory.mktemp("start")
    jobs = recipes(str(sample_store), str(root))
    pipeline.pretrain(jobs["fresh"], root / "pretrained")
    pipeline.finetune(jobs["lora"], root / "adapted")
    alone = {name: started(recipe, root / f"one-{name}") for name, recipe in jobs.items()}
    return [alone, *on_ranks(root / "ranks", on_each, str(sample_store), str(root))]


@pytest.mark.parametrize("job", JOBS)
def test_all_ranks_start_from_one_process_weights(weights: list[Any], job: str) -> None:
    alone, *ranks = weights
    assert len(alone[job]) > 5
    for rank in ranks:
        assert rank[job].keys() == alone[job].keys()
        for name, value in alone[job].items():
            assert torch.equal(rank[job][name], value), name


def test_jobs_start_differently(weights: list[Any]) -> None:
    """The equality above is not that of an empty or fixed model."""
    alone = weights[0]
    name = next(n for n in alone["frozen"] if n.startswith("backbone.") and n.endswith("weight"))
    assert not torch.equal(alone["scratch"][name], alone["frozen"][name])
    assert any("lora" in name for name in alone["lora"])

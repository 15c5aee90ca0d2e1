"""Several targets at once, missing labels, early stopping, and labels that cannot be used."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fmrizoo
from fmrizoo import pipeline
from fmrizoo.config import PrepareConfig, Recipe
from fmrizoo.data.prepare import prepare
from fmrizoo.data.sample import sample_path
from fmrizoo.errors import CheckpointError, DataError, RecipeError
from fmrizoo.evaluate.predictions import read_predictions
from fmrizoo.evaluate.results import read_result
from fmrizoo.model import DownstreamModel
from fmrizoo.trainer.export import read_info, read_model, save_model
from fmrizoo.zoo import load_recipe

SMALL = ["backbone.embed_dim=8", "backbone.num_heads=[1,2]", "backbone.depths=[1,1]"]
THREE = "task.targets={trial_type: classification, loudness: regression, effort: ordinal}"
# Every eighth event of a run has no loudness, every fifth no effort.
LOUDNESS = {"bottle": 1.0, "cat": 2, "chair": 3, "face": 4, "house": 5, "scissors": 6}


def loudness(kind: str, number: int) -> str:
    return "n/a" if number % 8 == 0 else str(LOUDNESS.get(kind, 7.5))


def effort(kind: str, number: int) -> str:
    return "n/a" if number % 5 == 0 else str(len(kind) % 3)


def labelled_store(root: Path, columns: dict[str, Callable[[str, int], str]]) -> Path:
    """The sample with more columns in its events, made of the category and the event's number."""
    shutil.copytree(sample_path(), root / "bids")
    for file in sorted((root / "bids").rglob("*events.tsv")):
        header, *rows = (line.split("\t") for line in file.read_text().splitlines())
        kind = header.index("trial_type")
        lines = ["\t".join([*header, *columns])]
        for number, row in enumerate(rows):
            more = [make(row[kind], number) for make in columns.values()]
            lines.append("\t".join([*row, *more]))
        file.write_text("\n".join(lines) + "\n")
    prepare(str(root / "bids"), root / "store", PrepareConfig(space="native"))
    return root / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("targets")
    columns = {"loudness": loudness, "effort": effort, "same": lambda kind, number: "yes"}
    return labelled_store(root, {**columns, "noise": lambda kind, number: "nan"})


def recipe_of(store: Path, *more: str) -> Recipe:
    given = [f"data.store={store}", *SMALL, "train.steps=6", "train.validate_every=2", *more]
    return load_recipe("finetune/haxby_slice", given)


def test_three_targets_at_once(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = recipe_of(store, THREE, "task.class_weights=balanced", "task.label_smoothing=0.1")
    first = pipeline.finetune(recipe, run)
    tasks = read_info(run / "model").tasks
    assert [(t.name, t.kind) for t in tasks] == list(recipe.task.targets.items())
    assert tasks[0].smoothing == 0.1 and tasks[2].smoothing == 0
    assert tasks[2].classes == ("0", "1", "2")
    assert len(tasks[0].weights) == 8 and not tasks[1].weights
    found = {t.name: read_result(run / "targets" / t.name) for t in tasks}
    assert first == found["trial_type"] and not (run / "results.json").exists()
    # 24 test events; the first of every run of 8 has no loudness, the first and sixth no effort.
    assert [r.n_test for r in found.values()] == [24, 21, 18]
    assert set(found["effort"].metrics) == {"quadratic_kappa", "mae", "accuracy", "spearman_r"}
    rows, _ = read_predictions(run / "targets/loudness/predictions.tsv")
    assert len(rows) == 21 and {row.target for row in rows} <= {*LOUDNESS.values(), 7.5}
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    known = {"loss", "trial_type.accuracy", "loudness.mae", "effort.quadratic_kappa"}
    assert known <= set(last["validation"])
    again = pipeline.finetune(recipe, run)
    assert again == first, "a finished run with several targets is left alone"
    pipeline.evaluate(run)
    assert {n: read_result(run / "targets" / n).metrics for n in found} == {
        n: r.metrics for n, r in found.items()
    }


def test_the_scaler_is_of_the_training_events_alone(store: Path, tmp_path: Path) -> None:
    recipe = recipe_of(store, "task.target=loudness", "task.kind=regression")
    pipeline.finetune(recipe, tmp_path / "run")
    (task,) = read_info(tmp_path / "run/model").tasks
    split = json.loads((tmp_path / "run/split.json").read_text())
    values = []
    for name in split["train"]:
        (file,) = (store.parent / "bids").rglob(f"{name}_events.tsv")
        _, *rows = (line.split("\t") for line in file.read_text().splitlines())
        values += [float(r[-4]) for r in rows if r[-4] != "n/a"]
    assert len(values) == 35
    mean = sum(values) / 35
    assert task.mean == pytest.approx(mean)
    assert task.std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 35))


def test_early_stopping_exports_the_best_weights(store: Path, tmp_path: Path) -> None:
    more = ["train.lr=0.3", "train.steps=60", "train.patience=2", "train.keep_best=true"]
    recipe = recipe_of(store, *more, "train.monitor=accuracy", "train.cache_features=true")
    result = pipeline.finetune(recipe, tmp_path / "run")
    assert result is not None and result.validation is not None
    info = read_info(tmp_path / "run/model")
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    seen = {r["step"]: r["validation"]["accuracy"] for r in rows if r.get("validation")}
    best = max(seen, key=lambda step: (seen[step], -step))
    assert info.stopped_early and info.steps_taken == max(seen) == best + 4 < 60
    assert info.step == best
    # The exported weights are those of that step: tested again on the validation events they
    # score what they scored then.
    assert result.validation["accuracy"] == pytest.approx(seen[best])
    assert not (tmp_path / "run/features").exists()


def test_cached_features_give_the_same_run(store: Path, tmp_path: Path) -> None:
    metrics = []
    for cached in ("false", "true"):
        recipe = recipe_of(store, THREE, f"train.cache_features={cached}", "head.dropout=0.2")
        pipeline.finetune(recipe, tmp_path / cached)
        lines = (tmp_path / cached / "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(line) for line in lines])
    for plain, kept in zip(*metrics, strict=True):
        assert kept["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        for name, value in (plain.get("validation") or {}).items():
            assert kept["validation"][name] == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task.target=same"], "'same' needs at least two classes .* found .'yes'."),
        (["task.target=noise", "task.kind=regression"], "noise='nan' is not a label"),
        (["task.target=trial_type", "task.kind=ordinal"], "trial_type.*(number|levels)"),
        (["task.target=effort", "task.kind=ordinal", "task.levels=['0','1']"], "'2'"),
        (["head=lora", "head.targets=[attn.qvk]"], r"attn\.qvk.*Did you mean 'attn.qkv'"),
        (["head=lora", "head.norm=none", "train.cache_features=true"], "needs a frozen encoder"),
        (["head=complex", "head.stages=[7]"], r"stages \[7\] do not exist: the backbone has 2"),
        (["train.keep_best=true", "split.validation=0"], "needs validation runs"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_training(
    more: list[str], said: str, store: Path, tmp_path: Path
) -> None:
    with pytest.raises((DataError, RecipeError), match=said):
        pipeline.finetune(recipe_of(store, *more), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task.label_smoothing=0.1", "task.kind=regression"], "is for classification"),
        (["task.class_weights=balanced", "task.kind=regression"], "needs a target with classes"),
        (["task.targets={age: regresion}"], "Did you mean 'regression'"),
        (["train.patience=3", "train.validate_every=0"], "set train.validate_every"),
        ([THREE, "task.level=run"], "several targets from events is ambiguous"),
        (["task.levels=[a,b]"], "needs one target of kind ordinal"),
    ],
)
def test_settings_that_contradict_are_refused_when_the_recipe_is_read(
    more: list[str], said: str, store: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(store, *more)


def test_an_adapter_of_a_run_fits_its_encoder_and_no_other(store: Path, tmp_path: Path) -> None:
    from fmrizoo.heads import adapters

    pre = [f"data.store={store}", *SMALL, "train.steps=2"]
    pipeline.pretrain(load_recipe("pretrain/haxby_slice", pre), tmp_path / "pre")
    more = [f"init_from={tmp_path / 'pre'}", "head=lora", "head.rank=2", "train.lr=1e-2"]
    result = pipeline.finetune(recipe_of(store, *more), tmp_path / "run")
    assert result is not None and result.train_encoder == "lora"
    whole = (tmp_path / "run/model/model.safetensors").stat().st_size
    alone = (tmp_path / "run/adapter/adapter_model.safetensors").stat().st_size
    assert alone < whole
    encoder = fmrizoo.load(tmp_path / "pre").backbone
    bold, mask = torch.randn(2, 1, 40, 20, 1, 8), torch.ones(2, 40, 20, 1, dtype=torch.bool)
    plain = encoder(bold, mask).values
    adapters.load(encoder, tmp_path / "run/adapter", name="objects")
    tuned = fmrizoo.load(tmp_path / "run")
    assert isinstance(tuned, DownstreamModel)
    adapted = encoder(bold, mask).values
    assert torch.equal(adapted, tuned.backbone(bold, mask).values)
    assert not torch.equal(adapted, plain)
    adapters.use(encoder, None)
    assert torch.equal(encoder(bold, mask).values, plain)
    other = fmrizoo.create_backbone("swin4d", img_size=[40, 20, 1, 8], patch_size=[5, 5, 1, 1])
    with pytest.raises(CheckpointError, match="adapter"):
        adapters.load(other, tmp_path / "run/adapter", name="objects")
    weights, info = read_model(tmp_path / "pre/model")
    key = "backbone.patch_embed.fc.weight"
    save_model(tmp_path / "moved", {**weights, key: weights[key] + 1}, info)
    with pytest.raises(CheckpointError, match="adapter"):
        adapters.load(fmrizoo.load(tmp_path / "moved").backbone, tmp_path / "run/adapter", name="o")

"""With permuted labels a probe of the sample falls to chance; with true ones it does not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fmrizoo import pipeline
from fmrizoo.config import PrepareConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.prepare import prepare
from fmrizoo.data.sample import sample_path
from fmrizoo.data.store import Store
from fmrizoo.data.targets import fit_tasks
from fmrizoo.zoo import build_model, load_recipe

PROBE = [
    "backbone.embed_dim=16",
    "backbone.num_heads=[2,4]",
    "backbone.depths=[1,1]",
    "train.steps=40",
    "train.lr=1e-2",
    "train.validate_every=0",
]
UNITS = 72  # 9 runs × 8 events, each in the test part of one fold
CHANCE = UNITS / 8
# Binomial with p = 1/8: 3.2 s.d. of 2.8 above the mean; one in two thousand permutations.
LIMIT = CHANCE + 9


def right(store: Path, out: Path) -> int:
    """Test events a frozen random encoder and a linear head get right, over the three folds."""
    total = 0.0
    for fold in range(3):
        given = [f"data.store={store}", f"split.fold={fold}", *PROBE]
        result = pipeline.finetune(load_recipe("finetune/haxby_slice", given), out / str(fold))
        assert result is not None and result.n_test == 24
        total += result.n_test * (result.metrics["accuracy"] or 0.0)
    return round(total)


@pytest.fixture(scope="module")
def permuted_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's slices with the labels of all 72 events dealt out again."""
    root = tmp_path_factory.mktemp("permuted")
    shutil.copytree(sample_path(), root / "bids")
    files = sorted((root / "bids/sub-001/func").glob("*acq-1slice*events.tsv"))
    tables = [[line.split("\t") for line in f.read_text().splitlines()] for f in files]
    column = tables[0][0].index("trial_type")
    labels = [row[column] for table in tables for row in table[1:]]
    assert len(labels) == UNITS
    dealt = iter(np.random.default_rng(0).permutation(labels).tolist())
    for file, (header, *rows) in zip(files, tables, strict=True):
        for row in rows:
            row[column] = next(dealt)
        file.write_text("".join("\t".join(row) + "\n" for row in (header, *rows)))
    settings = PrepareConfig(space="native", select={"acquisition": "1slice"})
    prepare(root / "bids", root / "store", settings)
    return root / "store"


def test_permuted_labels_fall_to_chance_and_true_ones_do_not(
    sample_store: Path, permuted_store: Path, tmp_path: Path
) -> None:
    assert right(sample_store, tmp_path / "true") > LIMIT + 4
    assert right(permuted_store, tmp_path / "permuted") <= LIMIT


def test_many_permutations_average_to_chance(sample_store: Path) -> None:
    """The same probe on cached features: 30 permutations, mean accuracy 1/8 ± 4 standard errors."""
    given = [f"data.store={sample_store}", *PROBE]
    recipe = load_recipe("finetune/haxby_slice", given)
    store = Store(sample_store)
    table = ClipTable.labelled(store, store.select(recipe.data.select), recipe.data, recipe.task)
    tasks = fit_tasks(table, recipe.task)
    torch.manual_seed(0)
    encoder = build_model(replace(recipe, head=None)).eval()
    with torch.no_grad():
        parts = [
            (encoder(b.bold, b.mask).pooled("space"), b.target)
            for c in Loader(table, recipe.data, 24, tasks=tasks).epoch()
            for b in [c.to_batch("cpu")]
        ]
    features = torch.cat([f for f, _ in parts])
    target = torch.cat([t for _, t in parts if t is not None]).long()
    fold = torch.tensor(table.run.tolist()) % 3
    draws = [fitted(features, target[torch.randperm(UNITS)], fold) for _ in range(30)]
    mean, error = np.mean(draws), np.std(draws, ddof=1) / len(draws) ** 0.5
    assert abs(mean - 1 / 8) < 4 * error < 0.04
    assert fitted(features, target, fold) > 1 / 8 + 4 * np.std(draws)


def fitted(features: torch.Tensor, target: torch.Tensor, fold: torch.Tensor) -> float:
    """Accuracy over three folds of ridge regression onto the classes."""
    correct = 0.0
    for k in range(3):
        train, test = fold != k, fold == k
        mean, scale = features[train].mean(0), features[train].std(0) + 1e-6
        x, y = (features - mean) / scale, torch.nn.functional.one_hot(target, 8).float()
        gram = x[train] @ x[train].T + 100 * torch.eye(int(train.sum()))
        scores = x[test] @ x[train].T @ torch.linalg.solve(gram, y[train] - 1 / 8)
        correct += (scores.argmax(1) == target[test]).sum().item()
    return correct / UNITS


@pytest.mark.slow
@pytest.mark.parametrize("head", ["complex", "lora", "prompt", "last_block"])
def test_permuted_labels_fall_to_chance_for_every_head(
    permuted_store: Path, tmp_path: Path, head: str
) -> None:
    total = 0.0
    for fold in range(3):
        given = [f"data.store={permuted_store}", f"split.fold={fold}", *PROBE[:-2]]
        recipe = load_recipe(f"finetune/haxby_slice_{head}", [*given, "train.validate_every=20"])
        result = pipeline.finetune(recipe, tmp_path / str(fold))
        assert result is not None and result.n_test == 24
        total += result.n_test * (result.metrics["accuracy"] or 0.0)
    assert total <= LIMIT

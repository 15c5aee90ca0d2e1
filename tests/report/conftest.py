"""Made-up run folders, as a pretraining, fine-tunings and baselines leave them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_measured import dynamics, memory_rows

from fmrizoo.analysis.dynamics import write_analysis
from fmrizoo.analysis.memory import write_memory
from fmrizoo.evaluate.predictions import Prediction, evaluate, write_predictions
from fmrizoo.evaluate.results import Parameters, Result, TaskInfo, write_result
from fmrizoo.types import TaskSpec

CLASSES = ("bottle", "cat", "chair", "face", "house", "scissors", "scrambledpix", "shoe")
TASK = TaskInfo("trial_type", "classification", CLASSES, "event")
SEEDS, FOLDS, RUNS = 3, 3, 9
CONTRACT = {
    "space": "native",
    "orientation": "RAS",
    "grid": [40, 20, 1],
    "voxel_size": [3.1, 3.75, 3.75],
    "tr": 2.5,
    "normalization": "voxel",
    "statistics": "run, each voxel over frames",
    "background": "0",
    "code_version": "0.1.0",
}
ENVIRONMENT = {
    "python": "3.11.7",
    "platform": "Linux",
    "versions": {"fmrizoo": "0.1.0", "torch": "2.14.1"},
    "argv": ["fmrizoo", "pretrain"],
    "world": {"size": 1, "device": "cpu"},
}


def clip_arrays(grid: tuple[int, int, int], frames: int = 10, patch: int = 2) -> dict[str, Any]:
    """A clip of smooth waves in an ellipse, half of its patches hidden, filled in with an error."""
    rng = np.random.default_rng(0)
    axes = [np.linspace(-1, 1, s) if s > 1 else np.zeros(1) for s in grid]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    mask = (x / 0.97) ** 2 + (y / 0.9) ** 2 + z**2 < 1
    t = np.arange(frames)
    truth = np.sin(3 * x[..., None] + 0.7 * t) * np.cos(4 * y[..., None] - 0.4 * t)
    truth = (truth + 0.3 * rng.normal(size=truth.shape)) * mask[..., None]
    cells = [-(-s // patch) for s in grid] + [-(-frames // 2)]
    hidden = rng.random(cells) < 0.5
    for axis, size in enumerate((*grid, frames)):
        hidden = np.repeat(hidden, 2 if axis == 3 else patch, axis).take(range(size), axis)
    predicted = 0.7 * truth + 0.2 * rng.normal(size=truth.shape)
    return {
        "truth": truth.astype(np.float32),
        "predicted": predicted.astype(np.float32),
        "masked": hidden,
        "mask": mask,
        "voxel_size": np.array([3.1, 3.75, 3.75]),
        "tr": np.array(2.5),
    }


def write_run(
    folder: Path, steps: int, recipe: dict[str, Any], seen: list[str], *, start: float, end: float
) -> None:
    """metrics.jsonl, recipe.yaml, env.json and model/config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(folder.name.encode()))
    lines = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * np.exp(-4 * step / steps) + 0.03 * rng.normal()
        line: dict[str, Any] = {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0}
        if step % (steps // 5) == 0:
            line["validation"] = {"loss": loss + 0.1, "accuracy": 0.3}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "env.json").write_text(json.dumps(ENVIRONMENT))
    model = {"contract": CONTRACT, "seen_runs": seen, "parameters": 1_234_567}
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(model))


def run_names(fold: int, part: str) -> list[str]:
    """Runs of one part of one of three folds."""
    every = [f"sub-001_task-objects_run-{i:02d}" for i in range(1, RUNS + 1)]
    return [r for i, r in enumerate(every) if (i % FOLDS == fold) == (part == "test")]


def predictions(fold: int, seed: int, skill: float) -> list[Prediction]:
    """Eight events a test run; the right class gets ``skill`` more on average."""
    rng = np.random.default_rng([fold, seed, round(1000 * skill)])
    rows = []
    for run in run_names(fold, "test"):
        for event in range(8):
            logits = rng.normal(size=8)
            logits[event] += skill
            unit = f"{run}#event-{event + 1:02d}"
            rows.append(Prediction(unit, "001", run, float(event), tuple(logits.tolist())))
    return rows


def write_row(
    folder: Path, name: str, kind: str, fold: int, seed: int, skill: float, **more: Any
) -> None:
    """results.json and predictions.tsv."""
    rows = predictions(fold, seed, skill)
    scored = evaluate(rows, TASK.kind)
    values: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "fold": fold,
        "seed": seed,
        "task": TASK,
        "n_test": scored.n,
        "chance": 0.125,
        "metrics": scored.values,
        "seconds": 1.0,
        "split_sha": f"split-{fold}",
    }
    write_result(folder, Result(**(values | more)))
    write_predictions(folder / "predictions.tsv", rows, TaskSpec(TASK.kind, CLASSES))


VARIANTS = {
    "Swin 4D, pretrained": (1.2, "pretrained", "all"),
    "Swin 4D, from scratch": (1.1, "random", "all"),
    "Swin 4D, frozen pretrained": (0.9, "pretrained", "none"),
    "Swin 4D, frozen random": (0.5, "random", "none"),
}
BASELINES = {"PCA whitening + logistic": 2.4, "Voxels + logistic": 1.9, "ROI means + logistic": 1.6}


def build(top: Path, grid: tuple[int, int, int] = (40, 20, 1)) -> Path:
    """The whole tree: one pretraining, four fine-tunings, three baselines, chance, one absent."""
    pre = {"backbone": {"name": "swin4d"}, "objective": {"name": "simmim"}}
    shared = {"data": {"clip_frames": 10, "frame_stride": 1}}
    train = {"steps": 400, "batch_size": 8, "lr": 0.001, "precision": "fp32"}
    recipe = {**pre, **shared, "train": train}
    write_run(top / "pretrain", 400, recipe, run_names(0, "train"), start=1.0, end=0.55)
    np.savez(top / "pretrain" / "reconstruction.npz", **clip_arrays(grid))
    write_analysis(top / "pretrain", dynamics())
    write_memory(top / "memory", memory_rows())
    tune = {"backbone": {"name": "swin4d"}, "head": {"name": "linear"}, **shared, "train": train}
    for number, (name, (skill, init, trains)) in enumerate(VARIANTS.items()):
        for fold in range(FOLDS):
            for seed in range(SEEDS):
                folder = top / "finetune" / f"{number}" / f"fold-{fold}-seed-{seed}"
                seen = run_names(fold, "train")
                write_run(folder, 50, tune, seen, start=2.1, end=1.6 - 0.2 * number)
                write_row(
                    folder,
                    name,
                    "finetune",
                    fold,
                    seed,
                    skill,
                    init=init,
                    train_encoder=trains,
                    parameters=Parameters(6_152 if trains == "none" else 1_240_719, 0),
                )
    for fold in range(FOLDS):
        for name, skill in BASELINES.items():
            folder = top / "baselines" / f"fold-{fold}" / name.split()[0]
            size = Parameters(968, 0)
            note = "label-free features of the clip"
            write_row(folder, name, "baseline", fold, 0, skill, parameters=size, note=note)
        chance = {"accuracy": 0.125, "balanced_accuracy": 0.125, "auroc": 0.5}
        note = "not applicable: clips of 4 frames are too short for correlations (at least 8)"
        for name, n, values, why in (
            ("Chance", 24, chance, None),
            ("Connectivity + logistic", 0, dict.fromkeys(chance), note),
        ):
            result = Result(
                kind="baseline",
                name=name,
                fold=fold,
                seed=0,
                task=TASK,
                n_test=n,
                chance=0.125,
                metrics=values,
                seconds=0.0,
                split_sha=f"split-{fold}",
                note=why,
            )
            write_result(top / "baselines" / f"fold-{fold}" / name.split()[0].lower(), result)
    return top


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete set of run folders (read only)."""
    return build(tmp_path_factory.mktemp("runs"))

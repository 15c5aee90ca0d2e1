"""Made-up run folders of every way to fine-tune, with one target or several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fmrizoo.config import DataConfig
from fmrizoo.evaluate.predictions import Prediction, evaluate, write_predictions
from fmrizoo.evaluate.results import Parameters, Result, TaskInfo, write_result
from fmrizoo.types import TaskSpec

ENCODER = 51_700_000
# Name, head, what trains, trained parameters (of the encoder; of the rest), skill.
HEADS = (
    ("swin4d pretrained, linear probe", "linear", "none", 0, 2_306, 1.0),
    ("swin4d pretrained, last two layers", "linear", "last_block", 14_800_000, 2_306, 1.6),
    ("swin4d pretrained, complex readout", "complex", "none", 0, 1_204_994, 1.4),
    ("swin4d pretrained, LoRA r=8", "lora", "lora", 0, 691_202, 1.7),
    ("swin4d pretrained, prompts", "prompt", "prompts", 0, 43_778, 1.2),
    ("swin4d pretrained, fine-tuned", "linear", "all", ENCODER, 2_306, 1.9),
)
SEX = TaskSpec("classification", ("F", "M"), name="sex")
AGE = TaskSpec("regression", mean=50.0, std=10.0, name="age")
GRADE = TaskSpec("ordinal", ("none", "mild", "severe"), name="grade")
SUBJECTS = 24


def unit_rows(task: TaskSpec, seed: int, skill: float) -> list[Prediction]:
    """Predictions of 24 subjects, better with more ``skill``."""
    rng = np.random.default_rng([seed, round(skill * 100), len(task.name)])
    rows = []
    for s in range(SUBJECTS):
        who = f"{s:03d}"
        if task.kind == "regression":
            target = 30.0 + 40 * s / SUBJECTS
            scores = [target + (20 / (0.3 + skill)) * float(rng.normal())]
        else:
            k = len(task.classes)
            target = float(s % k)
            where = np.arange(k) - target - rng.normal() * 0.8
            logits = -skill * where**2
            scores = (logits - np.log(np.exp(logits).sum())).tolist()
        run = f"sub-{who}_task-rest"
        rows.append(Prediction(f"sub-{who}", who, run, target, tuple(scores), 5))
    return rows


def write_one(folder: Path, task: TaskSpec, rows: list[Prediction], **values: Any) -> None:
    """``results.json`` and ``predictions.tsv`` of one target."""
    scored = evaluate(rows, task.kind)
    shared: dict[str, Any] = {
        "kind": "finetune",
        "fold": 0,
        "task": TaskInfo(task.name, task.kind, task.classes, "subject"),
        "n_test": scored.n,
        "chance": {"classification": 0.5, "regression": -0.05, "ordinal": 0.0}[task.kind],
        "metrics": scored.values,
        "seconds": 1.0,
        "split_sha": "split",
    }
    write_result(folder, Result(**(shared | values)))
    write_predictions(folder / "predictions.tsv", rows, task)


def write_settings(folder: Path, seen: list[str], **recipe: Any) -> None:
    """What a training leaves beside its results."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    clips = DataConfig(clip_frames=20)
    data = {"clip_frames": clips.clip_frames, "frame_stride": clips.frame_stride}
    recipe = {"backbone": {"name": "swin4d"}, "data": data, **recipe}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    contract = {"grid": [96, 96, 96], "space": "MNI152NLin2009cAsym", "tr": 2.0}
    model = {"contract": contract, "seen_runs": seen, "parameters": ENCODER}
    (folder / "model" / "config.json").write_text(json.dumps(model))
    (folder / "env.json").write_text(json.dumps({"python": "3.11.7"}))
    lines = [
        {"step": i, "loss": 2.0 - i / 40, "validation": {"loss": 2.2 - i / 50}} for i in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def every_head(
    top: Path, tasks: tuple[TaskSpec, ...], seeds: int = 3, seen: tuple[str, ...] = ()
) -> Path:
    """One run per head, initialisation and seed; random weights have no skill."""
    for number, (name, head, trains, encoder, rest, skill) in enumerate(HEADS):
        for init in ("pretrained", "random"):
            for seed in range(seeds):
                run = top / f"{number}-{init}" / f"seed-{seed}"
                write_settings(run, list(seen), head={"name": head})
                own = name if init == "pretrained" else name.replace("pretrained", "random")
                size = Parameters(
                    encoder + rest, ENCODER - encoder, 8 * (encoder + rest), ENCODER, encoder
                )
                for task in tasks:
                    folder = run / "targets" / task.name if len(tasks) > 1 else run
                    rows = unit_rows(task, seed, skill if init == "pretrained" else 0.3)
                    write_one(
                        folder,
                        task,
                        rows,
                        name=own,
                        seed=seed,
                        init=init,
                        head=head,
                        train_encoder=trains,
                        parameters=size,
                    )
    for task in tasks:
        for feature, skill in (("Voxels", 0.9), ("Connectivity", 1.5)):
            folder = top / "baselines" / task.name / feature.lower()
            name = f"{feature} + {'logistic' if task.kind == 'classification' else 'ridge'}"
            rows = unit_rows(task, 9, skill)
            note = "correlations between parcels"
            write_one(folder, task, rows, kind="baseline", name=name, seed=0, note=note)
    return top

"""Does storing one byte per voxel cost accuracy? The demo's models on int8, int16 and fp16 input.

    python benchmarks/number_formats.py [--seeds 5] [--jobs 2] [--folder DIR]

The sample's one-slice runs are prepared three times and nothing else differs: split, order of
clips, starts, masks and rates are the same. Per seed and fold: a pretraining, frozen features of
it with a linear head, the same fine-tuned, and a training from scratch. Differences are paired by
seed (mean over the folds, so every unit is tested once), with the 95 % interval of Student's t
over seeds. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from scipy.stats import t as student

FORMATS = {
    "int8": ["prepare.codec=int8"],
    "int16": ["prepare.codec=int8", "prepare.max_error=0.002"],  # int8 is too coarse for this
    "fp16": ["prepare.codec=gzip"],
}
STORED = {"int8": "int8", "int16": "int16", "fp16": "float16"}
MODELS = {
    "frozen, linear head": ["init_from={pretrained}", "train.cache_features=true"],
    "fine-tuned": ["init_from={pretrained}", "head.train_encoder=all", "train.lr=1e-3"],
    "from scratch": ["head.train_encoder=all", "train.lr=1e-3"],
}
METRICS = ("accuracy", "auroc")
FOLDS = 3


@dataclass(frozen=True)
class Job:
    """All trainings of one seed on one fold of one store."""

    folder: Path
    kind: str
    seed: int
    fold: int


def prepare_stores(folder: Path) -> None:
    """One store per number format, checked to hold what its name says."""
    from fmrizoo.data.prepare import prepare
    from fmrizoo.data.store import Store
    from fmrizoo.zoo import load_recipe

    for kind, overrides in FORMATS.items():
        chosen = ["prepare.select={acquisition: 1slice}", *overrides]
        recipe = load_recipe("pretrain/haxby_slice", chosen)
        prepare("sample:haxby2001", folder / kind, recipe.prepare)
        store = Store(folder / kind)
        kinds = {store.open(run).kind for run in store.runs}
        if kinds != {STORED[kind]}:
            raise SystemExit(f"{folder / kind} holds {kinds}, not {STORED[kind]}")


def run(job: Job) -> list[tuple[str, str, int, int, dict[str, float]]]:
    """(model, format, seed, fold, metrics) of one job."""
    from fmrizoo.pipeline import finetune, pretrain
    from fmrizoo.zoo import load_recipe

    logging.getLogger("fmrizoo").setLevel(logging.ERROR)
    common = [
        f"data.store={job.folder / job.kind}",
        f"split.fold={job.fold}",
        f"train.seed={job.seed}",
    ]
    place = job.folder / "runs" / job.kind / f"seed-{job.seed}" / f"fold-{job.fold}"
    begun = pretrain(load_recipe("pretrain/haxby_slice", common), place / "pretrained")
    loss = (begun.validation or {})["loss"]
    found = [("pretraining", job.kind, job.seed, job.fold, {"loss": loss})]
    for name, overrides in MODELS.items():
        given = [one.format(pretrained=place / "pretrained") for one in overrides]
        result = finetune(
            load_recipe("finetune/haxby_slice", [*common, *given]), place / name.split(",")[0]
        )
        assert result is not None
        values = {m: float(result.metrics[m] or 0.5) for m in METRICS}
        found.append((name, job.kind, job.seed, job.fold, values))
    return found


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Mean and the ends of the 95 % interval of Student's t."""
    mean, n = statistics.mean(differences), len(differences)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(differences) / sqrt(n)
    return mean, mean - half, mean + half


def show(rows: list[tuple[str, str, int, int, dict[str, float]]]) -> None:
    table: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for model, kind, seed, _, values in rows:
        for metric, value in values.items():
            table.setdefault((model, metric, kind), {}).setdefault(seed, []).append(value)
    seeds = {
        key: [statistics.mean(v) for _, v in sorted(own.items())] for key, own in table.items()
    }
    print("| model | metric | int8 | int16 | fp16 | int16 − int8 [95 %] | fp16 − int8 [95 %] |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model, metric in dict.fromkeys(key[:2] for key in seeds):
        own = {kind: seeds[model, metric, kind] for kind in FORMATS}
        cells = [f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in own.values()]
        for other in ("int16", "fp16"):
            gaps = [a - b for a, b in zip(own[other], own["int8"], strict=True)]
            mean, low, high = interval(gaps)
            clear = "" if low <= 0 <= high else " *"
            cells.append(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]{clear}")
        print(f"| {model} | {metric} | {' | '.join(cells)} |")
    n = len(next(iter(seeds.values())))
    print(f"\n{n} seeds × {FOLDS} folds; ± is the s.d. over seeds; * the interval leaves out 0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds must be ≥ 2: an interval needs repetitions")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = given.folder or Path(tempfile.mkdtemp())
    prepare_stores(folder)
    jobs = [
        Job(folder, kind, seed, fold)
        for seed in range(given.seeds)
        for fold in range(FOLDS)
        for kind in FORMATS
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=context) as pool:
        show([row for rows in pool.map(run, jobs) for row in rows])


if __name__ == "__main__":
    main()

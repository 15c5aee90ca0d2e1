"""The table of an ablation, from result files made by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fmrizoo.evaluate.predictions import Prediction, evaluate, write_predictions
from fmrizoo.evaluate.results import Result, TaskInfo, write_result
from fmrizoo.evaluate.statistics import corrected_t
from fmrizoo.files import write_json
from fmrizoo.pipeline.ablation.cells import cells_of
from fmrizoo.pipeline.ablation.chains import BASELINES, COST, DIVERGED, Tuning
from fmrizoo.pipeline.ablation.compared import compare
from fmrizoo.pipeline.ablation.results import CSV, JSON, collect, write_tables
from fmrizoo.pipeline.ablation.run import Found, Planned, chains_of
from fmrizoo.report.ablation import clear_sentences, write_ablation
from fmrizoo.types import TaskSpec

UNITS, SEEDS = 60, 2
SEX = TaskSpec("classification", ("F", "M"), name="sex")
AGE = TaskSpec("regression", (), name="age")
RECIPE = [
    "ablate.axes.MR=[0.2,0.9]",
    "ablate.tasks.sex={recipe: finetune/linear, subsets: [clinic]}",
    "ablate.tasks.age={recipe: finetune/linear, metric: mae, "
    "overrides: [task.target=age, task.kind=regression]}",
    f"ablate.seeds={SEEDS}",
    "data.store=S",
]


@cache
def planned(*more: str) -> Planned:
    recipe, cells = cells_of("pretrain/swin4d_simmim", [*RECIPE, *more])
    return Planned(recipe, cells, chains_of(recipe, cells))


def write(out: Path, tuning: Tuning, skill: float, *, name: str = "", folder: str = "") -> None:
    """Predictions that are right in a share ``skill`` of all units, or off by 10 · (1 − skill)."""
    spec = SEX if tuning.task == "sex" else AGE
    fold, seed = tuning.recipe.split.fold, tuning.recipe.train.seed
    draw = tuning.recipe.split.seed
    rng = np.random.default_rng([seed, fold, int(1000 * skill), draw])
    rows = []
    for k in range(UNITS // 5):
        unit = f"sub-{fold}{k:02d}"
        if spec is SEX:
            target, right = float(k % 2), rng.random() < skill
            side = 1.0 if (target == 1) == right else -1.0
            rows.append(Prediction(unit, unit, unit, target, (-side, side)))
        else:
            target = 20.0 + 5 * k
            error = 10 * (1 - skill) * rng.normal()
            rows.append(Prediction(unit, unit, unit, target, (target + error,)))
    scored = evaluate(rows, spec.kind)
    result = Result(
        kind="baseline" if name else "finetune",
        name=name or tuning.cell,
        fold=fold,
        seed=seed,
        task=TaskInfo(spec.name, spec.kind, spec.classes, "subject"),
        n_test=scored.n,
        chance=0.5,
        metrics=scored.values,
        seconds=3.0,
        split_sha=f"sha{fold}-{draw}",
    )
    place = out / tuning.folder / folder
    place.mkdir(parents=True)
    write_predictions(place / "predictions.tsv", rows, spec)
    write_result(place, result)


def note(path: Path, values: dict[str, object]) -> None:
    path.parent.mkdir(parents=True)
    write_json(path, values)


def filled(out: Path, skill: Callable[[Tuning], float | None], *more: str) -> Found:
    """An ablation in which every fine-tuning has the skill that ``skill`` says; None: diverged."""
    plan = planned(*more)
    for chain in plan.chains:
        if chain.pretraining is not None:
            note(out / chain.name / COST, {"seconds": 7.0, "steps": 1})
        for tuning in chain.tunings:
            if tuning.cell == BASELINES:
                write(out, tuning, 0.6, name="Voxels + logistic", folder="voxels")
            elif (own := skill(tuning)) is not None:
                write(out, tuning, own)
            else:
                note(out / tuning.folder / DIVERGED, {"why": "NaN"})
    table = collect(plan.recipe, plan.cells, plan.chains, out)
    return Found(table, compare(table))


def better_at_09(tuning: Tuning) -> float:
    return {"reference": 0.6, "MR 0.2": 0.62, "MR 0.9": 0.97}.get(tuning.cell, 0.5)


def test_the_better_cell_ranks_first_and_is_called_better(tmp_path: Path) -> None:
    found = filled(tmp_path, better_at_09)
    assert list(found.table.subsets) == ["all", "clinic"]
    best = next(line for line in found.table.lines if line.name == "MR 0.9")
    assert best.standing["all"].rank == best.standing["clinic"].rank == 1
    sums = [line.standing["all"].total for line in found.table.of("cell")]
    assert sum(total or 0 for total in sums) == pytest.approx(0, abs=1e-9)
    said = {(c.first, c.second, c.column.name): c.better for c in found.pairs}
    # Errors are lower where it is better, accuracies higher.
    assert said["MR 0.9", "reference", "sex"] == said["MR 0.9", "reference", "age"] == "yes"
    assert said["MR 0.2", "reference", "sex"] == "not clear"
    assert said["MR 0.9", "swin4d from scratch", "sex"] == "yes"
    assert not any(c.second == "MR 0.9" or "Voxels" in c.second for c in found.pairs)
    lines = clear_sentences(found.pairs)
    assert any(line.startswith("sex: MR 0.9 is better than reference by 0.") for line in lines)


def test_numbers_are_those_of_the_result_files(tmp_path: Path) -> None:
    found = filled(tmp_path, better_at_09)
    sex = found.table.columns[0]
    line = found.table.lines[0]
    row = line.rows[sex.name]
    values = [r.metrics["accuracy"] or 0.0 for r in row.results]
    assert len(values) == SEEDS * 5 and row.n_units == UNITS
    assert line.score(sex) == pytest.approx(float(np.mean(values)))
    assert line.cost and line.cost.pretraining == 7.0 and line.cost.finetuning == 3.0
    (baseline,) = found.table.of("baseline")
    assert baseline.name == "Voxels + logistic" and baseline.standing == {}


def test_a_cell_with_gaps_says_so_and_is_not_ranked(tmp_path: Path) -> None:
    def skill(tuning: Tuning) -> float | None:
        if tuning.cell == "MR 0.9" and tuning.task == "age":
            return None
        return better_at_09(tuning)

    found = filled(tmp_path, skill)
    best = next(line for line in found.table.lines if line.name == "MR 0.9")
    assert best.gaps == {"age": "0 of 10 results; 10 diverged"}
    assert best.standing["all"].rank is None and best.standing["all"].missing == ("age",)
    assert best.standing["clinic"].rank == 1
    assert {line.standing["all"].rank for line in found.table.of("cell")} == {None, 1, 2}


def test_repeated_folds_are_compared_by_the_corrected_t_test(tmp_path: Path) -> None:
    once = filled(tmp_path / "once", better_at_09)
    assert {pair.resampled for pair in once.pairs} == {None}
    twice = filled(tmp_path / "twice", better_at_09, "ablate.repeats=2")
    p = {(c.first, c.second, c.column.name): c.resampled for c in twice.pairs}
    better, same = p["MR 0.9", "reference", "sex"], p["MR 0.2", "reference", "sex"]
    assert better is not None and same is not None and better < 0.01 < 0.05 < same
    column = twice.table.columns[0]
    lines = {line.name: line.rows[column.name] for line in twice.table.lines}
    assert lines["reference"].n_units == UNITS
    gaps = []
    for fold, sha in sorted({(r.fold, r.split_sha) for r in lines["reference"].results}):
        own = [
            [r.metrics["accuracy"] or 0.0 for r in lines[name].results if r.split_sha == sha]
            for name in ("MR 0.9", "reference")
        ]
        assert fold in range(5) and len(own[0]) == SEEDS
        gaps.append(float(np.mean(own[0]) - np.mean(own[1])))
    assert len(gaps) == 10
    assert better == corrected_t(gaps, UNITS * 4 / 5, UNITS / 5).p


def test_files_hold_the_table(tmp_path: Path) -> None:
    found = filled(tmp_path, better_at_09)
    write_tables(found.table, [one.as_row() for one in found.pairs], tmp_path)
    with (tmp_path / CSV).open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [line.name for line in found.table.lines]
    assert float(rows[0]["sex accuracy mean"]) == found.table.lines[0].score(found.table.columns[0])
    body = json.loads((tmp_path / JSON).read_text(encoding="utf-8"))
    assert len(body["pairs"]) == len(found.pairs) and body["schema"] == "fmrizoo.ablation/1"
    write_ablation(found, planned(), tmp_path / "a.html", "table")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "MR 0.9 ranks first of 3" in page and "Voxels + logistic" in page
    assert 'src="http' not in page and "mask ratio" in page

"""Rows of every way to fine-tune, and runs with several targets."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
from report_heads import AGE, GRADE, HEADS, SEX, every_head

from fmrizoo.report.collect import collect
from fmrizoo.report.figures import Curve, losses
from fmrizoo.report.html import write_report
from fmrizoo.report.words import task_reports, trained_words

SEEN = ("sub-000_task-rest", "sub-900_task-rest")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_head(tmp_path_factory.mktemp("one"), (SEX,))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_head(tmp_path_factory.mktemp("three"), (SEX, AGE, GRADE), 1, SEEN)


@pytest.mark.parametrize(
    ("head", "trains", "words"),
    [
        ("linear", "none", "linear probe"),
        ("linear", "last_block", "last two layers"),
        ("linear", "all", "all weights"),
        ("complex", "none", "complex readout, frozen"),
        ("lora", "lora", "LoRA"),
        ("prompt", "prompts", "prompts"),
        (None, "none", "encoder frozen"),
        (None, "all", "all weights"),
        ("mine", "none", "mine head, encoder frozen"),
        ("mine", "half", "mine head, half"),
    ],
)
def test_words_of_what_trained(head: str | None, trains: str, words: str) -> None:
    assert trained_words(head, trains) == words


def test_each_head_is_paired_with_itself_only(one: Path) -> None:
    (found,) = task_reports(collect([one]))
    pairs = found.verdict.pairs[1:]
    # The fewest trained parameters first.
    assert [p.question.split(": ")[1] for p in pairs] == [
        "linear probe",
        "prompts",
        "LoRA",
        "complex readout, frozen",
        "last two layers",
        "all weights",
    ]
    for pair in pairs:
        assert (pair.first.init, pair.second.init) == ("pretrained", "random")
        assert pair.first.head == pair.second.head
        assert pair.first.train_encoder == pair.second.train_encoder
        assert pair.gap is not None and pair.gap.n_units == 24


def test_two_backbones_are_not_mixed(one: Path, tmp_path: Path) -> None:
    shutil.copytree(one / "0-pretrained", tmp_path / "a")
    shutil.copytree(one / "0-random", tmp_path / "b")
    for init in ("pretrained", "random"):
        shutil.copytree(one / f"0-{init}", tmp_path / f"other-{init}")
        for path in (tmp_path / f"other-{init}").rglob("results.json"):
            path.write_text(path.read_text().replace("swin4d", "neuromamba"))
        for path in (tmp_path / f"other-{init}").rglob("recipe.yaml"):
            path.write_text(path.read_text().replace("swin4d", "neuromamba"))
    shutil.copytree(one / "baselines", tmp_path / "baselines")
    (found,) = task_reports(collect([tmp_path]))
    assert [p.question.split(": ")[1] for p in found.verdict.pairs[1:]] == [
        "linear probe, neuromamba",
        "linear probe, swin4d",
    ]


def test_the_table_says_what_trained(one: Path, tmp_path: Path) -> None:
    write_report([one], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    text = " ".join(re.sub("<[^>]+>", " ", html).split())
    for name, head, trains, *_ in HEADS:
        assert name in text
        words = trained_words(head, trains)
        if words not in name:  # else the name says it already
            assert f"{name} {words}" in text
            assert f"{name.replace('pretrained', 'random')} random start, {words}" in text
    assert html.count("28.6 % of encoder") == 2  # the last two layers, from either start
    assert all(size in text for size in ("2.3 k", "14.8 M", "1.2 M", "691.2 k", "51.7 M"))
    assert "quadratic kappa" not in html.lower()


def test_targets_take_settings_from_the_run_above(three: Path) -> None:
    evidence = collect([three])
    assert evidence.problems == ()
    rows = [r for r in evidence.runs if r.owner]
    assert len(rows) == 2 * len(HEADS) * 3
    for run in rows:
        assert run.owner == run.folder.parents[1]
        assert run.recipe["backbone"] == {"name": "swin4d"}
        assert run.environment == {"python": "3.11.7"} and run.contract["tr"] == 2.0
        assert run.curve == () and not run.pretraining
    # The curve stays with the run above, under the name of its results.
    above = next(r for r in evidence.runs if r.folder == rows[0].owner)
    assert above.curve and above.result is None
    assert rows[0].result is not None and evidence.name(above) == rows[0].result.name


def test_a_target_alone_knows_its_run(three: Path) -> None:
    (run,) = collect([three / "3-pretrained" / "seed-0" / "targets" / "age"]).runs
    assert run.model["seen_runs"] == list(SEEN)


def test_leaks_are_seen_in_every_target(three: Path) -> None:
    found = {t.task.target: t for t in task_reports(collect([three]))}
    assert list(found) == ["age", "grade", "sex"]
    for report in found.values():
        leaks = [w for w in report.warnings if "unseen recordings" in w]
        assert len(leaks) == 2 * len(HEADS)
        assert "(1 runs, such as sub-000_task-rest" in leaks[0]
        (once,) = [w for w in report.warnings if "one seed only" in w]
        assert once.startswith("12 models: ")


def test_levels_are_ranked_by_kappa_and_compared_in_levels(three: Path, tmp_path: Path) -> None:
    summary = write_report([three], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert len(summary.lines) == 5 and summary.problems[0].startswith("No pretraining run")
    assert "Result: grade" in html and "3 levels: none, mild, severe" in html
    assert "mean absolute error (in levels)" in html
    assert "agreement on ordered levels" in html
    (grade,) = [t for t in task_reports(collect([three])) if t.task.target == "grade"]
    kappas = [r.primary.mean for r in grade.models if r.primary]
    assert kappas == sorted(kappas, reverse=True)
    assert grade.chance == 0.0
    pair = next(p for p in grade.verdict.pairs if "all weights" in p.question)
    assert pair.gap is not None and pair.gap.mean < 0  # a smaller error is better
    assert pair.gap.high < 0  # clear by itself, but not among so many pairs
    assert pair.answer == "not clear: p is above 0.05 for so many pairs"
    # One run folder per head and start, whatever the number of targets.
    assert "Preprocessing behind 12 run folders" in html
    assert re.search(r"subjects tested</th><td>24<", html)


def test_what_only_heads_follow_is_said(one: Path, tmp_path: Path) -> None:
    top = shutil.copytree(one, tmp_path / "runs")
    path = top / "0-pretrained" / "seed-0" / "recipe.yaml"
    task = {"class_weights": "balanced", "label_smoothing": 0.1}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task": task}))
    write_report([top], tmp_path / "r.html")
    said = "The heads were trained with class weights and label smoothing; the baselines were not"
    assert said in (tmp_path / "r.html").read_text()
    write_report([one], tmp_path / "r.html")
    assert "The heads were trained with" not in (tmp_path / "r.html").read_text()


def test_curves_keep_apart_when_the_colours_run_out() -> None:
    curves = [Curve(f"row {i}", (([1.0, 2.0], [1.0, 0.5]),)) for i in range(14)]
    drawing = base64.b64decode(losses(curves, "loss", "alt").uri.split(",")[1]).decode()
    lines = re.findall(r'<path d="[^"]+" clip-path="[^"]+" style="([^"]+)"', drawing)
    strong = [s for s in lines if "stroke-width: 1.8" in s]
    assert len(strong) == len(set(strong)) == 14

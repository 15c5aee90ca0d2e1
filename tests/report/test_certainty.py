"""Intervals, p and Holm's correction on the page and in the terminal, and the radar of tasks."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_heads import AGE, GRADE, SEX, every_head
from rich.console import Console

from fmrizoo import screens
from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.certainty import certainty, key, read_tables
from fmrizoo.evaluate.results import find_results
from fmrizoo.evaluate.statistics import holm, interval, permutation_p, unified_error
from fmrizoo.evaluate.summary import rows
from fmrizoo.report.collect import collect
from fmrizoo.report.html import write_report
from fmrizoo.report.radar import radar
from fmrizoo.report.words import p_word, task_reports


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_head(tmp_path_factory.mktemp("three"), (SEX, AGE, GRADE), 2)


def test_rows_carry_their_interval_and_p(three: Path) -> None:
    for report in task_reports(collect([three])):
        metric = metrics.PRIMARY[report.task.kind]
        assert set(report.sure) == {(r.kind, r.name) for r in report.rows}
        for row in report.rows:
            sure = report.sure[row.kind, row.name]
            assert row.primary is not None
            assert sure.interval.value == pytest.approx(row.primary.mean)
            assert (sure.interval.n_units, sure.interval.group) == (24, "subject")
        best = report.models[0]
        found = find_results([three])
        tables = read_tables(found)[key(best)]
        assert report.sure[best.kind, best.name].interval == interval(
            tables, report.task.kind, metric
        )
        assert report.sure[best.kind, best.name].p == permutation_p(
            tables, report.task.kind, metric
        )


def test_pairs_are_one_family(three: Path) -> None:
    for report in task_reports(collect([three])):
        pairs = report.verdict.pairs
        assert len(pairs) > 3
        plain = [pair.gap.p for pair in pairs if pair.gap]
        assert [pair.p_holm for pair in pairs] == holm(plain)


def test_the_page_shows_them(three: Path, tmp_path: Path) -> None:
    write_report([three], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    for title in ("p vs chance", "p&nbsp;(Holm)", "All tasks on one scale"):
        assert title in html
    report = task_reports(collect([three]))[0]
    sure = report.sure[report.models[0].kind, report.models[0].name]
    low, high = (f"{v:.3f}".replace("-", "−") for v in (sure.interval.low, sure.interval.high))
    assert f'<span class="note">{low} to {high}</span>' in html
    assert "a bootstrap that draws whole subjects (24)" in html
    assert "Both speak about other people like these" in html
    assert (p_word(0.0004), p_word(0.0123), p_word(None)) == ("< 0.001", "0.012", "–")


def test_the_radar_has_the_best_rows_and_needs_three_tasks(three: Path) -> None:
    evidence = collect([three])
    tasks = task_reports(evidence)
    image = radar(tasks, evidence)
    assert image is not None
    found = re.findall(r"(pretrained|from scratch|best baseline): (.*?)(?:;|$)", image.alt)
    assert [name for name, _ in found] == ["pretrained", "from scratch", "best baseline"]
    task = next(t for t in tasks if t.task.target == "sex")
    tables = read_tables(find_results([three]))[key(task.baselines[0])]
    wanted = unified_error(
        "classification", [p.target for p in tables[0]], [p.scores for p in tables[0]]
    )
    assert f"sex {wanted:.2f}" in dict(found)["best baseline"]
    assert radar(tasks[:2], evidence) is None


def test_the_terminal_shows_them(three: Path) -> None:
    found = find_results([three])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(screens.results([r for _, r in found], read_tables(found)))
    text = console.export_text()
    (best,) = [r for r in rows(r for _, r in found) if r.task.target == "sex"][:1]
    sure = certainty(best, read_tables(found)[key(best)])
    assert sure is not None and sure.interval.low is not None and sure.interval.high is not None
    assert f"{sure.interval.low:.2f}…{sure.interval.high:.2f}" in text
    assert certainty(best, []) is None


def test_predictions_of_another_result_are_refused(three: Path) -> None:
    path, result = next((p, r) for p, r in find_results([three]) if r.task.target == "sex")
    with pytest.raises(DataError, match=r"predictions\.tsv is not of .*results\.json"):
        read_tables([(path, replace(result, n_test=3))])

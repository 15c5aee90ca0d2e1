"""The page holds every row, loads nothing, escapes what it shows, and names what is missing."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from fmrizoo.errors import DataError
from fmrizoo.evaluate.predictions import read_predictions, write_predictions
from fmrizoo.evaluate.results import read_result, write_result
from fmrizoo.evaluate.summary import summarize
from fmrizoo.report.collect import collect
from fmrizoo.report.html import write_report
from fmrizoo.report.reconstruction import fill_errors, read_picture
from fmrizoo.report.words import number, task_reports
from fmrizoo.types import TaskSpec


class Page(HTMLParser):
    """Text, loaded addresses and image alternatives of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.loads += [
            v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")
        ]
        self.alts += [v or "" for k, v in attrs if k == "alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


@pytest.fixture(scope="module")
def report(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, tuple[str, ...]]:
    out = tmp_path_factory.mktemp("out") / "report.html"
    summary = write_report([tree], out, "Haxby <decoding>", citations=["Haxby et al. 2001"])
    assert summary.path == out
    assert summary.problems == ()
    return out.read_text(encoding="utf-8"), summary.lines


def plain(html: str) -> str:
    return " ".join(" ".join(Page(html).text).split())


def test_every_row_is_on_the_page(report: tuple[str, tuple[str, ...]], tree: Path) -> None:
    text = plain(report[0])
    rows = [r for t in task_reports(collect([tree])) for r in t.rows]
    assert len(rows) == 9
    for row in rows:
        assert row.name in text
        for value in row.spreads.values():
            assert value is None or number(value.mean) in text
    assert "not applicable: clips of 4 frames" in text
    assert "Haxby et al. 2001" in text
    assert "2.14.1" in text
    assert "40 × 20 × 1" in text


def test_nothing_is_loaded_from_elsewhere(report: tuple[str, tuple[str, ...]]) -> None:
    html = report[0]
    page = Page(html)
    assert page.loads
    assert all(address.startswith("data:") for address in page.loads)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in html
    assert "url(" not in html
    for encoded in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html):
        drawing = base64.b64decode(encoded).decode()
        assert not re.search(r"(href|src)=\"(?!#|data:)", drawing)
    assert page.open == []
    assert all(page.alts)


def test_names_are_escaped(tree: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tree / "baselines" / "fold-0" / "Voxels", tmp_path / "a" / "x")
    result = read_result(folder)
    bad = "<script>alert('x')</script> & co"
    values = json.loads((folder / "results.json").read_text()) | {"name": bad, "note": "<b>n</b>"}
    (folder / "results.json").write_text(json.dumps(values))
    assert result.name != bad
    write_report([tmp_path / "a"], tmp_path / "r.html", "<i>title</i>", citations=["<img src=x>"])
    html = (tmp_path / "r.html").read_text()
    assert "<script" not in html
    assert "<img src=x>" not in html
    assert "<i>title</i>" not in html
    assert bad in plain(html)


def test_a_winning_baseline_is_the_headline(report: tuple[str, tuple[str, ...]]) -> None:
    html, lines = report
    assert "A baseline wins: PCA whitening + logistic is ahead of Swin 4D, pretrained" in html
    assert len(lines) == 3
    assert "A baseline wins" in lines[0]
    assert "chance 0.125" in lines[1]
    assert "no, it is worse" in html


def test_a_winning_model_is_the_headline(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "finetune", tmp_path / "finetune")
    shutil.copytree(tree / "baselines", tmp_path / "baselines")
    for path in list((tmp_path / "baselines").rglob("results.json")):
        if path.parent.name in ("PCA", "Voxels", "ROI"):
            shutil.rmtree(path.parent)
    for fold in range(3):  # the weakest model, which mixes events up, becomes the only baseline
        source = tree / "finetune" / "3" / f"fold-{fold}-seed-0"
        folder = shutil.copytree(source, tmp_path / "baselines" / f"weak-{fold}")
        values = json.loads((folder / "results.json").read_text())
        values |= {"kind": "baseline", "name": "Weak", "init": None, "train_encoder": None}
        (folder / "results.json").write_text(json.dumps(values))
        rows, classes = read_predictions(folder / "predictions.tsv")
        mixed = [replace(p, scores=rows[i - 1].scores) for i, p in enumerate(rows)]
        write_predictions(folder / "predictions.tsv", mixed, TaskSpec("classification", classes))
    (verdict,) = [t.verdict for t in task_reports(collect([tmp_path]))]
    assert verdict.headline.startswith("A model wins: Swin 4D, pretrained is ahead of Weak")
    assert verdict.pairs[0].answer == "yes"


def test_an_unclear_lead_is_called_so(tree: Path, tmp_path: Path) -> None:
    for fold in range(3):
        for name, kind in (("0", "finetune"), ("1", "baseline")):
            source = tree / "finetune" / name / f"fold-{fold}-seed-0"
            folder = shutil.copytree(source, tmp_path / kind / f"{fold}")
            values = json.loads((folder / "results.json").read_text()) | {"kind": kind}
            (folder / "results.json").write_text(json.dumps(values))
    (found,) = task_reports(collect([tmp_path]))
    gap = found.verdict.pairs[0].gap
    assert gap is not None
    assert gap.low < 0 < gap.high
    assert found.verdict.headline.startswith("No clear winner")
    assert any("one seed only" in w for w in found.warnings)


def test_pretraining_is_compared_with_random_weights(tree: Path) -> None:
    (found,) = task_reports(collect([tree]))
    assert [p.question for p in found.verdict.pairs] == [
        "the best model against the best baseline",
        "pretrained against random weights: encoder frozen",
        "pretrained against random weights: all weights",
    ]
    gap = found.verdict.pairs[1].gap
    first, second = (
        r.primary for r in (found.verdict.pairs[1].first, found.verdict.pairs[1].second)
    )
    assert gap is not None
    assert first is not None
    assert second is not None
    assert gap.mean == pytest.approx(first.mean - second.mean)


def test_the_best_of_each_column_is_bold(report: tuple[str, tuple[str, ...]]) -> None:
    bold = re.findall(r'<b class="best">([^<]+)</b>', report[0])
    table, picture = bold[:3], bold[3:]
    assert [b.endswith("†") for b in table] == [True] * 3  # the baseline's, over folds
    assert len(picture) == 1


def test_weights_that_saw_test_runs_are_reported(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "finetune" / "0", tmp_path / "0")
    for path in tmp_path.rglob("config.json"):
        model = json.loads(path.read_text())
        model["seen_runs"].append("sub-001_task-objects_run-01")
        path.write_text(json.dumps(model))
    (found,) = task_reports(collect([tmp_path]))
    (warning,) = [w for w in found.warnings if "unseen recordings" in w]
    # Run 01 is in the test part of one fold of three, for three seeds.
    assert "3 of 9 results" in warning
    (clean,) = task_reports(collect([tree]))
    assert not any("unseen recordings" in w for w in clean.warnings)


def test_other_splits_and_missing_folds_are_reported(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "baselines", tmp_path / "baselines")
    shutil.rmtree(tmp_path / "baselines" / "fold-2")
    shutil.copytree(tree / "finetune" / "0", tmp_path / "0")
    shutil.rmtree(tmp_path / "0" / "fold-1-seed-2")
    (found,) = task_reports(collect([tmp_path]))
    assert any("same splits" in w for w in found.warnings)
    assert any("not every seed covers every fold" in w for w in found.warnings)


def test_what_is_missing_or_broken_is_said(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(tree / "pretrain", tmp_path / "runs" / "pre")
    (run / "reconstruction.npz").write_bytes(b"not an archive")
    (run / "env.json").unlink()
    (run / "model" / "config.json").write_text("[1]")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 401, "lo')
    summary = write_report([tmp_path / "runs"], tmp_path / "r.html")
    text = plain((tmp_path / "r.html").read_text())
    for said in (
        "pre/reconstruction.npz was left out",
        "the last line is torn",
        "pre/model/config.json was left out",
        "no results table",
        "No env.json",
        "preprocessing contract",
        "no picture",
    ):
        assert any(said in p for p in summary.problems), said
        assert said in text
    assert str(tmp_path) not in text  # paths of the machine stay out of a page that is passed on
    assert "reconstruction.npz was left out" in caplog.text
    assert len(summary.lines) == 3


def test_results_without_curves_or_partner_make_a_page(tree: Path, tmp_path: Path) -> None:
    write_report([tree / "baselines"], tmp_path / "r.html")
    text = plain((tmp_path / "r.html").read_text())
    assert "Only half a comparison: there is no fine-tuned model" in text
    assert "Fine-tuned models: none found" in text
    assert "No pretraining run was found" in text


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to report"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(DataError, match="is not a folder"):
        write_report([tmp_path / "absent"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_same_result_twice_is_an_error(tree: Path, tmp_path: Path) -> None:
    source = tree / "finetune" / "0" / "fold-0-seed-0"
    for name in "ab":
        write_result(tmp_path / name, read_result(source))
    with pytest.raises(DataError, match="two results"):
        task_reports(collect([tmp_path]))


def test_pages_are_equal_for_equal_inputs(tree: Path, tmp_path: Path) -> None:
    for name in "ab":
        write_report([tree / "pretrain"], tmp_path / name)
    one, two = ((tmp_path / name).read_text().split("</header>") for name in "ab")
    assert one[1] == two[1]  # the header holds the date


def test_the_callers_matplotlib_settings_are_left_alone(tree: Path, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    write_report([tree / "baselines"], tmp_path / "r.html")
    assert dict(matplotlib.rcParams) == before


def test_table_numbers_are_the_summaries(tree: Path) -> None:
    (found,) = task_reports(collect([tree]))
    row = found.models[0]
    assert summarize(row.results) == row
    assert (row.n_seeds, row.n_folds, row.n_units) == (3, 3, 72)
    assert np.isclose(found.chance or 0, 0.125)


def test_fill_errors_of_a_picture(tree: Path) -> None:
    picture = read_picture(tree / "pretrain" / "reconstruction.npz")
    errors = fill_errors(picture)
    hidden = picture.hidden
    expected = np.abs(picture.predicted - picture.truth)[hidden].mean()
    assert errors["the model"] == pytest.approx(expected)
    assert set(errors) == {
        "the model",
        "interpolation in time",
        "each voxel's own mean",
        "mean of what was shown",
    }

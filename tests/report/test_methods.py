"""The methods section says what was recorded and cites what was used, and no more."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from fmrizoo.report.citations import WORKS
from fmrizoo.report.collect import collect
from fmrizoo.report.html import write_report
from fmrizoo.report.methods import WriteUp, write_up
from fmrizoo.report.tables import results_csv
from fmrizoo.report.words import task_reports


def written(*folders: Path) -> WriteUp:
    evidence = collect(folders)
    return write_up(evidence, task_reports(evidence))


def keys(found: WriteUp) -> set[str]:
    return {reference.key for reference in found.references}


def test_what_was_used_is_cited(tree: Path) -> None:
    found = written(tree)
    assert keys(found) == {
        *("kim2023swift", "liu2021swin", "xie2022simmim", "loshchilov2019adamw"),
        *("paszke2019pytorch", "pedregosa2011sklearn", "haxby2001"),
        *("holm1979", "phipson2010permutation"),
    }
    text = found.text
    for said in (
        "kept in their own voxels (RAS axes, 40 × 20 × 1 voxels of 3.1 × 3.75 × 3.75 mm",
        "repetition time 2.5 s",
        "(Kim et al., 2023; Liu et al., 2021); 1\u202f234\u202f567 parameters",
        "AdamW (Loshchilov & Hutter, 2019) with linear warm-up",
        "400 steps, 8 clips a step, peak learning rate 0.001, precision fp32.",
        "scikit-learn (Pedregosa et al., 2011)",
        "fmrizoo 0.1.0, PyTorch 2.14.1 (Paszke et al., 2019) under Python 3.11.7",
        "bootstrap over 9 whole runs",
        "https://doi.org/10.1126/science.1063736",
    ):
        assert said in text, said
    # Every work that the text names is listed, and the other way round.
    body = text.split("References\n")[0]
    for reference in found.references:
        assert reference.short in body and reference.text in text
    assert "None" not in text and "?" not in body and "weight decay" not in body


def test_other_models_cite_other_works(tree: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tree / "pretrain", tmp_path / "runs" / "pre")
    recipe = {
        "backbone": {"name": "neuromamba"},
        "objective": {"name": "autoregressive"},
        "parametrization": {"name": "mup"},
        "train": {"steps": 10, "batch_size": 2, "lr": 0.1, "precision": "bf16", "seed": 3},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    model = json.loads((run / "model" / "config.json").read_text())
    model["contract"]["space"] = "MNI152NLin2009cAsym"
    (run / "model" / "config.json").write_text(json.dumps(model))
    found = written(tmp_path / "runs")
    assert keys(found) == {
        *("dao2024mamba2", "yang2021mup", "loshchilov2019adamw", "paszke2019pytorch"),
        "abraham2014nilearn",  # the runs were resampled
    }
    assert "in MNI152NLin2009cAsym space" in found.text and "precision bf16" in found.text
    (run / "env.json").unlink()
    assert "paszke2019pytorch" not in keys(written(tmp_path / "runs"))


def test_what_was_not_recorded_is_not_claimed(tree: Path) -> None:
    found = written(tree / "baselines")
    headings = [name for name, _ in found.parts]
    assert "Training" not in headings and "Models" not in headings
    assert keys(found) == {"haxby2001", "pedregosa2011sklearn"}


@pytest.mark.parametrize("key", WORKS)
def test_bibliographic_facts_are_well_formed(key: str) -> None:
    work = WORKS[key]
    assert re.fullmatch(r"[a-z]+\d{4}[a-z0-9]*", key) and str(work.year) in key
    assert key.startswith(re.split(r"[,-]", work.authors[0])[0].lower())
    assert all(re.fullmatch(r"[\w\- ]+, [\w.\- ]+\.", author) for author in work.authors)
    assert not work.doi or re.fullmatch(r"10\.\d{4,5}/\S+", work.doi)
    assert not work.arxiv or re.fullmatch(r"\d{4}\.\d{5}", work.arxiv)
    entry = work.bibtex
    assert not re.search(r"(?<!\\)&", entry)
    assert entry.count("{") == entry.count("}") and " and ".join(work.authors) in entry


def test_the_page_has_all_of_it_to_paste(tree: Path, tmp_path: Path) -> None:
    write_report([tree], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    evidence = collect([tree])
    tasks = task_reports(evidence)
    blocks = re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.S)
    text, bibtex, table = (html.unescape(block) for block in blocks)
    found = write_up(evidence, tasks)
    assert text == found.text and bibtex == found.bibtex
    assert table.strip() == results_csv(tasks).strip()
    assert "<button" not in page and "<script" not in page


def test_csv_holds_the_numbers_of_the_table(tree: Path) -> None:
    tasks = task_reports(collect([tree]))
    lines = list(csv.DictReader(io.StringIO(results_csv(tasks))))
    rows = {row.name: row for row in tasks[0].rows}
    assert {line["row"] for line in lines} == set(rows)
    for line in lines:
        spread = rows[line["row"]].spreads[line["metric"]]
        if spread is None:
            assert line["mean"] == ""
            continue
        assert float(line["mean"]) == spread.mean
        assert line["std"] == ("" if spread.std is None else str(spread.std))
        assert int(line["seeds"]) == rows[line["row"]].n_seeds

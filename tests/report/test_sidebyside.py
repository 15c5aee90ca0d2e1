"""Pretraining side by side: a row per recipe, folds merged, equal conditions, nothing left out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clip_arrays, run_names, write_run
from test_report import Page, plain

from fmrizoo.report.collect import collect
from fmrizoo.report.families import comparable, families
from fmrizoo.report.html import write_report
from fmrizoo.report.multiples import slices
from fmrizoo.report.sidebyside import beat_of, held_out, side_by_side

BACKBONES = ("swin4d", "swin_factorized", "neuromamba")
OBJECTIVES = {"simmim": "znorm_minback", "autoregressive": "voxel"}
GRID = (6, 10, 4)


def pretrained(folder: Path, backbone: str, objective: str, end: float, **more: Any) -> None:
    """One run with its picture; an autoregressive one measures persistence and forecasts."""
    recipe = {
        "backbone": {"name": backbone},
        "objective": {"name": objective},
        "data": {"normalization": OBJECTIVES.get(objective, "voxel"), "select": {"task": "rest"}},
        "split": {"by": "run", "fold": 0},
        "train": {"steps": 20, "batch_size": 4, "lr": 0.001, "precision": "fp32", "seed": 0},
    } | more
    write_run(folder, 20, recipe, run_names(0, "train"), start=1.5, end=end)
    arrays = clip_arrays(GRID, frames=6)
    if objective == "autoregressive":
        lines = [json.loads(v) for v in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if "validation" in line:
                line["validation"] = {"loss": end, "persistence": 2.0}
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        unit = "token" if backbone == "neuromamba" else "time"
        arrays |= {"masked": np.ones_like(arrays["masked"])}
        arrays |= {"step": np.array(1), "unit": np.array(unit)}
        context = arrays["truth"][..., :3]
        np.savez(
            folder / "forecast.npz",
            context=context,
            truth=arrays["truth"][..., 3:],
            predicted=arrays["predicted"][..., 3:],
            mask=arrays["mask"],
            voxel_size=arrays["voxel_size"],
            tr=arrays["tr"],
            run=np.array("sub-001_run-9"),
        )
    np.savez(folder / "reconstruction.npz", **arrays)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs, and one recipe on three folds."""
    top = tmp_path_factory.mktemp("six")
    for i, backbone in enumerate(BACKBONES):
        for objective in OBJECTIVES:
            pretrained(top / "pairs" / f"{backbone}_{objective}", backbone, objective, 0.5 + i / 10)
    for fold in range(3):
        data = {"normalization": "voxel", "select": {"task": "slice"}}
        split = {"by": "run", "fold": fold}
        folder = top / "slice" / f"fold-{fold}"
        pretrained(folder, "swin4d", "simmim", 0.4, data=data, split=split)
    return top


@pytest.fixture(scope="module")
def page(six: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "r.html"
    write_report([six], out)
    return out.read_text(encoding="utf-8")


def test_six_pairs_and_folds_make_seven_rows_in_three_groups(six: Path) -> None:
    found = side_by_side(families(collect([six]).pretrainings))
    assert found is not None
    assert [name for name, _ in found.groups] == [
        "SimMIM (task rest; znorm_minback normalisation)",
        "SimMIM (task slice; voxel normalisation)",
        "Next step (task rest; voxel normalisation)",
    ]
    rows = [[r.backbone for r in rows] for _, rows in found.groups]
    assert [sorted(r) for r in rows] == [sorted(BACKBONES), ["swin4d"], sorted(BACKBONES)]
    best = [[r.backbone for r in rows if r.best] for _, rows in found.groups]
    assert best[1:] == [[], ["swin4d"]]  # a row alone is the best of nothing
    steps = {r.backbone: (r.loss, r.beat, r.ratio) for r in found.groups[2][1]}
    assert steps["swin4d"] == ("0.500", "2.000", "0.25")
    assert steps["neuromamba"] == ("0.700", "2.000", "0.35")
    assert "swin4d (0.500) has the lowest held-out loss, before swin_factorized" in found.words[1]
    assert "neuromamba predicts patch after patch" in found.words[2]
    assert "short runs (20 steps) on one subject: they rank nothing" in found.words[-1]


def test_what_a_masked_model_has_to_beat_is_of_the_pictured_clip(six: Path) -> None:
    (family,) = [f for f in families(collect([six]).pretrainings) if f.label == "slice"]
    beat = beat_of(family)
    assert beat is not None and beat.clip and beat.ratio is not None
    picture = family.first.picture
    assert picture is not None
    error = np.abs(picture.predicted - picture.truth)[picture.hidden].mean()
    assert beat.own == pytest.approx(error)
    assert beat.ratio == pytest.approx(error / beat.rival)


def test_folds_are_one_row_with_their_mean(six: Path, page: str) -> None:
    runs = collect([six]).pretrainings
    (family,) = [f for f in families(runs) if f.label == "slice"]
    assert family.parts == ("fold-0", "fold-1", "fold-2")
    mean = np.mean([v for r in family.runs if (v := held_out(r)) is not None])
    text = plain(page)
    assert f"{mean:.3f}" in text
    assert "mean of 3 of 3: fold-0, fold-1, fold-2" in text
    assert "2 other runs of this recipe (fold-1, fold-2) are not shown here." in text
    assert text.count("Pretraining slice (3 times: fold-0, fold-1, fold-2)") == 1
    assert "slice/fold-1" not in text.split("Methods")[1].split("Versions")[0]


def test_other_recipes_under_fold_names_are_not_merged(six: Path, tmp_path: Path) -> None:
    for fold, backbone in enumerate(BACKBONES):
        shutil.copytree(six / "pairs" / f"{backbone}_simmim", tmp_path / "x" / f"fold-{fold}")
    assert len(families(collect([tmp_path]).pretrainings)) == 3
    split = {"by": "run", "fold": 1}
    pretrained(tmp_path / "x" / "other", "swin4d", "simmim", 0.5, split=split)
    groups = comparable(families(collect([tmp_path]).pretrainings))
    assert [len(g) for g in groups] == [3, 1]  # held-out runs differ: not compared


PASTED = ["<b>Methods and references as text</b>", "<b>References as BibTeX</b>"]


def test_details_are_closed_and_every_run_is_on_the_page(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    # Ten runs, and the text and BibTeX to paste, of which the text is open.
    assert parsed.tags.count("details") == 7 + 3 + 2
    assert re.findall(r"<details open><summary>(.*?)</summary>", page) == [PASTED[0]]
    summaries = re.findall(r"<summary>(.*?)</summary>", page)
    assert summaries[-2:] == PASTED
    summaries = summaries[:-2]
    assert all("On this clip" in s for s in summaries)
    for backbone in BACKBONES:
        for objective in OBJECTIVES:
            assert any(f"{backbone}_{objective}" in s for s in summaries)
    assert page.index("Pretraining side by side") < page.index("<details>")
    assert "<h3>Pretraining</h3>" not in page  # its curves are in the section's panels
    assert any("Pretraining loss by step" in a for a in parsed.alts)
    assert any("swin4d" in a and "seconds ahead" in a for a in parsed.alts)


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert all(address.startswith("data:") for address in Page(page).loads)
    assert "url(" not in page and "<script" not in page


def test_gaps_are_named_and_names_escaped(six: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(six / "pairs" / "swin4d_simmim", tmp_path / "r" / "bare")
    (bare / "reconstruction.npz").unlink()
    (bare / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    pretrained(tmp_path / "r" / "odd", "<b>net</b>", "simmim", 0.5)
    pretrained(tmp_path / "r" / "new", "swin4d", "<i>aim</i>", 0.5)
    write_report([tmp_path / "r"], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    text = plain(html)
    assert "<b>net</b>" not in html and "<i>aim</i>" not in html
    assert "<b>net</b>" in text and "<i>aim</i> (task rest; voxel normalisation)" in text
    assert "No validation loss: bare." in text
    assert "No reconstruction.npz, so no picture: bare." in text


def test_one_recipe_has_nothing_beside_it(six: Path, tmp_path: Path) -> None:
    write_report([six / "slice"], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "Pretraining side by side" not in html
    assert "<h3>Pretraining</h3>" in html
    assert (
        re.findall(r"<summary>(.*?)</summary>", html) == PASTED
        and "What the pretrained model fills in" in html
    )


def test_pictures_of_an_objective_share_their_colours_and_fit_the_page(six: Path) -> None:
    drawn = slices(comparable(families(collect([six]).pretrainings)))
    assert drawn is not None
    assert drawn.image.width <= 932
    assert drawn.caption.count("error ±") == 3  # one scale for each group
    for backbone in BACKBONES:
        assert f"{backbone}_simmim" in drawn.image.alt

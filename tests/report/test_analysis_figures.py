"""Dynamics and memory on the page: every run and every line, and what is missing is said."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from report_measured import dynamics, memory_rows

from fmrizoo.analysis.dynamics import write_analysis
from fmrizoo.analysis.memory import write_memory
from fmrizoo.errors import DataError
from fmrizoo.report import analysis
from fmrizoo.report.collect import collect
from fmrizoo.report.figures import Image
from fmrizoo.report.html import write_report

HEADING = "Do embeddings keep the data's dynamics?"


def drawing(image: Image) -> str:
    kind, encoded = image.uri.split(";base64,")
    assert kind == "data:image/svg+xml"
    return base64.b64decode(encoded).decode()


@pytest.fixture
def runs(tree: Path, tmp_path: Path) -> Path:
    """Pretraining runs of four kinds of result, and nothing else."""
    found = {
        "one": dynamics(),
        "two": dynamics("swin_factorized", 10, share=0.0),
        "three": dynamics("neuromamba", None, share=0.001, slots=120),
        "four": replace(dynamics(slots=6), artefacts=()),
    }
    for name, values in found.items():
        shutil.copytree(tree / "pretrain", tmp_path / "runs" / name)
        write_analysis(tmp_path / "runs" / name, values)
    return tmp_path / "runs"


def test_every_run_has_its_panel_and_its_number(runs: Path) -> None:
    image = analysis.dynamics(collect([runs]))
    assert image is not None
    for said in (
        "one: peaks at multiples of the window, 4 slots = 10 s: +0.100 "
        "(95 % interval +0.080 to +0.120)",
        "two: no peaks at multiples of the window, 10 slots = 25 s: +0.000",
        "three: no temporal window (period 4: no peaks, +0.001",
        "four: clips of 6 slots are too short to see a window of 4",
    ):
        assert said in image.alt
    content = drawing(image)
    # Letters are drawn as outlines; the text stays in comments beside them.
    for said in (
        "peaks at the window: +0.100 [+0.080, +0.120]",
        "no peaks: +0.000 [−0.020, +0.020]",
        "no window; at 4 slots +0.001",
        "clips of 6 slots: too short to tell",
        "embeddings, swin_factorized",
        "lag (s)",
    ):
        assert f"<!-- {said}" in content, said
    assert "#009e73" in content and "#0072b2" in content and "#d55e00" in content


def test_an_unknown_backbone_gets_a_color_of_its_own(runs: Path) -> None:
    write_analysis(runs / "two", dynamics("other", None, share=0.0))
    image = analysis.dynamics(collect([runs]))
    assert image is not None and "#cc79a7" in drawing(image)


def test_memory_has_a_line_with_its_slope_for_every_way(tmp_path: Path) -> None:
    write_memory(tmp_path / "somewhere", memory_rows())
    (figure,) = analysis.memory(collect([tmp_path]))
    for said in (
        "swin4d 50M, all kept: 31 MB a frame",
        "swin4d 50M, window-chunk: 6 MB a frame",
        "neuromamba 50M, all kept: 12.5 MB a frame",
        "neuromamba 50M, window-chunk: 4.5 MB a frame",
    ):
        assert said in figure.image.alt and f"<!-- {said}" in drawing(figure.image)
    assert figure.conditions == ("one clip of 96×96×96 voxels, with its objective, bf16 on cpu")
    content = drawing(figure.image)
    assert all(f"<!-- {n} -->" in content for n in (20, 40, 80, "2,000"))


def test_labels_of_lines_that_end_together_do_not_touch(tmp_path: Path) -> None:
    rows = [replace(r, mb=100.0 + r.frames) for r in memory_rows()]
    write_memory(tmp_path, rows)
    (figure,) = analysis.memory(collect([tmp_path]))
    labels = re.findall(
        r"<!-- \w+ 50M, [^>]* MB a frame -->\s*<g [^>]*translate\(\S+ (\S+)\)",
        drawing(figure.image),
    )
    heights = sorted(float(y) for y in labels)
    assert len(heights) == 4
    assert all(b - a > 12 for a, b in pairwise(heights))


def test_unequal_conditions_do_not_share_axes_and_recipes_are_told_apart(tmp_path: Path) -> None:
    rows = [r for r in memory_rows() if r.backbone == "swin4d"]
    larger = [replace(r, recipe="pretrain/sizes/swin4d_806M") for r in rows]
    write_memory(tmp_path / "a", [*rows, *larger])
    write_memory(tmp_path / "b", [replace(r, device="cuda", objective="") for r in rows])
    first, second = analysis.memory(collect([tmp_path]))
    assert "swin4d_806M 50M, all kept" in first.image.alt and "swin4d_simmim" in first.image.alt
    assert second.conditions.endswith("of the encoder alone, bf16 on cuda")


def test_a_single_length_has_no_slope(tmp_path: Path) -> None:
    write_memory(tmp_path, memory_rows(frames=(20,)))
    (figure,) = analysis.memory(collect([tmp_path]))
    assert "swin4d 50M, all kept: 637 MB" in figure.image.alt


def test_what_was_not_measured_is_said(tree: Path, runs: Path, tmp_path: Path) -> None:
    (runs / "two" / "analysis.json").unlink()
    (runs / "three" / "analysis.json").write_text("{}")
    rows = memory_rows()
    rows[0] = replace(rows[0], mb=None, note="stopped by signal 9")
    write_memory(runs, rows)
    summary = write_report([runs], tmp_path / "r.html")
    said = "\n".join(summary.problems)
    assert "three/analysis.json was left out: analysis.json is not an analysis" in said
    assert "2 of 4 pretraining runs hold no analysis.json: three, two" in said
    assert "Memory of pretrain/swin4d_simmim, none, 20 frames was not measured: stopped" in said
    assert HEADING in (tmp_path / "r.html").read_text()
    for name in ("one", "four"):
        (runs / name / "analysis.json").unlink()
    (runs / "memory.json").unlink()
    summary = write_report([runs], tmp_path / "r.html")
    said = "\n".join(summary.problems)
    assert "No run holds an analysis.json" in said and "No memory.json was found" in said
    html = (tmp_path / "r.html").read_text()
    assert HEADING not in html and "Memory against the length" not in html


def test_memory_alone_is_a_report_and_a_damaged_file_alone_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    write_memory(folder, memory_rows())
    write_report([folder], tmp_path / "r.html")
    assert "Memory against the length of the clip" in (tmp_path / "r.html").read_text()
    (folder / "memory.json").write_text(json.dumps({"schema": "other"}))
    summary = write_report([folder], tmp_path / "r.html")
    assert any("memory/memory.json was left out" in line for line in summary.problems)
    (folder / "memory.json").unlink()
    with pytest.raises(DataError, match=r"no memory\.json under .*: nothing to report"):
        write_report([folder], tmp_path / "r.html")

"""Quality measures against planted faults and plain formulas; flags, table and page."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmrizoo.config import PrepareConfig, QcConfig
from fmrizoo.data import qc
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import RunInfo, Store, read_index, write_index
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.report.qc import write_page


def signal(frames: int = 200, voxels: int = 500, sd: float = 10.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (1000 + sd * rng.standard_normal((frames, voxels))).astype(np.float32)


def test_measures_of_white_noise_are_the_textbook_ones() -> None:
    got = qc.signal_measures(signal(sd=20))
    assert got["tsnr"] == pytest.approx(50, rel=0.02)  # 1000 / 20
    assert got["dvars"] == pytest.approx(100 * 2**0.5 * 20 / 1000, rel=0.02)
    assert got["dvars"] <= got["dvars_max"] < 1.2 * got["dvars"]
    assert got["spikes"] == 0 and got["dropout"] == 0
    bold = signal(20, 7).astype(np.float64)
    tsnr = np.median(bold.mean(0) / bold.std(0))
    assert qc.signal_measures(bold.astype(np.float32))["tsnr"] == pytest.approx(tsnr, rel=1e-5)


@pytest.mark.parametrize("slope", [0.0, 0.5])  # a drift is no leap
def test_planted_leaps_and_dark_voxels_are_counted(slope: float) -> None:
    bold = signal() + slope * np.arange(200, dtype=np.float32)[:, None]
    bold[[20, 21, 150]] += 100
    bold[:, :50] *= 0.1
    got = qc.signal_measures(bold)
    assert got["spikes"] == 3 / 200 and got["dropout"] == 0.1
    assert got["dvars_max"] > 5 * got["dvars"] or got["dvars_max"] > 5


def test_measures_that_do_not_apply_are_none() -> None:
    for bold in (signal() - 1000, np.full((5, 4), 3.0, np.float32)):
        got = qc.signal_measures(bold)
        assert [got[k] for k in ("tsnr", "dvars", "dropout")] == [None] * 3
        assert got["spikes"] == 0


def test_displacement_after_power() -> None:
    shifts = np.array([[0, 0, 0], [1, -2, 0], [1, -2, 0.5]], float)
    turns = np.array([[0, 0, 0], [0.01, 0, 0], [0.01, -0.02, 0]], float)
    got = qc.power_displacement(shifts, turns)
    assert np.isnan(got[0]) and np.allclose(got[1:], [1 + 2 + 50 * 0.01, 0.5 + 50 * 0.02])


def test_every_limit_flags_beyond_it_and_not_on_it() -> None:
    measures: dict[str, Any] = dict.fromkeys((limit.measure for limit in qc.LIMITS), 0.5)
    for limit in qc.LIMITS:
        off = dict.fromkeys((other.setting for other in qc.LIMITS), 0.0)
        assert qc.flags(measures, QcConfig(**off)) == []
        assert qc.flags(measures, QcConfig(**{**off, limit.setting: 0.5})) == []
        beyond = 0.6 if limit.below else 0.4
        (said,) = qc.flags(measures, QcConfig(**{**off, limit.setting: beyond}))
        assert limit.words in said and f"prepare.qc.{limit.setting}" in said
        unknown = {**measures, limit.measure: None}
        assert qc.flags(unknown, QcConfig(**{**off, limit.setting: beyond})) == []
    with pytest.raises(RecipeError, match=r"data\.qc: min_tsnr must be a number ≥ 0, got -1"):
        QcConfig(min_tsnr=-1)


def noisy(sd: float, seed: int) -> np.ndarray:
    return signal(30, 5 * 6 * 4, sd, seed).T.reshape(5, 6, 4, 30)


@pytest.fixture
def three(tree: Any, tmp_path: Path) -> Path:
    """Three subjects, the second with much noise."""
    for subject, sd in (("01", 10), ("02", 200), ("03", 20)):
        tree.add(subject, data=noisy(sd, int(subject)))
    return Path(tree.root)


def test_a_bad_run_is_flagged_and_kept(
    three: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = PrepareConfig(space="native")
    with caplog.at_level(logging.WARNING):
        report = prepare(three, tmp_path / "s", config)
    assert list(report.flagged) == ["sub-02_task-rest_run-1"]
    assert re.search(r"1 of 3 runs are flagged(.|\n)*sub-02.*tSNR 5\.\d+ is below 20", caplog.text)
    store = Store(tmp_path / "s")
    assert len(store.runs) == 3 and store.verify() == []
    # Other limits renew nothing and judge anew.
    loose = PrepareConfig(space="native", qc=QcConfig(min_tsnr=70))
    again = prepare(three, tmp_path / "s", loose)
    assert len(again.kept) == 3 and len(again.flagged) == 2
    assert store.runs[0].qc["inside"] == 1 and store.runs[0].qc["source_axes"] == "RAS"


def test_the_table_is_sorted_worst_first(three: Path, tmp_path: Path) -> None:
    prepare(three, tmp_path / "s", PrepareConfig(space="native"))
    rows = qc.write_table(Store(tmp_path / "s"), tmp_path / "out/qc.tsv", QcConfig())
    assert [row.run.subject for row in rows] == ["02", "03", "01"]
    with open(tmp_path / "out/qc.tsv", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert [line["subject"] for line in table] == ["02", "03", "01"]
    assert "is below 20" in table[0]["flags"] and table[1]["flags"] == "n/a"
    assert float(table[2]["tsnr"]) == pytest.approx(100, rel=0.1)
    assert {line["fd_mean"] for line in table} == {"n/a"} and table[0]["frames"] == "30"


def test_stores_without_measures_are_measured_from_their_values(
    three: Path, tmp_path: Path
) -> None:
    prepare(three, tmp_path / "s", PrepareConfig(space="native"))
    first = {row.run.name: row for row in qc.assess(Store(tmp_path / "s"), QcConfig())}
    entries = [{k: v for k, v in e.items() if k != "qc"} for e in read_index(tmp_path / "s")]
    write_index(tmp_path / "s", entries, "0")  # as an older version wrote it
    rows = qc.assess(Store(tmp_path / "s"), QcConfig())
    for row in rows:
        assert row.from_store and not first[row.run.name].from_store
        for key in ("tsnr", "dvars", "dropout"):
            assert row.measures[key] == pytest.approx(first[row.run.name].measures[key], rel=0.01)
        assert row.measures["inside"] is None
    assert [row.run.subject for row in rows] == ["02", "03", "01"]
    assert RunInfo.from_entry(entries[0]).qc == {}


def test_motion_of_fmriprep(tree: Any, tmp_path: Path) -> None:
    path = tree.add(data=noisy(10, 0))
    table = path.with_name("sub-01_task-rest_run-1_desc-confounds_timeseries.tsv")
    rows = ["n/a", "9", *["0.2"] * 27, "0.8"]
    table.write_text("framewise_displacement\n" + "\n".join(rows) + "\n")
    prepare(tree.root, tmp_path / "s", PrepareConfig(space="native", dummy_scans=2))
    got = Store(tmp_path / "s").runs[0].qc
    assert got["fd_max"] == 0.8 and got["fd_mean"] == pytest.approx((27 * 0.2 + 0.8) / 28)
    table.write_text("framewise_displacement\n" + "\n".join(rows[:-1]) + "\n")
    with pytest.raises(DataError, match="has 29 rows for the 30 volumes"):
        prepare(tree.root, tmp_path / "t", PrepareConfig(space="native"))
    table.write_text("framewise_displacement\n" + "x\n" * 30)
    with pytest.raises(DataError, match="something else than numbers"):
        prepare(tree.root, tmp_path / "t", PrepareConfig(space="native"))


def test_cover_of_the_template() -> None:
    config = PrepareConfig(grid=[48, 48, 48], voxel_size=[4.0, 4.0, 4.0])
    everything = np.ones((48, 48, 48), bool)
    assert qc.template_cover(everything, config) == 1
    upper = everything.copy()
    upper[:, :, :20] = False
    share = qc.template_cover(upper, config)
    assert share is not None and 0.3 < share < 0.9
    assert qc.template_cover(everything, PrepareConfig(space="native")) is None


def test_the_page_shows_every_run(three: Path, tmp_path: Path, made: Callable[..., Store]) -> None:
    store = made(three)
    rows = qc.assess(store, QcConfig())
    write_page(store, rows, tmp_path / "qc.html", QcConfig(), pictures=2)
    page = (tmp_path / "qc.html").read_text()
    names = re.findall(r"<h3>(.*?)</h3>", page)
    assert names == [row.run.name for row in rows]
    assert page.count("data:image/png") == 6  # three slices of two runs
    assert "The last run is shown without slices" in page
    assert "1 of 3 runs is flagged" in page and page.count('class="run bad"') == 1
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing from elsewhere


def test_slices_are_turned_to_the_viewer(tree: Any, made: Callable[..., Store]) -> None:
    """A bright block at the right, front and top lies there in the picture of a LPI store too."""
    import base64
    import io

    from PIL import Image

    from fmrizoo.report.qc import _slices

    data = noisy(5, 0)
    data[2:, 2:, 1:] *= 3
    tree.add(data=data, mask=np.ones((5, 6, 4), np.uint8))
    for name, orientation in (("a", "RAS"), ("b", "LPI"), ("c", "ASL")):
        store = made(tree.root, name, orientation=orientation)
        axial, coronal, sagittal = _slices(store, qc.assess(store, QcConfig())[0])
        for part, ends in ((axial, "LR"), (coronal, "LR"), (sagittal, "PA")):
            content = base64.b64decode(part.uri.split(",")[1])
            shades = np.asarray(Image.open(io.BytesIO(content))).astype(float)
            half, wide = shades.shape[0] // 2, shades.shape[1] // 2
            # Brightest in the upper right corner: up is front or top, right is right or front.
            assert shades[:half, -wide:].mean() > shades[-half:, :wide].mean() + 20
            assert part.left + part.right == ends


def test_the_command(three: Path, tmp_path: Path, made: Callable[..., Store]) -> None:
    from typer.testing import CliRunner

    from fmrizoo.cli import app

    made(three)
    given = ["qc", str(tmp_path / "store"), "--out", str(tmp_path / "q"), "prepare.qc.min_tsnr=70"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "2 of 3 runs flagged" in done.output and "is below 70" in done.output
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == ["qc.html", "qc.tsv"]
    missing = CliRunner().invoke(app, ["qc", str(tmp_path / "none"), "--out", str(tmp_path / "r")])
    assert isinstance(missing.exception, DataError) and "is not a store" in str(missing.exception)

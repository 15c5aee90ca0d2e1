"""prepare: what it writes, what it refuses (one clear sentence each), and what is left behind."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fmrizoo.config import PrepareConfig
from fmrizoo.data.confounds import regress
from fmrizoo.data.prepare import ProgressEvent, prepare
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError

ODD = Path(__file__).parent / "odd"


def native(**settings: Any) -> PrepareConfig:
    return PrepareConfig(**{"space": "native", **settings})


def save(tree: Any, data: np.ndarray, **changes: Any) -> Path:
    """A run whose header departs from good in the given way."""
    affine = changes.pop("affine", np.diag([3.0, 3.0, 3.0, 1.0]))
    img = nib.Nifti1Image(data, affine)
    img.header.set_xyzt_units("mm", changes.pop("unit", "sec"))
    if data.ndim >= 4:
        tr = changes.pop("tr", 2.0)
        img.header.set_zooms((*img.header.get_zooms()[:3], tr, *[1.0] * (data.ndim - 4)))
    code = changes.pop("code", 1)
    img.set_sform(affine, code)
    img.set_qform(affine, code)
    return tree.add(img=img, **changes)


def bold(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(500, 900, shape or (5, 6, 4, 12)).astype(np.float32)


# --- what it writes -------------------------------------------------------------------------------


def test_progress_and_report(tmp_path: Path) -> None:
    seen: list[ProgressEvent] = []
    config = native(select={"acquisition": "25mm"})
    report = prepare("sample:haxby2001", tmp_path / "s", config, on_progress=seen.append)
    assert len(report.prepared) == 9 and not report.kept and not report.skipped
    assert [e.done for e in seen] == list(range(1, 10))
    assert {e.total for e in seen} == {9} and {e.state for e in seen} == {"prepared"}
    assert sorted(os.listdir(tmp_path / "s")) == ["index.json", "participants.tsv", "sub-001.h5"]
    assert (tmp_path / "s/sub-001.h5").stat().st_mode & 0o777 == 0o444


def test_the_same_again_keeps_everything(tmp_path: Path) -> None:
    config = native(select={"acquisition": "25mm"})
    prepare("sample:haxby2001", tmp_path / "s", config)
    before = (tmp_path / "s/sub-001.h5").stat()
    index = (tmp_path / "s/index.json").read_bytes()
    report = prepare("sample:haxby2001", tmp_path / "s", config)
    assert len(report.kept) == 9 and not report.prepared
    assert (tmp_path / "s/sub-001.h5").stat().st_ino == before.st_ino
    assert (tmp_path / "s/index.json").read_bytes() == index


def test_runs_are_added_without_redoing_the_others(tmp_path: Path) -> None:
    out = tmp_path / "s"
    prepare("sample:haxby2001", out, native(select={"acquisition": "25mm"}))
    old = {r.name: (r.uuid, Store(out).open(r).read(0, 121)) for r in Store(out).runs}
    report = prepare("sample:haxby2001", out, native(select={"acquisition": "1slice"}))
    assert len(report.prepared) == 9 and not report.kept
    store = Store(out)
    assert len(store.runs) == 18 and store.verify() == []
    for name, (uid, values) in old.items():
        assert store[name].uuid == uid
        assert np.array_equal(store.open(name).read(0, 121), values)


def test_a_changed_source_is_prepared_again(tree: Any, tmp_path: Path) -> None:
    tree.add(run="1")
    tree.add(run="2")
    prepare(tree.root, tmp_path / "s", native())
    tree.add(run="2", data=bold())
    report = prepare(tree.root, tmp_path / "s", native())
    assert [report.kept, report.prepared] == [
        ["sub-01_task-rest_run-1"],
        ["sub-01_task-rest_run-2"],
    ]
    store = Store(tmp_path / "s")
    assert store.verify() == []
    assert np.allclose(store.open(store.runs[1]).read(0, 12)[2, 2, 2], bold()[2, 2, 2], atol=2)


def test_a_damaged_run_is_prepared_again(
    tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree.add()
    prepare(tree.root, tmp_path / "s", native())
    store = Store(tmp_path / "s")
    file = tmp_path / "s/sub-01.h5"
    file.chmod(0o644)
    with open(file, "r+b") as handle:
        handle.seek(store.open(store.runs[0])._offset)
        handle.write(b"\x77\x11")
    assert len(store.verify()) == 1
    report = prepare(tree.root, tmp_path / "s", native())
    assert report.prepared and "prepared again" in caplog.text
    assert Store(tmp_path / "s").verify() == []


def test_settings_do_not_mix_in_one_store(tree: Any, tmp_path: Path) -> None:
    tree.add("01")
    prepare(tree.root, tmp_path / "s", native())
    shutil.rmtree(tree.root / "sub-01")
    tree.add("02")
    with pytest.raises(DataError, match=r"other settings \(orientation\).*another folder"):
        prepare(tree.root, tmp_path / "s", native(orientation="LAS"))
    assert len(prepare(tree.root, tmp_path / "s", native()).prepared) == 1
    assert {r.subject for r in Store(tmp_path / "s").runs} == {"01", "02"}
    tree.add("01")
    report = prepare(tree.root, tmp_path / "s", native(orientation="LAS"))  # renews all of it
    assert len(report.prepared) == 2
    assert Store(tmp_path / "s").contract.orientation == "LAS"


def test_a_standard_grid_from_a_table(tree: Any, tmp_path: Path) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [-10, -12, -8]
    data = bold(10, 12, 8, 6)
    path = save(tree, data, affine=affine, mask=np.ones((10, 12, 8), np.uint8))
    masks = list((tree.root / "derivatives").rglob("*.nii.gz"))
    (tmp_path / "t.tsv").write_text(f"path\tsubject\tmask\n{path}\t7\t{masks[0]}\n")
    config = PrepareConfig(
        space="MNI", grid=[8, 8, 8], voxel_size=[2, 2, 2], center=[-1, -1, -1], orientation="LAS"
    )
    prepare(tmp_path / "t.tsv", tmp_path / "s", config)
    store = Store(tmp_path / "s")
    assert store.contract.space == "MNI" and store.contract.grid == (8, 8, 8)
    reader = store.open("sub-7")
    got = reader.read(0, 6)
    # Stored voxel i has x = +6 − 2i; source voxel j has x = −10 + 2j: j = 8 − i, and so on.
    assert np.allclose(got[1, 0, 0], data[7, 2, 0], atol=2)
    assert np.allclose(got[6, 5, 4], data[2, 7, 4], atol=2)


def test_brain_outside_the_grid_is_said(
    tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tree.add(mask=np.ones((5, 6, 4), np.uint8))
    masks = list((tree.root / "derivatives").rglob("*.nii.gz"))
    (tmp_path / "t.tsv").write_text(f"path\tsubject\tmask\n{path}\t7\t{masks[0]}\n")
    small = {"space": "MNI", "grid": [4, 4, 4], "voxel_size": [3, 3, 3]}
    prepare(tmp_path / "t.tsv", tmp_path / "s", PrepareConfig(**small, center=[4.5, 4.5, 4.5]))
    assert "46.7 % of the brain lies outside" in caplog.text
    with pytest.raises(DataError, match="no brain voxel lies in the stored grid"):
        prepare(tmp_path / "t.tsv", tmp_path / "u", PrepareConfig(**small, center=[900, 0, 0]))


def test_computed_mask(tmp_path: Path) -> None:
    """Nilearn's EPI mask on a bright ball in a dark box."""
    rng = np.random.default_rng(0)
    at = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), -1)
    ball = ((at - 12) ** 2).sum(-1) < 64
    data = np.where(ball[..., None], 1000, 20) + rng.normal(0, 5, (24, 24, 24, 6))
    img = nib.Nifti1Image(data.astype(np.float32), np.diag([3.0, 3.0, 3.0, 1.0]))
    img.set_sform(img.affine, 1)
    img.header.set_zooms((3, 3, 3, 2))
    nib.save(img, tmp_path / "b.nii")
    (tmp_path / "t.tsv").write_text("path\tsubject\nb.nii\t1\n")
    prepare(tmp_path / "t.tsv", tmp_path / "s", native(mask="compute"))
    mask = Store(tmp_path / "s").open("sub-1").mask
    assert (mask & ball).sum() > 0.95 * ball.sum() and (mask & ~ball).sum() < 0.2 * ball.sum()


def test_confounds_are_regressed_out(tmp_path: Path) -> None:
    """A fMRIPrep-like run that is motion plus noise: the motion goes, the mean stays."""
    rng = np.random.default_rng(0)
    t = 60
    func = tmp_path / "sub-1" / "func"
    func.mkdir(parents=True)
    stem = "sub-1_task-rest"
    motion = rng.standard_normal((t, 6)).cumsum(0)
    axes = [f"{k}_{a}" for k in ("trans", "rot") for a in "xyz"]
    columns = {a: motion[:, i] for i, a in enumerate(axes)}
    for a in axes:
        columns[f"{a}_derivative1"] = np.r_[np.nan, np.diff(columns[a])]
        columns[f"{a}_power2"] = columns[a] ** 2
        columns[f"{a}_derivative1_power2"] = columns[f"{a}_derivative1"] ** 2
    for tissue in ("csf", "white_matter"):
        columns[tissue] = rng.standard_normal(t)
    columns["cosine00"] = np.cos(np.linspace(0, np.pi, t))
    import pandas

    table = pandas.DataFrame(columns)
    table.to_csv(
        func / f"{stem}_desc-confounds_timeseries.tsv", sep="\t", na_rep="n/a", index=False
    )
    (func / f"{stem}_desc-confounds_timeseries.json").write_text("{}")
    noise = rng.standard_normal((4, 4, 4, t))
    data = 1000 + 20 * motion[:, 0] + noise
    img = nib.Nifti1Image(data.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))
    img.set_sform(img.affine, 1)
    img.header.set_zooms((2, 2, 2, 2))
    space = "space-MNI152NLin2009cAsym"
    nib.save(img, func / f"{stem}_{space}_desc-preproc_bold.nii.gz")
    ones = nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), img.affine)
    ones.set_sform(img.affine, 1)
    nib.save(ones, func / f"{stem}_{space}_desc-brain_mask.nii.gz")
    config = PrepareConfig(grid=[4, 4, 4], center=[3, 3, 3], confounds="simple")
    prepare(tmp_path, tmp_path / "s", config)
    got = Store(tmp_path / "s").open(stem).read(0, t)
    assert np.abs(np.corrcoef(got.reshape(64, t), motion[:, 0])[-1, :-1]).max() < 0.05
    assert np.allclose(got.mean(3), data.mean(3), atol=0.05)
    assert got.std(3).mean() < 1.1
    with pytest.raises(DataError, match="Did you mean 'simple'"):
        prepare(tmp_path, tmp_path / "u", PrepareConfig(confounds="simpel"))


def test_regression_against_least_squares() -> None:
    rng = np.random.default_rng(0)
    confounds = np.c_[rng.standard_normal((50, 3)).cumsum(0), np.full(50, 2.0)]
    values = (300 + confounds[:, :3] @ rng.standard_normal((3, 20))).astype(np.float32)
    noise = rng.standard_normal((50, 20)).astype(np.float32)
    kept = np.ones(50, bool)
    got = regress(values + noise, confounds, kept)
    design = np.c_[np.ones(50), confounds[:, :3]]
    fit = design @ np.linalg.lstsq(design, (values + noise).astype(float), rcond=None)[0]
    assert np.allclose(got - got.mean(0), values + noise - fit, atol=1e-3)
    assert np.allclose(got.mean(0), (values + noise).mean(0), atol=1e-3)


def test_scrubbed_frames_neither_count_nor_stay(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    confounds = rng.standard_normal((40, 2))
    values = (500 + confounds @ rng.standard_normal((2, 8))).astype(np.float32)
    kept = np.ones(40, bool)
    kept[[0, 10, 11, 39]] = False
    values[~kept] = 9999
    got = regress(values, confounds, kept)
    assert np.allclose(got, 500, atol=2) and got.std() < 1
    assert np.allclose(got[10], 2 / 3 * got[9] + 1 / 3 * got[12], rtol=1e-6)
    assert np.array_equal(got[0], got[1]) and np.array_equal(got[39], got[38])
    assert "4 of 40 volumes scrubbed" in caplog.text
    with pytest.raises(DataError, match="3 usable volumes are too few"):
        regress(values[:5], confounds[:5], np.array([False, True, True, True, False]))


def test_a_subject_whose_runs_all_went_bad_leaves_the_store(tree: Any, tmp_path: Path) -> None:
    tree.add("01")
    tree.add("02")
    prepare(tree.root, tmp_path / "s", native())
    save(tree, 0 * bold(), subject="02")
    prepare(tree.root, tmp_path / "s", native(), skip_bad=True)
    assert [r.subject for r in Store(tmp_path / "s").runs] == ["01"]
    assert not (tmp_path / "s/sub-02.h5").exists()


# --- repetition time ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tr, unit, sidecar, settings, expected",
    [
        (2.0, "sec", {"RepetitionTime": 2.0}, {}, 2.0),
        (2000.0, "msec", {"RepetitionTime": 2.0}, {}, 2.0),
        (720000.0, "usec", {}, {}, 0.72),
        (1.5, "sec", {}, {}, 1.5),
        (0.0, "sec", {"RepetitionTime": 0.8}, {}, 0.8),
        (7.0, "hz", {"RepetitionTime": 0.8}, {}, 0.8),
        (2.0, "sec", {"RepetitionTime": 2.0004}, {}, 2.0004),
        (1.0, "sec", {"RepetitionTime": 2.5}, {"on_tr_conflict": "sidecar"}, 2.5),
        (1.0, "sec", {"RepetitionTime": 2.5}, {"tr": 3.0}, 3.0),
    ],
)
def test_repetition_time(
    tr: float,
    unit: str,
    sidecar: dict[str, float],
    settings: dict[str, Any],
    expected: float,
    tree: Any,
    made: Callable[..., Store],
) -> None:
    save(tree, bold(), tr=tr, unit=unit, sidecar=sidecar)
    assert made(tree.root, **settings).contract.tr == pytest.approx(expected)


@pytest.mark.parametrize(
    "tr, sidecar, settings, said",
    [
        (1.0, {"RepetitionTime": 2.5}, {}, r"1 s in the header but 2\.5 s in the sidecar"),
        (2000.0, {}, {}, "TR of 2000 s, which is not plausible"),
        (0.0, {}, {}, r"no TR in its header: set prepare\.tr"),
        (2.0, {"RepetitionTime": 2500}, {}, "RepetitionTime 2500 s is not plausible"),
        (2.0, {}, {"tr": 900.0}, r"prepare\.tr=900 s is not a repetition time"),
    ],
)
def test_impossible_repetition_times(
    tr: float, sidecar: dict[str, float], settings: dict[str, Any], said: str, tree: Any, made: Any
) -> None:
    save(tree, bold(), tr=tr, sidecar=sidecar)
    with pytest.raises(DataError, match=said):
        made(tree.root, **settings)


# --- bad runs -------------------------------------------------------------------------------------


def spoiled(value: float, inside: bool) -> np.ndarray:
    data = bold()
    data[(2, 2, 2) if inside else (0, 0, 0)][7] = value
    return data


@pytest.mark.parametrize(
    "data, changes, settings, said",
    [
        (bold(5, 6, 4), {}, {}, r"is 3D \(5, 6, 4\)"),
        (bold(5, 6, 4, 1, 3), {}, {}, "vector image"),
        (bold(5, 6, 4, 1), {}, {}, r"1 volume\(s\).*at least 2"),
        (bold(), {}, {"dummy_scans": 11}, "leaves 1: a run needs at least 2"),
        (0 * bold(), {}, {}, "is zero everywhere in the brain"),
        (0 * bold() + 7, {}, {}, "the one value 7 everywhere"),
        (spoiled(np.nan, True), {}, {}, "1 NaN or infinite values inside .* volume 7"),
        (spoiled(np.inf, True), {}, {}, "1 NaN or infinite values inside"),
        (spoiled(np.nan, False), {}, {"mask": "compute"}, "1 NaN or infinite"),
        (bold(), {"code": 0}, {}, "no orientation.*left and right"),
        (bold(), {"mask": None}, {}, r"has no brain mask.*prepare\.mask=compute"),
        (bold(), {"mask": np.ones((5, 6, 3), np.uint8)}, {}, r"has grid \(5, 6, 3\)"),
        (bold(), {"mask": np.zeros((5, 6, 4), np.uint8)}, {}, "has no brain voxel"),
        (bold(), {}, {"mask": "/nowhere/mask.nii.gz"}, r"/nowhere/mask\.nii\.gz does not exist"),
    ],
)
def test_bad_runs(
    data: np.ndarray,
    changes: dict[str, Any],
    settings: dict[str, Any],
    said: str,
    tree: Any,
    tmp_path: Path,
) -> None:
    if data.ndim != 4:
        changes = {**changes, "mask": np.ones(data.shape[:3], np.uint8)}
    save(tree, data, **changes)
    with pytest.raises(DataError, match=said) as caught:
        prepare(tree.root, tmp_path / "s", native(**settings))
    assert "sub-01_task-rest_run-1" in str(caught.value)
    assert not (tmp_path / "s").exists()  # nothing half-written


def test_nan_outside_the_brain_is_harmless(
    tree: Any, made: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    save(tree, spoiled(np.nan, False))
    assert made(tree.root).verify() == []
    assert "1 NaN or infinite values outside the brain set to 0" in caplog.text


def test_a_mask_that_lies_elsewhere(tree: Any, tmp_path: Path) -> None:
    tree.add()
    mask = nib.Nifti1Image(np.ones((5, 6, 4), np.uint8), np.diag([-3.0, 3.0, 3.0, 1.0]))
    mask.set_sform(mask.affine, 1)
    nib.save(mask, tmp_path / "mask.nii")
    with pytest.raises(DataError, match="lies elsewhere"):
        prepare(tree.root, tmp_path / "s", native(mask=str(tmp_path / "mask.nii")))


@pytest.mark.parametrize("keep", [0, 20, 300, 0.6, 0.98])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_truncated_files(keep: float, ending: str, tree: Any, tmp_path: Path) -> None:
    path = tree.add()
    content = path.read_bytes()
    if ending == ".nii":
        content = gzip.decompress(content)
        path.unlink()
        path = path.with_suffix("")
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(DataError, match=r"is not a NIfTI|is cut off or damaged"):
        prepare(tree.root, tmp_path / "s", native())


@pytest.mark.parametrize(
    "name, said", [("not_gzip", "is not a NIfTI file"), ("all_zero", "zero everywhere")]
)
def test_odd_real_files(name: str, said: str, tmp_path: Path) -> None:
    row = f"path\tsubject\ttr\n{ODD / name}.nii.gz\t1\t1.0\n"
    (tmp_path / "t.tsv").write_text(row)
    with pytest.raises(DataError, match=said):
        prepare(tmp_path / "t.tsv", tmp_path / "s", native(mask="compute"))


def test_a_real_mask_without_orientation(tmp_path: Path) -> None:
    folder = ODD / "brainiak"
    (tmp_path / "t.tsv").write_text(
        f"path\tsubject\tmask\n{folder}/subject1_bet.nii.gz\t1\t{folder}/mask.nii.gz\n"
    )
    with pytest.raises(DataError, match=r"mask\.nii\.gz has no orientation"):
        prepare(tmp_path / "t.tsv", tmp_path / "s", native())


def test_a_mask_over_nothing(tmp_path: Path) -> None:
    """Real case: 81 voxels were kept, nilearn's mask finds the 79,119 around them."""
    row = f"path\tsubject\n{ODD}/brainiak/subject1_bet.nii.gz\t1\n"
    (tmp_path / "t.tsv").write_text(row)
    with pytest.raises(DataError, match="brain voxels never change, so the mask does not fit"):
        prepare(tmp_path / "t.tsv", tmp_path / "s", native(mask="compute"))


def test_some_constant_voxels_are_said(
    tree: Any, made: Callable[..., Store], caplog: pytest.LogCaptureFixture
) -> None:
    data = bold()
    data[2] = 7
    save(tree, data)
    store = made(tree.root)
    assert "20 of 60 brain voxels never change" in caplog.text
    assert (store.open(store.runs[0]).read(0, 12)[2, 1:] == 7).all()


def test_not_an_image_at_all(tree: Any, tmp_path: Path) -> None:
    path = tree.add()
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match="is not a NIfTI file"):
        prepare(tree.root, tmp_path / "s", native())
    with gzip.open(path, "wb") as file:
        file.write(b"hello" * 1000)
    with pytest.raises(DataError, match="is not a NIfTI file"):
        prepare(tree.root, tmp_path / "s", native())


def test_bad_events(tree: Any, tmp_path: Path) -> None:
    tree.add(events="start\tduration\n1\t2\n")
    with pytest.raises(DataError, match="has no column 'onset'"):
        prepare(tree.root, tmp_path / "s", native())
    tree.add(events="onset\tduration\n1\t2\nsoon\t1\n")
    with pytest.raises(DataError, match="line 3: onset or duration is not a number"):
        prepare(tree.root, tmp_path / "s", native())


# --- some runs bad --------------------------------------------------------------------------------


@pytest.fixture
def mixed(tree: Any) -> Path:
    """Subject 1: a good and a bad run; subject 2: good; subject 3: bad."""
    tree.add("01", "1")
    save(tree, 0 * bold(), run="2")
    tree.add("02")
    save(tree, bold(5, 6, 4, 1), subject="03")
    return tree.root


def test_all_bad_runs_are_listed_and_nothing_is_published(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 4 runs cannot be used") as caught:
        prepare(mixed, tmp_path / "s", native())
    for run, reason in [("sub-01_task-rest_run-2", "zero"), ("sub-03_task-rest_run-1", "1 volume")]:
        assert any(run in line and reason in line for line in str(caught.value).splitlines())
    assert not (tmp_path / "s/index.json").exists()
    assert not list((tmp_path / "s").glob("*.h5"))


def test_skip_bad_publishes_the_others(mixed: Path, tmp_path: Path) -> None:
    report = prepare(mixed, tmp_path / "s", native(), skip_bad=True)
    assert [s.run[:6] for s in report.skipped] == ["sub-01", "sub-03"]
    assert all(s.file.endswith(".nii.gz") and s.reason for s in report.skipped)
    assert [r.name[:6] for r in Store(tmp_path / "s").runs] == ["sub-01", "sub-02"]
    assert sorted(p.name for p in (tmp_path / "s").glob("*")) == [
        "index.json",
        "sub-01.h5",
        "sub-02.h5",
    ]


def test_an_existing_store_survives_a_failure(mixed: Path, tree: Any, tmp_path: Path) -> None:
    prepare(mixed, tmp_path / "s", native(), skip_bad=True)
    index = (tmp_path / "s/index.json").read_bytes()
    tree.add("02", data=bold())
    with pytest.raises(DataError, match="nothing was published"):
        prepare(mixed, tmp_path / "s", native())
    assert (tmp_path / "s/index.json").read_bytes() == index
    assert Store(tmp_path / "s").verify() == []
    tree.add("01", "2")
    tree.add("03")
    report = prepare(mixed, tmp_path / "s", native())
    assert len(report.kept) == 2 and len(report.prepared) == 2  # 02 was staged by the failed call
    assert len(Store(tmp_path / "s").runs) == 4 and Store(tmp_path / "s").verify() == []
    assert not (tmp_path / "s/.staging").exists()


# --- disks and kills ------------------------------------------------------------------------------


def in_subprocess(code: str, *args: object, **popen: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


PREPARE = """
import sys, resource
from pathlib import Path
from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.errors import DataError
source, out, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
def show(event):
    print(event.run, flush=True)
try:
    prepare(source, Path(out), PrepareConfig(space="native"), on_progress=show)
except DataError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("limit", [pytest.param(20_000, marks=pytest.mark.slow), 200_000])
def test_a_full_disk(limit: int, tmp_path: Path) -> None:
    out = tmp_path / "s"
    process = in_subprocess(PREPARE, "sample:haxby2001", out, limit)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "is full" in said and "run the same command again" in said
    assert not (out / "index.json").exists() and not list(out.rglob("*.h5"))
    prepare("sample:haxby2001", out, native())
    assert Store(out).verify() == [] and len(Store(out).runs) == 18


def test_too_little_space_is_said_before_writing(
    tree: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.add()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="is full: the next run needs"):
        prepare(tree.root, tmp_path / "s", native())


def test_a_killed_writer(tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for subject in range(1, 9):
        tree.add(f"{subject:02d}", data=bold(12, 12, 12, 30))
    for lines in (1, 4):
        process = in_subprocess(PREPARE, tree.root, tmp_path / "s", 0)
        assert process.stdout is not None
        for _ in range(lines):
            process.stdout.readline()
        time.sleep(0.005 * lines)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        published = (tmp_path / "s/index.json").exists()
        if published:  # it was faster than the kill
            assert Store(tmp_path / "s").verify() == []
        else:
            with pytest.raises(DataError, match="not a store"):
                Store(tmp_path / "s")
    report = prepare(tree.root, tmp_path / "s", native())
    assert len(report.kept) >= 3  # the last killed writer had finished that many
    store = Store(tmp_path / "s")
    assert len(store.runs) == 8 and store.verify() == []
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "index.json",
        *(f"sub-{s:02d}.h5" for s in range(1, 9)),
    ]


def test_a_torn_staged_file_is_not_used(
    tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree.add()
    staging = tmp_path / "s/.staging"
    staging.mkdir(parents=True)
    (staging / "sub-01.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(500))
    (staging / ".sub-02.h5.part").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert prepare(tree.root, tmp_path / "s", native()).prepared
    assert "unusable" in caplog.text and "interrupted" in caplog.text
    assert Store(tmp_path / "s").verify() == [] and not staging.exists()


def test_a_folder_that_cannot_be_written(tree: Any, tmp_path: Path) -> None:
    tree.add()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to"):
        prepare(tree.root, tmp_path / "file" / "s", native())
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(DataError, match="cannot write to"):
            prepare(tree.root, tmp_path / "locked" / "s", native())


def test_one_prepare_at_a_time(tree: Any, tmp_path: Path) -> None:
    import fcntl

    tree.add()
    (tmp_path / "s/.staging").mkdir(parents=True)
    with open(tmp_path / "s/.staging/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another prepare is writing"):
            prepare(tree.root, tmp_path / "s", native())

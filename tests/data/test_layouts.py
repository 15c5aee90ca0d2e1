"""Layouts beside plain BIDS: versions of a recording, echoes, HCP folders, another TR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.interpolate
import scipy.signal

from fmrizoo.config import PrepareConfig
from fmrizoo.data.bids import find_runs
from fmrizoo.data.hcp import SPACE, read_motion
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import Store, read_index
from fmrizoo.data.temporal import resample_time
from fmrizoo.errors import DataError, RecipeError

MNI = "space-MNI152NLin2009cAsym"


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


# --- versions of one recording --------------------------------------------------------------------


def test_several_resolutions_are_listed_and_one_is_picked(tmp_path: Path) -> None:
    for run in "12":
        stem = f"sub-1/func/sub-1_task-rest_run-{run}_{MNI}"
        touch(tmp_path, *(f"{stem}_res-{r}_desc-preproc_bold.nii.gz" for r in "12"))
    with pytest.raises(DataError, match=r"2 of 2 recordings have several files") as caught:
        find_runs(tmp_path, PrepareConfig())
    for res in "12":
        assert f"run-1_{MNI}_res-{res}_desc-preproc_bold.nii.gz" in str(caught.value)
    assert "prepare.select.res=1" in str(caught.value)
    runs = find_runs(tmp_path, PrepareConfig(select={"res": "2"}))
    assert [str(r.key) for r in runs] == [f"sub-1_task-rest_run-{r}_res-2" for r in "12"]


def test_desc_picks_among_derivatives(tmp_path: Path) -> None:
    stem = f"sub-1/ses-b/func/sub-1_ses-b_task-rest_{MNI}"
    touch(tmp_path, *(f"{stem}_desc-{d}_bold.nii.gz" for d in ("preproc", "denoised")))
    (default,) = find_runs(tmp_path, PrepareConfig())
    (denoised,) = find_runs(tmp_path, PrepareConfig(desc="denoised"))
    assert "desc-preproc" in default.path.name and "desc-denoised" in denoised.path.name
    assert default.key == denoised.key and default.key.session == "b"
    with pytest.raises(DataError, match=r"desc 'smooth': found denoised, preproc\. Set prepare\.d"):
        find_runs(tmp_path, PrepareConfig(desc="smooth"))


def test_single_echoes_are_refused_unless_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, *(f"sub-1/func/sub-1_task-a_echo-{e}_bold.nii.gz" for e in "123"))
    with pytest.raises(DataError, match=r"one echo of a multi-echo run \(3 such files\): combine"):
        find_runs(tmp_path, PrepareConfig(space="native"))
    (run,) = find_runs(tmp_path, PrepareConfig(space="native", select={"echo": "2"}))
    assert str(run.key) == "sub-1_task-a_echo-2"


# --- HCP ------------------------------------------------------------------------------------------


def hcp(root: Path, subject: str, run: str, frames: int = 12, seed: int = 0) -> Path:
    """One run in LAS order with mask and motion, as the HCP leaves it."""
    folder = root / subject / "MNINonLinear" / "Results" / run
    folder.mkdir(parents=True)
    affine = np.diag([-2.0, 2, 2, 1])
    affine[:3, 3] = [10, -12, -8]
    rng = np.random.default_rng(seed)
    data = (1000 + 10 * rng.standard_normal((10, 12, 8, frames))).astype(np.float32)
    for name, values in ((run, data), ("brainmask_fs.2", np.ones((10, 12, 8), np.uint8))):
        img = nib.Nifti1Image(values, affine)
        img.set_sform(affine, 4)
        if values.ndim == 4:
            img.header.set_zooms((2, 2, 2, 0.72))
            img.header.set_xyzt_units("mm", "sec")
        nib.save(img, folder / f"{name}.nii.gz")
    motion = np.zeros((frames, 12))
    motion[3:, 0] = 0.5  # mm
    motion[6:, 4] = 1.0  # degrees
    np.savetxt(folder / "Movement_Regressors.txt", motion)
    return folder


def test_hcp_folders(tmp_path: Path) -> None:
    hcp(tmp_path / "h", "100307", "rfMRI_REST1_LR")
    hcp(tmp_path / "h", "100307", "tfMRI_WM_RL", seed=1)
    folder = hcp(tmp_path / "h", "100408", "rfMRI_REST1_LR", seed=2)
    config = PrepareConfig(
        space=SPACE, grid=[10, 12, 8], voxel_size=[2, 2, 2], center=[1, -1, -1], orientation="RAS"
    )
    prepare(tmp_path / "h", tmp_path / "s", config)
    store = Store(tmp_path / "s")
    assert [r.name for r in store.runs] == [
        "sub-100307_task-REST1_dir-LR",
        "sub-100307_task-WM_dir-RL",
        "sub-100408_task-REST1_dir-LR",
    ]
    contract = store.contract
    assert (contract.space, contract.orientation, contract.tr) == (SPACE, "RAS", 0.72)
    source = nib.load(folder / "rfMRI_REST1_LR.nii.gz").get_fdata()
    got = store.open("sub-100408_task-REST1_dir-LR").read(0, 12)
    assert np.allclose(got, source[::-1], atol=0.5)  # LAS → RAS: x the other way round
    qc = store.runs[2].qc
    assert qc["source_axes"] == "LAS" and qc["fd_max"] == pytest.approx(50 * np.deg2rad(1))
    assert qc["fd_mean"] == pytest.approx((0.5 + 50 * np.deg2rad(1)) / 11)
    one = find_runs(tmp_path / "h" / "100408", config)  # a single subject's folder
    assert [str(r.key) for r in one] == ["sub-100408_task-REST1_dir-LR"]


def test_hcp_is_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    folder = hcp(tmp_path, "1", "rfMRI_REST1_LR")
    with pytest.raises(DataError, match=r"set prepare\.space=MNI152NLin6Asym"):
        find_runs(tmp_path, PrepareConfig())
    with pytest.raises(DataError, match=r"<run>_hp2000_clean\.nii\.gz"):
        find_runs(tmp_path, PrepareConfig(space=SPACE, desc="hp2000_clean"))
    touch(folder, "rfMRI_REST1_LR_hp2000_clean.nii.gz")
    (run,) = find_runs(tmp_path, PrepareConfig(space=SPACE, desc="hp2000_clean"))
    assert run.path.name == "rfMRI_REST1_LR_hp2000_clean.nii.gz"
    motion = folder / "Movement_Regressors.txt"
    for text in ("1 2 3\n", "a b c d e f\n", ""):
        motion.write_text(text)
        with pytest.raises(DataError, match=r"Movement_Regressors\.txt (is not a table|holds)"):
            read_motion(motion)
    touch(folder, "brainmask_fs.1.60.nii.gz")
    with pytest.raises(DataError, match="several masks"):
        find_runs(tmp_path, PrepareConfig(space=SPACE))


# --- another TR -----------------------------------------------------------------------------------


@pytest.fixture
def bold() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (1000 + 10 * rng.standard_normal((120, 30)).cumsum(0)).astype(np.float32)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_whole_ratios_equal_scipys_decimate(bold: np.ndarray, interpolation: str) -> None:
    got = resample_time(bold, 0.8, 2.4, interpolation, Path("x"))
    mean = bold.mean(0, dtype=np.float64)
    wanted = mean + scipy.signal.decimate(bold - mean, 3, axis=0)
    assert got.shape == (40, 30) and np.allclose(got, wanted, atol=1e-3)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_shorter_times_equal_scipys_interpolation(bold: np.ndarray, interpolation: str) -> None:
    got = resample_time(bold, 2.0, 1.3, interpolation, Path("x"))
    old, new = np.arange(120) * 2.0, np.arange(len(got)) * 1.3
    assert new[-1] <= old[-1] < new[-1] + 1.3
    if interpolation == "cubic":
        wanted = scipy.interpolate.CubicSpline(old, bold.astype(float))(new)
    else:
        wanted = np.stack([np.interp(new, old, v) for v in bold.T], 1)
    assert np.allclose(got, wanted, atol=1e-3)


def test_slow_waves_pass_and_fast_ones_do_not_fold() -> None:
    time = np.arange(600) * 0.7
    slow, fast = np.sin(2 * np.pi * 0.05 * time), np.sin(2 * np.pi * 0.6 * time)
    bold = np.stack([100 + slow, 100 + fast], 1).astype(np.float32)
    got = resample_time(bold, 0.7, 2.0, "cubic", Path("x"))  # new Nyquist 0.25 Hz
    at = np.arange(len(got)) * 2.0
    inner = slice(10, -10)
    assert np.abs(got[inner, 0] - 100 - np.sin(2 * np.pi * 0.05 * at)[inner]).max() < 0.03
    assert np.abs(got[inner, 1] - 100).max() < 0.01
    assert np.abs(bold[::3, 1][inner] - 100).max() > 0.9  # taking every third would have kept it


def test_runs_of_several_tr_become_one_store(tree: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for subject, tr in (("01", 2.0), ("02", 1.0)):
        data = (1000 + 10 * rng.standard_normal((5, 6, 4, 60))).astype(np.float32)
        tree.add(subject, data=data, sidecar={"RepetitionTime": tr})
        image = nib.load(
            tree.root / f"sub-{subject}/func/sub-{subject}_task-rest_run-1_bold.nii.gz"
        )
        image.header.set_zooms((3, 3, 3, tr))
        nib.save(nib.Nifti1Image(data, image.affine, image.header), image.get_filename())
    native: dict[str, Any] = {"space": "native"}
    prepare(tree.root, tmp_path / "kept", PrepareConfig(**native))
    with pytest.raises(DataError, match="tr: expected"):
        _ = Store(tmp_path / "kept").contract
    prepare(tree.root, tmp_path / "s", PrepareConfig(**native, target_tr=2.0))
    store = Store(tmp_path / "s")
    assert store.contract.tr == 2.0 and [r.n_frames for r in store.runs] == [60, 30]
    assert [r.qc["source_tr"] for r in store.runs] == [2.0, 1.0]
    # A run that has the TR already is stored as it is without the setting.
    same = [Store(tmp_path / s).open("sub-01_task-rest_run-1").read(0, 60) for s in ("kept", "s")]
    assert np.array_equal(*same)
    settings = [read_index(tmp_path / s)[0]["fingerprint"]["settings"] for s in ("kept", "s")]
    assert "target_tr" not in settings[0] and settings[1]["target_tr"] == 2.0
    with pytest.raises(DataError, match=r"TR of 2 s, longer than prepare\.target_tr=1 s"):
        prepare(tree.root, tmp_path / "t", PrepareConfig(**native, target_tr=1.0))
    forced = PrepareConfig(**native, target_tr=1.0, allow_shorter_tr=True)
    prepare(tree.root, tmp_path / "t", forced)
    assert [r.n_frames for r in Store(tmp_path / "t").runs] == [119, 60]


def test_times_that_cannot_be(bold: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"20 frames of 1 s are too few"):
        resample_time(bold[:20], 1.0, 2.0, "cubic", Path("x"))
    with pytest.raises(DataError, match=r"are too few"):
        resample_time(bold, 1.0, 200.0, "linear", Path("x"))
    for value in (0, -1, float("inf")):
        with pytest.raises(RecipeError, match=r"prepare\.target_tr must be"):
            PrepareConfig(target_tr=value)
    with pytest.raises(RecipeError, match=r"prepare\.time_interpolation='nearest'"):
        PrepareConfig(time_interpolation="nearest")

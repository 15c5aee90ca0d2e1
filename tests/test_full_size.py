"""Real size: a synthetic 3 mm MNI run → 96³ at 2 mm → SwiFT's released configuration in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fmrizoo import zoo
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import Store
from fmrizoo.pipeline import pretrain


def write_run(folder: Path, subject: str, frames: int = 44) -> None:
    """BOLD-like noise inside nilearn's MNI mask at 3 mm, named as fMRIPrep names its outputs."""
    from nilearn.datasets import load_mni152_brain_mask

    mask = load_mni152_brain_mask(resolution=3)
    inside = np.asarray(mask.dataobj) > 0
    rng = np.random.default_rng(int(subject))
    bold = np.zeros((*inside.shape, frames), np.float32)
    noise = rng.normal(size=(int(inside.sum()), frames)).cumsum(1) * 2
    bold[inside] = 1000 + rng.normal(scale=150, size=(len(noise), 1)) + noise
    name = f"sub-{subject}_task-rest_space-MNI152NLin2009cAsym_res-3"
    func = folder / f"sub-{subject}" / "func"
    func.mkdir(parents=True)
    image = nibabel.Nifti1Image(bold, mask.affine)
    image.header.set_zooms((*image.header.get_zooms()[:3], 0.8))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, func / f"{name}_desc-preproc_bold.nii.gz")
    sidecar = func / f"{name}_desc-preproc_bold.json"
    sidecar.write_text(json.dumps({"RepetitionTime": 0.8, "TaskName": "rest"}))
    brain = nibabel.Nifti1Image(inside.astype(np.uint8), mask.affine)
    nibabel.save(brain, func / f"{name}_desc-brain_mask.nii.gz")


@pytest.mark.slow
def test_swift_at_full_size_learns_from_resampled_runs(tmp_path: Path) -> None:
    source = tmp_path / "fmriprep"
    for subject in ("01", "02", "03"):
        write_run(source, subject)
    description = {"Name": "synthetic", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}
    (source / "dataset_description.json").write_text(json.dumps(description))
    base = zoo.load_recipe("pretrain/swift_v1_simmim")
    report = prepare(source, tmp_path / "store", base.prepare)
    assert len(report.prepared) == 3
    store = Store(tmp_path / "store")
    assert store.contract.grid == (96, 96, 96)
    assert store.contract.orientation == "LAS"
    assert 200_000 < store.runs[0].n_vox < 280_000
    recipe = zoo.load_recipe(
        "pretrain/swift_v1_simmim",
        [
            f"data.store={tmp_path / 'store'}",
            "split.folds=3",
            "split.validation=0.4",
            "train.steps=12",
            "train.batch_size=2",
            "train.max_micro_batch=1",
            "train.lr=1e-3",
            "train.precision=bf16",
            "train.checkpointing=window-chunk",
            "train.save_every=0",
            "train.validate_every=0",
        ],
    )
    result = pretrain(recipe, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert result.step == 12
    assert np.mean([r["loss"] for r in rows[-3:]]) < 0.9 * np.mean([r["loss"] for r in rows[:3]])
    assert (tmp_path / "run/reconstruction.npz").is_file()

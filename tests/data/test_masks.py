"""Where the brain is: from the template, against nilearn's own placing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nifti_images import image
from nilearn.datasets import load_mni152_brain_mask
from nilearn.image import resample_to_img

from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.data.repair import repair
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError, RecipeError

MNI = {"space": "MNI152NLin6Asym", "grid": [24, 28, 24], "voxel_size": [8.0, 8.0, 8.0]}
SHAPE = (24, 28, 24)
NAME = "sub-01_task-rest_run-1"


def bold(root: Path, affine: np.ndarray, data: np.ndarray | None = None) -> nib.Nifti1Image:
    """A run in MNI space without a mask of its own."""
    if data is None:
        rng = np.random.default_rng(0)
        data = (1000 + 20 * rng.standard_normal((*SHAPE, 6))).astype(np.float32)
    made = image(data, affine)
    func = root / "sub-01" / "func"
    func.mkdir(parents=True, exist_ok=True)
    stem = f"sub-01_task-rest_run-1_space-{MNI['space']}_desc-preproc_bold"
    nib.save(made, func / f"{stem}.nii.gz")
    (func / f"{stem}.json").write_text('{"RepetitionTime": 2.0}')
    return made


def affine(flip: bool = False, shift: float = 0.0) -> np.ndarray:
    """8 mm voxels over the MNI brain, x from left to right or from right to left."""
    found = np.diag([-8.0 if flip else 8.0, 8.0, 8.0, 1.0])
    found[:3, 3] = [92.0 if flip else -92.0, -126.0, -75.0]
    found[:3, 3] += shift
    return found


def config(**values: Any) -> PrepareConfig:
    return PrepareConfig(**{**MNI, "center": [0.0, -18.0, 17.0], "mask": "template", **values})


@pytest.mark.parametrize("flip", [False, True])
def test_the_template_lies_where_nilearn_puts_it(flip: bool, tmp_path: Path) -> None:
    made = bold(tmp_path / "in", affine(flip))
    with pytest.raises(DataError, match=r"has no brain mask .* template, in MNI space"):
        prepare(tmp_path / "in", tmp_path / "s", config(mask="auto"))
    prepare(tmp_path / "in", tmp_path / "s", config())
    store = Store(tmp_path / "s")
    template = load_mni152_brain_mask(resolution=2)
    expected = resample_to_img(
        template, made, interpolation="nearest", force_resample=True, copy_header=True
    )
    mask = np.asarray(expected.dataobj) > 0
    reader = store.open(NAME)
    assert reader.n_vox == mask.sum() > 2000
    inside = reader.mask if not flip else reader.mask[::-1]
    assert np.array_equal(inside, mask)
    assert store.runs[0].qc["cover"] > 0.98


def test_voxels_without_signal_are_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = (1000 + 20 * rng.standard_normal((*SHAPE, 6))).astype(np.float32)
    data[:, :, :8] = 0  # the field of view ends here
    bold(tmp_path / "in", affine(), data)
    prepare(tmp_path / "in", tmp_path / "s", config())
    run = Store(tmp_path / "s").runs[0]
    mask = Store(tmp_path / "s").open(run).mask
    assert not mask[:, :, :8].any() and mask[:, :, 8:].any()
    assert 0.5 < run.qc["cover"] < 0.95


def test_what_is_refused(tmp_path: Path) -> None:
    for space in ("native", "T1w"):
        with pytest.raises(RecipeError, match=f"MNI152 brain, but prepare.space={space}"):
            config(space=space)
    bold(tmp_path / "far", affine(shift=2000.0))
    with pytest.raises(DataError, match="nothing of the MNI152 brain lies in the image"):
        prepare(tmp_path / "far", tmp_path / "s", config())
    bold(tmp_path / "flat", affine(), np.ones((*SHAPE, 6), np.float32))
    with pytest.raises(DataError, match=r"one value|never changes"):
        prepare(tmp_path / "flat", tmp_path / "s", config())


def test_repair_makes_the_same_mask(tmp_path: Path) -> None:
    bold(tmp_path / "in", affine())
    prepare(tmp_path / "in", tmp_path / "s", config())
    file = tmp_path / "s" / "sub-01.h5"
    before, values = file.read_bytes(), Store(tmp_path / "s").open(NAME).read(0, 6)
    file.chmod(0o644)
    file.write_bytes(before[:5000])
    assert repair(tmp_path / "s", tmp_path / "in").restored == ["sub-01.h5"]
    assert np.array_equal(Store(tmp_path / "s").open(NAME).read(0, 6), values)
    assert prepare(tmp_path / "in", tmp_path / "s", config()).kept == [NAME]

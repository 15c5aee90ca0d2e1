"""Each mode against the formula on the decoded run."""

from __future__ import annotations

import numpy as np
import pytest

from fmrizoo.config import NORMALIZATIONS
from fmrizoo.data.normalize import describe, loaded_contract, to_source, voxel_affine
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError


def expected(mode: str, v: np.ndarray) -> tuple[np.ndarray, float]:
    z = (v - v.mean()) / v.std()
    q1, q2, q3 = np.percentile(v, [25, 50, 75])
    with np.errstate(invalid="ignore", divide="ignore"):
        voxel = np.nan_to_num((v - v.mean(0)) / v.std(0))
    return {
        "znorm_minback": (z, z.min()),
        "znorm_zeroback": (z, 0.0),
        "minmax": ((v - v.min()) / (v.max() - v.min()), 0.0),
        "robust": ((v - q2) / (q3 - q1), 0.0),
        "voxel": (voxel, 0.0),
        "none": (v, 0.0),
    }[mode]


@pytest.mark.parametrize("mode", NORMALIZATIONS)
@pytest.mark.parametrize("acquisition", ["1slice", "25mm"])
def test_modes(mode: str, acquisition: str, sample_store: Store) -> None:
    reader = sample_store.open(f"sub-001_task-objects_acq-{acquisition}_run-02")
    values = reader.read(0, reader.n_frames)[reader.mask].T.astype(np.float64)
    affine = voxel_affine(reader, mode)
    stored = reader.read_compact(0, reader.n_frames)[:, : reader.n_vox].astype(np.float64)
    got = affine.a * stored + affine.b
    want, background = expected(mode, values)
    # The statistics are of the source, `values` are as quantised: 0.7 % of a voxel's s.d. apart.
    assert np.abs(got - want).max() < 0.02 * max(1.0, want.std())
    assert affine.background == pytest.approx(background, abs=0.01 * max(1.0, want.std()))


@pytest.mark.parametrize("mode", NORMALIZATIONS)
@pytest.mark.parametrize("acquisition", ["1slice", "25mm"])
def test_to_source_undoes_every_mode(mode: str, acquisition: str, sample_store: Store) -> None:
    reader = sample_store.open(f"sub-001_task-objects_acq-{acquisition}_run-02")
    affine = voxel_affine(reader, mode)
    stored = reader.read_compact(0, 5)[:, : reader.n_vox].astype(np.float32)
    values = reader.read(0, 5)[reader.mask].T
    back = to_source(reader, mode, affine.a * stored + affine.b)
    # float32 values of some thousand, normalised and back.
    np.testing.assert_allclose(back, values, atol=1e-5 * values.max())


def test_a_run_without_spread_is_refused(sample_store: Store) -> None:
    reader = sample_store.open(sample_store.runs[0])
    reader.meta["statistics"]["iqr"] = 0.0
    try:
        with pytest.raises(DataError, match=r"robust.*divide by 0"):
            voxel_affine(reader, "robust")
    finally:
        sample_store.close()


def test_the_contract_says_what_was_done(sample_store: Store) -> None:
    stored = sample_store.runs[0].contract
    assert stored.normalization == "stored"
    loaded = loaded_contract(stored, "znorm_minback")
    assert loaded.background == "run minimum"
    for mode in NORMALIZATIONS:
        assert describe(mode)
    differences = loaded.differences(loaded_contract(stored, "znorm_zeroback"))
    assert any(d.startswith("normalization") for d in differences)
    with pytest.raises(DataError, match="Did you mean 'znorm_minback'"):
        describe("znorm_minbak")

"""Where voxels go: known affines, exact copies on equal lattices, a blob by its millimetres."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from fmrizoo.config import PrepareConfig
from fmrizoo.data.spatial import place, reorient, same_lattice, target_affine, voxel_size

MNI = {"space": "MNI152NLin2009cAsym"}


def test_the_default_grid_lies_where_it_should() -> None:
    ras = target_affine(PrepareConfig())
    assert np.array_equal(ras[:3, 3], [-94, -112, -78])
    assert np.array_equal(np.diag(ras), [2, 2, 2, 1])
    las = target_affine(PrepareConfig(orientation="LAS"))
    assert np.array_equal(las[:3, 3], [96, -112, -78])
    # The exact mirror: the same places, x counted from the other side.
    assert np.array_equal(las @ [95, 0, 0, 1], ras @ [0, 0, 0, 1])
    assert voxel_size(las) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "LPS", "SAR", "PIR"])
def test_orientation_moves_no_voxel_in_space(orientation: str) -> None:
    rng = np.random.default_rng(0)
    data = rng.random((3, 4, 5, 2))
    affine = np.array([[0, -2.0, 0.1, 5], [3, 0, 0, -7], [0, 0.2, 4, 1], [0, 0, 0, 1]])
    moved, new = reorient(data, affine, orientation)
    assert "".join(nib.aff2axcodes(new)) == orientation
    index = np.array([1, 2, 3, 1])
    back = np.rint(np.linalg.inv(new) @ affine @ index).astype(int)[:3]
    assert np.array_equal(moved[tuple(back)], data[1, 2, 3])
    assert np.isclose(moved.sum(), data.sum())


@pytest.mark.parametrize(
    "origin, step, shape",
    [
        ((-96, -132, -78), (2, 2, 2), (97, 115, 97)),  # fMRIPrep's MNI152NLin2009cAsym, res-2
        ((90, -126, -72), (-2, 2, 2), (91, 109, 91)),  # FSL's MNI152 2 mm (LAS)
    ],
)
@pytest.mark.parametrize("orientation", ["RAS", "LAS"])
def test_coinciding_lattices_are_copied_bit_for_bit(
    origin: tuple[float, ...], step: tuple[float, ...], shape: tuple[int, ...], orientation: str
) -> None:
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = origin
    data = np.random.default_rng(0).random(shape).astype(np.float32)
    config = PrepareConfig(**MNI, orientation=orientation)
    moved, target = place(data, affine, config)
    assert moved.shape == (96, 96, 96) and np.array_equal(target, target_affine(config))
    for voxel in [(30, 50, 20), (60, 40, 70), (10, 15, 5)]:
        there = np.linalg.inv(target) @ affine @ [*voxel, 1]
        assert moved[tuple(np.rint(there[:3]).astype(int))] == data[voxel]
    assert np.isin(moved, np.append(data.ravel(), 0)).all()


@pytest.mark.parametrize("orientation", ["RAS", "LPS"])
def test_resampling_keeps_a_blob_at_its_millimetres(orientation: str) -> None:
    angle = 0.3
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn * 3.0
    affine[:3, 3] = [-30, -70, -30]
    shape = (30, 30, 30)
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = voxels @ affine[:3, :3].T + affine[:3, 3]
    center = world.reshape(-1, 3).mean(0)
    blob = np.exp(-((world - center) ** 2).sum(-1) / (2 * 10.0**2)).astype(np.float32)
    config = PrepareConfig(
        **MNI,
        grid=[40, 42, 44],
        voxel_size=[2, 2, 2],
        center=center.tolist(),
        orientation=orientation,
    )
    moved, target = place(np.stack([blob, 2 * blob], -1), affine, config)
    assert moved.shape == (40, 42, 44, 2)
    grid = np.stack(np.meshgrid(*map(np.arange, moved.shape[:3]), indexing="ij"), -1)
    there = grid @ target[:3, :3].T + target[:3, 3]
    expected = np.exp(-((there - center) ** 2).sum(-1) / (2 * 10.0**2))
    inside = expected > 0.05
    assert np.abs(moved[..., 0] - expected)[inside].max() < 0.01
    assert np.abs(moved[..., 1] - 2 * expected)[inside].max() < 0.02


def test_masks_stay_binary_under_resampling() -> None:
    mask = np.zeros((20, 20, 20), bool)
    mask[5:15, 5:15, 5:15] = True
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    config = PrepareConfig(**MNI, grid=[32, 32, 32], voxel_size=[2, 2, 2], center=[28.5] * 3)
    moved, _ = place(mask, affine, config, nearest=True)
    assert moved.dtype == bool
    # 30 mm a side at 2 mm: 15 voxels a side, give or take the nearest one
    assert 14**3 <= moved.sum() <= 16**3


def test_same_lattice_tolerates_header_rounding_only() -> None:
    a = np.diag([2.0, 2.0, 2.0, 1.0])
    b = a.copy()
    b[0, 3] += 1e-4
    assert same_lattice(a, b, (90, 90, 90))
    b[0, 3] += 0.5
    assert not same_lattice(a, b, (90, 90, 90))
    flipped = np.diag([-2.0, 2.0, 2.0, 1.0])
    assert not same_lattice(a, flipped, (90, 90, 90))

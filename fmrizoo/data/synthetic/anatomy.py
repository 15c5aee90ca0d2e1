"""The brain that all subjects share: mask, tissue-like mean image, networks, on any grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import PrepareConfig
from fmrizoo.data.spatial import Affine, place, target_affine
from fmrizoo.data.synthetic.cohort import NETWORKS, stream
from fmrizoo.data.synthetic.config import SynthConfig
from fmrizoo.errors import DataError

FWHM = math.sqrt(8 * math.log(2))  # of a Gaussian, in standard deviations
# EPI brightness of the tissues against grey matter: T2* weighting, CSF bright.
_WHITE, _FLUID = 0.85, 1.25
_HOLES = ((0.0, 42.0, -20.0), (50.0, -18.0, -28.0), (-50.0, -18.0, -28.0))  # MNI mm: sinus, ears
_HOLE = 11.0  # mm, s.d.
_DEEP = 10.0  # mm below the surface: where networks are centred
_OFF_MIDDLE = 14.0  # mm beside the midline
_EDGE = 0.1  # weight below which a voxel is of no network


@dataclass(frozen=True)
class Anatomy:
    """Arrays over the ``n_vox`` brain voxels in C order of the grid.

    Attributes:
        mask: ``(x, y, z)``.
        affine: Voxel → RAS mm.
        mean: Mean image ``(n_vox,)``, median ``level``.
        points: ``(n_vox, 3)`` RAS mm.
        slope: Change of the mean image by mm along R, A, S ``(3, n_vox)``, brain edge included.
        networks: Weights ``(networks, n_vox)`` in [0, 1]; a voxel is of one network at most.
        tissues: Shares of grey matter, white matter and CSF ``(3, n_vox)``.
    """

    mask: NDArray[np.bool_]
    affine: Affine
    mean: NDArray[np.float32]
    points: NDArray[np.float32]
    slope: NDArray[np.float32]
    networks: NDArray[np.float32]
    tissues: NDArray[np.float32]


def anatomy(config: SynthConfig) -> Anatomy:
    """The brain of a cohort.

    Raises:
        DataError: no brain voxel, or a network without one, on the grid.
    """
    grid = config.prepare
    return _anatomy(
        tuple(grid.grid), tuple(grid.voxel_size), tuple(grid.center), grid.orientation,
        config.level, config.dropout, config.networks, config.network_size, config.network_seed,
    )  # fmt: skip


@lru_cache(maxsize=2)
def _anatomy(
    grid: tuple[int, ...],
    voxels: tuple[float, ...],
    center: tuple[float, ...],
    orientation: str,
    level: float,
    dropout: float,
    networks: int,
    size: float,
    seed: int,
) -> Anatomy:
    target = PrepareConfig(
        grid=list(grid), voxel_size=list(voxels), center=list(center), orientation=orientation
    )
    brain, shares, affine = _template()
    placed, _ = place(brain, affine, target, nearest=True)
    mask = np.asarray(placed, bool)
    if not mask.any():
        raise DataError(
            f"no brain voxel lies on the grid: prepare.grid={list(grid)}, voxel_size="
            f"{list(voxels)} mm, center={list(center)} mm"
        )
    lattice = target_affine(target)
    points = np.argwhere(mask) @ lattice[:3, :3].T + lattice[:3, 3]
    tissues = _on_grid(shares, brain, affine, target, max(voxels))[:, mask]
    tissues /= np.maximum(tissues.sum(0), 1e-3)
    mean = np.array([1.0, _WHITE, _FLUID]) @ tissues
    for hole in _HOLES:
        apart = ((points - hole) ** 2).sum(1)
        mean *= 1 - dropout * np.exp(-apart / (2 * _HOLE**2))
    mean *= level / np.median(mean)
    dense = np.zeros(mask.shape)
    dense[mask] = mean
    # Per voxel step along each axis, then per mm of the world.
    steps = np.stack([_gradient(dense, axis)[mask] for axis in range(3)])
    slope = np.linalg.inv(lattice[:3, :3]).T @ steps
    weights = _networks(points, networks, size, seed)
    empty = np.flatnonzero(weights.max(1) == 0)
    if len(empty):
        raise DataError(
            f"network {empty[0]} has no voxel on the grid {list(grid)} of {list(voxels)} mm: take "
            f"fewer networks, smaller voxels or a larger network_size"
        )
    return Anatomy(
        mask, lattice, mean.astype(np.float32), points.astype(np.float32),
        slope.astype(np.float32), weights, tissues.astype(np.float32),
    )  # fmt: skip


def _gradient(dense: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    if dense.shape[axis] < 2:
        return np.zeros_like(dense)
    found: NDArray[np.float64] = np.gradient(dense, axis=axis)
    return found


@lru_cache(maxsize=1)
def _template() -> tuple[NDArray[np.bool_], NDArray[np.float32], Affine]:
    """Nilearn's MNI152 at 2 mm: brain, shares of grey, white and fluid ``(3, x, y, z)``, affine."""
    from nilearn.datasets import (
        load_mni152_brain_mask,
        load_mni152_gm_template,
        load_mni152_wm_template,
    )

    image = load_mni152_brain_mask(resolution=2)
    brain = np.asarray(image.dataobj) > 0
    grey, white = (
        np.clip(np.asarray(load(resolution=2).dataobj, np.float32), 0, 1)
        for load in (load_mni152_gm_template, load_mni152_wm_template)
    )
    fluid = np.clip(1 - grey - white, 0, 1)
    return brain, np.stack([grey, white, fluid]) * brain, np.asarray(image.affine, np.float64)


def _on_grid(
    shares: NDArray[np.float32],
    brain: NDArray[np.bool_],
    affine: Affine,
    target: PrepareConfig,
    voxel: float,
) -> NDArray[np.float64]:
    """The tissues as voxels of the target see them: averaged over about one voxel."""
    from scipy.ndimage import gaussian_filter

    sigma = voxel / FWHM / 2.0 if voxel > 2.5 else 0.0  # the template has 2 mm
    found = []
    weight = gaussian_filter(brain.astype(np.float32), sigma) if sigma else 1.0
    for share in shares:
        smooth = gaussian_filter(share, sigma) / np.maximum(weight, 1e-3) if sigma else share
        placed, _ = place(smooth.astype(np.float32), affine, target)
        found.append(np.clip(placed, 1e-3, 1).astype(np.float64))
    return np.stack(found)


def _networks(
    points: NDArray[np.float64], count: int, size: float, seed: int
) -> NDArray[np.float32]:
    """Gaussian blobs around mirrored centres; a voxel is of the nearest one's network."""
    centers = _centers(count, seed)
    sigma = size / FWHM
    apart = np.full((count, len(points)), np.inf)
    for network, center in enumerate(centers):
        for side in (1, -1):
            squared = ((points - center * [side, 1, 1]) ** 2).sum(1)
            apart[network] = np.minimum(apart[network], squared)
    weights = np.exp(-apart / (2 * sigma**2))
    weights[(np.arange(count)[:, None] != apart.argmin(0)) | (weights < _EDGE)] = 0
    return weights.astype(np.float32)


@lru_cache(maxsize=8)
def _centers(count: int, seed: int) -> NDArray[np.float64]:
    """``(count, 3)`` MNI mm in the right hemisphere, each as far as can be from those before.

    They are found in the 2 mm template, so they do not depend on the grid.
    """
    from scipy.ndimage import distance_transform_edt

    brain, _, affine = _template()
    depth = distance_transform_edt(brain) * 2.0  # mm
    points = np.argwhere(depth >= _DEEP) @ affine[:3, :3].T + affine[:3, 3]
    points = points[points[:, 0] >= _OFF_MIDDLE]
    for hole in _HOLES:  # no network where there is no signal
        points = points[((points - hole) ** 2).sum(1) > (2 * _HOLE) ** 2]
    chosen = [points[stream(seed, NETWORKS).integers(len(points))]]
    while len(chosen) < count:
        apart = np.min([((points - c) ** 2).sum(1) for c in chosen], axis=0)
        chosen.append(points[int(apart.argmax())])
    return np.array(chosen)

"""Where voxels lie: canonical axis order, and resampling to a common grid by the affine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import PrepareConfig
from fmrizoo.data.codec import Array
from fmrizoo.errors import DataError

log = logging.getLogger(__name__)

_AXES = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
_ON_GRID = 1e-3  # voxels: two lattices closer than this are the same one

Affine = NDArray[np.float64]


def check_affine(image: Any, path: Path) -> None:
    """Refuse an image that does not say where its voxels lie.

    Raises:
        DataError: no q-form or s-form code, or an affine that cannot be inverted.
    """
    header = image.header
    codes = (int(header["qform_code"]), int(header["sform_code"]))
    if codes == (0, 0):
        raise DataError(
            f"{path} has no orientation (q-form and s-form codes are 0), so left and right cannot "
            f"be told apart: set the codes with the tool that wrote it (e.g. fslorient, 3drefit)"
        )
    linear = np.asarray(image.affine)[:3, :3]
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(linear)) < 1e-9:
        raise DataError(f"{path} has an affine that cannot be inverted: {linear.tolist()}")


def same_lattice(a: Affine, b: Affine, shape: Sequence[int]) -> bool:
    """Whether two affines put every corner voxel of a grid of ``shape`` at the same place."""
    corners = np.array(np.meshgrid(*[(0, s - 1) for s in shape[:3]])).reshape(3, -1)
    points = np.vstack([corners, np.ones(corners.shape[1])])
    size = np.sqrt((np.asarray(a)[:3, :3] ** 2).sum(0)).min()
    return bool(np.abs((a @ points - b @ points)[:3]).max() <= 0.01 * size)


def target_affine(config: PrepareConfig) -> Affine:
    """Affine of the stored grid: ``config.center`` lies in its middle, axes as ``orientation``.

    ``grid`` and ``voxel_size`` count along the stored axes, ``center`` is RAS millimetres.
    """
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, letter in enumerate(config.orientation):
        world, sign = _AXES[letter]
        affine[world, axis] = sign * config.voxel_size[axis]
    middle = (np.asarray(config.grid) - 1) / 2
    affine[:3, 3] = np.asarray(config.center) - affine[:3, :3] @ middle
    return affine


def _nibabel() -> Any:
    """Nibabel, imported late (it takes a while) and without its partial annotations."""
    import nibabel

    return nibabel


def nibabel_orientations() -> Any:
    """Nibabel's functions on axis codes."""
    return _nibabel().orientations


def as_image(data: Array, affine: Affine) -> Any:
    """A NIfTI image in memory, in the dtype of ``data``."""
    return _nibabel().Nifti1Image(data, affine)


def reorient(data: Array, affine: Affine, orientation: str) -> tuple[Array, Affine]:
    """Permute and flip the spatial axes to ``orientation``; no value changes."""
    nib = nibabel_orientations()
    have = nib.io_orientation(affine)
    transform = nib.ornt_transform(have, nib.axcodes2ornt(tuple(orientation)))
    moved = nib.apply_orientation(data, transform)
    return moved, affine @ nib.inv_ornt_aff(transform, data.shape[:3])


def place(
    data: Array, affine: Affine, config: PrepareConfig, *, nearest: bool = False
) -> tuple[Array, Affine]:
    """Bring ``data (x, y, z[, t])`` to the stored space.

    ``space: native`` only permutes and flips. Otherwise the grid of :func:`target_affine`:
    voxels are copied where the two lattices coincide (an fMRIPrep output already at that
    resolution), else resampled by the affine, cubic (``nearest`` for masks); 0 outside.

    Returns:
        The array and the affine of its voxels.
    """
    data, affine = reorient(data, affine, config.orientation)
    if config.space == "native":
        return data, affine
    target = target_affine(config)
    shape = tuple(config.grid)
    step = np.linalg.solve(affine, target)  # target voxel → source voxel
    shift = np.rint(step[:3, 3])
    off_axis = np.abs(step[:3, :3] - np.eye(3)).max() * max(shape)  # at the far end of the grid
    if max(off_axis, np.abs(step[:3, 3] - shift).max()) < _ON_GRID:
        return _window(data, shift.astype(int), shape), target
    return resample(data, affine, target, shape, nearest), target


def _window(data: Array, shift: NDArray[np.int64], shape: tuple[int, ...]) -> Array:
    """Crop and zero-pad: ``out[i] = data[i + shift]``."""
    out = np.zeros((*shape, *data.shape[3:]), data.dtype)
    low = np.maximum(0, -shift)
    high = np.minimum(shape, np.asarray(data.shape[:3]) - shift)
    if (high > low).all():
        to = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        of = tuple(slice(a, b) for a, b in zip(low + shift, high + shift, strict=True))
        out[to] = data[of]
    return out


def resample(
    data: Array, affine: Affine, target: Affine, shape: tuple[int, ...], nearest: bool
) -> Array:
    """``data`` on the lattice of ``target`` and ``shape``; 0 outside of what it holds."""
    from nilearn.image import resample_img
    from nilearn.image.resampling import BoundingBoxError

    kind = np.uint8 if data.dtype == bool else np.float32
    image = as_image(data.astype(kind), affine)
    try:
        moved = resample_img(
            image,
            target_affine=target,
            target_shape=shape,
            interpolation="nearest" if nearest else "continuous",
            fill_value=0,
            clip=False,  # a limit taken over all frames would make a frame depend on the others
            force_resample=True,
            copy_header=True,
        )
    except BoundingBoxError:  # no overlap: all of it is outside
        return np.zeros((*shape, *data.shape[3:]), data.dtype)
    return np.asarray(moved.dataobj, dtype=kind).astype(data.dtype, copy=False)


def voxel_size(affine: Affine) -> tuple[float, float, float]:
    """Millimetres along the three stored axes."""
    x, y, z = (round(float(v), 4) for v in np.sqrt((affine[:3, :3] ** 2).sum(0)))
    return x, y, z

"""Parcel labels on the voxels of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fmrizoo.data.spatial import check_affine, same_lattice
from fmrizoo.data.store import RunInfo
from fmrizoo.errors import DataError


@dataclass(frozen=True, eq=False)
class Atlas:
    """A volume of labels; 0 and below: no parcel.

    Attributes:
        labels: ``(x, y, z)`` int64.
        affine: ``(4, 4)`` voxel → RAS millimetres; None: taken to be that of the clips.
        name: For messages and files.
    """

    labels: Tensor
    affine: NDArray[np.float64] | None = None
    name: str = "the atlas"

    @classmethod
    def of(cls, source: Atlas | Path | str | ArrayLike | Tensor) -> Atlas:
        """From a NIfTI file (with its affine) or an array of labels.

        Raises:
            DataError: no such file, not NIfTI, not three-dimensional, labels that are no whole
                numbers, or none above 0.
        """
        if isinstance(source, Atlas):
            return source
        if isinstance(source, str | Path):
            return cls._read(Path(source))
        return cls(_labels(np.asarray(source), "the atlas"))

    @classmethod
    def _read(cls, path: Path) -> Atlas:
        import nibabel
        from nibabel.filebasedimages import ImageFileError

        try:
            image = nibabel.load(path)
            data = np.asarray(image.dataobj)  # type: ignore[attr-defined]
        except (OSError, EOFError, ValueError, ImageFileError, AttributeError) as error:
            raise DataError(f"atlas {path} cannot be read as NIfTI: {error}") from None
        check_affine(image, path)
        affine = np.asarray(image.affine, np.float64)  # type: ignore[attr-defined]
        return cls(_labels(data, f"atlas {path}"), affine, f"atlas {path}")

    def check(self, runs: Sequence[RunInfo]) -> None:
        """Refuse runs on other voxels.

        Raises:
            DataError: names the first such run.
        """
        shape = tuple(self.labels.shape)
        for run in runs:
            if shape != run.grid:
                raise DataError(
                    f"{self.name} has {_size(shape)} voxels, run {run.name} {_size(run.grid)}: "
                    "resample its labels to the store's grid (nearest neighbour)"
                )
            affine = np.array(run.affine, np.float64)
            if self.affine is not None and not same_lattice(self.affine, affine, shape):
                raise DataError(
                    f"the voxels of {self.name} do not lie where those of run {run.name} do "
                    f"(affines {np.round(self.affine[:3], 3).tolist()} and "
                    f"{np.round(affine[:3], 3).tolist()}): resample its labels to the store's grid "
                    "(nearest neighbour)"
                )


def _labels(data: NDArray[np.generic], name: str) -> Tensor:
    volume = data[..., 0] if data.ndim == 4 and data.shape[3] == 1 else data
    if volume.ndim != 3:
        raise DataError(f"{name} must hold one volume (x, y, z), got shape {data.shape}")
    number = np.issubdtype(volume.dtype, np.number) and not np.iscomplexobj(volume)
    if not number or not np.isfinite(volume).all() or (np.mod(volume, 1) != 0).any():
        raise DataError(f"{name} must hold whole numbers, one for each parcel")
    whole = volume.astype(np.int64)
    if not (whole > 0).any():
        raise DataError(f"{name} holds no parcel: no label is above 0")
    return torch.from_numpy(np.ascontiguousarray(whole))


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))

"""NIfTI images for tests."""

from __future__ import annotations

import nibabel as nib
import numpy as np


def image(data: np.ndarray, affine: np.ndarray | None = None, tr: float = 2.0) -> nib.Nifti1Image:
    """A NIfTI image with codes set, RAS 3 mm unless told otherwise."""
    affine = np.diag([3.0, 3.0, 3.0, 1.0]) if affine is None else affine
    img = nib.Nifti1Image(data, affine)
    img.header.set_xyzt_units("mm", "sec")
    if data.ndim == 4:
        img.header.set_zooms((*img.header.get_zooms()[:3], tr))
    img.set_sform(affine, 1)
    img.set_qform(affine, 1)
    return img

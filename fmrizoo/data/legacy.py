"""Data prepared by other code: SwiFT's folders of frames, and dense HDF5 files.

Both hold values without saying where a voxel lies or how long a frame took. A store of them says
so: space and orientation ``unknown``, voxel size 0 and TR 0 (unless ``prepare.tr`` is given). Its
contract equals only that of such stores, so it does not mix with others by accident.

================ ===================================================================================
``swift``        ``[img/]<subject>/frame_N.pt``: tensors ``(x, y, z[, 1])``, one a frame, cropped,
                 normalised, background at the smallest value
``hdf5``         ``<subject>.h5`` or ``.hdf5`` with ``fmri_data (x, y, z, t)``
================ ===================================================================================

The brain is where a voxel ever departs from the first corner voxel of the first frame: that is how
SwiFT itself finds the background.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import PrepareConfig
from fmrizoo.data.bids import LABEL, RunFile
from fmrizoo.data.nifti import LoadedRun
from fmrizoo.errors import DataError
from fmrizoo.files import sha256_of
from fmrizoo.types import RunKey

DATASET = "fmri_data"
UNKNOWN = "unknown"
_FRAME = re.compile(r"frame_(\d+)\.pt")
_HDF5 = (".h5", ".hdf5")


def legacy_layout(source: Path) -> str:
    """``swift``, ``hdf5``, or empty if ``source`` is neither."""
    if any(_frames(folder) for folder in _folders(source)):
        return "swift"
    return "hdf5" if any(_holds_data(path) for path in _files(source)) else ""


def find_legacy_runs(source: Path, layout: str) -> list[RunFile]:
    """One run a subject; underscores are left out of labels (they part entities in run names).

    Raises:
        DataError: nothing of this layout there, or a name that makes no label.
    """
    if layout == "swift":
        found = [folder for folder in _folders(source) if _frames(folder)]
        wanted = "<subject>/frame_0.pt"
    else:
        found = [path for path in _files(source) if _holds_data(path)]
        wanted = f"<subject>.h5 with the dataset {DATASET!r}"
    if not found:
        raise DataError(f"no run in {source}: looked for {wanted}")
    runs = []
    for path in found:
        label = (path.stem if layout == "hdf5" else path.name).removeprefix("sub-").replace("_", "")
        if not LABEL.fullmatch(label):
            raise DataError(f"{path}: {label!r} is no subject label (letters, digits, -, +, .)")
        runs.append(RunFile(RunKey(label), path, layout=layout))
    return runs


def _folders(source: Path) -> list[Path]:
    below = source / "img" if (source / "img").is_dir() else source
    return sorted(p for p in below.iterdir() if p.is_dir()) if below.is_dir() else []


def _files(source: Path) -> list[Path]:
    files = source.iterdir() if source.is_dir() else ()
    return sorted(p for p in files if p.suffix in _HDF5 and p.is_file())


def _holds_data(path: Path) -> bool:
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            return DATASET in file
    except OSError as error:
        raise DataError(f"{path} is not an HDF5 file: {error}") from None


def _frames(folder: Path) -> dict[int, Path]:
    """Frame files by number, in numeric order."""
    named = ((_FRAME.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def digest(run: RunFile) -> str:
    """SHA-256 of all that is read."""
    if run.layout == "hdf5":
        return sha256_of(run.path)
    whole = hashlib.sha256()
    for number, path in _frames(run.path).items():
        whole.update(f"{number}:{sha256_of(path)};".encode())
    return whole.hexdigest()


def load_legacy(run: RunFile, config: PrepareConfig) -> LoadedRun:
    """Frames and brain of one run; its affine is the unit matrix, its TR 0 unless given.

    Raises:
        DataError: missing or odd frames, values that are not finite, no background or no brain, a
            setting that needs what is unknown.
    """
    for key, unset in (("mask", "auto"), ("confounds", None), ("target_tr", None)):
        if getattr(config, key) != unset:
            raise DataError(
                f"{run.path}: prepare.{key}={getattr(config, key)} cannot be applied to data whose "
                f"space and TR are unknown: prepare its NIfTI files instead"
            )
    bold = _read_frames(run.path) if run.layout == "swift" else _read_hdf5(run.path)
    if not np.isfinite(bold).all():
        raise DataError(f"{run.path} holds NaN or infinite values")
    mask = (bold != bold[0, 0, 0, 0]).any(3)
    if not mask.any():
        raise DataError(f"{run.path} has the one value {bold.flat[0]:g} everywhere")
    bold = bold[..., config.dummy_scans :]
    if bold.shape[3] < 2:
        raise DataError(f"{run.path}: {bold.shape[3]} frame(s) are left: a run needs at least 2")
    return LoadedRun(bold, mask, np.eye(4), 0.0 if config.tr is None else config.tr)


def _read_frames(folder: Path) -> NDArray[np.float32]:
    import torch

    frames = _frames(folder)
    if missing := sorted(set(range(max(frames) + 1)) - set(frames)):
        raise DataError(
            f"{folder} has frames up to {max(frames)} but lacks {len(missing)} of them, the first "
            f"is frame_{missing[0]}.pt: copy it whole"
        )
    out: NDArray[np.float32] | None = None
    for number, path in frames.items():
        try:
            frame = torch.load(path, map_location="cpu", weights_only=True)
            values = frame.to(torch.float32).numpy()
        except Exception as error:  # whatever unpickling meets: the file is named either way
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path} is not a saved tensor: {reason}") from None
        if values.ndim == 4 and values.shape[3] == 1:
            values = values[..., 0]
        if values.ndim != 3:
            raise DataError(
                f"{path} has shape {values.shape}: a frame is (x, y, z) or (x, y, z, 1)"
            )
        if out is None:
            out = np.empty((*values.shape, len(frames)), np.float32)
        if values.shape != out.shape[:3]:
            raise DataError(f"{path} has shape {values.shape}, frame 0 has {out.shape[:3]}")
        out[..., number] = values
    assert out is not None  # a folder without frames is no run
    return out


def _read_hdf5(path: Path) -> NDArray[np.float32]:
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            data = file[DATASET]
            if data.ndim != 4 or data.dtype.kind not in "fiu" or 0 in data.shape:
                raise DataError(
                    f"{path}: {DATASET} is {data.dtype} {data.shape}, numbers (x, y, z, t) are "
                    f"expected"
                )
            return np.asarray(data[()], dtype=np.float32)
    except (OSError, KeyError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} is damaged: {error}") from None

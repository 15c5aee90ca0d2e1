"""Folders as the Human Connectome Project lays them out.

``<subject>/MNINonLinear/Results/<run>/<run>.nii.gz`` with ``brainmask_fs.2.nii.gz`` and
``Movement_Regressors.txt`` beside it. ``rfMRI_REST1_LR`` becomes task REST1, direction LR. The runs
lie in FSL's MNI space, which BIDS calls MNI152NLin6Asym, in LAS order.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmrizoo.config import PrepareConfig
from fmrizoo.data.bids import LABEL, RunFile
from fmrizoo.errors import DataError
from fmrizoo.types import RunKey

SPACE = "MNI152NLin6Asym"
_RESULTS = Path("MNINonLinear") / "Results"
_RUN = re.compile(r"[rt]fMRI_(?P<task>.+?)(?:_(?P<dir>LR|RL|AP|PA))?")


def is_hcp(source: Path) -> bool:
    """Whether ``source`` is a subject of this layout or a folder of such subjects."""
    return bool(_subjects(source))


def _subjects(source: Path) -> list[Path]:
    if (source / _RESULTS).is_dir():
        return [source]
    return sorted(p.parent.parent for p in source.glob(f"*/{_RESULTS}") if p.is_dir())


def find_hcp_runs(source: Path, config: PrepareConfig) -> list[RunFile]:
    """Every run of every subject; ``prepare.desc=hp2000_clean`` picks ``<run>_hp2000_clean``.

    Raises:
        DataError: another space is asked for, no such files, several masks, an unusable name.
    """
    if config.space not in (SPACE, "native"):
        raise DataError(
            f"{source} is laid out as by the HCP, whose volumes lie in {SPACE}: set "
            f"prepare.space={SPACE} (or native to keep their voxels), not {config.space}"
        )
    ending = "" if config.desc == "preproc" else f"_{config.desc}"
    runs = []
    for subject in _subjects(source):
        for folder in sorted(p for p in (subject / _RESULTS).iterdir() if p.is_dir()):
            path = folder / f"{folder.name}{ending}.nii.gz"
            if path.is_file():
                runs.append(_run(subject, folder, path))
    if not runs:
        raise DataError(
            f"no run in {source}: looked for <subject>/{_RESULTS}/<run>/<run>{ending}.nii.gz "
            f"(prepare.desc={config.desc})"
        )
    return runs


def _run(subject: Path, folder: Path, path: Path) -> RunFile:
    label = subject.resolve().name.removeprefix("sub-")
    if not LABEL.fullmatch(label):
        raise DataError(f"{subject}: {label!r} is no subject label (letters, digits, -, +, .)")
    masks = sorted(folder.glob("brainmask_fs*.nii.gz"))
    if len(masks) > 1:
        listing = ", ".join(mask.name for mask in masks)
        raise DataError(f"{folder} has several masks ({listing}): keep the one of {path.name}")
    motion = folder / "Movement_Regressors.txt"
    named = _RUN.fullmatch(folder.name)
    task = named["task"] if named else folder.name
    direction = named["dir"] if named else None
    return RunFile(
        key=RunKey(
            label,
            task=re.sub(r"[^A-Za-z0-9]", "", task),
            extra=(("dir", direction),) if direction else (),
        ),
        path=path,
        mask=masks[0] if masks else None,
        motion=motion if motion.is_file() else None,
    )


def read_motion(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Translations (mm) and rotations (radians), ``(t, 3)`` each, of Movement_Regressors.txt.

    Its columns: three translations in mm, three rotations in degrees, and their derivatives.

    Raises:
        DataError: not a table of at least six columns of numbers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file, refused below
            values = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a table of numbers: {error}") from None
    if not len(values) or values.shape[1] < 6 or not np.isfinite(values).all():
        raise DataError(
            f"{path} holds {values.shape[0]} × {values.shape[1]} numbers; "
            f"6 or 12 columns of finite ones are expected"
        )
    return values[:, :3], np.deg2rad(values[:, 3:6])

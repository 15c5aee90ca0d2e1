"""Small runs for the data tests: the shipped sample, and NIfTI trees made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nifti_images import image

from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import Store

NATIVE = {"space": "native"}


@pytest.fixture(scope="session")
def sample_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The whole sample, codec int8."""
    out = tmp_path_factory.mktemp("sample") / "store"
    prepare("sample:haxby2001", out, PrepareConfig(**NATIVE))
    return Store(out)


def brain_like(shape: tuple[int, int, int, int], seed: int = 0) -> np.ndarray:
    """int16 values as a scanner gives them, bright in the middle."""
    rng = np.random.default_rng(seed)
    mean = 500 + 1000 * rng.random(shape[:3])
    return np.rint(mean[..., None] * (1 + 0.02 * rng.standard_normal(shape))).astype(np.int16)


@dataclass
class Tree:
    """A BIDS folder to put runs into."""

    root: Path

    def add(
        self,
        subject: str = "01",
        run: str = "1",
        data: np.ndarray | None = None,
        *,
        mask: np.ndarray | bool | None = True,
        sidecar: dict[str, Any] | None = None,
        img: nib.Nifti1Image | None = None,
        events: str | None = None,
    ) -> Path:
        """Write one run (and its mask, sidecar, events); returns the bold file."""
        func = self.root / f"sub-{subject}" / "func"
        func.mkdir(parents=True, exist_ok=True)
        stem = f"sub-{subject}_task-rest_run-{run}"
        if img is None:
            seed = int(subject) * 10 + int(run)
            img = image(brain_like((5, 6, 4, 12), seed) if data is None else data)
        path = func / f"{stem}_bold.nii.gz"
        nib.save(img, path)
        if mask is True:
            mask = np.zeros(img.shape[:3], np.uint8)
            mask[1:-1, 1:, :] = 1
        if mask is not None and mask is not False:
            masks = self.root / "derivatives" / "masks" / f"sub-{subject}" / "func"
            masks.mkdir(parents=True, exist_ok=True)
            nib.save(image(mask, img.affine), masks / f"{stem}_desc-brain_mask.nii.gz")
        if sidecar is None:
            sidecar = {"RepetitionTime": 2.0}
        (func / f"{stem}_bold.json").write_text(json.dumps(sidecar))
        if events is not None:
            (func / f"{stem}_events.tsv").write_text(events)
        return path


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """An empty BIDS folder."""
    return Tree(tmp_path / "bids")


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Store]:
    """``made(source, **settings)`` → the prepared store."""

    def make(source: str | Path, name: str = "store", **settings: Any) -> Store:
        prepare(source, tmp_path / name, PrepareConfig(**{**NATIVE, **settings}))
        return Store(tmp_path / name)

    return make

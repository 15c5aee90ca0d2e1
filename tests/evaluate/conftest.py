"""Two small stores: the shipped Haxby slice (events) and made-up subjects (traits)."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.data.store import Store

SUBJECTS, FRAMES, GRID = 20, 48, (6, 6, 4)


@pytest.fixture(scope="session")
def haxby(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Nine runs of one slice, eight labelled blocks each."""
    out = tmp_path_factory.mktemp("haxby") / "store"
    prepare(
        "sample:haxby2001", out, PrepareConfig(space="native", select={"acquisition": "1slice"})
    )
    return Store(out)


@pytest.fixture(scope="session")
def traits(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Twenty subjects: ``age`` sets one half's mean, ``group`` the coupling of the halves."""
    source = tmp_path_factory.mktemp("traits") / "bids"
    rng = np.random.default_rng(0)
    rows = ["participant_id\tage\tgroup"]
    mask = np.zeros(GRID, bool)
    mask[1:5, 1:5] = True
    for s in range(SUBJECTS):
        age, coupled = float(rng.uniform(20, 80)), s % 2
        rows.append(f"sub-{s:02d}\t{age:.1f}\t{'coupled' if coupled else 'free'}")
        wave = rng.normal(size=(2, FRAMES))
        wave[1] = wave[0] if coupled else wave[1]
        bold = rng.normal(size=(*GRID, FRAMES)) * 2 + 1000
        bold[:3] += 3 * wave[0]
        bold[3:] += 3 * wave[1] + age / 10
        bold[~mask] = 0
        folder = source / f"sub-{s:02d}" / "func"
        folder.mkdir(parents=True)
        stem = folder / f"sub-{s:02d}_task-rest"
        image = nibabel.Nifti1Image(bold.astype(np.float32), np.diag([3.0, 3, 3, 1]))
        image.header.set_xyzt_units("mm", "sec")
        image.header.set_zooms((3, 3, 3, 2))
        nibabel.save(image, f"{stem}_bold.nii.gz")
        Path(f"{stem}_bold.json").write_text(json.dumps({"RepetitionTime": 2.0}))
    (source / "participants.tsv").write_text("\n".join(rows) + "\n")
    description = {"Name": "made up", "BIDSVersion": "1.8.0"}
    (source / "dataset_description.json").write_text(json.dumps(description))
    brain = source.parent / "brain.nii.gz"
    nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), np.diag([3.0, 3, 3, 1])), brain)
    out = source.parent / "store"
    prepare(source, out, PrepareConfig(space="native", mask=str(brain)))
    return Store(out)

"""From a synthetic cohort to maps: attribution and lesions find the networks that were planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from local_backbone import opened, save_atlas
from sklearn.linear_model import LogisticRegression

from fmrizoo.analysis.attribution import voxels_of
from fmrizoo.analysis.attribution_run import Settings, attribute
from fmrizoo.analysis.lesion import lesion_each
from fmrizoo.analysis.tested import TestedRun
from fmrizoo.data.synthetic.config import load_synth_config
from fmrizoo.data.synthetic.write import synthesise
from fmrizoo.zoo import load_recipe

SUBJECTS = 6


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of two conditions, each in a network of its own, the last two of eight."""
    out = tmp_path_factory.mktemp("cohort") / "store"
    settings = [
        "prepare.grid=[16,16,16]", "prepare.voxel_size=[12,12,12]", f"subjects={SUBJECTS}",
        "frames=120", "traits={}", "conditions={face: 3, house: 3}",
    ]  # fmt: skip
    synthesise(out, load_synth_config(None, settings), store=True)
    return out


@pytest.fixture(scope="module")
def probed(cohort: Path) -> TestedRun:
    """A linear probe of voxels, fitted on four subjects, with the clips of the other two."""
    given = [
        f"data.store={cohort}", "data.select={}", "data.clip_frames=6", "task.lag=6",
        "backbone.img_size=[16,16,16,6]", "backbone.patch_size=[4,4,4,1]",
        "backbone.window_size=[2,2,2,4]",
    ]  # fmt: skip
    run = opened(load_recipe("finetune/haxby_slice", given))
    means, seen, subjects = [], [], []
    for compact in run.batches():
        batch = compact.to_batch()
        means.append(batch.bold[0, 0].mean(-1).flatten().double().numpy())
        seen.append(int(compact.samples[0].targets[0]))
        subjects += batch.subject
    names = sorted(set(subjects))
    train = np.isin(subjects, names[:4])
    fitted = LogisticRegression(C=1e-3).fit(np.stack(means)[train], np.array(seen)[train])
    assert fitted.score(np.stack(means)[~train], np.array(seen)[~train]) > 0.8
    project = run.model.head.project
    with torch.no_grad():
        weight = torch.from_numpy(fitted.coef_[0]).float()
        project.weight.copy_(torch.stack([-weight / 2, weight / 2]))  # type: ignore[union-attr, operator]
    kept = [r.name for r in run.table.runs if r.subject in names[4:]]
    held_out = opened(run.recipe, kept)
    return replace(held_out, model=run.model)


@pytest.fixture(scope="module")
def atlas(cohort: Path, probed: TestedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted networks as parcels 1 … 8; what belongs to none is 9."""
    image = nibabel.load(cohort / "networks.nii.gz")
    maps = np.asarray(image.dataobj)  # type: ignore[attr-defined]
    labels = np.where(maps.max(-1) > 300, maps.argmax(-1) + 1, 9)
    affine = probed.table.runs[0].affine
    return save_atlas(tmp_path_factory.mktemp("atlas") / "networks.nii.gz", labels, affine)


@pytest.mark.parametrize("method", ["ig", "occlusion"])
def test_attribution_finds_the_planted_networks(
    method: str, probed: TestedRun, atlas: Path
) -> None:
    settings = Settings(method=method, steps=2, cube=2)
    found = attribute(probed, settings, atlas=atlas, clips=12, sanity_clips=0)
    ranked = [row.label for row in found.parcels]
    assert set(ranked[:2]) == {7, 8}, found.parcels
    assert found.parcels[1].density > 1.5 * found.parcels[2].density
    assert found.subjects == 2 and all(row.mean > 0 for row in found.parcels[:2])


def test_lesions_find_the_planted_networks(probed: TestedRun, atlas: Path) -> None:
    found = lesion_each(probed, atlas=atlas)
    ranked = sorted(found.rows, key=lambda row: row.change)
    assert {row.label for row in ranked[:2]} == {7, 8}
    assert all(row.high is not None and row.high < 0 for row in ranked[:2])
    assert all(abs(row.change) < abs(ranked[1].change) / 2 for row in ranked[2:])
    assert found.intact is not None and found.intact > 0.8
    batch = next(probed.batches()).to_batch()
    assert voxels_of(batch).counts[0] > 500

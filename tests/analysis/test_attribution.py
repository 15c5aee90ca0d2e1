"""Attributions: exact on linear models, complete on every backbone and head, sane, and as files."""

from __future__ import annotations

import builtins
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from local_backbone import opened, probe, save_atlas

from fmrizoo.analysis.attribution import (
    cascade,
    explain,
    model_scores,
    randomised,
    target_value,
    voxels_of,
)
from fmrizoo.analysis.attribution_run import (
    Settings,
    attribute,
    attribute_run,
    rank_correlation,
    write_attribution,
)
from fmrizoo.analysis.tested import TestedRun, thinned
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.store import Store
from fmrizoo.data.targets import fit_tasks
from fmrizoo.errors import DataError, MissingExtraError, RecipeError
from fmrizoo.pipeline import finetune
from fmrizoo.registry import BACKBONES, HEADS
from fmrizoo.types import Batch, TaskSpec
from fmrizoo.zoo import build_downstream, build_encoder, load_recipe

SMALL = {
    "swin4d": ["embed_dim=8", "depths=[2,2]", "num_heads=[1,2]"],
    "swin_factorized": ["embed_dim=12", "depths=[4,4]", "num_heads=[2,2]"],
    "neuromamba": ["embed_dim=16", "depth=2", "d_state=8", "head_dim=8"],
}
SETTINGS = {"complex": ["dim=16", "num_heads=2", "cells=2"], "lora": ["rank=2"]}
KINDS = (
    TaskSpec("classification", ("face", "house", "shoe"), name="seen"),
    TaskSpec("regression", mean=40.0, std=8.0, name="age"),
    TaskSpec("ordinal", ("low", "mid", "high"), name="severity"),
)


def read_map(path: Path) -> Any:
    image = nibabel.load(path)
    return np.asarray(image.dataobj), image.affine  # type: ignore[attr-defined]


@pytest.fixture
def linear(sample_store: Path) -> TestedRun:
    """A probe with weights on a few voxels: of the brain, and outside of it."""
    run = opened(load_recipe("finetune/haxby_slice", [f"data.store={sample_store}"]))
    run = replace(run, table=thinned(run.table, 6))
    weight = run.model.head.project.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return run


def test_a_linear_model_is_explained_by_its_weights(linear: TestedRun) -> None:
    (batch, *_) = (c.to_batch() for c in linear.batches())
    voxels = voxels_of(batch)
    value = target_value(linear.tasks, 0, 2)
    weight = linear.model.head.project.weight.detach().double()  # type: ignore[union-attr]
    own = (weight[2] - (weight.sum(0) - weight[2]) / (len(weight) - 1))[voxels.index]
    for baseline, start in (
        ("background", voxels.background[0].double()),
        ("mean", voxels.values.double().mean(0)),
    ):
        expected = (voxels.values.double() - start) * own / len(voxels.values)
        found = explain(linear.model, batch, value, baseline=baseline, steps=4)
        torch.testing.assert_close(found.values.double(), expected, rtol=1e-3, atol=1e-5)
        assert abs(found.error) < 1e-4
        single = explain(
            linear.model, batch, value, method="occlusion", baseline=baseline, side=(1, 1, 1)
        )
        torch.testing.assert_close(
            single.values.double().sum(0), expected.sum(0), rtol=1e-3, atol=2e-4
        )
        patches = explain(
            linear.model, batch, value, method="occlusion", baseline=baseline, side=(3, 2, 1)
        )
        assert patches.difference == pytest.approx(found.difference, abs=1e-5)
        assert abs(patches.error) < 1e-3, "a linear model's falls add up"
        if baseline == "background":  # a mean over time is not missed by a model of means
            assert len(torch.unique(patches.values[0])) < len(torch.unique(single.values[0]))


def test_a_dense_batch_is_explained_as_the_compact_one(linear: TestedRun) -> None:
    batch = next(linear.batches()).to_batch()
    dense = Batch(
        batch.bold, batch.mask, batch.tr, batch.subject, batch.run, batch.start, batch.target
    )
    assert dense.voxels is None
    value = target_value(linear.tasks, 0, 0)
    a, b = (explain(linear.model, x, value, steps=3) for x in (batch, dense))
    torch.testing.assert_close(a.values, b.values)


PAIRS = [
    pytest.param(name, head, dict(variant), id="-".join([name, head, *map(str, variant.values())]))
    for name, head in itertools.product(BACKBONES.list(), HEADS.list())
    for variant in HEADS[head].factory.variants
]


@pytest.mark.parametrize(("name", "head", "variant"), PAIRS)
def test_every_backbone_with_every_head(
    name: str, head: str, variant: dict[str, Any], sample_store: Path
) -> None:
    given = [f"backbone.{text}" for text in SMALL[name]]
    given += [f"head.{text}" for text in SETTINGS.get(head, [])]
    given += [f"head.{key}={value}" for key, value in variant.items()]
    given += [f"head={head}", "objective=null", f"data.store={sample_store}"]
    recipe = load_recipe(f"pretrain/haxby_{name}_simmim", given)
    store = Store(recipe.data.store)
    table = thinned(ClipTable.windows(store, store.select(recipe.data.select), recipe.data), 1)
    batch = next(Loader(table, recipe.data, 1).epoch()).to_batch()
    torch.manual_seed(0)
    model = build_downstream(build_encoder(recipe), recipe, KINDS).eval()
    for number, method in ((0, "ig"), (1, "ig"), (2, "occlusion")):
        found = explain(
            model, batch, target_value(KINDS, number, 1), method=method, side=(20, 10, 1)
        )
        assert found.values.shape == voxels_of(batch).values.shape
        assert bool((found.values != 0).any())
        if method == "ig":
            assert abs(found.error) < 0.02 * max(abs(found.difference), 1e-3)
    assert not any(p.grad is not None for p in model.parameters()), "nothing is left behind"
    steps = cascade(model, 4)
    named = [n for _, names in steps for n in names]
    assert sorted(named) == sorted(n for n, _ in model.named_parameters()), "each exactly once"
    assert steps[0][0] == "head" and "patch embedding" in steps[-1][0]
    other = randomised(model, named)
    with torch.no_grad():
        before, after = (model_scores(m, batch) for m in (model, other))
    assert bool(torch.isfinite(after).all()) and not torch.equal(before, after)


def test_what_is_explained() -> None:
    scores = torch.tensor([[1.0, 2.0, 6.0, 33.0, *np.log([0.2, 0.3, 0.5]).tolist()]])
    found = [float(target_value(KINDS, k, 1)(scores)) for k in range(3)]
    assert found == pytest.approx([2 - 3.5, 33, 1.3], abs=1e-5)
    with pytest.raises(RecipeError, match="class of 'seen'"):
        target_value(KINDS, 0, None)


def test_maps_lie_in_the_stores_space_and_parcels_add_up(linear: TestedRun, tmp_path: Path) -> None:
    info = linear.table.runs[0]
    labels = np.zeros(info.grid, int)
    labels[:20], labels[20:] = 1, 2
    atlas = save_atlas(tmp_path / "two_dseg.nii.gz", labels, info.affine)
    (tmp_path / "two_dseg.tsv").write_text("index\tname\n1\tleft half\n2\tright half\n")
    weight = linear.model.head.project.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight[:, torch.from_numpy(labels == 2).flatten()] = 0
    found = attribute(linear, Settings(steps=3), atlas=atlas, sanity_clips=2)
    assert found.clips == 6 and found.subjects == 1
    assert found.relative_error is not None and found.relative_error < 1e-3
    assert [p.name for p in found.parcels] == ["left half", "right half"]
    assert found.parcels[0].share == pytest.approx(1) and found.parcels[1].share == 0
    brain = np.isfinite(found.signed)
    assert found.parcels[0].voxels + found.parcels[1].voxels == brain.sum()
    assert (found.absolute[brain] >= np.abs(found.signed[brain]) - 1e-9).all()
    assert found.difference == pytest.approx(np.nansum(found.signed), rel=1e-3)
    write_attribution(tmp_path / "out", found)
    signed, affine = read_map(tmp_path / "out/attribution_signed.nii.gz")
    np.testing.assert_allclose(affine, info.affine, atol=1e-5)
    np.testing.assert_allclose(signed, np.nan_to_num(found.signed), rtol=1e-6)
    own, _ = read_map(tmp_path / "out/subjects/sub-001_attribution_absolute.nii.gz")
    np.testing.assert_allclose(own, np.nan_to_num(found.absolute), rtol=1e-6)
    rows = (tmp_path / "out/parcels.tsv").read_text().splitlines()
    assert rows[0].split("\t")[:2] == ["label", "name"] and rows[1].split("\t")[1] == "left half"
    body = json.loads((tmp_path / "out/attribution.json").read_text())
    assert body["schema"] == "fmrizoo.attribution/1"
    assert body["settings"]["target"] == linear.tasks[0].name
    assert body["randomisation"][0]["down_to"] == "head"


def test_randomising_the_head_changes_a_probes_map(linear: TestedRun) -> None:
    # Few voxels count: absolute maps of random weights are alike where voxels differ in scale.
    weight = linear.model.head.project.weight  # type: ignore[union-attr]
    with torch.no_grad():
        some = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) < 0.1
        weight.mul_(some.float() * 20 + 0.01)
    found = attribute(linear, Settings(steps=3), sanity_clips=3)
    head = found.sanity[0]
    assert head.down_to == "head"
    assert head.signed is not None and abs(head.signed) < 0.3
    assert head.absolute is not None and head.absolute < 0.6
    values = np.arange(10.0)
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, np.ones(10)) is None


@pytest.mark.slow
def test_a_trained_run_is_explained_from_its_folder(
    sample_store: Path, tmp_path: Path, tiny: list[str]
) -> None:
    run = tmp_path / "run"
    finetune(load_recipe("finetune/haxby_slice", [f"data.store={sample_store}", *tiny]), run)
    found = attribute_run(run, Settings(label="face"), clips=3, sanity_clips=0, atlas="cubes:12")
    assert found.clips == 3 and found.sanity == () and 4 < len(found.parcels) <= 12
    assert found.relative_error is not None and found.relative_error < 0.01
    for wrong, said in (
        (Settings(label="fase"), "class 'fase'"),
        (Settings(target="other"), "target 'other'"),
        (Settings(method="gi"), "method='gi'"),
        (Settings(baseline="zero"), "baseline='zero'"),
    ):
        with pytest.raises(RecipeError, match=said):
            attribute_run(run, wrong, clips=1, sanity_clips=0)
    labels = np.zeros((40, 20, 1), int)
    labels[5:30, 5:15] = 4
    atlas = save_atlas(tmp_path / "a.nii", labels, found.affine)
    (tmp_path / "a.tsv").write_text("number\tname\n4\tfour\n")
    with pytest.raises(DataError, match=r"a\.tsv: columns index and name needed"):
        attribute_run(run, Settings(), clips=1, atlas=atlas)
    labels[labels == 4], labels[0, 0] = 0, 4
    outside = save_atlas(tmp_path / "b.nii", labels, found.affine)
    with pytest.raises(DataError, match="no parcel within the brain"):
        attribute_run(run, Settings(), clips=1, atlas=outside)
    with pytest.raises(DataError, match="cubes:N takes a positive number"):
        attribute_run(run, Settings(), clips=1, atlas="cubes:0")
    with pytest.raises(RecipeError, match="part='tests'"):
        attribute_run(run, Settings(), part="tests")


def test_without_captum_occlusion_is_named(
    linear: TestedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("captum"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"fmrizoo\[understand\].*--method occlusion"):
        attribute(linear, Settings(), clips=1, sanity_clips=0)


def test_runs_that_lie_elsewhere_share_no_map(linear: TestedRun) -> None:
    first, *rest = linear.table.runs
    moved = replace(first, affine=[[*row[:3], row[3] + 9] for row in first.affine])
    table = replace(linear.table, runs=(moved, *rest))
    with pytest.raises(DataError, match="lie in different places"):
        attribute(replace(linear, table=table), Settings(), clips=1)


def test_a_probe_without_weights_attributes_nothing(linear: TestedRun) -> None:
    tasks = fit_tasks(linear.table, linear.recipe.task)
    blank = replace(linear, model=probe(linear.table, tasks))
    found = attribute(blank, Settings(steps=2), clips=1, sanity_clips=0)
    assert np.nanmax(found.absolute) == 0 and found.relative_error is None

"""``fmrizoo analyze autocorrelation``: held-out runs of a trained run, and its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmrizoo.analysis import dynamics
from fmrizoo.analysis.autocorrelation import Artefact, Autocorrelation
from fmrizoo.analysis.dynamics import analyze_run, read_analysis, write_analysis
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.splits import Split
from fmrizoo.data.store import Store
from fmrizoo.errors import CheckpointError, DataError
from fmrizoo.pipeline import pretrain
from fmrizoo.zoo import load_recipe

FOUND = Autocorrelation(
    backbone="swin4d",
    window=4,
    slots=10,
    slot_seconds=1.6,
    data=(0.5, 0.25, 0.1, 0.0, -0.1),
    embeddings=(0.6, 0.3, 0.1, 0.2, 0.0),
    artefacts=(Artefact(4, 0.11, 0.05, 0.2),),
    clips=7,
    runs=3,
    drawn="clip",
)


@pytest.fixture(scope="module")
def trained(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretraining of the sample's slice, clips of 20 frames."""
    given = [
        f"data.store={sample_store}",
        "data.clip_frames=20",
        "data.clip_stride=1.0",
        "backbone.img_size=[40,20,1,20]",
        "backbone.embed_dim=8",
        "backbone.num_heads=[1,2]",
        "train.steps=1",
        "train.batch_size=2",
    ]
    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(load_recipe("pretrain/haxby_slice", given), out)
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_trained_run_is_measured_on_its_held_out_runs(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[ClipTable] = []
    spread = dynamics._spread
    monkeypatch.setattr(dynamics, "_spread", lambda t, n: (tables.append(t), spread(t, n))[1])
    found = analyze_run(run, clips=5)
    (table,) = tables
    split = Split.load(run / "split.json")
    names = {r.name for r in table.runs}
    assert names == set(split.validation) and not names & {*split.train, *split.test}
    assert (np.diff(table.start)[np.diff(table.run) == 0] == 20).all(), "clips do not overlap"
    assert found.clips == 5 < len(table) and found.runs == len(names)
    assert (found.backbone, found.window, found.slots) == ("swin4d", 4, 20)
    assert found.slot_seconds == 2.5 and len(found.data) == 10
    assert read_analysis(run / "analysis.json") == found
    assert found == analyze_run(run, clips=5), "nothing is left to chance"
    assert [a.period for a in found.artefacts] == [4]


def test_without_validation_the_test_runs_are_taken(run: Path) -> None:
    split = Split.load(run / "split.json")
    Split([*split.train, *split.validation], [], split.test, split.config).save(run / "split.json")
    store = Store(load_recipe(run / "recipe.yaml").data.store)
    assert [r.name for r in dynamics._held_out(run, store)] == split.test
    Split(split.train, [], [], split.config).save(run / "split.json")
    with pytest.raises(DataError, match="holds no run out of the training"):
        analyze_run(run)


def test_other_data_than_the_model_expects_are_refused(run: Path) -> None:
    path = run / "recipe.yaml"
    path.write_text(path.read_text().replace("normalization: voxel", "normalization: minmax"))
    with pytest.raises(CheckpointError, match=r"preprocessed in another way .* normalization"):
        analyze_run(run)
    assert not (run / "analysis.json").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no exported model"):
        analyze_run(tmp_path)
    with pytest.raises(DataError, match="at least one clip"):
        analyze_run(tmp_path, clips=0)


def test_models_of_any_length_take_the_shortest_runs_length(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmrizoo.zoo import load

    recipe = load_recipe(run / "recipe.yaml")
    backbone = load(run).backbone
    monkeypatch.setattr(type(backbone), "any_length", True)
    for frames, stride, expected in ((None, 1, 121), (50, 1, 50), (900, 1, 121), (50, 3, 17)):
        recipe.data.frame_stride = stride
        assert dynamics._table(run, recipe, backbone, frames).clip_frames == expected
    monkeypatch.setattr(backbone, "patch_size", (5, 5, 1, 2))
    recipe.data.frame_stride = 1
    assert dynamics._table(run, recipe, backbone, None).clip_frames == 120
    with pytest.raises(DataError, match="1 frames are less than one patch of 2"):
        dynamics._table(run, recipe, backbone, 1)


def test_files_come_back_and_bad_ones_are_refused(tmp_path: Path) -> None:
    path = write_analysis(tmp_path / "new", FOUND)
    assert read_analysis(path) == FOUND
    good = json.loads(path.read_text())
    spoils: list[dict[str, Any]] = [
        {"schema": "other/1"},
        {"autocorrelation": {**good["autocorrelation"], "more": 1}},
        {"autocorrelation": {**good["autocorrelation"], "data": [0.1]}},
        {"autocorrelation": {**good["autocorrelation"], "data": [], "embeddings": []}},
        {"autocorrelation": {**good["autocorrelation"], "slots": "many"}},
        {"autocorrelation": {**good["autocorrelation"], "artefacts": [{"period": 4}]}},
        {"autocorrelation": None},
    ]
    for spoil in spoils:
        path.write_text(json.dumps(good | spoil))
        with pytest.raises(DataError, match=r"analysis\.json"):
            read_analysis(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="is not an analysis of fmrizoo"):
        read_analysis(path)

"""Embeddings are the pooled features, with the names of what they are of."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmrizoo
from fmrizoo.config import DataConfig, SplitConfig, TaskConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.splits import make_split
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import CheckpointError, DataError, RecipeError
from fmrizoo.evaluate.atlas import Atlas
from fmrizoo.evaluate.derivatives import name_faults
from fmrizoo.evaluate.embed import POOLS, ClipEmbedder, embed
from fmrizoo.evaluate.embeddings import EmbeddingRow, Embeddings
from fmrizoo.model import DownstreamModel, PretrainingModel
from fmrizoo.trainer.export import ModelInfo, save_model
from fmrizoo.types import Backbone, Batch, Features, TaskSpec

DATA = DataConfig(clip_frames=8)
CLIP = [8, 6, 4, 8]  # the store's 6 × 6 × 4, padded by the encoder
ENCODERS: dict[str, dict[str, Any]] = {
    "swin4d": {
        "img_size": CLIP,
        "patch_size": [2, 2, 2, 2],
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": [2, 2, 2, 2],
    },
    "swin_factorized": {
        "img_size": CLIP,
        "patch_size": [2, 2, 2, 2],
        "embed_dim": 12,
        "depths": [4, 4],
        "num_heads": [2, 2],
        "window_size": [2, 2, 2],
        "temporal_window": 2,
    },
    "neuromamba": {
        "img_size": CLIP,
        "patch_size": [2, 2, 2, 2],
        "embed_dim": 16,
        "depth": 2,
        "d_state": 8,
        "head_dim": 8,
    },
}
every_encoder = pytest.mark.parametrize("name", ENCODERS)


def encoder(name: str = "swin4d", seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return fmrizoo.create_backbone(name, **ENCODERS[name]).eval()


def windows(store: Store, runs: int = 3, **settings: Any) -> ClipTable:
    return ClipTable.windows(store, store.runs[:runs], replace(DATA, **settings))


def first_batch(store: Store, clips: int = 3) -> Batch:
    return next(Loader(windows(store), DATA, clips).epoch()).to_batch()


def labels_of(store: Store) -> np.ndarray:
    """Five parcels that share cells; one lies outside of the brain; some voxels in none."""
    labels = np.random.default_rng(0).integers(0, 4, store.runs[0].grid)
    labels[0] = 9
    labels[-1, -1] = 0
    return labels


@every_encoder
@pytest.mark.parametrize("stage", [0, -1])
def test_pooling_against_loops(name: str, stage: int, traits: Store) -> None:
    backbone, batch = encoder(name), first_batch(traits)
    labels = labels_of(traits)
    with torch.no_grad():
        features = backbone.encode_stages(backbone.read(batch), (stage,))[0]
    cells = [c // f for c, f in zip(backbone.clip_grid, features.grid, strict=True)]
    found = {
        pool: ClipEmbedder(
            backbone, pool=pool, stage=stage, atlas=labels if pool == "parcel" else None
        )(batch)
        for pool in POOLS
    }
    t, d = features.grid.t, backbone.stage_features[stage]
    assert found["frame"].shape == (3, t, d)
    assert found["space"].shape == (3, *features.grid[:3], d)
    assert found["parcel"].shape == (3, 4, d)
    for clip in range(3):
        tokens = list(zip(*_tokens(features, clip), strict=True))
        values = torch.stack([v for v, *_ in tokens])
        torch.testing.assert_close(found["mean"][clip], values.mean(0), atol=1e-5, rtol=1e-5)
        brain = torch.stack([share for _, _, share in tokens])[:, None]
        weighted = (values * brain).sum(0) / brain.sum()
        torch.testing.assert_close(found["brain"][clip], weighted, atol=1e-5, rtol=1e-5)
        for slot in range(t):
            own = [v for v, place, _ in tokens if place[3] == slot]
            expected = torch.stack(own).mean(0) if own else torch.zeros(d)
            torch.testing.assert_close(found["frame"][clip, slot], expected, atol=1e-5, rtol=1e-5)
        place = {tuple(place): v for v, place, _ in tokens}
        some = (0, 1, 0)
        over_time = [place.get((*some, slot), torch.zeros(d)) for slot in range(t)]
        expected = torch.stack(over_time).mean(0)
        torch.testing.assert_close(found["space"][clip][some], expected, atol=1e-5, rtol=1e-5)
        for row, label in enumerate((1, 2, 3, 9)):
            own = [
                place[cell]
                for voxel in np.argwhere(labels == label)
                for slot in range(t)
                if (cell := (*(int(v) // c for v, c in zip(voxel, cells[:3], strict=True)), slot))
                in place
            ]
            expected = torch.stack(own).mean(0) if own else torch.full((d,), torch.nan)
            torch.testing.assert_close(
                found["parcel"][clip, row], expected, atol=1e-5, rtol=1e-5, equal_nan=True
            )


def _tokens(features: Features, clip: int) -> tuple[list[Tensor], list[list[int]], list[Tensor]]:
    """Values, places and brain shares of a clip's valid tokens."""
    kept = features.valid.expand(len(features.values), -1)[clip].nonzero()[:, 0].tolist()
    index = features.index.expand(len(features.values), -1, -1)[clip]
    brain = features.brain.expand(len(features.values), -1)[clip]
    values = [features.values[clip, i] for i in kept]
    return values, [index[i].tolist() for i in kept], [brain[i] for i in kept]


@every_encoder
@pytest.mark.parametrize("stage", [0, 1])
def test_cells_lie_where_parcels_take_them_to_lie(name: str, stage: int) -> None:
    # What a cell says of its brain must be what its voxels are.
    backbone = encoder(name)
    mask = torch.rand(1, *CLIP[:3], generator=torch.Generator().manual_seed(0)) > 0.4
    bold = torch.randn(1, 1, *CLIP) * mask[:, None, ..., None]
    with torch.no_grad():
        features = backbone.encode_stages(backbone.tokenize(bold, mask), (stage,))[0]
    sx, sy, sz, _ = (c // f for c, f in zip(backbone.clip_grid, features.grid, strict=True))
    for value, place, share in zip(*_tokens(features, 0), strict=True):
        x, y, z, _ = place
        inside = mask[0, x * sx : (x + 1) * sx, y * sy : (y + 1) * sy, z * sz : (z + 1) * sz]
        whole = torch.zeros(sx, sy, sz)
        whole[tuple(slice(0, n) for n in inside.shape)] = inside.float()
        assert share == pytest.approx(whole.mean().item(), abs=1e-6), (place, value.shape)


def test_clips_runs_and_subjects(traits: Store) -> None:
    table = windows(traits, clip_stride=0.5)
    twice = replace(table, runs=(*table.runs[:2], _other_run(table.runs[0])))
    embedder = ClipEmbedder(encoder())
    clips = embedder.embed_table(twice, DATA, batch_size=4)
    assert clips.values.shape == (33, 16) and clips.values.dtype == np.float32
    assert clips.rows[1] == EmbeddingRow("sub-00_task-rest#frame-0004", "00", "sub-00_task-rest", 4)
    assert clips.rows[-1].run == "sub-00_task-rest_run-2"
    runs = embedder.embed_table(twice, DATA, level="run")
    assert [r.unit for r in runs.rows] == [
        "sub-00_task-rest",
        "sub-01_task-rest",
        "sub-00_task-rest_run-2",
    ]
    assert {(r.start, r.n_clips) for r in runs.rows} == {(None, 11)}
    expected = clips.values.reshape(3, 11, -1).mean(1)
    np.testing.assert_allclose(runs.values, expected, atol=1e-6)
    subjects = embedder.embed_table(twice, DATA, level="subject")
    both = "sub-00_task-rest;sub-00_task-rest_run-2"
    assert subjects.rows == (
        EmbeddingRow("sub-00", "00", both, None, 22),
        EmbeddingRow("sub-01", "01", "sub-01_task-rest", None, 11),
    )
    np.testing.assert_allclose(subjects.values[0], expected[[0, 2]].mean(0), atol=1e-6)
    assert subjects.about["level"] == "subject" and subjects.about["clip_frames"] == 8


def _other_run(info: RunInfo) -> RunInfo:
    """The same recording under another name: a second run of the subject."""

    return replace(info, name=f"{info.name}_run-2")


@pytest.fixture(autouse=True)
def open_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store opens a run that :func:`_other_run` renamed."""
    original = Store.open

    def open_run(self: Store, run: RunInfo | str) -> Any:
        name = run if isinstance(run, str) else run.name
        return original(self, name.removesuffix("_run-2"))

    monkeypatch.setattr(Store, "open", open_run)


def test_batch_size_changes_nothing(traits: Store) -> None:
    table = windows(traits)
    for pool in ("mean", "frame"):
        embedder = ClipEmbedder(encoder(), pool=pool)
        one, many = (embedder.embed_table(table, DATA, batch_size=n) for n in (1, 7))
        np.testing.assert_allclose(one.values, many.values, atol=1e-6)
        assert one.rows == many.rows
    assert one.values.shape == (18, 4, 16)  # 8 frames in patches of 2


def test_events_keep_their_names(haxby: Store) -> None:
    data = DataConfig(clip_frames=9)
    table = ClipTable.labelled(haxby, haxby.runs[:1], data, TaskConfig())
    backbone = fmrizoo.create_backbone(
        "swin4d",
        img_size=[40, 20, 1, 9],
        patch_size=[5, 5, 1, 3],
        embed_dim=8,
        depths=[1],
        num_heads=[1],
    )
    found = ClipEmbedder(backbone).embed_table(table, data)
    assert [r.unit for r in found.rows] == list(table.units or ())
    assert [r.start for r in found.rows] == table.start.tolist()


def test_the_mode_is_eval_and_nothing_keeps_a_graph(traits: Store) -> None:
    backbone = encoder().train()
    values = ClipEmbedder(backbone)(first_batch(traits))
    assert not backbone.training and not values.requires_grad


@pytest.mark.parametrize("head", ["prompt", "lora"])
def test_what_a_head_put_into_the_encoder_acts(head: str, traits: Store) -> None:
    torch.manual_seed(0)
    section = {"name": "swin4d", **ENCODERS["swin4d"]}
    task = TaskSpec("classification", ("a", "b"))
    model = fmrizoo.build(backbone=section, head=head, task=task)
    assert isinstance(model, DownstreamModel)
    batch = first_batch(traits)
    before = ClipEmbedder(model)(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    after = ClipEmbedder(model)(batch)
    assert not torch.allclose(before, after, atol=1e-3)
    expected = model.encode(batch)[-1].pooled("mean")
    torch.testing.assert_close(after, expected.detach(), atol=1e-6, rtol=1e-6)


def test_a_model_that_diverged_is_refused(traits: Store) -> None:
    backbone = encoder()
    with torch.no_grad():
        next(backbone.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="NaN or infinite: its training diverged"):
        ClipEmbedder(backbone)(first_batch(traits))


# --- atlas ----------------------------------------------------------------------------------------


def write_atlas(path: Path, labels: np.ndarray, affine: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.int16), affine), path)
    return path


def test_parcels_from_a_file_are_those_of_the_array(traits: Store, tmp_path: Path) -> None:
    labels = labels_of(traits)
    path = write_atlas(tmp_path / "a.nii.gz", labels, np.array(traits.runs[0].affine))
    table = windows(traits)
    found = [
        ClipEmbedder(encoder(), pool="parcel", atlas=atlas).embed_table(table, DATA, level="run")
        for atlas in (path, labels, torch.from_numpy(labels), Atlas.of(labels))
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].values, other.values)
    assert found[0].values.shape == (3, 4, 16)
    assert found[0].about["parcels"] == [1, 2, 3, 9]


def test_parcels_without_brain_are_nan_and_said(
    traits: Store, caplog: pytest.LogCaptureFixture
) -> None:
    # NeuroMamba has no tokens outside the brain; the slice x = 0 lies outside.
    labels = np.ones(traits.runs[0].grid, np.int64)
    labels[:2, :2] = 5
    labels[:, 0] = 0
    backbone = fmrizoo.create_backbone(
        "neuromamba", **{**ENCODERS["neuromamba"], "patch_size": [1, 1, 2, 2]}
    )
    labels[0], labels[1] = 7, 1
    found = ClipEmbedder(backbone, pool="parcel", atlas=labels).embed_table(windows(traits), DATA)
    assert found.about["parcels"] == [1, 7]
    assert np.isfinite(found.values[:, 0]).all() and np.isnan(found.values[:, 1]).all()
    assert "1 of 2 parcels lie outside the brain of some rows, where they are NaN: 7" in caplog.text


def test_atlases_that_do_not_fit_are_refused(traits: Store, tmp_path: Path) -> None:
    labels, affine = labels_of(traits), np.array(traits.runs[0].affine)
    moved = affine.copy()
    moved[0, 3] += 3.0  # one voxel
    flipped = affine.copy()
    flipped[0, 0] *= -1

    def run(atlas: Any) -> None:
        ClipEmbedder(encoder(), pool="parcel", atlas=atlas).embed_table(windows(traits), DATA)

    for name, wrong in (("moved", moved), ("flipped", flipped)):
        path = write_atlas(tmp_path / f"{name}.nii", labels, wrong)
        with pytest.raises(DataError, match=rf"{name}\.nii do not lie where those of run sub-00"):
            run(path)
    with pytest.raises(DataError, match=r"has 5×6×4 voxels, run sub-00_task-rest 6×6×4: resample"):
        run(labels[1:])
    with pytest.raises(DataError, match=r"one volume \(x, y, z\), got shape \(6, 6\)"):
        run(labels[..., 0])
    with pytest.raises(DataError, match="must hold whole numbers"):
        run(labels + 0.5)
    with pytest.raises(DataError, match="must hold whole numbers"):
        run(np.full(labels.shape, np.nan))
    with pytest.raises(DataError, match="holds no parcel"):
        run(labels * 0)
    (tmp_path / "text.nii").write_text("no image")
    with pytest.raises(DataError, match="cannot be read as NIfTI"):
        run(tmp_path / "text.nii")
    with pytest.raises(DataError, match="cannot be read as NIfTI"):
        run(tmp_path / "absent.nii")
    with pytest.raises(DataError, match=r"the clips have \(6, 6, 4\)"):
        ClipEmbedder(encoder(), pool="parcel", atlas=labels[1:])(first_batch(traits))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pool": "means"}, "pool='means' is not known. Did you mean 'mean'"),
        ({"pool": "parcel"}, "pool=parcel needs a file of parcels"),
        ({"atlas": np.ones((6, 6, 4), int)}, "pool=mean makes no use of parcels"),
        ({"stage": 2}, r"stages \[2\] do not exist: the backbone has 2"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ClipEmbedder(encoder(), **settings)


def test_other_bad_input_is_refused(traits: Store) -> None:
    with pytest.raises(RecipeError, match="Linear is neither a backbone nor a model with one"):
        ClipEmbedder(nn.Linear(2, 2))
    with pytest.raises(RecipeError, match="level='subjects' is not known"):
        ClipEmbedder(encoder()).embed_table(windows(traits), DATA, level="subjects")


# --- files ----------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    values[1, 2] = np.nan
    rows = (EmbeddingRow("a#frame-0007", "a", "r", 7), EmbeddingRow("sub-ä", "ä", "r;s", None, 12))
    Embeddings(values, rows, {"pool": "parcel", "parcels": [1, 2, 9]}).save(tmp_path / "e.npz")
    found = Embeddings.read(tmp_path / "e.npz")
    np.testing.assert_array_equal(found.values, values)
    assert found.rows == rows and found.about == {"pool": "parcel", "parcels": [1, 2, 9]}
    with np.load(tmp_path / "e.npz") as plain:  # without fmrizoo
        assert plain["unit"].tolist() == ["a#frame-0007", "sub-ä"]
        assert plain["start"].tolist() == [7, -1] and plain["n_clips"].tolist() == [1, 12]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    rows = tuple(EmbeddingRow(f"u{i}", "a", "r", i) for i in range(50))
    path = tmp_path / "e.npz"
    Embeddings(values, rows).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="no file of embeddings, or damaged"):
        Embeddings.read(path)
    np.savez(path, values=values)
    with pytest.raises(DataError, match="no file of embeddings, or damaged"):
        Embeddings.read(path)
    path.write_bytes(b"text")
    with pytest.raises(DataError, match="no file of embeddings, or damaged"):
        Embeddings.read(path)
    with pytest.raises(DataError, match="cannot be read"):
        Embeddings.read(tmp_path / "absent.npz")
    with pytest.raises(DataError, match=r"name it \.npz, not e\.csv"):
        Embeddings(values, rows).save(tmp_path / "e.csv")
    with pytest.raises(DataError, match="do not fit 49 rows"):
        Embeddings(values, rows[1:])


# --- from a folder --------------------------------------------------------------------------------


@pytest.fixture
def run(traits: Store, tmp_path: Path) -> Path:
    """A run folder with a pretrained model, its split and contract."""
    torch.manual_seed(1)
    recipe = {
        "backbone": {"name": "swin4d", **ENCODERS["swin4d"]},
        "objective": {"name": "simmim"},
        "data": {"store": str(traits.path), "clip_frames": 8},
    }
    model = fmrizoo.build(recipe)
    assert isinstance(model, PretrainingModel)
    contract = windows(traits).contract("znorm_minback")
    info = ModelInfo(recipe=recipe, contract=contract, seen_runs=(traits.runs[0].name,))
    save_model(tmp_path / "run" / "model", model, info)
    split = make_split(traits, traits.runs, SplitConfig(by="subject", folds=5, validation=0.2))
    split.save(tmp_path / "run" / "split.json")
    return tmp_path / "run"


def test_one_call(run: Path, traits: Store, tmp_path: Path) -> None:
    found = embed(run, tmp_path / "e.npz", level="subject", part="test", device="cpu")
    assert len(found.rows) == 4 and found.values.shape == (4, 16)
    read = Embeddings.read(tmp_path / "e.npz")
    np.testing.assert_array_equal(read.values, found.values)
    assert read.rows == found.rows and read.about == found.about
    model = fmrizoo.load(run)
    runs = [traits[r.run] for r in found.rows]
    again = ClipEmbedder(model).embed_store(traits, DATA, runs, level="subject")
    np.testing.assert_allclose(again.values, found.values, atol=1e-6)
    assert len(read.about["weights_sha256"]) == 64
    # Everything can be said otherwise.
    other = embed(
        run / "model",
        tmp_path / "o.npz",
        store=traits.path,
        select={"subject": "03"},
        clip_stride=0.5,
        stage=0,
        pool="frame",
        device="cpu",
    )
    assert other.values.shape == (11, 4, 8) and other.about["clip_stride"] == 0.5


def test_derivatives_hold_what_the_archive_does(run: Path, tmp_path: Path) -> None:
    found = embed(
        run, tmp_path / "e.npz", bids=tmp_path / "bids", level="run", part="test", device="cpu"
    )
    assert name_faults(tmp_path / "bids") == []
    read = Embeddings.read(tmp_path / "e.npz")
    for row, value in zip(read.rows, read.values, strict=True):
        stem = f"sub-{row.subject}_task-rest_desc-swin4dSimmimMean_embedding"
        path = tmp_path / "bids" / f"sub-{row.subject}" / "func" / f"{stem}.tsv"
        cells = path.read_text().splitlines()[1].split("\t")
        assert cells[:3] == [row.unit, "n/a", str(row.n_clips)]
        np.testing.assert_array_equal(np.array(cells[3:], np.float32), value)
        said = json.loads(path.with_suffix(".json").read_text())
        assert said["WeightsSHA256"] == found.about["weights_sha256"]
        assert said["Contract"] == found.about["contract"]


def test_data_of_another_preprocessing_are_refused(run: Path, traits: Store) -> None:
    embedder = ClipEmbedder(run)
    with pytest.raises(CheckpointError, match="normalization: expected znorm_minback, found voxel"):
        embedder.embed_store(traits, replace(DATA, normalization="voxel"), traits.runs[:1])
    contract = windows(traits).contract("znorm_minback")
    given = ClipEmbedder(encoder(), contract=replace(contract, tr=0.8))
    with pytest.raises(CheckpointError, match=r"model in memory was trained .*tr: expected 0\.8"):
        given.embed_store(traits, DATA, traits.runs[:1])


def test_bad_arguments_of_one_call(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    for settings, said in (
        ({"part": "tests"}, "part='tests' is not known. Did you mean 'test'"),
        ({"part": "test", "select": {"subject": "00"}}, "no chosen run is in the test part"),
        ({"select": {"subject": "99"}}, "no run of .* matches"),
        ({"batch_size": 0}, "clips at a time must be ≥ 1, got 0"),
        ({"store": tmp_path / "nothing"}, "is not a store"),
        ({"atlas": tmp_path / "a.nii", "pool": "parcel"}, "cannot be read as NIfTI"),
    ):
        with pytest.raises((DataError, RecipeError), match=said):
            embed(run, out, device="cpu", **settings)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="holds no exported model"):
        embed(tmp_path, out)
    with pytest.raises(DataError, match=r"name it \.npz"):
        embed(run, tmp_path / "e.txt")
    with pytest.raises(DataError, match="nothing to write: give a file"):
        embed(run, None)
    assert not out.exists()
    assert list(itertools.islice(tmp_path.glob("*.npz"), 1)) == []

"""`fmrizoo forecast`: files in the unit of the data, the right frames, and bad input."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fmrizoo import pipeline
from fmrizoo.cli import app
from fmrizoo.config import NORMALIZATIONS
from fmrizoo.data.splits import Split
from fmrizoo.data.store import Store
from fmrizoo.errors import CheckpointError, DataError, RecipeError
from fmrizoo.forecast import Forecast, write_forecast
from fmrizoo.objectives import Autoregressive
from fmrizoo.trainer.export import read_model, save_model
from fmrizoo.types import Backbone, Batch
from fmrizoo.zoo import load_recipe

SMALL = [
    "backbone.embed_dim=8",
    "backbone.num_heads=[1,2]",
    "backbone.depths=[1,1]",
    "train.steps=2",
    "train.batch_size=4",
]


def pretrained(store: Path, out: Path, *more: str) -> Path:
    given = [f"data.store={store}", *SMALL, *more]
    pipeline.pretrain(load_recipe("pretrain/haxby_slice", given), out)
    return out


@pytest.fixture(scope="module")
def run(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A next-slot model of the sample's one-slice runs, 8 frames a clip."""
    out = tmp_path_factory.mktemp("runs") / "ar"
    return pretrained(sample_store, out, "objective=autoregressive")


@pytest.fixture(scope="module")
def simmim(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(sample_store, tmp_path_factory.mktemp("runs") / "simmim")


def test_a_pretraining_leaves_one_forecast_of_a_held_out_clip(
    run: Path, sample_store: Path
) -> None:
    (name,) = Split.load(run / "split.json").validation
    reader = Store(sample_store).open(name)
    with np.load(run / "forecast.npz") as found:
        assert str(found["run"]) == name
        for key in ("context", "truth", "predicted"):
            assert found[key].shape == (40, 20, 1, 8) and found[key].dtype == np.float32
        assert (found["mask"] == reader.mask).all()
        assert found["voxel_size"].tolist() == [3.1, 3.75, 3.75] and found["tr"] == 2.5
        frames = reader.read(0, 16)[reader.mask]
        mean, std = reader.decoder.mean[:, None], reader.decoder.std[:, None]
        recorded = np.concatenate([found["context"], found["truth"]], -1)[reader.mask]
        # The recipe scales each voxel; of stored bytes.
        np.testing.assert_allclose(recorded, (frames - mean) / std, atol=1e-4)
        assert (found["predicted"][~reader.mask] == 0).all()
        assert found["predicted"][reader.mask].std() > 0


def test_a_finished_pretraining_keeps_its_forecast(run: Path, sample_store: Path) -> None:
    before = (run / "forecast.npz").stat()
    pretrained(sample_store, run, "objective=autoregressive")
    after = (run / "forecast.npz").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_other_objectives_leave_none(simmim: Path) -> None:
    assert not (simmim / "forecast.npz").exists() and (simmim / "reconstruction.npz").is_file()
    with np.load(simmim / "reconstruction.npz") as found:
        assert found["step"] == 0


def test_the_picture_of_a_forecaster_is_one_step_ahead(run: Path) -> None:
    with np.load(run / "reconstruction.npz") as found:
        assert found["step"] == 1
        assert not found["masked"][..., 0].any() and found["masked"][..., 1:].all()


# --- the file ------------------------------------------------------------------------------------


def copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast that repeats the clip's last frame, in the model's units."""

    def forecast(_: Autoregressive, backbone: Backbone, batch: Batch, frames: int) -> torch.Tensor:
        assert batch.voxels is not None
        kept = batch.voxels.values[-1:].expand(frames, -1)
        grid = batch.grid._replace(t=frames)
        return replace(batch.voxels, values=kept, grid=grid).dense()[:, 0]

    monkeypatch.setattr(Autoregressive, "forecast", forecast)


@pytest.mark.parametrize("name", ["f.nii.gz", "deep/er/f.nii"])
def test_the_image_lies_where_the_run_does(
    run: Path, sample_store: Path, tmp_path: Path, name: str
) -> None:
    done = write_forecast(run, tmp_path / name, frames=5)
    split = Split.load(run / "split.json")
    info = Store(sample_store)[split.test[0]]
    assert (done.run, done.first, done.frames, done.seconds) == (info.name, 8, 5, 2.5)
    image = nib.load(tmp_path / name)
    assert image.shape == (40, 20, 1, 5) and image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.affine, info.affine, atol=1e-5)
    assert image.header.get_zooms() == pytest.approx((3.1, 3.75, 3.75, 2.5))
    assert image.header.get_xyzt_units() == ("mm", "sec")
    assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)
    assert {p.name for p in (tmp_path / name).parent.iterdir()} == {Path(name).name, "f.json"}


@pytest.mark.parametrize("mode", NORMALIZATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_values_come_back_in_the_unit_of_the_data(
    run: Path,
    sample_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    stride: int,
) -> None:
    """A forecast that copies a frame writes that frame: to 1e-4 of the largest value (float32)."""
    copying(monkeypatch)
    other = as_if_trained_with(mode, run, tmp_path)
    chosen = Split.load(run / "split.json").train[1]
    given = {"run": chosen, "start": 3, "overrides": [f"data.frame_stride={stride}"]}
    given["overrides"].append(f"data.normalization={mode}")
    done = write_forecast(other, tmp_path / "f.nii", frames=4, **given)
    reader = Store(sample_store).open(chosen)
    last = 3 + 7 * stride
    recorded = reader.read(0, reader.n_frames)
    expected = np.repeat(recorded[..., last : last + 1], 4, -1)
    found = nib.load(tmp_path / "f.nii").get_fdata()
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())
    assert (found[~reader.mask] == 0).all()
    assert (done.first, done.seconds, done.recorded) == (last + stride, 2.5 * stride, 4)
    after = recorded[reader.mask][:, last + stride : last + 5 * stride : stride]
    error = np.abs(after - recorded[reader.mask][:, last : last + 1]).mean()
    assert done.persistence == pytest.approx(error, rel=1e-5)
    assert done.error == pytest.approx(error, rel=1e-3)


def as_if_trained_with(mode: str, run: Path, tmp_path: Path) -> Path:
    """The same model, whose contract names another normalisation."""
    from fmrizoo.data.normalize import loaded_contract

    other = shutil.copytree(run, tmp_path / "other")
    weights, info = read_model(run / "model")
    assert info.contract is not None
    changed = replace(info, contract=loaded_contract(info.contract, mode))
    save_model(other / "model", weights, changed)
    return other


def test_the_sidecar_says_what_was_done(run: Path, tmp_path: Path) -> None:
    done = write_forecast(run, tmp_path / "f.nii.gz", frames=3)
    said = json.loads((tmp_path / "f.json").read_text())
    _, info = read_model(run / "model")
    assert said["RepetitionTime"] == 2.5 and said["TaskName"] == "objects"
    assert said["Sources"] == [done.run] and said["SeenInTraining"] is False
    assert said["Model"]["SHA256"] == info.sha256
    assert said["Model"]["Objective"] == "autoregressive"
    assert (said["ContextStartFrame"], said["ContextFrames"], said["FirstFrame"]) == (0, 8, 8)
    assert said["MeanAbsoluteError"] == done.error and said["RecordedFrames"] == 3
    seen = Split.load(run / "split.json").train[0]
    write_forecast(run, tmp_path / "g.nii.gz", frames=3, run=seen)
    assert json.loads((tmp_path / "g.json").read_text())["SeenInTraining"] is True


def test_a_forecast_may_go_on_after_the_run_has_ended(run: Path, tmp_path: Path) -> None:
    """121 frames: a clip that starts at 112 is followed by one more frame, at 113 by none."""
    done = write_forecast(run, tmp_path / "a.nii", frames=3, start=112)
    assert done.recorded == 1 and done.error is not None
    done = write_forecast(run, tmp_path / "b.nii", frames=3, start=113)
    assert (done.recorded, done.error, done.persistence) == (0, None, None)
    assert json.loads((tmp_path / "b.json").read_text())["MeanAbsoluteError"] is None
    assert np.isfinite(nib.load(tmp_path / "b.nii").get_fdata()).all()


def test_equal_forecasts_are_equal_files(run: Path, tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_forecast(run, tmp_path / name, frames=2)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.nii.gz", "b.nii.gz"))
    assert first == second
    write_forecast(run, tmp_path / "b.nii.gz", frames=3)  # over the older one
    assert nib.load(tmp_path / "b.nii.gz").shape[3] == 3
    assert len(gzip.decompress(first)) == 352 + 4 * 40 * 20 * 2


def test_without_a_test_part_the_validation_part_is_gone_on_from(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    split = Split.load(other / "split.json")
    replace(split, test=[]).save(other / "split.json")
    assert write_forecast(other, tmp_path / "f.nii", frames=1).run == split.validation[0]
    replace(split, test=[], validation=[]).save(other / "split.json")
    with pytest.raises(DataError, match=r"no run out of the training: choose one with --run: sub-"):
        write_forecast(other, tmp_path / "g.nii", frames=1)
    (other / "split.json").unlink()
    with pytest.raises(DataError, match=r"no split.json .* choose one with --run: sub-001.* …"):
        write_forecast(other, tmp_path / "g.nii", frames=1)
    assert write_forecast(other, tmp_path / "g.nii", frames=1, run=split.test[0]).frames == 1


# --- the command and bad input -------------------------------------------------------------------


def test_the_command(run: Path, sample_store: Path, tmp_path: Path) -> None:
    given = ["forecast", str(run), "--frames", "4", "--out", str(tmp_path / "x/f.nii.gz")]
    more = ["--run", Split.load(run / "split.json").test[1], "--start", "5"]
    store = shutil.copytree(sample_store, tmp_path / "moved")
    done = CliRunner().invoke(app, [*given, *more, f"data.store={store}"], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"f.nii.gz: 4 frames (10 s) of {more[1]} from frame 13; mean absolute er" in done.stdout
    assert nib.load(tmp_path / "x/f.nii.gz").shape == (40, 20, 1, 4)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"frames": 0}, RecipeError, r"--frames must be at least 1, got 0"),
        ({"out": "f.nii.bz2"}, RecipeError, r"written as .nii.gz or .nii, got 'f.nii.bz2'"),
        ({"out": ".nii"}, RecipeError, r"written as .nii.gz or .nii"),
        ({"run": "sub-001_run-99"}, DataError, r"no run 'sub-001_run-99' in"),
        ({"start": 114}, DataError, r"has 121 frames: .* frames 0 to 113, not at 114"),
        ({"start": -1}, DataError, r"frames 0 to 113, not at -1"),
        (
            {"overrides": ["data.clip_frames=8", "data.frame_stride=30"]},
            DataError,
            r"has 121 frames, a clip spans 211: it is too short",
        ),
        ({"overrides": ["train.steps=3"]}, RecipeError, r"takes data\.\* .* got train.steps=3"),
        ({"overrides": ["data.store="]}, RecipeError, r"data.store"),
        (
            {"overrides": ["data.normalization=minmax"]},
            CheckpointError,
            r"preprocessed in another way .*expected voxel, found minmax",
        ),
        (
            {"run": "sub-001_task-objects_acq-25mm_run-01"},
            CheckpointError,
            r"preprocessed in another way .*grid",
        ),
    ],
)
def test_what_cannot_be_forecast_is_refused(
    run: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], said: str
) -> None:
    given = {"frames": 2, "out": "f.nii", **changes}
    out = tmp_path / str(given.pop("out"))
    with pytest.raises(error, match=said):
        write_forecast(run, out, **given)
    assert list(tmp_path.iterdir()) == []


def test_models_that_did_not_learn_to_forecast_are_refused(
    simmim: Path, sample_store: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"objective=simmim, which does not teach it to forecast"):
        write_forecast(simmim, tmp_path / "f.nii", frames=2)
    given = [f"data.store={sample_store}", *SMALL, f"init_from={simmim}"]
    tuned = tmp_path / "tuned"
    pipeline.finetune(load_recipe("finetune/haxby_slice", given), tuned)
    with pytest.raises(CheckpointError, match=r"tuned is no pretraining run"):
        write_forecast(tuned, tmp_path / "f.nii", frames=2)
    with pytest.raises(CheckpointError, match="holds no exported model"):
        write_forecast(tmp_path / "gone", tmp_path / "f.nii", frames=2)
    assert not (tmp_path / "f.nii").exists()


def test_a_place_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write .*file/f.nii"):
        write_forecast(run, tmp_path / "file" / "f.nii", frames=1)


def test_what_is_written_is_what_the_model_expects(run: Path, tmp_path: Path) -> None:
    """The file equals the model's own forecast in its units, by hand."""
    from fmrizoo.config import DataConfig
    from fmrizoo.data.clips import ClipTable
    from fmrizoo.data.loader import Loader
    from fmrizoo.zoo import load

    recipe = load_recipe(run / "recipe.yaml")
    store = Store(recipe.data.store)
    info = store[Split.load(run / "split.json").test[0]]
    data = DataConfig(clip_frames=8, normalization="voxel")
    table = ClipTable.windows(store, [info], data)
    batch = next(iter(Loader(table, data, 1).epoch())).to_batch()
    with torch.no_grad():
        expected = load(run).forecast(batch, 6)[0].numpy()
    done = write_forecast(run, tmp_path / "f.nii", frames=6)
    assert isinstance(done, Forecast)
    reader = store.open(info)
    found = nib.load(tmp_path / "f.nii").get_fdata()[reader.mask]
    mean, std = (v.astype(np.float64)[:, None] for v in (reader.decoder.mean, reader.decoder.std))
    varying = std[:, 0] > 0
    by_hand = expected[reader.mask] * std + mean
    np.testing.assert_allclose(found[varying], by_hand[varying], rtol=1e-5)

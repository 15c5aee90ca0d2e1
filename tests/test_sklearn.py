"""`fmrizoo.Embedder` behaves as a scikit-learn transformer and gives what `fmrizoo embed` gives."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import nibabel
import numpy as np
import pandas
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, validate_data

import fmrizoo
import fmrizoo.sklearn
from fmrizoo import Embedder
from fmrizoo.config import PrepareConfig
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.prepare import prepare
from fmrizoo.data.single import config_for
from fmrizoo.data.store import Store
from fmrizoo.errors import CheckpointError, DataError, RecipeError
from fmrizoo.evaluate.embed import ClipEmbedder
from fmrizoo.trainer.export import ModelInfo, read_info, save_model
from fmrizoo.types import Contract
from fmrizoo.zoo import load_recipe

GRID, FRAMES, SUBJECTS = (6, 6, 4), 20, 6
AFFINE = np.array([[3.0, 0, 0, -9], [0, 3, 0, -8], [0, 0, 4, -7], [0, 0, 0, 1]])
BACKBONE = {
    "name": "swin4d",
    "img_size": [8, 6, 4, 8],
    "patch_size": [2, 2, 2, 2],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": [2, 2, 2, 2],
}


def save_bold(
    path: Path, seed: int, tr: float = 2.0, grid: tuple[int, ...] = GRID, frames: int = FRAMES
) -> Path:
    rng = np.random.default_rng(seed)
    bold = 1000 + 10 * rng.normal(size=(*grid, frames))
    bold[: grid[0] // 2] += 10 * np.sin(np.arange(frames) * (1 + seed % 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(bold.astype(np.float32), AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms((3, 3, 4, tr))
    nibabel.save(image, path)
    mask = np.zeros(grid, np.uint8)
    mask[1:5, 1:5] = 1
    name = path.name.replace("_bold.nii.gz", "_desc-brain_mask.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask, AFFINE), path.with_name(name))
    return path


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BIDS folder, its store, and a run folder with a pretrained model."""
    top = tmp_path_factory.mktemp("sklearn")
    for subject in range(SUBJECTS):
        folder = top / "bids" / f"sub-{subject:02d}" / "func"
        for run in (1, 2):
            save_bold(
                folder / f"sub-{subject:02d}_task-rest_run-{run}_bold.nii.gz", 7 * subject + run
            )
    sidecar = {"RepetitionTime": 2.0}
    (top / "bids" / "task-rest_bold.json").write_text(json.dumps(sidecar))
    people = [f"sub-{s:02d}\t{'ab'[s % 2]}" for s in range(SUBJECTS)]
    (top / "bids" / "participants.tsv").write_text("\n".join(["participant_id\tgroup", *people]))
    prepare(top / "bids", top / "store", PrepareConfig(space="native"))
    torch.manual_seed(0)
    recipe = {
        "backbone": BACKBONE,
        "objective": {"name": "simmim"},
        "prepare": {"space": "native"},
        "data": {"store": "gone", "clip_frames": 8},
    }
    store = Store(top / "store")
    table = ClipTable.windows(store, store.runs, load_recipe(recipe).data)
    contract = table.contract("znorm_minback")
    info = ModelInfo(recipe=recipe, contract=contract, seen_runs=("sub-00_task-rest_run-1",))
    save_model(top / "run" / "model", fmrizoo.build(recipe), info)
    return top


@pytest.fixture
def files(top: Path) -> list[str]:
    return [str(p) for p in sorted((top / "bids").rglob("*_bold.nii.gz"))]


@pytest.fixture
def names(top: Path) -> list[str]:
    return [run.name for run in Store(top / "store").runs]


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch, top: Path) -> None:
    """The model's warning was given already; see the test of it."""
    sha = read_info(top / "run" / "model").sha256
    monkeypatch.setattr(fmrizoo.sklearn, "_WARNED", {sha})


def embedder(top: Path, **settings: Any) -> Embedder:
    return Embedder(top / "run", device="cpu", **settings)


def test_files_names_and_stores_give_what_embed_gives(
    top: Path, files: list[str], names: list[str]
) -> None:
    store = Store(top / "store")
    data = replace(load_recipe(read_info(top / "run" / "model").recipe).data, clip_stride=0.5)
    expected = ClipEmbedder(top / "run").embed_store(store, data, store.runs, level="run")
    assert [row.unit for row in expected.rows] == names
    of_files = embedder(top, clip_stride=0.5)
    found = of_files.fit_transform(files)
    assert found.shape == (2 * SUBJECTS, 16) and found.dtype == np.float32
    assert of_files.n_features_out_ == 16
    np.testing.assert_allclose(found, expected.values, atol=1e-6)
    of_store = embedder(top, clip_stride=0.5, store=top / "store")
    np.testing.assert_allclose(of_store.fit_transform(names), expected.values, atol=1e-6)
    np.testing.assert_allclose(of_files.fit_transform(store), expected.values, atol=1e-6)
    np.testing.assert_allclose(of_files.transform(str(store.path)), expected.values, atol=1e-6)
    # Paths as objects, a column of a table, any order, and an input twice.
    column = pandas.DataFrame({"file": [Path(files[3]), Path(files[0]), Path(files[3])]})
    np.testing.assert_allclose(of_files.transform(column), expected.values[[3, 0, 3]], atol=1e-6)


def test_subjects_are_means_over_all_their_clips(top: Path, names: list[str]) -> None:
    runs = embedder(top, store=top / "store").fit_transform(names)
    subjects = embedder(top, store=top / "store", level="subject")
    found = subjects.fit_transform(["02", "sub-00"])
    expected = runs.reshape(SUBJECTS, 2, -1).mean(1)[[2, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    every = subjects.fit_transform(Store(top / "store"))
    np.testing.assert_allclose(every[[2, 0]], found, atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "brain", "frame", "space", "parcel"])
def test_every_pool_has_names_for_its_numbers(top: Path, names: list[str], pool: str) -> None:
    atlas = labels() if pool == "parcel" else None
    own = embedder(top, pool=pool, atlas=atlas, store=top / "store")
    own.set_output(transform="pandas")
    found = own.fit_transform(names[:2])
    assert isinstance(found, pandas.DataFrame)
    width = {"mean": 16, "brain": 16, "frame": 4 * 16, "space": 2 * 2 * 1 * 16, "parcel": 3 * 16}
    assert found.shape == (2, own.n_features_out_)
    assert len(set(found.columns)) == own.n_features_out_
    if pool != "space":
        assert own.n_features_out_ == width[pool]
    first = {"mean": "f00", "brain": "f00", "frame": "t0_f00", "parcel": "parcel-2_f00"}
    assert found.columns[0] == first.get(pool, "x0y0z0_f00")
    np.testing.assert_array_equal(own.get_feature_names_out(), found.columns)


def labels() -> np.ndarray:
    atlas = np.zeros(GRID, int)
    atlas[1:3, 1:5], atlas[3:5, 1:3], atlas[3:5, 3:5] = 2, 5, 9
    return atlas


def test_pipelines_and_cross_validation(top: Path, names: list[str]) -> None:
    y = np.array([int(name[-1]) for name in names])
    groups = [name[:6] for name in names]
    model = make_pipeline(embedder(top, store=top / "store"), LogisticRegression())
    scores = cross_val_score(model, names, y, groups=groups, cv=LeaveOneGroupOut())
    assert scores.shape == (SUBJECTS,)
    assert model.fit(names, y).score(names, y) > 0.5
    params = model.get_params()
    assert params["embedder__pool"] == "mean"
    assert clone(model.set_params(embedder__pool="brain"))[0].pool == "brain"


def test_clones_and_pickles_hold_paths_not_weights(
    top: Path, files: list[str], tmp_path: Path
) -> None:
    own = embedder(top, prepare={"mask": "auto"}).fit(files[:1])
    expected = own.transform(files[:2])
    content = pickle.dumps(own)
    weights = (top / "run" / "model" / "model.safetensors").stat().st_size
    assert len(content) < min(20_000, weights)
    np.testing.assert_array_equal(pickle.loads(content).transform(files[:2]), expected)
    joblib.dump(own, tmp_path / "e.joblib")
    np.testing.assert_array_equal(joblib.load(tmp_path / "e.joblib").transform(files[:2]), expected)
    copied = clone(own)
    assert copied.prepare == {"mask": "auto"} and copied.prepare is not own.prepare
    with pytest.raises(NotFittedError):
        copied.transform(files)


def test_another_model_in_the_same_place_is_refused(top: Path, files: list[str], tmp_path: Path):
    info = read_info(top / "run" / "model")
    save_model(tmp_path / "m", fmrizoo.load(top / "run"), info)
    own = pickle.loads(pickle.dumps(Embedder(tmp_path / "m", device="cpu").fit(files[:1])))
    torch.manual_seed(5)
    save_model(tmp_path / "m", fmrizoo.build(info.recipe), info)
    with pytest.raises(CheckpointError, match="is another one than when this Embedder was fitted"):
        own.transform(files[:1])


# --- back to the brain ----------------------------------------------------------------------------


def test_attributions_are_put_back_where_they_are_from(top: Path, files: list[str]) -> None:
    atlas = labels()
    own = embedder(top, pool="parcel", atlas=atlas).fit(files[:1])
    weights = np.random.default_rng(0).normal(size=(2, own.n_features_out_))
    per_parcel = weights.reshape(2, 3, 16)
    images = own.inverse_transform(weights)
    for image, row in zip(images, per_parcel, strict=True):
        data = image.get_fdata()
        assert data.shape == GRID and (data[atlas == 0] == 0).all()
        for k, label in enumerate((2, 5, 9)):
            np.testing.assert_allclose(data[atlas == label], row[k].sum(), rtol=1e-5)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-4)
    norm = own.inverse_transform(weights[0], reduce="norm")[0].get_fdata()
    np.testing.assert_allclose(norm[atlas == 5], np.linalg.norm(per_parcel[0, 1]), rtol=1e-5)
    whole = own.inverse_transform(weights[:1], reduce="none")[0].get_fdata()
    np.testing.assert_allclose(whole[1, 1, 0], per_parcel[0, 0], rtol=1e-5)


@pytest.mark.parametrize("stage", [0, 1])
def test_cells_are_put_back_on_their_voxels(top: Path, files: list[str], stage: int) -> None:
    # The encoder pads the 6 × 6 × 4 voxels to 8 × 8 × 4; cells beyond the clip have no voxel.
    own = embedder(top, pool="space", stage=stage).fit(files[:1])
    where = own.inverse_transform(np.eye(own.n_features_out_)[:: own.places_.width])
    covered = np.stack([image.get_fdata() for image in where])
    grid = [[4, 4, 2], [2, 2, 1]][stage]
    assert len(covered) == np.prod(grid)
    np.testing.assert_array_equal(covered.sum(0), np.ones(GRID))
    for number, (x, y, z) in enumerate(np.ndindex(*grid)):
        size = 2 * 2**stage
        expected = np.zeros(GRID)
        expected[x * size : (x + 1) * size, y * size : (y + 1) * size, z * size :][:, :, :size] = 1
        np.testing.assert_array_equal(covered[number], expected)


def test_pools_without_places_say_which_have_them(top: Path, files: list[str]) -> None:
    own = embedder(top).fit(files[:1])
    with pytest.raises(RecipeError, match=r"pool=mean keeps no place .* pool=space or pool=parcel"):
        own.inverse_transform(np.ones((1, 16)))
    own = embedder(top, pool="parcel", atlas=labels()).fit(files[:1])
    with pytest.raises(DataError, match=r"weights must be \(k, 48\).* got \(1, 4\)"):
        own.inverse_transform(np.ones((1, 4)))
    with pytest.raises(RecipeError, match="reduce='sums' is not known"):
        own.inverse_transform(np.ones((1, 48)), reduce="sums")


# --- what the model has seen, and bad input -------------------------------------------------------


def test_runs_of_the_pretraining_are_warned_of_once(
    top: Path, files: list[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fmrizoo.sklearn, "_WARNED", set())
    own = embedder(top).fit(files)
    assert own.seen_runs_ == ("sub-00_task-rest_run-1",)
    own.transform(files[2:3])  # not seen: silent
    with pytest.warns(UserWarning, match="1 of 2 inputs, such as .*sub-00_task-rest_run-1_bold"):
        own.transform(files[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.transform(files[:2])
    monkeypatch.setattr(fmrizoo.sklearn, "_WARNED", set())
    with pytest.warns(UserWarning, match="such as sub-00, are by their names among the runs"):
        embedder(top, store=top / "store", level="subject").fit_transform(["00", "01"])


def test_files_that_the_contract_refuses(top: Path, tmp_path: Path) -> None:
    stem = "sub-09_task-rest"
    slow = save_bold(tmp_path / "slow" / f"{stem}_bold.nii.gz", 1, tr=0.8)
    with pytest.raises(CheckpointError, match=r"slow.*: tr: expected 2\.0, found 0\.8"):
        embedder(top).fit_transform([slow])
    # … and can be resampled in time on purpose (28 frames are the fewest that can).
    long = save_bold(tmp_path / "long" / f"{stem}_bold.nii.gz", 1, tr=0.8, frames=40)
    assert embedder(top, prepare={"target_tr": 2.0}).fit_transform([long]).shape == (1, 16)
    other = save_bold(tmp_path / "grid" / f"{stem}_bold.nii.gz", 1, grid=(5, 6, 4))
    with pytest.raises(CheckpointError, match=r"grid: expected \(6, 6, 4\), found \(5, 6, 4\)"):
        embedder(top).fit_transform([other])
    mni = save_bold(tmp_path / f"{stem}_space-MNI152NLin6Asym_desc-preproc_bold.nii.gz", 1)
    with pytest.raises(DataError, match="is in space MNI152NLin6Asym by its name"):
        embedder(top).fit([mni])
    bare = save_bold(tmp_path / "bare" / f"{stem}_bold.nii.gz", 1)
    next(bare.parent.glob("*mask*")).unlink()
    with pytest.raises(DataError, match="has no brain mask"):
        embedder(top).fit_transform([bare])
    (tmp_path / "text_bold.nii.gz").write_text("no image")
    with pytest.raises(DataError, match=r"text_bold\.nii\.gz is not a NIfTI file"):
        embedder(top).fit([tmp_path / "text_bold.nii.gz"])


def test_a_file_with_any_name_is_taken_with_its_mask(
    top: Path, files: list[str], tmp_path: Path
) -> None:
    plain = tmp_path / "scan 1.nii.gz"
    plain.write_bytes(Path(files[2]).read_bytes())
    mask = files[2].replace("_bold", "_desc-brain_mask")
    own = embedder(top, prepare={"mask": mask})
    expected = embedder(top).fit_transform(files[2:3])
    np.testing.assert_array_equal(own.fit_transform([plain]), expected)


def test_files_are_resampled_as_prepare_would(tmp_path: Path) -> None:
    space = "MNI152NLin2009cAsym"
    stem = f"sub-01_task-rest_space-{space}_desc-preproc"
    path = save_bold(tmp_path / "bids" / "sub-01" / "func" / f"{stem}_bold.nii.gz", 1)
    settings = {"grid": [5, 5, 4], "voxel_size": [4.0, 4.0, 4.0], "center": [-1.0, 0.0, -1.0]}
    prepare(tmp_path / "bids", tmp_path / "store", PrepareConfig(**settings))
    store = Store(tmp_path / "store")
    recipe = {
        "backbone": BACKBONE,
        "objective": {"name": "simmim"},
        "prepare": settings,
        "data": {"clip_frames": 8},
    }
    contract = ClipTable.windows(store, store.runs, load_recipe(recipe).data)
    info = ModelInfo(recipe=recipe, contract=contract.contract("znorm_minback"))
    save_model(tmp_path / "m", fmrizoo.build(recipe), info)
    of_file = Embedder(tmp_path / "m", device="cpu", pool="space").fit([path])
    of_store = Embedder(tmp_path / "m", device="cpu", pool="space").fit(store)
    np.testing.assert_array_equal(of_file.transform([path]), of_store.transform(store))
    np.testing.assert_allclose(of_file.affine_, of_store.affine_)
    unnamed = path.rename(path.with_name("sub-01_task-rest_bold.nii.gz"))
    with pytest.raises(DataError, match="is in space native by its name, the model expects MNI"):
        of_file.transform([unnamed])


def test_other_bad_input(top: Path, files: list[str], names: list[str], tmp_path: Path) -> None:
    store = {"store": top / "store"}
    for settings, given, error, said in (
        ({}, ["gone_bold.nii.gz"], DataError, "gone_bold.nii.gz does not exist"),
        ({}, names, DataError, "is no NIfTI file by its name"),
        ({}, [[1.0, 2.0]], DataError, "numbers are what it gives, not what it takes"),
        ({}, [], ValueError, "minimum of 1 is required"),
        ({}, str(tmp_path), DataError, "is not a store"),
        (store, ["sub-1"], DataError, "no run 'sub-1' in"),
        ({**store, "level": "subject"}, ["99"], DataError, "no subject '99' with a run"),
        ({"level": "subject"}, files, RecipeError, "level=subject needs store=FOLDER"),
        ({"level": "clip"}, files, RecipeError, "level='clip' is not known"),
        ({"pool": "means"}, files, RecipeError, "pool='means' is not known"),
        ({"batch_size": 0}, files, RecipeError, "batch_size must be ≥ 1"),
        ({"prepare": {"maks": "compute"}}, files, RecipeError, "maks"),
    ):
        with pytest.raises(error, match=said):
            embedder(top, **settings).fit(given)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="needs a trained model"):
        Embedder().fit(files)
    with pytest.raises(CheckpointError, match="holds no exported model"):
        Embedder(tmp_path).fit(files)


def test_settings_that_meet_a_contract() -> None:
    contract = Contract("MNI152NLin2009cAsym", "RAS", (96, 96, 96), (2.0, 2.0, 2.0), 0.8)
    found = config_for(contract, PrepareConfig(dummy_scans=3), {"mask": "compute"})
    assert (found.space, found.mask, found.dummy_scans) == (contract.space, "compute", 3)
    other = replace(contract, grid=(48, 48, 48), voxel_size=(4.0, 4.0, 4.0))
    with pytest.raises(DataError, match=r"its grid, voxel_size differ .* middle of the grid"):
        config_for(other, PrepareConfig())
    placed = config_for(other, PrepareConfig(), {"center": [0.0, 0.0, 0.0]})
    assert placed.grid == [48, 48, 48] and placed.center == [0.0, 0.0, 0.0]
    with pytest.raises(DataError, match="space is not known"):
        config_for(replace(contract, space="unknown"), PrepareConfig())


def test_the_documented_example_runs(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "embeddings.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 3
    monkeypatch.chdir(top)
    nibabel.save(nibabel.Nifti1Image(labels().astype(np.int16), AFFINE), "atlas.nii.gz")
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block, found)
    assert found["scores"].shape == (3,) and (top / "cache").is_dir()
    assert found["table"].shape == (2 * SUBJECTS, 16)
    assert nibabel.load("weights.nii.gz").shape == GRID
    assert all(f"`{name}`" in page for name in EXPECTED)


# --- scikit-learn's own checks --------------------------------------------------------------------

# Their arrays of numbers are refused, as they should be: `OfNumbers` passes them.
NUMBERS = "feeds arrays of numbers; Embedder takes paths or names"
REFUSED = (
    "check_dict_unchanged check_dont_overwrite_parameters check_dtype_object "
    "check_estimators_dtypes check_estimators_fit_returns_self check_estimators_nan_inf "
    "check_estimators_overwrite_params check_estimators_pickle check_f_contiguous_array_estimator "
    "check_fit2d_1feature check_fit2d_1sample check_fit2d_predict1d check_fit_check_is_fitted "
    "check_fit_idempotent check_fit_score_takes_y check_methods_sample_order_invariance "
    "check_methods_subset_invariance check_n_features_in check_n_features_in_after_fitting "
    "check_pipeline_consistency check_positive_only_tag_during_fit check_readonly_memmap_input "
    "check_transformer_data_not_an_array check_transformer_general"
)
# With inputs of one dimension scikit-learn's own check cannot make its sparse array.
EXPECTED = {name: NUMBERS for name in REFUSED.split()} | {
    "check_estimator_sparse_array": "makes a sparse array of one dimension, which does not exist"
}


def checked(estimator: Embedder, expected: dict[str, str]) -> dict[str, set[str]]:
    """Outcomes of scikit-learn's checks by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            estimator, expected_failed_checks=expected, on_fail=None, on_skip=None
        )
    status: dict[str, set[str]] = {}
    for result in results:
        said = f"{result['status']}: {result['exception']}" if result["exception"] else "passed"
        status.setdefault(result["check_name"], set()).add(said)
    return status


def test_scikit_learns_own_checks(top: Path) -> None:
    status = checked(embedder(top), EXPECTED)
    failed = {name for name, said in status.items() if any(s.startswith("failed") for s in said)}
    refused = {name for name, said in status.items() if any(s.startswith("xfail") for s in said)}
    assert not failed, {name: status[name] for name in failed}
    assert refused == set(EXPECTED)  # none is excused that passes
    assert sum(said == {"passed"} for said in status.values()) >= 18


class OfNumbers(Embedder):
    """Rows of numbers stand for runs of the store: the checks above, through the real thing."""

    def _names(self, X: Any, reset: bool) -> list[str]:
        values = validate_data(self, X, reset=reset)
        runs = [run.name for run in Store(self.store).runs]
        rows = np.ascontiguousarray(values, np.float32)
        return [runs[zlib.crc32(row.tobytes()) % len(runs)] for row in rows]

    def fit(self, X: Any, y: Any = None) -> OfNumbers:
        super().fit(self._names(X, True))
        return self

    def transform(self, X: Any) -> Any:
        check_is_fitted(self)
        return super().transform(self._names(X, False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = tags.input_tags.string = False
        return tags


@pytest.mark.slow
def test_scikit_learns_checks_pass_where_numbers_stand_for_runs(top: Path) -> None:
    status = checked(OfNumbers(top / "run", device="cpu", store=top / "store"), {})
    failed = {name: said for name, said in status.items() if any("failed" in s for s in said)}
    assert not failed
    assert set(EXPECTED) <= set(status)

"""A trained model as a scikit-learn transformer: NIfTI files or runs of a store in, vectors out.

>>> from sklearn.linear_model import LogisticRegression
>>> from sklearn.pipeline import make_pipeline
>>> import fmrizoo
>>> decoder = make_pipeline(fmrizoo.Embedder("run", store="store"), LogisticRegression())
>>> decoder.fit(["sub-01_task-rest", "sub-02_task-rest"], ["patient", "control"])
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted

from fmrizoo.config import DataConfig, PrepareConfig, Recipe
from fmrizoo.data.bids import RunFile, run_file
from fmrizoo.data.exclusion import chosen
from fmrizoo.data.nifti import open_image
from fmrizoo.data.normalize import loaded_contract
from fmrizoo.data.single import check_space, config_for, single_store
from fmrizoo.data.spatial import check_affine, reorient, target_affine
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import CheckpointError, DataError, RecipeError
from fmrizoo.registry import suggest
from fmrizoo.types import Contract, Grid, RunKey

if TYPE_CHECKING:
    from fmrizoo.evaluate.embed import ClipEmbedder
    from fmrizoo.evaluate.places import Places

LEVELS = ("run", "subject")
_WARNED: set[str] = set()  # models of which it was said that they know some of the inputs


@dataclass(frozen=True)
class _Row:
    """What one row is made of: a NIfTI file, or runs of a store whose clips are averaged."""

    name: str
    file: RunFile | None = None
    runs: tuple[RunInfo, ...] = ()

    @property
    def run_names(self) -> list[str]:
        """Names by which a model may know the recordings."""
        if self.file is None:
            return [run.name for run in self.runs]
        return [str(self.file.key)] if self.file.key.subject else []


class Embedder(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Embeddings of runs or subjects by a trained model; every row is a mean over all clips.

    ``fit`` learns nothing of the data: it opens the model and checks that the inputs are there and
    preprocessed as the model expects. Inputs (``X``) are one of

    - paths of 4D NIfTI files, one row each. They are prepared as ``fmrizoo prepare`` would do it
      with the model's contract (space, orientation, grid) and its recipe (mask, confounds), one at
      a time in temporary files; a sidecar and a brain mask are found by the rules of BIDS;
    - names of runs (``level="run"``) or subjects (``level="subject"``) of ``store``;
    - a whole store (an opened one, or its folder): a row for each run or subject that the recipe
      selects, in the store's order.

    Args:
        model: Run folder or model folder. Only its path is kept and pickled, never its weights.
        pool: ``mean``, ``brain``, ``frame``, ``space`` or ``parcel``
            (:class:`fmrizoo.evaluate.embed.ClipEmbedder`); several vectors are laid side by side.
            A parcel that lies outside of a run's brain is NaN.
        stage: Stage of the encoder; negative: from the end.
        level: ``run`` or ``subject``: what a name of the store is of.
        atlas: For ``parcel``: NIfTI file of labels on the voxels of the clips, or an array.
        clip_stride: Starts of clips as a share of their span; None: as in training.
        batch_size: Clips at a time.
        device: ``auto``, ``cpu``, ``cuda`` or ``xpu``.
        prepare: Settings of ``prepare`` for NIfTI files that differ from the model's recipe, such
            as ``{"mask": "compute"}`` or ``{"target_tr": 2.0}``.
        store: Folder of a prepared store; names in ``X`` are then looked up there.

    Attributes:
        n_features_out_: Numbers in a row.
        seen_runs_: Names of all runs that the weights were trained on, of the encoder's
            pretraining too. A warning is given once if an input is among them.
        contract_: How the data must have been preprocessed.
        weights_sha256_: Of the model; another one in its place is refused later.
        places_: Which number is of which place (:class:`fmrizoo.evaluate.places.Places`).
        affine_: ``(4, 4)`` of the voxels of the first input in ``fit``, for images.
    """

    def __init__(
        self,
        model: str | Path = "",
        pool: str = "mean",
        stage: int = -1,
        level: str = "run",
        atlas: Any = None,
        clip_stride: float | None = None,
        batch_size: int = 8,
        device: str = "auto",
        prepare: Mapping[str, Any] | None = None,
        store: str | Path | None = None,
    ) -> None:
        self.model = model
        self.pool = pool
        self.stage = stage
        self.level = level
        self.atlas = atlas
        self.clip_stride = clip_stride
        self.batch_size = batch_size
        self.device = device
        self.prepare = prepare
        self.store = store

    # --- scikit-learn's methods -------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> Embedder:
        """Open the model and check the inputs; ``y`` is not looked at.

        Raises:
            CheckpointError: no model there, one without a contract, or data preprocessed in
                another way than it expects.
            DataError: inputs of a wrong kind, that do not exist or cannot be used.
            RecipeError: an unknown word.
        """
        from fmrizoo.evaluate.places import places_of
        from fmrizoo.trainer.export import read_info
        from fmrizoo.zoo import model_folder

        _check_list(X)  # before the model is read
        if self.level not in LEVELS:
            raise RecipeError(
                f"level={self.level!r} is not known.{suggest(self.level, list(LEVELS))}"
            )
        if self.batch_size < 1:
            raise RecipeError(f"batch_size must be ≥ 1, got {self.batch_size}")
        if not str(self.model):
            raise RecipeError("Embedder needs a trained model: give model=FOLDER of a run")
        folder = model_folder(self.model)
        info = read_info(folder)
        if info.contract is None:
            raise CheckpointError(f"{folder} carries no preprocessing contract")
        recipe = _recipe(info.recipe)
        self.contract_: Contract = info.contract
        self.weights_sha256_: str = info.sha256
        self.seen_runs_: tuple[str, ...] = tuple(info.seen_runs)
        _, rows = self._rows(X, recipe)
        self._embedder = self._open()
        clip = Grid(*self.contract_.grid, recipe.data.clip_frames)
        self.places_: Places = places_of(self._embedder, clip)
        self.n_features_out_: int = self.places_.features
        self.affine_ = self._affine(rows[0], recipe)
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """``(n, d)`` fp32, one row per input in its order.

        Raises:
            NotFittedError: ``fit`` was not called.
            CheckpointError, DataError: as :meth:`fit`, and runs that cannot be used.
        """
        from fmrizoo.trainer.export import read_info
        from fmrizoo.zoo import model_folder

        check_is_fitted(self)
        recipe = _recipe(read_info(model_folder(self.model)).recipe)
        store, rows = self._rows(X, recipe)
        self._warn_of_seen(rows)
        embedder = self._opened()
        unique = {row.name: row for row in rows}
        if store is not None:
            found = self._of_store(embedder, store, list(unique.values()), recipe)
        else:
            found = {name: self._of_file(embedder, row, recipe) for name, row in unique.items()}
        return np.stack([found[row.name] for row in rows]).reshape(len(rows), -1)

    def inverse_transform(self, X: Any, reduce: str = "sum") -> list[Any]:
        """Weights or attributions of features, put back onto the voxels they are from.

        Args:
            X: ``(k, d)``, or ``(d,)`` for one row, such as the ``coef_`` of a linear model.
            reduce: ``sum``, ``norm`` or ``none`` (:meth:`fmrizoo.evaluate.places.Places.images`).

        Returns:
            ``k`` NIfTI images in the space that the model works in.

        Raises:
            RecipeError: a pool that keeps no place (only ``space`` and ``parcel`` do).
            DataError: another number of features.
        """
        check_is_fitted(self)
        values = np.asarray(X, np.float64)
        return self.places_.images(np.atleast_2d(values), self.affine_, reduce)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the ``d`` numbers, such as ``f007`` or ``parcel-12_f007``."""
        check_is_fitted(self)
        return np.array(self.places_.feature_names, dtype=object)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_embedder", None)  # weights stay where they are: they are read again
        return state

    # --- the model --------------------------------------------------------------------------------

    def _open(self) -> ClipEmbedder:
        from fmrizoo.evaluate.embed import ClipEmbedder
        from fmrizoo.trainer.device import World, resolve_device

        where = resolve_device(self.device, World())
        found = ClipEmbedder(
            self.model, pool=self.pool, stage=self.stage, atlas=self.atlas, device=where
        )
        if found.weights != self.weights_sha256_:
            raise CheckpointError(
                f"the model in {self.model} is another one than when this Embedder was fitted: "
                "fit it again"
            )
        return found

    def _opened(self) -> ClipEmbedder:
        """The model, read again after a journey to another process."""
        if not hasattr(self, "_embedder"):
            self._embedder = self._open()
        return self._embedder

    def _data(self, recipe: Recipe) -> DataConfig:
        """How clips are cut."""
        stride = recipe.data.clip_stride if self.clip_stride is None else self.clip_stride
        return replace(recipe.data, clip_stride=stride)

    def _of_store(
        self, embedder: ClipEmbedder, store: Store, rows: Sequence[_Row], recipe: Recipe
    ) -> dict[str, NDArray[np.float32]]:
        runs = list({run.name: run for row in rows for run in row.runs}.values())
        found = embedder.embed_store(
            store, self._data(recipe), runs, level=self.level, batch_size=self.batch_size
        )
        return {r.unit: v for r, v in zip(found.rows, found.values, strict=True)}

    def _of_file(self, embedder: ClipEmbedder, row: _Row, recipe: Recipe) -> NDArray[np.float32]:
        from fmrizoo.trainer.export import check_contract

        assert row.file is not None
        with single_store(row.file, self._prepare(recipe)) as store:
            made = loaded_contract(store.contract, recipe.data.normalization)
            check_contract(self.contract_, made, embedder.where, row.file.path)
            found = embedder.embed_store(
                store, self._data(recipe), store.runs, level="run", batch_size=self.batch_size
            )
        values: NDArray[np.float32] = found.values[0]
        return values

    # --- inputs -----------------------------------------------------------------------------------

    def _rows(self, X: Any, recipe: Recipe) -> tuple[Store | None, list[_Row]]:
        """What each row is made of, and the store (None for files)."""
        given = _check_list(X)
        if isinstance(given, Store):
            runs = chosen(given, replace(recipe.data, leave_out=[])).used
            names = [r.name if self.level == "run" else f"sub-{r.subject}" for r in runs]
            return given, self._of_names(given, list(dict.fromkeys(names)), recipe)
        if self.store is not None:
            store = Store(self.store)
            return store, self._of_names(store, [str(name) for name in given], recipe)
        if self.level != "run":
            raise RecipeError(
                f"level={self.level} needs store=FOLDER: of NIfTI files each is a row of its own"
            )
        return None, [self._of_path(Path(item), recipe) for item in given]

    def _of_names(self, store: Store, names: Sequence[str], recipe: Recipe) -> list[_Row]:
        from fmrizoo.trainer.export import check_contract

        if self.level == "run":
            rows = [_Row(name, runs=(store[name],)) for name in names]
        else:
            people: dict[str, list[RunInfo]] = {}
            for run in chosen(store, replace(recipe.data, leave_out=[])).used:
                people.setdefault(f"sub-{run.subject}", []).append(run)
            rows = []
            for name in names:
                full = f"sub-{name.removeprefix('sub-')}"
                if full not in people:
                    raise DataError(
                        f"no subject {name!r} with a run that the model's recipe selects in "
                        f"{store.path}.{suggest(full, list(people))}"
                    )
                rows.append(_Row(full, runs=tuple(people[full])))
        for run in {run.name: run for row in rows for run in row.runs}.values():
            made = loaded_contract(run.contract, recipe.data.normalization)
            check_contract(self.contract_, made, Path(self.model), store.path)
        return rows

    def _of_path(self, path: Path, recipe: Recipe) -> _Row:
        file = run_file(path)
        check_space(file.path, self.contract_, dict(self.prepare or {}).get("space"))
        return _Row(str(file.path), file=file)

    def _prepare(self, recipe: Recipe) -> PrepareConfig:
        own = recipe.prepare if recipe.prepare is not None else PrepareConfig()
        return config_for(self.contract_, own, self.prepare)

    def _affine(self, row: _Row, recipe: Recipe) -> NDArray[np.float64]:
        """Where the voxels of an input lie once it is prepared."""
        if row.file is None:
            return np.array(row.runs[0].affine, np.float64)
        config = self._prepare(recipe)
        if config.space != "native":
            return target_affine(config)
        image = open_image(row.file.path)
        check_affine(image, row.file.path)
        shape = image.shape[:3]
        _, affine = reorient(np.broadcast_to(np.int8(0), shape), image.affine, config.orientation)
        return affine

    def _warn_of_seen(self, rows: Sequence[_Row]) -> None:
        known = {name for run in self.seen_runs_ for name in (run, str(RunKey.parse(run).bare))}
        seen = [row.name for row in rows if any(run in known for run in row.run_names)]
        if not seen or self.weights_sha256_ in _WARNED:
            return
        _WARNED.add(self.weights_sha256_)
        warnings.warn(
            f"{len(seen)} of {len(rows)} inputs, such as {seen[0]}, are by their names among the "
            f"runs that the model in {self.model} was trained on: scores on them say nothing about "
            "unseen recordings (seen_runs_ names all; this is said once for each model)",
            UserWarning,
            stacklevel=4,  # through scikit-learn's wrapper of transform
        )


def _recipe(values: dict[str, Any]) -> Recipe:
    from fmrizoo.zoo import load_recipe

    return load_recipe(values)


def _check_list(X: Any) -> Store | list[Any]:
    """The store, or the paths or names, that ``X`` holds.

    Raises:
        DataError: numbers, nothing, or more than one column.
        TypeError: a sparse matrix.
    """
    if isinstance(X, Store):
        return X
    if isinstance(X, str | Path):
        return Store(X)
    found = check_array(X, dtype=None, ensure_2d=False, allow_nd=True)
    if found.ndim == 2 and found.shape[1] == 1:  # a column of a table
        found = found[:, 0]
    if found.ndim != 1 or not all(isinstance(item, str | PathLike) for item in found):
        raise DataError(
            "Embedder takes a list of paths of NIfTI files or of names of a store's runs, got "
            f"{found.dtype} of shape {found.shape}: numbers are what it gives, not what it takes"
        )
    return list(found)

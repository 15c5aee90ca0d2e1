"""What an encoder makes of clips, pooled to vectors: embeddings for use outside of fmrizoo.

Shape letters: ``b`` clips, ``d`` features, ``p`` parcels, ``x y z t`` cells and time slots of the
encoder's output.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fmrizoo.config import DataConfig
from fmrizoo.data.batch import ClipFacts
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.exclusion import chosen
from fmrizoo.data.loader import Loader
from fmrizoo.data.mixture import open_store
from fmrizoo.data.splits import Split
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.evaluate.atlas import Atlas
from fmrizoo.evaluate.derivatives import label_of, write_derivatives
from fmrizoo.evaluate.embeddings import LEVELS, EmbeddingRow, Embeddings, Mean, check_suffix
from fmrizoo.layers.parcels import parcel_weights, pool_parcels
from fmrizoo.model import DownstreamModel
from fmrizoo.registry import suggest
from fmrizoo.types import Backbone, Batch, Contract, Features, Grid, chosen_stages

log = logging.getLogger(__name__)

POOLS = ("mean", "brain", "frame", "space", "parcel")


class ClipEmbedder:
    """An encoder and how its features are pooled; ``embedder(batch)`` gives a tensor.

    - ``mean``: over all valid tokens, ``(b, d)``.
    - ``brain``: the same, each token weighted by its share of brain, ``(b, d)``.
    - ``frame``: over space only, ``(b, t, d)``; 0 in a time slot without a valid token.
    - ``space``: over time only, ``(b, x, y, z, d)``; 0 in a cell without a token.
    - ``parcel``: over the voxels of each parcel of an atlas and over time, ``(b, p, d)``; NaN in a
      parcel that no token of the clip reaches.

    Args:
        source: Run folder or model folder (its weights are loaded); or a model or backbone in
            memory, which is put into ``eval()``. Of a model with a head, what it put into the
            encoder (adapters, prompts) acts.
        pool: See above.
        stage: Stage of the encoder whose features are pooled; negative: from the end.
        atlas: For ``parcel``: a NIfTI file or labels ``(x, y, z)`` on the voxels of the clips.
        contract: How the data must have been preprocessed; None: as the model folder says, or
            unchecked for a model in memory.
        device: Where the encoder runs.

    Raises:
        RecipeError: an unknown pooling or stage, an atlas missing or not used.
        CheckpointError: no model there.
        DataError: an atlas that cannot be used.
    """

    def __init__(
        self,
        source: str | Path | nn.Module,
        *,
        pool: str = "mean",
        stage: int = -1,
        atlas: Atlas | str | Path | ArrayLike | Tensor | None = None,
        contract: Contract | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if pool not in POOLS:
            raise RecipeError(f"pool={pool!r} is not known.{suggest(pool, list(POOLS))}")
        if (pool == "parcel") != (atlas is not None):
            wrong = "needs a file of parcels: labels on the voxels of the store"
            if pool != "parcel":
                wrong = "makes no use of parcels: take pool=parcel, or leave them out"
            raise RecipeError(f"pool={pool} {wrong}")
        self.where, self.weights, self.contract = Path("the model in memory"), "", contract
        self._check = contract is not None or isinstance(source, str | Path)
        if isinstance(source, str | Path):
            source = self._load(Path(source))
        self.model = source.eval().to(device)
        self.backbone = _backbone(source)
        self.pool, self.device = pool, torch.device(device)
        self.stage = chosen_stages((stage,), len(self.backbone.stage_features))[0]
        self.atlas = None if atlas is None else Atlas.of(atlas)
        self.parcels: tuple[int, ...] = ()
        if self.atlas is not None:
            found = np.unique(self.atlas.labels.numpy())
            self.parcels = tuple(int(label) for label in found if label > 0)
        self._parcel_weights: dict[Grid, Tensor] = {}

    def _load(self, folder: Path) -> nn.Module:
        from fmrizoo.trainer.export import read_info
        from fmrizoo.zoo import load, model_folder

        self.where = model_folder(folder)
        info = read_info(self.where)
        self.weights, self.contract = info.sha256, self.contract or info.contract
        return load(self.where)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Pooled features of clips, fp32 on the embedder's device.

        Raises:
            DataError: features that are not finite, clips without brain (``brain``), or on other
                voxels than the atlas.
        """
        dtype = next((p.dtype for p in self.backbone.parameters()), torch.float32)
        batch = batch.to(self.device, dtype)
        head = self.model.head if isinstance(self.model, DownstreamModel) else None
        prompts = head.prompts() if head is not None else None
        tokens = self.backbone.read(batch)
        features = self.backbone.encode_stages(tokens, (self.stage,), prompts=prompts)[0]
        if not bool(torch.isfinite(features.values[features.valid.expand(len(batch), -1)]).all()):
            raise DataError(f"features of {self.where} are NaN or infinite: its training diverged")
        return self._pooled(replace(features, values=features.values.float()), batch.grid)

    def _pooled(self, features: Features, clip: Grid) -> Tensor:
        if self.pool == "frame":
            return features.by_frame()
        if self.pool == "space":
            return features.to_grid().mean(-1).permute(0, 2, 3, 4, 1)
        if self.atlas is None:
            return features.pooled(self.pool)
        if tuple(self.atlas.labels.shape) != clip[:3]:
            raise DataError(
                f"{self.atlas.name} has {tuple(self.atlas.labels.shape)} voxels, the clips have "
                f"{tuple(clip[:3])}"
            )
        if features.grid not in self._parcel_weights:
            size = [c // f for c, f in zip(self.backbone.clip_grid, features.grid, strict=True)]
            weights, _ = parcel_weights(self.atlas.labels, size, features.grid)
            self._parcel_weights[features.grid] = weights.to(self.device)
        return pool_parcels(features, self._parcel_weights[features.grid])

    def embed_store(
        self,
        store: Store,
        config: DataConfig,
        runs: Sequence[RunInfo] | None = None,
        *,
        level: str = "clip",
        batch_size: int = 8,
    ) -> Embeddings:
        """Embed all windows of runs; see :meth:`embed_table`.

        Args:
            store: A prepared store.
            config: How clips are cut and normalised; ``select``, ``exclude`` and
                ``leave_out`` pick runs where ``runs`` is None.
            runs: Which runs.
            level, batch_size: See :meth:`embed_table`.
        """
        used = chosen(store, config).used if runs is None else runs
        table = ClipTable.windows(store, used, config)
        return self.embed_table(table, config, level=level, batch_size=batch_size)

    def embed_table(
        self, table: ClipTable, config: DataConfig, *, level: str = "clip", batch_size: int = 8
    ) -> Embeddings:
        """Embed clips, and average them over runs or subjects.

        Args:
            table: Which clips; of a labelled table the events keep their names.
            config: Normalisation and reader threads.
            level: ``clip``, or the mean over all clips of a ``run`` or ``subject`` (every clip
                counts once; a parcel that a clip does not reach is averaged over the others).
            batch_size: Clips at a time.

        Raises:
            RecipeError: an unknown level.
            CheckpointError: data that were preprocessed in another way than the model expects.
            DataError: runs on other voxels than the atlas, or unusable clips.
        """
        from fmrizoo.trainer.export import check_contract

        if level not in LEVELS:
            raise RecipeError(f"level={level!r} is not known.{suggest(level, list(LEVELS))}")
        if self._check:
            found = table.contract(config.normalization)
            check_contract(self.contract, found, self.where, table.store.path)
        if self.atlas is not None:
            self.atlas.check(table.runs)
        loader, collected = Loader(table, config, batch_size), _Collector(level)
        for compact in loader.epoch():
            values = self(compact.to_batch()).cpu().numpy()
            for sample, value in zip(compact.samples, values, strict=True):
                collected.add(sample.facts, value)
        values = collected.values()
        self._say_unreached(values)
        return Embeddings(values, collected.rows(), self._about(table, config, level))

    def _say_unreached(self, values: NDArray[np.float32]) -> None:
        if self.pool == "parcel" and (gone := np.isnan(values).any(-1).sum(0)).any():
            named = [p for p, n in zip(self.parcels, gone.tolist(), strict=True) if n]
            log.warning(
                "%d of %d parcels lie outside the brain of some rows, where they are NaN: %s",
                len(named),
                len(self.parcels),
                ", ".join(map(str, named[:10])) + (", …" if len(named) > 10 else ""),
            )

    def _about(self, table: ClipTable, config: DataConfig, level: str) -> dict[str, Any]:
        kept = ("clip_frames", "frame_stride", "clip_stride", "normalization")
        contract = table.contract(config.normalization)
        settings = {key: asdict(config)[key] for key in kept}
        return {
            "pool": self.pool,
            "stage": self.stage,
            "level": level,
            "parcels": list(self.parcels),
            "backbone": type(self.backbone).__name__,
            "weights_sha256": self.weights,
            "contract": json.loads(json.dumps(contract.to_dict())),  # lists, as they are read again
            **settings,
        }


def _backbone(model: nn.Module) -> Backbone:
    found = model if isinstance(model, Backbone) else getattr(model, "backbone", None)
    if not isinstance(found, Backbone):
        raise RecipeError(f"{type(model).__name__} is neither a backbone nor a model with one")
    return found


class _Collector:
    """Clips as they come, or their running means per run or subject."""

    def __init__(self, level: str) -> None:
        self._level = level
        self._clips: list[NDArray[np.float32]] = []
        self._means = Mean()
        self._rows: dict[str, EmbeddingRow] = {}

    def add(self, facts: ClipFacts, value: NDArray[np.float32]) -> None:
        if self._level == "clip":
            # A window's unit is its run; an event has a name of its own.
            own = facts.unit if "#event-" in facts.unit else f"{facts.run}#frame-{facts.start:04d}"
            if own in self._rows:
                raise DataError(f"clip {own} comes twice")
            self._rows[own] = EmbeddingRow(own, facts.subject, facts.run, facts.start)
            self._clips.append(value)
            return
        key = facts.run if self._level == "run" else f"sub-{facts.subject}"
        self._means.add(key, value)
        row = self._rows.get(key, EmbeddingRow(key, facts.subject, facts.run, None, 0))
        runs = row.run if facts.run in row.run.split(";") else f"{row.run};{facts.run}"
        self._rows[key] = replace(row, run=runs, n_clips=row.n_clips + 1)

    def values(self) -> NDArray[np.float32]:
        return np.stack(self._clips) if self._level == "clip" else self._means.values()

    def rows(self) -> tuple[EmbeddingRow, ...]:
        return tuple(self._rows.values())


def embed(
    model: Path,
    out: Path | None,
    *,
    bids: Path | None = None,
    label: str | None = None,
    sources: Sequence[str] = (),
    store: Path | str | None = None,
    pool: str = "mean",
    stage: int = -1,
    level: str = "clip",
    atlas: Path | None = None,
    part: str | None = None,
    select: dict[str, str] | None = None,
    clip_stride: float | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> Embeddings:
    """Embed the runs of a store with a trained model; write ``out`` (``.npz``) and ``bids``.

    Args:
        model: Run folder or model folder.
        out: File to write, see :meth:`fmrizoo.evaluate.embeddings.Embeddings.save`; None: none.
        bids: Folder to write BIDS derivatives to
            (:func:`fmrizoo.evaluate.derivatives.write_derivatives`); None: none.
        label: Of the model in BIDS names; None: of its backbone, objective or head, and pooling.
        sources: DOIs or URLs of the data, for the derivatives.
        store: Prepared store; None: the one the model was trained on.
        pool, stage, atlas: See :class:`ClipEmbedder`.
        level: ``clip``, ``run`` or ``subject``.
        part: ``train``, ``validation`` or ``test`` of the run's own split; None: all runs.
        select: BIDS entities to keep; None: as in training.
        clip_stride: Starts of clips as a share of their span; None: as in training.
        batch_size: Clips at a time.
        device: ``auto``, ``cpu``, ``cuda`` or ``xpu``.

    Raises:
        CheckpointError: no model, or data preprocessed in another way than it expects.
        RecipeError: an unknown word, or no store.
        DataError: unusable data or atlas, no split, neither ``out`` nor ``bids``, or they cannot
            be written.
    """
    from fmrizoo.trainer.device import World, resolve_device
    from fmrizoo.trainer.export import read_info
    from fmrizoo.zoo import load_recipe, model_folder

    if out is None and bids is None:
        raise DataError("nothing to write: give a file (.npz) or a folder for BIDS derivatives")
    if out is not None:
        check_suffix(out)
    if batch_size < 1:
        raise DataError(f"clips at a time must be ≥ 1, got {batch_size}")
    recipe = load_recipe(read_info(model_folder(model)).recipe)
    config = recipe.data
    changes: dict[str, Any] = {"store": store, "select": select, "clip_stride": clip_stride}
    changes = {key: value for key, value in changes.items() if value is not None}
    if store is not None:
        changes["stores"] = {}  # a single store takes the place of several
        if not config.store or Path(store).resolve() != Path(config.store).resolve():
            changes["leave_out"] = []  # names of another store's runs
    config = replace(config, **changes)
    if not str(config.store) and not config.stores:
        raise RecipeError("the model's recipe names no store: say which one to embed")
    opened = open_store(config)
    where = resolve_device(device, World())
    embedder = ClipEmbedder(model, pool=pool, stage=stage, atlas=atlas, device=where)
    runs = chosen(opened, config).used
    if part is not None:
        runs = _part(model, part, opened, runs)
    found = embedder.embed_store(opened, config, runs, level=level, batch_size=batch_size)
    if out is not None:
        found.save(out)
    if bids is not None:
        parts = (recipe.backbone.name, (recipe.objective or recipe.head).name, pool)
        write_derivatives(found, bids, label or _label(parts), sources=sources)
    return found


def _label(parts: Sequence[str]) -> str:
    """``swin4dSimmimMean``."""
    words = [label_of(word) for part in parts for word in part.split("_")]
    return "".join([words[0], *(word[0].upper() + word[1:] for word in words[1:])])


def _part(run: Path, part: str, store: Store, runs: Sequence[RunInfo]) -> list[RunInfo]:
    split = Split.load(run / "split.json")
    parts = split.parts()
    if part not in parts:
        raise RecipeError(f"part={part!r} is not known.{suggest(part, list(parts))}")
    split.check(store)
    kept = [info for info in runs if info.name in parts[part]]
    if not kept:
        raise DataError(f"no chosen run is in the {part} part of {run / 'split.json'}")
    return kept

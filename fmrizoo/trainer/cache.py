"""What a head reads of a frozen encoder, computed once for every clip.

A frozen encoder gives a clip the same features at every step, so it runs once over each table and
the head alone is trained from memory-mapped files (``features/<part>/`` of the run folder, see
:mod:`fmrizoo.trainer.shards`). Order, seeds and targets are the loader's; only the clips that share
a batch with a clip while it is encoded are others, which moves features by rounding errors.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fmrizoo import __version__
from fmrizoo.config import Recipe, to_dict
from fmrizoo.data.batch import ClipFacts, Clips, batch_target
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.errors import FmrizooError, RecipeError, TrainingError
from fmrizoo.files import canonical
from fmrizoo.model import DownstreamModel
from fmrizoo.trainer.device import World, rng_state, set_rng_state
from fmrizoo.trainer.folder import RunFolder, deciding_keys
from fmrizoo.trainer.inputs import BatchStream
from fmrizoo.trainer.patience import answer_of, bytes_in
from fmrizoo.trainer.ranks import Ranks
from fmrizoo.trainer.shards import Rows, Shard
from fmrizoo.trainer.zero import micro_batch
from fmrizoo.types import ReadBatch, TaskSpec

log = logging.getLogger(__name__)


class CachedBatch(Clips[ClipFacts]):
    """Clips of one micro-batch whose features are known: a stand-in for ``CompactBatch``."""

    def __init__(self, clips: Sequence[int], samples: Sequence[ClipFacts], rows: _Rows) -> None:
        super().__init__(samples)
        self._clips, self._rows = clips, rows

    def to_batch(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ReadBatch:
        """What the head reads of these clips, on ``device``.

        Raises:
            TrainingError: the encoder ran in another ``dtype``.
        """
        if dtype != self._rows.dtype:
            raise TrainingError(
                f"the features were computed in {self._rows.dtype}, a model in {dtype} cannot use "
                f"them"
            )
        read = tuple(t.to(device, non_blocking=True) for t in self._rows.of(self._clips))
        return ReadBatch(read, self.subject, batch_target(self.samples, device))


class CachedStream:
    """The clips of a loader in its order, read from the cache."""

    def __init__(self, loader: Loader, rows: _Rows) -> None:
        self._loader, self._rows = loader, rows

    def batches(self, start: int = 0) -> Iterator[CachedBatch]:
        """Micro-batches ``start``, ``start + 1``, … without end, as :meth:`Loader.batches`."""
        return self._serve(self._loader.plan(start))

    def epoch(self) -> Iterator[CachedBatch]:
        """The loader's clips once, in the table's order."""
        return self._serve(self._loader.epoch_plan())

    def _serve(self, plan: Iterator[list[tuple[int, int]]]) -> Iterator[CachedBatch]:
        facts = self._loader.dataset.facts
        for planned in plan:
            clips = [clip for clip, _ in planned]
            yield CachedBatch(clips, [facts(clip) for clip in clips], self._rows)


class _Rows:
    """All rows of a table, over the shards of all ranks."""

    def __init__(self, shards: Sequence[Shard], dtype: torch.dtype) -> None:
        self._shards, self.dtype = shards, dtype
        self._starts = [shard.first for shard in shards]
        for shard in shards:
            shard.open()

    def of(self, clips: Sequence[int]) -> Rows:
        """What the head reads of these clips, ``(len(clips), …)`` each."""
        # Empty shards start where the next one does; the last one at a start holds its rows.
        found = [self._shards[bisect_right(self._starts, clip) - 1] for clip in clips]
        rows = [shard.row(clip) for shard, clip in zip(found, clips, strict=True)]
        return found[0].stack(rows)


class FeatureCache:
    """Features of the clips of several tables, below a run folder.

    Args:
        model: With a frozen encoder. It is copied for the computation, never changed.
        recipe: Of the run.
        out: Run folder.
        tables: Clips by the name of their part (``train`` is what :func:`train` asks for).
        tasks: Targets of the clips.

    Raises:
        RecipeError: the head trains something of the encoder.
    """

    def __init__(
        self,
        model: DownstreamModel,
        recipe: Recipe,
        out: Path,
        tables: Mapping[str, ClipTable],
        tasks: Sequence[TaskSpec] = (),
    ) -> None:
        if model.head.encoder_trains():
            raise RecipeError(
                f"train.cache_features=true needs a frozen encoder; head={recipe.head.name} "
                f"({model.head.trains}) trains it"
            )
        self._model, self._recipe = model, recipe
        self.folder = RunFolder(out).features
        self._tables, self._tasks = dict(tables), tuple(tasks)
        self._rows: dict[str, _Rows] = {}

    def build(
        self,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Make what is not there yet: each rank encodes its share of every table.

        The random state and the model are left as they were.

        Args:
            device: Where the encoder runs.
            dtype: The training precision: bf16 runs keep what a bf16 encoder gives.
            ranks: All of them call this.
            stop: Asked between two batches.

        Returns:
            False if ``stop`` said so on any rank before all was made.

        Raises:
            CheckpointError: no room, on any rank.
            CorruptStoreError: a damaged clip, on any rank.
        """
        before, world = rng_state(device), ranks.world
        try:
            for part, table in self._tables.items():
                shards = self._shards(part, table, dtype, world.size)
                mine = shards[world.rank]
                make = partial(self._make, mine, part, device, dtype, world, stop)
                made = _together(ranks, make, self.folder / part)
                if not all(ranks.gathered(made)):
                    return False
                self._rows[part] = _Rows(shards, dtype)
        finally:
            set_rng_state(before, device)
        return True

    def stream(self, part: str, loader: BatchStream) -> CachedStream:
        """The clips that ``loader`` (of this part's table) would read, in its order."""
        if not isinstance(loader, Loader) or loader.table is not self._tables.get(part):
            raise TrainingError(f"the cache of {part} needs a Loader of the table it was made of")
        return CachedStream(loader, self._rows[part])

    def epoch(self, part: str, batch: int) -> Iterator[CachedBatch]:
        """Every clip of a part once, in the table's order, ``batch`` at a time."""
        return CachedStream(self._loader(part, batch, World()), self._rows[part]).epoch()

    def remove(self) -> None:
        """Delete the files (one rank calls this)."""
        if not self.folder.is_dir():
            return
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            # Some network folders keep files that another rank still maps; the run is finished.
            log.warning("%s is no longer needed but could not be removed: %s", self.folder, error)
        else:
            log.info("removed %s: the run is finished, its features can be made again", self.folder)

    def _loader(self, part: str, batch: int, world: World) -> Loader:
        return Loader(
            self._tables[part],
            self._recipe.data,
            batch,
            rank=world.rank,
            world=world.size,
            seed=self._recipe.train.seed,
            tasks=self._tasks,
        )

    def _shards(self, part: str, table: ClipTable, dtype: torch.dtype, size: int) -> list[Shard]:
        """Shards of all ranks, in the order of the table's rows."""
        n, made_of = len(table), self._made_of(table, dtype)
        bounds = [n * rank // size for rank in range(size + 1)]
        return [
            Shard(self.folder / part, rank, first, last, made_of)
            for rank, (first, last) in enumerate(itertools.pairwise(bounds))
        ]

    def _made_of(self, table: ClipTable, dtype: torch.dtype) -> dict[str, Any]:
        """What decides the features, by words for the log."""
        sections = to_dict(self._recipe)
        (data,) = deciding_keys({"data": sections["data"]})
        return {
            "fmrizoo version": __version__,
            "encoder": _weights_sha(self._model.backbone),
            "backbone section": sections.get("backbone"),
            "head section": sections.get("head"),
            "stages": list(self._model.head.stages),
            "data section": data,
            "table of clips": _table_sha(table),
            "precision": str(dtype),
        }

    def _make(
        self,
        shard: Shard,
        part: str,
        device: torch.device,
        dtype: torch.dtype,
        world: World,
        stop: Callable[[], bool],
    ) -> bool:
        """Write this rank's share, unless it is there; False if stopped."""
        fault = shard.fault()
        if not fault:
            log.info("features of %s: using those in %s", part, shard.folder)
            return True
        if fault != "absent":
            log.warning("features of %s (%s) are %s: making them again", part, shard.name, fault)
        log.info(
            "features of %s: running the frozen encoder once over %d clips",
            part,
            shard.last - shard.first,
        )
        model = copy.deepcopy(self._model).to(device, dtype).eval()
        loader = self._loader(part, micro_batch(self._recipe.train, world), world)

        def encoded() -> Iterator[Rows]:
            for compact in loader.epoch():
                if stop():
                    raise _StoppedError
                # Not around the loop: while the one who asks is at work, or has failed and keeps
                # this generator alive, gradients are its own business.
                with torch.no_grad():
                    rows = model.read(compact.to_batch(device, dtype))
                yield rows

        try:
            shard.write(encoded())
        except _StoppedError:
            return False
        return True


def _together(ranks: Ranks, make: Callable[[], bool], folder: Path) -> bool:
    """:meth:`Ranks.each`; ranks that are done sooner give signs of life while files grow."""
    made, failed = False, None
    try:
        made = make()
    except FmrizooError as error:
        failed = error

    def outcome() -> bool:
        if failed is not None:
            raise failed
        return made

    return answer_of(ranks, lambda: ranks.each(outcome), lambda: bytes_in(folder))


class _StoppedError(Exception):
    """A signal asked for the end while features were being made."""


def _weights_sha(module: nn.Module) -> str:
    """Of all parameters and buffers by name."""
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        plain = value.detach().cpu().contiguous()
        sha.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        sha.update(plain.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def _table_sha(table: ClipTable) -> str:
    """Of which voxels and frames the clips hold, in the table's order."""
    sha = hashlib.sha256()
    runs = [[run.name, run.uuid, run.meta_crc32] for run in table.runs]
    sha.update(canonical([runs, table.clip_frames, table.frame_stride]))
    for column in (table.run, table.start):
        sha.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
    return sha.hexdigest()

"""Compact samples (in-brain voxels as stored) and how they become a :class:`Batch` on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fmrizoo.data.augment import Augmentation
from fmrizoo.data.clips import Labels
from fmrizoo.data.codec import Array
from fmrizoo.data.normalize import voxel_affine
from fmrizoo.data.reader import RunReader
from fmrizoo.data.store import Store
from fmrizoo.types import Batch, Grid, Voxels
from fmrizoo.types.batch import fresh


@dataclass(frozen=True)
class _OnDevice:
    a: Tensor
    b: Tensor
    index: Tensor
    mask: Tensor


class RunDecode:
    """Turns a run's stored numbers into normalised voxels; shared by all its samples.

    Pickled as a reference (store, run, mode), so that samples stay small between processes.
    """

    def __init__(self, store: Path, reader: RunReader, mode: str) -> None:
        self._where = (store, reader.name, mode)
        affine = voxel_affine(reader, mode)
        self.background = affine.background
        self.grid = reader.grid
        self.n_vox = reader.n_vox
        self._cpu = _OnDevice(
            torch.from_numpy(affine.a),
            torch.from_numpy(affine.b),
            torch.from_numpy(reader.index),
            torch.from_numpy(reader.mask),
        )
        # Only ever one device besides the CPU, and its copies live as long as this run is cached.
        self._moved: dict[torch.device, _OnDevice] = {torch.device("cpu"): self._cpu}

    def __reduce__(self) -> tuple[object, tuple[Path, str, str]]:
        return _decode_again, self._where

    def on(self, device: torch.device) -> _OnDevice:
        """The tensors on ``device`` (copied there once)."""
        if device not in self._moved:
            c = self._cpu
            self._moved[device] = _OnDevice(*(v.to(device) for v in (c.a, c.b, c.index, c.mask)))
        return self._moved[device]


@lru_cache(maxsize=8)
def _store_again(path: Path) -> Store:
    return Store(path)


@lru_cache(maxsize=64)
def _decode_again(path: Path, run: str, mode: str) -> RunDecode:
    return RunDecode(path, _store_again(path).open(run), mode)


@dataclass(frozen=True, eq=False, kw_only=True)
class ClipFacts:
    """What is known of a clip without reading its voxels.

    Attributes:
        subject, run, start, tr: Where the clip is from; ``tr`` seconds between its frames.
        unit: What its prediction counts for.
        labels: Class name, level or value of each target as in the table; None = missing.
        targets: Class index (int) or value (float, as exact as in the table) of each target, NaN =
            missing; empty without tasks.
    """

    subject: str
    run: str
    start: int
    tr: float
    unit: str
    labels: Labels = ()
    targets: tuple[int | float, ...] = ()

    @property
    def facts(self) -> ClipFacts:
        """These alone, without what a subclass holds beside them (voxels)."""
        return ClipFacts(**{f.name: getattr(self, f.name) for f in fields(ClipFacts)})


@dataclass(frozen=True, eq=False, kw_only=True)
class CompactSample(ClipFacts):
    """One clip as stored.

    Attributes:
        rows: ``(frames, row)``: brain voxels first, then padding. Reused by the loader once the
            sample and all arrays and tensors made from it are gone.
        decode: How they become voxels.
        seed: The sample's own random seed.
    """

    rows: Array
    decode: RunDecode
    seed: int


def batch_target(clips: Sequence[ClipFacts], device: torch.device | str = "cpu") -> Tensor | None:
    """``Batch.target`` of clips; None without tasks.

    One target: ``(b,)`` int64 class indices, or float32 values. Several: ``(b, k)`` float32. NaN =
    missing, which turns class indices into floats as well.
    """
    rows = [clip.targets for clip in clips]
    if not rows or not rows[0]:
        return None
    if len(rows[0]) > 1:
        return torch.tensor(rows, dtype=torch.float32, device=device)
    values = [row[0] for row in rows]
    whole = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64 if whole else torch.float32, device=device)


Known = TypeVar("Known", bound=ClipFacts)


class Clips(Generic[Known]):
    """Clips of one micro-batch, and what is known of them."""

    def __init__(self, samples: Sequence[Known]) -> None:
        self.samples = tuple(samples)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def subject(self) -> list[str]:
        """Subject labels."""
        return [s.subject for s in self.samples]

    @property
    def run(self) -> list[str]:
        """Run names."""
        return [s.run for s in self.samples]

    @property
    def units(self) -> list[str]:
        """What each prediction counts for: event, run or subject."""
        return [s.unit for s in self.samples]

    @property
    def labels(self) -> list[Labels]:
        """Class names, levels and values of each clip as in the table."""
        return [s.labels for s in self.samples]


class CompactBatch(Clips[CompactSample]):
    """Samples of one micro-batch.

    Args:
        samples: The clips.
        augment: What changes training clips on their device, if anything.
    """

    def __init__(
        self, samples: Sequence[CompactSample], augment: Augmentation | None = None
    ) -> None:
        super().__init__(samples)
        self._augment = augment

    def to_batch(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Batch:
        """Normalised clips on ``device``; only the in-brain bytes travel there.

        They stay compact until ``bold`` is read: ``(b, 1, x, y, z, t)`` over memory in the order
        b, t, x, y, z.

        Raises:
            DataError: a random movement that takes a brain out of its box.
        """
        device = torch.device(device)
        if self._augment is None:
            return self._normalised(device, dtype)
        # Changed in float32, rounded once.
        seeds = [s.seed for s in self.samples]
        return self._augment(self._normalised(device, torch.float32), seeds).to(device, dtype)

    def _normalised(self, device: torch.device, dtype: torch.dtype) -> Batch:
        runs = [s.decode.on(device) for s in self.samples]
        counts = tuple(s.decode.n_vox for s in self.samples)
        values = fresh((len(self.samples[0].rows), sum(counts)), dtype, device)
        for sample, out in zip(self.samples, torch.split(values, list(counts), 1), strict=True):
            _decode(sample, out)
        voxels = Voxels(
            values=values,
            index=torch.cat([run.index for run in runs]),
            counts=counts,
            background=torch.tensor([s.decode.background for s in self.samples], device=device),
            grid=Grid(*self.samples[0].decode.grid, self.samples[0].rows.shape[0]),
        )
        return Batch.compact(
            voxels,
            mask=torch.stack([run.mask for run in runs]),
            tr=torch.tensor([s.tr for s in self.samples], device=device),
            subject=self.subject,
            run=self.run,
            start=torch.tensor([s.start for s in self.samples], device=device),
            target=batch_target(self.samples, device),
            seed=torch.tensor([s.seed for s in self.samples], dtype=torch.int64, device=device),
        )


def _decode(sample: CompactSample, out: Tensor) -> None:
    """``out (frames, voxels)``: ``a * stored + b`` at the brain voxels."""
    run = sample.decode.on(out.device)
    stored = torch.from_numpy(sample.rows).to(out.device)[:, : sample.decode.n_vox]
    # One frame at a time stays in a CPU's cache; other devices take all at once.
    step = 1 if out.device.type == "cpu" else max(len(stored), 1)
    for t in range(0, len(stored), step):
        # float32 whatever the dtype asked for: z-scores are small differences of large means.
        out[t : t + step] = torch.addcmul(run.b, stored[t : t + step].to(torch.float32), run.a)


def collate(samples: Sequence[CompactSample]) -> CompactBatch:
    """For ``torch.utils.data.DataLoader(ClipDataset(...), collate_fn=collate)``."""
    return CompactBatch(samples)

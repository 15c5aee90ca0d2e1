"""Clips on their way to a backbone.

Shape letters: ``b`` samples, ``v`` brain voxels, ``x y z t`` voxels and frames.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmrizoo.errors import DataError
from fmrizoo.types.grid import Grid

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# Memory of the last host tensors of this size or more that nobody looks at any longer.
_LARGE = 4 << 20
_kept: deque[NDArray[np.uint8]] = deque(maxlen=2)


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Uninitialised memory of a batch; on a CPU used again once the last tensor over it is gone.

    A dense clip of 20 frames is 35 MB: to touch so many new pages costs more than to fill them.
    Two such pieces are kept at most, in huge pages where the kernel has them (NumPy asks it to).
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _LARGE:
        return torch.empty(*shape, dtype=dtype, device=device)
    # The tensor's storage holds this view, and nothing else does: it goes when the storage goes.
    memory = _memory(size)
    view = memory[:]
    weakref.finalize(view, _kept.append, memory).atexit = False
    return torch.from_numpy(view).view(dtype).view(*shape)


def _memory(size: int) -> NDArray[np.uint8]:
    for _ in range(len(_kept)):
        try:
            memory = _kept.popleft()
        except IndexError:  # another thread took it
            break
        if memory.nbytes == size:
            return memory
        _kept.append(memory)
    return np.empty(size, np.uint8)


@dataclass
class Voxels:
    """In-brain voxels of several clips: the compact form of ``bold``.

    Attributes:
        values: ``(t, v)`` normalised BOLD, the samples one after the other along ``v``.
        index: ``(v,)`` int64 row-major cell ``(x · Y + y) · Z + z`` of each voxel, rising within a
            sample.
        counts: Voxels of each sample; they add up to ``v``.
        background: ``(b,)`` value of all other voxels.
        grid: Voxels and frames of the dense clips.
    """

    values: Tensor
    index: Tensor
    counts: tuple[int, ...]
    background: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        v, b = sum(self.counts), len(self.counts)
        if self.values.shape != (self.grid.t, v) or not self.values.is_floating_point():
            raise DataError(
                f"voxels must be floating point {(self.grid.t, v)}, got {self.values.dtype} "
                f"{tuple(self.values.shape)}"
            )
        if self.index.shape != (v,) or self.background.shape != (b,):
            raise DataError(
                f"index must be {(v,)} and background {(b,)}, got {tuple(self.index.shape)} and "
                f"{tuple(self.background.shape)}"
            )

    @classmethod
    def of(cls, bold: Tensor, mask: Tensor, background: Tensor) -> Voxels:
        """The voxels of ``bold (b, 1, x, y, z, t)`` in ``mask (b, x, y, z)``."""
        grid = Grid(*bold.shape[2:])
        inside = [cells.flatten().nonzero()[:, 0] for cells in mask]
        frames = bold[:, 0].permute(0, 4, 1, 2, 3)
        parts = [
            clip.flatten(1).index_select(1, index)
            for clip, index in zip(frames, inside, strict=True)
        ]
        counts = tuple(len(index) for index in inside)
        return cls(torch.cat(parts, 1), torch.cat(inside), counts, background, grid)

    def dense(self) -> Tensor:
        """``(b, 1, x, y, z, t)`` over memory in the order b, t, x, y, z."""
        space = math.prod(self.grid[:3])
        shape = (len(self.counts), self.grid.t, space)
        values = torch.split(self.values, list(self.counts), 1)
        # NumPy takes neither subclasses (which may only play at computing) nor trained values.
        if self.values.is_cpu and type(self.values) is Tensor and not self.values.requires_grad:
            out = fresh(shape, self.values.dtype, "cpu")
            self._fill(out, values)
        else:
            out = self.values.new_empty(shape)
            out[:] = self.background.to(out.dtype).view(-1, 1, 1)
            # By number: autograd lets nobody write into the rows that iterating over it gives.
            pairs = zip(values, self.split(self.index), strict=True)
            for clip, (frames, index) in enumerate(pairs):
                out[clip].index_copy_(1, index, frames)
        return out.view(-1, self.grid.t, *self.grid[:3]).permute(0, 2, 3, 4, 1).unsqueeze(1)

    def _fill(self, out: Tensor, values: Sequence[Tensor]) -> None:
        """``out (b, t, cells)`` on a CPU: frame by frame, each filled while it is in the cache."""
        word = _WORDS[out.dtype.itemsize]  # bits are copied, whatever they mean
        background = self.background.to(out.dtype)
        indices = self.split(self.index)
        for clip, frames, index, outside in zip(out, values, indices, background, strict=True):
            brain = np.zeros(clip.shape[1], bool)
            brain[index.numpy()] = True
            for frame, row in zip(clip, frames, strict=True):
                frame.fill_(outside)
                frame.view(word).numpy()[brain] = row.view(word).numpy()

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """``rows (v, …)`` cut into the samples."""
        return torch.split(rows, list(self.counts))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Voxels:
        """A copy on ``device``; ``dtype`` changes the values only."""
        return replace(
            self,
            values=self.values.to(device, dtype or self.values.dtype, non_blocking=True),
            index=self.index.to(device, non_blocking=True),
            background=self.background.to(device, non_blocking=True),
        )


class _DenseOnDemand:
    """The attribute ``bold``: set to a dense tensor or to :class:`Voxels`, read as a tensor."""

    def __get__(self, batch: Batch | None, owner: type) -> Any:
        if batch is None:
            return self
        kept = batch.__dict__
        if "_bold" not in kept:
            kept["_bold"] = kept["_voxels"].dense()
        return kept["_bold"]

    def __set__(self, batch: Batch, value: Tensor | Voxels) -> None:
        batch.__dict__.pop("_bold", None)
        batch.__dict__["_voxels" if isinstance(value, Voxels) else "_bold"] = value


@dataclass
class Batch:
    """Clips of several runs, checked once at the door.

    Attributes:
        bold: ``(b, 1, x, y, z, t)`` floating point, normalised, background filled. Given as
            :class:`Voxels` (:meth:`compact`), it is made dense when it is first read.
        mask: ``(b, x, y, z)`` bool, True = brain.
        tr: ``(b,)`` seconds between two frames of the clip.
        subject, run: ``b`` names each.
        start: ``(b,)`` first frame within the run.
        target: ``(b,)`` class index or value; ``(b, k)`` floating point for k targets at once,
            NaN = missing; or None.
        seed: ``(b,)`` int64, one seed per sample for masks and augmentations: the same sample at
            the same training step gets the same draw for any world size; None draws freely.
    """

    bold: Tensor
    mask: Tensor
    tr: Tensor
    subject: list[str]
    run: list[str]
    start: Tensor
    target: Tensor | None = None
    seed: Tensor | None = None

    @classmethod
    def compact(
        cls,
        voxels: Voxels,
        mask: Tensor,
        tr: Tensor,
        subject: list[str],
        run: list[str],
        start: Tensor,
        target: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> Batch:
        """A batch of in-brain voxels; a backbone that can do without never makes it dense."""
        return cls(cast(Tensor, voxels), mask, tr, subject, run, start, target, seed)

    def __post_init__(self) -> None:
        shape, dtype = self._form()
        b = shape[0] if shape else 0
        if len(shape) != 6 or shape[1] != 1:
            raise DataError(f"bold must be (b, 1, x, y, z, t), got {shape}")
        if not dtype.is_floating_point:
            raise DataError(f"bold must be floating point, got {dtype}")
        if tuple(self.mask.shape) != (b, *shape[2:5]) or self.mask.dtype != torch.bool:
            raise DataError(
                f"mask must be bool (b, x, y, z) = {(b, *shape[2:5])}, "
                f"got {self.mask.dtype} {tuple(self.mask.shape)}"
            )
        for name in ("tr", "start", "target", "seed"):
            value = getattr(self, name)
            if value is not None and value.shape[:1] != (b,):
                raise DataError(f"{name} must have {b} rows, got shape {tuple(value.shape)}")
        if len(self.subject) != b or len(self.run) != b:
            raise DataError(f"subject and run need {b} names each")

    def _form(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of ``bold``, without making it dense."""
        if self.voxels is not None:
            return (len(self.voxels.counts), 1, *self.voxels.grid), self.voxels.values.dtype
        return tuple(self.bold.shape), self.bold.dtype

    def __len__(self) -> int:
        return len(self.subject)

    @property
    def voxels(self) -> Voxels | None:
        """The compact form, if the batch came in it."""
        found: Voxels | None = self.__dict__.get("_voxels")
        return found

    @property
    def background(self) -> Tensor | None:
        """``(b,)`` value outside the brain, where it is known."""
        return None if self.voxels is None else self.voxels.background

    @property
    def grid(self) -> Grid:
        """Voxels and frames of each clip."""
        return Grid(*self._form()[0][2:])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy on ``device``; ``dtype`` changes ``bold`` only."""

        def move(v: Tensor | None) -> Tensor | None:
            return None if v is None else v.to(device, non_blocking=True)

        if self.voxels is not None:
            bold = cast(Tensor, self.voxels.to(device, dtype))
        else:
            bold = self.bold.to(device, dtype or self.bold.dtype, non_blocking=True)
        return replace(
            self,
            bold=bold,
            mask=self.mask.to(device, non_blocking=True),
            tr=self.tr.to(device, non_blocking=True),
            start=self.start.to(device, non_blocking=True),
            target=move(self.target),
            seed=move(self.seed),
        )


Batch.bold = _DenseOnDemand()  # type: ignore[assignment]


@dataclass
class ReadBatch:
    """Clips of which a frozen encoder's features are known already.

    Attributes:
        read: What ``Head.read`` returned for these clips, ``(b, …)`` each.
        subject: ``b`` names.
        target: As in :class:`Batch`.
    """

    read: tuple[Tensor, ...]
    subject: list[str]
    target: Tensor | None = None

    def __len__(self) -> int:
        return len(self.subject)

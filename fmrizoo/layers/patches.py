"""Non-overlapping 4-D patches: embedding, and the padding that makes a grid divisible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fmrizoo.errors import DataError
from fmrizoo.layers.readout import scaled
from fmrizoo.types import Grid


def background_value(bold: Tensor, mask: Tensor | None) -> Tensor:
    """``(b,)`` lowest value of each clip's first frame, inside the brain if a mask is given.

    Later frames have no say: a causal model must not learn of them. Nor has what lies outside the
    brain; 0 for a clip without a brain voxel.

    ``bold (b, c, x, y, z, t)``; ``mask (b, x, y, z)`` True = brain, or None.
    """
    first = bold.detach()[..., 0]
    if mask is None:
        return first.flatten(1).amin(1)
    lowest = first.masked_fill(~mask.unsqueeze(1), torch.inf).flatten(1).amin(1)
    return torch.where(lowest.isposinf(), 0.0, lowest)


def pad_to(
    bold: Tensor, mask: Tensor | None, size: Grid, background: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Pad the end of x, y, z with ``background (b,)`` up to ``size``; the frames must already fit.

    Raises:
        DataError: the clip is larger than ``size`` or has another number of frames.
    """
    have = Grid(*bold.shape[2:])
    if any(h > s for h, s in zip(have[:3], size[:3], strict=True)):
        raise DataError(f"clip of {have} voxels is larger than the model's grid {size}")
    if have.t != size.t:
        raise DataError(f"clip has {have.t} frames, expected {size.t}")
    if have == size:
        return bold, mask
    out = bold.new_empty(*bold.shape[:2], *size)
    out[:] = background.to(bold.dtype).view(-1, 1, 1, 1, 1, 1)
    out[:, :, : have.x, : have.y, : have.z] = bold
    if mask is not None:
        mask = F.pad(mask, (0, size.z - have.z, 0, size.y - have.y, 0, size.x - have.x))
    return out, mask


@dataclass(frozen=True)
class Brain:
    """Which voxels of a clip count, and what the others are read as.

    Attributes:
        mask: ``(b, x, y, z)`` True = brain.
        background: ``(b,)``, a constant: no gradient flows to where it was taken from.
    """

    mask: Tensor
    background: Tensor

    def fill(self, bold: Tensor) -> Tensor:
        """``bold (b, c, x, y, z, t)`` with the background outside the brain."""
        background = self.background.to(bold.dtype).view(-1, 1, 1, 1, 1, 1)
        return torch.where(self.mask[:, None, ..., None], bold, background)


def patch_share(mask: Tensor, patch: Sequence[int]) -> Tensor:
    """``mask (b, x, y, z)`` → ``(b, x', y', z')`` share of True voxels in each spatial patch."""
    return F.avg_pool3d(mask.unsqueeze(1).float(), tuple(patch[:3])).squeeze(1)


SLAB_BYTES = 1 << 22  # of patches that are copied out at a time


class _SlabProjection(torch.autograd.Function):
    """``patches @ weight.T`` on a CPU, a slab of patches at a time, keeping none of them.

    Copying all patches out at once (or all frames, for a convolution) moves the whole clip through
    memory with long strides; a slab stays in the cache. Saves ``bold`` itself and nothing else.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, bold: Tensor, weight: Tensor, patch: Patch, brain: Brain | None
    ) -> Tensor:
        b, _, *size = bold.shape
        grid = [s // p for s, p in zip(size, patch, strict=True)]
        out = weight.new_empty(b, *grid, weight.shape[0])
        for samples, rows in _slabs(bold, patch):
            target = out[samples, rows].view(-1, weight.shape[0])
            torch.mm(_patches(bold, patch, samples, rows, brain), weight.t(), out=target)
        ctx.save_for_backward(bold, weight)
        ctx.patch, ctx.brain = patch, brain
        return out.view(b, -1, weight.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        bold, weight = ctx.saved_tensors
        patch, b, rows = ctx.patch, bold.shape[0], bold.shape[2] // ctx.patch[0]
        d_bold = torch.empty_like(bold) if ctx.needs_input_grad[0] else None
        # Summed over many slabs: at least in fp32, whatever the weights' own precision.
        d_weight = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        by_row = grad.reshape(b, rows, -1, weight.shape[0])
        for samples, chosen in _slabs(bold, patch):
            part = by_row[samples, chosen].reshape(-1, weight.shape[0])
            if ctx.needs_input_grad[1]:
                d_weight += part.t() @ _patches(bold, patch, samples, chosen, ctx.brain)
            if d_bold is not None:
                voxels = slice(chosen.start * patch[0], chosen.stop * patch[0])
                target = d_bold[samples, :, voxels]
                target.copy_(_from_patches(part @ weight, target, patch))
        if d_bold is not None and ctx.brain is not None:
            d_bold.masked_fill_(~ctx.brain.mask[:, None, ..., None], 0.0)
        return d_bold, d_weight.to(weight.dtype), None, None


Patch = tuple[int, int, int, int]


def _slabs(bold: Tensor, patch: Patch) -> Iterator[tuple[slice, slice]]:
    """Samples and rows of patches (along x) that fill a slab: rows of one sample, or samples."""
    b, rows = bold.shape[0], bold.shape[2] // patch[0]
    row_bytes = bold[0].numel() // rows * bold.element_size()
    some_rows = min(rows, max(1, SLAB_BYTES // row_bytes))
    some = max(1, SLAB_BYTES // (row_bytes * rows)) if some_rows == rows else 1
    for sample in range(0, b, some):
        for row in range(0, rows, some_rows):
            yield (
                slice(sample, min(sample + some, b)),
                slice(row, min(row + some_rows, rows)),
            )


def _patches(
    bold: Tensor, patch: Patch, samples: slice, rows: slice, brain: Brain | None
) -> Tensor:
    """``(tokens, px·py·pz·pt·c)`` patches of a slab, row-major; background outside the brain."""
    px, py, pz, pt = patch
    voxels = slice(rows.start * px, rows.stop * px)
    slab = bold[samples, :, voxels]
    found: Tensor = rearrange(
        slab,
        "b c (x px) (y py) (z pz) (t pt) -> (b x y z t) (px py pz pt c)",
        px=px,
        py=py,
        pz=pz,
        pt=pt,
    )
    if brain is None:
        return found
    if found.data_ptr() == slab.data_ptr():  # a view (patches of one voxel): not ours to fill
        found = found.clone()
    inside: Tensor = rearrange(
        brain.mask[samples, voxels],
        "b (x px) (y py) (z pz) -> b (x y z) 1 (px py pz) 1",
        px=px,
        py=py,
        pz=pz,
    )
    channels = bold.shape[1]
    clips = found.view(len(inside), inside.shape[1], -1, px * py * pz, pt * channels)
    for clip, cells, value in zip(clips, ~inside, brain.background[samples], strict=True):
        clip.masked_fill_(cells, value.to(clip.dtype))
    return found


def _from_patches(values: Tensor, like: Tensor, patch: Patch) -> Tensor:
    """Inverse of :func:`_patches` for a slab of the shape of ``like (b, c, x, y, z, t)``."""
    px, py, pz, pt = patch
    b, _, x, y, z, t = like.shape
    voxels: Tensor = rearrange(
        values,
        "(b x y z t) (px py pz pt c) -> b c (x px) (y py) (z pz) (t pt)",
        b=b,
        pt=pt,
        x=x // px,
        y=y // py,
        z=z // pz,
        t=t // pt,
        px=px,
        py=py,
        pz=pz,
    )
    return voxels


class PatchEmbed(nn.Module):
    """Linear embedding of 4-D patches; parameters as in SwiFT (``fc``, channels fastest).

    Attributes:
        multiplies, multiplier: On the voxels, see :class:`fmrizoo.layers.readout.ScaledLinear`.
    """

    multiplies: ClassVar[str] = "input"
    multiplier: float = 1.0

    def __init__(self, patch: Sequence[int], in_chans: int, embed_dim: int, norm: bool) -> None:
        super().__init__()
        px, py, pz, pt = patch
        self.patch: Patch = (px, py, pz, pt)
        self.fc = nn.Linear(prod(self.patch) * in_chans, embed_dim)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    @torch.no_grad()
    def fold_multiplier(self) -> None:
        """Multiply it into the weight, not the bias: the same tokens with a multiplier of 1."""
        self.fc.weight.mul_(self.multiplier)
        self.multiplier = 1.0

    def forward(self, bold: Tensor, brain: Brain | None = None) -> Tensor:
        """``(b, c, x, y, z, t)`` → ``(b, n, embed_dim)``, tokens row-major in x, y, z, t.

        ``brain``: what lies outside is read as its background.
        """
        if bold.device.type == "cpu":
            projected = _SlabProjection.apply(bold, self.fc.weight, self.patch, brain)
            out = scaled(projected, self.multiplier) + self.fc.bias
        else:
            out = self._convolve(bold if brain is None else brain.fill(bold))
        normed: Tensor = self.norm(out)
        return normed

    def _convolve(self, bold: Tensor) -> Tensor:
        """The same as one strided convolution, without copying the patches out."""
        px, py, pz, pt = self.patch
        bold = scaled(bold, self.multiplier)
        frames = rearrange(bold, "b c x y z (t pt) -> (b t) (pt c) x y z", pt=pt)
        kernel = rearrange(self.fc.weight, "e (px py pz k) -> e k px py pz", px=px, py=py, pz=pz)
        out = F.conv3d(frames, kernel, self.fc.bias, stride=(px, py, pz))
        return rearrange(out, "(b t) e x y z -> b (x y z t) e", b=bold.shape[0])

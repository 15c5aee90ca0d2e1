"""Non-overlapping 4-D patches: embedding, and the padding that makes a grid divisible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fmrizoo.errors import DataError
from fmrizoo.types import Grid


def background_value(bold: Tensor, mask: Tensor | None) -> Tensor:
    """``(b,)`` value outside the brain: of the first such voxel, else each clip's minimum.

    ``bold (b, c, x, y, z, t)``; ``mask (b, x, y, z)`` True = brain, or None.
    """
    lowest = bold.flatten(1).amin(1)
    if mask is None:
        return lowest
    outside = ~mask.flatten(1)
    first = outside.float().argmax(1)
    sampled = bold[:, 0, ..., 0].flatten(1).gather(1, first[:, None])[:, 0]
    return torch.where(outside.any(1), sampled, lowest)


def pad_to(bold: Tensor, mask: Tensor | None, size: Grid) -> tuple[Tensor, Tensor | None]:
    """Pad the end of x, y, z with background up to ``size``; the frames must already fit.

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
    out[:] = background_value(bold, mask).view(-1, 1, 1, 1, 1, 1)
    out[:, :, : have.x, : have.y, : have.z] = bold
    if mask is not None:
        mask = F.pad(mask, (0, size.z - have.z, 0, size.y - have.y, 0, size.x - have.x))
    return out, mask


def patch_share(mask: Tensor, patch: Sequence[int]) -> Tensor:
    """``mask (b, x, y, z)`` → ``(b, x', y', z')`` share of True voxels in each spatial patch."""
    return F.avg_pool3d(mask.unsqueeze(1).float(), tuple(patch[:3])).squeeze(1)


def to_patches(bold: Tensor, patch: Sequence[int]) -> Tensor:
    """``(b, c, x, y, z, t)`` → ``(b, x', y', z', t', px·py·pz·pt·c)``, channel fastest."""
    return rearrange(
        bold,
        "b c (x px) (y py) (z pz) (t pt) -> b x y z t (px py pz pt c)",
        px=patch[0],
        py=patch[1],
        pz=patch[2],
        pt=patch[3],
    )


class PatchEmbed(nn.Module):
    """Linear embedding of 4-D patches; parameters as in SwiFT (``fc``, features channel-fastest).

    Computed as a strided 3-D convolution over frames: the patches are never copied out when the
    clip lies time-first in memory, as the loader delivers it.
    """

    def __init__(self, patch: Sequence[int], in_chans: int, embed_dim: int, norm: bool) -> None:
        super().__init__()
        self.patch = tuple(patch)
        self.in_chans = in_chans
        self.fc = nn.Linear(
            self.patch[0] * self.patch[1] * self.patch[2] * self.patch[3] * in_chans, embed_dim
        )
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, bold: Tensor) -> Tensor:
        """``(b, c, x, y, z, t)`` → ``(b, n, embed_dim)``, tokens row-major in x, y, z, t."""
        px, py, pz, pt = self.patch
        frames = rearrange(bold, "b c x y z (t pt) -> (b t) (pt c) x y z", pt=pt)
        kernel = rearrange(self.fc.weight, "e (px py pz k) -> e k px py pz", px=px, py=py, pz=pz)
        out = F.conv3d(frames, kernel, self.fc.bias, stride=(px, py, pz))
        out = rearrange(out, "(b t) e x y z -> b (x y z t) e", b=bold.shape[0])
        normed: Tensor = self.norm(out)
        return normed

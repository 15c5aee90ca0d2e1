"""Random changes of training clips, on the device: ``data.augment``.

Every draw comes from the sample's own seed, so a sample is changed in the same way for any number
of threads and ranks and in any batch. In this order: movement of the whole head, a weaker band of
frequencies, intensity, noise. Background and brain stay what they are: changes of values touch
brain voxels alone; a movement takes the brain mask along, and what it leaves behind is background.

Shapes: ``b`` samples, ``v`` brain voxels of all samples, ``t`` frames, ``x y z`` voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from fmrizoo.config import AffineConfig, AugmentConfig
from fmrizoo.data.order import derived
from fmrizoo.errors import DataError
from fmrizoo.types import Batch, Voxels

# Of what a sample's seed decides; its random start is 1 (fmrizoo.data.dataset).
_AFFINE, _FREQUENCY, _INTENSITY, _NOISE = 2, 3, 4, 5
_BAND = 0.25  # share of the frequencies above 0 that a band holds


class Augmentation:
    """What ``config`` asks for; with every strength at 0 a batch comes back unchanged.

    Args:
        config: Strengths.
        voxel_size: Millimetres along x, y, z.
    """

    def __init__(self, config: AugmentConfig, voxel_size: Sequence[float]) -> None:
        self._config, self._size = config, tuple(voxel_size)

    def __call__(self, batch: Batch, seeds: Sequence[int]) -> Batch:
        """``batch`` (compact, float32) with every sample changed by its own seed.

        Raises:
            DataError: a dense batch, or a movement that takes a brain out of its box.
        """
        voxels, c = batch.voxels, self._config
        if voxels is None:
            raise DataError("only compact batches can be augmented")
        if c.affine.rotate or c.affine.translate or c.affine.scale:
            matrix = draw_movements(c.affine, seeds, voxels.grid[:3])
            batch = moved(batch, voxels, matrix.to(voxels.values.device), self._size)
            voxels = cast(Voxels, batch.voxels)
        values = voxels.values
        if c.frequency:
            values = weaken_band(values, voxels.counts, draw_bands(len(values), seeds), c.frequency)
        if c.intensity:
            gain, shift = draw_intensity(c.intensity, seeds)
            values = stretch(values, voxels.counts, gain, shift)
        if c.noise:
            values = add_noise(values, voxels.counts, c.noise, seeds)
        if values is voxels.values:
            return batch
        return replace(batch, bold=cast(Tensor, replace(voxels, values=values)))


def _uniform(seeds: Sequence[int], which: int, n: int) -> Tensor:
    """``(b, n)`` numbers in −1 … 1, float64 on the CPU: the same ones for any device."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(derived(seed, which) >> 1)
        rows.append(torch.rand(n, generator=generator, dtype=torch.float64))
    return 2 * torch.stack(rows) - 1


# -- movement ---------------------------------------------------------------------------------


def draw_movements(config: AffineConfig, seeds: Sequence[int], box: Sequence[int]) -> Tensor:
    """``(b, 3, 4)`` millimetres from the middle of the box → millimetres from it, as the head goes.

    Scale along each axis, then turns about x, y and z, then a translation. Nothing leaves the plane
    of a box that is one voxel thick.
    """
    drawn = _uniform(seeds, _AFFINE, 9)
    thick = torch.tensor([n > 1 for n in box], dtype=torch.float64)
    scale = torch.diag_embed(1 + config.scale * drawn[:, :3] * thick)
    angles = torch.deg2rad(config.rotate * drawn[:, 3:6])
    linear = scale
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        flat = bool(thick[others].min() == 0)
        linear = _turn(angles[:, axis] * (not flat), others) @ linear
    shift = config.translate * drawn[:, 6:] * thick
    return torch.cat([linear, shift[:, :, None]], 2)


def _turn(angle: Tensor, axes: Sequence[int]) -> Tensor:
    """``(b, 3, 3)`` turns by ``angle (b,)`` in the plane of two axes."""
    first, second = axes
    out = torch.eye(3, dtype=angle.dtype).repeat(len(angle), 1, 1)
    out[:, first, first] = out[:, second, second] = torch.cos(angle)
    out[:, first, second] = -torch.sin(angle)
    out[:, second, first] = torch.sin(angle)
    return out


def moved(batch: Batch, voxels: Voxels, matrix: Tensor, voxel_size: Sequence[float]) -> Batch:
    """``batch`` with every head moved by ``matrix (b, 3, 4)``; see :func:`draw_movements`.

    Raises:
        DataError: a brain that is out of its box afterwards.
    """
    background = voxels.background
    bold, mask = resample(batch.bold, batch.mask, background, matrix, voxel_size)
    for run, inside in zip(batch.run, mask.flatten(1).any(1).tolist(), strict=True):
        if not inside:
            raise DataError(
                f"data.augment.affine moves the whole brain of run {run} out of its box: lower "
                "data.augment.affine.translate"
            )
    return replace(batch, bold=cast(Tensor, Voxels.of(bold, mask, background)), mask=mask)


def resample(
    bold: Tensor, mask: Tensor, background: Tensor, matrix: Tensor, voxel_size: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """``bold (b, 1, x, y, z, t)`` and ``mask (b, x, y, z)`` moved by ``matrix (b, 3, 4)``.

    Trilinear between brain voxels alone (background never bleeds in); brain is where at least half
    of the weight comes from brain.
    """
    box = bold.shape[2:5]
    device = bold.device
    back = torch.linalg.inv(matrix[:, :, :3])
    size = torch.tensor(voxel_size, dtype=matrix.dtype, device=device)
    middle = (torch.tensor(box, dtype=matrix.dtype, device=device) - 1) / 2
    cells = [torch.arange(n, dtype=matrix.dtype, device=device) for n in box]
    target = (torch.stack(torch.meshgrid(*cells, indexing="ij"), -1) - middle) * size
    source = torch.einsum("bij,bxyzj->bxyzi", back, target - matrix[:, None, None, None, :, 3])
    place = source / size + middle
    # grid_sample counts from −1 to 1 over the box's outer faces, last axis first.
    steps = torch.tensor(box, dtype=matrix.dtype, device=device)
    where = ((2 * place + 1) / steps - 1).flip(-1).to(bold.dtype)
    frames = bold[:, 0].permute(0, 4, 1, 2, 3)
    inside = mask[:, None].to(bold.dtype)
    stacked = torch.cat([frames * inside, inside], 1)
    taken = grid_sample(stacked, where, padding_mode="zeros", align_corners=False)
    weight = taken[:, -1:]
    # Half exactly is brain; coordinates carry rounding errors.
    brain = weight >= 0.5 - 1e-4
    empty = background.to(bold.dtype).view(-1, 1, 1, 1, 1)
    out = torch.where(brain, taken[:, :-1] / weight.clamp(min=0.25), empty)
    return out.permute(0, 2, 3, 4, 1).unsqueeze(1), brain[:, 0]


# -- values -----------------------------------------------------------------------------------


def _each(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """``(…, b)`` → ``(…, v)``: every sample's value at its voxels."""
    repeats = torch.tensor(counts, device=rows.device)
    return rows.repeat_interleave(repeats, dim=-1, output_size=sum(counts))


def _means(values: Tensor, counts: Sequence[int]) -> Tensor:
    """``(b,)`` means over the voxels of each sample of ``values (v,)``."""
    return torch.stack([part.mean() for part in torch.split(values, list(counts))])


def draw_bands(frames: int, seeds: Sequence[int]) -> Tensor:
    """``(t // 2 + 1, b)`` bool: the band of each sample, a quarter of all frequencies above 0."""
    n = frames // 2
    width = max(1, round(_BAND * n))
    first = ((_uniform(seeds, _FREQUENCY, 1)[:, 0] + 1) / 2 * (n - width + 1)).long()
    first = 1 + first.clamp(max=n - width)
    bins = torch.arange(n + 1)[:, None]
    return (bins >= first) & (bins < first + width)


def weaken_band(values: Tensor, counts: Sequence[int], bands: Tensor, strength: float) -> Tensor:
    """``values (t, v)`` whose amplitude in ``bands (t // 2 + 1, b)`` is ``1 − strength`` times."""
    factors = _each(1 - strength * bands.to(values.device, values.dtype), counts)
    spectrum = torch.fft.rfft(values, dim=0)
    weaker: Tensor = torch.fft.irfft(spectrum * factors, n=len(values), dim=0)
    return weaker


def draw_intensity(strength: float, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``(b,)`` gains in 1 ± strength and shifts in ± strength s.d."""
    drawn = strength * _uniform(seeds, _INTENSITY, 2)
    return 1 + drawn[:, 0], drawn[:, 1]


def stretch(values: Tensor, counts: Sequence[int], gain: Tensor, shift: Tensor) -> Tensor:
    """``mean + gain · (values − mean) + shift · s.d.``, both over a sample's voxels × frames."""
    mean = _means(values.mean(0), counts)
    square = _means((values - _each(mean, counts)).square().mean(0), counts)
    gain, shift = (v.to(values.device, values.dtype) for v in (gain, shift))
    offset = mean * (1 - gain) + shift * square.sqrt()
    return values * _each(gain, counts) + _each(offset, counts)


def add_noise(
    values: Tensor, counts: Sequence[int], strength: float, seeds: Sequence[int]
) -> Tensor:
    """White noise of ``strength`` × the rms over a sample's voxels of their s.d. over time."""
    spread = _means(values.var(0, unbiased=False), counts).sqrt()
    noise = torch.empty_like(values)
    for part, seed in zip(torch.split(noise, list(counts), 1), seeds, strict=True):
        generator = torch.Generator(values.device).manual_seed(derived(seed, _NOISE) >> 1)
        # Drawn on its own: what a sample gets must not depend on its neighbours in the batch.
        drawn = torch.randn(
            part.shape, generator=generator, dtype=values.dtype, device=values.device
        )
        part.copy_(drawn)
    return values + strength * noise * _each(spread, counts)

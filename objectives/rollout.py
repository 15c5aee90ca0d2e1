"""Forecasting: an autoregressive model rolled forward, one time slot after the other.

The model looks at one slot less than the clip has: these are the positions that it learned to
predict from. Its predictions then take the place of the oldest slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.objectives.decoders import unpatchify
from fmrizoo.objectives.scoring import background_of
from fmrizoo.types import Backbone, Batch, Grid, Voxels


def roll_forward(backbone: Backbone, decoder: nn.Module, batch: Batch, frames: int) -> Tensor:
    """What a model expects after the clips of ``batch``.

    Args:
        backbone: Causal in time or in tokens.
        decoder: Features of one step → raw voxels of the next.
        batch: Clips of at least two time slots.
        frames: How far to go; no multiple of a slot's frames is needed.

    Returns:
        ``(b, x, y, z, frames)``; the background outside the brain.

    Raises:
        RecipeError: ``frames`` < 1.
        DataError: clips of fewer than two time slots.
    """
    if frames < 1:
        raise RecipeError(f"a forecast needs at least one frame, got {frames}")
    slot = backbone.patch_size[3]
    keep = (batch.grid.t // slot - 1) * slot
    if keep < slot:
        raise DataError(
            f"clips of {batch.grid.t} frames are too short to forecast from: they need at least two"
            f" time slots of {slot} frames"
        )
    voxels = batch.voxels
    if voxels is None:
        voxels = Voxels.of(batch.bold, batch.mask, background_of(batch))
    step = _next_by_slot
    parts = [_window(batch, voxels, voxels.values[-keep:])]
    if backbone.causal_unit == "token":
        # Brains differ in size, so the clips' sequences do not go in step.
        step = _next_by_token
        parts = [_sample(parts[0], number) for number in range(len(batch))]
    with _evaluating(backbone, decoder):
        ahead = [_roll(step, backbone, decoder, part, math.ceil(frames / slot)) for part in parts]
    grid = voxels.grid._replace(t=frames)
    return replace(voxels, values=torch.cat(ahead, 1)[:frames], grid=grid).dense()[:, 0]


def _roll(
    step: Callable[[Backbone, nn.Module, Batch], Tensor],
    backbone: Backbone,
    decoder: nn.Module,
    window: Batch,
    slots: int,
) -> Tensor:
    """In-brain voxels of ``slots`` slots after ``window``, ``(slots · rt, v)``."""
    assert window.voxels is not None
    voxels, made = window.voxels, []
    for _ in range(slots):
        new = step(backbone, decoder, window).to(voxels.values.dtype)
        made.append(new)
        assert window.voxels is not None
        seen = torch.cat([window.voxels.values, new])[-voxels.grid.t :]
        window = _window(window, voxels, seen)
    return torch.cat(made)


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    """Without dropout, and as before afterwards."""
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.train(training)


def _sample(batch: Batch, number: int) -> Batch:
    """One clip of a compact batch."""
    voxels, one = batch.voxels, slice(number, number + 1)
    assert voxels is not None
    start = sum(voxels.counts[:number])
    inside = slice(start, start + voxels.counts[number])
    kept = Voxels(
        voxels.values[:, inside],
        voxels.index[inside],
        voxels.counts[one],
        voxels.background[one],
        voxels.grid,
    )
    return Batch.compact(
        kept, batch.mask[one], batch.tr[one], batch.subject[one], batch.run[one], batch.start[one]
    )


def _window(batch: Batch, voxels: Voxels, values: Tensor) -> Batch:
    """The batch with other frames: ``values (t, v)``."""
    kept = replace(voxels, values=values, grid=voxels.grid._replace(t=len(values)))
    return Batch.compact(kept, batch.mask, batch.tr, batch.subject, batch.run, batch.start)


def _in_brain(dense: Tensor, window: Batch) -> Tensor:
    """``(b, X, Y, Z, t)``, maybe padded at the ends → ``(t, v)``."""
    x, y, z, _ = window.grid
    assert window.voxels is not None
    kept = dense[:, None, :x, :y, :z]
    return Voxels.of(kept, window.mask, window.voxels.background).values


def _next_by_slot(backbone: Backbone, decoder: nn.Module, window: Batch) -> Tensor:
    """In-brain voxels of the next slot, ``(rt, v)``: decoded from the last slot's features."""
    features = backbone.encode(backbone.read(window), causal=True)
    last = features.to_grid()[..., -1].movedim(1, -1)
    grid = Grid._make((*last.shape[1:4], 1))
    index = torch.cartesian_prod(*(torch.arange(n, device=last.device) for n in grid))
    patches = decoder(last.flatten(1, 3))
    return _in_brain(unpatchify(patches, index.view(1, -1, 4), grid, backbone.reduction), window)


def _next_by_token(backbone: Backbone, decoder: nn.Module, window: Batch) -> Tensor:
    """In-brain voxels of the next slot of one clip, ``(rt, v)``: its tokens in sequence order.

    A slot that is not known yet is put after the others, so that the backbone lays the whole
    sequence out; what it holds is never read. Known tokens between two unknown ones, and the one
    predicted before them, go through the backbone together.
    """
    voxels, patch = window.voxels, backbone.patch_size
    assert voxels is not None
    blank = voxels.values[-1:].expand(patch[3], -1)
    tokens = backbone.read(_window(window, voxels, torch.cat([voxels.values, blank])))
    assert tokens.patches is not None and tokens.inside is not None
    chosen = tokens.valid[0]
    index, patches, inside = (
        part[0][chosen].unsqueeze(0) for part in (tokens.index, tokens.patches, tokens.inside)
    )
    unknown = (index[0, :, 3] == tokens.grid.t - 1).nonzero()[:, 0]
    if unknown[0] == 0:
        raise RecipeError(
            "the backbone's sequence begins with the last time slot, which nothing precedes: it "
            "cannot forecast in this order of tokens"
        )
    patches, state, start = patches.clone(), None, 0
    values = backbone.place(patches, index, window.tr)
    for here in unknown.tolist():
        features, state = backbone.extend(values[:, start:here], state)
        predicted = decoder(features[:, -1:])
        one = slice(here, here + 1)
        background = voxels.background.to(predicted.dtype).view(-1, 1, 1)
        patches[:, one] = torch.where(inside[:, one], predicted, background).to(patches.dtype)
        values[:, one] = backbone.place(patches[:, one], index[:, one], window.tr)
        start = here
    first = index[:, unknown] * index.new_tensor([1, 1, 1, 0])
    dense = unpatchify(patches[:, unknown], first, tokens.grid._replace(t=1), patch)
    return _in_brain(dense, window)

"""The smallest backbones that keep the contract of each causal unit, and clips to feed them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fmrizoo.objectives.decoders import patchify
from fmrizoo.objectives.scoring import background_of
from fmrizoo.types import Backbone, Batch, Features, Grid, Tokens, Voxels

PATCH = (2, 2, 2, 2)
P = 16
CLIP = Grid(7, 5, 4, 8)  # padded to 8×6×4: neither 7 nor 5 divides into patches
CELLS = Grid(4, 3, 2, 4)


def batch_of(clips: int = 2, frames: int = CLIP.t, seed: int = 0) -> Batch:
    """Noise in brains of different sizes; 9.0 outside, which is also the known background."""
    torch.manual_seed(seed)
    mask = torch.zeros(clips, *CLIP[:3], dtype=torch.bool)
    for i in range(clips):
        mask[i, 1 : 4 + i % 3, 1:4, 1:3] = True
    bold = torch.randn(clips, 1, *CLIP[:3], frames).masked_fill(~mask[:, None, ..., None], 9.0)
    return compact_of(
        Batch(
            bold=bold,
            mask=mask,
            tr=torch.full((clips,), 2.0),
            subject=["01"] * clips,
            run=[f"sub-01_run-{i}" for i in range(clips)],
            start=torch.arange(clips),
            seed=torch.arange(clips) + 100,
        )
    )


def compact_of(batch: Batch, background: float = 9.0) -> Batch:
    """The same clips as in-brain voxels."""
    values = Voxels.of(batch.bold, batch.mask, torch.full((len(batch),), background))
    return replace(batch, bold=values)


def ramp_of(clips: int = 2, frames: int = CLIP.t) -> Batch:
    """Every voxel goes up or down along its own line."""
    batch = batch_of(clips, frames + 20, seed=1)
    first, slope = batch.bold[..., :1], torch.randn(clips, 1, *CLIP[:3], 1)
    line = first + slope * torch.arange(frames + 20)
    return compact_of(replace(batch, bold=line))


def first_frames(batch: Batch, frames: int) -> Batch:
    """The beginning of each clip."""
    return compact_of(replace(batch, bold=batch.bold[..., :frames]))


class Raw(Backbone):
    """Tokens are raw patches, of all the grid, padded."""

    patch_size = PATCH
    reduction = PATCH
    embed_dim = P
    num_features = P
    clip_grid = Grid(8, 6, 4, 8)

    @classmethod
    def supports(cls, config: Any) -> frozenset[str]:
        return frozenset({"causal"})

    def tokenize(
        self,
        bold: Tensor,
        mask: Tensor | None = None,
        *,
        background: Tensor | None = None,
        tr: Tensor | None = None,
    ) -> Tokens:
        assert mask is not None and background is not None
        b, grid = len(bold), Grid(*bold.shape[2:]).padded(PATCH)
        dense = bold.new_empty(b, *grid)
        dense[:] = background.view(-1, 1, 1, 1, 1)
        x, y, z = bold.shape[2:5]
        dense[:, :x, :y, :z] = torch.where(mask[..., None], bold[:, 0], dense[:, :x, :y, :z])
        inside = torch.zeros(b, *grid, dtype=torch.bool)
        inside[:, :x, :y, :z] = mask[..., None]
        cut = grid.divided(PATCH)
        index = torch.cartesian_prod(*(torch.arange(s) for s in cut)).expand(b, -1, -1)
        patches, flags = patchify(dense, index, PATCH), patchify(inside, index, PATCH)
        valid = torch.ones(b, cut.size, dtype=torch.bool)
        return Tokens(patches, index, valid, cut, flags.float().mean(-1), patches, flags)

    def read(self, batch: Batch) -> Tokens:
        return self.tokenize(batch.bold, batch.mask, background=background_of(batch), tr=batch.tr)


class InTime(Raw):
    """Features: the slot's own patch + ``memory`` × the features one slot before, + all of space.

    Built with ``space`` = 0 and ``memory`` = 0 they are the patch itself.
    """

    def __init__(self, memory: float = 0.5, space: float = 0.1) -> None:
        super().__init__()
        self.memory, self.space = memory, space
        self.drop = torch.nn.Dropout(0.5)

    def tokenize(self, *given: Any, **named: Any) -> Tokens:
        return replace(super().tokenize(*given, **named), patches=None, inside=None)

    def encode(self, tokens: Tokens, *, causal: bool = False) -> Features:
        plain = Features(tokens.values, tokens.index, tokens.valid, tokens.grid, tokens.brain)
        slots = list(plain.to_grid().unbind(-1))
        for t in range(len(slots)):
            slots[t] = slots[t] + self.space * slots[t].mean((2, 3, 4), keepdim=True)
            if t:
                slots[t] = slots[t] + self.memory * slots[t - 1]
        if not causal:
            slots = [slot + 0.1 * slots[-1] for slot in slots]
        values = self.drop(torch.stack(slots, -1).flatten(2).transpose(1, 2))
        return replace(plain, values=values)


class InTokens(Raw):
    """Features: the token ``delay`` places before + ``memory`` × the sum of all up to here.

    Only tokens with brain voxels are kept, per clip; shorter clips are padded. ``fastest``: the
    axis that the sequence runs along first (``t``, or ``x`` with time slowest).
    """

    causal_unit = "token"

    def __init__(self, fastest: str = "t", memory: float = 0.1, delay: int = 0) -> None:
        super().__init__()
        self.fastest, self.memory, self.delay = fastest, memory, delay
        torch.manual_seed(5)
        self.code = torch.nn.Linear(5, P, bias=False)
        self.drop = torch.nn.Dropout(0.5)

    def tokenize(self, *given: Any, tr: Tensor | None = None, **named: Any) -> Tokens:
        full = super().tokenize(*given, **named)
        assert full.patches is not None and full.inside is not None
        t = full.index[0, :, 3]
        order = torch.arange(len(t)) if self.fastest == "t" else torch.argsort(t, stable=True)
        kept = [order[full.brain[i][order] > 0] for i in range(len(full.brain))]
        n = max(map(len, kept))
        rows = torch.stack([torch.nn.functional.pad(k, (0, n - len(k))) for k in kept])
        valid = torch.stack([torch.arange(n) < len(k) for k in kept])

        def pick(part: Tensor) -> Tensor:
            return torch.stack([p[r] for p, r in zip(part, rows, strict=True)])

        index, patches = pick(full.index), pick(full.patches)
        index = index.masked_fill(~valid[..., None], 0)
        values, brain = self.place(patches, index, tr), pick(full.brain) * valid
        inside = pick(full.inside) & valid[..., None]
        return Tokens(values, index, valid, full.grid, brain, patches, inside)

    def place(self, patches: Tensor, index: Tensor, tr: Tensor | None = None) -> Tensor:
        assert tr is not None
        seconds = tr.view(-1, 1, 1).expand(*index.shape[:2], 1)
        return patches + self.code(torch.cat([index.float(), seconds], -1))

    def extend(self, values: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        total, last = state or (values.new_zeros(len(values), 1, P),) * 2
        if state is None:
            last = values.new_zeros(len(values), self.delay, P)
        sums = total + values.cumsum(1)
        line = torch.cat([last, values], 1)
        features = line[:, : values.shape[1]] + self.memory * torch.tanh(0.05 * sums)
        return features, (sums[:, -1:], line[:, values.shape[1] :])

    def encode(self, tokens: Tokens, *, causal: bool = False) -> Features:
        values = tokens.values * tokens.valid[..., None]
        features, _ = self.extend(values)
        if not causal:
            mean = values.sum(1) / tokens.valid.sum(1, keepdim=True)
            features = features + 0.1 * mean.unsqueeze(1)
        features = self.drop(features)
        return Features(features, tokens.index, tokens.valid, tokens.grid, tokens.brain)


def places(batch: Batch, sample: int = 0) -> int:
    """Patches of a time slot that hold brain."""
    tokens = Raw().read(batch)
    return int((tokens.brain[sample] > 0).sum()) // tokens.grid.t

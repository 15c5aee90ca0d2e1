"""Masked image modelling with an L1 loss on the hidden voxels (SimMIM), in four dimensions.

Source: Xie et al. 2022 (SimMIM); SwiFT V2 uses it on fMRI. Hidden patches are replaced by one
learned token after the patch embedding and before positions are added.
What differs from SimMIM: the loss is averaged per clip before it is averaged over the batch, so
that it does not depend on how clips are dealt out to ranks; voxels that only pad the grid are never
scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.objectives.decoders import DECODERS, build_decoder
from fmrizoo.objectives.masking import MASK_TYPES, cell_factors, draw_mask
from fmrizoo.registry import register_objective, suggest
from fmrizoo.types import Backbone, Batch, Grid, Objective, Reconstruction, Tokens


@dataclass
class SimMIMConfig:
    """Masked image modelling: L1 on hidden voxels, after SimMIM."""

    name: str = "simmim"
    mask_ratio: float = 0.6  # share of mask cells hidden (MR)
    mask_type: str = "random"  # random | tube (same places at all times) | temporal (MT)
    mask_patch_size: list[int] | None = None  # voxels x y z, frames (MPS); None: the model's patch
    brain_only: bool = False  # score in-brain voxels only
    decoder: str = "mlp"  # mlp (factorised, pixel-shuffle) | linear

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio <= 1:
            raise RecipeError(f"objective.mask_ratio must be in (0, 1], got {self.mask_ratio}")
        patch = self.mask_patch_size
        if patch is not None and (len(patch) != 4 or any(v < 1 for v in patch)):
            raise RecipeError(
                f"objective.mask_patch_size needs four positive numbers (x, y, z, t), got "
                f"{list(patch)}"
            )
        for key, known in (("mask_type", MASK_TYPES), ("decoder", DECODERS)):
            value = getattr(self, key)
            if value not in known:
                raise RecipeError(
                    f"objective.{key}={value!r} is not known.{suggest(value, list(known))}"
                )


@register_objective("simmim", SimMIMConfig)
class SimMIM(Objective):
    """``loss, logs = simmim(backbone, batch)``."""

    def __init__(self, config: SimMIMConfig, *, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.factors = cell_factors(
            config.mask_patch_size or backbone.patch_size, backbone.patch_size
        )
        self.patch = backbone.patch_size
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = build_decoder(
            config.decoder, backbone.num_features, backbone.reduction, backbone.clip_grid
        )

    def forward(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error of hidden voxels, averaged per clip, then over clips.

        Raises:
            DataError: a clip has no hidden voxel to score (``brain_only`` and no brain in it).
        """
        predicted, masked = self._fill_in(backbone, batch)
        truth = batch.bold[:, 0]
        scored = masked
        if self.config.brain_only:
            scored = masked & batch.mask.unsqueeze(-1)
        count = scored.flatten(1).sum(1)
        if bool((count == 0).any()):
            names = [n for n, c in zip(batch.run, count.tolist(), strict=True) if c == 0]
            raise DataError(f"no hidden voxel to score in clips of {', '.join(names)}")
        error = (predicted.float() - truth.float()).abs() * scored
        loss = (error.flatten(1).sum(1) / count).mean()
        return loss, {"loss": loss.detach(), "masked": masked.float().mean().detach()}

    @torch.no_grad()
    def reconstruct(self, backbone: Backbone, batch: Batch) -> Reconstruction:
        """What the model fills into the hidden patches (and what it makes of the visible ones)."""
        predicted, masked = self._fill_in(backbone, batch)
        return Reconstruction(batch.bold[:, 0].float(), predicted.float(), masked)

    def _fill_in(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predicted voxels and the mask, ``(b, x, y, z, t)``, without the grid's padding."""
        tokens = backbone.tokenize(batch.bold, batch.mask)
        hidden = self._hidden(tokens, batch)
        values = torch.where(
            hidden.unsqueeze(-1), self.mask_token.to(tokens.values.dtype), tokens.values
        )
        predicted = self.decoder(backbone.encode(tokens.with_values(values)))
        masked = self._to_voxels(hidden, tokens)
        x, y, z, t = batch.grid
        return predicted[:, :x, :y, :z, :t], masked[:, :x, :y, :z, :t]

    def _hidden(self, tokens: Tokens, batch: Batch) -> Tensor:
        """``(b, n)`` True where a token is replaced by the mask token."""
        seeds = [None] * len(batch) if batch.seed is None else batch.seed.tolist()
        dense = draw_mask(
            tokens.grid, self.factors, self.config.mask_ratio, self.config.mask_type, seeds
        ).to(tokens.values.device)
        return dense.gather(1, _flat(tokens.index, tokens.grid)) & tokens.valid

    def _to_voxels(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """``(b, n)`` → ``(b, X, Y, Z, T)`` by repeating each token's flag over its patch."""
        dense = torch.zeros(
            hidden.shape[0], tokens.grid.size, dtype=torch.bool, device=hidden.device
        )
        dense.scatter_(1, _flat(tokens.index, tokens.grid).expand_as(hidden), hidden)
        voxels = dense.view(-1, *tokens.grid)
        for axis, size in enumerate(self.patch, start=1):
            voxels = voxels.repeat_interleave(size, dim=axis)
        return voxels


def _flat(index: Tensor, grid: Grid) -> Tensor:
    """``(b, n, 4)`` coordinates → ``(b, n)`` row-major cells."""
    x, y, z, t = index.unbind(-1)
    return ((x * grid.y + y) * grid.z + z) * grid.t + t

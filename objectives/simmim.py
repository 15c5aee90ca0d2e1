"""Masked image modelling with an L1 loss on the hidden voxels (SimMIM), in four dimensions.

Source: Xie et al. 2022 (SimMIM); SwiFT V2 uses it on fMRI. Hidden patches are replaced by one
learned token after the patch embedding and before positions are added.
What differs from SimMIM: the loss is averaged per clip before it is averaged over the batch, so
that it does not depend on how clips are dealt out to ranks; only in-brain voxels are scored unless
asked, and voxels that only pad the grid never.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmrizoo.errors import RecipeError
from fmrizoo.objectives.decoders import DECODERS, build_decoder, cells, flag_voxels, unpatchify
from fmrizoo.objectives.masking import MASK_TYPES, cell_factors, draw_mask
from fmrizoo.objectives.scoring import by_token, clip_mean, scored_patches
from fmrizoo.registry import register_objective, suggest
from fmrizoo.types import Backbone, Batch, Features, Objective, Reconstruction, Tokens


@dataclass
class SimMIMConfig:
    """Masked image modelling: L1 on hidden voxels, after SimMIM."""

    name: str = "simmim"
    mask_ratio: float = 0.6  # share of mask cells hidden (MR)
    mask_type: str = "random"  # random | tube (same places at all times) | temporal (MT)
    mask_patch_size: list[int] | None = None  # voxels x y z, frames (MPS); None: the model's patch
    brain_only: bool = True  # score in-brain voxels only
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
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = build_decoder(config.decoder, backbone.num_features, backbone.reduction)

    def forward(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error of hidden voxels, averaged per clip, then over clips.

        Raises:
            DataError: a clip has no hidden voxel to score (``brain_only`` and none in its brain).
        """
        tokens = backbone.read(batch)
        hidden, features = self._fill_in(backbone, tokens, batch)
        if by_token(backbone, tokens):
            # On raw patches: a batch of in-brain voxels is never made dense.
            assert tokens.patches is not None
            predicted, truth = self.decoder(features.values), tokens.patches
            scored = scored_patches(
                tokens, hidden, batch.grid, backbone.patch_size, self.config.brain_only
            )
            share = hidden.sum() / tokens.valid.sum()
        else:
            predicted, masked = self._to_voxels(backbone, tokens, features, hidden, batch)
            truth = batch.bold[:, 0]
            brain_only = self.config.brain_only
            scored = masked & batch.mask.unsqueeze(-1) if brain_only else masked
            share = masked.float().mean()
        error = (predicted.float() - truth.float()).abs()
        loss = clip_mean(error, scored, batch.run, "hidden voxel")
        return loss, {"loss": loss.detach(), "masked": share.detach()}

    @torch.no_grad()
    def reconstruct(self, backbone: Backbone, batch: Batch) -> Reconstruction:
        """What the model fills into the hidden patches (and what it makes of the visible ones).

        Where the backbone has dropped the background, the prediction is what was recorded.
        """
        tokens = backbone.read(batch)
        hidden, features = self._fill_in(backbone, tokens, batch)
        predicted, masked = self._to_voxels(backbone, tokens, features, hidden, batch)
        truth = batch.bold[:, 0].float()
        shown = flag_voxels(features.valid, features.index, features.grid, backbone.reduction)
        x, y, z, t = batch.grid
        filled = torch.where(shown[:, :x, :y, :z, :t], predicted.float(), truth)
        return Reconstruction(truth, filled, masked)

    def _fill_in(self, backbone: Backbone, tokens: Tokens, batch: Batch) -> tuple[Tensor, Features]:
        """Which tokens are hidden, ``(b, n)``, and the features of what is left."""
        hidden = self._hidden(tokens, batch)
        values = torch.where(
            hidden.unsqueeze(-1), self.mask_token.to(tokens.values.dtype), tokens.values
        )
        return hidden, backbone.encode(tokens.with_values(values))

    def _hidden(self, tokens: Tokens, batch: Batch) -> Tensor:
        """``(b, n)`` True where a token is replaced by the mask token."""
        seeds = [None] * len(batch) if batch.seed is None else batch.seed.tolist()
        dense = draw_mask(
            tokens.grid, self.factors, self.config.mask_ratio, self.config.mask_type, seeds
        ).to(tokens.values.device)
        where = cells(tokens.index, tokens.grid).expand(len(batch), -1)
        return dense.gather(1, where) & tokens.valid

    def _to_voxels(
        self,
        backbone: Backbone,
        tokens: Tokens,
        features: Features,
        hidden: Tensor,
        batch: Batch,
    ) -> tuple[Tensor, Tensor]:
        """Predicted voxels and the mask, ``(b, x, y, z, t)``, without the grid's padding."""
        reduction = backbone.reduction
        decoded = self.decoder(features.values)
        predicted = unpatchify(decoded, features.index, features.grid, reduction, features.valid)
        masked = flag_voxels(hidden, tokens.index, tokens.grid, backbone.patch_size)
        x, y, z, t = batch.grid
        return predicted[:, :x, :y, :z, :t], masked[:, :x, :y, :z, :t]

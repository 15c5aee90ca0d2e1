"""Autoregression: the next step from the steps before it, by regression on raw voxels.

What a step is, the backbone says (``Backbone.causal_unit``):

``token``
    The features of token i predict the raw patch of token i + 1 of the sequence. Source: direct
    sequence modelling of fMRI with Mamba (NeuroMamba). The first token is never scored.
``time``
    The features at time slot t predict all voxels of slot t + 1 of the same place. Ours, for
    backbones that merge space and attend over it both ways.

What differs from the source: only in-brain voxels are scored unless asked, the loss is averaged per
clip before it is averaged over clips, and beside it the log holds that of persistence (nothing
changes any more): what a model has to beat to have learned anything. (Next-token models see the
same moment at other places, which persistence does not: a forecast is the fair comparison.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.objectives.decoders import DECODERS, build_decoder, cells, flag_voxels, unpatchify
from fmrizoo.objectives.rollout import roll_forward
from fmrizoo.objectives.scoring import clip_mean, scored_patches
from fmrizoo.registry import register_objective, suggest
from fmrizoo.types import Backbone, Batch, Features, Objective, Reconstruction, Tokens

LOSSES = ("mse", "l1")


@dataclass
class AutoregressiveConfig:
    """Autoregression: regression on the next token, or on the next time slot."""

    name: str = "autoregressive"
    loss: str = "mse"  # mse | l1
    brain_only: bool = True  # score in-brain voxels only
    decoder: str = "linear"  # linear | mlp (factorised, pixel-shuffle)

    def __post_init__(self) -> None:
        for key, known in (("loss", LOSSES), ("decoder", DECODERS)):
            value = getattr(self, key)
            if value not in known:
                raise RecipeError(
                    f"objective.{key}={value!r} is not known.{suggest(value, list(known))}"
                )


class _Ahead(NamedTuple):
    """Predictions beside what came, all of one shape ``(b, …)``; ``scored`` ⊇ ``compared``."""

    predicted: Tensor
    truth: Tensor
    scored: Tensor
    persistent: Tensor  # the last frame of the slot before, again
    compared: Tensor  # scored, and there is a slot before in the clip


@register_objective("autoregressive", AutoregressiveConfig)
class Autoregressive(Objective):
    """``loss, logs = autoregressive(backbone, batch)``."""

    needs = frozenset({"causal"})

    def __init__(self, config: AutoregressiveConfig, *, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.decoder = build_decoder(config.decoder, backbone.num_features, backbone.reduction)

    def forward(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean error of the voxels one step ahead, averaged per clip, then over clips.

        The log's ``persistence`` is the same of a prediction that repeats the last frame of the
        slot before; it leaves out tokens of a clip's first slot.

        Raises:
            DataError: clips of fewer than two time slots, or one without a voxel to score.
        """
        tokens, features = _encode(backbone, batch)
        if backbone.causal_unit == "token":
            ahead = self._next_token(backbone, tokens, features, batch)
        else:
            ahead = self._next_slot(backbone, features, batch)
        what = "voxel after the first step"
        error = self._error(ahead.predicted, ahead.truth)
        loss = clip_mean(error, ahead.scored, batch.run, what)
        with torch.no_grad():
            error = self._error(ahead.persistent, ahead.truth)
            persistence = clip_mean(error, ahead.compared, batch.run, what)
        return loss, {"loss": loss.detach(), "persistence": persistence}

    @torch.no_grad()
    def reconstruct(self, backbone: Backbone, batch: Batch) -> Reconstruction:
        """Every step as predicted from the steps before it; the first ones as recorded."""
        tokens, features = _encode(backbone, batch)
        truth = batch.bold[:, 0].float()
        if backbone.causal_unit == "token":
            x, y, z, t = batch.grid
            patch, index = backbone.patch_size, tokens.index[:, 1:]
            decoded = self.decoder(features.values[:, :-1]).float()
            follows = _follows(tokens)
            voxels = unpatchify(decoded, index, tokens.grid, patch, follows)
            masked = flag_voxels(follows, index, tokens.grid, patch)
            voxels, masked = (v[:, :x, :y, :z, :t] for v in (voxels, masked))
            return Reconstruction(truth, torch.where(masked, voxels, truth), masked)
        slot = backbone.reduction[3]
        voxels, real = self._slots(backbone, features, batch)
        predicted, masked = truth.clone(), torch.zeros_like(truth, dtype=torch.bool)
        predicted[..., slot:] = torch.where(real, voxels.float(), truth[..., slot:])
        masked[..., slot:] = real
        return Reconstruction(truth, predicted, masked)

    @torch.no_grad()
    def forecast(self, backbone: Backbone, batch: Batch, frames: int) -> Tensor:
        """``(b, x, y, z, frames)`` after the clips; see :func:`roll_forward`."""
        return roll_forward(backbone, self.decoder, batch, frames)

    def _error(self, predicted: Tensor, truth: Tensor) -> Tensor:
        difference = predicted.float() - truth.float()
        return difference.square() if self.config.loss == "mse" else difference.abs()

    def _next_token(
        self, backbone: Backbone, tokens: Tokens, features: Features, batch: Batch
    ) -> _Ahead:
        """On raw patches: a batch of in-brain voxels is never made dense."""
        assert tokens.patches is not None  # the contract of token-causal backbones
        counts = scored_patches(
            tokens, tokens.valid, batch.grid, backbone.patch_size, self.config.brain_only
        )
        scored = counts[:, 1:] & _follows(tokens).unsqueeze(-1)
        persistent, known = _last_frames(tokens, backbone.patch_size[3])
        return _Ahead(
            predicted=self.decoder(features.values[:, :-1]),
            truth=tokens.patches[:, 1:],
            scored=scored,
            persistent=persistent[:, 1:],
            compared=scored & known[:, 1:].unsqueeze(-1),
        )

    def _next_slot(self, backbone: Backbone, features: Features, batch: Batch) -> _Ahead:
        slot = backbone.reduction[3]
        predicted, scored = self._slots(backbone, features, batch)
        if self.config.brain_only:
            scored = scored & batch.mask.unsqueeze(-1)
        truth = batch.bold[:, 0]
        last = truth[..., slot - 1 : -slot : slot]
        return _Ahead(
            predicted=predicted,
            truth=truth[..., slot:],
            scored=scored,
            persistent=last.repeat_interleave(slot, -1),
            compared=scored,
        )

    def _slots(self, backbone: Backbone, features: Features, batch: Batch) -> tuple[Tensor, Tensor]:
        """Slots 1 … as predicted from those before, ``(b, x, y, z, t − slot)``, and where.

        The decoder never sees the last slot's features: nothing follows.
        """
        x, y, z, _ = batch.grid
        reduction, last = backbone.reduction, features.grid.t - 1
        grid = features.grid._replace(t=last)
        decoded = self.decoder(features.to_grid()[..., :last].movedim(1, -1))
        every = torch.cartesian_prod(*(torch.arange(n, device=decoded.device) for n in grid))
        voxels = unpatchify(decoded.flatten(1, 4), every.view(1, -1, 4), grid, reduction)
        known = flag_voxels(features.valid, features.index, features.grid, reduction)
        return voxels[:, :x, :y, :z], known[:, :x, :y, :z, : last * reduction[3]]


def _encode(backbone: Backbone, batch: Batch) -> tuple[Tokens, Features]:
    tokens = backbone.read(batch)
    if tokens.grid.t < 2:
        slot = backbone.patch_size[3]
        raise DataError(
            f"clips of {batch.grid.t} frames hold {tokens.grid.t} time slot of {slot} frames, and "
            f"there is nothing after it to predict: set data.clip_frames to at least {2 * slot}"
        )
    return tokens, backbone.encode(tokens, causal=True)


def _follows(tokens: Tokens) -> Tensor:
    """``(b, n − 1)`` True where token i + 1 stands for something and so does token i before it."""
    return tokens.valid[:, 1:] & tokens.valid[:, :-1]


def _last_frames(tokens: Tokens, slot: int) -> tuple[Tensor, Tensor]:
    """The persistence prediction of every token.

    Returns:
        ``(b, n, P)`` the last frame of the same place one slot before, repeated; and ``(b, n)``
        whether that slot is in the clip.
    """
    assert tokens.patches is not None
    b, n = tokens.valid.shape
    size = tokens.grid.size
    here = cells(tokens.index, tokens.grid).expand(b, -1)
    # Which token a cell is; padding tokens write to a cell of their own.
    number = here.new_full((b, size + 1), -1)
    order = torch.arange(n, device=here.device).expand(b, -1)
    number.scatter_(1, here.where(tokens.valid, size), order)
    before = number.gather(1, (here - 1).clamp(min=0))  # time is a cell's last coordinate
    known = tokens.valid & (tokens.index[..., 3] > 0) & (before >= 0)
    last = tokens.patches.reshape(b, n, -1, slot)[..., -1]
    rows = before.clamp(min=0).unsqueeze(-1).expand(-1, -1, last.shape[-1])
    return last.gather(1, rows).repeat_interleave(slot, -1), known

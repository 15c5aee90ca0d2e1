"""Autoregression: the loss worked out by hand, causality, and forecasts of known dynamics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_stubs import (
    CLIP,
    InTime,
    InTokens,
    Raw,
    batch_of,
    compact_of,
    first_frames,
    places,
    ramp_of,
)
from torch import Tensor

import fmrizoo
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.model import PretrainingModel
from fmrizoo.objectives import (
    Autoregressive,
    AutoregressiveConfig,
    SimMIM,
    SimMIMConfig,
)
from fmrizoo.objectives.decoders import LinearDecoder
from fmrizoo.objectives.scoring import background_of
from fmrizoo.types import Batch, Voxels

SLOT = 2


def stub(kind: str, **values: Any) -> Raw:
    if kind == "time":
        return InTime(**values)
    return InTokens("t" if kind == "token, time fastest" else "x", **values)


KINDS = ["time", "token, time fastest", "token, time slowest"]


def model_of(kind: str, backbone: Raw | None = None, **values: Any) -> PretrainingModel:
    backbone = backbone or stub(kind)
    torch.manual_seed(0)
    objective = Autoregressive(AutoregressiveConfig(**values), backbone=backbone)
    return PretrainingModel(backbone, objective).eval()


def per_clip(error: Tensor, scored: Tensor) -> float:
    return sum(e[s].mean().item() for e, s in zip(error, scored, strict=True)) / len(error)


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse", "l1"])
@pytest.mark.parametrize("brain_only", [True, False])
@pytest.mark.parametrize("decoder", ["linear", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_mean_over_clips_of_the_mean_error_one_step_ahead(
    kind: str, decoder: str, brain_only: bool, loss: str
) -> None:
    """Against the voxels of the reconstruction: what is not padding, in-brain unless asked."""
    model = model_of(kind, decoder=decoder, brain_only=brain_only, loss=loss)
    batch = batch_of(3)
    value, logs = model(batch)
    filled = model.reconstruct(batch)
    assert filled.predicted.shape == filled.masked.shape == (3, *CLIP)
    scored = filled.masked & batch.mask.unsqueeze(-1) if brain_only else filled.masked
    difference = filled.predicted - filled.truth
    error = difference.square() if loss == "mse" else difference.abs()
    assert value.item() == pytest.approx(per_clip(error, scored), rel=1e-5)
    assert logs["loss"].item() == pytest.approx(value.item())


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_is_decoded_from_the_features_of_the_step_before(kind: str) -> None:
    model = model_of(kind)
    batch = batch_of(2)
    filled = model.reconstruct(batch)
    tokens = model.backbone.read(batch)
    features = model.backbone.encode(tokens, causal=True)
    patches = model.objective.decoder(features.values)
    checked = 0
    for sample in range(2):
        numbers = tokens.valid[sample].nonzero()[:, 0].tolist()
        cells = tokens.index[sample].tolist()
        for i in numbers:
            x, y, z, t = cells[i]
            after = [x, y, z, t + 1]
            if kind == "time":
                if t + 1 == tokens.grid.t:
                    continue
            elif i + 1 in numbers:
                after = cells[i + 1]
            else:
                continue
            place = tuple(slice(2 * v, 2 * v + 2) for v in after)
            found = filled.predicted[sample][place]
            a, b, c, d = found.shape  # cut where the patch pads the clip
            expected = patches[sample, i].view(2, 2, 2, 2)[:a, :b, :c, :d]
            torch.testing.assert_close(found, expected)
            assert filled.masked[sample][place].all()
            checked += 1
    expected_steps = {"time": 2 * 24 * 3}.get(kind, int(tokens.valid.sum()) - 2)
    assert checked == expected_steps


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_shown_as_recorded(kind: str) -> None:
    batch = batch_of(2)
    filled = model_of(kind).reconstruct(batch)
    assert torch.equal(filled.predicted[~filled.masked], filled.truth[~filled.masked])
    for sample in range(2):
        inside = batch.mask[sample]
        first = ~filled.masked[sample][inside]
        if kind == "time":
            assert first[:, :SLOT].all() and not first[:, SLOT:].any()
        else:  # the one patch that begins the sequence: up to 2·2·2 voxels of the first slot
            assert first.any() and first.sum() <= 8 * SLOT and not first[:, SLOT:].any()


@pytest.mark.parametrize("loss", ["mse", "l1"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_log_holds_what_persistence_would_lose(kind: str, loss: str) -> None:
    batch = batch_of(3)
    _, logs = model_of(kind, loss=loss)(batch)
    bold = batch.bold[:, 0]
    last = bold[..., SLOT - 1 : -1 : SLOT].repeat_interleave(SLOT, -1)
    difference = bold[..., SLOT:] - last
    error = difference.square() if loss == "mse" else difference.abs()
    scored = batch.mask.unsqueeze(-1).expand_as(error)
    assert logs["persistence"].item() == pytest.approx(per_clip(error, scored), rel=1e-5)
    assert not logs["persistence"].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_clip_is_what_persistence_predicts(kind: str) -> None:
    batch = batch_of(2)
    still = batch.bold[..., :1].expand(*batch.bold.shape).clone()
    _, logs = model_of(kind)(compact_of(replace(batch, bold=still)))
    assert logs["persistence"].item() == 0.0 and logs["loss"].item() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_clips_loss_does_not_depend_on_its_batch_mates(kind: str) -> None:
    model, batch = model_of(kind), batch_of(3)
    whole, logs = model(batch)
    parts, lasting = [], []
    for i in range(3):
        s = slice(i, i + 1)
        one = Batch(batch.bold[s], batch.mask[s], batch.tr[s], ["01"], ["r"], batch.start[s])
        loss, log = model(compact_of(one))
        parts.append(loss.item())
        lasting.append(log["persistence"].item())
    assert whole.item() == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert logs["persistence"].item() == pytest.approx(sum(lasting) / 3, rel=1e-5)


def test_raw_patches_are_scored_without_the_dense_cube() -> None:
    model, batch = model_of("token, time fastest"), batch_of(3)
    expected, _ = model(batch)
    tokens, lean = model.backbone.read(batch), batch_of(3)
    model.backbone.read = lambda _: tokens  # type: ignore[method-assign]
    found, _ = model(lean)
    assert found.item() == expected.item() and "_bold" not in vars(lean)


@pytest.mark.parametrize("decoder", ["linear", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind: str, decoder: str) -> None:
    model = model_of(kind, decoder=decoder)
    optimizer = torch.optim.Adam(model.objective.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss, _ = model(ramp_batch())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.objective.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def ramp_batch() -> Batch:
    return first_frames(ramp_of(2), CLIP.t)


# --- causality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["time", "token, time slowest"])
@pytest.mark.parametrize("slot", [1, 2, 3])
def test_changing_later_frames_changes_no_prediction_up_to_there(kind: str, slot: int) -> None:
    model, batch = model_of(kind), batch_of(2)
    before = model.reconstruct(batch).predicted
    changed = batch.bold.clone()
    changed[..., SLOT * slot :] += torch.randn(())
    after = model.reconstruct(compact_of(replace(batch, bold=changed))).predicted
    inside = batch.mask
    if kind == "time":  # the slot itself is predicted from those before it
        here = slice(SLOT, SLOT * (slot + 1))
        assert torch.equal(after[..., here], before[..., here])
    else:  # its first token is; those after it see this one's truth
        here = slice(0, SLOT * slot)
        assert torch.equal(after[inside][..., here], before[inside][..., here])
    if slot < 3:
        later = slice(SLOT * (slot + 1), None)
        assert (after[inside][..., later] != before[inside][..., later]).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS[1:])
def test_changing_later_tokens_changes_no_prediction_up_to_there(kind: str) -> None:
    model, batch = model_of(kind), batch_of(1)
    tokens = model.backbone.read(batch)
    before = model.objective.decoder(model.backbone.encode(tokens, causal=True).values)
    for token in (1, 5, 11):
        values = tokens.values.clone()
        values[:, token:] += 1.0
        features = model.backbone.encode(tokens.with_values(values), causal=True)
        after = model.objective.decoder(features.values)
        assert torch.equal(after[:, :token], before[:, :token])
        assert not torch.equal(after[:, token], before[:, token])


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_one_slot_are_refused(kind: str) -> None:
    model, short = model_of(kind), first_frames(batch_of(2), SLOT)
    with pytest.raises(DataError, match=r"clips of 2 frames hold 1 time slot .* at least 4"):
        model(short)
    with pytest.raises(DataError, match=r"clips of 2 frames are too short to forecast"):
        model.forecast(short, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_clip_without_a_brain_is_named(kind: str) -> None:
    model, batch = model_of(kind), batch_of(2)
    mask = batch.mask.clone()
    mask[1] = False
    bold = batch.bold
    empty = compact_of(replace(batch, bold=bold, mask=mask))
    with pytest.raises(DataError, match=r"no voxel after the first step .* sub-01_run-1$"):
        model(empty)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "mae"}, r"objective.loss='mae' is not known"),
        ({"decoder": "liner"}, r"decoder='liner' is not known. Did you mean 'linear'\?"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AutoregressiveConfig(**values)


def test_a_model_that_learned_no_forecasting_says_so() -> None:
    backbone = InTime()
    model = PretrainingModel(backbone, SimMIM(SimMIMConfig(), backbone=backbone))
    with pytest.raises(RecipeError, match=r"SimMIM does not learn to forecast.*autoregressive"):
        model.forecast(batch_of(1), 2)
    with pytest.raises(RecipeError, match="at least one frame, got 0"):
        model_of("time").forecast(batch_of(1), 0)


# --- on the real backbones -----------------------------------------------------------------------

REAL: dict[str, dict[str, Any]] = {
    "swin4d": {"name": "swin4d", "depths": [2, 2], "num_heads": [1, 2]},
    "swin_factorized": {"name": "swin_factorized", "depths": [4, 4], "num_heads": [1, 2]},
    "neuromamba": {"name": "neuromamba", "depth": 2, "d_state": 8, "head_dim": 8},
}
TIME_SLOWEST = {**REAL["neuromamba"], "order": "txyz"}


def real_model(section: dict[str, Any]) -> PretrainingModel:
    torch.manual_seed(0)
    shared = {"img_size": list(CLIP), "patch_size": [2, 2, 2, 2], "embed_dim": 24}
    model = fmrizoo.build(backbone={**shared, **section}, objective="autoregressive")
    assert isinstance(model, PretrainingModel)
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "neuromamba" else pytest.mark.slow) for n in REAL],
)
def test_a_short_training_beats_persistence_on_ramps(name: str) -> None:
    """All voxels move along lines, which persistence cannot see."""
    model = real_model(REAL[name]).train()
    batch = first_frames(ramp_of(4), CLIP.t)
    batch = compact_of(replace(batch, bold=batch.bold / 5))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(160):
        loss, logs = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logs["loss"] < 0.7 * logs["persistence"]


@pytest.mark.parametrize("name", ["swin4d", "swin_factorized"])
def test_the_swins_next_slots_depend_on_no_later_frame(name: str) -> None:
    model, batch = real_model(REAL[name]), batch_of(2)
    before = model.reconstruct(batch).predicted
    for slot in (1, 2, 3):
        changed = batch.bold.clone()
        changed[..., SLOT * slot :] += torch.randn(())
        after = model.reconstruct(compact_of(replace(batch, bold=changed))).predicted
        assert torch.equal(
            after[..., SLOT : SLOT * (slot + 1)], before[..., SLOT : SLOT * slot + 2]
        )


@pytest.mark.parametrize("section", [REAL["neuromamba"], TIME_SLOWEST], ids=["xyzt", "txyz"])
def test_neuromamba_walks_as_it_would_encode(section: dict[str, Any]) -> None:
    """Within 1e-4: a state carried step by step against the scan of the whole sequence."""
    model, batch = real_model(section), batch_of(1)
    with torch.no_grad():
        expected = recomputed(model, batch, 5)
    torch.testing.assert_close(model.forecast(batch, 5), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", REAL)
def test_every_backbone_forecasts_clips_of_different_brains(name: str) -> None:
    model, batch = real_model(REAL[name]), batch_of(3)
    found = model.forecast(batch, 5)
    assert found.shape == (3, *CLIP[:3], 5) and found.isfinite().all()
    assert (found[~batch.mask] == 9.0).all() and found[batch.mask].std() > 0


# --- forecasts -----------------------------------------------------------------------------------


def along_the_line(decoder: LinearDecoder) -> None:
    """Next slot from this one's two frames f, g: 2g − f, 3g − 2f."""
    step = torch.tensor([[-1.0, 2.0], [-2.0, 3.0]])
    with torch.no_grad():
        decoder.project.weight.copy_(torch.block_diag(*[step] * 8))
        decoder.project.bias.zero_()


def knowing(kind: str, batch: Batch) -> PretrainingModel:
    """A model of :func:`ramp_of`'s dynamics: the token it has to go on from, and the line."""
    if kind == "time":
        backbone: Raw = InTime(memory=0.0, space=0.0)
    else:
        delay = 0 if kind == "token, time fastest" else places(batch) - 1
        backbone = stub(kind, memory=0.0, delay=delay)
        torch.nn.init.zeros_(backbone.code.weight)
    model = model_of(kind, backbone)
    along_the_line(model.objective.decoder)
    return model


@pytest.mark.parametrize("frames", [1, 2, 5, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_known_dynamics_are_continued(kind: str, frames: int) -> None:
    """12 frames ahead, every context frame is a prediction; 5 is no multiple of a slot."""
    line = ramp_of(1)
    model, batch = knowing(kind, line), first_frames(line, CLIP.t)
    found = model.forecast(batch, frames)
    expected = line.bold[:, 0, ..., CLIP.t : CLIP.t + frames]
    assert found.shape == (1, *CLIP[:3], frames)
    # Rounding errors grow along extrapolated lines; values go up to some 30.
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_brain_a_forecast_is_background(kind: str) -> None:
    batch = batch_of(2)
    found = model_of(kind).forecast(batch, 3)
    assert (found[~batch.mask] == 9.0).all()
    dense = Batch(batch.bold, batch.mask, batch.tr, batch.subject, batch.run, batch.start)
    inside = model_of(kind).forecast(dense, 3)
    lowest = batch.bold[:, 0, ..., 0].masked_fill(~batch.mask, torch.inf).flatten(1).amin(1)
    for sample in range(2):
        assert (inside[sample][~batch.mask[sample]] == lowest[sample]).all()
    assert torch.equal(background_of(dense), lowest)


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_forecast_alike_alone_and_together(kind: str) -> None:
    model, batch = model_of(kind), batch_of(3)
    together = model.forecast(batch, 5)
    for i in range(3):
        s = slice(i, i + 1)
        one = Batch(batch.bold[s], batch.mask[s], batch.tr[s], ["01"], ["r"], batch.start[s])
        alone = model.forecast(compact_of(one), 5)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)


def recomputed(model: PretrainingModel, batch: Batch, frames: int) -> Tensor:
    """The forecast of one clip by whole encodings only, each after one token more is known."""
    backbone, (px, py, pz, pt) = model.backbone, model.backbone.patch_size
    kept = batch.grid.t - pt
    seen, made = batch.bold[0, 0, ..., pt:], []
    for _ in range(0, frames, pt):
        whole = torch.cat([seen, torch.zeros(*seen.shape[:3], pt)], -1)
        index = backbone.read(with_bold(batch, whole)).index[0]
        for u in (index[:, 3] == kept // pt).nonzero()[:, 0].tolist():
            features = backbone.encode(backbone.read(with_bold(batch, whole)), causal=True)
            patch = model.objective.decoder(features.values[0, u - 1]).view(px, py, pz, pt)
            x, y, z = (index[u, :3] * torch.tensor([px, py, pz])).tolist()
            place = whole[x : x + px, y : y + py, z : z + pz, kept:]
            a, b, c, _ = place.shape  # cut where the patch pads the clip
            place.copy_(patch[:a, :b, :c])
        new = with_bold(batch, whole).bold[0, 0, ..., kept:]
        made.append(new)
        seen = torch.cat([seen, new], -1)[..., -kept:]
    return torch.cat(made, -1)[None, ..., :frames]


def with_bold(batch: Batch, bold: Tensor) -> Batch:
    """The batch of one clip with other frames ``(x, y, z, t)``."""
    assert batch.background is not None
    return replace(batch, bold=Voxels.of(bold[None, None], batch.mask, batch.background))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_walking_with_a_state_equals_encoding_the_whole_sequence_again(kind: str) -> None:
    model = model_of(kind, stub(kind, delay=2))
    batch = batch_of(1)
    with torch.no_grad():
        expected = recomputed(model, batch, 7)
    found = model.forecast(batch, 7)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_forecasting_does_not_drop_out_and_leaves_the_model_training(kind: str) -> None:
    model, batch = model_of(kind).train(), batch_of(2)
    first, second = model.forecast(batch, 4), model.forecast(batch, 4)
    assert torch.equal(first, second) and not first.requires_grad
    assert model.backbone.training and model.objective.decoder.training
    model.backbone.eval()
    model.forecast(batch, 2)
    assert not model.backbone.training and model.objective.decoder.training


@pytest.mark.parametrize("kind", KINDS)
def test_the_oldest_slot_of_the_clip_is_not_looked_at(kind: str) -> None:
    """One slot less than the clip has: as far as the model has learned to look."""
    model, batch = model_of(kind), batch_of(2)
    changed = batch.bold.clone()
    changed[..., :SLOT] += 5.0
    other = compact_of(replace(batch, bold=changed))
    assert torch.equal(model.forecast(batch, 3), model.forecast(other, 3))
    changed[..., SLOT : 2 * SLOT] += 5.0
    other = compact_of(replace(batch, bold=changed))
    assert not torch.equal(model.forecast(batch, 3), model.forecast(other, 3))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_sequence_that_begins_with_the_unknown_is_refused(kind: str) -> None:
    class Backwards(InTokens):
        def tokenize(self, *given: Any, **named: Any) -> Any:
            tokens = super().tokenize(*given, **named)
            turned = {
                name: getattr(tokens, name).flip(1)
                for name in ("values", "index", "valid", "brain", "patches", "inside")
            }
            return replace(tokens, **turned)

    with pytest.raises(RecipeError, match="begins with the last time slot"):
        model_of("token", Backwards()).forecast(batch_of(1), 2)

"""SimMIM: what is hidden, that it is really hidden, and the loss worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_stubs import CELLS, InTokens, compact_of
from objective_stubs import PATCH as STUB_PATCH
from objective_stubs import batch_of as stub_batch

import fmrizoo
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.model import PretrainingModel
from fmrizoo.objectives import SimMIM, SimMIMConfig
from fmrizoo.objectives.decoders import patchify
from fmrizoo.types import Batch, Grid

PATCH = (2, 2, 2, 2)
BACKBONE = {
    "name": "swin4d",
    "img_size": [7, 5, 4, 4],  # padded to 8×8×4: neither 7 nor 5 divides into patches and merges
    "patch_size": list(PATCH),
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": [2, 2, 2, 2],
    "patch_norm": True,
    "final_norm": True,
}
CLIP = Grid(7, 5, 4, 4)


def model_of(**objective: Any) -> PretrainingModel:
    torch.manual_seed(0)
    built = fmrizoo.build(backbone=BACKBONE, objective={"name": "simmim", **objective})
    assert isinstance(built, PretrainingModel)
    return built.eval()


def batch_of(clips: int = 2, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    mask = torch.zeros(clips, *CLIP[:3], dtype=torch.bool)
    for i in range(clips):  # brains of different sizes
        mask[i, 1 : 4 + i % 3, 1:4, 1:3] = True
    return Batch(
        bold=torch.randn(clips, 1, *CLIP),
        mask=mask,
        tr=torch.full((clips,), 2.0),
        subject=["01"] * clips,
        run=[f"sub-01_run-{i}" for i in range(clips)],
        start=torch.arange(clips),
        seed=torch.arange(clips) + 100,
    )


@pytest.mark.parametrize("mask_type", ["random", "tube", "temporal"])
@pytest.mark.parametrize("brain_only", [False, True])
@pytest.mark.parametrize("decoder", ["mlp", "linear"])
def test_loss_is_the_mean_over_clips_of_the_mean_error_of_hidden_voxels(
    mask_type: str, brain_only: bool, decoder: str
) -> None:
    model = model_of(mask_type=mask_type, brain_only=brain_only, decoder=decoder)
    batch = batch_of(3)
    loss, logs = model(batch)
    filled = model.reconstruct(batch)
    assert filled.predicted.shape == filled.masked.shape == (3, *CLIP), "padding is cut off"
    means = []
    for i in range(3):
        scored = [
            abs(filled.predicted[i, x, y, z, t].item() - batch.bold[i, 0, x, y, z, t].item())
            for x, y, z, t in filled.masked[i].nonzero().tolist()
            if batch.mask[i, x, y, z] or not brain_only
        ]
        means.append(sum(scored) / len(scored))
    assert loss.item() == pytest.approx(sum(means) / 3, rel=1e-5)
    assert logs["loss"].item() == pytest.approx(loss.item())
    assert logs["masked"].item() == pytest.approx(filled.masked.float().mean().item())


def test_brain_only_changes_the_loss() -> None:
    batch = batch_of()
    inside, _ = model_of()(batch)
    asked, _ = model_of(brain_only=True)(batch)
    every, _ = model_of(brain_only=False)(batch)
    assert inside.item() == asked.item(), "in-brain voxels only, unless asked"
    assert abs(every.item() - inside.item()) > 1e-4


def test_hidden_share_is_that_of_the_recipe() -> None:
    """Patches 4·4·2·2 = 64 (with padding), of which ceil(0.6 · 64) = 39 are hidden."""
    model, batch = model_of(mask_ratio=0.6), batch_of(1)
    tokens = model.backbone.tokenize(batch.bold, batch.mask)
    assert tokens.grid == (4, 4, 2, 2)
    assert model.objective._hidden(tokens, batch).sum() == 39


def test_masked_voxels_are_whole_patches_and_cells() -> None:
    model, batch = model_of(mask_patch_size=[4, 4, 2, 4], mask_ratio=0.5), batch_of(2)
    masked = model.reconstruct(batch).masked
    for sample in masked:
        for x in (0, 4):
            for y in (0, 4):
                for z in (0, 2):
                    cell = sample[x : x + 4, y : y + 4, z : z + 2]
                    assert cell.all() or not cell.any()
    assert 0 < masked.float().mean() < 1


@pytest.mark.parametrize("mask_type", ["random", "tube", "temporal"])
def test_what_is_hidden_reaches_no_prediction(mask_type: str) -> None:
    # With a known background: else the lowest value of the first frame stands for it.
    model, batch = model_of(mask_type=mask_type, mask_ratio=0.5), compact_of(batch_of(2), 0.0)
    before = model.reconstruct(batch)
    hidden = before.masked & batch.mask.unsqueeze(-1)
    visible = ~before.masked & batch.mask.unsqueeze(-1)
    other = torch.where(hidden, torch.full((), 50.0), batch.bold[:, 0]).unsqueeze(1)
    assert hidden.any() and not torch.equal(other, batch.bold)
    after = model.reconstruct(compact_of(replace(batch, bold=other), 0.0))
    assert torch.equal(after.masked, before.masked)
    assert torch.equal(after.predicted, before.predicted)
    seen = torch.where(visible, torch.full((), 50.0), batch.bold[:, 0]).unsqueeze(1)
    again = model.reconstruct(compact_of(replace(batch, bold=seen), 0.0))
    assert not torch.equal(again.predicted, before.predicted)


def test_the_same_seed_hides_the_same_in_any_batch() -> None:
    model, batch = model_of(), batch_of(3)
    together = model.reconstruct(batch).masked
    one = Batch(
        batch.bold[2:], batch.mask[2:], batch.tr[2:], ["01"], ["r"], batch.start[2:],
        seed=torch.tensor([102]),
    )  # fmt: skip
    assert torch.equal(model.reconstruct(one).masked[0], together[2])
    assert not torch.equal(together[0], together[1])
    other = replace(batch, seed=torch.arange(3) + 5000)
    assert not torch.equal(model.reconstruct(other).masked, together)


def test_a_clip_s_loss_does_not_depend_on_how_clips_are_dealt_out() -> None:
    model, batch = model_of(brain_only=True), batch_of(3)
    whole, _ = model(batch)
    parts = []
    for i in range(3):
        s = slice(i, i + 1)
        one = Batch(
            batch.bold[s], batch.mask[s], batch.tr[s], ["01"], ["r"], batch.start[s],
            seed=batch.seed[s],
        )  # fmt: skip
        parts.append(model(one)[0].item())
    assert whole.item() == pytest.approx(sum(parts) / 3, rel=1e-5)


def test_only_the_hidden_part_trains_through_the_mask_token() -> None:
    model, batch = model_of(), batch_of()
    loss, _ = model(batch)
    loss.backward()
    grad = model.objective.mask_token.grad
    assert grad is not None and grad.abs().sum() > 0


def test_a_clip_without_anything_to_score_is_named() -> None:
    model, batch = model_of(brain_only=True), batch_of()
    mask = batch.mask.clone()
    mask[1] = False
    with pytest.raises(DataError, match=r"no hidden voxel to score in clips of sub-01_run-1$"):
        model(replace(batch, mask=mask))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_ratio": 0.0}, r"mask_ratio must be in \(0, 1\], got 0.0"),
        ({"mask_ratio": 1.5}, r"mask_ratio must be in \(0, 1\], got 1.5"),
        ({"mask_type": "tubes"}, r"mask_type='tubes' is not known. Did you mean 'tube'\?"),
        ({"decoder": "liner"}, r"decoder='liner' is not known. Did you mean 'linear'\?"),
        ({"mask_patch_size": [3, 2, 2, 2]}, r"\[3, 2, 2, 2\] must be a multiple"),
        ({"mask_patch_size": [2, 2]}, r"needs four positive numbers"),
        ({"mask_patch_size": [2, 2, 2, 0]}, r"needs four positive numbers"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        model_of(**values)


# --- on a backbone that drops the background and has raw patches --------------------------------


def stub_model(**values: Any) -> PretrainingModel:
    backbone = InTokens()
    torch.manual_seed(0)
    objective = SimMIM(SimMIMConfig(**values), backbone=backbone)
    return PretrainingModel(backbone, objective).eval()


@pytest.mark.parametrize("brain_only", [True, False])
@pytest.mark.parametrize("mask_type", ["random", "tube", "temporal"])
def test_loss_on_raw_patches_is_that_on_voxels(mask_type: str, brain_only: bool) -> None:
    """Against the voxels of the reconstruction, one by one; never dense on the way."""
    model, batch = stub_model(mask_type=mask_type, brain_only=brain_only), stub_batch(3)
    loss, logs = model(batch)
    if brain_only:
        # The stub makes the cube when it reads; a second batch shows that the objective does not.
        tokens, lean = model.backbone.read(batch), stub_batch(3)
        model.backbone.read = lambda _: tokens  # type: ignore[method-assign]
        again, _ = model(lean)
        assert again.item() == loss.item() and "_bold" not in vars(lean)
        del model.backbone.read
    filled = model.reconstruct(batch)
    scored = filled.masked & batch.mask.unsqueeze(-1) if brain_only else filled.masked
    error = (filled.predicted - filled.truth).abs()
    means = [error[i][scored[i]].mean().item() for i in range(3)]
    assert loss.item() == pytest.approx(sum(means) / 3, rel=1e-5)
    hidden = model.objective._hidden(model.backbone.read(batch), batch)
    kept = model.backbone.read(batch).valid
    assert not (hidden & ~kept).any()
    assert logs["masked"].item() == pytest.approx((hidden.sum() / kept.sum()).item())


def test_where_the_background_was_dropped_nothing_is_filled_in() -> None:
    model, batch = stub_model(mask_ratio=1.0), stub_batch(2)
    filled = model.reconstruct(batch)
    inside = torch.zeros(2, 8, 6, 4, 8, dtype=torch.bool)
    inside[:, :7, :5] = batch.mask[..., None]
    cells = torch.cartesian_prod(*(torch.arange(s) for s in CELLS)).expand(2, -1, -1)
    kept = patchify(inside, cells, STUB_PATCH).any(-1)
    assert kept.any() and not kept.all()
    expected = torch.zeros_like(inside)
    for sample, number in kept.nonzero().tolist():
        x, y, z, t = (2 * v for v in cells[sample, number].tolist())
        expected[sample, x : x + 2, y : y + 2, z : z + 2, t : t + 2] = True
    assert torch.equal(filled.masked, expected[:, :7, :5])
    dropped = ~filled.masked
    assert torch.equal(filled.predicted[dropped], filled.truth[dropped])
    assert (filled.predicted[filled.masked] != filled.truth[filled.masked]).float().mean() > 0.99


def test_a_stubs_clip_loss_does_not_depend_on_the_padding_beside_it() -> None:
    model, batch = stub_model(), stub_batch(3)
    counts = model.backbone.read(batch).valid.sum(1)
    assert len(set(counts.tolist())) > 1, "clips of different numbers of tokens"
    whole, _ = model(batch)
    parts = []
    for i in range(3):
        s = slice(i, i + 1)
        one = Batch(
            batch.bold[s], batch.mask[s], batch.tr[s], ["01"], ["r"], batch.start[s],
            seed=batch.seed[s],
        )  # fmt: skip
        parts.append(model(compact_of(one))[0].item())
    assert whole.item() == pytest.approx(sum(parts) / 3, rel=1e-5)

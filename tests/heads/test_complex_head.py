"""The complex head: cell means by hand, masks, frames, and that its reads may be kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from head_stubs import CLASSES, LEVELS, VALUES, VOXELS, Tiny, batch_of, clip_of, index_of

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.heads import ComplexConfig, ComplexHead
from fmrizoo.heads.cells import cell_means
from fmrizoo.model import DownstreamModel
from fmrizoo.types import Features, Grid, ReadBatch, TaskSpec

GRID = Grid(5, 2, 3, 2)  # with at most 2 cells an axis: blocks of 3×1×2 places


def features(order: bool = True) -> Features:
    torch.manual_seed(0)
    index = index_of(GRID)[0]
    index = index[torch.randperm(len(index))] if order else index
    brain = (torch.rand(2, GRID.size) * 2 - 0.7).clamp(0, 1)
    valid = torch.rand(2, GRID.size) > 0.2
    values = torch.randn(2, GRID.size, 4)
    return Features(values, index.expand(2, -1, -1), valid, GRID, brain)


def model_of(*tasks: TaskSpec, encoder: Tiny | None = None, **values: Any) -> DownstreamModel:
    torch.manual_seed(1)
    encoder = encoder or Tiny()
    config = ComplexConfig(**{"dim": 16, "num_heads": 2, "cells": 2, **values})
    return DownstreamModel(
        encoder, ComplexHead(config, backbone=encoder, tasks=tasks or (CLASSES,))
    )


def spread(model: DownstreamModel) -> DownstreamModel:
    """Larger weights: whatever a part does, the outputs show it."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    return model.eval()


def test_cells_are_means_of_blocks_weighted_by_brain() -> None:
    given = features()
    means, present, centres = cell_means(given, 2)
    assert means.shape == (2, 2 * 2 * 2, 2, 4) and present.shape == (2, 8, 2)
    cells = list(itertools.product(range(2), range(2), range(2)))
    missing = 0
    for clip, (number, (i, j, k)), t in itertools.product(range(2), enumerate(cells), range(2)):
        total, weights = torch.zeros(4), 0.0
        for n, (x, y, z, slot) in enumerate(given.index[clip].tolist()):
            if (x // 3, y // 1, z // 2, slot) == (i, j, k, t) and given.valid[clip, n]:
                total += given.values[clip, n] * given.brain[clip, n]
                weights += float(given.brain[clip, n])
        assert bool(present[clip, number, t]) == (weights > 0)
        expected = total / weights if weights else total
        torch.testing.assert_close(means[clip, number, t], expected)
        missing += not weights
    assert missing, "the case of an empty cell is among them"
    # Middles of places 0–2, 3–4 of 5; 0, 1 of 2; 0–1, 2 of 3.
    middles = itertools.product((1.5 / 5, 4 / 5), (0.25, 0.75), (1 / 3, 2.5 / 3))
    torch.testing.assert_close(centres, torch.tensor(list(middles)).expand(2, -1, -1))


def test_a_small_grid_keeps_its_places() -> None:
    given = features(order=False)
    given.valid[:], given.brain[:] = True, 1
    means, present, centres = cell_means(given, 8)
    assert present.all() and centres.shape == (2, 30, 3)
    torch.testing.assert_close(means.flatten(1, 2), given.values)


def test_sums_are_exact_enough_in_bf16() -> None:
    """A thousand tokens of one cell, added in bf16, would stop growing."""
    grid = Grid(10, 10, 10, 1)
    values = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    ones = torch.ones(1, 1000)
    given = Features(values, index_of(grid), ones.bool(), grid, ones)
    means, _, _ = cell_means(given, 1)
    assert means.dtype == torch.bfloat16 and means.item() == 1


@pytest.mark.parametrize("temporal", ["none", "attention"])
def test_what_is_read_may_be_kept_and_stacked(temporal: str) -> None:
    tasks, target = (CLASSES, VALUES, LEVELS), torch.tensor([[0, 41.0, 3], [1, 30, 0], [2, 9, 1]])
    model, batch = spread(model_of(*tasks, temporal=temporal)), batch_of(3, target)
    rows = [model.read(clip_of(batch, clip)) for clip in range(3)]
    assert all(not part.requires_grad for row in rows for part in row)
    stacked = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
    for part, together in zip(stacked, model.read(batch), strict=True):
        torch.testing.assert_close(part, together)
    kept = ReadBatch(stacked, batch.subject, batch.target)
    torch.testing.assert_close(model.predict(kept), model.predict(batch))
    torch.testing.assert_close(model(kept)[0], model(batch)[0])
    alone = torch.cat([model.predict(clip_of(batch, clip)) for clip in range(3)])
    torch.testing.assert_close(alone, model.predict(batch))


@pytest.mark.parametrize("temporal", ["none", "attention"])
def test_missing_cells_and_frames_have_no_say(temporal: str) -> None:
    model = spread(model_of(temporal=temporal))
    read = list(model.read(batch_of(2)))
    for stage in (0, 3):
        read[stage + 1] = read[stage + 1].clone()
        read[stage + 1][0, :, 1] = False  # a whole frame of the first clip
        read[stage + 1][1, 0] = False  # a cell of the second
    answer = model.head.answer(read)
    assert answer.isfinite().all()
    for stage in (0, 3):
        noisy = torch.randn_like(read[stage]) * 10
        read[stage] = torch.where(read[stage + 1].unsqueeze(-1), read[stage], noisy)
    torch.testing.assert_close(model.head.answer(read), answer)
    read[0] = read[0] + 1e-2 * torch.randn_like(read[0])
    assert not torch.allclose(model.head.answer(read), answer)
    with torch.enable_grad():
        loss = model.head.loss(model.head.answer(read), torch.tensor([0, 1]))
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())


def test_a_left_out_frame_is_as_if_it_were_not_there() -> None:
    """Without a mixer the answer is a mean over frames: the same with the frame cut out."""
    model = spread(model_of(temporal="none"))
    read = model.read(batch_of(2))
    masked = [part.clone() for part in read]
    masked[1][:, :, 2] = masked[4][:, :, 2] = False
    cut = [part if n % 3 == 2 else part[:, :, :2] for n, part in enumerate(read)]
    torch.testing.assert_close(model.head.answer(masked), model.head.answer(cut))


def test_frames_in_another_order_matter_to_the_mixer_alone() -> None:
    for temporal in ("none", "attention"):
        model = spread(model_of(temporal=temporal))
        read = model.read(batch_of(2))
        turned = [part if n % 3 == 2 else part.flip(2) for n, part in enumerate(read)]
        same = torch.allclose(model.head.answer(read), model.head.answer(turned), atol=1e-5)
        assert same == (temporal == "none")


def test_the_mixer_adds_nothing_at_the_start() -> None:
    plain, mixed = (model_of(temporal=how).eval() for how in ("none", "attention"))
    mixed.head.load_state_dict(plain.head.state_dict(), strict=False)
    torch.testing.assert_close(mixed.predict(batch_of()), plain.predict(batch_of()))


def test_places_are_in_the_keys() -> None:
    model = spread(model_of(temporal="none"))
    read = list(model.read(batch_of(2)))
    before = model.head.answer(read)
    shuffled = torch.randperm(read[0].shape[1])
    moved = [part[:, shuffled] if n < 3 else part for n, part in enumerate(read)]
    torch.testing.assert_close(model.head.answer(moved), before)  # cells with their places
    moved[2] = read[2]
    assert not torch.allclose(model.head.answer(moved), before, atol=1e-4)


@pytest.mark.parametrize("temporal", ["none", "attention"])
def test_clips_of_any_length(temporal: str) -> None:
    model = model_of(temporal=temporal)
    for frames in (1, 3, 7):
        assert model.predict(batch_of(2, frames=frames)).shape == (2, 3)


def test_every_target_has_its_own_queries() -> None:
    model = spread(model_of(CLASSES, VALUES, queries=2))
    assert model.head.queries.shape == (4, 16)
    before = model.outputs(batch_of())
    with torch.no_grad():
        model.head.queries[2:] += 1
    after = model.outputs(batch_of())
    assert torch.equal(after[:, :3], before[:, :3])
    assert (after[:, 3] != before[:, 3]).all()


def test_the_encoder_is_frozen_and_the_head_learns() -> None:
    model = model_of(CLASSES).train()
    assert model.head.trains == "none" and not model.head.encoder_trains()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    assert not any(m.training for m in model.backbone.modules())
    batch, losses = batch_of(3, torch.tensor([0, 1, 2])), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    torch.manual_seed(0)
    for _ in range(25):
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


def test_dropout_in_training_only() -> None:
    model = spread(model_of(dropout=0.5))
    assert torch.equal(model.outputs(batch_of()), model.outputs(batch_of()))
    model.train()
    assert not torch.equal(model.outputs(batch_of()), model.outputs(batch_of()))


def test_one_stage_is_enough() -> None:
    model = model_of(stages=[0])
    assert model.head.stages == (0,) and len(model.read(batch_of())) == 3
    assert model.read(batch_of())[0].shape[-1] == 6


def test_bf16_is_near() -> None:
    model = spread(model_of())
    exact = model.predict(batch_of())
    rounded = model.bfloat16().predict(batch_of().to("cpu", torch.bfloat16))
    torch.testing.assert_close(rounded, exact, atol=0.05 * exact.abs().max().item(), rtol=0.05)


def test_a_clip_without_brain_is_refused() -> None:
    batch = batch_of(2)
    batch.mask[1] = False
    with pytest.raises(DataError, match="a clip without a brain voxel has no features to read"):
        model_of().read(batch)


def test_stages_must_share_their_frames() -> None:
    head, given = model_of().head, features()
    with pytest.raises(RecipeError, match=r"stages=\[-2, -1\] have \[2, 4\] time slots"):
        head.read([given, Features(**{**vars(given), "grid": GRID._replace(t=4)})])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temporal": "conv"}, "head.temporal='conv' is not known"),
        ({"dropout": 1.0}, r"head.dropout is a share in \[0, 1\)"),
        ({"cells": 0}, "head.cells must be ≥ 1, got 0"),
        ({"queries": 0}, "head.queries must be ≥ 1"),
        ({"depth": 0}, "head.depth must be ≥ 1"),
        ({"dim": 18, "num_heads": 4}, "head.dim=18 must be even and a multiple of head.num_heads"),
        ({"dim": 9, "num_heads": 3}, "head.dim=9 must be even"),
        ({"stages": []}, r"needs different stages, got \[\]"),
        ({"stages": [1, 1]}, r"needs different stages, got \[1, 1\]"),
        ({"stages": [1, -1]}, r"head.stages=\[1, -1\] names a stage twice: the backbone has 2"),
        ({"stages": [2]}, r"stages \[2\] do not exist: the backbone has 2"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        model_of(**values)


def test_the_stub_is_what_it_says() -> None:
    stages = Tiny().encode_stages(Tiny().read(batch_of()))
    assert [s.values.shape[1:] for s in stages] == [(48, 6), (24, 8)]
    assert stages[0].grid == VOXELS.divided((2, 2, 2, 1))

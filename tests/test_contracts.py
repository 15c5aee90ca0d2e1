"""Registered = tested: one suite walks every backbone, objective, head and pair."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fmrizoo
from fmrizoo import zoo
from fmrizoo.config import CHECKPOINTING, compose, to_dict
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.model import DownstreamModel, PretrainingModel
from fmrizoo.registry import BACKBONES, HEADS, OBJECTIVES
from fmrizoo.trainer.export import ModelInfo, save_model
from fmrizoo.types import Backbone, Batch, Features, Grid, ReadBatch, TaskSpec, Voxels

# The smallest sensible build of every registered backbone, for a clip of CLIP voxels and frames.
CLIP = Grid(12, 8, 8, 4)
SMALL = {
    "swin4d": {
        "img_size": list(CLIP),
        "patch_size": [2, 2, 2, 2],
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "window_size": [2, 2, 2, 2],
        "patch_norm": True,
        "final_norm": True,
    },
    "swin_factorized": {
        "img_size": list(CLIP),
        "patch_size": [2, 2, 2, 2],
        "embed_dim": 12,
        "depths": [4, 4],
        "num_heads": [2, 2],
        "window_size": [2, 2, 2],
        "temporal_window": 2,
    },
    "neuromamba": {
        "img_size": list(CLIP),
        "patch_size": [2, 2, 2, 2],
        "embed_dim": 16,
        "depth": 3,
        "d_state": 8,
        "head_dim": 8,
    },
}
Tasks = TaskSpec | tuple[TaskSpec, ...]
LEVELS = TaskSpec("ordinal", classes=("low", "mid", "high"), name="severity")
TASKS = [
    TaskSpec("classification", classes=("face", "house", "shoe")),
    TaskSpec("regression", mean=30.0, std=10.0),
    LEVELS,
]


def backbone_of(name: str, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return fmrizoo.create_backbone(name, **SMALL[name])


def batch_of(clips: int = 2, task: TaskSpec | None = None, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    mask = torch.zeros(clips, *CLIP[:3], dtype=torch.bool)
    for clip, brain in enumerate(mask):  # every brain has another size
        brain[2 : 10 - clip, 1:7, 1 : 7 - clip] = True
    bold = torch.randn(clips, 1, *CLIP) * mask[:, None, ..., None]
    target = None
    if task is not None:
        target = torch.rand(clips) if task.kind == "regression" else torch.arange(clips) % 3
    return Batch(
        bold=bold,
        mask=mask,
        tr=torch.full((clips,), 2.0),
        subject=["01"] * clips,
        run=["sub-01_run-1"] * clips,
        start=torch.arange(clips),
        target=target,
        seed=torch.arange(clips),
    )


def model_recipe(name: str, objective: str) -> dict[str, Any]:
    section = {"name": name, **SMALL[name]}
    return {"backbone": section, "objective": objective, "data": {"clip_frames": CLIP.t}}


BACKBONE_NAMES = BACKBONES.list()
CAUSAL = [
    name
    for name in BACKBONE_NAMES
    if "causal" in type(backbone_of(name)).supports(backbone_of(name).config)
]
PAIRS = list(itertools.product(BACKBONE_NAMES, OBJECTIVES.list()))


def test_the_zoo_is_not_empty() -> None:
    assert BACKBONE_NAMES and OBJECTIVES.list() and HEADS.list()
    assert set(BACKBONE_NAMES) == set(SMALL), "give every registered backbone a small build above"


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_backbone_shapes_are_what_it_declares(name: str) -> None:
    backbone, batch = backbone_of(name), batch_of()
    tokens = backbone.tokenize(batch.bold, batch.mask)
    b, n, d = tokens.values.shape
    assert (b, d) == (2, backbone.embed_dim)
    assert tokens.index.shape == (b, n, 4)
    assert tokens.valid.shape == tokens.brain.shape == (b, n)
    assert tokens.grid == backbone.clip_grid.divided(backbone.patch_size)
    features = backbone.encode(tokens)
    assert features.values.shape[::2] == (b, backbone.num_features)
    assert features.grid == backbone.clip_grid.divided(backbone.reduction)
    assert features.to_grid().shape == (b, backbone.num_features, *features.grid)
    assert torch.equal(backbone(batch.bold, batch.mask).values, features.values)


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_brain_share_of_tokens_and_features_adds_up_to_the_mask(name: str) -> None:
    backbone, batch = backbone_of(name), batch_of()
    voxels = batch.mask.flatten(1).sum(1) * CLIP.t
    tokens = backbone.tokenize(batch.bold, batch.mask)
    for part, size in (
        (tokens, backbone.patch_size),
        (backbone.encode(tokens), backbone.reduction),
    ):
        share = (part.brain * part.valid).sum(1) * math.prod(size)
        torch.testing.assert_close(share, voxels.float())


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_every_parameter_that_trains_gets_a_gradient(name: str) -> None:
    backbone, batch = backbone_of(name), batch_of()
    backbone(batch.bold, batch.mask).values.square().sum().backward()
    without = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    """Clips with brains of other sizes beside it: other windows, more or less padding."""
    backbone, batch = backbone_of(name).eval(), batch_of(3)
    together = backbone(batch.bold, batch.mask).to_grid()
    for clip in range(3):
        alone = backbone(batch.bold[[clip]], batch.mask[[clip]]).to_grid()
        torch.testing.assert_close(together[[clip]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_voxels_outside_the_brain_change_nothing(name: str) -> None:
    backbone, batch = backbone_of(name).eval(), batch_of()
    noisy = torch.where(batch.mask[:, None, ..., None], batch.bold, torch.randn(2, 1, *CLIP))
    kept, changed = (backbone(bold, batch.mask).values for bold in (batch.bold, noisy))
    assert torch.equal(kept, changed)
    inside = batch.bold + torch.randn(2, 1, *CLIP)
    assert not torch.equal(kept, backbone(inside, batch.mask).values)


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_a_smaller_clip_is_padded_with_its_background(name: str) -> None:
    backbone, batch = backbone_of(name).eval(), batch_of()
    bold, mask = batch.bold[:, :, :, :7, :6], batch.mask[:, :, :7, :6]
    background = torch.tensor([-1.0, 2.0])
    whole = background.view(2, 1, 1, 1, 1, 1).expand(2, 1, *CLIP).clone()
    whole[:, :, :, :7, :6] = bold
    padded = torch.nn.functional.pad(mask, (0, 2, 0, 1))
    small, large = (
        backbone.encode(backbone.tokenize(b, m, background=background)).to_grid()
        for b, m in ((bold, mask), (whole, padded))
    )
    assert torch.equal(small, large)


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_compact_and_dense_batches_give_the_same_features(name: str) -> None:
    backbone, batch = backbone_of(name).eval(), batch_of()
    background = torch.tensor([-3.0, 0.5])
    voxels = Voxels.of(batch.bold, batch.mask, background)
    compact = Batch.compact(
        voxels, batch.mask, batch.tr, batch.subject, batch.run, batch.start, batch.target
    )
    dense = backbone.tokenize(batch.bold, batch.mask, background=background, tr=batch.tr)
    a, b = (backbone.encode(t).values for t in (backbone.read(compact), dense))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_cannot_change_the_past(name: str, dtype: torch.dtype) -> None:
    backbone, batch = backbone_of(name).eval().to(dtype), batch_of()
    bold = batch.bold.to(dtype)
    if backbone.causal_unit == "time":
        for frame in range(backbone.patch_size[3], CLIP.t, backbone.patch_size[3]):
            changed = bold.clone()
            changed[..., frame:] += torch.randn_like(changed[..., frame:]).abs()
            a, b = (backbone.encode(backbone.tokenize(v), causal=True) for v in (bold, changed))
            slot = frame // backbone.patch_size[3]
            assert torch.equal(a.to_grid()[..., :slot], b.to_grid()[..., :slot])
            assert not torch.equal(a.to_grid()[..., slot:], b.to_grid()[..., slot:])
        return
    tokens = backbone.tokenize(bold, batch.mask)
    a = backbone.encode(tokens, causal=True).values
    for first in (1, 7, tokens.values.shape[1] // 2):
        values = tokens.values.clone()
        values[:, first:] += 1
        b = backbone.encode(tokens.with_values(values), causal=True).values
        assert torch.equal(a[:, :first], b[:, :first])
        assert not torch.equal(a[:, first], b[:, first])


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_clips_of_any_length_where_it_is_declared(name: str) -> None:
    backbone = backbone_of(name).eval()
    longer = torch.randn(1, 1, *CLIP[:3], 3 * CLIP.t)
    if not backbone.any_length:
        with pytest.raises(DataError, match="6 time tokens"):
            backbone(longer)
        return
    grid = backbone(longer).to_grid()
    assert grid.shape[-1] == 3 * CLIP.t // backbone.reduction[3] and grid.isfinite().all()


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_recomputed_activations_give_the_same_gradients(name: str, mode: str) -> None:
    batch, found = batch_of(), []
    for chosen in ("none", mode):
        backbone = backbone_of(name)
        backbone.set_checkpointing(chosen)
        backbone(batch.bold, batch.mask).values.square().sum().backward()
        found.append([p.grad for p in backbone.parameters() if p.grad is not None])
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(kept, again, atol=1e-5, rtol=1e-4)
    with pytest.raises(RecipeError, match="checkpointing must be one of"):
        backbone_of(name).set_checkpointing("all")


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_intermediates_end_in_the_features(name: str) -> None:
    backbone, batch = backbone_of(name).eval(), batch_of()
    stages = backbone.forward_intermediates(batch.bold, batch.mask)
    assert len(stages) >= 2
    assert all(isinstance(s, Features) for s in stages)
    torch.testing.assert_close(stages[-1].values, backbone(batch.bold, batch.mask).values)
    (only,) = backbone.forward_intermediates(batch.bold, batch.mask, indices=[-1])
    torch.testing.assert_close(only.values, stages[-1].values)
    with pytest.raises(RecipeError, match="do not exist"):
        backbone.forward_intermediates(batch.bold, batch.mask, indices=[99])


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_saved_weights_come_back_bit_equal(name: str, tmp_path: Path) -> None:
    first, second, batch = backbone_of(name, 0), backbone_of(name, 1), batch_of()
    torch.save(first.state_dict(), tmp_path / "w.pt")
    second.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    first.eval(), second.eval()
    a, b = (m(batch.bold, batch.mask).values for m in (first, second))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_adapters_find_their_targets(name: str) -> None:
    backbone = backbone_of(name)
    linears = [n for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)]
    assert backbone.lora_targets()
    for target in backbone.lora_targets():
        assert any(n.endswith(target) for n in linears), target


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_analytic_flops_equal_those_that_are_run(name: str) -> None:
    """Matrix products only; attention on the math path: within 0.1 %, Mamba 2 within 0.5 %."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    backbone, batch = backbone_of(name).eval(), batch_of(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        backbone(batch.bold, batch.mask)
    counted = counter.get_total_flops()
    allowed = 5e-3 if name == "neuromamba" else 1e-3
    analytic = sum(backbone.flops(CLIP, batch.mask[0]).values())
    assert abs(analytic - counted) <= allowed * counted


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_a_clip_that_does_not_fit_is_refused(name: str) -> None:
    backbone = backbone_of(name)
    cases = [
        ((1, 1, 14, 8, 8, 4), "larger than the model's grid"),
        ((1, 1, 12, 8, 8, 3), "3 frames do not divide into patches of 2"),
        ((1, 1, 12, 8, 8, 1), "1 frames do not divide into patches of 2"),
        ((1, 2, 12, 8, 8, 4), r"bold must be \(b, 1, x, y, z, t\)"),
    ]
    for shape, message in cases:
        with pytest.raises(DataError, match=message):
            backbone.tokenize(torch.randn(shape))


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_a_brain_without_voxels_is_refused(name: str) -> None:
    backbone, batch = backbone_of(name), batch_of()
    empty = batch.mask & torch.tensor([True, False]).view(2, 1, 1, 1)
    with pytest.raises(DataError, match="without a brain voxel"):
        backbone(batch.bold, empty).pooled("brain")


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_pair_learns_and_saves(name: str, objective: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fmrizoo.build(backbone={"name": name, **SMALL[name]}, objective=objective)
    assert isinstance(model, PretrainingModel)
    batch = batch_of()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss, logs = model(batch)
        assert all(not v.requires_grad for v in logs.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    model.eval()
    info = ModelInfo(to_dict(compose(model_recipe(name, objective))))
    save_model(tmp_path / "model", model, info)
    again = fmrizoo.load(tmp_path / "model")
    assert isinstance(again, PretrainingModel)
    with torch.no_grad():
        assert torch.equal(again(batch)[0], model(batch)[0])
    filled = model.reconstruct(batch)
    assert torch.equal(again.reconstruct(batch).predicted, filled.predicted)
    assert filled.truth.shape == filled.predicted.shape == filled.masked.shape == (2, *CLIP)
    assert filled.masked.dtype == torch.bool


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_pair_runs_in_bf16(name: str, objective: str) -> None:
    torch.manual_seed(0)
    model = fmrizoo.build(backbone={"name": name, **SMALL[name]}, objective=objective)
    batch = batch_of()
    exact, _ = model(batch)
    rounded, _ = model.bfloat16()(batch.to("cpu", torch.bfloat16))
    rounded.backward()
    assert abs(rounded.item() - exact.item()) < 0.02 * exact.item()


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_every_parameter_lies_in_one_layer(name: str) -> None:
    backbone = backbone_of(name)
    layers = backbone.layer_names()
    known = {n for n, _ in backbone.named_modules()} | {n for n, _ in backbone.named_parameters()}
    assert len(layers) >= 3 and {n for layer in layers for n in layer} <= known
    for parameter, _ in backbone.named_parameters():
        within = [
            n for layer in layers for n in layer if parameter == n or parameter.startswith(f"{n}.")
        ]
        assert len(within) == 1, parameter


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_the_widths_of_all_stages_are_what_it_declares(name: str) -> None:
    backbone, batch = backbone_of(name).eval(), batch_of()
    stages = backbone.encode_stages(backbone.read(batch))
    assert tuple(s.values.shape[2] for s in stages) == backbone.stage_features
    first, last = backbone.encode_stages(backbone.read(batch), [0, -1])
    assert torch.equal(first.values, stages[0].values)
    assert torch.equal(last.values, backbone.encode(backbone.read(batch)).values)


PROMPTED = [
    name
    for name in BACKBONE_NAMES
    if "prompts" in type(backbone_of(name)).supports(backbone_of(name).config)
]


def prompts_of(backbone: Backbone, count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [torch.randn(count, w, requires_grad=True) for w in backbone.prompt_widths()]


@pytest.mark.parametrize("name", PROMPTED)
def test_prompts_change_features_but_mix_no_samples(name: str) -> None:
    backbone, batch = backbone_of(name).eval(), batch_of(3)
    prompts = prompts_of(backbone)
    plain = backbone.encode(backbone.read(batch))
    (led,) = backbone.encode_stages(backbone.read(batch), [-1], prompts=prompts)
    assert led.values.shape == plain.values.shape and torch.equal(led.index, plain.index)
    assert not torch.allclose(led.values, plain.values, atol=1e-3)
    for clip in range(3):
        tokens = backbone.tokenize(batch.bold[[clip]], batch.mask[[clip]])
        (alone,) = backbone.encode_stages(tokens, [-1], prompts=prompts)
        torch.testing.assert_close(led.to_grid()[[clip]], alone.to_grid(), atol=1e-5, rtol=1e-5)
    led.values.square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in prompts)


@pytest.mark.parametrize("name", PROMPTED)
def test_prompts_that_do_not_fit_are_refused(name: str) -> None:
    backbone, batch = backbone_of(name), batch_of()
    prompts = prompts_of(backbone)
    for wrong in (prompts[:-1], [*prompts[:-1], torch.zeros(3, 1)]):
        with pytest.raises(RecipeError, match="prompt"):
            backbone.encode_stages(backbone.read(batch), [-1], prompts=wrong)


# Heads as small as the backbones they sit on; in each variant that differs in what trains.
HEAD_SMALL: dict[str, dict[str, Any]] = {
    "complex": {"dim": 16, "num_heads": 2, "cells": 2},
    "lora": {"rank": 2, "alpha": 4},
    "prompt": {"count": 2},
}
VARIANTS = [
    (head, dict(settings)) for head in HEADS.list() for settings in HEADS[head].factory.variants
]
HEAD_PAIRS = [
    pytest.param(name, head, settings, id="-".join([name, head, *map(str, settings.values())]))
    for name, (head, settings) in itertools.product(BACKBONE_NAMES, VARIANTS)
]


def downstream_of(
    name: str, head: str, settings: dict[str, Any], task: Tasks, **config: Any
) -> DownstreamModel:
    torch.manual_seed(0)
    model = fmrizoo.build(
        backbone={"name": name, **SMALL[name], **config},
        head={"name": head, **HEAD_SMALL.get(head, {}), **settings},
        task=task,
    )
    assert isinstance(model, DownstreamModel)
    return model.train()


def head_recipe(name: str, head: str, settings: dict[str, Any]) -> dict[str, Any]:
    section = {"name": head, **HEAD_SMALL.get(head, {}), **settings}
    clip = {"clip_frames": CLIP.t}
    return {"backbone": {"name": name, **SMALL[name]}, "head": section, "data": clip}


def encoder_parts(model: DownstreamModel) -> tuple[list[str], list[str]]:
    """Names of the encoder's parameters that train, and of those that do not."""
    found: tuple[list[str], list[str]] = ([], [])
    for name, parameter in model.backbone.named_parameters():
        found[not parameter.requires_grad].append(name)
    return found


@pytest.mark.parametrize(("name", "head", "settings"), HEAD_PAIRS)
@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.kind)
def test_head_learns_and_leaves_what_is_frozen_alone(
    name: str, head: str, settings: dict[str, Any], task: TaskSpec
) -> None:
    model = downstream_of(name, head, settings, task)
    trained, frozen = encoder_parts(model)
    assert bool(trained) == (model.head.trains in ("last_block", "all", "lora"))
    assert bool(frozen) or model.head.trains == "all"
    before = {k: v.detach().clone() for k, v in model.backbone.named_parameters()}
    batch = batch_of(3, task)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(20):
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    after = dict(model.backbone.named_parameters())
    assert all(torch.equal(before[k], after[k]) and after[k].grad is None for k in frozen)
    assert all(not torch.equal(before[k], after[k]) for k in trained)
    assert model.eval().predict(batch).shape == (3, task.scores)


@pytest.mark.parametrize(("name", "head", "settings"), HEAD_PAIRS)
def test_frozen_parts_do_not_drop_out(name: str, head: str, settings: dict[str, Any]) -> None:
    """Twice in training mode: only an encoder that trains may differ from itself."""
    model = downstream_of(name, head, settings, TASKS[0], drop_rate=0.5)
    batch = batch_of(3, TASKS[0])
    first, second = (model.outputs(batch) for _ in range(2))
    assert torch.equal(first, second) == (model.head.trains not in ("last_block", "all"))
    if model.head.trains == "last_block":
        below = range(len(model.backbone.layer_names()) - 3)
        stages = model.backbone.encode_stages(model.backbone.read(batch))
        again = model.backbone.encode_stages(model.backbone.read(batch))
        assert below and torch.equal(stages[0].values, again[0].values)


@pytest.mark.parametrize(("name", "head", "settings"), HEAD_PAIRS)
def test_model_with_a_head_comes_back_equal(
    name: str, head: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    tasks = (TASKS[0], TASKS[1], LEVELS)
    model = downstream_of(name, head, settings, tasks)
    batch = replace(batch_of(3), target=torch.tensor([[0.0, 31, 2], [2, math.nan, 0], [1, 50, 1]]))
    loss, _ = model(batch)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad.sign()
    model.eval()
    recipe = compose(head_recipe(name, head, settings))
    save_model(tmp_path / "model", model, ModelInfo(to_dict(recipe), tasks=tasks))
    again = fmrizoo.load(tmp_path / "model")
    assert isinstance(again, DownstreamModel) and again.head.tasks == tasks
    assert torch.equal(again.predict(batch), model.predict(batch))
    model.head.export(model.backbone, tmp_path)


@pytest.mark.parametrize(("name", "head", "settings"), HEAD_PAIRS)
def test_an_encoder_goes_on_without_its_head(
    name: str, head: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """``init_from`` a fine-tuned model: a plain encoder, adapters merged into it."""
    model = downstream_of(name, head, settings, TASKS[0]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    recipe = compose(head_recipe(name, head, settings))
    save_model(tmp_path / "model", model, ModelInfo(to_dict(recipe), tasks=(TASKS[0],)))
    plain, batch = backbone_of(name, 1).eval(), batch_of()
    zoo.load_encoder(plain, tmp_path / "model")
    (expected,) = model.backbone.encode_stages(model.backbone.read(batch), [-1])
    torch.testing.assert_close(
        plain.encode(plain.read(batch)).values, expected.values, atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize(("name", "head", "settings"), HEAD_PAIRS)
def test_recomputing_changes_no_gradient_of_a_head(
    name: str, head: str, settings: dict[str, Any]
) -> None:
    batch, found = batch_of(2, TASKS[0]), []
    for mode in CHECKPOINTING:
        model = downstream_of(name, head, settings, TASKS[0])
        model.backbone.set_checkpointing(mode)
        loss, _ = model(batch)
        loss.backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, gradient in found[0].items():
            torch.testing.assert_close(other[key], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "head", "settings"), HEAD_PAIRS)
def test_head_runs_in_bf16(name: str, head: str, settings: dict[str, Any]) -> None:
    model, batch = downstream_of(name, head, settings, TASKS[0]), batch_of(3, TASKS[0])
    exact, _ = model(batch)
    rounded, _ = model.bfloat16()(batch.to("cpu", torch.bfloat16))
    rounded.backward()
    assert abs(rounded.item() - exact.item()) < 0.03 * exact.item()
    assert all(p.grad is not None for p in model.head.parameters() if p.requires_grad)


@pytest.mark.parametrize(("name", "head", "settings"), HEAD_PAIRS)
def test_what_a_head_reads_of_a_frozen_encoder_may_be_kept(
    name: str, head: str, settings: dict[str, Any]
) -> None:
    """Clip by clip, with brains of other sizes: rows of equal shape that give equal answers."""
    model, batch = downstream_of(name, head, settings, TASKS[0]).eval(), batch_of(3, TASKS[0])
    if model.head.encoder_trains():
        assert model.head.trains != "none"
        return
    rows = [
        model.read(
            replace(
                batch_of(3, TASKS[0]),
                bold=batch.bold[[i]], mask=batch.mask[[i]], tr=batch.tr[[i]], subject=["01"],
                run=["r"], start=batch.start[[i]], target=None, seed=None,
            )
        )
        for i in range(3)
    ]  # fmt: skip
    kept = ReadBatch(
        tuple(torch.cat(part) for part in zip(*rows, strict=True)), batch.subject, batch.target
    )
    torch.testing.assert_close(model.predict(kept), model.predict(batch), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(kept)[0], model(batch)[0], atol=1e-5, rtol=1e-4)


def test_a_head_that_asks_too_much_is_refused_before_any_data() -> None:
    class Picky(HEADS["linear"].factory):  # type: ignore[misc]
        needs = frozenset({"wings"})
        kinds = frozenset({"regression"})

    HEADS.register("picky", HEADS["linear"].config)(Picky)
    try:
        for needs, said in (
            (frozenset({"wings"}), "needs a backbone that takes wings; 'swin4d' as configured"),
            (frozenset(), "cannot learn 'trial_type', a target of kind classification"),
        ):
            Picky.needs = needs
            with pytest.raises(RecipeError, match=said):
                zoo.load_recipe({"backbone": "swin4d", "head": {"name": "picky"}})
    finally:
        del HEADS._entries["picky"]


@pytest.mark.parametrize("name", zoo.list_recipes())
def test_every_shipped_recipe_composes_and_comes_back_equal(name: str) -> None:
    from fmrizoo.config import to_yaml

    recipe = zoo.load_recipe(name)
    assert compose(to_dict(recipe)) == recipe
    assert "# " not in zoo.recipe_summary(name)[:2] and len(zoo.recipe_summary(name)) > 20
    assert to_yaml(recipe)


@pytest.mark.parametrize("name", zoo.list_recipes())
def test_every_shipped_recipe_builds_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = fmrizoo.build(name, task=TASKS[0])
    assert sum(p.numel() for p in model.parameters()) > 1000

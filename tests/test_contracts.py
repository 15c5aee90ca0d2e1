"""Registered = tested: one suite walks every backbone, objective, head and pair."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import fmrizoo
from fmrizoo import zoo
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.model import DownstreamModel, PretrainingModel
from fmrizoo.registry import BACKBONES, HEADS, OBJECTIVES
from fmrizoo.types import Backbone, Batch, Features, Grid, TaskSpec

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
}
TASKS = [
    TaskSpec("classification", classes=("face", "house", "shoe")),
    TaskSpec("regression", mean=30.0, std=10.0),
]


def backbone_of(name: str, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return fmrizoo.create_backbone(name, **SMALL[name])


def batch_of(clips: int = 2, task: TaskSpec | None = None, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    mask = torch.zeros(clips, *CLIP[:3], dtype=torch.bool)
    mask[:, 2:10, 1:7, 1:7] = True
    bold = torch.randn(clips, 1, *CLIP) * mask[:, None, ..., None]
    target = None
    if task is not None:
        target = torch.arange(clips) % 3 if task.kind == "classification" else torch.rand(clips)
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


BACKBONE_NAMES = BACKBONES.list()
PAIRS = list(itertools.product(BACKBONE_NAMES, OBJECTIVES.list()))
HEAD_PAIRS = list(itertools.product(BACKBONE_NAMES, HEADS.list()))


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
    share = batch.mask.float().mean((1, 2, 3))
    padding = Grid(*CLIP[:3], 1).size / Grid(*backbone.clip_grid[:3], 1).size
    for part in (backbone.tokenize(batch.bold, batch.mask), backbone(batch.bold, batch.mask)):
        torch.testing.assert_close(part.brain.mean(1), share * padding)


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_every_parameter_that_trains_gets_a_gradient(name: str) -> None:
    backbone, batch = backbone_of(name), batch_of()
    backbone(batch.bold, batch.mask).values.square().sum().backward()
    without = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    backbone, batch = backbone_of(name).eval(), batch_of(3)
    together = backbone(batch.bold, batch.mask).to_grid()
    alone = backbone(batch.bold[1:2], batch.mask[1:2]).to_grid()
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-5)


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
    """Matrix products only; attention is counted on the math path, within 0.1 %."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    backbone, batch = backbone_of(name).eval(), batch_of(1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        backbone(batch.bold, batch.mask)
    counted = counter.get_total_flops()
    assert abs(sum(backbone.flops(CLIP).values()) - counted) <= 1e-3 * counted


@pytest.mark.parametrize("name", BACKBONE_NAMES)
def test_a_clip_that_does_not_fit_is_refused(name: str) -> None:
    backbone = backbone_of(name)
    for size in [(14, 8, 8, 4), (12, 8, 8, 3)]:
        with pytest.raises(DataError):
            backbone.tokenize(torch.zeros(1, 1, *size))


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
    filled = model.reconstruct(batch)
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


@pytest.mark.parametrize(("name", "head"), HEAD_PAIRS)
@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.kind)
def test_head_learns_and_leaves_the_frozen_encoder_alone(
    name: str, head: str, task: TaskSpec
) -> None:
    torch.manual_seed(0)
    model = fmrizoo.build(
        backbone={"name": name, "drop_rate": 0.5, **SMALL[name]}, head=head, task=task
    )
    assert isinstance(model, DownstreamModel)
    model.train()
    assert not model.backbone.training, "a frozen encoder must not drop out"
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    batch = batch_of(3, task)
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trains, 1e-2)
    losses = []
    for _ in range(20):
        loss, _ = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.eval().predict(batch).shape == (3, task.outputs)


@pytest.mark.parametrize(("name", "head"), HEAD_PAIRS)
def test_full_fine_tuning_moves_the_encoder(name: str, head: str) -> None:
    section = {"name": head, "train_encoder": "all"}
    model = fmrizoo.build(backbone={"name": name, **SMALL[name]}, head=section, task=TASKS[0])
    model.train()
    assert model.backbone.training
    loss, _ = model(batch_of(3, TASKS[0]))
    loss.backward()
    assert all(p.grad is not None for p in model.backbone.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", zoo.list_recipes())
def test_every_shipped_recipe_composes_and_comes_back_equal(name: str) -> None:
    from fmrizoo.config import compose, to_dict, to_yaml

    recipe = zoo.load_recipe(name)
    assert compose(to_dict(recipe)) == recipe
    assert "# " not in zoo.recipe_summary(name)[:2] and len(zoo.recipe_summary(name)) > 20
    assert to_yaml(recipe)


@pytest.mark.parametrize("name", zoo.list_recipes())
def test_every_shipped_recipe_builds_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = fmrizoo.build(name, task=TASKS[0])
    assert sum(p.numel() for p in model.parameters()) > 1000

"""The linear head against its definition: pooling, norms, what trains, learning rates by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_stubs import CLASSES, LEVELS, VALUES, Tiny, batch_of, clip_of, index_of
from torch import Tensor

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.heads import LinearConfig, LinearHead
from fmrizoo.model import DownstreamModel
from fmrizoo.types import Backbone, Features, Grid, TaskSpec

CELLS = Grid(2, 1, 2, 3)
WIDTH = 4


class Plain(Backbone):
    """Shapes only."""

    num_features = WIDTH
    stage_features = (WIDTH,)
    reduction = (5, 5, 5, 2)
    clip_grid = Grid(10, 5, 10, 6)


def features(batch: int = 3, cells: Grid = CELLS) -> Features:
    torch.manual_seed(0)
    valid = torch.ones(batch, cells.size, dtype=torch.bool)
    valid[1, 3] = False
    values, brain = torch.randn(batch, cells.size, WIDTH), torch.rand(batch, cells.size)
    return Features(values, index_of(cells).expand(batch, -1, -1), valid, cells, brain)


def head_of(*tasks: TaskSpec, **values: Any) -> LinearHead:
    torch.manual_seed(1)
    return LinearHead(LinearConfig(**values), backbone=Plain(), tasks=tasks or (CLASSES,))


def model_of(**values: Any) -> DownstreamModel:
    encoder = Tiny()
    head = LinearHead(LinearConfig(**values), backbone=encoder, tasks=(CLASSES,))
    return DownstreamModel(encoder, head).train()


def by_hand(given: Features, pool: str) -> Tensor:
    rows = []
    for values, valid, brain in zip(given.values, given.valid, given.brain, strict=True):
        kept = [i for i in range(CELLS.size) if valid[i]]
        if pool == "mean":
            rows.append(sum(values[i] for i in kept) / len(kept))
        elif pool == "brain":
            rows.append(sum(values[i] * brain[i] for i in kept) / sum(brain[i] for i in kept))
        elif pool == "frame":
            slots = [[i for i in kept if i % CELLS.t == t] for t in range(CELLS.t)]
            rows.append(torch.cat([sum(values[i] for i in s) / len(s) for s in slots]))
        else:
            # Features first, then places; an invalid token counts as 0.
            grid = (values * valid.unsqueeze(-1)).view(*CELLS, WIDTH)
            rows.append(grid.mean(3).permute(3, 0, 1, 2).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("pool", ["mean", "brain", "space", "frame"])
def test_outputs_are_a_linear_layer_on_the_pooled_features(pool: str) -> None:
    head, given = head_of(pool=pool), features()
    expected = by_hand(given, pool) @ head.project.weight.T + head.project.bias
    torch.testing.assert_close(head([given]), expected)
    width = {"mean": 4, "brain": 4, "space": 4 * 2 * 1 * 2, "frame": 4 * 3}[pool]
    assert head.project.weight.shape == (3, width)


def test_places_keep_their_own_weights_only_in_space_pooling() -> None:
    given = features(2)
    given.valid[:] = True
    flipped = Features(
        given.values.view(2, *CELLS, WIDTH).flip(1).flatten(1, 4),
        given.index, given.valid, given.grid, given.brain,
    )  # fmt: skip
    for pool in ("mean", "frame"):
        torch.testing.assert_close(head_of(pool=pool)([flipped]), head_of(pool=pool)([given]))
    assert not torch.allclose(head_of(pool="space")([flipped]), head_of(pool="space")([given]))


def test_pooling_over_no_brain_is_refused() -> None:
    given = features()
    given.brain[1] = 0
    with pytest.raises(DataError, match="without a brain voxel"):
        head_of(pool="brain")([given])


def test_clips_of_another_length_need_a_pooling_over_time() -> None:
    longer = features(cells=CELLS._replace(t=5))
    assert head_of()([longer]).shape == (3, 3)
    with pytest.raises(DataError, match="pool=frame built for 12 pooled features got 20"):
        head_of(pool="frame")([longer])


def test_layer_norm_standardises_each_clip() -> None:
    given = features()
    pooled = by_hand(given, "mean")
    scaled = (pooled - pooled.mean(1, keepdim=True)) / (
        pooled.var(1, False, keepdim=True) + 1e-5
    ) ** 0.5
    head = head_of(norm="layer")
    torch.testing.assert_close(head([given]), scaled @ head.project.weight.T + head.project.bias)


def test_batch_norm_standardises_each_feature_by_the_training_batches() -> None:
    given = features()
    pooled = by_hand(given, "mean")
    head = head_of(norm="batch").train()
    scaled = (pooled - pooled.mean(0)) / (pooled.var(0, False) + 1e-5) ** 0.5
    torch.testing.assert_close(head([given]), scaled @ head.project.weight.T + head.project.bias)
    head.eval()
    # One batch seen with momentum 0.1, from mean 0 and variance 1; the variance is unbiased.
    running = (pooled - 0.1 * pooled.mean(0)) / (0.9 + 0.1 * pooled.var(0) + 1e-5) ** 0.5
    torch.testing.assert_close(head([given]), running @ head.project.weight.T + head.project.bias)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_norms_have_nothing_to_learn(norm: str) -> None:
    assert [name for name, _ in head_of(norm=norm).named_parameters()] == [
        "project.weight",
        "project.bias",
    ]


def test_dropout_works_on_the_pooled_features_in_training_only() -> None:
    head, given = head_of(dropout=0.5), features()
    torch.nn.init.eye_(head.project.weight)
    pooled = by_hand(given, "mean")[:, :3]
    dropped = head.train()([given])
    ratio = dropped / pooled
    assert ((ratio.abs() < 1e-6) | ((ratio - 2).abs() < 1e-4)).all()
    assert (dropped == 0).any()
    torch.testing.assert_close(head.eval()([given]), pooled)


def test_predictions_lie_side_by_side_in_their_own_units() -> None:
    head = head_of(VALUES, CLASSES, LEVELS)
    outputs = head([features()])
    assert outputs.shape == (3, 1 + 3 + 3)
    scores = head.scores(outputs)
    torch.testing.assert_close(scores[:, :1], outputs[:, :1] * 8.0 + 40.0)
    torch.testing.assert_close(scores[:, 1:4], outputs[:, 1:4])
    torch.testing.assert_close(scores[:, 4:].exp().sum(1), torch.ones(3))


def test_a_model_needs_targets() -> None:
    with pytest.raises(RecipeError, match="needs batches with targets"):
        model_of()(batch_of())


def trained_names(model: DownstreamModel) -> set[str]:
    found = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    return {".".join(n.split(".")[: 2 if n.startswith("blocks") else 1]) for n in found}


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ("none", set()),
        ("last_block", {"blocks.1", "merge", "blocks.2", "norm"}),
        ("all", {"embed", "blocks.0", "blocks.1", "merge", "blocks.2", "norm"}),
    ],
)
def test_what_trains_moves_and_nothing_else_does(train: str, names: set[str]) -> None:
    model = model_of(train_encoder=train)
    assert model.head.trains == train and model.head.encoder_trains() == bool(names)
    assert trained_names(model) == names, "spare never trains: the encoder itself says so"
    before = {k: v.detach().clone() for k, v in model.backbone.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        loss, _ = model(batch_of(3, torch.tensor([0, 1, 2])))
        loss.backward()
        optimizer.step()
    for name, parameter in model.backbone.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        assert (parameter.grad is None) != parameter.requires_grad


@pytest.mark.parametrize(
    ("train", "on"), [("none", ()), ("last_block", (1, 2)), ("all", (0, 1, 2))]
)
def test_only_what_trains_drops_out(train: str, on: tuple[int, ...]) -> None:
    model = model_of(train_encoder=train)
    blocks = model.backbone.blocks
    assert tuple(i for i, b in enumerate(blocks) if b.drop.training) == on  # type: ignore[union-attr, arg-type]
    assert model.backbone.training == (train == "all")
    model.eval()
    assert not any(m.training for m in model.modules())


def test_release_lets_the_encoder_train_again() -> None:
    model = model_of()
    model.head.release(model.backbone)
    assert all(p.requires_grad == (n != "spare") for n, p in model.backbone.named_parameters())


@pytest.mark.parametrize("train", ["last_block", "all"])
def test_an_encoder_that_came_frozen_is_refused(train: str) -> None:
    encoder = Tiny().requires_grad_(False)
    head = LinearHead(LinearConfig(train_encoder=train), backbone=encoder, tasks=(CLASSES,))
    with pytest.raises(RecipeError, match=f"train_encoder={train} finds nothing to train"):
        head.attach(encoder)


@pytest.mark.parametrize(
    ("train", "scales"),
    [("all", {"embed": 0.5**4, "blocks.0": 0.5**3}), ("last_block", {})],
)
def test_learning_rates_fall_with_the_distance_from_the_head(
    train: str, scales: dict[str, float]
) -> None:
    model = model_of(train_encoder=train, layer_decay=0.5)
    expected = {**scales, "blocks.1": 0.25, "merge": 0.25, "blocks.2": 0.5, "norm": 0.5}
    found = model.lr_scales()
    names = [n for n, p in model.backbone.named_parameters() if p.requires_grad]
    assert found.keys() == {f"backbone.{name}" for name in names}
    for name in names:
        prefix = next(p for p in expected if name.startswith(f"{p}."))
        assert found[f"backbone.{name}"] == expected[prefix]
    assert model_of(train_encoder=train).lr_scales() == {}


def test_a_parameter_in_no_layer_is_refused() -> None:
    encoder = Tiny()
    encoder.extra = torch.nn.Linear(2, 2)
    head = LinearHead(LinearConfig(train_encoder="last_block"), backbone=encoder, tasks=(CLASSES,))
    with pytest.raises(RecipeError, match=r"does not say which layer extra\.weight is in"):
        head.attach(encoder)


def test_one_clip_answers_whatever_is_beside_it() -> None:
    model, batch = model_of(pool="brain", norm="layer").eval(), batch_of(3)
    alone = [model.predict(clip_of(batch, clip)) for clip in range(3)]
    torch.testing.assert_close(torch.cat(alone), model.predict(batch))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pool": "brian"}, r"head.pool='brian' is not known. Did you mean 'brain'\?"),
        ({"norm": "group"}, "head.norm='group' is not known"),
        ({"train_encoder": "lastblock"}, r"Did you mean 'last_block'\?"),
        ({"dropout": 1.0}, r"head.dropout is a share in \[0, 1\), got 1.0"),
        ({"train_encoder": "all", "layer_decay": 0.0}, r"a factor in \(0, 1\], got 0.0"),
        ({"layer_decay": 0.5}, "layer_decay=0.5 has nothing to act on"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        head_of(**values)


def test_a_head_needs_a_target() -> None:
    with pytest.raises(RecipeError, match="at least one target"):
        LinearHead(LinearConfig(), backbone=Plain(), tasks=())

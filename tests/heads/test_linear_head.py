"""The linear head against its definition: pooling, norms, scaling, smoothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.heads import LinearConfig, LinearHead
from fmrizoo.types import Backbone, Batch, Features, Grid, TaskSpec

CLASSES = TaskSpec("classification", classes=("face", "house", "shoe"))
VALUES = TaskSpec("regression", mean=40.0, std=8.0)
CELLS = Grid(2, 1, 2, 3)
WIDTH = 4


class Plain(Backbone):
    """Shapes only."""

    num_features = WIDTH
    reduction = (5, 5, 5, 2)
    clip_grid = Grid(10, 5, 10, 6)

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


def features(batch: int = 3) -> Features:
    torch.manual_seed(0)
    index = torch.cartesian_prod(*(torch.arange(s) for s in CELLS)).expand(batch, -1, -1)
    valid = torch.ones(batch, CELLS.size, dtype=torch.bool)
    valid[1, 3] = False
    values, brain = torch.randn(batch, CELLS.size, WIDTH), torch.rand(batch, CELLS.size)
    return Features(values, index, valid, CELLS, brain)


def head_of(task: TaskSpec = CLASSES, **values: Any) -> LinearHead:
    torch.manual_seed(1)
    return LinearHead(LinearConfig(**values), backbone=Plain(), task=task)


def by_hand(given: Features, pool: str) -> Tensor:
    rows = []
    for values, valid, brain in zip(given.values, given.valid, given.brain, strict=True):
        kept = [i for i in range(CELLS.size) if valid[i]]
        if pool == "mean":
            rows.append(sum(values[i] for i in kept) / len(kept))
        elif pool == "brain":
            rows.append(sum(values[i] * brain[i] for i in kept) / sum(brain[i] for i in kept))
        else:
            # Features first, then places; an invalid token counts as 0.
            grid = (values * valid.unsqueeze(-1)).view(*CELLS, WIDTH)
            rows.append(grid.mean(3).permute(3, 0, 1, 2).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("pool", ["mean", "brain", "space"])
def test_outputs_are_a_linear_layer_on_the_pooled_features(pool: str) -> None:
    head, given = head_of(pool=pool), features()
    expected = by_hand(given, pool) @ head.project.weight.T + head.project.bias
    torch.testing.assert_close(head(given), expected)
    assert head.project.in_features == {"mean": 4, "brain": 4, "space": 4 * 2 * 1 * 2}[pool]


def test_places_keep_their_own_weights_only_in_space_pooling() -> None:
    given = features(2)
    given.valid[:] = True
    flipped = Features(
        given.values.view(2, *CELLS, WIDTH).flip(1).flatten(1, 4),
        given.index, given.valid, given.grid, given.brain,
    )  # fmt: skip
    torch.testing.assert_close(head_of(pool="mean")(flipped), head_of(pool="mean")(given))
    assert not torch.allclose(head_of(pool="space")(flipped), head_of(pool="space")(given))


def test_pooling_over_no_brain_is_refused() -> None:
    given = features()
    given.brain[1] = 0
    with pytest.raises(DataError, match="without a brain voxel"):
        head_of(pool="brain")(given)


def test_layer_norm_standardises_each_clip() -> None:
    given = features()
    pooled = by_hand(given, "mean")
    scaled = (pooled - pooled.mean(1, keepdim=True)) / (
        pooled.var(1, False, keepdim=True) + 1e-5
    ) ** 0.5
    head = head_of(norm="layer")
    torch.testing.assert_close(head(given), scaled @ head.project.weight.T + head.project.bias)


def test_batch_norm_standardises_each_feature_by_the_training_batches() -> None:
    given = features()
    pooled = by_hand(given, "mean")
    head = head_of(norm="batch").train()
    scaled = (pooled - pooled.mean(0)) / (pooled.var(0, False) + 1e-5) ** 0.5
    torch.testing.assert_close(head(given), scaled @ head.project.weight.T + head.project.bias)
    head.eval()
    # One batch seen with momentum 0.1, from mean 0 and variance 1; the variance is unbiased.
    running = (pooled - 0.1 * pooled.mean(0)) / (0.9 + 0.1 * pooled.var(0) + 1e-5) ** 0.5
    torch.testing.assert_close(head(given), running @ head.project.weight.T + head.project.bias)


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
    dropped = head.train()(given)
    ratio = dropped / pooled
    assert ((ratio.abs() < 1e-6) | ((ratio - 2).abs() < 1e-4)).all()
    assert (dropped == 0).any()
    torch.testing.assert_close(head.eval()(given), pooled)


def test_regression_learns_the_scaled_target_and_predicts_in_its_own_unit() -> None:
    from fmrizoo.model import DownstreamModel

    head = head_of(VALUES)
    outputs, target = torch.tensor([[0.5], [-1.0]]), torch.tensor([48.0, 40.0])
    # (0.5 − 1)² and (−1 − 0)²
    assert head.loss(outputs, target).item() == pytest.approx((0.25 + 1.0) / 2)

    class Encoder(Plain):
        def read(self, batch: Batch) -> Any:
            return None

        def encode(self, tokens: Any, *, causal: bool = False) -> Features:
            return features()

    model = DownstreamModel(Encoder(), head)
    batch = Batch(
        torch.zeros(3, 1, 2, 2, 2, 2), torch.ones(3, 2, 2, 2, dtype=torch.bool), torch.ones(3),
        ["01"] * 3, ["r"] * 3, torch.zeros(3),
    )  # fmt: skip
    torch.testing.assert_close(model.predict(batch), head(features()) * 8.0 + 40.0)
    with pytest.raises(RecipeError, match="needs batches with targets"):
        model(batch)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classification_loss_with_label_smoothing(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    wanted = torch.full((5, 3), smoothing / 3)
    wanted[torch.arange(5), target] += 1 - smoothing
    expected = -(wanted * logits.log_softmax(1)).sum(1).mean()
    loss = head_of(label_smoothing=smoothing).loss(logits, target)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("train", "trains"), [("none", False), ("all", True)])
def test_attach_freezes_the_encoder_unless_it_trains(train: str, trains: bool) -> None:
    encoder, head = Plain(), head_of(train_encoder=train)
    head.attach(encoder)
    assert head.encoder_trains() is trains
    assert all(p.requires_grad is trains for p in encoder.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pool": "brian"}, r"head.pool='brian' is not known. Did you mean 'brain'\?"),
        ({"norm": "group"}, "head.norm='group' is not known"),
        ({"train_encoder": "al"}, r"Did you mean 'all'\?"),
        ({"dropout": 1.0}, r"head.dropout is a share in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"head.label_smoothing is a share in \[0, 1\), got -0.1"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        head_of(**values)

"""Losses and predictions of every kind of target against their definitions, number by number."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from head_stubs import CLASSES, LEVELS, VALUES
from torch import Tensor

from fmrizoo.errors import DataError
from fmrizoo.heads.losses import LEAST_STEP, all_scores, level_scores, total_loss
from fmrizoo.heads.readout import TaskLinear
from fmrizoo.types import TaskSpec

NAN = math.nan


def cross_entropy(logits: Tensor, label: int, smoothing: float = 0.0) -> float:
    total = sum(math.exp(v) for v in logits.tolist())
    wanted = [smoothing / len(logits) + (1 - smoothing) * (i == label) for i in range(len(logits))]
    return -sum(w * (v - math.log(total)) for w, v in zip(wanted, logits.tolist(), strict=True))


@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 1.25)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classification_is_weighted_and_smoothed_cross_entropy(
    smoothing: float, weights: tuple[float, ...]
) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    task = replace(CLASSES, smoothing=smoothing, weights=weights)
    each = [
        cross_entropy(row, label, smoothing) * (weights[label] if weights else 1)
        for row, label in zip(logits, target.tolist(), strict=True)
    ]
    # The mean is over the samples, not over their weights.
    assert total_loss([task], logits, target).item() == pytest.approx(sum(each) / 5, rel=1e-6)


def test_regression_is_the_squared_error_of_the_scaled_value() -> None:
    outputs, target = torch.tensor([[0.5], [-1.0]]), torch.tensor([48.0, 40.0])
    # (0.5 − 1)² and (−1 − 0)²
    assert total_loss([VALUES], outputs, target).item() == pytest.approx((0.25 + 1.0) / 2)
    assert all_scores([VALUES], outputs).tolist() == [[44.0], [32.0]]


@pytest.mark.parametrize("weights", [(), (4.0, 2.0, 1.0, 0.5)])
def test_ordinal_is_cross_entropy_of_above_each_level(weights: tuple[float, ...]) -> None:
    outputs = torch.tensor([[2.0, 0.5, -1.0], [1.0, 0.0, -3.0]])
    expected = 0.0
    for row, level in zip(outputs.tolist(), (1, 3), strict=True):
        losses = []
        for step, logit in enumerate(row):
            chance = 1 / (1 + math.exp(-logit))
            losses.append(-math.log(chance if level > step else 1 - chance))
        expected += sum(losses) / 3 * (weights[level] if weights else 1) / 2
    task = replace(LEVELS, weights=weights)
    for target in (torch.tensor([1, 3]), torch.tensor([1.0, 3.0])):
        assert total_loss([task], outputs, target).item() == pytest.approx(expected, rel=1e-6)


def test_two_levels_are_two_classes() -> None:
    torch.manual_seed(0)
    outputs, target = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 0])
    two = TaskSpec("ordinal", classes=("no", "yes"))
    logits = torch.cat([torch.zeros(6, 1), outputs], 1)
    classes = TaskSpec("classification", classes=("no", "yes"))
    torch.testing.assert_close(
        total_loss([two], outputs, target), total_loss([classes], logits, target)
    )
    torch.testing.assert_close(level_scores(outputs), logits.log_softmax(1))


def test_levels_have_the_probabilities_between_their_cut_points() -> None:
    torch.manual_seed(0)
    outputs = torch.randn(7, 3, dtype=torch.float64).sort(1, descending=True).values
    above = torch.sigmoid(outputs)
    full = torch.cat([torch.ones(7, 1), above, torch.zeros(7, 1)], 1)
    expected = full[:, :-1] - full[:, 1:]
    torch.testing.assert_close(level_scores(outputs).exp(), expected)
    torch.testing.assert_close(expected.sum(1), torch.ones(7, dtype=torch.float64))


def test_log_probabilities_of_levels_keep_their_digits_far_out() -> None:
    """σ(−40) − σ(−41) from the definition is 0 in fp32; exactly e^−40 · (1 − e^−1) to 1e-17."""
    scores = level_scores(torch.tensor([[-40.0, -41.0], [41.0, 40.0]]))
    assert scores[:, 1].tolist() == pytest.approx([-40 + math.log(1 - math.exp(-1))] * 2, rel=1e-6)
    equal = level_scores(torch.tensor([[0.3, 0.3, 0.3]]))
    assert equal.isfinite().all() and equal[0, 1] < math.log(LEAST_STEP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ordinal_outputs_never_rise_whatever_the_parameters(dtype: torch.dtype) -> None:
    layer = TaskLinear(5, [LEVELS]).to(dtype)
    for seed in range(20):
        torch.manual_seed(seed)
        torch.nn.init.normal_(layer.weight, std=3)
        torch.nn.init.normal_(layer.bias, std=8)
        outputs = layer(torch.randn(50, 5, dtype=dtype))
        assert (outputs[:, :-1] >= outputs[:, 1:]).all()
        assert all_scores([LEVELS], outputs).isfinite().all()


def test_levels_start_equally_likely() -> None:
    layer = TaskLinear(5, [LEVELS, CLASSES])
    torch.nn.init.zeros_(layer.weight)
    scores = all_scores(layer.tasks, layer(torch.randn(2, 5)))
    torch.testing.assert_close(scores[:, :4].exp(), torch.full((2, 4), 0.25))
    assert torch.equal(scores[:, 4:], torch.zeros(2, 3))


def test_ordinal_outputs_are_one_score_and_its_distance_from_cut_points() -> None:
    torch.manual_seed(0)
    layer, x = TaskLinear(5, [VALUES, LEVELS]), torch.randn(3, 5)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    assert layer.weight.shape == (2, 5) and layer.bias.shape == (4,)
    bias = layer.bias.tolist()
    down = [0.0, math.log1p(math.exp(bias[2])), math.log1p(math.exp(bias[3]))]
    for row, out in zip((x @ layer.weight.T).tolist(), layer(x).tolist(), strict=True):
        expected = [row[0] + bias[0]] + [row[1] + bias[1] - sum(down[: j + 1]) for j in range(3)]
        assert out == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gradients_of_all_kinds_together() -> None:
    torch.manual_seed(0)
    tasks = [CLASSES, VALUES, replace(LEVELS, weights=(1.0, 2.0, 0.5, 1.0))]
    layer = TaskLinear(3, tasks).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 41.0, 3], [NAN, 30, 0], [2, NAN, 1], [1, 50, NAN]])

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        given = {"weight": weight, "bias": bias}
        return total_loss(tasks, torch.func.functional_call(layer, given, x), target)

    assert torch.autograd.gradcheck(loss, (x, layer.weight, layer.bias))


def test_several_targets_add_up_and_missing_labels_count_for_nothing() -> None:
    torch.manual_seed(0)
    tasks = [CLASSES, VALUES, LEVELS]
    outputs = torch.randn(4, 7, requires_grad=True)
    target = torch.tensor([[0, 41.0, 3], [NAN, 30, NAN], [2, NAN, NAN], [1, 50, NAN]])
    alone = (
        total_loss([CLASSES], outputs[[0, 2, 3], :3], torch.tensor([0, 2, 1]))
        + total_loss([VALUES], outputs[[0, 1, 3], 3:4], torch.tensor([41.0, 30, 50]))
        + total_loss([LEVELS], outputs[[0], 4:], torch.tensor([3]))
    )
    loss = total_loss(tasks, outputs, target)
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert outputs.grad is not None
    missing = torch.tensor([[False, False, False], [True, False, True], [False, True, True]])
    for row, gone in enumerate(missing):
        for task, part in enumerate((slice(0, 3), slice(3, 4), slice(4, 7))):
            assert bool((outputs.grad[row, part] == 0).all()) == bool(gone[task])


@pytest.mark.parametrize("task", [CLASSES, VALUES, LEVELS], ids=lambda t: t.kind)
def test_a_batch_without_a_label_has_loss_0_and_a_gradient_of_0(task: TaskSpec) -> None:
    outputs = torch.randn(3, task.outputs, requires_grad=True)
    loss = total_loss([task], outputs, torch.full((3,), NAN))
    loss.backward()
    assert loss.item() == 0 and outputs.grad is not None and not outputs.grad.any()


@pytest.mark.parametrize("shape", [(3, 2), (2,), (3, 1, 1)])
def test_targets_that_do_not_match_the_tasks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"targets must be \(3, 1\) \(samples, targets\), got"):
        total_loss([CLASSES], torch.zeros(3, 3), torch.zeros(shape))

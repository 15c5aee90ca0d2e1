"""Metrics against hand-computed values and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics


def test_classification_by_hand() -> None:
    # Class 0: 3 of 4 right, class 1: 0 of 1, class 2: 1 of 1.
    target = [0, 0, 0, 0, 1, 2]
    scores = np.eye(3)[[0, 0, 0, 1, 0, 2]]
    found = metrics.classification(target, scores)
    assert found.n == 6
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 0 + 1) / 3)


def test_balanced_accuracy_counts_only_classes_that_occur() -> None:
    found = metrics.classification([0, 0, 1], np.eye(3)[[0, 2, 1]])
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)


def test_auroc_binary_by_hand() -> None:
    # Pairs (negative, positive) ranked right: 3 of 4.
    margin = np.array([0.1, 0.4, 0.35, 0.8])
    found = metrics.classification([0, 0, 1, 1], np.stack([-margin, margin], 1))
    assert found["auroc"] == pytest.approx(0.75)


def test_auroc_binary_survives_saturated_probabilities() -> None:
    margin = np.array([0.0, 60.0, 80.0, 90.0])
    found = metrics.classification([0, 0, 1, 1], np.stack([np.zeros(4), margin], 1))
    assert found["auroc"] == 1.0


def test_auroc_multiclass_equals_sklearn_and_ignores_row_constants() -> None:
    rng = np.random.default_rng(0)
    target = np.arange(60) % 4
    logits = rng.normal(size=(60, 4)) + np.eye(4)[target]
    expected = roc_auc_score(target, metrics.softmax(logits), multi_class="ovr", average="macro")
    shifted = logits + rng.normal(size=(60, 1)) * 5
    assert metrics.classification(target, logits)["auroc"] == pytest.approx(expected, abs=1e-12)
    assert metrics.classification(target, shifted)["auroc"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("target", [[1, 1, 1], [0, 1, 1]])
def test_auroc_is_none_when_a_class_is_absent(target: list[int]) -> None:
    assert metrics.classification(target, np.eye(3))["auroc"] is None


def test_regression_by_hand() -> None:
    found = metrics.regression([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert found["mae"] == pytest.approx(2.0)
    assert found["r2"] == pytest.approx(1 - 14 / 2)
    assert found["pearson_r"] == pytest.approx(1.0)


def test_regression_gaps_are_none() -> None:
    assert metrics.regression([2.0, 2.0], [1.0, 3.0]).values == {
        "mae": 1.0,
        "r2": None,
        "pearson_r": None,
    }
    constant = metrics.regression([1.0, 2.0, 4.0], [0.1 + 0.2] * 3)
    assert constant["pearson_r"] is None
    assert constant["r2"] is not None


def levels(predicted: list[int], k: int) -> np.ndarray:
    """Log-probabilities that leave no doubt about ``predicted``."""
    return 50 * np.eye(k)[predicted]


def test_ordinal_by_hand() -> None:
    # Differences 0, 0, 1, 2 levels; observed Σw = 1 + 4 = 5.
    target, predicted = [0, 1, 1, 2], [0, 1, 2, 0]
    found = metrics.ordinal(target, levels(predicted, 3))
    # Expected Σw: all 16 pairs of (target, predicted) / 4 units.
    expected = sum((t - p) ** 2 for t in target for p in predicted) / 4
    assert found.n == 4
    assert found["quadratic_kappa"] == pytest.approx(1 - 5 / expected)
    assert found["mae"] == pytest.approx(3 / 4)
    assert found["accuracy"] == pytest.approx(2 / 4)
    # Ranks of the targets 1, 2.5, 2.5, 4 and of the predictions 1.5, 3, 4, 1.5.
    ranks = np.corrcoef([1, 2.5, 2.5, 4], [1.5, 3, 4, 1.5])[0, 1]
    assert found["spearman_r"] == pytest.approx(ranks)
    assert tuple(found.values) == metrics.names("ordinal")


def test_kappa_weighs_far_misses_more() -> None:
    target = [0, 1, 2, 3]
    near = metrics.ordinal(target, levels([1, 0, 3, 2], 4))["quadratic_kappa"]
    far = metrics.ordinal(target, levels([3, 1, 2, 0], 4))["quadratic_kappa"]
    assert near is not None and far is not None and near > 0.5 > 0 > far
    assert metrics.ordinal(target, levels(target, 4))["quadratic_kappa"] == 1.0


def test_kappa_counts_levels_that_do_not_occur() -> None:
    target, predicted = [0, 1, 3, 3], [0, 1, 3, 1]
    found = metrics.ordinal(target, levels(predicted, 5))["quadratic_kappa"]
    expected = sum((t - p) ** 2 for t in target for p in predicted) / 4
    assert found == pytest.approx(1 - 4 / expected)


def test_kappa_of_any_constant_answer_is_zero() -> None:
    for level in range(3):
        found = metrics.ordinal([0, 1, 1, 2], levels([level] * 4, 3))
        assert found["quadratic_kappa"] == pytest.approx(0.0)
        assert found["spearman_r"] is None


def test_the_predicted_level_is_the_median_not_the_mode() -> None:
    # Cumulative 0.4, 0.7, 1: the mode is level 0, the median level 1.
    p = np.log([[0.4, 0.3, 0.3], [0.5, 0.2, 0.3], [0.1, 0.1, 0.8]])
    assert metrics.median_level(p).tolist() == [1, 0, 2]
    # ½ reached but for rounding, and any constant per row.
    assert metrics.median_level(np.log([[0.3, 0.2, 0.5]]) - 700).tolist() == [1]


def test_spearman_is_of_the_expected_level() -> None:
    # The median of all is level 0; the expected levels rise with the target.
    p = np.log([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.6, 0.2, 0.2]])
    found = metrics.ordinal([0, 1, 2], p)
    assert found["spearman_r"] == pytest.approx(1.0)
    assert found["quadratic_kappa"] == pytest.approx(0.0)


def test_ordinal_gaps_are_none() -> None:
    found = metrics.ordinal([1, 1], levels([1, 0], 3))
    assert found.values == {
        "quadratic_kappa": None,
        "mae": 0.5,
        "accuracy": 0.5,
        "spearman_r": None,
    }


def test_chance_of_levels() -> None:
    found = metrics.chance("ordinal", [0, 1, 1, 2, 3], [0, 1, 3, 3], 4)
    # Always the training median, level 1: errors 1, 0, 2, 2.
    assert found["mae"] == pytest.approx(5 / 4)
    # The majority level 1 occurs once in four; drawing gives 0.2·¼ + 0.4·¼ + 0.2·½ = 0.25.
    assert found["accuracy"] == pytest.approx(0.25)
    assert (found["quadratic_kappa"], found["spearman_r"]) == (0.0, None)
    assert metrics.chance("ordinal", [0, 1], [1, 1], 2)["quadratic_kappa"] is None


def test_chance_of_majority_and_of_balanced_classes() -> None:
    skewed = metrics.chance("classification", [0, 0, 0, 1], [0, 0, 0, 0, 1, 1], 2)
    assert skewed["accuracy"] == pytest.approx(4 / 6)
    assert skewed["balanced_accuracy"] == 0.5
    assert skewed["auroc"] == 0.5
    even = metrics.chance("classification", np.arange(16) % 8, np.arange(8), 8)
    assert even["accuracy"] == pytest.approx(0.125)


def test_chance_takes_the_better_guesser() -> None:
    # The training majority (class 0) never occurs in the test: drawing from frequencies is better.
    found = metrics.chance("classification", [0, 0, 0, 1], [1, 1], 2)
    assert found["accuracy"] == pytest.approx(0.25)
    assert found["auroc"] is None


def test_chance_of_regression_answers_the_training_mean() -> None:
    found = metrics.chance("regression", [1.0, 3.0], [2.0, 4.0])
    assert found["mae"] == pytest.approx(1.0)
    assert found["r2"] == pytest.approx(1 - 4 / 2)
    assert found["pearson_r"] is None


@pytest.mark.parametrize(
    ("target", "scores", "word"),
    [
        ([], np.zeros((0, 2)), "empty"),
        ([0, 1], np.array([[0.0, np.nan], [1.0, 0.0]]), "NaN"),
        ([0, 2], np.zeros((2, 2)), "0..1"),
        ([0, 1, 1], np.zeros((2, 2)), "must be"),
        ([0, 0.5], np.zeros((2, 2)), "indices"),
    ],
)
def test_bad_input_is_refused(target: list[float], scores: np.ndarray, word: str) -> None:
    for score in (metrics.classification, metrics.ordinal):
        with pytest.raises(DataError, match=word):
            score(target, scores)


def test_bad_regression_input_is_refused() -> None:
    with pytest.raises(DataError, match="infinite"):
        metrics.regression([1.0], [np.inf])
    with pytest.raises(DataError, match="must both"):
        metrics.regression([1.0, 2.0], [1.0])
    with pytest.raises(DataError, match="task kind"):
        metrics.names("ranking")

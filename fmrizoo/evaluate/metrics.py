"""Scores of predictions against the truth, each with the number of units it rests on.

A metric that the data cannot support (AUROC with one class, R² of a constant) is ``None``, never
NaN and never a made-up 0: a table shows the gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fmrizoo.errors import DataError

CLASSIFICATION = ("accuracy", "balanced_accuracy", "auroc")
REGRESSION = ("mae", "r2", "pearson_r")
ORDINAL = ("quadratic_kappa", "mae", "accuracy", "spearman_r")
# Of levels: kappa, as is the custom for ratings. A guesser reaches 0 however the levels are spread,
# which is true of neither accuracy nor mae, and a miss by two levels weighs more than two by one.
PRIMARY = {"classification": "accuracy", "regression": "r2", "ordinal": "quadratic_kappa"}
LOWER_IS_BETTER = frozenset({"mae"})

Values = dict[str, float | None]


@dataclass(frozen=True)
class Metrics:
    """Metric name → value, and ``n``, the number of units (events, runs, subjects) behind it."""

    values: Values
    n: int

    def __getitem__(self, name: str) -> float | None:
        return self.values[name]


def names(kind: str) -> tuple[str, ...]:
    """Metrics of a task kind, in the order tables show them."""
    known = {"classification": CLASSIFICATION, "regression": REGRESSION, "ordinal": ORDINAL}
    if kind not in known:
        raise DataError(f"task kind must be one of {sorted(known)}, got {kind!r}")
    return known[kind]


def softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """``(n, k)`` logits → probabilities that sum to 1 along the last axis."""
    z = np.asarray(logits, dtype=np.float64)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return cast(NDArray[np.float64], e / e.sum(axis=-1, keepdims=True))


def classification(target: ArrayLike, scores: ArrayLike) -> Metrics:
    """Accuracy, balanced accuracy and AUROC.

    Args:
        target: ``(n,)`` class indices in ``0..k-1``.
        scores: ``(n, k)`` logits (any additive constant per row); the largest is the prediction.

    Balanced accuracy is the mean recall of the classes that occur in ``target``. AUROC is that of
    the softmax probabilities: of class 1 for two classes, the unweighted mean of one class against
    the rest for more; ``None`` unless every class occurs.

    Raises:
        DataError: shapes that do not fit, no unit, a class index out of range, NaN or infinity.
    """
    from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

    y, s = _classes(target, scores)
    k = s.shape[1]
    predicted = s.argmax(axis=1)
    present = np.unique(y)
    recall = recall_score(y, predicted, labels=present, average="macro", zero_division=0)
    auroc: float | None = None
    if present.size == k:
        p = softmax(s)
        # Of the log-odds for two classes: probabilities saturate at 1 and would tie there.
        columns = [s[:, 1] - s[:, 0]] if k == 2 else list(p.T)
        wanted = [1] if k == 2 else list(range(k))
        each = [roc_auc_score(y == c, v) for c, v in zip(wanted, columns, strict=True)]
        auroc = float(np.mean(each))
    accuracy = float(accuracy_score(y, predicted))
    values: Values = {"accuracy": accuracy, "balanced_accuracy": float(recall), "auroc": auroc}
    return Metrics(values, int(y.size))


def regression(target: ArrayLike, predicted: ArrayLike) -> Metrics:
    """Mean absolute error (unit of the target), R² (1 - SS_res/SS_tot) and Pearson's r.

    R² is not r²: a prediction that is correlated but off scale has a high r and a negative R².
    R² is ``None`` for a constant target, r also for a constant prediction or a single unit.

    Raises:
        DataError: shapes that do not fit, no unit, NaN or infinity.
    """
    from scipy.stats import pearsonr
    from sklearn.metrics import mean_absolute_error, r2_score

    y = np.asarray(target, dtype=np.float64)
    p = np.asarray(predicted, dtype=np.float64)
    if p.ndim == 2 and p.shape[1] == 1:
        p = p[:, 0]
    if y.ndim != 1 or y.shape != p.shape:
        raise DataError(f"target and prediction must both be (n,): {y.shape}, {p.shape}")
    _check_finite(y, p)
    varied, answered = bool(np.ptp(y) > 0), bool(np.ptp(p) > _rounding(p))
    values: Values = {
        "mae": float(mean_absolute_error(y, p)),
        "r2": float(r2_score(y, p)) if varied else None,
        "pearson_r": float(pearsonr(y, p).statistic) if varied and answered else None,
    }
    return Metrics(values, int(y.size))


def ordinal(target: ArrayLike, scores: ArrayLike) -> Metrics:
    """Quadratic weighted kappa, mean absolute error in levels, accuracy, Spearman's r.

    Args:
        target: ``(n,)`` level indices in ``0..k-1``.
        scores: ``(n, k)`` log-probabilities of the levels (any additive constant per row).

    The first three are of the median level (:func:`median_level`), r is of the expected level
    Σ j · p(j). Kappa is 1 − Σ w·observed / Σ w·expected with w = (difference of levels)² (Cohen
    1968, Psychol. Bull. 70:213); it and r are ``None`` where all units have one level, r also for
    a constant prediction.

    Raises:
        DataError: shapes that do not fit, no unit, a level out of range, NaN or infinity.
    """
    from scipy.stats import spearmanr
    from sklearn.metrics import cohen_kappa_score

    y, s = _classes(target, scores)
    predicted, expected = median_level(s), softmax(s) @ np.arange(s.shape[1])
    varied, answered = bool(np.ptp(y) > 0), bool(np.ptp(expected) > _rounding(expected))
    # All levels by name: distances are between levels, not between those that happen to occur.
    every = list(range(s.shape[1]))
    kappa = cohen_kappa_score(y, predicted, labels=every, weights="quadratic") if varied else None
    r = spearmanr(y, expected).statistic if varied and answered else None
    values: Values = {
        "quadratic_kappa": None if kappa is None else float(kappa),
        "mae": float(np.abs(predicted - y).mean()),
        "accuracy": float((predicted == y).mean()),
        "spearman_r": None if r is None else float(r),
    }
    return Metrics(values, int(y.size))


def median_level(scores: ArrayLike) -> NDArray[np.int64]:
    """``(n, k)`` log-probabilities → ``(n,)`` the lowest level whose cumulative probability is ½.

    The median is the level of the smallest expected error; a cumulative probability that misses ½
    by rounding (1e-9) counts as ½.
    """
    reached = np.cumsum(softmax(scores), axis=-1) >= 0.5 - 1e-9
    return cast(NDArray[np.int64], reached.argmax(axis=-1))


def score(kind: str, target: ArrayLike, scores: ArrayLike) -> Metrics:
    """:func:`classification`, :func:`regression` or :func:`ordinal`, as ``kind`` says."""
    names(kind)
    of = {"classification": classification, "regression": regression, "ordinal": ordinal}
    return of[kind](target, scores)


def chance(kind: str, train_target: ArrayLike, test_target: ArrayLike, classes: int = 0) -> Metrics:
    """What guessing from the training labels alone is expected to score on the test units.

    Classification: accuracy of the better of two guessers, the one that always says the most
    frequent training class (averaged over ties) and the one that draws from the training
    frequencies; balanced accuracy 1/k over the classes that occur; AUROC 0.5 where it is defined.
    Regression: every answer is the training mean, so r is ``None``. Ordinal: accuracy as for
    classes, the error of always the training median, kappa 0 (that of every guesser), r ``None``.
    """
    train, test = np.asarray(train_target), np.asarray(test_target)
    _check_finite(train, test)
    if names(kind) == REGRESSION:
        return regression(test, np.full(test.shape, train.astype(np.float64).mean()))
    k = max(classes, 2, int(max(train.max(), test.max())) + 1)
    p_train = np.bincount(train.astype(np.int64), minlength=k) / train.size
    p_test = np.bincount(test.astype(np.int64), minlength=k) / test.size
    majority = p_test[p_train == p_train.max()].mean()
    stratified = p_train @ p_test
    if kind == "ordinal":
        median = int((np.cumsum(p_train) >= 0.5 - 1e-9).argmax())
        guess: Values = {
            "quadratic_kappa": 0.0 if np.ptp(test) > 0 else None,
            "mae": float(np.abs(test - median).mean()),
            "accuracy": float(max(majority, stratified)),
            "spearman_r": None,
        }
        return Metrics(guess, int(test.size))
    present = int((p_test > 0).sum())
    values: Values = {
        "accuracy": float(max(majority, stratified)),
        "balanced_accuracy": 1.0 / present,
        "auroc": 0.5 if present == p_test.size else None,
    }
    return Metrics(values, int(test.size))


def _classes(target: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Class indices and scores as arrays, checked."""
    y, s = np.asarray(target), np.asarray(scores, dtype=np.float64)
    if s.ndim != 2 or y.shape != s.shape[:1] or s.shape[1] < 2:
        raise DataError(f"scores must be (n, ≥ 2 classes) and target (n,): {s.shape}, {y.shape}")
    _check_finite(y, s)
    k = s.shape[1]
    if not np.all((y >= 0) & (y < k) & (y == np.round(y))):
        raise DataError(f"targets must be class indices 0..{k - 1}, got {np.unique(y).tolist()}")
    return y.astype(np.int64), s


def _check_finite(*arrays: NDArray[Any]) -> None:
    for a in arrays:
        if a.size == 0:
            raise DataError("no unit to score: the part of the split is empty")
        if not np.all(np.isfinite(a)):
            raise DataError("a target or score is NaN or infinite: the model that gave it diverged")


def _rounding(p: NDArray[np.float64]) -> float:
    """Below this spread, values differ by rounding only and a correlation would be noise."""
    return float(np.abs(p).max() * 1e-12)

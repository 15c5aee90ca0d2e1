"""The linear models behind the baselines: logistic regression and ridge, strength from validation.

Both see standardised features (unless they come whitened). Standardisation, the penalty's strength
and the weights come from training and validation rows only; test rows are only ever multiplied with
the finished weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fmrizoo.errors import DataError
from fmrizoo.evaluate.metrics import softmax

Array = NDArray[np.float64]
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
DEFAULT_C = 1.0


@dataclass(frozen=True)
class Part:
    """One part of a split: features ``x (n, f)``, targets ``y (n,)`` (class index or value)."""

    x: NDArray[Any]
    y: NDArray[Any]

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.shape != self.x.shape[:1]:
            raise DataError(f"x must be (n, f) and y (n,): {self.x.shape}, {self.y.shape}")
        if not np.all(np.isfinite(self.x)):
            raise DataError("a feature is NaN or infinite")


@dataclass(frozen=True)
class Inner:
    """An inner k-fold over groups of training and validation rows, to choose the strength.

    Attributes:
        folds: k.
        groups: Group of each row, those of the training part first; none is divided.
    """

    folds: int
    groups: Sequence[str]


@dataclass(frozen=True)
class Fitted:
    """A fitted model as plain arrays; ``scores(x) = (x - mean) / scale @ weights + bias``.

    Attributes:
        mean, scale: ``(f,)`` of the training rows; a constant feature has scale 1 (and so is 0).
        weights: ``(f, outputs)``; bias: ``(outputs,)``.
        c: Inverse strength of the penalty.
        tried: Strength → validation loss (empty without validation rows).
    """

    mean: Array
    scale: Array
    weights: Array
    bias: Array
    c: float
    tried: dict[float, float]

    def scores(self, x: NDArray[Any]) -> Array:
        """``(n, classes)`` logits (of levels: log-probabilities up to a constant per row), or
        ``(n, 1)`` values in the target's unit."""
        return (x - self.mean) / self.scale @ self.weights + self.bias


def fit(
    kind: str,
    train: Part,
    validation: Part | None = None,
    *,
    standardize: bool = True,
    levels: int = 0,
    seed: int = 0,
    inner: Inner | None = None,
) -> Fitted:
    """Fit on ``train``; choose the strength on ``validation`` (1.0 without it).

    The chosen strength has the lowest log loss (classification) or squared error on validation
    rows, the strongest penalty on ties. The weights are not refitted with the validation rows:
    every row of a results table has learned from the same training units.

    Ordinal targets: a ridge regression on the level's number, which knows the order and that levels
    are equally far apart, as the metrics do; see :func:`_level_scores`.

    Args:
        kind: ``classification``, ``regression`` or ``ordinal``.
        train, validation: The two parts; ``validation`` may be None.
        standardize: Scale each feature to unit variance over the training rows. False for whitened
            features, whose scale carries meaning: clip means vary most where brain states last.
        levels: Number of levels (ordinal).
        seed: Of the solver and the inner folds.
        inner: Choose the strength by this k-fold within training and validation rows (mean loss
            over rows) instead of on the validation rows alone; the weights are still those of
            the training rows.

    Raises:
        DataError: classification targets other than ``0..k-1`` with all classes present, k ≥ 2.
    """
    if validation is not None and not len(validation.y):
        validation = None
    if kind == "ordinal":
        if levels < 2:
            raise DataError(f"an ordinal target needs at least two levels, got {levels}")
        ridge = fit(
            "regression", train, validation, standardize=standardize, seed=seed, inner=inner
        )
        return _level_scores(ridge, validation or train, levels)
    mean, scale = train.x.mean(0, dtype=np.float64), train.x.std(0, dtype=np.float64)
    if not standardize:
        scale = np.ones_like(scale)
    # Features that vary by rounding only would be blown up to unit variance.
    scale = np.where(scale > 1e-7 * np.maximum(np.abs(mean), 1e-30), scale, 1.0)
    x = (train.x - mean) / scale
    basis = _row_space(x)
    z = x if basis is None else x @ basis
    solve = _logistic if kind == "classification" else _ridge
    if kind == "classification":
        _check_classes(train.y)

    def at(c: float) -> Fitted:
        w, bias = solve(z, train.y, c, seed)
        return Fitted(mean, scale, w if basis is None else basis @ w, bias, c, {})

    if inner is not None:
        mean_loss = _inner_losses(kind, train, validation, inner, standardize, seed)
        best = at(min(mean_loss, key=lambda c: (mean_loss[c], c)))
        return replace(best, tried=mean_loss)
    if validation is None:
        return at(DEFAULT_C)
    candidates = [at(c) for c in STRENGTHS]
    losses = [_loss(kind, f.scores(validation.x), validation.y) for f in candidates]
    best = candidates[int(np.argmin(losses))]
    tried = dict(zip(STRENGTHS, losses, strict=True))
    return Fitted(best.mean, best.scale, best.weights, best.bias, best.c, tried)


def _inner_losses(
    kind: str,
    train: Part,
    validation: Part | None,
    inner: Inner,
    standardize: bool,
    seed: int,
) -> dict[float, float]:
    """Strength → mean loss over all rows, each scored by a model that has not seen its group."""
    from sklearn.model_selection import StratifiedGroupKFold

    both = [train] if validation is None else [train, validation]
    x = np.concatenate([part.x for part in both])
    y = np.concatenate([part.y for part in both])
    groups = np.asarray(inner.groups)
    if groups.shape != y.shape:
        raise DataError(f"{len(groups)} groups for {len(y)} training and validation rows")
    if len(np.unique(groups)) < inner.folds:
        raise DataError(
            f"split.inner={inner.folds} needs at least as many units in training and validation, "
            f"but there are {len(np.unique(groups))}: lower split.inner"
        )
    strata = y.astype(np.int64) if kind == "classification" else np.zeros(len(y), np.int64)
    lacking = DataError(
        f"split.inner={inner.folds} leaves an inner fold without a training unit of some class: "
        "lower split.inner, or set it to 0"
    )
    if np.bincount(strata).min() < inner.folds:
        raise lacking
    folds = StratifiedGroupKFold(inner.folds, shuffle=True, random_state=seed)
    total = dict.fromkeys(STRENGTHS, 0.0)
    for learn, judge in folds.split(x, strata, groups):
        if kind == "classification" and len(np.unique(y[learn])) < len(np.unique(y)):
            raise lacking
        one, other = Part(x[learn], y[learn]), Part(x[judge], y[judge])
        tried = fit(kind, one, other, standardize=standardize, seed=seed).tried
        for c, loss in tried.items():
            total[c] += loss * len(judge) / len(y)
    return total


@dataclass(frozen=True)
class Outcome:
    """Test and validation scores of a fitted model, and the model."""

    test: Array
    validation: Array | None
    model: Fitted


def fit_predict(
    kind: str,
    train: Part,
    validation: Part | None,
    test_x: NDArray[Any],
    *,
    standardize: bool = True,
    seed: int = 0,
) -> Outcome:
    """:func:`fit`, then one look at the test rows (which come without targets)."""
    model = fit(kind, train, validation, standardize=standardize, seed=seed)
    seen = None if validation is None else model.scores(validation.x)
    return Outcome(model.scores(test_x), seen, model)


def _row_space(x: Array) -> Array | None:
    """Orthonormal ``(f, rank)`` basis of the rows, None where it would save nothing.

    An L2-penalised linear model's weights lie in the span of the training rows, so fitting in
    that basis gives the same model, with n instead of f unknowns.
    """
    n, f = x.shape
    if f <= n:
        return None
    values, vectors = np.linalg.eigh(x @ x.T)
    kept = values > values.max() * 1e-12
    return cast(Array, x.T @ (vectors[:, kept] / np.sqrt(values[kept])))


def _logistic(x: Array, y: NDArray[Any], c: float, seed: int) -> tuple[Array, Array]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=5000, random_state=seed).fit(x, y)
    if model.coef_.shape[0] == 1:
        # Two classes: one weight vector; spread it over two logits of opposite sign.
        w, b = model.coef_[0] / 2, model.intercept_[0] / 2
        return np.stack([-w, w], axis=1), np.array([-b, b])
    return model.coef_.T, model.intercept_


def _ridge(x: Array, y: NDArray[Any], c: float, seed: int) -> tuple[Array, Array]:
    from sklearn.linear_model import Ridge

    # The target is scaled so that the same strengths fit years and milliseconds alike.
    target = y.astype(np.float64)
    center, spread = target.mean(), target.std() or 1.0
    model = Ridge(alpha=1 / c, random_state=seed).fit(x, (target - center) / spread)
    bias = np.array([model.intercept_ * spread + center])
    return np.asarray(model.coef_)[:, None] * spread, bias


def _level_scores(ridge: Fitted, seen: Part, levels: int) -> Fitted:
    """Values v → log-probabilities of the levels j = 0 … k−1 under a Gaussian around v.

    log p(j) = −(v − j)² / 2σ² + … = (j·v − j²/2) / σ² + a constant of the row: linear in the
    features again. σ is the root mean square error on ``seen`` (validation rows, or the training
    rows if there are none), at least half a level. The median level is v, rounded and kept within
    the levels, drawn to the middle where v is uncertain.
    """
    error = ridge.scores(seen.x)[:, 0] - seen.y
    precision = 1 / max(float((error**2).mean()), 0.25)
    j = np.arange(levels, dtype=np.float64)
    weights = ridge.weights * (j * precision)
    bias = (j * ridge.bias - j**2 / 2) * precision
    return Fitted(ridge.mean, ridge.scale, weights, bias, ridge.c, ridge.tried)


def _check_classes(y: NDArray[Any]) -> None:
    present = np.unique(y)
    if present.size < 2 or not np.array_equal(present, np.arange(present.size)):
        raise DataError(
            f"training targets must hold every class index from 0, found {present.tolist()}"
        )


def _loss(kind: str, scores: Array, y: NDArray[Any]) -> float:
    if kind == "classification":
        p = softmax(scores)[np.arange(len(y)), y.astype(np.int64)]
        return float(-np.log(np.maximum(p, 1e-300)).mean())
    return float(((scores[:, 0] - y) ** 2).mean())

"""The baselines' linear models: equal to scikit-learn, blind to the test, at chance on noise."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fmrizoo.errors import DataError
from fmrizoo.evaluate.linear import STRENGTHS, Part, fit, fit_predict
from fmrizoo.evaluate.metrics import median_level, softmax


def blobs(n: int, f: int, k: int, seed: int, signal: float = 1.0) -> Part:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(k, f))
    y = np.arange(n) % k
    return Part(signal * centers[y] + rng.normal(size=(n, f)) * 3 + 5, y)


@pytest.mark.parametrize(("k", "f"), [(2, 5), (2, 200), (4, 5), (4, 200)])
def test_logistic_equals_sklearn_on_all_features(k: int, f: int) -> None:
    # With f > n the fit runs in the span of the training rows; it must be the same model.
    train, test = blobs(40, f, k, 0), blobs(30, f, k, 1)
    pipe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-10, max_iter=5000))
    expected = pipe.fit(train.x, train.y).predict_proba(test.x)
    scores = fit("classification", train).scores(test.x)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    np.testing.assert_allclose(p, expected, atol=2e-3)


@pytest.mark.parametrize("f", [5, 200])
def test_ridge_equals_sklearn_on_all_features(f: int) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(40, f)), rng.normal(size=f)
    y = 70 + 10 * (x @ w)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=1.0)).fit(x, y).predict(x[:9] + 1)
    found = fit("regression", Part(x, y)).scores(x[:9] + 1)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-8)


def test_strength_has_the_lowest_validation_loss() -> None:
    noisy = fit("classification", blobs(40, 60, 2, 0, 0.1), blobs(40, 60, 2, 1, 0.1))
    clean = fit("classification", blobs(40, 60, 2, 0, 3.0), blobs(40, 60, 2, 1, 3.0))
    assert list(noisy.tried) == list(STRENGTHS)
    for model in (noisy, clean):
        assert model.tried[model.c] == min(model.tried.values())
    assert noisy.c < clean.c
    assert fit("classification", blobs(40, 60, 2, 0)).c == 1.0


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_no_training_side_number_depends_on_the_test_rows(kind: str) -> None:
    train, validation = blobs(40, 60, 3, 0), blobs(12, 60, 3, 1)
    one = fit_predict(kind, train, validation, blobs(9, 60, 3, 2).x)
    other = fit_predict(kind, train, validation, blobs(33, 60, 3, 3).x * 1e6 - 4)
    for name in ("mean", "scale", "weights", "bias", "c"):
        np.testing.assert_array_equal(getattr(one.model, name), getattr(other.model, name))
    np.testing.assert_array_equal(one.validation, other.validation)


def test_each_test_row_is_scored_by_itself() -> None:
    train, test = blobs(40, 60, 3, 0), blobs(9, 60, 3, 2).x
    together = fit_predict("classification", train, None, test).test
    alone = fit_predict("classification", train, None, test[4:5]).test
    np.testing.assert_allclose(alone[0], together[4], rtol=1e-9)


def test_weights_come_from_training_rows_only() -> None:
    # Every validation row twice has the same mean loss: the same strength, and the same weights.
    train, once = blobs(40, 60, 3, 0), blobs(30, 60, 3, 1)
    twice = Part(np.concatenate([once.x, once.x]), np.concatenate([once.y, once.y]))
    a, b = fit("classification", train, once), fit("classification", train, twice)
    assert a.c == b.c
    np.testing.assert_array_equal(a.weights, b.weights)


def test_permuted_labels_fall_to_chance() -> None:
    hits, real = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        train, validation = blobs(80, 100, 4, seed), blobs(24, 100, 4, 100 + seed)
        test = blobs(100, 100, 4, 200 + seed)
        shuffled = Part(train.x, rng.permutation(train.y))
        out = fit_predict("classification", shuffled, validation, test.x).test
        hits.append((out.argmax(1) == test.y).mean())
        out = fit_predict("classification", train, validation, test.x).test
        real.append((out.argmax(1) == test.y).mean())
    assert abs(np.mean(hits) - 0.25) < 0.06  # 800 rows: s.e. of chance 0.015, doubled for sharing
    assert np.mean(real) > 0.6


def test_constant_features_and_bad_targets() -> None:
    train = blobs(20, 4, 2, 0)
    x = np.concatenate([train.x, np.full((20, 1), 0.1 + 0.2)], axis=1)
    shifted = np.concatenate([train.x, np.full((20, 1), 0.3 + 1e-9)], axis=1)
    model = fit("classification", Part(x, train.y))
    np.testing.assert_allclose(model.scores(x), model.scores(shifted), atol=1e-6)
    with pytest.raises(DataError, match="every class index"):
        fit("classification", Part(train.x, train.y + 1))
    with pytest.raises(DataError, match="NaN"):
        Part(np.full((2, 2), np.nan), np.zeros(2))
    with pytest.raises(DataError, match="must be"):
        Part(np.zeros((2, 2)), np.zeros(3))


@pytest.mark.parametrize("f", [5, 200])
def test_levels_are_a_gaussian_around_the_ridge(f: int) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(40, f)), rng.normal(size=f) / np.sqrt(f)
    y = np.clip(np.round(2 + 1.5 * (x @ w)), 0, 4)
    train, held_out = Part(x[:30], y[:30]), Part(x[30:], y[30:])
    model = fit("ordinal", train, held_out, levels=5)
    ridge = fit("regression", train, held_out)
    assert (model.c, model.tried) == (ridge.c, ridge.tried)
    values = ridge.scores(held_out.x)[:, 0]
    variance = max(((values - held_out.y) ** 2).mean(), 0.25)
    expected = softmax(-((values[:, None] - np.arange(5)) ** 2) / (2 * variance))
    np.testing.assert_allclose(softmax(model.scores(held_out.x)), expected, atol=1e-10)


def test_a_confident_level_is_the_rounded_value() -> None:
    x = np.arange(40.0)[:, None] / 39
    train = Part(x, np.floor(4.999 * x[:, 0]))
    values = fit("regression", train).scores(x)[:, 0]
    found = median_level(fit("ordinal", train, levels=5).scores(x))
    assert np.abs(found - values).max() < 0.62
    with pytest.raises(DataError, match="at least two levels, got 0"):
        fit("ordinal", train)

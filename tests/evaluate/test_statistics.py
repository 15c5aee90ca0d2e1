"""Intervals, tests and corrections: against references, and by how often they are wrong."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from fmrizoo.errors import DataError
from fmrizoo.evaluate import metrics
from fmrizoo.evaluate.predictions import Prediction
from fmrizoo.evaluate.resampled import resampled, widening
from fmrizoo.evaluate.statistics import (
    UNITWISE,
    corrected_t,
    holm,
    interval,
    paired,
    permutation_p,
    sign_flip,
    unified_error,
)

EVERY = [(kind, m) for kind in metrics.PRIMARY for m in metrics.names(kind)]


def drawn(rng: np.random.Generator, kind: str, n: int, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Targets and scores with ties, as quantised models give them."""
    if kind == "regression":
        y = rng.normal(40, 10, n).round(1)
        return y, (y + rng.normal(0, 12, n))[:, None].round(0)
    y = rng.integers(0, k, n).astype(float)
    scores = rng.normal(size=(n, k)).round(1)
    scores[np.arange(n), y.astype(int)] += 1.5
    return y, scores


def table(
    y: Sequence[float], scores: np.ndarray, subjects: Sequence[object], name: str = "u"
) -> list[Prediction]:
    return [
        Prediction(f"{name}{i}", f"{s}", f"run-{name}{i}", float(t), tuple(map(float, row)))
        for i, (t, row, s) in enumerate(zip(y, scores, subjects, strict=True))
    ]


def hits(correct: Sequence[int], subjects: Sequence[object] | None = None) -> list[Prediction]:
    scores = np.array([[0.0, 1.0] if c else [1.0, 0.0] for c in correct])
    return table([1.0] * len(correct), scores, subjects or range(len(correct)))


@pytest.mark.parametrize(("kind", "metric"), EVERY)
@pytest.mark.parametrize("k", [2, 3])
def test_a_draw_has_the_metric_of_the_units_it_repeats(kind: str, metric: str, k: int) -> None:
    rng = np.random.default_rng(k)
    y, scores = drawn(rng, kind, 30, k)
    counts = rng.multinomial(30, np.full(30, 1 / 30), size=6)
    found = resampled(kind, metric, scores)(y[None], counts.astype(float))
    for value, count in zip(found, counts, strict=True):
        wanted = metrics.score(kind, np.repeat(y, count), np.repeat(scores, count, 0))[metric]
        assert value == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize(("kind", "metric"), EVERY)
def test_permuted_targets_have_the_metric_of_those_targets(kind: str, metric: str) -> None:
    rng = np.random.default_rng(0)
    y, scores = drawn(rng, kind, 25)
    moved = rng.permuted(np.tile(y, (5, 1)), axis=1)
    found = resampled(kind, metric, scores)(moved, np.ones((1, 25)))
    wanted = [metrics.score(kind, row, scores)[metric] for row in moved]
    np.testing.assert_allclose(found, np.array(wanted, dtype=float), atol=1e-10)


def test_what_metrics_leave_out_is_left_out() -> None:
    one_class = np.ones((1, 4))
    scores = np.random.default_rng(0).normal(size=(4, 2))
    assert np.isnan(resampled("classification", "auroc", scores)(one_class, np.ones((1, 4))))
    assert np.isnan(resampled("ordinal", "quadratic_kappa", scores)(one_class, np.ones((1, 4))))
    assert np.isnan(resampled("regression", "r2", scores[:, :1])(one_class, np.ones((1, 4))))
    flat = np.full((4, 1), 3.1)
    y = np.arange(4.0)[None]
    assert np.isnan(resampled("regression", "pearson_r", flat)(y, np.ones((1, 4))))
    found = interval([hits([1, 1, 0, 1, 1])], "classification", "auroc")
    assert (found.value, found.low, found.high, found.n_units) == (None, None, None, 5)
    with pytest.raises(DataError, match="regression has no metric 'auroc'"):
        interval([hits([1, 1])], "regression", "auroc")
    with pytest.raises(DataError, match="no prediction"):
        interval([], "regression", "mae")


def test_the_value_is_the_mean_of_tables_by_units() -> None:
    first, second = hits([1] * 30), hits([0] * 10)
    second = [Prediction("v" + p.unit, "v" + p.subject, p.run, 1.0, p.scores) for p in second]
    found = interval([first, second], "classification", "accuracy")
    assert found.value == pytest.approx(0.75)
    assert (found.n_units, found.n_groups, found.group) == (40, 40, "subject")
    # Two seeds of one fold are one set of units, not twice as many.
    twice = interval([first, first], "classification", "accuracy")
    assert (twice.n_units, twice.low, twice.high) == (30, 1.0, 1.0)


def test_whole_people_are_drawn() -> None:
    correct = [1, 1, 1, 1, 0, 0, 0, 1, 1, 0] * 5
    people = [i % 10 for i in range(50)]
    whole = interval([hits(correct, people)], "classification", "accuracy")
    each = interval([hits(correct)], "classification", "accuracy")
    assert (whole.n_groups, each.n_groups) == (10, 50)
    assert None not in (whole.low, whole.high, each.low, each.high)
    width = [float(f.high or 0) - float(f.low or 0) for f in (whole, each)]
    assert width[0] == pytest.approx(np.sqrt(5) * width[1], rel=0.15)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_interval_covers_the_truth_as_often_as_it_says(kind: str) -> None:
    # 300 experiments with 40 people of 3 correlated units: s.e. of the share is 0.013 at 0.95, and
    # the percentile interval is known to be a little short at 40.
    rng, covered = np.random.default_rng(5), 0
    metric = "accuracy" if kind == "classification" else "mae"
    for _ in range(300):
        person = rng.normal(size=(40, 1))
        noise = np.sqrt(0.5) * person + np.sqrt(0.5) * rng.normal(size=(40, 3))
        people = np.repeat(np.arange(40), 3).tolist()
        if kind == "classification":
            tables, truth = hits((noise.ravel() < 0.524).astype(int).tolist(), people), 0.7
        else:
            tables = table(np.zeros(120).tolist(), noise.reshape(-1, 1), people)
            truth = float(np.sqrt(2 / np.pi))
        found = interval([tables], kind, metric, draws=400)
        covered += float(found.low or 0) <= truth <= float(found.high or 0)
    assert 0.90 <= covered / 300 <= 0.98


def test_sign_flips_are_exact_for_few_groups() -> None:
    x = np.array([0.9, 0.3, -0.2, 0.5, 0.1])
    signs = np.array(list(itertools.product([1, -1], repeat=5)))
    assert sign_flip(x) == (np.abs(signs @ x) >= abs(x.sum()) - 1e-12).mean()
    assert sign_flip(np.ones(6)) == 2 / 64
    assert sign_flip(np.zeros(6)) == 1.0
    # Random patterns agree with all of them: s.e. 0.007.
    y = np.random.default_rng(0).normal(0.4, 1, 11)
    assert sign_flip(y, draws=2000) == pytest.approx(sign_flip(y, draws=2048), abs=0.03)


def rejects(ps: Sequence[float], level: float = 0.05) -> bool:
    """Whether a valid test could reject so often: one chance in a thousand."""
    most = stats.binom.ppf(0.999, len(ps), level)
    return bool(np.sum(np.asarray(ps) <= level) > most)


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "auroc"])
def test_equal_models_are_rarely_told_apart(metric: str) -> None:
    rng, found, clear = np.random.default_rng(3), [], 0
    for _ in range(300):
        y = rng.permutation([0.0, 1.0] * 20)
        signal, both = np.stack([-y, y], 1) * 0.5, rng.normal(size=(40, 2))
        rows = [table(y, signal + both + rng.normal(size=(40, 2)), range(40)) for _ in range(2)]
        gap = paired([rows[0]], [rows[1]], "classification", metric, draws=400)
        assert gap is not None
        found.append(gap.p)
        clear += gap.clear
    assert not rejects(found)
    assert clear <= 0.1 * 300  # the percentile interval of 40 people is a little short
    assert np.mean(np.asarray(found) < 0.6) > 0.3  # not merely timid (accuracy has ties)


def test_a_better_model_is_seen_on_every_metric() -> None:
    rng = np.random.default_rng(1)
    for kind, metric in EVERY:
        y, scores = drawn(rng, kind, 60)
        worse = rng.permutation(scores)
        gap = paired([table(y, scores, range(60))], [table(y, worse, range(60))], kind, metric)
        assert gap is not None
        assert gap.p < 0.05, (kind, metric, gap)
        assert (gap.mean < 0) == (metric in metrics.LOWER_IS_BETTER)
        assert gap.low < gap.mean < gap.high


def test_a_row_against_itself_is_no_difference() -> None:
    rng = np.random.default_rng(2)
    for kind, metric in EVERY:
        own = [table(*drawn(rng, kind, 30), range(30))]
        gap = paired(own, own, kind, metric, draws=200)
        assert gap is not None
        assert (gap.mean, gap.low, gap.high, gap.p, gap.clear) == (0, 0, 0, 1, False)
    assert paired(own, [own[0][:1]], kind, metric) is None


@pytest.mark.parametrize("design", ["events", "runs", "people", "values"])
def test_chance_is_rarely_called_better(design: str) -> None:
    rng, found = np.random.default_rng(11), []
    for _ in range(300):
        tables = _null(rng, design)
        kind, metric = ("regression", "r2") if design == "values" else ("classification", "auroc")
        p = permutation_p(tables, kind, metric, draws=99)
        assert p is not None
        found.append(p)
    assert not rejects(found)
    assert stats.kstest(found, "uniform").pvalue > 1e-3 or design == "runs"


def _null(rng: np.random.Generator, design: str) -> list[list[Prediction]]:
    """Predictions that know the run and the person, but nothing of the label; two seeds alike."""
    y = np.tile([0.0, 1.0], 12)
    run, person = np.arange(24) // 4, np.arange(24) // 8
    if design == "runs":
        y, run = (np.arange(24) // 2 % 2).astype(float), np.arange(24) // 2
    elif design == "people":
        y = rng.permutation([0.0] * 6 + [1.0] * 6)[np.arange(24) // 2]
        run, person = np.arange(24), np.arange(24) // 2
    elif design == "values":
        y, run, person = rng.normal(size=24), np.arange(24), np.arange(24)
    shared = rng.normal(size=(24, 1)) + rng.normal(size=24)[run][:, None]
    tables = []
    for _ in range(2):
        score = shared + 0.3 * rng.normal(size=(24, 1))
        scores = score if design == "values" else np.hstack([-score, score])
        tables.append(
            [
                Prediction(f"u{i}", f"{person[i]}", f"r{run[i]}", float(y[i]), tuple(scores[i]))
                for i in range(24)
            ]
        )
    return tables


def of_people(y: np.ndarray, scores: np.ndarray, people: Sequence[int]) -> list[Prediction]:
    """One unit a person."""
    return [
        Prediction(f"p{i}", f"p{i}", f"p{i}", float(t), tuple(own))
        for i, t, own in zip(people, y, scores.tolist(), strict=True)
    ]


def cross_validated(
    rng: np.random.Generator, y: np.ndarray, folds: int, kind: str
) -> list[list[Prediction]]:
    """Ridge regression on features that know nothing of ``y``, trained and tested fold by fold."""
    x = rng.normal(size=(len(y), 100))
    kernel, order, tables = x @ x.T / 100, rng.permutation(len(y)), []
    for fold in range(folds):
        test = order[fold::folds]
        train = np.setdiff1d(order, test)
        mean = y[train].mean()
        inner = kernel[np.ix_(train, train)] + np.eye(len(train))
        score = kernel[np.ix_(test, train)] @ np.linalg.solve(inner, y[train] - mean) + mean
        scores = score[:, None]
        if kind == "classification":
            scores = np.stack([0.5 - score, score - 0.5], 1)
        tables.append(of_people(y[test], scores, test.tolist()))
    return tables


@pytest.mark.parametrize(
    ("kind", "metric"),
    [("classification", "accuracy"), ("classification", "auroc"), ("regression", "pearson_r")],
)
def test_pooled_folds_that_know_nothing_are_rarely_called_better(kind: str, metric: str) -> None:
    # Without widening about one in nine is: each fold's labels train the models of the others.
    rng, chance, gaps = np.random.default_rng(5), [], []
    for _ in range(250):
        y = rng.permutation([0.0, 1.0] * 30) if kind == "classification" else rng.normal(size=60)
        one, two = (cross_validated(rng, y, 4, kind) for _ in range(2))
        p = permutation_p(one, kind, metric, draws=199)
        gap = paired(one, two, kind, UNITWISE[kind], draws=400)
        assert p is not None and gap is not None
        chance.append(p)
        gaps.append(gap.p)
    assert not rejects(chance) and not rejects(gaps)


def test_only_several_folds_widen() -> None:
    rng = np.random.default_rng(0)
    y, scores = drawn(rng, "classification", 40)
    whole, again = of_people(y, scores, range(40)), of_people(y, scores, range(40))
    half = [whole[:20], whole[20:]]
    assert widening([whole, again]) == 1 and widening([whole[:30], whole[5:]]) == 1
    assert widening(half) == pytest.approx(np.sqrt(2)) == widening([*half, [*half[0]]])
    other = [of_people(y, rng.permutation(scores), range(40))]
    narrow = paired([whole], other, "classification", "accuracy")
    wide = paired(half, [other[0][:20], other[0][20:]], "classification", "accuracy")
    assert narrow is not None and wide is not None and narrow.mean == wide.mean
    assert wide.high - wide.low == pytest.approx(np.sqrt(2) * (narrow.high - narrow.low))


def test_a_real_effect_has_the_smallest_p_there_is() -> None:
    rng = np.random.default_rng(0)
    for kind, metric in EVERY:
        own = [table(*drawn(rng, kind, 80), range(80))]
        p = permutation_p(own, kind, metric, draws=199)
        assert p is not None and p < 0.05, (kind, metric)
    sure = np.eye(2)[[0, 1] * 20] * 9
    assert permutation_p([table([0.0, 1.0] * 20, sure, range(40))], "classification", "auroc") == (
        1 / 1001
    )


def test_labels_move_only_where_they_are_exchangeable() -> None:
    # Right about every run's own share of labels and about nothing else: no better than chance.
    rows = [
        Prediction(f"{r}{i}", "1", f"r{r}", float(i < c), (0.0, 1.0) if c > 2 else (1.0, 0.0))
        for r in range(8)
        for c in [1 if r % 2 else 3]
        for i in range(4)
    ]
    assert permutation_p([rows], "classification", "accuracy") == 1.0
    free = [Prediction(p.unit, p.unit, p.run, p.target, p.scores) for p in rows]
    assert (permutation_p([free], "classification", "accuracy") or 1) < 0.05
    # Folds too: labels of one fold never move to another.
    low, high = ([p for p in free if (p.scores[1] > 0.5) == up] for up in (False, True))
    assert permutation_p([low, high], "classification", "accuracy") == 1.0
    assert permutation_p([hits([1, 0, 1])], "classification", "accuracy") is None
    assert permutation_p([], "classification", "accuracy") is None


def test_one_label_a_unit_over_seeds() -> None:
    # Ten copies of one seed know no more than one.
    y = np.tile([0.0, 1.0], 10)
    scores = np.random.default_rng(4).normal(size=(20, 2)) + 0.4 * np.eye(2)[y.astype(int)]
    one = [table(y, scores, range(20))]
    assert permutation_p(one * 10, "classification", "auroc") == permutation_p(
        one, "classification", "auroc"
    )


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(DataError, match="0 … 1"):
        holm([1.2])


def test_corrected_t_is_its_formula() -> None:
    x = [0.02, 0.05, -0.01, 0.03, 0.04, 0.00, 0.06, 0.01, 0.02, 0.03]
    found = corrected_t(x, n_train=80, n_test=20)
    t = np.mean(x) / np.sqrt((1 / 10 + 20 / 80) * np.var(x, ddof=1))
    assert (found.t, found.df) == (pytest.approx(t), 9)
    assert found.p == pytest.approx(2 * stats.t.sf(t, 9))
    assert found.p > stats.ttest_1samp(x, 0).pvalue  # what it corrects
    assert (corrected_t([0.0, 0.0], 8, 2).p, corrected_t([0.1, 0.1], 8, 2).p) == (1.0, 0.0)
    for bad in ([0.1], [0.1, np.nan]):
        with pytest.raises(DataError, match="two or more finite"):
            corrected_t(bad, 8, 2)
    with pytest.raises(DataError, match="above 0"):
        corrected_t(x, 8, 0)


def test_unified_error() -> None:
    y = [0, 0, 1, 1]
    assert unified_error("classification", y, [[1, 0], [1, 0], [0, 1], [0, 1]]) == 0.0
    assert unified_error("classification", y, np.zeros((4, 2))) == 1.0
    assert unified_error("classification", [1, 1], np.zeros((2, 2))) is None
    assert unified_error("regression", [10.0, 20.0], [13.0, 16.0]) == pytest.approx(
        np.sqrt((9 + 16) / 2) / 10
    )
    assert unified_error("regression", [5.0, 5.0], [4.0, 6.0]) is None
    sure = 20 * np.eye(5)[[1, 3, 3]]  # levels 1, 3, 3 answered
    assert unified_error("ordinal", [1, 3, 1], sure) == pytest.approx(np.sqrt(4 / 3) / 4)

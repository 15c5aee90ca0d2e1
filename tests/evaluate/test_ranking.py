"""Sums of z-scores and ranks, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmrizoo.errors import DataError
from fmrizoo.evaluate.ranking import standings, z_scores

SCORES = {
    "a": {"sex": 0.9, "age": 3.0, "iq": 0.30},
    "b": {"sex": 0.8, "age": 4.0, "iq": 0.10},
    "c": {"sex": 0.7, "age": 8.0, "iq": 0.20},
}


def test_z_scores_by_hand_with_a_turned_sign() -> None:
    z = z_scores(SCORES, lower_is_better=["age"])
    step = math.sqrt(3 / 2)  # of three equidistant values
    assert z["a"]["sex"] == pytest.approx(step)
    assert z["b"]["sex"] == pytest.approx(0, abs=1e-12)
    # Errors 3, 4, 8: mean 5, deviations −2, −1, 3, s.d. √(14/3); less is better.
    assert z["a"]["age"] == pytest.approx(2 / math.sqrt(14 / 3))
    assert z["c"]["age"] == pytest.approx(-3 / math.sqrt(14 / 3))


def test_ranks_of_subsets() -> None:
    z = z_scores(SCORES, lower_is_better=["age"])
    places = standings(z, {"all": ["sex", "age", "iq"], "cognition": ["iq"]})
    assert [places["all"][m].rank for m in "abc"] == [1, 2, 3]
    assert [places["cognition"][m].rank for m in "abc"] == [1, 3, 2]
    assert places["all"]["b"].total == pytest.approx(0 + 1 / math.sqrt(14 / 3) - math.sqrt(3 / 2))


def test_a_model_that_lacks_a_task_is_not_ranked_where_it_counts() -> None:
    scores = {**SCORES, "d": {"sex": 0.95, "age": None, "iq": 0.5}}
    z = z_scores(scores, lower_is_better=["age"])
    places = standings(z, {"all": ["sex", "age", "iq"], "quick": ["sex", "iq"]})
    assert places["all"]["d"].rank is None and places["all"]["d"].missing == ("age",)
    assert places["all"]["a"].rank == 1
    assert places["quick"]["d"].rank == 1 and places["quick"]["a"].rank == 2


def test_ties_share_the_better_rank_and_flat_tasks_decide_nothing() -> None:
    scores = {m: {"x": 0.1 + 0.2, "y": v} for m, v in zip("abc", (1.0, 1.0, 0.0), strict=True)}
    scores["b"]["x"] = 0.3
    places = standings(z_scores(scores), {"all": ["x", "y"]})["all"]
    assert [places[m].rank for m in "abc"] == [1, 1, 3]


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8),
    st.floats(0.1, 100),
    st.floats(-50, 50),
)
def test_z_scores_do_not_depend_on_unit_and_zero_of_a_metric(
    values: list[float], unit: float, zero: float
) -> None:
    if np.std(values) < 1e-3:
        return
    first = z_scores({str(i): {"t": v} for i, v in enumerate(values)})
    other = z_scores({str(i): {"t": unit * v + zero} for i, v in enumerate(values)})
    for name, own in first.items():
        assert other[name]["t"] == pytest.approx(own["t"], abs=1e-6)
    assert sum(own["t"] for own in first.values()) == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(DataError, match="nan"):
        z_scores({"a": {"t": math.nan}})
    z = z_scores(SCORES)
    with pytest.raises(DataError, match="subset 'x' of the tasks is empty"):
        standings(z, {"x": []})
    with pytest.raises(DataError, match="'height', which no model has"):
        standings(z, {"x": ["height"]})

"""Baselines without a brain, in tangent space, and with an inner k-fold for their penalty."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from fmrizoo.config import DataConfig, SplitConfig, TaskConfig
from fmrizoo.data.splits import make_split
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError
from fmrizoo.evaluate import linear
from fmrizoo.evaluate.baselines import run_baselines
from fmrizoo.evaluate.confounds import Confounds
from fmrizoo.evaluate.features import Tangent
from fmrizoo.evaluate.linear import Inner, Part, fit

DATA = DataConfig(clip_frames=9)
GROUP = TaskConfig(target="group", source="participants", level="subject")


@pytest.fixture
def known(traits: Store, tmp_path: Path) -> Store:
    """``traits`` with sex (which gives the group away), site and motion; some cells are missing."""
    shutil.copytree(traits.path, tmp_path / "known")
    store = Store(tmp_path / "known")
    lines = (store.path / "participants.tsv").read_text().splitlines()
    rows = [lines[0] + "\tSex\tsite"]
    for i, line in enumerate(lines[1:]):
        rows.append(f"{line}\t{'n/a' if i == 7 else 'FM'[i % 2]}\t{i % 3}")
    (store.path / "participants.tsv").write_text("\n".join(rows) + "\n")
    store.runs = tuple(replace(r, qc={"fd_mean": 0.1 * i}) for i, r in enumerate(store.runs))
    store._by_name = {r.name: r for r in store.runs}
    return store


def test_what_is_known_is_used_and_never_the_target(known: Store) -> None:
    names = [r.name for r in known.runs]
    found = Confounds.fit(known, names[:12], "group")
    assert isinstance(found, Confounds)
    assert found.names == "age, Sex, site, motion"
    x = found(names[:12])
    assert x.shape == (12, 1 + 2 + 3 + 1)  # sites called 0, 1 and 2 are classes
    np.testing.assert_allclose(x[:, [0, -1]].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x[:, [0, -1]].std(0), 1)
    assert x[7, 1:3].tolist() == [0, 0]  # missing
    # Scales are those of the training runs.
    motion = found(names[12:])[:, -1]
    values = 0.1 * np.arange(12)
    np.testing.assert_allclose(motion, (0.1 * np.arange(12, 20) - values.mean()) / values.std())
    for target, left in (("age", "Sex, site, motion"), ("Gender", "age, site, motion")):
        less = Confounds.fit(known, names, target)
        assert isinstance(less, Confounds)
        assert less.names == left


def test_confounds_are_a_row_with_its_columns(known: Store) -> None:
    split = make_split(known, known.runs, SplitConfig(folds=2, validation=0.2))
    rows = {b.result.name: b.result for b in run_baselines(known, split, DATA, GROUP)}
    row = rows["Confounds only + logistic"]
    assert row.note == "age, Sex, site, motion; nothing of the brain"
    assert row.n_test == 10
    assert (row.metrics["accuracy"] or 0) >= 0.8  # sex is the group here
    assert rows["Tangent connectivity + logistic"].metrics["accuracy"] == 1.0


def test_nothing_known_is_said(traits: Store) -> None:
    split = make_split(traits, traits.runs, SplitConfig(folds=2, validation=0.2))
    task = TaskConfig(target="age", source="participants", level="subject", kind="regression")
    row = run_baselines(traits, split, DATA, task)[-1].result
    assert row.name == "Confounds only + ridge" and row.n_test == 0
    assert "none of age, sex and site that varies (beside age)" in (row.note or "")


def test_text_in_a_numeric_column(known: Store) -> None:
    names = [r.name for r in known.runs]
    found = Confounds.fit(known, names[:10], "group")
    assert isinstance(found, Confounds) and found.people is not None
    cast("dict[str, Any]", found.people.rows["15"])["age"] = "old"
    with pytest.raises(DataError, match="age='old' of a unit is not a number"):
        found(names)


def test_tangent_is_nilearns_and_of_the_training_series_only() -> None:
    from nilearn.connectome import ConnectivityMeasure
    from sklearn.covariance import LedoitWolf

    rng = np.random.default_rng(0)
    train, test = ([rng.normal(size=(5, 40)).cumsum(1) for _ in range(n)] for n in (8, 3))
    ours = Tangent().fit(train)
    x, _ = ours(train), ours(test)
    assert x.shape == (8, 15)
    np.testing.assert_array_equal(ours(train), x)
    scaled = [((s - s.mean(1, keepdims=True)) / s.std(1, keepdims=True)).T for s in train]
    measure = ConnectivityMeasure(
        LedoitWolf(store_precision=False), kind="tangent", vectorize=True, standardize=False
    )
    np.testing.assert_allclose(x, measure.fit_transform(scaled), atol=1e-10)
    # Vectors from the geometric mean: they average to nothing over the training series.
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    # A parcel without signal is no reason to fail.
    flat = [s * np.array([[0], [1], [1], [1], [1]]) for s in test]
    assert np.isfinite(ours(flat)).all()


def test_an_inner_fold_divides_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(12), 4)
    y = (person % 2).astype(int)
    x = np.hstack([rng.normal(size=(48, 3)), person[:, None] + 0.01 * rng.normal(size=(48, 1))])
    seen: list[tuple[set[float], set[float]]] = []
    plain = linear.fit

    def noted(kind: str, one: Part, other: Part | None = None, **kwargs: Any) -> Any:
        if other is not None:
            seen.append(tuple(set(p.x[:, 3].round().tolist()) for p in (one, other)))
        return plain(kind, one, other, **kwargs)

    train, validation = Part(x[:40], y[:40]), Part(x[40:], y[40:])
    with monkeypatch.context() as patch:
        patch.setattr(linear, "fit", noted)
        inner = Inner(3, [f"p{p}" for p in person])
        found = plain("classification", train, validation, inner=inner)
    assert len(seen) == 3
    assert all(one.isdisjoint(other) for one, other in seen)
    assert set().union(*(other for _, other in seen)) == set(range(12))
    # The weights are those of the training rows at the chosen strength.
    assert found.c == min(found.tried, key=lambda c: found.tried[c])
    monkeypatch.setattr(linear, "DEFAULT_C", found.c)
    np.testing.assert_allclose(found.weights, fit("classification", train).weights)


def test_inner_folds_need_units(traits: Store) -> None:
    split = make_split(traits, traits.runs, SplitConfig(folds=2, validation=0.2))
    with pytest.raises(DataError, match=r"split\.inner=11 needs .* have 10 subject\(s\)"):
        run_baselines(traits, split, DATA, GROUP, inner=11)
    with_inner = run_baselines(traits, split, DATA, GROUP, inner=3)
    assert {b.result.name for b in with_inner if b.result.n_test} >= {"Connectivity + logistic"}
    with pytest.raises(DataError, match="without a training unit of some class"):
        fit(
            "classification",
            Part(np.eye(6), np.array([0, 0, 0, 0, 0, 1])),
            inner=Inner(2, list("aabbcc")),
        )

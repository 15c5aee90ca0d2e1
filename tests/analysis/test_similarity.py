"""CKA and RSA against their formulas and invariances, and between stages of trained models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import ortho_group, spearmanr

from fmrizoo.analysis.compare import compare_runs, write_similarity
from fmrizoo.analysis.similarity import CKA, cka, rsa
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.pipeline import finetune, pretrain
from fmrizoo.zoo import load_recipe


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The unbiased estimator as Song et al. 2012, eq. 5, write it."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    total = np.trace(k @ m)
    total += (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    total -= 2 / (n - 2) * (one @ k @ m @ one)
    return float(total / (n * (n - 3)))


def direct(x: np.ndarray, y: np.ndarray) -> float:
    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_cka_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(20, d)) + rng.normal(size=d) for d in (3, 7, 30)]
    found = cka(sets, sets[:2])
    expected = [[direct(x, y) for y in sets[:2]] for x in sets]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_cka_does_not_see_rotation_scale_or_shift() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 6))
    y = 3.7 * x @ ortho_group.rvs(6, random_state=2) + 5
    assert cka([x], [y])[0, 0] == pytest.approx(1, abs=1e-9)
    stretched = x * np.array([30.0, 1, 1, 1, 1, 1])
    assert cka([x], [stretched])[0, 0] < 0.9
    assert rsa([x], [2.5 * x + 1])[0, 0] == pytest.approx(1, abs=1e-9)


def test_cka_of_independent_features_is_zero_however_wide_they_are() -> None:
    rng = np.random.default_rng(3)
    pairs = [(rng.normal(size=(50, 200)), rng.normal(size=(50, 200))) for _ in range(40)]
    found = np.array([cka([x], [y])[0, 0] for x, y in pairs])
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(len(found))
    assert np.abs(found).max() < 0.2
    x, y = (v - v.mean(0) for v in pairs[0])
    biased = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert biased > 0.7, "the plain estimator would call them alike"


def test_minibatches_agree_with_all_clips_and_none_is_lost() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(1001, 5))
    y = np.concatenate([x[:, :2], rng.normal(size=(1001, 3))], 1)
    whole = cka([x], [y])[0, 0]
    assert cka([x], [y], 1001)[0, 0] == whole
    assert cka([x], [y], 100)[0, 0] == pytest.approx(whole, abs=0.02)
    by_hand = CKA(1, 1)
    for start, end in ((0, 6), (6, 13)):  # the rest of one joins the last
        by_hand.update([x[start:end]], [y[start:end]])
    assert cka([x[:13]], [y[:13]], 6)[0, 0] == by_hand.result()[0, 0]


def test_rsa_is_the_rank_correlation_of_distance_matrices() -> None:
    rng = np.random.default_rng(5)
    sets = [rng.normal(size=(12, d)) for d in (4, 9)]
    found = rsa(sets, sets)
    other = spearmanr(*(pdist(x, "correlation") for x in sets)).statistic
    np.testing.assert_allclose(found, [[1, other], [other, 1]], atol=1e-9)


def test_what_cannot_be_compared_is_refused() -> None:
    x = np.random.default_rng(6).normal(size=(10, 3))
    for wrong in ([x[:3]], [np.full((10, 3), np.nan)], [x[:, 0]]):
        with pytest.raises(DataError, match="at least 4 clips"):
            cka(wrong, wrong)
    for compare in (cka, rsa):
        with pytest.raises(DataError, match="the same clips"):
            compare([x], [x[:9]])
    with pytest.raises(DataError, match="at least 4 clips, got 3"):
        cka([x], [x], 3)
    with pytest.raises(DataError, match="not all equal"):
        rsa([np.ones((10, 3))], [x])
    assert np.isnan(cka([np.ones((10, 3))], [x])[0, 0]), "what does not vary has no similarity"


@pytest.fixture(scope="module")
def runs(sample_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretraining and a fine-tuning of all its layers."""
    out = tmp_path_factory.mktemp("runs")
    given = [
        f"data.store={sample_store}", "backbone.embed_dim=8", "backbone.num_heads=[1,2]",
        "train.batch_size=4", "train.validate_every=0", "train.steps=4",
    ]  # fmt: skip
    pretrain(load_recipe("pretrain/haxby_slice", given), out / "pretrained")
    more = [f"init_from={out / 'pretrained'}", "head.train_encoder=all", "train.lr=1e-2"]
    finetune(load_recipe("finetune/haxby_slice", [*given, *more, "train.steps=20"]), out / "tuned")
    return out


def test_a_model_is_itself_and_a_tuned_one_is_not(runs: Path, tmp_path: Path) -> None:
    before = runs / "pretrained"
    alone = compare_runs(before, clips=20)
    assert alone.pretraining_loss is None and alone.clips == 20
    matrix = np.array(alone.cka, float)
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-9)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-9)
    assert matrix[0, 1] < 0.999
    copied = compare_runs(before, before / "model", clips=20)
    assert copied.cka == alone.cka and copied.rsa == alone.rsa
    tuned = compare_runs(runs / "tuned", before, clips=20)
    first, last = tuned.per_stage
    assert first is not None and last is not None and last < 0.999 and first <= 1
    assert tuned.pretraining_loss is not None
    kept, changed = tuned.pretraining_loss
    assert kept > 0 and changed > 0 and kept != changed
    write_similarity(tmp_path, tuned)
    body = json.loads((tmp_path / "similarity.json").read_text())
    assert body["schema"] == "fmrizoo.similarity/1" and len(body["cka"]) == 2
    assert body["pretraining_loss"] == [kept, changed]


def test_clips_and_words_that_do_not_exist_are_refused(runs: Path, sample_store: Path) -> None:
    run = runs / "pretrained"
    with pytest.raises(RecipeError, match="pool='men' is not known"):
        compare_runs(run, pool="men")
    with pytest.raises(RecipeError, match="part='tset' is not known"):
        compare_runs(run, part="tset")
    with pytest.raises(DataError, match="at least 4 clips, got 3"):
        compare_runs(run, clips=3)
    with pytest.raises(DataError, match=r"no split\.json"):
        compare_runs(run / "model")
    assert compare_runs(run / "model", store=sample_store, clips=8).clips == 8

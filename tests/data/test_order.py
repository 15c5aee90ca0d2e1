"""The counter-based permutation: a permutation, different each epoch, and without structure."""

from __future__ import annotations

import numpy as np
import pytest

from fmrizoo.data.order import derived, permuted, sample_seed, uniform


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1024, 1025])
def test_every_element_once(n: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (7, 0), (-1, 3)]:
        assert sorted(permuted(i, n, seed, epoch) for i in range(n)) == list(range(n))


def test_large_tables_need_no_list() -> None:
    n = 24_500_000
    got = {permuted(i, n, 3, 2) for i in range(n - 2000, n)}
    assert len(got) == 2000 and max(got) < n


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permuted(i, 50, s, e) for i in range(50)) for s in range(3) for e in range(4)}
    assert len(orders) == 12


def test_places_are_uniform() -> None:
    n, epochs = 12, 3000
    counts = np.zeros((n, n))
    for e in range(epochs):
        for i in range(n):
            counts[i, permuted(i, n, 5, e)] += 1
    expected = epochs / n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # 121 degrees of freedom: mean 121, s.d. 15.6; six s.d. above is a broken shuffle.
    assert chi2 < 121 + 6 * 15.6


def test_position_outside_the_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="position 5"):
        permuted(5, 5, 0, 0)


def test_sample_seeds_are_distinct_int64() -> None:
    seeds = {sample_seed(s, p) for s in range(4) for p in range(5000)}
    assert len(seeds) == 20000
    assert min(seeds) >= 0 and max(seeds) < 2**63


def test_derived_seeds_differ() -> None:
    seeds = {derived(s, k) for s in range(50) for k in range(200)}
    assert len(seeds) == 10000
    draws = np.bincount([uniform(sample_seed(1, p), 7) for p in range(7000)], minlength=7)
    assert ((draws - 1000) ** 2 / 1000).sum() < 6 + 6 * np.sqrt(12)

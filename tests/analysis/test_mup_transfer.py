"""Optimum, drift and regret from planted curves of loss against the learning rate."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fmrizoo.analysis.mup_transfer import (
    FILE,
    TABLE,
    Transfer,
    Trial,
    missing_rates,
    read_transfers,
    write_transfers,
)
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.report.transfer_figure import save_transfer_figure

RATES = [2.0**k for k in range(-10, -3)]


def planted(
    drift: float, *, start: float = -7.2, widths: tuple[int, ...] = (16, 32, 64), seeds: int = 2
) -> Transfer:
    """Parabolas of log loss whose lowest point moves by ``drift`` octaves per doubling."""
    trials = [
        Trial(width, rate, seed, math.exp(0.1 * (math.log2(rate) - centre) ** 2 + 0.01 * seed))
        for width in widths
        for centre in [start + drift * math.log2(width / widths[0])]
        for rate in RATES
        for seed in range(seeds)
    ]
    return Transfer("mup", "validation", tuple(trials))


@pytest.mark.parametrize("drift", [-0.9, 0.0, 0.12, 0.4])
def test_a_planted_drift_is_found(drift: float) -> None:
    found = planted(drift)
    assert found.drift() == pytest.approx(drift, abs=1e-9)
    assert found.drift(seed=1) == pytest.approx(drift, abs=1e-9)
    assert [row.log2 for row in found.rows] == pytest.approx(
        [-7.2 + drift * k for k in range(3)], abs=1e-9
    )


def test_regret_is_what_the_base_widths_best_rate_costs() -> None:
    found = planted(0.6, seeds=1)
    # The base's best trained rate is 2^-7; width 64 has its valley at -6, so 2^-6 is best there.
    assert found.optimum(16).rate == 2**-7
    assert found.rows[2].regret == pytest.approx(math.exp(0.1) - 1)
    assert found.regret == pytest.approx(max(row.regret for row in found.rows))
    assert not found.transfers and planted(0.1).transfers


def test_a_drift_or_a_regret_alone_is_enough_to_fail() -> None:
    assert planted(0.0).transfers
    drifting = planted(0.2)
    assert drifting.regret <= 0.01 and not drifting.transfers
    # Both valleys lie near the middle of two rates, on either side: drift 0.1, but regret 2 %.
    narrow = planted(0.0, start=-7.4, widths=(16,), seeds=1)
    wide = planted(0.0, start=-7.6, widths=(32, 64), seeds=1)
    dear = replace(narrow, trials=narrow.trials + wide.trials)
    assert dear.drift() == pytest.approx(-0.1) and dear.regret == pytest.approx(0.02, rel=0.02)
    assert not dear.transfers


def test_seeds_are_averaged_and_a_rate_that_one_of_them_lacks_is_left_out() -> None:
    found = Transfer(
        "sp",
        "train",
        (
            Trial(8, 0.1, 0, 1.0),
            Trial(8, 0.1, 1, 3.0),
            Trial(8, 0.2, 0, 1.5),
            Trial(8, 0.2, 1, 1.5),
            Trial(8, 0.4, 0, 0.1),
        ),
    )
    assert found.curve(8) == {0.1: 2.0, 0.2: 1.5}
    assert found.optimum(8).rate == 0.2 and found.optimum(8, seed=0).rate == 0.4


def test_a_diverged_seed_makes_the_rate_infinite_and_is_never_the_best() -> None:
    found = planted(0.0, seeds=1)
    trials = [replace(t, loss=math.inf) if t.rate > 2**-7 else t for t in found.trials]
    cut = replace(found, trials=tuple(trials))
    best = cut.optimum(16)
    # Only one neighbour is left: no parabola, and not an edge, for higher rates were trained.
    assert best.rate == 2**-7 and best.log2 == -7 and not best.edge
    gone = replace(found, trials=tuple(replace(t, loss=math.inf) for t in found.trials))
    with pytest.raises(DataError, match="none of 7 learning rates gave a finite loss"):
        gone.optimum(16)


def test_the_best_rate_at_an_edge_is_said_and_asks_for_one_more() -> None:
    found = planted(-1.5, start=-9.0)
    assert found.edges == (32, 64) and not found.transfers and "last one trained" in found.says
    assert missing_rates(found, 16) == []
    assert missing_rates(found, 64) == [2**-11]
    high = planted(0.0, start=-3.0)
    assert missing_rates(high, 16) == [2**-3]


def test_every_width_gets_the_base_widths_best_rate() -> None:
    found = planted(0.0, seeds=1)
    lacking = tuple(t for t in found.trials if t.width == 16 or t.rate != 2**-7)
    cut = replace(found, trials=lacking)
    assert missing_rates(cut, 32) == [2**-7] and missing_rates(cut, 16) == []
    all_gone = tuple(replace(t, loss=math.inf) if t.width == 32 else t for t in found.trials)
    assert missing_rates(replace(found, trials=all_gone), 32) == [2**-11]
    with pytest.raises(RecipeError, match="two rates or more"):
        missing_rates(replace(found, trials=found.trials[:1]), 16)


def test_results_survive_the_file_and_infinities_are_null_in_it(tmp_path: Path) -> None:
    found = planted(0.1)
    broken = replace(found, trials=(*found.trials[:-1], replace(found.trials[-1], loss=math.inf)))
    write_transfers(tmp_path, [found, broken])
    assert read_transfers(tmp_path / FILE) == [found, broken]
    plain = json.loads((tmp_path / FILE).read_text())
    assert plain["transfers"][1]["trials"][-1]["loss"] is None
    assert plain["transfers"][0]["drift"] == pytest.approx(0.1)
    assert len((tmp_path / TABLE).read_text().splitlines()) == 1 + 2 * len(found.trials)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(DataError, match="holds no transfer of rates"):
        read_transfers(tmp_path / FILE)


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_picture_is_drawn_whatever_diverged(tmp_path: Path, kind: str) -> None:
    found = planted(0.1, seeds=3)
    trials = [replace(t, loss=math.inf) if t.rate > 2**-6 else t for t in found.trials]
    path = tmp_path / f"new/transfer.{kind}"
    save_transfer_figure(path, [replace(found, name="sp"), replace(found, trials=tuple(trials))])
    assert path.stat().st_size > 5000
    if kind == "svg":
        assert path.read_text().count("<svg") == 1

"""The checks of muP on a network with rules written by hand: right ones pass, wrong ones fail."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mup_mlp import LR, SP, Rules, loss, make, rates_of
from torch import nn

from fmrizoo.analysis.mup_check import (
    CoordinateCheck,
    Point,
    Recorder,
    coordinate_check,
    leaf_taps,
    read_checks,
    slope,
    write_checks,
)
from fmrizoo.analysis.mup_step import FirstStep, first_step, snapshot
from fmrizoo.errors import DataError, RecipeError

MUP = Rules()
HIDDEN = dict(MUP.rates)


def check(rules: Rules, lr: float = LR, **more: object) -> CoordinateCheck:
    widths = (16, 32, 64, 128)
    settings: dict[str, object] = {"steps": 3, "seeds": 2, **more}
    return coordinate_check(lambda w, s: make(w, s, rules, lr), loss, widths, **settings)  # type: ignore[arg-type]


def stepped(rules: Rules, rates: Mapping[str, float] | None = None) -> FirstStep:
    """One real step at width 64 of a model with a random readout."""
    model, optimizer = make(64, 0, replace(rules, zero=False))
    before = snapshot(model)
    loss(model).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return first_step(before, snapshot(model), rates or rates_of(make(64, 0, MUP)[1]))


def test_mup_passes_and_sp_fails() -> None:
    good, bad = check(MUP), check(SP)
    assert good.passed and good.proves_something, good.says
    assert not bad.passed
    assert {"hidden.0", "back", "leave"} <= {v.module for v in bad.failed}
    assert bad.worst.worst > 1.5


# What is wrong, and whether activations alone (the usual figure) would show it.
WRONG = {
    "width-free init": (replace(MUP, init=False), True),
    "no readout multiplier": (replace(MUP, divide=False), True),
    "hidden rates as they are": (replace(MUP, rates={}), True),
    "one layer forgotten": (replace(MUP, rates={"back.weight": 1.0}), True),
    "readout rate / m": (replace(MUP, rates={**HIDDEN, "leave.weight": 1.0}), True),
    "input rate / m": (replace(MUP, rates={**HIDDEN, "enter.weight": 1.0}), False),
    "token rate / m": (replace(MUP, rates={**HIDDEN, "token": 1.0}), False),
}


@pytest.mark.parametrize("what", WRONG)
def test_every_wrong_rule_fails(what: str) -> None:
    rules, seen = WRONG[what]
    found = check(rules)
    assert not found.passed, found.says
    assert any(abs(v.activation) > 0.2 for v in found.verdicts) == seen
    assert any(abs(v.change) > 0.2 for v in found.verdicts)


def test_small_steps_prove_nothing() -> None:
    found = check(MUP, lr=1e-6)
    assert not found.failed and not found.proves_something and not found.passed
    assert "proves nothing: raise the learning rate" in found.says


def test_a_readout_that_starts_at_random_is_a_transient_to_be_declared() -> None:
    rules = replace(MUP, zero=False)
    found = check(rules)
    assert [v.module for v in found.failed] == ["leave"]
    assert found.verdicts[-2].activation == pytest.approx(-0.5, abs=0.15)
    assert check(rules, transients={"lea*": 1}).slopes("leave", "activation").keys() == {1, 2, 3}


def test_the_slope_is_that_of_the_line() -> None:
    widths = (8, 16, 64)
    assert slope(widths, [3 * w**-0.7 for w in widths]) == pytest.approx(-0.7, abs=1e-12)
    reference = np.polyfit(np.log(widths), np.log([1.0, 5.0, 2.0]), 1)[0]
    assert slope(widths, [1.0, 5.0, 2.0]) == pytest.approx(reference, rel=1e-9)
    for bad in ([1.0, 0.0, 1.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0], [1.0, 1.0]):
        assert slope(widths, bad) == math.inf


def made_up(values: Mapping[int, list[tuple[float, float]]]) -> CoordinateCheck:
    """A check of one module; ``values`` by width: (activation, change) of every step."""
    points = tuple(
        Point("a", width, step, *pair)
        for width, pairs in values.items()
        for step, pair in enumerate(pairs)
    )
    steps = len(next(iter(values.values()))) - 1
    return CoordinateCheck("x", tuple(values), steps, 1, points, {})


def test_zeros_are_excused_at_the_start_only() -> None:
    start = made_up({8: [(0, 0), (1, 0), (1, 1)], 16: [(0, 0), (1, 0), (1, 1)]})
    assert start.passed and start.slopes("a", "change").keys() == {2}
    to_the_end = made_up({8: [(1, 0), (1, 0), (1, 0)], 16: [(1, 0), (1, 0), (1, 0)]})
    assert to_the_end.verdicts[0].change == math.inf and not to_the_end.passed
    at_some_widths = made_up({8: [(0, 0), (1, 1)], 16: [(1, 0), (1, 1)]})
    assert at_some_widths.verdicts[0].activation == math.inf


def test_a_loss_that_is_not_finite_fails() -> None:
    found = made_up({8: [(1, 0), (1, 1)], 16: [(1, 0), (math.nan, math.nan)]})
    assert not found.passed and found.worst.worst == math.inf


def test_seeds_are_averaged_in_log_space() -> None:
    one, two = (check(MUP, seeds=1, steps=1), check(MUP, seeds=2, steps=1))
    other = coordinate_check(lambda w, s: make(w, s + 1, MUP), loss, (16, 32, 64, 128), steps=1)
    for a, b, both in zip(one.points, other.points, two.points, strict=True):
        assert (a.module, a.width, a.step) == (both.module, both.width, both.step)
        mean = math.sqrt(a.activation * b.activation)
        assert both.activation == pytest.approx(mean, rel=1e-9)


def test_the_recorder_reads_what_modules_give_and_how_far_it_moved() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.tensor([1.0, -3.0]))
            self.fc = nn.Linear(2, 2, bias=False)
            self.drop = nn.Dropout(0.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.drop(self.fc(x[:3])).sum() + self.fc(x[3:]).relu_().sum()
            return out

    model, x = Twice(), torch.randn(5, 2)
    recorder = Recorder(model, leaf_taps(model))
    first = model.fc(x).detach()
    for _ in range(2):
        with recorder.listening():
            model(x)
        found = recorder.read()
        assert found.keys() == {"fc", "token"}
        now = model.fc(x).detach()
        assert found["fc"][0] == pytest.approx(now.abs().mean().item(), rel=1e-6)
        assert found["fc"][1] == pytest.approx((now - first).abs().mean().item(), rel=1e-6)
        assert found["token"] == (2.0, 0.0)
        with torch.no_grad():
            model.fc.weight.add_(0.3)
    assert found["fc"][1] > 0
    assert not model.fc._forward_hooks


def test_files_hold_the_whole_check(tmp_path: Path) -> None:
    checks = [check(MUP, name="mup", steps=1, seeds=1), check(SP, name="sp", steps=1, seeds=1)]
    path = write_checks(tmp_path / "new", checks)
    assert read_checks(path) == checks
    path.write_text("{}")
    with pytest.raises(DataError, match="holds no coordinate check"):
        read_checks(path)


def test_a_check_needs_two_widths() -> None:
    with pytest.raises(RecipeError, match="two widths or more"):
        coordinate_check(lambda w, s: make(w, s, MUP), loss, [32, 32])


def test_the_first_step_is_the_rate_for_every_parameter() -> None:
    found = stepped(MUP)
    assert found.passed and len(found.rows) == 11, found.says


@pytest.mark.parametrize(
    "rates", [{}, {"back.weight": 1.0}, *({**HIDDEN, n: 1.0} for n in ("norm.bias", "enter.bias"))]
)
def test_the_first_step_sees_every_wrong_rate(rates: dict[str, float]) -> None:
    found = stepped(replace(MUP, rates=rates))
    wrong = {n for n in {*HIDDEN, *rates} if HIDDEN.get(n, 0.0) != rates.get(n, 0.0)}
    assert {row.name for row in found.off} == wrong and not found.passed


def test_the_first_step_sees_a_scheduler_that_sets_every_group_to_one_rate() -> None:
    model, optimizer = make(64, 0, replace(MUP, zero=False))
    before, rates = snapshot(model), rates_of(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = LR
    loss(model).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    found = first_step(before, snapshot(model), rates)
    assert {row.name for row in found.off} == set(HIDDEN)
    assert "4 times as far" in found.says


def test_the_first_step_names_what_stood_still() -> None:
    model, _ = make(64, 0, MUP)
    same = snapshot(model)
    found = first_step(same, same, dict.fromkeys(same, LR))
    assert not found.passed and found.still == tuple(same) and "still: token" in found.says


def test_the_first_step_needs_a_rate_for_every_parameter() -> None:
    model, _ = make(64, 0, MUP)
    same = snapshot(model)
    with pytest.raises(RecipeError, match=r"differ in 1: token"):
        first_step(same, same, {n: LR for n in same if n != "token"})

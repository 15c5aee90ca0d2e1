"""Where a step's time goes: a partition that adds up, and nothing wrapped unless asked."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from trainer_tiny import TinyStream, inputs, on_ranks, rows, timeless

from fmrizoo import screens
from fmrizoo.errors import CheckpointError
from fmrizoo.trainer import loop as loop_module
from fmrizoo.trainer.device import World
from fmrizoo.trainer.engine import Engine
from fmrizoo.trainer.loop import train
from fmrizoo.trainer.profile import (
    PHASES,
    TABLE,
    TOLERANCE,
    TRACE,
    PhaseClock,
    Profile,
    Waited,
    breakdown,
    read_breakdown,
)


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_the_innermost_phase_has_the_time_and_the_rest_is_other() -> None:
    hand = Hand()
    clock = PhaseClock(hand)
    with clock.step():
        hand.work(1)
        with clock.phase("backward"):
            hand.work(10)
            with clock.phase("collectives"):
                hand.work(100)
            hand.work(20)
        clock.around("forward", hand.work)(1000)
        hand.work(2)
    want = dict.fromkeys(PHASES, 0.0)
    want |= {"other": 3, "backward": 30, "collectives": 100, "forward": 1000, "step": 1133}
    assert clock.steps == [want]


def test_a_phase_that_fails_ends_and_its_step_does_not_count() -> None:
    hand = Hand()
    clock = PhaseClock(hand)
    with pytest.raises(ZeroDivisionError), clock.step(), clock.phase("forward"):
        hand.work(1 / 0)
    assert clock.steps == []
    with clock.phase("forward"):  # outside of a step
        hand.work(7)
    with clock.step():
        hand.work(1)
    assert clock.steps[0]["forward"] == 0 and clock.steps[0]["step"] == 1


def test_every_change_of_phase_waits_for_the_device() -> None:
    """A kernel runs on after its call; the wait puts its time into the phase that started it."""
    hand, queue = Hand(), []

    def settle() -> None:
        while queue:
            hand.work(queue.pop())

    clock = PhaseClock(hand, settle)
    with clock.step():
        with clock.phase("forward"):
            queue.append(5)
        with clock.phase("backward"):
            queue.append(9)
    assert clock.steps[0]["forward"] == 5 and clock.steps[0]["backward"] == 9


def test_waited_counts_only_the_source_and_closes_it() -> None:
    hand, closed = Hand(), []

    def source() -> Iterator[int]:
        try:
            for number in count():
                hand.work(3)
                yield number
        finally:
            closed.append(True)

    waited = Waited(source(), hand)
    assert next(waited) == 0
    hand.work(50)
    assert next(waited) == 1
    assert waited.taken() == 6 and waited.taken() == 0
    waited.close()
    assert closed and next(iter(Waited(iter([4])))) == 4
    Waited(iter([4])).close()  # has nothing to close


def _steps(*seconds: float) -> list[dict[str, float]]:
    return [{**dict.fromkeys(PHASES, 0.0), "forward": s, "data": s, "step": 2 * s} for s in seconds]


def test_the_first_and_traced_steps_count_only_without_others() -> None:
    found = breakdown(_steps(9, 7, 7, 7, 1, 3), first=11, traced=range(1, 4))
    assert found.measured == 2 and found.steps == 6 and found.first == 11
    assert found.phases["forward"] == 2000 and found.step == 4000 and found.slowest == 6000
    assert found.stall == 0.5
    assert breakdown(_steps(9, 7), 1, range(1, 2)).measured == 2
    with pytest.raises(ValueError, match="no step"):
        breakdown([], 1, range(0))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_profiled_run_takes_the_same_steps_and_adds_up(tmp_path: Path, stage: int) -> None:
    before = {name: getattr(dist, name) for name in ("all_reduce", "reduce_scatter_tensor")}
    wait = dist.Work.wait
    train(inputs(tmp_path / "plain", dropout=0.3, zero_stage=stage))
    train(inputs(tmp_path / "timed", dropout=0.3, zero_stage=stage, profile=True))
    assert timeless(tmp_path / "timed") == timeless(tmp_path / "plain")
    assert before == {name: getattr(dist, name) for name in before} and dist.Work.wait == wait
    found = read_breakdown(tmp_path / "timed")
    assert found is not None and tuple(found.phases) == PHASES
    assert sum(found.phases.values()) == pytest.approx(found.step, rel=TOLERANCE)
    assert found.steps == 6 and found.measured == 2 and found.first == 1
    for phase in ("data", "to device", "forward", "backward", "optimizer", "other"):
        assert found.phases[phase] > 0, phase
    with gzip.open(tmp_path / "timed" / TRACE) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # Three steps of two micro-batches; the device's own events are there too.
    assert names.count("fmrizoo: backward") == 6 and names.count("fmrizoo: optimizer") == 3
    assert any(str(name).startswith("aten::") for name in names)
    assert not (tmp_path / "plain" / TABLE).exists() and not (tmp_path / "plain" / TRACE).exists()


def test_phases_agree_with_the_loops_own_step_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's clips per second and stall come from another clock reading than the phases."""
    hand = Hand()

    class SlowStream(TinyStream):
        def batches(self, start: int = 0) -> Iterator[object]:  # type: ignore[override]
            for samples in super().batches(start):
                hand.work(0.25)
                yield samples

    def slow(work: Callable[..., object], seconds: float) -> Callable[..., object]:
        def run(*args: object) -> object:
            hand.work(seconds)
            return work(*args)

        return run

    monkeypatch.setattr(loop_module.time, "monotonic", hand)
    monkeypatch.setattr(Engine, "step", slow(Engine.step, 4.0))
    real = Profile

    def profile(*args: object, **kwargs: object) -> Profile:
        return real(*args, **kwargs, clock=hand)  # type: ignore[arg-type]

    monkeypatch.setattr(loop_module, "Profile", profile)
    monkeypatch.setattr(loop_module, "Waited", lambda source: Waited(source, hand))
    train(replace(inputs(tmp_path, profile=True), loader_for=SlowStream))
    found = read_breakdown(tmp_path)
    assert found is not None
    assert found.phases["data"] == pytest.approx(500) and found.step == pytest.approx(4500)
    assert found.phases["optimizer"] == pytest.approx(4000)
    for row in rows(tmp_path):
        assert row["stall"] == pytest.approx(0.5 / 4.5, abs=1e-4)
        assert row["clips_per_second"] == pytest.approx(8 / 4.5, abs=1e-3)


def test_without_it_nothing_is_made_or_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(loop_module, "Profile", never)
    monkeypatch.setattr(Engine, "timed", never)
    train(inputs(tmp_path, steps=2))
    assert all(0 <= row["stall"] <= 1 for row in rows(tmp_path))
    assert read_breakdown(tmp_path) is None


def test_one_step_is_timed_and_traced(tmp_path: Path) -> None:
    train(inputs(tmp_path, steps=1, profile=True))
    found = read_breakdown(tmp_path)
    assert found is not None and found.measured == found.steps == 1
    assert (tmp_path / TRACE).is_file()


def test_a_run_may_be_profiled_when_it_goes_on(tmp_path: Path) -> None:
    """The key changes no number, so it is no other recipe; the wraps go when a step fails."""

    class Killed(BaseException):
        pass

    def kill(event: object) -> None:
        if event.step == 4:  # type: ignore[attr-defined]
            raise Killed

    with pytest.raises(Killed):
        train(replace(inputs(tmp_path, save_every=2, profile=True), on_step=kill))
    assert dist.all_reduce.__module__.startswith("torch.distributed")
    assert not hasattr(dist.Work.wait, "__wrapped__")
    done = train(inputs(tmp_path, save_every=2))
    assert done.resumed_from == 4
    assert (found := read_breakdown(tmp_path)) is not None and found.steps == 4


def test_damaged_table(tmp_path: Path) -> None:
    (tmp_path / TABLE).write_text("{")
    with pytest.raises(CheckpointError, match=r"profile\.json cannot be read"):
        read_breakdown(tmp_path)
    (tmp_path / TABLE).write_text('{"step": 1}')
    with pytest.raises(CheckpointError, match="remove it"):
        read_breakdown(tmp_path)


def _on_two(world: World, out: str) -> bool:
    train(inputs(Path(out), world=world, profile=True, accumulate=1, zero_stage=2))
    return hasattr(dist.all_reduce, "__wrapped__")


def test_two_ranks_have_collectives(tmp_path: Path) -> None:
    assert (
        on_ranks(tmp_path / "work", _on_two, str(tmp_path / "run"))
        == [hasattr(dist.all_reduce, "__wrapped__")] * 2
    )
    found = read_breakdown(tmp_path / "run")
    assert found is not None and found.phases["collectives"] > 0
    assert sum(found.phases.values()) == pytest.approx(found.step, rel=TOLERANCE)


def test_table_on_the_screen() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(screens.profile(breakdown(_steps(9, 1, 3), 1, range(0))))
    text = console.export_text()
    assert "forward" in text and "2,000.00" in text and "50.0%" in text and "4,000.00" in text
    assert "Mean of 2 of 3 steps" in text


def test_accelerators_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    device = torch.device("cuda", 1)
    made = Profile(tmp_path, device, first=1, left=9, main=False)
    with made.step(), made.clock.phase("forward"):
        pass
    assert asked == [device] * 4

"""Thousands of steps through the real loader and trainer: nothing grows, and resuming is exact.

``FMRIZOO_SOAK_STEPS=30000`` makes the long run longer than it is by default.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from soak_tiny import GROWTH, Held, Plan, Seen, leaks, make_store, slopes, soak
from trainer_tiny import on_ranks, rows, timeless

from fmrizoo.trainer.device import World
from fmrizoo.trainer.export import read_model
from fmrizoo.trainer.inputs import StepEvent

STEPS = int(os.environ.get("FMRIZOO_SOAK_STEPS", "3000"))
SHORT = 800  # of a run with a leak on purpose
STILL = Held(0, 500 << 20, 200 << 20, 10**6, 30, 20, 9, 0, 0, 11, 2)


def look(step: int, **changes: int) -> Held:
    return replace(STILL, step=step, **changes)


# --- the check itself ---------------------------------------------------------------------------


def test_a_process_that_keeps_still_or_settles_has_no_leak() -> None:
    assert leaks([look(20 * k) for k in range(60)], keep=2) == []
    # Caches that fill in the first third, and pages that come and go afterwards.
    rises = [look(20 * k, rss=(500 << 20) + min(k, 20) * 2**20) for k in range(60)]
    assert leaks(rises, keep=2) == []
    breathes = [look(20 * k, rss=(500 << 20) + (k % 3) * 2**22) for k in range(60)]
    assert leaks(breathes, keep=2) == []


@pytest.mark.parametrize("name", sorted(GROWTH))
def test_growth_above_its_bound_is_a_leak_and_below_it_is_none(name: str) -> None:
    for times, found in ((0.9, 0), (1.1, 1)):
        slope = times * GROWTH[name] / 1000
        samples = [look(100 * k, **{name: int(2**21 + slope * 100 * k)}) for k in range(60)]
        assert slopes(samples)[name] == pytest.approx(1000 * slope, rel=0.02)
        said = leaks(samples, keep=2)
        assert len(said) == found and all(name in sentence for sentence in said)


@pytest.mark.parametrize("name", ["descriptors", "threads", "shm", "temporary", "staged"])
def test_one_more_of_what_must_be_constant_is_a_leak(name: str) -> None:
    more = [look(20 * k, **{name: getattr(STILL, name) + (k > 50)}) for k in range(60)]
    (said,) = leaks(more, keep=2)
    assert said.startswith(f"{name} is not constant")


def test_more_checkpoints_than_kept_are_a_leak() -> None:
    (said,) = leaks([look(20 * k, checkpoints=1 + k // 20) for k in range(60)], keep=2)
    assert "3 checkpoints instead of 2" in said


# --- the run ------------------------------------------------------------------------------------


def long_runs(world: World, folder: str) -> dict[str, Any]:
    """All runs in one fresh process, one after the other: what one leaves, the next one shows."""
    root = Path(folder)
    temporary = root / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    # PyTorch's record of the last 2000 collectives (2 MB) fills all the warm-up otherwise.
    os.environ["TORCH_FR_BUFFER_SIZE"] = "50"
    store = make_store(root / "store")
    # The second stop leaves exactly one step: it needs the whole state of the optimizer.
    stops = (STEPS * 2 // 5 + 37, STEPS - 2)
    kept: list[torch.Tensor] = []
    opened: list[int] = []

    def keep(event: StepEvent) -> None:
        kept.append(torch.zeros(1000))  # 4 kB a step

    def leave_open(event: StepEvent) -> None:
        if event.step % 100 == 0:
            opened.append(os.open(os.devnull, os.O_RDONLY))

    runs = {
        "whole": soak(Plan(store, root / "whole", STEPS)),
        "stopped": soak(Plan(store, root / "stopped", STEPS, stops=stops)),
        "list": soak(Plan(store, root / "list", SHORT, every=10, inject=keep)),
    }
    kept.clear()
    runs["descriptor"] = soak(Plan(store, root / "fd", SHORT, every=10, inject=leave_open))
    for descriptor in opened:
        os.close(descriptor)
    runs["again"] = soak(Plan(store, root / "again", SHORT, every=10))
    return {**runs, "stops": stops}


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("soak")
    (answer,) = on_ranks(root / "answers", long_runs, str(root), size=1)
    return root, answer


def long(test: Callable[..., None]) -> Callable[..., None]:
    """Minutes: all tests of the runs, which the first of them makes."""
    return pytest.mark.slow(pytest.mark.timeout(1800 + STEPS)(test))


@long
def test_nothing_grows_in_thousands_of_steps(soaked: tuple[Path, dict[str, Any]]) -> None:
    seen: Seen = soaked[1]["whole"]
    samples = seen.samples
    assert samples[-1].step == STEPS and seen.starts == [None]
    assert leaks(samples, seen.keep) == [], slopes(samples)


@long
def test_a_finished_run_leaves_nothing_behind(soaked: tuple[Path, dict[str, Any]]) -> None:
    root, runs = soaked
    # Descriptors and threads after every call of the trainer, over all runs of the process.
    after = [one for name in ("whole", "stopped", "list") for one in runs[name].after]
    assert len(after) == 5 and len(set(after)) == 1, after
    # Files: PyTorch makes an empty folder for its compiler.
    assert [p for p in (root / "tmp").rglob("*") if p.is_file()] == []
    for name in ("whole", "stopped"):
        # Of a staged copy only its two locks stay, which are empty.
        assert not any(p.stat().st_size for p in (root / name / "stage").rglob("*") if p.is_file())
        found = {p.name for p in (root / name / "run").iterdir()}
        assert not any(".partial" in p or p.endswith(".part") for p in found), found


@long
def test_every_step_has_its_line_of_metrics(soaked: tuple[Path, dict[str, Any]]) -> None:
    lines = rows(soaked[0] / "whole" / "run")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [n for n, line in enumerate(lines, 1) if "validation" in line] == [
        *range(100, STEPS, 100), STEPS,
    ]  # fmt: skip
    assert lines[-1]["clips"] == 4 * STEPS
    # It learns something: the run is not one of steps that do nothing.
    assert lines[-1]["validation"]["loss"] < lines[99]["validation"]["loss"]


@long
def test_a_run_stopped_twice_is_the_uninterrupted_one_to_the_bit(
    soaked: tuple[Path, dict[str, Any]],
) -> None:
    root, runs = soaked
    # The signal comes at the end of a step and is answered at the end of the next one.
    assert runs["stopped"].starts == [None, *(stop + 1 for stop in runs["stops"])]
    assert timeless(root / "stopped" / "run") == timeless(root / "whole" / "run")
    (first, one), (second, two) = (
        read_model(root / name / "run" / "model") for name in ("whole", "stopped")
    )
    assert first.keys() == second.keys() and one.step == two.step
    assert all(torch.equal(first[name], second[name]) for name in first)


@long
def test_leaks_on_purpose_are_found_and_a_run_without_them_has_none(
    soaked: tuple[Path, dict[str, Any]],
) -> None:
    runs = soaked[1]
    # Pages that the runs before gave back may take it all up: malloc tells what rss need not.
    found = {said.split()[0] for said in leaks(runs["list"].samples, keep=2)}
    assert {"heap", "blocks", "tensors"} <= found <= {"heap", "blocks", "tensors", "rss"}
    (said,) = leaks(runs["descriptor"].samples, keep=2)
    assert said.startswith("descriptors is not constant")
    assert leaks(runs["again"].samples, keep=2) == [], slopes(runs["again"].samples)

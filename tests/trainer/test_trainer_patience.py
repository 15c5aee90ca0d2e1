"""Waiting for slow disks: signs of life while something grows, none while nothing does."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from trainer_tiny import ALONE, inputs, timeless

import fmrizoo.trainer.loop as loop
import fmrizoo.trainer.patience as patience
import fmrizoo.trainer.saving as saving
import fmrizoo.trainer.watchdog as watchdog
from fmrizoo.files import sha256_of
from fmrizoo.trainer.checkpoint import RunState
from fmrizoo.trainer.device import World
from fmrizoo.trainer.folder import RunFolder
from fmrizoo.trainer.loop import train
from fmrizoo.trainer.patience import Hashed, answer_of, bytes_in, wait_together
from fmrizoo.trainer.ranks import Ranks
from fmrizoo.trainer.saving import Saver
from fmrizoo.trainer.sharded import Snapshot
from fmrizoo.trainer.watchdog import SAVING, WRITTEN, Pulse, Watchdog, file_of

LIMIT = 1.5 / 60  # minutes; a slow write takes more than twice as long


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a busy machine is not taken for one that hangs."""
    monkeypatch.setattr(patience, "_LONGEST", 0.05)


def watched(tmp_path: Path, ended: threading.Event, world: World = ALONE) -> tuple[Pulse, Watchdog]:
    pulse = Pulse()
    pulse.enter(SAVING)

    def end(code: int) -> None:
        ended.set()

    return pulse, Watchdog(pulse, LIMIT, tmp_path, world, end=end)  # type: ignore[arg-type]


def growing(file: Path, done: Future[None], sizes: int = 40) -> None:
    for size in range(sizes):
        file.write_bytes(b"x" * (size + 1))
        time.sleep(0.1)
    done.set_result(None)


def test_growing_files_are_signs_of_life(tmp_path: Path) -> None:
    ended, done = threading.Event(), Future[None]()
    _, dog = watched(tmp_path, ended)
    with dog:
        thread = threading.Thread(target=growing, args=(tmp_path / "shard", done))
        thread.start()
        ranks = Ranks(ALONE, torch.device("cpu"))
        wait_together(ranks, done, lambda: bytes_in(tmp_path))
        thread.join()
    assert not ended.is_set() and not file_of(tmp_path, 0).exists()


def test_disk_that_stands_still_is_a_hang(tmp_path: Path) -> None:
    ended, done = threading.Event(), Future[None]()
    (tmp_path / "shard").write_bytes(b"x")
    _, dog = watched(tmp_path, ended)
    with dog:
        ranks = Ranks(ALONE, torch.device("cpu"))

        def progress() -> int:
            if ended.is_set() and not done.done():
                done.set_result(None)  # where the process would have ended
            return bytes_in(tmp_path)

        wait_together(ranks, done, progress)
    assert ended.is_set()
    assert "while saving a checkpoint" in file_of(tmp_path, 0).read_text()


@pytest.mark.slow
def test_late_answer_with_growing_files_is_no_hang(tmp_path: Path) -> None:
    """A rank whose features are there waits for one that makes its own for a long time."""
    ended, done = threading.Event(), Future[None]()
    pulse, dog = watched(tmp_path, ended, World(0, 2, 0, "test"))
    ranks = Ranks(World(0, 2, 0, "test"), torch.device("cpu"))

    def collective() -> str:
        growing(tmp_path / "features", done)
        return "all are there"

    with dog:
        assert answer_of(ranks, collective, lambda: bytes_in(tmp_path)) == "all are there"
    assert not ended.is_set() and pulse.phase == WRITTEN


def test_error_of_a_late_answer(tmp_path: Path) -> None:
    def collective() -> None:
        raise RuntimeError("gloo: Connection closed by peer")

    ranks = Ranks(World(0, 2, 0, "test"), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="closed by peer"):
        answer_of(ranks, collective, lambda: 0)


class Others(Ranks):
    """Of two ranks, the one whose files are written; the other's never grow."""

    def __init__(self, over: threading.Event) -> None:
        super().__init__(World(0, 2, 0, "test"), torch.device("cpu"))
        self.over = over

    def reduced(self, values: list[float]) -> list[float]:
        return [values[0] + (not self.over.is_set()), values[1]]


def test_rank_that_waits_for_files_is_not_the_culprit(tmp_path: Path) -> None:
    ended = threading.Event()
    pulse, dog = watched(tmp_path, ended, World(0, 2, 0, "test"))
    with dog:
        wait_together(Others(ended), None, lambda: 0)
    assert pulse.phase == WRITTEN
    assert "waiting for other ranks to write their files; the one that hangs is another" in (
        file_of(tmp_path, 0).read_text()
    )


def test_checksum_tells_every_byte(tmp_path: Path) -> None:
    file, hashed = tmp_path / "file", Hashed()
    file.write_bytes(bytes(range(256)) * 9000)
    assert sha256_of(file, hashed) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert hashed.bytes == file.stat().st_size


def test_bytes_in_a_folder_that_goes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").mkdir()
    assert bytes_in(tmp_path) - (tmp_path / "b").stat().st_size == 3
    assert bytes_in(tmp_path / "absent") == 0


@pytest.mark.parametrize("at_once", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_slow_write_of_a_run_is_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    """The shard takes more than twice ``hang_minutes``; the run ends as any other."""
    write: Callable[[Path, Snapshot], None] = saving.write_shard
    codes: list[int] = []
    dogs: list[Watchdog] = []

    class Dog(Watchdog):
        """Patient but while the shard is written; does not end the tests."""

        def __init__(self, *args: object) -> None:
            super().__init__(*args, end=codes.append)  # type: ignore[arg-type]
            dogs.append(self)

    def slow(path: Path, snapshot: Snapshot) -> None:
        patient, dogs[0]._limit = dogs[0]._limit, 1.5
        growing(path, Future())
        dogs[0]._limit = patient
        write(path, snapshot)

    train(inputs(tmp_path / "fast"))
    monkeypatch.setattr(saving, "write_shard", slow)
    monkeypatch.setattr(watchdog, "_LOOK", 0.2)
    monkeypatch.setattr(loop, "Watchdog", Dog)
    train(inputs(tmp_path / "slow", async_save=not at_once))
    assert dogs and not codes
    assert timeless(tmp_path / "slow") == timeless(tmp_path / "fast")


def test_rank_that_is_gone_ends_the_wait_for_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``flush`` cannot reach it, and ``close`` must not wait for what it will never write."""

    class Gone(Ranks):
        def reduced(self, values: list[float]) -> list[float]:
            raise RuntimeError("gloo: Connection closed by peer")

    monkeypatch.setattr(saving, "_GRACE", 0.2)
    two = World(0, 2, 0, "test")
    folder = RunFolder(tmp_path)
    saver = Saver(None, folder, Gone(two, torch.device("cpu")), 2)  # type: ignore[arg-type]
    own, state = Future[None](), RunState(6, 12, 2, 1.0, "")
    own.set_result(None)
    pending = saving._Pending(state, folder.checkpoints / "absent", own, threading.Event())
    pending.sealed = saver._pool.submit(saver._publish, pending, "the checkpoint")
    saver._pending = pending
    with pytest.raises(RuntimeError, match="closed by peer"):
        saver.flush()
    ends = threading.Thread(target=saver.close, daemon=True)
    ends.start()
    ends.join(60)
    closed = not ends.is_alive()
    pending.given_up.set()  # also where this fails: the interpreter waits for the pool
    assert closed

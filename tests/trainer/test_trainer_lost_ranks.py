"""Ranks that hang, are killed or fail: the others end in one sentence, and the rerun is exact."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from trainer_tiny import ALONE, inputs, timeless

from fmrizoo.errors import HungRankError, LostRankError, TrainingError
from fmrizoo.trainer.device import World
from fmrizoo.trainer.loop import train
from fmrizoo.trainer.ranks import leave_code, lost
from fmrizoo.trainer.watchdog import WAITING, Pulse, Watchdog, alive, file_of, losing_ranks

HERE = Path(__file__).parent
# Three launches of two ranks: half a minute, but several on a machine that others use too.
pytestmark = pytest.mark.timeout(900)
# Generous: starting a process takes long on a busy machine. Nothing here waits for it to pass.
BOUND = 400


@dataclass
class Ended:
    """How a rank ended."""

    code: int
    text: str


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ended(process: subprocess.Popen[str]) -> Ended:
    text, _ = process.communicate(timeout=BOUND)
    return Ended(process.returncode, text)


def together(
    commands: list[list[str]], env: dict[str, str], kill: Path | None = None
) -> list[Ended]:
    """Processes side by side; if told, the last is killed once the metrics have four lines.

    Raises:
        subprocess.TimeoutExpired: one does not end.
    """
    running = []
    for rank, command in enumerate(commands):
        own = {**os.environ, **env, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
        own["WORLD_SIZE"] = f"{len(commands)}"
        running.append(
            subprocess.Popen(
                command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        while kill is not None and running[-1].poll() is None:
            if kill.is_file() and kill.read_text().count("\n") >= 4:
                running[-1].send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        return [ended(p) for p in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()


def tiny_ranks(*outs: Path, fault: str, size: int = 2, left: Path | None = None) -> list[Ended]:
    meet = f"{port()}"
    script = str(HERE / "fault_rank.py")
    commands = [
        [sys.executable, script, f"{rank}", f"{size}", meet, fault, *map(str, outs)]
        for rank in range(size)
    ]
    env = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    return together(commands, env | ({"FMRIZOO_EXIT_FILE": str(left)} if left else {}))


@dataclass
class Launches:
    """What two ranks did under each fault, and afterwards."""

    out: Path
    ends: dict[str, list[Ended]]
    after: list[Ended]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    out = tmp_path_factory.mktemp("lost")
    ends = {
        fault: tiny_ranks(out / fault, fault=fault, left=out / f"{fault}.exit")
        for fault in ("sleep", "die")
    }
    # One launch for the run that nothing happens to and for both reruns.
    after = tiny_ranks(out / "none", out / "sleep", out / "die", fault="none")
    return Launches(out, ends, after)


def test_nothing_happened(launches: Launches) -> None:
    assert [end.code for end in launches.after] == [0, 0], launches.after
    assert len(timeless(launches.out / "none")) == 6


def test_hung_rank_ends_all(launches: Launches) -> None:
    """The sleeping rank and the one that waits for it both end with the code that goes on."""
    ends, out = launches.ends["sleep"], launches.out / "sleep"
    assert [end.code for end in ends] == [75, 75], ends
    assert (launches.out / "sleep.exit").read_text() == "75\n"
    told = file_of(out, 1).read_text()
    assert "rank 1 of 2 gave no sign of life" in told
    assert "while waiting for data; it does not wait for other ranks: this is the one" in told
    assert "fault_rank.py" in told and "MainThread" not in ends[1].text
    assert ends[1].text.count("error: ") == 1 and "Traceback" not in ends[1].text
    # Rank 0 may have noticed by itself, or seen the other go.
    assert ends[0].text.count("error: ") == 1 and "Traceback" not in ends[0].text
    if file_of(out, 0).exists():
        assert "it waits for other ranks (in " in file_of(out, 0).read_text()
    else:
        assert "rank 1 hung and has ended itself" in ends[0].text


def test_killed_rank_ends_all(launches: Launches) -> None:
    first, second = launches.ends["die"]
    assert second.code == -signal.SIGKILL and first.code == 1
    assert (launches.out / "die.exit").read_text() == "1\n"
    assert "error: another rank is gone (" in first.text and "Traceback" not in first.text
    assert "run the same command again" in first.text


@pytest.mark.parametrize("fault", ["sleep", "die"])
def test_rerun_is_exact(launches: Launches, fault: str) -> None:
    facts = json.loads((launches.out / fault / "env.json").read_text())
    assert facts["resumed_from"] == 4
    assert timeless(launches.out / fault) == timeless(launches.out / "none")


@pytest.mark.slow
def test_lock_that_is_never_released(tmp_path: Path) -> None:
    """No Python thread runs any more; a timer without need of the lock ends the process."""
    (end,) = tiny_ranks(tmp_path, fault="lock", size=1)
    assert end.code == 1 and "Timeout" in end.text and "fault_rank.py" in end.text
    assert train(inputs(tmp_path, dropout=0.3, save_every=2)).resumed_from == 4


@pytest.mark.slow
def test_kill_through_the_command_line(tmp_path: Path, sample_store: Path, tiny: list[str]) -> None:
    """``python -m fmrizoo pretrain`` on two ranks, kill -9 from outside, and the same again."""
    values = [*tiny, "train.steps=12", "train.save_every=2", f"data.store={sample_store}"]

    def run(out: Path, kill: Path | None = None) -> list[Ended]:
        command = [sys.executable, "-m", "fmrizoo", "pretrain", "pretrain/haxby_swin4d_simmim"]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port()}"}
        ranks = [[*command, *values, "--out", str(out)]] * 2
        return together(ranks, env, kill)

    assert [end.code for end in run(tmp_path / "whole")] == [0, 0]
    first, second = run(tmp_path / "cut", kill=tmp_path / "cut" / "metrics.jsonl")
    assert second.code == -signal.SIGKILL and first.code == 1, first.text
    assert "another rank is gone" in " ".join(first.text.split())
    assert "Traceback" not in first.text
    ends = run(tmp_path / "cut")
    assert [end.code for end in ends] == [0, 0], ends
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_signs_of_life_keep_a_rank_alive(tmp_path: Path) -> None:
    """Work that gives signs goes on for many times the limit; then it stops giving any."""
    codes: list[int] = []
    over = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        over.set()

    pulse = Pulse()
    with Watchdog(pulse, 0.4 / 60, tmp_path, ALONE, end=end):  # type: ignore[arg-type]
        pulse.enter(WAITING)
        for _ in range(40):
            alive()
            time.sleep(0.05)
        assert not codes
        assert over.wait(60)
    assert codes == [75]
    text = file_of(tmp_path, 0).read_text()
    assert "while waiting for data; there is no other rank" in text
    assert "test_signs_of_life_keep_a_rank_alive" in text  # the stack


def test_time_in_which_nothing_ran_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspended process (SIGSTOP, a closed laptop) finds hours gone when it goes on."""
    import fmrizoo.trainer.watchdog as watchdog

    codes: list[int] = []
    ticks = iter(range(0, 10**9, 3600))
    looks = threading.Semaphore(0)

    def clock() -> float:
        looks.release()
        return float(next(ticks))

    monkeypatch.setattr(watchdog.time, "monotonic", clock)
    monkeypatch.setattr(watchdog, "_LOOK", 0.2)
    with Watchdog(Pulse(), 1.0, tmp_path, ALONE, end=codes.append) as dog:  # type: ignore[arg-type]
        dog._over.wait(0)
        looks.acquire(timeout=60)
        assert looks.acquire(timeout=60)  # it has looked once, an hour later
        looks.acquire(timeout=60)
    assert not codes


def test_no_watchdog_where_none_is_asked_for(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(Pulse(), 0.0, tmp_path, ALONE):
        assert threading.active_count() == before
    alive()  # outside of a training this is nothing


def test_which_errors_say_that_a_rank_is_gone(tmp_path: Path) -> None:
    closed = RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:9"
    )
    assert lost(closed) and lost(dist.DistNetworkError("recvValue failed"))
    assert not lost(RuntimeError("shape mismatch")) and not lost(OSError("Broken pipe"))
    two = World(0, 2, 0, "test")
    gone = pytest.raises(LostRankError, match="another rank is gone")
    with gone as caught, losing_ranks(tmp_path, two):
        raise closed
    assert caught.value.exit_code == 1 and not caught.value.together
    with pytest.raises(RuntimeError, match="shape"), losing_ranks(tmp_path, two):
        raise RuntimeError("shape mismatch")
    with pytest.raises(TrainingError, match="own"), losing_ranks(tmp_path, two):
        raise TrainingError("own")
    with pytest.raises(RuntimeError, match="gloo"), losing_ranks(tmp_path, ALONE):
        raise closed


def test_hang_of_an_earlier_start_is_not_taken_for_this_one(tmp_path: Path) -> None:
    closed = RuntimeError("gloo: Connection closed by peer")
    two, file = World(0, 2, 0, "test"), file_of(tmp_path, 1)
    file.parent.mkdir()
    file.write_text("rank 1 hung, sign of life 12")
    with pytest.raises(LostRankError) as caught, losing_ranks(tmp_path, two):
        raise closed
    assert not isinstance(caught.value, HungRankError)
    with pytest.raises(HungRankError, match="rank 1 hung") as hung, losing_ranks(tmp_path, two):
        file.write_text("rank 1 hung, sign of life 14")
        raise closed
    assert hung.value.exit_code == 75


def test_exit_code_is_left_by_rank_0_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMRIZOO_EXIT_FILE", str(tmp_path / "code"))
    for rank, there in ((1, False), (0, True)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, f"{value}")
        leave_code(75)
        assert (tmp_path / "code").exists() == there

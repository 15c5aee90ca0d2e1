"""Writers that fail, die or meet: the store is the old one or the new one, never half of each."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import prepare
from fmrizoo.data.repair import repair
from fmrizoo.data.store import Store
from fmrizoo.data.verify import verify
from fmrizoo.errors import DataError

NATIVE = PrepareConfig(space="native")
# Every call by which a writer changes the disk (HDF5 writes through the first two).
STEPS = ("pwrite", "ftruncate", "fsync", "replace", "unlink", "mkdir", "rmdir", "chmod", "open")


def state(path: Path) -> str:
    """Digest of all values and of what the index says, but for the identities of the runs."""
    found = hashlib.sha256()
    store = Store(path)
    for run in store.runs:
        reader = store.open(run)
        found.update(repr((run.name, run.tr, run.events, run.statistics)).encode())
        found.update(np.ascontiguousarray(reader.read(0, reader.n_frames)).tobytes())
    return found.hexdigest()


@pytest.fixture
def change(tree: Any, tmp_path: Path) -> tuple[Path, Path, str, str]:
    """(source, store, old state, new state): the source has changed since the store was made."""
    for subject in ("01", "02"):
        tree.add(subject)
    people = tree.root / "participants.tsv"
    people.write_text("participant_id\tage\nsub-01\t3\n")
    prepare(tree.root, tmp_path / "old", NATIVE)
    tree.add("02", run="2")  # sub-02 is written anew, with its first run taken over
    tree.add("03")
    people.write_text("participant_id\tage\nsub-01\t4\n")
    prepare(tree.root, tmp_path / "new", NATIVE)
    return tree.root, tmp_path / "old", state(tmp_path / "old"), state(tmp_path / "new")


def settle(source: Path, out: Path, old: str, new: str) -> str:
    """Which of the two states ``out`` is in; the next prepare must complete and leave no trace."""
    found = {old: "old", new: "new"}[state(out)]
    assert (out / "participants.tsv").read_text().endswith(("\t3\n", "\t4\n"))
    prepare(source, out, NATIVE)
    assert state(out) == new
    assert verify(out).findings == []
    names = {p.name.partition("@")[0].removesuffix(".h5") for p in out.iterdir()}
    assert names == {"index.json", "participants.tsv", "sub-01", "sub-02", "sub-03"}
    assert len(list(out.iterdir())) == 5
    return found


class Steps:
    """Counts the calls that change the disk below a folder, and does ``act`` at one of them."""

    def __init__(self, folder: Path, act: Callable[[], None], at: int) -> None:
        self.count, self.at, self._act, self._folder = 0, at, act, str(folder)

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self._concerns(args):
                self.count += 1
                if self.count - 1 == self.at:
                    self._act()
            return real(*args, **options)

        return call

    def _concerns(self, args: tuple[Any, ...]) -> bool:
        first = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else args[0]
        return str(first).startswith(self._folder)

    def install(self) -> dict[str, Any]:
        real = {name: getattr(os, name) for name in STEPS}
        for name, function in real.items():
            setattr(os, name, self.wrap(function))
        return real


def attempt(source: Path, out: Path, at: int, number: int) -> tuple[str, int]:
    """``prepare`` whose disk fails at step ``at``: how it ended, and how many steps it took."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    steps = Steps(out, fail, at)
    real = steps.install()
    try:
        prepare(source, out, NATIVE)
        ended = "completed"
    except DataError as error:
        assert str(out) in str(error) and "\n" not in str(error)
        ended = "raised"
    finally:
        for name, function in real.items():
            setattr(os, name, function)
    return ended, steps.count


def failing(change: tuple[Path, Path, str, str], tmp_path: Path, every: int) -> Counter[str]:
    source, store, old, new = change
    shutil.copytree(store, tmp_path / "dry")
    ended, total = attempt(source, tmp_path / "dry", -1, 0)
    assert ended == "completed" and total > 60
    counts: Counter[str] = Counter()
    for at in range(0, total, every):
        for number in (errno.ENOSPC, errno.EIO) if every == 1 else (errno.ENOSPC,):
            out = tmp_path / "out"
            shutil.copytree(store, out)
            ended, _ = attempt(source, out, at, number)
            counts[f"{ended}, {settle(source, out, old, new)}"] += 1
            shutil.rmtree(out)
    return counts


def test_a_disk_that_fails_at_one_step(change: tuple[Path, Path, str, str], tmp_path: Path) -> None:
    counts = failing(change, tmp_path, 12)
    assert counts["raised, old"] > 3 and "completed, old" not in counts


@pytest.mark.slow
def test_a_disk_that_fails_at_any_step(
    change: tuple[Path, Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = failing(change, tmp_path, 1)
    with capsys.disabled():
        sys.stdout.write(f"\ndisk fails at one step: {dict(counts)}\n")
    assert "completed, old" not in counts


# Forks for every kill, so that the libraries are loaded once: copies OLD, kills at the given step.
KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import h5py, nibabel, pandas
from fmrizoo.data.prepare import prepare
from test_faults_writing import NATIVE, Steps
source, store, work, *steps = sys.argv[1:]
for at in map(int, steps):
    out = Path(work) / f"killed-{at}"
    shutil.copytree(store, out)
    child = os.fork()
    if child == 0:
        Steps(out, lambda: os.kill(os.getpid(), signal.SIGKILL), at).install()
        prepare(source, out, NATIVE)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    sys.stdout.write(json.dumps([at, status]) + "\\n")
"""


def script(code: str, *args: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def killed(change: tuple[Path, Path, str, str], tmp_path: Path, steps: list[int]) -> Counter[str]:
    source, store, old, new = change
    process = script(KILLED, source, store, tmp_path, *steps)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    counts: Counter[str] = Counter()
    for at, status in map(json.loads, said.splitlines()):
        assert status in (0, signal.SIGKILL)
        out = tmp_path / f"killed-{at}"
        counts[f"{'killed' if status else 'done'}, {settle(source, out, old, new)}"] += 1
        shutil.rmtree(out)
    return counts


def test_killed_at_one_step(change: tuple[Path, Path, str, str], tmp_path: Path) -> None:
    source, store, _, _ = change
    shutil.copytree(store, tmp_path / "dry")
    _, total = attempt(source, tmp_path / "dry", -1, 0)
    # The last steps are the ones that publish.
    counts = killed(change, tmp_path, [0, total // 2, *range(total - 12, total, 2)])
    assert counts["killed, old"] >= 3 and counts["killed, new"] >= 1


@pytest.mark.slow
def test_killed_at_any_step(
    change: tuple[Path, Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, store, _, _ = change
    shutil.copytree(store, tmp_path / "dry")
    _, total = attempt(source, tmp_path / "dry", -1, 0)
    counts = killed(change, tmp_path, list(range(total)))
    with capsys.disabled():
        sys.stdout.write(f"\nkill -9 at one step of prepare: {dict(counts)}\n")
    assert counts.total() == total and counts["killed, new"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_random_moments(
    change: tuple[Path, Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real command, killed after any time up to what it takes."""
    source, store, old, new = change
    draw = random.Random(0)
    command = [sys.executable, "-m", "fmrizoo", "prepare", str(source)]
    start = time.monotonic()
    shutil.copytree(store, tmp_path / "whole")
    subprocess.run(
        [*command, str(tmp_path / "whole"), "prepare.space=native"], check=True, capture_output=True
    )
    takes = time.monotonic() - start
    counts: Counter[str] = Counter()
    while sum(n for how, n in counts.items() if how.startswith("killed")) < 20:
        assert counts.total() < 60, counts
        out = tmp_path / "out"
        shutil.copytree(store, out)
        process = subprocess.Popen(
            [*command, str(out), "prepare.space=native"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(draw.uniform(0.4, 0.95) * takes)
        process.kill()
        ended = "killed" if process.wait() == -signal.SIGKILL else "done"
        counts[f"{ended}, {settle(source, out, old, new)}"] += 1
        shutil.rmtree(out)
    with capsys.disabled():
        sys.stdout.write(f"\nkill -9 at random moments: {dict(counts)}\n")
    assert counts["killed, old"] > 0


# --- two writers ----------------------------------------------------------------------------------

TOGETHER = """
import os, sys, time
from pathlib import Path
import h5py, nibabel, pandas
from fmrizoo.data.prepare import prepare
from fmrizoo.errors import DataError
from test_faults_writing import NATIVE

def one(out, start):
    time.sleep(max(0, start - time.monotonic()))
    try:
        prepare(source, out, NATIVE)
    except DataError as error:
        return 3 if "another prepare" in str(error) else 4
    except BaseException as error:
        sys.stderr.write(repr(error))
        return 5
    return 0

source, number, *folders = sys.argv[1:]
for out in folders:
    start, children = time.monotonic() + 0.05, []
    for _ in range(int(number)):
        child = os.fork()
        if child == 0:
            os._exit(one(Path(out), start))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]
    sys.stdout.write(" ".join(map(str, codes)) + "\\n")
"""


def test_writers_at_once(change: tuple[Path, Path, str, str], tmp_path: Path) -> None:
    source, store, _, new = change
    folders = [tmp_path / f"together-{k}" for k in range(6)]
    for out in folders:
        shutil.copytree(store, out)
    said, errors = script(TOGETHER, source, 3, *folders).communicate()
    assert len(said.splitlines()) == len(folders), errors
    for out, line in zip(folders, said.splitlines(), strict=True):
        codes = Counter(line.split())
        assert set(codes) <= {"0", "3"} and codes["0"] >= 1, (said, errors)
        assert state(out) == new and verify(out).findings == []
        assert not (out / ".staging").exists()


# --- folders that cannot be written ---------------------------------------------------------------

# Without its capabilities root obeys file modes like everybody else.
POWERLESS = """
import ctypes, os, sys
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
nothing = (ctypes.c_uint32 * 6)()
if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, nothing):
    sys.exit("capset failed")
from pathlib import Path
from fmrizoo.data.prepare import prepare
from fmrizoo.data.repair import repair
from fmrizoo.data.verify import verify
from fmrizoo.errors import DataError
from test_faults_writing import NATIVE, state
source, out = sys.argv[1], Path(sys.argv[2])
try:
    (out / "probe").touch()
    sys.exit("the folder is not read-only")
except PermissionError:
    pass
assert state(out) == sys.argv[3]
assert verify(out).findings == [] and repair(out, source).findings == []
try:
    prepare(source, out, NATIVE)
    sys.exit("prepare wrote into a read-only folder")
except DataError as error:
    sys.stdout.write(str(error))
"""


def test_a_read_only_store(change: tuple[Path, Path, str, str]) -> None:
    source, store, old, _ = change
    before = sorted((p.name, p.stat().st_mtime_ns) for p in store.iterdir())
    store.chmod(0o555)
    try:
        process = script(POWERLESS, source, store, old)
        said, errors = process.communicate()
    finally:
        store.chmod(0o755)
    assert process.returncode == 0, errors
    assert said == f"cannot write to {store}: Permission denied"
    assert sorted((p.name, p.stat().st_mtime_ns) for p in store.iterdir()) == before


# --- repair is a writer too -----------------------------------------------------------------------


@pytest.fixture
def damaged(tree: Any, tmp_path: Path) -> Iterator[tuple[Path, Path, str]]:
    """(source, store with a bad subject, state before the damage)."""
    for subject in ("01", "02"):
        tree.add(subject)
    prepare(tree.root, tmp_path / "s", NATIVE)
    before = state(tmp_path / "s")
    (tmp_path / "s/sub-02.h5").unlink()
    yield tree.root, tmp_path / "s", before


def test_a_repair_whose_disk_fails(damaged: tuple[Path, Path, str], tmp_path: Path) -> None:
    source, store, before = damaged
    good = (store / "sub-01.h5").read_bytes()
    for at in (0, 3, 10, 20, 40):
        out = tmp_path / f"repair-{at}"
        shutil.copytree(store, out)

        def fail() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        steps = Steps(out, fail, at)
        real = steps.install()
        try:
            repair(out, source)
        except DataError as error:
            assert str(out) in str(error)
        finally:
            for name, function in real.items():
                setattr(os, name, function)
        assert steps.count > at
        assert (out / "sub-01.h5").read_bytes() == good
        repair(out, source)
        assert state(out) == before and verify(out).findings == []


def test_a_good_subject_that_could_not_be_opened_once_is_left_alone(
    damaged: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, store, before = damaged
    good = (store / "sub-01.h5").read_bytes()
    real, failed = os.open, []

    def once(path: Any, *args: Any, **options: Any) -> int:
        if str(path) == str(store / "sub-01.h5") and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", once)
    report = repair(store, source)
    assert failed and [name for name in report.restored + report.renewed if "01" in name] == []
    assert (store / "sub-01.h5").read_bytes() == good and state(store) == before

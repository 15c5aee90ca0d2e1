"""prepare --jobs: the same store as with one process, and nothing half-done however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest

from fmrizoo.config import PrepareConfig
from fmrizoo.data.prepare import ProgressEvent, prepare
from fmrizoo.data.store import Store, read_index
from fmrizoo.errors import DataError

NATIVE = PrepareConfig(space="native")
CHANGING = ("uuid", "meta_crc32")  # the id is random, and checksums are seeded with it


def test_several_processes_write_the_same_values(
    tree: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for subject in ("01", "02", "03"):
        for run in ("1", "2"):
            tree.add(subject, run, events="onset\tduration\ttrial_type\n1\t2\tface\n")
    constant = nib.load(tree.root / "sub-02/func/sub-02_task-rest_run-1_bold.nii.gz")
    data = np.asarray(constant.dataobj).copy()
    data[2] = 7
    nib.save(nib.Nifti1Image(data, None, constant.header), constant.get_filename())
    seen: list[ProgressEvent] = []
    one = prepare(tree.root, tmp_path / "one", NATIVE)
    assert "20 of 60 brain voxels never change" in caplog.text
    caplog.clear()
    two = prepare(tree.root, tmp_path / "two", NATIVE, jobs=2, on_progress=seen.append)
    assert "20 of 60 brain voxels never change" in caplog.text  # said by a worker
    assert two.prepared == one.prepared and len(two.prepared) == 6
    assert [e.done for e in seen] == [1, 2, 3, 4, 5, 6]
    assert sorted(e.run for e in seen) == sorted(two.prepared)
    first, second = ({e["name"]: e for e in read_index(tmp_path / s)} for s in ("one", "two"))
    for name, entry in first.items():
        assert {k: v for k, v in entry.items() if k not in CHANGING} == {
            k: v for k, v in second[name].items() if k not in CHANGING
        }
        with (
            h5py.File(tmp_path / "one" / entry["file"]) as a,
            h5py.File(tmp_path / "two" / entry["file"]) as b,
        ):
            for key in a[name]:
                if key not in ("meta", "crc32"):
                    assert np.array_equal(a[name][key][()], b[name][key][()]), key
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))
    assert Store(tmp_path / "two").verify() == []
    again = prepare(tree.root, tmp_path / "two", NATIVE, jobs=2)
    assert len(again.kept) == 6 and not again.prepared


@pytest.mark.slow
def test_bad_runs_are_listed_whoever_met_them(tree: Any, tmp_path: Path) -> None:
    for subject in ("01", "02", "03"):
        tree.add(subject)
    tree.add("02", data=np.zeros((5, 6, 4, 12), np.int16))
    with pytest.raises(DataError, match=r"(?s)1 of 3 runs cannot be used.*sub-02_.*zero every"):
        prepare(tree.root, tmp_path / "s", NATIVE, jobs=2)
    report = prepare(tree.root, tmp_path / "s", NATIVE, jobs=3, skip_bad=True)
    assert [s.run for s in report.skipped] == ["sub-02_task-rest_run-1"]
    assert len(report.kept) == 2  # staged by the call that failed
    with pytest.raises(DataError, match="--jobs must be ≥ 1"):
        prepare(tree.root, tmp_path / "s", NATIVE, jobs=0)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from fmrizoo.config import PrepareConfig
from fmrizoo.data import subject
from fmrizoo.data.interrupt import Interrupted
from fmrizoo.data.prepare import prepare
from fmrizoo.errors import DataError

real = subject.process

def slow(run, config):
    if run.key.subject == os.environ.get("DIES"):
        os.kill(os.getpid(), signal.SIGKILL)
    made = real(run, config)
    if run.key.subject in os.environ.get("HANGS", ""):
        print("hanging", os.getpid(), flush=True)
        import time
        time.sleep(600)
    return made

subject.process = slow

if __name__ == "__main__":
    try:
        prepare(sys.argv[1], Path(sys.argv[2]), PrepareConfig(space="native"),
                jobs=int(sys.argv[3]), on_progress=lambda e: print(e.run, flush=True))
    except DataError as error:
        sys.exit(str(error))
    except Interrupted:
        sys.exit(75)
"""


def start(tmp_path: Path, root: Path, jobs: int, **env: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"  # a file: spawned processes import it again
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(root), str(tmp_path / "s"), str(jobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    """Whether they end within some seconds."""
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


@pytest.mark.slow
def test_a_worker_that_dies_names_its_subject(tree: Any, tmp_path: Path) -> None:
    for subject in ("01", "02", "03"):
        tree.add(subject)
    _, said = start(tmp_path, tree.root, 2, DIES="02").communicate(timeout=120)
    assert "the process that prepared sub-02 died (killed by SIGKILL" in said
    assert "Traceback" not in said
    assert not (tmp_path / "s/index.json").exists()
    assert len(prepare(tree.root, tmp_path / "s", NATIVE, jobs=2).prepared) >= 1
    assert Store(tmp_path / "s").verify() == [] and len(Store(tmp_path / "s").runs) == 3


@pytest.mark.parametrize(
    ("jobs", "number"),
    [
        (2, signal.SIGTERM),
        *(
            pytest.param(jobs, number, marks=pytest.mark.slow)
            for jobs, number in [
                (1, signal.SIGINT),
                (1, signal.SIGTERM),
                (2, signal.SIGINT),
                (2, signal.SIGKILL),
            ]
        ),
    ],
)
def test_interrupted_and_gone_on(
    tree: Any, tmp_path: Path, jobs: int, number: signal.Signals
) -> None:
    for subject in ("01", "02", "03"):
        tree.add(subject)
    process = start(tmp_path, tree.root, jobs, HANGS="02 03")
    assert process.stdout is not None
    lines: list[str] = []
    while len(lines) < (2 if jobs == 1 else 3):  # sub-01 is done, the others hang
        lines.append(process.stdout.readline())
    workers = [int(line.split()[1]) for line in lines if line.startswith("hanging")]
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (75 if number != signal.SIGKILL else -9), said
    assert "Traceback" not in said
    assert gone(workers)
    assert not (tmp_path / "s/index.json").exists()
    staged = {p.name for p in (tmp_path / "s/.staging").glob("sub-*")}
    assert staged == {"sub-01.h5"}  # whole, and nothing else
    report = prepare(tree.root, tmp_path / "s", NATIVE, jobs=2)
    assert report.kept == ["sub-01_task-rest_run-1"] and len(report.prepared) == 2
    assert Store(tmp_path / "s").verify() == [] and not (tmp_path / "s/.staging").exists()

"""Faults that a training survives, each done for real, as a Markdown table (docs/faults.md).

    python benchmarks/faults.py [--only WORD]

Every fault hits ``fmrizoo pretrain`` on two ranks (processes, gloo) of the shipped sample; then the
same command runs again and its metrics are compared with those of a run that nothing happened to.
New faults are entries of :data:`FAULTS`; ``fault_rank.py`` is a rank that harms itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS, EVERY, AT = 12, 2, 7  # steps of a run, between checkpoints, before a fault
RANKS = 2
PATIENCE = 240  # seconds after which a run counts as hanging
VALUES = (
    "backbone.embed_dim=8",
    "backbone.num_heads=[1,2]",
    f"train.steps={STEPS}",
    f"train.save_every={EVERY}",
    "train.batch_size=4",
    "train.validate_every=100",
)
HEADS = ["fault", "injected how", "noticed by", "ended after (s)", "exit code", "reruns resume at"]
HEADS += ["steps lost", "equal to the uninterrupted run", "what the user reads"]


@dataclass
class Case:
    """A run under a fault: its folder, its own copy of the store, its processes."""

    out: Path
    store: Path
    ranks: list[subprocess.Popen[str]] = field(default_factory=list)


Act = Callable[[Case], None]


@dataclass(frozen=True)
class Fault:
    """One line of the table.

    Attributes:
        name, how: What happens, and how it is done here.
        by, says: Who notices, and words of what is then told.
        worker: What the last rank does to itself (``fault_rank.py``).
        at_step: Done from outside once the metrics have :data:`AT` lines.
        between: Done to a run whose last rank was killed, before the same command runs again.
        mend: Undoes the fault where a person would have to, after a start was refused.
        values: More recipe values, of the first start.
        dies: The last rank has no exit code of its own.
        survives: The run goes on by itself to its end.
        code: Exit code of the ranks.
        ranks, then: Ranks, and more recipe values, of the second start.
    """

    name: str
    how: str
    by: str
    says: str
    worker: str = ""
    at_step: Act | None = None
    between: Act | None = None
    mend: Act | None = None
    values: tuple[str, ...] = ()
    dies: bool = False
    survives: bool = False
    code: int = 1
    ranks: int = RANKS
    then: tuple[str, ...] = ()


# --- faults from outside -------------------------------------------------------------------------


def kill_last(case: Case) -> None:
    case.ranks[-1].send_signal(signal.SIGKILL)


def end_last(case: Case) -> None:
    case.ranks[-1].send_signal(signal.SIGTERM)


def warn_last(case: Case) -> None:
    case.ranks[-1].send_signal(signal.SIGUSR1)


def stored(case: Case) -> list[Path]:
    files = sorted(case.store.glob("sub-*.h5"))
    for file in files:
        os.chmod(file, 0o644)
    return files


def truncate_store(case: Case) -> None:
    for file in stored(case):
        os.truncate(file, file.stat().st_size // 3)


def overwrite_store(case: Case) -> None:
    for file in stored(case):
        size = file.stat().st_size
        with file.open("r+b") as opened:
            opened.seek(size // 4)
            opened.write(os.urandom(size // 2))


def replace_file(case: Case) -> None:
    """A file of the same subject, prepared at another time."""
    other = case.store.with_name(case.store.name + "-other")
    make_store(other)
    for file in stored(case):
        os.replace(other / file.name, file)


def prepare_again(case: Case) -> None:
    shutil.rmtree(case.store)
    make_store(case.store)


def restore(case: Case) -> None:
    shutil.rmtree(case.store)
    shutil.copytree(case.store.with_name("store"), case.store)


def date_forward(case: Case) -> None:
    """The oldest checkpoint gets the newest date, of next year."""
    folders = sorted((case.out / "checkpoints").glob("step-*"))
    for days, folder in enumerate(reversed(folders), start=365):
        when = time.time() + 86_400 * days
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (when, when))


def newest(case: Case) -> Path:
    folders = (case.out / "checkpoints").glob("step-*")
    return max(f for f in folders if f.suffix != ".partial")


def tear_shard(case: Case) -> None:
    shard = newest(case) / "shard-00001.safetensors"
    os.truncate(shard, shard.stat().st_size * 2 // 3)


def flip_bit(case: Case) -> None:
    with (newest(case) / "shard-00000.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def drop_manifest(case: Case) -> None:
    (newest(case) / "manifest.json").unlink()


def point_nowhere(case: Case) -> None:
    (case.out / "checkpoints" / "latest").write_text("step-999999\n")


def nothing(case: Case) -> None:
    """The other ranks of the second start are the fault."""


GONE = "another rank is gone"
FAULTS: list[Fault] = [
    Fault("rank killed", "kill -9 of one rank", "the other rank", GONE, between=nothing),
    Fault(
        "stop asked for",
        "SIGTERM to one rank",
        "all ranks",
        "interrupted",
        at_step=end_last,
        code=75,
    ),
    Fault(
        "scheduler's warning",
        "SIGUSR1 to one rank",
        "all ranks",
        "interrupted",
        at_step=warn_last,
        code=75,
    ),
    Fault(
        "rank hangs",
        "its data stream sleeps; train.hang_minutes=0.5",
        "its watchdog",
        "gave no sign of life",
        worker="sleep",
        values=("train.hang_minutes=0.5",),
        code=75,
    ),
    Fault("NaN loss, stop", "one rank's loss is NaN", "all ranks", "is not finite", worker="nan"),
    Fault(
        "NaN loss, skip",
        "the same; train.not_finite=skip",
        "all ranks",
        "is left out",
        worker="nan",
        values=("train.not_finite=skip",),
        survives=True,
        code=0,
    ),
    Fault(
        "reader fails",
        "ValueError in a reader thread",
        "the loader",
        "negative dimensions",
        worker="reader",
    ),
    Fault(
        "reader thread ends",
        "the thread ends without an answer",
        "the loader",
        "reader",
        worker="silent",
    ),
    Fault(
        "store truncated",
        "files cut to a third under way",
        "the loader",
        "sub-",
        at_step=truncate_store,
        mend=restore,
    ),
    Fault(
        "store overwritten",
        "half of each file is noise under way",
        "the loader",
        "sub-",
        at_step=overwrite_store,
        mend=restore,
    ),
    Fault(
        "store file replaced",
        "by one prepared at another time, between two starts",
        "the second start",
        "STORE",
        between=replace_file,
        mend=restore,
    ),
    Fault(
        "store prepared again",
        "between two starts",
        "the second start",
        "STORE",
        between=prepare_again,
        mend=restore,
    ),
    Fault(
        "clocks",
        "one rank's clock goes back a day a look, then it is killed; dates of checkpoints swapped",
        "nobody: none is asked",
        GONE,
        worker="clock",
        at_step=kill_last,
        dies=True,
        between=date_forward,
    ),
    Fault(
        "torn shard",
        "newest checkpoint's shard cut to two thirds",
        "checksums at the start",
        "bytes instead of",
        between=tear_shard,
    ),
    Fault(
        "flipped bit",
        "one bit of the newest checkpoint's shard",
        "checksums at the start",
        "has another checksum",
        between=flip_bit,
    ),
    Fault(
        "no manifest",
        "manifest.json of the newest checkpoint removed",
        "the start",
        "manifest.json is missing",
        between=drop_manifest,
    ),
    Fault(
        "`latest` points nowhere",
        "it names step-999999",
        "nobody: folders count",
        GONE,
        between=point_nowhere,
    ),
    Fault(
        "killed while saving",
        "kill -9 by the checkpoint thread, half a shard written",
        "the other rank",
        GONE,
        worker="save",
        dies=True,
    ),
    Fault(
        "disk full while saving",
        "RLIMIT_FSIZE of one rank",
        "all ranks, a step later",
        "cannot write",
        worker="full",
    ),
    Fault(
        "other ranks, other stage",
        "kill -9; rerun with 1 rank at ZeRO 3",
        "the start",
        "ranks go on with what",
        between=nothing,
        ranks=1,
        then=("train.zero_stage=3",),
    ),
]


# --- running them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """A start of all ranks: exit codes, what was printed, seconds from the fault to the end."""

    codes: list[int | str]
    texts: list[str]
    seconds: float


def make_store(path: Path) -> None:
    from fmrizoo.config import PrepareConfig
    from fmrizoo.data.prepare import prepare

    prepare("sample:haxby2001", path, PrepareConfig(space="native"))


def start(
    case: Case,
    *,
    ranks: int = RANKS,
    values: tuple[str, ...] = (),
    worker: str = "",
    at_step: Act | None = None,
) -> Ended:
    """Start all ranks, harm them, and wait for the last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    at = case.out.with_suffix(".at")
    at.unlink(missing_ok=True)
    arguments = ["pretrain", "pretrain/haxby_swin4d_simmim", *VALUES, *values]
    arguments += [f"data.store={case.store}", "--out", str(case.out)]
    here = Path(__file__).resolve()
    case.ranks = []
    for rank in range(ranks):
        env = os.environ | {
            "PYTHONPATH": str(here.parents[1]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{port}",
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank}",
            "WORLD_SIZE": f"{ranks}",
            "OMP_NUM_THREADS": "1",
            "FAULT_AT": str(at),
            "FAULT_STEP": f"{AT}",
            "COLUMNS": "1000",
        }
        harmed = worker and rank == ranks - 1
        own = [str(here.with_name("fault_rank.py")), worker] if harmed else ["-m", "fmrizoo"]
        case.ranks.append(
            subprocess.Popen(
                [sys.executable, *own, *arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    metrics = case.out / "metrics.jsonl"
    while at_step and all(p.poll() is None for p in case.ranks):
        if metrics.is_file() and metrics.read_text().count("\n") >= AT:
            at.write_text(repr(time.monotonic()))
            at_step(case)
            break
        time.sleep(0.002)
    return wait(case, at)


def wait(case: Case, at: Path) -> Ended:
    texts, codes = [], []
    for process in case.ranks:
        try:
            text, _ = process.communicate(timeout=PATIENCE)
            codes.append(process.returncode)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            codes.append("hangs")
        texts.append(text)
    seconds = time.monotonic() - float(at.read_text()) if at.is_file() else math.nan
    return Ended(codes, texts, seconds)


def rows(out: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock decides."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    timed = ("seconds", "clips_per_second", "stall")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def told(texts: list[str], folder: Path, says: str) -> str:
    """The line that says so, of the rank that knows most; empty if none does."""
    for line in (line for text in texts[::-1] for line in text.splitlines()):
        line = re.sub(rf"{re.escape(str(folder))}/store[-\w]*", "STORE", line)
        line = re.sub(rf"{re.escape(str(folder))}/(run-\d+|killed)", "RUN", line)
        for mark in ("error: ", "WARNING ", "ERROR ", "interrupted: "):
            if mark in line and says in line:
                return (mark if mark.startswith("int") else "") + line.partition(mark)[2].strip()
    return ""


def equality(got: list[dict[str, Any]], want: list[dict[str, Any]], exact: bool) -> str:
    """``exact``, or how far the losses are; empty where the runs differ."""
    if got == want:
        return "exact"
    if exact or [row["step"] for row in got] != [row["step"] for row in want]:
        return ""
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(got, want, strict=True))
    return f"losses within {worst:.0e}" if worst < 1e-5 else ""


class Bench:
    """Runs the faults; what several of them begin with is run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_store(folder / "store")
        whole = Case(folder / "whole", folder / "store")
        if (codes := start(whole).codes) != [0] * RANKS:
            raise SystemExit(f"the run without a fault fails: {codes}")
        self.want = rows(whole.out)
        self._killed: Ended | None = None

    def killed(self) -> tuple[Path, Ended]:
        """A run whose last rank was killed, and how it ended."""
        case = Case(self.folder / "killed", self.folder / "store")
        if self._killed is None:
            self._killed = start(case, at_step=kill_last)
        return case.out, self._killed

    def line(self, number: int, fault: Fault) -> tuple[list[str], bool]:
        """Cells of the table, and whether all is as it should be."""
        case = Case(self.folder / f"run-{number}", self.folder / f"store-{number}")
        shutil.copytree(self.folder / "store", case.store)
        dies = fault.dies
        if fault.between and not fault.worker:
            out, ended = self.killed()
            shutil.copytree(out, case.out)
            dies = True
        else:
            ended = start(case, values=fault.values, worker=fault.worker, at_step=fault.at_step)
        stopped, texts = len(rows(case.out)), list(ended.texts)
        codes = ended.codes[:-1] if dies else ended.codes
        good = all(code == fault.code for code in codes) and "hangs" not in ended.codes
        resumed, lost, equal = "not needed", 0, ""
        if fault.survives:
            got = rows(case.out)
            lost = sum(bool(row.get("skipped")) for row in got)
            good &= stopped == STEPS and got[: AT - 1] == self.want[: AT - 1]
            equal = "up to the step left out"
        else:
            if fault.between:
                fault.between(case)
            if fault.mend:
                refused = start(case)
                good &= all(code == 1 for code in refused.codes)
                texts += refused.texts if fault.between else []
                fault.mend(case)
            again = start(case, ranks=fault.ranks, values=fault.then)
            texts += again.texts
            good &= again.codes == [0] * fault.ranks
            at = json.loads((case.out / "env.json").read_text())["resumed_from"] or 0
            resumed, lost = f"{at}", max(stopped - at, 0)
            equal = equality(rows(case.out), self.want, exact=not fault.then)
        text = told(texts, self.folder, fault.says)
        good &= bool(text and equal) and not any("Traceback" in one for one in texts)
        if not good:
            print("\n".join(texts), file=sys.stderr)
        code = "0" if fault.survives else f"{fault.code}"
        cells = [fault.name, fault.how, fault.by if text else "NOBODY", f"{ended.seconds:.1f}"]
        cells += [code if good else f"{ended.codes}", resumed, f"{lost}", equal or "NO", text]
        return cells, good


def main() -> int:
    """Print the table; the exit code says whether all faults were survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="Faults with this in their name.")
    only, began = parser.parse_args().only, time.monotonic()
    survived = []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
        for number, fault in enumerate(FAULTS):
            if only in fault.name:
                cells, good = bench.line(number, fault)
                print(f"| {' | '.join(cells)} |", flush=True)
                survived.append(good)
    print(f"\n{len(survived)} injected, {sum(survived)} survived; a run has {STEPS} steps and a")
    print(f"checkpoint every {EVERY}; {time.monotonic() - began:.0f} s in all.")
    return 0 if all(survived) else 1


if __name__ == "__main__":
    raise SystemExit(main())

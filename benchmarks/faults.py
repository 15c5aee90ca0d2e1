"""Faults that a training survives, each done for real, as a Markdown table (docs/faults.md).

    python benchmarks/faults.py [--only WORD]

Every fault hits ``fmrizoo pretrain`` on one or two ranks (processes, gloo) of the shipped sample;
then the same command runs again and its metrics are compared with those of a run that nothing
happened to. New faults are entries of :data:`FAULTS`; ``--rank`` starts a rank that harms itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS, EVERY, AT = 12, 4, 6  # steps of a run, between checkpoints, before a fault
PATIENCE = 120  # seconds after which a run counts as hanging
VALUES = (
    "backbone.embed_dim=8",
    "backbone.num_heads=[1,2]",
    f"train.steps={STEPS}",
    f"train.save_every={EVERY}",
    "train.batch_size=4",
    "train.validate_every=100",
)


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
        ranks: Processes.
        worker: What the last rank does to itself (:data:`WORKERS`).
        at_step: Done from outside once the metrics have :data:`AT` lines.
        between: Done after all ranks have ended, before the same command runs again.
        mend: Undoes it where a person would have to, after a second start was refused.
        values: More recipe values, of the first start.
        survives: The run goes on by itself to its end.
        code: Exit code of the ranks that the fault leaves alive.
    """

    name: str
    how: str
    ranks: int = 2
    worker: str = ""
    at_step: Act | None = None
    between: Act | None = None
    mend: Act | None = None
    values: tuple[str, ...] = ()
    survives: bool = False
    code: int = 1


# --- faults from outside -------------------------------------------------------------------------


def kill_last(case: Case) -> None:
    case.ranks[-1].send_signal(signal.SIGKILL)


def warn_last(case: Case) -> None:
    case.ranks[-1].send_signal(signal.SIGUSR1)


def truncate_store(case: Case) -> None:
    for file in case.store.glob("sub-*.h5"):
        os.chmod(file, 0o644)
        os.truncate(file, file.stat().st_size // 3)


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


FAULTS: list[Fault] = [
    Fault("scheduler's warning", "SIGUSR1 to one rank", at_step=warn_last, code=75),
    Fault("rank killed", "kill -9 of one rank", at_step=kill_last),
    Fault(
        "rank hangs",
        "its data stream sleeps; train.hang_minutes=0.5",
        worker="sleep",
        values=("train.hang_minutes=0.5",),
        code=75,
    ),
    Fault("NaN loss, stop", "one rank's loss is NaN", worker="nan"),
    Fault(
        "NaN loss, skip",
        "the same; train.not_finite=skip",
        worker="nan",
        values=("train.not_finite=skip",),
        survives=True,
        code=0,
    ),
    Fault("reader fails", "ValueError in a reader thread", worker="reader"),
    Fault("reader thread ends", "the thread ends without an answer", worker="silent"),
    Fault(
        "store truncated", "files cut to a third under way", at_step=truncate_store, mend=restore
    ),
    Fault(
        "store prepared again",
        "between two starts",
        at_step=kill_last,
        between=prepare_again,
        mend=restore,
    ),
    Fault(
        "clocks",
        "one rank's clock goes back a day a look; dates of checkpoints swapped",
        worker="clock",
        at_step=kill_last,
        between=date_forward,
    ),
]


# --- faults that a rank does to itself -----------------------------------------------------------


def in_stream(do: Callable[[], None]) -> None:
    """``do`` before the first micro-batch of step ``AT + 1``."""
    from fmrizoo.data.loader import Loader

    batches = Loader.batches

    def wrapped(self: Loader, start: int = 0) -> Iterator[Any]:
        for number, batch in enumerate(batches(self, start), start=start):
            if number == AT:
                do()
            yield batch

    Loader.batches = wrapped  # type: ignore[method-assign]


def in_reader(do: Callable[[], None]) -> None:
    from fmrizoo.data.dataset import ClipDataset

    read, count = ClipDataset.read, itertools.count(1)

    def wrapped(self: ClipDataset, *args: Any, **kwargs: Any) -> Any:
        if next(count) == 2 * AT + 1:  # two clips a rank and step
            do()
        return read(self, *args, **kwargs)

    ClipDataset.read = wrapped  # type: ignore[method-assign]


def worker_sleep() -> None:
    in_stream(lambda: (injected(), time.sleep(10_000))[0])


def worker_nan() -> None:
    from fmrizoo.model import PretrainingModel

    forward, bad = PretrainingModel.forward, [False]
    in_stream(lambda: bad.__setitem__(0, True))

    def wrapped(self: PretrainingModel, batch: Any) -> Any:
        loss, logs = forward(self, batch)
        if bad[0] and self.training:
            bad[0] = False
            injected()
            loss = loss * float("nan")
        return loss, logs

    PretrainingModel.forward = wrapped  # type: ignore[method-assign]


def worker_reader() -> None:
    def fail() -> None:
        injected()
        raise ValueError("negative dimensions are not allowed")

    in_reader(fail)


def worker_silent() -> None:
    from concurrent.futures import thread

    run, count = thread._WorkItem.run, itertools.count(1)

    def wrapped(self: Any) -> None:
        if next(count) == 2 * AT + 1:
            injected()
            raise SystemExit
        run(self)

    thread._WorkItem.run = wrapped


def worker_clock() -> None:
    now, seen = time.time(), itertools.count()
    time.time = lambda: now - 86_400 * next(seen)


WORKERS: dict[str, Callable[[], None]] = {
    "sleep": worker_sleep,
    "nan": worker_nan,
    "reader": worker_reader,
    "silent": worker_silent,
    "clock": worker_clock,
}


def injected() -> None:
    """Note when it happened, on the clock that all processes of a machine share."""
    Path(os.environ["FAULT_AT"]).write_text(repr(time.monotonic()))


def be_rank(worker: str, arguments: list[str]) -> None:
    """``python -m fmrizoo`` with a fault in it."""
    WORKERS[worker]()
    sys.argv = ["fmrizoo", *arguments]
    runpy.run_module("fmrizoo", run_name="__main__", alter_sys=True)


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


def start(case: Case, fault: Fault, *, harmed: bool) -> Ended:
    """Start all ranks, harm them, and wait for the last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    at = case.out.with_suffix(".at")
    at.unlink(missing_ok=True)
    arguments = ["pretrain", "pretrain/haxby_swin4d_simmim", *VALUES]
    arguments += fault.values if harmed else ()
    arguments += [f"data.store={case.store}", "--out", str(case.out)]
    root = str(Path(__file__).resolve().parents[1])
    case.ranks = []
    for rank in range(fault.ranks):
        env = os.environ | {
            "PYTHONPATH": root,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{port}",
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank}",
            "WORLD_SIZE": f"{fault.ranks}",
            "OMP_NUM_THREADS": "1",
            "FAULT_AT": str(at),
            "COLUMNS": "1000",
        }
        own = ["-m", "fmrizoo"]
        if harmed and fault.worker and rank == fault.ranks - 1:
            own = [__file__, "--rank", fault.worker]
        case.ranks.append(
            subprocess.Popen(
                [sys.executable, *own, *arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    if harmed and fault.at_step:
        metrics = case.out / "metrics.jsonl"
        while all(p.poll() is None for p in case.ranks):
            if metrics.is_file() and metrics.read_text().count("\n") >= AT:
                at.write_text(repr(time.monotonic()))
                fault.at_step(case)
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
    seconds = time.monotonic() - float(at.read_text()) if at.is_file() else float("nan")
    return Ended(codes, texts, seconds)


def rows(out: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock decides."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    timed = ("seconds", "clips_per_second", "stall")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def message(ended: Ended, case: Case) -> str:
    """What a user reads: the error, or else the warning, of the rank that knows most."""
    lines = [line.strip() for text in ended.texts[::-1] for line in text.splitlines()]
    for mark in ("error: ", "WARNING  the loss", "interrupted: "):
        if found := [line for line in lines if mark in line]:
            text = found[0][found[0].index(mark) :].removeprefix("error: ")
            text = text.removeprefix("WARNING  ")
            return text.replace(str(case.store), "STORE").replace(str(case.out), "RUN")
    return ""


def line_of(fault: Fault, folder: Path, want: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Cells of the table, and whether all is as it should be."""
    number = FAULTS.index(fault)
    case = Case(folder / f"run-{number}", folder / f"store-{number}")
    shutil.copytree(folder / "store", case.store)
    ended = start(case, fault, harmed=True)
    stopped = len(rows(case.out))
    survivors = ended.codes if fault.worker and fault.code == 75 else ended.codes[:-1]
    good = all(code == fault.code for code in survivors) and "hangs" not in ended.codes
    good &= not any("Traceback" in text for text in ended.texts)
    told = message(ended, case)
    if fault.survives:
        skipped = sum(bool(row.get("skipped")) for row in rows(case.out))
        good &= stopped == STEPS
        return [fault.name, fault.how, "yes", "goes on", "not needed", f"{skipped}", told], good
    if fault.between:
        fault.between(case)
        if fault.mend:
            refused = start(case, fault, harmed=False)
            good &= all(code == 1 for code in refused.codes)
            told = message(refused, case)
    if fault.mend:
        fault.mend(case)
    again = start(case, fault, harmed=False)
    good &= again.codes == [0] * fault.ranks and rows(case.out) == want
    resumed = json.loads((case.out / "env.json").read_text())["resumed_from"]
    lost = stopped - (resumed or 0)
    cells = [fault.name, fault.how, "yes" if told else "NO", f"{ended.seconds:.1f}"]
    cells += [f"from {resumed}, exact" if good else "NO", f"{max(lost, 0)}", told]
    if not good:
        print("\n".join([*ended.texts, *again.texts]), file=sys.stderr)
    return cells, good


def main() -> int:
    """Print the table; the exit code says whether all faults were survived."""
    if sys.argv[1:2] == ["--rank"]:
        be_rank(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="Faults with this in their name.")
    only, began = parser.parse_args().only, time.monotonic()
    heads = ["fault", "injected how", "detected", "stopped within (s)", "resumed"]
    heads += ["steps lost", "message"]
    survived = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder / "store")
        plain = Case(folder / "whole", folder / "store")
        if start(plain, Fault("none", ""), harmed=False).codes != [0, 0]:
            raise SystemExit("the run without a fault fails")
        print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for fault in FAULTS:
            if only in fault.name:
                cells, good = line_of(fault, folder, rows(plain.out))
                print(f"| {' | '.join(cells)} |", flush=True)
                survived.append(good)
    print(f"\n{len(survived)} faults, {sum(survived)} survived; a run has {STEPS} steps and a ")
    print(f"checkpoint every {EVERY}; {time.monotonic() - began:.0f} s in all.")
    return 0 if all(survived) else 1


if __name__ == "__main__":
    raise SystemExit(main())

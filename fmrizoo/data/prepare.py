"""NIfTI → store: every run is examined, and the store is published whole or not at all.

Subjects are written to ``<store>/.staging`` and moved in place when all are done, so a killed or
failed ``prepare`` leaves an existing store as it was, and the next one goes on from the staged
subjects.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmrizoo.config import PrepareConfig
from fmrizoo.data.bids import RunFile, find_runs
from fmrizoo.data.confounds import check_strategy
from fmrizoo.data.interrupt import listening, shield
from fmrizoo.data.process import settings_of
from fmrizoo.data.qc import flags, measures_of
from fmrizoo.data.sample import resolve_source
from fmrizoo.data.store import INDEX, PARTICIPANTS, read_index, write_index
from fmrizoo.data.subject import (
    STAGING,
    Entries,
    Note,
    Skipped,
    SubjectResult,
    SubjectTask,
    prepare_subject,
)
from fmrizoo.data.workers import WORKERS_LOCK, prepare_side_by_side, wait_for_orphans
from fmrizoo.errors import CorruptStoreError, DataError, FmrizooError
from fmrizoo.files import PART, write_atomic

log = logging.getLogger(__name__)

LOCKS = ("lock", WORKERS_LOCK)
LISTED = 3  # flagged runs that a warning names; the report has them all


@dataclass(frozen=True)
class ProgressEvent:
    """One run is done: ``state`` is prepared, kept or skipped."""

    done: int
    total: int
    run: str
    state: str


@dataclass
class PrepareReport:
    """What ``prepare`` did.

    Attributes:
        store: The folder.
        prepared, kept: Names of runs written now, and of runs that were already there.
        skipped: Runs left out (only with ``skip_bad``).
        flagged: Runs of this call that are in the store but failed a quality check, with reasons.
        unmeasured: Kept runs of an older version, which took no measures (``fmrizoo qc`` does).
    """

    store: Path
    prepared: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    flagged: dict[str, list[str]] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)


def prepare(
    source: str | Path,
    out: Path,
    config: PrepareConfig,
    *,
    skip_bad: bool = False,
    jobs: int = 1,
    layout: str = "auto",
    on_progress: Callable[[ProgressEvent], None] | None = None,
) -> PrepareReport:
    """Write the runs of ``source`` into the store ``out`` (added to, if it is one already).

    Args:
        source: BIDS folder, fMRIPrep folder, TSV of files (see :func:`find_runs`), or
            ``sample:haxby2001``.
        out: Folder of the store.
        config: Space, mask, TR, codec.
        skip_bad: Publish the good runs even if others cannot be used.
        jobs: Subjects prepared at a time, each in a process of its own if more than one (a script
            then needs ``if __name__ == "__main__":``). The values stored do not depend on it.
        layout: ``bids``, ``hcp``, ``swift``, ``hdf5``; ``auto`` looks what is there.
        on_progress: Called after every run.

    Returns:
        What was prepared, kept and skipped. Runs whose sources and settings have not changed
        since an earlier ``prepare`` are kept as they are.

    Raises:
        DataError: nothing to prepare, runs that cannot be used (all are listed; nothing is
            published), a store made with other settings, a full or read-only disk, a process that
            died (its subject is named).
        Interrupted: Ctrl-C or SIGTERM (a KeyboardInterrupt); the same call goes on from there.
    """
    if jobs < 1:
        raise DataError(f"--jobs must be ≥ 1, got {jobs}")
    if config.confounds is not None:
        check_strategy(config.confounds)
    folder = resolve_source(source)
    runs = find_runs(folder, config, layout)
    report = PrepareReport(out)
    counter = itertools.count(1)

    def note(run: str, state: str) -> None:
        if on_progress is not None:
            on_progress(ProgressEvent(next(counter), len(runs), run, state))

    with listening(), locked(out):
        old = _existing(out, runs, config)
        tasks = _tasks(out, config, runs, old)
        results = _run(tasks, jobs, note)
        for result in results:
            report.prepared += result.prepared
            report.kept += result.kept
            report.skipped += result.skipped
        _check_bad(report, skip_bad)
        asked = {task.subject for task in tasks}
        entries = [e for e in old.values() if e["key"]["subject"] not in asked]
        entries += [e for result in results for e in result.entries]
        with shield():
            staged = [r.staged for r in results if r.staged]
            published = _publish(out, folder, entries, staged, old)
            _remove_replaced(out, published, old)
        left = {e["key"]["subject"] for e in published}
        for subject in sorted({e["key"]["subject"] for e in old.values()} - left):
            log.warning("%s: sub-%s has no usable run any more and is removed", out, subject)
    _judge(report, published, config)
    return report


def _judge(report: PrepareReport, entries: list[dict[str, Any]], config: PrepareConfig) -> None:
    """Compare the quality measures of this call's runs with their limits; say what is flagged."""
    asked = {*report.prepared, *report.kept}
    for entry in entries:
        if entry["name"] not in asked:
            continue
        if not entry.get("qc"):
            report.unmeasured.append(entry["name"])
        elif reasons := flags(measures_of(entry), config.qc):
            report.flagged[entry["name"]] = reasons
    if report.flagged:
        lines = [f"  {name}: {'; '.join(why)}" for name, why in report.flagged.items()]
        more = [f"  … and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        listing = "\n".join([*lines[:LISTED], *more])
        log.warning(
            "%d of %d runs are flagged by the quality checks; they are in the store all the same "
            "(`fmrizoo qc %s` shows them, prepare.qc sets the limits):\n%s",
            len(report.flagged),
            len(asked),
            report.store,
            listing,
        )


def _tasks(
    out: Path, config: PrepareConfig, runs: list[RunFile], old: Entries
) -> list[SubjectTask]:
    """One task a subject, in the order of its first run."""
    subjects: dict[str, list[RunFile]] = {}
    for run in runs:
        subjects.setdefault(run.key.subject, []).append(run)
    tasks = []
    for subject, files in subjects.items():
        published = {n: e for n, e in old.items() if e["key"]["subject"] == subject}
        tasks.append(SubjectTask(out, config, subject, files, published))
    return tasks


def _run(tasks: list[SubjectTask], jobs: int, note: Note) -> list[SubjectResult]:
    if jobs == 1 or len(tasks) == 1:
        return [prepare_subject(task, note) for task in tasks]
    return prepare_side_by_side(tasks, jobs, note)


def _check_bad(report: PrepareReport, skip_bad: bool) -> None:
    bad = report.skipped
    if not bad:
        return
    listing = "\n".join(f"  {s.run}: {s.reason}" for s in bad)
    if not report.prepared and not report.kept:
        raise DataError(f"none of the {len(bad)} runs can be used:\n{listing}")
    if not skip_bad:
        good = len(report.prepared) + len(report.kept)
        raise DataError(
            f"{len(bad)} of {len(bad) + good} runs cannot be used, so nothing was published "
            f"(--skip-bad publishes the other {good}):\n{listing}"
        )
    log.warning("%d runs skipped:\n%s", len(bad), listing)


# --- the store folder -----------------------------------------------------------------------------


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One writer (prepare or repair) per store; the lock dies with the process.

    Raises:
        DataError: another writer has it, or the disk fails in any of the steps inside.
    """
    lock = _lock(out)
    try:
        wait_for_orphans(out)
        for leftover in [*out.glob(f".*{PART}"), *(out / STAGING).glob(f".*{PART}")]:
            log.warning("removing %s, left by an interrupted prepare", leftover)
            leftover.unlink()
        try:
            yield
        finally:
            # Before the lock is given up: the folder may be another writer's a moment later.
            if not any(p.name not in LOCKS for p in (out / STAGING).iterdir()):
                shutil.rmtree(out / STAGING)
                with suppress(OSError):
                    out.rmdir()  # only if nothing else is in it
    except FmrizooError:
        raise
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}") from error
    finally:
        os.close(lock)


def _lock(out: Path) -> int:
    """Descriptor of the locked file ``<out>/.staging/lock``.

    Raises:
        DataError: another writer has it, or the folder cannot be written.
    """
    import fcntl

    busy = f"another prepare is writing {out}: wait for it or stop it"
    file = out / STAGING / "lock"
    for _ in range(20):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # a writer that ended removed the folder in between
            continue
        except OSError as error:
            raise DataError(f"cannot write to {out}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise DataError(busy) from None
        except OSError as error:  # some parallel file systems have no locks
            log.warning("%s cannot be locked (%s): run one prepare at a time", out, error.strerror)
        # The lock counts only if the next writer would meet it: the file may have been removed.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(file)):
                return lock
        os.close(lock)
    raise DataError(busy)


def _existing(out: Path, runs: list[RunFile], config: PrepareConfig) -> dict[str, dict[str, Any]]:
    """Entries of the store that is already there.

    Raises:
        DataError: it holds other runs that were prepared with other settings: mixing them would
            feed a model two kinds of data.
    """
    if not (out / INDEX).exists():
        return {}
    try:
        entries = {e["name"]: e for e in read_index(out)}
    except CorruptStoreError as error:
        log.warning("%s; it is built anew", error)
        return {}
    asked = {str(run.key) for run in runs}
    settings = settings_of(config, runs[0].layout)
    for name, entry in entries.items():
        theirs = entry["fingerprint"]["settings"]
        if name not in asked and theirs != settings:
            both = {**theirs, **settings}
            keys = sorted(k for k in both if settings.get(k) != theirs.get(k))
            raise DataError(
                f"{out} holds {name}, prepared with other settings ({', '.join(keys)}), and this "
                f"call does not renew it: give another folder for the store"
            )
    return entries


def _publish(
    out: Path,
    source: Path,
    entries: list[dict[str, Any]],
    staged: list[str],
    old: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Move the staged subjects in place and write the index, last; returns what it lists.

    A staged subject never takes the name of a file that the published index ``old`` refers to: the
    old store is whole until the new index replaces the old one, in one step.
    """
    from fmrizoo import __version__

    participants = participants_of(source)
    taken = {e["file"] for e in old.values()}
    places: dict[str, str] = {}
    for name in staged:
        places[name] = free_name(name, taken)
        taken.add(places[name])
    entries = [{**e, "file": places.get(e["file"], e["file"])} for e in entries]
    try:
        for name in staged:
            os.replace(out / STAGING / name, out / places[name])
        if participants is not None:
            write_atomic(out / PARTICIPANTS, participants.read_bytes())
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror}") from error
    write_index(out, entries, __version__)
    for leftover in (out / STAGING).glob("sub-*.h5"):
        leftover.unlink()  # subjects staged by an earlier call that this one did not ask for
    return entries


def participants_of(source: Path) -> Path | None:
    """participants.tsv of a source, if it has one."""
    folder = source if source.is_dir() else source.parent
    file = folder / PARTICIPANTS
    if not file.is_file() and folder.parent.name == "derivatives":
        file = folder.parent.parent / PARTICIPANTS  # fMRIPrep leaves it in the raw folder
    return file if file.is_file() else None


def free_name(name: str, taken: Iterable[str]) -> str:
    """``sub-1.h5``, or if that is taken ``sub-1@2.h5``, ``sub-1@3.h5``, …"""
    stem = name.partition("@")[0].removesuffix(".h5")
    names = (f"{stem}@{k}.h5" if k > 1 else f"{stem}.h5" for k in itertools.count(1))
    return next(n for n in names if n not in taken)


def leftovers(out: Path, entries: Iterable[dict[str, Any]]) -> list[Path]:
    """Files of indexed subjects that the index does not list: replaced, or never published."""
    listed = {e["file"] for e in entries}
    stems = {n.partition("@")[0].removesuffix(".h5") for n in listed}
    return sorted(
        path
        for path in out.glob("sub-*.h5")
        if path.name not in listed and path.name.partition("@")[0].removesuffix(".h5") in stems
    )


def _remove_replaced(
    out: Path, published: list[dict[str, Any]], old: dict[str, dict[str, Any]]
) -> None:
    """Remove what the new index does not need any more."""
    gone = {out / e["file"] for e in old.values()} - {out / e["file"] for e in published}
    for path in sorted({*gone, *leftovers(out, published)}):
        path.unlink(missing_ok=True)

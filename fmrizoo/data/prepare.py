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
from fmrizoo.data.hdf5 import SubjectWriter
from fmrizoo.data.process import fingerprint, process, settings_of
from fmrizoo.data.reader import RunReader
from fmrizoo.data.sample import resolve_source
from fmrizoo.data.store import INDEX, PARTICIPANTS, read_index, write_index
from fmrizoo.errors import CorruptStoreError, DataError, FmrizooError
from fmrizoo.files import PART, write_atomic

log = logging.getLogger(__name__)

STAGING = ".staging"


@dataclass(frozen=True)
class ProgressEvent:
    """One run is done: ``state`` is prepared, kept or skipped."""

    done: int
    total: int
    run: str
    state: str


@dataclass(frozen=True)
class Skipped:
    """A run that could not be prepared, and why."""

    run: str
    file: str
    reason: str


@dataclass
class PrepareReport:
    """What ``prepare`` did.

    Attributes:
        store: The folder.
        prepared, kept: Names of runs written now, and of runs that were already there.
        skipped: Runs left out (only with ``skip_bad``).
    """

    store: Path
    prepared: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


@dataclass
class _Job:
    """What the steps of one ``prepare`` share."""

    out: Path
    config: PrepareConfig
    report: PrepareReport
    total: int
    on_progress: Callable[[ProgressEvent], None] | None

    def note(self, run: str, state: str) -> None:
        r = self.report
        done = len(r.prepared) + len(r.kept) + len(r.skipped)
        if self.on_progress is not None:
            self.on_progress(ProgressEvent(done, self.total, run, state))


def prepare(
    source: str | Path,
    out: Path,
    config: PrepareConfig,
    *,
    skip_bad: bool = False,
    on_progress: Callable[[ProgressEvent], None] | None = None,
) -> PrepareReport:
    """Write the runs of ``source`` into the store ``out`` (added to, if it is one already).

    Args:
        source: BIDS folder, fMRIPrep folder, TSV of files (see :func:`find_runs`), or
            ``sample:haxby2001``.
        out: Folder of the store.
        config: Space, mask, TR, codec.
        skip_bad: Publish the good runs even if others cannot be used.
        on_progress: Called after every run.

    Returns:
        What was prepared, kept and skipped. Runs whose sources and settings have not changed
        since an earlier ``prepare`` are kept as they are.

    Raises:
        DataError: nothing to prepare, runs that cannot be used (all are listed; nothing is
            published), a store made with other settings, a full or read-only disk.
    """
    if config.confounds is not None:
        check_strategy(config.confounds)
    folder = resolve_source(source)
    runs = find_runs(folder, config)
    job = _Job(out, config, PrepareReport(out), len(runs), on_progress)
    with locked(out):
        old = _existing(out, runs, config)
        subjects: dict[str, list[RunFile]] = {}
        for run in runs:
            subjects.setdefault(run.key.subject, []).append(run)
        entries = [e for e in old.values() if e["key"]["subject"] not in subjects]
        staged: list[str] = []
        for subject, files in subjects.items():
            done, moved = _subject(job, subject, files, old)
            entries += done
            staged += moved
        _check_bad(job.report, skip_bad)
        published = _publish(out, folder, entries, staged, old)
        left = {e["key"]["subject"] for e in published}
        for subject in sorted({e["key"]["subject"] for e in old.values()} - left):
            log.warning("%s: sub-%s has no usable run any more and is removed", out, subject)
        _remove_replaced(out, published, old)
    return job.report


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


# --- one subject ----------------------------------------------------------------------------------


def _subject(
    job: _Job, subject: str, files: list[RunFile], old: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The index entries of one subject, and the file to move from staging (none if unchanged)."""
    name = f"sub-{subject}.h5"
    published = {n: e for n, e in old.items() if e["key"]["subject"] == subject}
    home = job.out / next((e["file"] for e in published.values()), name)
    staged_file = job.out / STAGING / name
    sources = [(home, published), (staged_file, _staged(staged_file))]
    wanted: list[tuple[RunFile, dict[str, Any]]] = []
    reuse: dict[str, tuple[Path, dict[str, Any]]] = {}
    for run in files:
        try:
            prints = fingerprint(run, job.config)
        except (DataError, OSError) as error:
            _skip(job, run, error)
            continue
        wanted.append((run, prints))
        for path, entries in sources:
            entry = entries.get(str(run.key))
            if entry and entry["fingerprint"] == prints and _intact(path, entry):
                reuse[str(run.key)] = (path, entry)
                break
    others = {n: e for n, e in published.items() if n not in {str(r.key) for r in files}}
    if all(reuse.get(str(r.key), (None,))[0] == home for r, _ in wanted) and wanted:
        for run, _ in wanted:
            job.report.kept.append(str(run.key))
            job.note(str(run.key), "kept")
        return [*others.values(), *(reuse[str(r.key)][1] for r, _ in wanted)], []
    for n, e in others.items():
        reuse[n] = (home, e)
    return _write_subject(job, name, wanted, reuse)


def _write_subject(
    job: _Job,
    name: str,
    wanted: list[tuple[RunFile, dict[str, Any]]],
    reuse: dict[str, tuple[Path, dict[str, Any]]],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write ``.staging/<name>`` from the runs of ``reuse`` (copied) and the rest of ``wanted``."""
    path = job.out / STAGING / name
    writer = SubjectWriter(path, name.removeprefix("sub-").removesuffix(".h5"))
    wanted_names = {str(run.key) for run, _ in wanted}
    with writer:
        for run_name, (source, entry) in reuse.items():
            writer.copy(source, entry)
            if run_name in wanted_names:
                job.report.kept.append(run_name)
                job.note(run_name, "kept")
        for run, prints in wanted:
            if str(run.key) in reuse:
                continue
            try:
                meta, encoded, mask = process(run, job.config)
            except (DataError, OSError) as error:
                _skip(job, run, error)
                continue
            _check_space(job.out, encoded.rows.nbytes)
            writer.add({**meta, "fingerprint": prints}, encoded, mask)
            job.report.prepared.append(str(run.key))
            job.note(str(run.key), "prepared")
    if not writer.entries:
        path.unlink(missing_ok=True)
        return [], []
    return [{**e, "file": name} for e in writer.entries], [name]


def _skip(job: _Job, run: RunFile, error: Exception) -> None:
    reason = str(error) or type(error).__name__
    job.report.skipped.append(Skipped(str(run.key), str(run.path), reason))
    job.note(str(run.key), "skipped")


def _staged(path: Path) -> dict[str, dict[str, Any]]:
    """Entries of a subject that an interrupted ``prepare`` finished; none if unusable."""
    import h5py

    if not path.exists():
        return {}
    entries = {}
    try:
        with h5py.File(path, "r", locking=False) as file:
            names = {n: int(file[n].attrs["meta_crc32"]) for n in file}
        for name, checksum in names.items():
            entries[name] = {**RunReader(path, name).meta, "meta_crc32": checksum}
    except (OSError, KeyError, RuntimeError) as error:
        log.warning("%s is left over from an interrupted prepare and unusable (%s)", path, error)
        return {}
    return entries


def _intact(path: Path, entry: dict[str, Any]) -> bool:
    """Whether every frame of an earlier run still passes its checksum."""
    try:
        reader = RunReader(path, entry["name"], entry["uuid"], entry["meta_crc32"])
        for frame in range(reader.n_frames):
            reader.read_compact(frame, 1)
    except CorruptStoreError as error:
        log.warning("%s; it is prepared again", error)
        return False
    return True


# --- the store folder -----------------------------------------------------------------------------


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One writer (prepare or repair) per store; the lock dies with the process.

    Raises:
        DataError: another writer has it, or the disk fails in any of the steps inside.
    """
    lock = _lock(out)
    try:
        for leftover in [*out.glob(f".*{PART}"), *(out / STAGING).glob(f".*{PART}")]:
            log.warning("removing %s, left by an interrupted prepare", leftover)
            leftover.unlink()
        try:
            yield
        finally:
            # Before the lock is given up: the folder may be another writer's a moment later.
            if not any(p.name != "lock" for p in (out / STAGING).iterdir()):
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
    settings = settings_of(config)
    for name, entry in entries.items():
        theirs = entry["fingerprint"]["settings"]
        if name not in asked and theirs != settings:
            keys = sorted(k for k in settings if settings[k] != theirs.get(k))
            raise DataError(
                f"{out} holds {name}, prepared with other settings ({', '.join(keys)}), and this "
                f"call does not renew it: give another folder for the store"
            )
    return entries


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed + (1 << 20):
        raise DataError(
            f"{out} is full: the next run needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are "
            f"free; free some space and run the same command again; finished subjects are kept"
        )


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

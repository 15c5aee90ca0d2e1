"""One subject of a ``prepare``: what is still good is kept or copied, the rest is made anew.

The result is one file in ``<store>/.staging``, whole or absent. Nothing here touches the published
store, so several processes may each work on a subject of their own.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmrizoo.config import PrepareConfig
from fmrizoo.data.bids import RunFile
from fmrizoo.data.hdf5 import SubjectWriter
from fmrizoo.data.interrupt import shield
from fmrizoo.data.process import fingerprint, process
from fmrizoo.data.reader import RunReader
from fmrizoo.errors import CorruptStoreError, DataError

log = logging.getLogger(__name__)

STAGING = ".staging"

Note = Callable[[str, str], None]  # (run, state) after every run
Entries = dict[str, dict[str, Any]]  # index entries by run name


@dataclass(frozen=True)
class Skipped:
    """A run that could not be prepared, and why."""

    run: str
    file: str
    reason: str


@dataclass(frozen=True)
class SubjectTask:
    """What one subject's file is made from; travels to another process.

    Attributes:
        out: Folder of the store.
        subject: Label without ``sub-``.
        files: The runs asked for.
        published: Entries of the subject in the store as it is; all in one file.
    """

    out: Path
    config: PrepareConfig
    subject: str
    files: list[RunFile]
    published: Entries

    @property
    def name(self) -> str:
        """File name in staging; in the store it may get another (``sub-1@2.h5``)."""
        return f"sub-{self.subject}.h5"

    @property
    def home(self) -> Path:
        """The published file, if there is one."""
        return self.out / next((e["file"] for e in self.published.values()), self.name)


@dataclass
class SubjectResult:
    """What became of one subject.

    Attributes:
        entries: Index entries of all its runs, also of those that this call did not ask for.
        staged: The file to move from staging; empty if the published one stays.
        prepared, kept, skipped: Of the runs asked for.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    staged: str = ""
    prepared: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def prepare_subject(task: SubjectTask, note: Note) -> SubjectResult:
    """Bring one subject's file up to date in staging.

    Raises:
        DataError: the disk is full or cannot be written. Runs that cannot be used are in
            ``skipped`` instead.
    """
    result = SubjectResult()
    published_file = task.home
    staged_file = task.out / STAGING / task.name
    sources = [(published_file, task.published), (staged_file, _staged(staged_file))]
    wanted: list[tuple[RunFile, dict[str, Any]]] = []
    reuse: dict[str, tuple[Path, dict[str, Any]]] = {}
    for run in task.files:
        try:
            prints = fingerprint(run, task.config)
        except (DataError, OSError) as error:
            _skip(result, note, run, error)
            continue
        wanted.append((run, prints))
        for path, entries in sources:
            entry = entries.get(str(run.key))
            if entry and entry["fingerprint"] == prints and _intact(path, entry):
                reuse[str(run.key)] = (path, entry)
                break
    asked = {str(r.key) for r in task.files}
    others = {n: e for n, e in task.published.items() if n not in asked}
    if wanted and all(reuse.get(str(r.key), (None,))[0] == published_file for r, _ in wanted):
        for run, _ in wanted:
            result.kept.append(str(run.key))
            note(str(run.key), "kept")
        result.entries = [*others.values(), *(reuse[str(r.key)][1] for r, _ in wanted)]
        return result
    for n, e in others.items():
        reuse[n] = (published_file, e)
    _write(task, wanted, reuse, result, note)
    return result


def _write(
    task: SubjectTask,
    wanted: list[tuple[RunFile, dict[str, Any]]],
    reuse: dict[str, tuple[Path, dict[str, Any]]],
    result: SubjectResult,
    note: Note,
) -> None:
    """Write the staged file from the runs of ``reuse`` (copied) and the rest of ``wanted``."""
    path = task.out / STAGING / task.name
    wanted_names = {str(run.key) for run, _ in wanted}
    with _writing(path, task.subject) as writer:
        for run_name, (source, entry) in reuse.items():
            with shield():
                writer.copy(source, entry)
            if run_name in wanted_names:
                result.kept.append(run_name)
                note(run_name, "kept")
        for run, prints in wanted:
            if str(run.key) in reuse:
                continue
            try:
                meta, encoded, mask = process(run, task.config)
            except (DataError, OSError) as error:
                _skip(result, note, run, error)
                continue
            _check_space(task.out, encoded.rows.nbytes)
            with shield():
                writer.add({**meta, "fingerprint": prints}, encoded, mask)
            result.prepared.append(str(run.key))
            note(str(run.key), "prepared")
    if not writer.entries:
        path.unlink(missing_ok=True)
        return
    result.entries = [{**e, "file": task.name} for e in writer.entries]
    result.staged = task.name


@contextmanager
def _writing(path: Path, subject: str) -> Iterator[SubjectWriter]:
    """A :class:`SubjectWriter` whose opening and closing no signal interrupts."""
    writer = SubjectWriter(path, subject)
    with shield():
        writer.__enter__()
    try:
        yield writer
    except BaseException:
        with shield():
            writer.__exit__(*sys.exc_info())
        raise
    with shield():
        writer.__exit__(None, None, None)


def _skip(result: SubjectResult, note: Note, run: RunFile, error: Exception) -> None:
    reason = str(error) or type(error).__name__
    result.skipped.append(Skipped(str(run.key), str(run.path), reason))
    note(str(run.key), "skipped")


def _staged(path: Path) -> Entries:
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


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed + (1 << 20):
        raise DataError(
            f"{out} is full: the next run needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are "
            f"free; free some space and run the same command again; finished subjects are kept"
        )

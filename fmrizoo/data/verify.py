"""Comparing every checksum of a store: index, files, metadata, frames, participants.tsv."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmrizoo.data.reader import RunReader
from fmrizoo.data.store import INDEX, PARTICIPANTS, described, read_index_body
from fmrizoo.errors import CorruptStoreError
from fmrizoo.files import PART, canonical, sha256_of

_SHOWN = 8  # frames listed by number in a message; more are counted


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        file: Name inside the store.
        run: Name of the run, empty where the whole file is concerned.
        kind: ``index``, ``missing``, ``extra``, ``metadata``, ``frames`` or ``participants``.
        message: One sentence that names the file.
    """

    file: str
    run: str
    kind: str
    message: str


@dataclass
class Verification:
    """What :func:`verify` read and found.

    Attributes:
        store: The folder.
        findings: What is wrong, by file and run; empty if all is well.
        files, runs, frames: How many were checked.
        bytes: Bytes of the checked files; each was read once.
        seconds: Time it took.
    """

    store: Path
    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    runs: int = 0
    frames: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {
            "store": str(self.store),
            "good": not self.findings,
            "files": self.files,
            "runs": self.runs,
            "frames": self.frames,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "findings": [vars(f) for f in self.findings],
        }


@dataclass(frozen=True)
class _File:
    """What the check of one subject's file gave."""

    findings: list[Finding]
    runs: int
    frames: int
    bytes: int


def verify(
    path: str | Path,
    jobs: int = 4,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Verification:
    """Read every file of a store once and compare all that is recorded about it.

    Checked are the index with its own checksum, each subject's file against the index (missing,
    unfinished, other metadata, runs that only one of them has), the checksums of all metadata and
    of every frame, participants.tsv, and data files that the index does not know. Without an index,
    or with a damaged one, the files are checked on their own word.

    Args:
        path: Folder of the store.
        jobs: Threads; reading and CRC-32 run outside Python's lock.
        on_progress: Called with files done, files in all and the file's name.

    Raises:
        DataError: not a store.
    """
    folder, start = Path(path), time.perf_counter()
    result = Verification(folder)
    body: Mapping[str, Any] | None = None
    try:
        content = read_index_body(folder)
        described(folder, content["runs"])
        body = content
    except CorruptStoreError as error:
        result.findings.append(Finding(INDEX, "", "index", str(error)))
    expected = _by_file(folder, body)
    with ThreadPoolExecutor(jobs) as pool:
        tasks = {pool.submit(_check_file, folder / f, e): f for f, e in expected.items()}
        try:
            for done, task in enumerate(as_completed(tasks), start=1):
                _add(result, task.result())
                if on_progress is not None:
                    on_progress(done, len(tasks), tasks[task])
        except BaseException:  # Ctrl-C: do not read on to the end of the store
            pool.shutdown(cancel_futures=True)
            raise
    if body is not None:
        result.findings += _participants(folder, body)
        result.findings += _extra(folder, expected)
    for name in (INDEX, PARTICIPANTS):
        if (folder / name).is_file():
            result.files += 1
            result.bytes += (folder / name).stat().st_size
    result.findings.sort(key=lambda f: (f.file != INDEX, f.file, f.run))
    result.seconds = time.perf_counter() - start
    return result


def confirmed(path: str | Path, findings: Sequence[Finding]) -> list[Finding]:
    """Those of ``findings`` that are still there when their subjects' files are read once more.

    A disk that failed for a moment leaves a finding like damage does. Findings about the index,
    ``participants.tsv`` and files that the index does not know are kept as they are.
    """
    folder = Path(path)
    lost = any(f.file == INDEX for f in findings)
    expected = _by_file(folder, None if lost else read_index_body(folder))
    doubtful = sorted({f.file for f in findings} & expected.keys())
    kept = [f for f in findings if f.file not in doubtful]
    return kept + [
        f for name in doubtful for f in _check_file(folder / name, expected[name]).findings
    ]


def _by_file(
    folder: Path, body: Mapping[str, Any] | None
) -> dict[str, list[dict[str, Any]] | None]:
    """Index entries by file; None for a file whose entries are not known."""
    if body is None:
        return {path.name: None for path in sorted(folder.glob("sub-*.h5"))}
    found: dict[str, list[dict[str, Any]] | None] = {}
    for entry in body["runs"]:
        listed = found.setdefault(entry["file"], [])
        assert listed is not None
        listed.append(entry)
    return found


def _add(result: Verification, one: _File) -> None:
    result.findings += one.findings
    result.files += 1
    result.runs += one.runs
    result.frames += one.frames
    result.bytes += one.bytes


def _check_file(path: Path, entries: Sequence[Mapping[str, Any]] | None) -> _File:
    """One subject's file against its entries (None: on its own word)."""
    name = path.name
    if not os.path.exists(path):  # False also for a name that no file system takes
        said = f"{path} is missing: {len(entries or ())} runs of the index are lost"
        return _File([Finding(name, "", "missing", said)], 0, 0, 0)
    findings: list[Finding] = []
    inside: list[str] | None = None
    try:
        inside = run_names(path)
    except CorruptStoreError as error:
        findings.append(Finding(name, "", "metadata", str(error)))
    if entries is None:
        entries = [{"name": run} for run in inside or ()]
    elif inside is not None:
        for run in sorted(set(inside) - {e["name"] for e in entries}):
            said = f"{path} holds run {run}, which the index does not list"
            findings.append(Finding(name, run, "index", said))
    frames = 0
    # Where the whole file cannot be opened, one sentence says it for all runs.
    for entry in entries if inside is not None else ():
        found, n_frames = _check_run(path, entry)
        findings += found
        frames += n_frames
    return _File(findings, len(entries), frames, path.stat().st_size)


def _check_run(path: Path, entry: Mapping[str, Any]) -> tuple[list[Finding], int]:
    run = str(entry["name"])
    try:
        reader = RunReader(path, run, entry.get("uuid"), entry.get("meta_crc32"))
    except CorruptStoreError as error:
        return [Finding(path.name, run, "metadata", str(error))], 0
    findings = []
    if "uuid" in entry:
        recorded = {k: v for k, v in entry.items() if k not in ("file", "meta_crc32")}
        if canonical(recorded) != canonical(reader.meta):
            said = f"{path}, run {run}: the index says other things than the file: run repair"
            findings.append(Finding(path.name, run, "index", said))
    bad = list(reader.bad_frames())
    if len(bad) == 1:
        findings.append(Finding(path.name, run, "frames", str(bad[0][1])))
    elif bad:
        some = ", ".join(str(t) for t, _ in bad[:_SHOWN]) + (", …" if len(bad) > _SHOWN else "")
        said = f"{path}, run {run}: {len(bad)} of {reader.n_frames} frames fail ({some})"
        findings.append(Finding(path.name, run, "frames", said))
    return findings, reader.n_frames


def run_names(path: Path) -> list[str]:
    """Names of the runs inside a subject's file.

    Raises:
        CorruptStoreError: it cannot be opened.
    """
    import h5py

    if not path.is_file():
        raise CorruptStoreError(f"{path} is not a file")
    try:
        with h5py.File(path, "r", locking=False) as file:
            return sorted(file)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CorruptStoreError(f"{path} cannot be opened ({error})") from None


def _participants(folder: Path, body: Mapping[str, Any]) -> Iterable[Finding]:
    file, recorded = folder / PARTICIPANTS, body.get("participants_sha256")
    if recorded is None:  # none, or a store from before it was recorded
        return
    if not file.is_file():
        yield Finding(PARTICIPANTS, "", "participants", f"{file} is missing")
    elif sha256_of(file) != recorded:
        said = f"{file} was changed after prepare (its checksum differs)"
        yield Finding(PARTICIPANTS, "", "participants", said)


def _extra(folder: Path, expected: Iterable[str]) -> Iterable[Finding]:
    """Data files that the index does not list, and torn ones; other files are not the store's."""
    known = set(expected)
    for path in sorted(folder.iterdir()):
        if path.name.endswith(PART):
            yield Finding(path.name, "", "extra", f"{path} was left by a writer that was stopped")
        elif path.suffix == ".h5" and path.name not in known:
            yield Finding(path.name, "", "extra", f"{path} is not in the index")

"""Bringing damaged subjects back from the source, under the settings that the store recorded."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fmrizoo.config import PrepareConfig
from fmrizoo.data.bids import RunFile, find_runs
from fmrizoo.data.hdf5 import SubjectWriter, write_error
from fmrizoo.data.prepare import free_name, leftovers, locked, participants_of
from fmrizoo.data.process import fingerprint, process, settings_of
from fmrizoo.data.reader import RunReader
from fmrizoo.data.sample import resolve_source
from fmrizoo.data.store import INDEX, PARTICIPANTS, described, read_index_body, write_index
from fmrizoo.data.subject import STAGING
from fmrizoo.data.verify import Finding, Verification, confirmed, run_names, verify
from fmrizoo.errors import CorruptStoreError, DataError, RecipeError
from fmrizoo.files import PART, sha256_of, write_atomic

Entry = dict[str, Any]


@dataclass
class RepairReport:
    """What ``repair`` found and did.

    Attributes:
        store: The folder.
        findings: What :func:`fmrizoo.data.verify.verify` found before.
        restored: Files whose content is again what the index recorded, checksum for checksum.
        renewed: Files prepared again whose checksums differ from the recorded ones (another
            version of fmrizoo or of a library); the index was renewed with them.
        removed: Files that no index lists, left by stopped writers.
        others: What else was put right: the index, participants.tsv.
        refused: Why something cannot be repaired, one sentence each (only in a dry run;
            otherwise they are raised).
        dry_run: Nothing was written.
        after: The verification at the end; None in a dry run.
    """

    store: Path
    findings: list[Finding]
    restored: list[str] = field(default_factory=list)
    renewed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    dry_run: bool = False
    after: Verification | None = None


@dataclass
class _Plan:
    """What will be written: the runs of each bad file, with their recorded entries."""

    files: dict[str, list[tuple[RunFile, Entry, PrepareConfig]]] = field(default_factory=dict)
    participants: bytes | None = None
    refused: list[str] = field(default_factory=list)


def repair(
    store: str | Path,
    source: str | Path,
    *,
    dry_run: bool = False,
    mask: Path | None = None,
    jobs: int = 4,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> RepairReport:
    """Verify a store, prepare its bad subjects again from ``source``, and verify it again.

    Good subjects' files are not touched. A repaired file keeps the recorded identity of its runs
    if their checksums come out as recorded: it then holds the very same values as before.

    Args:
        store: Folder of the store.
        source: What it was prepared from (as in :func:`fmrizoo.data.prepare.prepare`).
        dry_run: Say what would be done and write nothing.
        mask: The mask file, where ``prepare.mask`` was a file.
        jobs: Threads of the verification.
        on_progress: Called with runs done, runs in all and the run's name.

    Raises:
        DataError: the source is not the one that was recorded (each file is listed; nothing was
            written), a damaged file that no index describes, another writer at work.
        CorruptStoreError: something is still wrong afterwards.
    """
    path, folder = Path(store), resolve_source(source)
    index = _index_bytes(path)
    before = verify(path, jobs)
    report = RepairReport(path, before.findings, dry_run=dry_run)
    if not before.findings:
        report.after = None if dry_run else before
        return report
    if dry_run:
        _repair(report, folder, mask, on_progress)
        return report
    with locked(path):
        if _index_bytes(path) != index:
            raise DataError(f"{path} was written to meanwhile: run repair again")
        # A good file must not be written anew because the disk failed to open it once.
        report.findings = confirmed(path, before.findings)
        _repair(report, folder, mask, on_progress)
    report.after = verify(path, jobs)
    if report.after.findings:
        raise CorruptStoreError(_listing(f"{path} is repaired but for", report.after.findings))
    return report


def _index_bytes(path: Path) -> bytes | None:
    try:
        return (path / INDEX).read_bytes() if (path / INDEX).is_file() else None
    except OSError:  # verify says that it cannot be read
        return None


def _listing(title: str, findings: Sequence[Finding]) -> str:
    return title + ":\n" + "\n".join(f"  {f.message}" for f in findings)


def _repair(
    report: RepairReport,
    folder: Path,
    mask: Path | None,
    on_progress: Callable[[int, int, str], None] | None,
) -> None:
    path = report.store
    rebuilt = any(f.file == INDEX for f in report.findings)
    body = _rebuilt(report) if rebuilt else read_index_body(path)
    entries: list[Entry] = list(body["runs"])
    bad = sorted({e["file"] for e in entries} & {f.file for f in report.findings})
    plan = _plan(bad, entries, folder, mask)
    if rebuilt or any(f.file == PARTICIPANTS for f in report.findings):
        _plan_participants(plan, path, folder, body.get("participants_sha256"))
    torn = [path / f.file for f in report.findings if f.file.endswith(PART)]
    useless = sorted({*leftovers(path, entries), *torn})
    if report.dry_run:
        report.refused, report.restored = plan.refused, bad
        report.removed = [p.name for p in useless]
        report.others = _others(rebuilt, plan)
        return
    if plan.refused:
        raise DataError(
            f"{path} cannot be repaired from {folder}, and nothing was written:\n"
            + "\n".join(f"  {line}" for line in plan.refused)
        )
    changed = _write_files(report, plan, entries, on_progress)
    if plan.participants is not None:
        write_atomic(path / PARTICIPANTS, plan.participants)
    if changed or rebuilt:
        from fmrizoo import __version__

        write_index(path, [{**e, **changed.get(e["name"], {})} for e in entries], __version__)
        entries = list(read_index_body(path)["runs"])
        useless = sorted({*useless, *leftovers(path, entries)})
    report.others = _others(rebuilt, plan)
    for file in useless:
        file.unlink(missing_ok=True)
        report.removed.append(file.name)


def _others(rebuilt: bool, plan: _Plan) -> list[str]:
    return [INDEX] * rebuilt + [PARTICIPANTS] * (plan.participants is not None)


# --- what is to be done ---------------------------------------------------------------------------


def _rebuilt(report: RepairReport) -> dict[str, Any]:
    """The content of a missing or damaged index, from the files' own checksummed metadata.

    A file of which frames are damaged still says what it holds, and is prepared again like others.

    Raises:
        DataError: the metadata of a file are damaged too: nothing says any more what it held.
    """
    path = report.store
    if lost := [f for f in report.findings if f.file != INDEX and f.kind != "frames"]:
        raise DataError(
            _listing(
                f"{path / INDEX} is missing or damaged, and nothing says any more what these files "
                "held (move them out of the folder, run repair again, and then prepare, which adds "
                "their subjects anew)",
                lost,
            )
        )
    entries: list[Entry] = []
    for file in sorted(path.glob("sub-*.h5")):
        for name in run_names(file):
            reader = RunReader(file, name)
            entries.append({**reader.meta, "meta_crc32": reader.meta_crc32, "file": file.name})
    holders: dict[str, str] = {}
    for entry in entries:
        other = holders.setdefault(entry["name"], entry["file"])
        if other != entry["file"]:
            raise DataError(
                f"{path / INDEX} is missing or damaged, and both {other} and {entry['file']} hold "
                f"run {entry['name']}: move the one that is not wanted out of the folder"
            )
    described(path, entries)
    if not entries:
        raise DataError(f"{path / INDEX} is damaged and there are no files: run prepare")
    return {"runs": entries}


def _plan(bad: Sequence[str], entries: Sequence[Entry], source: Path, mask: Path | None) -> _Plan:
    """Each run of the ``bad`` files with its place in the source, or why that cannot be used."""
    plan = _Plan()
    chosen = [e for e in entries if e["file"] in bad]
    found: dict[str, dict[str, RunFile]] = {}
    for entry in chosen:
        name = entry["name"]
        try:
            config = recorded_config(entry, mask)
            kind = repr(sorted(asdict(config).items()))
            if kind not in found:
                subjects = "|".join(sorted({e["key"]["subject"] for e in chosen}))
                config.select = {"subject": subjects}
                found[kind] = {str(run.key): run for run in find_runs(source, config)}
            if name not in found[kind]:
                raise DataError(f"{source} has no run {name}")
            run = found[kind][name]
            plan.refused += _differences(entry, run, config)
            plan.files.setdefault(entry["file"], []).append((run, entry, config))
        except DataError as error:
            if str(error) not in plan.refused:
                plan.refused.append(str(error))
    return plan


def recorded_config(entry: Mapping[str, Any], mask: Path | None = None) -> PrepareConfig:
    """The ``prepare`` section that a run was made with, from its recorded fingerprint.

    Raises:
        DataError: settings of another version, or a mask file that must be given (``mask``).
    """
    settings = dict(entry["fingerprint"]["settings"])
    settings.pop("format", None)
    known = {f.name for f in fields(PrepareConfig)}
    if unknown := sorted(set(settings) - known):
        raise DataError(
            f"run {entry['name']} was prepared by another version of fmrizoo (setting "
            f"{unknown[0]}): repair with that version, or prepare the store anew"
        )
    if settings.get("mask") == "file":
        if mask is None:
            raise DataError(
                f"run {entry['name']} was prepared with a mask file: give it with --mask"
            )
        settings["mask"] = str(mask)
    if "grid" in settings:
        settings["grid"] = [int(v) for v in settings["grid"]]
    try:
        # Header and sidecar may disagree: then the sidecar was followed, or there were no run.
        return PrepareConfig(**settings, on_tr_conflict="sidecar")
    except (RecipeError, TypeError) as error:
        raise DataError(f"run {entry['name']} has unusable recorded settings: {error}") from None


def _differences(entry: Entry, run: RunFile, config: PrepareConfig) -> list[str]:
    """Why ``run`` is not what the entry was made from, one sentence a file."""
    recorded = entry["fingerprint"]
    if settings_of(config) != recorded["settings"]:
        return [
            f"run {entry['name']} was prepared by another version of fmrizoo (format "
            f"{recorded['settings'].get('format')}): prepare the store anew"
        ]
    now = fingerprint(run, config)
    files = {"bold": run.path, "events": run.events, "confounds": run.confounds}
    files["mask"] = run.mask if config.mask == "auto" else Path(config.mask)
    said = []
    for part, before in sorted(recorded["sha256"].items()):
        after = now["sha256"].get(part)
        if before != after:
            what = files.get(part) or f"no {part} file of {run.path}"
            said.append(f"{what}: {_short(after)} now, {_short(before)} when it was prepared")
    if now["tr"] != recorded["tr"]:
        said.append(f"{run.path}: sidecar's TR is {now['tr']} now, {recorded['tr']} before")
    return said


def _short(checksum: str | None) -> str:
    return f"SHA-256 {checksum[:12]}…" if checksum else "none"


def _plan_participants(plan: _Plan, store: Path, source: Path, recorded: str | None) -> None:
    file = participants_of(source)
    if file is None:
        if recorded is not None:
            plan.refused.append(f"{source} has no {PARTICIPANTS}")
    elif recorded is not None and sha256_of(file) != recorded:
        plan.refused.append(
            f"{file}: {_short(sha256_of(file))} now, {_short(recorded)} when it was prepared"
        )
    elif not (store / PARTICIPANTS).is_file() or sha256_of(store / PARTICIPANTS) != sha256_of(file):
        plan.participants = file.read_bytes()


# --- writing --------------------------------------------------------------------------------------


def _write_files(
    report: RepairReport,
    plan: _Plan,
    entries: Sequence[Entry],
    on_progress: Callable[[int, int, str], None] | None,
) -> dict[str, Entry]:
    """Write the bad files anew; what changes in the index, by run."""
    path = report.store
    total, done = sum(map(len, plan.files.values())), 0
    changed: dict[str, Entry] = {}
    taken = {e["file"] for e in entries}
    for name, runs in plan.files.items():

        def note(run: str) -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(min(done, total), total, run)

        staged = path / STAGING / f".repair-{name}{PART}"  # the next writer removes it after a kill
        written = _write_file(staged, runs, {}, note)
        same = {e["name"]: e["meta_crc32"] for _, e, _ in runs} == {
            e["name"]: e["meta_crc32"] for e in written
        }
        place = name
        if not same:
            # Other bytes under an old identity would be a lie: these are new runs.
            fresh = {e["name"]: uuid.uuid4().hex for _, e, _ in runs}
            written = _write_file(staged, runs, fresh, note)
            place = free_name(name, taken)
            taken.add(place)
            changed |= {e["name"]: {**e, "file": place} for e in written}
        try:
            os.replace(staged, path / place)
        except OSError as error:
            raise write_error(path / place, error) from error
        (report.restored if same else report.renewed).append(place)
    return changed


def _write_file(
    staged: Path,
    runs: Sequence[tuple[RunFile, Entry, PrepareConfig]],
    uuids: Mapping[str, str],
    note: Callable[[str], None],
) -> list[Entry]:
    """One subject's file from its sources; runs not in ``uuids`` get their recorded identity."""
    writer = SubjectWriter(staged, runs[0][1]["key"]["subject"])
    with writer:
        for run, entry, config in runs:
            meta, encoded, mask = process(run, config)
            meta |= {"uuid": uuids.get(entry["name"], entry["uuid"])}
            writer.add({**meta, "fingerprint": fingerprint(run, config)}, encoded, mask)
            note(entry["name"])
    return writer.entries

"""Which runs a BIDS folder, an fMRIPrep folder or a TSV of files holds, and what belongs to each.

The inheritance rule of BIDS is followed: a sidecar, events or mask file applies to every run whose
entities include all of its own; the nearest folder and the most entities win.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fmrizoo.config import PrepareConfig
from fmrizoo.data.store import matches, read_table, records
from fmrizoo.errors import DataError
from fmrizoo.registry import suggest
from fmrizoo.types import RunKey

log = logging.getLogger(__name__)

_NIFTI = (".nii.gz", ".nii")
_NAMED = {"ses": "session", "task": "task", "acq": "acquisition", "run": "run"}
_NOT_IDENTITY = ("space", "desc")  # say how a file was made, not which recording it is
_VERSIONS = ("res", "den", "rec", "part")  # entities by which files of one recording differ
LAYOUTS = ("auto", "bids", "hcp", "swift", "hdf5")
LABEL = re.compile(r"[\w.+-]+")
_COLUMNS = (
    "path",
    "subject",
    "session",
    "task",
    "acquisition",
    "run",
    "tr",
    "mask",
    "events",
    "confounds",
)


@dataclass(frozen=True)
class RunFile:
    """One run to prepare.

    Attributes:
        key: BIDS identity.
        path: The 4D NIfTI file.
        mask: Its brain mask, if one was found.
        tr: RepetitionTime of the sidecar (or the TSV's column), seconds.
        events: events.tsv, if there is one.
        confounds: fMRIPrep's confounds table, if there is one.
        motion: HCP's Movement_Regressors.txt, if there is one.
        layout: ``nifti``; ``swift`` or ``hdf5`` (:mod:`fmrizoo.data.legacy`; ``path`` may then be
            a folder); ``synth`` (``path`` is the cohort's synth.json, from which runs are made).
    """

    key: RunKey
    path: Path
    mask: Path | None = None
    tr: float | None = None
    events: Path | None = None
    confounds: Path | None = None
    motion: Path | None = None
    layout: str = "nifti"


@dataclass(frozen=True)
class _File:
    """A BIDS file name taken apart."""

    path: Path
    entities: Mapping[str, str]
    suffix: str

    def applies_to(self, other: _File) -> bool:
        """Whether all entities but ``desc`` also stand in ``other``'s name."""
        return all(other.entities.get(k) == v for k, v in self.entities.items() if k != "desc")


def parse_name(path: Path) -> tuple[dict[str, str], str]:
    """``sub-01_task-rest_bold.nii.gz`` → ({sub: 01, task: rest}, bold)."""
    stem = path.name
    for ending in (*_NIFTI, ".json", ".tsv"):
        stem = stem.removesuffix(ending)
    *parts, suffix = stem.split("_")
    return dict(p.split("-", 1) for p in parts if "-" in p), suffix


def _file(path: Path) -> _File:
    entities, suffix = parse_name(path)
    return _File(path, entities, suffix)


def _key(entities: Mapping[str, str]) -> RunKey:
    extra = tuple(
        sorted((k, v) for k, v in entities.items() if k not in ("sub", *_NAMED, *_NOT_IDENTITY))
    )
    subject, session, task, acquisition, run = (entities.get(k, "") for k in ("sub", *_NAMED))
    return RunKey(subject, session, task, acquisition, run, extra)


def find_runs(source: Path, config: PrepareConfig, layout: str = "auto") -> list[RunFile]:
    """Every run of ``source`` that ``config.space`` and ``config.select`` ask for, in name order.

    Args:
        source: A BIDS raw folder, an fMRIPrep derivatives folder, subjects as the HCP lays them out
            (:mod:`fmrizoo.data.hcp`), the synth.json of a synthetic cohort, or a ``.tsv`` with the
            columns ``path`` and ``subject`` and any of session, task, acquisition, run, tr, mask,
            events, confounds (paths relative to the TSV).

        layout: One of ``LAYOUTS``; ``auto`` looks what is there.

    Raises:
        DataError: nothing found (with what was looked for), two files for one run (all are listed),
            single echoes, a TSV without the needed columns or naming a missing file.
    """
    runs = _all_runs(source, config, layout)
    if not runs:
        raise DataError(f"{source} lists no run")
    chosen = [run for run in runs if matches(run.key, config.select)]
    if not chosen:
        raise DataError(
            f"none of the {len(runs)} runs in {source} matches prepare.select="
            f"{dict(config.select)}; the first is {runs[0].key}"
        )
    chosen.sort(key=lambda run: str(run.key))
    for one, other in itertools.pairwise(chosen):
        if str(one.key) == str(other.key):  # an entity without a value is none
            raise DataError(
                f"{one.path} and {other.path} are both run {one.key}: keep one of them out with "
                f"prepare.select"
            )
    _refuse_echoes(chosen, config)
    _refuse_versions(chosen)
    return chosen


def _all_runs(source: Path, config: PrepareConfig, layout: str) -> list[RunFile]:
    from fmrizoo.data.hcp import find_hcp_runs, is_hcp
    from fmrizoo.data.legacy import find_legacy_runs, legacy_layout
    from fmrizoo.data.synthetic.source import find_synthetic
    from fmrizoo.data.synthetic.truth import SYNTH

    if layout not in LAYOUTS:
        raise DataError(f"layout {layout!r} is not known.{suggest(layout, list(LAYOUTS))}")
    if source.is_file():
        if layout != "auto":
            raise DataError(f"{source} is a file: layout {layout} is one of folders")
        if source.name == SYNTH:
            return find_synthetic(source, config)
        return _from_table(source)
    if layout == "auto":
        layout = "bids" if any(source.glob("sub-*/**/*_bold.nii*")) else ""
        layout = layout or ("hcp" if is_hcp(source) else legacy_layout(source)) or "bids"
    if layout == "hcp":
        return find_hcp_runs(source, config)
    if layout in ("swift", "hdf5"):
        return find_legacy_runs(source, layout)
    return _from_folder(source, config)


def _refuse_echoes(runs: list[RunFile], config: PrepareConfig) -> None:
    echoes = [run for run in runs if "echo" in dict(run.key.extra)]
    if echoes and "echo" not in config.select:
        raise DataError(
            f"{echoes[0].path} is one echo of a multi-echo run ({len(echoes)} such files): combine "
            f"the echoes first (fMRIPrep and tedana do) and prepare the result, or pick one on "
            f"purpose with prepare.select.echo=2"
        )


def _refuse_versions(runs: list[RunFile]) -> None:
    """Two files that differ in how they were made are one recording: it would count twice."""
    found: dict[RunKey, list[RunFile]] = {}
    for run in runs:
        bare = tuple(pair for pair in run.key.extra if pair[0] not in _VERSIONS)
        found.setdefault(replace(run.key, extra=bare), []).append(run)
    several = [files for files in found.values() if len(files) > 1]
    if several:
        first = several[0]
        listing = "\n".join(f"  {run.path}" for run in first)
        keys = [k for k in _VERSIONS if len({dict(run.key.extra).get(k) for run in first}) > 1]
        value = dict(first[0].key.extra).get(keys[0], "")
        raise DataError(
            f"{len(several)} of {len(found)} recordings have several files that match, such as\n"
            f"{listing}\npick one kind, such as prepare.select.{keys[0]}={value}"
        )


# --- a folder -------------------------------------------------------------------------------------


def _from_folder(source: Path, config: PrepareConfig) -> list[RunFile]:
    subjects = sorted(p for p in source.glob("sub-*") if p.is_dir())
    bolds = [_file(p) for s in subjects for p in _niftis(s, "bold")]
    bolds = [b for b in bolds if "func" in b.path.parts or b.path.parent == source]
    wanted = [b for b in bolds if _fits(b, config)]
    if not wanted:
        raise DataError(_nothing(source, bolds, config))
    roots = [source]
    if source.parent.name == "derivatives":  # fMRIPrep leaves the events in the raw folder
        roots.insert(0, source.parent.parent)
    masks = _masks(source, subjects)
    return [_run(b, roots, masks.get(b.entities.get("sub", ""), ())) for b in wanted]


def _niftis(folder: Path, suffix: str) -> Iterator[Path]:
    for path in sorted(folder.rglob(f"*_{suffix}.nii*")):
        if path.name.endswith(_NIFTI):
            yield path


def _fits(bold: _File, config: PrepareConfig) -> bool:
    same = bold.entities.get("space", "native") == config.space
    return same and bold.entities.get("desc", "preproc") == config.desc


def _nothing(source: Path, bolds: list[_File], config: PrepareConfig) -> str:
    looked = f"{source}/sub-*/**/func/*_bold.nii[.gz]"
    if not bolds:
        return f"no BOLD run in {source}: looked for {looked}. Is it a BIDS folder, or a .tsv?"
    spaces = sorted({b.entities.get("space", "native") for b in bolds})
    if config.space in spaces:
        descs = {
            b.entities.get("desc", "preproc")
            for b in bolds
            if b.entities.get("space", "native") == config.space
        }
        return (
            f"{len(bolds)} BOLD runs in {source}, none in space {config.space!r} with desc "
            f"{config.desc!r}: found {', '.join(sorted(descs))}. Set prepare.desc to one of these"
        )
    return (
        f"{len(bolds)} BOLD runs in {source}, none in space {config.space!r}: found "
        f"{', '.join(spaces)} (native = no space entity, as in raw BIDS). Set prepare.space to one "
        f"of these"
    )


def _masks(source: Path, subjects: list[Path]) -> dict[str, list[_File]]:
    """Brain masks by subject, also those of derivatives inside a raw folder."""
    found: dict[str, list[_File]] = {}
    inside = source.glob("derivatives/*/sub-*")
    for folder in [*subjects, *sorted(p for p in inside if p.is_dir())]:
        for file in _brain_masks(_niftis(folder, "mask")):
            found.setdefault(file.entities.get("sub", ""), []).append(file)
    return found


def _brain_masks(paths: Iterable[Path]) -> list[_File]:
    return [f for f in map(_file, paths) if f.entities.get("desc", "brain") == "brain"]


def run_file(path: Path) -> RunFile:
    """One NIfTI file with the mask, sidecar, events and confounds that BIDS gives it.

    In no BIDS folder (no ``sub-*`` above it) only the files beside it are looked at.

    Raises:
        DataError: no such file, another ending, two masks that fit, an unusable sidecar.
    """
    path = path.absolute()
    if not path.name.endswith(_NIFTI):
        raise DataError(f"{path} is no NIfTI file by its name (.nii or .nii.gz)")
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    subject = next((p for p in reversed(path.parents) if p.name.startswith("sub-")), None)
    if subject is None:
        beside = [p for p in sorted(path.parent.glob("*_mask.nii*")) if p.name.endswith(_NIFTI)]
        return _run(_file(path), [path.parent], _brain_masks(beside))
    root = subject.parent
    roots = [root.parent.parent, root] if root.parent.name == "derivatives" else [root]
    folders = [subject, *sorted(root.glob(f"derivatives/*/{subject.name}"))]
    return _run(_file(path), roots, _brain_masks(p for f in folders for p in _niftis(f, "mask")))


def _run(bold: _File, roots: list[Path], masks: Iterable[_File]) -> RunFile:
    tr, _ = _sidecar_tr(bold, roots)
    events = _inherited(bold, roots, "events", ".tsv")
    confounds = [
        p
        for p in sorted(bold.path.parent.glob("*_desc-confounds_*.tsv"))
        if _file(p).applies_to(bold)
    ]
    return RunFile(
        key=_key(bold.entities),
        path=bold.path,
        mask=_best_mask(bold, masks),
        tr=tr,
        events=events[-1].path if events else None,
        confounds=confounds[0] if confounds else None,
    )


def _best_mask(bold: _File, masks: Iterable[_File]) -> Path | None:
    # A mask of another space has another grid; one without a space entity is of native space.
    space = bold.entities.get("space")
    fitting = [m for m in masks if m.applies_to(bold) and m.entities.get("space") == space]
    if not fitting:
        return None
    most = max(len(m.entities) for m in fitting)
    best = [m.path for m in fitting if len(m.entities) == most]
    if len(best) > 1:
        raise DataError(
            f"{best[0]} and {best[1]} both fit {bold.path}: remove one, or set prepare.mask"
        )
    return best[0]


def _inherited(bold: _File, roots: list[Path], suffix: str, ending: str) -> list[_File]:
    """Files with ``suffix`` that apply to ``bold``, the most specific last."""
    found: list[tuple[int, int, int, _File]] = []
    for rank, root in enumerate(roots):
        folder, levels = root, [root]
        relative = bold.path.parent.relative_to(roots[-1])
        for part in relative.parts:
            folder = folder / part
            levels.append(folder)
        for depth, level in enumerate(levels):
            for path in sorted(level.glob(f"*{suffix}{ending}")) if level.is_dir() else ():
                file = _file(path)
                if file.suffix == suffix and file.applies_to(bold):
                    found.append((rank, depth, len(file.entities), file))
    found.sort(key=lambda f: f[:3])
    return [f[3] for f in found]


def _sidecar_tr(bold: _File, roots: list[Path]) -> tuple[float | None, Path | None]:
    """RepetitionTime of the most specific sidecar that has one, and that file."""
    for file in reversed(_inherited(bold, roots, "bold", ".json")):
        try:
            content = json.loads(file.path.read_text(encoding="utf-8"))
            value = content.get("RepetitionTime")
            if value is not None:
                return float(value), file.path
        except (
            ValueError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            OSError,
        ) as error:
            raise DataError(f"{file.path} is not a usable JSON sidecar: {error}") from None
    return None, None


# --- a table --------------------------------------------------------------------------------------


def _from_table(source: Path) -> list[RunFile]:
    if source.suffix != ".tsv":
        raise DataError(
            f"{source} is a file but no .tsv: give a BIDS folder, or a TSV with the columns "
            f"path and subject"
        )
    table = read_table(source)
    if missing := [c for c in ("path", "subject") if c not in table.columns]:
        raise DataError(
            f"{source} lacks the column {missing[0]!r}; it has {list(table.columns)}, known are "
            f"{', '.join(_COLUMNS)}"
        )
    return [_from_row(source, line, row) for line, row in enumerate(records(table), start=2)]


def _from_row(source: Path, line: int, row: Mapping[str, str]) -> RunFile:
    def existing(column: str) -> Path | None:
        if not row.get(column):
            return None
        try:
            path = (source.parent / row[column]).resolve()
            found = path.is_file()
        except (ValueError, OSError, RuntimeError) as error:  # a NUL, too long, a loop of links
            raise DataError(
                f"{source} line {line}: {column}={row[column][:60]!r} is no file name ({error})"
            ) from None
        if not found:
            raise DataError(f"{source} line {line}: {column} file {path} does not exist")
        return path

    path = existing("path")
    if path is None or not row["subject"]:
        raise DataError(f"{source} line {line}: path and subject must both be given")
    try:
        tr = float(row["tr"]) if row.get("tr") else None
    except ValueError:
        raise DataError(f"{source} line {line}: tr={row['tr']!r} is not a number") from None
    labels = {short: row.get(name, "") for short, name in _NAMED.items()}
    key = _key({"sub": row["subject"].removeprefix("sub-"), **labels})
    if bad := [v for v in (key.subject, *labels.values()) if not re.fullmatch(r"[\w.+-]*", v)]:
        raise DataError(f"{source} line {line}: {bad[0]!r} is no label (letters, digits, -, +, .)")
    return RunFile(key, path, existing("mask"), tr, existing("events"), existing("confounds"))

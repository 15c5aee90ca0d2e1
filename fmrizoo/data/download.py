"""Open data sets through nilearn's fetchers, as a table that ``prepare`` reads.

Files are nilearn's, in its own folders below the destination; what is there is not fetched again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmrizoo.data.store import PARTICIPANTS
from fmrizoo.errors import DataError
from fmrizoo.files import write_atomic
from fmrizoo.registry import suggest

if TYPE_CHECKING:
    import pandas

RUNS = "runs.tsv"


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        fetcher: Name in ``nilearn.datasets``.
        runs: Key of its list of 4D files, one a subject.
        identity: Column of its phenotypes that the file names begin with.
        task: BIDS task.
        space: What the volumes were normalised to, for ``prepare.space``.
        about: One line.
    """

    fetcher: str
    runs: str
    identity: str
    task: str
    space: str
    about: str


SOURCES = {
    "development_fmri": Source(
        "fetch_development_fmri", "func", "participant_id", "pixar", "MNI152NLin2009cAsym",
        "155 children and adults watching a film, fMRIPrep, 4 mm, TR 2 s",
    ),
    "adhd": Source(
        "fetch_adhd", "func", "Subject", "rest", "MNI152",
        "40 children of ADHD-200 at rest, Athena pipeline, 3 mm",
    ),
    "abide_pcp": Source(
        "fetch_abide_pcp", "func_preproc", "FILE_ID", "rest", "MNI152NLin6Asym",
        "871 people of ABIDE I at rest, with and without autism, C-PAC, 3 mm; large",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Downloaded:
    """What :func:`download` left: the table for ``prepare``, and how many subjects it lists."""

    table: Path
    subjects: int
    space: str


def download(name: str, folder: Path, *, subjects: int | None = None) -> Downloaded:
    """Fetch a data set and write ``runs.tsv`` and ``participants.tsv`` beside it.

    Args:
        name: Key of ``SOURCES``.
        folder: Destination; nilearn's files go below it.
        subjects: The first so many; None: all.

    Raises:
        DataError: unknown name, no network, or phenotypes that do not fit the files.
    """
    if name not in SOURCES:
        raise DataError(f"no data set {name!r}.{suggest(name, list(SOURCES))}")
    if subjects is not None and subjects < 1:
        raise DataError(f"--subjects must be ≥ 1, got {subjects}")
    source = SOURCES[name]
    fetched = _fetch(name, source, folder, subjects)
    files = [Path(str(path)) for path in fetched[source.runs]]
    if missing := [path for path in files if not path.is_file()]:
        raise DataError(f"nilearn left no file {missing[0]}: run the same command again")
    phenotypes = fetched["phenotypic"].reset_index(drop=True)
    rows = [_row_of(path, phenotypes, source) for path in files]
    labels = [_label(str(phenotypes[source.identity][row])) for row in rows]
    confounds = fetched.get("confounds") if name == "development_fmri" else None
    _write_runs(folder, files, labels, source, fetched.get("t_r"), confounds)
    _write_participants(folder, phenotypes.iloc[rows], labels)
    return Downloaded(folder / RUNS, len(files), source.space)


def _fetch(name: str, source: Source, folder: Path, subjects: int | None) -> Any:
    import nilearn.datasets

    try:
        folder.mkdir(parents=True, exist_ok=True)
        fetch = getattr(nilearn.datasets, source.fetcher)
        return fetch(n_subjects=subjects, data_dir=str(folder))
    except OSError as error:  # requests' errors are among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{name} could not be downloaded to {folder} ({type(error).__name__}: {reason[:200]}): "
            f"is there a network, and space? Run the same command again; files that are whole are "
            f"not fetched twice"
        ) from None


def _row_of(path: Path, phenotypes: pandas.DataFrame, source: Source) -> int:
    """Position of a file's subject in the phenotypes, whose order is not that of the files."""
    if source.identity not in phenotypes.columns:
        raise DataError(
            f"the phenotypes have no column {source.identity!r}: {list(phenotypes.columns)[:8]} …"
        )
    fits = [
        row
        for row, name in enumerate(phenotypes[source.identity].astype(str))
        if re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", path.name)
    ]
    if len(fits) != 1:
        raise DataError(f"{len(fits)} rows of phenotypes fit {path.name} ({source.identity})")
    return fits[0]


def _label(name: str) -> str:
    return name.removeprefix("sub-").replace("_", "")


def _write_runs(
    folder: Path,
    files: list[Path],
    labels: list[str],
    source: Source,
    tr: Any,
    confounds: list[Any] | None,
) -> None:
    lines = ["path\tsubject\ttask\ttr\tconfounds"]
    for i, (path, label) in enumerate(zip(files, labels, strict=True)):
        table = "n/a" if confounds is None else _relative(Path(str(confounds[i])), folder)
        seconds = "n/a" if tr is None else f"{float(tr):g}"
        lines.append(f"{_relative(path, folder)}\t{label}\t{source.task}\t{seconds}\t{table}")
    write_atomic(folder / RUNS, ("\n".join(lines) + "\n").encode())


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.resolve(), folder.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _write_participants(folder: Path, phenotypes: pandas.DataFrame, labels: list[str]) -> None:
    table = phenotypes.drop(columns="participant_id", errors="ignore").copy()
    table.insert(0, "participant_id", [f"sub-{label}" for label in labels])
    text = table.to_csv(sep="\t", na_rep="n/a", index=False)
    write_atomic(folder / PARTICIPANTS, text.encode())

"""Writing a cohort: as an fMRIPrep-like derivative, or straight into a store."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmrizoo.data.codec import Array
from fmrizoo.data.interrupt import listening
from fmrizoo.data.prepare import locked, prepare
from fmrizoo.data.spatial import Affine, as_image
from fmrizoo.data.store import PARTICIPANTS
from fmrizoo.data.synthetic.anatomy import anatomy
from fmrizoo.data.synthetic.cohort import Person, cohort
from fmrizoo.data.synthetic.config import SynthConfig
from fmrizoo.data.synthetic.run import MadeRun, RunId, make_run, run_ids, run_key
from fmrizoo.data.synthetic.truth import (
    NETWORKS_FILE,
    SYNTH,
    TRUTH,
    describe,
    participants_text,
    planted,
    read_description,
    truth_text,
)
from fmrizoo.errors import DataError, FmrizooError
from fmrizoo.files import PART, canonical, publish, write_atomic

OnProgress = Callable[[int, int, str], None]  # done, total, run


@dataclass(frozen=True)
class SynthReport:
    """What was written.

    Attributes:
        folder: The derivative or the store.
        runs, kept: Runs of the cohort; how many of them were already there.
        size: Bytes of the runs.
        planted: See :func:`fmrizoo.data.synthetic.truth.planted`.
    """

    folder: Path
    runs: int
    kept: int
    size: int
    planted: dict[str, Any]


def synthesise(
    folder: Path,
    config: SynthConfig,
    *,
    store: bool = False,
    jobs: int = 1,
    on_progress: OnProgress | None = None,
) -> SynthReport:
    """Write a cohort; the same call again goes on where it stopped, or adds ``subjects``.

    Beside the runs: participants.tsv (what a study would know), and synth.json, truth.tsv and
    networks.nii.gz (what no study knows).

    Args:
        folder: New, empty, or of an earlier call with the same settings (``subjects`` may grow).
        store: A store, as ``prepare`` would make it of the files, without the files.
        jobs: Subjects at a time, each in a process of its own; stores only.

    Raises:
        DataError: a folder with something else in it, no brain on the grid, a full disk,
            another writer.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    if jobs < 1 or (jobs > 1 and not store):
        raise DataError(f"--jobs {jobs}: give 1, or more with --store, where subjects are apart")
    anatomy(config)  # a grid without brain leaves no folder behind
    people = cohort(config)
    try:
        _claim(folder, config, "store" if store else "files")
        _write_known(folder, config, people)
        with listening():
            if store:
                return _into_store(folder, config, jobs, on_progress)
            with locked(folder):
                return _into_files(folder, config, people, on_progress)
    except FmrizooError:
        raise
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error


def _claim(folder: Path, config: SynthConfig, form: str) -> None:
    """Make the folder this cohort's, or refuse."""
    file = folder / SYNTH
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file: give a folder for the cohort")
    if file.is_file():
        old, content = read_description(file)
        mine, theirs = (json.loads(canonical(asdict(c))) for c in (config, old))
        grown = mine.pop("subjects") - theirs.pop("subjects")
        different = [k for k in mine if mine[k] != theirs[k]]
        if content.get("form") != form:
            different.append("form (files or --store)")
        if grown < 0:
            different.append("subjects (it may only grow)")
        if different:
            raise DataError(
                f"{folder} holds a cohort with other settings ({', '.join(different)}): give "
                f"another folder"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and holds no synthetic cohort: give a new folder")
    write_atomic(file, (json.dumps(describe(config, form), indent=2) + "\n").encode())


def _write_known(folder: Path, config: SynthConfig, people: list[Person]) -> None:
    body = anatomy(config)
    write_atomic(folder / TRUTH, truth_text(config, people).encode())
    write_atomic(folder / PARTICIPANTS, participants_text(config, people).encode())
    if not (folder / NETWORKS_FILE).is_file():
        weights = np.rint(body.networks * 1000).astype(np.int16)
        _save(folder / NETWORKS_FILE, _dense(weights, body.mask), body.affine, 1.0)


def _into_store(
    folder: Path, config: SynthConfig, jobs: int, on_progress: OnProgress | None
) -> SynthReport:
    def note(event: Any) -> None:
        if on_progress is not None:
            on_progress(event.done, event.total, event.run)

    report = prepare(folder / SYNTH, folder, config.prepare, jobs=jobs, on_progress=note)
    runs = len(report.prepared) + len(report.kept)
    size = sum(path.stat().st_size for path in folder.glob("sub-*.h5"))
    return SynthReport(folder, runs, len(report.kept), size, planted(config))


# --- files ----------------------------------------------------------------------------------------


def _into_files(
    folder: Path, config: SynthConfig, people: list[Person], on_progress: OnProgress | None
) -> SynthReport:
    write_atomic(folder / "dataset_description.json", _json(_description()))
    for leftover in folder.rglob(f".*{PART}"):
        leftover.unlink()
    runs, kept, size = list(run_ids(config)), 0, 0
    for done, who in enumerate(runs, start=1):
        path = bold_path(folder, config, who)
        if path.is_file():  # written last
            kept += 1
        else:
            _write_run(path, config, make_run(config, people[who.subject], who))
        size += path.stat().st_size
        if on_progress is not None:
            on_progress(done, len(runs), str(run_key(config, who)))
    return SynthReport(folder, len(runs), kept, size, planted(config))


def bold_path(folder: Path, config: SynthConfig, who: RunId) -> Path:
    """The run's NIfTI file."""
    key = run_key(config, who)
    session = [f"ses-{key.session}"] if key.session else []
    func = folder.joinpath(f"sub-{key.subject}", *session, "func")
    return func / f"{key}_space-{config.prepare.space}_desc-preproc_bold.nii.gz"


def _write_run(path: Path, config: SynthConfig, made: MadeRun) -> None:
    """All files of a run; the BOLD file last, so that what it stands for is there."""
    body = anatomy(config)
    stem = path.name.removesuffix("_desc-preproc_bold.nii.gz")
    bare = stem.partition("_space-")[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    sidecar = {"RepetitionTime": config.tr, "TaskName": config.task_name, "SkullStripped": True}
    write_atomic(path.parent / f"{stem}_desc-preproc_bold.json", _json(sidecar))
    confounds = _table(list(made.confounds), zip(*made.confounds.values(), strict=True))
    write_atomic(path.parent / f"{bare}_desc-confounds_timeseries.tsv", confounds)
    about = {name: {"Method": "synthetic"} for name in made.confounds}
    write_atomic(path.parent / f"{bare}_desc-confounds_timeseries.json", _json(about))
    if made.events:
        events = _table(list(made.events[0]), (e.values() for e in made.events))
        write_atomic(path.parent / f"{bare}_events.tsv", events)
    mask = path.parent / f"{stem}_desc-brain_mask.nii.gz"
    _save(mask, body.mask.astype(np.int16), body.affine, config.tr)
    _save(path, _dense(made.bold, body.mask), body.affine, config.tr)


def _description() -> dict[str, Any]:
    from fmrizoo import __version__

    return {
        "Name": "synthetic BOLD",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "fmrizoo synth", "Version": __version__}],
    }


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _table(columns: list[str], rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        table.writerow([_cell(value) for value in row])
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.9g}" if np.isfinite(value) else "n/a"
    return str(value)


def _dense(rows: Array, mask: Array) -> Array:
    """``(frames, n_vox)`` → int16 ``(x, y, z, frames)``, 0 outside the brain."""
    out = np.zeros((*mask.shape, len(rows)), np.int16, order="F")  # NIfTI's order
    for t, row in enumerate(rows):
        out[..., t][mask] = row
    return out


def _save(path: Path, data: Array, affine: Affine, tr: float) -> None:
    """A gzipped NIfTI, whole or absent."""
    image = as_image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    if data.ndim == 4:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr))
    image.set_sform(affine, 4)  # MNI
    image.set_qform(affine, 4)
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=".", suffix=PART, delete=False
        ) as file:
            temporary = Path(file.name)
            with gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:  # the same bytes every time
                image.to_stream(packed)
        temporary.chmod(0o644)
        publish(temporary, path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)

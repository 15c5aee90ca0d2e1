"""Embeddings as BIDS derivatives: one table a run beside a JSON sidecar, or one of all subjects.

The suffix ``embedding`` is not (yet) in the standard, so ``.bidsignore`` names it; everything else
(folders, entities, their order, sidecars, dataset_description.json) follows BIDS 1.10.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo import __version__
from fmrizoo.errors import DataError
from fmrizoo.evaluate.embeddings import EmbeddingRow, Embeddings
from fmrizoo.files import write_atomic
from fmrizoo.types import RunKey

DESCRIPTION = "dataset_description.json"
BIDS_VERSION = "1.10.0"
SUFFIX = "embedding"
# In the order that BIDS asks for.
ENTITIES = (
    *("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo", "part", "hemi"),
    *("space", "res", "den", "recording", "desc"),
)
_LABEL = re.compile(r"[0-9a-zA-Z]+")
_AT_ROOT = (DESCRIPTION, ".bidsignore", "participants.tsv", "README", "CHANGES")


def label_of(text: str) -> str:
    """``text`` with letters and digits only, as BIDS asks of a label.

    Raises:
        DataError: nothing is left.
    """
    found = "".join(_LABEL.findall(text))
    if not found:
        raise DataError(f"{text!r} has no letter or digit, so it cannot be a label in a BIDS name")
    return found


def write_derivatives(
    found: Embeddings, folder: Path, label: str, *, sources: Sequence[str] = ()
) -> list[Path]:
    """Write embeddings as a BIDS derivatives folder, which may hold those of other models.

    Levels ``clip`` and ``run`` give a file for each run, ``sub-*/[ses-*/]func/…_desc-<label>_
    embedding.tsv``, with a row for each clip or one; ``subject`` gives ``desc-<label>_embedding
    .tsv`` at the top with a row for each participant. Embeddings with more than one vector a row
    (per frame, place or parcel) are ``.npy`` arrays instead, their rows named in the sidecar.

    Args:
        found: Of :func:`fmrizoo.evaluate.embed.embed`.
        folder: Made if absent.
        label: Name of the model, letters and digits.
        sources: DOIs or URLs of the data sets that were embedded, if known.

    Returns:
        The data files written.

    Raises:
        DataError: a label that BIDS does not allow, two runs whose names differ only by characters
            that BIDS forbids, a folder that is another data set, files of another model under the
            same label, or a folder that cannot be written.
    """
    if not _LABEL.fullmatch(label):
        raise DataError(f"label {label!r} is no BIDS label: only letters and digits are allowed")
    parts = list(_parts(found, label))
    _check_names([name for name, _ in parts])
    _check_folder(folder, [name for name, _ in parts], found.about.get("weights_sha256", ""))
    _describe(folder, sources)
    written = []
    for name, rows in parts:
        values = found.values[rows]
        own = [found.rows[i] for i in rows]
        flat = values.ndim == 2
        path = folder / f"{name}.{'tsv' if flat else 'npy'}"
        columns = _columns(values.shape[1]) if flat else []
        people = found.about.get("level") == "subject"
        write_atomic(path, _table(own, values, columns, people) if flat else _array(values))
        sidecar = _sidecar(found.about, own, values, columns)
        write_atomic(path.with_suffix(".json"), _json(sidecar))
        written.append(path)
    return written


def _parts(found: Embeddings, label: str) -> Iterator[tuple[str, list[int]]]:
    """(path without suffix, its rows) of each file."""
    if found.about.get("level") == "subject":
        yield f"desc-{label}_{SUFFIX}", list(range(len(found.rows)))
        return
    space = str((found.about.get("contract") or {}).get("space", "native"))
    runs: dict[str, list[int]] = {}
    for i, row in enumerate(found.rows):
        runs.setdefault(row.run, []).append(i)
    for run, rows in runs.items():
        yield _name(RunKey.parse(run), space, label), rows


def _name(key: RunKey, space: str, label: str) -> str:
    given = {
        "sub": key.subject,
        "ses": key.session,
        "task": key.task,
        "acq": key.acquisition,
        "run": key.run,
        **dict(key.extra),
        "space": "" if space in ("native", "unknown") else space,
        "desc": label,
    }
    unknown = [name for name in given if name not in ENTITIES]
    if unknown:
        raise DataError(f"run {key} has the entity {unknown[0]!r}, which no BIDS name can hold")
    pairs = [(name, label_of(given[name])) for name in ENTITIES if given.get(name)]
    folder = [f"{k}-{v}" for k, v in pairs if k in ("sub", "ses")]
    return "/".join([*folder, "func", "_".join([*(f"{k}-{v}" for k, v in pairs), SUFFIX])])


def _check_names(names: Sequence[str]) -> None:
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise DataError(
            f"two runs would both be {twice}: their labels differ only by characters that BIDS "
            "names cannot hold; embed them into folders of their own (select=…)"
        )


def _check_folder(folder: Path, names: Sequence[str], weights: str) -> None:
    """Refuse to write into another data set, or over what another model made."""
    description = folder / DESCRIPTION
    if description.is_file():
        made_by = [str(one.get("Name")) for one in _read(description).get("GeneratedBy", [])]
        if "fmrizoo" not in made_by:
            raise DataError(
                f"{folder} is a data set that fmrizoo did not make (its {DESCRIPTION} does not say "
                "so): give a folder of its own, such as derivatives/fmrizoo"
            )
    for name in names:
        sidecar = folder / f"{name}.json"
        if not sidecar.is_file():
            continue
        if _read(sidecar).get("WeightsSHA256") != weights:
            raise DataError(
                f"{sidecar} is of another model with the same label: give this one a label of its "
                "own (--label), or another folder"
            )
        for ending in (".tsv", ".npy"):  # another pooling may have given the other kind
            sidecar.with_suffix(ending).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object")
    return content


def _describe(folder: Path, sources: Sequence[str]) -> None:
    said: dict[str, Any] = {
        "Name": "Embeddings of fMRI runs",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "fmrizoo", "Version": __version__}],
    }
    if sources:
        said["SourceDatasets"] = [
            {"DOI": s.removeprefix("https://doi.org/")} if "10." in s[:20] else {"URL": s}
            for s in sources
        ]
    elif (folder / DESCRIPTION).is_file():
        known = _read(folder / DESCRIPTION).get("SourceDatasets")
        said |= {"SourceDatasets": known} if known else {}
    write_atomic(folder / DESCRIPTION, _json(said))
    write_atomic(folder / ".bidsignore", f"*_{SUFFIX}.*\n".encode())


def _columns(width: int) -> list[str]:
    digits = len(str(width - 1))
    return [f"f{k:0{digits}d}" for k in range(width)]


def _table(
    rows: Sequence[EmbeddingRow],
    values: NDArray[np.float32],
    columns: Sequence[str],
    subjects: bool,
) -> bytes:
    """A TSV; nine digits give every fp32 back exactly."""
    head = ["participant_id" if subjects else "unit", *([] if subjects else ["start"]), "n_clips"]
    lines = ["\t".join([*head, *columns])]
    for row, value in zip(rows, values, strict=True):
        own = [row.unit]
        if not subjects:
            own.append("n/a" if row.start is None else str(row.start))
        cells = ("n/a" if np.isnan(v) else f"{v:.9g}" for v in value)
        lines.append("\t".join([*own, str(row.n_clips), *cells]))
    return ("\n".join(lines) + "\n").encode()


def _array(values: NDArray[np.float32]) -> bytes:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    return content.getvalue()


_AXES = {"frame": ["time slot"], "space": ["x", "y", "z"], "parcel": ["parcel"]}


def _sidecar(
    about: dict[str, Any],
    rows: Sequence[EmbeddingRow],
    values: NDArray[np.float32],
    columns: Sequence[str],
) -> dict[str, Any]:
    level, pool = about.get("level", "clip"), about.get("pool", "mean")
    said = {
        "Description": f"Features of the encoder {about.get('backbone', '')} for each {level}, "
        f"pooled by {pool}",
        "Shape": list(values.shape),
        "Axes": [level, *_AXES.get(pool, []), "feature"],
        "Units": "arbitrary",
        "Pooling": pool,
        "Stage": about.get("stage"),
        "Level": level,
        "WeightsSHA256": about.get("weights_sha256", ""),
        "Contract": about.get("contract"),
        "ClipFrames": about.get("clip_frames"),
        "FrameStride": about.get("frame_stride"),
        "ClipStride": about.get("clip_stride"),
        "Runs": list(dict.fromkeys(run for row in rows for run in row.run.split(";"))),
    }
    if about.get("parcels"):
        said["Parcels"] = about["parcels"]
    if columns:
        said["FeatureColumns"] = f"{columns[0]} … {columns[-1]}"
        if level != "subject":
            said["start"] = {"Description": "First frame of the clip within its run, from 0"}
        said["n_clips"] = {"Description": "Clips averaged"}
    else:
        said["Rows"] = [{"unit": r.unit, "start": r.start, "n_clips": r.n_clips} for r in rows]
    return said


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def name_faults(folder: Path) -> list[str]:
    """What in a derivatives folder BIDS would not allow by name; empty if all is well.

    Looked at: entities known, in order, each once, with labels of letters and digits; folders that
    say what the names say; a sidecar beside every data file; what lies at the top.
    """
    faults = []
    if not (folder / DESCRIPTION).is_file():
        faults.append(f"{DESCRIPTION} is missing")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder)
        if str(relative) in _AT_ROOT:
            continue
        faults += [f"{relative}: {fault}" for fault in _faults_of(relative)]
        if path.suffix != ".json" and not path.with_suffix(".json").is_file():
            faults.append(f"{relative}: no sidecar")
    return faults


def _faults_of(path: Path) -> list[str]:
    *pairs, suffix = path.name.split(".")[0].split("_")
    split = [pair.partition("-") for pair in pairs]
    names = [name for name, _, _ in split]
    found = [f"{n}-{v} is no entity with a label" for n, _, v in split if not _LABEL.fullmatch(v)]
    found += [f"entity {name} is unknown" for name in names if name not in ENTITIES]
    if names != sorted(set(names), key=[*ENTITIES, *names].index):
        found.append(f"entities {names} are not in order")
    if not _LABEL.fullmatch(suffix):
        found.append(f"suffix {suffix!r}")
    own = {name: f"{name}-{value}" for name, _, value in split}
    expected = [own[n] for n in ("sub", "ses") if n in own]
    if list(path.parent.parts) != ([*expected, "func"] if "sub" in own else []):
        found.append(f"lies in {path.parent}, not in {'/'.join([*expected, 'func'])}")
    return found

"""Reading a store: the folder that ``prepare`` wrote (an index, and one HDF5 file a subject)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fmrizoo.data.hdf5 import FORMAT
from fmrizoo.data.reader import RunReader
from fmrizoo.errors import CorruptStoreError, DataError
from fmrizoo.files import canonical, sha256_of, write_atomic
from fmrizoo.registry import suggest
from fmrizoo.types import Contract, RunKey

if TYPE_CHECKING:
    import pandas

log = logging.getLogger(__name__)

INDEX = "index.json"
PARTICIPANTS = "participants.tsv"
SCHEMA = "fmrizoo.store/1"
# What json and the types raise on content that no ``prepare`` wrote.
_MALFORMED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    OverflowError,
    MemoryError,
)
_ENTITIES = ("subject", "session", "task", "acquisition", "run")
# What the index says of a run, by type; the rest is checked by the types it becomes.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "file", "uuid", "kind"), (str,)),
    **dict.fromkeys(("n_frames", "n_vox", "meta_crc32"), (int,)),
    **dict.fromkeys(("tr", "quantisation_error"), (int, float)),
    **dict.fromkeys(("statistics", "fingerprint", "key"), (dict,)),
    **dict.fromkeys(("events", "affine"), (list,)),
}
_SHORT = {"sub": "subject", "ses": "session", "acq": "acquisition"}
_OTHER = ("dir", "echo", "rec", "res", "ce", "part", "space", "den", "hemi", "recording")


class Fault(NamedTuple):
    """One thing that :meth:`Store.verify` found wrong."""

    file: str
    run: str
    message: str


@dataclass(frozen=True, eq=False)
class RunInfo:
    """What the index knows about one run, without opening its file.

    Attributes:
        key: BIDS identity; ``name`` is its string.
        file: The subject's file, relative to the store.
        uuid: Changes whenever the run is prepared again.
        n_frames, n_vox, grid: Size in time, in brain voxels, and of the box.
        tr: Seconds between two frames.
        kind: Stored numbers: int8, int16, float16 or float32.
        contract: How the run was preprocessed.
        affine: ``(4, 4)`` voxel → RAS millimetres, nested tuples.
        events: Rows of events.tsv; onsets count from the first stored frame.
        statistics: mean, std, min, max, median, iqr over brain voxels × frames.
        fingerprint: Checksums of the sources and settings that made the run.
        quantisation_error: Rms error / temporal s.d.
        meta_crc32: Checksum of the run's metadata in the file.
        qc: Quality measures taken while preparing (:mod:`fmrizoo.data.qc`); empty in old stores.
    """

    key: RunKey
    name: str
    file: str
    uuid: str
    n_frames: int
    n_vox: int
    grid: tuple[int, int, int]
    tr: float
    kind: str
    contract: Contract
    affine: tuple[tuple[float, ...], ...]
    events: tuple[dict[str, Any], ...]
    statistics: dict[str, float]
    fingerprint: dict[str, Any]
    quantisation_error: float
    meta_crc32: int
    qc: dict[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """Label without ``sub-``."""
        return self.key.subject

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> RunInfo:
        """From one entry of the index (or a run's ``meta`` plus file and checksum)."""
        values = {f.name: entry[f.name] for f in fields(cls) if f.name != "qc"}
        key = dict(entry["key"])
        key["extra"] = tuple((k, v) for k, v in key.get("extra", ()))
        x, y, z = entry["grid"]
        values |= {
            "key": RunKey(**key),
            "grid": (x, y, z),
            "contract": Contract.from_dict(entry["contract"]),
            "affine": tuple(tuple(row) for row in entry["affine"]),
            "events": tuple(entry["events"]),
            "qc": dict(entry.get("qc", {})),
        }
        return cls(**values)


def matches(key: RunKey, select: Mapping[str, str]) -> bool:
    """Whether every entity of ``select`` has its value, or one of several: ``{run: 1|2|3}``.

    ``1`` and ``01`` are the same number.

    Raises:
        DataError: a key that is no BIDS entity.
    """
    extra = dict(key.extra)
    for name, wanted in select.items():
        name = _SHORT.get(name, name)
        if name not in _ENTITIES and name not in _OTHER and name not in extra:
            raise DataError(
                f"select.{name} is not a BIDS entity.{suggest(name, [*_ENTITIES, *_OTHER])}"
            )
        value = getattr(key, name) if name in _ENTITIES else extra.get(name, "")
        words = [word.strip() for word in str(wanted).split("|")]
        if name == "subject":
            words = [word.removeprefix("sub-") for word in words]
        if not any(_same(value, word) for word in words):
            return False
    return True


def _same(value: str, wanted: str) -> bool:
    numbers = value.isdigit() and wanted.isdigit()
    return int(value) == int(wanted) if numbers else value == wanted


def index_checksum(body: Mapping[str, Any]) -> str:
    """SHA-256 of the index without its own checksum."""
    return hashlib.sha256(canonical({k: v for k, v in body.items() if k != "sha256"})).hexdigest()


def write_index(path: Path, entries: Sequence[Mapping[str, Any]], code_version: str) -> None:
    """Publish the index of the store folder ``path`` (and of its participants.tsv) atomically."""
    runs = sorted((dict(e) for e in entries), key=lambda e: str(e["name"]))
    body: dict[str, Any] = {"schema": SCHEMA, "code_version": code_version, "runs": runs}
    if (path / PARTICIPANTS).is_file():
        body["participants_sha256"] = sha256_of(path / PARTICIPANTS)
    body["sha256"] = index_checksum(body)
    write_atomic(path / INDEX, canonical(body) + b"\n")


def read_index(path: Path) -> list[dict[str, Any]]:
    """The run entries of the store folder ``path``; raises as :func:`read_index_body`."""
    return list(read_index_body(path)["runs"])


def read_index_body(path: Path) -> dict[str, Any]:
    """Everything in the index of the store folder ``path``: runs, version, checksums.

    Raises:
        DataError: no store there, or one of another format version.
        CorruptStoreError: its content is not what was written, or only the subjects' files are
            there.
    """
    file = path / INDEX
    rebuild = f"`fmrizoo repair {path} SOURCE` rebuilds it from the subjects' files"
    if not file.is_file() and (count := len(subject_files(path))):
        raise CorruptStoreError(f"{file} is missing beside {count} subjects' files: {rebuild}")
    if not file.is_file():
        found = "the folder does not exist" if not path.is_dir() else f"it has no {INDEX}"
        raise DataError(f"{path} is not a store ({found}): run `fmrizoo prepare` first")
    try:
        body = json.loads(file.read_bytes())
        schema, checksum, runs = body["schema"], body["sha256"], body["runs"]
        good = checksum == index_checksum(body) and isinstance(runs, list)
    except (OSError, *_MALFORMED) as error:
        raise CorruptStoreError(f"{file} is damaged ({_said(error)}): {rebuild}") from None
    if not good:
        raise CorruptStoreError(f"{file} does not match its checksum: {rebuild}")
    if schema != SCHEMA:
        raise DataError(f"{file} has format {schema!r}, this version of fmrizoo reads {SCHEMA!r}")
    return cast("dict[str, Any]", body)


def subject_files(path: Path) -> list[Path]:
    """Files in a folder that say they are subjects of a store."""
    import h5py

    found = []
    for file in sorted(path.glob("sub-*.h5")):
        try:
            with h5py.File(file, "r", locking=False) as opened:
                if opened.attrs.get("schema") == FORMAT.encode():
                    found.append(file)
        except (OSError, RuntimeError, ValueError, KeyError):
            continue  # no HDF5 file, or a damaged one: it says nothing
    return found


def described(path: Path, entries: Sequence[Mapping[str, Any]]) -> tuple[RunInfo, ...]:
    """The runs of the index entries of the store folder ``path``.

    Raises:
        CorruptStoreError: an entry that ``prepare`` cannot have written.
    """
    try:
        for entry in entries:
            _check_types(entry)
        runs = tuple(map(RunInfo.from_entry, entries))
        outside = [run.file for run in runs if Path(run.file).name != run.file or "\0" in run.file]
    except _MALFORMED as error:
        raise CorruptStoreError(
            f"{path / INDEX} has an entry that is not a run's ({_said(error)}): run prepare again"
        ) from None
    if outside:
        raise CorruptStoreError(f"{path / INDEX} names {outside[0]!r}, which is no file of a store")
    if len({run.name for run in runs}) < len(runs):
        raise CorruptStoreError(f"{path / INDEX} lists a run twice: run prepare again")
    return runs


def _check_types(entry: Mapping[str, Any]) -> None:
    """Raise TypeError for a value of another type than ``prepare`` writes."""
    for name, kinds in _TYPES.items():
        if not isinstance(entry[name], kinds):
            raise TypeError(f"{name} is {entry[name]!r}")
    texts = [v for k, v in entry["key"].items() if k != "extra"]
    if not all(isinstance(v, str) for v in texts) or not all(
        isinstance(row, dict) for row in entry["events"]
    ):
        raise TypeError("key or events")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


class Store:
    """A prepared store.

    Args:
        path: Folder that ``prepare`` wrote.
        cache: Runs kept open (each holds some 30 bytes per brain voxel); the least recently
            used is closed once nothing reads from it any more.

    Raises:
        DataError: not a store.
        CorruptStoreError: the index is damaged.
    """

    def __init__(self, path: str | Path, cache: int = 32) -> None:
        self.path = Path(path)
        body = read_index_body(self.path)
        self.runs: tuple[RunInfo, ...] = described(self.path, body["runs"])
        self._participants_sha256: str | None = body.get("participants_sha256")
        self._by_name = {run.name: run for run in self.runs}
        self._capacity = cache
        self._elsewhere: dict[str, Path] = {}  # files with a copy, and the folder of that
        self._open: OrderedDict[str, RunReader] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Store], tuple[Path, int]]:
        # Open files do not travel to another process: it opens its own.
        return Store, (self.path, self._capacity)

    @property
    def contract(self) -> Contract:
        """The contract that all runs share; see :func:`common_contract`."""
        return common_contract(self.runs)

    @property
    def participants(self) -> pandas.DataFrame | None:
        """participants.tsv with every column as text, ``n/a`` missing; None if there is none.

        Warns where it is not the file that ``prepare`` wrote: people add columns by hand.
        """
        file = self.path / PARTICIPANTS
        if not file.is_file():
            return None
        table = read_table(file)
        if self._participants_sha256 not in (None, sha256_of(file)):
            log.warning("%s was changed after prepare (its checksum differs); it is used", file)
        return table

    def __getitem__(self, name: str) -> RunInfo:
        """The run called ``name``; DataError with the nearest name otherwise."""
        if name not in self._by_name:
            raise DataError(f"no run {name!r} in {self.path}.{_nearest(name, list(self._by_name))}")
        return self._by_name[name]

    def select(self, entities: Mapping[str, str] | None = None) -> list[RunInfo]:
        """Runs whose BIDS entities match; all for an empty ``entities``.

        Raises:
            DataError: an unknown entity, or nothing matches.
        """
        chosen = [run for run in self.runs if matches(run.key, entities or {})]
        if not chosen:
            names = ", ".join(run.name for run in self.runs[:3])
            raise DataError(
                f"no run of {self.path} matches select={dict(entities or {})}; "
                f"it holds {len(self.runs)} runs such as {names or '(none)'}"
            )
        return chosen

    def open(self, run: RunInfo | str) -> RunReader:
        """A reader of one run, shared between threads.

        Raises:
            CorruptStoreError: the file is missing, damaged, or not the one the index describes.
        """
        info = self[run] if isinstance(run, str) else run
        with self._lock:
            reader = self._open.get(info.name)
            if reader is not None:
                self._open.move_to_end(info.name)
                return reader
        folder = self._elsewhere.get(info.file, self.path)
        reader = RunReader(folder / info.file, info.name, info.uuid, info.meta_crc32)
        with self._lock:
            reader = self._open.setdefault(info.name, reader)
            self._open.move_to_end(info.name)
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)
        return reader

    def divert(self, files: Iterable[str], folder: Path) -> None:
        """Read these files in ``folder``, which holds copies of them (in this process alone)."""
        self._elsewhere |= dict.fromkeys(files, folder)

    def home(self, run: RunInfo) -> Path:
        """The folder that holds ``run``."""
        return self.path

    def reserve(self, readers: int) -> None:
        """Keep at least so many runs open at a time."""
        self._capacity = max(self._capacity, readers)

    def close(self) -> None:
        """Forget the cached readers; each file closes when its last user is done."""
        with self._lock:
            self._open.clear()

    def summary(self) -> dict[str, Any]:
        """Counts and settings in plain types, for ``fmrizoo inspect``."""
        files = sorted({run.file for run in self.runs})
        there = [f for f in files if os.path.exists(self.path / f)]
        contracts: dict[bytes, Contract] = {}
        for run in self.runs:
            contracts.setdefault(canonical(run.contract.to_dict()), run.contract)
        participants = self.participants
        return {
            "path": str(self.path),
            "subjects": len({run.subject for run in self.runs}),
            "runs": len(self.runs),
            "frames": sum(run.n_frames for run in self.runs),
            "minutes": sum(run.n_frames * run.tr for run in self.runs) / 60,
            "bytes": sum((self.path / f).stat().st_size for f in there),
            "missing_files": [f for f in files if f not in there],
            "stored_as": dict(Counter(run.kind for run in self.runs)),
            "quantisation_error": max((run.quantisation_error for run in self.runs), default=0.0),
            "brain_voxels": sorted({run.n_vox for run in self.runs}),
            "contracts": [contract.to_dict() for contract in contracts.values()],
            "trial_types": sorted(
                {str(e["trial_type"]) for run in self.runs for e in run.events if "trial_type" in e}
            ),
            "participants_columns": [] if participants is None else list(participants.columns),
        }

    def verify(self) -> list[Fault]:
        """Read every byte and compare every checksum; an empty list means all is well."""
        faults = []
        for run in self.runs:
            try:
                reader = RunReader(self.path / run.file, run.name, run.uuid, run.meta_crc32)
            except CorruptStoreError as error:
                faults.append(Fault(run.file, run.name, str(error)))
                continue
            faults += [Fault(run.file, run.name, str(e)) for _, e in reader.bad_frames()]
        return faults


def common_contract(runs: Sequence[RunInfo]) -> Contract:
    """The contract that ``runs`` share.

    Raises:
        DataError: no runs, or runs that were preprocessed differently (named in the message).
    """
    if not runs:
        raise DataError("there are no runs, so there is no preprocessing contract")
    first = runs[0]
    for run in runs[1:]:
        if differences := first.contract.differences(run.contract):
            raise DataError(
                f"runs {first.name} and {run.name} were preprocessed differently "
                f"({'; '.join(differences)}): pick one kind with data.select"
            )
    return first.contract


def read_table(file: Path) -> pandas.DataFrame:
    """A BIDS TSV with every column as text; ``n/a`` and empty cells are missing.

    Raises:
        DataError: not a tab-separated table.
    """
    import pandas

    try:
        with warnings.catch_warnings():
            # Rows longer than the header: pandas would drop cells, or take a column for an index.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            return pandas.read_csv(
                file,
                sep="\t",
                dtype=str,
                keep_default_na=False,
                na_values=["n/a", "N/A", ""],
                index_col=False,
            )
    except (ValueError, OSError, OverflowError, MemoryError) as error:
        raise DataError(f"{file} is not a tab-separated table: {error}") from None
    except pandas.errors.ParserWarning:
        raise DataError(
            f"{file} is not a tab-separated table: it has rows with more cells than its header"
        ) from None


def records(table: pandas.DataFrame) -> list[dict[str, str]]:
    """Rows of :func:`read_table` as text; missing cells are empty."""
    return cast("list[dict[str, str]]", table.fillna("").to_dict("records"))


def _nearest(name: str, known: list[str]) -> str:
    text = suggest(name, known)
    return text if len(known) <= 20 else text.split(" Available")[0]

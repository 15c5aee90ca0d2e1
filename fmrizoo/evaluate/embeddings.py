"""Embeddings of clips, runs or subjects with the names of what they are of, and their file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmrizoo.errors import DataError
from fmrizoo.files import write_arrays

SCHEMA = "fmrizoo.embeddings/1"
LEVELS = ("clip", "run", "subject")
_COLUMNS = ("unit", "subject", "run", "start", "n_clips")


@dataclass(frozen=True)
class EmbeddingRow:
    """What one row of embeddings is of.

    Attributes:
        unit: The clip (``<run>#frame-<start>``, or the event), the run, or ``sub-XX``.
        subject: Its subject, without ``sub-``.
        run: Its run; several joined by ``;`` where a subject has several.
        start: First frame of the clip within its run; None for runs and subjects.
        n_clips: Clips averaged.
    """

    unit: str
    subject: str
    run: str
    start: int | None
    n_clips: int = 1


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Numbers and what they are of.

    Attributes:
        values: ``(n, d)`` fp32; ``(n, t, d)`` per time slot, ``(n, p, d)`` per parcel,
            ``(n, x, y, z, d)`` per place.
        rows: ``n`` of them.
        about: How they were made, in plain JSON types: pooling, stage, level, labels of the
            parcels, how clips were cut, the weights' SHA-256.
    """

    values: NDArray[np.float32]
    rows: tuple[EmbeddingRow, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.values.ndim < 2 or len(self.values) != len(self.rows):
            raise DataError(
                f"embeddings of shape {self.values.shape} do not fit {len(self.rows)} rows"
            )

    def save(self, path: Path) -> None:
        """Write one ``.npz`` file, whole or not at all; NumPy reads it without fmrizoo.

        Its arrays: ``values``; ``unit``, ``subject``, ``run`` (text); ``start`` (−1 for runs and
        subjects) and ``n_clips``; ``about`` (JSON text).

        Raises:
            DataError: another suffix, or the file cannot be written.
        """
        check_suffix(path)
        starts = [-1 if row.start is None else row.start for row in self.rows]
        write_arrays(
            path,
            values=self.values,
            **{name: _texts(getattr(r, name) for r in self.rows) for name in _COLUMNS[:3]},
            start=np.array(starts, np.int64),
            n_clips=np.array([row.n_clips for row in self.rows], np.int64),
            about=np.array(json.dumps({"schema": SCHEMA, **self.about}, allow_nan=False)),
        )

    @classmethod
    def read(cls, path: Path) -> Embeddings:
        """Inverse of :meth:`save`; every array is checked against its checksum.

        Raises:
            DataError: no such file, not one of embeddings, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in ("values", *_COLUMNS, "about")}
            about = json.loads(str(arrays["about"]))
            schema = about.pop("schema")
        except OSError as error:
            why = error.strerror or error
            raise DataError(f"embeddings {path} cannot be read: {why}") from None
        # An archive of something else, or bytes that are not those that were written.
        except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is no file of embeddings, or damaged: {error}") from None
        if schema != SCHEMA:
            raise DataError(f"{path} has format {schema!r}, this version reads {SCHEMA!r}")
        columns = zip(*(arrays[name].tolist() for name in _COLUMNS), strict=True)
        rows = tuple(
            EmbeddingRow(unit, subject, run, None if start < 0 else start, n)
            for unit, subject, run, start, n in columns
        )
        return cls(arrays["values"], rows, about)


def check_suffix(path: Path) -> None:
    """Raise :class:`DataError` unless ``path`` is named as a NumPy archive."""
    if path.suffix != ".npz":
        raise DataError(f"embeddings are written as a NumPy archive: name it .npz, not {path.name}")


def _texts(values: Iterable[str]) -> NDArray[np.str_]:
    return np.array(list(values), dtype=np.str_)


class Mean:
    """Running means of arrays by key; what is NaN in one clip counts for nothing there."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def add(self, key: str, value: NDArray[np.float32]) -> None:
        """Count ``value`` for ``key``."""
        known = ~np.isnan(value)
        counted = np.where(known, value, 0.0).astype(np.float64)
        self._sums[key] = self._sums.get(key, np.zeros(value.shape)) + counted
        self._counts[key] = self._counts.get(key, np.zeros(value.shape, np.int64)) + known

    def values(self) -> NDArray[np.float32]:
        """``(keys, …)`` in the order in which they came; NaN where nothing was known."""
        rows = []
        for key, total in self._sums.items():
            count = self._counts[key]
            rows.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
        return np.stack(rows).astype(np.float32)

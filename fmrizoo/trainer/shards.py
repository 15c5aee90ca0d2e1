"""Rows of features on disk: one shard a rank, each tensor in a memory-mapped ``.npy`` file.

``rank-00000.0.npy``, ``rank-00000.1.npy``, … hold ``(rows, …)`` each. ``rank-00000.json``, written
last, says which rows of the table they are, what they were made of (``made_of``), and the SHA-256
of every file: a shard is either whole or not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmrizoo.errors import CheckpointError
from fmrizoo.files import publish, sha256_of, write_json
from fmrizoo.trainer.accounting import megabytes
from fmrizoo.trainer.files import writing

SCHEMA = "fmrizoo.features/1"
# NumPy has no bfloat16: its bits are kept as another type of the same size.
_STORED = {torch.bfloat16: torch.int16}

Rows = tuple[Tensor, ...]


class Shard:
    """Rows ``first`` to ``last`` − 1 of a table, in ``folder``.

    Args:
        folder: Of one table.
        number: Of this shard.
        first, last: Its rows.
        made_of: Plain JSON values; with other ones the rows would be others.
    """

    def __init__(
        self, folder: Path, number: int, first: int, last: int, made_of: dict[str, Any]
    ) -> None:
        self.folder, self.name = folder, f"rank-{number:05d}"
        self.first, self.last, self.made_of = first, last, made_of
        self._arrays: list[NDArray[Any]] = []
        self._dtypes: list[torch.dtype] = []

    @property
    def _facts(self) -> Path:
        return self.folder / f"{self.name}.json"

    def _file(self, tensor: int) -> Path:
        return self.folder / f"{self.name}.{tensor}.npy"

    def fault(self) -> str:
        """Why this shard cannot be used; empty if it can. ``absent`` if it was never written."""
        if not self._facts.is_file():
            return "absent"
        try:
            facts = json.loads(self._facts.read_text(encoding="utf-8"))
            if facts["schema"] != SCHEMA:
                return f"written in another format ({facts['schema']})"
            before, wanted = facts["made_of"], {**self.made_of, "rows": [self.first, self.last]}
            if others := sorted(k for k in before | wanted if before.get(k) != wanted.get(k)):
                return f"made with another {', '.join(others)}"
            checksums = [str(tensor["sha256"]) for tensor in facts["tensors"]]
        except (ValueError, KeyError, TypeError):
            return f"{self._facts.name} is unreadable"
        for tensor, checksum in enumerate(checksums):
            path = self._file(tensor)
            if not path.is_file() or sha256_of(path) != checksum:
                return f"{path.name} is missing or damaged"
        return ""

    def write(self, batches: Iterable[Rows]) -> None:
        """Write the rows that ``batches`` hold in turn, ``last − first`` of them in all.

        Raises:
            CheckpointError: no room, or a folder that cannot be written.
        """
        with writing("features", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._facts.unlink(missing_ok=True)
        tensors = self._write_files(iter(batches))
        made_of = {**self.made_of, "rows": [self.first, self.last]}
        with writing("features", self.folder):
            write_json(self._facts, {"schema": SCHEMA, "made_of": made_of, "tensors": tensors})

    def _write_files(self, batches: Iterator[Rows]) -> list[dict[str, Any]]:
        first = next(batches, None)
        if first is None:  # more ranks than rows
            return []
        self._check_room(first)
        written: list[_Writer] = []
        with ExitStack() as stack:
            for k, rows in enumerate(first):
                writer = _Writer(self._file(k), self.last - self.first, rows)
                written.append(stack.enter_context(writer))
            for batch in _chain(first, batches):
                for writer, rows in zip(written, batch, strict=True):
                    writer.append(rows)
            return [writer.publish() for writer in written]

    def _check_room(self, first: Rows) -> None:
        """Fail now, not after hours of computing."""
        row = sum(t[0].numel() * t.element_size() for t in first)
        need, free = row * (self.last - self.first), shutil.disk_usage(self.folder).free
        if need > free:
            raise CheckpointError(
                f"the features need {megabytes(need)} in {self.folder} and {megabytes(free)} are "
                f"free: make room, or set train.cache_features=false"
            )

    def open(self) -> None:
        """Map the files into memory."""
        facts = json.loads(self._facts.read_text(encoding="utf-8"))
        self._dtypes = [getattr(torch, tensor["dtype"]) for tensor in facts["tensors"]]
        self._arrays = [np.load(self._file(k), mmap_mode="r") for k in range(len(self._dtypes))]

    def row(self, clip: int) -> list[NDArray[Any]]:
        """What is stored of one row of the table."""
        return [array[clip - self.first] for array in self._arrays]

    def stack(self, rows: Sequence[list[NDArray[Any]]]) -> Rows:
        """Stored rows, of any shards of this table, as tensors ``(len(rows), …)``."""
        columns = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return tuple(t.view(d) for t, d in zip(columns, self._dtypes, strict=True))


class _Writer:
    """One tensor's file while it grows; removed again unless :meth:`publish` was reached."""

    def __init__(self, path: Path, rows: int, like: Tensor) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.tmp")
        self._dtype, self._row, self._left = like.dtype, like.shape[1:], rows
        self._shape = (rows, *like.shape[1:])
        self._sha = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Writer:
        stored = _stored(torch.empty(0, dtype=self._dtype)).dtype
        header = io.BytesIO()
        facts = {"descr": stored.str, "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(header, facts)
        with writing("features", self._path):
            self._file = self._temporary.open("wb")
        self._put(header.getvalue())
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            # Not published: thrown away, whether or not what was buffered still fits the disk.
            with suppress(OSError):
                self._file.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, rows: Tensor) -> None:
        """The next rows."""
        if rows.shape[1:] != self._row or rows.dtype != self._dtype or len(rows) > self._left:
            raise CheckpointError(
                f"features cannot be kept: {self._left} rows of {self._dtype} {tuple(self._row)} "
                f"were still expected, got {len(rows)} of {rows.dtype} {tuple(rows.shape[1:])}; "
                f"set train.cache_features=false"
            )
        self._put(_stored(rows).tobytes())
        self._left -= len(rows)

    def _put(self, content: bytes) -> None:
        # Only around the file: what fails while features are computed is another matter.
        with writing("features", self._path):
            cast(IO[bytes], self._file).write(content)
        self._sha.update(content)

    def publish(self) -> dict[str, Any]:
        """Give the whole file its name; returns what the facts say of it."""
        assert self._file is not None
        if self._left:
            raise CheckpointError(f"features cannot be kept: {self._left} rows never came")
        with writing("features", self._path):
            self._file.close()
            publish(self._temporary, self._path)
        return {
            "shape": list(self._shape),
            "dtype": str(self._dtype).removeprefix("torch."),
            "sha256": self._sha.hexdigest(),
        }


def _stored(rows: Tensor) -> NDArray[Any]:
    plain = rows.detach().cpu().contiguous()
    array: NDArray[Any] = plain.view(_STORED.get(plain.dtype, plain.dtype)).numpy()
    return array


def _chain(first: Rows, rest: Iterator[Rows]) -> Iterator[Rows]:
    yield first
    yield from rest

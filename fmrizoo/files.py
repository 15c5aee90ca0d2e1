"""Files that are either whole or absent: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fmrizoo.errors import DataError

PART = ".part"  # suffix of a file that is being written; never read, removed by the next writer


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of ``path`` survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def publish(temporary: Path, final: Path, *, read_only: bool = False) -> None:
    """Flush ``temporary`` to disk and give it the name ``final`` in one step."""
    sync_file(temporary)
    if read_only:
        os.chmod(temporary, 0o444)
    os.replace(temporary, final)
    sync_folder(final.parent)


def replace_content(path: Path, content: bytes) -> None:
    """Write a small file; a reader sees the old content or the new, never a part.

    Raises:
        OSError: the folder cannot be written or the disk is full (the old file is untouched).
    """
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        publish(temporary, path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """:func:`replace_content` of UTF-8 text."""
    replace_content(path, text.encode())


def write_json(path: Path, values: Any) -> None:
    """:func:`replace_content` of indented JSON (NaN and infinities are refused)."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_atomic(path: Path, content: bytes) -> None:
    """:func:`replace_content` that makes the folder and fails in one sentence.

    Raises:
        DataError: the folder cannot be written or the disk is full (the old file is untouched).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_content(path, content)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def write_arrays(path: Path, **arrays: Any) -> None:
    """:func:`write_atomic` of a compressed NumPy archive."""
    import numpy as np

    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomic(path, content.getvalue())


def canonical(values: Any) -> bytes:
    """JSON whose bytes depend on the values only: the input of every checksum here."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_of(path: Path, told: Callable[[int], object] | None = None) -> str:
    """Hex SHA-256 of a file's bytes.

    Args:
        path: Of the file.
        told: Called with the size of each piece once it is counted in.
    """
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            if told is not None:
                told(count)
    return digest.hexdigest()

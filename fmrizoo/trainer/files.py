"""Files that are either whole or absent: written aside, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fmrizoo.errors import CheckpointError


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, read-only folder) into one sentence.

    Raises:
        CheckpointError: in place of an OSError, or of a RuntimeError, which is what torch.save
            makes of a full disk.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {what} to {path}: {error}. Checkpoints written before are untouched; "
            f"make room or choose another folder, and run the same command again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the content of ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Sync ``temporary`` and give it the name ``path`` in one step."""
    sync_file(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write ``path`` so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)


def write_json(path: Path, values: Any) -> None:
    """:func:`write_text` of indented JSON (NaN and infinities are refused)."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

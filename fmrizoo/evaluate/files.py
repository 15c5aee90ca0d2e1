"""Atomic text files: a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fmrizoo.errors import DataError


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) beside ``path``, flush it to the disk, then rename it into place.

    Raises:
        DataError: the folder cannot be written (full disk, no permission).
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; results are meant to be shared like any other output.
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise DataError(f"{path} could not be written: {error.strerror or error}") from error

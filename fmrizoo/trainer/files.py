"""Failed writes of checkpoints and models, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fmrizoo.errors import CheckpointError


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, read-only folder) into one sentence.

    Raises:
        CheckpointError: in place of an OSError, or of a RuntimeError, which is what torch.save
            makes of a full disk.
    """
    from safetensors import SafetensorError

    from fmrizoo.trainer.ranks import lost

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if lost(error):  # nothing is wrong with the disk
            raise
        raise CheckpointError(
            f"cannot write {what} to {path}: {error}. Checkpoints written before are untouched; "
            f"make room or choose another folder, and run the same command again"
        ) from error

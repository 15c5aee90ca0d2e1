"""The weights of the best validation so far.

``best/step-000040.safetensors`` holds the values after step 40 of what training may change (trained
parameters and all buffers). The checkpoints say which of these files they count on, and with what
checksum; a file that none of those kept counts on is removed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from fmrizoo.errors import CheckpointError
from fmrizoo.files import publish, sha256_of
from fmrizoo.trainer.export import apart
from fmrizoo.trainer.files import writing


def weights_path(run: Path, step: int) -> Path:
    """Where the weights after ``step`` are kept, in the run folder ``run``."""
    return run / "best" / f"step-{step:06d}.safetensors"


def write_weights(run: Path, step: int, tensors: Mapping[str, Tensor]) -> str:
    """Write what training may change after ``step``; returns the file's SHA-256.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full.
    """
    from safetensors.torch import save_file

    path = weights_path(run, step)
    temporary = path.with_name(f".{path.name}.tmp")
    own = apart(tensors)
    with writing(f"the best weights (of step {step})", path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(own, temporary, metadata={"format": "pt"})
            checksum = sha256_of(temporary)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return checksum


def weights_fault(run: Path, step: int, sha256: str) -> str:
    """What is wrong with a weights file; empty if nothing is."""
    path = weights_path(run, step)
    if not path.is_file():
        return f"its best weights {path.relative_to(run)} are missing"
    if sha256_of(path) != sha256:
        return f"its best weights {path.relative_to(run)} have another checksum"
    return ""


def read_weights(run: Path, step: int, sha256: str) -> dict[str, Tensor]:
    """Inverse of :func:`write_weights`.

    Raises:
        CheckpointError: the file is missing or not as it was written.
    """
    from safetensors.torch import load_file

    if fault := weights_fault(run, step, sha256):
        raise CheckpointError(
            f"{run} cannot be exported: {fault}. Run the same command again: it goes on from an "
            f"older checkpoint, if one is whole, and makes them anew"
        )
    return load_file(weights_path(run, step))


def drop_weights(run: Path, keep: Collection[int]) -> None:
    """Remove all weights files, unfinished ones included, but those of the steps in ``keep``."""
    kept = {weights_path(run, step) for step in keep}
    folder = run / "best"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path not in kept:
            path.unlink()

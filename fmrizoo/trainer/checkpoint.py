"""Checkpoints that can be trusted: checksummed, published by a rename, the last few kept.

``checkpoints/step-000123/`` holds DeepSpeed's files (``deepspeed/``), one ``rng-*.pt`` per rank,
``state.json`` and ``manifest.json`` (size and SHA-256 of all the others, written last). The folder
is made under another name and renamed when whole; ``checkpoints/latest`` names the newest one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmrizoo.errors import CheckpointError
from fmrizoo.files import sha256_of, sync_file, sync_folder, write_json, write_text
from fmrizoo.trainer.best import drop_weights, weights_fault
from fmrizoo.trainer.export import ModelInfo as ModelInfo
from fmrizoo.trainer.export import read_info as read_info
from fmrizoo.trainer.export import read_model as read_model
from fmrizoo.trainer.export import save_model as save_model

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
_PREFIX = "step-"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps taken.
        micro_step: Micro-batches consumed per rank.
        world_size: Ranks that wrote the checkpoint (only as many can load it).
        seconds: Training time so far, over all starts.
        recipe_hash: SHA-256 of the recipe's keys that decide the result.
        best: The best validation so far.
        best_step: Its step.
        best_sha256: Of its weights file (:mod:`fmrizoo.trainer.best`); empty if none is kept.
        waited: Validations since then.
        skipped: Steps left out because something was not finite (``train.not_finite=skip``).
    """

    step: int
    micro_step: int
    world_size: int
    seconds: float
    recipe_hash: str
    best: dict[str, float] | None = None
    best_step: int = 0
    best_sha256: str = ""
    waited: int = 0
    skipped: int = 0


def name_of(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"{_PREFIX}{step:06d}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is put together before it gets its name."""
    return checkpoints / f"{name_of(step)}{_PARTIAL}"


def seal(checkpoints: Path, state: RunState, keep: int) -> Path:
    """Turn the partial folder of ``state.step`` into a checkpoint and drop old ones.

    Only rank 0 calls this, after all ranks have written their files.

    Returns:
        The published folder.
    """
    partial = partial_folder(checkpoints, state.step)
    write_json(partial / STATE, asdict(state))
    listed = {}
    for path in sorted(p for p in partial.rglob("*") if p.is_file()):
        sync_file(path)
        listed[path.relative_to(partial).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
    write_json(partial / MANIFEST, {"schema": "fmrizoo.checkpoint/1", "files": listed})
    final = checkpoints / name_of(state.step)
    if final.exists():
        # Only a torn one can be here: the run would otherwise have gone on from it.
        shutil.rmtree(final)
    os.replace(partial, final)
    sync_folder(checkpoints)
    write_text(checkpoints / "latest", final.name + "\n")
    for old in found(checkpoints)[keep:]:
        shutil.rmtree(old)
    if state.best_sha256:
        drop_weights(checkpoints.parent, best_steps(checkpoints))
    return final


def best_steps(checkpoints: Path) -> set[int]:
    """Steps whose best weights the checkpoints there count on."""
    steps = set()
    for folder in found(checkpoints):
        try:
            state = _state(folder)
        except (CheckpointError, OSError, ValueError):
            continue  # a torn checkpoint is never gone on from
        if state.best_sha256:
            steps.add(state.best_step)
    return steps


def found(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not."""
    if not checkpoints.is_dir():
        return []
    numbered = [
        (int(p.name[len(_PREFIX) :]), p)
        for p in checkpoints.iterdir()
        if p.is_dir() and p.name.startswith(_PREFIX) and p.name[len(_PREFIX) :].isdigit()
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def clear_partial(checkpoints: Path) -> None:
    """Remove what a killed writer left behind."""
    if checkpoints.is_dir():
        for path in checkpoints.glob(f"{_PREFIX}*{_PARTIAL}"):
            log.info("removing the unfinished checkpoint %s", path)
            shutil.rmtree(path)


def faults(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; an empty list means every byte is as written."""
    manifest = folder / MANIFEST
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        wanted = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is unreadable"]
    wrong = []
    for name, (size, digest) in wanted.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif sha256_of(path) != digest:
            wrong.append(f"{name} has another checksum")
    if STATE not in wanted:
        wrong.append(f"{STATE} is not listed")
    return wrong


def newest_valid(checkpoints: Path, *, resume: bool = True) -> tuple[Path, RunState] | None:
    """The newest checkpoint whose checksums hold; torn ones are logged and passed over.

    Args:
        checkpoints: ``checkpoints/`` of a run folder.
        resume: Also pass over one whose best weights are damaged: from an older one the run makes
            them again.

    Returns:
        Its folder and state, or None where no checkpoint was ever published.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    candidates = found(checkpoints)
    for folder in candidates:
        wrong = faults(folder)
        if not wrong:
            state = _state(folder)
            if resume and state.best_sha256:
                wrong = [weights_fault(checkpoints.parent, state.best_step, state.best_sha256)]
            if not any(wrong):
                return folder, state
        log.error("checkpoint %s is damaged and not used: %s", folder, "; ".join(wrong))
    if candidates:
        raise CheckpointError(
            f"all {len(candidates)} checkpoints in {checkpoints} are damaged; delete the folder to "
            f"start this run from its beginning"
        )
    return None


def _state(folder: Path) -> RunState:
    values: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    try:
        return RunState(**values)
    except TypeError as error:
        raise CheckpointError(f"{folder / STATE} is of another fmrizoo version: {error}") from None

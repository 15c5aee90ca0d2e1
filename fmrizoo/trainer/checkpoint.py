"""Checkpoints that can be trusted: checksummed, published by a rename, the last few kept.

``checkpoints/step-000123/`` holds one ``shard-*.safetensors`` and one ``rng-*.pt`` per rank, what
is where in the shards (``tensors.json``, :mod:`fmrizoo.trainer.sharded`), ``state.json``,
``model.json`` (what a model made of it would say of itself), ``parametrization.json`` of a muP
model, and ``manifest.json`` (size and SHA-256 of all the others, written last). The folder is made
under another name and renamed when whole; ``checkpoints/latest`` names the newest one.

Each rank writes and checksums its own files and says so in ``written-*.json``; when all have, rank
0 puts index and manifest together and publishes the folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fmrizoo.errors import CheckpointError
from fmrizoo.files import sha256_of, sync_file, sync_folder, write_json, write_text
from fmrizoo.trainer.best import weights_fault
from fmrizoo.trainer.export import ModelInfo as ModelInfo
from fmrizoo.trainer.export import read_info as read_info
from fmrizoo.trainer.export import read_model as read_model
from fmrizoo.trainer.export import save_model as save_model
from fmrizoo.trainer.sharded import INDEX, index_of

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
MODEL = "model.json"
_PREFIX = "step-"
_PARTIAL = ".partial"
_WRITTEN = "written-"
SCHEMA = "fmrizoo.checkpoint/2"


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps taken.
        micro_step: Micro-batches consumed per rank.
        world_size: Ranks that wrote the checkpoint (any number can load it).
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


def begin(checkpoints: Path, state: RunState, info: ModelInfo) -> Path:
    """Make the partial folder of a step; only rank 0 calls this.

    Returns:
        Where all ranks put their files.
    """
    partial = partial_folder(checkpoints, state.step)
    if partial.exists():
        shutil.rmtree(partial)  # of a start that was killed
    partial.mkdir(parents=True)
    write_json(partial / STATE, asdict(state))
    write_json(partial / MODEL, info.to_dict())
    return partial


def note_written(
    partial: Path,
    rank: int,
    files: Sequence[Path],
    places: dict[str, Any],
    steps: int,
    told: Callable[[int], object] | None = None,
) -> None:
    """Say that a rank has written ``files``: their checksums, and what is where in its shard.

    Args:
        partial: From :func:`begin`.
        rank: Of this process.
        files: In ``partial``.
        places: Of :class:`fmrizoo.trainer.sharded.Snapshot`.
        steps: Updates that the optimizer has taken.
        told: Called with the size of each piece that was checksummed.
    """
    listed = {}
    for path in files:
        sync_file(path)
        listed[path.name] = _facts(path, told)
    said = {"files": listed, "places": places, "optimizer_steps": steps}
    write_json(partial / f"{_WRITTEN}{rank:05d}.json", said)


def all_written(partial: Path, ranks: int) -> bool:
    """Whether every rank has noted its files."""
    return sum(1 for _ in partial.glob(f"{_WRITTEN}*.json")) == ranks


def seal(checkpoints: Path, step: int, keep: int) -> Path:
    """Turn the partial folder of ``step`` into a checkpoint and drop old ones.

    Only rank 0 calls this, after all ranks have noted what they wrote.

    Returns:
        The published folder.

    Raises:
        CheckpointError: what the ranks wrote is not one whole model.
    """
    partial = partial_folder(checkpoints, step)
    listed: dict[str, Any] = {}
    places: dict[int, Any] = {}
    steps: set[int] = set()
    for note in sorted(partial.glob(f"{_WRITTEN}*.json")):
        said = json.loads(note.read_text(encoding="utf-8"))
        listed |= said["files"]
        places[int(note.stem.removeprefix(_WRITTEN))] = said["places"]
        steps.add(int(said["optimizer_steps"]))
        note.unlink()
    if len(steps) != 1:
        raise CheckpointError(f"the ranks are at different updates: {sorted(steps)}")
    write_json(partial / INDEX, index_of(places, steps.pop()))
    for path in partial.glob("*.json"):
        listed[path.name] = _facts(path)
    manifest = {"schema": SCHEMA, "files": dict(sorted(listed.items()))}
    write_json(partial / MANIFEST, manifest)
    final = checkpoints / name_of(step)
    if final.exists():
        # Only a torn one can be here: the run would otherwise have gone on from it.
        shutil.rmtree(final)
    os.replace(partial, final)
    sync_folder(checkpoints)
    write_text(checkpoints / "latest", final.name + "\n")
    for old in found(checkpoints)[keep:]:
        shutil.rmtree(old)
    return final


def _facts(path: Path, told: Callable[[int], object] | None = None) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path, told)}


def best_steps(checkpoints: Path) -> set[int]:
    """Steps whose best weights the checkpoints there count on."""
    steps = set()
    for folder in found(checkpoints):
        try:
            state = read_state(folder)
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


def faults(
    folder: Path,
    share: tuple[int, int] = (0, 1),
    told: Callable[[int], object] | None = None,
) -> list[str]:
    """What is wrong with a checkpoint; an empty list means every byte is as written.

    Args:
        folder: Of one step.
        share: ``(i, n)``: compare the checksums of every n-th file only, from the i-th on.
        told: Called with the size of each piece that was read.
    """
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if values["schema"] != SCHEMA:
            return [f"{MANIFEST} is {values['schema']}, not {SCHEMA}: of another fmrizoo version"]
        files = values["files"]
        wanted = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is unreadable"]
    wrong = [f"{name} is not listed" for name in (STATE, MODEL, INDEX) if name not in wanted]
    for name, (size, digest) in list(wanted.items())[share[0] :: share[1]]:
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif sha256_of(path, told) != digest:
            wrong.append(f"{name} has another checksum")
    return wrong


def newest_valid(
    checkpoints: Path,
    *,
    resume: bool = True,
    faults_of: Callable[[Path], list[str]] = faults,
) -> tuple[Path, RunState] | None:
    """The newest checkpoint whose checksums hold; torn ones are logged and passed over.

    Args:
        checkpoints: ``checkpoints/`` of a run folder.
        resume: Also pass over one whose best weights are damaged: from an older one the run makes
            them again.
        faults_of: What is wrong with a folder.

    Returns:
        Its folder and state, or None where no checkpoint was ever published.

    Raises:
        CheckpointError: there are checkpoints and all of them are damaged.
    """
    candidates = found(checkpoints)
    for folder in candidates:
        wrong = faults_of(folder)
        if not wrong:
            state = read_state(folder)
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


def read_state(folder: Path) -> RunState:
    """``state.json`` of a checkpoint that has no :func:`faults`.

    Raises:
        CheckpointError: it is of another version.
    """
    values: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    try:
        return RunState(**values)
    except TypeError as error:
        raise CheckpointError(f"{folder / STATE} is of another fmrizoo version: {error}") from None

"""A model folder out of a checkpoint, on any machine: no DeepSpeed, no GPU, no other rank.

For runs that are not finished, and for steps before the end.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fmrizoo.errors import CheckpointError
from fmrizoo.mup.parametrization import FILE as PARAMETRIZATION
from fmrizoo.trainer.best import read_weights
from fmrizoo.trainer.checkpoint import MODEL, RunState, faults, found, newest_valid, read_state
from fmrizoo.trainer.export import CONFIG, ModelInfo, save_model
from fmrizoo.trainer.files import writing
from fmrizoo.trainer.fragments import MEAN, WEIGHT
from fmrizoo.trainer.sharded import Sharded

log = logging.getLogger(__name__)


def consolidate(source: Path, out: Path, *, step: int | None = None, best: bool = False) -> Path:
    """Write the weights of a checkpoint as ``model.safetensors`` + ``config.json``.

    What comes out is what the run exports at its end: fp32, running means if it keeps them
    (``train.ema``).

    Args:
        source: Run folder, or a checkpoint in it.
        out: Model folder to write; it must hold no model yet.
        step: Of which checkpoint of a run folder; None: the newest whole one.
        best: With the weights of the best validation that the checkpoint knows of
            (``train.keep_best``) in place of those of its own step.

    Returns:
        ``out``.

    Raises:
        CheckpointError: no such checkpoint, a damaged one, or ``out`` is taken or cannot be
            written.
    """
    if (out / CONFIG).exists():
        raise CheckpointError(f"{out} holds a model already: choose another folder, or remove it")
    folder, state = _chosen(source, step)
    try:
        info = ModelInfo.from_dict(json.loads((folder / MODEL).read_text(encoding="utf-8")))
    except (ValueError, CheckpointError) as error:
        raise CheckpointError(f"{folder / MODEL} cannot be read: {error}") from None
    with Sharded(folder) as stored:
        tensors = {name: stored.whole(name, _kind(stored, name)) for name in stored.tensors}
        tensors |= {name: tensors[first] for name, first in stored.aliases.items()}
    tensors = {
        name: value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    if best:
        tensors |= _best(folder, state)
        info = replace(info, step=state.best_step)
    if (folder / PARAMETRIZATION).is_file():
        with writing(PARAMETRIZATION, out):
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / PARAMETRIZATION, out / PARAMETRIZATION)
    save_model(out, tensors, info)
    log.info("%s: step %d of %s", out, info.step, folder)
    return out


def _kind(stored: Sharded, name: str) -> str:
    return MEAN if MEAN in stored.kinds(name) else WEIGHT


def _chosen(source: Path, step: int | None) -> tuple[Path, RunState]:
    inside = source / "checkpoints"
    if not inside.is_dir():
        if step is not None:
            raise CheckpointError(f"--step is for run folders; {source} holds no checkpoints/")
        if wrong := faults(source):
            raise CheckpointError(f"{source} is no whole checkpoint: {'; '.join(wrong)}")
        return source, read_state(source)
    if step is None:
        newest = newest_valid(inside, resume=False)
        if newest is None:
            raise CheckpointError(f"{inside} holds no checkpoint yet")
        return newest
    steps = {read_step(path): path for path in found(inside)}
    if step not in steps:
        kept = ", ".join(str(known) for known in sorted(steps)) or "none"
        raise CheckpointError(f"{inside} holds no checkpoint of step {step}; there are: {kept}")
    return _chosen(steps[step], None)


def read_step(folder: Path) -> int:
    """Step of a checkpoint's folder by its name."""
    return int(folder.name.rpartition("-")[2])


def _best(folder: Path, state: RunState) -> dict[str, Tensor]:
    if not state.best_sha256:
        raise CheckpointError(
            f"{folder} knows of no best weights: the run has train.keep_best=false, or no "
            f"validation came before it"
        )
    return read_weights(folder.parent.parent, state.best_step, state.best_sha256)

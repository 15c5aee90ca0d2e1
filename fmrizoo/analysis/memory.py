"""``memory.json``: activation memory of one training step against the length of the clip.

Source: the SwiFT v2 report, Figure 5-C, which plots memory of the original and the revised model.
What is measured: how far one forward and backward pass of one clip raises the peak above weights,
gradients and the loader's compact clip. Each number comes from a process of its own. On a CPU it is
the growth of the peak resident size (Linux), on CUDA that of the allocator's peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fmrizoo.config import compose
from fmrizoo.errors import DataError, FmrizooError
from fmrizoo.files import write_atomic
from fmrizoo.types import check_checkpointing
from fmrizoo.zoo import load_recipe, recipe_path

SCHEMA = "fmrizoo.memory/1"
FILE = "memory.json"
CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryRow:
    """One measurement.

    Attributes:
        recipe: Name or file of the recipe.
        backbone: Registered name.
        objective: Registered name; empty: the bare encoder, with the mean square of its features.
        parameters: Of the whole model.
        checkpointing: ``none``, ``block`` or ``window-chunk``.
        frames: Frames of the clip.
        voxels: Voxels of the clip along x, y, z.
        precision, device: Of the step.
        mb: Growth of the peak in MB (2²⁰ bytes); None where the step failed.
        note: Why it failed; empty otherwise.
    """

    recipe: str
    backbone: str
    objective: str
    parameters: int
    checkpointing: str
    frames: int
    voxels: tuple[int, int, int]
    precision: str
    device: str
    mb: float | None
    note: str = ""


def measure_memory(
    recipes: Sequence[str],
    frames: Sequence[int],
    checkpointing: Sequence[str] = ("none", "window-chunk"),
    overrides: Sequence[str] = (),
    *,
    device: str = "cpu",
    on_row: Callable[[int, int, MemoryRow], None] | None = None,
) -> list[MemoryRow]:
    """Measure every recipe with every way of checkpointing at every length, one after the other.

    Args:
        recipes: Shipped names or files; backbone, objective and precision are taken from them.
        frames: Lengths of the clip; the backbone is built for each.
        checkpointing: Modes of ``train.checkpointing``.
        overrides: ``key=value`` for all recipes.
        device: ``cpu`` or ``cuda``.
        on_row: Called after every measurement with (done, total, row).

    Raises:
        RecipeError: a recipe that does not exist or cannot take clips of some length.
        DataError: this system cannot measure a peak.
    """
    _check_device(device)
    jobs = []
    for recipe in recipes:
        for mode in checkpointing:
            check_checkpointing(mode)
            for length in frames:
                sized = _sized(recipe, length, overrides)
                load_recipe(recipe, sized)  # refused before the first measurement, not in between
                jobs.append((recipe, mode, length, sized))
    rows = []
    for number, (recipe, mode, length, sized) in enumerate(jobs, start=1):
        row = _in_a_process(recipe, mode, length, sized, device)
        rows.append(row)
        if on_row is not None:
            on_row(number, len(jobs), row)
    return rows


def _check_device(device: str) -> None:
    if device == "cpu" and not CLEAR.exists():
        raise DataError(
            "the peak memory of a CPU step is read from /proc, which this system does not have: "
            "measure on Linux, or with --device cuda"
        )
    if device not in ("cpu", "cuda"):
        raise DataError(f"memory is measured on cpu or cuda, not on {device!r}")


def _sized(recipe: str, frames: int, overrides: Sequence[str]) -> list[str]:
    """Overrides that build the recipe's backbone for clips of ``frames``."""
    composed = compose(recipe_path(recipe), overrides)
    size = getattr(composed.backbone, "img_size", None)
    longer = [f"data.clip_frames={frames}"]
    if size is not None:
        longer.append(f"backbone.img_size=[{','.join(map(str, [*size[:3], frames]))}]")
    return [*overrides, *longer]


def _in_a_process(
    recipe: str, mode: str, frames: int, overrides: list[str], device: str
) -> MemoryRow:
    words = {"recipe": recipe, "mode": mode, "overrides": overrides, "device": device}
    # Blocks above 64 KiB go back to the system when freed, so the peak is what is in use.
    done = subprocess.run(
        [sys.executable, "-m", "fmrizoo.analysis.memory_step", json.dumps(words)],
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "DS_ACCELERATOR": device},
    )
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():  # what was known before a crash is printed first
        found |= json.loads(line)
    if "parameters" not in found:
        raise DataError(f"{recipe} at {frames} frames could not be built: {_reason(done)}")
    failed = "" if done.returncode == 0 else _reason(done)
    mb = None if failed else float(found["mb"])
    values = {k: v for k, v in found.items() if k != "mb"}
    x, y, z = values.pop("voxels")
    return MemoryRow(
        recipe=recipe,
        checkpointing=mode,
        frames=frames,
        voxels=(x, y, z),
        device=device,
        mb=mb,
        note=failed,
        **values,
    )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"stopped by signal {-done.returncode} (9: out of memory, as a rule)"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def write_memory(folder: Path, rows: Sequence[MemoryRow]) -> Path:
    """Write ``folder/memory.json`` atomically and return its path."""
    import torch

    path = folder / FILE
    body = {"schema": SCHEMA, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    write_atomic(path, (json.dumps(body, indent=1, allow_nan=False) + "\n").encode())
    return path


def read_memory(path: Path) -> tuple[MemoryRow, ...]:
    """Read and check one file.

    Raises:
        DataError: not JSON, another schema, or missing, unknown or wrongly typed fields.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(body, dict) or body.get("schema") != SCHEMA:
            raise DataError(f"{path} holds no memory measurements of fmrizoo (schema {SCHEMA})")
        return tuple(_row(values) for values in body["rows"])
    except FmrizooError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not readable as memory measurements: {error}") from None


def _row(values: dict[str, Any]) -> MemoryRow:
    if wrong := {f.name for f in fields(MemoryRow)} ^ set(values):
        raise ValueError(f"fields {sorted(wrong)} are missing or unknown")
    x, y, z = (int(v) for v in values["voxels"])
    texts = ("recipe", "backbone", "objective", "checkpointing", "precision", "device", "note")
    words = {name: str(values[name]) for name in texts}
    return MemoryRow(
        parameters=int(values["parameters"]),
        frames=int(values["frames"]),
        voxels=(x, y, z),
        mb=None if values["mb"] is None else float(values["mb"]),
        **words,
    )

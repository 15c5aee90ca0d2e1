"""One training step in a process of its own: ``python -m fmrizoo.analysis.memory_step JSON``.

Prints one JSON line about the model, then one with the growth of the peak in MB.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmrizoo.analysis.memory import CLEAR
from fmrizoo.analysis.sizes import brain_of
from fmrizoo.config import Recipe
from fmrizoo.errors import FmrizooError
from fmrizoo.model import PretrainingModel
from fmrizoo.types import Backbone, Batch, Grid, Voxels
from fmrizoo.zoo import build_model, load_recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def clip_of(grid: Grid, device: str, dtype: torch.dtype) -> Batch:
    """One made-up compact clip, as the loader gives it."""
    mask = brain_of(grid[:3])
    index = mask.flatten().nonzero()[:, 0]
    torch.manual_seed(1)
    voxels = Voxels(
        torch.randn(grid.t, len(index)), index, (len(index),), torch.full((1,), -2.0), grid
    )
    batch = Batch.compact(
        voxels,
        mask=mask.unsqueeze(0),
        tr=torch.ones(1),
        subject=["a"],
        run=["a"],
        start=torch.zeros(1),
        seed=torch.zeros(1, dtype=torch.int64),
    )
    return batch.to(device, dtype)


def step(model: PretrainingModel | Backbone, batch: Batch) -> None:
    """Forward and backward; gradients are added to those that are there."""
    if isinstance(model, PretrainingModel):
        loss, _ = model(batch)
    else:
        loss = model.encode(model.read(batch)).values.float().square().mean()
    loss.backward()


def high_water() -> float:
    """Peak resident size of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (v for v in lines if v.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def growth(model: PretrainingModel | Backbone, batch: Batch, device: str) -> float:
    """MB by which one step raises the peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(model, batch)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what the first step left behind must not hide what this one takes
    CLEAR.write_text("5")  # the peak starts anew at what is in use
    resident = high_water()
    step(model, batch)
    return high_water() - resident


def build(
    recipe: Recipe, mode: str, device: str, dtype: torch.dtype
) -> PretrainingModel | Backbone:
    """The recipe's model in training mode, with gradients allocated."""
    torch.manual_seed(0)
    recipe.head = None
    model = build_model(recipe)
    assert isinstance(model, (PretrainingModel, Backbone))
    backbone = model.backbone if isinstance(model, PretrainingModel) else model
    backbone.set_checkpointing(mode)
    moved: nn.Module = model.train().to(device, dtype)
    for parameter in moved.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are not activations
    return model


def main(words: dict[str, Any]) -> None:
    """Measure what ``words`` (recipe, mode, overrides, device) say and print it."""
    recipe = load_recipe(words["recipe"], words["overrides"])
    device, dtype = words["device"], DTYPES[recipe.train.precision]
    model = build(recipe, words["mode"], device, dtype)
    backbone = model.backbone if isinstance(model, PretrainingModel) else model
    grid = Grid(*recipe.backbone.img_size) if hasattr(recipe.backbone, "img_size") else None
    grid = (grid or backbone.clip_grid)._replace(t=recipe.data.clip_frames)
    about = {
        "backbone": recipe.backbone.name,
        "objective": recipe.objective.name if recipe.objective else "",
        "parameters": sum(p.numel() for p in model.parameters()),
        "voxels": list(grid[:3]),
        "precision": recipe.train.precision,
    }
    sys.stdout.write(json.dumps(about) + "\n")
    sys.stdout.flush()
    few = min(grid.t, 4 * backbone.patch_size[3])
    step(model, clip_of(grid._replace(t=few), device, dtype))  # kernels and their workspaces
    found = growth(model, clip_of(grid, device, dtype), device)
    sys.stdout.write(json.dumps({"mb": found}) + "\n")


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except FmrizooError as error:
        sys.exit(str(error))

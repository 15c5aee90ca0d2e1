"""A trained muP model on disk as a plain one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fmrizoo.config import to_dict
from fmrizoo.errors import CheckpointError
from fmrizoo.model import DownstreamModel
from fmrizoo.mup.fold import fold, folded_recipe
from fmrizoo.trainer.export import read_info, save_model
from fmrizoo.zoo import load, load_recipe, model_folder


def fold_model(path: str | Path, out: Path) -> Path:
    """Write the folded model of a run folder or model folder (:mod:`fmrizoo.mup.fold`).

    Args:
        path: Run folder or model folder.
        out: Model folder to make: ``parametrization.name=sp``, all else (contract, tasks, runs
            seen) as it was.

    Raises:
        CheckpointError: no model there, or ``out`` exists.
        RecipeError: the model is not muP.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists: give --out a folder that does not")
    info = read_info(model_folder(path))
    model = fold(load(path))
    recipe = folded_recipe(load_recipe(info.recipe))
    save_model(out, model, replace(info, recipe=to_dict(recipe)))
    if isinstance(model, DownstreamModel):
        model.head.export(model.backbone, out)
    return out

"""What any artefact of fmrizoo holds, as plain values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fmrizoo.errors import DataError
from fmrizoo.zoo import model_folder


def describe(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Summarise a store, a run folder, a checkpoint, a model folder or a split file.

    Args:
        path: Any of them.
        verify: Also compare every checksum; the answer then has ``faults``.

    Raises:
        DataError: nothing that fmrizoo knows.
        CorruptStoreError, CheckpointError: damaged files.
    """
    from fmrizoo.data.store import INDEX, Store, subject_files

    if not path.exists():
        raise DataError(f"no file or folder {path}")
    if path.is_file() and path.suffix == ".json":
        return _split(path)
    if (path / INDEX).is_file() or subject_files(path):
        store = Store(path)
        found = {"kind": "store", **store.summary()}
        if verify:
            found["faults"] = [fault.message for fault in store.verify()]
        return found
    if (path / "manifest.json").is_file():
        return _checkpoint(path)
    if (path / "recipe.yaml").is_file():
        return _run(path, verify)
    if (path / "config.json").is_file():
        return _model(path, verify)
    raise DataError(f"{path} is no store, run folder, checkpoint, model folder or split file")


def _split(path: Path) -> dict[str, Any]:
    from fmrizoo.data.splits import Split

    split = Split.load(path)
    left_out = {"left_out": dict(split.left_out)} if split.left_out else {}
    return {"kind": "split", "sha": split.sha, **split.parts(), **left_out}


def _checkpoint(path: Path) -> dict[str, Any]:
    from fmrizoo.trainer.checkpoint import STATE, faults

    wrong = faults(path)
    return {
        "kind": "checkpoint",
        "bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "state": None if wrong else json.loads((path / STATE).read_text(encoding="utf-8")),
        "faults": wrong,
    }


def _model(path: Path, verify: bool) -> dict[str, Any]:
    from fmrizoo.trainer.export import read_info, read_model

    info = read_info(path).to_dict()
    recipe = info.pop("recipe")
    found = {"kind": "model", **info, "backbone": recipe.get("backbone")}
    if verify:
        weights, _ = read_model(path)
        found["tensors"] = len(weights)
        found["faults"] = []
    return found


def _run(path: Path, verify: bool) -> dict[str, Any]:
    from fmrizoo.trainer.checkpoint import found as checkpoints
    from fmrizoo.trainer.folder import read_metrics
    from fmrizoo.zoo import load_recipe

    recipe = load_recipe(path / "recipe.yaml")
    rows = read_metrics(path / "metrics.jsonl")
    answer: dict[str, Any] = {
        "kind": "fine-tuning run" if recipe.head else "pretraining run",
        "backbone": recipe.backbone.name,
        "steps": f"{rows[-1]['step'] if rows else 0} of {recipe.train.steps}",
        "last": rows[-1] if rows else None,
        "checkpoints": [c.name for c in checkpoints(path / "checkpoints")],
    }
    if (path / "model" / "config.json").is_file():
        answer["model"] = _model(model_folder(path), verify)
    if (path / "results.json").is_file():
        answer["result"] = json.loads((path / "results.json").read_text(encoding="utf-8"))
    if verify and "model" in answer:
        answer["faults"] = answer["model"]["faults"]
    return answer

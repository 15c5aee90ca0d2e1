"""The run folder: recipe.yaml, env.json, metrics.jsonl, checkpoints/, best/, model/."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fmrizoo.config import Recipe, to_dict, to_yaml
from fmrizoo.errors import CheckpointError, RecipeError
from fmrizoo.files import sync_file, write_json, write_text
from fmrizoo.trainer.device import World, environment
from fmrizoo.trainer.files import writing

log = logging.getLogger(__name__)

# May differ between two starts of one run: none of them changes a number that is computed, beyond
# the order of sums (how a batch is cut up, and over how many ranks), but see _JUDGED_KEYS.
SAFE_KEYS = frozenset(
    {
        "train.keep",
        "train.async_save",
        "train.zero_stage",
        "train.accumulate",
        "train.max_micro_batch",
        "train.log_every",
        "train.save_every",
        "train.validate_every",
        "train.device",
        "train.compile",
        "train.profile",
        # A run that a bad batch stopped may go on without it: all steps before are the same.
        "train.not_finite",
        "train.max_skips",
        "train.hang_minutes",
        "data.threads",
        "data.store",
        "data.stage",
        "data.stage_keep",
    }
)
_MOVED = re.compile(r"data\.stores\.[^.]+\.path")  # as data.store
# But not once the validations decide which weights are exported, or how many steps are taken.
_JUDGING_KEYS = ("train.patience", "train.keep_best")
_JUDGED_KEYS = frozenset({"train.validate_every"})
# Sections that decide no training: which others are trained, which stored runs are flagged.
_ELSEWHERE = ("sweep.", "ablate.", "prepare.qc.", "split.inner")
# Absent means the same in folders from before there were such settings.
_LATER = {
    "split.train_units": 0,
    "split.column": "",
    "split.stratify": [],
    "split.bins": 4,
    "split.match.target": "",
    "split.match.on": [],
    "split.match.caliper": 0.2,
    "parametrization.query_zero_init": False,
    "train.ema": 0.0,
    "train.offload": "none",
    "prepare.desc": "preproc",
    "prepare.time_interpolation": "cubic",
    "prepare.allow_shorter_tr": False,
    "data.windows": "fixed",
    "data.balance": "none",
    "data.clips_per_visit": 1,
    "data.augment.affine.rotate": 0.0,
    "data.augment.affine.translate": 0.0,
    "data.augment.affine.scale": 0.0,
    "data.augment.frequency": 0.0,
    "data.augment.intensity": 0.0,
    "data.augment.noise": 0.0,
    "data.augment.time_shift": 0,
    "data.divide": 1,
    "data.exclude": "none",
    "data.leave_out": [],
}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaves (lists are leaves)."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def deciding_keys(*recipes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each recipe's leaves without those that may change when a run goes on."""
    flat = [flatten(recipe) for recipe in recipes]
    judged = any(keys.get(name) for keys in flat for name in _JUDGING_KEYS)
    safe = SAFE_KEYS - _JUDGED_KEYS if judged else SAFE_KEYS
    # None and an absent key mean the same: to_dict leaves the sections that are None out.
    return [
        {
            k: v
            for k, v in keys.items()
            if k not in safe
            and not _MOVED.fullmatch(k)
            and not k.startswith(_ELSEWHERE)
            and not (k.startswith("data.qc.") and keys.get("data.exclude", "none") == "none")
            and v not in (None, {})
            and not (k in _LATER and _LATER[k] == v)
        }
        for keys in flat
    ]


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of what :func:`deciding_keys` keeps."""
    (keys,) = deciding_keys(to_dict(recipe))
    text = json.dumps(keys, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.features = path / "features"

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse to go on under another recipe than the one the folder was started with.

        Raises:
            RecipeError: names every changed key with its old and new value.
            CheckpointError: the folder's recipe cannot be read.
        """
        if not self.recipe.is_file():
            return
        try:
            loaded = OmegaConf.to_container(OmegaConf.load(self.recipe))
        except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.recipe} cannot be read: {error}") from None
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{self.recipe} is not a recipe")
        old = {str(k): v for k, v in loaded.items()}
        before, after = deciding_keys(old, to_dict(recipe))
        changed = [
            f"{key}: {before.get(key)!r} → {after.get(key)!r}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
        if changed:
            raise RecipeError(
                f"{self.path} was started under another recipe ({'; '.join(changed)}): "
                f"undo the change to resume, or choose another output folder"
            )

    def write_start(self, recipe: Recipe, facts: Mapping[str, Any]) -> None:
        """Write recipe.yaml and env.json (versions, machine, and ``facts`` about this start)."""
        with writing("recipe.yaml and env.json", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe, to_yaml(recipe))
            write_json(self.path / "env.json", {**environment(), "git": git_commit(), **facts})

    def finished(self, steps: int) -> bool:
        """True where the model was exported after all ``steps``, or after early stopping."""
        from fmrizoo.trainer.export import CONFIG, read_info

        if not (self.model / CONFIG).is_file():
            return False
        info = read_info(self.model)
        return info.stopped_early or info.steps_taken == steps


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.info("no git commit recorded: %s", error)
        return None
    return done.stdout.strip()


def describe(world: World, device: str, nodes: int = 1) -> dict[str, Any]:
    """What env.json says about the ranks, and about the cores that rank 0's node gives it."""
    return {
        "device": device,
        "world_size": world.size,
        "nodes": nodes,
        "cores": len(os.sched_getaffinity(0)),
        "launcher": world.launcher,
    }


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, ordered by step, no step twice.

    Args:
        path: The file; made if absent.
        step: Lines after this step are dropped (they belong to work that a resumed run repeats),
            and so is a half-written last line.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [json.dumps(row) for row in read_metrics(path) if row["step"] <= step]
        write_text(path, "".join(line + "\n" for line in kept))
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line, visible to readers at once; a value that is not finite becomes null."""
        plain = {k: None if _undefined(v) else v for k, v in row.items()}
        with writing("metrics", self.path):
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Make the lines so far survive a power cut (before a checkpoint that counts on them)."""
        with writing("metrics", self.path):
            sync_file(self.path)

    def close(self) -> None:
        """Flush and close."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _undefined(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; an incomplete last line (a killed writer) is left out.

    Raises:
        CheckpointError: another line is not a metrics row.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                log.warning("%s: dropping the incomplete last line", path)
                break
            raise CheckpointError(f"{path}, line {number} is not a metrics row") from None
        rows.append(row)
    return rows

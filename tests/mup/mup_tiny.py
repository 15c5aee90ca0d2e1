"""Every backbone, objective, decoder and head, small, as recipes with a width to scale."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fmrizoo import zoo
from fmrizoo.config import Recipe, compose
from fmrizoo.types import TaskSpec

GRID = {"img_size": [8, 8, 4, 4], "patch_size": [2, 2, 2, 2]}
BACKBONES: dict[str, dict[str, Any]] = {
    "swin4d": {
        "name": "swin4d",
        **GRID,
        "depths": [2, 1],
        "patch_norm": True,
        "final_norm": True,
        "window_size": [2, 2, 2, 2],
    },
    "swin4d_v1": {"name": "swin4d", **GRID, "depths": [1, 1]},
    "swin_factorized": {
        "name": "swin_factorized",
        **GRID,
        "depths": [4, 4],
        "residual": "layerscale",
        "temporal_window": 2,
        "window_size": [2, 2, 2],
    },
    "neuromamba": {
        "name": "neuromamba",
        **GRID,
        "depth": 2,
        "d_state": 8,
        "head_dim": 6,
    },
    "neuromamba_2way": {
        "name": "neuromamba",
        **GRID,
        "depth": 2,
        "d_state": 8,
        "head_dim": 6,
        "bidirectional": True,
    },
}
BASE = 12  # width; heads of 6 channels
TASKS = (
    TaskSpec("classification", classes=("face", "house", "shoe")),
    TaskSpec("regression", mean=40.0, std=8.0, name="age"),
    TaskSpec("ordinal", classes=("low", "mid", "high"), name="severity"),
)
OBJECTIVES: dict[str, dict[str, Any]] = {
    f"{name}_{decoder}": {"objective": {"name": name, "decoder": decoder}}
    for name in ("simmim", "autoregressive")
    for decoder in ("mlp", "linear")
}
HEADS: dict[str, dict[str, Any]] = {
    "linear": {"head": {"name": "linear", "train_encoder": "all"}},
    "linear_space": {"head": {"name": "linear", "pool": "space", "norm": "batch"}},
    "complex": {
        "head": {"name": "complex", "dim": 8, "num_heads": 2, "cells": 2, "temporal": "attention"}
    },
    "lora": {"head": {"name": "lora", "rank": 2}},
    "prompt": {"head": {"name": "prompt", "count": 3}},
    "none": {},
}
CASES = [
    (backbone, part)
    for backbone in BACKBONES
    for part in (*OBJECTIVES, *HEADS)
    if not (backbone == "neuromamba_2way" and part.startswith("autoregressive"))
]
# What differs is tested always; the other pairs by `make test-slow`.
DIFFERENT = {(backbone, "simmim_mlp") for backbone in BACKBONES}
DIFFERENT |= {("swin4d", part) for part in HEADS} | {("neuromamba", "lora")}
DIFFERENT |= {("neuromamba", "autoregressive_linear"), ("swin_factorized", "lora")}
MOST = [pytest.param(*c, marks=() if c in DIFFERENT else pytest.mark.slow) for c in CASES]


def section(backbone: str, times: int = 1) -> dict[str, Any]:
    """The backbone's section at ``times`` the base width."""
    values = {**BACKBONES[backbone], "embed_dim": BASE * times}
    if "depths" in values:
        values["num_heads"] = [2 * times, 4 * times]
    return values


def recipe(backbone: str, part: str, times: int = 1, name: str = "mup", **more: Any) -> Recipe:
    """``part``: a key of OBJECTIVES or HEADS; ``more``: of the parametrization."""
    base: dict[str, Any] = {"embed_dim": BASE}
    if "depths" in BACKBONES[backbone]:
        base["num_heads"] = [2, 4]
    if name == "mup":
        more = {"readout_zero_init": False, "base": base, **more}
    return compose(
        {
            "backbone": section(backbone, times),
            **{**OBJECTIVES, **HEADS}[part],
            "data": {"clip_frames": 4},
            "parametrization": {"name": name, **more},
        }
    )


def model(made: Recipe) -> nn.Module:
    """Built from the recipe."""
    return zoo.build_model(made, TASKS)

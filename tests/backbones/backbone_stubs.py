"""Small builds of every backbone with brains of unequal size, and what their tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fmrizoo
from fmrizoo.backbones.neuromamba import MambaBlock
from fmrizoo.layers.swin import SwinBlock
from fmrizoo.types import Backbone, Grid, Tokens

CLIP = Grid(8, 8, 6, 6)
SWIN = {"img_size": list(CLIP), "patch_size": [2, 2, 2, 1], "embed_dim": 12, "num_heads": [2, 2]}
BUILDS: dict[str, dict[str, Any]] = {
    "swin4d": {
        "name": "swin4d",
        **SWIN,
        "depths": [2, 2],
        "window_size": [2, 2, 2, 4],
        "patch_norm": True,
        "final_norm": True,
    },
    "swin_factorized": {
        "name": "swin_factorized",
        **SWIN,
        "depths": [4, 4],
        "window_size": [2, 2, 2],
        "temporal_window": 4,
        "residual": "layerscale",
    },
    "spatial_first": {
        "name": "swin_factorized",
        **SWIN,
        "depths": [4, 4],
        "window_size": [2, 2, 2],
        "temporal_window": 4,
        "order": "spatial",
    },
    "neuromamba": {
        "name": "neuromamba",
        "img_size": list(CLIP),
        "patch_size": [2, 2, 2, 2],
        "embed_dim": 16,
        "d_state": 8,
        "head_dim": 8,
        "depth": 3,
        "chunk_size": 16,
    },
}
BUILDS["both_ways"] = {**BUILDS["neuromamba"], "bidirectional": True}
BUILDS["padded"] = {**BUILDS["neuromamba"], "batching": "padded"}


def build(kind: str, seed: int = 0, **values: Any) -> Backbone:
    torch.manual_seed(seed)
    backbone = fmrizoo.create_backbone(**{**BUILDS[kind], **values})
    for module in backbone.modules():
        if isinstance(module, MambaBlock):
            module.mixer.rows = 32  # several slices
    return backbone


def clips(count: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """``bold``, ``mask`` with a smaller brain in every further clip."""
    torch.manual_seed(seed)
    mask = torch.zeros(count, *CLIP[:3], dtype=torch.bool)
    for number, brain in enumerate(mask):
        brain[1 : 7 - 2 * number, 1:7, 0:5] = True
    return torch.randn(count, 1, *CLIP).to(dtype), mask


def tokens_of(backbone: Backbone, count: int = 2) -> Tokens:
    dtype = next(backbone.parameters()).dtype
    return backbone.tokenize(*clips(count, dtype))


def prompts_of(backbone: Backbone, count: int = 3) -> list[Tensor]:
    """Leaves with gradients, large enough to matter."""
    torch.manual_seed(7)
    dtype = next(backbone.parameters()).dtype
    return [torch.randn(count, w, dtype=dtype).requires_grad_() for w in backbone.prompt_widths()]


def blocks_of(backbone: Backbone) -> list[nn.Module]:
    """All Swin or Mamba blocks, in the order in which they are registered."""
    return [m for m in backbone.modules() if isinstance(m, SwinBlock | MambaBlock)]


def parameters_of(backbone: Backbone, layers: Sequence[Sequence[str]]) -> set[str]:
    """Names of the parameters that are or lie in the parts of ``layers``."""
    parts = [part for layer in layers for part in layer]
    return {
        name
        for name, _ in backbone.named_parameters()
        if any(name == part or name.startswith(f"{part}.") for part in parts)
    }

"""Backbones. This folder is the package ``fmrizoo.backbones`` (see pyproject.toml)."""

if __name__ != "fmrizoo.backbones":
    raise ImportError("import fmrizoo.backbones, not the bare folder 'backbones'")

from fmrizoo.backbones.neuromamba import NeuroMamba, NeuroMambaConfig
from fmrizoo.backbones.swin4d import Swin4D, Swin4DConfig
from fmrizoo.backbones.swin_factorized import SwinFactorized, SwinFactorizedConfig

__all__ = [
    "NeuroMamba",
    "NeuroMambaConfig",
    "Swin4D",
    "Swin4DConfig",
    "SwinFactorized",
    "SwinFactorizedConfig",
]

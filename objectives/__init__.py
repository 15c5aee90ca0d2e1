"""Objectives. This folder is the package ``fmrizoo.objectives`` (see pyproject.toml)."""

if __name__ != "fmrizoo.objectives":
    raise ImportError("import fmrizoo.objectives, not the bare folder 'objectives'")

from fmrizoo.objectives.autoregressive import Autoregressive, AutoregressiveConfig
from fmrizoo.objectives.simmim import SimMIM, SimMIMConfig

__all__ = ["Autoregressive", "AutoregressiveConfig", "SimMIM", "SimMIMConfig"]

"""Sections of a recipe, one dataclass each, one comment per field; they check their own values."""

from fmrizoo.sections.checks import one_of, require
from fmrizoo.sections.data import (
    BALANCES,
    EXCLUDES,
    NORMALIZATIONS,
    WINDOWS,
    AffineConfig,
    AugmentConfig,
    DataConfig,
    StoreConfig,
)
from fmrizoo.sections.prepare import PrepareConfig, QcConfig
from fmrizoo.sections.split import MatchConfig, SplitConfig
from fmrizoo.sections.task import TaskConfig
from fmrizoo.sections.train import CHECKPOINTING, SWEEP_LOSSES, SweepConfig, TrainConfig

__all__ = [
    "BALANCES",
    "CHECKPOINTING",
    "EXCLUDES",
    "NORMALIZATIONS",
    "SWEEP_LOSSES",
    "WINDOWS",
    "AffineConfig",
    "AugmentConfig",
    "DataConfig",
    "MatchConfig",
    "PrepareConfig",
    "QcConfig",
    "SplitConfig",
    "StoreConfig",
    "SweepConfig",
    "TaskConfig",
    "TrainConfig",
    "one_of",
    "require",
]

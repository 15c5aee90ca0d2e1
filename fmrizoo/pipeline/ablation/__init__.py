"""Ablations: cells planned from axes, trained in chains, compared in one table."""

from fmrizoo.pipeline.ablation.cells import Cell, cells_of
from fmrizoo.pipeline.ablation.chains import Chain, chains_of, run_chain
from fmrizoo.pipeline.ablation.results import Ablation, collect
from fmrizoo.pipeline.ablation.run import Found, ablate, plan

__all__ = [
    "Ablation",
    "Cell",
    "Chain",
    "Found",
    "ablate",
    "cells_of",
    "chains_of",
    "collect",
    "plan",
    "run_chain",
]

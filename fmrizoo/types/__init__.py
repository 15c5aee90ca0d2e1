"""The contracts that let any backbone meet any objective, head and data set."""

from fmrizoo.types.backbone import Backbone, check_checkpointing, chosen_stages
from fmrizoo.types.batch import Batch, ReadBatch, Voxels
from fmrizoo.types.features import POOLING, Features, Tokens
from fmrizoo.types.grid import Contract, Grid
from fmrizoo.types.head import Head
from fmrizoo.types.objective import Objective, Reconstruction
from fmrizoo.types.runs import RunKey
from fmrizoo.types.task import KINDS, Label, TaskSpec

__all__ = [
    "KINDS",
    "POOLING",
    "Backbone",
    "Batch",
    "Contract",
    "Features",
    "Grid",
    "Head",
    "Label",
    "Objective",
    "ReadBatch",
    "Reconstruction",
    "RunKey",
    "TaskSpec",
    "Tokens",
    "Voxels",
    "check_checkpointing",
    "chosen_stages",
]

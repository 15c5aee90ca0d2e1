"""muP: rules by parameter name, from which learning rates and starts carry over to other widths.

``parametrize`` gives the table of a model, ``install`` scales a fresh model and sets its forward
multipliers (both from ``Recipe.parametrization``), ``Parametrization.groups`` is for optimizers.
"""

from fmrizoo.mup.apply import Multipliers, apply
from fmrizoo.mup.base import base_backbone, check_base
from fmrizoo.mup.dims import Dim, ParameterDims, infer
from fmrizoo.mup.init import initialise
from fmrizoo.mup.parametrization import (
    FILE,
    Parametrization,
    Scales,
    infer_dims,
    install,
    make,
    parametrize,
)
from fmrizoo.mup.rules import ROLES, Rule, rule_table

__all__ = [
    "FILE",
    "ROLES",
    "Dim",
    "Multipliers",
    "ParameterDims",
    "Parametrization",
    "Rule",
    "Scales",
    "apply",
    "base_backbone",
    "check_base",
    "infer",
    "infer_dims",
    "initialise",
    "install",
    "make",
    "parametrize",
    "rule_table",
]

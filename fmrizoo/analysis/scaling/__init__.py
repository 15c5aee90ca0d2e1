"""Scaling laws of the loss: points, law, fit, intervals and isoFLOP parabolas."""

from fmrizoo.analysis.scaling.bootstrap import (
    Intervals,
    LeaveOneOut,
    Noise,
    intervals,
    leave_one_out,
    measure_noise,
)
from fmrizoo.analysis.scaling.design import choose_form, refuse_underdetermined
from fmrizoo.analysis.scaling.fit import Fit, fit_law, pure_power
from fmrizoo.analysis.scaling.isoflop import IsoFlop, compute_of, isoflop, pf_days
from fmrizoo.analysis.scaling.law import Form, Law, effective_data
from fmrizoo.analysis.scaling.points import Points, read_points

__all__ = [
    "Fit",
    "Form",
    "Intervals",
    "IsoFlop",
    "Law",
    "LeaveOneOut",
    "Noise",
    "Points",
    "choose_form",
    "compute_of",
    "effective_data",
    "fit_law",
    "intervals",
    "isoflop",
    "leave_one_out",
    "measure_noise",
    "pf_days",
    "pure_power",
    "read_points",
    "refuse_underdetermined",
]

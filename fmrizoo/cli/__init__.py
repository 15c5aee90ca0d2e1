"""The command line. Flags say where and how, dotted ``key=value`` arguments say what."""

# Importing a module of commands adds them to the program, in the order of its help page.
from fmrizoo.cli import data, store, training, models, zoo  # isort: skip
from fmrizoo.cli import mup, mup_check, mup_transfer  # isort: skip
from fmrizoo.cli import scaling, scaling_sweep  # isort: skip
from fmrizoo.cli import ablate  # isort: skip
from fmrizoo.cli import bench, doctor, job, plan, synth  # isort: skip
from fmrizoo.cli import understanding  # isort: skip
from fmrizoo.cli.shell import app, main

__all__ = [
    "ablate",
    "app",
    "bench",
    "data",
    "doctor",
    "job",
    "main",
    "models",
    "mup",
    "mup_check",
    "mup_transfer",
    "plan",
    "scaling",
    "scaling_sweep",
    "store",
    "synth",
    "training",
    "understanding",
    "zoo",
]

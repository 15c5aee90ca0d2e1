"""Errors that a user can act on: what was wrong, the value seen, where, and what to do."""

from __future__ import annotations

INTERRUPTED = 75  # exit code (EX_TEMPFAIL): run the same command again to go on


class FmrizooError(Exception):
    """Base of every error that fmrizoo raises on purpose.

    Attributes:
        exit_code: What the command line ends with.
        together: Whether all ranks raise it at the same place.
    """

    exit_code = 1
    together = True


class RecipeError(FmrizooError, ValueError):
    """A recipe, override or combination of components that cannot work."""


class DataError(FmrizooError, ValueError):
    """Input data that cannot be used as it is (file named in the message)."""


class CorruptStoreError(FmrizooError, OSError):
    """A store file whose bytes are not those that were written."""


class CheckpointError(FmrizooError, ValueError):
    """A checkpoint that is torn, foreign, or does not fit the model or the data."""


class TrainingError(FmrizooError, RuntimeError):
    """Training that cannot start or go on: a device, the ranks, or a loss that is not finite."""


class DivergedError(TrainingError):
    """A loss or a gradient that is not finite: the rate is too high, or the data are broken."""


class LostRankError(TrainingError):
    """Another rank is gone: it was killed, its node died, or it ended with an error of its own."""

    together = False


class HungRankError(LostRankError):
    """Another rank hung, wrote where, and ended so that the run can go on from its checkpoint."""

    exit_code = INTERRUPTED


class MissingExtraError(FmrizooError, ImportError):
    """An optional package is needed; the message holds the pip command."""

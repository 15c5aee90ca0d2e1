"""Which runs of a store a recipe uses, and which it leaves out: ``data.exclude``, ``leave_out``.

``data.exclude=flagged`` leaves out the runs beyond a limit of ``data.qc``, judged by the measures
that ``prepare`` stored in the index; ``data.leave_out`` names runs, sessions or subjects. Nothing
goes in silence: one log line names every run that is left out, with the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fmrizoo.config import DataConfig, QcConfig
from fmrizoo.data.qc import flags, measures_of, unjudged
from fmrizoo.data.store import RunInfo, Store
from fmrizoo.errors import DataError
from fmrizoo.registry import suggest

log = logging.getLogger(__name__)

_NAMED = "named in data.leave_out"


class Selection(NamedTuple):
    """The runs that ``data.select`` matches.

    Attributes:
        runs: All of them, with those that are left out: what a split is drawn over, so that
            leaving runs out moves no other run to another part.
        left_out: Why a run is not used, by name, in the order of ``runs``.
    """

    runs: list[RunInfo]
    left_out: dict[str, str]

    @property
    def used(self) -> list[RunInfo]:
        """The runs that are not left out."""
        return [run for run in self.runs if run.name not in self.left_out]


def chosen(store: Store, config: DataConfig) -> Selection:
    """What ``config`` selects, and what of it is left out; said once in the log.

    Raises:
        DataError: nothing matches ``select``, a name in ``leave_out`` that matches no run of the
            store, ``exclude=flagged`` for a run without measures, or nothing is left.
    """
    runs = store.select(config.select)
    left_out = reasons(store, runs, config)
    found = Selection(runs, left_out)
    if not found.used:
        raise DataError(
            f"data.exclude={config.exclude} and data.leave_out leave none of the {len(runs)} runs "
            f"of {store.path}: the first is left out: {left_out[runs[0].name]}"
        )
    return found


def reasons(store: Store, runs: Sequence[RunInfo], config: DataConfig) -> dict[str, str]:
    """Why each of ``runs`` that is left out is left out; raises and logs as :func:`chosen`."""
    found = _named(store, runs, config.leave_out)
    if config.exclude == "flagged":
        for run, why in _flagged(store, runs, config.qc).items():
            found[run] = f"{found[run]}; {why}" if run in found else why
    ordered = {run.name: found[run.name] for run in runs if run.name in found}
    if ordered:
        _say(store.path, len(runs), tuple(ordered.items()))
    return ordered


def _named(store: Store, runs: Sequence[RunInfo], names: Sequence[str]) -> dict[str, str]:
    """Runs whose name is in ``names``, or begins with one up to an underscore."""
    wanted, known = set(names), {start for run in store.runs for start in _starts(run.name)}
    if unknown := [name for name in names if name not in known]:
        near = suggest(unknown[0], sorted(known)).split(" Available")[0]
        raise DataError(
            f"data.leave_out names {unknown[0]!r}, but no run of {store.path} is called so or "
            f"begins with it.{near}"
        )
    return {run.name: _NAMED for run in runs if wanted & _starts(run.name)}


def _starts(name: str) -> set[str]:
    """A run's name and its beginnings: the subject, the session, …"""
    words = name.split("_")
    return {"_".join(words[:count]) for count in range(1, len(words) + 1)}


def _flagged(store: Store, runs: Sequence[RunInfo], limits: QcConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    unknown: dict[str, int] = {}
    for run in runs:
        if not run.qc:
            raise DataError(
                f"data.exclude=flagged needs the quality measures of every run, but {run.name} of "
                f"{store.home(run)} was prepared without: prepare the store again, or look at "
                "`fmrizoo qc` and name the bad runs in data.leave_out"
            )
        measures = measures_of(vars(run))
        if why := flags(measures, limits, "data.qc"):
            found[run.name] = "; ".join(why)
        for setting in unjudged(measures, limits):
            unknown[setting] = unknown.get(setting, 0) + 1
    if unknown:
        _say_unjudged(store.path, len(runs), tuple(sorted(unknown.items())))
    return found


@cache
def _say(store: Path, total: int, left_out: tuple[tuple[str, str], ...]) -> None:
    """A job asks several times what is left out; once is enough to say."""
    listing = ", ".join(f"{name} ({why})" for name, why in left_out)
    log.warning("%s: %d of %d runs are left out: %s", store, len(left_out), total, listing)


@cache
def _say_unjudged(store: Path, total: int, unknown: tuple[tuple[str, int], ...]) -> None:
    listing = ", ".join(f"{count} by data.qc.{setting}" for setting, count in unknown)
    log.info("%s: of %d runs, without the measure and so not judged: %s", store, total, listing)


def without(names: Sequence[str], left_out: Mapping[str, str]) -> list[str]:
    """``names`` but for those that are left out."""
    return [name for name in names if name not in left_out]

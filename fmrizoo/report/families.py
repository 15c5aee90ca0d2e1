"""Pretraining runs that differ only by fold or seed, and families that were measured alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fmrizoo.report.collect import Run

_PART = re.compile(r"(fold|seed)-\w+([-_](fold|seed)-\w+)*")
OBJECTIVES = {"simmim": "SimMIM", "autoregressive": "Next step"}


@dataclass(frozen=True)
class Family:
    """One recipe trained once, or on several folds or with several seeds.

    Attributes:
        label: Of the single run; of several, the folder that holds them.
        runs: In folder order.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run whose sections stand for all."""
        return self.runs[0]

    @property
    def backbone(self) -> str:
        """Its name in the recipe."""
        return _name(self.first.recipe.get("backbone"))

    @property
    def objective(self) -> str:
        """Its name in words."""
        name = _name(self.first.recipe.get("objective"))
        return OBJECTIVES.get(name, name)

    @property
    def normalization(self) -> str:
        """Of the data."""
        data = self.first.recipe.get("data") or {}
        return str(data.get("normalization") or self.first.contract.get("normalization") or "–")

    @property
    def selection(self) -> str:
        """Which runs of the store: ``acquisition 25mm``; empty for all of them."""
        chosen = (self.first.recipe.get("data") or {}).get("select") or {}
        return ", ".join(f"{k} {_joined(v)}" for k, v in chosen.items())

    @property
    def parts(self) -> tuple[str, ...]:
        """``fold-0``, ``fold-1``, …: what tells the runs apart."""
        if len(self.runs) == 1:
            return (self.label,)
        return tuple(r.folder.relative_to(_trunk(r)).as_posix() for r in self.runs)

    def shows(self, has: Callable[[Run], bool]) -> Run | None:
        """The first run that ``has`` something."""
        return next((r for r in self.runs if has(r)), None)

    def known(self, of: Callable[[Run], float | None]) -> list[float]:
        """The value of every run that has one."""
        return [v for r in self.runs if (v := of(r)) is not None]


def families(runs: Sequence[Run]) -> list[Family]:
    """Runs in one folder ``…/fold-*`` or ``…/seed-*`` with otherwise equal recipes are a family."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        apart = str(_trunk(run))
        groups.setdefault((apart, _recipe(run)), []).append(run)
    found = []
    for own in groups.values():
        label = own[0].label
        if len(own) > 1:
            kept = [p for p in label.split("/") if not _PART.fullmatch(p)]
            label = "/".join(kept) or _trunk(own[0]).name
        found.append(Family(label, tuple(own)))
    return found


def comparable(found: Sequence[Family]) -> list[tuple[Family, ...]]:
    """Families whose held-out losses compare, largest objective group first in recipe order.

    Equal must be the objective with its settings, the preprocessing, the selection and clips of
    the data, and the split with the runs trained on.
    """
    groups: dict[tuple[str, ...], list[Family]] = {}
    for family in found:
        groups.setdefault(tuple(sorted({_conditions(r) for r in family.runs})), []).append(family)
    names = list(OBJECTIVES.values())

    def order(group: Sequence[Family]) -> tuple[int, str, int]:
        name = group[0].objective
        return (names.index(name) if name in names else len(names), name, -len(group))

    return [tuple(g) for g in sorted(groups.values(), key=order)]


def _trunk(run: Run) -> Any:
    """The folder above trailing ``fold-*`` and ``seed-*``."""
    folder = run.folder
    while _PART.fullmatch(folder.name):
        folder = folder.parent
    return folder


def _recipe(run: Run) -> str:
    """All that must be equal in a family."""
    recipe = {k: v for k, v in run.recipe.items() if k not in ("split", "train")}
    recipe["split"] = _without(run.recipe.get("split"), "fold", "seed", "file")
    recipe["train"] = _without(run.recipe.get("train"), "seed")
    recipe["parameters"] = run.model.get("parameters")
    return _text(recipe)


def _conditions(run: Run) -> str:
    return _text(
        {
            "objective": run.recipe.get("objective"),
            "data": _without(run.recipe.get("data"), "store", "threads"),
            "split": run.recipe.get("split"),
            "contract": _without(run.contract, "code_version"),
            "trained on": sorted(run.model.get("seen_runs") or ()),
        }
    )


def _without(section: Any, *keys: str) -> Any:
    if not isinstance(section, dict):
        return section
    return {k: v for k, v in section.items() if k not in keys}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _name(section: Any) -> str:
    return str(section.get("name", "?")) if isinstance(section, dict) else "?"


def _joined(value: Any) -> str:
    return " or ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)

"""Does the best learning rate stay where it is when the width grows? Numbers from trained models.

Source: Yang et al. 2022 (Tensor Programs V), figure 1, whose picture becomes three numbers: where
the optimum lies, how far it drifts per doubling of the width, and what keeping the base width's
rate costs (regret).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.files import write_atomic

SCHEMA = "fmrizoo.mup_transfer/1"
FILE, TABLE = "transfer.json", "transfer.csv"
DRIFT, REGRET = 0.15, 0.01  # aimed at: octaves per doubling of the width; share of the loss
REACH = 1.0  # octaves on either side of the best rate that the parabola is fitted to
_NEAR = 1e-6


@dataclass(frozen=True)
class Trial:
    """One trained model; ``loss`` is infinite if it diverged."""

    width: int
    rate: float
    seed: int
    loss: float


@dataclass(frozen=True)
class Optimum:
    """The best learning rate at one width.

    Attributes:
        rate: The best one trained.
        loss: Mean loss over the seeds there.
        log2: Lowest point of a parabola of log loss on log₂ rate, through all rates within an
            octave of the best; log₂ of the best rate itself where these are fewer than three that
            did not diverge, or make no valley.
        edge: The best rate is the lowest or the highest of all; the optimum may lie beyond.
    """

    rate: float
    loss: float
    log2: float
    edge: bool


@dataclass(frozen=True)
class Row:
    """One width of the printed table."""

    width: int
    log2: float
    edge: bool
    loss: float
    at_base_rate: float
    regret: float


@dataclass(frozen=True)
class Transfer:
    """Trained models of one parametrization over widths, rates and seeds.

    Attributes:
        name: ``sp`` or ``mup``.
        which: What the losses are, ``validation`` or ``train``.
        trials: All of them.
    """

    name: str
    which: str
    trials: tuple[Trial, ...]

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """From narrow to wide; the first is the base of drift and regret."""
        return tuple(sorted({trial.width for trial in self.trials}))

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Of the trials."""
        return tuple(sorted({trial.seed for trial in self.trials}))

    def curve(self, width: int, seed: int | None = None) -> dict[float, float]:
        """Rate → mean loss over the seeds (or that of one), for rates that all seeds have."""
        wanted = self.seeds if seed is None else (seed,)
        found: dict[float, dict[int, float]] = {}
        for trial in self.trials:
            if trial.width == width and trial.seed in wanted:
                found.setdefault(trial.rate, {})[trial.seed] = trial.loss
        return {
            rate: mean(losses.values())
            for rate, losses in sorted(found.items())
            if len(losses) == len(wanted)
        }

    def optimum(self, width: int, seed: int | None = None) -> Optimum:
        """Where the loss at ``width`` is lowest.

        Raises:
            DataError: every rate diverged there, or none was trained.
        """
        curve = self.curve(width, seed)
        finite = {rate: loss for rate, loss in curve.items() if math.isfinite(loss)}
        if not finite:
            raise DataError(
                f"{self.name}, width {width}: none of {len(curve)} learning rates gave a finite "
                "loss; add lower ones to sweep.rates"
            )
        best = min(finite, key=lambda rate: finite[rate])
        edge = best in (min(curve), max(curve))
        return Optimum(best, finite[best], _valley(finite, best), edge)

    def drift(self, seed: int | None = None) -> float:
        """Slope of the optimum's log₂ rate on log₂ width: octaves per doubling."""
        x = np.log2(np.array(self.widths, float))
        y = np.array([self.optimum(width, seed).log2 for width in self.widths])
        x -= x.mean()
        return float((x * y).sum() / (x * x).sum())

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every width: its optimum, and what the base width's best rate costs there."""
        base = self.optimum(self.widths[0]).rate
        found = []
        for width in self.widths:
            best = self.optimum(width)
            at_base = self.curve(width)[base]
            regret = at_base / best.loss - 1
            found.append(Row(width, best.log2, best.edge, best.loss, at_base, regret))
        return tuple(found)

    @property
    def regret(self) -> float:
        """The largest over the widths."""
        return max(row.regret for row in self.rows)

    @property
    def edges(self) -> tuple[int, ...]:
        """Widths whose optimum may lie beyond the rates that were trained."""
        return tuple(row.width for row in self.rows if row.edge)

    @property
    def transfers(self) -> bool:
        """Drift and regret are within what is aimed at, and no optimum is at an edge."""
        return abs(self.drift()) <= DRIFT and self.regret <= REGRET and not self.edges

    @property
    def says(self) -> str:
        """The result in one sentence."""
        said = f"{self.name}: the best rate drifts by {self.drift():+.2f} octaves per doubling"
        if len(self.seeds) > 1:
            each = sorted(self.drift(seed) for seed in self.seeds)
            said += f" (seed by seed {each[0]:+.2f} to {each[-1]:+.2f})"
        over = self.widths[-1] / self.widths[0]
        said += f"; the rate of width {self.widths[0]} costs {self.regret:.1%} at most"
        said += f" over {over:g} times the width"
        if self.edges:
            said += (
                f"; at width {', '.join(map(str, self.edges))} the best rate is the last trained"
            )
        return said.replace("-", "−")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON (a diverged loss is null), results included."""
        plain: dict[str, Any] = {
            "name": self.name,
            "loss": self.which,
            "drift": self.drift(),
            "drift_by_seed": {seed: self.drift(seed) for seed in self.seeds},
            "regret": _finite(self.regret),
            "transfers": self.transfers,
            "widths": [{k: _finite(v) for k, v in asdict(row).items()} for row in self.rows],
            "trials": [{k: _finite(v) for k, v in asdict(t).items()} for t in self.trials],
        }
        return plain


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _valley(losses: dict[float, float], best: float) -> float:
    centre = math.log2(best)
    near = [rate for rate in losses if abs(math.log2(rate) - centre) <= REACH + _NEAR]
    if len(near) < 3:
        return centre
    x = np.log2(near) - centre
    bent, tilt, _ = np.polyfit(x, np.log([losses[rate] for rate in near]), 2)
    if bent <= 0:
        return centre
    return centre + float(np.clip(-tilt / (2 * bent), x.min(), x.max()))


def missing_rates(transfer: Transfer, width: int) -> list[float]:
    """Rates that this width still needs: beyond an edge where the best is, and the base's best.

    The step beyond is that between the two outermost rates. Where all diverged: a lower one.

    Raises:
        RecipeError: fewer than two rates.
    """
    curve = transfer.curve(width)
    rates = sorted(curve)
    if len(rates) < 2:
        raise RecipeError(f"sweep.rates needs two rates or more, got {rates}")
    wanted = []
    finite = {rate: loss for rate, loss in curve.items() if math.isfinite(loss)}
    best = min(finite, key=lambda rate: finite[rate]) if finite else rates[0]
    if best == rates[0]:
        wanted.append(rates[0] ** 2 / rates[1])
    if best == rates[-1]:
        wanted.append(rates[-1] ** 2 / rates[-2])
    base = transfer.optimum(transfer.widths[0]).rate
    if not any(math.isclose(base, rate) for rate in rates):
        wanted.append(base)
    return wanted


def write_transfers(folder: Path, transfers: Sequence[Transfer]) -> None:
    """``transfer.json`` and one line per model in ``transfer.csv``."""
    plain = {"schema": SCHEMA, "transfers": [found.as_dict() for found in transfers]}
    text = json.dumps(plain, indent=1, allow_nan=False) + "\n"
    write_atomic(folder / FILE, text.encode())
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["parametrization", "width", "lr", "seed", "loss"])
    for found in transfers:
        for trial in found.trials:
            writer.writerow([found.name, trial.width, repr(trial.rate), trial.seed, trial.loss])
    write_atomic(folder / TABLE, lines.getvalue().encode())


def read_transfers(path: Path) -> list[Transfer]:
    """What :func:`write_transfers` wrote.

    Raises:
        DataError: no such file, or another kind of file.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["schema"] != SCHEMA:
            raise ValueError(plain["schema"])
        return [
            Transfer(
                found["name"],
                found["loss"],
                tuple(
                    Trial(**{**trial, "loss": math.inf if trial["loss"] is None else trial["loss"]})
                    for trial in found["trials"]
                ),
            )
            for found in plain["transfers"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no transfer of rates ({SCHEMA}): {error!r}") from error

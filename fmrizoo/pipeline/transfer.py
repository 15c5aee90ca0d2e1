"""Learning rates over widths: the trainings behind ``fmrizoo mup transfer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fmrizoo.analysis.mup_transfer import Transfer, Trial, missing_rates
from fmrizoo.config import Recipe
from fmrizoo.errors import RecipeError
from fmrizoo.mup.widths import at_width, widths_of
from fmrizoo.pipeline.inputs import open_data
from fmrizoo.pipeline.sweep import Job, Outcome, part_of, prepared, run_jobs

OCTAVES = (-2, -1, 0, 1, 2)  # around train.lr, where sweep.rates is empty
ROUNDS = 8  # of rates beyond an edge

OnDone = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Result:
    """What a sweep has found.

    Attributes:
        transfers: One per parametrization; empty as long as trainings are missing.
        trained: Models with an outcome.
        seconds: Their training time together.
        interrupted: By a signal.
    """

    transfers: tuple[Transfer, ...]
    trained: int
    seconds: float
    interrupted: bool = False


@dataclass(frozen=True)
class _Setting:
    name: str
    width: int
    rate: float
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.name}/width-{self.width}/lr-{self.rate:.6g}/seed-{self.seed}"


def transfer(
    recipe: Recipe,
    out: Path,
    names: Sequence[str] = ("sp", "mup"),
    *,
    workers: int = 1,
    part: tuple[int, int] | None = None,
    keep_models: bool = False,
    on_done: OnDone | None = None,
) -> Result:
    """Train the recipe at every width with every rate, and beyond while the best rate is the last.

    Args:
        recipe: Of a pretraining; ``sweep`` says widths, rates, seeds and which loss. Without
            muP its own width is the base.
        out: A folder of its own for every model, below ``<name>/width-…/lr-…/seed-…``.
        names: Parametrizations.
        workers, keep_models, on_done: See :func:`fmrizoo.pipeline.sweep.run_jobs`.
        part: (k, n): only every n-th of the first rates' trainings from the k-th on, for a job
            array; the call without it does the rest and has the result.

    Raises:
        RecipeError: a recipe, width or rate that cannot be trained; nothing has been by then.
    """
    settings = _first(recipe, names)
    jobs = {setting: _job(recipe, setting) for setting in settings}
    open_data(recipe)  # refused before the first training
    outcomes: dict[_Setting, Outcome] = {}
    chosen = list(jobs.values()) if part is None else part_of(list(jobs.values()), part)
    for _ in range(ROUNDS + 1):
        swept = run_jobs(chosen, out, workers=workers, keep_models=keep_models, on_done=on_done)
        outcomes |= {s: swept.outcomes[s.folder] for s in jobs if s.folder in swept.outcomes}
        if swept.interrupted or part is not None:
            return _result((), outcomes, swept.interrupted)
        found = tuple(_transfer(recipe, name, outcomes) for name in names)
        more = [setting for each in found for setting in _more(recipe, each)]
        if not more:
            break
        jobs |= {setting: _job(recipe, setting) for setting in more}
        chosen = list(jobs.values())
    return _result(found, outcomes)


def _first(recipe: Recipe, names: Sequence[str]) -> list[_Setting]:
    rates = sorted(recipe.sweep.rates) or [recipe.train.lr * 2.0**k for k in OCTAVES]
    if len(rates) < 2:
        raise RecipeError(f"sweep.rates needs two rates or more, got {rates}")
    widths = widths_of(recipe)
    if len(widths) < 2:
        raise RecipeError(f"a transfer needs two widths or more, got sweep.widths={widths}")
    # Wide models first: the last to finish should be a short one.
    return [
        _Setting(name, width, rate, seed)
        for width in reversed(widths)
        for name in names
        for rate in rates
        for seed in _seeds(recipe)
    ]


def _seeds(recipe: Recipe) -> range:
    return range(recipe.train.seed, recipe.train.seed + recipe.sweep.seeds)


def _more(recipe: Recipe, found: Transfer) -> list[_Setting]:
    return [
        _Setting(found.name, width, rate, seed)
        for width in reversed(found.widths)
        for rate in missing_rates(found, width)
        for seed in _seeds(recipe)
    ]


def _job(recipe: Recipe, setting: _Setting) -> Job:
    scaled = prepared(at_width(recipe, setting.width, setting.name))
    train = replace(scaled.train, lr=setting.rate, seed=setting.seed)
    return Job(setting.folder, replace(scaled, train=train))


def _transfer(recipe: Recipe, name: str, outcomes: dict[_Setting, Outcome]) -> Transfer:
    which = recipe.sweep.loss
    trials = [
        Trial(s.width, s.rate, s.seed, outcome.loss(which))
        for s, outcome in outcomes.items()
        if s.name == name
    ]
    return Transfer(name, which, tuple(sorted(trials, key=lambda t: (t.width, t.rate, t.seed))))


def _result(
    found: tuple[Transfer, ...], outcomes: dict[_Setting, Outcome], interrupted: bool = False
) -> Result:
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    return Result(found, len(outcomes), seconds, interrupted)

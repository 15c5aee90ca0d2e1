"""The section ``split``: which units train, validate and test."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fmrizoo.sections.checks import one_of, require


@dataclass
class MatchConfig:
    """A cohort whose two classes are alike in what must not decide; empty target: nobody is left
    out."""

    target: str = ""  # column of participants.tsv with two classes
    on: list[str] = field(default_factory=list)  # columns (numbers or classes) to be alike in
    caliper: float = 0.2  # a pair's logit propensities differ by at most so many s.d.

    def __post_init__(self) -> None:
        require(
            bool(self.target) == bool(self.on),
            f"split.match needs both target and on, got target={self.target!r}, on={list(self.on)}",
        )
        require(
            self.target not in self.on,
            f"split.match.on={list(self.on)} holds the target itself: the classes would be "
            "told apart by it",
        )
        require(
            0 < self.caliper < math.inf,
            f"split.match.caliper must be a number above 0, got {self.caliper}",
        )


@dataclass
class SplitConfig:
    """Which units train, validate and test. Written to a file once, then reused."""

    by: str = "subject"  # subject | session | run | family | site: never divided between the parts
    column: str = ""  # family, site: of participants.tsv, or `site,family`; empty: the name of `by`
    folds: int = 5  # every unit is in the test part of exactly one fold
    fold: int = 0  # the fold of this run
    validation: float = 0.2  # share of the non-test units held out for validation
    train_units: int = 0  # train on so many units only, the first of one order; 0: on all
    seed: int = 0  # of the shuffle; another one is another repetition of the k-fold
    stratify: list[str] = field(default_factory=list)  # columns that all parts have alike
    bins: int = 4  # quantile bins of a numeric column of split.stratify
    match: MatchConfig = field(default_factory=MatchConfig)
    inner: int = 0  # folds within training + validation that choose a baseline's penalty; 0: none
    file: str | None = None  # an existing split file to use as it is

    def __post_init__(self) -> None:
        one_of("split.by", self.by, ("subject", "session", "run", "family", "site"))
        require(
            not self.column or self.by in ("family", "site"),
            f"split.column={self.column!r} is for split.by=family or site, not {self.by}",
        )
        require(self.train_units >= 0, f"split.train_units must be ≥ 0, got {self.train_units}")
        require(self.folds >= 2, f"split.folds must be ≥ 2, got {self.folds}")
        require(
            0 <= self.fold < self.folds,
            f"split.fold must be in 0..{self.folds - 1}, got {self.fold}",
        )
        require(
            0 <= self.validation < 1, f"split.validation must be in [0, 1), got {self.validation}"
        )
        require(self.bins >= 2, f"split.bins must be ≥ 2, got {self.bins}")
        require(
            self.inner == 0 or self.inner >= 2, f"split.inner must be 0 or ≥ 2, got {self.inner}"
        )
        twice = sorted({name for name in self.stratify if self.stratify.count(name) > 1})
        require(not twice, f"split.stratify names {', '.join(twice)} twice")

"""The section ``task``: what a head learns to predict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fmrizoo.sections.checks import one_of, require


@dataclass
class TaskConfig:
    """What a head learns to predict."""

    target: str = "trial_type"  # column of events.tsv or participants.tsv
    kind: str = "classification"  # classification | regression | ordinal (classes in an order)
    targets: dict[str, str] = field(
        default_factory=dict
    )  # several columns at once, {sex: classification, age: regression}; replaces target and kind
    source: str = "events"  # events: one clip per event; participants: all clips of a subject
    levels: list[str] = field(
        default_factory=list
    )  # ordinal: names from low to high; empty: the labels are numbers
    class_weights: str = "none"  # none | balanced: rare classes count as much as frequent ones
    label_smoothing: float = 0.0  # classification: share of the target spread over all classes
    lag: float = 5.0  # seconds after an event's onset at which its clip starts (haemodynamic delay)
    level: str = "event"  # predictions are averaged over the clips of one: event | run | subject

    def __post_init__(self) -> None:
        one_of("task.source", self.source, ("events", "participants"))
        one_of("task.class_weights", self.class_weights, ("none", "balanced"))
        for name, kind in self.wanted().items():
            key = "task.kind" if name not in self.targets else f"task.targets.{name}"
            one_of(key, kind, ("classification", "regression", "ordinal"))
        kinds = list(self.wanted().values())
        require(
            0 <= self.label_smoothing < 1,
            f"task.label_smoothing is a share in [0, 1), got {self.label_smoothing}",
        )
        require(
            not self.label_smoothing or "classification" in kinds,
            f"task.label_smoothing={self.label_smoothing} is for classification, not {kinds[0]}",
        )
        require(
            self.class_weights == "none" or set(kinds) != {"regression"},
            f"task.class_weights={self.class_weights} needs a target with classes",
        )
        require(
            not self.levels or kinds.count("ordinal") == 1,
            f"task.levels={list(self.levels)} needs one target of kind ordinal",
        )
        one_of("task.level", self.level, ("event", "run", "subject"))
        require(math.isfinite(self.lag), f"task.lag is a number of seconds, got {self.lag}")
        require(
            not (self.source == "participants" and self.level == "event"),
            "task.level=event needs task.source=events; use level=subject for participants.tsv",
        )
        require(
            len(self.targets) < 2 or self.source == "participants" or self.level == "event",
            f"task.level={self.level} with several targets from events is ambiguous: use "
            "task.level=event",
        )

    def wanted(self) -> dict[str, str]:
        """Kind of each target by its name, in the order of a head's outputs."""
        return dict(self.targets) or {self.target: self.kind}

"""What is predicted: one target, or several at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fmrizoo.errors import DataError, RecipeError

KINDS = ("classification", "regression", "ordinal")

Label = str | float


@dataclass(frozen=True)
class TaskSpec:
    """One target of a head. A head with several has a tuple of them.

    Everything that is fitted (classes, scaler, weights) comes from the training units alone.

    Attributes:
        kind: ``classification``, ``regression``, or ``ordinal``: classes in an order, learned as
            "above this level?" for every level but the last.
        classes: Names in index order (classification), from low to high (ordinal).
        mean, std: Scaler (regression).
        name: Of the target.
        weights: Weight of each class in the loss, 1 on average over the training units; empty:
            all alike.
        smoothing: Label smoothing (classification): share of the target that is spread evenly.
    """

    kind: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    name: str = "target"
    weights: tuple[float, ...] = ()
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"task must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind != "regression" and len(self.classes) < 2:
            raise RecipeError(
                f"{self.kind} of {self.name!r} needs at least two classes in the training units, "
                f"found {list(self.classes)}: choose another target or another split"
            )
        if self.kind == "regression" and not (math.isfinite(self.mean) and self.std > 0):
            raise RecipeError(
                f"the training units' {self.name!r} has mean {self.mean} and s.d. {self.std}: "
                "nothing to predict"
            )
        if self.kind == "regression" and (self.weights or self.smoothing):
            raise RecipeError(
                f"{self.name!r} is a regression: it has no classes to weigh or smooth"
            )
        if self.kind == "ordinal" and self.smoothing:
            raise RecipeError(f"{self.name!r} is ordinal: label smoothing is for classification")
        if self.weights and len(self.weights) != len(self.classes):
            raise RecipeError(
                f"{self.name!r} has {len(self.classes)} classes but {len(self.weights)} weights"
            )

    @property
    def outputs(self) -> int:
        """Numbers that a head puts out: a logit per class, the scaled value, or one per step."""
        return {"classification": len(self.classes), "regression": 1}.get(
            self.kind, len(self.classes) - 1
        )

    @property
    def scores(self) -> int:
        """Numbers that a prediction holds: one per class (or level), or the value."""
        return 1 if self.kind == "regression" else len(self.classes)

    def target_of(self, label: Label | None) -> float:
        """Class index, or the value; NaN where the label is missing.

        Raises:
            DataError: a class that the training units lack.
        """
        if label is None:
            return math.nan
        if self.kind == "regression":
            return float(label)
        if str(label) not in self.classes:
            raise DataError(
                f"{self.name} {str(label)!r} does not occur in the training units (known: "
                f"{', '.join(self.classes)}): use fewer folds or another split.by"
            )
        return float(self.classes.index(str(label)))

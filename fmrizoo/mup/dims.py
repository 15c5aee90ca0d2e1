"""Which axes of which parameters grow with the width, from models on the meta device.

No weight is ever made or read: three models are built without memory, at base width, at twice that
(the delta) and at the target's. An axis grows if base and delta differ in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fmrizoo.errors import RecipeError
from fmrizoo.mup.partition import whole_modules

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Dim:
    """One axis of a parameter.

    Attributes:
        base: Its length at base width.
        size: Its length in the target.
        grows: Whether it is a width.
    """

    base: int
    size: int
    grows: bool

    @property
    def ratio(self) -> float:
        """Target ÷ base."""
        return self.size / self.base


@dataclass(frozen=True)
class ParameterDims:
    """A parameter as the rules see it.

    Attributes:
        dims: Its axes; of a weight ``(out, in, …)``.
        spread: Standard deviation that its module draws it with in the target ÷ at base width.
        marked: It carries mamba-ssm's mark ``_no_weight_decay``.
    """

    dims: tuple[Dim, ...]
    spread: float = 1.0
    marked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """In the target."""
        return tuple(dim.size for dim in self.dims)

    @property
    def growing(self) -> tuple[int, ...]:
        """Axes that grow with the width."""
        return tuple(axis for axis, dim in enumerate(self.dims) if dim.grows)


Shapes = Mapping[str, ParameterDims]


def infer(base: Build, delta: Build, target: Build) -> dict[str, ParameterDims]:
    """Dims of every parameter of the target by name, in its order.

    Args:
        base: Builds the model at base width; ``delta`` and ``target``: at the others. They are
            called with the meta device as the default one.

    Raises:
        RecipeError: the models have other parameters, or one differs in an axis that is no width.
    """
    with whole_modules(), torch.device("meta"):
        models = [build() for build in (base, delta, target)]
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters()} for model in models]
    for other in shapes[1:]:
        _check_names(shapes[0], other)
    starts = [start_scales(model) for model in (models[0], models[2])]
    found = {}
    for name, parameter in models[2].named_parameters():
        sizes = [shape[name] for shape in shapes]
        if len({len(size) for size in sizes}) > 1:
            raise RecipeError(f"{name} has {len(sizes[0])} axes at base width and not here")
        dims = tuple(Dim(b, t, b != d) for b, d, t in zip(*sizes, strict=True))
        if any(dim.base != dim.size and not dim.grows for dim in dims):
            raise RecipeError(
                f"{name} is {_by(sizes[0])} at base width and {_by(sizes[2])} here in an axis that "
                "is no width: parametrization.base may differ from the model in widths only"
            )
        before, after = (start.get(name, 1.0) for start in starts)
        marked = bool(getattr(parameter, "_no_weight_decay", False))
        found[name] = ParameterDims(dims, after / before, marked)
    return found


def start_scales(model: nn.Module) -> dict[str, float]:
    """What the standard deviation of freshly drawn parameters is proportional to, by name.

    PyTorch draws weight and bias of a Linear within ± fan-in^-½. A module that draws parameters in
    another way that depends on the width says so in a method ``start_scales()`` (its own names).
    Whatever is not named is drawn alike at every width.
    """
    found: dict[str, float] = {}
    for prefix, module in model.named_modules():
        own: dict[str, float] = {}
        if isinstance(module, nn.Linear):
            own = {name: module.in_features**-0.5 for name in ("weight", "bias")}
        elif callable(ask := getattr(module, "start_scales", None)):
            own = dict(ask())
        found |= {f"{prefix}.{name}" if prefix else name: value for name, value in own.items()}
    return found


def _check_names(base: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> None:
    if odd := sorted(base.keys() ^ other.keys()):
        raise RecipeError(
            f"the model at base width has other parameters than this one (such as {odd[0]}): "
            "parametrization.base may differ from the model in widths only"
        )


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))

"""Does a parametrisation keep its word? The coordinate check of muP.

Source: Yang et al. 2022 (Tensor Programs V), appendix D.1. What differs: beside how large
activations are at each width we look at how far a few steps of training have moved them, since a
rule that moves a layer too little can never be seen in the former; and the check says so when the
steps were too small to prove anything.

Nothing here knows recipes: ``make(width, seed)`` gives a model with its optimizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fmrizoo.errors import DataError, RecipeError
from fmrizoo.files import write_atomic

SCHEMA = "fmrizoo.mup_check/1"
FILE = "mup_check.json"
WIDTHS = (32, 64, 128, 256)
TARGET, LIMIT = 0.15, 0.2  # |log-log slope| against width: aimed at, and still passed
MOVED = 0.05  # relative change of the median module below which the steps were too small
KINDS = ("activation", "change")
# A readout that starts at 0 says nothing at step 0, and lets no gradient past itself before step 1.
SILENT = {"activation": 0, "change": 1}

Make = Callable[[int, int], tuple[nn.Module, torch.optim.Optimizer]]


class Tap(NamedTuple):
    """Where a coordinate is read: ``read(inputs, output)`` of every call of ``module``."""

    name: str
    module: nn.Module
    read: Callable[[tuple[Any, ...], Any], Tensor | None]


@dataclass(frozen=True)
class Point:
    """One module at one width after some steps; geometric means over the seeds.

    Attributes:
        module: Name of the module, the tap or the parameter.
        width: Of the model.
        step: Optimizer steps taken.
        activation: Mean \\|h_t\\| over all entries.
        change: Mean \\|h_t − h_0\\| on the same batch.
    """

    module: str
    width: int
    step: int
    activation: float
    change: float


@dataclass(frozen=True)
class Verdict:
    """One module of a coordinate check.

    Attributes:
        module: Its name.
        activation, change: The steepest log-log slope against width over the steps, with its sign;
            infinite where a value was not finite, or 0 at some widths only, or 0 to the end.
        ok: Both are within the tolerance.
    """

    module: str
    activation: float
    change: float
    ok: bool

    @property
    def worst(self) -> float:
        """The steeper of both slopes."""
        return max(self.activation, self.change, key=abs)


@dataclass(frozen=True)
class CoordinateCheck:
    """What a coordinate check has seen.

    Attributes:
        name: What was checked.
        widths, steps, seeds: Of the models that were trained.
        points: Every module at every width after every step.
        losses: By width, one per step, means over the seeds.
        tolerance: Largest slope that passes.
        transients: Glob on module names → first step that is judged, for starts that are known to
            depend on the width.
    """

    name: str
    widths: tuple[int, ...]
    steps: int
    seeds: int
    points: tuple[Point, ...]
    losses: dict[int, tuple[float, ...]]
    tolerance: float = LIMIT
    transients: dict[str, int] = field(default_factory=dict)

    @cached_property
    def table(self) -> dict[str, dict[int, tuple[Point, ...]]]:
        """Points by module, then by step, from narrow to wide."""
        found: dict[str, dict[int, tuple[Point, ...]]] = {}
        for point in sorted(self.points, key=lambda p: (p.step, p.width)):
            by_step = found.setdefault(point.module, {})
            by_step[point.step] = (*by_step.get(point.step, ()), point)
        return found

    def slopes(self, module: str, kind: str) -> dict[int, float]:
        """Log-log slope against width by step; steps that are not judged are left out."""
        begin = max((s for g, s in self.transients.items() if fnmatch(module, g)), default=0)
        found = {}
        for step, points in self.table[module].items():
            values = [getattr(point, kind) for point in points]
            silent = step <= SILENT[kind] and not any(values)
            if step >= max(begin, int(kind == "change")) and not silent:
                found[step] = slope(self.widths, values)
        return found

    @cached_property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Every module in the order it runs."""
        found = []
        for module in dict.fromkeys(point.module for point in self.points):
            steepest = {
                kind: max(self.slopes(module, kind).values(), key=abs, default=0.0)
                for kind in KINDS
            }
            ok = all(abs(value) <= self.tolerance for value in steepest.values())
            found.append(Verdict(module, steepest["activation"], steepest["change"], ok))
        return tuple(found)

    @property
    def worst(self) -> Verdict:
        """The module with the steepest slope."""
        return max(self.verdicts, key=lambda v: abs(v.worst))

    @property
    def failed(self) -> tuple[Verdict, ...]:
        """Modules out of tolerance."""
        return tuple(v for v in self.verdicts if not v.ok)

    @cached_property
    def moved(self) -> float:
        """Change / activation of the median module after the last step, where it is least."""
        shares = []
        for width in self.widths:
            last = [p for p in self.points if p.step == self.steps and p.width == width]
            shares.append(median(p.change / p.activation for p in last if p.activation > 0))
        return min(shares)

    @property
    def proves_something(self) -> bool:
        """The steps were large enough for a wrong rule to be seen."""
        return self.moved >= MOVED

    @property
    def passed(self) -> bool:
        """Every module is within the tolerance, and the check proves something."""
        return not self.failed and self.proves_something

    @property
    def says(self) -> str:
        """The result in one sentence."""
        count, worst = len(self.verdicts), self.worst
        said = f"{count - len(self.failed)} of {count} modules within ±{self.tolerance:g}"
        said += f", worst {worst.module} {worst.worst:+.2f}"
        if not self.proves_something:
            said += (
                f"; but the median module moved by {self.moved:.1%} only (< {MOVED:.0%}), which "
                "proves nothing: raise the learning rate"
            )
        return said

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the verdicts for other readers."""
        plain = asdict(self)
        plain["passed"], plain["moved"] = self.passed, self.moved
        plain["verdicts"] = [asdict(v) for v in self.verdicts]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> CoordinateCheck:
        """Inverse of :meth:`as_dict`."""
        return cls(
            name=plain["name"],
            widths=tuple(plain["widths"]),
            steps=plain["steps"],
            seeds=plain["seeds"],
            points=tuple(Point(**point) for point in plain["points"]),
            losses={int(width): tuple(line) for width, line in plain["losses"].items()},
            tolerance=plain["tolerance"],
            transients=dict(plain["transients"]),
        )


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of log value against log width; infinite unless all are > 0, finite."""
    if len(values) != len(widths) or not all(0 < v < math.inf for v in values):
        return math.inf
    x, y = np.log(np.asarray(widths, float)), np.log(np.asarray(values, float))
    x -= x.mean()
    return float((x * y).sum() / (x * x).sum())


def write_checks(folder: Path, checks: Sequence[CoordinateCheck]) -> Path:
    """``mup_check.json`` in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {"schema": SCHEMA, "checks": [check.as_dict() for check in checks]}
    write_atomic(folder / FILE, json.dumps(plain, indent=1).encode())
    return folder / FILE


def read_checks(path: Path) -> list[CoordinateCheck]:
    """What :func:`write_checks` wrote.

    Raises:
        DataError: no such file, or another kind of file.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["schema"] != SCHEMA:
            raise ValueError(plain["schema"])
        return [CoordinateCheck.from_dict(check) for check in plain["checks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no coordinate check ({SCHEMA}): {error!r}") from error


# --- listening ------------------------------------------------------------------------------------


def leaf_taps(model: nn.Module) -> Iterator[Tap]:
    """The output of every module without children that computes something."""
    for name, module in model.named_modules():
        if not any(module.children()) and not isinstance(module, nn.Dropout | nn.Identity):
            yield Tap(name, module, lambda _, out: out if isinstance(out, Tensor) else None)


def loose_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters that belong to no leaf module, such as a mask token: taps of their own."""
    return {
        f"{name}.{own}" if name else own: parameter
        for name, module in model.named_modules()
        if any(module.children())
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


class Recorder:
    """Sizes of what a model's taps give in one forward pass, and of how far they have moved.

    A tap may be read several times in a pass (a module that works piece by piece, or is shared):
    its calls count as one long tensor.
    """

    def __init__(self, model: nn.Module, taps: Iterable[Tap]) -> None:
        self.taps, self.loose = list(taps), loose_parameters(model)
        self.first: dict[str, list[Tensor]] | None = None
        self._now: dict[str, list[Tensor]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record the forward pass inside (a backward pass would repeat parts of it)."""
        self._now = {}
        hooks = [tap.module.register_forward_hook(self._hook(tap)) for tap in self.taps]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for name, parameter in self.loose.items():
            self._now[name] = [parameter.detach().clone()]

    def _hook(self, tap: Tap) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            with torch.no_grad():
                found = tap.read(inputs, output)
                if found is not None:
                    # A copy: what follows may write into the module's output.
                    self._now.setdefault(tap.name, []).append(found.detach().float().clone())

        return note

    def read(self) -> dict[str, tuple[float, float]]:
        """Name → (mean \\|h\\|, mean \\|h − h of the first pass\\|)."""
        if self.first is None:
            self.first = self._now
        found = {}
        for name, calls in self._now.items():
            count = sum(call.numel() for call in calls)
            size = sum(call.abs().sum(dtype=torch.float64).item() for call in calls)
            moved = sum(
                (call - before).abs().sum(dtype=torch.float64).item()
                for call, before in zip(calls, self.first[name], strict=True)
            )
            found[name] = (size / count, moved / count)
        return found


# --- the coordinate check -------------------------------------------------------------------------


def coordinate_check(
    make: Make,
    loss: Callable[[nn.Module], Tensor],
    widths: Sequence[int] = WIDTHS,
    *,
    steps: int = 4,
    seeds: int = 1,
    taps: Callable[[nn.Module], Iterable[Tap]] = leaf_taps,
    name: str = "",
    tolerance: float = LIMIT,
    transients: Mapping[str, int] | None = None,
    on_model: Callable[[int, int, int], None] | None = None,
) -> CoordinateCheck:
    """Train a model of each width for a few large steps on one batch and look at its coordinates.

    Args:
        make: ``make(width, seed)`` → a fresh model and its optimizer. The rate should be the
            largest that the narrowest model bears.
        loss: Loss of a model on one and the same batch at every call.
        widths: Two or more.
        steps: Optimizer steps.
        seeds: Initialisations, averaged in log space.
        taps: What is looked at.
        name, tolerance, transients: See :class:`CoordinateCheck`.
        on_model: Called after every model with (done, total, width).

    Raises:
        RecipeError: fewer than two widths, no step or no seed.
    """
    sizes = tuple(sorted(set(widths)))
    if len(sizes) < 2 or steps < 1 or seeds < 1:
        raise RecipeError(
            f"a coordinate check needs two widths or more, a step and a seed, got widths "
            f"{list(widths)}, {steps} steps and {seeds} seeds"
        )
    logs: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    losses = {width: np.zeros(steps + 1) for width in sizes}
    jobs = [(width, seed) for width in sizes for seed in range(seeds)]
    for number, (width, seed) in enumerate(jobs, start=1):
        model, optimizer = make(width, seed)
        for step, (value, read) in enumerate(_train(model, optimizer, loss, steps, taps)):
            losses[width][step] += value / seeds
            for module, pair in read.items():
                logs.setdefault((module, width, step), []).append(pair)
        if on_model is not None:
            on_model(number, len(jobs), width)
    points = tuple(
        Point(module, width, step, *(_geometric([p[i] for p in pairs]) for i in (0, 1)))
        for (module, width, step), pairs in logs.items()
    )
    return CoordinateCheck(
        name=name,
        widths=sizes,
        steps=steps,
        seeds=seeds,
        points=points,
        losses={width: tuple(line.tolist()) for width, line in losses.items()},
        tolerance=tolerance,
        transients=dict(transients or {}),
    )


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module], Tensor],
    steps: int,
    taps: Callable[[nn.Module], Iterable[Tap]],
) -> Iterator[tuple[float, dict[str, tuple[float, float]]]]:
    """Loss and coordinates before each step and after the last."""
    recorder = Recorder(model, taps(model))
    for step in range(steps + 1):
        with recorder.listening():
            value = loss(model)
        yield value.item(), recorder.read()
        if step < steps:
            optimizer.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def _geometric(values: Sequence[float]) -> float:
    if not all(v > 0 for v in values):
        return 0.0 if 0.0 in values else math.nan
    return math.exp(sum(math.log(v) for v in values) / len(values))

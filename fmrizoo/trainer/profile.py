"""Where the time of a training step goes: ``train.profile``.

A step's time is divided between phases like a cake: at any moment exactly one of them runs, so
that their sum is the step's time (within :data:`TOLERANCE`). A collective inside the backward pass
counts as collective, not as backward. Without ``train.profile`` nothing here is made and nothing
is wrapped. On an accelerator every change of phase waits for the device, because kernels run on
after the call that starts them has returned: the table is then true, but what would have
overlapped (collectives with the backward pass) does not, and a step takes longer than it would.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from fmrizoo.errors import CheckpointError
from fmrizoo.files import write_json
from fmrizoo.trainer.files import writing
from fmrizoo.trainer.inputs import CompactSamples
from fmrizoo.types import Batch, ReadBatch

PHASES = ("data", "to device", "forward", "backward", "collectives", "optimizer", "other")
TABLE, TRACE = "profile.json", "trace.json.gz"
TOLERANCE = 0.001  # share of a step by which the sum of its phases may miss it: rounding only
TRACED = 3  # steps in the trace
# What the trainer and DeepSpeed call of torch.distributed.
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)
# Those that DeepSpeed's backend looked up when it was made.
_LOOKED_UP = ("all_gather_function", "reduce_scatter_function")

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Waited(Generic[T]):
    """An iterator that knows how long its reader waited for it. This one is always there.

    Args:
        source: What is iterated.
        clock: Seconds.
    """

    def __init__(self, source: Iterator[T], clock: Callable[[], float] = time.monotonic) -> None:
        self._source, self._clock, self._seconds = source, clock, 0.0

    def __iter__(self) -> Waited[T]:
        return self

    def __next__(self) -> T:
        began = self._clock()
        try:
            return next(self._source)
        finally:
            self._seconds += self._clock() - began

    def taken(self) -> float:
        """Seconds waited since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Close the source: generators hold reader threads; others have nothing to close."""
        if callable(close := getattr(self._source, "close", None)):
            close()


class PhaseClock:
    """Divides time between phases; the innermost one gets it.

    Args:
        clock: Seconds.
        settle: Called at every change of phase: waits for the device.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        self._clock, self._settle = clock, settle
        self._stack: list[str] = []
        self._mark = 0.0
        self.naming = False  # name the phases in torch's trace too
        self._found: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []  # seconds by phase, and "step"

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step; what no phase claims of it is ``other``. A step that fails is left out."""
        self._found = dict.fromkeys(PHASES, 0.0)
        self._settle()
        began = self._mark = self._clock()
        self._stack = ["other"]
        try:
            yield
            self._change()
            self.steps.append({**self._found, "step": self._mark - began})
        finally:
            self._stack = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside a step: ``name`` has the time until the end. Outside of one this does nothing."""
        if not self._stack:
            yield
            return
        self._change()
        self._stack.append(name)
        try:
            if self.naming:
                with torch.profiler.record_function(f"fmrizoo: {name}"):
                    yield
            else:
                yield
        finally:
            self._change()
            self._stack.pop()

    def _change(self) -> None:
        """Give the time since the last change to the phase that runs."""
        self._settle()
        now = self._clock()
        self._found[self._stack[-1]] += now - self._mark
        self._mark = now

    def around(self, name: str, work: F) -> F:
        """``work`` as a phase."""

        @functools.wraps(work)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return work(*args, **kwargs)

        return timed  # type: ignore[return-value]  # same signature


@dataclass(frozen=True)
class _Timed:
    """Samples whose way to the device is a phase."""

    samples: CompactSamples
    clock: PhaseClock

    def to_batch(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Batch | ReadBatch:
        with self.clock.phase("to device"):
            return self.samples.to_batch(device, dtype=dtype)


@dataclass(frozen=True)
class Breakdown:
    """Mean milliseconds of a step by phase, on rank 0.

    Attributes:
        phases: In the order of :data:`PHASES`.
        step: Of the whole step: their sum.
        slowest: Milliseconds of the slowest step.
        measured: Steps that count: not the first one and not the traced ones, which are slower,
            unless there are no others.
        first: The first step of this start that was timed at all.
        steps: Steps that were timed at all.
        stall: Share of the time that was spent waiting for data.
    """

    phases: dict[str, float]
    step: float
    slowest: float
    measured: int
    first: int
    steps: int
    stall: float


def breakdown(steps: list[dict[str, float]], first: int, traced: range) -> Breakdown:
    """Means over ``steps`` (seconds by phase; number ``first`` and on).

    Raises:
        ValueError: no steps.
    """
    if not steps:
        raise ValueError("no step was timed")
    plain = [one for i, one in enumerate(steps) if i > 0 and i not in traced]
    kept = plain or steps
    mean = {name: 1e3 * sum(one[name] for one in kept) / len(kept) for name in (*PHASES, "step")}
    whole = mean.pop("step")
    return Breakdown(
        phases=mean,
        step=whole,
        slowest=1e3 * max(one["step"] for one in kept),
        measured=len(kept),
        first=first,
        steps=len(steps),
        stall=mean["data"] / whole if whole else 0.0,
    )


def read_breakdown(out: Path) -> Breakdown | None:
    """The table of the run folder ``out``; None where no run was profiled.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = out / TABLE
    if not path.is_file():
        return None
    try:
        return Breakdown(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it") from None


class Profile:
    """The profile of one call of :func:`fmrizoo.trainer.loop.train`.

    Args:
        out: Run folder; rank 0 writes ``profile.json`` and ``trace.json.gz`` there.
        device: Where this rank computes.
        first: Number of the first step.
        left: Steps to come.
        main: This is rank 0. Other ranks time themselves too, so that all are equally slow.
        clock: Seconds.
    """

    def __init__(
        self,
        out: Path,
        device: torch.device,
        *,
        first: int,
        left: int,
        main: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.out, self.main, self.first = out, main, first
        settle = functools.partial(_settle, device) if device.type != "cpu" else lambda: None
        self.clock = PhaseClock(clock, settle)
        # Not the first step: allocations and lazy initialisations would hide the rest.
        start = min(1, left - 1)
        self.traced = range(start, min(start + TRACED, left))
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type in ("cuda", "xpu"):
            activities.append(getattr(torch.profiler.ProfilerActivity, device.type.upper()))
        self._trace = torch.profiler.profile(activities=activities)
        self._tracing = False
        self._undo: list[tuple[Any, str, Any]] = []

    def start(self) -> None:
        """Wrap the collectives; :meth:`finish` takes the wraps off."""
        wrapped: list[tuple[Any, str]] = [(dist, name) for name in COLLECTIVES]
        wrapped.append((dist.Work, "wait"))
        backend = getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None)
        wrapped += [(backend, name) for name in _LOOKED_UP if hasattr(backend, name)]
        for owner, name in wrapped:
            old = getattr(owner, name)
            self._undo.append((owner, name, old))
            setattr(owner, name, self.clock.around("collectives", old))

    def stream(self, batches: Iterator[CompactSamples]) -> Iterator[CompactSamples]:
        """``batches`` with their two phases; closing it closes them."""
        try:
            while True:
                with self.clock.phase("data"):
                    try:
                        samples = next(batches)
                    except StopIteration:
                        return
                yield _Timed(samples, self.clock)
        finally:
            if callable(close := getattr(batches, "close", None)):
                close()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step, in the trace if it is one of those."""
        number = len(self.clock.steps)
        if self.main and number == self.traced.start and not self._tracing:
            self._trace.start()
            self._tracing = self.clock.naming = True
        with self.clock.step():
            yield
        if number + 1 == self.traced.stop:
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self._tracing:
            self._tracing = self.clock.naming = False
            self._trace.stop()
            with writing(TRACE, self.out):
                self._trace.export_chrome_trace(str(self.out / TRACE))

    def finish(self) -> None:
        """Take the wraps off and write the table, and what there is of the trace."""
        while self._undo:
            owner, name, old = self._undo.pop()
            setattr(owner, name, old)
        self._stop_trace()
        if self.main and self.clock.steps:
            found = breakdown(self.clock.steps, self.first, self.traced)
            with writing(TABLE, self.out):
                write_json(self.out / TABLE, asdict(found))


def _settle(device: torch.device) -> None:
    getattr(torch, device.type).synchronize(device)

"""Do embeddings keep the data's dynamics? Autocorrelation over time of both, side by side.

Source: the SwiFT v2 report, Figure 5-A, which finds artificial peaks in the autocorrelation of the
original model's embeddings and none in the revised one's. Here "artificial" is a number, see
:func:`artefact`: how far the autocorrelation stands out at the multiples of the model's temporal
window, beyond what the data do there.

Time is counted in slots: the frames of one patch (``Backbone.reduction[3]``) are one slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmrizoo.errors import DataError
from fmrizoo.types import Backbone, Batch, Features, Voxels

Array = NDArray[np.float64]

# A backbone without a temporal window is looked at where the windows of the others are.
CANDIDATE_PERIODS = (4, 10)
DRAWS = 2000  # of the bootstrap
FEW_RUNS = 5  # below this many runs, single clips are drawn
COURSES = 1 << 14  # time courses transformed at once


@dataclass(frozen=True)
class Artefact:
    """How far the embeddings' autocorrelation peaks at the multiples of ``period`` slots.

    Attributes:
        value: In units of correlation; see :func:`artefact`.
        low, high: 95 % bootstrap interval; None with a single clip.
    """

    period: int
    value: float
    low: float | None
    high: float | None

    @property
    def kind(self) -> str:
        """``peaks``, ``dips`` or ``no peaks``: the interval lies above, below or around 0."""
        low, high = self.low, self.high
        if low is None or high is None:
            return "peaks" if self.value > 0 else "dips"
        return "peaks" if low > 0 else "dips" if high < 0 else "no peaks"

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{_signed(self.value)} (one clip)"
        return f"{_signed(self.value)} (95 % interval {_signed(self.low)} to {_signed(self.high)})"


@dataclass(frozen=True)
class Autocorrelation:
    """Autocorrelation of data and embeddings, averaged over places, features and clips.

    Attributes:
        backbone: Registered name.
        window: Slots of the model's temporal window; None: it has none.
        slots: Time slots of a clip.
        slot_seconds: Seconds from one slot to the next.
        data, embeddings: Correlation at the lags 1, 2, … slots.
        artefacts: One per period looked at; empty where the clips are too short for it.
        clips, runs: How many went into the means.
        drawn: What the bootstrap draws: ``run``, ``clip``, or empty without an interval.
    """

    backbone: str
    window: int | None
    slots: int
    slot_seconds: float
    data: tuple[float, ...]
    embeddings: tuple[float, ...]
    artefacts: tuple[Artefact, ...]
    clips: int
    runs: int
    drawn: str

    @property
    def says(self) -> str:
        """The artefact in plain words."""
        if not self.artefacts:
            what = f"a window of {self.window}" if self.window else "a period"
            return f"clips of {self.slots} slots are too short to see {what}"
        if self.window is None:
            each = (f"period {a.period}: {a.kind}, {a}" for a in self.artefacts)
            return f"no temporal window ({'; '.join(each)})"
        (only,) = self.artefacts
        seconds = f"{only.period * self.slot_seconds:g} s"
        return f"{only.kind} at multiples of the window, {only.period} slots = {seconds}: {only}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def autocorrelation(courses: Tensor, lags: int) -> Array:
    """Mean over time courses of the biased autocorrelation at lags 0 … ``lags``.

    Each course is demeaned; ``r(k) = Σ_t x_t x_{t+k} / Σ_t x_t²`` (both sums divided by the full
    length). Courses that do not change are left out.

    Args:
        courses: ``(n, t)``.
        lags: Less than ``t``.

    Returns:
        ``(lags + 1,)``; the first is 1.

    Raises:
        DataError: no course changes over time.
    """
    frames = courses.shape[1]
    total, count = torch.zeros(lags + 1, dtype=torch.float64), 0
    for part in torch.split(courses, COURSES):
        x = part.double()
        size = x.abs().amax(1)
        x = x - x.mean(1, keepdim=True)
        # Rounding of a constant is no signal.
        x = x[x.abs().amax(1) > 1e-6 * size]
        if not len(x):
            continue
        spectrum = torch.fft.rfft(x, 2 * frames).abs().square()
        products = torch.fft.irfft(spectrum, 2 * frames)[:, : lags + 1]
        total += (products / products[:, :1]).sum(0).cpu()
        count += len(x)
    if not count:
        raise DataError("nothing changes over time, so there is no autocorrelation")
    mean: Array = (total / count).numpy()
    return mean


def comb(curve: Array, period: int) -> float | None:
    """Mean over the multiples of ``period`` of ``r(kP) − ½ (r(kP−1) + r(kP+1))``.

    ``curve`` holds r at lags 0, 1, 2, …; None where no multiple has both neighbours. 0 on a
    straight line, positive where the multiples stick out.
    """
    at = np.arange(period, len(curve) - 1, period)
    if period < 2 or not len(at):
        return None
    return float(np.mean(curve[at] - (curve[at - 1] + curve[at + 1]) / 2))


def artefact(embeddings: Array, data: Array, period: int) -> float | None:
    """The window-period artefact: :func:`comb` of the embeddings minus that of the data.

    Both are autocorrelations at lags 0, 1, 2, … of the same clips. Positive: the embeddings are
    more alike at multiples of the window than their neighbours in lag and the data say, that is,
    they show artificial peaks. It is 0 for embeddings with the data's own autocorrelation. A
    cosine of period P that makes up the share ``s`` of the embeddings' variance adds about
    ``s · (1 − cos 2π/P)`` times the mean of ``1 − kP/t`` over the multiples. Curves that differ
    only in smoothness (``ρ^k``) differ in bend, by less than 0.02 for P = 4, less for longer ones.
    """
    ours, theirs = comb(embeddings, period), comb(data, period)
    return None if ours is None or theirs is None else ours - theirs


def temporal_window(config: Any) -> int | None:
    """Slots of a backbone's temporal attention window, read from its config; None: no window."""
    window = getattr(config, "temporal_window", None)
    if window is not None:
        return int(window)
    size = getattr(config, "window_size", None)
    return int(size[3]) if size is not None and len(size) == 4 else None


def longest_lag(slots: int, periods: Sequence[int]) -> int:
    """Half a clip; a little more where a window would otherwise lie just outside."""
    reach = min((p + 1 for p in periods if p + 1 <= slots - 2), default=0)
    return max(slots // 2, reach)


def data_courses(voxels: Voxels, patch: Sequence[int], slot: int) -> list[Tensor]:
    """Time courses ``(patches, slots)`` of the brain voxels' mean in every patch, per sample.

    Args:
        voxels: Compact clips.
        patch: Voxels of a patch along x, y, z.
        slot: Frames of a time slot.
    """
    _, ny, nz, frames = voxels.grid
    found = []
    parts = zip(
        voxels.split(voxels.index), torch.split(voxels.values, list(voxels.counts), 1), strict=True
    )
    for index, values in parts:
        x, y, z = index // (ny * nz), index // nz % ny, index % nz
        px, py, pz = (a // p for a, p in zip((x, y, z), patch, strict=True))
        cell = (px * (ny // patch[1] + 1) + py) * (nz // patch[2] + 1) + pz
        kept, place, size = torch.unique(cell, return_inverse=True, return_counts=True)
        sums = values.new_zeros(frames, len(kept)).index_add_(1, place, values)
        means = (sums / size).view(frames // slot, slot, -1).mean(1)
        found.append(means.t())
    return found


def feature_courses(features: Features) -> list[Tensor]:
    """Time courses ``(places · d, slots)`` of the places with brain in them, per sample."""
    grid = features.to_grid()
    share = Features(
        features.brain.unsqueeze(-1).to(grid.dtype),
        features.index,
        features.valid,
        features.grid,
        features.brain,
    ).to_grid()
    kept = share[:, 0].amax(-1) > 0
    return [clip[:, inside].flatten(0, 1) for clip, inside in zip(grid, kept, strict=True)]


def measure(
    backbone: Backbone, batches: Iterable[Batch], *, name: str, window: int | None
) -> Autocorrelation:
    """Autocorrelation of ``batches`` and of what ``backbone`` makes of them.

    Args:
        backbone: Put into ``eval()`` mode.
        batches: Clips of equal length and repetition time, on the backbone's device.
        name: Of the backbone, for the record.
        window: Slots of its temporal window (:func:`temporal_window`).

    Raises:
        DataError: no clip, clips of fewer than 4 slots, or of different repetition times.
    """
    slot = backbone.reduction[3]
    periods = CANDIDATE_PERIODS if window is None else (window,)
    theirs: list[Array] = []
    ours: list[Array] = []
    runs: list[str] = []
    seconds: set[float] = set()
    slots = 0
    backbone.eval()
    for batch in batches:
        slots = batch.grid.t // slot
        if slots < 4:
            raise DataError(f"clips of {slots} time slots are too short for an autocorrelation")
        lags = longest_lag(slots, periods)
        voxels = batch.voxels or Voxels.of(batch.bold, batch.mask, batch.bold.new_zeros(len(batch)))
        with torch.no_grad():
            features = backbone.encode(backbone.read(batch))
        courses = data_courses(voxels, backbone.patch_size[:3], slot)
        theirs += [autocorrelation(c, lags) for c in courses]
        ours += [autocorrelation(c, lags) for c in feature_courses(features)]
        runs += batch.run
        seconds |= {round(float(tr) * slot, 4) for tr in batch.tr}
    if not ours:
        raise DataError("no clip to take an autocorrelation of")
    if len(seconds) > 1:
        raise DataError(f"the clips have different times between slots: {sorted(seconds)} s")
    drawn = "" if len(ours) == 1 else ("run" if len(set(runs)) >= FEW_RUNS else "clip")
    data, embeddings = np.stack(theirs), np.stack(ours)
    found = [_with_interval(embeddings, data, p, runs if drawn == "run" else None) for p in periods]
    return Autocorrelation(
        backbone=name,
        window=window,
        slots=slots,
        slot_seconds=seconds.pop(),
        data=tuple(data.mean(0)[1:].tolist()),
        embeddings=tuple(embeddings.mean(0)[1:].tolist()),
        artefacts=tuple(a for a in found if a is not None),
        clips=len(ours),
        runs=len(set(runs)),
        drawn=drawn,
    )


def _with_interval(
    embeddings: Array, data: Array, period: int, runs: Sequence[str] | None
) -> Artefact | None:
    """The artefact of curves ``(clips, lags + 1)``, with an interval over runs or else clips."""
    pairs = zip(embeddings, data, strict=True)
    each = [artefact(e, d, period) for e, d in pairs]
    values = np.array([v for v in each if v is not None])
    if len(values) < len(each):
        return None
    if len(values) == 1:
        return Artefact(period, float(values[0]), None, None)
    names = np.unique(runs, return_inverse=True)[1] if runs is not None else np.arange(len(values))
    size = np.bincount(names)
    total = np.bincount(names, values)
    chosen = np.random.default_rng(0).integers(len(size), size=(DRAWS, len(size)))
    means = total[chosen].sum(1) / size[chosen].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Artefact(period, float(values.mean()), float(low), float(high))

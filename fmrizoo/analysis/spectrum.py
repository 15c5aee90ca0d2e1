"""Do embeddings fluctuate over time as the data do? Slope of the spectrum and Hurst exponent.

- Slope: straight line through log power against log frequency in a stated band, power by Welch's
  method (Hann windows of half a run, overlapping by half, each demeaned). White noise: 0; 1/f^β
  noise: −β.
- Hurst exponent: detrended fluctuation analysis of first order (DFA-1, Peng et al. 1994): a line is
  removed from each window of the summed course. White noise: 0.5; 1/f^β noise: (β + 1) / 2, above 1
  not stationary (Brownian motion: 1.5).

Both are biased on short courses, so that white noise of the same length is measured beside.

A model that takes clips of a fixed length sees a run as clips one after the other without overlap,
and its embeddings are joined. Whatever depends on the place within the clip (position embeddings,
window borders) then repeats with the clip's length, in peaks that hide everything else. So each
course's mean at each place within the clip is taken away, from embeddings, data and white noise
alike, and its share of the variance is reported (by chance about one in the number of clips); see
also :mod:`fmrizoo.analysis.autocorrelation`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fmrizoo.analysis.autocorrelation import data_courses, feature_courses
from fmrizoo.analysis.dynamics import held_out
from fmrizoo.analysis.tested import interval, write_json
from fmrizoo.errors import DataError
from fmrizoo.types import Backbone, Batch, Voxels

Array = NDArray[np.float64]

SCHEMA = "fmrizoo.spectrum/1"
ORDER = 1  # of the trend that DFA removes
LEAST_SLOTS = 32
LEAST_BINS = 4  # frequencies in the band
WHITE = 64  # courses of white noise for comparison
AT_MOST = 4096  # courses of a clip that are looked at
BAND = (0.01, 0.1)  # Hz


def welch(courses: Array, seconds: float) -> tuple[Array, Array]:
    """Frequencies in Hz and mean power of courses ``(n, t)`` scaled to unit variance.

    Courses that do not change are left out.

    Raises:
        DataError: no course changes over time, or fewer than ``LEAST_SLOTS`` slots.
    """
    from scipy.signal import welch as of_scipy

    x = _varying(courses)
    length = max(LEAST_SLOTS // 2, x.shape[1] // 2)
    frequency, power = of_scipy(
        x, fs=1 / seconds, window="hann", nperseg=length, noverlap=length // 2, detrend="constant"
    )
    return frequency, power.mean(0)


def _varying(courses: Array) -> Array:
    """The courses that change, with mean 0 and variance 1."""
    if courses.shape[1] < LEAST_SLOTS:
        raise DataError(
            f"{courses.shape[1]} time slots are too short for a spectrum: {LEAST_SLOTS} are needed"
        )
    x = courses.astype(np.float64)
    size = np.abs(x).max(1, initial=0)
    x = x - x.mean(1, keepdims=True)
    kept = np.abs(x).max(1, initial=0) > 1e-6 * size  # rounding of a constant is no signal
    if not kept.any():
        raise DataError("nothing changes over time, so there is no spectrum")
    x = x[kept]
    scaled: Array = x / x.std(1, keepdims=True)
    return scaled


def slope(frequency: Array, power: Array, band: tuple[float, float]) -> float:
    """Least-squares slope of log power against log frequency within ``band`` (Hz).

    Raises:
        DataError: fewer than ``LEAST_BINS`` frequencies lie in the band.
    """
    inside = (frequency >= band[0]) & (frequency <= band[1]) & (frequency > 0) & (power > 0)
    if inside.sum() < LEAST_BINS:
        raise DataError(
            f"{int(inside.sum())} frequencies lie between {band[0]:g} and {band[1]:g} Hz, at least "
            f"{LEAST_BINS} are needed: take a wider band or longer clips (frequencies are "
            f"{frequency[1]:.3g} Hz apart up to {frequency[-1]:.3g} Hz)"
        )
    return float(np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1)[0])


def dfa(courses: Array) -> float:
    """Scaling exponent of DFA-1 of courses ``(n, t)``, over windows of 8 to t/4 slots.

    Fluctuations are averaged over courses (of unit variance) before the line is fitted.

    Raises:
        DataError: see :func:`welch`.
    """
    profile = np.cumsum(_varying(courses), axis=1)
    slots = profile.shape[1]
    sizes = np.unique(np.geomspace(8, max(slots // 4, 12), 12).round().astype(int))
    fluctuation = [_fluctuation(profile, int(size)) for size in sizes]
    return float(np.polyfit(np.log(sizes), np.log(fluctuation), 1)[0])


def _fluctuation(profile: Array, size: int) -> float:
    """Root mean square of what is left of windows of ``size`` without their trend."""
    count = profile.shape[1] // size
    # From both ends, so that no slot is left out.
    ends = (profile[:, : count * size], profile[:, profile.shape[1] - count * size :])
    windows = np.concatenate([part.reshape(-1, size) for part in ends])
    basis = np.linalg.qr(np.vander(np.linspace(-1, 1, size), ORDER + 1))[0]
    rest = windows - (windows @ basis) @ basis.T
    return float(np.sqrt((rest**2).mean()))


@dataclass(frozen=True)
class Exponent:
    """Mean over runs, with a 95 % bootstrap interval over subjects or runs (None: one run)."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: list[float], subjects: list[str]) -> Exponent:
        """From one value a run."""
        ends = interval(np.array(values), subjects)
        return cls(float(np.mean(values)), ends and ends[0], ends and ends[1])

    def __str__(self) -> str:
        text = f"{self.mean:+.2f}"
        if self.low is None or self.high is None:
            return text
        return f"{text} (95 % interval {self.low:+.2f} to {self.high:+.2f})"


@dataclass(frozen=True)
class Spectrum:
    """Spectra and exponents of data and embeddings of the same runs.

    Attributes:
        backbone: Registered name.
        slots, slot_seconds: Of a run (the shortest), and seconds from one slot to the next.
        band: Hz, in which the slopes were fitted.
        runs: How many.
        clip_slots: Slots that the model sees at once.
        frequency: Hz.
        data_power, embedding_power: Mean over courses of unit variance and runs, per Hz.
        joined_power: Of the embeddings with what repeats from clip to clip.
        data_repeats, embedding_repeats: Share of the variance that repeats from clip to clip and
            was taken away; 0 where a run is one clip.
        data_slope, embedding_slope, slope_difference: The last is embeddings minus data.
        data_hurst, embedding_hurst, hurst_difference: Likewise; DFA-1.
        white_slope, white_hurst: Of white noise of the same length: what is bias.
    """

    backbone: str
    slots: int
    slot_seconds: float
    band: tuple[float, float]
    runs: int
    clip_slots: int
    frequency: tuple[float, ...]
    data_power: tuple[float, ...]
    embedding_power: tuple[float, ...]
    joined_power: tuple[float, ...]
    data_repeats: float
    embedding_repeats: float
    data_slope: Exponent
    embedding_slope: Exponent
    slope_difference: Exponent
    data_hurst: Exponent
    embedding_hurst: Exponent
    hurst_difference: Exponent
    white_slope: float
    white_hurst: float

    @property
    def says(self) -> str:
        """Both exponents in plain words."""
        return (
            f"slope {self.band[0]:g} to {self.band[1]:g} Hz: embeddings {self.embedding_slope}, "
            f"data {self.data_slope}, white noise {self.white_slope:+.2f}; Hurst exponent (DFA-1): "
            f"embeddings {self.embedding_hurst}, data {self.data_hurst}, white noise "
            f"{self.white_hurst:+.2f}; {self.runs} × {self.slots} slots; taken away as it "
            f"repeats with every clip: {100 * self.embedding_repeats:.0f} % of the embeddings, "
            f"{100 * self.data_repeats:.0f} % of the data (variance)"
        )


def spectrum_of(
    backbone: Backbone,
    batches: Iterable[Batch],
    *,
    name: str,
    band: tuple[float, float] | None = None,
) -> Spectrum:
    """Measure clips and what ``backbone`` makes of them.

    Args:
        backbone: Put into ``eval()`` mode.
        batches: Clips of equal length and repetition time, on the backbone's device; those of a
            run one after the other in time, without a gap.
        name: Of the backbone, for the record.
        band: Hz; None: ``BAND``, narrowed to what clips of this length resolve.

    Raises:
        DataError: no clip, or clips too short or of different repetition times.
    """
    slot = backbone.reduction[3]
    clips: dict[str, list[Array]] = {"data": [], "embeddings": []}
    runs: list[str] = []
    subject: dict[str, str] = {}
    seconds: set[float] = set()
    backbone.eval()
    for batch in batches:
        voxels = batch.voxels or Voxels.of(batch.bold, batch.mask, batch.bold.new_zeros(len(batch)))
        with torch.no_grad():
            features = backbone.encode(backbone.read(batch))
        for kind, found in (
            ("data", data_courses(voxels, backbone.patch_size[:3], slot)),
            ("embeddings", feature_courses(features)),
        ):
            clips[kind] += [_some(c.double().cpu().numpy()) for c in found]
        runs += batch.run
        subject |= dict(zip(batch.run, batch.subject, strict=True))
        seconds |= {round(float(tr) * slot, 4) for tr in batch.tr}
    if not runs:
        raise DataError("no clip to take a spectrum of")
    if len(seconds) > 1:
        raise DataError(f"the clips have different times between slots: {sorted(seconds)} s")
    joined = {kind: _joined(parts, runs) for kind, parts in clips.items()}
    clip_slots = clips["data"][0].shape[1]
    return _summary(joined, list(subject.values()), seconds.pop(), name, band, clip_slots)


def _joined(clips: list[Array], runs: list[str]) -> list[Array]:
    """Courses ``(n, slots)`` of each run, as long as those of the shortest."""
    found = []
    for run in dict.fromkeys(runs):
        own = [clip for clip, name in zip(clips, runs, strict=True) if name == run]
        found.append(np.concatenate(own, 1))
    shortest = min(f.shape[1] for f in found)
    return [f[:, :shortest] for f in found]


def _some(courses: Array) -> Array:
    """At most ``AT_MOST`` courses, evenly over places and features."""
    step = -(-len(courses) // AT_MOST)
    return courses[::step]


def _summary(
    courses: dict[str, list[Array]],
    subjects: list[str],
    seconds: float,
    name: str,
    band: tuple[float, float] | None,
    clip_slots: int,
) -> Spectrum:
    power: dict[str, Array] = {"joined": _mean_power(courses["embeddings"], seconds)}
    repeats: dict[str, float] = {}
    slopes: dict[str, list[float]] = {}
    hursts: dict[str, list[float]] = {}
    slots = courses["data"][0].shape[1]
    for kind, runs in courses.items():
        rest, shares = zip(*(without_repeats(c, clip_slots) for c in runs), strict=True)
        repeats[kind] = float(np.mean(shares))
        spectra = [welch(c, seconds) for c in rest]
        frequency = spectra[0][0]
        # Nearest to 0, Welch's windows leak what they took away with the mean.
        used = band or (max(BAND[0], frequency[2]), min(BAND[1], frequency[-1]))
        power[kind] = np.mean([p for _, p in spectra], axis=0)
        slopes[kind] = [slope(f, p, used) for f, p in spectra]
        hursts[kind] = [dfa(c) for c in rest]
    noise = np.random.default_rng(0).normal(size=(WHITE, slots))
    white, _ = without_repeats(noise, clip_slots)

    def differ(values: dict[str, list[float]]) -> Exponent:
        pairs = zip(values["embeddings"], values["data"], strict=True)
        return Exponent.of([e - d for e, d in pairs], subjects)

    return Spectrum(
        backbone=name,
        slots=slots,
        slot_seconds=seconds,
        band=(float(used[0]), float(used[1])),
        runs=len(subjects),
        clip_slots=clip_slots,
        frequency=tuple(frequency.tolist()),
        data_power=tuple(power["data"].tolist()),
        embedding_power=tuple(power["embeddings"].tolist()),
        joined_power=tuple(power["joined"].tolist()),
        data_repeats=repeats["data"],
        embedding_repeats=repeats["embeddings"],
        data_slope=Exponent.of(slopes["data"], subjects),
        embedding_slope=Exponent.of(slopes["embeddings"], subjects),
        slope_difference=differ(slopes),
        data_hurst=Exponent.of(hursts["data"], subjects),
        embedding_hurst=Exponent.of(hursts["embeddings"], subjects),
        hurst_difference=differ(hursts),
        white_slope=slope(*welch(white, seconds), used),
        white_hurst=dfa(white),
    )


def _mean_power(runs: list[Array], seconds: float) -> Array:
    mean: Array = np.mean([welch(c, seconds)[1] for c in runs], axis=0)
    return mean


def without_repeats(courses: Array, period: int) -> tuple[Array, float]:
    """Courses ``(n, t)`` without the mean over repeats at each of ``period`` places in time.

    A last repeat that is not whole counts where it is. With fewer than two, nothing is taken away.

    Returns:
        What is left, and the share of the courses' variance that was taken (mean over courses that
        change).
    """
    slots = courses.shape[1]
    if slots < 2 * period:
        return courses, 0.0
    x = courses.astype(np.float64)
    x = x - x.mean(1, keepdims=True)
    place = np.arange(slots) % period
    which = (place[None] == np.arange(period)[:, None]).astype(np.float64)
    mean = x @ (which / which.sum(1, keepdims=True)).T
    rest = x - mean[:, place]
    before, after = x.var(1), rest.var(1)
    changing = before > 1e-12 * (courses.astype(np.float64) ** 2).mean(1)
    if not changing.any():
        raise DataError("nothing changes over time, so there is no spectrum")
    share = 1 - after[changing] / before[changing]
    return rest, float(share.mean())


def spectrum_run(
    run: Path,
    *,
    runs: int = 32,
    frames: int | None = None,
    band: tuple[float, float] | None = None,
) -> Spectrum:
    """:func:`spectrum_of` a trained run on its held-out runs.

    Args:
        run: Folder of a finished run.
        runs: At most so many, spread evenly.
        frames: Length of a stretch for models that take any; None: the shortest run's length.
        band: Hz, see :func:`spectrum_of`.

    Raises:
        CheckpointError, DataError: see :func:`fmrizoo.analysis.dynamics.held_out`.
    """
    recipe, backbone, batches = held_out(run, clips=None, frames=frames, runs=runs)
    return spectrum_of(backbone, batches, name=recipe.backbone.name, band=band)


def write_spectrum(folder: Path, found: Spectrum) -> None:
    """Write ``spectrum.json``."""
    write_json(folder / "spectrum.json", {"schema": SCHEMA, **asdict(found)})

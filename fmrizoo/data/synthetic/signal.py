"""Generators of what a run is a sum of. Arrays in, arrays out; frames first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]
Event = dict[str, Any]  # onset, duration, trial_type

_BREATH, _HEART = 0.27, 1.05  # Hz; the heart's is aliased at a TR of seconds
_HEAD = 50.0  # mm, radius on which rotations become millimetres (Power et al. 2012)
_BURN = 20  # frames before the first one
_EVENT = 1.0  # seconds
_START = 8.0  # seconds of rest before the first stimulus


def band_limited(
    rng: np.random.Generator, frames: int, count: int, tr: float, low: float, high: float
) -> Series:
    """``(frames, count)`` independent Gaussian series of power in low … high Hz, variance 1.

    Cut from a series four times as long, so that the end does not lead into the beginning.
    """
    length = max(4 * frames, math.ceil(8 / (min(high, 0.5 / tr) - low) / tr))
    frequency = np.fft.rfftfreq(length, tr)
    inside = (frequency >= low) & (frequency <= high)
    inside[0] = False
    spectrum = np.zeros((len(frequency), count), complex)
    spectrum[inside] = rng.standard_normal((int(inside.sum()), count, 2)) @ [1, 1j]
    both = np.where(frequency * tr * 2 >= 1 - 1e-9, 1, 4) * inside  # real part alone at Nyquist
    scale = length / math.sqrt(float(both.sum()))
    series: Series = np.fft.irfft(spectrum, length, axis=0)[:frames] * scale
    return series


def field_noise(
    rng: np.random.Generator,
    mask: NDArray[np.bool_],
    voxel_size: Sequence[float],
    frames: int,
    *,
    fwhm: float,
    temporal: str,
    lag1: float,
    exponent: float,
) -> NDArray[np.float32]:
    """``(frames, n_vox)`` Gaussian noise of variance 1, smooth in space, coloured in time.

    Args:
        voxel_size: mm.
        fwhm: mm, of the Gaussian kernel that white noise is smoothed with.
        temporal: ``white``, ``ar1`` with correlation ``lag1`` of neighbouring frames, or
            ``one_over_f``: power ~ frequency^-``exponent``; its end leads into its beginning.
    """
    kernels = [_kernel(fwhm / size) for size in voxel_size]
    box, inside = _box(mask, [len(k) // 2 for k in kernels])
    out = np.empty((frames, int(mask.sum())), np.float32)
    phi = np.float32(lag1 if temporal == "ar1" else 0)
    fresh = np.float32(math.sqrt(1 - float(phi) ** 2))
    for t in range(frames):
        white = _smooth(rng.standard_normal(box, dtype=np.float32), kernels)[inside]
        if t == 0 or phi == 0:
            out[t] = white
        else:
            np.multiply(out[t - 1], phi, out=out[t])
            out[t] += fresh * white
    if temporal == "one_over_f":
        _redden(out, exponent)
    return out


def _kernel(fwhm: float) -> NDArray[np.float32]:
    """Taps that give white noise the correlations exp(−d² / 4σ²) of a Gaussian of ``fwhm`` voxels.

    Sampling the Gaussian itself would give too little at d = 1 where it is as narrow as a voxel.
    The squares of the taps add up to 1, so that the variance stays 1.
    """
    sigma = max(fwhm / math.sqrt(8 * math.log(2)), 1e-3)
    half = math.ceil(8 * sigma) + 8
    apart = np.minimum(np.arange(2 * half), 2 * half - np.arange(2 * half))
    spectrum = np.fft.fft(np.exp(-(apart**2) / (4 * sigma**2))).real
    taps = np.fft.ifft(np.sqrt(np.maximum(spectrum, 0))).real
    reach = int(np.flatnonzero(np.abs(taps[:half]) > 2e-3 * taps[0])[-1])
    taps = np.roll(taps, reach)[: 2 * reach + 1]
    return (taps / math.sqrt(float((taps**2).sum()))).astype(np.float32)


def _box(
    mask: NDArray[np.bool_], reach: Sequence[int]
) -> tuple[tuple[int, ...], tuple[NDArray[np.int64], ...]]:
    """Shape of the smallest box around the brain, and the voxels' places in it.

    The box is wider than the brain by the kernel's reach: what wraps around is no neighbour.
    """
    where = np.nonzero(mask)
    first = [int(axis.min()) for axis in where]
    shape = tuple(
        int(axis.max()) - low + 1 + r for axis, low, r in zip(where, first, reach, strict=True)
    )
    return shape, tuple(axis - low for axis, low in zip(where, first, strict=True))


def _smooth(
    values: NDArray[np.float32], kernels: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    from scipy.ndimage import correlate1d

    for axis, kernel in enumerate(kernels):
        if len(kernel) > 1:
            values = correlate1d(values, kernel, axis=axis, mode="wrap")
    return values


def _redden(noise: NDArray[np.float32], exponent: float) -> None:
    """Give white ``(frames, n)`` a spectrum ~ 1 / f^exponent, variance 1, in place."""
    frequency = np.fft.rfftfreq(len(noise))
    gain = np.zeros(len(frequency))
    gain[1:] = frequency[1:] ** (-exponent / 2)
    twice = np.full(len(frequency), 2.0)
    twice[0] = 1
    if len(noise) % 2 == 0:
        twice[-1] = 1
    gain *= math.sqrt(len(noise) / float((twice * gain**2).sum()))
    for start in range(0, noise.shape[1], 8192):
        part = noise[:, start : start + 8192]
        part[:] = np.fft.irfft(np.fft.rfft(part, axis=0) * gain[:, None], len(noise), axis=0)


def drift(rng: np.random.Generator, frames: int, sd: float, points: NDArray[np.float32]) -> Any:
    """Three slow courses ``(frames, 3)`` and their maps ``(3, n_vox)``: sd over time ``sd``.

    A line, half a cosine and one cosine over the run, each with a plane in space as its map.
    """
    time = np.linspace(-1, 1, frames)
    courses = np.stack([time, np.cos(np.pi * time), np.sin(np.pi * time)], axis=1)
    courses -= courses.mean(0)
    courses /= courses.std(0)
    planes = rng.standard_normal((3, 4)) @ np.vstack([_unit(points), np.ones(len(points))])
    planes *= sd / math.sqrt(float((planes**2).sum(0).mean()))
    return courses, planes


def _unit(points: NDArray[np.float32]) -> Series:
    """Coordinates ``(3, n_vox)`` with mean 0 and s.d. about 1."""
    centred = points.T.astype(np.float64) - points.mean(0)[:, None]
    found: Series = centred / max(float(centred.std()), 1.0)
    return found


def physiology(
    rng: np.random.Generator, frames: int, tr: float, sd: float, tissues: NDArray[np.float32]
) -> Any:
    """Breathing (everywhere) and heart beat (most in CSF): courses ``(frames, 2)``, maps."""
    time = np.arange(frames) * tr
    courses = []
    for rate in (_BREATH, _HEART):
        mine = rate * math.exp(0.1 * rng.standard_normal())
        wander = 0.3 * np.cumsum(rng.standard_normal(frames)) * math.sqrt(tr)
        courses.append(
            math.sqrt(2) * np.cos(2 * np.pi * mine * time + rng.uniform(0, 2 * np.pi) + wander)
        )
    maps = np.stack([np.ones(tissues.shape[1]), 0.5 + tissues[2]])
    maps *= sd / np.sqrt((maps**2).mean(1, keepdims=True))
    return np.stack(courses, axis=1), maps


def head_motion(rng: np.random.Generator, frames: int, mean_displacement: float) -> Series:
    """Shifts (mm) along R, A, S and rotations (radians) ``(frames, 6)``.

    A slow walk that tends back, with a few jerks, scaled to the mean framewise displacement.
    """
    steps = rng.standard_normal((frames + _BURN, 6))
    jerk = rng.random(frames + _BURN) < 0.03
    steps[jerk] *= 5
    steps[:, 3:] /= _HEAD
    walk = np.zeros_like(steps)
    for t in range(1, len(walk)):
        walk[t] = 0.97 * walk[t - 1] + steps[t]
    walk = walk[_BURN:] - walk[_BURN]
    size = float(displacement(walk)[1:].mean())
    scaled: Series = walk * (mean_displacement / size)
    return scaled


def displacement(motion: Series) -> Series:
    """Framewise displacement ``(frames,)`` in mm after Power et al. (2012); NaN for the first."""
    from fmrizoo.data.qc import power_displacement

    found: Series = power_displacement(motion[:, :3], motion[:, 3:])
    return found


def motion_maps(
    slope: NDArray[np.float32], mean: NDArray[np.float32], points: NDArray[np.float32]
) -> Series:
    """% signal per mm or radian ``(6, n_vox)``: the brain moves, the voxel stays (first order)."""
    x, y, z = points.T - points.mean(0)[:, None]
    gx, gy, gz = slope
    turns = [gz * y - gy * z, gx * z - gz * x, gy * x - gx * y]  # slope · (axis × place)
    found: Series = -100 * np.stack([gx, gy, gz, *turns]) / mean
    return found


def stimuli(
    rng: np.random.Generator,
    names: Sequence[str],
    seconds: float,
    *,
    design: str,
    duration: float,
    pause: float,
) -> list[Event]:
    """Conditions in random order, each once before any comes again; all end inside the run."""
    found: list[Event] = []
    onset = _START
    left: list[str] = []
    length = duration if design == "block" else _EVENT
    while onset + length <= seconds:
        left = left or [names[i] for i in rng.permutation(len(names))]
        found.append({"onset": round(onset, 3), "duration": length, "trial_type": left.pop()})
        onset += length + (pause if design == "block" else float(rng.uniform(2, max(pause, 2))))
    return found


def responses(
    events: Sequence[Event], changes: Mapping[str, float], frames: int, tr: float
) -> Series:
    """% signal ``(frames, conditions)``: canonical double-gamma response, 1 on a long plateau."""
    from nilearn.glm.first_level import compute_regressor

    times = np.arange(frames) * tr
    columns = []
    for name, change in changes.items():
        mine = [e for e in events if e["trial_type"] == name]
        paradigm = np.array([[e["onset"], e["duration"], 1.0] for e in mine]).T
        course, _ = (
            compute_regressor(paradigm, "spm", times) if mine else (np.zeros((frames, 1)), 0)
        )
        columns.append(change * course[:, 0])
    return np.stack(columns, axis=1)

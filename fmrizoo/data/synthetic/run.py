"""One run: ``mean · gain · (1 + courses @ maps / 100) + noise``, as whole numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from fmrizoo.data.synthetic import signal
from fmrizoo.data.synthetic.anatomy import Anatomy, anatomy
from fmrizoo.data.synthetic.cohort import RUN, Person, covariance, stream
from fmrizoo.data.synthetic.config import SynthConfig
from fmrizoo.data.synthetic.signal import Event, Series
from fmrizoo.types import RunKey

MOTION_COLUMNS = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
_BLOCK = 32  # frames put together at a time
_LARGEST = 32767.0  # of int16
_PERIOD = 128.0  # seconds, the shortest of fMRIPrep's cosines
_NETWORKS, _TASK, _MOTION, _DRIFT, _BODY, _NOISE = range(6)  # parts of a run, each its own stream


@dataclass
class MadeRun:
    """One synthetic run.

    Attributes:
        bold: ``(frames, n_vox)`` whole numbers.
        events: Rows of events.tsv.
        confounds: Columns of fMRIPrep's table, ``(frames,)`` each; NaN where it has n/a.
        courses: Time courses of the networks without noise ``(frames, networks)``, % signal in the
            middle of a blob, task responses included.
    """

    bold: NDArray[np.float32]
    events: list[Event]
    confounds: dict[str, Series]
    courses: Series


@dataclass(frozen=True)
class RunId:
    """Which run of whom: subject number, session and run from 0."""

    subject: int
    session: int
    run: int


def run_ids(config: SynthConfig) -> Iterator[RunId]:
    """All runs in order."""
    for subject in range(config.subjects):
        for session in range(config.sessions):
            for run in range(config.runs):
                yield RunId(subject, session, run)


def run_key(config: SynthConfig, who: RunId) -> RunKey:
    """BIDS identity; session and run are named where there are several."""
    return RunKey(
        f"{who.subject + 1:04d}",
        f"{who.session + 1:02d}" if config.sessions > 1 else "",
        config.task_name,
        "",
        f"{who.run + 1}" if config.runs > 1 else "",
    )


def make_run(config: SynthConfig, someone: Person, who: RunId) -> MadeRun:
    """The run ``who`` of ``someone``; the same for any cohort that the person is in.

    Raises:
        DataError: the grid holds no brain (see :func:`anatomy`).
    """
    body = anatomy(config)

    def rng(part: int) -> np.random.Generator:
        return stream(config.seed, RUN, who.subject, who.session, who.run, part)

    noise = signal.field_noise(
        rng(_NOISE),
        body.mask,
        config.prepare.voxel_size,
        config.frames,
        fwhm=config.smoothness,
        temporal=config.temporal,
        lag1=config.lag1,
        exponent=config.exponent,
    )
    courses, events = _network_courses(config, someone, rng(_NETWORKS), rng(_TASK))
    motion = signal.head_motion(rng(_MOTION), config.frames, someone.motion)
    parts = [(courses, body.networks), *_nuisances(config, body, motion, rng)]
    bold = _add_up(config, someone, body, parts, noise)
    return MadeRun(bold, events, _confounds(config, body, bold, motion), courses)


def _network_courses(
    config: SynthConfig, someone: Person, rng: np.random.Generator, task: np.random.Generator
) -> tuple[Series, list[Event]]:
    """% signal of the networks ``(frames, networks)``, and the stimuli."""
    fresh = signal.band_limited(
        rng, config.frames, config.networks, config.tr, config.low, config.high
    )
    mixing = np.linalg.cholesky(covariance(config, someone.couplings))
    courses = fresh @ mixing.T * np.array(someone.amplitudes) * config.network_amplitude
    if not config.conditions:
        return courses, []
    events = signal.stimuli(
        task,
        list(config.conditions),
        config.frames * config.tr,
        design=config.design,
        duration=config.duration,
        pause=config.pause,
    )
    changes = signal.responses(events, config.conditions, config.frames, config.tr)
    for name, column in zip(config.conditions, changes.T, strict=True):
        courses[:, config.condition_networks()[name]] += column
    return courses, events


def _nuisances(
    config: SynthConfig, body: Anatomy, motion: Series, rng: Callable[[int], np.random.Generator]
) -> list[tuple[Series, Series]]:
    """Courses ``(frames, k)`` and maps ``(k, n_vox)`` in % signal of all that is no brain."""
    parts = []
    if config.motion > 0 and config.motion_left > 0:
        maps = signal.motion_maps(body.slope, body.mean, body.points)
        parts.append((motion * config.motion_left, maps))
    if config.motion > 0 and config.spin > 0:
        lost = np.nan_to_num(signal.displacement(motion))[:, None]
        parts.append((-config.spin * lost, np.ones((1, len(body.mean)))))
    if config.drift > 0:
        parts.append(signal.drift(rng(_DRIFT), config.frames, config.drift, body.points))
    if config.physiology > 0:
        parts.append(
            signal.physiology(rng(_BODY), config.frames, config.tr, config.physiology, body.tissues)
        )
    return parts


def _add_up(
    config: SynthConfig,
    someone: Person,
    body: Anatomy,
    parts: Sequence[tuple[Series, Any]],
    noise: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The run, in the array of its noise: blocks of frames keep the memory small."""
    courses = np.concatenate([c for c, _ in parts], axis=1).astype(np.float32) / 100
    maps = np.concatenate([m for _, m in parts]).astype(np.float32)
    mean = body.mean * np.float32(someone.gain)
    # Of thermal and of signal-bound noise the mean: brighter voxels have a higher tSNR.
    sd = (
        someone.gain
        * someone.noise
        * config.level
        / config.tsnr
        * np.sqrt(body.mean / config.level)
    )
    sd = sd.astype(np.float32)
    with threadpool_limits(1):  # sums in one order, whatever else the machine does
        for start in range(0, len(noise), _BLOCK):
            part = noise[start : start + _BLOCK]
            part *= sd
            change = courses[start : start + _BLOCK] @ maps
            change += 1
            change *= mean
            part += change
            np.rint(part, out=part)
            np.clip(part, 0, _LARGEST, out=part)
    return noise


def _confounds(
    config: SynthConfig, body: Anatomy, bold: NDArray[np.float32], motion: Series
) -> dict[str, Series]:
    """fMRIPrep's columns, all that nilearn's strategies ``simple`` and ``scrubbing`` ask for."""
    white, fluid = (body.tissues[k] >= body.tissues[k].max() * 0.9 for k in (1, 2))
    found = {
        "global_signal": bold.mean(1, dtype=np.float64),
        "csf": bold[:, fluid].mean(1, dtype=np.float64),
        "white_matter": bold[:, white].mean(1, dtype=np.float64),
        "framewise_displacement": signal.displacement(motion),
        "std_dvars": _std_dvars(bold),
    }
    for k, name in enumerate(MOTION_COLUMNS):
        column = motion[:, k]
        change = np.concatenate([[np.nan], np.diff(column)])
        found |= {name: column, f"{name}_derivative1": change}
        found |= {f"{name}_power2": column**2, f"{name}_derivative1_power2": change**2}
    middle = np.pi * (2 * np.arange(config.frames) + 1) / (2 * config.frames)
    for k in range(math.floor(2 * config.frames * config.tr / _PERIOD)):
        found[f"cosine{k:02d}"] = np.cos((k + 1) * middle) * math.sqrt(2 / config.frames)
    return found


def _std_dvars(bold: NDArray[np.float32]) -> Series:
    """Change from frame to frame, as a share of its mean."""
    change = [np.nan]
    change += [float(np.sqrt(np.mean((b - a) ** 2))) for a, b in itertools.pairwise(bold)]
    found: Series = np.array(change) / max(np.nanmean(change), 1e-9)
    return found

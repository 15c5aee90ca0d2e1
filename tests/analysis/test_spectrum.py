"""Spectral slope and DFA exponent of noise whose exponents are known, and of trained models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fmrizoo.analysis.spectrum import (
    dfa,
    slope,
    spectrum_of,
    welch,
    without_repeats,
    write_spectrum,
)
from fmrizoo.errors import DataError
from fmrizoo.types import Batch, Features, Tokens

SECONDS = 2.0


def noise(beta: float, slots: int, courses: int = 48, seed: int = 0) -> np.ndarray:
    """Gaussian courses with power 1/f^beta, cut from twice as long ones."""
    rng = np.random.default_rng(seed)
    frequency = np.fft.rfftfreq(2 * slots)
    size = np.zeros_like(frequency)
    size[1:] = frequency[1:] ** (-beta / 2)
    phases = rng.normal(size=(2, courses, len(frequency)))
    made: np.ndarray = np.fft.irfft((phases[0] + 1j * phases[1]) * size, axis=1)[:, :slots]
    return made


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_known_exponents_are_recovered(beta: float) -> None:
    courses = noise(beta, 2048)
    assert slope(*welch(courses, SECONDS), (0.01, 0.1)) == pytest.approx(-beta, abs=0.1)
    assert dfa(courses) == pytest.approx((beta + 1) / 2, abs=0.07)


def test_brownian_motion_in_time() -> None:
    walk = np.cumsum(np.random.default_rng(1).normal(size=(48, 2048)), 1)
    assert slope(*welch(walk, SECONDS), (0.01, 0.1)) == pytest.approx(-2, abs=0.15)
    assert dfa(walk) == pytest.approx(1.5, abs=0.07)


def test_level_scale_and_constant_courses_do_not_matter() -> None:
    x = noise(1.0, 256)
    scaled = np.concatenate([x * 1e3 + 1e4, np.full((5, 256), 7.0)])
    for of in (dfa, lambda c: slope(*welch(c, SECONDS), (0.02, 0.2))):
        assert of(scaled) == pytest.approx(of(x), abs=1e-6)
    for of in (dfa, lambda c: welch(c, SECONDS)):
        with pytest.raises(DataError, match="nothing changes over time"):
            of(np.full((3, 64), 1 / 3))
        with pytest.raises(DataError, match="31 time slots are too short"):
            of(x[:, :31])
    with pytest.raises(DataError, match="1 frequencies lie between"):
        slope(*welch(x, SECONDS), (0.01, 0.012))


def test_what_repeats_is_taken_away_and_counted() -> None:
    rng = np.random.default_rng(2)
    pattern = np.tile(rng.normal(size=(6, 10)), 20)
    rest, share = without_repeats(pattern, 10)
    assert share == pytest.approx(1) and np.abs(rest).max() < 1e-12
    white = rng.normal(size=(200, 200))
    rest, share = without_repeats(white + 3 * np.tile(rng.normal(size=(200, 10)), 20), 10)
    assert 0.85 < share < 0.95  # 9 / (9 + 1)
    _, chance = without_repeats(white, 10)
    assert chance == pytest.approx(1 / 20, abs=0.01)
    same, none = without_repeats(white, 101)
    assert none == 0 and same is white


class Shaped:
    """Embeds a clip as its own voxels, plus something that depends on the place in the clip."""

    patch_size = reduction = (1, 1, 1, 1)

    def __init__(self, place: float) -> None:
        self.place = place

    def eval(self) -> None: ...

    def read(self, batch: Batch) -> Tokens:
        grid = batch.grid
        cells = torch.cartesian_prod(*(torch.arange(n) for n in grid))
        bold = batch.bold + self.place * torch.cos(torch.arange(grid.t) * 2.0)
        brain = torch.ones(len(batch), grid.size)
        return Tokens(bold.flatten(1)[..., None], cells[None], brain > 0, grid, brain)

    def encode(self, tokens: Tokens) -> Features:
        return Features(tokens.values, tokens.index, tokens.valid, tokens.grid, tokens.brain)


def batches(x: np.ndarray, frames: int) -> list[Batch]:
    """One run of 8 voxels, in clips."""
    bold = torch.from_numpy(x).float().view(1, 1, 2, 2, 2, -1)
    mask = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    parts = torch.split(bold, frames, -1)
    return [
        Batch(part, mask, torch.tensor([SECONDS]), ["1"], ["r"], torch.tensor([k * frames]))
        for k, part in enumerate(parts)
    ]


def test_clips_of_a_run_are_joined(tmp_path: Path) -> None:
    x = noise(1.0, 320, courses=8)
    whole = spectrum_of(Shaped(0), batches(x, 320), name="shaped")  # type: ignore[arg-type]
    assert (whole.runs, whole.slots, whole.clip_slots) == (1, 320, 320)
    assert whole.embedding_slope == whole.data_slope and whole.slope_difference.mean == 0
    assert whole.embedding_repeats == 0
    parts = spectrum_of(Shaped(0), batches(x, 20), name="shaped")  # type: ignore[arg-type]
    np.testing.assert_allclose(parts.joined_power, whole.embedding_power, rtol=1e-5)
    spoiled = spectrum_of(Shaped(3), batches(x, 20), name="shaped")  # type: ignore[arg-type]
    assert spoiled.embedding_repeats > 0.5 > spoiled.data_repeats
    assert spoiled.embedding_slope.mean == pytest.approx(parts.embedding_slope.mean, abs=1e-3)
    assert spoiled.embedding_hurst.mean == pytest.approx(parts.embedding_hurst.mean, abs=1e-3)
    assert abs(parts.white_slope) < 0.3 and parts.white_hurst == pytest.approx(0.5, abs=0.1)
    write_spectrum(tmp_path, spoiled)
    body = json.loads((tmp_path / "spectrum.json").read_text())
    assert body["schema"] == "fmrizoo.spectrum/1" and body["clip_slots"] == 20
    with pytest.raises(DataError, match="no clip"):
        spectrum_of(Shaped(0), [], name="shaped")  # type: ignore[arg-type]

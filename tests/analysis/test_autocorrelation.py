"""Autocorrelation against its definition, and the window artefact against signals that have it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange, reduce
from torch import Tensor

import fmrizoo
from fmrizoo.analysis import autocorrelation as module
from fmrizoo.analysis.autocorrelation import (
    Artefact,
    artefact,
    autocorrelation,
    comb,
    data_courses,
    feature_courses,
    longest_lag,
    measure,
    temporal_window,
)
from fmrizoo.errors import DataError
from fmrizoo.types import Backbone, Batch, Features, Grid, Tokens, Voxels

PATCH = (2, 2, 2, 1)


def ar1(courses: int, frames: int, rho: float, seed: int) -> Tensor:
    """``(courses, frames)`` AR(1), each course with a sample mean of 0 and variance of 1."""
    torch.manual_seed(seed)
    noise = torch.randn(courses, frames, dtype=torch.float64)
    out = noise.clone()
    for t in range(1, frames):
        out[:, t] = rho * out[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    out -= out.mean(1, keepdim=True)
    return out / out.square().mean(1, keepdim=True).sqrt()


# --- curves ---------------------------------------------------------------------------------------


def test_it_is_the_biased_autocorrelation_at_every_lag() -> None:
    courses = ar1(7, 31, 0.6, seed=0) + 5.0
    expected = []
    for x in courses.numpy():
        x = x - x.mean()
        products = [(x[: len(x) - k] * x[k:]).sum() / len(x) for k in range(16)]
        expected.append(np.array(products) / products[0])
    np.testing.assert_allclose(autocorrelation(courses, 15), np.mean(expected, 0), atol=1e-12)


def test_many_courses_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    courses = ar1(50, 20, 0.5, seed=1)
    whole = autocorrelation(courses, 10)
    monkeypatch.setattr(module, "COURSES", 7)
    np.testing.assert_allclose(autocorrelation(courses, 10), whole, atol=1e-14)


def test_courses_that_do_not_change_are_left_out() -> None:
    courses = ar1(4, 20, 0.5, seed=2)
    still = torch.full((3, 20), 0.1, dtype=torch.float64)
    both = autocorrelation(torch.cat([courses, still]), 10)
    np.testing.assert_allclose(both, autocorrelation(courses, 10), atol=1e-14)
    with pytest.raises(DataError, match="nothing changes over time"):
        autocorrelation(still.float() + 1e-3, 10)


def test_the_comb_by_hand() -> None:
    curve = np.array([1.0, 0.0, 0.0, 0.6, 0.0, 0.2, 0.5, 0.4, 0.0])
    assert comb(curve, 3) == pytest.approx(((0.6 - 0.0) + (0.5 - 0.3)) / 2)
    assert comb(np.linspace(1, 0, 12), 4) == pytest.approx(0.0, abs=1e-15)
    assert comb(curve[:4], 3) is None, "lag 4 is needed beside lag 3"
    assert comb(curve, 1) is None, "every lag is a multiple of 1"
    assert artefact(curve, curve, 3) == 0.0
    assert artefact(curve, curve[:4], 3) is None


@pytest.mark.parametrize("period", [4, 10])
def test_no_artefact_in_an_ar1_signal(period: int) -> None:
    data, other = (autocorrelation(ar1(4000, 60, 0.7, seed), 30) for seed in (3, 4))
    found = artefact(other, data, period)
    assert found is not None and abs(found) < 0.002  # 20 times the standard error


@pytest.mark.parametrize(("period", "share"), [(4, 0.2), (10, 0.5), (6, 0.05)])
def test_a_component_with_the_window_period_gives_its_known_value(
    period: int, share: float
) -> None:
    frames = 60
    data = ar1(4000, frames, 0.7, seed=5)
    time = torch.arange(frames, dtype=torch.float64)
    phase = 2 * math.pi * torch.rand(4000, 1, dtype=torch.float64)
    wave = math.sqrt(2) * torch.cos(2 * math.pi * time / period + phase)
    mixed = math.sqrt(1 - share) * ar1(4000, frames, 0.7, seed=6) + math.sqrt(share) * wave
    curve = autocorrelation(data, frames // 2)
    found = artefact(autocorrelation(mixed, frames // 2), curve, period)
    kept = [1 - k / frames for k in range(period, frames // 2, period)]
    added = share * (1 - math.cos(2 * math.pi / period)) * float(np.mean(kept))
    assert found == pytest.approx(added - share * (comb(curve, period) or 0.0), abs=0.005)


@pytest.mark.parametrize("period", [4, 5, 10])
def test_smoothness_alone_moves_it_by_less_than_is_said(period: int) -> None:
    bends = [comb(rho ** np.arange(41), period) or 0.0 for rho in np.linspace(0, 0.999, 200)]
    assert max(map(abs, bends)) < 0.02


# --- courses of clips -----------------------------------------------------------------------------


def clips(
    count: int, frames: int, rho: float = 0.8, side: int = 8, seed: int = 0
) -> Iterator[Batch]:
    """One clip a batch, each of its own run: an AR(1) course in every 2×2×2 patch of a brain."""
    mask = torch.zeros(1, side, side, side, dtype=torch.bool)
    mask[:, 1:-1, 1:, :-2] = True
    for i in range(count):
        cells = ar1((side // 2) ** 3, frames, rho, seed + i).float()
        bold = cells.view(side // 2, side // 2, side // 2, frames)
        for axis in range(3):
            bold = bold.repeat_interleave(2, axis)
        voxels = Voxels.of(bold[None, None], mask, torch.tensor([-3.0]))
        yield Batch.compact(
            voxels, mask, torch.tensor([2.5]), ["01"], [f"run-{i}"], torch.tensor([0])
        )


def test_data_courses_are_means_of_brain_voxels_in_patches_and_slots() -> None:
    torch.manual_seed(0)
    bold = torch.randn(2, 1, 7, 5, 4, 6)
    mask = torch.rand(2, 7, 5, 4) > 0.4
    mask[1, :2, :2, :2] = False  # a patch without brain
    courses = data_courses(Voxels.of(bold, mask, torch.zeros(2)), (2, 2, 2), 3)
    for sample in range(2):
        padded = np.full((8, 6, 4, 6), np.nan)
        padded[:7, :5] = np.where(mask[sample][..., None], bold[sample, 0], np.nan)
        blocks = rearrange(
            padded,
            "(x i) (y j) (z k) (t s) -> (x y z) t (i j k) s", i=2, j=2, k=2, s=3,
        )  # fmt: skip
        kept = blocks[~np.isnan(blocks).all((1, 2, 3))]
        expected = np.nanmean(kept, (2, 3))
        assert courses[sample].shape == expected.shape
        np.testing.assert_allclose(courses[sample], expected, atol=1e-6)


def test_feature_courses_leave_out_places_without_brain() -> None:
    grid = Grid(2, 2, 1, 5)
    index = torch.cartesian_prod(*(torch.arange(s) for s in grid)).unsqueeze(0)
    values = torch.randn(2, 20, 3)
    brain = torch.zeros(2, 4, 5)
    brain[0, 1], brain[1, :3] = 0.3, 1.0
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :5] = False  # its first place is padding
    features = Features(values, index.expand(2, -1, -1), valid, grid, brain.flatten(1))
    first, second = feature_courses(features)
    by_place = values.view(2, 4, 5, 3)
    torch.testing.assert_close(first, by_place[0, 1].t())
    expected = by_place[1, 1:3].permute(2, 0, 1).flatten(0, 1)
    torch.testing.assert_close(second, expected)


# --- models ---------------------------------------------------------------------------------------


class Means(Backbone):
    """Features: the patch means, and a fixed pattern over time slots on top."""

    embed_dim = num_features = 1
    patch_size = reduction = PATCH
    clip_grid = Grid(8, 8, 8, 40)

    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        self.pattern = pattern

    def tokenize(self, bold: Tensor, mask: Tensor | None = None, **_: Any) -> Tokens:
        assert mask is not None and not self.training
        inside = mask[:, None, ..., None].expand_as(bold)
        way = "b 1 (x i) (y j) (z k) t -> b (x y z t) 1"
        sums = reduce(bold * inside, way, "sum", i=2, j=2, k=2)
        sizes = reduce(inside.float(), way, "sum", i=2, j=2, k=2)
        grid = Grid(*(s // 2 for s in bold.shape[2:5]), bold.shape[5])
        index = torch.cartesian_prod(*(torch.arange(s) for s in grid)).unsqueeze(0)
        valid = torch.ones(sums.shape[:2], dtype=torch.bool)
        return Tokens(sums / sizes.clamp(min=1), index, valid, grid, sizes[..., 0] / 8)

    def encode(self, tokens: Tokens, *, causal: bool = False) -> Features:
        values = tokens.values + self.pattern[tokens.index[..., 3]].unsqueeze(-1)
        return Features(values, tokens.index, tokens.valid, tokens.grid, tokens.brain)


def test_embeddings_that_are_the_data_have_no_artefact() -> None:
    backbone = Means(torch.zeros(40)).train()
    found = measure(backbone, clips(3, 40), name="means", window=4)
    assert found.embeddings == pytest.approx(found.data, abs=1e-5)
    assert len(found.data) == 20 and found.slots == 40 and found.slot_seconds == 2.5
    (only,) = found.artefacts
    assert only.period == 4 and abs(only.value) < 1e-5
    assert found.clips == found.runs == 3 and found.drawn == "clip"


def test_a_pattern_that_repeats_every_window_is_found_and_named() -> None:
    backbone = Means(0.5 * (torch.arange(40) % 4 == 0).float())
    found = measure(backbone, clips(6, 40), name="means", window=4)
    (only,) = found.artefacts
    assert only.low is not None and only.high is not None
    assert 0 < only.low <= only.value <= only.high
    # Within a clip the pattern's variance is 0.5² · ¼ · ¾ beside 1 of the data.
    expected = 0.047 / 1.047 * (1 + 1 / 3) * np.mean([1 - k / 40 for k in range(4, 20, 4)])
    assert only.value == pytest.approx(expected, abs=0.006)
    assert only.kind == "peaks" and found.drawn == "run"
    assert found.says.startswith("peaks at multiples of the window, 4 slots = 10 s: +0.0")
    other = measure(Means(torch.zeros(40)), clips(6, 40), name="means", window=4)
    assert other.artefacts[0].kind in ("no peaks", "dips")


def test_a_backbone_without_window_is_looked_at_where_others_have_theirs() -> None:
    backbone = Means(0.5 * (torch.arange(40) % 10 == 0).float())
    found = measure(backbone, clips(6, 40), name="means", window=None)
    four, ten = found.artefacts
    assert (four.period, ten.period) == (4, 10)
    assert ten.kind == "peaks" and four.value < ten.value
    assert "no temporal window" in found.says and "period 10: peaks" in found.says


def test_an_untrained_swin_makes_no_peaks_on_smooth_data() -> None:
    """What shows later was learned: the architecture alone does not make it."""
    torch.manual_seed(0)
    backbone = fmrizoo.create_backbone(
        "swin4d", img_size=[8, 8, 8, 40], patch_size=list(PATCH), embed_dim=12, depths=[2, 2],
        num_heads=[2, 4],
    )  # fmt: skip
    found = measure(backbone, clips(6, 40, rho=0.95), name="swin4d", window=4)
    assert found.artefacts[0].value < 0.01
    assert found.embeddings[0] > 0.3


def test_short_clips_say_what_they_cannot_show() -> None:
    found = measure(Means(torch.zeros(40)), clips(2, 5), name="means", window=4)
    assert found.artefacts == () and "too short to see a window of 4" in found.says
    with pytest.raises(DataError, match="clips of 3 time slots are too short"):
        measure(Means(torch.zeros(40)), clips(2, 3), name="means", window=4)
    with pytest.raises(DataError, match="no clip"):
        measure(Means(torch.zeros(40)), [], name="means", window=4)


def test_one_clip_has_no_interval() -> None:
    found = measure(Means(torch.zeros(40)), clips(1, 40), name="means", window=4)
    (only,) = found.artefacts
    assert only.low is None and only.high is None and found.drawn == ""
    assert "(one clip)" in str(only)


def test_equal_clips_leave_no_doubt() -> None:
    same = [next(clips(1, 40)) for _ in range(4)]
    pattern = (torch.arange(40) % 4 == 0).float()
    (only,) = measure(Means(pattern), same, name="means", window=4).artefacts
    assert only.low == pytest.approx(only.value) and only.high == pytest.approx(only.value)


def test_mixed_repetition_times_are_refused() -> None:
    first, second = clips(2, 40)
    second.tr = torch.tensor([2.0])
    with pytest.raises(DataError, match=r"different times between slots: \[2.0, 2.5\] s"):
        measure(Means(torch.zeros(40)), [first, second], name="means", window=4)


@pytest.mark.parametrize(
    ("low", "high", "kind"), [(0.01, 0.03, "peaks"), (-0.01, 0.03, "no peaks"), (-2, -1, "dips")]
)
def test_what_an_interval_means(low: float, high: float, kind: str) -> None:
    assert Artefact(4, (low + high) / 2, low, high).kind == kind


def test_windows_are_read_from_configs() -> None:
    assert temporal_window(SimpleNamespace(window_size=[4, 4, 4, 6])) == 6
    assert temporal_window(SimpleNamespace(window_size=[4, 4, 4], temporal_window=10)) == 10
    assert temporal_window(SimpleNamespace(d_state=32)) is None


def test_lags_reach_half_a_clip_or_just_past_one_window() -> None:
    assert longest_lag(40, (4,)) == 20
    assert longest_lag(8, (4,)) == 5
    assert longest_lag(6, (4,)) == 3, "lag 5 of 6 slots rests on a single product"
    assert longest_lag(10, (4, 10)) == 5

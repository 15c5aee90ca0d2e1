"""Augmentations: nothing at strength 0, what they say otherwise, the same for a sample anywhere."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from fmrizoo.config import AffineConfig, AugmentConfig, DataConfig
from fmrizoo.data import augment
from fmrizoo.data.augment import Augmentation
from fmrizoo.data.clips import ClipTable
from fmrizoo.data.loader import Loader
from fmrizoo.data.store import Store
from fmrizoo.errors import DataError, RecipeError
from fmrizoo.types import Batch, Voxels
from fmrizoo.zoo import load_recipe

SIZE = (2.0, 2.5, 3.0)
ALL = AugmentConfig(AffineConfig(10.0, 2.0, 0.1), 0.5, 0.1, 0.2)


def ball(box: tuple[int, int, int], radius: float) -> Tensor:
    """A round brain in the middle of the box."""
    cells = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in box), indexing="ij")
    return sum(c.square() for c in cells) <= radius**2  # type: ignore[return-value]


def clips(b: int = 3, t: int = 8, box: tuple[int, int, int] = (12, 11, 10)) -> Batch:
    """Smooth random clips with different brains and backgrounds."""
    rng = np.random.default_rng(0)
    raw = rng.standard_normal((b, 1, *box, t))
    bold = torch.from_numpy(ndimage.gaussian_filter(raw, (0, 0, 2, 2, 2, 0))).float() * 10
    mask = torch.stack([ball(box, 3.5 + 0.3 * k) for k in range(b)])
    background = -3.0 - torch.arange(b)
    voxels = Voxels.of(bold, mask, background.float())
    one = torch.ones(b)
    names = [f"r{k}" for k in range(b)]
    return Batch.compact(voxels, mask, one, names, names, torch.zeros(b))


def seeds(b: int = 3) -> list[int]:
    return [1000 + 17 * k for k in range(b)]


def parts(batch: Batch) -> list[Tensor]:
    assert batch.voxels is not None
    return [v.double() for v in torch.split(batch.voxels.values, list(batch.voxels.counts), 1)]


def test_nothing_at_strength_0() -> None:
    batch = clips()
    assert Augmentation(AugmentConfig(), SIZE)(batch, seeds()) is batch
    assert not AugmentConfig().on_device and not AugmentConfig(time_shift=3).on_device
    assert ALL.on_device
    values, counts = batch.voxels.values, batch.voxels.counts  # type: ignore[union-attr]
    still = augment.draw_movements(AffineConfig(), seeds(), (12, 11, 10))
    assert torch.equal(still, torch.eye(3, 4, dtype=torch.float64).repeat(3, 1, 1))
    bold, mask = augment.resample(
        batch.bold,
        batch.mask,
        batch.background,
        still,
        SIZE,  # type: ignore[arg-type]
    )
    assert torch.equal(mask, batch.mask) and torch.allclose(bold, batch.bold, atol=1e-4)
    bands = augment.draw_bands(8, seeds())
    assert torch.allclose(augment.weaken_band(values, counts, bands, 0.0), values, atol=1e-5)
    assert torch.allclose(
        augment.stretch(values, counts, *augment.draw_intensity(0.0, seeds())), values, atol=1e-5
    )
    assert torch.equal(augment.add_noise(values, counts, 0.0, seeds()), values)


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(affine=AffineConfig(20.0, 3.0, 0.2)),
        AugmentConfig(frequency=0.7),
        AugmentConfig(intensity=0.3),
        AugmentConfig(noise=0.5),
        ALL,
    ],
)
def test_a_sample_does_not_know_its_neighbours(config: AugmentConfig) -> None:
    batch, change = clips(), Augmentation(config, SIZE)
    together, again = change(batch, seeds()), change(batch, seeds())
    assert torch.equal(together.bold, again.bold)
    assert not torch.allclose(together.bold, batch.bold, atol=1e-3)
    order = [2, 0]
    picked = Batch.compact(
        Voxels.of(batch.bold[order], batch.mask[order], batch.background[order]),  # type: ignore[index]
        batch.mask[order],
        batch.tr[order],
        ["a", "b"],
        ["a", "b"],
        batch.start[order],
    )
    some = change(picked, [seeds()[k] for k in order])
    assert torch.equal(some.mask, together.mask[order])
    assert torch.allclose(some.bold, together.bold[order], atol=2e-6)
    other = change(batch, [s + 1 for s in seeds()])
    assert not torch.allclose(other.bold, together.bold, atol=1e-3)


@pytest.mark.parametrize("config", [ALL, AugmentConfig(noise=1.0), AugmentConfig(intensity=0.5)])
def test_background_stays(config: AugmentConfig) -> None:
    batch = clips()
    changed = Augmentation(config, SIZE)(batch, seeds())
    assert changed.voxels is not None
    assert torch.equal(changed.background, batch.background)  # type: ignore[arg-type]
    for bold, mask, outside in zip(changed.bold, changed.mask, batch.background, strict=True):  # type: ignore[arg-type]
        assert (bold[0][~mask] == outside).all()
        assert mask.any() and (bold[0][mask] != outside).all()
    assert changed.bold.shape == batch.bold.shape and changed.bold.isfinite().all()


# -- movement ---------------------------------------------------------------------------------


def matrices(*, rotate: float = 0, translate: float = 0, scale: float = 0) -> Tensor:
    config = AffineConfig(rotate, translate, scale)
    return augment.draw_movements(config, seeds(), (12, 11, 10))


def test_movements_are_drawn_as_said() -> None:
    many = list(range(4000))
    turns = augment.draw_movements(AffineConfig(rotate=15), many, (9, 9, 9))[:, :, :3]
    eye = torch.eye(3, dtype=turns.dtype).expand_as(turns)
    assert torch.allclose(turns @ turns.mT, eye, atol=1e-12)
    assert torch.allclose(torch.linalg.det(turns), torch.ones(4000, dtype=turns.dtype))
    moves = augment.draw_movements(AffineConfig(translate=4), many, (9, 9, 9))[:, :, 3]
    assert moves.abs().max() < 4 and (moves.amax(0) > 3.9).all()
    assert (moves.mean(0).abs() < 0.15).all()
    scales = augment.draw_movements(AffineConfig(scale=0.2), many, (9, 9, 9))[:, :, :3]
    sides = scales.diagonal(dim1=1, dim2=2)
    assert 0.8 < sides.min() < 0.81 and 1.19 < sides.max() < 1.2
    thin = augment.draw_movements(AffineConfig(20, 5, 0.3), many, (9, 9, 1))
    assert (thin[:, 2, :] == torch.tensor([0, 0, 1, 0])).all()
    assert (thin[:, :, 2] == torch.tensor([0, 0, 1])).all()
    assert (thin[:, 0, 1].abs() > 0).all()


@pytest.mark.parametrize("kind", ["rotate", "translate", "scale"])
def test_resampling_is_scipys(kind: str) -> None:
    """Against ndimage's linear interpolation, where only brain is involved."""
    batch = clips(t=2)
    matrix = matrices(**{kind: {"rotate": 25.0, "translate": 5.0, "scale": 0.3}[kind]})
    bold, mask = augment.resample(
        batch.bold,
        batch.mask,
        batch.background,
        matrix,
        SIZE,  # type: ignore[arg-type]
    )
    size = np.diag(SIZE)
    middle = (np.array(batch.grid[:3]) - 1) / 2
    compared = 0
    for k in range(3):
        back = np.linalg.inv(matrix[k, :, :3].numpy())
        linear = np.linalg.inv(size) @ back @ size
        offset = middle - linear @ middle - np.linalg.inv(size) @ back @ matrix[k, :, 3].numpy()

        def by_scipy(
            volume: np.ndarray, linear: np.ndarray = linear, offset: np.ndarray = offset
        ) -> np.ndarray:
            return ndimage.affine_transform(volume, linear, offset, order=1, mode="constant")

        weight = by_scipy(batch.mask[k].numpy().astype(float))
        sure = np.abs(weight - 0.5) > 1e-3
        assert np.array_equal(mask[k].numpy()[sure], (weight >= 0.5)[sure])
        inner = weight > 1 - 1e-9
        for t in range(2):
            wanted = by_scipy(batch.bold[k, 0, ..., t].double().numpy())
            assert np.abs(bold[k, 0, ..., t].numpy() - wanted)[inner].max() < 1e-4
        compared += int(inner.sum())
    assert compared > 150


def test_whole_voxels_move_exactly_and_there_and_back_is_identity() -> None:
    batch = clips()
    step = torch.eye(3, 4, dtype=torch.float64).repeat(3, 1, 1)
    step[:, 0, 3], step[:, 2, 3] = 2.0, -3.0  # one voxel along x, one back along z
    args = (batch.background, step, SIZE)
    bold, mask = augment.resample(batch.bold, batch.mask, *args)  # type: ignore[arg-type]
    assert torch.equal(mask, batch.mask.roll((1, -1), (1, 3)))
    assert torch.allclose(bold, batch.bold.roll((1, -1), (2, 4)), atol=1e-4)
    there = matrices(rotate=30, translate=1.5, scale=0.1)
    back = torch.linalg.inv(there[:, :, :3])
    again = torch.cat([back, -back @ there[:, :, 3:]], 2)
    smooth = batch.bold.clone()
    cells = torch.meshgrid(*(torch.arange(n).float() for n in batch.grid[:3]), indexing="ij")
    smooth[:, 0] = (cells[0] - 0.5 * cells[1] + 2 * cells[2])[..., None]  # linear: kept exactly
    first = augment.resample(smooth, batch.mask, batch.background, there, SIZE)  # type: ignore[arg-type]
    second, inside = augment.resample(*first, batch.background, again, SIZE)  # type: ignore[arg-type]
    deep = torch.stack([ball((12, 11, 10), 1.5)] * 3)
    assert (inside & deep).sum() == deep.sum()
    assert (second - smooth)[:, 0][deep].abs().max() < 1e-3


def test_a_brain_that_leaves_is_refused() -> None:
    batch = clips()
    with pytest.raises(DataError, match=r"whole brain of run r\d out of its box: lower"):
        for s in range(40):
            far = Augmentation(AugmentConfig(affine=AffineConfig(translate=900)), SIZE)
            far(batch, [s, s + 1, s + 2])


# -- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [2, 7, 8, 20])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_band_loses_its_share(t: int, strength: float) -> None:
    batch = clips(t=t)
    bands = augment.draw_bands(t, seeds())
    width = max(1, round(0.25 * (t // 2)))
    assert (bands.sum(0) == width).all() and not bands[0].any()  # the mean stays
    changed = Augmentation(AugmentConfig(frequency=strength), SIZE)(batch, seeds())
    for k, (before, after) in enumerate(zip(parts(batch), parts(changed), strict=True)):
        was, now = (torch.fft.rfft(x, dim=0).abs() for x in (before, after))
        band = bands[:, k]
        assert torch.allclose(now[band], (1 - strength) * was[band], atol=1e-4)
        assert torch.allclose(now[~band], was[~band], atol=1e-4)


def test_bands_lie_anywhere() -> None:
    bands = augment.draw_bands(20, range(3000)).float().mean(1)
    assert bands[0] == 0 and (bands[1:] > 0.05).all()


def test_noise_has_the_energy_that_was_asked_for() -> None:
    batch = clips(t=40)
    changed = Augmentation(AugmentConfig(noise=0.5), SIZE)(batch, seeds())
    noises = [a - b for a, b in zip(parts(changed), parts(batch), strict=True)]
    for before, noise in zip(parts(batch), noises, strict=True):
        wanted = 0.25 * before.var(0, unbiased=False).mean() * before.numel()
        assert abs(noise.square().sum() / wanted - 1) < 5 * (2 / before.numel()) ** 0.5
        flat = noise.flatten()
        assert flat.mean().abs() < 5 * flat.std() / flat.numel() ** 0.5
        lagged = (noise[1:] * noise[:-1]).mean() / noise.square().mean()
        assert lagged.abs() < 5 / noise[1:].numel() ** 0.5  # white
    n = min(x.shape[1] for x in noises)
    one, two = noises[0][:, :n].flatten(), noises[1][:, :n].flatten()
    assert torch.corrcoef(torch.stack([one, two]))[0, 1].abs() < 5 / len(one) ** 0.5


def test_intensity_is_a_stretch_and_a_shift() -> None:
    batch = clips()
    changed = Augmentation(AugmentConfig(intensity=0.3), SIZE)(batch, seeds())
    gain, shift = augment.draw_intensity(0.3, seeds())
    for k, (before, after) in enumerate(zip(parts(batch), parts(changed), strict=True)):
        mean, spread = before.mean(), before.std(unbiased=False)
        wanted = mean + gain[k] * (before - mean) + shift[k] * spread
        assert torch.allclose(after, wanted, atol=1e-4)
    gain, shift = augment.draw_intensity(0.3, range(3000))
    for drawn, middle in ((gain, 1.0), (shift, 0.0)):
        assert (drawn - middle).abs().max() < 0.3 and (drawn - middle).abs().max() > 0.29
        assert abs(float(drawn.mean()) - middle) < 0.02


# -- in the loader ----------------------------------------------------------------------------


def loader(store: Store, change: AugmentConfig, micro: int = 4, **values: Any) -> Loader:
    config = DataConfig(clip_frames=12, select={"acquisition": "25mm"}, augment=change)
    table = ClipTable.windows(store, store.select(config.select), config)
    return Loader(table, config, micro, seed=5, **values)


def first(loaded: Loader, n: int = 1) -> list[Batch]:
    stream = loaded.batches()
    found = [batch.to_batch() for batch in itertools.islice(stream, n)]
    stream.close()
    return found


def test_training_clips_alone_are_changed(sample_store: Store) -> None:
    plain, changed = (loader(sample_store, c) for c in (AugmentConfig(), ALL))
    (a,), (b,) = first(plain), first(changed)
    assert a.run == b.run and torch.equal(a.start, b.start) and torch.equal(a.seed, b.seed)  # type: ignore[arg-type]
    assert not torch.equal(a.bold, b.bold)
    for one, two in zip(plain.epoch(), changed.epoch(), strict=True):
        assert torch.equal(one.to_batch().bold, two.to_batch().bold)


def test_ranks_and_threads_change_nothing(sample_store: Store) -> None:
    (whole,) = first(loader(sample_store, ALL, 4))
    halves = [first(loader(sample_store, ALL, 2, rank=r, world=2))[0] for r in range(2)]
    together = torch.cat([half.bold for half in halves])
    assert torch.allclose(together, whole.bold, atol=1e-5)
    assert torch.equal(torch.cat([half.mask for half in halves]), whole.mask)
    half = next(loader(sample_store, ALL).batches()).to_batch("cpu", torch.bfloat16)
    assert torch.equal(half.bold, whole.bold.to(torch.bfloat16))


def test_time_shift_reads_other_frames(sample_store: Store) -> None:
    plain, shifted = (loader(sample_store, AugmentConfig(time_shift=s)) for s in (0, 3))
    moves = []
    pairs = zip(first(plain, 30), first(shifted, 30), strict=True)
    for a, b in pairs:
        assert a.run == b.run
        for k, run in enumerate(b.run):
            start, was = int(b.start[k]), int(a.start[k])
            reader = sample_store.open(run)
            assert 0 <= start <= reader.n_frames - 12
            move = start - was
            assert abs(move) <= 3
            # 0 is the edge that a shift stops at; elsewhere all of it is taken.
            moves.append(move) if 3 <= was <= reader.n_frames - 15 else None
            wanted = reader.read_compact(start, 12)[:, : reader.n_vox]
            own = parts(b)[k].numpy()
            scaled = np.polyfit(wanted[:, 0].astype(float), own[:, 0], 1)
            assert np.allclose(np.polyval(scaled, wanted[:, 0]), own[:, 0], atol=1e-4)
    assert set(moves) == set(range(-3, 4))


def test_settings_that_make_no_sense() -> None:
    for key, value in [("noise", -1.0), ("frequency", 1.5), ("intensity", 0.95)]:
        with pytest.raises(RecipeError, match=rf"data\.augment\.{key}"):
            AugmentConfig(**{key: value})
    with pytest.raises(RecipeError, match=r"affine\.rotate must be between 0 and 180"):
        AffineConfig(rotate=200)
    with pytest.raises(RecipeError, match="random already starts anywhere"):
        DataConfig(windows="random", augment=AugmentConfig(time_shift=1))
    with pytest.raises(RecipeError, match="needs clips of several frames"):
        DataConfig(clip_frames=1, augment=AugmentConfig(noise=0.1))
    with pytest.raises(RecipeError, match="keeps the features of unchanged clips"):
        load_recipe("finetune/haxby_slice", ["train.cache_features=true", "data.augment.noise=0.1"])
    with pytest.raises(RecipeError, match="nois"):
        load_recipe("pretrain/haxby_slice", ["data.augment.nois=0.1"])
    recipe = load_recipe("pretrain/haxby_slice", ["data.augment.affine={rotate: 5}"])
    assert recipe.data.augment.affine == AffineConfig(rotate=5)

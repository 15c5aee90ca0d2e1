"""Quantisation, mask runs and rows, against direct computation."""

from __future__ import annotations

import importlib.util
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrizoo.data import codec, inflate
from fmrizoo.errors import DataError


def bold(frames: int = 80, n_vox: int = 300, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mean = rng.uniform(200, 4000, n_vox)
    return (mean + mean / 50 * rng.standard_normal((frames, n_vox))).astype(np.float32)


def decoded(encoded: codec.Encoded, n_vox: int) -> np.ndarray:
    d = codec.decode(encoded.kind, encoded.arrays, n_vox)
    return d.offset + d.scale * encoded.rows[:, :n_vox].astype(np.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_mask_runs_hold_the_mask(seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((7, 5, 3)) < share
    mask[3, 2, 1] = True
    runs = codec.mask_to_runs(mask)
    assert np.array_equal(codec.runs_to_index(runs), np.flatnonzero(mask))
    assert (runs[1:, 0] > runs[:-1].sum(1)).all()  # maximal: no two runs touch


def test_int8_error_is_half_a_step_and_below_one_percent() -> None:
    x = bold()
    encoded = codec.encode(x, "int8", 0.02)
    assert encoded.kind == "int8"
    d = codec.decode("int8", encoded.arrays, x.shape[1])
    error = decoded(encoded, x.shape[1]) - x
    # Half a quantisation step, plus float32 rounding of the offset and of the clipped peak.
    assert (np.abs(error) <= 0.57 * d.scale + 1e-3).all()
    relative = np.sqrt(np.mean((error**2).mean(0) / x.astype(np.float64).var(0)))
    assert encoded.error == pytest.approx(relative, rel=1e-3)
    assert encoded.error < 0.01


@pytest.mark.parametrize("codec_name, kind", [("int8", "int8"), ("gzip", "float16")])
def test_mean_and_sd_per_voxel_survive(codec_name: str, kind: str) -> None:
    x = bold()
    encoded = codec.encode(x, codec_name, 0.05)
    d = codec.decode(encoded.kind, encoded.arrays, x.shape[1])
    assert encoded.kind == kind
    assert np.allclose(d.mean, x.mean(0, dtype=np.float64), rtol=1e-6)
    assert np.allclose(d.std, x.std(0, dtype=np.float64), rtol=2e-3)


def test_a_spike_falls_back_to_int16() -> None:
    x = bold(frames=2000)
    x[5] += 300 * x.std(0)
    encoded = codec.encode(x, "int8", 0.02)
    assert encoded.kind == "int16"
    assert np.abs(decoded(encoded, x.shape[1]) - x).max() < 0.5


def test_gzip_falls_back_to_float32_where_float16_is_coarse() -> None:
    x = 1e5 + bold()
    x[:, 0] += 1e7  # the global s.d. dwarfs the temporal one
    encoded = codec.encode(x, "gzip", 0.01)
    assert encoded.kind == "float32"


def test_an_impossible_error_bound_is_refused() -> None:
    with pytest.raises(DataError, match="max_error"):
        codec.encode(bold(), "int8", 0.0)


def test_constant_and_tiny_voxels_come_back() -> None:
    x = bold(n_vox=4)
    x[:, 1] = 123.5
    x[:, 2] = 0
    x[:, 3] = np.linspace(0, 1e-42, len(x))  # below float32's normal range
    encoded = codec.encode(x, "int8", 0.02)
    got = decoded(encoded, 4)
    assert (got[:, 1] == 123.5).all() and (got[:, 2] == 0).all()
    assert np.allclose(got[:, 3], 0, atol=1e-37)
    assert codec.decode("int8", encoded.arrays, 4).std[1] == 0


def test_scales_beyond_float16_stay_float32() -> None:
    for factor, dtype in [(1.0, np.float16), (1e9, np.float32), (1e-9, np.float32)]:
        x = (bold() * factor).astype(np.float32)
        encoded = codec.encode(x, "int8", 0.02)
        assert encoded.arrays["scale"].dtype == dtype
        assert encoded.error < 0.01


@pytest.mark.parametrize("n_vox, itemsize", [(1, 1), (64, 1), (129, 2), (70000, 1), (235375, 1)])
def test_rows_are_padded_little_and_to_pages_when_long(n_vox: int, itemsize: int) -> None:
    size = codec.row_width(n_vox, itemsize) * itemsize
    assert size >= n_vox * itemsize and size % 64 == 0
    if n_vox * itemsize >= 65536:
        assert size % codec.PAGE == 0
        assert size <= 1.07 * n_vox * itemsize


@given(st.binary(max_size=2000), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_crc_is_the_standard_one(data: bytes, seed: int) -> None:
    row = np.frombuffer(data, np.uint8)
    assert codec.frame_crc(row, seed) == zlib.crc32(data, seed)


def test_a_zeroed_or_swapped_frame_has_another_crc() -> None:
    zeros = np.zeros(500, np.uint8)
    seeds = [codec.frame_seed("u", "r", t) for t in range(50)]
    assert len({codec.frame_crc(zeros, s) for s in seeds}) == 50


@pytest.mark.parametrize("missing", [(), ("deflate",), ("deflate", "isal", "isal.isal_zlib")])
def test_inflate_is_the_same_with_every_library(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("inflate_again", inflate.__file__)
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "inflate_again", again)
    spec.loader.exec_module(again)
    plain = np.random.default_rng(0).integers(0, 9, 5000, np.uint8).tobytes()
    packed = zlib.compress(plain, 1)
    assert bytes(again.inflate(memoryview(packed), len(plain))) == plain
    broken = bytearray(packed)
    broken[len(packed) // 2] ^= 4
    for bad, size in (
        (packed[:-7], len(plain)),
        (bytes(broken), len(plain)),
        (packed, len(plain) - 1),
        (packed, len(plain) + 1),
        (b"", len(plain)),
    ):
        with pytest.raises(ValueError):
            again.inflate(bad, size)

"""Made-up measurements: autocorrelations with a known artefact, memory with known slopes."""

from __future__ import annotations

import numpy as np

from fmrizoo.analysis.autocorrelation import Artefact, Autocorrelation
from fmrizoo.analysis.memory import MemoryRow


def dynamics(
    backbone: str = "swin4d", window: int | None = 4, share: float = 0.1, slots: int = 40
) -> Autocorrelation:
    """Smooth data, and embeddings that stick out by about ``share`` at multiples of the window."""
    lags = np.arange(1, slots // 2 + 1)
    sticks = share * (lags % window == 0) if window else 0.0
    periods = (window,) if window else (4, 10)
    return Autocorrelation(
        backbone=backbone,
        window=window,
        slots=slots,
        slot_seconds=2.5,
        data=tuple((0.8**lags).tolist()),
        embeddings=tuple((0.9**lags + sticks).tolist()),
        artefacts=tuple(Artefact(p, share, share - 0.02, share + 0.02) for p in periods),
        clips=32,
        runs=6,
        drawn="run",
    )


def memory_rows(frames: tuple[int, ...] = (20, 40, 80)) -> list[MemoryRow]:
    """Two backbones, two ways of checkpointing: lines of known slope."""
    slopes = {("swin4d", "none"): 31.0, ("swin4d", "window-chunk"): 6.0}
    slopes |= {("neuromamba", "none"): 12.5, ("neuromamba", "window-chunk"): 4.5}
    return [
        MemoryRow(
            recipe=f"pretrain/{backbone}_simmim",
            backbone=backbone,
            objective="simmim",
            parameters=50_000_000,
            checkpointing=mode,
            frames=n,
            voxels=(96, 96, 96),
            precision="bf16",
            device="cpu",
            mb=17.0 + rate * n,
        )
        for (backbone, mode), rate in slopes.items()
        for n in frames
    ]

"""Plain functions with the interfaces of the CUDA kernels, which need a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrizoo.backbones.ssd import ssd


def convolve(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Any, activation: str) -> Tensor:
    """The interface of causal-conv1d, with what its kernel asks of strides."""
    assert x.stride(1) == 1 and x.stride(2) % 8 == 0 and activation == "silu"
    parts = []
    for piece in sequences(x, seq_idx, 2):
        padded = F.pad(piece, (weight.shape[1] - 1, 0))
        parts.append(F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight)))
    return F.silu(torch.cat(parts, 2))


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **o: Any) -> Tensor:
    """The interface of mamba-ssm's scan, with a state that is reset where ``seq_idx`` changes."""
    assert o["dt_softplus"] and o["chunk_size"] & (o["chunk_size"] - 1) == 0
    dt = F.softplus(dt + o["dt_bias"])
    rows = [sequences(t, o["seq_idx"], 1) for t in (x, dt, B, C)]
    parts = [ssd(a, b, A, c, d, backend="ref")[0] for a, b, c, d in zip(*rows, strict=True)]
    return torch.cat(parts, 1) + o["D"][:, None] * x


def sequences(t: Tensor, seq_idx: Tensor | None, axis: int) -> list[Tensor]:
    if seq_idx is None:
        return [t]
    assert len(t) == 1 and seq_idx.dtype == torch.int32
    return list(t.split(torch.bincount(seq_idx[0]).tolist(), axis))

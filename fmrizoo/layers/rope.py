"""Rotary positions along one or several axes.

Source: Su et al. 2021, "RoFormer" (one axis). Along several axes the channels of a head are
split equally: each axis turns its own pairs, so positions of equal coordinate sums stay apart.
``q·k`` depends on the difference of two positions only, along every axis: nothing is tied to the
length or the grid that a model was trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(positions: Tensor, head_dim: int, theta: float, wide: bool = False) -> Tensor:
    """Unit complex numbers that turn each pair of channels at each position.

    Args:
        positions: ``(n, axes)`` integers.
        head_dim: Channels of a head, a multiple of ``2 · axes``.
        theta: Pair ``i`` of ``p`` (per axis) turns by ``theta ** (−i / p)`` radians per step.
        wide: In double precision.

    Returns:
        ``(n, head_dim / 2)`` complex; the pairs of the first axis come first.
    """
    axes = positions.shape[1]
    if head_dim % (2 * axes):
        raise ValueError(f"{head_dim} channels do not split into pairs over {axes} axes")
    pairs = head_dim // (2 * axes)
    speed = theta ** (-torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs)
    angle = (positions.unsqueeze(-1) * speed).flatten(1)
    turned = torch.polar(torch.ones_like(angle), angle)
    return turned if wide else turned.to(torch.complex64)


def rotate_queries_and_keys(qkv: Tensor, rotation: Tensor, heads: int) -> Tensor:
    """Turn the queries and keys of ``qkv`` in place; adjacent channels form a pair.

    Args:
        qkv: ``(rows, 3 · d)``, query, key and value, each split over the heads. Overwritten, so it
            must be a result that nothing else needs (such as the output of a Linear).
        rotation: ``(length, head_dim / 2)``; the rows are blocks of ``length``, all turned alike.
        heads: Number of heads.
    """
    turned: Tensor = _Rotate.apply(qkv, rotation, heads)
    return turned


class _Rotate(torch.autograd.Function):
    """Keeps only the rotation: the gradient is turned back."""

    @staticmethod
    def forward(ctx, qkv: Tensor, rotation: Tensor, heads: int) -> Tensor:  # type: ignore[no-untyped-def]
        _turn(qkv, rotation, heads)
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(rotation)
        ctx.heads = heads
        return qkv

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (rotation,) = ctx.saved_tensors
        back = grad.clone(memory_format=torch.contiguous_format)
        _turn(back, rotation.conj(), ctx.heads)
        return back, None, None


def _turn(qkv: Tensor, rotation: Tensor, heads: int) -> None:
    """Multiply queries and keys, read as complex numbers, in place."""
    length, pairs = rotation.shape
    both = qkv.view(-1, length, 3, heads, pairs, 2)[:, :, :2]
    factor = rotation.view(length, 1, 1, pairs)
    if both.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(both).mul_(factor)
    else:
        exact = both.float()
        torch.view_as_complex(exact).mul_(factor)
        both.copy_(exact)

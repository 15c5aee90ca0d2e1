"""Softmax attention inside windows, with what is fastest on each device.

Measured on CPUs: PyTorch's fused kernel is the fastest in fp32. In bf16 explicit products over a
few windows at a time (small enough for the cache, formed again in the backward pass instead of
kept) are faster forward, and 2–5 times faster backward. Neither keeps any attention weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE_BYTES = 1 << 23  # attention weights formed at a time by the explicit kernel
Groups = Sequence[tuple[int, int]]


def attend_windows(
    qkv: Tensor, groups: Groups, heads: int, scale: float, dropout: float = 0.0
) -> Tensor:
    """Multi-head attention within each window of tokens kept in window order.

    Args:
        qkv: ``(rows, 3 · d)``, query, key and value of each row, each split over the heads.
        groups: ``(windows, tokens in each)`` consecutive blocks of rows.
        heads: Number of heads; must divide ``d``.
        scale: Factor on ``q·k``.
        dropout: Probability on the attention weights.

    Returns:
        ``(rows, d)`` in the dtype of ``qkv``.
    """
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and not dropout:
        mixed: Tensor = _ExplicitAttention.apply(qkv, tuple(groups), heads, scale)
        return mixed
    parts = [_fused(block, scale, dropout) for block in _windows(qkv, groups, 3, heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _windows(rows: Tensor, groups: Groups, parts: int, heads: int) -> Iterator[Tensor]:
    """Views ``(windows, tokens, parts, heads, head_dim)`` of the groups of ``rows``."""
    blocks = torch.split(rows, [windows * tokens for windows, tokens in groups])
    for block, (windows, tokens) in zip(blocks, groups, strict=True):
        yield block.view(windows, tokens, parts, heads, -1)


def _fused(qkv: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """``(windows, tokens, 3, heads, head_dim)`` → ``(rows, d)`` by PyTorch's kernel."""
    width = qkv.shape[-1]
    if qkv.device.type == "cuda" and qkv.dtype != torch.float32 and width % 8:
        # The memory-efficient kernel needs head_dim % 8 == 0; zero channels change no product.
        qkv = F.pad(qkv, (0, -width % 8))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out[..., :width].transpose(1, 2).reshape(-1, qkv.shape[3] * width)


class _ExplicitAttention(torch.autograd.Function):
    """Keeps nothing but ``qkv`` for the backward pass."""

    @staticmethod
    def forward(ctx, qkv: Tensor, groups: Groups, heads: int, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        targets = _windows(out, groups, 1, heads)
        for source, target in zip(_windows(qkv, groups, 3, heads), targets, strict=True):
            _explicit(source, target, scale)
        ctx.save_for_backward(qkv)
        ctx.settings = (groups, heads, scale)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        (qkv,) = ctx.saved_tensors
        groups, heads, scale = ctx.settings
        result = torch.empty_like(qkv)
        for source, out, target in zip(
            _windows(qkv, groups, 3, heads),
            _windows(grad.contiguous(), groups, 1, heads),
            _windows(result, groups, 3, heads),
            strict=True,
        ):
            _explicit_backward(source, out, target, scale)
        return result, None, None, None


def _slices(qkv: Tensor) -> Iterator[slice]:
    """Windows whose attention weights fit the cache together."""
    windows, tokens, _, heads, _ = qkv.shape
    step = max(1, CACHE_BYTES // (heads * tokens * tokens * qkv.element_size()))
    for start in range(0, windows, step):
        yield slice(start, start + step)


def _per_head(windows: Tensor) -> Tensor:
    """``(w, n, parts, heads, d)`` → ``(parts, w · heads, n, d)``, contiguous."""
    _, tokens, parts, _, width = windows.shape
    return windows.permute(2, 0, 3, 1, 4).reshape(parts, -1, tokens, width)


def _explicit(qkv: Tensor, out: Tensor, scale: float) -> None:
    """Softmax attention of ``qkv (w, n, 3, heads, d)`` into ``out (w, n, 1, heads, d)``."""
    for part in _slices(qkv):
        q, k, v = _per_head(qkv[part])
        weights = torch.softmax(torch.bmm(q * scale, k.transpose(1, 2)), -1)
        mixed = torch.bmm(weights, v)
        target = out[part]
        target.copy_(
            mixed.view(target.shape[0], target.shape[3], -1, 1, v.shape[-1]).permute(0, 2, 3, 1, 4)
        )


def _explicit_backward(qkv: Tensor, out: Tensor, result: Tensor, scale: float) -> None:
    """Gradient of ``qkv`` into ``result``, from the gradient ``out`` of the output."""
    for part in _slices(qkv):
        q, k, v = _per_head(qkv[part])
        d_out = _per_head(out[part])[0]
        q = q * scale
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1)
        d_weights = torch.bmm(d_out, v.transpose(1, 2))
        d_logits = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, qkv.dtype)
        grads = (
            torch.bmm(d_logits, k) * scale,
            torch.bmm(d_logits.transpose(1, 2), q),
            torch.bmm(weights.transpose(1, 2), d_out),
        )
        windows, tokens, _, heads, width = qkv[part].shape
        for index, gradient in enumerate(grads):
            by_head = gradient.view(windows, heads, tokens, width)
            result[part][:, :, index].copy_(by_head.transpose(1, 2))

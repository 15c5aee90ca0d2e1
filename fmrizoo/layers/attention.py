"""Softmax attention inside windows, with the kernel that is fastest on each device.

Measured on CPUs (``benchmarks/swin4d.py``): PyTorch's fused kernel wins in fp32; in bf16 its
backward pass is 2–5 times slower than plain matrix products, so there the logits of a few windows
at a time are formed explicitly, small enough to stay in the cache, and formed again in the
backward pass. Either way no logits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CACHE_BYTES = 1 << 21  # logits formed at a time by the blocked kernel


def attend_windows(
    qkv: Tensor, groups: Sequence[tuple[int, int]], heads: int, scale: float, dropout: float = 0.0
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
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    blocks = qkv.split([windows * tokens for windows, tokens in groups])
    mixed = [
        _attend(block.view(windows, tokens, 3, heads, width // heads), scale, dropout)
        for block, (windows, tokens) in zip(blocks, groups, strict=True)
    ]
    if len(mixed) == 1:
        return mixed[0].reshape(rows, width)
    return torch.cat([part.reshape(-1, width) for part in mixed])


def _attend(qkv: Tensor, scale: float, dropout: float) -> Tensor:
    """``(windows, tokens, 3, heads, head_dim)`` → ``(windows, tokens, heads, head_dim)``."""
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and not dropout:
        mixed: Tensor = _BlockedAttention.apply(qkv, scale)  # type: ignore[no-untyped-call]
        return mixed
    width = qkv.shape[-1]
    if qkv.device.type == "cuda" and qkv.dtype != torch.float32 and width % 8:
        # The memory-efficient kernel needs head_dim % 8 == 0; zero channels change no product.
        qkv = F.pad(qkv, (0, -width % 8))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)[..., :width]


class _BlockedAttention(torch.autograd.Function):
    """Attention over a few windows at a time; only ``qkv`` is saved for the backward pass."""

    @staticmethod
    def forward(ctx, qkv: Tensor, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        windows, tokens, _, heads, width = qkv.shape
        step = max(1, CACHE_BYTES // (heads * tokens * tokens * qkv.element_size()))
        out = qkv.new_empty(windows, tokens, heads, width)
        for start in range(0, windows, step):
            q, k, v = _per_head(qkv[start : start + step])
            weights = torch.softmax(torch.bmm(q * scale, k.transpose(1, 2)), -1)
            mixed = torch.bmm(weights, v).view(-1, heads, tokens, width)
            out[start : start + step] = mixed.transpose(1, 2)
        ctx.save_for_backward(qkv)
        ctx.scale, ctx.step = scale, step
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (qkv,) = ctx.saved_tensors
        windows, tokens, _, heads, width = qkv.shape
        result = torch.empty_like(qkv)
        for start in range(0, windows, ctx.step):
            part = slice(start, start + ctx.step)
            q, k, v = _per_head(qkv[part])
            q = q * ctx.scale
            weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1)
            out = grad[part].transpose(1, 2).reshape(-1, tokens, width)
            d_value = torch.bmm(weights.transpose(1, 2), out)
            d_weights = torch.bmm(out, v.transpose(1, 2))
            d_logits = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, qkv.dtype)
            d_query = torch.bmm(d_logits, k) * ctx.scale
            d_key = torch.bmm(d_logits.transpose(1, 2), q)
            stacked = torch.stack([d_query, d_key, d_value]).view(3, -1, heads, tokens, width)
            result[part] = stacked.permute(1, 3, 0, 2, 4)
        return result, None


def _per_head(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(w, n, 3, heads, d)`` → three ``(w · heads, n, d)``."""
    _, tokens, _, _, width = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, -1, tokens, width).unbind(0)
    return q, k, v
